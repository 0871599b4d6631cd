"""A client of upgraded streams for tests (WIRE: subprotocol `docker-runner.stream.v1`), and the engine's own, raw."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from client import body_hash, sign
from service import SECRET, Runner

SUBPROTOCOL = "docker-runner.stream.v1"
EOF = '{"eof":true}'
MIB = 1024 * 1024


class Upgraded:
    """One stream; what came is in `data`, and after its answer in `status`, `headers`, `body`."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.data = bytearray()
        self.eof = False
        """The engine's half has ended."""
        self.close_code: int | None = None
        self.close_reason: str | None = None

    async def ask(self, body: str | bytes) -> Self:
        """Send the first frame and take in the answer."""
        await self.socket.send(body)
        return await self.answer()

    async def answer(self) -> Self:
        """Take in the frame that answers."""
        frame = json.loads(await self.socket.recv())
        self.status, self.headers = frame["status"], {name.lower(): value for name, value in frame["headers"].items()}
        self.body = base64.b64decode(frame["body"]) if "body" in frame else None
        assert (self.body is None) == (self.status == 101)
        return self

    @property
    def error(self) -> dict[str, Any]:
        """The runner's own error in a refusal."""
        assert self.body is not None
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error

    async def send(self, *frames: bytes | str) -> None:
        """Send frames: bytes are data, a string a text frame."""
        for frame in frames:
            await self.socket.send(frame)

    async def receive(self) -> bytes:
        """The next data; empty after the close. An eof is taken note of."""
        while True:
            try:
                frame = await self.socket.recv()
            except ConnectionClosed:
                self.close_code, self.close_reason = self.socket.close_code, self.socket.close_reason
                return b""
            if isinstance(frame, bytes):
                assert not self.eof, "data came after eof"
                return frame
            assert frame == EOF
            assert not self.eof, "eof came twice"
            self.eof = True

    async def until(self, text: bytes) -> None:
        """Take in data until `text` is among it."""
        while text not in self.data:
            piece = await self.receive()
            assert piece, f"closed with {self.close_code} {self.close_reason}; had {bytes(self.data)[-200:]!r}"
            self.data += piece

    async def to_end(self) -> Self:
        """Take in everything up to the close."""
        while piece := await self.receive():
            self.data += piece
        return self

    @property
    def end(self) -> tuple[bool, int | None]:
        """How it ended: whether the engine's half did, and the code of the close."""
        return self.eof, self.close_code


def upgrade_headers(target: str, body: str = "", *, secret: str = SECRET, key: str | None = None) -> dict[str, str]:
    """The signature of an upgrade with this request body to come."""
    return sign(secret, "GET", target, content_hash=body_hash(body.encode()) if body else None, key=key)


@contextlib.asynccontextmanager
async def socket_of(
    runner: Runner,
    target: str,
    headers: Mapping[str, str],
    *,
    subprotocols: tuple[str, ...] | None = (SUBPROTOCOL,),
    **kw: Any,
) -> AsyncIterator[Upgraded]:
    """A stream whose first frame is still to be sent."""
    options = {"ping_interval": None, "max_size": None, "compression": None, "close_timeout": 2, "proxy": None, **kw}
    async with connect(
        f"ws://127.0.0.1:{runner.port}{target}",
        additional_headers=headers,
        subprotocols=None if subprotocols is None else [Subprotocol(name) for name in subprotocols],
        **options,
    ) as socket:
        yield Upgraded(socket)


@contextlib.asynccontextmanager
async def upgraded(
    runner: Runner,
    target: str,
    body: str = "",
    *,
    status: int = 101,
    fields: Mapping[str, str] | None = None,
    **kw: Any,
) -> AsyncIterator[Upgraded]:
    """A stream, asked for and answered."""
    content_type = {"Content-Type": "application/json"} if body else {}
    async with socket_of(
        runner, target, {**upgrade_headers(target, body), **content_type, **(fields or {})}, **kw
    ) as up:
        await up.ask(body)
        assert up.status == status, up.body
        yield up


class Hijacked:
    """The engine's own stream, asked directly: `status`, `headers`, then its raw bytes by `read`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def _head(self) -> None:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}

    async def to_end(self) -> bytes:
        """Everything up to the engine's close."""
        return await self.reader.read()


@contextlib.asynccontextmanager
async def hijacked(engine_socket: str, target: str, body: str = "") -> AsyncIterator[Hijacked]:
    """The engine's stream of an operation."""
    reader, writer = await asyncio.open_unix_connection(engine_socket, limit=64 * MIB)
    try:
        fields = ["Host: docker", "Connection: Upgrade", "Upgrade: tcp", f"Content-Length: {len(body)}"]
        fields += ["Content-Type: application/json"] if body else []
        writer.write("\r\n".join([f"POST {target} HTTP/1.1", *fields, "", body]).encode())
        stream = Hijacked(reader, writer)
        await stream._head()
        yield stream
    finally:
        writer.close()
