"""Examine a modeling module: find the parts that gdn_ops can replace, and why not the rest.

Only the two functions of the delta rule are required, by what their parameters begin with. The
convolution, the gated norm and the padding mask are found by what they are, tried, and left to
transformers where they do not fit. Versions are never looked at.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from gdn_ops.compat.transformers import convolution, norm, token
from gdn_ops.compat.transformers.discovery import (
    CHUNK,
    FUNCTIONS,
    RECURRENT,
    architecture_of,
    pair_of,
)
from gdn_ops.compat.transformers.padding import MASK
from gdn_ops.compat.transformers.positions import INPUTS, POSITIONS
from gdn_ops.compat.transformers.rule import Rule, examine_rule
from gdn_ops.compat.transformers.signatures import mentions, modules_of, parameter_names
from gdn_ops.compat.transformers.split_layers import attention_classes, obstacle
from gdn_ops.parallel.context import suspended

HELD = {CHUNK: "chunk_gated_delta_rule", RECURRENT: "recurrent_gated_delta_rule"}
"""Attribute of a layer that holds each function, where layers hold them: before 5.15."""

PACKAGE = {CHUNK: "chunk_gated_delta_rule", RECURRENT: "fused_recurrent_gated_delta_rule"}
"""Name in such a module of the function of the package fla, which a layer holds if it is there."""


@dataclass(frozen=True)
class Layer:
    """Describe a class whose forward runs the delta rule.

    Attributes:
        cls: the class.
        parameters: names of the parameters of its forward, in order, without `self`.
        holds: whether it calls the functions through attributes of its own.
        left: why one token is not advanced in one call between the projections, or None.
    """

    cls: type[nn.Module]
    parameters: tuple[str, ...]
    holds: bool
    left: str | None


@dataclass(frozen=True)
class Plan:
    """Hold the parts of a module that can be replaced, and those that cannot.

    Attributes:
        rules: the two functions, by name.
        layers: the classes that run them.
        models: the classes that take tokens, a mask and positions, with their parameters' names.
        convolutions: the replacement of each convolution, by name.
        norms: the classes whose forward is replaced.
        attentions: the classes that call an attention function.
        obstacle: why tokens cannot be split over ranks, or None.
        left: parts that are there and do not fit, each with the reason.
        absent: parts that this release does not have.
    """

    rules: dict[str, Rule]
    layers: list[Layer]
    models: list[tuple[type[nn.Module], tuple[str, ...]]]
    convolutions: dict[str, Any]
    norms: list[type[nn.Module]]
    attentions: list[type[nn.Module]]
    obstacle: str | None
    left: list[str]
    absent: list[str]


def examine(module: ModuleType) -> Plan | list[str]:
    """Return the plan of a module, or every reason why its delta rule cannot be replaced."""
    with suspended():
        return _examined(module)


def _examined(module: ModuleType) -> Plan | list[str]:
    pair = pair_of(module)
    examined = {name: examine_rule(name, vars(module).get(name)) for name in pair}
    rules = {name: rule for name, rule in examined.items() if isinstance(rule, Rule)}
    if len(rules) < len(pair):
        return [rule for rule in examined.values() if isinstance(rule, str)]
    layers, left = _layers(module, pair), []
    if not layers:
        left.append(f"the padding mask: no layer calls {' and '.join(pair)}")
    left += [
        f"the padding mask: {layer.cls.__name__}.forward has no {MASK}"
        for layer in layers
        if MASK not in layer.parameters
    ]
    convolutions: dict[str, Any] = {}
    absent = []
    for name in convolution.PARAMETERS:
        # A layer that holds its functions does not look its convolution up in the module either.
        is_held = any(layer.holds for layer in layers)
        new = None if is_held else convolution.examine_convolution(name, module)
        if new is None:
            absent.append(f"{name}: layers of this release do not call such a function")
        elif isinstance(new, str):
            left.append(new)
        else:
            convolutions[name] = new
    norms = []
    for cls in norm.candidates(module):
        incompatibility = norm.incompatibility_of(cls)
        if incompatibility is None:
            norms.append(cls)
        else:
            left.append(incompatibility)
    architecture = architecture_of(module.__name__) or module.__name__
    return Plan(
        rules=rules,
        layers=layers,
        models=_models(module),
        convolutions=convolutions,
        norms=norms,
        attentions=attention_classes(module),
        obstacle=obstacle(module, architecture, convolutions),
        left=left,
        absent=absent,
    )


def _models(module: ModuleType) -> list[tuple[type[nn.Module], tuple[str, ...]]]:
    """Return the classes of a module that take tokens, a mask and positions."""
    named = ((cls, parameter_names(vars(cls)["forward"])) for cls in modules_of(module))
    wanted = {MASK, POSITIONS, *INPUTS}
    return [(cls, names) for cls, names in named if wanted <= set(names)]


def _layers(module: ModuleType, pair: tuple[str, str]) -> list[Layer]:
    """Return the layers of a module: classes that call, or hold, both functions."""
    layers = []
    for cls in modules_of(module):
        methods = [f for f in vars(cls).values() if inspect.isfunction(f)]
        may_hold = pair == FUNCTIONS
        holds = may_hold and any(mentions(f, tuple(HELD.values())) for f in methods)
        if holds or any(mentions(f, pair) for f in methods if f.__name__ != "__init__"):
            reason = token.incompatibility_of(cls)
            layers.append(Layer(cls, parameter_names(vars(cls)["forward"]), holds, reason))
    return layers
