"""The way from the bridge to its runner: signed requests over kept connections, and upgraded streams as WebSockets.

Framing is h11's and websockets'; here is what they leave open: who signs, which connection is taken, and what a
failure means. A request is sent again, signed anew, in one case only: it changes nothing (GET, HEAD), and a kept
connection was lost before the first byte of an answer. Anything else may have happened and is reported.
"""

import asyncio
import base64
import collections
import contextlib
import os
import select
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

# Before the import: it would stop at 8 KiB a line, and take what is signed for one runner to another.
os.environ["WEBSOCKETS_MAX_LINE_LENGTH"] = str(2 * 65_536)
os.environ["WEBSOCKETS_MAX_REDIRECTS"] = "1"  # Of attempts.

import h11
import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from client import STREAMING, body_hash, sign, signed_chunk
from errors import RunnerError
from headers import Headers

READ = 256 * 1024
"""Bytes asked of a socket at once."""
MAX_HEAD = 512 * 1024
"""Security limit: bytes of an answer's head."""
MAX_FRAME = 64 * 1024 * 1024
"""Security limit: bytes of one WebSocket message; an answer that refuses an upgrade is one."""
MAX_IDLE = 32
"""Connections kept without a request."""
IDLE_S = 30.0
"""Seconds they are kept: well below the time after which a runner, or a proxy before it, closes them."""
CONNECT_S = 10.0
"""Seconds for a connection to be made, TLS included."""
SUBPROTOCOL = Subprotocol("docker-runner.stream.v1")
EOF = '{"eof":true}'
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A runner that vanished without a word is noticed after a minute; a stream may be silent for ever."""

Signer = Callable[[], tuple[str | None, str]]
"""Gives the key's name (or None) and the secret to sign with, anew for each request."""


class BrokenOffError(Exception):
    """The runner's answer broke off; what was given of it is not all."""


class NoMoreError(Exception):
    """The runner reads no more of a request's body. It may have answered why."""


