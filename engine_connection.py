"""One connection to the engine, an asyncio protocol on httptools, and the answer that comes on it.

Theory of operation. A connection is IDLE → BUSY (one request and its answer) → IDLE → … → CLOSED; after a 101 it is RAW
until it closes. What arrives is handed to the answer, and whoever waits for it is woken once per read, not once per
parser callback, so that a small answer is complete when its head is first seen. Reading pauses while more than
`HIGH_WATER` bytes wait to be taken. An answer that is left before its end costs its connection, which is aborted at
once, so that the engine notices.
"""

import asyncio
import contextlib
import enum
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Self, cast

import httptools

from errors import RunnerError

HIGH_WATER = 256 * 1024
"""Bytes of one answer that wait to be taken before reading pauses."""
MAX_HEAD = 512 * 1024
"""Security limit: bytes of an answer's head."""

_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)


class _State(enum.Enum):
    IDLE = enum.auto()
    BUSY = enum.auto()
    RAW = enum.auto()
    CLOSED = enum.auto()


class NotProcessedError(Exception):
    """The connection was lost, and the engine provably has not read the request."""


class Overflow:
    """What happens to an answer that must be read at once: a bound in bytes, and whom to tell when it is passed."""

    def __init__(self, limit: int, tell: Callable[[], object]) -> None:
        self.limit = limit
        self.tell = tell


