"""Hold the version of the package, and order versions."""

from __future__ import annotations

import re

__version__ = "0.1.0"


def version_key(version: str) -> tuple[tuple[int, ...], bool]:
    """Return a sort key for a version: its numbers, and a release after its previews.

    2.13.0+cpu and 2.13 are equal to 2.13.0; 5.25.0.dev0 and 5.25.0rc1 come before 5.25.0.
    """
    public = version.partition("+")[0]
    release = re.match(r"\d+(\.\d+)*", public)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    rest = public[release.end() :] if release else public
    return tuple(numbers), not re.search(r"a|b|rc|dev", rest)