class Uplink:
    """The runner, as the bridge sees it.

    Args:
        url: `http` or `https`. A path in it is what a proxy in front takes off: it is sent, and not signed.
        signer: see `Signer`.
        tls: for `https`; None for the usual certificate checks.

    Raises:
        ValueError: the URL is none, or holds what has no meaning here.
    """

    def __init__(self, url: str, signer: Signer, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("cannot hold a user, a query or a fragment")
        secure = parts.scheme == "https"
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if secure else 80)
        self._authority = parts.netloc.encode()
        self._prefix = parts.path.rstrip("/")
        self._signer = signer
        self._tls = (tls or ssl.create_default_context()) if secure else None
        self._idle: collections.deque[tuple[float, _Line]] = collections.deque()

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, target: str, headers: Headers, body: bytes | None
    ) -> AsyncIterator["Exchange"]:
        """Send a request's head, and its body if it is given; None: it follows by `Exchange.send`, in signed chunks.

        Leaving the context drops what is not complete.

        Raises:
            RunnerError: `runner_unreachable`: nothing was sent.
        """
        line = self._kept()
        if line is not None and method in ("GET", "HEAD") and body == b"":
            with contextlib.closing(self._begin(line, method, target, headers, body)) as exchange:
                if await exchange.fill():
                    yield exchange
                    return
            line = None
        with contextlib.closing(self._begin(line or await self._connect(), method, target, headers, body)) as exchange:
            yield exchange

    @contextlib.asynccontextmanager
    async def stream(self, target: str, headers: Headers, body: bytes) -> AsyncIterator["Stream"]:
        """Ask for an upgraded stream; see `Stream.status` for what came of it. Leaving the context ends it.

        Raises:
            RunnerError: `runner_unreachable`; `runner_cut`: the answer did not come.
        """
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise RunnerError("bad_request", "docker-runner bridge: the body of this request must be text") from None
        target = target.removesuffix("?")  # websockets would send it without.
        name, secret = self._signer()
        signed = sign(secret, "GET", target, key=name, content_hash=body_hash(body) if body else None)
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        secure = self._tls is not None
        opening = connect(
            f"{'wss' if secure else 'ws'}://{self._authority.decode()}{self._prefix}{target}",
            additional_headers=[*fields, *signed.items()],
            subprotocols=[SUBPROTOCOL],
            user_agent_header=None,
            compression=None,
            ping_interval=None,
            open_timeout=None,
            close_timeout=2,
            max_size=MAX_FRAME,
            max_queue=(8, 2),
            proxy=None,
            ssl=self._tls,
        )
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await opening
        except InvalidStatus as error:
            answer = error.response
            refusal = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.raw_items()]
            yield Stream(answer.status_code, refusal, bytes(answer.body or b""))
            return
        except (OSError, WebSocketException, TimeoutError, EOFError) as error:
            raise self._unreachable(error) from error
        _keep_alive(connection.transport)
        try:
            yield await _ask(connection, text)
        finally:
            reset(connection.transport)  # After a proper close this does nothing.

    def close(self) -> None:
        """Drop the kept connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def _begin(self, line: "_Line", method: str, target: str, headers: Headers, body: bytes | None) -> "Exchange":
        name, secret = self._signer()
        hashed = STREAMING if body is None else (body_hash(body) if body else None)
        signed = sign(secret, method, target, key=name, content_hash=hashed)
        fields: Headers = [(b"Host", self._authority), *headers]
        fields += [(field.encode(), value.encode()) for field, value in signed.items()]
        if body is None:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif body or method in ("POST", "PUT"):
            fields.append((b"Content-Length", b"%d" % len(body)))
        previous = base64.b64decode(signed["X-DR-Signature"])
        exchange = Exchange(self, line, method, secret.encode(), previous)
        exchange.begin((self._prefix + target).encode("latin-1"), fields, body)
        return exchange

    def _kept(self) -> "_Line | None":
        now = asyncio.get_running_loop().time()
        while self._idle:
            since, line = self._idle.pop()
            if now - since < IDLE_S and line.stands:
                return line
            line.close()
        return None

    def keep(self, line: "_Line") -> None:
        """A request is done with its connection, whole."""
        now = asyncio.get_running_loop().time()
        self._idle.append((now, line))
        while len(self._idle) > MAX_IDLE or now - self._idle[0][0] >= IDLE_S:
            self._idle.popleft()[1].close()

    async def _connect(self) -> "_Line":
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=READ)
        except (OSError, TimeoutError) as error:
            raise self._unreachable(error) from error
        _keep_alive(writer.transport)
        return _Line(reader, writer)

    def _unreachable(self, error: BaseException) -> RunnerError:
        reason = "it does not answer" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return RunnerError("runner_unreachable", f"docker-runner bridge: no way to the runner at {self.url}: {reason}")


def _keep_alive(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def reset(transport: asyncio.WriteTransport) -> None:
    """Drop a connection with a reset. A plain end would wait behind all that the other side has not read yet."""
    if not transport.is_closing():
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Line:
    """One connection to the runner."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._spare: socket.socket | None = None

    @property
    def stands(self) -> bool:
        """Nothing has come on it out of turn: its end, or what a proxy says before that."""
        if self.writer.is_closing():
            return False
        # Unlike `at_eof`, a read knows what has come. It is begun, and not waited for.
        reading = self.reader.read(1)
        try:
            reading.send(None)
        except (StopIteration, OSError):
            return False
        reading.close()
        # The loop may not have seen yet what the kernel has.
        poll = select.poll()
        poll.register(self.writer.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def brace(self) -> None:
        """A body is about to be sent, and may be refused in its midst: see `rest`."""
        if self.writer.get_extra_info("sslcontext") is None:
            self._spare = socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno()))

    def rest(self) -> bytes:
        """What the kernel still holds after the connection has failed.

        An answer that says why a body is refused comes just before the reset that the rest of the body earns. The event
        loop may meet the reset first, as it writes, and closes its socket then with the answer in it.
        """
        try:
            return self._spare.recv(READ) if self._spare is not None else b""
        except OSError:
            return b""

    def close(self) -> None:
        """Drop it, with whatever is on its way."""
        reset(self.writer.transport)
        if self._spare is not None:
            self._spare.close()


