"""Write constraints for an environment that has torch: `python -m versions.constrain LOCK`.

A CUDA build of torch pins its own Triton and CUDA libraries, a CPU build pins nothing. So the
lock holds for every build less the lines that the torch at hand does not allow. This runs where
nothing but pip and torch may be installed, and then with the parts of pip.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ModuleNotFoundError:
    # Not first: before Python 3.12, setuptools cannot be imported any more where pip was.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version


def read_lock(text: str) -> dict[str, str]:
    """Return the versions of a lock by name."""
    return dict(line.split("==") for line in text.splitlines())


def write_lock(versions: dict[str, str]) -> str:
    """Return a lock: a line `name==version` for each name, sorted."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def refused(lock: dict[str, str]) -> set[str]:
    """Return the names whose locked version is not allowed by torch or by what it requires."""
    found: set[str] = set()
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
                found.add(needed)
            if (key := (needed, frozenset(requirement.extras))) not in waiting:
                waiting.append(key)
    return found


def main(lock: Path) -> None:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
