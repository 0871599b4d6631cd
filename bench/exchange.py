"""The generator's side of a connection: as little as can be, and the same for every subject.

A request is bytes that were signed before the clock starts, an answer is read until its framing says that it is whole.
"""

import contextlib
import re
import socket
import time
from collections.abc import Iterable
from typing import Any

from client import sign

SECRET = "bench-secret-0123456789abcdef"
PATIENCE_S = 60.0

Address = tuple[str, int] | str
"""Of a TCP listener, or the path of a Unix socket."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


class BenchError(Exception):
    """What was measured did not do its work: a wrong status, a broken stream, something lost."""


def connect(address: Address, patience_s: float = 15) -> socket.socket:
    """A blocking connection; waits until something listens there. Raises OSError."""
    deadline = time.monotonic() + patience_s
    while True:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        if not isinstance(address, str):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(PATIENCE_S)
        return sock


def request(method: str, target: str, body: bytes = b"", *, signed: bool, headers: tuple[str, ...] = ()) -> bytes:
    """One request as it goes over the wire, signed or not; a signature is good once, and for a minute."""
    lines = [f"{method} {target} HTTP/1.1", "Host: bench", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if signed:
        lines += [f"{name}: {value}" for name, value in sign(SECRET, method, target, body).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def whole(data: bytes) -> bool:
    """Whether this is a whole answer of HTTP/1.1 that keeps its connection."""
    end = data.find(_END)
    if end < 0:
        return False
    length = _LENGTH.search(data, 0, end + 2)
    return data.endswith(_LAST_CHUNK) if length is None else len(data) - end - len(_END) >= int(length[1])


def ask(sock: socket.socket, prepared: bytes, expected: bytes = b"200") -> bytes:
    """Send a request, and read its whole answer, its body small enough to be kept. Raises BenchError, OSError."""
    sock.sendall(prepared)
    data = sock.recv(1 << 18)
    while data and not whole(data):
        more = sock.recv(1 << 18)
        if not more:
            break
        data += more
    if data[9:12] != expected:
        raise BenchError(f"{prepared.partition(b' HTTP/')[0]!r}: {data[:400]!r}")
    return data


def drain(sock: socket.socket, prepared: Iterable[bytes], *statuses: bytes) -> int:
    """Send a request, and read until the other side closes; how many bytes came after the head.

    Raises BenchError where the status is none of the given (200 if none is), or a chunked answer does not end.
    """
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused in the midst: the answer says why
        for piece in prepared:
            sock.sendall(piece)
    first = bytearray()
    while _END not in first:
        data = sock.recv(1 << 16)
        if not data:
            break
        first += data
    head, _, rest = bytes(first).partition(_END)
    if head[9:12] not in (statuses or (b"200",)):
        raise BenchError(f"{head!r} {rest[:400]!r}")
    buffer = memoryview(bytearray(1 << 20))
    size, last = len(rest), rest[-5:]
    while count := sock.recv_into(buffer):
        size += count
        last = (last + bytes(buffer[max(0, count - 5) : count]))[-5:]
    if b"\r\nTransfer-Encoding: chunked" in head and last != _LAST_CHUNK:
        raise BenchError(f"the answer broke off after {size} bytes")
    return size


def body_of(answer: bytes) -> Any:
    """The body of a whole answer that is not chunked."""
    return answer.partition(_END)[2]
