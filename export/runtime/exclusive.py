"""Keep what has one state to one thread at a time, and to the process that made it."""

from __future__ import annotations

import os
import threading
from typing import NoReturn

from gdn_ops.spec.errors import SpecError, SpecTypeError

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Exclusive:
    """Enter a block that no other thread is in, or refuse to.

    Waiting would not help: steps of two threads in one session would come in any order, and each
    would read what the other has written into the states.
    """

    def __init__(self, name: str) -> None:
        self._name, self._lock, self._made_after = name, threading.Lock(), _forks

    def __enter__(self) -> None:
        if self._made_after != _forks:
            raise SpecError(
                f"{self._name}: is used in a forked process, should be made there: the threads of "
                f"onnxruntime stay behind"
            )
        if not self._lock.acquire(blocking=False):
            raise SpecError(
                f"{self._name}: is used by two threads at once, should be by one: it has one state "
                f"per row; make one for each thread, or one with more rows"
            )

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> NoReturn:
        raise SpecTypeError(
            f"{self._name}: is copied or pickled, should be made anew from its model: its states "
            f"are memory that onnxruntime writes; session.state has copies of them"
        )
