"""Read environment variables that have one value which does something."""

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
