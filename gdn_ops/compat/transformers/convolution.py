"""Replace the short convolution of transformers' layers on CPUs by that of `gdn_ops.nn`.

Elsewhere than on CPUs, in a graph, or for operands of a kind that is not known here, the original
runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdn_ops.backends.cpp import layers
from gdn_ops.compat.transformers import packing
from gdn_ops.compat.transformers.rule import ORIGINAL, original_of
from gdn_ops.compat.transformers.signatures import definition, mismatch_of_parameters
from gdn_ops.compat.transformers.split_calls import refuse
from gdn_ops.compat.transformers.split_layers import split_convolution
from gdn_ops.compat.transformers.trial import difference, drawn, plain_torch
from gdn_ops.nn import kernels
from gdn_ops.nn.blocks import is_plain, wide
from gdn_ops.nn.causal import causal_convolution, convolved_window
from gdn_ops.parallel.context import active

Function = Callable[..., Tensor]

_ACTIVATIONS = (None, "silu", "swish")

PARAMETERS = {
    "causal_conv1d_fn": ("hidden_states", "weight", "bias", "activation"),
    "causal_conv1d_update": ("hidden_states", "conv_state", "weight", "bias", "activation"),
}
"""List the first parameters of each function, in order."""


def _automatic() -> str:
    return "auto"


def whole_convolution(original: Function, backend: Callable[[], str] = _automatic) -> Function:
    """Return the replacement of `causal_conv1d_fn`.

    Args:
        original: what it replaces.
        backend: says which backend runs the rule, at every call.
    """

    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Tensor:
        split, silu = active(), activation is not None
        if split is not None:
            if activation not in _ACTIVATIONS:
                refuse(f"the activation {activation!r} is not computed under sequence_parallel")
            x = hidden_states.transpose(1, 2)
            y = split_convolution(split, x, weight, bias, silu=silu, backend=backend())
            return y.transpose(1, 2)
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
        x, name = hidden_states.transpose(1, 2), backend()
        if sequences is None:
            y = causal_convolution(x, weight, bias, silu=silu, backend=name)
            return y.transpose(1, 2)
        return _packed(x, weight, bias, sequences[0], silu, name).transpose(1, 2)

    return causal_conv1d_fn


def _packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor, silu: bool, backend: str
) -> Tensor:
    """Convolve (1, T, D), each token being of the sequence of its number (T,)."""
    lengths = torch.unique_consecutive(numbers, return_counts=True)[1]

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, _: None) -> tuple[Tensor, None]:
        parts = x.split(lengths.tolist(), 1)
        results = [causal_convolution(y, weight, bias, silu=silu, backend="torch") for y in parts]
        return torch.cat(results, 1), None

    if not kernels.may_run(backend, x, weight, bias) or not kernels.tells(numbers):
        return plain(x, weight, bias, None)[0]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    options: dict[str, Any] = {"silu": silu, "keeps": False, "starts": starts}
    return kernels.convolve(x, weight, bias, None, plain, **options)[0]


def convolution_update(original: Function, backend: Callable[[], str] = _automatic) -> Function:
    """Return the replacement of `causal_conv1d_update`, which also writes the next state.

    Args:
        original: what it replaces.
        backend: says which backend runs the rule, at every call.
    """

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
        given = (hidden_states, weight, bias, conv_state)
        if kernels.may_run(backend(), *given) and not kernels.needs_grad(*given):
            x, silu = hidden_states.transpose(1, 2), activation is not None
            call = layers.Convolution(x, weight, bias, conv_state, None, None, silu)
            return layers.convolution(call, conv_state).transpose(1, 2)
        window = torch.cat([conv_state, hidden_states], -1)
        conv_state.copy_(window[..., 1:])
        wide_window = window[..., -taps:].mT.to(wide(weight.dtype))
        y = convolved_window(wide_window, weight, bias, silu=activation is not None)
        return y.mT.to(hidden_states.dtype)

    return causal_conv1d_update


_REPLACEMENTS: dict[str, Callable[[Function, Callable[[], str]], Function]] = {
    "causal_conv1d_fn": whole_convolution,
    "causal_conv1d_update": convolution_update,
}

Maker = Callable[[Callable[[], str]], Function]
"""Make a replacement, told what says which backend runs the rule."""


def _replacement(name: str, original: Function, backend: Callable[[], str]) -> Function:
    new = _REPLACEMENTS[name](original, backend)
    setattr(new, ORIGINAL, original)
    return new


def examine_convolution(name: str, module: ModuleType) -> Maker | str | None:
    """Return what makes the replacement of a module's convolution, why none can, or None.

    None where the module has no such function.
    """
    function = vars(module).get(name)
    if not callable(function):
        return None
    original = original_of(function)
    expected = definition(original, PARAMETERS[name])
    if expected is None:
        return mismatch_of_parameters(name, original, PARAMETERS[name])
    make = functools.partial(_replacement, name, original)
    new = make(_automatic)
    with plain_torch():
        for example in _examples(name):
            # Copies, because an update writes its second argument.
            runs = (_run_of(f, copy.deepcopy(example)) for f in (expected, new))
            incompatibility = difference(*runs)
            if incompatibility is not None:
                return f"{name} {incompatibility}"
    return make


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
