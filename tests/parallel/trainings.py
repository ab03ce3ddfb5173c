"""Train by examples/train_lm.py in processes, which may be killed: functions found by name."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paths import ROOT

TINY = (
    *("--pattern", "GA", "--layers", "2", "--width", "32", "--heads", "2", "--window", "8"),
    *("--length", "32", "--batch", "4", "--sample", "3", "--timeout", "20"),
)


def example(name: str) -> Any:
    """Import an example as its folder sees it."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def train(arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Run the example; return nats and gradient norms of all steps in its file of losses."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        example("train_lm").main([*arguments])
    return losses_in(Path(arguments[arguments.index("--losses") + 1]))


def train_transformers(arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Run the example with a model of transformers; return nats and gradient norms of its steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        history: list[tuple[float, float]] = example("train_transformers").main([*arguments])
    return history


def losses_in(path: Path) -> list[tuple[float, float]]:
    """Return nats and norms of steps 1 and on; the last ones where steps were done twice."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_step = {line["step"]: (line["nats"], line["norm"]) for line in lines}
    assert sorted(by_step) == [*range(1, len(by_step) + 1)]
    return [by_step[step] for step in sorted(by_step)]


def train_in_bfloat16(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the example; return losses, dtypes that weights have in use, and how many are here."""
    mesh = example("mesh")
    placed, seen, here = mesh.Mesh.placed, {}, []

    def watched(own: Any, model: Any) -> Any:
        whole = sum(p.numel() for p in model.parameters())
        model = placed(own, model)
        here.append((sum(p.to_local().numel() for p in model.parameters()), whole))
        for name, module in model.named_modules():
            if name.endswith("decay") or isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(see(name))
        return model

    def see(name: str) -> Any:
        def hook(module: Any, _: Any) -> None:
            seen.update({f"{name}.{n}": str(p.dtype) for n, p in module.named_parameters()})

        return hook

    mesh.Mesh.placed = watched
    found = train(arguments)
    return {"losses": found, "dtypes": seen, "here": here[0]}


def serve(arguments: Sequence[str]) -> list[int] | None:
    """Run the example that splits a prompt; return what follows, where this process has it."""
    with contextlib.redirect_stdout(io.StringIO()):
        added = example("serve_split").main([*arguments])
    return None if added is None else added[0].tolist()


def generate(out: Path, prompt: bytes, count: int) -> list[int]:
    """Return the most likely bytes behind a prompt, by one process."""
    model = example("train_lm").trained(out)
    tokens = torch.tensor([list(prompt)])
    found: list[int] = model.generate(tokens, count, temperature=0)[0, len(prompt) :].tolist()
    return found


def train_until_killed(arguments: Sequence[str], rank: int, step: int, where: str) -> None:
    """Run the example, in which a rank ends early.

    Args:
        arguments: of the example.
        rank: the one that ends.
        step: at which it does.
        where: "step" or "save", where it is killed, "error" for an error of its own, or "hang".
    """
    lm = example("train_lm")
    if int(os.environ["RANK"]) == rank:
        if where == "save":
            _kill_in_save(lm, step)
        else:
            _end_in_step(lm, step, where)
    train(arguments)


def _end_in_step(lm: Any, step: int, where: str) -> None:
    share = lm.Training.share

    def ending(training: Any, tokens: Any) -> Any:
        if training.step == step:
            if where == "error":
                raise ValueError("no such token")
            if where == "hang":
                time.sleep(12)
            os.kill(os.getpid(), signal.SIGKILL)
        return share(training, tokens)

    lm.Training.share = ending


def _kill_in_save(lm: Any, step: int) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    write, save = FileSystemWriter.write_data, lm.Training.save

    def saving(training: Any, path: Path) -> None:
        if training.step == step:
            FileSystemWriter.write_data = writing  # type: ignore[method-assign]
        save(training, path)

    def writing(*given: Any) -> None:
        # The files of this process are there, and nobody hears of it.
        write(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    lm.Training.save = saving
