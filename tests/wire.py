"""The caller's side of the wire protocol, from nothing: HTTP/1.1 and RFC 6455 on sockets, signed with `hmac`.

It knows WIRE.md and nothing of this project, so that the suite that uses it can be pointed at any implementation. It is
strict where clients are: framing, lengths, what follows an answer, and the form of every server-sent event are checked.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Self
from urllib.parse import quote, urlsplit

PATIENCE_S = 20
"""How long a read may take; longer is a defect."""

INTERACTIVE = "/v1/exec/interactive/ws"
POSTS: dict[str, dict[str, Any]] = {
    "/v1/images/ensure": {"image": "x"},
    "/v1/containers/start": {"image": "x"},
    "/v1/containers/stop": {"containerId": "x"},
    "/v1/containers/remove": {"containerId": "x"},
    "/v1/containers/findByLabels": {"labels": {"a": "b"}},
    "/v1/volumes/remove": {"volumeName": "x"},
    "/v1/containers/touch": {"containerId": "x"},
    "/v1/containers/putArchive": {"containerId": "x", "path": "/", "payloadBase64": ""},
    "/v1/exec/run": {"containerId": "x", "command": "true"},
    "/v1/exec/resize": {"execId": "x", "size": {"cols": 1, "rows": 1}},
}
GETS: dict[str, dict[str, str]] = {
    "/v1/containers/inspect": {"containerId": "x"},
    "/v1/containers/labels": {"containerId": "x"},
    "/v1/containers/networks": {"containerId": "x"},
    "/v1/containers/listByVolume": {"volumeName": "x"},
    "/v1/containers/logs/sse": {"containerId": "x"},
    "/v1/events/sse": {},
}
"""The smallest valid request of each route."""

Headers = Mapping[str, str | None]


def compact(value: Any) -> bytes:
    """JSON as existing clients send it: without blanks, keys sorted."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def target(path: str, query: Mapping[str, Any] | None = None) -> str:
    """A request target. Booleans become `true` and `false`; anything but unreserved characters is percent-encoded."""
    pairs = {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in (query or {}).items()
    }
    given = "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())
    return f"{path}?{given}" if given else path


