"""Run functions on several processes that share a process group over gloo, again and again.

A rank waits for the name of a function in a module of tests, and its arguments. What it returns or
raises comes back from every rank.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 120
"""How long one call, or one exchange, may take."""


class Raised(NamedTuple):
    """Hold what a rank raised."""

    kind: str
    text: str


class Ranks:
    """Hold processes that run functions together.

    Args:
        count: how many.
        store: a file that does not exist yet, by which they find each other.
    """

    def __init__(self, count: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.count, self.pipes, self.processes = count, [], []
        for rank in range(count):
            here, there = context.Pipe()
            given = (rank, count, str(store), there, [*sys.path])
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def results(self, function: Callable[..., Any], /, *arguments: Any) -> list[Any]:
        """Call a function on every rank, and return what it returned or `Raised` there."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(SECONDS), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        return answers

    def run(self, function: Callable[..., Any], /, *arguments: Any) -> list[Any]:
        """Call a function on every rank, which should not raise, and return what it returned."""
        answers = self.results(function, *arguments)
        for rank, answer in enumerate(answers):
            assert not isinstance(answer, Raised), f"rank {rank}: {answer.kind}: {answer.text}"
        return answers

    def refusal(self, function: Callable[..., Any], /, *arguments: Any) -> str:
        """Call a function that every rank should refuse alike, and return the reason."""
        answers = self.results(function, *arguments)
        assert all(isinstance(x, Raised) and x.kind == "SpecError" for x in answers), answers
        assert len(set(answers)) == 1, answers
        text: str = answers[0].text
        return text

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, count: int, store: str, pipe: Any, path: list[str]) -> None:
    """Run what comes through a pipe, until nothing does."""
    sys.path[:] = path
    torch.set_num_threads(1)
    file = dist.FileStore(store, count)
    dist.init_process_group(
        "gloo", store=file, rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
    )
    while (asked := pipe.recv()) is not None:
        module, name, arguments = asked
        try:
            answer = getattr(importlib.import_module(module), name)(*arguments)
        except Exception as error:
            answer = Raised(type(error).__name__, str(error))
        pipe.send(answer)
    dist.destroy_process_group()
