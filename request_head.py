"""What the head of a caller's request says, and what is refused of it. Pure functions; names are in lower case.

The parser checks the syntax. Here is what it lets pass: heads too large, and what two readers of the same bytes could
take for different requests.
"""

import re
from collections.abc import Sequence

from errors import RunnerError

MAX_TARGET = 65_535
"""Security limit: bytes of a request target."""
MAX_HEAD = 2 * 65_536
"""Security limit: bytes of a request's head, target included (`X-Registry-Config` may be long)."""
MAX_FIELDS = 100
"""Security limit: header fields of a request."""
_WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")
_LENGTH = re.compile(rb"[0-9]+")

Fields = Sequence[tuple[bytes, bytes]]


def check_size(target: bytes, fields: Fields, size: int) -> None:
    """Of a head or its beginning, of which `size` bytes are known to have come.

    Raises:
        RunnerError: `target_too_long`, `headers_too_large`.
    """
    if len(target) > MAX_TARGET:
        raise RunnerError("target_too_long", f"the request target is longer than {MAX_TARGET} bytes")
    if len(fields) > MAX_FIELDS or size > MAX_HEAD:
        raise RunnerError("headers_too_large", f"more than {MAX_FIELDS} header fields or {MAX_HEAD} bytes")


def check(version: str, target: bytes, fields: Fields, found: dict[bytes, bytes], size: int) -> None:
    """Of a whole head.

    Args:
        version, target, fields: what it says.
        found: `dict(fields)`, which is shorter where a name stands twice.
        size: bytes in which the head came, perhaps with something behind it.

    Raises:
        RunnerError: as `check_size`; `bad_request`.
    """
    if version not in ("1.0", "1.1"):
        raise RunnerError("bad_request", "HTTP/1.1 is spoken here")
    if size > MAX_HEAD:
        size = len(target) + sum([len(name) + len(value) + 4 for name, value in fields])
    check_size(target, fields, size)
    twice: Sequence[bytes] = ()
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = [name for name in found if names.count(name) > 1]
    coding = found.get(b"transfer-encoding")
    if coding is not None and (coding != b"chunked" or b"transfer-encoding" in twice or version == "1.0"):
        raise RunnerError("bad_request", "the only transfer coding is `chunked`, of HTTP/1.1")
    if b"content-length" in found:
        for name, value in fields:
            if name == b"content-length" and not _LENGTH.fullmatch(value):
                raise RunnerError("bad_request", "Content-Length must be decimal digits")
    if b"host" in twice or (b"host" not in found and version == "1.1"):
        raise RunnerError("bad_request", "one Host header is needed, and no more")


def is_websocket(method: str, fields: Fields) -> bool:
    """A WebSocket upgrade is a GET with what RFC 6455 asks for; any other is served as if it asked for none."""
    found = dict(fields)
    tokens = [token.strip().lower() for token in found.get(b"connection", b"").split(b",")]
    wanted = [value for name, value in fields if name in (b"sec-websocket-version", b"sec-websocket-key")]
    return (
        method == "GET"
        and b"upgrade" in tokens
        and found.get(b"upgrade", b"").lower() == b"websocket"
        and len(wanted) == 2
        and b"13" in wanted
        and any(_WEBSOCKET_KEY.fullmatch(value) for value in wanted)
        and not found.keys() & {b"content-length", b"transfer-encoding"}
    )


def body_fields(fields: Fields) -> list[tuple[bytes, bytes]]:
    """Those that announce a body."""
    names = (b"content-length", b"transfer-encoding")
    return [(name, value) for name, value in fields if name in names and value != b"0"]
