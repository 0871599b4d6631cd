"""Events for many callers from one subscription to the engine: shared, resumed, and told with every gap.

Callers that may know of the same events and ask for the same share an `EventStream`: each event is decided on and
encoded once (`event_fanout.py` sends it). What came lately is kept in a journal, from which callers that come back are
served.

When the engine's stream breaks, the feed asks anew, with a second look at what the engine still has: `event_journal.py`
tells what of it was missed, and whether that is all. The order matters: first the stream, from a time before the last
event on; then the look. What the look shows happened before its answer and is settled by it; the stream may show it
again (the engine even sends an event twice that happens while it begins a stream), and has all that happens after.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

from calls import Calls
from engine_response import EngineResponse
from errors import RunnerError
from event_fanout import Fanout, Subscriber
from event_journal import HORIZON_NS, Journal, Position, Room, Sieve, time_of
from scope_events import MAX_EVENT
from streams import LineReader

log = logging.getLogger("docker_runner.events")

SECOND_NS = 1_000_000_000
LOOK_BACK_NS = 3600 * SECOND_NS
"""How far a new feed looks back, so that callers of an earlier one can go on. (Podman keeps events for ever.)"""
SLACK_NS = 10 * SECOND_NS
"""How far before the last known event a broken stream is asked for; the engine's order is not quite that of times."""
JOURNAL_BYTES = 8 * 1024 * 1024
"""What one feed keeps of what it told lately."""
JOURNALS_BYTES = 64 * 1024 * 1024
"""What all feeds keep together."""
ATTEMPT_S = 10.0
"""How long the engine may take to begin a stream anew, and to say what it has."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
"""Between attempts to reach the engine; doubled from the first to the longest."""
GIVE_UP_S = 60.0
"""How long the engine may be away before its callers are told that the stream has ended."""
_ONCE = ((b"Connection", b"close"),)


class Wish(msgspec.Struct, frozen=True):
    """Where a caller wants to begin: after a position, else from a time on, else now."""

    since: str | None = None
    """As the engine takes it."""
    position: Position | None = None

    @property
    def time_ns(self) -> int | None:
        """The time it needs to be looked back to; None: not at all, or only the engine can tell."""
        if self.position is not None:
            return self.position.time_ns
        return None if self.since is None else _nanoseconds(self.since)


class EventHub:
    """The feeds of one engine.

    Args:
        keep_alive_s: a quiet feed says so often that it lives.
        on_passed: told of events that are passed on, and since when (in ns since the epoch) they are no history.
    """

    def __init__(self, keep_alive_s: float, on_passed: Callable[[bytes, int], object]) -> None:
        self._keep_alive_s = keep_alive_s
        self._on_passed = on_passed
        self._room = Room(total=JOURNALS_BYTES, each=JOURNAL_BYTES)
        self._feeds: dict[tuple[str, str], EventStream] = {}

    async def subscribe(self, calls: Calls, filters: str, wish: Wish, subscriber: Subscriber) -> "EventStream":
        """Begin a caller's stream; `EventStream.leave` ends it.

        Args:
            calls: on whose behalf: its scope says whose events these are, its policy was asked.
            filters: of the engine, in one form for all that mean the same.
            wish: where to begin.
            subscriber: gets the messages.

        Raises:
            RunnerError: the engine refused, failed, or could not be reached.
        """
        key = (calls.scope_label, filters)
        while True:
            feed = self._feeds.get(key)
            if feed is None:
                feed = self._feeds[key] = EventStream(calls, filters, self._room, self._keep_alive_s, self._on_passed)
                feed.open(_look_back(wish.time_ns), functools.partial(self._ended, key, feed))
            feed.users += 1
            try:
                await feed.ready()
                is_covered = await self._covers(feed, calls, wish)
            except BaseException:
                feed.leave(subscriber)
                raise
            if feed.is_open:
                break
            feed.leave(subscriber)  # It broke off meanwhile.
        replay = feed.replay(wish, is_covered=is_covered)
        if replay is None and wish.position is None:
            feed.leave(subscriber)
            return await self._apart(calls, filters, wish, subscriber)
        feed.join(subscriber, wish, replay)
        return feed

    def _ended(self, key: tuple[str, str], feed: "EventStream") -> None:
        if self._feeds.get(key) is feed:
            del self._feeds[key]

    async def _covers(self, feed: "EventStream", calls: Calls, wish: Wish) -> bool:
        """Whether the engine has all since a position that no event marks, and this feed does not know."""
        position = wish.position
        if position is None or not position.unmarked or feed.journal.after(position) is not None:
            return False
        return await reaches_back(calls, position.time_ns)

    async def _apart(self, calls: Calls, filters: str, wish: Wish, subscriber: Subscriber) -> "EventStream":
        """A feed for one caller that wants more of the past than the shared one has; the engine tells it."""
        assert wish.since is not None
        feed = EventStream(calls, filters, self._room, self._keep_alive_s, self._on_passed)
        feed.users += 1
        feed.tell_all(subscriber)
        feed.open(wish.since, lambda: None, looks=False)
        try:
            await feed.ready()
        except BaseException:
            feed.leave(subscriber)
            raise
        return feed


class EventStream:
    """One stream of the engine's events, for all callers with the same scope and the same filters.

    Args:
        calls: asks the engine.
        filters: of the engine.
        room: for its journal.
        keep_alive_s: how long it may be quiet.
        on_passed: see `EventHub`.
    """

    def __init__(
        self, calls: Calls, filters: str, room: Room, keep_alive_s: float, on_passed: Callable[[bytes, int], object]
    ) -> None:
        self._calls = calls
        self._filters = filters
        self._room = room
        self._on_passed = on_passed
        self._fanout = Fanout(keep_alive_s)
        self._loop = asyncio.get_running_loop()
        self._is_own: Callable[[bytes], Awaitable[bool]] | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.users = 0
        """Callers that have joined or are about to."""
        self.is_open = False
        self._ended = False
        self.journal = Journal(room, reach_ns=0, time_ns=0)

    # Callers.

    def open(self, since: str, on_end: Callable[[], object], *, looks: bool = True) -> None:
        """Begin the engine's stream.

        Args:
            since: from when on the engine is asked.
            on_end: called when the feed ends.
            looks: what the engine has of the past is noted only, else it is told.
        """
        self._on_end = on_end
        self._task = self._calls.background(self._run(since, looks=looks))

    async def ready(self) -> None:
        """Wait until the engine's stream is open.

        Raises:
            RunnerError: why it is not.
        """
        await asyncio.shield(self._ready)

    def replay(self, wish: Wish, *, is_covered: bool) -> list[bytes] | None:
        """The messages that a caller gets first; None if the journal does not reach back so far."""
        if wish.position is not None:
            found = self.journal.after(wish.position)
            return self.journal.since(wish.position.time_ns + 1) if found is None and is_covered else found
        if wish.since is None:
            return []
        return None if wish.time_ns is None else self.journal.since(wish.time_ns)

    def join(self, subscriber: Subscriber, wish: Wish, replay: list[bytes] | None) -> None:
        """Send a caller what it missed, and from now on what happens."""
        first: list[bytes] = []
        if replay is None:
            assert wish.position is not None
            first = [b"data: %b\n\n" % _gap("resume", "the engine or the runner may have forgotten what came after it")]
            replay = self.journal.since(max(wish.position.time_ns + 1, self.journal.reach_ns)) or []
        if not replay:
            replay = [b": here\nid: %b\n\n" % str(self.journal.position()).encode()]
        self._fanout.attach(subscriber, [*first, *replay])

    def tell_all(self, subscriber: Subscriber) -> None:
        """Send a caller all that the engine's stream gives, from its beginning."""
        self._fanout.attach(subscriber, [])

    def leave(self, subscriber: Subscriber) -> None:
        """A caller goes; with the last one the engine's stream ends at once."""
        self._fanout.detach(subscriber)
        self.users -= 1
        if not self.users:
            self._task.cancel()
            self._end()

    # The engine's stream.

    async def _run(self, since: str, *, looks: bool) -> None:
        try:
            response, sieve = await self._begin(since, looks=looks)
            while True:
                self._set_ready()
                await self._pump(response, sieve)
                response, sieve = await self._begin_again()
        except RunnerError as error:
            self._fail(error)
        except Exception:
            log.exception("a defect in a stream of events")
            self._fail(RunnerError("internal_error", "a defect of the runner; its log says more"))
        finally:
            self._end()

    async def _begin(self, since: str, *, looks: bool) -> tuple[EngineResponse, Sieve]:
        """The engine's stream, and what of it is new."""
        self._is_own = await self._calls.is_own_event()
        response = await self._stream(since)
        try:
            now_ns = _engine_time(response)
            self.journal.close()
            self.journal = Journal(self._room, reach_ns=_nanoseconds(since) or 0 if looks else now_ns, time_ns=now_ns)
            history, is_all = await self._look(_nanoseconds(since) or 0, now_ns) if looks else ([], True)
            for line in history:
                if await self._is_own(line):
                    self.journal.tell(line)
            if not is_all:
                self.journal.tell_aside(_TOO_LONG)
        except BaseException:
            response.close()
            raise
        return response, Sieve(history)

    async def _begin_again(self) -> tuple[EngineResponse, Sieve]:
        """The engine's stream, once it is to be had again. All callers are told, and what they missed.

        Raises:
            RunnerError: it was not to be had for too long.
        """
        self.is_open = False
        self._ready = self._loop.create_future()
        lost_at, pause_s = self._loop.time(), FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    return await self._catch_up(lost_at)
            except (RunnerError, TimeoutError) as failure:
                error = failure if isinstance(failure, RunnerError) else _timed_out()
                log.warning("the stream of events is broken: %s", error.message)
                if self._loop.time() - lost_at > GIVE_UP_S:
                    raise error from None
                self._fail_waiting(error)
                self._ready = self._loop.create_future()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _catch_up(self, lost_at: float) -> tuple[EngineResponse, Sieve]:
        assert self._is_own is not None
        newest_ns = self.journal.newest_ns
        response = await self._stream(_seconds(newest_ns - SLACK_NS))
        try:
            now_ns = _engine_time(response)
            # An event of the future is from before the clock was set back: the engine would wait until its time.
            is_past = newest_ns < now_ns + 2 * SECOND_NS
            until_ns = max(now_ns, newest_ns)
            history, is_all = await self._look(newest_ns - SLACK_NS, until_ns) if is_past else ([], False)
            lines, is_proven = self.journal.missed([line for line in history if await self._is_own(line)])
            if not is_proven and self.journal.position().unmarked:
                is_proven = await reaches_back(self._calls, newest_ns)
            is_all = is_all and is_proven
            if not is_all:
                self._is_own = await self._calls.is_own_event()  # What is noted of the things that are there is stale.
        except BaseException:
            response.close()
            raise
        sieve = Sieve(history, self.journal.known())
        away_s = self._loop.time() - lost_at
        log.info("the stream of events goes on after %.1f s, %s", away_s, "whole" if is_all else "with a gap")
        told = {"type": "reconnected", "message": f"the engine's stream of events was interrupted for {away_s:.1f} s"}
        frames = [self.journal.tell_aside(msgspec.json.encode(told))]
        if not is_all:
            gap = _gap("engine", "the engine was restarted, or has forgotten some of what happened meanwhile")
            frames.append(self.journal.tell_gap(gap, now_ns))
        self._fanout.publish(frames + [self.journal.tell(line) for line in lines])
        return response, sieve

    async def _stream(self, since: str) -> EngineResponse:
        query = {"since": since, "filters": self._filters}
        return await self._calls.open("GET", "/events", query, own=True, buffer_limit=MAX_EVENT)

    async def _look(self, since_ns: int, until_ns: int) -> tuple[list[bytes], bool]:
        """What the engine has of the past, in its order, and whether that is all: no more than `MAX_EVENT` is held."""
        lines: deque[bytes] = deque()
        size = left_out = 0
        with await _past(self._calls, since_ns, until_ns, filters=self._filters) as response:
            reader = LineReader(MAX_EVENT)
            async for chunk in response.chunks():
                for line in reader.feed(chunk):
                    lines.append(line)
                    size += len(line)
                while size > MAX_EVENT:
                    size -= len(lines.popleft())
                    left_out += 1
        return list(lines), not (left_out or reader.left_out)

    async def _pump(self, response: EngineResponse, sieve: Sieve) -> None:
        """Tell what happens, until the engine's stream breaks."""
        assert self._is_own is not None
        reader = LineReader(MAX_EVENT)
        left_out = 0
        since_ns = time.time_ns()
        try:
            with response:
                while chunk := await response.next():
                    own = [line for line in reader.feed(chunk) if sieve.is_new(line)]
                    if self._calls.scope_label:
                        own = [line for line in own if await self._is_own(line)]
                    # From here on without a pause: who joins gets what is in the journal, and not what is sent then.
                    frames = [self.journal.tell(line) for line in own]
                    if reader.left_out > left_out:
                        left_out = reader.left_out
                        frames.append(self.journal.tell_aside(_TOO_LONG))
                    if frames:
                        self._fanout.publish(frames)
                        self._on_passed(b"\n".join(own), since_ns)
        except RunnerError as error:
            log.warning("the stream of events broke off: %s", error.message)

    # Ends.

    def _set_ready(self) -> None:
        self.is_open = True
        if not self._ready.done():
            self._ready.set_result(None)

    def _fail_waiting(self, error: RunnerError) -> None:
        """Tell those who wait for the stream that it is not to be had."""
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # Looked at, though perhaps nobody waits.

    def _fail(self, error: RunnerError) -> None:
        self._fail_waiting(error)
        self._fanout.end(error)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.is_open = False
        self._on_end()
        self._fanout.close()
        self.journal.close()


