"""Keep the lock of versions, and make constraints of it.

`python -m versions.lock LOCK TORCH` resolves everything anew with this torch, writes the lock and
shows what changed. `python -m versions.lock LOCK` prints constraints for an environment that has a
torch: a CUDA build pins its own Triton and CUDA libraries, a CPU build pins nothing, so the lock
holds for every build less the lines that the torch at hand does not allow. This runs where nothing
but pip and torch may be installed, and then with the parts of pip.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from versions.cells import ROOT

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ModuleNotFoundError:
    # Not first: before Python 3.12, setuptools cannot be imported any more where pip was.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

PROJECT = (".[dev]", "setuptools", "wheel")
"""What is locked: everything for tests, documentation and demo, and what builds the wheel."""


def read_lock(text: str) -> dict[str, str]:
    """Return the versions of a lock by name."""
    return dict(line.split("==") for line in text.splitlines())


def write_lock(versions: dict[str, str]) -> str:
    """Return a lock: a line `name==version` for each name, sorted."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def refused(lock: dict[str, str]) -> set[str]:
    """Return the names whose locked version is not allowed by torch or by what it requires."""
    lines: set[str] = set()
    waiting = [("torch", frozenset[str]())]
    # The list grows while it is read.
    for name, extras in waiting:
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            needed = canonicalize_name(requirement.name)
            version = lock.get(needed)
            if version and not requirement.specifier.contains(version, prereleases=True):
                lines.add(needed)
            if (key := (needed, frozenset(requirement.extras))) not in waiting:
                waiting.append(key)
    return lines


def constrain(lock: Path) -> None:
    """Print the constraints, and on stderr what they leave out."""
    versions = read_lock(lock.read_text(encoding="utf-8"))
    here, locked = importlib.metadata.version("torch"), versions.pop("torch")
    if Version(here).public != locked:
        print(f"torch {here} is installed, {lock} has {locked}", file=sys.stderr)
    left_out = refused(versions)
    if left_out:
        names = ", ".join(sorted(left_out))
        print(f"left out of {lock}, torch {here} needs other versions: {names}", file=sys.stderr)
    print(write_lock({n: v for n, v in versions.items() if n not in left_out}), end="")


def run_pip(command: list[str]) -> None:
    """Run pip; end with a message where it fails."""
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit("lock: pip found no set of versions; nothing was changed")


def resolve(*arguments: str, run: Callable[[list[str]], None] = run_pip) -> list[dict[str, Any]]:
    """Return the metadata of what `pip install` with these arguments would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--quiet", "--report", str(report))
        run([sys.executable, "-m", "pip", "install", *options, *arguments])
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [entry["metadata"] for entry in packages]


def stand_in(torch: dict[str, Any], folder: Path) -> Path:
    """Write a wheel that needs what every build of a torch needs, and return its path.

    What only one build needs (a CUDA build: its CUDA libraries and its Triton) has a marker.
    Without it the lock is the same whatever build the machine gets.
    """
    version = Version(torch["version"]).public
    needs = [text for text in torch["requires_dist"] if Requirement(text).marker is None]
    head = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    wheel = folder / f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"torch-{version}.dist-info"
        lines = [*head, *(f"Requires-Dist: {text}" for text in needs), ""]
        archive.writestr(f"{info}/METADATA", "\n".join(lines))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def versions_of(packages: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the public versions of packages by their normalized names, without gdn_ops."""
    versions = {canonicalize_name(p["name"]): Version(p["version"]).public for p in packages}
    versions.pop("gdn-ops", None)
    return versions


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return a line for each name that is added, removed or has another version."""
    lines = {name: f"+ {name} {new[name]}" for name in new.keys() - old.keys()}
    lines |= {name: f"- {name} {old[name]}" for name in old.keys() - new.keys()}
    for name in new.keys() & old.keys():
        if old[name] != new[name]:
            lines[name] = f"  {name} {old[name]} -> {new[name]}"
    return [lines[name] for name in sorted(lines)]


def refresh(lock: Path, torch: str) -> None:
    """Resolve everything anew, show what changes, and only then write the lock."""
    packages = resolve("--ignore-installed", "--no-deps", *shlex.split(torch))
    with tempfile.TemporaryDirectory() as folder:
        wheel = stand_in(packages[0], Path(folder))
        new = versions_of(resolve("--ignore-installed", str(wheel), *PROJECT))
    old = read_lock(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    lines = changes(old, new)
    print("\n".join(lines) or "nothing changed")
    print(f"{lock}: {len(new)} packages, {len(lines)} changed")
    written = lock.with_suffix(".new")
    written.write_text(write_lock(new), encoding="utf-8")
    written.replace(lock)


if __name__ == "__main__":
    run = refresh if sys.argv[2:] else constrain
    run(Path(sys.argv[1]), *sys.argv[2:])