def signed(
    secret: str,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    timestamp: str | None = None,
    nonce: str | None = None,
    body_hash: str | None = None,
) -> dict[str, str]:
    """The headers that sign a request (WIRE.md, section 2)."""
    timestamp = str(time.time_ns() // 1_000_000) if timestamp is None else timestamp
    nonce = str(uuid.uuid4()) if nonce is None else nonce
    hashed = base64.b64encode(hashlib.sha256(body).digest()).decode() if body_hash is None else body_hash
    text = "\n".join((method.upper(), target, timestamp, nonce, hashed))
    mac = hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest()
    return {"X-DR-Timestamp": timestamp, "X-DR-Nonce": nonce, "X-DR-Signature": base64.b64encode(mac).decode()}


class Connection:
    """A socket with a buffer: lines, exact lengths, and its end. A context manager."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> str:
        """One line, without its CRLF."""
        while (end := self._buffer.find(b"\r\n")) < 0:
            assert self._fill(), f"the connection ended within a line: {bytes(self._buffer)!r}"
        line = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 2]
        return line

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            assert self._fill(), f"the connection ended {size - len(self._buffer)} bytes too early"
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def rest(self) -> bytes:
        """Everything up to the connection's end."""
        while self._fill():
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def _fill(self) -> bool:
        data = self.socket.recv(1 << 18)
        self._buffer += data
        return bool(data)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Reply:
    """An HTTP answer whose head has been read: `status`, `headers` (lower-cased names); the body is still to come."""

    def __init__(self, connection: Connection, method: str) -> None:
        self.connection = connection
        version, status, _ = connection.line().split(" ", 2)
        assert version == "HTTP/1.1"
        self.status = int(status)
        self.headers: list[tuple[str, str]] = []
        while line := connection.line():
            name, _, value = line.partition(":")
            self.headers.append((name.lower(), value.strip()))
        self._bodiless = method == "HEAD" or self.status in (101, 204, 304) or self.status < 200
        self.body = b""

    def header(self, name: str) -> str | None:
        values = [value for other, value in self.headers if other == name]
        assert len(values) <= 1, f"{name} stands {len(values)} times"
        return values[0] if values else None

    @property
    def json(self) -> Any:
        assert self.header("content-type") == "application/json"
        return json.loads(self.body)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes; it must end as its framing says."""
        if self._bodiless:
            return
        if self.header("transfer-encoding") == "chunked":
            while size := int(self.connection.line(), 16):
                yield self.connection.exactly(size)
                assert self.connection.line() == ""
            assert self.connection.line() == ""
        else:
            length = self.header("content-length")
            assert length is not None, "an answer without a length"
            yield self.connection.exactly(int(length))

    def finish(self) -> Self:
        """Read the whole body; nothing may follow it."""
        self.body = b"".join(self.pieces())
        assert self.connection.rest() == b""
        self.connection.close()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.connection.close()


class Feed:
    """The server-sent events of an answer: each one line `data: {JSON}`, an `id:` line or none, and an empty line; or a
    comment."""

    def __init__(self, reply: Reply) -> None:
        self._pieces = reply.pieces()
        self._buffer = b""
        self.comments = 0

    def block(self) -> bytes | None:
        """The next block up to its empty line and less its id, a comment or a message; None at the stream's end."""
        while b"\n\n" not in self._buffer:
            piece = next(self._pieces, None)
            if piece is None:
                assert self._buffer == b"", f"the stream ended within a message: {self._buffer!r}"
                return None
            self._buffer += piece
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        return re.sub(rb"\nid: [A-Za-z0-9_-]+\Z", b"", block)

    def __iter__(self) -> Iterator[Any]:
        """The messages."""
        while (block := self.block()) is not None:
            if block.startswith(b":"):
                self.comments += 1
                continue
            assert re.fullmatch(rb"data: \{[^\r\n]*\}", block), block
            yield json.loads(block.removeprefix(b"data: "))


class WebSocket:
    """A WebSocket after its upgrade. `closed` is the server's close: code and reason."""

    TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.closed: tuple[int, str] | None = None

    @staticmethod
    def frame(opcode: int, payload: bytes) -> bytes:
        """One masked frame."""
        mask, size = os.urandom(4), len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        elif size < 1 << 16:
            length = b"\xfe" + size.to_bytes(2, "big")
        else:
            length = b"\xff" + size.to_bytes(8, "big")
        key = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
        return bytes([0x80 | opcode]) + length + mask + masked

    @classmethod
    def message(cls, value: Any) -> bytes:
        """The frame of a JSON message."""
        return cls.frame(cls.TEXT, compact(value))

    def send(self, *values: Any) -> None:
        """JSON messages, all in one segment."""
        self.connection.send(b"".join(self.message(value) for value in values))

    def stdin(self, data: bytes) -> None:
        self.send({"type": "stdin", "data": base64.b64encode(data).decode()})

    def __iter__(self) -> Iterator[Any]:
        """The JSON messages up to the server's close, which is answered."""
        while True:
            first, second = self.connection.exactly(2)
            assert first & 0x70 == 0, "a reserved bit: an extension that nobody asked for"
            assert second & 0x80 == 0, "a masked frame from a server"
            assert first & 0x80, "a fragment"
            size = second
            if second >= 126:
                size = int.from_bytes(self.connection.exactly(2 if second == 126 else 8), "big")
            payload = self.connection.exactly(size)
            match first & 0x0F:
                case self.TEXT:
                    yield json.loads(payload)
                case self.CLOSE:
                    self.closed = int.from_bytes(payload[:2], "big"), payload[2:].decode()
                    self.connection.send(self.frame(self.CLOSE, payload[:2]))
                    with contextlib.suppress(ConnectionResetError):  # It need not read what came after.
                        assert self.connection.rest() == b""
                    return
                case opcode:
                    raise AssertionError(f"a frame of type {opcode}")

    def next(self) -> Any:
        """The next message."""
        return next(iter(self))

    def until(self, text: bytes) -> bytes:
        """What came on stdout up to and including `text`."""
        said = b""
        while text not in said:
            frame = self.next()
            assert frame["type"] == "stdout", frame
            said += base64.b64decode(frame["data"], validate=True)
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.connection.close()


class Wire:
    """An implementation, by its base URL and its secret."""

    def __init__(self, url: str, secret: str) -> None:
        parts = urlsplit(url)
        assert parts.scheme == "http"
        assert parts.hostname is not None
        self.host = parts.hostname
        self.port = parts.port or 80
        self.secret = secret

    def connect(self) -> Connection:
        return Connection(self.host, self.port)

    def sign(self, method: str, target: str, body: bytes = b"", **more: str) -> dict[str, str]:
        """See `signed`."""
        return signed(self.secret, method, target, body, **more)

    def head(self, method: str, target: str, headers: Headers) -> bytes:
        """A request's head; headers of value None are left out."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def open(
        self, method: str, target: str, body: bytes = b"", headers: Headers | None = None, *, sign: bool = True
    ) -> Reply:
        """One request on a connection of its own; the answer's body is still to be read, by `with`."""
        fields: dict[str, str | None] = {"Connection": "close"}
        if body:
            fields |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        if sign:
            fields |= self.sign(method, target, body)
        connection = self.connect()
        connection.send(self.head(method, target, {**fields, **(headers or {})}) + body)
        return Reply(connection, method)

    def request(
        self, method: str, target: str, body: bytes = b"", headers: Headers | None = None, *, sign: bool = True
    ) -> Reply:
        """As `open`, with the whole answer read."""
        return self.open(method, target, body, headers, sign=sign).finish()

    def post(self, path: str, /, **fields: Any) -> Reply:
        return self.request("POST", path, compact(fields))

    def get(self, path: str, /, **query: Any) -> Reply:
        return self.request("GET", target(path, query))

    def feed(self, path: str, /, **query: Any) -> tuple[Reply, Feed]:
        """An answer of server-sent events, with its head checked."""
        reply = self.open("GET", target(path, query))
        if reply.status != 200:
            raise AssertionError((reply.status, reply.finish().body))
        assert reply.header("content-type") == "text/event-stream"
        assert reply.header("cache-control") == "no-cache, no-transform"
        return reply, Feed(reply)

    def upgrade(self, target: str, headers: Headers | None = None) -> tuple[Reply, WebSocket]:
        """Ask for a WebSocket; the answer's status is 101 if it was given."""
        key = base64.b64encode(os.urandom(16)).decode()
        fields: dict[str, str | None] = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": key,
            **self.sign("GET", target),
            **(headers or {}),
        }
        connection = self.connect()
        connection.send(self.head("GET", target, fields))
        reply = Reply(connection, "GET")
        if reply.status == 101:
            accept = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
            assert reply.header("sec-websocket-accept") == base64.b64encode(accept).decode()
        return reply, WebSocket(connection)

    def interactive(self, **query: Any) -> WebSocket:
        """An interactive exec, upgraded."""
        reply, socket = self.upgrade(target("/v1/exec/interactive/ws", query))
        assert reply.status == 101, reply.finish().body
        return socket


def b64(data: bytes) -> str:
    """Base64, as text."""
    return base64.b64encode(data).decode()


def refused(reply: Reply, status: int, code: str, *, retryable: bool = False) -> str:
    """The message of an error of exactly this kind."""
    assert (reply.status, reply.json["error"]["code"]) == (status, code), reply.body
    assert set(reply.json) == {"message", "error"}
    assert set(reply.json["error"]) - {"details"} == {"code", "message", "retryable"}
    assert reply.json["error"]["retryable"] is retryable
    assert reply.json["error"]["message"] == reply.json["message"] != ""
    message: str = reply.json["message"]
    return message


def done(reply: Reply) -> None:
    """It succeeded, and there is nothing to say."""
    assert (reply.status, reply.body) == (204, b""), reply.body
