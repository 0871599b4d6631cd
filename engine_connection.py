"""One connection to the engine: an asyncio protocol on httptools.

Theory of operation. A connection is IDLE → BUSY (one request and its answer) → IDLE → … → CLOSED; after a 101 it is RAW
until it closes. What arrives is handed to the answer, and whoever waits for it is woken once per read, not once per
parser callback, so that a small answer is complete when its head is first seen. Reading pauses while the answer has
enough that waits to be taken. An answer that is left before its end costs its connection, which is aborted at once, so
that the engine notices.
"""

import asyncio
import contextlib
import enum
import re
import select
import socket
import time
from collections.abc import Callable
from typing import cast

import httptools

from engine_response import HIGH_WATER, EngineResponse, NotProcessedError, Overflow
from errors import RunnerError
from headers import travel_whole
from streams import Data

MAX_HEAD = 512 * 1024
"""Security limit: bytes of an answer's head."""

WRITE_AHEAD = 1024 * 1024
"""Bytes of a request's body that wait for the engine here, and as many in the kernel (fewer if net.core.wmem_max is).
The engine needs some 40 ms before it reads any; and whenever it finds nothing to read, both sides pay a switch."""

_ANNOUNCES_BODY = re.compile(rb"\n(?:content-length|transfer-encoding):", re.IGNORECASE)


class _State(enum.Enum):
    IDLE = enum.auto()
    BUSY = enum.auto()
    RAW = enum.auto()
    CLOSED = enum.auto()


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
        self._events = select.poll()
        self._events.register(sock.fileno(), select.POLLIN)
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
        self._parser = httptools.HttpResponseParser(self)

    def alive(self) -> bool:
        """Whether a kept connection still stands; sees a close that the event loop has not reported yet."""
        # Whatever poll(2) has to tell, it is closed, or the engine speaks out of turn.
        return self.state is _State.IDLE and not self._events.poll(0)

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
        if not whole:
            self._transport.set_write_buffer_limits(WRITE_AHEAD, WRITE_AHEAD // 2)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WRITE_AHEAD // 2)  # The kernel doubles it.
        self._transport.write(data)
        return answer

    async def write(self, *parts: Data) -> None:
        """See `engine_response.Line`."""
        if self.state is _State.CLOSED:
            raise RunnerError("engine_cut_head", "the engine closed the connection during the request's body")
        self._transport.writelines(parts)
        if self._writable is not None:
            await asyncio.shield(self._writable)  # Who gives up waiting does not end the wait of the next.

    def request_sent(self) -> None:
        """The request's body is complete."""
        self._sent = True
        if self.state is not _State.CLOSED:
            self._transport.set_write_buffer_limits()

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

    def cut(self) -> None:
        """Drop it as if the engine had; one that was never used is left."""
        if self._used:
            self.connection_lost(None)
            self._transport.abort()

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
        head = self._head if self._head.startswith(b"H") else self._head.lstrip(b"\r\n")  # As the parser does.
        end = head.find(b"\r\n\r\n")
        if 100 <= status < 200 and status != 101:
            if _ANNOUNCES_BODY.search(head, 0, end):  # Which the parser would read, and give as part of the answer's.
                raise ValueError("the engine sent an interim answer with a body")
            self._head = head[end + 4 :]
            return
        if not (200 <= status < 600 or (status == 101 and self._asks_upgrade)):
            raise ValueError("the engine sent a status that answers nothing")
        answer = self._answer
        assert answer is not None
        fields = head[head.find(b"\r\n") + 2 : end + 2]
        answer.lowered = lowered = b"\n" + fields.lower()
        answer.travels_whole = travel_whole(lowered)
        if (
            end < 0
            or fields.count(b"\n") != fields.count(b"\r\n")
            or (not answer.travels_whole and (b"\n " in lowered or b"\n\t" in lowered))
        ):
            raise ValueError("the engine sent a folded header field")
        self._head = b""
        answer.status = status
        if self._operation:
            self._on_answered(self._operation, time.perf_counter() - self._began)
        answer.fields = fields
        if status != 101:
            self._frame(answer)

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
            if self._method != b"HEAD":
                self._keep = self._parser.should_keep_alive()  # A trailer may have said `Connection: close`.

    # Inside.

    def _frame(self, answer: EngineResponse) -> None:
        """See where the body ends, whose head has come, and whether the connection can be kept then."""
        lowered = answer.lowered
        codings = []
        if b"\ntransfer-encoding:" in lowered:
            codings = [value.lower() for name, value in answer.headers if name.lower() == b"transfer-encoding"]
            if codings != [b"chunked"]:
                raise ValueError("the engine sent a transfer coding that nobody asked for")
        if self._method == b"HEAD":
            # The parser knows nothing of HEAD: it would wait for a body, without a length until the connection's end.
            answer.completed()
            self._keep = self._parser.get_http_version() == "1.1" and b"\nconnection:" not in lowered
        elif answer.status not in (204, 304):
            answer.chunked = bool(codings)
            self._until_eof = not codings and b"\ncontent-length:" not in lowered
            if self._until_eof:
                answer.travels_whole = False

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
        if self._keep and self._sent and not self._until_eof and not self._transport.get_write_buffer_size():
            self.resume_reading()
            self.state = _State.IDLE
            self._answer = None
            if self._method == b"HEAD":
                self._parser = httptools.HttpResponseParser(self)  # The used one waits for a body.
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
