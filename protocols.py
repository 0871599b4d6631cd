"""What ASGI cannot hold: a thin subclass of uvicorn's HTTP protocol and its request cycle.

uvicorn 0.54 as it stands has no limit on a head's size or time, answers parse errors as text, loses a target's lone
`?`, fragment and host, and queues pipelined requests (and then never notices that the caller has gone). Here:

* every request's scope carries `docker_runner`, the `admission.Connection` of its caller: the raw target, `abort`, and
  callbacks for the caller's leaving and the service's shutdown;
* what is wrong with a request's framing is answered in the runner's error shape, and ends the connection;
* bytes that come after a request and before the end of its answer are refused: 400 while nothing of the answer has
  been given, an abort after that. The request they came after is treated as if its caller had left;
* an answer that is given before the request's body was read is followed by a bounded drain, so that it can be read;
* head and body of a small answer leave in one write.
"""

import asyncio
import functools
import re
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from callers import LOOK_S, Callback, Caller, abort, hung_up, peer, well_formed_id
from errors import RunnerError
from websocket_protocol import WebSocket

MAX_TARGET = 65_535
"""Security limit: bytes of a request target."""
MAX_HEAD = 2 * 65_536
"""Security limit: bytes of a request's head, target included (`X-Registry-Config` may be long)."""
MAX_FRAMING = 65_536
"""Security limit: bytes between two pieces of a body, and after the last: chunk extensions, trailers."""

MAX_FIELDS = 100
"""Security limit: header fields of a request."""
LINGER_BYTES = 1024 * 1024
"""Bytes of an unwanted body that are read and dropped, so that the caller gets to read the answer."""
LINGER_S = 1.0
"""Seconds for that."""
CLOSE_S = 30.0
"""Seconds that a caller may take to read the rest of a last answer."""
_ONE_WRITE = 16 * 1024
_WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")

_LENGTH = re.compile(rb"[0-9]+")


class Refusal(NamedTuple):
    """What was refused before it became a request of the application: for the audit log."""

    id: str
    client: tuple[str, int] | None
    local: str
    method: str
    target: bytes
    error: RunnerError


