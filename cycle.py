"""One HTTP request of a caller and its answer: ASGI's `receive` and `send`, and the bytes that they stand for."""

import asyncio
import functools
import http
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import unquote

from callers import Caller, abort

MAX_UNREAD = 256 * 1024
"""Bytes of a request's body that wait to be taken before reading pauses."""
ONE_WRITE = 16 * 1024
"""Pieces of an answer up to this many bytes are copied to leave in one write."""
_OWN_FIELDS = frozenset((b"content-length", b"connection", b"x-request-id"))


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: status_line(status) for status in range(100, 600)}


class Peer(Protocol):
    """The connection that a request came on, as far as its answer is concerned."""

    transport: asyncio.Transport
    write_paused: bool
    scope: dict[str, Any]
    """What of ASGI's scope is the same for all requests."""

    async def drain(self) -> None:
        """Wait until the caller has read enough for more to be written."""

    def pause_reading(self) -> None:
        """Read no more for now."""

    def resume_reading(self) -> None:
        """Read on."""

    def answered(self) -> None:
        """The answer is complete."""

    def serve(self, cycle: "Cycle") -> None:
        """Have the application serve the request, in a task."""


class Cycle(Caller):
    """One HTTP request and its answer; it is the `admission.Connection` of its request.

    Args:
        peer: the connection.
        method, version: of the request, as ASGI has them.
        target: as it stood in the request line.
        headers: the header fields, names in lower case.
        found: the same by name, one for each.
        request_id: the caller's, or one made for it.
        local: who asks on the local socket.
        keep_alive: the connection stays open after the answer, as far as the caller is concerned.
    """

    # Defaults of the class: most requests change few of these, and to make all would be a good part of their cost.
    disconnected = False
    response_started = False
    response_complete = False
    status = 0
    received = 0
    sent = 0
    more_body = True
    """The end of the request's body has not come yet."""
    _body_size = 0
    _end_untold = False
    _wanted: asyncio.Future[None] | None = None
    _head: bytes | None = None
    _chunked: bool | None = None
    _expected = 0

    def __init__(
        self,
        peer: Peer,
        method: str,
        version: str,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        found: dict[bytes, bytes],
        request_id: str,
        local: str,
        *,
        keep_alive: bool,
    ) -> None:
        self.method = method
        self.version = version
        self.target = target
        self.headers = headers
        self.found = found
        self.request_id = request_id
        self.local = local
        self.keep_alive = keep_alive
        self._peer = peer
        self._expects_continue = version != "1.0" and found.get(b"expect", b"").lower() == b"100-continue"
        self._body: list[bytes] = []

    @functools.cached_property
    def scope(self) -> dict[str, Any]:
        """ASGI's. Made when it is first asked for: the short way has no use for it."""
        target, _, query = self.target.partition(b"?")
        path = target.decode("latin-1")
        return {
            **self._peer.scope,
            "method": self.method,
            "http_version": self.version,
            "headers": self.headers,
            "path": unquote(path) if "%" in path else path,
            "raw_path": target,
            "query_string": query,
            "docker_runner": self,
        }

    def abort(self) -> None:
        """See `admission.Connection`."""
        abort(self._peer.transport)

    def leave(self) -> None:
        """The caller has gone, or counts as gone."""
        if not self.response_complete:
            self.disconnected = True
            self._wake()
            super().leave()

    def serve(self) -> None:
        """Have the application serve the request, in a task."""
        self._peer.serve(self)

    def respond(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Give the whole answer at once, without waiting for a caller that reads slowly."""
        self._head = self._render_head(status, headers)
        self.response_started = True
        self._send_body(body, last=True)

    def pass_on(self, status: int, fields: bytes, body: bytes, *, chunked: bool) -> None:
        """As `respond`, with header fields that travel whole, as they came; not for HTTP/1.0 and status 204."""
        self.status = status
        self.response_started = True
        end = b"" if self.keep_alive else b"connection: close\r\n"
        self._head = b"%bx-request-id: %b\r\n%b%b\r\n" % (STATUS_LINES[status], self.request_id.encode(), end, fields)
        self._chunked = chunked
        self._expected = -1  # The engine's parser has counted.
        self._send_body(body, last=True)

    # What comes from the connection.

    def body_came(self, piece: bytes) -> bool:
        """Take in a piece of the request's body; returns whether reading should pause."""
        self._body.append(piece)
        self._body_size += len(piece)
        self.received += len(piece)
        self._wake()
        return self._body_size > MAX_UNREAD

    def body_ended(self) -> None:
        """The request's body is complete."""
        self.more_body = False
        self._end_untold = True
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    # ASGI.

    async def receive(self) -> dict[str, Any]:
        """ASGI."""
        if self._expects_continue and not self._peer.transport.is_closing():
            self._expects_continue = False
            self._peer.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._body or self._end_untold or self.disconnected or self.response_complete):
            self._peer.resume_reading()
            self._wanted = asyncio.get_running_loop().create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        pieces, self._body, self._body_size = self._body, [], 0
        self._end_untold = False
        self._peer.resume_reading()  # While the application works on these, the next arrive.
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        """ASGI. The head of an answer waits for the first piece of its body, but not beyond the loop's next turn.

        With `docker_runner.held` the application says that a piece follows at once, so that no turn need be watched.
        """
        if self._peer.write_paused and not self.disconnected:
            await self._peer.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._head = self._render_head(message["status"], message.get("headers", ()))
            self.response_started = True
            self._expects_continue = False
            if "docker_runner.held" not in message:
                asyncio.get_running_loop().call_soon(self._flush_head)
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def push(self, body: bytes, chunk: bytes) -> bool:
        """Write a piece of the body at once, outside ASGI; returns whether the caller takes it, else nothing was done.

        Of use where the same piece goes to many: `chunk` is `body` as a chunk, made once for all of them.
        """
        if self._peer.write_paused or self.disconnected or self._head is not None:
            return False
        self.sent += len(body)
        self._peer.transport.write(chunk if self._chunked else body)
        return True

    def _render_head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        if self.more_body:
            self.keep_alive = False  # What remains of the request's body is not read.
        self.status = status
        lines = [STATUS_LINES[status], b"x-request-id: %b\r\n" % self.request_id.encode()]
        for name, value in headers:
            lower = name.lower()
            if lower in _OWN_FIELDS:
                if lower == b"connection":
                    self.keep_alive = False  # The application says `close`; it is written below.
                if lower != b"content-length" or status == 204:  # RFC 9110, 8.6: not with this status.
                    continue
                self._expected = int(value)
                self._chunked = False
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.method == "HEAD" or status in (204, 304):
            self._expected = 0
            self._chunked = False
        elif self._chunked is None:
            # An HTTP/1.0 caller knows no chunks: its answer ends with the connection.
            self._chunked = self.version != "1.0"
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self._expected = -1
        lines.append(b"\r\n")
        head = b"".join(lines)
        if not (head.count(b"\n") == head.count(b"\r") == len(lines)) or b"\0" in head:
            raise RuntimeError("a header holds a line break")
        return head

    def _flush_head(self) -> None:
        if self._head is not None and not self.disconnected and not self._peer.transport.is_closing():
            self._peer.transport.write(self._head)
        self._head = None

    def _send_body(self, body: bytes, *, last: bool) -> None:
        self.sent += len(body)
        parts = [] if self._head is None else [self._head]
        self._head = None
        if self.method == "HEAD":
            pass
        elif self._chunked:
            if body:
                parts += (b"%x\r\n" % len(body), body, b"\r\n")
            if last:
                parts.append(b"0\r\n\r\n")
        elif body:
            parts.append(body)
            if self._expected >= 0:
                self._expected -= len(body)
                if self._expected < 0:
                    raise RuntimeError("the body is longer than its Content-Length")
        if last and self._expected > 0:
            raise RuntimeError("the body is shorter than its Content-Length")
        if len(body) > ONE_WRITE:
            self._peer.transport.writelines(parts)
        elif parts:
            self._peer.transport.write(b"".join(parts))
        if last:
            self.response_complete = True
            self._wake()
            self._peer.answered()
