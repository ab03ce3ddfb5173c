"""Replace the short convolution of transformers' layers on CPUs by one in blocks of tokens.

Elsewhere than on CPUs, in a graph, or for operands of a kind that is not known here, the original
runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdn_ops.compat.transformers import packing
from gdn_ops.compat.transformers.rule import ORIGINAL, original_of
from gdn_ops.compat.transformers.signatures import definition, mismatch_of_parameters
from gdn_ops.compat.transformers.trial import difference, drawn, plain_torch
from gdn_ops.nn.blocks import is_plain, wide
from gdn_ops.nn.causal import causal_convolution, convolved_window

Function = Callable[..., Tensor]

_ACTIVATIONS = (None, "silu", "swish")

PARAMETERS = {
    "causal_conv1d_fn": ("hidden_states", "weight", "bias", "activation"),
    "causal_conv1d_update": ("hidden_states", "conv_state", "weight", "bias", "activation"),
}
"""What the parameters of each function begin with, in order."""


def whole_convolution(original: Function) -> Function:
    """Return the replacement of `causal_conv1d_fn`."""

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
            or options.get("cu_seqlens") is not None
            or (sequences is not None and sequences.shape != (1, hidden_states.shape[2]))
        ):
            if packing.is_packed(options):
                packing.check_package(hidden_states.device.type)
            return original(hidden_states, weight, bias, activation=activation, **options)
        x, silu = hidden_states.transpose(1, 2), activation is not None
        if sequences is None:
            return causal_convolution(x, weight, bias, silu=silu).transpose(1, 2)
        lengths = torch.unique_consecutive(sequences[0], return_counts=True)[1].tolist()
        parts = [causal_convolution(part, weight, bias, silu=silu) for part in x.split(lengths, 1)]
        return torch.cat(parts, 1).transpose(1, 2)

    return causal_conv1d_fn


def convolution_update(original: Function) -> Function:
    """Return the replacement of `causal_conv1d_update`, which also writes the next state."""

    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Tensor:
        dtypes = {hidden_states.dtype, conv_state.dtype, weight.dtype}
        taps = weight.shape[1]
        if (
            options
            or activation not in _ACTIVATIONS
            or not is_plain(hidden_states)
            or len(dtypes) > 1
            or hidden_states.shape[2] != 1
            or conv_state.shape[2] < taps - 1
        ):
            return original(hidden_states, conv_state, weight, bias, activation, **options)
        window = torch.cat([conv_state, hidden_states], -1)
        conv_state.copy_(window[..., 1:])
        wide_window = window[..., -taps:].mT.to(wide(weight.dtype))
        y = convolved_window(wide_window, weight, bias, silu=activation is not None)
        return y.mT.to(hidden_states.dtype)

    return causal_conv1d_update


_REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "causal_conv1d_fn": whole_convolution,
    "causal_conv1d_update": convolution_update,
}


def examine_convolution(name: str, module: ModuleType) -> Function | str | None:
    """Return the replacement of a module's convolution, why there can be none, or None.

    None where the module has no such function.
    """
    function = vars(module).get(name)
    if not callable(function):
        return None
    original = original_of(function)
    expected = definition(original, PARAMETERS[name])
    if expected is None:
        return mismatch_of_parameters(name, original, PARAMETERS[name])
    new = _REPLACEMENTS[name](original)
    setattr(new, ORIGINAL, original)
    with plain_torch():
        for example in _examples(name):
            # Copies, because an update writes its second argument.
            runs = (_run_of(f, copy.deepcopy(example)) for f in (expected, new))
            incompatibility = difference(*runs)
            if incompatibility is not None:
                return f"{name} {incompatibility}"
    return new


def _run_of(function: Function, arguments: list[Any]) -> Callable[[], Sequence[Tensor]]:
    """Return a function that makes a call; it returns the result and the argument written."""
    return lambda: (function(*arguments), arguments[1])


def _examples(name: str) -> list[list[Any]]:
    """Return the arguments of two calls, as layers make them: without a bias, and with one."""
    x, state, weight, bias = drawn((2, 6, 9), (2, 6, 4), (6, 4), (6,))
    if name == "causal_conv1d_fn":
        return [[x, weight, None, "silu"], [x, weight, bias, None]]
    token = x[..., :1]
    return [[token, state, weight, None, "silu"], [token, state[..., 1:], weight, bias, "silu"]]
