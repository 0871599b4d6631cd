"""Request bodies: gathered, hashed and bounded before they are verified, or verified chunk by chunk as they pass.

A `Body` is kept in memory up to 1 MiB and past that in an unlinked temporary file, so that any number of uploads costs
little memory; it is hashed as it arrives. Writing and hashing of large bodies happen in a worker thread, a mebibyte at
a time, so that one upload does not delay the other requests, while the next mebibyte arrives. `SignedChunks` keep one
chunk and nothing else.
"""

import asyncio
import hashlib
import logging
import os
import tempfile
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from io import FileIO
from typing import Any, TypeVar

from client import EMPTY_BODY_HASH
from errors import RunnerError
from streams import Data, Gathered, SignedChunkError, SignedChunkReader

log = logging.getLogger("docker_runner.bodies")

R = TypeVar("R")

IN_MEMORY = 1024 * 1024
"""Bytes of one body that are kept in memory; also the size of the pieces a spooled body is written and read in: while
one is on its way to or from the file, another arrives or leaves."""


class Budget:
    """A bound that several bodies share, in bytes: what they hold together before they are verified."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Reserve `size` bytes.

        Raises:
            RunnerError: `unverified_bodies_full`; nothing was reserved.
        """
        if self.used + size > self.limit:
            raise RunnerError("unverified_bodies_full", "too many bytes of unverified bodies are held; try again soon")
        self.used += size

    def give(self, size: int) -> None:
        """Return what was reserved."""
        self.used -= size


