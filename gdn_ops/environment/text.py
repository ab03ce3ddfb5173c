"""Read the text that comes with the package."""

from __future__ import annotations

from importlib import resources


def shipped_text() -> bytes:
    """Return the text that comes with the package."""
    return resources.files("gdn_ops").joinpath("data", "chapters.txt").read_bytes()
