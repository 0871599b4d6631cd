"""A tool's connection to the bridge: plain requests in, answers out, or raw bytes both ways.

h11 does the framing, anew for each request, and is strict; here is what it leaves open: limits, when a head leaves, how
a tool's leaving shows, and how a connection ends so that its last answer can be read.
"""

import asyncio
import contextlib
import fcntl
import http
import select
import socket
import struct
import termios

import h11

from errors import RunnerError
from headers import HOP_BY_HOP, Headers, end_to_end
from uplink import READ, reset

MAX_HEAD = 2 * 65_536
"""Security limit: bytes of a request's head (`X-Registry-Config` may be long)."""
MAX_AHEAD = 64 * 1024
"""Bytes that a tool may send before the answer to its request is complete; one that sends more has lost count."""
HEAD_S = 30.0
"""Seconds for a request's head, from its first byte."""
HALF_CLOSED_S = 0.5
"""Seconds in which a tool on TCP that has ended its half still gets its answer: nothing tells it from one that left."""
LINGER_S = 1.0
"""Seconds for which a body that nobody wants is read on, so that the tool gets to read the answer."""
LINGER_BYTES = 16 * 1024 * 1024
"""Bytes of it."""
HEAD_TAKEN_S = 0.1
"""Seconds that the first bytes of a raw stream wait for the tool to have read the head."""


class LeftError(Exception):
    """The tool has closed its connection."""


