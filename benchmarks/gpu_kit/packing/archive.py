"""Choose the parts that fit, and write archive and manifest."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from packing.build import Made, NotMadeError, TooLargeError, mib
from packing.parts import PARTS, PYTHON, Part

LIMIT = 64 << 20
SCHEMA = 1
SCRIPTS = Path(__file__).resolve().parents[1]
TOP = "gpu-kit"
LARGEST = 3
SPARE = 64 << 10
"""Bytes for the manifest, and for the headers of a tar."""


class KitTooLargeError(Exception):
    """Say how large the required parts are, and which the largest."""


class MakesParts(Protocol):
    """Make the file of a part, as `packing.build.Builder` does."""

    def make(self, part: Part, room: int) -> Made:
        """Return the file of a part that may have so many bytes."""


def pack(
    builder: MakesParts, out: Path, limit: int = LIMIT, parts: Sequence[Part] = PARTS
) -> dict[str, Any]:
    """Write the archive with every part that fits, in their order; return the manifest.

    Raises:
        KitTooLargeError: the required parts alone are larger than the limit.
        NotMadeError: a required part cannot be had.
    """
    made: list[tuple[Part, Made]] = []
    left_out: list[dict[str, str]] = []
    scripts = [SCRIPTS / "run.py", *sorted((SCRIPTS / "kit").glob("*.py"))]
    room = limit - SPARE - sum(path.stat().st_size + 1024 for path in scripts)
    for part in sorted(parts, key=lambda part: not part.is_required):
        try:
            new = builder.make(part, (1 << 40) if part.is_required else room)
        except NotMadeError as error:
            if part.is_required and not isinstance(error, TooLargeError):
                raise
            left_out.append({"name": part.name, "reason": str(error)})
            continue
        made.append((part, new))
        room -= new.file.stat().st_size + 1024
    if room < 0:
        raise KitTooLargeError(too_large(made, limit, limit - room))
    manifest = describe(made, left_out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=1).encode()
    with tarfile.open(out, "w") as tar:
        for path in scripts:
            tar.add(path, f"{TOP}/{path.relative_to(SCRIPTS)}")
        entry = tarfile.TarInfo(f"{TOP}/manifest.json")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for part, new in made:
            tar.add(new.file, f"{TOP}/{file_of(part)}")
    return manifest


def describe(made: Sequence[tuple[Part, Made]], left_out: list[dict[str, str]]) -> dict[str, Any]:
    """Return the manifest: parts with sizes, versions and checksums, and what was left out."""
    entries = [
        {
            **{"name": part.name, "file": file_of(part), "folder": part.folder},
            **{"bytes": new.file.stat().st_size, "sha256": checksum(new.file)},
            **{"unless": list(part.unless), "variable": part.variable, **new.facts},
        }
        for part, new in made
    ]
    commit = next((new.facts["commit"] for _, new in made if "commit" in new.facts), "")
    return {
        **{"schema": SCHEMA, "date": datetime.date.today().isoformat(), "python": PYTHON},
        **{"commit": commit, "parts": entries, "left_out": left_out},
    }


def file_of(part: Part) -> str:
    """Return where the file of a part lies in the kit."""
    return f"parts/{part.name}.tar.xz"


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def too_large(made: Sequence[tuple[Part, Made]], limit: int, size: int) -> str:
    """Return the size of a kit, what it may have, and its largest parts."""
    sizes = sorted(((new.file.stat().st_size, part.name) for part, new in made), reverse=True)
    largest = ", ".join(f"{name} {mib(size)}" for size, name in sizes[:LARGEST])
    return f"the kit has {mib(size)}, should be at most {mib(limit)}; largest: {largest}"