async def _past(calls: Calls, since_ns: int, until_ns: int, **more: str) -> EngineResponse:
    """The engine's events between two times, of which the second has passed; from Podman, those since then as well.

    Podman (4.3) stops reading its events at a time that has passed before it has read them all, or any. It has a
    parameter of its own, which Docker Engine does not know, for not to wait for more.
    """
    asked = {"since": _seconds(since_ns), **more}
    response = await _ask(calls, {**asked, "until": _seconds(until_ns)})
    if not response.from_podman:
        return response
    response.close()
    return await _ask(calls, {**asked, "stream": "false"})


async def _ask(calls: Calls, query: dict[str, str]) -> EngineResponse:
    """The engine's events of the past, on a connection that does not outlive them."""
    return await calls.open("GET", "/events", query, own=True, head_s=ATTEMPT_S, headers=_ONCE)


async def reaches_back(calls: Calls, time_ns: int) -> bool:
    """Whether the engine still has an event, of any kind, from before a time: then it has all from there on."""
    until_ns = time_ns - HORIZON_NS
    with await _past(calls, 0, until_ns) as response:
        reader = LineReader(MAX_EVENT)
        async for chunk in response.chunks():
            for line in reader.feed(chunk):
                return 0 < time_of(line) <= until_ns
    return False


