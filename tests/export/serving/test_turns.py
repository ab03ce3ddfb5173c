"""Turns of the worker: a long prompt stalls nobody, and a request that fails harms no other."""

from __future__ import annotations

import importlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdn_ops.export.runtime.model_session import ModelSession
from paths import ROOT
from served_models import SECONDS, export_tiny, until


@pytest.fixture(scope="module")
def worker_module() -> Iterator[Any]:
    """Import the worker as its folder sees it; forget it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "serve_onnx")
        yield importlib.import_module("worker")
        sys.modules.pop("worker", None)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    folder = export_tiny(tmp_path_factory.mktemp("turns") / "tiny")
    return ModelSession(folder, threads=1, prompt_chunk=4)


@pytest.fixture
def worker(worker_module: Any) -> Iterator[Any]:
    made = worker_module.Worker(3, 4)
    yield made
    made.end(0)
    made.join()


class Request:
    """Hold a job, and what is told of it.

    Args:
        log: gets the name and whether a piece of the prompt is read, call by call.
    """

    def __init__(
        self, module: Any, generation: Any, name: str = "", log: list[Any] | None = None
    ) -> None:
        self.told: queue.Queue[Any] = queue.Queue()
        advance: Callable[[], Any] = generation.advance

        def noted() -> Any:
            if log is not None:
                log.append((name, generation.is_reading))
            return advance()

        generation.advance = noted
        self.job = module.Job(generation, None, self.told.put)

    def tokens(self) -> list[int]:
        """Return the tokens of the whole answer."""
        found = []
        while True:
            piece = self.told.get(timeout=SECONDS)
            found += piece.tokens
            if piece.reason is not None:
                return found


def held(worker: Any) -> Any:
    """Return a lock that keeps the worker from its next turn."""
    return worker._changed


def test_between_two_pieces_of_a_prompt_every_answer_gets_a_token(
    session: ModelSession, worker: Any, worker_module: Any
) -> None:
    log: list[tuple[str, bool]] = []
    short = Request(worker_module, session.begin([1], 10**5), "short", log)
    long = Request(worker_module, session.begin([2] * 200, 1), "long", log)
    other = Request(worker_module, session.begin([3] * 40, 1), "other", log)
    worker.submit(short.job)
    assert short.told.get(timeout=SECONDS).tokens
    with held(worker):
        worker.submit(long.job)
        worker.submit(other.job)
    assert long.tokens() == session.generate([2] * 200, 1)
    assert other.tokens() == session.generate([3] * 40, 1)
    worker.cancel(short.job)
    until(lambda: worker.counts() == {"running": 0, "waiting": 0})
    reads = [place for place, (name, is_reading) in enumerate(log) if is_reading and place]
    names = [log[place][0] for place in reads]
    # 50 pieces and 10: the two prompts take turns too.
    assert names == ["long", "other"] * 10 + ["long"] * 40
    assert all(log[place - 1] == ("short", False) for place in reads)


def test_a_request_that_fails_leaves_the_others(
    session: ModelSession, worker: Any, worker_module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = (session.begin([n, n + 1], 30) for n in (5, 6))
    failing, going = Request(worker_module, bad), Request(worker_module, good)
    calls = iter(range(4))

    def fails() -> list[int]:
        next(calls)
        return [1]

    bad.advance = fails  # type: ignore[method-assign]
    with held(worker):
        worker.submit(failing.job)
        worker.submit(going.job)
    assert going.tokens() == session.generate([6, 7], 30)
    *pieces, last = failing.told.queue
    assert len(pieces) == 4
    assert (last.status, last.message) == (
        500,
        "the model could not be run: the log of the server says why",
    )
    assert "StopIteration" in caplog.text
    assert worker.counts() == {"running": 0, "waiting": 0}


def test_the_server_takes_as_many_as_it_says_and_ends_those_that_are_cancelled(
    session: ModelSession, worker: Any, worker_module: Any
) -> None:
    jobs = [Request(worker_module, session.begin([n], 10**5)) for n in range(8)]
    for request in jobs[:7]:
        worker.submit(request.job)
    with pytest.raises(worker_module.Refused) as caught:
        worker.submit(jobs[7].job)
    assert caught.value.status == 429
    until(lambda: worker.counts() == {"running": 3, "waiting": 4})
    # One that runs, and one that waits: the first of those that wait has its place.
    for request in (jobs[0], jobs[4]):
        worker.cancel(request.job)
    until(lambda: worker.counts() == {"running": 3, "waiting": 2})
    assert jobs[3].told.get(timeout=SECONDS).tokens
    assert jobs[0].job.generation.is_done
    assert jobs[4].told.empty()
    worker.end(0)
    worker.join()
    assert all(request.job.generation.is_done for request in jobs[:7])
    with pytest.raises(worker_module.Refused) as caught:
        worker.submit(jobs[7].job)
    assert (caught.value.status, caught.value.message) == (503, "the server is ending")
    assert "model" not in {thread.name for thread in threading.enumerate()}


def test_behind_the_end_requests_that_run_are_answered(
    session: ModelSession, worker: Any, worker_module: Any
) -> None:
    requests = [Request(worker_module, session.begin([n], 20)) for n in range(6)]
    with held(worker):
        for request in requests:
            worker.submit(request.job)
        worker.end(SECONDS)
    worker.join()
    assert [request.tokens() for request in requests] == [
        session.generate([n], 20) for n in range(6)
    ]


def test_files_of_the_example_stand_alone() -> None:
    """The worker knows nothing of HTTP: it runs where no web framework is installed."""
    text = Path(ROOT, "examples", "serve_onnx", "worker.py").read_text(encoding="utf-8")
    assert "starlette" not in text
    assert "uvicorn" not in text
