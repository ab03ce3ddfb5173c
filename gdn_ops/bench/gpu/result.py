"""Hold the result of `bench gpu`: its outcomes, and the JSON that is written after every row."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gdn_ops.bench.gpu.device import find_peaks
from gdn_ops.bench.gpu.rows import PUBLISHED_ON, Goal, GpuRow
from gdn_ops.bench.rows import write_json

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of one contender in a row; times in milliseconds.

    Attributes:
        contender, version, is_peer: name of the contender, its version, whether it is a peer.
        status: "measured", "unsupported", "failed", "wrong" or "left out".
        reason: why not "measured", or a remark.
        kernel, kernel_best: median and least time of the device's work.
        kernel_by: "graph", or "events" where it cannot be captured: then launches are in it.
        samples: interleaved rounds.
        wall, host: median of a call until the device is done, and until it returns.
        error, error_of: largest relative error to float64 per head, and of which result.
        peak: MiB allocated at most, above the operands; of forward and backward for a backward.
        roofline: the cost model's time at datasheet rates over the kernel time.
        first_call: seconds of the first call, compilation included.
        sets, set_mib: how many sets of operands take turns, and MiB of one.
        launches: "name" and "ms" of every launch of a call of ours in order, by events.
        sm_mhz, memory_mhz: clocks right after the row was timed, or None.
    """

    contender: str
    version: str
    is_peer: bool
    status: str
    reason: str = ""
    kernel: float | None = None
    kernel_best: float | None = None
    kernel_by: str = ""
    samples: int = 0
    wall: float | None = None
    host: float | None = None
    error: float | None = None
    error_of: str = ""
    peak: float | None = None
    roofline: float | None = None
    first_call: float | None = None
    sets: int = 0
    set_mib: float | None = None
    launches: list[dict[str, Any]] = field(default_factory=list)
    sm_mhz: float | None = None
    memory_mhz: float | None = None


def roofline_seconds(row: GpuRow, device_name: str) -> float | None:
    """Return a row's least seconds by the cost model at datasheet rates, or None if unknown."""
    peaks, work = find_peaks(device_name), row.work()
    if peaks is None or work is None:
        return None
    matrix = peaks.float32 if row.dtype == "float32" or row.what == "step" else peaks.matrix
    return max(work[0] / matrix, work[1] / peaks.bytes)


@dataclass(frozen=True)
class Conformance:
    """Hold the result of the short check of one of our backends, made before it is timed.

    Attributes:
        backend: its name.
        passed: whether nothing was wrong.
        examples: how many calls were judged.
        total: how many there are.
        worst: largest error / allowance.
        text: how a call fails and the smallest that does, as code; or why not all were judged.
    """

    backend: str
    passed: bool
    examples: int
    total: int
    worst: float = 0.0
    text: str = ""

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        counted = f"{self.examples} of {self.total} calls, worst error / allowance {self.worst:.2g}"
        return f"{self.backend}: {verdict}, {counted}" + (f"\n{self.text}" if self.text else "")


def reached(goal: Goal, outcome: Outcome) -> bool | None:
    """Return whether an outcome reaches a goal; None where it was not measured."""
    value = getattr(outcome, goal.what)
    if outcome.status != "measured" or value is None:
        return None
    return bool(value <= goal.at_most)


@dataclass
class GpuResult:
    """Hold the result of one run.

    Attributes:
        system: device, driver, versions, date, time given.
        conformance: of each of our backends.
        left_out: (name, reason) of every backend that is not measured at all.
        rows: every row with its outcomes, in the order in which they were measured.
        failed: whether a backend of ours is wrong, or has failed in its check or in a row.
    """

    system: dict[str, Any]
    conformance: list[Conformance] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    rows: list[tuple[GpuRow, list[Outcome]]] = field(default_factory=list)
    failed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "schema": SCHEMA,
            "system": self.system,
            "published_on": PUBLISHED_ON,
            "conformance": [asdict(c) for c in self.conformance],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "rows": [self._row(row, outcomes) for row, outcomes in self.rows],
            "failed": self.failed,
        }

    @staticmethod
    def _row(row: GpuRow, outcomes: list[Outcome]) -> dict[str, Any]:
        by_name = {o.contender: o for o in outcomes}
        goals = [
            {**asdict(g), "reached": reached(g, by_name[g.backend])}
            for g in row.goals
            if g.backend in by_name
        ]
        return {
            "name": row.name,
            "what": row.what,
            "sizes": asdict(row.sizes),
            "lengths": list(row.lengths),
            "packed": row.packed,
            "dtype": row.dtype,
            "state_dtype": row.state_dtype if row.what == "step" else "float32",
            "published": [asdict(p) for p in row.published],
            "goals": goals,
            "outcomes": [asdict(o) for o in outcomes],
        }

    @property
    def stem(self) -> str:
        """Return the name of the files without suffix: "gpu-nvidia-h200"."""
        name = "".join(c if c.isalnum() else "-" for c in str(self.system["device"]).lower())
        return f"gpu-{name.strip('-')}"

    def write_json(self, folder: Path) -> Path:
        """Write the result so far as JSON and return its path."""
        return write_json(self.to_json(), folder / f"{self.stem}.json")
