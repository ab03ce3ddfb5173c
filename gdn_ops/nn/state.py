"""Hold the state that a layer keeps between calls, and check that a given one fits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.spec.errors import SpecError


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
    state: State, memory_shape: tuple[int, int, int, int], conv_shape: tuple[int, int, int] | None
) -> None:
    """Raise a SpecError where a state has other shapes; without a convolution one is None."""
    shape, (rows, heads, key_width, value_width) = tuple(state.memory.shape), memory_shape
    if shape != memory_shape:
        is_v_first = shape == (rows, heads, value_width, key_width)
        cure = "; gdn_ops.compat.states.state_from('fla_v_first', memory) turns a V-first state"
        cure = cure if is_v_first else ""
        raise SpecError(
            f"GatedDeltaNet: state.memory has shape {shape}, should be (N, HV, K, V) = "
            f"{memory_shape}{cure}"
        )
    given = None if state.conv is None else tuple(state.conv.shape)
    if conv_shape is not None and given != conv_shape:
        kind = "is None" if given is None else f"has shape {given}"
        raise SpecError(
            f"GatedDeltaNet: state.conv {kind}, should be (N, channels, kernel_size - 1) = "
            f"{conv_shape}"
        )
