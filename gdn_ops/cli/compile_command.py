"""Run `gdn-ops compile`: compile and judge kernels for GPUs, show and write the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdn_ops.aot.gpu_limits import refusal
from gdn_ops.aot.results import CompiledKernel, CompilesAhead
from gdn_ops.aot.sampling import samples
from gdn_ops.cli import exit_codes
from gdn_ops.cli.compile_report import as_json, show
from gdn_ops.cli.parser import ALL, Options, UsageError, add_command, names, one_name, path
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.environment.files import whole
from gdn_ops.spec.cases import GPU_CASES
from gdn_ops.spec.language import Case
from gdn_ops.spec.names import unknown
from gdn_ops.spec.ops import OPS
from gdn_ops.terminal.output import check_file
from gdn_ops.terminal.progress import progress


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compile",
        run,
        "Compile kernels for GPUs, present or not, and judge the generated code.",
        more="A row of the first table is the code of a kernel: shared memory in bytes, registers, "
        "spilled registers, stack in bytes, and instructions of matrix units. A row of the second "
        "is a launch of it, with its hot loop and the time that a model predicts: docs/cli.md.",
        examples=(
            "gdn-ops compile --backend triton",
            "gdn-ops compile qwen-16-32-8192 --backend triton --target sm_90,gfx942",
        ),
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="named cases of any op (default: all)"
    )
    parser.add_argument(
        "--backend",
        type=one_name,
        required=True,
        metavar="NAME",
        help="a backend that compiles ahead of time",
    )
    parser.add_argument(
        "--target", type=names, metavar="GPUS", help="GPUs, with commas between (default: all)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also compile every option that differs from the defaults; minutes per GPU",
    )
    parser.add_argument(
        "--loops", action="store_true", help="also print what the code has in each loop"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=path, metavar="FILE", help="write the JSON to a file")


def run(options: Options) -> int:
    """Compile kernels and show them, two tables per target; return the exit code.

    Raises:
        SpecError, UsageError: a backend, target or case is unknown, or the backend is not
            available.
    """
    backend = registry.get_backend(options.backend)
    if isinstance(backend, str):
        raise UsageError(f"backend {options.backend!r} is not available: {backend}")
    if not isinstance(backend, CompilesAhead):
        raise UsageError(f"backend {options.backend!r} compiles nothing ahead of time")
    chosen = backend.targets if options.target in (None, ALL) else options.target
    for target in chosen:
        if target not in backend.targets:
            raise UsageError(refusal(target, backend.targets))
    named = find_cases(options.cases)
    check_file("--out", options.out)
    rows: list[CompiledKernel] = []
    for target in chosen:
        own: list[CompiledKernel] = []
        with progress(None, f"compiling for {target}") as advance:
            for row in backend.compile_ahead(target, samples(named, everything=options.all)):
                own.append(row)
                advance(f"compiling for {target}: {len(own)} kernels, {row.kernel}")
        if not options.json:
            show(own, target, has_loops=options.loops)
        rows += own
    if options.json:
        print(as_json(backend, rows), end="")
    write(backend, rows, options.out, is_told=not options.json)
    return exit_codes.WRONG if any(row.failures for row in rows) else exit_codes.DONE


def write(
    backend: Backend, rows: Sequence[CompiledKernel], where: Path | None, *, is_told: bool
) -> None:
    """Write the rows as JSON, if a file is named."""
    if where is not None:
        with whole(where) as file:
            file.write_text(as_json(backend, rows), encoding="utf-8")
        if is_told:
            print(where)


def find_cases(names: Sequence[str]) -> list[Case]:
    """Return the cases with the given names, or all cases of every op if none is given.

    Raises:
        UsageError: no case has that name.
    """
    known = {case.name: case for case in (*(x for op in OPS for x in op.cases), *GPU_CASES)}
    for name in names:
        if name not in known:
            raise UsageError(unknown("case", name, known))
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())
