"""Say which loops a launch has in the source of its kernel, and how often each is run.

A kernel that changes its loops changes its entry here; one that has no entry has no predicted time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdn_ops.aot.source_loops import SourceLoop
from gdn_ops.kernel_support.launches import Launch

Loops = tuple[SourceLoop, ...]


def _chunks(x: Mapping[str, Any]) -> Loops:
    """Return the loop over the chunks of a sequence, or of a segment of L chunks."""
    chunks = -(-x["T"] // x["C"])
    return (SourceLoop("chunks", min(chunks, x["L"] or chunks), is_kept=True),)


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


def _compose(x: Mapping[str, Any]) -> Loops:
    rows = SourceLoop("rows of M", -(-x["K"] // x["BR"]), is_constant=True)
    # The first two cuts need no product.
    segments = max(-(-x["T"] // x["tokens"]) - 2, 0)
    return (SourceLoop("segments", segments, (rows,), is_kept=True),)


KERNELS: dict[str, Callable[[Mapping[str, Any]], Loops]] = {
    "prepare": _prepare,
    "walk": _chunks,
    "compose": _compose,
    "walk_back": _chunks,
    "pair_gradients": lambda x: (_heads(x, _columns(x)),),
    "token_gradients": lambda x: (_heads(x, _columns(x)), _heads(x, _columns(x))),
    "tokens": lambda x: (SourceLoop("tokens", x["T"], is_kept=True),),
}
"""By the name of a kernel: its loops, given the arguments of a launch by name, in the order of the
source."""


def loops_of(launch: Launch) -> Sequence[SourceLoop] | None:
    """Return the loops of a launch whose sequences are as long, or None of an unknown kernel."""
    loops = KERNELS.get(launch.kernel.__name__)
    if loops is None:
        return None
    return loops(dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs)
