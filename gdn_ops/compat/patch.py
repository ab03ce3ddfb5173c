"""The patch of one modeling module: installed whole or not at all, taken back object by object."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gdn_ops.compat import layer_parts, modeling
from gdn_ops.compat.delta_rule import delta_rule, packed_sequences
from gdn_ops.errors import SpecError

_MISSING = object()

_CONVOLUTIONS = {
    "causal_conv1d_fn": layer_parts.whole_convolution,
    "causal_conv1d_update": layer_parts.convolution_update,
}

_current = threading.local()
"""`mask`: the padding mask of the layer that runs in this thread, which its functions need."""


class User(Protocol):
    """Whoever asked for the patch: the backend to run on, and the account of calls."""

    backend: str
    calls: Counter[tuple[str, str, str]]


class Site:
    """One modeling module. Patched while somebody uses it; calls run for the latest user.

    Attributes:
        architecture: its name.
        module: the module.
        users: who uses the patch, the latest last.
        originals: what was replaced: (owner, name, the object).
    """

    known: ClassVar[dict[str, Site]] = {}
    """The sites of this process by architecture."""

    def __init__(self, architecture: str, module: ModuleType) -> None:
        self.architecture = architecture
        self.module = module
        self.users: list[User] = []
        self.originals: list[tuple[Any, str, Any]] = []

    def add(self, user: User) -> None:
        """Patch the module for a user."""
        self.users.append(user)
        if len(self.users) == 1:
            self._install()

    def remove(self, user: User) -> None:
        """Forget a user; the last one takes the patch along."""
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
        """Return the names of what is replaced."""
        return [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _ in self.originals]

    def note(self, op: str, backend: str) -> None:
        """Count a call in the account of the latest user."""
        _count(self.architecture, op, backend)

    def _install(self) -> None:
        functions = {name: getattr(self.module, name) for name in modeling.HELD}
        new = {name: self._function(name, old) for name, old in functions.items()}
        layers = modeling.layers(self.module)
        for name, function in new.items():
            self._set(self.module, name, function)
        for name in modeling.convolutions(self.module):
            self._set(self.module, name, _CONVOLUTIONS[name](getattr(self.module, name)))
        for cls in modeling.gated_norms(self.module):
            self._set(cls, "forward", layer_parts.gated_norm(cls.forward))
        for layer in layers:
            self._set(layer, "forward", _with_mask(layer.forward))
            if modeling.holds(layer):
                for name, attribute in modeling.HELD.items():
                    self._set(layer, attribute, _held(attribute, functions[name], new[name]))
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Drop compiled graphs that would not notice the change.

        A graph checks the globals that it was made with, but not the attributes of a class.
        """
        is_held = any(modeling.holds(layer) for layer in modeling.layers(self.module))
        if is_held and "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def _function(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return what stands in the module instead of one of the two functions."""

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            chunk_size: int | None,
            initial_state: Tensor | None,
            output_final_state: bool,
            use_qk_l2norm_in_kernel: bool,
            options: dict[str, Any],
        ) -> tuple[Tensor, Tensor | None]:
            return delta_rule(
                query,
                key,
                value,
                g,
                beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                mask=_mask_for(query),
                cu_seqlens=packed_sequences(options),
                chunk_size=chunk_size,
                backend=self.users[-1].backend,
                note=self.note,
            )

        def chunk(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            chunk_size: int | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            state = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
            return run(query, key, value, g, beta, chunk_size, *state, options)

        def recurrent(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            state = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
            return run(query, key, value, g, beta, None, *state, options)

        return chunk if name == modeling.CHUNK else recurrent


def _count(architecture: str, op: str, backend: str) -> None:
    Site.known[architecture].users[-1].calls[architecture, op, backend] += 1


# What torch.compiler.assume_constant_result does: run while tracing, and leave no code in the
# graph. It can be done with plain values only.
_count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _mask_for(query: Tensor) -> Tensor | None:
    """Return the mask of the running layer, if it is one for these tokens."""
    mask: Tensor | None = getattr(_current, "mask", None)
    return mask if mask is not None and mask.shape == query.shape[:2] else None


def _held(attribute: str, original: Any, new: Any) -> property:
    """Return a property that shows `new` wherever a layer holds `original`.

    A property of the class goes before what its instances hold, so that models which are loaded
    already are reached, and nothing of theirs is changed. One that is built meanwhile holds the
    original as well.
    """

    def get(layer: nn.Module) -> Any:
        held = vars(layer)[attribute]
        return new if held is original else held

    def set_(layer: nn.Module, value: Any) -> None:
        vars(layer)[attribute] = original if value is new else value

    return property(get, set_)


def _with_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer's forward that lets its functions see the padding mask."""
    names = tuple(inspect.signature(forward).parameters)[2:]

    @functools.wraps(forward)
    def masked_forward(
        self: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any
    ) -> Any:
        keywords.update(zip(names, arguments, strict=False))
        mask, cache = keywords.get("attention_mask"), keywords.get("cache_params")
        if cache is not None and not torch.compiler.is_compiling():
            _check_padding(self, cache, mask)
        outer = getattr(_current, "mask", None)
        _current.mask = mask
        try:
            return forward(self, hidden_states, **keywords)
        finally:
            _current.mask = outer

    return masked_forward


_PADDED = "_gdn_ops_right_padded"
"""Attribute of a cache: the row that was padded on the right, by the index of the layer."""


def _check_padding(layer: nn.Module, cache: Any, mask: Tensor | None) -> None:
    """Refuse to continue from a cache that was filled from rows padded on the right.

    Its memory is right, since padding is the identity, but its convolution would go on from the
    padding. Filling one is fine: training and scoring do, and never look at it again.
    """
    index: Any = layer.layer_idx
    padded: dict[Any, int] = vars(cache).setdefault(_PADDED, {})
    if not _continues(cache, index):
        padded.pop(index, None)
    elif index in padded:
        raise SpecError(
            f"accelerate: attention_mask of the call that filled the cache has padding on the "
            f"right in row {padded[index]}, should have it on the left: the short convolution "
            f"would continue from the padding; tokenizer.padding_side = 'left'"
        )
    if mask is not None:
        kept = mask.ne(0)
        rows = (kept[:, :-1] & ~kept[:, 1:]).any(1).nonzero()
        if len(rows):
            padded[index] = int(rows[0])


def _continues(cache: Any, index: Any) -> bool:
    """Return whether a cache holds a state of a layer; caches ask for its index or not."""
    has_previous = cache.has_previous_state
    if not callable(has_previous):
        return bool(has_previous)
    takes_index = bool(inspect.signature(has_previous).parameters)
    return bool(has_previous(index) if takes_index else has_previous())
