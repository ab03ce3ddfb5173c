"""Read environment variables that have one value which does something, or none of use."""

from __future__ import annotations

import os
import warnings


def is_on(variable: str, value: str) -> bool:
    """Return whether an environment variable has its value; warn of another that does nothing.

    Args:
        variable: its name.
        value: what it should be; unset, empty and "0" turn it off.
    """
    given = os.environ.get(variable, "")
    if given not in ("", "0", value):
        text = f"{variable} is {given!r}, should be {value!r} or not be set: it does nothing"
        warnings.warn(text, stacklevel=2)
    return given == value


def unset_if_empty(*variables: str) -> None:
    """Unset environment variables that are empty, for a library that takes "" for a folder."""
    for name in variables:
        if os.environ.get(name) == "":
            del os.environ[name]
