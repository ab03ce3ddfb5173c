"""List installed versions, and compare them with those the tests ran with: `data/tested.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import resources

import torch

from gdn_ops._version import __version__, version_key
from gdn_ops.dispatch.backend import installed_version

PAGE = "docs/versions.md"
OPTIONAL_PACKAGES = (
    "numpy",
    "triton",
    "tilelang",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "hypothesis",
    "matplotlib",
)


def installed_versions() -> dict[str, str | None]:
    """Return the installed versions by name; None for an optional package that is missing."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gdn_ops": __version__,
        **{name: installed_version(name) for name in OPTIONAL_PACKAGES},
    }


def tested_ranges() -> dict[str, tuple[str, str]]:
    """Return the oldest and the newest version of each package that the tests passed with."""
    text = resources.files("gdn_ops").joinpath("data", "tested.json").read_text(encoding="utf-8")
    return {name: (low, high) for name, (low, high) in json.loads(text)["packages"].items()}


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
        text = ""
        if version_key(version) > version_key(high):
            text = f"newer than {high}, the newest"
        elif version_key(version) < version_key(low):
            text = f"older than {low}, the oldest"
        if text:
            lines.append(f"{name} {version} is {text} that was tested: {PAGE}")
    return lines
