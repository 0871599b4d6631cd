"""The bridge: a local plain socket that speaks the Engine API, in front of a runner far away.

Tools that cannot sign (the docker CLI, compose, the SDKs) are pointed at it; each of their requests goes on, signed, to
the runner (`uplink.py`), and the answer comes back framed as it was. What takes the connection over (attach, exec, and
what asks for h2c) becomes a WebSocket to the runner and raw bytes to the tool: a true `101`, or for the older form
without `Upgrade` a `200` that ends with the connection. A WebSocket of the tool's own (the runner face has one) is
passed on as it is.

Theory of operation. Each connection is one task, held by the bridge: the event loop itself holds a half-closed
connection only weakly. A request is two directions that run side by side: one gives the tool the answer, the other
takes what the tool sends and notices its leaving. Whichever finds the end ends the other. Nothing is buffered but what
one read brought; who reads slowly slows the far end.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11

import local_socket
from callers import well_formed_id
from errors import RunnerError
from headers import HOP_BY_HOP, NOT_FORWARDED, end_to_end
from logs import current_request
from tool import LeftError, Tool
from uplink import READ, BrokenOffError, Exchange, NoMoreError, Pipe, Stream, Uplink

log = logging.getLogger("docker_runner.bridge")

MAX_CONNECTIONS = 1024
"""Connections of tools at once."""
WHOLE = 1024 * 1024
"""A body of a stated length up to this many bytes is signed whole; any other goes as signed chunks."""
_TAKEN_OVER = re.compile(
    r"(?:/v[0-9]+\.[0-9]+)?/(?:containers/[^/?]+/(?P<attach>attach)|exec/[^/?]+/start|(?P<h2c>session|grpc))(?:\?|$)"
)
_LOOPBACK = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?", re.IGNORECASE)
_OF_BROWSERS = (b"origin", b"sec-fetch-")


class Bridge:
    """Serves tools on a listening socket.

    Args:
        uplink: the way to the runner.
        sock: listens, on a Unix socket or on loopback.
    """

    def __init__(self, uplink: Uplink, sock: socket.socket) -> None:
        self._uplink = uplink
        self._sock = sock
        self._local = sock.family == socket.AF_UNIX
        self._path = sock.getsockname() if self._local else None
        self._conversations: set[asyncio.Task[None]] = set()

    async def serve(self, on_started: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT; then every connection is dropped."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        start = asyncio.start_unix_server if self._local else asyncio.start_server
        server = await start(self._accept, sock=self._sock, limit=READ, backlog=MAX_CONNECTIONS)
        on_started()
        await stop.wait()
        server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)
        self._uplink.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.ensure_future(self._converse(Tool(reader, writer)))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def _converse(self, tool: Tool) -> None:
        """Serve one connection to its end."""
        try:
            while (request := await self._request(tool)) is not None and await self._serve(tool, request):
                pass
            await tool.finish()
        except (LeftError, OSError):
            pass
        except BrokenOffError as error:
            log.warning("an answer broke off: %s", error)
            tool.reset()
        except Exception:
            log.exception("a defect while serving a tool: please report it with this trace")
        finally:
            tool.abort()

    async def _request(self, tool: Tool) -> h11.Request | None:
        try:
            if len(self._conversations) > MAX_CONNECTIONS:
                raise RunnerError("too_many_connections", "docker-runner bridge: too many connections are open")
            return await tool.request()
        except RunnerError as error:
            await tool.refuse(error)
            return None

    async def _serve(self, tool: Tool, request: h11.Request) -> bool:
        """Serve one request; whether another may follow on this connection."""
        target = request.target.decode("ascii")
        current_request.set(well_formed_id(request.headers))
        try:
            if not self._local:
                _check_origin(request.headers)
            asked = next((value.lower() for name, value in request.headers if name == b"upgrade"), None)
            taken = _TAKEN_OVER.match(target) if request.method == b"POST" else None
            if taken and (asked or not taken["h2c"]):
                await _side_by_side(self._carry(tool, request, asked, bool(taken["attach"])), tool.hung_up())
            else:
                await self._relay(tool, request, request.method == b"GET" and asked == b"websocket")
        except RunnerError as error:
            log.warning("%s %s: %s", request.method.decode("ascii"), target.partition("?")[0], error)
            await tool.refuse(error)
        return tool.reusable

    async def _relay(self, tool: Tool, request: h11.Request, websocket: bool) -> None:
        """Serve a request that has an answer and no more, unless it is a WebSocket's."""
        body = await tool.whole_body(WHOLE)
        leaving = tool.hung_up() if body is None or websocket else tool.gone()
        await _side_by_side(self._ask(tool, request, body, websocket), leaving)

    async def _ask(self, tool: Tool, request: h11.Request, body: bytes | None, websocket: bool) -> None:
        method, target = request.method.decode("ascii"), request.target.decode("ascii")
        headers = _onward(request)
        if websocket:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        async with self._uplink.request(method, target, headers, body) as exchange:
            if body is None:
                await _side_by_side(_answer(tool, exchange), _forward(tool, exchange))
            else:
                await _answer(tool, exchange)

    async def _carry(self, tool: Tool, request: h11.Request, asked: bytes | None, attach: bool) -> None:
        """Serve a request whose connection the engine takes over."""
        # Of an attach nothing is a body: the engine takes whatever follows the head for input, chunk marks included.
        body = b"" if attach and tool.chunked else await tool.read_body(WHOLE)
        headers = _onward(request)
        async with self._uplink.stream(request.target.decode("ascii"), headers, body) as stream:
            if stream.status != 101:
                await tool.give(stream.status, stream.headers, stream.body)
                return
            await tool.take_over(asked, stream.headers)
            await _side_by_side(_give_raw(tool, stream), _take_raw(tool, stream))


