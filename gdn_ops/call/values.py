"""Check the values of a call: domains of gates, sequence boundaries, slots of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gdn_ops.call.structure import fail
from gdn_ops.spec.language import Interval, OpSpec, Sizes


def check_tensor_values(spec: OpSpec, arguments: Mapping[str, Any], sizes: Sizes) -> None:
    """Check domains, sequence boundaries and slots. NaN passes: NaN in, NaN out."""
    for arg, domain in spec.bounded:
        value = arguments[arg.name]
        if value is None or value.numel() == 0:
            continue
        smallest, largest = torch.aminmax(value.detach() if value.requires_grad else value)
        low, high = smallest.item(), largest.item()
        if low < domain.low or high > domain.high:
            hint = ""
            if arg.name == "alpha" and low < 0:
                hint = "; log-space gates go in log_alpha="
            elif arg.name == "log_alpha" and low >= 0:
                hint = "; gates in [0, 1] go in alpha="
            values = f"[{_digits(low, domain)}, {_digits(high, domain)}]"
            fail(spec, f"{arg.name} has values in {values}, should be in {domain}{hint}")
    boundaries = arguments.get("cu_seqlens")
    if boundaries is not None:
        _check_boundaries(spec, boundaries.tolist(), sizes.T)
    slots = arguments.get("state_indices")
    if slots is not None:
        _check_slots(spec, slots.tolist(), arguments["state"].shape[0])


def _digits(value: float, domain: Interval) -> str:
    """Return a value as text in four digits, or in more if four hide that it is out of range."""
    inside = domain.low <= value <= domain.high
    texts = (f"{value:.{digits}g}" for digits in (4, 9, 17))
    return next(t for t in texts if (domain.low <= float(t) <= domain.high) == inside)


def _check_boundaries(spec: OpSpec, boundaries: list[int], tokens: int) -> None:
    if boundaries[0] != 0:
        fail(spec, f"cu_seqlens starts with {boundaries[0]}, should start with 0")
    for i in range(1, len(boundaries)):
        if boundaries[i] < boundaries[i - 1]:
            fail(
                spec,
                f"cu_seqlens decreases at index {i} ({boundaries[i - 1]} to {boundaries[i]}), "
                f"should be non-decreasing",
            )
    if boundaries[-1] != tokens:
        fail(spec, f"cu_seqlens ends with {boundaries[-1]}, should end with T = {tokens}")


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
