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
    return (SourceLoop("chunks", -(-x["T"] // x["C"])),)


def _heads(x: Mapping[str, Any], *inner: SourceLoop) -> SourceLoop:
    return SourceLoop("value heads", x["R"], inner, is_constant=True)


def _columns(x: Mapping[str, Any]) -> SourceLoop:
    return SourceLoop("columns of V", -(-x["V"] // x["BV"]), is_constant=True)


def _output(x: Mapping[str, Any]) -> Loops:
    chunks = x["CHUNKS_PER_STATE"]
    return (_heads(x),) if chunks == 1 else (SourceLoop("chunks of a state", chunks),)


KERNELS: dict[str, Callable[[Mapping[str, Any]], Loops]] = {
    "solve": lambda x: (_heads(x),),
    "states": _chunks,
    "output": _output,
    "local_gradients": lambda x: (_heads(x),),
    "state_gradients": _chunks,
    "pair_gradients": lambda x: (_heads(x, _columns(x)),),
    "token_gradients": lambda x: (_heads(x, _columns(x)), _heads(x, _columns(x))),
    "tokens": lambda x: (SourceLoop("tokens", x["T"]),),
}
"""By the name of a kernel: its loops, given the arguments of a launch by name, in the order of the
source."""


def loops_of(launch: Launch) -> Sequence[SourceLoop] | None:
    """Return the loops of a launch whose sequences are as long, or None of an unknown kernel."""
    loops = KERNELS.get(launch.kernel.__name__)
    if loops is None:
        return None
    return loops(dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs)
