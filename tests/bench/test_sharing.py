"""A forward is timed with one thread and two, alone and beside a process that keeps cores busy."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from gdn_ops.bench import sharing
from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.inputs import Inputs, Setting, find_case, make_inputs
from gpu_stand_ins import contender

TINY = find_case("tiny")
SETTING = Setting(repeats=3)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "REST", 0.0)
    monkeypatch.setattr(sharing, "SETTLE", 0.01)


def noting(note: object) -> tuple[Contender, list[object]]:
    """Return a contender that notes something in every run, and its notes."""
    notes: list[object] = []

    def sequence(x: Inputs) -> Prepared:
        return Prepared(lambda: notes.append(note()))  # type: ignore[operator]

    return Contender("noting", sequence), notes


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the machine has one core")
def test_one_thread_and_two_take_turns_and_the_threads_are_set_back() -> None:
    x, before = make_inputs(TINY.sizes, torch.float32), torch.get_num_threads()
    c, notes = noting(torch.get_num_threads)
    row = sharing.threads_row(TINY, c, x, SETTING)
    assert notes == [1, 2, 2, 1, 1, 2, 2, 1]
    assert torch.get_num_threads() == before
    assert not isinstance(row, str)
    assert (row.what, row.unit, row.samples, row.against) == ("threads", "x", 3, "2 threads")


def test_a_machine_of_one_core_has_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    x = make_inputs(TINY.sizes, torch.float32)
    reason = sharing.threads_row(TINY, contender(), x, SETTING)
    assert reason == "the machine has fewer than 2 cores"


def state_of(process: subprocess.Popen[str]) -> str:
    """Return how a process is: "R" and "S" where it runs, "T" where it is halted."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_busy_process_runs_beside_every_other_time_and_ends_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    c, notes = noting(lambda: state_of(started[0]) == "T")
    row = sharing.load_row(TINY, c, make_inputs(TINY.sizes, torch.float32), SETTING)
    assert notes == [True, False, False, True, True, False, False, True]
    assert not isinstance(row, str)
    assert (row.what, row.against) == ("load", "alone")
    assert started[0].returncode == -signal.SIGKILL


def test_where_processes_cannot_be_halted_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(signal, "SIGSTOP", raising=False)
    x = make_inputs(TINY.sizes, torch.float32)
    assert sharing.load_row(TINY, contender(), x, SETTING) == "processes cannot be halted here"
