"""Request bodies that are gathered before they are verified (`bodies.Body`): in memory, or in a file."""

import asyncio
import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from bodies import IN_MEMORY, Body
from client import body_hash
from dev import wait_until
from errors import RunnerError
from streams import Data

NOISE = bytes(itertools.islice(itertools.cycle(range(251)), 4 * IN_MEMORY))
"""Longer than what is ever held; no two of its pages are alike."""


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 30))


def open_files() -> int:
    """How many files without a name this process has open: those of bodies, and pytest's."""
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # That of the listing itself.
            count += os.readlink(each).endswith("(deleted)")
    return count


async def gathered(data: bytes, sizes: list[int]) -> Body:
    """A body that came in pieces of these sizes, over and over."""
    body, at = Body(), 0
    for size in itertools.cycle(sizes):
        if at >= len(data):
            return body
        await body.write(data[at : at + size])
        at += size
    return body


lengths = st.sampled_from((0, 1, 1000, IN_MEMORY - 1, IN_MEMORY, IN_MEMORY + 1, 2 * IN_MEMORY, 3 * IN_MEMORY + 17))


@given(lengths, st.lists(st.sampled_from((5000, 16_383, 16_384, 70_000, 256_000, 700_000)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_body_is_what_came_however_it_came(length: int, sizes: list[int]) -> None:
    async def test() -> None:
        data = NOISE[:length]
        body = await gathered(data, sizes)
        try:
            assert await body.finish() == body_hash(data)
            assert body.size == length
            assert b"".join([piece async for piece in body.chunks()]) == data
            assert bytes(await body.read()) == data
            assert body.data == (data if length <= IN_MEMORY else None)
        finally:
            body.close()

    run(test())


def test_it_can_be_given_out_again_after_it_was_left_half_way() -> None:
    async def test() -> None:
        body = await gathered(NOISE, [256_000])
        await body.finish()
        async for _ in body.chunks():
            break
        assert bytes(await body.read()) == NOISE
        body.close()

    run(test())


class Stuck(Body):
    """A body whose file takes nothing until it is told to."""

    __slots__ = ("go", "spooled")

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.spooled = 0

    def _spool(self, pieces: list[Data]) -> None:
        assert self.go.wait(20)
        super()._spool(pieces)
        self.spooled += sum(map(len, pieces))


def test_while_the_file_is_slow_no_more_is_taken_than_two_pieces() -> None:
    async def test() -> None:
        body, taken = Stuck(), 0

        async def fill() -> None:
            nonlocal taken
            for at in range(0, len(NOISE), 64 * 1024):
                await body.write(NOISE[at : at + 64 * 1024])
                taken += 64 * 1024

        filling = asyncio.ensure_future(fill())
        for _ in range(1000):
            await asyncio.sleep(0)
        assert IN_MEMORY < taken <= 2 * IN_MEMORY + 64 * 1024
        body.go.set()
        await filling
        assert await body.finish() == body_hash(NOISE)
        assert body.spooled == len(NOISE)
        body.close()

    run(test())


def test_a_file_that_a_thread_is_at_work_on_is_closed_after_that() -> None:
    async def test() -> None:
        body, others = Stuck(), open_files()
        await body.write(NOISE)
        ending = asyncio.ensure_future(body.finish())
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        body.close()
        body.go.set()
        assert await asyncio.to_thread(wait_until, lambda: body.spooled == len(NOISE) and open_files() == others, 5)

    run(test())


@pytest.mark.parametrize("length", [IN_MEMORY + 1, len(NOISE)])
def test_a_file_that_cannot_be_made_is_told(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))

    async def test() -> None:
        with pytest.raises(RunnerError) as told:
            await (await gathered(NOISE[:length], [256_000])).finish()
        assert (told.value.code, told.value.retryable) == ("spool_failed", True)

    run(test())
