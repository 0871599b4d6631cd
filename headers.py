"""Which headers travel on, and which stay at a hop. Pure functions.

Source: RFC 9110, section 7.6.1.
"""

import re
from collections.abc import Container, Iterable

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
"""What concerns one connection only. What `Connection` names beside these is found by `end_to_end`."""
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
"""Of a request: these too are made anew for the next connection."""


_KEPT_BACK = re.compile(
    b"\n(?:[ \t]|x-dr-|(?:%b):)" % b"|".join(sorted(HOP_BY_HOP - {b"transfer-encoding"} | {b"x-request-id"}))
)


def travel_whole(lowered: bytes) -> bool:
    """Whether all of an answer's header fields travel on, `Transfer-Encoding: chunked` included.

    `lowered` are their lines in lower case behind a newline; nothing stands between a name and its colon. Folded fields
    do not travel.
    """
    return _KEPT_BACK.search(lowered) is None


def forwarded(headers: Iterable[tuple[bytes, bytes]], found: Container[bytes]) -> Headers:
    """Of a request's headers, names in lower case, those that travel on; `found` are the names."""
    if b"connection" in found:
        return end_to_end(headers, NOT_FORWARDED)
    return [field for field in headers if not (field[0] in NOT_FORWARDED or field[0].startswith(b"x-dr-"))]


def end_to_end(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    """The headers that travel on: all but `dropped`, the signature's, and what `Connection` names (RFC 9110, 7.6.1)."""
    kept: Headers = []
    named: set[bytes] = set()
    for field in headers:
        name = field[0].lower()
        if name in dropped:
            if name == b"connection":
                named.update(token.strip().lower() for token in field[1].split(b","))
        elif not name.startswith(b"x-dr-"):
            kept.append(field)
    if named - {b"close", b"keep-alive", b"upgrade"}:
        return [field for field in kept if field[0].lower() not in named]
    return kept
