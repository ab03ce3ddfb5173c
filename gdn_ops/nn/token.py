"""Advance a layer by one token in one call of the C++ library, between its projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gdn_ops.backends.cpp import layer_token as kernel
from gdn_ops.kernel_support.host_memory import settle_allocator
from gdn_ops.nn import kernels
from gdn_ops.nn.convolution import ShortConvolution
from gdn_ops.nn.gates import DecayGate
from gdn_ops.nn.norm import GatedRMSNorm
from gdn_ops.nn.state import State
from gdn_ops.spec.ops import GATED_DELTA

if TYPE_CHECKING:
    from gdn_ops.nn.gated_delta_net import GatedDeltaNet

_FEATURE_MAPS = ("silu", "none")
_QK_NORMS = ("l2", None)


def mixed(layer: GatedDeltaNet, x: Tensor, state: State) -> tuple[Tensor, State] | None:
    """Return what the output projection of a layer is given, and the state behind the token.

    Args:
        layer: it mixes nothing in between that only PyTorch sees.
        x: (B, 1, hidden_size), checked.
        state: of the layer, checked.

    Returns:
        o (B, 1, HV V) and the new state, or None where the kernel does not compute this call.
    """
    if not _fits(layer) or not kernels.may_run(layer.backend, x, *_tensors(layer), *state):
        return None
    q, k, v, b = (
        project(x) for project in (layer.q_proj, layer.k_proj, layer.v_proj, layer.b_proj)
    )
    a = None if layer.decay is None else layer.a_proj(x)
    z = None if layer.output_gate is None else layer.g_proj(x)
    if len({y.dtype for y in (q, k, v)}) > 1 or not kernels.may_run("cpp", q, k, v, b, a, z):
        return None
    sizes = kernel.Sizes(
        layer.num_heads, layer.num_value_heads // layer.num_heads, layer.head_dim, layer.value_dim
    )
    values, width = sizes.R * sizes.V, sizes.K if layer.channel_decay else 1
    q, k, v, b = (y.contiguous() for y in (q, k, v, b))
    a, z = (None if y is None else y.contiguous() for y in (a, z))
    given = kernel.Projections(
        q=kernel.heads(q, sizes.K),
        k=kernel.heads(k, sizes.K),
        v=kernel.heads(v, values, sizes.V),
        z=kernel.heads(z, values, sizes.V),
        a=kernel.heads(a, sizes.R * width, width),
        b=kernel.heads(b, sizes.R),
    )
    settle_allocator()
    before = state.memory
    if before.stride()[2:] != (sizes.V, 1):
        before = before.contiguous()
    behind = torch.empty(before.shape, dtype=before.dtype, device=before.device)
    kept = None
    if state.conv is not None:
        kept = torch.empty(state.conv.shape, dtype=v.dtype, device=v.device)
    inputs, states = (state.conv, kept), (before, behind)
    o = kernel.token(len(x), sizes, given, _parameters(layer), inputs, states, v.dtype)
    return o, State(kept, behind)


def _fits(layer: GatedDeltaNet) -> bool:
    """Return whether the kernel computes what stands between the projections of a layer."""
    parts: list[tuple[nn.Module | None, type[nn.Module]]]
    parts = [(layer.conv, ShortConvolution), (layer.decay, DecayGate)]
    return (
        not layer.erase_write
        and layer.feature_map in _FEATURE_MAPS
        and layer.qk_norm in _QK_NORMS
        and layer.output_norm
        and kernels.is_bare(layer.o_norm, GatedRMSNorm)
        and all(part is None or kernels.is_bare(part, cls) for part, cls in parts)
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()))
    )


def _tensors(layer: GatedDeltaNet) -> tuple[Tensor | None, ...]:
    """Return the parameters that the kernel reads."""
    p = _parameters(layer)
    return (p.A_log, p.dt_bias, p.weight, p.bias, p.norm)


def _parameters(layer: GatedDeltaNet) -> kernel.Parameters:
    """Return what the kernel is told of a layer."""
    conv, decay = layer.conv, layer.decay
    return kernel.Parameters(
        A_log=None if decay is None else decay.A_log,
        dt_bias=None if decay is None else decay.dt_bias,
        weight=None if conv is None else conv.weight,
        bias=None if conv is None else conv.bias,
        norm=layer.o_norm.weight,
        eps=layer.o_norm.eps,
        gate=layer.output_gate,
        beta_factor=2.0 if layer.allow_neg_eigval else 1.0,
        silu=layer.feature_map == "silu",
        has_erase=GATED_DELTA.rule[layer.rule].has_erase,
        qk_l2norm=layer.qk_norm == "l2",
        has_channels=decay is not None and decay.channels is not None,
        lower_bound=None if decay is None else decay.lower_bound,
    )
