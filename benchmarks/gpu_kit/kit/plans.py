"""List the stages of each plan as data.

In a command `{python}`, `{tree}`, `{kit}`, `{work}` and `{seconds}` stand for the interpreter, the
unpacked repository, the folder of this file, a folder for what the stage writes, and the time that
it has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


class UnknownPlanError(ValueError):
    """Report a name that is no plan, or a file that holds none."""


@dataclass(frozen=True)
class Stage:
    """Describe one command, its limit, and what is read from its lines.

    Attributes:
        name: of the stage, and of its file.
        command: the words of the command.
        seconds: its time limit.
        least: with less time left than this, it is not begun.
        needs_gpu: whether it is left out where there is no GPU.
        tool: a program that it needs, or "".
        shows: a pattern; matching lines are printed as they come.
        rows: a pattern whose first group is a row to paste, or "".
        table: a file of the tree whose table the rows go into, for the stages that follow.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 5.0
    needs_gpu: bool = True
    tool: str = ""
    shows: str = ""
    rows: str = ""
    table: str = ""


FASTEST = r"^fastest [^:]+: (.+)$"
TRITON_TABLE = "backends/triton/host/table.py"
TILELANG_TABLE = "backends/tilelang/host/table.py"
VERDICTS = r"PASSED|FAILED|ERROR|Error|passed|failed|no tests ran"
OPS = ("{python}", "-m", "gdn_ops")
TESTS = ("{python}", "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short")
SHAPES = ("qwen-16-64-8192", "qwen-16-32-8192")


def _probe(name: str, *words: str) -> tuple[str, ...]:
    """Return the command of a script of this folder."""
    return ("{python}", f"{{kit}}/{name}.py", *words)


def _tune(name: str, backend: str, table: str, seconds: float, *cases: str) -> Stage:
    """Return the stage that measures the configurations of a backend on cases in bfloat16."""
    setting = ("--device", "cuda", "--dtype", "bfloat16")
    command = (*OPS, "bench", "--tune", backend, *setting, *cases)
    return Stage(name, command, seconds, 20.0, rows=FASTEST, table=table)


def _bench(seconds: float, *words: str) -> Stage:
    """Return the stage of `bench gpu`, which ends by itself a little before its time is up."""
    command = (*OPS, "bench", "gpu", "--seconds", "{seconds}", "--out", "{work}", *words)
    return Stage("bench", command, seconds, 40.0)


CEILINGS = Stage("ceilings", _probe("ceilings"), 30.0, needs_gpu=False)
PLANS: dict[str, tuple[Stage, ...]] = {
    # Is it right, how fast is it, which configuration: forward and decode, Triton first.
    "first": (
        CEILINGS,
        Stage(
            "launches",
            (*TESTS, "{tree}/tests/backends/triton", "{tree}/tests/backends/tilelang"),
            *(60.0, 10.0),
            shows=VERDICTS,
        ),
        Stage(
            "sanitizer",
            _probe("sanitize", "triton", "tilelang"),
            *(60.0, 15.0),
            tool="compute-sanitizer",
        ),
        Stage("check", _probe("short_check", "{seconds}", "triton", "tilelang"), 30.0, 10.0),
        _tune("sweep", "triton", TRITON_TABLE, 120.0, *SHAPES),
        _bench(180.0),
        Stage("ncu", _probe("profile_launches", "forward 16/64 T=8192"), 40.0, 15.0, tool="ncu"),
    ),
    # Backward, what the first run made us repair, and TileLang.
    "second": (
        CEILINGS,
        Stage(
            "launches",
            (*TESTS, "{tree}/tests/backends/tilelang", "{tree}/tests/backends/triton"),
            *(60.0, 10.0),
            shows=VERDICTS,
        ),
        Stage("check", _probe("short_check", "{seconds}", "tilelang", "triton"), 40.0, 10.0),
        _tune("sweep-tilelang", "tilelang", TILELANG_TABLE, 120.0, *SHAPES),
        _tune("sweep-triton", "triton", TRITON_TABLE, 90.0, "qwen-16-32-step-b1", SHAPES[1]),
        _bench(170.0),
        Stage("ncu", _probe("profile_launches", "backward 16/32 T=8192"), 40.0, 15.0, tool="ncu"),
    ),
    # Certificates, and the figures that are kept.
    "third": (
        CEILINGS,
        *(
            Stage(
                f"check-{backend}",
                (
                    *("env", "GDN_OPS_CACHE={work}", *OPS, "check", "--backend", backend),
                    *("--device", "cuda", "--seconds", str(share)),
                ),
                *(share + 30.0, 20.0),
            )
            for backend, share in (("triton", 80), ("tilelang", 80), ("torch", 20))
        ),
        _bench(250.0),
    ),
}


def read_plan(name: str) -> tuple[Stage, ...]:
    """Return the stages of a plan that is named, or that a JSON file holds.

    Raises:
        UnknownPlanError: there is no such plan, or the file does not describe stages.
    """
    if name in PLANS:
        return PLANS[name]
    if not name.endswith(".json"):
        raise UnknownPlanError(f"no plan is called {name!r}, known: {', '.join(PLANS)}")
    try:
        entries = json.loads(Path(name).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Stage)}
        for entry in entries:
            if unknown := entry.keys() - known:
                raise UnknownPlanError(f"{name}: a stage has no {', '.join(sorted(unknown))}")
        return tuple(Stage(**{**entry, "command": tuple(entry["command"])}) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnknownPlanError(f"{name}: {error}") from error


def choose(stages: tuple[Stage, ...], names: str | None) -> tuple[Stage, ...]:
    """Return the stages with some names, which have commas between them; all where none is given.

    Raises:
        UnknownPlanError: no stage has one of the names.
    """
    wanted = names.split(",") if names else [stage.name for stage in stages]
    known = {stage.name: stage for stage in stages}
    for name in wanted:
        if name not in known:
            raise UnknownPlanError(f"no stage is called {name!r}, known: {', '.join(known)}")
    return tuple(stage for stage in stages if stage.name in wanted)
