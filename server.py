"""The server: uvicorn's, with a shutdown that lets the application end what it began, and listening sockets of our own.

uvicorn 0.54 as it stands closes WebSockets at once on SIGTERM, waits for ever on HTTP streams, and exits 143. With TLS,
it counts no connection before its handshake is done, and never reads a certificate again; so here connections are
accepted one by one, each with the certificate of the moment.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from callers import Callback
from cycle import Cycle
from protocols import CLOSE_S, HttpProtocol, Refusal
from websocket_protocol import WebSocket

log = logging.getLogger("docker_runner.server")

LAST_WORDS_S = 2.0
"""Seconds for what is still running after the grace time to say so in-band."""
BACKLOG = 2048
"""Connections that wait to be accepted; a burst past it costs its callers a second."""
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""Callers that vanish without a word, with their machine or a NAT entry, are noticed after two minutes."""
MAX_WEBSOCKET_MESSAGE = 48 * 1024 * 1024
"""Bytes of one WebSocket message: base64 of 32 MiB in JSON."""
NO_FILES_S = 0.2
"""Seconds until the next try, when no file descriptor is left for a connection."""


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown that lets the application end what it began.

    Args:
        config: of uvicorn.
        tls: what connections by TCP are served with; None for plain HTTP. May be replaced: new connections get it.
        local: a listening Unix socket, whose requests need no signature.
        handshake_s: for a TLS handshake.
        max_connections: TLS handshakes and connections at once; one more is closed.
        grace_s: how long running requests may go on after SIGTERM or SIGINT.
        on_reload: called on SIGHUP.
        on_started: called once requests are served.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        tls: ssl.SSLContext | None,
        local: socket.socket | None,
        handshake_s: float,
        max_connections: int,
        grace_s: float,
        on_reload: Callback,
        on_started: Callback,
    ) -> None:
        super().__init__(config)
        self.tls = tls
        self._local = local
        self._handshake_s = handshake_s
        self._max_connections = max_connections
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Future[Any]] = set()
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
        await super().startup([] if self.tls is not None else sockets)
        if self.tls is not None:
            self._accepting = [loop.create_task(self._accept(sock)) for sock in sockets or ()]
        if self._local is not None:
            protocol = functools.partial(self._protocol, is_local=True)
            self.servers.append(await loop.create_unix_server(protocol, sock=self._local, backlog=BACKLOG))
        self._on_started()

    def _protocol(self, **more: Any) -> asyncio.Protocol:
        make = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, **more)

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections by TLS."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # It has left already, or there is no file descriptor for it.
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(NO_FILES_S)
                continue
            if len(self._handshakes) + len(self.server_state.connections) > self._max_connections:
                sock.close()
                continue
            handshake = asyncio.ensure_future(
                loop.connect_accepted_socket(
                    self._protocol,
                    sock,
                    ssl=self.tls,
                    ssl_handshake_timeout=self._handshake_s,
                    ssl_shutdown_timeout=CLOSE_S,
                )
            )
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._shaken)

    def _shaken(self, handshake: asyncio.Future[Any]) -> None:
        self._handshakes.discard(handshake)
        if not handshake.cancelled() and (error := handshake.exception()) is not None:
            log.debug("a TLS handshake failed: %s", error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new requests, give the running ones their time, then have them end in-band, then close."""
        for server in self.servers:
            server.close()
        for task in (*self._accepting, *self._handshakes):
            task.cancel()
        if self._accepting:
            for sock in sockets or ():
                sock.close()
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
    at_once: Callable[[Cycle], bool],
    head_timeout_s: float,
    keep_alive_s: float,
    grace_s: float,
    max_connections: int,
    tls: ssl.SSLContext | None,
    local: socket.socket | None,
    on_refused: Callable[[Refusal], object],
    trusted_proxies: tuple[str, ...],
    on_reload: Callback,
    on_started: Callback,
) -> Server:
    """A server of `app`; `run(sockets)` serves until SIGTERM. Times in seconds.

    `at_once` is asked first, for requests that have come whole.
    """
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=cast(Any, functools.partial(HttpProtocol, head_timeout_s, max_connections, on_refused, at_once)),
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
    return Server(
        config,
        tls=tls,
        local=local,
        handshake_s=head_timeout_s,
        max_connections=max_connections,
        grace_s=grace_s,
        on_reload=on_reload,
        on_started=on_started,
    )
