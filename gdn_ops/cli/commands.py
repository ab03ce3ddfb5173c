"""List the commands of `gdn-ops`, and run the one that is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import gdn_ops
from gdn_ops.cli import (
    bench_command,
    build_command,
    check_command,
    compile_command,
    completion_command,
    demo_command,
    exit_codes,
    export_command,
    generate_command,
    info_command,
    plan_command,
)
from gdn_ops.cli.parser import Parser, add_commands, parse

COMMANDS = (
    info_command,
    check_command,
    bench_command,
    build_command,
    compile_command,
    plan_command,
    export_command,
    generate_command,
    demo_command,
    completion_command,
)
"""Modules with a function `add_to(commands)` each, in the order of the help."""


def make_parser() -> Parser:
    """Return the parser of all commands."""
    codes = "".join(f"  {code:>3}  {text}\n" for code, text in exit_codes.MEANINGS.items())
    parser = Parser(
        prog="gdn-ops",
        description="The gated delta rule: inspect, certify, measure and show the backends.",
        epilog=f"gdn-ops COMMAND --help shows options and examples.\n\nexit codes:\n{codes}",
    )
    version = f"gdn_ops {gdn_ops.__version__}"
    parser.add_argument(
        "-V", "--version", action="version", version=version, help="print the version"
    )
    parser.set_defaults(run=None)
    commands = add_commands(parser)
    for module in COMMANDS:
        module.add_to(commands)
    return parser


def run_command(arguments: Sequence[str]) -> int:
    """Run a command from its arguments; return the exit code.

    Raises:
        UsageError: an argument is wrong.
        SpecError, BackendUnsupportedError, ModuleNotFoundError, OSError: what is asked for is not
            possible here.
        RefusedError: numbers are wrong.
    """
    parser = make_parser()
    options: argparse.Namespace = parse(parser, bench_command.with_default(arguments))
    if options.run is None:
        getattr(options, "parser", parser).print_help()
        return exit_codes.NOT_POSSIBLE if arguments else exit_codes.DONE
    code: int = options.run(options)
    return code
