"""What the server knows of a caller, whichever protocol it speaks: its leaving, its id, its end of the connection."""

import asyncio
import random
import re
import select
import socket
import struct
from collections.abc import Callable, Iterable

LOOK_S = 0.5
"""Seconds between looks for a caller, while nothing is read of it."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:@+/=-]{1,128}")

Callback = Callable[[], object]
Headers = Iterable[tuple[bytes, bytes]]


def well_formed_id(headers: Headers) -> str:
    """The caller's `X-Request-Id`, if it sent exactly one that is well-formed, else a new one."""
    given = [value for name, value in headers if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else new_id()


def new_id() -> str:
    """An id for a request that has none. It tells requests apart, and is no secret."""
    return f"{random.getrandbits(64):016x}"


def peer(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end of a Unix socket, as the kernel says."""
    pid, uid, _ = struct.unpack(
        "3i", transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return f"unix:uid={uid},pid={pid}"


def abort(transport: asyncio.Transport) -> None:
    """Close with a reset: an answer delimited by the connection's end must not look complete."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def hung_up(transport: asyncio.BaseTransport) -> bool:
    """Whether the caller has left. While reading is paused the event loop does not see that; poll(2) does."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


class Caller:
    """The callbacks of an `admission.Connection`; each is called once, at once if its time has already come."""

    _on_disconnect: Callback | None = None
    _on_drain: Callback | None = None
    _has_left = False
    _draining = False

    def on_disconnect(self, callback: Callback) -> None:
        self._on_disconnect = callback
        if self._has_left:
            callback()

    def on_drain(self, callback: Callback) -> None:
        self._on_drain = callback
        if self._draining:
            callback()

    def forget(self) -> None:
        """Nobody asks to be told any more."""
        self._on_disconnect = self._on_drain = None

    def leave(self) -> None:
        self._has_left = True
        if self._on_disconnect is not None:
            self._on_disconnect()
            self._on_disconnect = None

    def drain(self) -> None:
        self._draining = True
        if self._on_drain is not None:
            self._on_drain()
            self._on_drain = None
