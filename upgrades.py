"""Upgraded streams of the engine face: connections that the engine hands over, carried to the caller in a WebSocket.

The wire, subprotocol `docker-runner.stream.v1`, on the operation's own target: the caller's first frame is a text frame
with the request's body, which must have the hash that the upgrade was signed with. The answer is one text frame: the
engine's status and headers, and its body if it refused. After a 101, binary frames are the raw bytes both ways, and
`{"eof":true}` says that a side has ended its half; the other half goes on. A close with 1000 says that the engine's
stream ended whole, any other that it broke.

Bytes are taken from one side only when the other has taken what came before, so a stream is never held in memory.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import quote

import msgspec
from starlette.types import Receive, Scope, Send

from admission import Connection, Request
from client import EMPTY_BODY_HASH, body_hash
from dockerapi import Engine
from engine_response import EngineResponse
from errors import RunnerError
from headers import HOP_BY_HOP, NOT_FORWARDED, end_to_end
from operations import Kind, Operation
from scope import Narrowed

SUBPROTOCOL = "docker-runner.stream.v1"
MAX_REFUSAL = 16 * 1024 * 1024
"""Bytes of an answer other than a 101; it is sent in one frame."""
NO_EVENTS = b"/events?filters=" + quote('{"type":["daemon"],"event":["none"]}').encode()
SHORT_S = 0.25
"""A stream that ends sooner has no need of a witness: no other engine is there by then."""
ALIVE_LIMIT_S = 2.0
"""Seconds for the engine to show, after the end of a raw stream, that it is still there; it need not, if it is seen."""
ALIVE_ALONE_LIMIT_S = 10.0
"""The same, where nothing else tells of it."""
NORMAL, PROTOCOL_ERROR, POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART = 1000, 1002, 1008, 1011, 1012
EOF = '{"eof":true}'


class _Answer(msgspec.Struct, omit_defaults=True):
    """The frame that answers: the engine's status and headers; after a 101 the stream follows, else this is all."""

    status: int
    headers: dict[str, str]
    body: bytes | None = None


class _Left(Exception):  # noqa: N818
    """The caller has closed the WebSocket."""


class _Violation(Exception):  # noqa: N818
    """The caller sent what the subprotocol does not know."""


async def serve(
    engine: Engine,
    witness: "Witness",
    operation: Operation,
    asked: Narrowed,
    scope: Scope,
    receive: Receive,
    send: Send,
    first_frame_s: float,
) -> None:
    """Serve one WebSocket of the engine face, on the target of `operation`, as it was narrowed.

    Raises:
        RunnerError: refused before the upgrade.
    """
    request: Request = scope["docker_runner.request"]
    if operation.kind is not Kind.HIJACK:
        raise RunnerError("upgrade_unsupported", f"{operation.id} has no upgraded stream")
    if SUBPROTOCOL not in scope["subprotocols"]:
        raise RunnerError("upgrade_unsupported", f"a stream of the engine is carried by the subprotocol {SUBPROTOCOL}")
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
    stream = _Stream(receive, send, request.connection)
    with contextlib.suppress(_Left):
        try:
            await _carry(engine, witness, operation, asked, request, stream, first_frame_s)
        except RunnerError as error:
            request.broke = error
            if stream.answered:
                await stream.close(INTERNAL_ERROR, error.code)
            else:
                if error.retryable:
                    request.give_back()
                await stream.refuse(error)
        except _Violation as error:
            await stream.close(PROTOCOL_ERROR, str(error))
        except asyncio.CancelledError:
            if request.connection.disconnected:
                raise
            if not stream.answered:
                reason = "the runner ended before the answer; the request may have happened"
                await stream.refuse(RunnerError("shutting_down", reason, retryable=False))
            else:
                await stream.close(SERVICE_RESTART, "shutting_down")


class _Stream:
    """The caller's side: frames in, frames out."""

    def __init__(self, receive: Receive, send: Send, connection: Connection) -> None:
        self._receive = receive
        self._send = send
        self._connection = connection
        self.answered = False

    async def receive(self) -> bytes | str:
        """The next frame.

        Raises:
            _Left: the caller has closed.
        """
        message: Any = await self._receive()
        if message["type"] == "websocket.disconnect":
            raise _Left
        data: bytes | str | None = message.get("bytes")
        return message["text"] if data is None else data

    async def _give(self, message: dict[str, Any]) -> None:
        try:
            await self._send(message)
        except (OSError, RuntimeError):
            # The server's ways of saying that the caller, or its breach of the WebSocket protocol, has closed already.
            raise _Left from None

    async def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes | None = None) -> None:
        """Send the frame that answers the request."""
        self.answered = True
        self._connection.status = status  # For the audit log: the upgrade's own says less.
        fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        frame = msgspec.json.encode(_Answer(status, fields, body))
        await self._give({"type": "websocket.send", "text": frame.decode()})

    async def refuse(self, error: RunnerError) -> None:
        """Answer with an error of the runner's own, and close."""
        await self.answer(*error.response())
        await self.close(POLICY_VIOLATION if error.status == 401 else NORMAL)

    async def data(self, data: bytes) -> None:
        """Send raw bytes; waits while the caller reads slowly."""
        await self._give({"type": "websocket.send", "bytes": data})

    async def eof(self) -> None:
        """Say that the engine's half has ended."""
        await self._give({"type": "websocket.send", "text": EOF})

    async def close(self, code: int, reason: str = "") -> None:
        """Close the WebSocket."""
        await self._give({"type": "websocket.close", "code": code, "reason": reason})


