"""The bridge: a local plain socket that speaks the Engine API, in front of a runner far away.

Tools that cannot sign (the docker CLI, compose, the SDKs) are pointed at it; each of their requests goes on, signed, to
the runner (`uplink.py`), and the answer comes back framed as it was. What takes the connection over (attach, exec, and
what asks for h2c) becomes a WebSocket to the runner and raw bytes to the tool: a true `101`, or for the older form
without `Upgrade` a `200` that ends with the connection.

Theory of operation. Each connection is one task, held by the bridge: the event loop itself holds a half-closed
connection only weakly. A request is two directions that run side by side: one gives the tool the answer, the other
takes what the tool sends and notices its leaving. Whichever finds the end ends the other. Nothing is buffered but what
one read brought; who reads slowly slows the far end.
"""

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import re
import select
import signal
import socket
import stat
import struct
import termios
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11

from errors import RunnerError
from headers import HOP_BY_HOP, NOT_FORWARDED, Headers, end_to_end
from uplink import READ, BrokenOffError, Exchange, Stream, Uplink

log = logging.getLogger("docker_runner.bridge")

MAX_HEAD = 2 * 65_536
"""Security limit: bytes of a request's head (`X-Registry-Config` may be long)."""
MAX_CONNECTIONS = 1024
"""Connections of tools at once."""
MAX_AHEAD = 64 * 1024
"""Bytes that a tool may send before the answer to its request is complete; one that sends more has lost count."""
HEAD_S = 30.0
"""Seconds for a request's head, from its first byte."""
WHOLE = 1024 * 1024
"""A body of a stated length up to this many bytes is signed whole; any other goes as signed chunks."""
LINGER_S = 1.0
"""Seconds for which a body that nobody wants is read on, so that the tool gets to read the answer."""
LINGER_BYTES = 16 * 1024 * 1024
"""Bytes of it."""
HEAD_TAKEN_S = 0.1
"""Seconds that the first bytes of a raw stream wait for the tool to have read the head."""
_TAKEN_OVER = re.compile(
    r"(?:/v[0-9]+\.[0-9]+)?/(?:containers/[^/?]+/(?P<attach>attach)|exec/[^/?]+/start|(?P<h2c>session|grpc))(?:\?|$)"
)
_LOOPBACK = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?", re.IGNORECASE)
_OF_BROWSERS = frozenset((b"origin", b"sec-fetch-site", b"sec-fetch-mode"))


class _LeftError(Exception):
    """The tool has closed its connection."""


