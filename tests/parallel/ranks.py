"""Run functions on the ranks of process groups: processes that are started once and kept."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

SIZES = (1, 2, 3, 4, 8)
"""Sizes of the groups that there are; each of the first ranks."""

MOST = max(SIZES)

PATIENCE = 20
"""Seconds that an exchange may take, and three times of which a test waits for an answer."""

PRELOADED = (
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "gdn_ops.parallel",
    "rich.progress",
    "tests.parallel.workers",
)
"""Modules that processes have when they start."""


def context() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes: from one that has imported what they need."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*PRELOADED])
    return found


class RankError(RuntimeError):
    """Report what a rank raised, with its traceback."""


class Ranks:
    """Hold the processes of the ranks, and run functions on them.

    Args:
        most: how many processes there are.
        patience: seconds that an exchange may take.
    """

    def __init__(self, most: int = MOST, patience: float = PATIENCE) -> None:
        self.most, self.patience = most, patience
        self.start()

    def start(self) -> None:
        """Start the processes."""
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self.processes, self._pipes = [], []
        most, patience = self.most, self.patience
        for rank in range(most):
            ours, theirs = context().Pipe()
            process = context().Process(
                target=_serve, args=(theirs, rank, most, store, patience), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call function(group, *arguments) on the first `count` ranks; return their results.

        Raises:
            RankError: a rank raised.
        """
        answers = self.try_run(count, function, *arguments)
        failed = [f"rank {r}: {a.args[1]}" for r, a in enumerate(answers) if _is_error(a)]
        if failed:
            # Exchanges of the others may be left half done.
            self.close()
            self.start()
            raise RankError("\n".join(failed))
        return answers

    def try_run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call as `run` does; return a RankError (its text, its traceback) where a rank raised."""
        for pipe in self._pipes[:count]:
            pipe.send((count, function, arguments))
        return [self._answer(rank) for rank in range(count)]

    def _answer(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        if not pipe.poll(3 * self.patience):
            return RankError("does not answer", "does not answer")
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return RankError("has ended", "has ended")

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _is_error(answer: Any) -> bool:
    return isinstance(answer, RankError)


def _serve(
    pipe: multiprocessing.connection.Connection, rank: int, most: int, store: str, patience: float
) -> None:
    """Answer calls until the other end is closed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, most),
        rank=rank,
        world_size=most,
        timeout=timedelta(seconds=patience),
    )
    sizes: Sequence[int] = [size for size in SIZES if size <= most]
    # A group does not take the timeout of another.
    groups = {size: dist.new_group(range(size), timedelta(seconds=patience)) for size in sizes}
    dist.barrier()
    while True:
        try:
            count, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(groups[count], *arguments)
        except Exception as error:
            answer = RankError(f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send(answer)
