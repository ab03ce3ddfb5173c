"""Read the layers that advance by one token: their projections, sizes and parameters.

A layer is known by the names of its parts. Projections are called as modules, whatever they have
become: quantised, or with adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gdn_ops.backends.cpp import layer_token as kernel
from gdn_ops.compat.transformers.norm import GATES
from gdn_ops.nn import kernels

INTERLEAVED = ("in_proj_qkvz", "in_proj_ba")
JOINED = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
SINGLE = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
CHANNELS = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "forget_gate.f_proj")
"""Of a layer with a decay of every key channel."""

NARROW = (
    *("q_proj", "k_proj", "v_proj", "g_a_proj g_b_proj", "b_proj"),
    "forget_gate.f_a_proj forget_gate.f_b_proj",
)
"""The same, with two projections one after the other for a wide one."""

_OF_HEADS, _OF_CHANNELS = (INTERLEAVED, JOINED, SINGLE), (CHANNELS, NARROW)

_CHAINS: dict[tuple[str, ...], list[list[list[str]]]] = {
    names: [[path.split(".") for path in chain.split()] for chain in names]
    for names in (*_OF_HEADS, *_OF_CHANNELS)
}
"""The paths to the projections that are applied one after the other, of a kind of layer."""

_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


def projections_of(layer: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the projections of a layer of a kind that is known, or None."""
    kinds = _OF_HEADS if _forget_gate(layer) is None else _OF_CHANNELS
    for names in kinds:
        if all(_part(layer, path) is not None for chain in _CHAINS[names] for path in chain):
            return names
    return None


def _forget_gate(layer: nn.Module) -> Any:
    """Return the module of the decay of key channels, or None; quick where there is none."""
    return layer._modules.get("forget_gate")


def _part(layer: nn.Module, path: list[str]) -> Any:
    """Return what a layer has at the end of a path, or None."""
    found: Any = layer
    for name in path:
        found = getattr(found, name, None)
    return found


def sizes_of(layer: Any) -> kernel.Sizes:
    """Return the sizes of a layer."""
    if _forget_gate(layer) is not None:
        return kernel.Sizes(layer.num_heads, 1, layer.head_dim, layer.head_dim)
    H, HV, K, V = (getattr(layer, name) for name in _SIZES)
    return kernel.Sizes(H, HV // H, K, V)


def project(
    layer: Any, names: tuple[str, ...], sizes: kernel.Sizes, x: Tensor
) -> tuple[list[Tensor], kernel.Projections]:
    """Project a token; return the results, and where the heads of each lie in them."""
    H, R, K, V = sizes
    made = [_projected(layer, chain, x) for chain in _CHAINS[names]]
    made = [y if y.stride(-1) == 1 else y.contiguous() for y in made]
    values, heads = R * V, kernel.heads
    if names == INTERLEAVED:
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
    elif names == JOINED:
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
        width = 1 if names == SINGLE else K
        given = kernel.Projections(
            q=heads(q, K),
            k=heads(k, K),
            v=heads(v, values, V),
            z=heads(z, values, V),
            b=heads(b, R),
            a=heads(a, R * width, width),
        )
    return made, given


def _projected(layer: nn.Module, chain: list[list[str]], x: Tensor) -> Tensor:
    """Return what a projection makes of a token, or several do one after the other."""
    for path in chain:
        x = _part(layer, path)(x)
    return x


def parameters_of(layer: Any) -> kernel.Parameters | None:
    """Return what a layer computes with, or None where the kernel does not compute it."""
    norm, conv = getattr(layer, "norm", None) or getattr(layer, "o_norm", None), layer.conv1d
    gate = GATES.get(getattr(norm, "activation", "silu"))
    channels = _forget_gate(layer)
    decay, bound = (layer, None) if channels is None else (channels, _lower_bound(channels))
    if (
        norm is None
        or gate is None
        or layer.activation not in ("silu", "swish")
        or not kernels.is_bare(conv, nn.Conv1d)
        or not kernels.is_bare(norm, type(norm))
        or not (channels is None or kernels.is_bare(channels, type(channels)))
        or not (bound is None or bound < 0)
    ):
        return None
    return kernel.Parameters(
        A_log=decay.A_log if channels is None else decay.A_log.flatten(),
        dt_bias=decay.dt_bias,
        weight=conv.weight[:, 0],
        bias=conv.bias,
        norm=norm.weight,
        eps=norm.variance_epsilon,
        gate=gate,
        beta_factor=2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0,
        has_channels=channels is not None,
        lower_bound=bound,
    )


def _lower_bound(decay: Any) -> float | None:
    """Return the bound of a gate by the names that it has in GLM-5.3-Flash and in Ling-3.0."""
    if getattr(decay, "safe_gate", False):
        bound: float | None = decay.lower_bound
        return bound
    return getattr(decay, "safe_gate_lower_bound", None)
