"""Patch one modeling module: install everything at once, take it back object by object."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gdn_ops.compat.transformers import token
from gdn_ops.compat.transformers.discovery import architecture_of
from gdn_ops.compat.transformers.examine import HELD, PACKAGE, Plan
from gdn_ops.compat.transformers.norm import gated_norm
from gdn_ops.compat.transformers.padding import with_context
from gdn_ops.compat.transformers.positions import with_positions
from gdn_ops.compat.transformers.signatures import parameter_names
from gdn_ops.compat.transformers.split_calls import layer_arguments, model_arguments, with_split
from gdn_ops.compat.transformers.split_layers import (
    REGISTRY,
    attention_arguments,
    has_attention_functions,
    registry_with_split,
)
from gdn_ops.parallel.foreign_models import SEES_SPLIT
from gdn_ops.spec.ops import GATED_DELTA_STEP

_MISSING = object()


class User(Protocol):
    """Describe a user of a patch: the backend to run on, and the account of calls."""

    backend: str
    calls: Counter[tuple[str, str, str]]


class Site:
    """Patch one modeling module while it has a user; calls run for the latest user.

    Attributes:
        module: the module.
        architecture: the model folder it is of.
        plan: what is replaced.
        users: who uses the patch, the latest last.
        originals: the replaced objects, as (owner, name, object).
    """

    known: ClassVar[dict[str, Site]] = {}
    """The sites of this process by the name of their module."""

    def __init__(self, module: ModuleType, plan: Plan) -> None:
        self.module, self.plan = module, plan
        self.architecture = architecture_of(module.__name__) or module.__name__
        self.users: list[User] = []
        self.originals: list[tuple[Any, str, Any]] = []
        Site.known[module.__name__] = self

    def add(self, user: User) -> None:
        """Patch the module for a user."""
        self.users.append(user)
        if len(self.users) == 1:
            self._install()

    def remove(self, user: User) -> None:
        """Forget a user; undo the patch when the last one is gone."""
        self.users.remove(user)
        if not self.users:
            for owner, name, original in reversed(self.originals):
                if original is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
            self.originals.clear()
            self._forget_graphs()

    def replaced(self) -> list[str]:
        """Return the names of the replaced objects."""
        return [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _ in self.originals]

    def backend(self) -> str:
        """Return the name of the latest user's backend."""
        return self.users[-1].backend

    def note(self, op: str, backend: str) -> None:
        """Count a call in the account of the latest user."""
        _count(self.module.__name__, op, backend)

    def _install(self) -> None:
        plan = self.plan
        new = {name: rule.replacement(self.backend, self.note) for name, rule in plan.rules.items()}
        for name, function in new.items():
            self._set(self.module, name, function, plan.rules[name].original)
        for name, make in plan.convolutions.items():
            self._set(self.module, name, make(self.backend), vars(self.module)[name])
        for cls in plan.norms:
            self._set(cls, "forward", gated_norm(vars(cls)["forward"], self.backend))
        for model, names in plan.models:
            self._set(model, "forward", self._model_forward(vars(model)["forward"], names))
        for layer in plan.layers:
            forward = vars(layer.cls)["forward"]
            advance = self._advance if layer.left is None else None
            wrapped = with_context(forward, layer.parameters, layer.holds, advance)
            prepare = functools.partial(layer_arguments, plan.obstacle)
            wrapped = with_split(forward, layer.parameters, prepare, wrapped)
            self._set(layer.cls, "forward", wrapped)
            if layer.holds:
                for name, attribute in HELD.items():
                    replaced = (plan.rules[name].original, vars(self.module).get(PACKAGE[name]))
                    self._set(layer.cls, attribute, _held(attribute, replaced, new[name]))
        self._install_attention()
        self._forget_graphs()

    def _model_forward(self, forward: Any, names: tuple[str, ...]) -> Any:
        """Return the replacement of a model's forward, whose parameters have these names."""
        prepare = functools.partial(model_arguments, self.plan.obstacle)
        wrapped = with_split(forward, names, prepare, with_positions(forward, names))
        setattr(wrapped, SEES_SPLIT, True)
        return wrapped

    def _install_attention(self) -> None:
        """Let attention compute on split tokens, inside of sequence_parallel alone."""
        if has_attention_functions(self.module):
            self._set(self.module, REGISTRY, registry_with_split(vars(self.module)[REGISTRY]))
        prepare = functools.partial(attention_arguments, self.plan.obstacle)
        for cls in self.plan.attentions:
            forward = vars(cls)["forward"]
            wrapped = with_split(forward, parameter_names(forward), prepare)
            self._set(cls, "forward", wrapped)

    def _advance(self, layer: nn.Module, named: dict[str, Any]) -> Tensor | None:
        """Advance a layer by one token, and count that as a step of the rule."""
        y = token.advance(layer, named, self.backend())
        if y is not None:
            self.note(GATED_DELTA_STEP.name, "cpp")
        return y

    def _forget_graphs(self) -> None:
        """Drop the compiled graphs, which would not notice the change of a class.

        A graph checks the globals that it was made with, but not the attributes of a class.
        """
        if any(layer.holds for layer in self.plan.layers) and "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def _set(self, owner: Any, name: str, value: Any, original: Any = None) -> None:
        if original is None:
            original = vars(owner).get(name, _MISSING)
        self.originals.append((owner, name, original))
        setattr(owner, name, value)


def _count(module: str, op: str, backend: str) -> None:
    site = Site.known[module]
    site.users[-1].calls[site.architecture, op, backend] += 1


# Do as torch.compiler.assume_constant_result does: run while tracing, and leave no code in the
# graph. It can be done with plain values only.
_count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _held(attribute: str, originals: Iterable[Any], new: Any) -> property:
    """Return a property that shows `new` wherever a layer holds one of the originals.

    A property of the class takes precedence over what its instances hold, so that models which are
    loaded already are reached, and nothing of theirs is changed. A model that is built meanwhile
    holds the original as well.
    """
    replaced = [original for original in originals if original is not None]

    def get(layer: nn.Module) -> Any:
        # torch.compile of torch 2.11 and older takes `vars(layer)[attribute]` for the attribute,
        # which is this property.
        held = super(nn.Module, layer).__getattribute__("__dict__")[attribute]
        return new if any(held is original for original in replaced) else held

    def set_(layer: nn.Module, value: Any) -> None:
        vars(layer)[attribute] = replaced[0] if value is new else value

    return property(get, set_)