def listen(address: str) -> socket.socket:
    """A socket that listens at `unix:///PATH` (mode 0600) or `tcp://HOST:PORT` (loopback only).

    Raises:
        ValueError: it is neither, or not loopback.
        OSError: it cannot be listened on; somebody else does, say.
    """
    if address.startswith("unix://"):
        path = address.removeprefix("unix://")
        if not path.startswith("/"):
            raise ValueError("must be unix:// and an absolute path")
        return local_socket.listen(path, MAX_CONNECTIONS)
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None or parts.path:
        raise ValueError("must be unix:///PATH or tcp://127.0.0.1:PORT")
    (family, *_, found), *_ = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    if not ipaddress.ip_address(found[0]).is_loopback:
        raise ValueError("must be loopback: whoever can connect is root on the engine's host")
    return socket.create_server(found[:2], family=family)


def _onward(request: h11.Request) -> list[tuple[bytes, bytes]]:
    """The headers that go on: the tool's, and where it gave no id, the one under which the bridge logs."""
    headers = end_to_end(request.headers.raw_items(), NOT_FORWARDED)
    if not any(name == b"x-request-id" for name, _ in request.headers):
        headers.append((b"X-Request-Id", current_request.get().encode()))
    return headers


async def _side_by_side(answer: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]) -> None:
    """Run the direction that gives the answer to its end. The others end with it, or break it off by an exception."""
    first, *rest = [asyncio.ensure_future(direction) for direction in (answer, *others)]
    running = {first, *rest}
    try:
        while not first.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if first not in done:
                for direction in done:
                    direction.result()
        first.result()
    finally:
        for direction in (first, *rest):
            direction.cancel()
        await asyncio.gather(first, *rest, return_exceptions=True)


async def _answer(tool: Tool, exchange: Exchange) -> None:
    """Give the runner's answer as it comes, each piece at once; the head leaves with the first."""
    response = await exchange.head()
    if isinstance(response, h11.InformationalResponse):
        await tool.switch(response)
        pipe = exchange.pipe()
        await _side_by_side(_give_raw(tool, pipe), _take_raw(tool, pipe))
        return
    tool.begin_answer(response.status_code, end_to_end(response.headers.raw_items(), HOP_BY_HOP), response.reason)
    while True:
        piece = exchange.take()
        if piece is None:
            await tool.flush()
            await exchange.fill()
        elif piece:
            tool.add(piece)
        else:
            tool.end_answer()
            await tool.flush()
            return


async def _forward(tool: Tool, exchange: Exchange) -> None:
    """Send the request's body piece by piece, then wait for the tool to leave."""
    try:
        while piece := await tool.body_piece():
            await exchange.send(piece)
        await exchange.send(b"")
    except NoMoreError:
        await tool.drop_body()  # The answer says why.
    await tool.gone()


async def _give_raw(tool: Tool, stream: Stream | Pipe) -> None:
    while (data := await stream.receive()) is not None:
        await tool.give_raw(data)


async def _take_raw(tool: Tool, stream: Stream | Pipe) -> None:
    while data := await tool.take_raw():
        await stream.send(data)
    await stream.send(b"")


def _check_origin(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """On TCP any web page that the user looks at could reach the bridge: let nothing of a browser through."""
    hosts = [value for name, value in headers if name == b"host"]
    browser = any(name.startswith(_OF_BROWSERS) for name, _ in headers)
    if browser or not all(_LOOPBACK.fullmatch(host) for host in hosts):
        raise RunnerError("foreign_origin", "docker-runner bridge: only local tools may ask, no browser")
