"""Run the command line of the library in this process."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from unittest import mock

from gdn_ops import _interrupt, cli


@dataclass(frozen=True)
class Result:
    """Hold how a command ended and what it printed."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run(*arguments: object, columns: int = 200) -> Result:
    """Run `gdn-ops` with arguments, in a terminal that is wide unless its columns are given."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.dict(os.environ, COLUMNS=str(columns)), streams[0], streams[1]:
        code = _interrupt.run(lambda: cli.run([*map(str, arguments)]))
    return Result(code, out.getvalue(), err.getvalue())