async def _carry(
    engine: Engine,
    witness: "Witness",
    operation: Operation,
    asked: Narrowed,
    request: Request,
    stream: _Stream,
    first_frame_s: float,
) -> None:
    """Ask the engine, answer, and carry the stream to its end."""
    body = await _request_body(request, stream, first_frame_s)
    headers = end_to_end(request.headers, _NOT_FORWARDED)
    headers += ((b"Connection", b"Upgrade"), (b"Upgrade", operation.upgrade.encode()))
    with await engine.request(b"POST", asked.target, headers, body, operation=operation.id) as response:
        answer_headers = end_to_end(response.headers, HOP_BY_HOP)
        if response.status != 101:
            await stream.answer(response.status, answer_headers, asked.revealed(await response.read(MAX_REFUSAL)))
            await stream.close(NORMAL)
            return
        with witness.watching() as line:
            await stream.answer(101, answer_headers)
            output = asyncio.ensure_future(_carry_output(response, line, stream))
            input_ = asyncio.ensure_future(_carry_input(response, stream))
            try:
                await asyncio.wait((output, input_), return_when=asyncio.FIRST_COMPLETED)
                if input_.done():
                    input_.result()  # It ends by an exception only: the caller left, or broke the rules.
                output.result()
            finally:
                output.cancel()
                input_.cancel()
                await asyncio.gather(output, input_, return_exceptions=True)
    await stream.close(NORMAL)


_NOT_FORWARDED = NOT_FORWARDED | {
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-protocol",
    b"sec-websocket-extensions",
    b"origin",
}


async def _request_body(request: Request, stream: _Stream, limit_s: float) -> bytes:
    """The first frame: the request's body, which must be the one that was signed."""
    try:
        async with asyncio.timeout(limit_s):
            frame = await stream.receive()
    except TimeoutError:
        raise RunnerError("request_timeout", "the frame with the request's body did not come in time") from None
    except (_Left, asyncio.CancelledError):
        request.give_back()  # Nothing was forwarded: it may come again as it was.
        raise
    if isinstance(frame, bytes):
        raise _Violation("the first frame must be text: the request's body")
    body = frame.encode()
    announced = next((value for name, value in request.headers if name == b"x-dr-content-sha256" and value), None)
    if request.signed and body_hash(body) != (EMPTY_BODY_HASH if announced is None else announced.decode()):
        raise RunnerError("body_hash_mismatch", "the body in the first frame is not the one that was signed")
    return body


async def _carry_output(response: EngineResponse, line: "_Line", stream: _Stream) -> None:
    while chunk := await response.next():
        await stream.data(chunk)
    await line.check_whole()
    await stream.eof()


async def _carry_input(response: EngineResponse, stream: _Stream) -> None:
    """Give the engine what the caller sends. What comes after the stream's end goes nowhere, as on a socket."""
    ended = False
    while True:
        frame = await stream.receive()
        if isinstance(frame, str):
            if frame.replace(" ", "") != EOF:
                raise _Violation("a text frame within the stream can only say eof")
            if not ended:
                response.write_eof()
            ended = True
        elif ended:
            raise _Violation("data came after eof")
        elif not response.complete:
            try:
                await response.write(frame)
            except RunnerError:
                if not response.complete:
                    raise


class Witness:
    """Knows, at the end of a raw stream, whether the engine is still the one that began it.

    Such a stream ends with its connection, whether it is complete or the engine was killed; and what the caller has not
    taken yet may outlast the engine, and another engine be there in its place. So while there are streams, one more
    connection is held, on which the engine keeps silent for as long as it lives (it is asked for events that do not
    exist). It belongs to no pool: that may be full of streams.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._line: _Line | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator["_Line"]:
        """From the beginning of a stream to its end, which is then for `check_whole`."""
        if self._line is None or self._line.lost:
            self._line = _Line(self._path)
        line = self._line
        line.streams += 1
        try:
            yield line
        finally:
            line.streams -= 1
            if not line.streams:
                line.close()
                if self._line is line:
                    self._line = None


class _Line(asyncio.Protocol):
    """A connection of the witness; opens in the background."""

    def __init__(self, path: str) -> None:
        self.streams = 0
        """How many watch it."""
        self.lost = False
        """It has stood, and the engine has ended it."""
        self._path = path
        self._stands = False
        self._closed = False
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._begin = asyncio.get_running_loop().call_later(SHORT_S, self._begin_to_open)

    async def check_whole(self) -> None:
        """A stream has ended: see that the engine did not end with it.

        Raises:
            RunnerError: `engine_cut_body`: it did.
        """
        try:
            async with asyncio.timeout(ALIVE_LIMIT_S if self._stands else ALIVE_ALONE_LIMIT_S):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    writer.write(b"HEAD /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
                    alive = (await reader.readline()).startswith(b"HTTP/")
                finally:
                    writer.transport.abort()
        except BlockingIOError:
            alive = True  # So many want to speak to it that it accepts nobody just now.
        except (FileNotFoundError, ConnectionError):
            alive = False
        except OSError:
            alive = self._stands  # It is slow (TimeoutError), or no file is left here.
        if self.lost or not alive:
            raise RunnerError("engine_cut_body", "the stream ended, and so did the engine")

    def close(self) -> None:
        """Nobody watches any more."""
        self._closed = True
        self._begin.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _begin_to_open(self) -> None:
        self._opening = asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        with contextlib.suppress(OSError):  # Then the ping alone decides.
            await asyncio.get_running_loop().create_unix_connection(lambda: self, self._path)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:
            self._transport.abort()
        else:
            self._transport.write(b"GET %b HTTP/1.1\r\nHost: docker\r\n\r\n" % NO_EVENTS)

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol. The answer's head; and what would be its end, if the engine says one, proves nothing."""
        begins = data.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in data.lower()
        self._stands = (self._stands or begins) and not data.endswith(b"\r\n0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self.lost = self._stands
