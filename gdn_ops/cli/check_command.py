"""Run `gdn-ops check`: judge a backend, show the verdict, record it."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import gdn_ops
from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import ALL, Options, UsageError, add_command, integer, names, real
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.explain import runs_or_emulates_here, status_of
from gdn_ops.environment import certificate
from gdn_ops.environment.devices import check_device
from gdn_ops.terminal.output import print_json
from gdn_ops.terminal.progress import progress
from gdn_ops.terminal.tables import table, wrapped

if TYPE_CHECKING:
    from gdn_ops.testing.conformance import CheckReport

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""

SECONDS = 60.0


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        run,
        "Certify backends on this machine by random calls, compared with the definition.",
        more="Judges outputs, states and gradients against float64, and the laws of the "
        "recurrence. The result is recorded for this device and these versions.",
        examples=("gdn-ops check", "gdn-ops check --backend torch --seconds 10 --seed 1"),
    )
    parser.add_argument(
        "--backend",
        type=names,
        metavar="NAMES",
        help='backends, with commas between; "all" is every one that is available here (default)',
    )
    parser.add_argument(
        "--seconds",
        type=real(0.1),
        metavar="SECONDS",
        default=SECONDS,
        help="time for each backend (default 60)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        metavar="NUMBER",
        help="seed of the random calls (default: a new one each time)",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="a torch device (default: a GPU that the backend runs on, else cpu)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Options) -> int:
    """Check backends one after the other; return the exit code."""
    if importlib.util.find_spec("hypothesis") is None:
        raise UsageError("check needs the testing extra: pip install 'gdn_ops[testing]'")
    if options.device is not None:
        check_device(options.device)
    reports = []
    for name in checkable(options.backend or ALL):
        report = judge(name, options.seconds, options.seed, options.device or "")
        backend = registry.get_backend(name)
        assert not isinstance(backend, str)
        kept = record(backend, report)
        reports.append((report, kept))
        if not options.json:
            show(report)
            print(wrapped(kept, indent="  ") + "\n", flush=True)
    if options.json:
        print_json({"schema": SCHEMA, "reports": [as_data(*pair) for pair in reports]})
    passed = all(report.passed for report, _ in reports)
    return exit_codes.DONE if passed else exit_codes.WRONG


def checkable(given: tuple[str, ...]) -> list[str]:
    """Return the names of the backends to check.

    Raises:
        SpecError, UsageError: one is unknown, or not available here, for a reason that is said.
    """
    if given == ALL:
        return [i.name for i in gdn_ops.list_backends() if i.status == "available"]
    for name in given:
        backend = registry.get_backend(name)
        if isinstance(backend, str):
            raise UsageError(f"backend {name!r} is not available: {backend}")
        if backend.absence() or not runs_or_emulates_here(backend.limits):
            raise UsageError(f"backend {name!r} is not available: {status_of(backend)}")
    return list(given)


def judge(name: str, seconds: float, seed: int | None, device: str) -> CheckReport:
    """Check one backend and return what came out.

    Args:
        name: of a backend that is available.
        seconds: how long.
        seed: of the random calls; random if None.
        device: torch device; where the backend runs best if empty.
    """
    # The kit needs hypothesis, which is looked for before.
    from gdn_ops.cli.check_worker import check_side_by_side
    from gdn_ops.testing.conformance import check

    backend = registry.get_backend(name)
    assert not isinstance(backend, str)
    where = device or best_device(backend)
    # A kernel that takes the process with it, or hangs, must not keep its certificate.
    try:
        certificate.suspend(type(backend), where)
    except OSError as error:
        warnings.warn(f"the old certificate could not be taken back: {error}", stacklevel=2)
    compiles = backend.kernels and where.partition(":")[0] == "cuda"
    with progress(None, name) as advance:
        return (check_side_by_side if compiles else check)(
            name,
            seconds,
            on_progress=lambda share, text: advance(f"{name}, {share:.0%}: {text}"),
            seed=seed,
            device=where,
        )


def best_device(backend: Backend) -> str:
    """Return the GPU where a backend can run on one, else the CPU."""
    on_gpu = torch.cuda.is_available() and {"*", "cuda"} & set(backend.limits.devices)
    return "cuda" if on_gpu else "cpu"


def show(report: CheckReport) -> None:
    """Print a row per subject, and the smallest failing calls as code."""
    rows = [
        (r.subject, str(r.examples), f"{r.worst:.3g}", "pass" if r.passed else "FAIL")
        for r in report.rows
    ]
    print(f"backend {report.backend} on {report.device}; error in units of what is allowed")
    print(table(("subject", "calls", "error", ""), [("", rows)]))
    for row in report.rows:
        if row.failure is not None:
            print(f"\n{row.subject}: the smallest call that fails\n{row.failure}")
    verdict = "passed" if report.passed else "failed"
    print(f"{report.backend}: {report.examples} calls in {report.seconds:.0f} s, {verdict}")


def as_data(report: CheckReport, kept: str) -> dict[str, Any]:
    """Return a report as plain data; `kept` says where it was recorded."""
    whole = {"passed": report.passed, "examples": report.examples, "recorded": kept}
    return {**asdict(report), **whole}


def record(backend: Backend, report: CheckReport) -> str:
    """Record the result of a check; return a line that says where, or why it could not be."""
    result = certificate.issue(
        type(backend),
        report.device,
        passed=report.passed,
        examples=report.examples,
        seconds=report.seconds,
        seed=report.seed,
    )
    kind = "certificate" if result.passed else "failure, no certificate,"
    try:
        path = certificate.record(result)
    except OSError as error:
        return f"the {kind} for {result.device} could not be recorded: {error}"
    return f"{kind} for {result.device} recorded in {path}"
