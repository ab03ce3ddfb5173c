"""Advance a layer by one decoded token in one call of the C++ library, between its projections.

A layer is known by the names of its projections, and tried: its own forward, with the functions of
transformers, must give the same output and the same states. Its projections are called as modules,
whatever they have become: quantised, or with adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.backends.cpp import layer_token as kernel
from gdn_ops.backends.cpp.library import missing
from gdn_ops.compat.transformers.norm import GATES
from gdn_ops.compat.transformers.packing import is_packed
from gdn_ops.compat.transformers.trial import difference, drawn, plain_torch
from gdn_ops.nn import kernels

_INTERLEAVED = ("in_proj_qkvz", "in_proj_ba")
_JOINED = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_SINGLE = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")

_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
_CACHE = (
    "get_conv_state",
    "get_recurrent_state",
    "is_recording_past",
    "update_recurrent_state",
)
"""Methods of a cache that are called; releases before 5.24 have other ones."""


def projections_of(layer: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the projections of a layer of a kind that is known, or None."""
    kinds = (_INTERLEAVED, _JOINED, _SINGLE)
    return next((names for names in kinds if all(hasattr(layer, n) for n in names)), None)


def project(
    layer: Any, names: tuple[str, ...], sizes: kernel.Sizes, x: Tensor
) -> tuple[list[Tensor], kernel.Projections]:
    """Project a token; return the results, and where the heads of each lie in them."""
    H, R, K, V = sizes
    made = [getattr(layer, name)(x) for name in names]
    made = [y if y.stride(-1) == 1 else y.contiguous() for y in made]
    values, heads = R * V, kernel.heads
    if names == _INTERLEAVED:
        qkvz, ba = made
        width = 2 * K + 2 * values
        given = kernel.Projections(
            q=heads(qkvz, width),
            k=heads(qkvz, width, first=K),
            v=heads(qkvz, width, V, 2 * K),
            z=heads(qkvz, width, V, 2 * K + values),
            b=heads(ba, 2 * R),
            a=heads(ba, 2 * R, first=R),
        )
    elif names == _JOINED:
        qkv, z, b, a = made
        given = kernel.Projections(
            q=heads(qkv, K),
            k=heads(qkv, K, first=H * K),
            v=heads(qkv, values, V, 2 * H * K),
            z=heads(z, values, V),
            b=heads(b, R),
            a=heads(a, R),
        )
    else:
        q, k, v, z, b, a = made
        given = kernel.Projections(
            q=heads(q, K),
            k=heads(k, K),
            v=heads(v, values, V),
            z=heads(z, values, V),
            b=heads(b, R),
            a=heads(a, R),
        )
    return made, given


def parameters_of(layer: Any) -> kernel.Parameters | None:
    """Return what a layer computes with, or None where the kernel does not compute it."""
    norm, conv = getattr(layer, "norm", None) or getattr(layer, "o_norm", None), layer.conv1d
    gate = GATES.get(getattr(norm, "activation", "silu"))
    if (
        norm is None
        or gate is None
        or layer.activation not in ("silu", "swish")
        or not kernels.is_bare(conv, nn.Conv1d)
        or not kernels.is_bare(norm, type(norm))
    ):
        return None
    return kernel.Parameters(
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        weight=conv.weight[:, 0],
        bias=conv.bias,
        norm=norm.weight,
        eps=norm.variance_epsilon,
        gate=gate,
        beta_factor=2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0,
    )


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
        or named.get("attention_mask") is not None
        or is_packed(named)
        or not all(hasattr(cache, name) for name in _CACHE)
        or not kernels.may_run(backend, x)
    ):
        return None
    index = layer.layer_idx
    inputs = cache.get_conv_state(index, state_idx=0)
    state = cache.get_recurrent_state(index, state_idx=0)
    parameters = parameters_of(layer)
    if inputs is None or state is None or parameters is None or cache.is_recording_past(index):
        return None
    H, HV, K, V = (getattr(layer, name) for name in _SIZES)
    tensors = (inputs, state, *(p for p in parameters if isinstance(p, Tensor)))
    if not kernels.may_run("cpp", *tensors) or kernels.needs_grad(x, *tensors):
        return None
    taps = parameters.weight.shape[1] if parameters.weight is not None else 1
    is_whole = state.stride()[2:] == (V, 1) and tuple(state.shape) == (len(x), HV, K, V)
    if not is_whole or inputs.shape[0] != len(x) or inputs.shape[2] < taps - 1:
        return None
    names, sizes = projections_of(layer), kernel.Sizes(H, HV // H, K, V)
    made, given = project(layer, names or (), sizes, x)
    if not kernels.may_run("cpp", *made) or kernels.needs_grad(*made):
        return None
    o = kernel.token(len(x), sizes, given, parameters, (inputs,) * 2, (state,) * 2, made[0].dtype)
    # The state was advanced in place: the cache copies a tensor to itself, which is nothing.
    cache.update_recurrent_state(state, index)
    y: Tensor = _output_projection(layer)(o)
    return y


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


_CONFIG = {
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
}
"""Settings that layers read of their configuration; a layer that reads more is left."""


def incompatibility_of(cls: type[nn.Module]) -> str | None:
    """Try to advance a layer of a class; return why it is left, or None.

    The class has its own forward, and its module the functions of transformers.
    """
    reason = missing()
    if reason is not None:
        return reason
    maker: Any = cls
    with plain_torch():
        try:
            layer = maker(SimpleNamespace(**_CONFIG), 0)
            for x, drawing in zip(layer.parameters(), _drawings(layer), strict=True):
                x.copy_(drawing)
            own, ours = _example(), _example()
        except Exception as error:
            return f"cannot be tried: {type(error).__name__}: {error}"
        if projections_of(layer) is None:
            return "its projections are not known"
        return difference(
            lambda: [layer(**own), own["cache"].inputs, own["cache"].state],
            lambda: [_advanced(layer, ours), ours["cache"].inputs, ours["cache"].state],
        )


def _drawings(layer: nn.Module) -> list[Tensor]:
    return drawn(*(tuple(x.shape) for x in layer.parameters()))


def _example() -> dict[str, Any]:
    """Return the arguments of a call for one token of two rows, with states of their own."""
    channels = 2 * 2 * 4 + 4 * 6
    x, inputs, state = drawn((2, 1, 8), (2, channels, 3), (2, 4, 4, 6))
    return {"hidden_states": x, "cache": _Cache(inputs, state)}


def _advanced(layer: nn.Module, named: dict[str, Any]) -> Tensor:
    y = advance(layer, named, "cpp")
    if y is None:
        raise ValueError("it is of another kind")
    return y
