"""What a modeling module of transformers must look like, for its delta rule to be replaced.

Signatures are checked, not versions. Since 5.16 a layer looks the two functions up in its module
at every call; before, every layer held references, made when it was built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gdn_ops.nn.norm import gated_rms_norm

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

CONVOLUTIONS = {
    "causal_conv1d_fn": ("hidden_states", "weight", "bias", "activation"),
    "causal_conv1d_update": ("hidden_states", "conv_state", "weight", "bias", "activation"),
}
"""Functions in front of the delta rule, and their parameters: faster on CPUs if they are there."""

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


def convolutions(module: ModuleType) -> tuple[str, ...]:
    """Return the names of the convolutions of a module that look as they should."""
    found = []
    for name, expected in CONVOLUTIONS.items():
        function = getattr(module, name, None)
        if callable(function) and _signature_objection(function, expected) is None:
            found.append(name)
    return tuple(found)


def gated_norms(module: ModuleType) -> list[type[nn.Module]]:
    """Return the classes of a module that compute the gated norm of `nn.GatedRMSNorm`.

    What a class computes is not seen from its signature: one is tried.
    """
    return [
        cls
        for name, cls in vars(module).items()
        if name.endswith("RMSNormGated")
        and inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls.__module__ == module.__name__
        and tuple(inspect.signature(cls.forward).parameters) == ("self", "hidden_states", "gate")
        and _is_gated_norm(cls)
    ]


def _is_gated_norm(cls: type[nn.Module]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 3, 4, generator=generator)
    try:
        norm: Any = cls(4, eps=0.5)
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1.0, 5.0))
            found = norm(x, gate)
            expected = gated_rms_norm(x, norm.weight, gate, eps=norm.variance_epsilon)
    except (TypeError, AttributeError, RuntimeError):
        return False
    return norm.variance_epsilon == 0.5 and torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


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
