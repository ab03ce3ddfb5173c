"""Run the command line of the library in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from gdn_ops.cli import commands


def run(*arguments: object) -> Result:
    """Run `gdn-ops` with arguments, in a wide terminal."""
    return CliRunner().invoke(commands.app, [*map(str, arguments)], env={"COLUMNS": "200"})
