"""Start processes as torchrun does, and hear how each of them ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.ranks import context

PATIENCE = 60.0
"""Seconds after which processes that have not ended are killed."""


@dataclass(frozen=True)
class Ending:
    """Hold how a process ended.

    Attributes:
        code: its exit code; -9 if it was killed.
        error: type and text of what it raised, or None.
        result: what the function returned, or None.
        seconds: until it ended.
    """

    code: int | None
    error: str | None
    result: Any
    seconds: float


def launch(count: int, function: Callable[..., Any], *arguments: Any) -> list[Ending]:
    """Call function(*arguments) in processes that find each other by environment variables.

    Args:
        count: how many; 0 for one that torchrun did not start.
        function: found by its name.
        arguments: of it.
    """
    # Kept here, as torchrun keeps it: it outlives whatever process ends.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started, begin = [], time.monotonic()
    for rank in range(max(count, 1)):
        ours, theirs = context().Pipe(duplex=False)
        variables = _variables(rank, count, store.port) if count else {}
        process = context().Process(target=_run, args=(theirs, variables, function, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    return [_ending(process, pipe, begin) for process, pipe in started]


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _ending(process: Any, pipe: multiprocessing.connection.Connection, begin: float) -> Ending:
    error, result = None, None
    if pipe.poll(max(0.0, begin + PATIENCE - time.monotonic())):
        with contextlib.suppress(EOFError):
            error, result = pipe.recv()
    process.join(max(0.1, begin + PATIENCE - time.monotonic()))
    seconds = time.monotonic() - begin
    if process.is_alive():
        process.kill()
        process.join()
        error = f"{error}; has not ended after {seconds:.0f} s"
    return Ending(process.exitcode, error, result, seconds)


def _run(
    pipe: multiprocessing.connection.Connection,
    variables: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        pipe.send((None, function(*arguments)))
    except BaseException as error:
        pipe.send((f"{type(error).__name__}: {error}", None))
        raise SystemExit(1) from None
