"""Say which loops a launch has in the source of its kernel, and how often each is run.

A kernel that changes its loops changes its entry here; one that has no entry has no predicted time.
Where TileLang adds warps that only copy, these have a loop of their own, which a warp that computes
never runs: its trips are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gdn_ops.aot.source_loops import SourceLoop
from gdn_ops.kernel_support.launches import Launch

Loops = tuple[SourceLoop, ...]


def _owner(sequences: int) -> SourceLoop:
    """Return the search for the sequence of a slot, by halves."""
    return SourceLoop("search for a sequence", (sequences - 1).bit_length())


def _chunks(x: Mapping[str, Any]) -> int:
    """Return the chunks of a sequence, where all are as long: no tensor is read."""
    sequences, tokens = x["cu"].shape[0] - 1, x["k"].shape[0]
    return -int(-(tokens // sequences) // x["C"])


def _walk(x: Mapping[str, Any]) -> Loops:
    return (
        _owner(x["cu"].shape[0] - 1),
        SourceLoop("chunks of a segment", min(_chunks(x), x["L"])),
    )


def _solve(x: Mapping[str, Any]) -> Loops:
    heads = x["gates"].shape[0] // x["k"].shape[1]
    return (_owner(x["cu"].shape[0] - 1), SourceLoop("value heads", heads))


def _token_gradients(x: Mapping[str, Any]) -> Loops:
    heads, columns = x["gates"].shape[0] // x["k"].shape[1], -(-x["V"] // x["BV"])
    owner = _owner(x["cu"].shape[0] - 1)
    return (owner, SourceLoop("value heads and columns of V", heads * columns))


def _compose(x: Mapping[str, Any]) -> Loops:
    # Each sequence has a slot more than whole segments.
    sequences = x["cu"].shape[0] - 1
    return (SourceLoop("segments", max(1, x["maps"].shape[0] // sequences - 1)),)


KERNELS: dict[str, Callable[[Mapping[str, Any]], Loops]] = {
    "solve": _solve,
    "states": _walk,
    "state_gradients": _walk,
    "token_gradients": _token_gradients,
    "compose": _compose,
    "tokens": lambda x: (SourceLoop("tokens", x["length"]),),
}
"""By the name of a kernel: its loops, given the arguments of a launch by name, in the order of the
source."""


def loops_of(
    launch: Launch, function: Any, *, has_copiers: bool, copiers_first: bool = False
) -> Sequence[SourceLoop] | None:
    """Return the loops of a launch, or None of an unknown kernel.

    Args:
        launch: the launch.
        function: its kernel, traced.
        has_copiers: whether it has warps that only copy.
        copiers_first: whether their code stands before that of the warps that compute.
    """
    loops = KERNELS.get(launch.kernel.__name__)
    if loops is None:
        return None
    names = [
        function.buffer_map[p].name if p in function.buffer_map else p.name for p in function.params
    ]
    own = loops(dict(zip(names, launch.args, strict=True)) | launch.kwargs)
    if not has_copiers:
        return own
    *searches, last = own
    # A search that the compiler moves ahead of where the warps part stands there once.
    if copiers_first:
        again = [replace(x, is_constant=True) for x in searches]
        return (*searches, SourceLoop(last.name, 0), *again, last)
    again = [SourceLoop(x.name, 0, is_constant=True) for x in searches]
    return (*own, *again, SourceLoop(last.name, 0))
