"""Run the requests of all users in one thread, a step of each in turn.

A turn is one new token for every request that is being answered, and one piece of one prompt: so a
long prompt makes others wait for one piece of it, never for the whole. Requests never share a call
of the graph, hence never a state.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gdn_ops.export import TextGeneration, TextPieces

logger = logging.getLogger("serve_onnx")


class Refused(Exception):
    """Report a request that is not answered, with the status of HTTP that says why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


@dataclass(frozen=True)
class Piece:
    """Hold what a step adds to an answer; the last piece says why it ends."""

    tokens: list[int]
    text: str
    reason: str | None = None


class Job:
    """Hold one request: what generates its tokens, what makes text of them, and who is told.

    Args:
        generation: of one text.
        pieces: None where there is no tokenizer.
        tell: is called by the worker's thread with each `Piece`, or with a `Refused` as the last.
    """

    def __init__(
        self,
        generation: TextGeneration,
        pieces: TextPieces | None,
        tell: Callable[[Piece | Refused], None],
    ) -> None:
        self.generation, self._pieces, self.tell = generation, pieces, tell
        self._tokens: list[int] = []
        self.is_cancelled = False

    def step(self) -> Piece | None:
        """Call the graph once, and return what can be told."""
        added = [token for token in self.generation.advance() if token is not None]
        self._tokens += added
        text, reason = "", None
        if self.generation.is_done:
            (reason,) = self.generation.reasons
        if self._pieces is not None:
            text = "".join(map(self._pieces.add, added))
            text += "" if reason is None else self._pieces.finish()
            if self._pieces.is_ended:
                self.generation.close()
                reason = "stop"
        # Without a tokenizer tokens are told one by one, else with the text that they complete.
        if reason is None and not text and not (self._pieces is None and added):
            return None
        piece, self._tokens = Piece(self._tokens, text, reason), []
        return piece


class Worker:
    """Run jobs in one thread.

    Args:
        most_running: how many requests are answered at a time; each has states of its own.
        most_waiting: how many more are kept until one of them ends.
    """

    def __init__(self, most_running: int, most_waiting: int) -> None:
        self.most_running, self.most_waiting = most_running, most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """Return how many requests run, and how many wait."""
        with self._changed:
            return {"running": len(self._running), "waiting": len(self._waiting)}

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            Refused: as many wait as may, or the server is ending.
        """
        with self._changed:
            if self._deadline is not None:
                raise Refused(503, "the server is ending")
            running, waiting = len(self._running), len(self._waiting)
            if running + waiting >= self.most_running + self.most_waiting:
                raise Refused(
                    429,
                    f"the server is full: {running} of {self.most_running} requests run and "
                    f"{waiting} of {self.most_waiting} wait; try again later",
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job, which frees its states before the next turn; one that has ended is none."""
        with self._changed:
            job.is_cancelled = True
            self._changed.notify()

    def end(self, seconds: float) -> None:
        """Take no more jobs, and let those that there are go on for some seconds."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def join(self) -> None:
        """Wait until all jobs have ended behind `end`."""
        self._thread.join()

    def _work(self) -> None:
        while turn := self._next_turn():
            for job in turn:
                self._step(job)

    def _next_turn(self) -> list[Job]:
        """Wait for jobs, and return those of the next turn; none when all have ended for good."""
        with self._changed:
            while True:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._drop_all()
                self._forget_cancelled()
                free = self.most_running - len(self._running)
                for _ in range(min(free, len(self._waiting))):
                    self._running.append(self._waiting.popleft())
                if self._running or self._deadline is not None:
                    break
                self._changed.wait()
            readers = [job for job in self._running if job.generation.is_reading]
            turn = [job for job in self._running if job not in readers] + readers[:1]
            for job in readers[:1]:
                # The next turn reads a piece of the prompt of another one.
                self._running.remove(job)
                self._running.append(job)
            return turn

    def _forget_cancelled(self) -> None:
        for job in (*self._waiting, *self._running):
            if job.is_cancelled:
                job.generation.close()
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        self._running = [job for job in self._running if not job.is_cancelled]

    def _step(self, job: Job) -> None:
        if job.is_cancelled:
            return
        told: Piece | Refused | None
        try:
            told = job.step()
        except Exception:
            # One request that fails leaves the others, and the server, as they are.
            logger.exception("a request failed")
            job.generation.close()
            told = Refused(500, "the model could not be run: the log of the server says why")
        if job.generation.is_done:
            # Its place is free before anybody knows of its end.
            with self._changed:
                self._running.remove(job)
        if told is not None:
            job.tell(told)

    def _drop_all(self) -> None:
        for job in (*self._waiting, *self._running):
            if not job.is_cancelled:
                job.is_cancelled = True
                job.tell(Refused(503, "the server is ending"))
