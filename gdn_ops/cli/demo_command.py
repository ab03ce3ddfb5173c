"""Run `gdn-ops demo`: read a text with an associative memory that was never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import Options, UsageError, add_command, integer, one_name, path
from gdn_ops.demo import show
from gdn_ops.dispatch import registry
from gdn_ops.environment.text import shipped_text
from gdn_ops.terminal.output import print_json

LIMIT = 16384


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "Read a text with a memory that was never trained, then continue it.",
        more="Keys are random features of the last bytes, values are codes of the next one. "
        "The rules, resets, backends and the continuation are measured on the way.",
        examples=("gdn-ops demo", "gdn-ops demo README.md --limit 4096 --backend torch"),
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=path,
        metavar="FILE",
        help="text file to read (default: one that ships with gdn_ops)",
    )
    parser.add_argument(
        "--backend",
        type=one_name,
        default="auto",
        metavar="NAME",
        help="backend that reads the text; all are timed in any case (default: auto)",
    )
    parser.add_argument(
        "--limit",
        type=integer(show.SHORTEST),
        default=LIMIT,
        metavar="BYTES",
        help=f"read only the first BYTES bytes, {show.SHORTEST} or more (default: {LIMIT})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Options) -> int:
    """Measure and show; return the exit code."""
    if options.backend != "auto":
        backend = registry.get_backend(options.backend)
        if isinstance(backend, str):
            raise UsageError(f"backend {options.backend!r} is not available: {backend}")
    text = shipped_text() if options.file is None else read(options.file, options.limit)
    findings = show.measure_all(text[: options.limit], options.backend)
    if options.json:
        print_json(show.as_data(findings))
    else:
        show.show(findings)
    return exit_codes.DONE


def read(file: Path, limit: int) -> bytes:
    """Return the first bytes of a file.

    Raises:
        UsageError: it is a folder.
        OSError: it is not there, or cannot be read.
    """
    if file.is_dir():
        raise UsageError(f"{str(file)!r} is a folder, should be a text file")
    with file.open("rb") as text:
        return text.read(limit)
