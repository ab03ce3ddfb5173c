"""Recognise axes in another order, where the sizes of a call betray them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gdn_ops.spec.language import OpSpec, Sizes, printed_shape

MANY_HEADS = 128
"""More heads than tokens, and more than that: heads and tokens are rather in the other order."""

MANY_ROWS = 1024
"""As many rows as that, of a few tokens: rows and tokens are rather in the other order."""

FEW_TOKENS = 64
"""Fewer tokens than that are a few."""

GATES = ("alpha", "log_alpha", "beta", "erase", "write")

Axes = tuple[str, ...]


class Given(NamedTuple):
    """Hold the axes that one tensor of a call should have, and the sizes that it has."""

    axes: Axes
    sizes: tuple[int, ...]


def layout_hint(spec: OpSpec, given: Mapping[str, Given]) -> str:
    """Return what the tensors of a call look like that does not fit together, as a text.

    Args:
        spec: the op.
        given: every tensor of the call, by name, in the order of the spec.

    Returns:
        "; v looks like (B, HV, T, V): ...", or "" where no order of axes fits.
    """
    found: list[str] = []
    found_rank = 0
    for rank, names, swap in _candidates(given):
        if found and rank > found_rank:
            break
        turned = {
            name: Given(_swapped(x.axes, swap), x.sizes) if name in names else x
            for name, x in given.items()
        }
        if _fits(spec, turned):
            found_rank = rank
            found.append(_reading({name: turned[name].axes for name in names}, swap))
    return f"; {', or '.join(found)}" if found else ""


def layout_notes(sizes: Sizes) -> tuple[str, ...]:
    """Return notes on sizes that are allowed, but rare in this order of axes."""
    notes = []
    if max(sizes.T, MANY_HEADS) < sizes.H:
        notes.append(
            f"q has T={sizes.T} tokens and H={sizes.H} heads; if it is (B, H, T, K), pass "
            f"q.transpose(1, 2), and likewise k, v and the gates"
        )
    if 1 < sizes.T < FEW_TOKENS and sizes.B >= MANY_ROWS:
        notes.append(
            f"q has B={sizes.B} rows of T={sizes.T} tokens; if it is (T, B, H, K), pass "
            f"q.transpose(0, 1), and likewise k, v and the gates"
        )
    return tuple(notes)


_SWAPS: tuple[tuple[Axes, str], ...] = (
    (("T", "H"), "transpose(1, 2)"),
    (("B", "T"), "transpose(0, 1)"),
    (("B", "H"), "transpose(0, 1)"),
    (("K", "V"), "transpose(-1, -2)"),
)
"""Axes that others have in the other order, and what turns them; H is HV where a tensor has it."""


def _candidates(given: Mapping[str, Given]) -> Iterator[tuple[int, tuple[str, ...], Axes]]:
    """Yield a rank, tensors whose axes may be in another order, and which axes; likely ones first.

    Tokens and gates that contradict each other are equally likely to be wrong.
    """
    tokens = tuple(name for name in ("q", "k", "v") if name in given)
    gates = tuple(name for name in GATES if name in given)
    groups: list[tuple[int, tuple[str, ...]]] = [(0, (name,)) for name in given]
    groups += [(1, tokens[:2]), (2, tokens), (2, gates), (3, tokens + gates)]
    has_tokens = "T" in given["q"].axes
    for rank, names in groups:
        for swap, _ in _SWAPS:
            if swap == ("B", "H") and has_tokens:
                continue
            if names and all(_swapped(given[n].axes, swap) != given[n].axes for n in names):
                yield rank, names, swap


def _swapped(axes: Axes, swap: Axes) -> Axes:
    """Return axes with two of them in the other order, where both are there."""
    first, second = swap
    second = "HV" if second == "H" and "HV" in axes else second
    if first not in axes or second not in axes:
        return axes
    other = {first: second, second: first}
    return tuple(other.get(axis, axis) for axis in axes)


def _fits(spec: OpSpec, given: Mapping[str, Given]) -> bool:
    """Return whether every axis has one size, and the constraints of the op hold."""
    is_packed = "cu_seqlens" in given
    sizes: dict[str, int] = {}
    for axes, shape in given.values():
        if len(axes) != len(shape):
            return False
        for name, size in zip(axes, shape, strict=True):
            axis = "B" if name == "N" and not is_packed else name
            count = size - 1 if axis == "N+1" else size
            if sizes.setdefault(axis.removesuffix("+1"), count) != count:
                return False
    if is_packed and sizes["B"] != 1:
        return False
    return all(sizes[c.axis] % max(1, sizes[c.of]) == 0 for c in spec.constraints)


def _reading(found: Mapping[str, Axes], swap: Axes) -> str:
    """Return how tensors look as a text: "q and k look like (B, H, T, K): ..."."""
    by_axes: dict[Axes, list[str]] = {}
    for name, axes in found.items():
        by_axes.setdefault(axes, []).append(name)
    (first, names), *rest = by_axes.items()
    text = f"{_listed(names)} {'look' if len(names) > 1 else 'looks'} like {printed_shape(first)}"
    for axes, others in rest:
        text += f", {_listed(others)} like {printed_shape(axes)}"
    turn = dict(_SWAPS)[swap]
    return f"{text}: {f'{names[0]}.{turn} turns it' if len(found) == 1 else f'{turn} turns them'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
