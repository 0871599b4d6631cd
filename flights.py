"""Single flight: who wants the same image at the same time waits for one pull, and sees its progress or its error.

The same is: reference, platform, and credentials. A caller without credentials, or with others, never rides on a pull
that was given some: it has a flight of its own, and the registry's own answer. Policy is the caller's affair, too, and
was asked before (`images.py`).

A pull lasts as long as somebody waits for it: who leaves does not end it for the others, and the last one does. Who
joins late is told where it stands first: the last line of each layer so far. So is who reads so slowly that more than
`MAX_PENDING` bytes wait for it; the pull itself waits for nobody.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import urlencode

import msgspec

from dockerapi import Engine
from engine_response import EngineResponse
from errors import RunnerError
from streams import LineFramer

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an engine's answer that is no progress."""
MAX_PENDING = 256 * 1024
"""Bytes of progress that wait for one reader; past it they are replaced by a summary."""
MAX_SUMMARY = 1024
"""Layers (and lines that are of none) in a summary; the oldest go first."""
LONGEST_SUMMARISED = 4096
"""Bytes of a line that a summary holds; longer ones pass, and are not remembered."""


class Wanted(msgspec.Struct, frozen=True):
    """An image to be had.

    Args:
        inspect: the target that tells whether it is there; None to pull it in any case.
        repository, version: what is pulled.
        platform: for which.
        auth: `X-Registry-Auth`, encoded, if there is any.
    """

    inspect: str | None
    repository: str
    version: str
    platform: str | None
    auth: bytes | None

    def target(self) -> str:
        """Of the pull."""
        query = {"fromImage": self.repository, "tag": self.version}
        if self.platform is not None:
            query["platform"] = self.platform
        return "/images/create?" + urlencode(query)

    def key(self) -> tuple[str | None, str, bytes | None]:
        """What is the same flight. Of credentials only a hash is held beyond their use."""
        return self.inspect, self.target(), self.auth and hashlib.sha256(self.auth).digest()


class Refused(Exception):  # noqa: N818
    """The engine refused, before there was any progress: its status and body, for each caller to tell in its way."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Flights:
    """The pulls that go on.

    Args:
        engine: who pulls.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._flights: dict[object, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def ensure(self, wanted: Wanted) -> AsyncGenerator[bytes, None]:
        """Have an image; yields the lines of the pull's progress, if it has to be pulled. To be closed (`aclosing`).

        Raises:
            Refused: by the engine.
            RunnerError: the engine failed, or an error stands in the progress.
        """
        key = wanted.key()
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(_pulled(self._engine, wanted))
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        reader = flight.join()
        try:
            async for line in reader.lines():
                yield line
        finally:
            if flight.leave(reader):
                self._forget(key, flight)

    def _forget(self, key: object, flight: "_Flight") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Reader:
    """One caller's view of a flight."""

    def __init__(self, flight: "_Flight") -> None:
        self._flight = flight
        self._pending: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._catch_up()

    def add(self, line: bytes) -> None:
        """The flight has progressed."""
        self._pending.append(line)
        self._size += len(line)
        if self._size > MAX_PENDING:
            self._catch_up()
        self._changed.set()

    def ended(self) -> None:
        """The flight has."""
        self._changed.set()

    def _catch_up(self) -> None:
        self._pending = deque(self._flight.summary.values())
        self._size = sum(map(len, self._pending))

    async def lines(self) -> AsyncIterator[bytes]:
        """The progress; raises what ended it."""
        while True:
            while self._pending:
                line = self._pending.popleft()
                self._size -= len(line)
                yield line
            if self._flight.task.done():
                self._flight.landed()
                return
            self._changed.clear()
            await self._changed.wait()


class _Flight:
    """One pull, and who waits for it."""

    def __init__(self, progress: AsyncIterator[tuple[bytes, object]]) -> None:
        self.summary: dict[object, bytes] = {}
        """The last line of each layer; lines of none, each."""
        self._readers: set[_Reader] = set()
        self.task = asyncio.create_task(self._fly(progress))
        self.task.add_done_callback(self._tell_the_end)

    def join(self) -> _Reader:
        """A caller comes."""
        reader = _Reader(self)
        self._readers.add(reader)
        return reader

    def leave(self, reader: _Reader) -> bool:
        """A caller goes; True: it was the last one, and the pull is ended with it."""
        self._readers.discard(reader)
        if not self._readers:
            self.task.cancel()
        return not self._readers

    def landed(self) -> None:
        """Raise what ended the flight, if that was an error: anew, for each caller has a traceback of its own."""
        error = self.task.exception()
        if isinstance(error, RunnerError):
            raise RunnerError(error.code, error.message, status=error.status, retryable=error.retryable)
        if isinstance(error, Refused):
            raise Refused(error.status, error.body)
        if error is not None:
            raise RuntimeError("a pull that others began broke on a defect") from error

    async def _fly(self, progress: AsyncIterator[tuple[bytes, object]]) -> None:
        async for line, layer in progress:
            self._remember(line, layer)
            for reader in self._readers:
                reader.add(line)

    def _tell_the_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # Somebody has seen it, whoever still waits.
        for reader in self._readers:
            reader.ended()

    def _remember(self, line: bytes, layer: object) -> None:
        if len(line) <= LONGEST_SUMMARISED:
            self.summary[layer] = line
        if len(self.summary) > MAX_SUMMARY:
            del self.summary[next(iter(self.summary))]


class _Progress(msgspec.Struct):
    error: str | None = None
    id: Any = None


async def _pulled(engine: Engine, wanted: Wanted) -> AsyncIterator[tuple[bytes, object]]:
    """Pull the image, unless it is there; yields the engine's progress, a JSON document each, and of which layer."""
    if wanted.inspect is not None:
        with await engine.request(b"GET", wanted.inspect.encode()) as response:
            answer = await response.read(MAX_ANSWER)
            if response.status == 200:
                return
            if response.status != 404:
                raise Refused(response.status, answer)
    headers = () if wanted.auth is None else ((b"X-Registry-Auth", wanted.auth),)
    with await engine.request(b"POST", wanted.target().encode(), headers, b"") as response:
        if response.status >= 300:
            raise Refused(response.status, await response.read(MAX_ANSWER))
        async for step in _steps(response):
            yield step


async def _steps(response: EngineResponse) -> AsyncIterator[tuple[bytes, object]]:
    framer = LineFramer()
    async for chunk in response.chunks():
        for line in framer.feed(chunk).splitlines():
            if line.strip():
                yield line, _layer(line)
    if framer.tail().strip():
        raise RunnerError("image_ensure_failed", "the pull's progress broke off")


def _layer(line: bytes) -> object:
    """What a line of progress is of: lines of the same replace one another. Raises the error that stands in it."""
    try:
        progress = msgspec.json.decode(line, type=_Progress)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunnerError("image_ensure_failed", f"the pull's progress is not JSON: {error}") from error
    if progress.error is not None:
        raise RunnerError("image_ensure_failed", progress.error)
    return progress.id if isinstance(progress.id, str) else object()
