"""The server: uvicorn's, with a shutdown that lets the application end what it began, and listening sockets of our own.

uvicorn 0.54 as it stands closes WebSockets at once on SIGTERM, waits for ever on HTTP streams, and exits 143.
"""

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from protocols import Callback, HttpProtocol, WebSocket

LAST_WORDS_S = 2.0
"""Seconds for what is still running after the grace time to say so in-band."""
BACKLOG = 2048
"""Connections that wait to be accepted; a burst past it costs its callers a second."""
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""Callers that vanish without a word, with their machine or a NAT entry, are noticed after two minutes."""
MAX_WEBSOCKET_MESSAGE = 48 * 1024 * 1024
"""Bytes of one WebSocket message: base64 of 32 MiB in JSON."""


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown that lets the application end what it began.

    Args:
        config: of uvicorn.
        grace_s: how long running requests may go on after SIGTERM or SIGINT.
        on_reload: called on SIGHUP.
        on_started: called once requests are served.
    """

    def __init__(self, config: uvicorn.Config, *, grace_s: float, on_reload: Callback, on_started: Callback) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._grace_s = grace_s
        self._on_reload = on_reload
        self._hurry = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would re-raise what it caught, and so exit with the signal's status; `startup` takes them instead."""
        yield

    def stop(self) -> None:
        """SIGTERM, SIGINT: the first drains, the second ends at once."""
        if self.should_exit:
            self._hurry.set()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the signals, and serve."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self.stop)
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new requests, give the running ones their time, then have them end in-band, then close."""
        for server in self.servers:
            server.close()
        connections = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        await self._settle(self._grace_s)
        for task in list(self.server_state.tasks):
            task.cancel()
        await self._settle(LAST_WORDS_S)
        for connection in list(connections):
            connection.transport.abort()
        await self.lifespan.shutdown()

    async def _settle(self, limit_s: float) -> None:
        """Wait until no request runs, for a while, or until told to hurry."""
        running: asyncio.Future[Any] = asyncio.gather(*self.server_state.tasks, return_exceptions=True)
        hurry: asyncio.Future[Any] = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({running, hurry}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address that `host` names.

    Raises:
        OSError: the name is not known, or an address cannot be listened on.
    """
    sockets = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, address in dict.fromkeys(found):
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # Accepted sockets inherit these.
        for option, value in KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sockets.append(sock)
    return sockets


def create_server(
    app: ASGIApp,
    *,
    head_timeout_s: float,
    keep_alive_s: float,
    grace_s: float,
    max_connections: int,
    trusted_proxies: tuple[str, ...],
    on_reload: Callback,
    on_started: Callback,
) -> Server:
    """A server of `app`; `run(sockets)` serves until SIGTERM. Times in seconds."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=cast(Any, functools.partial(HttpProtocol, head_timeout_s, max_connections)),
        ws=WebSocket,
        ws_max_size=MAX_WEBSOCKET_MESSAGE,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=cast(int, keep_alive_s),
    )
    return Server(config, grace_s=grace_s, on_reload=on_reload, on_started=on_started)
