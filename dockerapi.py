"""HTTP/1.1 to the engine over its Unix socket: requests over a pool of connections.

Layers, each knowing only the one below: `Engine` (the pool: bound, queue, reuse) → `EngineResponse` (one answer: head,
chunks) → `Connection` (one socket: parser, flow control, state); the last two are in `engine_connection.py`.

A request is sent a second time in one case only: on a kept connection, where it is proven that the engine has not read
its head whole. The proof is the kernel's: a write that fails with EPIPE found the peer closed before it took the last
byte; a reset of a Unix socket means that the peer closed it with bytes still unread. Both speak of the head only where
nothing follows it: an engine may act on a head while the body waits. So a request with a body is never repeated, and
neither is one whose connection was lost in any other way; that is reported.
"""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from engine_connection import MAX_HEAD, Connection
from engine_response import EngineResponse, NotProcessedError, Overflow
from errors import RunnerError
from streams import Data

Headers = Sequence[tuple[bytes, bytes]]
_Identity = tuple[int, int]

SPARE = 16
"""Connections that are kept open though nobody needs them."""
SPARE_S = 10.0
"""Seconds for which more of them are."""
MAX_WAITING = 4096
"""Requests that wait for a connection; one more is refused at once."""
ONE_WRITE = 64 * 1024
"""A body up to this many bytes leaves in one write with its head."""


class Use(NamedTuple):
    """Use of the pool: connections busy and idle, their bound, requests that wait for one; how many ever have waited,
    and for how many seconds together."""

    busy: int
    idle: int
    limit: int
    waiting: int
    waits: int
    waited_s: float


