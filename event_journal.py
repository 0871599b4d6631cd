"""What a stream of events has told lately, and where in it somebody stopped. Sans-IO.

Theory. To go on where a stream broke off, the engine is asked for what it still has, and what was told already is left
out. It keeps its last 256 events, and three things about them forbid the simple ways (seen on Docker Engine 20.10, with
8 to 48 callers at once): it sends them in another order than it keeps them (up to 30 places apart), keeps them in
another order than that of their times (`timeNano`, up to 60 ms apart), and events may share a time. So neither a time
nor a count says where a stream stopped; *which* events it told last does. A position is therefore the digests of
those: the older half of them only tells what is known, the newer half must all be found, as a proof that nothing that
came after has been forgotten. What the engine has after the first of the proof, and is not known, was missed; if the
proof is not found, a gap cannot be excluded.

Digests tell equal events apart by counting them. Nothing else goes into a position: not how many events there were, and
nothing of events that were not told in this very stream.
"""

import base64
import binascii
import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from errors import RunnerError
from streams import sse

MAX_ENTRIES = 512
"""Events that a journal knows of: what the engine keeps (256), and what may be on its way meanwhile."""
WINDOW = 64
"""Events of a position, at most; the engine's two orders were seen to differ by up to half of it."""
HORIZON_NS = 250_000_000
"""Events of a position are this close to the last one; the engine's orders were seen to differ by a quarter of it."""
_DIGEST = 8
_SHORT = 4
"""Bytes of a digest in a position. That an event is taken for another by chance: 64 in 2**32."""
_ASIDE = b""
"""Stands for a digest where something is told that is no event."""
_VERSION = 1
_HEAD = 10
_ID = re.compile(r"[A-Za-z0-9_-]{1,400}")


class Position:
    """Where a stream stopped: the events told last, the time of the newest, and how many of them are the proof.

    A position before the first event of a stream is `unmarked`: its time is all that can be said.
    """

    __slots__ = ("digests", "proof", "time_ns")

    def __init__(self, time_ns: int, proof: int, digests: Sequence[bytes]) -> None:
        self.time_ns = time_ns
        self.proof = proof
        self.digests = digests

    @property
    def unmarked(self) -> bool:
        """There was no event to remember it by."""
        return not self.proof

    def __str__(self) -> str:
        head = bytes((_VERSION, self.proof)) + self.time_ns.to_bytes(8, "big", signed=True)
        return base64.urlsafe_b64encode(head + b"".join(self.digests)).rstrip(b"=").decode()


def read_position(text: str) -> Position:
    """A position from the id of an event. One of another service, or version, is a position that is nowhere found.

    Raises:
        RunnerError: `validation_error`: no event has such an id.
    """
    if not _ID.fullmatch(text):
        raise RunnerError("validation_error", "Last-Event-ID: not the id of an event")
    foreign = Position((1 << 63) - 1, 1, [])
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return foreign
    digests = [raw[at : at + _SHORT] for at in range(_HEAD, len(raw), _SHORT)]
    if raw[0] != _VERSION or not digests or len(digests[-1]) != _SHORT or not raw[1] <= len(digests) <= WINDOW:
        return foreign
    return Position(int.from_bytes(raw[2:_HEAD], "big", signed=True), raw[1], digests)


class _Timed(msgspec.Struct):
    time_nano: int = msgspec.field(default=0, name="timeNano")


def time_of(line: bytes) -> int:
    """When an event was, in ns since the epoch; 0 if it does not say."""
    try:
        found = msgspec.json.decode(line, type=_Timed).time_nano
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 0
    return found if abs(found) < 1 << 63 else 0


class Entry:
    """One message of a stream. `frame` is None once its bytes had to make room; `is_mark`: see `Journal._mark`."""

    __slots__ = ("digest", "frame", "is_mark", "time_ns")

    def __init__(self, digest: bytes, time_ns: int, frame: bytes | None = None, *, is_mark: bool = False) -> None:
        self.digest = digest
        self.time_ns = time_ns
        self.frame = frame
        self.is_mark = is_mark


