"""Make small GPU kits of stand-ins, and say what a run of their script left."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import ROOT

SCRIPTS = ROOT / "benchmarks" / "gpu_kit"


class Ran:
    """Hold what a run of run.py left: its exit code, what it printed, and its results."""

    def __init__(self, done: subprocess.CompletedProcess[str], out: Path) -> None:
        self.code, self.text, self.error, self.out = done.returncode, done.stdout, done.stderr, out
        path = out / "results.json"
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def statuses(self) -> list[str]:
        """Return how the stages ended."""
        assert self.results, f"no results: {self.text}\n{self.error}"
        return [stage["status"] for stage in self.results["stages"]]

    def stage(self, name: str) -> dict[str, Any]:
        """Return the result of a stage."""
        (found,) = (stage for stage in self.results["stages"] if stage["name"] == name)
        return dict(found)


Runs = Callable[..., Ran]


def write_part(path: Path, files: dict[str, str]) -> str:
    """Write files as a tar.xz; return its checksum."""
    folder = path.parent / "files"
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            tar.add(file, name)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_kit(folder: Path) -> Path:
    """Make what an unpacked archive has: the scripts, a manifest, a tree and a package."""
    (folder / "parts").mkdir(parents=True)
    (folder / "kit").mkdir()
    for path in (SCRIPTS / "run.py", *(SCRIPTS / "kit").glob("*.py")):
        (folder / path.relative_to(SCRIPTS)).write_text(path.read_text())
    table = "SEQUENCE: dict[tuple[int, str], int] = {}\nSTEP: dict[int, int] = {}\n"
    parts = []
    for name, place, files in (
        ("tree", "tree", {"gdn_ops/backends/triton/host/table.py": table}),
        ("package", "site-package", {"stand_in_package.py": "here = 7\n"}),
    ):
        file = folder / "parts" / f"{name}.tar.xz"
        entry = {"name": name, "folder": place, "file": f"parts/{name}.tar.xz"}
        parts.append({**entry, "sha256": write_part(file, files), "bytes": file.stat().st_size})
    manifest = {"schema": 1, "commit": "0123abc", "parts": parts, "left_out": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run_plan(
    kit: Path,
    stages: tuple[dict[str, Any], ...],
    seconds: float = 60,
    python: str = sys.executable,
    **environment: str,
) -> Ran:
    """Run stages by the script of a kit, in a process of its own."""
    folder = kit.parent
    plan, out = folder / "plan.json", folder / "out"
    plan.write_text(json.dumps([{"seconds": 20, "needs_gpu": False, **s} for s in stages]))
    done = subprocess.run(
        [python, str(kit / "run.py"), str(plan), "--out", str(out), "--seconds", str(seconds)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    return Ran(done, out)