class Cycle(Caller, RequestResponseCycle):
    """One HTTP request and its answer; it is the `admission.Connection` of its request."""

    def __init__(self, target: bytes, request_id: str, local: str, end: Callback, **uvicorns: Any) -> None:
        Caller.__init__(self)
        RequestResponseCycle.__init__(self, **uvicorns)
        self.target = target
        self.request_id = request_id
        self.local = local
        self.status = 0
        self.sent = 0
        self._end = end
        self._head: bytes | None = None
        self._is_head_request = self.scope["method"] == "HEAD"

    def abort(self) -> None:
        """See `admission.Connection`."""
        abort(self.transport)

    def leave(self) -> None:
        """The caller has gone, or counts as gone."""
        if not self.response_complete:
            self.disconnected = True
            self.message_event.set()
            super().leave()

    async def run_asgi(self, app: Any) -> None:
        """uvicorn: serve the request. The application answers its own errors; what is left unfinished is cut off."""
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            if not self.response_complete and not self.disconnected:
                self.abort()
            self.on_response = lambda: None

    async def send(self, message: Any) -> None:
        """ASGI. The head waits for the first piece of the body, but never longer than to the loop's next turn."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._head = self._render_head(message["status"], message.get("headers", ()))
            self.response_started = True
            self.waiting_for_100_continue = False
            asyncio.get_running_loop().call_soon(self._flush_head)
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def _render_head(self, status: int, headers: Any) -> bytes:
        if self.more_body:
            self.keep_alive = False  # What remains of the request's body is not read.
        self.status = status
        lines = [STATUS_LINE[status], b"x-request-id: %b\r\n" % self.request_id.encode()]
        for name, value in headers:
            if b"\n" in value or b"\r" in value or b"\0" in value:
                raise RuntimeError("a header's value holds a line break")
            lower = name.lower()
            if lower == b"content-length":
                if status == 204:
                    continue  # RFC 9110, 8.6: not with this status.
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif lower == b"connection":
                self.keep_alive = False  # The application says `close`; it is written below.
                continue
            elif lower == b"x-request-id":
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self._is_head_request or status in (204, 304):
            self.expected_content_length = 0
            self.chunked_encoding = False
        elif self.chunked_encoding is None:
            # An HTTP/1.0 caller knows no chunks: its answer ends with the connection.
            self.chunked_encoding = self.scope["http_version"] != "1.0"
            if self.chunked_encoding:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.expected_content_length = -1
        lines.append(b"\r\n")
        return b"".join(lines)

    def _flush_head(self) -> None:
        if self._head is not None and not self.disconnected and not self.transport.is_closing():
            self.transport.write(self._head)
        self._head = None

    def _send_body(self, body: bytes, *, last: bool) -> None:
        self.sent += len(body)
        parts = [] if self._head is None else [self._head]
        self._head = None
        if self._is_head_request:
            pass
        elif self.chunked_encoding:
            if body:
                parts += (b"%x\r\n" % len(body), body, b"\r\n")
            if last:
                parts.append(b"0\r\n\r\n")
        elif body:
            parts.append(body)
            if self.expected_content_length >= 0:
                self.expected_content_length -= len(body)
                if self.expected_content_length < 0:
                    raise RuntimeError("the body is longer than its Content-Length")
        if last and self.expected_content_length > 0:
            raise RuntimeError("the body is shorter than its Content-Length")
        if len(body) > _ONE_WRITE:
            self.transport.writelines(parts)
        elif parts:
            self.transport.write(b"".join(parts))
        if last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self._end()
            self.on_response()


class HttpProtocol(HttpToolsProtocol):
    """One connection of a caller.

    Args:
        head_timeout_s: for a request's head, from its first byte.
        max_connections: of all callers together; one more is refused.
        on_refused: told of each refusal that is answered here.
        is_local: it came on the local socket, where requests need no signature.
        uvicorns: what uvicorn gives its protocols.
    """

    cycle: Cycle

    def __init__(
        self,
        head_timeout_s: float,
        max_connections: int,
        on_refused: Callable[[Refusal], object],
        *,
        is_local: bool = False,
        **uvicorns: Any,
    ) -> None:
        super().__init__(**uvicorns)
        self._max_connections = max_connections
        self._on_refused = on_refused
        self._is_local = is_local
        self._local = ""
        self.parser = httptools.HttpRequestParser(self)  # Without the leniencies that uvicorn sets.
        self._head_timeout_s = head_timeout_s
        self._head_timer: TimerHandle | None = None
        self._in_head = False
        self._head_size = 0
        self._fields_size = 0
        self._violation: RunnerError | None = None
        self._linger_left: int | None = None
        self._body_came = False
        self._framing = 0
        self._look: TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        super().connection_made(cast(asyncio.Transport, transport))
        if self._is_local:
            self._local = peer(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if len(self.connections) > self._max_connections:
            self._refuse(RunnerError("too_many_connections", "too many connections are open; try again soon"))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self._look is not None:
            self._look.cancel()
        if self.cycle is not None:
            self.cycle.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        if self._linger_left is not None:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            if data.strip(b"\r\n"):
                self._refuse(RunnerError("pipelining_refused", "more bytes came before the answer was complete"))
            return
        self._body_came = False
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._violation or RunnerError("bad_request", "not a well-formed HTTP/1.1 request"))
            return
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._refuse(RunnerError("headers_too_large", f"the head is longer than {MAX_HEAD} bytes"))
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_timed_out)
        elif not self._body_came and self.cycle is not None and self.cycle.more_body:
            self._framing += len(data)
            if self._framing > MAX_FRAMING:
                self._refuse(RunnerError("headers_too_large", "the chunk extensions or trailers are too long"))
        else:
            self._framing = 0

    def on_message_begin(self) -> None:
        """httptools."""
        if self.cycle is not None and not self.cycle.response_complete:
            raise self._violates("pipelining_refused", "a second request came before the answer to the first")
        self._unset_keepalive_if_required()  # Not before: line breaks alone are no request.
        super().on_message_begin()
        self._in_head = True
        self._head_size = self._fields_size = 0

    def on_url(self, url: bytes) -> None:
        """httptools."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET:
            raise self._violates("target_too_long", f"the request target is longer than {MAX_TARGET} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools. Trailers come here too; they are read and dropped."""
        if not self._in_head:
            return
        super().on_header(name, value)
        self._fields_size += len(name) + len(value) + 4
        if len(self.headers) > MAX_FIELDS or len(self.url) + self._fields_size > MAX_HEAD:
            raise self._violates("headers_too_large", f"more than {MAX_FIELDS} header fields or {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        """httptools. The head is whole: start the application."""
        self._in_head = False
        self._stop_head_timer()
        scope = cast(dict[str, Any], self.scope)
        scope["method"] = self.parser.get_method().decode("ascii")
        version = scope["http_version"] = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._violates("bad_request", "HTTP/1.1 is spoken here")
        self._check_framing(version)
        if self.parser.should_upgrade() and self._should_upgrade():
            return
        raw_path, _, query = self.url.partition(b"?")
        scope["raw_path"] = raw_path
        scope["path"] = unquote(raw_path.decode("latin-1"))
        scope["query_string"] = query
        self.cycle = scope["docker_runner"] = Cycle(
            self.url,
            well_formed_id(self.headers),
            self._local,
            self._end,
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def _check_framing(self, version: str) -> None:
        """What the parser lets pass, and two readers of the same bytes could take for different requests."""
        hosts = codings = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                codings += 1
                if value != b"chunked" or codings > 1 or version == "1.0":
                    raise self._violates("bad_request", "the only transfer coding is `chunked`, of HTTP/1.1")
            elif name == b"content-length" and not _LENGTH.fullmatch(value):
                raise self._violates("bad_request", "Content-Length must be decimal digits")
        if hosts > 1 or (not hosts and version == "1.1"):
            raise self._violates("bad_request", "one Host header is needed, and no more")

    def on_body(self, body: bytes) -> None:
        """httptools."""
        self._body_came = True
        super().on_body(body)
        if self.flow.read_paused and self._look is None:
            self._look = self.loop.call_later(LOOK_S, self._look_for_caller)

    def _look_for_caller(self) -> None:
        """Reading is paused while an engine does not take an upload."""
        self._look = None
        if self.flow.read_paused:
            if hung_up(self.transport):
                self.transport.abort()
            else:
                self._look = self.loop.call_later(LOOK_S, self._look_for_caller)

    def on_message_complete(self) -> None:
        """httptools. It comes too early where an upgrade is asked for: the parser takes no body for the request's."""
        if not (self.parser.should_upgrade() and self._body_fields()):
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is complete: wait for the next request, or (when lingering) for nothing more."""
        if self._linger_left is None:
            super().on_response_complete()

    def shutdown(self) -> None:
        """The service begins to shut down."""
        super().shutdown()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.drain()

    def _should_upgrade(self) -> bool:
        """A WebSocket upgrade is a GET with what RFC 6455 asks for; any other is served as if it asked for none."""
        if self.scope["method"] != "GET" or self._get_upgrade() != b"websocket":
            return False
        wanted = [value for name, value in self.headers if name in (b"sec-websocket-version", b"sec-websocket-key")]
        names = {name for name, _ in self.headers}
        return (
            len(wanted) == 2
            and b"13" in wanted
            and any(_WEBSOCKET_KEY.fullmatch(value) for value in wanted)
            and not names & {b"content-length", b"transfer-encoding"}
        )

    def _upgrade(self, rest: bytes) -> None:
        """The parser has stopped at a head that asks for an upgrade; `rest` came after it."""
        if self._should_upgrade():
            if rest:
                raise self._violates("pipelining_refused", "bytes came before the upgrade was answered")
            self.ws_protocol_class = cast(
                Any, functools.partial(WebSocket, self.url, well_formed_id(self.headers), self._local)
            )
            self.handle_websocket_upgrade()
            return
        self.cycle.keep_alive = False
        if fields := self._body_fields():
            self.parser = httptools.HttpRequestParser(_BodyEvents(self))
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(b"%b: %b\r\n" % field for field in fields))
            if rest:
                self.parser.feed_data(rest)
        elif rest.strip(b"\r\n"):
            raise self._violates("pipelining_refused", "more bytes came before the answer was complete")

    def _body_fields(self) -> list[tuple[bytes, bytes]]:
        """The header fields that announce a body."""
        names = (b"content-length", b"transfer-encoding")
        return [(name, value) for name, value in self.headers if name in names and value != b"0"]

    def _head_timed_out(self) -> None:
        self._refuse(RunnerError("request_timeout", "the head of the request did not arrive in time"))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _violates(self, code: str, message: str) -> httptools.HttpParserError:
        """What a parser's callback raises to refuse the request with this error."""
        self._violation = RunnerError(code, message)
        return httptools.HttpParserError(message)

    def _refuse(self, error: RunnerError) -> None:
        """End the connection because of what came on it, telling why if nothing of another answer was given."""
        self._stop_head_timer()
        request_id = well_formed_id(self.headers)
        if self.cycle is not None and not self.cycle.response_complete:
            request_id = self.cycle.request_id
            self.cycle.leave()
            if self.cycle.response_started:
                self.cycle.abort()
                return
        status, headers, body = error.response()
        headers.append((b"x-request-id", request_id.encode()))
        fields = b"".join(b"%b: %b\r\n" % field for field in headers)
        self.transport.write(b"%bconnection: close\r\n%b\r\n%b" % (STATUS_LINE[status], fields, body))
        self._linger()
        method = self.scope.get("method", "") if self.scope is not None else ""
        target = self.url if self.scope is not None else b""
        self._on_refused(Refusal(request_id, self.client, self._local, method, target, error))

    def _linger(self) -> None:
        """Close, but read on for a while, so that a caller that is still sending gets to read the answer."""
        self._linger_left = LINGER_BYTES
        can_half_close = self.transport.can_write_eof()
        if can_half_close:
            self.transport.write_eof()
        self.flow.resume_reading()
        end = self.transport.abort if can_half_close else self._say_end
        self._head_timer = self.loop.call_later(LINGER_S, end)

    def _say_end(self) -> None:
        """TLS has no half-close: its end can be told only when nothing more is read."""
        self.transport.close()
        self._head_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _end(self) -> None:
        """The last answer was given: close, though not for ever waiting for a caller that does not read it."""
        if self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()
            self._head_timer = self.loop.call_later(CLOSE_S, self.transport.abort)


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
            raise self._protocol._violates("pipelining_refused", "a second request came before the answer to the first")
        self._begun = True
