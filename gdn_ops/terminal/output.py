"""Print JSON that every reader takes, and check that files can be written before work starts."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from gdn_ops.spec.errors import SpecError


def plain(value: Any) -> Any:
    """Return plain data without numbers that JSON does not have: NaN and infinities are null."""
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(plain(data), indent=2, allow_nan=False))


def check_folder(option: str, path: Path | None) -> None:
    """Make a folder for results, if one is named.

    Raises:
        SpecError: it is a file, or cannot be made or written.
    """
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if path.is_file() else f"cannot be made: {error.strerror}"
        raise SpecError(f"{option}: {str(path)!r} {reason}, should be a folder") from error
    try:
        # Only an attempt tells: root may write anywhere but to a disk that is read-only or full.
        with tempfile.NamedTemporaryFile(prefix=".gdn_ops-", dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise SpecError(f"{option}: {str(path)!r} {reason}, should be writable") from error


def check_file(option: str, path: Path | None) -> None:
    """Make the folder of a file that will be written, if one is named.

    Raises:
        SpecError: the file is a folder, a device or a pipe, which writing would replace, or its
            folder cannot be made or written.
    """
    if path is None:
        return
    if path.is_dir():
        raise SpecError(f"{option}: {str(path)!r} is a folder, should be a file")
    if path.exists() and not path.is_file():
        raise SpecError(f"{option}: {str(path)!r} is a device or a pipe, should be a file")
    check_folder(option, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise SpecError(f"{option}: {str(path)!r} cannot be written, should be writable")