class Room:
    """Bytes that all journals together may hold, and each of them."""

    def __init__(self, *, total: int, each: int) -> None:
        self.total = total
        self.each = each
        self.used = 0


class Journal:
    """The last messages of one stream, as they are sent, each with the id of the position after it.

    Args:
        room: for the messages; those that find none are forgotten, the oldest first.
        reach_ns: what came from this time on is held.
        time_ns: the time now.
    """

    def __init__(self, room: Room, *, reach_ns: int, time_ns: int) -> None:
        self._room = room
        self._entries: deque[Entry] = deque()
        self._framed: deque[Entry] = deque()
        self._size = 0
        self._window: deque[Entry] = deque(maxlen=WINDOW)
        self.reach_ns = reach_ns
        self._add(self._mark(time_ns))

    def _mark(self, time_ns: int) -> Entry:
        """A place that only this journal knows, in place of the events told before."""
        self._window.clear()
        self._beginning = Entry(os.urandom(_DIGEST), time_ns, is_mark=True)
        return self._beginning

    @property
    def newest_ns(self) -> int:
        """The time of the last event; where there is none, of what stands in for it."""
        return (self._window[-1] if self._window else self._beginning).time_ns

    def position(self) -> Position:
        """The position after all that was told."""
        if not self._window:
            return Position(self._beginning.time_ns, 0, [self._beginning.digest[:_SHORT]])
        newest = self._window[-1].time_ns
        told = [each for each in self._window if each.time_ns > newest - HORIZON_NS]
        return Position(newest, len(self._proof(told)), [each.digest[:_SHORT] for each in told])

    def _proof(self, told: Sequence[Entry]) -> Sequence[Entry]:
        newest = told[-1].time_ns
        return [each for each in told[-WINDOW // 2 :] if each.time_ns > newest - HORIZON_NS // 2]

    # Telling.

    def tell(self, line: bytes) -> bytes:
        """Tell of an event; the message."""
        entry = Entry(_digest(line), time_of(line))
        self._window.append(entry)
        # The id comes last: who has it has the event.
        message = b'data: {"type":"event","event":%b}\nid: %b\n\n' % (line, str(self.position()).encode())
        entry.frame = message
        self._add(entry)
        return message

    def tell_gap(self, message: bytes, time_ns: int) -> bytes:
        """Tell that events may be missing here: nothing before counts as known any more."""
        entry = self._mark(time_ns)
        entry.frame = frame = b"data: %b\nid: %b\n\n" % (message, str(self.position()).encode())
        self._add(entry)
        return frame

    def tell_aside(self, message: bytes) -> bytes:
        """Tell something that is not of the events, and does not change the position."""
        frame = sse(message)
        self._add(Entry(_ASIDE, self.newest_ns, frame))
        return frame

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        if entry.frame is not None:
            self._framed.append(entry)
            self._size += len(entry.frame)
            self._room.used += len(entry.frame)
        room = self._room
        while len(self._framed) > 1 and (self._size > room.each or room.used > room.total):
            self._forget_frame()
        if len(self._entries) > MAX_ENTRIES:
            oldest = self._entries.popleft()
            if self._framed and self._framed[0] is oldest:
                self._forget_frame()

    def _forget_frame(self) -> None:
        entry = self._framed.popleft()
        assert entry.frame is not None
        self._size -= len(entry.frame)
        self._room.used -= len(entry.frame)
        entry.frame = None
        self.reach_ns = max(self.reach_ns, entry.time_ns + 1)

    def close(self) -> None:
        """Give back the room."""
        self._room.used -= self._size
        self._size = 0
        self._framed.clear()
        self._entries.clear()

    # Looking back.

    def since(self, time_ns: int) -> list[bytes] | None:
        """The messages from a time on; None if some of them are not held any more."""
        if time_ns < self.reach_ns:
            return None
        return [each.frame for each in self._framed if each.frame is not None and each.time_ns >= time_ns]

    def after(self, position: Position) -> list[bytes] | None:
        """The messages after a position; None if it is not one of this journal, or some of them are not held."""
        proof = position.digests[-position.proof :] if position.proof else position.digests
        sure_ns = position.time_ns - HORIZON_NS if len(position.digests) < WINDOW else None
        found = _missed(self._entries, position.digests, proof, sure_ns, _SHORT)
        if found is None:
            return None
        frames = [each.frame for each in found if each.frame is not None]
        return frames if len(frames) == len(found) else None

    def known(self) -> list[bytes]:
        """Digests of what was told lately."""
        return [each.digest for each in self._entries]

    def missed(self, history: Sequence[bytes]) -> tuple[list[bytes], bool]:
        """What of the engine's events was not told yet, and whether it is proven to be all of it.

        Args:
            history: the events that the engine has, from some time before `newest_ns` on, in its order.
        """
        entries = [(line, Entry(_digest(line), time_of(line))) for line in history]
        lines = {id(entry): line for line, entry in entries}
        proof = [each.digest for each in self._proof(list(self._window))] if self._window else []
        known = self.known()
        since_ns = self.newest_ns - HORIZON_NS
        sure_ns = since_ns if len(known) < MAX_ENTRIES or self._entries[0].time_ns < since_ns else None
        found = _missed([entry for _, entry in entries], known, proof, sure_ns, _DIGEST) if proof else None
        if found is not None:
            return [lines[id(entry)] for entry in found], True
        unknown = _unknown((entry for _, entry in entries), known, _DIGEST)
        return [lines[id(entry)] for _, entry in unknown if entry.time_ns > self.newest_ns], False


class Sieve:
    """Which lines of a stream are new, where a look at what the engine has was taken after the stream was begun.

    The stream first gives what the engine had when it began, in the order of the look; then what happens. The look has
    settled what it shows. What the stream gives before any of that is what the engine has forgotten in between, or an
    event that overtook others.

    Args:
        history: what the look showed.
        known: digests of what was told before.
    """

    def __init__(self, history: Sequence[bytes], known: Iterable[bytes] = ()) -> None:
        digests = [_digest(line) for line in history]
        self._settled = frozenset((*digests, *known))
        self._met = not digests
        self._middle_ns = (time_of(history[0]) + time_of(history[-1])) // 2 if history else 0

    def is_new(self, line: bytes) -> bool:
        """Whether this line is to be told. Lines are to be given in order."""
        if _digest(line) in self._settled:
            self._met = True
            return False
        return self._met or time_of(line) > self._middle_ns


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=_DIGEST).digest()


def _unknown(history: Iterable[Entry], known: Iterable[bytes], size: int) -> Iterator[tuple[int, Entry]]:
    """The entries that are not known, and where they stand. Of equal ones the first are the known ones."""
    left = Counter(known)
    for at, entry in enumerate(history):
        digest = entry.digest[:size]
        if left[digest]:
            left[digest] -= 1
        else:
            yield at, entry


def _missed(
    history: Sequence[Entry], known: Iterable[bytes], proof: Sequence[bytes], sure_ns: int | None, size: int
) -> list[Entry] | None:
    """The entries that were not told, in their order; None if not all of the proof is there.

    Those are the unknown ones after the first of the proof; and also before it, if they are from a time (`sure_ns`)
    since when all that was told is known: the others have overtaken them.
    """
    wanted = Counter(proof)
    places = []
    begin = 0
    for at, entry in enumerate(history):
        digest = entry.digest[:size]
        if wanted[digest]:
            wanted[digest] -= 1
            places.append(at)
        elif entry.is_mark and not places:
            begin = at + 1
    if not places or any(wanted.values()):
        return None
    first, last = places[0], places[-1]

    def is_missed(at: int, entry: Entry) -> bool:
        if entry.digest == _ASIDE:
            return at > last
        return at > first or (at >= begin and sure_ns is not None and entry.time_ns > sure_ns)

    return [entry for at, entry in _unknown(history, known, size) if is_missed(at, entry)]
