"""The scripts that the stages run do their work on the CPU, and with tools that stand in."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_kit_runs import SCRIPTS
from kit import profile_launches
from paths import ROOT
from processes import python

KIT = SCRIPTS / "kit"
ON_THE_CPU = {"PYTHONPATH": str(ROOT), "KIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


def program(path: Path, source: str) -> str:
    """Write a shell script; return its path."""
    path.write_text(f"#!/bin/sh\n{source}\n")
    path.chmod(0o755)
    return str(path)


def test_the_short_check_goes_on_after_a_backend_that_is_not_there() -> None:
    done = python(KIT / "short_check.py", 60, "nothing", "torch", **ON_THE_CPU)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0] == "nothing: exit code 1"
    assert lines[-1] == "torch: passed"
    assert len(lines) > 5, "a line per call"


def test_sanitizing_says_what_each_tool_finds(tmp_path: Path) -> None:
    # As compute-sanitizer --tool CHECK --error-exitcode CODE PROGRAM ARGUMENT ... does.
    source = (
        'check=$2; code=$4; shift 4; "$@" || exit 1\n'
        "[ $check = memcheck ] && echo '========= ERROR SUMMARY: 0 errors' && exit 0\n"
        "echo '========= RACECHECK SUMMARY: 3 hazards'; exit $code"
    )
    tool = program(tmp_path / "tool", source)
    done = python(KIT / "sanitize.py", "torch", **ON_THE_CPU, KIT_TOOL=tool)
    first, second = done.stdout.splitlines()
    assert done.returncode == 1
    assert first == "memcheck torch: nothing found: ========= ERROR SUMMARY: 0 errors"
    assert second == "racecheck torch: FOUND: ========= RACECHECK SUMMARY: 3 hazards"
    broken = python(KIT / "sanitize.py", "nothing", **ON_THE_CPU, KIT_TOOL=tool)
    assert broken.stdout.startswith("memcheck nothing: did not run: ")


def test_the_longest_launches_are_those_that_ncu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tool = program(tmp_path / "ncu", 'for word in "$@"; do echo "$word"; done; exit 4')
    monkeypatch.setenv("KIT_TOOL", tool)
    monkeypatch.setattr(profile_launches, "longest", lambda *_: ["solve", "states"])
    assert profile_launches.main("forward 16/64 T=8192") == 4
    words = capfd.readouterr().out.splitlines()
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--kernel-name") + 1] == "regex:^(solve|states)$"
    assert words[-3:] == ["forward 16/64 T=8192", "triton", "--once"]


def test_the_ceilings_are_left_out_without_a_gpu(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = python(KIT / "ceilings.py", **environment, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert "no GPU: no rates are measured" in done.stdout and "gdn_ops 0" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("cache of triton: ")


@pytest.mark.parametrize(("backend", "count"), [("torch", 5), ("tilelang", 2)])
def test_tiny_calls_are_those_that_a_backend_takes(backend: str, count: int) -> None:
    pytest.importorskip(backend)
    done = python(KIT / "tiny_calls.py", backend, **ON_THE_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend}: {count} calls with gradients, and steps\n"
