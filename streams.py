"""Transforms of bytes on their way through the runner. Sans-IO: chunks in, chunks out, nothing awaited.

The one idea: a stream's bytes are the engine's and are never changed here; only the places where they are cut are ours.
"""

import msgspec

MAX_LINE = 1024 * 1024
"""Bytes of one line that are held back at most; a longer line passes as it comes."""


class LineFramer:
    r"""Cuts a newline-delimited stream at its newlines, whatever chunks it arrives in.

    The concatenation of everything returned equals the concatenation of everything fed, less the unfinished last line,
    which `tail` gives. A stream that ended whole delivers its tail; one that broke does not, so that a consumer never
    mistakes half a JSON document for an event.

    Args:
        max_line: a security limit, in bytes: past it the line is no longer held back, but passes as it comes up to its
            newline (memory stays bounded, and no byte is lost).
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._held: list[bytes] = []
        self._held_size = 0
        self._overlong = False

    def feed(self, chunk: bytes) -> bytes:
        """Take the next chunk of the stream; return what may leave now: whole lines, possibly none."""
        cut = chunk.rfind(b"\n") + 1
        if cut:
            self._overlong = False
            out = b"".join((*self._held, chunk[:cut])) if self._held else chunk[:cut]
            self._held.clear()
            rest = chunk[cut:]
            self._held_size = len(rest)
            if rest:
                self._held.append(rest)
        else:
            out = b""
            self._held.append(chunk)
            self._held_size += len(chunk)
        if self._overlong or self._held_size > self._max_line:
            self._overlong = True
            out += b"".join(self._held)
            self._held.clear()
            self._held_size = 0
        return out

    @property
    def within_line(self) -> bool:
        """Part of a line has left and its newline has not."""
        return self._overlong

    def tail(self) -> bytes:
        """The unfinished last line, for a stream that ended whole."""
        return b"".join(self._held)


def progress_error(message: str) -> bytes:
    """A line that tells of an error within a progress stream (pull, push, build, load), as the engine writes it."""
    return msgspec.json.encode({"errorDetail": {"message": message}, "error": message}) + b"\r\n"
