"""Check the values of a call: domains of gates, boundaries of sequences, slots of a pool."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn_ops.call import transforms
from gdn_ops.call.structure import fail
from gdn_ops.call.transforms import NONE, Transforms
from gdn_ops.spec.language import Interval, OpSpec, Sizes, TensorArg
from gdn_ops.spec.switches import is_on

if TYPE_CHECKING:
    from gdn_ops.call.bind import Arguments

CHECK_VALUES_EVERYWHERE = is_on("GDN_OPS_CHECK", "values")
"""Check value ranges on every device, not only on the CPU, if true. Read at import."""


def are_readable(device: torch.device) -> bool:
    """Return whether the values of a device's tensors are checked: elsewhere a look is a sync."""
    return CHECK_VALUES_EVERYWHERE or device.type == "cpu"


def check_values(
    spec: OpSpec, arguments: Arguments, sizes: Sizes, under: Transforms = NONE
) -> None:
    """Check domains, sequence boundaries and slots. NaN passes: NaN in, NaN out.

    Args:
        spec: the op.
        arguments: those of a call, whose structure is right.
        sizes: its axes.
        under: the transforms that concern its tensors.

    Raises:
        SpecError: a value is not allowed.
    """
    if not under.has_tangent:
        _check_gates(spec, arguments, under.wraps)
    else:
        # No tangent of `aminmax` is wanted, and in torch 2.8 it has none.
        with forward_ad._set_fwd_grad_enabled(False):
            _check_gates(spec, arguments, under.wraps)
    check_integers(spec, arguments, sizes)


def _check_gates(spec: OpSpec, arguments: Arguments, is_wrapped: bool) -> None:
    for arg, domain in spec.bounded:
        value = getattr(arguments.tokens, arg.name)
        if value is not None and is_wrapped:
            value = transforms.innermost(value)
        if value is None or value.numel() == 0:
            continue
        value = value.detach() if value.requires_grad else value
        # Nothing is below -inf: a bound that always holds is not looked for.
        if domain.low == -math.inf:
            is_within = not value.max().item() > domain.high
        else:
            low, high = torch.aminmax(value)
            is_within = not (low.item() < domain.low or high.item() > domain.high)
        if not is_within:
            _refuse(spec, arg, domain, value)


def _refuse(spec: OpSpec, arg: TensorArg, domain: Interval, value: Tensor) -> None:
    """Refuse a gate with a value that is out of its domain."""
    low, high = (x.item() for x in torch.aminmax(value))
    hint = ""
    if arg.name == "alpha" and low < 0:
        hint = "; log-space gates go in log_alpha="
    elif arg.name == "log_alpha" and low >= 0:
        hint = "; gates in [0, 1] go in alpha="
    values = f"[{_digits(low, domain)}, {_digits(high, domain)}]"
    fail(spec, f"{arg.name} has values in {values}, should be in {domain}{hint}")


def _digits(value: float, domain: Interval) -> str:
    """Return a value as text in four digits, or in more if four hide that it is out of range."""
    inside = domain.low <= value <= domain.high
    texts = (f"{value:.{digits}g}" for digits in (4, 9, 17))
    return next(t for t in texts if (domain.low <= float(t) <= domain.high) == inside)


def check_integers(spec: OpSpec, arguments: Arguments, sizes: Sizes) -> None:
    """Check the boundaries of packed sequences and the slots of a pool, where there are any.

    Raises:
        SpecError: one of them is not allowed.
    """
    boundaries = arguments.cu_seqlens
    if boundaries is not None:
        places = transforms.integers(boundaries)
        fault = fault_of_boundaries(places, sizes.T)
        if fault is not None:
            is_turned = places[0] == 0 and places[-1] == sizes.H
            hint = "; q looks like (B, H, T, K): q.transpose(1, 2) turns it" if is_turned else ""
            fail(spec, fault + hint)
    slots, pool = arguments.state_indices, arguments.state
    if slots is not None and pool is not None:
        _check_slots(spec, transforms.integers(slots), pool.shape[0])


def fault_of_boundaries(boundaries: list[int], tokens: int) -> str | None:
    """Return what is wrong with the boundaries of packed sequences of so many tokens, or None."""
    if boundaries[0] != 0:
        is_lengths = sum(boundaries) == tokens
        hint = "; lengths become boundaries as 0 and their running sums" if is_lengths else ""
        return f"cu_seqlens starts with {boundaries[0]}, should start with 0{hint}"
    if boundaries != sorted(boundaries):  # without a loop over sequences in Python
        pairs = enumerate(itertools.pairwise(boundaries), 1)
        i, before, after = next((i, a, b) for i, (a, b) in pairs if b < a)
        return f"cu_seqlens decreases at index {i} ({before} to {after}), should be non-decreasing"
    if boundaries[-1] != tokens:
        return f"cu_seqlens ends with {boundaries[-1]}, should end with T = {tokens}"
    return None


def _check_slots(spec: OpSpec, slots: list[int], count: int) -> None:
    """Check that every row names a slot of the pool, or -1, and no two rows the same one."""
    if slots and not (min(slots) >= -1 and max(slots) < count):
        fail(
            spec,
            f"state_indices has values in [{min(slots)}, {max(slots)}], should be in "
            f"[-1, {count - 1}]: state has {count} slots, and -1 skips a row",
        )
    row_of: dict[int, int] = {}
    for row, slot in enumerate(slots):
        first = row_of.setdefault(slot, row)
        if slot >= 0 and first != row:
            fail(
                spec,
                f"state_indices names slot {slot} twice, in rows {first} and {row}, should name "
                f"a slot once",
            )
