"""The short convolution and the gated norm of transformers' layers on CPUs, by blocks of tokens.

Theirs transpose, and pass over memory once per operation. Elsewhere than on CPUs, in a graph, or
for operands of a kind that is not known here, the original runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.nn.blocks import is_plain, wide
from gdn_ops.nn.causal import causal_convolution
from gdn_ops.nn.norm import gated_rms_norm

Function = Callable[..., Tensor]

_ACTIVATIONS = (None, "silu", "swish")

_GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
"""Activations of a gate as transformers calls them, and as `gated_rms_norm` does."""


def whole_convolution(original: Function) -> Function:
    """Return what stands instead of `causal_conv1d_fn`."""

    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Tensor:
        sequences = options.get("seq_idx")
        if (
            activation not in _ACTIVATIONS
            or not is_plain(hidden_states)
            or (sequences is not None and sequences.shape[0] != 1)
        ):
            return original(hidden_states, weight, bias, activation=activation, **options)
        x, silu = hidden_states.transpose(1, 2), activation is not None
        if sequences is None:
            return causal_convolution(x, weight, bias, silu=silu).transpose(1, 2)
        lengths = torch.unique_consecutive(sequences[0], return_counts=True)[1].tolist()
        parts = [causal_convolution(part, weight, bias, silu=silu) for part in x.split(lengths, 1)]
        return torch.cat(parts, 1).transpose(1, 2)

    return causal_conv1d_fn


def convolution_update(original: Function) -> Function:
    """Return what stands instead of `causal_conv1d_update`, which writes the next state."""

    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        dtypes = {hidden_states.dtype, conv_state.dtype, weight.dtype}
        taps = weight.shape[1]
        if (
            activation not in _ACTIVATIONS
            or not is_plain(hidden_states)
            or len(dtypes) > 1
            or hidden_states.shape[2] != 1
            or conv_state.shape[2] < taps - 1
        ):
            return original(hidden_states, conv_state, weight, bias, activation)
        window = torch.cat([conv_state, hidden_states], -1)
        conv_state.copy_(window[..., 1:])
        dtype = wide(weight.dtype)
        p = (window[..., -taps:].to(dtype) * weight.to(dtype)).sum(-1, keepdim=True)
        if bias is not None:
            p = p + bias.to(dtype)[:, None]
        return (functional.silu(p) if activation is not None else p).to(hidden_states.dtype)

    return causal_conv1d_update


def gated_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what stands instead of the forward of a gated norm."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
        weight, activation = self.weight, _GATES.get(self.activation)
        if (
            activation is None
            or not is_plain(hidden_states)
            or hidden_states.shape != gate.shape
            # In half precision transformers rounds between norm and gate.
            or {hidden_states.dtype, gate.dtype, weight.dtype} != {torch.float32}
        ):
            return original(self, hidden_states, gate)
        eps = self.variance_epsilon
        return gated_rms_norm(hidden_states, weight, gate, eps=eps, activation=activation)

    return forward
