"""Logs and events of the runner face: the engine's streams as server-sent events."""

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from admission import Connection
from calls import Calls, Thing, segment
from containers import inspected
from engine_connection import EngineResponse
from errors import RunnerError
from streams import KEEP_ALIVE, FrameCutter, FramingError, LineFramer, sse

_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache, no-transform")]
END = sse(b'{"type":"end"}')
MAX_EVENT = 64 * 1024 * 1024
"""Security limit: bytes of one event. It may be long: the event of an exec's creation holds the whole command."""


class Feed(Response):
    """A response of server-sent events. Its head leaves at once; when quiet, a comment tells that it lives.

    Args:
        messages: whole messages, each by `sse`, any number in a piece. A `RunnerError` of theirs is told in-band.
        keep_alive_s: how long it may be quiet.
        close: called at the end, whatever ends it.
        endless: it has no end of its own, so a shutdown ends it at once.
    """

    def __init__(
        self, messages: AsyncGenerator[bytes, None], *, keep_alive_s: float, close: Callable[[], None], endless: bool
    ) -> None:
        super().__init__()
        self._messages = messages
        self._keep_alive_s = keep_alive_s
        self._close = close
        self._endless = endless
        self._quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        connection: Connection = scope["docker_runner"]
        task = asyncio.current_task()
        assert task is not None
        if self._endless:
            connection.on_drain(task.cancel)
        alive = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            alive = asyncio.ensure_future(self._show_life(send))
            last = b""
            try:
                async with contextlib.aclosing(self._messages):
                    async for piece in self._messages:
                        self._quiet = False
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            except RunnerError as error:
                scope["docker_runner.request"].broke = error
                last = error_message(error)
            except asyncio.CancelledError:
                if connection.disconnected:
                    raise
                last = error_message(RunnerError("shutting_down", "docker-runner is shutting down", retryable=False))
            alive.cancel()
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            if alive is not None:
                alive.cancel()
            self._close()

    async def _show_life(self, send: Send) -> None:
        """Runs beside the messages; each send is whole, so that nothing of it comes between the bytes of one."""
        while True:
            self._quiet = True
            await asyncio.sleep(self._keep_alive_s)
            if self._quiet:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


def error_message(error: RunnerError) -> bytes:
    """The message that tells of an error within a stream."""
    fields = {"status": error.status, "code": error.code, "retryable": error.retryable}
    return sse(msgspec.json.encode({"type": "error", "message": error.message, **fields}))


async def logs(calls: Calls, container: str, query: dict[str, Any], keep_alive_s: float) -> Feed:
    """A container's log: chunks of whole frames of the engine's stream, base64; then the end.

    Args:
        calls: the engine.
        container: id, prefix or name.
        query: of the engine's `ContainerLogs`.
        keep_alive_s: see `Feed`.
    """
    tty = (await inspected(calls, container, own=True)).config.tty
    response = await calls.open("GET", f"/containers/{segment(Thing.CONTAINER, container)}/logs", query)
    return Feed(
        _log_messages(response, tty=tty), keep_alive_s=keep_alive_s, close=response.close, endless=bool(query["follow"])
    )


async def _log_messages(response: EngineResponse, *, tty: bool) -> AsyncGenerator[bytes, None]:
    cutter = FrameCutter()
    try:
        async for chunk in response.chunks():
            whole = chunk if tty else cutter.feed(chunk)
            if whole:
                yield _chunk(whole)
    except FramingError as error:
        raise RunnerError("engine_garbage", f"the engine's log is no multiplexed stream: {error}") from error
    if tail := cutter.tail():
        yield _chunk(tail)
    yield END


def _chunk(data: bytes) -> bytes:
    return sse(b'{"type":"chunk","data":"' + base64.b64encode(data) + b'"}')


def event_filters(given: str | None) -> str:
    """The engine's `filters` from the base64 of a JSON object of lists; containers only, if absent or undecodable.

    Raises:
        RunnerError: `validation_error`: it is JSON of another structure.
    """
    default = '{"type":["container"]}'
    if given is None:
        return default
    try:
        padded = given.translate(str.maketrans("-_", "+/")).rstrip("=")
        text = base64.b64decode(padded + "=" * (-len(padded) % 4), validate=True)
        decoded = msgspec.json.decode(text)
    except (binascii.Error, ValueError):
        return default
    with contextlib.suppress(msgspec.ValidationError):
        filters = msgspec.convert(decoded, dict[str, list[str]])
        return msgspec.json.encode(filters).decode()
    raise RunnerError("validation_error", "filters: must be an object of lists of strings")


async def events(
    calls: Calls,
    since: str | None,
    filters: str,
    *,
    connection: Connection,
    buffer_limit: int,
    keep_alive_s: float,
    on_passed: Callable[[bytes, int], object],
) -> Feed:
    """The engine's events, each once. A reader that is too slow is cut off; the engine must not be made to wait.

    `on_passed` is told of each piece that leaves, and since when (in ns since the epoch) the events are no history.
    """
    is_own = await calls.is_own_event()
    response = await calls.open(
        "GET",
        "/events",
        {"since": since, "filters": filters},
        buffer_limit=buffer_limit,
        on_overflow=connection.abort,
    )
    return Feed(
        _event_messages(response, is_own, on_passed), keep_alive_s=keep_alive_s, close=response.close, endless=True
    )


async def _event_messages(
    response: EngineResponse, is_own: Callable[[bytes], Awaitable[bool]], on_passed: Callable[[bytes, int], object]
) -> AsyncGenerator[bytes, None]:
    since_ns = time.time_ns()
    framer = LineFramer(max_line=MAX_EVENT)
    async for chunk in response.chunks():
        lines = [line for line in framer.feed(chunk).splitlines() if line.strip() and await is_own(line)]
        if framer.within_line:
            raise RunnerError("events_failed", f"an event is longer than {MAX_EVENT} bytes")
        if lines:
            piece = b"".join(sse(b'{"type":"event","event":' + line + b"}") for line in lines)
            on_passed(piece, since_ns)
            yield piece
    raise RunnerError("events_failed", "the engine ended the stream of events")


async def pull_feed(progress: AsyncGenerator[bytes, None], keep_alive_s: float) -> Feed:
    """A pull's progress as messages, then its end. What fails before there is any is still an HTTP error.

    Raises:
        RunnerError: as the progress does.
    """
    first = await anext(progress, None)
    return Feed(_pull_messages(first, progress), keep_alive_s=keep_alive_s, close=lambda: None, endless=False)


async def _pull_messages(first: bytes | None, progress: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(progress):
        if first is not None:
            yield _progress(first)
            async for line in progress:
                yield _progress(line)
    yield END


def _progress(line: bytes) -> bytes:
    return sse(b'{"type":"progress","event":' + line.strip() + b"}")
