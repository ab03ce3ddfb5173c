"""Run `gdn-ops bench ablation`: train small models with one part taken out at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gdn_ops.bench.ablation.table import QUICK, TASKS, VARIANTS, Settings
from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import Options, add_command, integer, path, some_of
from gdn_ops.terminal.output import check_file, check_folder, print_json
from gdn_ops.terminal.progress import progress

FILE = "ablation.json"


def add_to(commands: Any) -> None:
    """Add the command, below `bench`."""
    parser = add_command(
        commands,
        "ablation",
        run,
        "Train small models with one part of the layer taken out at a time.",
        more="One layer is trained to recall pairs, to overwrite them, to forget them and to read "
        "a text; rows share data, steps, learning rate and what they start from. Two cores "
        "take minutes.",
        examples=(
            "gdn-ops bench ablation",
            "gdn-ops bench ablation --rows full,no-decay --seeds 5 --json",
            "gdn-ops bench ablation --quick",
        ),
    )
    for name, kind, what in (("--rows", "row", VARIANTS), ("--tasks", "task", TASKS)):
        parser.add_argument(
            name,
            type=some_of(kind, what),
            metavar="NAMES",
            help=f"{', '.join(what)}; with commas (default: all)",
        )
    default = Settings()
    for name, most, text in (
        ("seeds", 1000, f"trainings of each row (default: {default.seeds})"),
        ("steps", 10**6, f"steps of each task (default: {default.steps})"),
        ("processes", 1024, "trainings side by side (default: one per core)"),
    ):
        parser.add_argument(f"--{name}", type=integer(1, most), metavar="NUMBER", help=text)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"run everything in seconds, too short to learn: {QUICK.steps} steps, "
        f"{QUICK.seeds} seeds",
    )
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help=f"a folder for {FILE}; created if missing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Options) -> int:
    """Train and show; return the exit code."""
    from gdn_ops.bench.ablation import report
    from gdn_ops.bench.ablation.run import measure
    from gdn_ops.bench.rows import write_json

    given = {name: getattr(options, name) for name in ("steps", "seeds")}
    sizes = {name: number for name, number in given.items() if number is not None}
    settings = replace(QUICK if options.quick else Settings(), **sizes)
    rows, tasks = options.rows or tuple(VARIANTS), options.tasks or tuple(TASKS)
    check_folder("--out", options.out)
    file = None if options.out is None else options.out / FILE
    check_file("--out", file)
    with progress(len(rows) * settings.seeds + 1, "training", is_quiet=True) as log:
        log("training")
        data = measure(rows, tasks, settings, options.processes, log)
    if file is not None:
        write_json(data, file)
    if options.json:
        print_json(data)
        return exit_codes.DONE
    print(report.text(data))
    if file is not None:
        print(file)
    return exit_codes.DONE
