"""Make the files of the parts: download wheels, compile kernels, compress folders."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packing.parts import PLATFORMS, PYTHON, TILELANG_CACHE, TREE, TRITON_CACHE, Part

ROOT = Path(__file__).resolve().parents[3]
FILL = ROOT / "benchmarks" / "gpu_kit" / "kit" / "fill.py"
BEST_RATIO = 0.35
"""Share of its size to which a wheel can be compressed at best; larger parts are not tried."""

# The first makes jumps of x86 code alike, which saves a fifth of the libraries.
FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27},
]


class NotMadeError(Exception):
    """Say why a part cannot be had."""


class TooLargeError(NotMadeError):
    """Say by how much a part does not fit."""


@dataclass(frozen=True)
class Made:
    """Hold the file of a part, and what is to be said of it in the manifest."""

    file: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Builder:
    """Hold where parts are made and with which Python kernels are compiled.

    Attributes:
        folder: for wheels, kernels and finished parts, which the next time are there already.
        python: an interpreter of the GPU machine's versions, or None.
        tuned: cases whose configurations are compiled too.
        log: is told what is done.
    """

    folder: Path
    python: Path | None
    tuned: str = ""
    log: Callable[[str], None] = print

    def make(self, part: Part, room: int) -> Made:
        """Make the file of a part.

        Args:
            part: which.
            room: the bytes that it may have.

        Raises:
            NotMadeError: it cannot be had, or does not fit.
        """
        if part == TREE:
            made = self._tree()
        elif part in (TRITON_CACHE, TILELANG_CACHE):
            made = self._cache(part)
        else:
            made = self._wheels(part, room)
        size = made.file.stat().st_size
        if size > room:
            raise TooLargeError(f"{mib(size)}, {mib(room)} are left")
        return made

    def _tree(self) -> Made:
        """Pack what is committed."""
        commit = output(["git", "rev-parse", "HEAD"])
        target = self.folder / f"tree-{commit}.tar.xz"
        if not target.exists():
            archive = subprocess.run(
                ["git", "archive", "--format=tar", "HEAD"],
                cwd=ROOT,
                capture_output=True,
                check=True,
            )
            target.write_bytes(lzma.compress(archive.stdout, preset=9))
        changed = bool(output(["git", "status", "--porcelain"]))
        return Made(target, {"commit": commit, "changes_left_out": changed})

    def _cache(self, part: Part) -> Made:
        """Compile the launches, show that a second process compiles none, and pack their code."""
        if self.python is None:
            raise NotMadeError(f"no Python {PYTHON} with the GPU machine's torch and Triton")
        backend = part.name.removesuffix("-cache")
        # Name the cache by the source of the kernels: an older one is not packed.
        sources = output(["git", "rev-parse", f"HEAD:backends/{backend}"])
        cache = self.folder / f"{part.name}-{sources}"
        self.log(f"compiling the launches of {backend} for sm_90, unless they are there")
        first = self._fill_all(part, cache)
        again = self._fill_all(part, cache) if first["compiled"] else first
        if again["compiled"]:
            raise NotMadeError(f"a second process compiles {again['compiled']} kernels again")
        if not again["found"]:
            raise NotMadeError(f"no launch was compiled, {again['failed']} failed")
        command = [str(self.python), "-c", f"import {backend}; print({backend}.__version__)"]
        facts = {
            "versions": {backend: output(command)},
            "compiled_now": first["compiled"],
            "second_process": {n: again[n] for n in ("launches", "compiled", "found", "failed")},
        }
        said = "".join(sorted(str(path) for path in cache.rglob("*")))
        name = hashlib.sha256(said.encode()).hexdigest()[:16]
        return Made(self._compressed(cache, f"{part.name}-{name}"), facts)

    def _fill_all(self, part: Part, cache: Path) -> Counter[str]:
        """Compile the launches of every process that makes some; return the counts together."""
        histories = ["bench", "steps", "check", *(["tune"] if self.tuned else [])]
        total: Counter[str] = Counter()
        for history in histories:
            total += self._fill(part, cache, history)
        return total

    def _fill(self, part: Part, cache: Path, history: str) -> Counter[str]:
        """Run `fill.py` in processes side by side; return their counts, and log what failed."""
        environment = {
            **{**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            part.variable: str(cache),
        }
        backend, processes = part.name.removesuffix("-cache"), os.cpu_count() or 1
        words = [str(self.python), str(FILL), backend, history, "--tune", self.tuned]
        words += ["--launchers", "--share"]
        running = [
            subprocess.Popen(
                [*words, f"{i}/{processes}"],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]
        outputs = [process.communicate()[0].strip().splitlines() for process in running]
        total: Counter[str] = Counter()
        for process, lines in zip(running, outputs, strict=True):
            if process.returncode not in (0, 1) or not lines:
                raise NotMadeError(f"compiling ended with exit code {process.returncode}")
            counts = json.loads(lines[-1])
            for text in counts["failed"]:
                self.log(f"does not compile: {text}")
            total += Counter({**counts, "failed": len(counts["failed"])})
        return total

    def _wheels(self, part: Part, room: int) -> Made:
        """Download wheels, unpack them into one folder, and compress that."""
        files = [self._download(requirement) for requirement in pinned(part.wheels)]
        size = sum(file.stat().st_size for file in files)
        if BEST_RATIO * size > room:
            raise TooLargeError(f"its wheels have {mib(size)}, {mib(room)} are left")
        said = "".join(f"{f.name}{f.stat().st_size}" for f in files) + repr(part.without)
        name = f"{part.name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        versions = dict(file.name.split("-")[:2] for file in files)
        target = self.folder / f"{name}.tar.xz"
        if not target.exists():
            folder = self.folder / name
            for file in files:
                with zipfile.ZipFile(file) as wheel:
                    members = [n for n in wheel.namelist() if not n.startswith(part.without)]
                    wheel.extractall(folder, members)
            self._compressed(folder, name)
            shutil.rmtree(folder)
        return Made(target, {"versions": versions})

    def _download(self, requirement: str) -> Path:
        """Return the wheel of a requirement for the GPU machine, downloaded once."""
        folder = self.folder / "wheels" / requirement
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
            command += [word for name in PLATFORMS for word in ("--platform", name)]
            done = subprocess.run(
                [*command, "--dest", str(folder), requirement], capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise NotMadeError(f"{requirement} cannot be downloaded: {last}")
        (wheel,) = folder.glob("*.whl")
        return wheel

    def _compressed(self, folder: Path, name: str) -> Path:
        """Compress a folder, unless it is there; return the file."""
        target = self.folder / f"{name}.tar.xz"
        if not target.exists():
            self.log(f"compressing {name}")
            new = target.with_suffix(".new")
            with lzma.open(new, "wb", filters=FILTERS) as out:
                compress(folder, out)
            new.replace(target)
        return target


def compress(folder: Path, out: Any) -> None:
    """Write a folder as a tar, sorted, without what differs from one time to the next."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_dir():
                tar.add(path, str(path.relative_to(folder)), filter=plain)


def pinned(requirements: Iterable[str]) -> list[str]:
    """Return requirements with versions: those without one have that of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines)
    return [r if "==" in r else f"{r}=={locked[r]}" for r in requirements]


def output(command: Sequence[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def mib(size: float) -> str:
    """Return a size in MiB, as text."""
    return f"{size / 2**20:.1f} MiB"
