"""HTTP/1.1 with callers: a protocol of our own on httptools, for uvicorn to serve.

uvicorn 0.54's own has no limit on a head's size or time, answers parse errors as text, loses a target's lone `?`,
fragment and host, queues pipelined requests (and then never notices that the caller has gone), and takes about twice
the time for a request. Here:

* every request's scope carries `docker_runner`, the `admission.Connection` of its caller: the raw target, `abort`, and
  callbacks for the caller's leaving and the service's shutdown (`cycle.py`);
* what is wrong with a request's framing is answered in the runner's error shape, and ends the connection;
* bytes that come after a request and before the end of its answer are refused: 400 while nothing of the answer has
  been given, an abort after that. The request they came after is treated as if its caller had left;
* an answer that is given before the request's body was read is followed by a bounded drain, so that it can be read;
* time limits cost a request nothing: a timer that finds its time not yet come is set anew for what is left of it.
"""

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import httptools
import uvicorn
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

import request_head
from callers import LOOK_S, hung_up, new_id, peer, well_formed_id
from cycle import STATUS_LINES, Cycle
from errors import RunnerError
from websocket_protocol import WebSocket

MAX_FRAMING = 65_536
"""Security limit: bytes between two pieces of a body, and after the last: chunk extensions, trailers."""
LINGER_BYTES = 1024 * 1024
"""Bytes of an unwanted body that are read and dropped, so that the caller gets to read the answer."""
LINGER_S = 1.0
"""Seconds for that."""
CLOSE_S = 30.0
"""Seconds that a caller may take to read the rest of a last answer."""


class Refusal(NamedTuple):
    """What was refused before it became a request of the application: for the audit log."""

    id: str
    client: tuple[str, int] | None
    local: str
    method: str
    target: bytes
    error: RunnerError