class Body:
    """A request body: `write` while it arrives, then `data` or `chunks`, then `close`."""

    __slots__ = ("_file", "_hash", "_memory", "_work", "size")

    def __init__(self) -> None:
        self.size = 0
        self._memory = Gathered()
        self._hash: hashlib._Hash | None = None
        self._file: FileIO | None = None
        self._work: asyncio.Future[Any] | None = None

    async def write(self, chunk: bytes) -> None:
        """Append a chunk; waits while the file is slower than what arrives.

        Raises:
            RunnerError: `spool_failed`, the temporary file could not be written.
        """
        self.size += len(chunk)
        self._memory.add(chunk)
        if self._memory.size > IN_MEMORY:
            await self._kept()
            self._begin(self._spool, self._memory.take())

    async def finish(self) -> str:
        """The body is complete: return its BODYHASH. Raises as `write`."""
        if self._work is None:
            return b64encode(hashlib.sha256(self._memory.whole()).digest()).decode() if self.size else EMPTY_BODY_HASH
        await self._kept()
        self._begin(self._spool, self._memory.take())
        await self._kept()
        assert self._hash is not None
        return b64encode(self._hash.digest()).decode()

    @property
    def data(self) -> bytes | None:
        """The whole body, or None where it is too long for memory."""
        return self._memory.whole() if self._file is None else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The whole body from its start, in pieces; the next is read while one is with the taker."""
        if self._file is None:
            yield self._memory.whole()
            return
        file, at = self._file.fileno(), 0
        reading = self._begin(os.pread, file, IN_MEMORY, at)
        while piece := await asyncio.shield(reading):
            at += len(piece)
            reading = self._begin(os.pread, file, IN_MEMORY, at)
            yield piece

    async def read(self, limit: int | None = None) -> bytes | bytearray:
        """The whole body in memory, once. How long it is, is known before: `limit` is for `SignedChunks`."""
        if self._file is None:
            return self._memory.whole()
        whole = bytearray(self.size)
        view, at = memoryview(whole), 0
        while read := await asyncio.shield(self._begin(os.preadv, self._file.fileno(), [view[at:]], at)):
            at += read
        return whole

    def close(self) -> None:
        """Free the memory and the temporary file."""
        self._memory = Gathered()
        if self._work is not None:
            # A thread may still use the file: closed under its hands, its descriptor's number could be a socket's.
            self._work.add_done_callback(self._close_file)

    def _close_file(self, work: "asyncio.Future[Any]") -> None:
        if not work.cancelled():
            work.exception()  # Whoever closes has no use for it.
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, function: Callable[..., R], *arguments: Any) -> "asyncio.Future[R]":
        """Do something with the file in a thread, after what was begun before; who gives up waiting does not end it."""
        before = self._work

        async def work() -> R:
            if before is not None and not before.done():
                await asyncio.wait((before,))
            return await asyncio.to_thread(function, *arguments)

        begun = self._work = asyncio.ensure_future(work())
        return begun

    async def _kept(self) -> None:
        """Wait until what was given to the file is in it."""
        if self._work is None:
            return
        try:
            await asyncio.shield(self._work)
        except OSError as error:
            # Strangers may cause this: what exactly went wrong, and where, is for the log.
            log.error("a request's body could not be kept in a temporary file: %s; look at TMPDIR (or /tmp)", error)
            raise RunnerError("spool_failed", "the body could not be kept on disk; try again soon") from error

    def _spool(self, pieces: list[Data]) -> None:
        if self._file is None:
            self._hash = hashlib.sha256()
            # Unbuffered: what is written is in the file, and a full disk is told here and not at close.
            self._file = tempfile.TemporaryFile(prefix="docker-runner-", buffering=0)
        assert self._hash is not None
        for piece in pieces:
            self._hash.update(piece)
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]


NO_BODY = Body()
"""The body of a request without one."""


class SignedChunks:
    """A request body that comes as signed chunks: given out as it is verified. In place of a `Body`.

    Args:
        reader: verifies.
        receive: of ASGI, the request's.
        limit: bytes of data altogether.
        limit_in_memory: bytes for `read`.
        pause_s: longest time without a byte, while one is waited for. Time that the taker needs does not count.
    """

    size = None
    data = None

    def __init__(
        self, reader: SignedChunkReader, receive: Callable[[], Any], *, limit: int, limit_in_memory: int, pause_s: float
    ) -> None:
        self._reader = reader
        self._receive = receive
        self._limit = limit
        self._limit_in_memory = limit_in_memory
        self._pause_s = pause_s
        self._left = limit
        self._verified: list[Data] = []
        self._complete = False

    async def begin(self) -> None:
        """Wait for the first chunk, or the end. Nothing is forwarded before; raises as `chunks`."""
        while not self._verified and not self._complete:
            await self._read_on()

    async def chunks(self) -> AsyncIterator[Data]:
        """The verified data, piece by piece.

        Raises:
            RunnerError: `invalid_chunk`, `body_too_large`, `request_timeout`; what was given out before is not the
                whole body.
        """
        while self._verified or not self._complete:
            verified, self._verified = self._verified, []
            for data in verified:
                yield data
            if not self._complete:
                await self._read_on()

    async def read(self, limit: int | None = None) -> bytes:
        """The whole body in memory, of at most `limit` bytes (or `limit_in_memory`); raises as `chunks`."""
        limit = self._limit_in_memory if limit is None else limit
        whole = bytearray()
        async for data in self.chunks():
            whole += data
            if len(whole) > limit:
                raise too_large(limit)
        return bytes(whole)

    def close(self) -> None:
        """Nothing to free."""

    async def _read_on(self) -> None:
        try:
            async with asyncio.timeout(self._pause_s):
                message = await self._receive()
        except TimeoutError:
            raise RunnerError("request_timeout", "the body stopped arriving") from None
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        try:
            for data in self._reader.feed(message["body"]):
                self._left -= len(data)
                if self._left < 0:
                    raise too_large(self._limit)
                self._verified.append(data)
        except SignedChunkError as error:
            raise RunnerError("invalid_chunk", str(error)) from error
        if not message["more_body"]:
            if not self._reader.ended:
                raise RunnerError("invalid_chunk", "the body ended without the chunk that ends it")
            self._complete = True


def too_large(limit: int) -> RunnerError:
    """The refusal of a body over a limit in bytes."""
    return RunnerError("body_too_large", f"the body is longer than the limit of {limit} bytes")