class Tool:
    """A tool's connection: requests in, answers out; h11 does the framing, anew for each request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)
        self._ahead = b""
        """Read, and not given to h11 yet."""
        self._out: list[bytes] = []
        self._request: h11.Request | None = None
        self._local = writer.get_extra_info("socket").family == socket.AF_UNIX
        self._raw = False
        self._raw_begun = False
        self._ended = False

    # The request.

    async def request(self) -> h11.Request | None:
        """The next request's head; None if the tool closes instead.

        Raises:
            RunnerError: it is none.
        """
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        data = self._ahead.lstrip(b"\r\n")
        while not data:
            if not (data := await self._reader.read(READ)):
                return None
            data = data.lstrip(b"\r\n")
        try:
            async with asyncio.timeout(HEAD_S):
                while (end := data.find(b"\r\n\r\n") + 4) < 4 and len(data) <= MAX_HEAD:
                    if data.count(b"\n") != data.count(b"\r\n"):
                        raise _malformed("a line of the head ends without a carriage return")
                    if not (more := await self._reader.read(READ)):
                        raise LeftError
                    data += more
        except TimeoutError:
            raise RunnerError("request_timeout", "the head of the request did not arrive in time") from None
        if not 4 <= end <= MAX_HEAD:
            raise RunnerError("headers_too_large", f"the head is longer than {MAX_HEAD} bytes")
        head, self._ahead = data[:end], data[end:]
        try:
            self._http.receive_data(head)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            # What h11 says may quote a line, and a line may be a password.
            raise _malformed(str(error).partition(":")[0]) from None
        if not isinstance(event, h11.Request):
            raise _malformed("it is not a request")
        _check_head(head, event)
        self._request = event
        return event

    @property
    def chunked(self) -> bool:
        """The request's body is of no stated length."""
        return self._length is None

    @property
    def _length(self) -> int | None:
        """What the request says of its body's length; None if it comes in chunks."""
        headers = dict(self._request.headers) if self._request is not None else {}
        return None if b"transfer-encoding" in headers else int(headers.get(b"content-length", b"0"))

    async def whole_body(self, limit: int) -> bytes | None:
        """The body, if it says that it has at most `limit` bytes; None: it follows in pieces."""
        length = self._length
        return None if length is None or length > limit else await self.read_body(limit)

    async def read_body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            RunnerError: `body_too_large`: it is longer than `limit`.
        """
        parts: list[bytes] = []
        while piece := await self.body_piece():
            parts.append(piece)
            limit -= len(piece)
            if limit < 0:
                raise RunnerError("body_too_large", "docker-runner bridge: the body of this request is too long")
        return b"".join(parts)

    async def body_piece(self) -> bytes:
        """The next piece of the body; empty at its end.

        Raises:
            LeftError: the tool left before its end, or lost count of its chunks.
        """
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    return bytes(event.data)
                if isinstance(event, h11.EndOfMessage):
                    self._ahead = self._http.trailing_data[0] + self._ahead
                    return b""
                if self._http.they_are_waiting_for_100_continue:
                    self._put(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
                    await self.flush()
                data, self._ahead = self._ahead or await self._reader.read(READ), b""
                if not data:
                    raise LeftError
                self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise LeftError from error

    async def drop_body(self) -> None:
        """Read what is left of the body for nothing."""
        while await self.body_piece():
            pass

    async def gone(self) -> None:
        """Wait for the tool to leave.

        Raises:
            LeftError: it has. On TCP a half-closed connection soon counts as closed: nothing tells them apart.
        """
        while data := await self._reader.read(READ):
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD:
                raise LeftError
        if self._local:
            await self.hung_up()
        await asyncio.sleep(HALF_CLOSED_S)
        raise LeftError

    # The answer.

    def begin_answer(self, status: int, headers: Headers, reason: bytes = b"") -> None:
        """The answer's head; it leaves with `flush`."""
        with contextlib.suppress(ValueError):
            reason = reason or http.HTTPStatus(status).phrase.encode()
        if self._http.their_state in _UNREAD:
            headers = [*headers, (b"Connection", b"close")]  # What remains of the body is not read.
        self._put(h11.Response(status_code=status, headers=headers, reason=reason))
        if self._request is not None and self._request.method == b"HEAD":
            # h11 says how it would frame the body, but the engine has nothing of that kind.
            self._out[-1] = self._out[-1].replace(b"Transfer-Encoding: chunked\r\n", b"")

    def add(self, piece: bytes) -> None:
        """A piece of the answer's body."""
        self._out += self._http.send_with_data_passthrough(h11.Data(data=piece)) or []

    def end_answer(self) -> None:
        """The answer is complete."""
        self._put(h11.EndOfMessage())

    async def flush(self) -> None:
        """Let go what is ready; waits while the tool reads slowly."""
        if self._out:
            self._writer.write(b"".join(self._out)) if len(self._out) < 8 else self._writer.writelines(self._out)
            self._out = []
            await self._writer.drain()

    async def give(self, status: int, headers: Headers, body: bytes) -> None:
        """Give a whole answer."""
        framing = (b"content-length", b"transfer-encoding", b"connection")
        headers = [field for field in headers if field[0].lower() not in framing]
        self.begin_answer(status, [*headers, (b"Content-Length", b"%d" % len(body))])
        if self._request is None or self._request.method != b"HEAD":
            self.add(body)
        self.end_answer()
        await self.flush()

    async def refuse(self, error: RunnerError) -> None:
        """Answer with an error of our own, unless an answer has begun."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self.give(*error.response())
        else:
            raise LeftError from error

    @property
    def reusable(self) -> bool:
        """Request and answer are whole, and another may follow."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    # The raw stream.

    async def switch(self, response: h11.InformationalResponse) -> None:
        """The runner's own 101: what follows is raw."""
        lines = [b"%b: %b\r\n" % field for field in response.headers.raw_items()]
        self._out += [b"HTTP/1.1 101 Switching Protocols\r\n", *lines, b"\r\n"]
        self._raw = True
        await self.flush()

    async def take_over(self, asked: bytes | None, headers: Headers) -> None:
        """The head of a raw stream, on its own: some tools lose what comes in the same read."""
        if asked is None:
            lines = [b"HTTP/1.1 200 OK\r\n"]
        else:
            protocol = asked if asked == b"h2c" else b"tcp"
            lines = [b"HTTP/1.1 101 UPGRADED\r\n", b"Connection: Upgrade\r\nUpgrade: %b\r\n" % protocol]
        lines += [b"%b: %b\r\n" % field for field in end_to_end(headers, HOP_BY_HOP | {b"content-length"})]
        self._out += [*lines, b"\r\n"]
        self._raw = True
        await self.flush()

    async def give_raw(self, data: bytes) -> None:
        """Raw bytes to the tool; none: the engine has ended its half."""
        if not self._raw_begun:
            self._raw_begun = True
            await self._head_taken()
        if data:
            self._writer.write(data)
            await self._writer.drain()
        else:
            self._ended = True
            self._writer.write_eof()

    async def take_raw(self) -> bytes:
        """Raw bytes from the tool; empty when it has ended its half."""
        data, self._ahead = self._ahead or await self._reader.read(READ), b""
        return data

    async def hung_up(self) -> None:
        """Wait for the tool to close both halves, which no read would tell after the end of the first.

        Raises:
            LeftError: it has.
        """
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        with select.epoll() as watch:
            watch.register(self._fileno, 0)  # EPOLLHUP and EPOLLERR are always told.
            loop.add_reader(watch.fileno(), told.set)
            try:
                await told.wait()
            finally:
                loop.remove_reader(watch.fileno())
        if self._ended:
            await asyncio.Event().wait()  # It was our half that completed the hang-up: the stream's end comes anyway.
        raise LeftError

    async def _head_taken(self) -> None:
        """Wait, a little, until the tool has read all that was written (a Unix socket can tell)."""
        if not self._local:
            return
        end = asyncio.get_running_loop().time() + HEAD_TAKEN_S
        while asyncio.get_running_loop().time() < end:
            (unread,) = struct.unpack("i", fcntl.ioctl(self._fileno, termios.TIOCOUTQ, b"\0\0\0\0"))
            if not unread:
                return
            await asyncio.sleep(0.001)

    @property
    def _fileno(self) -> int:
        number: int = self._writer.get_extra_info("socket").fileno()
        return number

    # The end.

    async def finish(self) -> None:
        """Close after the last answer. What else comes is read on a while, so that the tool can read it too."""
        if self._http.their_state in _UNREAD and not self._raw:
            self._writer.write_eof()
            left = LINGER_BYTES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while left > 0 and (data := await self._reader.read(READ)):
                        left -= len(data)
        self._writer.close()
        await self._writer.wait_closed()

    def reset(self) -> None:
        """Drop the connection so that what was given cannot be taken for all, as far as the kind of socket can tell."""
        reset(self._writer.transport)

    def abort(self) -> None:
        """Drop the connection at once."""
        self._writer.transport.abort()

    def _put(self, event: h11.Event) -> None:
        self._out.append(self._http.send(event) or b"")


_UNREAD = (h11.IDLE, h11.SEND_BODY, h11.ERROR)
"""States in which more of the request may be on its way than was read."""


def _check_head(head: bytes, request: h11.Request) -> None:
    """Refuse what two readers of one request could read in two ways."""
    if head.count(b"\n") != head.count(b"\r\n"):
        raise _malformed("a line of the head ends without a carriage return")
    if not request.target.startswith(b"/") or b"#" in request.target:
        raise _malformed("the target must be a path, without a fragment")
    lines = head.lower().split(b"\r\n")
    lengths = [line for line in lines if line.startswith((b"content-length:", b"transfer-encoding:"))]
    if len(lengths) > 1 or any(b"," in line for line in lengths):
        raise _malformed("its length is stated more than once")


def _malformed(what: str) -> RunnerError:
    return RunnerError("bad_request", f"not a well-formed HTTP/1.1 request: {what}")
