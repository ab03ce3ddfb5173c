"""Answer requests of HTTP: routes, bodies, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from completion import Completion, Limits, error_of, parse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from worker import Job, Piece, Refused, Worker

from gdn_ops.export import ModelSession

BODY_SECONDS = 30.0
"""Bound the time a client takes to send a body."""

DISCARDED = 16
"""Read a refused body to its end up to so many times the limit, so that its client hears why; of
a longer one the connection is closed."""


class App:
    """Serve one model.

    Args:
        session: the model.
        model: its name, by which clients may ask for it.
        worker: runs it.
        limits: of a request.
    """

    def __init__(self, session: ModelSession, model: str, worker: Worker, limits: Limits) -> None:
        self.session, self.model, self.worker, self.limits = session, model, worker, limits

    def starlette(self) -> Starlette:
        """Return the application of the framework."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        return Starlette(
            routes=routes, exception_handlers={Refused: refuse, HTTPException: refuse_route}
        )

    async def health(self, _: Request) -> Response:
        """Say what is served, and how many requests run and wait."""
        folder = self.session.folder
        facts = {
            "status": "ok",
            "model": self.model,
            "architecture": folder.architecture,
            "flavour": folder.flavour,
            "body": self.session.body,
            **self.worker.counts(),
            "limits": {
                **vars(self.limits),
                "running": self.worker.most_running,
                "waiting": self.worker.most_waiting,
            },
        }
        return JSONResponse(facts)

    async def models(self, _: Request) -> Response:
        """List the one model."""
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "gdn_ops"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def complete(self, request: Request) -> Response:
        """Continue a prompt."""
        body = await read_body(request, self.limits.body_bytes)
        # A long text takes long to be cut into tokens: others are heard meanwhile.
        asked = await run_in_threadpool(parse, body, self.session, self.model, self.limits)
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece | Refused]()

        def tell(piece: Piece | Refused) -> None:
            # The loop is closed where the server was made to end at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(told.put_nowait, piece)

        job = Job(asked.generation, asked.pieces, tell)
        self.worker.submit(job)
        if asked.is_streamed:
            return Events(events(asked, told), self.worker, job)
        return await answer(request, asked, told, self.worker, job)


class Events(StreamingResponse):
    """Send the pieces of an answer as server-sent events, and end its job with the connection."""

    def __init__(self, lines: AsyncIterator[str], worker: Worker, job: Job) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._worker, self._job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)


async def pieces_of(told: asyncio.Queue[Piece | Refused]) -> AsyncIterator[Piece]:
    """Yield pieces up to the last.

    Raises:
        Refused: the answer cannot be ended.
    """
    while True:
        piece = await told.get()
        if isinstance(piece, Refused):
            raise piece
        yield piece
        if piece.reason is not None:
            return


async def events(asked: Completion, told: asyncio.Queue[Piece | Refused]) -> AsyncIterator[str]:
    """Yield the events of a streamed answer."""
    count = 0
    try:
        async for piece in pieces_of(told):
            count += len(piece.tokens)
            yield event(asked.chunk(piece))
    except Refused as refused:
        yield event(error_of(refused))
        return
    if asked.has_usage:
        yield event(asked.last(count))
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


async def answer(
    request: Request,
    asked: Completion,
    told: asyncio.Queue[Piece | Refused],
    worker: Worker,
    job: Job,
) -> Response:
    """Return a whole answer, or an empty one when its client has gone."""

    async def collect() -> list[Piece]:
        return [piece async for piece in pieces_of(told)]

    collected, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
        if collected.done():
            return JSONResponse(asked.whole(collected.result()))
        return Response(status_code=499)
    finally:
        worker.cancel(job)
        collected.cancel()
        gone.cancel()


async def until_gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: it is too long, or takes too long to come.
    """
    parts, length = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                length += len(part)
                if length <= most:
                    parts.append(part)
                elif length > DISCARDED * most:
                    break
    except TimeoutError:
        message = f"the body has not come in {BODY_SECONDS:g} s, should have come by then"
        raise Refused(408, message) from None
    except ClientDisconnect:
        raise Refused(400, "the body has not come to its end") from None
    if length > most:
        behind = "or more" if length > DISCARDED * most else "in all"
        raise Refused(413, f"the body has {length} bytes {behind}, should have at most {most}")
    return b"".join(parts)


async def refuse(_: Request, refused: Exception) -> Response:
    """Answer a request that is refused."""
    assert isinstance(refused, Refused)
    headers = {"retry-after": "1"} if refused.status in (429, 503) else {}
    if refused.status in (408, 413):
        headers["connection"] = "close"
    return JSONResponse(error_of(refused), refused.status, headers)


async def refuse_route(request: Request, error: Exception) -> Response:
    """Answer a request for what is not there."""
    assert isinstance(error, HTTPException)
    shown = f"{request.method} {request.url.path}"
    message = f"{shown} is not served, should be POST /v1/completions, GET /v1/models or /health"
    refused = Refused(error.status_code, message)
    return JSONResponse(error_of(refused), error.status_code, dict(error.headers or {}))
