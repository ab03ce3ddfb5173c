"""`gdn-ops compile` shows what each launch costs, and writes all that it knows as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ahead_of_time import Launching, sequence
from command_line import run
from gdn_ops.aot.jobs import Built, Made, _timed, launches_of
from gdn_ops.aot.machine_code import Code, Counts, Loop
from gdn_ops.aot.model import predict
from gdn_ops.aot.processors import GPUS
from gdn_ops.aot.results import CompiledKernel, Sample, TimedLaunch
from gdn_ops.aot.sass import Usage
from gdn_ops.aot.source_loops import SourceLoop
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch, note
from gdn_ops.spec.rules import Limits

CASE = "qwen-16-64-8192"
HEAD = Loop(-1, 0, False, Counts(instructions=600, hgmma=28, register_a=24, barriers=2))
WAIT = Loop(0, 1, True, Counts(instructions=3))
WALK = Code(Counts(instructions=100), (HEAD, WAIT))
FLAT = Code(Counts(instructions=60000))
SOLVE = Code(Counts(instructions=500), (Loop(-1, 0, False, Counts(instructions=900)),))


def launch(code: Code, trips: dict[int, int] | None, **fields: Any) -> TimedLaunch:
    """Return a launch of 4 warps a program, two of which fit a processor."""
    given = {"sample": f"{CASE} inference", "direction": "forward", "order": 0, "bytes": 4800}
    one = TimedLaunch(**given | {"grid": (64, 2)} | fields)  # type: ignore[arg-type]
    if trips is None:
        return one
    work = code.trip(-1, trips)
    time = predict(GPUS["sm_90"], work, 4, 2, one.grid, one.bytes)
    return replace(one, trips=trips, work=work, prediction=time)


class Timing(Backend):
    """A backend whose kernels are given."""

    name = "timing"
    limits = Limits(devices=("cuda",), dtypes=("bfloat16",), head_dims=(128,))
    targets = ("sm_90",)
    kernels_of_all: tuple[CompiledKernel, ...] = ()

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        yield from self.kernels_of_all


@pytest.fixture(autouse=True)
def _timing(registry_as_found: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    registry.register_backend(Timing)


def shown(*arguments: str) -> list[str]:
    """Return the lines of the second table."""
    result = run("compile", CASE, "--backend", "timing", *arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("launch "))
    return lines[start : lines.index("", start)]


def kernel(name: str, code: Code, *launches: TimedLaunch, **fields: Any) -> CompiledKernel:
    own = {"warps": 4, "programs": 2, "registers": 249} | fields
    return CompiledKernel(name, f"{CASE} inference", "sm_90", code=code, launches=launches, **own)


def test_a_row_is_a_launch_and_a_section_a_call_in_a_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = {"sample": f"{CASE} training"}
    walks = [
        launch(WALK, {0: 128}, order=1),
        launch(WALK, {0: 128}, order=1, **training),
        launch(WALK, {0: 128}, order=0, direction="backward", **training),
    ]
    solves = [
        launch(SOLVE, {0: 4}, grid=(128, 16)),
        launch(SOLVE, {0: 4}, grid=(128, 16), **training),
    ]
    rows = (kernel("walk", WALK, *walks), kernel("solve", SOLVE, *solves))
    monkeypatch.setattr(Timing, "kernels_of_all", rows)
    # The forward of training is that of inference, and is not shown again.
    assert shown() == [
        "launch   fit  waves  hot loop   reg. A    barriers  us    bound",
        "qwen-16-64-8192 inference, forward: 141.5 us",
        "  solve  2    7.76   900 x 4    -         0         62.3  issue",
        "  walk   2    0.48   603 x 128  24 of 28  2         79.2  serial",
        "qwen-16-64-8192 training, backward: 79.2 us",
        "  walk   2    0.48   603 x 128  24 of 28  2         79.2  serial",
    ]
    # Another grid is another forward.
    other = (rows[0], kernel("solve", SOLVE, solves[0], replace(solves[1], grid=(64, 16))))
    monkeypatch.setattr(Timing, "kernels_of_all", other)
    assert "qwen-16-64-8192 training, forward: 141.5 us" in shown()


def test_what_is_not_known_is_said_and_makes_no_total(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        kernel("walk", WALK, launch(WALK, None)),
        kernel("solve", SOLVE, replace(launch(SOLVE, {0: 4}, order=1), prediction=None)),
        kernel("output", FLAT, launch(FLAT, {}, order=2)),
        kernel("broken", Code(), launch(Code(), None, order=3), warps=0, programs=0),
    )
    monkeypatch.setattr(Timing, "kernels_of_all", rows)
    assert shown()[1:] == [
        "qwen-16-64-8192 inference, forward: not predicted",
        "  walk    2           trips not known",
        "  solve   2           does not fit",
        "  output  2    0.48   60000 x 1         -       0         57.0  issue",
        "  broken              does not compile",
    ]


def test_loops_are_shown_with_what_is_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Loop(0, 1, False, Counts(instructions=7, shuffles=5, special=1, spills=2, waits=3))
    code = Code(WALK.outside, (HEAD, inner, replace(WAIT, parent=1, depth=2)))
    monkeypatch.setattr(Timing, "kernels_of_all", (kernel("walk", code),))
    result = run("compile", CASE, "--backend", "timing", "--loops")
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("loop "))
    assert lines[start : lines.index("", start)] == [
        "loop        all  matrix  reg. A  bar.  wait  ld  st  shfl  spill  mufu",
        "walk, qwen-16-64-8192 inference",
        "  outside   100  0       0       0     0     0   0   0     0      0",
        "  loop      600  0       24      2     0     0   0   0     0      0",
        "    loop    7    0       0       0     3     0   0   5     2      1",
        "      wait  3    0       0       0     0     0   0   0     0      0",
    ]


def test_the_json_has_the_loops_of_kernels_and_the_times_of_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = launch(WALK, {0: 128}, order=1, read=4000, written=800)
    rows = (kernel("solve", SOLVE, launch(SOLVE, None)), kernel("walk", WALK, walk))
    monkeypatch.setattr(Timing, "kernels_of_all", rows)
    result = run("compile", CASE, "--backend", "timing", "--json")
    data = json.loads(result.stdout)
    assert list(data) == ["backend", "date", "versions", "kernels", "launches", "totals"]
    _, walked = data["kernels"]
    assert (walked["registers"], walked["warps"], walked["programs"]) == (249, 4, 2)
    assert walked["code"] == WALK.values() and "launches" not in walked
    assert data["launches"][0] == {
        **{"target": "sm_90", "sample": f"{CASE} inference", "direction": "forward"},
        **{"kernel": "solve", "order": 0, "grid": [64, 2], "bytes": 4800},
        **{"read": None, "written": None, "trips": None, "row": 0},
    }
    hot = {"trips": 128, "instructions": 603, "hgmma": 28, "register_a": 24, "barriers": 2}
    time = walk.prediction
    assert time is not None
    assert data["launches"][1] == {
        **{"target": "sm_90", "sample": f"{CASE} inference", "direction": "forward"},
        **{"kernel": "walk", "order": 1, "grid": [64, 2], "bytes": 4800},
        **{"read": 4000, "written": 800, "trips": [128, None], "row": 1, "hot_loop": hot},
        "executed": 100 + 128 * 603,
        **{"waves": time.waves, "issue_us": time.issue_us, "bytes_us": time.bytes_us},
        **{"us": time.us, "bound": "serial"},
    }
    total = {"target": "sm_90", "sample": f"{CASE} inference", "direction": "forward", "us": None}
    assert data["totals"] == [total]
    # A kernel or a launch a line.
    assert sum(line.startswith('  {"') for line in result.stdout.splitlines()) == 2 + 2 + 1


def made_by(backend: Backend, sample: Sample) -> list[tuple[str, int, bool]]:
    return [(x.direction, x.order, x.is_packed) for x in launches_of(backend, sample, "sm_90")]


def test_launches_are_noted_with_their_direction_and_place() -> None:
    x = torch.empty(1, device="meta")

    def twice(call: Call) -> None:
        for _ in range(2):
            note(Launch(made_by, (1,), (x,), {}))

    backend = Launching(twice, dtypes=("bfloat16",), head_dims=(128,))
    assert made_by(backend, sequence()) == [("forward", 0, False), ("forward", 1, False)]
    assert made_by(backend, sequence(N=7)) == [("forward", 0, True), ("forward", 1, True)]
    # A case that the backend cannot run.
    assert made_by(backend, sequence(dtype="float16")) == []


def test_trips_are_not_known_of_packed_sequences_and_a_time_only_where_a_program_fits() -> None:
    built = Built(
        *(0, 4, 0, Usage(249, 0, 0, {}, WALK), ()), loops=lambda x: [SourceLoop("chunks", 128)]
    )
    x = torch.empty(30, 40, device="meta")
    made = Made(Launch(made_by, (64, 2), (x, x, 7), {}), f"{CASE} inference", "forward", 0, False)
    expected = launch(WALK, {0: 128}, bytes=2 * 4800)
    assert _timed(made, built, 2, "sm_90") == expected
    assert _timed(made, built, 0, "sm_90") == replace(expected, work=None, prediction=None)
    assert _timed(made._replace(is_packed=True), built, 2, "sm_90") == launch(
        WALK, None, bytes=2 * 4800
    )
    moved = built._replace(moved=lambda x: (4000, 800))
    assert _timed(made, moved, 2, "sm_90") == launch(WALK, {0: 128}, read=4000, written=800)
