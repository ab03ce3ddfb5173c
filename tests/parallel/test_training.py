"""A training of several processes has the losses of one, however it is laid out or interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from errors import message_of
from paths import ROOT
from processes import output_of
from tests.parallel.launches import Ending, launch
from tests.parallel.trainings import (
    TINY,
    example,
    generate,
    losses_in,
    serve,
    train,
    train_in_bfloat16,
    train_until_killed,
)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

CLOSE = 1e-5

Losses = list[tuple[float, float]]
"""Nats per byte, and the norm of the gradient, of steps."""


class Folder:
    """Hold the text that is learnt, and name what trainings of it write."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path / "text.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog. " * 30, "utf-8")

    def arguments(self, name: str, *more: str) -> list[str]:
        out = ["--out", str(self.path / name), "--losses", str(self.path / f"{name}.losses")]
        return [str(self.text), *TINY, *out, *more]

    def copy(self, name: str, new: str) -> None:
        shutil.copytree(self.path / name, self.path / new)
        shutil.copy(self.path / f"{name}.losses", self.path / f"{new}.losses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="module")
def alone(folder: Folder) -> Losses:
    """Return the losses of 50 steps of one process."""
    return losses(launch(0, train, folder.arguments("alone", "--steps", "50")))


def losses(endings: list[Ending]) -> Losses:
    """Return the losses that all processes saw."""
    assert [ending.error for ending in endings] == [None] * len(endings)
    found: Losses = endings[0].result
    return found


def check_close(found: Losses, expected: Losses) -> None:
    assert len(found) == len(expected)
    for (nats, norm), (right, right_norm) in zip(found, expected, strict=True):
        assert abs(nats - right) < CLOSE
        assert abs(norm - right_norm) < 10 * CLOSE * right_norm


LAYOUTS = {
    "2 of rows": (2, 50, []),
    "2 of tokens": (2, 20, ["--context-parallel", "--recompute"]),
    "2 of weights": (2, 20, ["--data-parallel", "fsdp"]),
    "4 of rows": (4, 50, []),
    "4 of tokens": (4, 50, ["--context-parallel"]),
    "4 of both": (4, 30, ["--context-parallel", "2"]),
    "4 of all": (4, 10, ["--context-parallel", "2", "--data-parallel", "fsdp", "--recompute"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_process(folder: Folder, alone: Losses, name: str) -> None:
    count, steps, more = LAYOUTS[name]
    assert alone[0][0] > 2 * alone[-1][0]
    arguments = folder.arguments(name, "--steps", "50", "--until", str(steps), *more)
    check_close(losses(launch(count, train, arguments)), alone[:steps])


def test_fsdp_computes_in_bfloat16_with_gates_in_float32(folder: Folder, alone: Losses) -> None:
    how = ("--data-parallel", "fsdp", "--bfloat16", "--context-parallel", "--recompute")
    arguments = folder.arguments("narrow", "--steps", "50", "--until", "10", *how)
    endings = launch(2, train_in_bfloat16, arguments)
    assert [ending.error for ending in endings] == [None, None]
    results = [ending.result for ending in endings]
    assert sum(own for own, _ in (r["here"] for r in results)) == results[0]["here"][1]
    for name, dtype in results[0]["dtypes"].items():
        assert dtype == ("torch.float32" if ".decay." in name else "torch.bfloat16"), name
    assert {name.rpartition(".")[2] for name in results[0]["dtypes"]} == {
        "A_log",
        "dt_bias",
        "weight",
    }
    for (nats, _), (right, _) in zip(results[0]["losses"], alone[:10], strict=True):
        assert abs(nats - right) < 0.02 * right


def test_what_4_processes_saved_2_and_1_go_on_from(folder: Folder, alone: Losses) -> None:
    of_all = ("--context-parallel", "2", "--data-parallel", "fsdp")
    stop = ("--steps", "50", "--until", "12")
    losses(launch(4, train, folder.arguments("on 4", *stop, "--save-every", "10", *of_all)))
    # What is named is all that is kept.
    assert sorted(x.name for x in (folder.path / "on 4" / "checkpoint").iterdir()) == [
        "latest.json",
        "step-12",
    ]
    folder.copy("on 4", "on 1")
    go_on = ("--resume", "--until", "24")
    on_2 = folder.arguments("on 4", *go_on, "--context-parallel")
    check_close(losses(launch(2, train, on_2)), alone[:24])
    check_close(losses(launch(0, train, folder.arguments("on 1", *go_on))), alone[:24])


@pytest.mark.parametrize("where", ["step", "save", "error"])
def test_all_processes_end_with_one_that_does_and_others_go_on_from_the_checkpoint(
    folder: Folder, alone: Losses, where: str
) -> None:
    lost, step = {"step": (2, 8), "save": (1, 10), "error": (3, 8)}[where]
    how = ("--steps", "50", "--save-every", "5", "--context-parallel", "2")
    arguments = folder.arguments(f"lost in {where}", *how)
    endings = launch(4, train_until_killed, arguments, lost, step, where)
    reason = "failed: ValueError: no such token" if where == "error" else "has ended"
    assert endings[lost].code == (1 if where == "error" else -9)
    check_named(endings, lost, f"; rank {lost} {reason}")
    go_on = folder.arguments(f"lost in {where}", "--resume", "--until", "14")
    check_close(losses(launch(3 if where == "error" else 1, train, go_on)), alone[:14])


def test_a_process_that_hangs_is_left_after_the_timeout(folder: Folder) -> None:
    arguments = folder.arguments("hang", "--context-parallel", "--timeout", "3")
    endings = launch(2, train_until_killed, arguments, 1, 2, "hang")
    check_named(endings, 1, "; no word from rank 1")
    assert endings[0].seconds < 12


def check_named(endings: list[Ending], lost: int, reason: str) -> None:
    """Check that the others end, and say why."""
    for rank, ending in enumerate(endings):
        if rank != lost:
            assert ending.code == 1, rank
            assert ending.error is not None
            assert ending.error.startswith("ParallelError: "), ending.error
            assert reason in ending.error
            assert ending.seconds < 20


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def test_torchrun_starts_a_training_and_another_number_of_processes_goes_on(
    folder: Folder, alone: Losses
) -> None:
    script = (ROOT / "examples" / "train_lm.py",)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more = ("--steps", "50", "--until", "4", "--context-parallel")
    arguments = folder.arguments("by torchrun", *more)
    printed = output_of(*TORCHRUN, 4, *script, *arguments, **environment)
    assert printed.count("step 4: ") == 1
    go_on = folder.arguments("by torchrun", "--resume", "--until", "8")
    printed = output_of(*TORCHRUN, 2, *script, *go_on, **environment)
    assert printed.count("step 8: ") == 1
    check_close(losses_in(folder.path / "by torchrun.losses"), alone[:8])


@pytest.mark.parametrize(("count", "length"), [(2, 301), (4, 5), (4, 64)])
def test_what_follows_a_split_prompt_is_what_one_process_says(
    folder: Folder, alone: Losses, count: int, length: int
) -> None:
    out, prompt = folder.path / "alone", folder.text.read_bytes()[:length]
    (expected,) = launch(0, generate, out, prompt, 20)
    arguments = ["--prompt", str(folder.text), "--length", str(length), "--model", str(out)]
    endings = launch(count, serve, [*arguments, "--count", "20"])
    assert [ending.error for ending in endings] == [None] * count
    assert [ending.result for ending in endings] == [None] * (count - 1) + [expected.result]
    assert len(set(expected.result)) > 3


# Mistakes.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process seem to be the first of four."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.parametrize("more", [["--context-parallel"], ["--data-parallel", "ddp"]])
def test_one_process_shares_nothing(folder: Folder, more: list[str]) -> None:
    message = message_of(SystemExit, example("train_lm").main, folder.arguments("no", *more))
    assert message == "this is for several processes: start it with torchrun --nproc-per-node COUNT"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context-parallel", "3"], "--context-parallel is 3, should divide the 4 processes"),
        (["--context-parallel", "8"], "--context-parallel is 8, should divide the 4 processes"),
        (["--context-parallel", "-1"], "--context-parallel is -1, should divide the 4 processes"),
        (["--bfloat16"], "--bfloat16 is given, should be with --data-parallel fsdp alone"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    folder: Folder, launched: None, more: list[str], message: str
) -> None:
    assert (
        message_of(SystemExit, example("train_lm").main, folder.arguments("no", *more)) == message
    )


def test_a_batch_of_fewer_rows_than_processes_is_refused(folder: Folder) -> None:
    (ending, _) = launch(2, train, folder.arguments("no", "--batch", "1"))
    assert ending.error == (
        "SystemExit: --batch is 1, should be at least 2: so many processes take rows"
    )


def test_a_checkpoint_that_is_not_there_is_not_resumed(folder: Folder) -> None:
    arguments = folder.arguments("no", "--resume")
    message = message_of(SystemExit, example("train_lm").main, arguments)
    assert message == f"{folder.path / 'no'} has no checkpoint; without --resume a training starts"


def test_ddp_goes_on_from_one_process_and_fsdp_says_that_it_does_not(
    folder: Folder, alone: Losses
) -> None:
    losses(launch(0, train, folder.arguments("one", "--steps", "50", "--until", "3")))
    go_on = folder.arguments("one", "--resume", "--until", "6")
    endings = launch(2, train, [*go_on, "--data-parallel", "fsdp"])
    file = folder.path / "one" / "checkpoint.pt"
    for ending in endings:
        assert ending.error == (
            f"SystemExit: {file} is of one process, should be of several for fsdp"
        )
    check_close(losses(launch(2, train, go_on)), alone[:6])
    assert json.loads((folder.path / "one/checkpoint/latest.json").read_text())["step"] == 6
    # What was saved last counts: the folder of two processes, not the file of one.
    (found,) = launch(0, generate, folder.path / "one", b"the quick ", 20)
    file.unlink()
    (expected,) = launch(0, generate, folder.path / "one", b"the quick ", 20)
    assert found.result == expected.result
    assert len(found.result) == 20
