"""Hold the state that a layer keeps between calls, and check that a given one fits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.nn.values import check_kept, check_tensor
from gdn_ops.spec.errors import SpecError, SpecTypeError


class State(NamedTuple):
    """Hold the state that a layer keeps between calls.

    Attributes:
        conv: (N, 2 H K + HV V, kernel_size - 1), the last inputs of the convolution, channels of
            q, k and v in this order; None without one.
        memory: (N, HV, K, V), float32, or float64 for float64 inputs.
    """

    conv: Tensor | None
    memory: Tensor


# `torch.load(weights_only=True)` reads what it knows; a state holds tensors and nothing else.
torch.serialization.add_safe_globals([State])


def made_in(*modules: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device of the first floating parameter or buffer of modules.

    A layer that was quantised, wrapped or sharded need not have a `weight` that is a tensor.

    Args:
        modules: looked at in this order.

    Returns:
        Those of the first one; float32 on the CPU where there is none, as of modules that were
        quantised dynamically.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.element_size() > 1:
                return tensor.dtype, tensor.device
    return torch.float32, torch.device("cpu")


def check_state(
    state: State,
    x: Tensor,
    memory_shape: tuple[int, int, int, int],
    conv_shape: tuple[int, int, int] | None,
) -> None:
    """Check a state that a layer is given.

    Args:
        state: should be a State.
        x: the input of the layer.
        memory_shape: (N, HV, K, V).
        conv_shape: (N, channels, kernel_size - 1), or None without a convolution.

    Raises:
        SpecError: the state is something else, or of a layer of another shape.
    """
    if not isinstance(state, State):
        raise SpecTypeError(
            f"GatedDeltaNet: state has type {type(state).__name__}, should be the "
            f"gdn_ops.nn.State that an earlier call returned; State(conv, memory) makes one"
        )
    check_tensor("GatedDeltaNet", "state.memory", state.memory)
    shape, (rows, heads, key_width, value_width) = tuple(state.memory.shape), memory_shape
    if shape != memory_shape:
        is_v_first = shape == (rows, heads, value_width, key_width)
        cure = "; gdn_ops.compat.states.state_from('fla_v_first', memory) turns a V-first state"
        cure = cure if is_v_first else ""
        raise SpecError(
            f"GatedDeltaNet: state.memory has shape {shape}, should be (N, HV, K, V) = "
            f"{memory_shape}{cure}"
        )
    check_kept("GatedDeltaNet", x, {"state.memory": state.memory})
    _check_conv(state.conv, x, conv_shape)


def _check_conv(conv: Any, x: Tensor, expected: tuple[int, int, int] | None) -> None:
    """Check the state of the convolution, None without one."""
    if conv is not None:
        check_tensor("GatedDeltaNet", "state.conv", conv)
    given = None if conv is None else tuple(conv.shape)
    kind = "is None" if given is None else f"has shape {given}"
    if given is not None and expected is None:
        raise SpecError(
            f"GatedDeltaNet: state.conv {kind}, should be None: the layer has no convolution"
        )
    if given != expected:
        raise SpecError(
            f"GatedDeltaNet: state.conv {kind}, should be (N, channels, kernel_size - 1) = "
            f"{expected}"
        )
    if conv is not None:
        check_kept("GatedDeltaNet", x, {"state.conv": conv})
