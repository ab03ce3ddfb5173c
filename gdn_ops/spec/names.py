"""Say which names are known where one is not, and which of them was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the text of an error: a name that is unknown, those that are known, the nearest.

    Args:
        kind: what is named, "backend".
        name: as it was given.
        known: every name of that kind.
    """
    names = list(known)
    text = f"unknown {kind} {name!r}, known: {', '.join(names)}"
    near = nearest(str(name), names)
    return f"{text}; did you mean {near!r}?" if near else text


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like another one; None where none is like it."""
    by_folded = {x.casefold(): x for x in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, 1, 0.6)
    return by_folded[close[0]] if close else None
