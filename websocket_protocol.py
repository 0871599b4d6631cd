"""A thin subclass of uvicorn's WebSocket protocol: what ASGI cannot hold of a WebSocket.

uvicorn 0.54 as it stands parses all that one read brought in one go, keeps pongs for a caller that does not read, and
sees no caller leave while its input waits.
"""

import asyncio
import logging
import os
import time
from typing import Any, cast

# Before uvicorn imports websockets, which stops at 8 KiB a line, and then hangs. No line is as long as a whole head.
os.environ["WEBSOCKETS_MAX_LINE_LENGTH"] = str(2 * 65_536)  # request_head.MAX_HEAD

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from callers import LOOK_S, Caller, abort, hung_up

FEED_S = 0.01
"""Seconds for which WebSocket frames are parsed at once, about: a few hundred of tiny ones, or all that was read."""
LEAST_FEED = 4096
MOST_FEED = 256 * 1024

log = logging.getLogger("uvicorn.websockets")
log.setLevel(logging.WARNING)  # What uvicorn and websockets say below that holds queries (and so `env`), and frames.


class WebSocket(Caller, WebSocketsSansIOProtocol):
    """One WebSocket; it is the `admission.Connection` of its upgrade request."""

    method = "GET"

    def __init__(self, target: bytes, request_id: str, local: str, **uvicorns: Any) -> None:
        WebSocketsSansIOProtocol.__init__(self, **uvicorns)
        self.logger = self.conn.logger = log
        self.conn.debug = False
        self.target = target
        self.request_id = request_id
        self.local = local
        self.status = 0
        self.received = 0
        self.sent = 0
        self._unfed = b""
        self._feed_size = LEAST_FEED

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """See `admission.Connection`."""
        return cast(list[tuple[bytes, bytes]], self.scope["headers"])

    @property
    def response_started(self) -> bool:
        """See `admission.Connection`."""
        return self.handshake_complete or self.initial_response is not None

    async def run_asgi(self) -> None:
        """uvicorn: serve the application."""
        cast(dict[str, Any], self.scope)["docker_runner"] = self
        try:
            await self.app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        finally:
            if self.close_timer is None:
                self.transport.close()

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol. The first data is the whole head, from the parser of the upgrade."""
        if not self.handshake_initiated:
            super().data_received(data)
            if not self.handshake_initiated:
                self.abort()
        elif self._unfed:
            self._unfed += data
        else:
            self._unfed = data
            self._feed()

    def _feed(self) -> None:
        """Parse what has come, a piece in each turn of the loop; nothing more is read meanwhile."""
        if self.transport.is_closing():
            self._unfed = b""
            return
        piece, self._unfed = self._unfed[: self._feed_size], self._unfed[self._feed_size :]
        started = time.monotonic()
        super().data_received(piece)
        if time.monotonic() - started > FEED_S:
            self._feed_size = max(LEAST_FEED, self._feed_size // 4)
        else:
            self._feed_size = min(MOST_FEED, self._feed_size * 2)
        if self._unfed:
            self._pause()
            self.loop.call_soon(self._feed)
        elif self.read_paused and self.queue.empty() and not self.disconnected:
            self.read_paused = False
            self.transport.resume_reading()

    def _pause(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    async def receive(self) -> Any:
        """ASGI."""
        message: Any = await super().receive()
        self.received += len(message.get("bytes") or message.get("text") or b"")
        if self._unfed and not self.disconnected:
            self._pause()
        return message

    async def send(self, message: Any) -> None:
        """ASGI. The answer to the upgrade carries the request's id."""
        kind = message["type"]
        if kind == "websocket.send":
            self.sent += len(message.get("bytes") or message.get("text") or b"")
        elif kind in ("websocket.accept", "websocket.http.response.start"):
            self.status = message.get("status", 101)
            identified = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), identified]}
        await super().send(message)

    def handle_ping(self) -> None:
        """uvicorn. Of a caller that does not read, no pongs are kept (RFC 6455 wants one for the latest ping only)."""
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set():
            self.transport.write(pong)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        super().connection_made(transport)
        self._look = self.loop.call_later(LOOK_S, self._look_for_caller)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self._look.cancel()
        self._unfed = b""
        super().connection_lost(exc)
        self.leave()

    def _look_for_caller(self) -> None:
        """Reading is paused while nobody reads what the caller types."""
        self._look = self.loop.call_later(LOOK_S, self._look_for_caller)
        if self.read_paused and hung_up(self.transport):
            self.abort()

    def shutdown(self) -> None:
        """The service begins to shut down: the application ends its session in-band."""
        self.drain()

    def abort(self) -> None:
        """See `admission.Connection`."""
        abort(self.transport)