class Exchange:
    """One request and its answer. `close` it in the end: unless both are whole, its connection goes with it."""

    def __init__(self, uplink: Uplink, line: _Line, method: str, secret: bytes, previous: bytes) -> None:
        self._uplink = uplink
        self._line = line
        self._method = method
        self._secret = secret
        self._previous = previous
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._begun = False
        """The answer's head has come."""
        self._chunked = False
        self._held: list[bytes] = []
        self._held_size = 0

    def begin(self, target: bytes, headers: Headers, body: bytes | None) -> None:
        """Send the head, with the body if there is one already."""
        parts = [self._http.send(h11.Request(method=self._method, target=target, headers=headers)) or b""]
        if body:
            parts.append(self._http.send(h11.Data(data=body)) or b"")
        if body is not None:
            parts.append(self._http.send(h11.EndOfMessage()) or b"")
        else:
            self._line.brace()
        self._line.writer.write(b"".join(parts))

    async def send(self, data: bytes) -> None:
        """Send the next piece of the body, at most 1 MiB; waits while the runner reads slowly. No data ends the body.

        Raises:
            NoMoreError: the runner does not take it.
        """
        record = signed_chunk(self._secret, self._previous, data)
        self._previous = record[4:36]
        self._line.writer.writelines(self._http.send_with_data_passthrough(h11.Data(data=record)) or [])
        if not data:
            self._line.writer.write(self._http.send(h11.EndOfMessage()) or b"")
        try:
            await self._line.writer.drain()
        except OSError as error:
            raise NoMoreError from error

    async def head(self) -> h11.Response | h11.InformationalResponse:
        """The answer's status and headers. After a 101 see `pipe`.

        Raises:
            RunnerError: `runner_cut`: there is none; the operation may have happened.
        """
        try:
            while not isinstance(event := self._http.next_event(), h11.Response):
                if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                    return event
                if event is h11.NEED_DATA and not await self.fill():
                    raise _cut("the runner closed the connection before its answer")
        except h11.RemoteProtocolError as error:
            raise _cut(f"what the runner sent is not HTTP: {_without_quotes(error)}") from error
        self._begun = True
        self._chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
        return event

    def take(self) -> bytes | None:
        """The next piece of the answer's body, cut as the runner cut it; empty at the end; None: `fill` first.

        Raises:
            BrokenOffError: the answer is not whole.
        """
        try:
            while isinstance(event := self._http.next_event(), h11.Data):
                self._held.append(bytes(event.data))
                self._held_size += len(event.data)
                if not self._chunked or event.chunk_end or self._held_size > READ:
                    piece = self._held[0] if len(self._held) == 1 else b"".join(self._held)
                    self._held, self._held_size = [], 0
                    return piece
        except h11.RemoteProtocolError as error:
            raise BrokenOffError(_without_quotes(error)) from error
        return None if event is h11.NEED_DATA else b""

    def pipe(self) -> "Pipe":
        """What the connection has become after a 101."""
        return Pipe(self._line, self._http.trailing_data[0])

    async def fill(self) -> bool:
        """Read more of the answer; whether there is more.

        Raises:
            BrokenOffError: it broke in its midst.
        """
        try:
            data = await self._line.reader.read(READ)
        except OSError as error:
            data = self._line.rest()
            if self._begun and not data:
                raise BrokenOffError(str(error)) from error
        self._http.receive_data(data)
        return bool(data)

    def close(self) -> None:
        """Done: keep the connection if request and answer are whole, else drop it at once."""
        http = self._http
        whole = http.our_state is h11.DONE and http.their_state is h11.DONE and not http.trailing_data[0]
        if whole and self._line.stands:
            self._uplink.keep(self._line)
        else:
            self._line.close()


class Stream:
    """An upgraded stream, or the answer that refused it.

    `status` is 101 for a stream; `headers` and (else) `body` are the engine's, or the runner's.
    """

    def __init__(self, status: int, headers: Headers, body: bytes, connection: ClientConnection | None = None) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self._connection = connection

    async def send(self, data: bytes) -> None:
        """Send raw bytes, none of them for the end of our half; waits while they are taken slowly."""
        assert self._connection is not None
        with contextlib.suppress(ConnectionClosed):  # What became of the stream, the other direction tells.
            await self._connection.send(data or EOF)

    async def receive(self) -> bytes | None:
        """The next raw bytes; empty when the engine has ended its half; None at the stream's proper end.

        Raises:
            BrokenOffError: the stream broke.
        """
        assert self._connection is not None
        try:
            frame = await self._connection.recv()
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == CloseCode.NORMAL_CLOSURE:
                return None
            raise BrokenOffError(str(error)) from error
        return frame if isinstance(frame, bytes) else b""


class Pipe:
    """A connection that speaks another protocol now: raw bytes both ways, in the manner of a `Stream`."""

    def __init__(self, line: _Line, first: bytes) -> None:
        self._line = line
        self._first = first

    async def send(self, data: bytes) -> None:
        """Send raw bytes. Whoever ends a half here has left: such protocols say in their own words that they end.

        Raises:
            ConnectionError: there are none.
        """
        if not data:
            raise ConnectionAbortedError
        self._line.writer.write(data)
        await self._line.writer.drain()

    async def receive(self) -> bytes | None:
        """The next raw bytes; None at the end."""
        data, self._first = self._first or await self._line.reader.read(READ), b""
        return data or None


class _Answer(msgspec.Struct):
    """The frame that answers a request for an upgraded stream."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


async def _ask(connection: ClientConnection, body: str) -> Stream:
    try:
        await connection.send(body)
        answer = msgspec.json.decode(await connection.recv(), type=_Answer)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
    except ConnectionClosed as error:
        raise _cut(f"the runner closed the stream before its answer: {error}") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise _cut(f"what the runner sent is no answer: {error}") from error
    return Stream(answer.status, headers, answer.body, connection)


def _without_quotes(error: h11.RemoteProtocolError) -> str:
    """What h11 complains of, without the bytes that it quotes: they are somebody's data."""
    return str(error).partition(":")[0]


def _cut(reason: str) -> RunnerError:
    return RunnerError("runner_cut", f"docker-runner bridge: {reason}")
