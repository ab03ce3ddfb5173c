"""Advance a layer by one decoded token in one call of the C++ library, between its projections.

A layer is known by the names of its parts, and tried: its own forward, with the functions of
transformers, must give the same output and the same states.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.backends.cpp import layer_token as kernel
from gdn_ops.backends.cpp.library import missing
from gdn_ops.compat.transformers.layer_projections import (
    parameters_of,
    project,
    projections_of,
    sizes_of,
)
from gdn_ops.compat.transformers.packing import is_packed
from gdn_ops.compat.transformers.trial import difference, drawn, plain_torch
from gdn_ops.nn import kernels

_CACHE = (
    "get_conv_state",
    "get_recurrent_state",
    "is_recording_past",
    "update_recurrent_state",
)
"""Methods of a cache that are called; releases before 5.24 have other ones."""


def advance(layer: Any, named: dict[str, Any], backend: str) -> Tensor | None:
    """Return the output of a layer for one token, its cache advanced; None for another call.

    Args:
        layer: of a class that `incompatibility_of` was asked about.
        named: the arguments of its forward by name.
        backend: that of the rule.
    """
    x, cache = named.get("hidden_states"), named.get("cache")
    if (
        torch.compiler.is_compiling()
        or cache is None
        or not isinstance(x, Tensor)
        or x.dim() != 3
        or x.shape[1] != 1
        or is_packed(named)
        or not all(hasattr(cache, name) for name in _CACHE)
        or not kernels.may_run(backend, x)
        or not _has_no_padding(named.get("attention_mask"), x)
    ):
        return None
    index = layer.layer_idx
    inputs = cache.get_conv_state(index, state_idx=0)
    state = cache.get_recurrent_state(index, state_idx=0)
    parameters = parameters_of(layer)
    if inputs is None or state is None or parameters is None or cache.is_recording_past(index):
        return None
    names, sizes = projections_of(layer), sizes_of(layer)
    H, R, K, V = sizes
    tensors = (inputs, state, *(p for p in parameters if isinstance(p, Tensor)))
    if not kernels.may_run("cpp", *tensors) or kernels.needs_grad(x, *tensors):
        return None
    taps = parameters.weight.shape[1] if parameters.weight is not None else 1
    is_whole = state.stride()[2:] == (V, 1) and tuple(state.shape) == (len(x), H * R, K, V)
    if not is_whole or inputs.shape[0] != len(x) or inputs.shape[2] < taps - 1:
        return None
    made, given = project(layer, names or (), sizes, x)
    if not kernels.may_run("cpp", *made) or kernels.needs_grad(*made):
        return None
    o = kernel.token(len(x), sizes, given, parameters, (inputs,) * 2, (state,) * 2, made[0].dtype)
    # The state was advanced in place: the cache copies a tensor to itself, which is nothing.
    cache.update_recurrent_state(state, index)
    y: Tensor = _output_projection(layer)(o)
    return y


def _has_no_padding(mask: Any, x: Tensor) -> bool:
    """Return whether a mask is none, or says of every row that its token is no padding."""
    if mask is None:
        return True
    if type(mask) is not Tensor or not mask.is_cpu or mask.shape != x.shape[:2]:
        return False
    return bool(mask.eq(1).all())


def _output_projection(layer: Any) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = getattr(layer, "out_proj", None) or layer.o_proj
    return found


class _Cache:
    """Hold the states of one layer, as a cache of transformers does."""

    def __init__(self, inputs: Tensor, state: Tensor) -> None:
        self.inputs, self.state = inputs, state

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.state

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return True

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.state.copy_(states)


_CONFIG: dict[str, Any] = {
    "hidden_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "linear_allow_neg_eigval": True,
    "linear_a_log_min": 0.1,
    "linear_a_log_max": 4.0,
    "linear_dt_min": 0.01,
    "linear_dt_max": 0.1,
    "linear_dt_init_floor": 1e-4,
    "hidden_act": "silu",
    "output_gate_type": None,
    "rms_norm_eps": 0.1,
    "layer_types": ["linear_attention"],
    "linear_head_dim": 4,
    "linear_num_heads": 3,
    "kda_safe_gate": True,
    "kda_lower_bound": -2.0,
    "linear_lower_bound": -2.0,
}
"""Settings that layers read of their configuration; a layer that reads more is left."""

_UNBOUNDED = {"kda_safe_gate": False, "linear_lower_bound": None}
"""Settings of a gate without a bound, where layers have both."""


def incompatibility_of(cls: type[nn.Module]) -> str | None:
    """Try to advance a layer of a class; return why it is left, or None.

    The class has its own forward, and its module the functions of transformers.
    """
    reason = missing()
    if reason is not None:
        return reason
    reasons = (_difference_of(cls, _CONFIG | more) for more in ({}, _UNBOUNDED))
    return next((reason for reason in reasons if reason is not None), None)


def _difference_of(cls: type[nn.Module], settings: dict[str, Any]) -> str | None:
    """Try to advance a layer of a class with some settings; return why it is left, or None."""
    maker: Any = cls
    with plain_torch():
        try:
            layer = maker(SimpleNamespace(**settings), 0)
            for x, drawing in zip(layer.parameters(), _drawings(layer), strict=True):
                x.copy_(drawing)
            if projections_of(layer) is None:
                return "its projections are not known"
            own, ours = _example(layer), _example(layer)
        except Exception as error:
            return f"cannot be tried: {type(error).__name__}: {error}"
        return difference(
            lambda: [layer(**own), own["cache"].inputs, own["cache"].state],
            lambda: [_advanced(layer, ours), ours["cache"].inputs, ours["cache"].state],
        )


def _drawings(layer: nn.Module) -> list[Tensor]:
    return drawn(*(tuple(x.shape) for x in layer.parameters()))


def _example(layer: nn.Module) -> dict[str, Any]:
    """Return the arguments of a call for one token of two rows, with states of their own."""
    H, R, K, V = sizes_of(layer)
    channels = 2 * H * K + H * R * V
    x, inputs, state = drawn((2, 1, 8), (2, channels, 3), (2, H * R, K, V))
    return {"hidden_states": x, "cache": _Cache(inputs, state)}


def _advanced(layer: nn.Module, named: dict[str, Any]) -> Tensor:
    y = advance(layer, named, "cpp")
    if y is None:
        raise ValueError("it is of another kind")
    return y