class Bridge:
    """Serves tools on a listening socket.

    Args:
        uplink: the way to the runner.
        sock: listens, on a Unix socket or on loopback.
    """

    def __init__(self, uplink: Uplink, sock: socket.socket) -> None:
        self._uplink = uplink
        self._sock = sock
        self._local = sock.family == socket.AF_UNIX
        self._conversations: set[asyncio.Task[None]] = set()

    async def serve(self, on_started: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT; then every connection is dropped."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        start = asyncio.start_unix_server if self._local else asyncio.start_server
        server = await start(self._accept, sock=self._sock, limit=READ, backlog=MAX_CONNECTIONS)
        on_started()
        await stop.wait()
        server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)
        self._uplink.close()
        if self._local:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._sock.getsockname())

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.ensure_future(self._converse(_Tool(reader, writer)))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def _converse(self, tool: "_Tool") -> None:
        """Serve one connection to its end."""
        try:
            while (request := await self._request(tool)) is not None and await self._serve(tool, request):
                pass
            await tool.finish()
        except (_LeftError, OSError):
            pass
        except BrokenOffError as error:
            log.warning("an answer broke off: %s", error)
            tool.reset()
        except Exception:
            log.exception("a defect while serving a tool")
        finally:
            tool.abort()

    async def _request(self, tool: "_Tool") -> h11.Request | None:
        try:
            if len(self._conversations) > MAX_CONNECTIONS:
                raise RunnerError("too_many_connections", "docker-runner bridge: too many connections are open")
            return await tool.request()
        except RunnerError as error:
            await tool.refuse(error)
            return None

    async def _serve(self, tool: "_Tool", request: h11.Request) -> bool:
        """Serve one request; whether another may follow on this connection."""
        target = request.target.decode("ascii")
        try:
            if not self._local:
                _check_origin(request.headers)
            asked = next((value.lower() for name, value in request.headers if name == b"upgrade"), None)
            taken = _TAKEN_OVER.match(target) if request.method == b"POST" else None
            if taken and (asked or not taken["h2c"]):
                await _side_by_side(self._carry(tool, request, asked, bool(taken["attach"])), tool.hung_up())
            else:
                await self._relay(tool, request)
        except RunnerError as error:
            log.warning("%s %s: %s", request.method.decode("ascii"), target.partition("?")[0], error)
            await tool.refuse(error)
        return tool.reusable

    async def _relay(self, tool: "_Tool", request: h11.Request) -> None:
        """Serve a request that has an answer and no more."""
        method, target = request.method.decode("ascii"), request.target.decode("ascii")
        body = await tool.whole_body()
        headers = end_to_end(request.headers.raw_items(), NOT_FORWARDED)
        exchange = await self._uplink.request(method, target, headers, body)
        try:
            await _side_by_side(_answer(tool, exchange), _forward(tool, exchange, body is None))
        finally:
            exchange.close()

    async def _carry(self, tool: "_Tool", request: h11.Request, asked: bytes | None, attach: bool) -> None:
        """Serve a request whose connection the engine takes over."""
        # Of an attach nothing is a body: the engine takes whatever follows the head for input, chunk marks included.
        body = b"" if attach and tool.chunked else await tool.read_body(WHOLE)
        headers = end_to_end(request.headers.raw_items(), NOT_FORWARDED)
        async with self._uplink.stream(request.target.decode("ascii"), headers, body) as stream:
            if stream.status != 101:
                await tool.give(stream.status, stream.headers, stream.body)
                return
            await tool.take_over(asked, stream.headers)
            await _side_by_side(_give_raw(tool, stream), _take_raw(tool, stream))


def listen(address: str) -> socket.socket:
    """A socket that listens at `unix:///PATH` (mode 0600) or `tcp://HOST:PORT` (loopback only).

    Raises:
        ValueError: it is neither, or not loopback.
        OSError: it cannot be listened on; somebody else does, say.
    """
    if address.startswith("unix://"):
        return _listen_unix(address.removeprefix("unix://"))
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None or parts.path:
        raise ValueError("must be unix:///PATH or tcp://127.0.0.1:PORT")
    (family, *_, found), *_ = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    if not ipaddress.ip_address(found[0]).is_loopback:
        raise ValueError("must be loopback: whoever can connect is root on the engine's host")
    return socket.create_server(found[:2], family=family)


def _listen_unix(path: str) -> socket.socket:
    if not path.startswith("/"):
        raise ValueError("must be unix:// and an absolute path")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else", path)
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(path)
            raise OSError(errno.EADDRINUSE, "somebody listens there", path)
        os.unlink(path)  # Left behind by one that was killed.
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


async def _side_by_side(answer: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]) -> None:
    """Run the direction that gives the answer to its end. The others end with it, or break it off by an exception."""
    first, *rest = [asyncio.ensure_future(direction) for direction in (answer, *others)]
    running = {first, *rest}
    try:
        while not first.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if first not in done:
                for direction in done:
                    direction.result()
        first.result()
    finally:
        for direction in (first, *rest):
            direction.cancel()
        await asyncio.gather(first, *rest, return_exceptions=True)


async def _answer(tool: "_Tool", exchange: Exchange) -> None:
    """Give the runner's answer as it comes, each piece at once; the head leaves with the first."""
    response = await exchange.head()
    tool.begin_answer(response.status_code, end_to_end(response.headers.raw_items(), HOP_BY_HOP), response.reason)
    while True:
        piece = exchange.take()
        if piece is None:
            await tool.flush()
            await exchange.fill()
        elif piece:
            tool.add(piece)
        else:
            tool.end_answer()
            await tool.flush()
            return


async def _forward(tool: "_Tool", exchange: Exchange, body_follows: bool) -> None:
    """Send what is still to come of the request's body, then wait for the tool to leave."""
    if body_follows:
        with contextlib.suppress(ConnectionError):  # The runner reads no more: its answer says why.
            while piece := await tool.body_piece():
                await exchange.send(piece)
            await exchange.send(b"")
    await tool.gone()


