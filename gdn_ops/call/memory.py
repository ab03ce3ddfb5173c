"""Say what shares memory: the elements of a state, and the inputs of a call with its state.

Nothing here looks at a value, so nothing waits for a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from gdn_ops.call.structure import fail
from gdn_ops.spec.language import OpSpec

if TYPE_CHECKING:
    from gdn_ops.call.bind import Call


def check_updatable(spec: OpSpec, state: Tensor, is_eager: bool) -> None:
    """Check that a state that is updated in place has memory of its own for every element.

    Args:
        spec: the op.
        state: the state of a call, whose structure is right.
        is_eager: whether it is a tensor that can be asked, which Dynamo's is not.

    Raises:
        SpecError: the state cannot be updated in place.
    """
    if overlaps_itself(state):
        fail(
            spec,
            f"state has shape {tuple(state.shape)} and strides {tuple(state.stride())}, so that "
            f"elements share memory; inplace needs memory for every element: pass "
            f"state.contiguous(), or inplace=False",
        )
    if is_eager and state.is_neg():
        fail(
            spec,
            "state is a negated view, whose memory holds -state; inplace needs memory of its "
            "values: pass state.resolve_neg(), or inplace=False",
        )
    if is_eager and is_frozen(state):
        fail(
            spec,
            "state was made under torch.inference_mode(), which alone may update it in place: "
            "decode under it, or pass state.clone()",
        )


def is_frozen(x: Tensor) -> bool:
    """Return whether a tensor was made under inference mode, which alone may change it."""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def overlaps_itself(x: Tensor) -> bool:
    """Return whether two elements of a tensor have the same address, exactly for any strides."""
    if x.is_contiguous() or not x.numel():
        return False
    axes = sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 0
    for step, size in axes:
        if step <= reach:
            return step == 0 or _meet(axes)
        reach += (size - 1) * step
    return False


def _meet(axes: list[tuple[int, int]]) -> bool:
    """Return whether Σ d_i step_i = 0 for some d other than 0 with |d_i| < size_i.

    Args:
        axes: (step_i, size_i), sorted; no step is 0.
    """
    joined = axes[:1]
    for step, size in axes[1:]:
        last_step, last_size = joined[-1]
        if step == last_step * last_size:
            joined[-1] = last_step, last_size * size
        else:
            joined.append((step, size))
    # Differences within one half of the axes cancel, or equal those within the other.
    middle = (len(joined) + 1) // 2
    first, second = _differences(joined[:middle]), _differences(joined[middle:])
    return 0 in first or 0 in second or not first.isdisjoint(second)


def _differences(axes: list[tuple[int, int]]) -> set[int]:
    """Return Σ d_i step_i for every d other than 0 with |d_i| < size_i."""
    reaches = [range(-(size - 1) * step, size * step, step) for step, size in axes]
    return {sum(offsets) for offsets in itertools.product(*reaches) if any(offsets)}


def apart(call: Call) -> Call:
    """Return a call in place with copies of the inputs that lie in the memory that it updates.

    A backend may then write the state before it has read the rest. What has a storage in common
    with the state, but no byte between its first and its last, is not copied.
    """
    state = call.state
    if type(state) is not Tensor and type(state) is not Parameter:
        return call
    if not lies_in(state, (*call.tokens, call.state_indices)):
        return call
    first, end = _span(state)
    indices = call.state_indices
    return replace(
        call,
        tokens=call.tokens.map(lambda x: _outside(x, first, end)),
        state_indices=None if indices is None else _outside(indices, first, end),
    )


def lies_in(state: Tensor, inputs: Sequence[Tensor | None]) -> bool:
    """Return whether an input lies between the first and the last byte of a state, in part."""
    first, end = _span(state)
    for x in inputs:
        if x is None:
            continue
        # Calls of a step come here: what lies before or behind the state is known by few questions.
        start = x.data_ptr()
        if start >= end or (start + x.nbytes <= first and x.is_contiguous()):
            continue
        if _span(x)[1] > first:
            return True
    return False


def _outside(x: Tensor, first: int, end: int) -> Tensor:
    """Return a tensor, or a copy if it lies within a range of addresses."""
    span = _span(x)
    return x.clone() if span[0] < end and span[1] > first else x


def _span(x: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the one after its last."""
    first = x.data_ptr()
    return first, first + reach(x)


def reach(x: Tensor) -> int:
    """Return how many bytes there are from the first of a tensor to its last, both included."""
    if x.is_contiguous() or not x.numel():
        return x.nbytes
    steps = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.itemsize
