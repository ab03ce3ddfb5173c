"""Hold the rows and the result of `gdn-ops bench paper`, which become JSON, table and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gdn_ops.bench.paper.break_even import BreakEven, break_even
from gdn_ops.bench.paper.memory import Kept, equal_context
from gdn_ops.bench.paper.skeletons import ATTENTION
from gdn_ops.bench.paper.timing import Spread
from gdn_ops.bench.rows import Result, Row


@dataclass(frozen=True)
class PaperRow(Row):
    """Hold the time of one contender, as Row does, and what it was a time of.

    Attributes:
        worst: the longest sample, in `unit`.
        width: of the model or the layer.
        length: tokens of a sequence; of decode, those before the token.
        batch: sequences.
        tokens_per_second: at the median.
        joules_per_token: median; None where energy is not counted.
    """

    worst: float = 0.0
    width: int = 0
    length: int = 0
    batch: int = 1
    tokens_per_second: float = 0.0
    joules_per_token: float | None = None


@dataclass(frozen=True)
class Crossing:
    """Hold from which length on a contender is faster than attention."""

    what: str
    comparator: str
    width: int
    at: BreakEven


@dataclass
class PaperResult(Result):
    """Hold a result as Result does, and what only this benchmark has.

    Attributes:
        parameters: of every model: those of its mixers and of everything else.
        energy: the name of what counts it, or None and the reason.
        crossings: break-even lengths.
        kept: bytes that models remember.
    """

    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    energy: dict[str, str | None] = field(default_factory=dict)
    crossings: list[Crossing] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            **super().to_json(),
            "parameters": self.parameters,
            "energy": self.energy,
            "break_even": [
                {"what": x.what, "comparator": x.comparator, "width": x.width, **asdict(x.at)}
                for x in self.crossings
            ],
            "memory": [asdict(x) for x in self.kept],
            "equal_context": equal_context(self.kept),
        }


@dataclass(frozen=True)
class Cell:
    """Say what one time is of: a contender, a width, and sequences of a length."""

    comparator: str
    width: int
    length: int
    batch: int


def rows_of(
    what: str, spreads: Mapping[Cell, Spread], dtype: str, tokens: int | None = None
) -> list[PaperRow]:
    """Return the rows of times, each with its ratio to attention at its width and length.

    Args:
        what: was timed.
        spreads: times by cell.
        dtype: of the model.
        tokens: that a sample computes; those of the batch if None.
    """
    rows = []
    for cell, x in spreads.items():
        computed = cell.batch * cell.length if tokens is None else tokens
        scale = 1e3 if tokens is None else 1e3 / tokens
        peer = spreads.get(Cell(ATTENTION, cell.width, cell.length, cell.batch))
        joules = x.joules
        case = f"{cell.batch}x{cell.length}" if tokens is None else f"context-{cell.length}"
        rows.append(
            PaperRow(
                what,
                case,
                cell.comparator,
                "ms",
                x.median * scale,
                x.least * scale,
                len(x.samples),
                None if peer is None else peer.median / x.median,
                None if peer is None else ATTENTION,
                dtype=dtype,
                worst=x.most * scale,
                width=cell.width,
                length=cell.length,
                batch=cell.batch,
                tokens_per_second=computed / x.median,
                joules_per_token=None if joules is None else joules / computed,
            )
        )
    return rows


def crossings_of(rows: list[PaperRow]) -> list[Crossing]:
    """Return from which length on every contender is faster than attention, by width."""
    times: dict[tuple[str, int, str], dict[int, float]] = {}
    for row in rows:
        group = times.setdefault((row.what, row.width, row.comparator), {})
        group[row.length] = 1 / row.tokens_per_second
    found = []
    for (what, width, name), own in times.items():
        other = times.get((what, width, ATTENTION), {})
        # One of them may have had no memory for the longest.
        both = own.keys() & other.keys()
        if name != ATTENTION and both:
            at = break_even({n: own[n] for n in both}, {n: other[n] for n in both})
            found.append(Crossing(what, name, width, at))
    return found
