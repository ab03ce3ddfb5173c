"""Start `gdn-ops`; its commands are loaded only when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from gdn_ops import _interrupt
from gdn_ops.cli import exit_codes

TRACEBACK = "GDN_OPS_TRACEBACK"
"""Show where an unforeseen error was raised, if this is 1 in the environment."""

EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "hypothesis": "testing",
    "transformers": "bench",
    "matplotlib": "cli",
    "triton": "triton",
    "tilelang": "tilelang",
}
"""The extra that brings a package, by the name of its import."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with the code that says how it went."""
    _make_streams_safe()
    warnings.showwarning = _show_warning
    given = sys.argv[1:] if arguments is None else list(arguments)
    code = _interrupt.run(lambda: run(given))
    if code == exit_codes.INTERRUPTED:
        _drop_output()
    raise SystemExit(code)


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code; what goes wrong is a line on stderr.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
    """
    try:
        from gdn_ops.cli.commands import run_command

        try:
            code = run_command(arguments)
        except SystemExit:
            # argparse ends so after --help and --version.
            code = exit_codes.DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return exit_codes.CLOSED_PIPE
    except Exception as error:
        if _interrupt.came():
            raise KeyboardInterrupt from error
        code, text = _verdict(error)
        if code == exit_codes.UNFORESEEN and os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        print(f"gdn-ops: {' '.join(text.split())}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_output()
        return code


def _verdict(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and what is said about it."""
    from gdn_ops.bench.verify import RefusedError
    from gdn_ops.cli.parser import UsageError
    from gdn_ops.spec.errors import BackendUnsupportedError, SpecError

    text = str(error).strip()
    if isinstance(error, UsageError):
        return error.code, text
    if isinstance(error, RefusedError):
        return exit_codes.WRONG, text
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        text = text.partition("\n")[0]
        return exit_codes.NOT_POSSIBLE, f"there is not enough memory: {text or 'MemoryError'}"
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        cure = f": pip install 'gdn_ops[{extra}]'" if extra else ""
        return exit_codes.NOT_POSSIBLE, f"package {error.name!r} is not installed{cure}"
    expected = (SpecError, BackendUnsupportedError, ModuleNotFoundError)
    if isinstance(error, OSError) and error.filename is not None:
        return exit_codes.NOT_POSSIBLE, f"{os.fspath(error.filename)!r}: {error.strerror}"
    if isinstance(error, (*expected, OSError)) or type(error) is ValueError:
        return exit_codes.NOT_POSSIBLE, text
    tell = f"a fault of gdn_ops; {TRACEBACK}=1 shows where, please report it"
    return exit_codes.UNFORESEEN, f"{type(error).__name__}: {text} ({tell})"


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether torch found no memory: on CPUs it raises a plain RuntimeError then."""
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)
    )


def _drop_output() -> None:
    """Send what is left in the buffer of stdout nowhere: it would raise again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_streams_safe() -> None:
    """Let no text fail to be printed: neither in ASCII nor where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning in one line, without the place in the code that gave it."""
    with contextlib.suppress(OSError):
        print(f"gdn-ops: warning: {' '.join(str(message).split())}", file=sys.stderr)
