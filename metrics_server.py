"""Where the metrics are read: a listener of its own, with one path, `/metrics`, and bounds of its own.

Nothing here needs a signature, and nothing else can be had here; what callers ask for is served elsewhere. The listener
shares the event loop, and so the text is made in small pieces, at most once in `MAX_AGE_S`, whoever asks.
"""

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app import App
from dockerapi import Engine
from errors import RunnerError
from exposition import Exposition, Observed
from protocols import HttpProtocol, Refusal
from runner_face import Readiness

PATH = "/metrics"
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MAX_AGE_S = 1.0
"""A text this young is given again."""
MAX_CONNECTIONS = 16
"""Security limit: of those who read metrics, at once; one more gets 503."""
HEAD_S = 5.0
"""Security limit: seconds for a request's head, and for a connection without one."""
BACKLOG = 16
PING_S = 2.0
"""Seconds for the engine to take a connection for a ping."""


class MetricsApp:
    """ASGI: the text for GET and HEAD of `/metrics`; anything else is refused. Each answer ends its connection.

    Args:
        app: whose metrics.
        connections: of its callers, now.
        max_connections: their bound.
        clock: seconds, monotonic.
    """

    def __init__(
        self, app: App, connections: Callable[[], int], max_connections: int, clock: Callable[[], float]
    ) -> None:
        self._exposition = Exposition(app)
        # With connections of its own: where callers use up all others, the engine is there still.
        self._engine = Engine(app.engine.path, max_connections=2, queue_s=PING_S, connect_s=PING_S)
        self._readiness = Readiness(self._engine, clock)
        self._connections = connections
        self._max_connections = max_connections
        self._clock = clock
        self._made_at = float("-inf")
        self._text: asyncio.Task[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        if scope["raw_path"] != PATH.encode():
            await _answer(send, *RunnerError("not_found", f"only {PATH} is here").response())
        elif scope["method"] not in ("GET", "HEAD"):
            allow = ((b"allow", b"GET, HEAD"),)
            await _answer(send, *RunnerError("method_not_allowed", "metrics are read", headers=allow).response())
        else:
            text = await self._current()
            fields = [(b"content-type", CONTENT_TYPE), (b"content-length", b"%d" % len(text))]
            await _answer(send, 200, [*fields, (b"cache-control", b"no-store")], text)

    async def _current(self) -> bytes:
        """The text, made anew if it is old; one making serves all who ask meanwhile."""
        making = self._text
        if making is None or (making.done() and self._clock() - self._made_at >= MAX_AGE_S):
            self._made_at = self._clock()
            making = self._text = asyncio.create_task(self._make())
        return await asyncio.shield(making)

    def close(self) -> None:
        """Drop the connections to the engine."""
        self._engine.close()

    async def _make(self) -> bytes:
        try:
            await self._readiness.check()
        except RunnerError:
            up = False
        else:
            up = True
        now = Observed(up, self._connections(), self._max_connections)
        pieces = []
        for piece in self._exposition.pieces(now):
            pieces.append(piece)
            await asyncio.sleep(0)  # Callers are served between any two.
        return b"".join(pieces)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    # A reader gets so many seconds for an answer, and no second one: none can hold a connection for long.
    headers = [*headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def serve(app: MetricsApp, sockets: list[socket.socket]) -> None:
    """Serve on listening sockets until cancelled; both they and the connections are closed then."""
    config = uvicorn.Config(
        cast(Any, app),
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=cast(int, HEAD_S),
    )
    config.load()
    state = ServerState()
    protocol = functools.partial(
        HttpProtocol, HEAD_S, MAX_CONNECTIONS, _pass_over, config=config, server_state=state, app_state={}
    )
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(protocol, sock=sock, backlog=BACKLOG) for sock in sockets]
    try:
        await loop.create_future()
    finally:
        for server in servers:
            server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        app.close()


def _pass_over(refusal: Refusal) -> None:
    """What is no request for metrics has no place in the audit log, which tells of requests to the engine."""