class Engine:
    """The engine behind its Unix socket.

    Args:
        path: of the socket.
        max_connections: bound on open connections, streams included.
        queue_s: how long a request waits for one of them.
        connect_s: how long the engine may take to accept one.
        on_answered: told of each answer that begins: to which operation, how many seconds after the request was sent.
        spare_s: how long connections that nobody needs are kept, past the first few.
    """

    def __init__(
        self,
        path: str,
        *,
        max_connections: int,
        queue_s: float,
        connect_s: float,
        on_answered: Callable[[str, float], object] = lambda *_: None,
        spare_s: float = SPARE_S,
    ) -> None:
        self.path = path
        self._places = max_connections
        self._queue_s = queue_s
        self._connect_s = connect_s
        self._on_answered = on_answered
        self._limit = max_connections
        self._waits = 0
        self._waited_s = 0.0
        # Strong references: the event loop holds a half-closed transport only weakly.
        self._open: dict[Connection, _Identity | None] = {}
        self._idle: list[Connection] = []
        """The one that was used last is used next."""
        self._spare_s = spare_s
        self._unneeded = 0
        """How many were idle at every moment since the latest look."""
        self._look: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Headers = (),
        body: bytes | AsyncIterator[Data] | None = None,
        *,
        length: int | None = None,
        head_s: float | None = None,
        buffer_limit: int | None = None,
        on_overflow: Callable[[], object] = lambda: None,
        operation: str = "",
    ) -> EngineResponse:
        """Send one request and wait for the head of its answer.

        Args:
            method: in upper case.
            target: path and query, sent as they are.
            headers: sent as they are, without `Host` and without those of framing, which are made here.
            body: None for no body; bytes; or pieces, sent with backpressure while the answer may already come.
            length: of a body in pieces, in bytes; None sends it chunked.
            head_s: time limit on the answer's head, from the moment the request is sent.
            buffer_limit: if given, the answer is read at once, whatever its taker does, up to this many waiting bytes;
                past it the answer fails, its connection is closed, and `on_overflow` is called.
            operation: its id, for `on_answered`, which is not called without it.

        Raises:
            RunnerError: any `engine_*` code; what is `retryable` never reached the engine.
        """
        head, pieces = _rendered(method, target, headers, body, length)
        upgrade = any(name.lower() == b"upgrade" for name, _ in headers)
        overflow = None if buffer_limit is None else Overflow(buffer_limit, on_overflow)
        fresh = False
        while True:
            connection = await self._acquire(fresh=fresh)
            answer = connection.begin(
                method,
                head,
                whole=pieces is None,
                bare=not body,
                upgrade=upgrade,
                head_s=head_s,
                overflow=overflow,
                operation=operation,
            )
            try:
                if pieces is not None:
                    sending = answer.send(pieces, chunked=not isinstance(body, bytes) and length is None)
                    answer.attach_writer(asyncio.ensure_future(sending))
                await answer.head()
            except NotProcessedError:
                if fresh:
                    raise RunnerError("engine_cut_head", "the engine closed the connection twice") from None
                fresh = True
            except BaseException:
                answer.close()
                raise
            else:
                return answer

    def begin(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        *,
        empty: bool,
        head_s: float | None,
        operation: str = "",
    ) -> EngineResponse | None:
        """Send a request without a body at once, on a kept connection; None if there is none, and nothing was sent.

        Its answer is returned before the head has come: see `EngineResponse.on_change`.

        Args:
            empty: there is a body, of no bytes.

        The others are as of `request`.
        """
        connection = self._kept()
        if connection is None:
            return None
        request, _ = _rendered(method, target, headers, b"" if empty else None, None)
        return connection.begin(
            method,
            request,
            whole=True,
            bare=True,
            upgrade=False,
            head_s=head_s,
            overflow=None,
            operation=operation,
        )

    async def ping(self, limit_s: float) -> None:
        """Ask the engine whether it is there.

        Raises:
            RunnerError: it is not, or it answers with an error.
        """
        try:
            async with asyncio.timeout(limit_s):
                with await self.request(b"GET", b"/_ping") as response:
                    body = await response.read(MAX_HEAD)
        except TimeoutError:
            raise RunnerError("engine_timeout", "the engine did not answer a ping in time") from None
        if response.status != 200:
            raise RunnerError("docker_unavailable", f"the engine's ping answers {response.status}: {body[:200]!r}")

    def use(self) -> "Use":
        """How much of the pool is used just now."""
        idle = len(self._idle)
        return Use(len(self._open) - idle, idle, self._limit, len(self._waiting), self._waits, self._waited_s)

    def cut_replaced(self) -> bool:
        """Cut every connection that was made while another socket stood at the path; returns whether there were any.

        The engine behind them may live on, and would be asked for ever by whatever uses them, and nothing else would.
        """
        standing = _identity(self.path)
        outdated = [each for each, identity in self._open.items() if standing is not None and identity != standing]
        for connection in outdated:
            connection.cut()
        return bool(outdated)

    def close(self) -> None:
        """Drop every connection."""
        if self._look is not None:
            self._look.cancel()
        for connection in list(self._open):
            connection.close()

    # The pool. A place is a connection that is open or being opened; a place that is given up goes to who waits.

    async def _acquire(self, *, fresh: bool) -> Connection:
        """A connection that stands: a kept one (unless `fresh`), else a new one, else what the queue brings."""
        deadline = asyncio.get_running_loop().time() + self._queue_s
        while True:
            if not fresh and (kept := self._kept()) is not None:
                return kept
            if self._idle and not self._places:
                self._idle.pop().close()  # A fresh one takes its place.
            if self._places:
                self._places -= 1
                return await self._connect()
            freed = await self._queue(deadline)
            if freed is None:
                return await self._connect()
            if not fresh and freed.alive():
                return freed
            freed.close()

    def _kept(self) -> Connection | None:
        """A kept connection that still stands."""
        while self._idle:
            connection = self._idle.pop()
            self._unneeded = min(self._unneeded, len(self._idle))
            if connection.alive():
                return connection
            connection.close()
        return None

    def _close_unneeded(self) -> None:
        """Close what nobody has needed for a while, but for a few."""
        self._look = None
        for connection in self._idle[: max(0, min(self._unneeded, len(self._idle)) - SPARE)]:
            connection.close()
        self._watch_idle()

    def _watch_idle(self) -> None:
        if len(self._idle) > SPARE:
            self._unneeded = len(self._idle)
            self._look = asyncio.get_running_loop().call_later(self._spare_s, self._close_unneeded)

    async def _queue(self, deadline: float) -> Connection | None:
        """Wait for a freed connection, or (None) for a place that is now ours to open one in."""
        if len(self._waiting) >= MAX_WAITING:
            raise RunnerError("engine_busy", "too many requests wait for a connection to the engine; try again soon")
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        began = time.perf_counter()
        self._waits += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                freed = turn.result()
                self._give_place() if freed is None else self._on_free(freed)
            else:
                with contextlib.suppress(ValueError):  # Passed over already.
                    self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise RunnerError("engine_busy", "all connections to the engine are in use; try again soon") from None
            raise
        finally:
            self._waited_s += time.perf_counter() - began

    async def _connect(self) -> Connection:
        """Open a connection in a place that is ours; gives the place up on failure."""
        sock = None
        identity = _identity(self.path)  # Before: what is replaced meanwhile is rather taken for the old one.
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            async with asyncio.timeout(self._connect_s):
                while True:
                    try:
                        sock.connect(self.path)
                        break
                    except BlockingIOError:
                        # The backlog is full; a Unix socket has nothing that would wake us up, so look again.
                        await asyncio.sleep(0.01)
        except BaseException as error:
            if sock is not None:
                sock.close()
            self._give_place()
            if isinstance(error, TimeoutError):
                raise RunnerError("engine_connect_timeout", "the engine accepts no connection") from None
            if isinstance(error, OSError):
                raise _connect_error(error, self.path) from None
            raise
        connection = Connection(sock, self._on_free, self._on_lost, self._on_answered)
        self._open[connection] = identity
        # From here on the place is the connection's. The loop takes the socket over within one turn; that is never
        # broken off, because the loops differ in what they then leave of the socket and whether they tell of its end.
        taking = asyncio.ensure_future(asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=sock))

        def unwanted(taken: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
            failed = taken.cancelled() or taken.exception() is not None
            connection.connection_lost(None) if failed else connection.close()

        try:
            await asyncio.shield(taking)
        except BaseException:
            taking.add_done_callback(unwanted)
            raise
        if connection not in self._open:  # Lost already: the engine ended before it took it from its backlog.
            raise RunnerError("engine_refused", f"the engine's socket {self.path} closed as it was connected to")
        return connection

    def _on_free(self, connection: Connection) -> None:
        turn = self._next_waiting()
        if turn is not None:
            turn.set_result(connection)
        else:
            self._idle.append(connection)
            if self._look is None:
                self._watch_idle()

    def _on_lost(self, connection: Connection) -> None:
        self._open.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)
        self._give_place()

    def _give_place(self) -> None:
        turn = self._next_waiting()
        if turn is not None:
            turn.set_result(None)
        else:
            self._places += 1

    def _next_waiting(self) -> asyncio.Future[Connection | None] | None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn
        return None


