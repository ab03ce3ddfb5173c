"""What a modeling module of transformers must look like, for its delta rule to be replaced.

Signatures are checked, not versions. Since 5.16 a layer looks the two functions up in its module
at every call; before, every layer held references, made when it was built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

ARCHITECTURES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen4_exp")
"""Model folders of transformers whose layers call the two functions."""

CHUNK = "torch_chunk_gated_delta_rule"
RECURRENT = "torch_recurrent_gated_delta_rule"

HELD = {CHUNK: "chunk_gated_delta_rule", RECURRENT: "recurrent_gated_delta_rule"}
"""Attribute of a layer that holds each function, where layers hold them."""

_LEADING = ("query", "key", "value", "g", "beta")
_TRAILING = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
PARAMETERS = {CHUNK: (*_LEADING, "chunk_size", *_TRAILING), RECURRENT: (*_LEADING, *_TRAILING)}
"""Names of the parameters of each function, in order; `**kwargs` may follow."""

LAYER_PARAMETERS = ("hidden_states", "cache_params", "attention_mask")
"""Parameters that the forward of a layer must have, in any order."""


def module_name(architecture: str) -> str:
    """Return the name of the modeling module of an architecture."""
    return f"transformers.models.{architecture}.modeling_{architecture}"


def objections(module: ModuleType) -> list[str]:
    """Return every reason why the delta rule of a modeling module cannot be replaced."""
    found = []
    for name, expected in PARAMETERS.items():
        function = getattr(module, name, None)
        if not callable(function):
            found.append(f"it has no function {name}")
            continue
        against = _signature_objection(function, expected)
        if against is not None:
            found.append(f"{name} {against}")
    if found:
        return found
    found_layers = layers(module)
    if not found_layers:
        found.append(f"no layer calls {CHUNK} and {RECURRENT}")
    for layer in found_layers:
        parameters = inspect.signature(layer.forward).parameters
        missing = [name for name in LAYER_PARAMETERS if name not in parameters]
        if missing:
            found.append(f"{layer.__name__}.forward has no {', '.join(missing)}")
    return found


def _signature_objection(function: Callable[..., Any], expected: tuple[str, ...]) -> str | None:
    """Return what is different about a signature, or None."""
    # A function that the package `kernels` wrapped is a module, whose forward has the signature.
    target = type(function).forward if isinstance(function, nn.Module) else function
    parameters = dict(inspect.signature(target).parameters)
    parameters.pop("self", None)
    keywords = [n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for name in keywords:
        del parameters[name]
    if tuple(parameters) != expected:
        return f"takes ({', '.join(parameters)}), should take ({', '.join(expected)})"
    for name, parameter in parameters.items():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return f"takes {name} by {parameter.kind.description} only"
    return None


def layers(module: ModuleType) -> list[type[nn.Module]]:
    """Return the classes of a module whose forward calls both functions, or holds of them."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls.__module__ == module.__name__
        and "forward" in vars(cls)
        and (_mentions(cls, tuple(HELD)) or holds(cls))
    ]


def holds(layer: type[nn.Module]) -> bool:
    """Return whether a layer calls the functions through its own attributes."""
    return _mentions(layer, tuple(HELD.values()))


def _mentions(layer: type[nn.Module], names: tuple[str, ...]) -> bool:
    code = getattr(inspect.unwrap(layer.forward), "__code__", None)
    return code is not None and set(names) <= set(code.co_names)
