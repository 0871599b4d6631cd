"""Transforms of bytes on their way through the runner. Sans-IO: chunks in, chunks out, nothing awaited.

The one idea: a stream's bytes are the engine's and are never changed here; only the places where they are cut are ours.
"""

import hashlib
import hmac
import struct
from collections.abc import Iterator

import msgspec

from client import MAX_CHUNK, chunk_signature

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


class LineReader:
    """The whole lines of a stream, without their ends, whatever chunks it arrives in. Empty ones are passed over.

    Args:
        max_line: a security limit, in bytes: a longer line is left out.
    """

    def __init__(self, max_line: int) -> None:
        self._max_line = max_line
        self._held: list[bytes] = []
        self._held_size = 0
        self._overlong = False
        self.left_out = 0
        """How many lines were too long."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next chunk; return the lines that it completes."""
        whole, newline, rest = chunk.rpartition(b"\n")
        lines: list[bytes] = []
        if newline:
            if self._overlong:
                _, _, whole = whole.partition(b"\n")  # What came before is of the line that is left out.
            elif self._held:
                whole = b"".join((*self._held, whole))
            self._overlong = False
            self._held, self._held_size = [], 0
            lines = [line for line in whole.splitlines() if line.strip()]
        if rest and not self._overlong:
            self._held.append(rest)
            self._held_size += len(rest)
            if self._held_size > self._max_line:
                self._held, self._held_size = [], 0
                self._overlong = True
                self.left_out += 1
        return lines


STDOUT, STDERR = 1, 2
MAX_FRAME = 1024 * 1024
"""Bytes of one multiplexed frame that are held back at most; a longer frame passes as it comes."""
_HEADER = struct.Struct(">II")
# The first word is the stream and three zeros. 0 is stdin, which the engine never sends, and 3 its own errors; both
# read best as stderr.
_STREAMS = {0: STDERR, 1 << 24: STDOUT, 2 << 24: STDERR, 3 << 24: STDERR}


class FramingError(Exception):
    """The bytes are not the engine's multiplexed stream."""


class FrameReader:
    """Takes the engine's multiplexed stream apart, whatever chunks it arrives in.

    The format: frames of a header (stream, three zeros, the payload's length in 4 bytes, big-endian) and the payload.
    Source: the API document, `ContainerAttach`, "Stream format".
    """

    def __init__(self) -> None:
        self._header = b""
        self._stream = 0
        self._left = 0

    @property
    def between_frames(self) -> bool:
        """The stream may end here."""
        return not self._left and not self._header

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The payloads in a chunk, in order: (`STDOUT` or `STDERR`, bytes). A payload may come in several pieces.

        Raises:
            FramingError: a header is none.
        """
        for start, end in self._spans(chunk):
            if start < end:
                yield self._stream, chunk[start:end]

    def last_border(self, chunk: bytes) -> int | None:
        """Take a chunk as `feed` does, and tell where in it the last whole frame ends; None if none does."""
        border = None
        for _, end in self._spans(chunk):
            if not self._left:
                border = end
        return border

    def _spans(self, chunk: bytes) -> Iterator[tuple[int, int]]:
        """Where the payloads in a chunk begin and end. A log of short lines is a frame for each."""
        at, size = 0, len(chunk)
        while at < size:
            if not self._left:
                if not self._header and size - at >= _HEADER.size:
                    kind, self._left = _HEADER.unpack_from(chunk, at)
                    at += _HEADER.size
                else:
                    needed = chunk[at : at + _HEADER.size - len(self._header)]
                    at += len(needed)
                    self._header += needed
                    if len(self._header) < _HEADER.size:
                        return
                    kind, self._left = _HEADER.unpack(self._header)
                    self._header = b""
                if kind not in _STREAMS:
                    raise FramingError(f"no frame begins with {_HEADER.pack(kind, self._left)!r}")
                self._stream = _STREAMS[kind]
            end = min(at + self._left, size)
            self._left -= end - at
            yield at, end
            at = end


class FrameCutter:
    """Cuts a multiplexed stream between its frames; otherwise as `LineFramer`: no byte is changed, lost or added."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max_frame = max_frame
        self._reader = FrameReader()
        self._held: list[bytes] = []
        self._held_size = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take the next chunk; return what may leave now: whole frames, possibly none.

        Raises:
            FramingError: as `FrameReader.feed`.
        """
        cut = self._reader.last_border(chunk)
        if cut is None:
            self._held.append(chunk)
            self._held_size += len(chunk)
            if self._held_size <= self._max_frame:
                return b""
            out = b"".join(self._held)
            self._held, self._held_size = [], 0
            return out
        out = b"".join((*self._held, chunk[:cut]))
        self._held, self._held_size = ([chunk[cut:]], len(chunk) - cut) if cut < len(chunk) else ([], 0)
        return out

    def tail(self) -> bytes:
        """The unfinished last frame, for a stream that ended whole."""
        return b"".join(self._held)


Data = bytes | bytearray | memoryview
"""Bytes on their way, whoever holds them; whoever has given them on does not change them any more."""

MIN_UNCOPIED = 16 * 1024
"""Bytes of the least piece that is held as it came: what comes in a million pieces takes no more room than in one."""


GATHER_S = 0.002
"""Seconds for more to come after a piece smaller than that, in a log that is not followed: the engine writes each line
by itself, and to pass each on by itself made 4 MB of short lines a quarter slower."""


class Gathered:
    """Pieces of a body that are held until they are enough: large ones uncopied, small ones put together.

    How much it holds is for its owner to bound; it takes about `size` bytes, and the buffers that views are of.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[Data] = []

    def add(self, piece: Data) -> None:
        """Hold one more."""
        self.size += len(piece)
        if len(piece) >= MIN_UNCOPIED:
            self._pieces.append(piece)
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray):
            last += piece
        elif piece:
            self._pieces.append(bytearray(piece))

    def take(self) -> list[Data]:
        """All that is held, in order, and hold nothing."""
        pieces, self._pieces, self.size = self._pieces, [], 0
        return pieces

    def whole(self) -> bytes:
        """A copy of all that is held."""
        return b"".join(self._pieces)


