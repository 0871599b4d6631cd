"""The engine's answer, between the connection that it comes on and whoever takes it. Knows no parser and no socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, Self

from errors import RunnerError
from streams import Data

HIGH_WATER = 256 * 1024
"""Bytes of one answer that wait to be taken before reading pauses."""


class Line(Protocol):
    """The connection that an answer comes on, as far as the answer is concerned."""

    async def write(self, *parts: Data) -> None:
        """Send more; waits while the engine reads slowly. What is given is not changed until it has left."""

    def write_eof(self) -> None:
        """Close our half."""

    def request_sent(self) -> None:
        """The request's body is complete."""

    def resume_reading(self) -> None:
        """The answer's buffer was emptied."""

    def close(self) -> None:
        """Drop the connection now."""


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

    status = 0
    fields = b""
    """The header fields as they came, each with the end of its line."""
    lowered = b"\n"
    """The same in lower case, behind a newline: a name's beginning is found by the newline before it."""
    travels_whole = False
    """The fields can be passed on as they stand (`headers.travel_whole`), and say where the body ends."""
    chunked = False
    """The body comes in chunks."""
    complete = False
    """The whole body has arrived (some of it may still wait to be taken). Excludes a `failure`."""
    on_change: Callable[[], object] | None = None
    """Called after each read, and when the answer fails; for who looks instead of waiting."""
    _failure: Exception | None = None
    _size = 0
    _waiter: asyncio.Future[None] | None = None
    _writer: asyncio.Task[None] | None = None

    def __init__(self, connection: Line, overflow: Overflow | None, loop: asyncio.AbstractEventLoop) -> None:
        self._connection: Line | None = connection
        self._loop = loop
        self._overflow = overflow
        self._chunks: list[bytes] = []

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
    def from_podman(self) -> bool:
        """Whether Podman answered; see docs/engines.md for what that changes."""
        return b"\nlibpod-api-version:" in self.lowered

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

    async def send(self, body: AsyncIterator[Data], *, chunked: bool) -> None:
        """Write a streamed request body; runs beside the answer, which may begin (and end) before the body does."""
        connection = self._connection
        assert connection is not None
        async for piece in body:
            if piece:
                # In one write, and never copied: a piece may be a mebibyte.
                await (connection.write(b"%x\r\n" % len(piece), piece, b"\r\n") if chunked else connection.write(piece))
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
