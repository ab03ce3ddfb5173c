"""Say which loops a launch has in the source of its kernel, and how often each is run.

A kernel that changes its loops changes its entry here; one that has no entry has no predicted time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdn_ops.aot.source_loops import SourceLoop
from gdn_ops.backends.triton.kernels.blocks import ALPHA, NO_DECAY
from gdn_ops.backends.triton.kernels.channel_decays import WIDTH as CHANNELS
from gdn_ops.backends.triton.kernels.gate_gradients import HEADS, ROWS, WIDTH
from gdn_ops.backends.triton.kernels.squares import PAIRS
from gdn_ops.kernel_support.launches import Launch

Loops = tuple[SourceLoop, ...]


def _chunks(x: Mapping[str, Any]) -> Loops:
    """Return the loop over the chunks of a sequence, or of a segment of L chunks."""
    chunks = -(-x["T"] // x["C"])
    return (SourceLoop("chunks", min(chunks, x["L"] or chunks), is_kept=True),)


def _walk(x: Mapping[str, Any]) -> Loops:
    """Return the loops of the walk, without those of the programs that compose beside it."""
    if not x["COMPOSED"]:
        return _chunks(x)
    rows = SourceLoop("rows of M", 0, is_constant=True)
    return SourceLoop("segments", 0, (rows,), is_kept=True, may_rest=True), *_chunks(x)


def _heads(x: Mapping[str, Any], *inner: SourceLoop) -> SourceLoop:
    return SourceLoop("value heads", x["R"], inner, is_kept=True)


def _columns(x: Mapping[str, Any]) -> SourceLoop:
    return SourceLoop("columns of V", -(-x["V"] // x["BV"]), is_constant=True)


def _prepare(x: Mapping[str, Any]) -> Loops:
    fours = SourceLoop("four value heads", -(-x["R"] // 4), is_kept=True)
    chunks = SourceLoop("chunks", x["chunks"], (fours,), is_kept=True)
    squares = SourceLoop("four squares", -(-x["chunks"] * x["R"] // 4), is_kept=True)
    tasks = -(-x["chunk_slots"] // x["chunks"]) * x["H"]
    programs = x["grams"].shape[0]
    return (SourceLoop("tasks", -(-tasks // programs), (chunks, squares), is_kept=True),)


def _levels(x: Mapping[str, Any]) -> int:
    """Return how often a chunk is halved."""
    return int(x["C"]).bit_length() - 1


def _columns_of_channels(x: Mapping[str, Any], *inner: SourceLoop) -> SourceLoop:
    columns = -(-x["K"] // min(x["BK"], CHANNELS.value))
    return SourceLoop("columns of K", columns, inner, is_constant=True)


def _norms(x: Mapping[str, Any]) -> Loops:
    """Return the loops over columns of K that q and k each have where they are normalised."""
    return (_columns_of_channels(x),) * 2 if x["NORM"] else ()


def _prepare_channels(x: Mapping[str, Any]) -> Loops:
    tasks = -(-x["chunk_slots"] * x["HV"] // PAIRS.value)
    levels = SourceLoop("levels", _levels(x), is_constant=True)
    inner = _columns_of_channels(x), *_norms(x), _columns_of_channels(x, levels)
    squares = SourceLoop("squares", PAIRS.value, inner, is_kept=True)
    programs = x["grams"].shape[0]
    return (SourceLoop("tasks", -(-tasks // programs), (squares,), is_kept=True),)


def _channel_gradients(x: Mapping[str, Any]) -> Loops:
    levels = SourceLoop("levels", _levels(x), is_constant=True)
    # Half of them, on average.
    below = SourceLoop("levels below", _levels(x) // 2, is_kept=True)
    halves = SourceLoop("halves", _levels(x), (below,), is_constant=True)
    heads = _heads(x, _columns(x), levels, halves)
    inner = *_norms(x), _columns_of_channels(x, heads), *_norms(x)
    tasks, programs = x["chunk_slots"] * x["H"], x["totals"].shape[0]
    return (SourceLoop("tasks", -(-tasks // programs), inner, is_kept=True),)


def _token_gradients(x: Mapping[str, Any]) -> Loops:
    columns = _columns(x)
    corners = () if x["TMA"] or x["GATE"] == NO_DECAY.value else (columns,)
    pairs = _heads(x, columns)
    of_a = (pairs,) if x["ERASE"] else ()
    rare = (_rare_pairs(x),) if x["GATE"] == ALPHA.value else ()
    has_gates = x["GATE"] != NO_DECAY.value or x["HAS_BETA"]
    fours = SourceLoop("four value heads", -(-x["R"] // HEADS.value), is_kept=True)
    gates = (fours,) if has_gates else ()
    return pairs, _heads(x, columns, *corners), *of_a, pairs, pairs, *rare, *gates


def _rare_pairs(x: Mapping[str, Any]) -> SourceLoop:
    of_k = SourceLoop("columns of K", -(-x["K"] // min(x["BK"], WIDTH.value)), is_constant=True)
    rows = SourceLoop("rows of pairs", x["C"] // ROWS.value, (_columns(x), of_k), is_constant=True)
    # No gate of a named case is rare.
    kinds = SourceLoop("kinds of rare gates", 0, (rows,), is_kept=True, may_rest=True)
    return _heads(x, kinds)


def _compose(x: Mapping[str, Any]) -> Loops:
    rows = SourceLoop("rows of M", -(-x["K"] // x["BR"]), is_constant=True)
    # The first two cuts need no product.
    segments = max(-(-x["T"] // x["tokens"]) - 2, 0)
    return (SourceLoop("segments", segments, (rows,), is_kept=True, may_rest=True),)


def _compose_whole(x: Mapping[str, Any]) -> Loops:
    rows = SourceLoop("rows of M", -(-x["K"] // x["BR"]), is_constant=True)
    return (SourceLoop("segments", -(-x["T"] // x["tokens"]), (rows,), is_kept=True),)


KERNELS: dict[str, Callable[[Mapping[str, Any]], Loops]] = {
    "prepare": _prepare,
    "walk": _walk,
    "compose": _compose,
    "compose_whole": _compose_whole,
    "walk_back": _chunks,
    "token_gradients": _token_gradients,
    "prepare_channels": _prepare_channels,
    "square_gradients": lambda x: (_columns(x),),
    "channel_gradients": _channel_gradients,
    "tokens": lambda x: (SourceLoop("tokens", x["T"], is_kept=True),),
}
"""By the name of a kernel: its loops, given the arguments of a launch by name, in the order of the
source."""


def loops_of(launch: Launch) -> Sequence[SourceLoop] | None:
    """Return the loops of a launch whose sequences are as long, or None of an unknown kernel."""
    loops = KERNELS.get(launch.kernel.__name__)
    return None if loops is None else loops(_given(launch))


def grid_of(launch: Launch) -> tuple[int, ...]:
    """Return the grid of a launch without the programs that compose beside a walk."""
    grid, composed = launch.grid, _given(launch).get("COMPOSED", 0)
    return (grid[0], grid[1] - composed) if composed else grid


def _given(launch: Launch) -> Mapping[str, Any]:
    """Return the arguments of a launch by name."""
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