def _gap(reason: str, message: str) -> bytes:
    return msgspec.json.encode({"type": "gap", "reason": reason, "message": f"events may be missing here: {message}"})


_TOO_LONG = _gap("too_long", f"an event longer than {MAX_EVENT} bytes was left out")


def _timed_out() -> RunnerError:
    return RunnerError("engine_timeout", "the engine did not begin its stream of events in time")


def _look_back(time_ns: int | None) -> str:
    newest = time.time_ns() - LOOK_BACK_NS
    return _seconds(newest if time_ns is None else min(newest, time_ns - SLACK_NS))


def _seconds(time_ns: int) -> str:
    return f"{max(time_ns, 0) // SECOND_NS}.{max(time_ns, 0) % SECOND_NS:09}"


def _nanoseconds(since: str) -> int | None:
    """The time that the engine understands; None if it is not written in the usual way."""
    whole, dot, fraction = since.partition(".")
    is_usual = since.isascii() and whole.isdigit() and len(whole) <= 10 and len(fraction) <= 9
    if not is_usual or (dot and not fraction.isdigit()):
        return None
    return int(whole) * SECOND_NS + int(fraction.ljust(9, "0") or "0")


def _engine_time(response: EngineResponse) -> int:
    """The engine's time now: ours, unless its `Date` says that its clock is another."""
    ours = time.time_ns()
    date = next((value for name, value in response.headers if name.lower() == b"date"), None)
    try:
        theirs = parsedate_to_datetime((date or b"").decode("latin-1")).replace(tzinfo=UTC)
    except ValueError:
        return ours
    told = int((theirs - datetime.fromtimestamp(0, UTC)).total_seconds()) * SECOND_NS
    return ours if -SECOND_NS < ours - told < 3 * SECOND_NS else told + SECOND_NS
