"""The same bytes to many callers: written through to those that read, held back a while for those that do not.

A write to a caller costs some 10 microseconds, most of it the kernel's; a task that wakes up for each would double it.
So a piece is encoded once, as a chunk of HTTP too, and written from here to each connection that takes it. Only what a
caller does not take is its own task's business.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

from errors import RunnerError
from streams import KEEP_ALIVE

PIECE = 64 * 1024
"""Bytes of what is written at once of messages that are sent again."""
LONGEST_LAG_S = 0.05
"""How long messages may wait to leave together, where there are so many callers that each write to all takes time."""


class Caller(Protocol):
    """A caller's connection, as far as it is written to from here."""

    def push(self, body: bytes, chunk: bytes) -> bool:
        """Write a piece at once (`chunk`: as a chunk of HTTP); False if the caller does not take it now."""

    def abort(self) -> None:
        """Cut the caller off."""


class Subscriber:
    """One caller: what is pushed goes through to its connection, until that does not take more; then it waits.

    Args:
        caller: the connection.
        limit: bytes that may wait; past it the caller is cut off.
    """

    __slots__ = ("_caller", "_error", "_first", "_held", "_limit", "_size", "_through", "_wanted")

    def __init__(self, caller: Caller, limit: int) -> None:
        self._caller = caller
        self._limit = limit
        self._first: list[bytes] = []
        self._held: list[bytes] = []
        self._size = 0
        self._through = False
        self._error: RunnerError | None = None
        self._wanted: asyncio.Future[None] | None = None

    def begin(self, frames: Iterable[bytes]) -> None:
        """What is to be sent first. It counts for nothing in the limit: the bytes are the journal's."""
        self._first = list(frames)

    def push(self, body: bytes, chunk: bytes) -> None:
        """Send a piece, now or when the caller takes it."""
        if self._through and self._caller.push(body, chunk):
            return
        self._through = False
        if self._size <= self._limit:
            self._held.append(body)
            self._size += len(body)
            if self._size > self._limit:
                self._held = []
                self._caller.abort()
            self._wake()

    def end(self, error: RunnerError) -> None:
        """Say in-band that this is the end, and why."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def deliver(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what waits, as the caller takes it; returns never.

        Raises:
            RunnerError: the end.
        """
        for piece in _pieces(self._first):
            await send(piece)
        self._first = []
        while True:
            while self._held:
                held, self._held = self._held, []
                for piece in held:
                    await send(piece)
                    self._size -= len(piece)
            if self._error is not None:
                raise self._error
            self._through = True
            self._wanted = asyncio.get_running_loop().create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None


def _pieces(frames: list[bytes]) -> Iterator[bytes]:
    """The frames, joined to pieces that are worth a write each."""
    piece: list[bytes] = []
    size = 0
    for frame in frames:
        piece.append(frame)
        size += len(frame)
        if size >= PIECE:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)


class Fanout:
    """Subscribers that get the same messages.

    Args:
        keep_alive_s: when nothing was said for so long, a comment tells that the stream lives.
    """

    def __init__(self, keep_alive_s: float) -> None:
        self._keep_alive_s = keep_alive_s
        self._loop = asyncio.get_running_loop()
        self._subscribers: dict[Subscriber, None] = {}
        self._unsent: list[bytes] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._said_at = self._loop.time()
        self._timer = self._loop.call_later(keep_alive_s, self._show_life)

    def attach(self, subscriber: Subscriber, frames: list[bytes]) -> None:
        """Send one these messages, and then what is published from now on."""
        self.flush()
        subscriber.begin(frames)
        self._subscribers[subscriber] = None

    def detach(self, subscriber: Subscriber) -> None:
        """Send one nothing more."""
        self._subscribers.pop(subscriber, None)

    def publish(self, frames: list[bytes]) -> None:
        """Send messages to all, at once or soon: see `_flushed`."""
        self._unsent += frames
        if self._flushing is None:
            wait_s = self._not_before - self._loop.time()
            if wait_s > 0:
                self._flushing = self._loop.call_later(wait_s, self.flush)
            else:
                self.flush()

    def flush(self) -> None:
        """Send what waits to leave together."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self._unsent:
            began = time.perf_counter()
            body, self._unsent = b"".join(self._unsent), []
            self._push(body)
            self._loop.call_soon(self._flushed, began)

    def _push(self, body: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        self._said_at = self._loop.time()
        for subscriber in self._subscribers:
            subscriber.push(body, chunk)

    def _flushed(self, began: float) -> None:
        """All was written (the event loop does that after the turn). A write to 1,000 callers takes 10 ms; at that rate
        one event at a time would take all the time there is. So the next write comes after twice as long a pause."""
        pause_s = min(2 * (time.perf_counter() - began), LONGEST_LAG_S)
        if pause_s > 0.001:
            self._not_before = self._loop.time() + pause_s

    def _show_life(self) -> None:
        left_s = self._said_at + self._keep_alive_s - self._loop.time()
        if left_s <= 0:
            self.flush()
            self._push(KEEP_ALIVE)
            left_s = self._keep_alive_s
        self._timer = self._loop.call_later(left_s, self._show_life)

    def end(self, error: RunnerError) -> None:
        """Tell all that this is the end, and why."""
        self.flush()
        for subscriber in self._subscribers:
            subscriber.end(error)

    def close(self) -> None:
        """Set no more timers."""
        self._timer.cancel()
        if self._flushing is not None:
            self._flushing.cancel()
