"""Run code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT


def python(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments, in a folder and with more environment variables."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(*arguments: object, cwd: Path = ROOT, **environment: str) -> str:
    """Run Python with arguments, which should not fail, and return what it prints."""
    done = python(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.rstrip()


def printed(code: str, *arguments: object, **environment: str) -> str:
    """Run code in a fresh process, which should not fail, and return what it prints."""
    return output_of("-c", code, *arguments, **environment)


def install(target: Path, source: Path) -> None:
    """Install a distribution into a folder, without network and without what it depends on."""
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps")
    output_of(*pip, "--no-index", "--no-build-isolation", "--target", target, source, cwd=target)


def build_distribution(source: Path, out: Path, kind: str, **environment: str) -> Path:
    """Build a wheel or an sdist of a source tree without network; return the file.

    Args:
        source: the tree.
        out: an empty folder for it.
        kind: "--wheel" or "--sdist".
        environment: more environment variables.
    """
    command = ("-m", "build", "--no-isolation", kind, "--outdir", out, source)
    output_of(*command, cwd=out, **environment)
    (built,) = out.iterdir()
    return built
