"""Run `gdn-ops build`: compile the C++ kernels for this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gdn_ops.backends.cpp import build, library
from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import Options, UsageError, add_command
from gdn_ops.terminal.output import print_json
from gdn_ops.terminal.progress import progress
from gdn_ops.terminal.tables import wrapped

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "build",
        run,
        "Compile the C++ kernels for this machine.",
        more="Needs GCC or Clang: the command in CXX, or c++, g++ or clang++. The library is "
        "written into the installed package, or into the user's cache if the package cannot be "
        "written. Processes that run already keep the old one.",
        examples=("gdn-ops build", "CXX=clang++ gdn-ops build"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Options) -> int:
    """Build the library and say where it is; return the exit code.

    Raises:
        UsageError: it cannot be built here, or the compiler failed.
    """
    try:
        with progress(None, "compiling the C++ kernels"):
            built = build.build(_folder())
    except build.CompileError as error:
        print("\n".join(error.lines), file=sys.stderr)
        raise UsageError(str(error), exit_codes.WRONG) from error
    except build.BuildError as error:
        raise UsageError(str(error)) from error
    if options.json:
        print_json({"schema": SCHEMA, **built._asdict(), "path": str(built.path)})
        return exit_codes.DONE
    print(built.path)
    print(wrapped(f"levels: {', '.join(built.levels)}", indent="  "))
    for name, reason in built.left_out.items():
        print(wrapped(f"without {name}: {reason}", indent="  "))
    return exit_codes.DONE


def _folder() -> Path:
    """Return where the library belongs: the package, or the user's cache."""
    return library.PACKAGE if build.is_writable(library.PACKAGE) else library.user_folder()