class EngineResponse:
    """The engine's answer: `status`, `headers` (as sent, in order), then its body by `next`, `chunks` or `read`.

    A context manager: leaving it before the body's end closes the connection. After a 101 the body is the raw stream
    from the engine, and `write` and `write_eof` send on it.
    """

    __slots__ = (
        "_chunks",
        "_connection",
        "_failure",
        "_loop",
        "_overflow",
        "_size",
        "_waiter",
        "_writer",
        "complete",
        "fields",
        "on_change",
        "status",
    )

    def __init__(self, connection: "Connection", overflow: Overflow | None, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.fields = b""
        """The header fields as they came, each with the end of its line."""
        self.complete = False
        """The whole body has arrived (some of it may still wait to be taken). Excludes a `failure`."""
        self.on_change: Callable[[], object] | None = None
        """Called after each read, and when the answer fails; for who looks instead of waiting."""
        self._connection: Connection | None = connection
        self._loop = loop
        self._overflow = overflow
        self._failure: Exception | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    # For the caller.

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The header fields, in order."""
        fields = []
        for line in self.fields.split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            fields.append((name, value.strip(b" \t")))
        return fields

    @property
    def ended(self) -> bool:
        """The whole body has arrived and was taken."""
        return self.complete and not self._chunks

    @property
    def ready(self) -> bool:
        """`next` need not wait."""
        return self.complete or bool(self._chunks)

    @property
    def failure(self) -> Exception | None:
        """Why the answer will not be complete, as soon as that is known."""
        return self._failure

    async def next(self) -> bytes:
        """The next piece of the body: all that has arrived. Empty at its end.

        Raises:
            RunnerError: `engine_cut_body`, `engine_garbage`: the body broke off (what had arrived was given before).
        """
        while not self._chunks:
            if self.complete:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """All that has arrived of the body and was not taken yet."""
        chunks, self._chunks, self._size = self._chunks, [], 0
        if self._connection is not None:
            self._connection.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece; raises as `next`."""
        while chunk := await self.next():
            yield chunk

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes.

        Raises:
            RunnerError: as `next`; `engine_garbage` past the limit.
        """
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                raise RunnerError("engine_garbage", f"the engine's answer is longer than {limit} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """After a 101: send raw bytes; waits while the engine reads slowly."""
        if self._connection is None:
            raise RunnerError("engine_cut_body", "the engine's stream has ended")
        await self._connection.write(data)

    def write_eof(self) -> None:
        """After a 101: end our half. The engine's half goes on."""
        if self._connection is not None:
            self._connection.write_eof()

    def close(self) -> None:
        """Done with the answer: unless it is complete, its connection is closed at once. Never blocks."""
        if self._writer is not None:
            self._writer.cancel()
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # For the connection and the pool.

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            RunnerError: there will be none.
            NotProcessedError: there will be none, and the request may be sent again.
        """
        while not self.status:
            if self._failure is not None:
                raise self._failure
            await self._wait()

    async def send(self, body: AsyncIterator[bytes], *, chunked: bool) -> None:
        """Write a streamed request body; runs beside the answer, which may begin (and end) before the body does."""
        connection = self._connection
        assert connection is not None
        async for piece in body:
            if piece:
                await connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            await connection.write(b"0\r\n\r\n")
        connection.request_sent()

    def attach_writer(self, writer: asyncio.Task[None]) -> None:
        """`writer` runs `send`: it ends with the answer, and its failure is the answer's."""
        self._writer = writer
        writer.add_done_callback(self._writer_done)

    def _writer_done(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and (error := writer.exception()) is not None:
            self.failed(error if isinstance(error, Exception) else RuntimeError(str(error)))
            self.close()

    def append(self, data: bytes) -> bool:
        """Take in what arrived of the body; returns whether reading should pause."""
        if self._failure is not None:
            return False  # After a gap there is nothing worth having.
        self._chunks.append(data)
        self._size += len(data)
        if self._overflow is None:
            return self._size > HIGH_WATER
        if self._size > self._overflow.limit:
            self.failed(RunnerError("engine_cut_body", "the caller reads too slowly"))
            self._chunks.clear()
            self._overflow.tell()
        return False

    def completed(self) -> None:
        """The whole body has arrived."""
        if self._failure is None:
            self.complete = True

    def failed(self, error: Exception) -> None:
        """The answer will not be complete; the first reason counts."""
        if self._failure is None and not self.complete:
            self._failure = error

    def detach(self) -> None:
        """The connection has no more to do with this answer."""
        self._connection = None
        if self._writer is not None and not self._writer.done():
            self._writer.cancel()
        self.wake()

    def wake(self) -> None:
        """Something changed: whoever waits looks again."""
        if self.on_change is not None:
            self.on_change()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Connection(asyncio.Protocol):
    """One socket to the engine.

    Args:
        sock: the connected socket; kept to look whether the engine has closed it.
        on_free: called when an answer ended so that the connection can be kept.
        on_lost: called once, when the connection is gone.
        on_answered: told of the head of an answer: to which operation, how many seconds after the request was sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_free: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
        on_answered: Callable[[str, float], object] = lambda *_: None,
    ) -> None:
        self.state = _State.IDLE
        self._sock = sock
        self._on_free = on_free
        self._on_lost = on_lost
        self._on_answered = on_answered
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._writable: asyncio.Future[None] | None = None
        self._reading = True
        self._used = False
        self._answer: EngineResponse | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def alive(self) -> bool:
        """Whether a kept connection still stands; sees a close that the event loop has not reported yet."""
        if self.state is not _State.IDLE:
            return False
        try:
            self._sock.recv(1, _PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # Closed, or the engine speaks out of turn.

    def begin(
        self,
        method: bytes,
        data: bytes,
        *,
        whole: bool,
        bare: bool,
        upgrade: bool,
        head_s: float | None,
        overflow: Overflow | None,
        operation: str = "",
    ) -> EngineResponse:
        """Send a request's head with its first bytes; returns its answer to come.

        Args:
            method: of the request.
            data: what is sent now.
            whole: it is all of the request.
            bare: it is a head alone, and nothing follows it.
            upgrade: it asks for one.
            head_s: time limit on the answer's head.
            overflow: see `Engine.request`.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._method = method
        self._asks_upgrade = upgrade
        self._sent = whole
        self._repeatable = bare and self._used
        self._used = True
        self._operation = operation
        self._began = time.perf_counter()
        self._head = b""
        self._head_size = 0
        self._keep = False
        self._until_eof = False
        self._answer = answer = EngineResponse(self, overflow, self._loop)
        self.state = _State.BUSY
        if head_s is None:
            self._deadline = None
        else:
            self._limit_head(head_s)
        self._transport.write(data)
        return answer

    async def write(self, data: bytes) -> None:
        """Send more; waits while the engine reads slowly."""
        if self.state is _State.CLOSED:
            raise RunnerError("engine_cut_head", "the engine closed the connection during the request's body")
        self._transport.write(data)
        if self._writable is not None:
            await asyncio.shield(self._writable)  # Who gives up waiting does not end the wait of the next.

    def request_sent(self) -> None:
        """The request's body is complete."""
        self._sent = True

    def write_eof(self) -> None:
        """Close our half."""
        if self.state is not _State.CLOSED:
            self._transport.write_eof()

    def resume_reading(self) -> None:
        """The answer's buffer was emptied."""
        if not self._reading and self.state is not _State.CLOSED:
            self._reading = True
            self._transport.resume_reading()

    def close(self) -> None:
        """Drop the connection now, with whatever is on its way."""
        if self.state is not _State.CLOSED:
            self._transport.abort()
            self._lost()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        answer = self._answer
        if answer is None:
            self.close()  # The engine speaks out of turn.
            return
        if self.state is _State.RAW:
            self._append(data)
        else:
            if not answer.status:
                self._head_size += len(data)
                self._head = self._head + data if self._head else data
            try:
                self._parser.feed_data(data)
                if not answer.status and self._head_size > MAX_HEAD:
                    raise httptools.HttpParserError("head too long")
            except httptools.HttpParserUpgrade as upgrade:
                self.state = _State.RAW
                if rest := data[upgrade.args[0] :]:
                    self._append(rest)
            except httptools.HttpParserError:
                answer.failed(RunnerError("engine_garbage", "what the engine sent is not HTTP, or out of bounds"))
                self.close()
                return
            if answer.complete:
                self._finish(answer)
        answer.wake()
        if answer.failure is not None:
            self.close()

    def eof_received(self) -> bool:
        """asyncio.Protocol. In RAW our half stays open: closing it early would end the output of an attach."""
        answer = self._answer
        if answer is not None and (self.state is _State.RAW or self._until_eof):
            answer.completed()
            answer.wake()
        if self.state is _State.RAW:
            return True
        self.connection_lost(None)
        self._transport.abort()  # A close would first wait for an engine that may never read what is on its way.
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        unread = isinstance(exc, BrokenPipeError | ConnectionResetError)
        if unread:
            self._receive_rest()
        if self.state is _State.CLOSED:
            return
        answer = self._answer
        if answer is not None and not answer.complete:
            if answer.status:
                answer.failed(RunnerError("engine_cut_body", "the engine's answer broke off"))
            elif unread and self._repeatable and not self._head_size:
                answer.failed(NotProcessedError())
            else:
                answer.failed(RunnerError("engine_cut_head", "the engine closed the connection before its answer"))
        self._lost()

    def pause_writing(self) -> None:
        """asyncio.Protocol."""
        self._writable = self._writable or self._loop.create_future()

    def resume_writing(self) -> None:
        """asyncio.Protocol."""
        if self._writable is not None:
            if not self._writable.done():
                self._writable.set_result(None)
            self._writable = None

    # httptools

    def on_message_begin(self) -> None:
        """httptools. An answer follows an interim one only (100)."""
        if self._answer is None or self._answer.status:
            raise ValueError("the engine sent a second answer")

    def on_headers_complete(self) -> None:
        """httptools. It has checked the fields, which are cut out of what came: most are passed on as they stand."""
        status = self._parser.get_status_code()
        head, _, rest = self._head.partition(b"\r\n\r\n")
        if 100 <= status < 200 and status != 101:
            self._head = rest
            return
        if not (200 <= status < 600 or (status == 101 and self._asks_upgrade)):
            raise ValueError("the engine sent a status that answers nothing")
        answer = self._answer
        assert answer is not None
        fields = head.partition(b"\r\n")[2]
        if fields:
            fields += b"\r\n"
        if fields.count(b"\n") != fields.count(b"\r\n") or b"\n " in fields or b"\n\t" in fields:
            raise ValueError("the engine sent a folded header field")
        self._head = b""
        answer.status = status
        if self._operation:
            self._on_answered(self._operation, time.perf_counter() - self._began)
        answer.fields = fields
        if status == 101:
            return
        self._keep = self._parser.should_keep_alive()
        if self._method == b"HEAD":
            # The parser knows nothing of HEAD: it would wait for a body, without a length until the connection's end.
            answer.completed()
            self._keep = self._parser.get_http_version() == "1.1" and not any(
                name.lower() == b"connection" and value.lower() == b"close" for name, value in answer.headers
            )
        elif status not in (204, 304):
            names = b"\r\n" + fields.lower()
            is_coded = b"\r\ntransfer-encoding:" in names
            if is_coded and any(
                name.lower() == b"transfer-encoding" and value.lower() != b"chunked" for name, value in answer.headers
            ):
                raise ValueError("the engine sent a transfer coding that nobody asked for")
            self._until_eof = not is_coded and b"\r\ncontent-length:" not in names

    def on_body(self, body: bytes) -> None:
        """httptools."""
        if self._method == b"HEAD":
            raise ValueError("the engine sent a body with its answer to HEAD")
        self._append(body)

    def on_message_complete(self) -> None:
        """httptools. Also called for interim answers and for the head of an upgrade."""
        answer = self._answer
        if answer is not None and answer.status and answer.status != 101:
            answer.completed()

    # Inside.

    def _receive_rest(self) -> None:
        """A failed write ends the transport: take what the engine said (413, say) before it closed on our bytes."""
        self._sent = self._reading = False  # Neither kept nor paused any more.
        with contextlib.suppress(OSError):
            while self.state in (_State.BUSY, _State.RAW):
                data = self._sock.recv(HIGH_WATER, socket.MSG_DONTWAIT)
                if data:
                    self.data_received(data)
                else:
                    # A raw stream ends with the connection, whether or not all of its input was wanted.
                    if self._answer is not None and self.state is _State.RAW:
                        self._answer.completed()
                    break

    def _append(self, data: bytes) -> None:
        assert self._answer is not None
        if self._answer.append(data) and self._reading:
            self._reading = False
            self._transport.pause_reading()

    def _finish(self, answer: EngineResponse) -> None:
        """The answer is whole: keep the connection if both sides are done with it."""
        if self._keep and self._sent and not self._until_eof:
            self.resume_reading()
            self.state = _State.IDLE
            self._answer = None
            answer.detach()
            self._on_free(self)
        else:
            self.close()

    def _limit_head(self, head_s: float) -> None:
        """Set the time limit. The timer of an earlier request serves, if it looks in time: few are ever set."""
        self._deadline = self._loop.time() + head_s
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_later(head_s, self._look_at_head)

    def _look_at_head(self) -> None:
        self._timer = None
        answer = self._answer
        if answer is None or answer.status or self._deadline is None:
            return
        left_s = self._deadline - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look_at_head)
            return
        answer.failed(RunnerError("engine_timeout", "the engine began no answer in time"))
        self.close()

    def _lost(self) -> None:
        self.state = _State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume_writing()
        answer, self._answer = self._answer, None
        if answer is not None:
            if not answer.complete:
                answer.failed(RunnerError("engine_cut_body", "the connection to the engine was closed"))
            answer.detach()
        self._on_lost(self)
