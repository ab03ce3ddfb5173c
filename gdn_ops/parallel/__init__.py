"""Cut sequences into runs, and split them over processes: exactly, by summaries or by states."""

from __future__ import annotations

from gdn_ops.parallel.context import sequence_parallel
from gdn_ops.parallel.exchange import Traffic, counting
from gdn_ops.parallel.failures import ParallelError
from gdn_ops.parallel.sequence import gated_delta
from gdn_ops.parallel.split import Piece, SequenceSplit
from gdn_ops.parallel.summary import Summary, compose, gated_delta_summary
from gdn_ops.parallel.tensor import tensor_plan

__all__ = [
    "ParallelError",
    "Piece",
    "SequenceSplit",
    "Summary",
    "Traffic",
    "compose",
    "counting",
    "gated_delta",
    "gated_delta_summary",
    "sequence_parallel",
    "tensor_plan",
]