class HttpProtocol(asyncio.Protocol):
    """One connection of a caller.

    Args:
        head_timeout_s: for a request's head, from its first byte.
        max_connections: of all callers together; one more is refused.
        on_refused: told of each refusal that is answered here.
        at_once: asked to serve a request that has come whole; if it says no, a task is made for it.
        is_local: it came on the local socket, where requests need no signature.
        config, server_state, app_state, _loop: what uvicorn gives its protocols.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        head_timeout_s: float,
        max_connections: int,
        on_refused: Callable[[Refusal], object],
        at_once: Callable[[Cycle], bool] | None = None,
        *,
        is_local: bool = False,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._head_timeout_s = head_timeout_s
        self._max_connections = max_connections
        self._on_refused = on_refused
        self._at_once = at_once
        self._is_local = is_local
        self._uvicorns = {"config": config, "server_state": server_state, "app_state": app_state}
        self._app = config.loaded_app
        self._idle_limit_s = config.timeout_keep_alive
        self._connections = server_state.connections
        self._tasks = server_state.tasks
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._local = ""
        self.scope: dict[str, Any] = {}
        self.write_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._read_paused = False
        # Of the request whose head comes, or came last.
        self._cycle: Cycle | None = None
        self._unserved: Cycle | None = None
        self._method = ""
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._in_head = False
        self._head_size = 0
        """Of what came before the latest read."""
        self._read_size = 0
        self._violation: RunnerError | None = None
        # Of its body.
        self._body_came = False
        self._framing = 0
        # Time limits.
        self._idle_since = 0.0
        self._idle_timer: TimerHandle | None = None
        self._timer: TimerHandle | None = None
        self._linger_left: int | None = None
        self._look: TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)
        self._connections.add(cast(Any, self))
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
            "root_path": "",
        }
        if self._is_local:
            self._local = peer(transport)
        self._idle_since = self._loop.time()
        self._idle_timer = self._loop.call_later(self._idle_limit_s, self._look_if_idle)
        if len(self._connections) > self._max_connections:
            self._refuse(RunnerError("too_many_connections", "too many connections are open; try again soon"))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self._connections.discard(cast(Any, self))
        for timer in (self._timer, self._idle_timer, self._look):
            if timer is not None:
                timer.cancel()
        if self._cycle is not None:
            self._cycle.leave()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        if self._linger_left is not None:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                self.transport.abort()
            return
        cycle = self._cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            if data.strip(b"\r\n"):
                self._refuse(RunnerError("pipelining_refused", "more bytes came before the answer was complete"))
            return
        self._body_came = False
        self._read_size = len(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._unserved = None
            self._refuse(self._violation or RunnerError("bad_request", "not a well-formed HTTP/1.1 request"))
            return
        if self._unserved is not None:
            self._begin(self._unserved)
        if self._in_head:
            self._head_size += len(data)
            try:
                request_head.check_size(self._url, self._fields, self._head_size)
            except RunnerError as error:
                self._refuse(error)
                return
            if self._timer is None:
                self._set_timer(self._head_timeout_s, self._head_timed_out)
        elif not self._body_came and self._cycle is not None and self._cycle.more_body:
            self._framing += len(data)
            if self._framing > MAX_FRAMING:
                self._refuse(RunnerError("headers_too_large", "the chunk extensions or trailers are too long"))
        else:
            self._framing = 0

    def pause_writing(self) -> None:
        """asyncio.Protocol."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """asyncio.Protocol."""
        self.write_paused = False
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    # cycle.Peer

    async def drain(self) -> None:
        """See `cycle.Peer`."""
        if self.write_paused:
            if self._writable is None:
                self._writable = self._loop.create_future()
            await asyncio.shield(self._writable)

    def pause_reading(self) -> None:
        """See `cycle.Peer`."""
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """See `cycle.Peer`."""
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()

    def answered(self) -> None:
        """The answer is complete: wait for the next request, or end the connection."""
        assert self._cycle is not None
        if not self._cycle.keep_alive:
            self._end(self._cycle)
        else:
            self._idle_since = self._loop.time()
            self.resume_reading()

    def serve(self, cycle: Cycle) -> None:
        """See `cycle.Peer`."""
        self._tasks.add(self._loop.create_task(self._serve(cycle)))

    # httptools

    def on_message_begin(self) -> None:
        """httptools."""
        if self._cycle is not None and not self._cycle.response_complete:
            raise self._violates(_second_request())
        self._in_head = True
        self._head_size = 0
        self._method = ""
        self._url = b""
        self._fields = []

    def on_url(self, url: bytes) -> None:
        """httptools."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools. Trailers come here too; they are read and dropped."""
        if self._in_head:
            self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """httptools. The head is whole: start the application."""
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        parser, url, fields = self._parser, self._url, self._fields
        version = parser.get_http_version()
        self._method = parser.get_method().decode("ascii")
        found = dict(fields)
        try:
            request_head.check(version, url, fields, found, self._head_size + self._read_size)
        except RunnerError as error:
            raise self._violates(error) from None
        if parser.should_upgrade() and request_head.is_websocket(self._method, fields):
            return
        cycle = self._cycle = Cycle(
            self,
            self._method,
            version,
            url,
            fields,
            found,
            well_formed_id(fields) if b"x-request-id" in found else new_id(),
            self._local,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
        )
        self._unserved = cycle  # Not before all that came with it is known to be well-formed.

    def _begin(self, cycle: Cycle) -> None:
        self._unserved = None
        if self.write_paused:
            self._refuse(RunnerError("pipelining_refused", "a request came before the last answer was read"))
        elif self._at_once is None or cycle.more_body or not self._at_once(cycle):
            self.serve(cycle)

    async def _serve(self, cycle: Cycle) -> None:
        """Have the application serve a request. It answers its own errors; what is left unfinished is cut off."""
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._app(cast(Any, cycle.scope), cast(Any, cycle.receive), cycle.send)
        finally:
            if not cycle.response_complete and not cycle.disconnected:
                cycle.abort()
            self._tasks.discard(task)  # A callback for that would cost the loop another turn.

    def on_body(self, body: bytes) -> None:
        """httptools."""
        self._body_came = True
        cycle = self._cycle
        if cycle is None or cycle.response_complete:
            return
        if cycle.body_came(body):
            self.pause_reading()
            if self._look is None:
                self._look = self._loop.call_later(LOOK_S, self._look_for_caller)

    def _look_for_caller(self) -> None:
        """Reading is paused while an engine does not take an upload."""
        self._look = None
        if self._read_paused:
            if hung_up(self.transport):
                self.transport.abort()
            else:
                self._look = self._loop.call_later(LOOK_S, self._look_for_caller)

    def on_message_complete(self) -> None:
        """httptools. It comes too early where an upgrade is asked for: the parser takes no body for the request's."""
        cycle = self._cycle
        if cycle is None or cycle.response_complete:
            return
        if not (self._parser.should_upgrade() and request_head.body_fields(self._fields)):
            cycle.body_ended()

    # uvicorn

    def shutdown(self) -> None:
        """The service begins to shut down."""
        if self._cycle is None or self._cycle.response_complete:
            self.transport.close()
        else:
            self._cycle.keep_alive = False
            self._cycle.drain()

    def _upgrade(self, rest: bytes) -> None:
        """The parser has stopped at a head that asks for an upgrade; `rest` came after it."""
        if request_head.is_websocket(self._method, self._fields):
            if rest:
                raise self._violates(RunnerError("pipelining_refused", "bytes came before the upgrade was answered"))
            self._become_websocket()
            return
        assert self._cycle is not None
        self._cycle.keep_alive = False
        if fields := request_head.body_fields(self._fields):
            self._parser = httptools.HttpRequestParser(_BodyEvents(self))
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(b"%b: %b\r\n" % field for field in fields))
            if rest:
                self._parser.feed_data(rest)
        elif rest.strip(b"\r\n"):
            raise self._violates(RunnerError("pipelining_refused", "more bytes came before the answer was complete"))

    def _become_websocket(self) -> None:
        """Hand the connection over; the other protocol parses the head again."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._connections.discard(cast(Any, self))
        protocol = WebSocket(self._url, well_formed_id(self._fields), self._local, **self._uvicorns)
        head = b"".join([b"%b: %b\r\n" % field for field in self._fields])
        protocol.connection_made(self.transport)
        protocol.data_received(b"GET %b HTTP/1.1\r\n%b\r\n" % (self._url, head))
        self.transport.set_protocol(protocol)

    def _look_if_idle(self) -> None:
        """Close a connection that has been without a request for long enough."""
        is_busy = self._in_head or (self._cycle is not None and not self._cycle.response_complete)
        left_s = self._idle_limit_s if is_busy else self._idle_since + self._idle_limit_s - self._loop.time()
        if left_s > 0:
            self._idle_timer = self._loop.call_later(left_s, self._look_if_idle)
        else:
            self._close(min(CLOSE_S, self._idle_limit_s))  # What was answered last may still not be read.

    def _head_timed_out(self) -> None:
        self._refuse(RunnerError("request_timeout", "the head of the request did not arrive in time"))

    def _violates(self, error: RunnerError) -> httptools.HttpParserError:
        """What a parser's callback raises to refuse the request with this error."""
        self._violation = error
        return httptools.HttpParserError(error.message)

    def _refuse(self, error: RunnerError) -> None:
        """End the connection because of what came on it, telling why if nothing of another answer was given."""
        cycle = self._cycle
        request_id = well_formed_id(self._fields)
        if cycle is not None and not cycle.response_complete:
            request_id = cycle.request_id
            cycle.leave()
            if cycle.response_started:
                cycle.abort()
                return
        status, headers, body = error.response()
        headers.append((b"x-request-id", request_id.encode()))
        fields = b"".join(b"%b: %b\r\n" % field for field in headers)
        if self._method == "HEAD":
            body = b""
        self.transport.write(b"%bconnection: close\r\n%b\r\n%b" % (STATUS_LINES[status], fields, body))
        self._linger()
        self._on_refused(Refusal(request_id, self.scope["client"], self._local, self._method, self._url, error))

    def _linger(self) -> None:
        """Close, but read on for a while, so that a caller that is still sending gets to read the answer."""
        self._linger_left = LINGER_BYTES
        can_half_close = self.transport.can_write_eof()
        if can_half_close:
            self.transport.write_eof()
        self.resume_reading()
        self._set_timer(LINGER_S, self.transport.abort if can_half_close else self._say_end)

    def _say_end(self) -> None:
        """TLS has no half-close: its end can be told only when nothing more is read."""
        self.transport.close()
        self._set_timer(LINGER_S, self.transport.abort)

    def _end(self, cycle: Cycle) -> None:
        """The last answer was given: close, though not for ever waiting for a caller that does not read it."""
        if cycle.more_body:
            self._linger()
        else:
            self._close(CLOSE_S)

    def _close(self, limit_s: float) -> None:
        """Close once the caller has read what was answered, or after the limit."""
        self.transport.close()
        self._set_timer(limit_s, self.transport.abort)

    def _set_timer(self, delay_s: float, callback: Callable[[], object]) -> None:
        """One thing at a time has its end set: a head, a lingering close."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, callback)


def _second_request() -> RunnerError:
    return RunnerError("pipelining_refused", "a second request came before the answer to the first")


class _BodyEvents:
    """What a second parser tells of a body whose head the first has read: httptools stops at every `Upgrade`."""

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        self._begun = False
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        """httptools. The first message is the stand-in for the head that was read."""
        if self._begun:
            raise self._protocol._violates(_second_request())
        self._begun = True
