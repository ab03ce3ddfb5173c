"""Compare installed versions with the ones that the tests ran with: `data/tested.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources

PAGE = "docs/versions.md"


def tested_ranges() -> dict[str, tuple[str, str]]:
    """Return the oldest and the newest version of each package that the tests passed with."""
    text = resources.files("gdn_ops").joinpath("data", "tested.json").read_text(encoding="utf-8")
    return {name: (low, high) for name, (low, high) in json.loads(text)["packages"].items()}


def version_key(version: str) -> tuple[tuple[int, ...], bool]:
    """Return what orders versions: the numbers, then a release after its previews.

    2.13.0+cpu is 2.13.0, and 2.13 is too; 5.25.0.dev0 and 5.25.0rc1 come before 5.25.0.
    """
    public = version.partition("+")[0]
    found = re.match(r"\d+(\.\d+)*", public)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    rest = public[found.end() :] if found else public
    return tuple(numbers), not re.search(r"a|b|rc|dev", rest)


def warnings(
    installed: Mapping[str, str | None], ranges: Mapping[str, tuple[str, str]] | None = None
) -> list[str]:
    """Return a line for each installed version that is older or newer than what was tested.

    Args:
        installed: versions by name; None for what is not installed.
        ranges: the oldest and the newest tested version by name; those of the package without.
    """
    lines = []
    for name, (low, high) in (tested_ranges() if ranges is None else ranges).items():
        version = installed.get(name)
        if version is None:
            continue
        if name == "python":
            # Releases of one Python differ in repairs only.
            version = ".".join(version.split(".")[:2])
        if version_key(version) > version_key(high):
            lines.append(
                f"{name} {version} is newer than {high}, the newest that was tested: {PAGE}"
            )
        elif version_key(version) < version_key(low):
            lines.append(
                f"{name} {version} is older than {low}, the oldest that was tested: {PAGE}"
            )
    return lines
