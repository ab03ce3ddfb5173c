"""Say on every rank which rank failed, and why, where an exchange between ranks cannot end.

What one rank knows it posts in the store of torch.distributed; the others read it there once their
own exchange fails, which takes at most the timeout of the process group.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

GRACE: Final = 2.0
"""Seconds that a rank waits for word of the others before it raises."""

_registered: set[tuple[str, int]] = set()


class ParallelError(RuntimeError):
    """Report that ranks disagree about a call, or that an exchange between them failed.

    It is raised on every rank that takes part, and names the ranks and what is wrong.
    """


@contextmanager
def reported(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Post the reason why this rank leaves an exchange early, and go on raising it."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ParallelError):
            _post(group, "failed", f"{type(error).__name__}: {_first_line(error)}")
        raise


@contextmanager
def exchanging(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Turn the failure of an exchange into a ParallelError that says what is known of the ranks.

    Args:
        group: the process group.
        what: the exchange, like "states of gated_delta".

    Raises:
        ParallelError: torch.distributed raised.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ParallelError):
            raise
        reason = _first_line(error)
        _post(group, "failed", f"exchange failed: {reason}")
        raise ParallelError(
            f"rank {dist.get_rank(group)}: exchange of {what} failed: {reason}"
            f"{_known_of_others(group)}"
        ) from error


def register(group: dist.ProcessGroup) -> None:
    """Say in the store which process this rank is, once for a group."""
    # Names are given anew after destroy_process_group.
    key = group.group_name, id(group)
    if key not in _registered:
        _registered.add(key)
        _post(group, "process", f"{socket.gethostname()} {os.getpid()}")


def _known_of_others(group: dist.ProcessGroup) -> str:
    """Return what the other ranks have posted, and which of them have ended, as text."""
    own, ranks = dist.get_rank(group), dist.get_world_size(group)
    missing = [rank for rank in range(ranks) if rank != own]
    ended: list[str] = []
    failed: list[str] = []
    until = time.monotonic() + GRACE
    while missing and time.monotonic() < until:
        for rank in tuple(missing):
            word = _posted(group, "failed", rank)
            process = _posted(group, "process", rank)
            if word is not None and not word.startswith("exchange failed"):
                failed.append(f"rank {rank} failed: {word}")
            elif word is None and process is not None and _has_ended(process):
                ended.append(f"rank {rank} has ended (process {process.split()[1]})")
            elif word is None:
                continue
            missing.remove(rank)
        if failed:
            break
        time.sleep(0.05)
    causes = failed + ended
    if not causes and missing:
        causes = [f"no word from rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"]
    return "".join(f"; {cause}" for cause in causes)


def _has_ended(process: str) -> bool:
    """Return whether a process of this machine, given as "host pid", is known to have ended."""
    host, pid = process.split()
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        # Behind the name, which is in parentheses: Z is a process that nobody has waited for.
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _post(group: dist.ProcessGroup, kind: str, text: str) -> None:
    store = _store()
    if store is not None:
        # The store may have ended with the rank that held it.
        with suppress(RuntimeError):
            store.set(_key(group, kind, dist.get_rank(group)), text)


def _posted(group: dist.ProcessGroup, kind: str, rank: int) -> str | None:
    store = _store()
    key = _key(group, kind, rank)
    try:
        if store is None or not store.check([key]):
            return None
        return bytes(store.get(key)).decode(errors="replace")
    except RuntimeError:
        return None


def _key(group: dist.ProcessGroup, kind: str, rank: int) -> str:
    return f"gdn_ops/{group.group_name}/{kind}/{rank}"


def _store() -> Any:
    """Return the store that all processes share, or None where torch has none."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
