"""Event loops for tests: uvloop, which serves in production, and asyncio's own; they differ in many details."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}

Run = Callable[[Coroutine[Any, Any, None]], None]


def run_on(loop: str) -> Run:
    """A function that runs a test's coroutine to its end, in bounded time, and sees that it leaves no task behind."""

    async def bounded(test: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(30):
            await test
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, 1)

    def run(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(bounded(test))

    return run


async def until(condition: Callable[[], object], limit_s: float = 10) -> None:
    """Wait until something has come true, while the loop runs."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
