"""Serve an exported language model over HTTP.

    pip install starlette uvicorn
    python examples/serve_onnx out/qwen --port 8000
    curl localhost:8000/v1/completions -H 'content-type: application/json' \
        -d '{"prompt": "The gated delta rule", "max_tokens": 64, "stream": true}'

Several users are answered at a time: one thread runs the model, and each request has states of
its own. A request past a limit is refused, and its client is told the value and the limit. On
SIGTERM no more are taken, and those that run have some seconds to end.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from app import App
from completion import Limits
from worker import Worker

from gdn_ops import SpecError
from gdn_ops.export import ModelSession


class Server(uvicorn.Server):
    """Serve until a signal comes, then let requests end.

    Args:
        config: of uvicorn.
        worker: whose jobs are ended.
        grace: how many seconds they have.
        name: of what is served.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float, name: str) -> None:
        super().__init__(config)
        self._worker, self._grace, self._name = worker, grace, name

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for socket in sockets:
            host, port = socket.getsockname()[:2]
            print(f"serving {self._name} on http://{host}:{port}", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        self._worker.end(self._grace)
        await super().shutdown(sockets)


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a number that is not smaller."""

    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value}, should be at least {least}")
        return value

    return count


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="serve_onnx",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    limits = Limits()
    options.add_argument("folder", type=Path, help="what export_model has written")
    options.add_argument("--host", default="127.0.0.1", help="address to listen on")
    options.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options.add_argument("--body", default="auto", help="function body of our nodes")
    for name, least, default, text in (
        ("--threads", 1, None, "that one operator computes with"),
        ("--running", 1, 8, "requests that are answered at a time"),
        ("--waiting", 0, 32, "requests that may wait"),
        ("--prompt-tokens", 1, limits.prompt_tokens, "of a request, at most"),
        ("--max-tokens", 1, limits.max_tokens, "of an answer, at most"),
        ("--body-bytes", 1, limits.body_bytes, "of a request, at most"),
        ("--prompt-chunk", 1, 128, "tokens of a prompt that are read in one call"),
    ):
        options.add_argument(name, type=at_least(least), default=default, metavar="N", help=text)
    options.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that requests have at a signal",
    )
    return options


def main() -> None:
    given = parser().parse_args()
    # Also before the server is there, and when it raises the signal again at its end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        session = ModelSession(
            given.folder,
            threads=given.threads,
            body=given.body,
            prompt_chunk=given.prompt_chunk,
        )
    except SpecError as error:
        sys.exit(f"serve_onnx: {error}")
    worker = Worker(given.running, given.waiting)
    limits = Limits(given.prompt_tokens, given.max_tokens, given.body_bytes)
    name = given.folder.resolve().name
    config = uvicorn.Config(
        App(session, name, worker, limits).starlette(),
        host=given.host,
        port=given.port,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        # Longer than the worker needs: it tells clients why, uvicorn only hangs up.
        timeout_graceful_shutdown=int(given.grace) + 5,
    )
    try:
        server = Server(config, worker, given.grace, f"{name} ({session!r})")
        server.run(sockets=[config.bind_socket()])
    finally:
        worker.end(0)
        worker.join()
        print("ended", flush=True)


if __name__ == "__main__":
    main()