_CHUNK_HEAD = 4 + 32


class SignedChunkError(Exception):
    """A body of signed chunks is malformed, cut short, or was tampered with."""


class SignedChunkReader:
    """Takes a body of signed chunks apart, whatever pieces it arrives in, and verifies each chunk before giving it out.

    The format: records of a length (4 bytes, big-endian), a signature (32 bytes) and that much data. Each signature
    covers the one before, the first the request's; so no record can be changed, moved, left out or added. A record
    without data ends the body. Source: `client.signed_chunk`.

    Args:
        secret: the one that signed the request.
        previous: the 32 raw bytes of the request's signature.
        max_chunk: a security limit: bytes of one record's data, which are held until they are verified.
    """

    def __init__(self, secret: bytes, previous: bytes, max_chunk: int = MAX_CHUNK) -> None:
        self._secret = secret
        self._previous = previous
        self._max_chunk = max_chunk
        self._head = b""
        self._left = 0
        self._held = Gathered()
        self._digest = hashlib.sha256()
        self.ended = False
        """The record that ends the body has come, and was right."""

    def feed(self, piece: bytes) -> Iterator[Data]:
        """The data of the chunks that a piece completes, in order; a chunk's may come in parts, all of it verified.

        Raises:
            SignedChunkError: what came is not what was signed.
        """
        view = memoryview(piece)
        at = 0
        while at < len(piece):
            if self.ended:
                raise SignedChunkError("more came after the chunk that ends the body")
            if len(self._head) < _CHUNK_HEAD:
                needed = piece[at : at + _CHUNK_HEAD - len(self._head)]
                at += len(needed)
                self._head += needed
                if len(self._head) < _CHUNK_HEAD:
                    return
                self._left = int.from_bytes(self._head[:4], "big")
                if self._left > self._max_chunk:
                    raise SignedChunkError(f"a chunk is longer than {self._max_chunk} bytes")
            data = view[at : at + self._left]
            at += len(data)
            self._left -= len(data)
            self._digest.update(data)  # As it comes: a whole chunk at once would hold up the other requests.
            self._held.add(data)
            if not self._left:
                yield from self._verified()

    def _verified(self) -> list[Data]:
        signed = self._head[4:]
        expected = chunk_signature(self._secret, self._previous, self._digest.digest())
        if not hmac.compare_digest(expected, signed):
            raise SignedChunkError("the signature of a chunk does not match")
        self._previous, self._head = signed, b""
        self._digest = hashlib.sha256()
        self.ended = not self._held.size
        return self._held.take()


class Tail:
    """The last bytes of a stream.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept = bytearray()

    def add(self, piece: bytes) -> None:
        """The next piece of the stream."""
        self._kept += piece
        if len(self._kept) > 2 * self._size:
            del self._kept[: -self._size]

    def get(self) -> bytes:
        """What is kept."""
        return bytes(self._kept[-self._size :])


KEEP_ALIVE = b": keep-alive\n\n"
"""An SSE comment: nothing to the client, a sign of life to everything in between."""


def sse(*message: bytes) -> bytes:
    """One message of a server-sent event stream, in parts: JSON without line breaks, on one `data:` line.

    Source: the HTML standard, section "Server-sent events".
    """
    return b"".join((b"data: ", *message, b"\n\n"))


def progress_error(message: str) -> bytes:
    """A line that tells of an error within a progress stream (pull, push, build, load), as the engine writes it."""
    return msgspec.json.encode({"errorDetail": {"message": message}, "error": message}) + b"\r\n"