async def _give_raw(tool: "_Tool", stream: Stream) -> None:
    while (data := await stream.receive()) is not None:
        await tool.give_raw(data)


async def _take_raw(tool: "_Tool", stream: Stream) -> None:
    while data := await tool.take_raw():
        await stream.send(data)
    await stream.send(b"")


def _check_origin(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """On TCP any web page that the user looks at could reach the bridge: let nothing of a browser through."""
    hosts = [value for name, value in headers if name == b"host"]
    if not all(_LOOPBACK.fullmatch(host) for host in hosts) or any(name in _OF_BROWSERS for name, _ in headers):
        raise RunnerError("foreign_origin", "docker-runner bridge: only local tools may ask, no browser")


class _Tool:
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
        self._raw_begun = False
        self._ended = False

    # The request.

    async def request(self) -> h11.Request | None:
        """The next request's head; None if the tool closes instead.

        Raises:
            RunnerError: it is none.
        """
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        data = self._ahead.lstrip(b"\r\n") or (await self._reader.read(READ)).lstrip(b"\r\n")
        if not data:
            return None
        try:
            async with asyncio.timeout(HEAD_S):
                while (end := data.find(b"\r\n\r\n") + 4) < 4:
                    if len(data) > MAX_HEAD:
                        raise RunnerError("headers_too_large", f"the head is longer than {MAX_HEAD} bytes")
                    more = await self._reader.read(READ)
                    if not more:
                        raise _LeftError
                    data += more
        except TimeoutError:
            raise RunnerError("request_timeout", "the head of the request did not arrive in time") from None
        head, self._ahead = data[:end], data[end:]
        try:
            if head.count(b"\n") != head.count(b"\r\n"):
                raise h11.RemoteProtocolError("a line of the head ends without a carriage return")
            self._http.receive_data(head)
            event = self._http.next_event()
            if not isinstance(event, h11.Request):
                raise h11.RemoteProtocolError("not a request")
        except h11.RemoteProtocolError as error:
            raise RunnerError("bad_request", f"not a well-formed HTTP/1.1 request: {error}") from error
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

    async def whole_body(self) -> bytes | None:
        """The body, if it is short; None: it follows in pieces."""
        length = self._length
        return None if length is None or length > WHOLE else await self.read_body(WHOLE)

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
            _LeftError: the tool left before its end, or lost count of its chunks.
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
                    raise _LeftError
                self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise _LeftError from error

    async def gone(self) -> None:
        """Wait for the tool to leave.

        Raises:
            _LeftError: it has. On TCP a half-closed connection counts as closed: nothing tells them apart.
        """
        while data := await self._reader.read(READ):
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD:
                raise _LeftError
        if self._local:
            await self.hung_up()
        raise _LeftError

    # The answer.

    def begin_answer(self, status: int, headers: Headers, reason: bytes = b"") -> None:
        """The answer's head; it leaves with `flush`."""
        if self._http.their_state in (h11.IDLE, h11.SEND_BODY, h11.ERROR):
            headers = [*headers, (b"Connection", b"close")]  # What remains of the body is not read.
        self._put(h11.Response(status_code=status, headers=headers, reason=reason))

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
            raise _LeftError from error

    @property
    def reusable(self) -> bool:
        """Request and answer are whole, and another may follow."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    # The raw stream.

    async def take_over(self, asked: bytes | None, headers: Headers) -> None:
        """The head of a raw stream, on its own: some tools lose what comes in the same read."""
        if asked is None:
            lines = [b"HTTP/1.1 200 OK\r\n"]
        else:
            protocol = asked if asked == b"h2c" else b"tcp"
            lines = [b"HTTP/1.1 101 UPGRADED\r\n", b"Connection: Upgrade\r\nUpgrade: %b\r\n" % protocol]
        lines += [b"%b: %b\r\n" % field for field in end_to_end(headers, HOP_BY_HOP | {b"content-length"})]
        self._out += [*lines, b"\r\n"]
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
            _LeftError: it has.
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
        raise _LeftError

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
        """Close after the last answer. What is left of a body is read on a while, so that the tool can read it too."""
        if self._http.their_state is h11.SEND_BODY:
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
        if not self._local:
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._writer.transport.abort()

    def _put(self, event: h11.Event) -> None:
        self._out.append(self._http.send(event) or b"")
