"""Logs and events of the runner face: the engine's streams as server-sent events."""

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import urlencode

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import operations
from admission import Connection
from calls import Calls, Thing, segment
from containers import inspected
from engine_response import EngineResponse
from errors import RunnerError
from event_fanout import Caller, Subscriber
from event_hub import EventHub, EventStream, Wish
from event_journal import read_position
from streams import GATHER_S, KEEP_ALIVE, MIN_UNCOPIED, FrameCutter, FramingError, sse

_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache, no-transform")]
END = sse(b'{"type":"end"}')
_FILTERS = msgspec.json.Decoder(dict[str, list[str]])
"""Made once: what it decodes to takes longer to be understood than to be decoded."""
HEAD_WAIT_S = 0.3
"""How long a followed log of Podman's waits for it to answer. A refusal comes at once, but its answer begins only when
the container says something; what it refuses after this time is told in-band."""


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
    path = f"/containers/{segment(Thing.CONTAINER, container)}/logs"
    following = bool(query["follow"])
    opening: asyncio.Future[EngineResponse]
    if following and calls.of_podman:
        # Use of the container lasts as long as the task that begins it, which the opening's is not.
        await calls.expiry.use(operations.decide(b"GET", path.encode()), path.encode())
        opening = await _begun(calls.open("GET", path, query))
    else:
        opening = asyncio.get_running_loop().create_future()
        opening.set_result(await calls.open("GET", path, query))
    return Feed(
        _log_messages(opening, tty=tty, gather=not following),
        keep_alive_s=keep_alive_s,
        close=lambda: _abandon(opening),
        endless=following,
    )


async def _begun(answer: Coroutine[Any, Any, EngineResponse]) -> asyncio.Future[EngineResponse]:
    """An answer that is waited for a while, and may still be to come then. Raises what is known by then."""
    opening = asyncio.ensure_future(answer)
    try:
        await asyncio.wait((opening,), timeout=HEAD_WAIT_S)
        if opening.done():
            opening.result()
    except BaseException:
        _abandon(opening)
        raise
    return opening


def _abandon(opening: asyncio.Future[EngineResponse]) -> None:
    """Close the engine's answer, whether it has come or is still to come."""
    opening.cancel()
    opening.add_done_callback(_close)


def _close(opening: asyncio.Future[EngineResponse]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _log_messages(opening: Awaitable[EngineResponse], *, tty: bool, gather: bool) -> AsyncGenerator[bytes, None]:
    cutter = FrameCutter()
    try:
        response = await opening
        async for chunk in response.chunks():
            whole = chunk if tty else cutter.feed(chunk)
            if whole:
                yield _chunk(whole)
            if gather and not response.ended and len(chunk) < MIN_UNCOPIED:
                await asyncio.sleep(GATHER_S)
    except FramingError as error:
        raise RunnerError("engine_garbage", f"the engine's log is no multiplexed stream: {error}") from error
    if tail := cutter.tail():
        yield _chunk(tail)
    yield END


def _chunk(data: bytes) -> bytes:
    return sse(b'{"type":"chunk","data":"', base64.b64encode(data), b'"}')


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
        msgspec.json.decode(text)
    except (binascii.Error, ValueError, RecursionError):
        return default
    with contextlib.suppress(msgspec.ValidationError):
        filters = _FILTERS.decode(text)
        # What means the same reads the same, so that it can be shared.
        return msgspec.json.encode({name: sorted(set(filters[name])) for name in sorted(filters)}).decode()
    raise RunnerError("validation_error", "filters: must be an object of lists of strings")


def event_wish(since: str | None, last_event_ids: list[str]) -> Wish:
    """Where a caller's events are to begin: what it has seen last goes before a time.

    Raises:
        RunnerError: `validation_error`: its `Last-Event-ID` is no id of an event, or there are several.
    """
    given = [each for each in last_event_ids if each]  # Empty, it is that of a client that has seen none.
    if len(given) > 1:
        raise RunnerError("validation_error", "Last-Event-ID: stands more than once")
    return Wish(since, read_position(given[0]) if given else None)


class EventFeed(Response):
    """A response of server-sent events that many share.

    Args:
        stream: theirs; it is left at the end, whatever ends it.
        subscriber: this caller's part in it.
    """

    def __init__(self, stream: EventStream, subscriber: Subscriber) -> None:
        super().__init__()
        self._stream = stream
        self._subscriber = subscriber

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        connection: Connection = scope["docker_runner"]

        async def send_piece(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        ending = RunnerError("shutting_down", "docker-runner is shutting down", retryable=False)
        connection.on_drain(lambda: self._subscriber.end(ending))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            last = b""
            try:
                if scope["method"] != "HEAD":
                    await self._subscriber.deliver(send_piece)
            except RunnerError as error:
                last = error_message(error)
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._stream.leave(self._subscriber)


async def events(
    calls: Calls, hub: EventHub, filters: str, wish: Wish, *, connection: Caller, buffer_limit: int
) -> EventFeed:
    """The engine's events, each once, from where the caller wants them.

    Args:
        calls: the engine, on the caller's behalf.
        hub: where they come from.
        filters: by `event_filters`.
        wish: where to begin.
        connection: the caller's.
        buffer_limit: bytes that may wait for it; past it, it is cut off: the engine must not be made to wait.
    """
    calls.check("GET", f"/events?{urlencode({'filters': filters})}".encode(), b"")
    subscriber = Subscriber(connection, buffer_limit)
    return EventFeed(await hub.subscribe(calls, filters, wish, subscriber), subscriber)


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
    return sse(b'{"type":"progress","event":', line.strip(), b"}")
