"""Check the arguments of public functions by type and size, before onnx is given them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from gdn_ops.call.scalars import as_python
from gdn_ops.spec.errors import SpecError, SpecTypeError

LARGEST = 2**31 - 1
"""The most heads, columns and rows that are taken."""


def check_type(label: str, name: str, value: Any, kind: type, should: str) -> None:
    """Check that an argument has a type; a bool is no int.

    Raises:
        SpecTypeError: it has another one; the text says what it should be.
    """
    value = as_python(value) if kind in (bool, int) else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SpecTypeError(f"{label}: {name} has type {type(value).__name__}, should be {should}")


def check_integer(label: str, name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Check that an argument is an integer within bounds.

    Raises:
        SpecError: it is none, or beyond them.
    """
    check_type(label, name, value, int, "an integer")
    value = as_python(value)
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        # Python prints no integer of more than a few thousand digits.
        shown = value if value.bit_length() <= 64 else f"of {value.bit_length()} bits"
        raise SpecError(f"{label}: {name} is {shown}, should be {bound}")


def check_scale(label: str, value: Any) -> None:
    """Check that a scale is a number that float32 holds, as which ONNX writes it, or None.

    Raises:
        SpecError: it is none, or float32 makes it infinite or zero.
    """
    value = as_python(value)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise SpecTypeError(f"{label}: scale has type {kind}, should be a finite number")
    if not abs(value) <= float(np.finfo(np.float32).max):
        shown = value if isinstance(value, float) else "an integer beyond float32"
        raise SpecError(f"{label}: scale is {shown}, should be a finite number in float32")
    if value != 0 and np.float32(value) == 0:
        raise SpecError(f"{label}: scale is {value}, which is 0 in float32, should be 0 or larger")


def check_flag(label: str, name: str, value: Any) -> None:
    """Check that an argument is True or False.

    Raises:
        SpecTypeError: it is something else.
    """
    check_type(label, name, value, bool, "True or False")


def check_name(label: str, name: str, value: Any, known: Collection[str], more: str = "") -> None:
    """Check that an argument is a known name; `more` says what else it may be.

    Raises:
        SpecError: it is another one, or no text.
    """
    if not isinstance(value, str) or value not in known:
        kind = SpecError if isinstance(value, str) else SpecTypeError
        shown = f"{value!r}, should be one of {', '.join(known)}{more}"
        raise kind(f"{label}: {name} is {shown}")


def check_path(label: str, name: str, value: Any) -> None:
    """Check that an argument is a path.

    Raises:
        SpecError: it is of another type, or a text that no path is.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise SpecTypeError(f"{label}: {name} has type {type(value).__name__}, should be a path")
    text = os.fspath(value)
    try:
        is_path = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise SpecError(f"{label}: {name} is {text!r}, should be a path")


def check_target(label: str, value: Any) -> None:
    """Check that an argument `path` names a file that can be written, before work is done for it.

    Raises:
        SpecError: it is no path, a folder, a device, or in a folder that does not exist.
    """
    check_path(label, "path", value)
    path, where = Path(value), f"{label}: path is {os.fspath(value)!r},"
    if path.is_dir():
        raise SpecError(f"{where} a folder, should be a file")
    if path.exists() and not path.is_file():
        raise SpecError(f"{where} a device or a pipe, should be a file")
    if not path.parent.is_dir():
        raise SpecError(f"{where} whose folder should exist")