def _rendered(
    method: bytes, target: bytes, headers: Headers, body: bytes | AsyncIterator[Data] | None, length: int | None
) -> tuple[bytes, AsyncIterator[Data] | None]:
    """A request's first bytes, all of it if it is small; else also what follows. See `Engine.request`."""
    lines = [b"%b %b HTTP/1.1\r\nHost: docker\r\n" % (method, target)]
    lines += [b"%b: %b\r\n" % field for field in headers]
    pieces: AsyncIterator[Data] | None = None
    tail = b"\r\n"
    if isinstance(body, bytes):
        lines.append(b"Content-Length: %d\r\n" % len(body))
        if len(body) <= ONE_WRITE:
            tail += body
        else:
            pieces = _pieces(body)
    elif body is not None:
        pieces = body
        lines.append(b"Transfer-Encoding: chunked\r\n" if length is None else b"Content-Length: %d\r\n" % length)
    lines.append(tail)
    return b"".join(lines), pieces


def _identity(path: str) -> _Identity | None:
    """Of the file at a path; None if there is none. No other has it as long as somebody listens there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect_error(error: OSError, path: str) -> RunnerError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RunnerError("engine_socket_missing", f"there is no engine socket at {path}")
    if isinstance(error, PermissionError):
        return RunnerError("engine_permission_denied", f"the runner may not open the engine's socket {path}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return RunnerError("engine_busy", "the runner has no file descriptor left; try again soon")
    return RunnerError("engine_refused", f"nothing accepts connections on the engine's socket {path}: {error.strerror}")


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), ONE_WRITE):
        yield body[start : start + ONE_WRITE]
