"""The processes of an exec, ended inside their container.

The engine can start a process in a container and has no call that ends it. So an exec that may have to be ended bears a
mark, a random variable in its environment, which whatever it starts inherits. To end it, shells in the container look
for the mark (`process_look.py`): SIGTERM, a short grace, then SIGKILL until two looks in a row find none. Where it
cannot be shown that nothing is left, the reason is told.

What has lost the mark, has left the exec's sessions *and* has been orphaned before the look cannot be told from the
container's own processes.
"""

import asyncio
import contextlib
import logging
import math
import secrets
from typing import Any, TypeVar

import msgspec

from calls import Calls, Thing, decoded, segment
from engine_response import EngineResponse
from errors import RunnerError
from process_look import PAUSE_S, Looks

LIMIT_S = 3.5
"""Seconds to end an exec: callers give up 5 s after their time limit, and are told before."""
SETTLE_S = 0.5
"""Seconds in which the engine must have noted that the exec has ended, where only the engine can tell."""
MAX_EXECS = 100
"""Execs of a container that are asked for one by one."""
TICKS = 100
"""`starttime` of proc(5) is in these, a second: the same on every architecture of today."""

_MARK = "DR_EXEC"

R = TypeVar("R")

log = logging.getLogger("docker_runner.execs")


class Tree:
    """The processes of one exec: marked before it starts, ended if need be. A context manager.

    Args:
        calls: the engine.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._mark = f"{_MARK}={secrets.token_hex(16)}"
        self._exec = ""
        self._began = 0.0
        self._starting: asyncio.Task[EngineResponse] | None = None
        self._ending: asyncio.Task[str] | None = None

    def marked(self, config: dict[str, Any]) -> dict[str, Any]:
        """The engine's `ContainerExec`, with the mark in its environment. The last of two of a name counts."""
        return {**config, "Env": [*config.get("Env", ()), self._mark]}

    def begun(self, exec_id: str, starting: "asyncio.Task[EngineResponse]") -> None:
        """The exec is being started: for `Exec.start`."""
        self._exec, self._starting = exec_id, starting
        self._began = asyncio.get_running_loop().time()

    def end(self) -> "asyncio.Task[str]":
        """Begin to end it, whatever becomes of who asks; may be said more than once.

        Returns:
            A task whose result is why some of it may still run, or empty. It takes `LIMIT_S` at most.
        """
        if self._ending is None:
            self._ending = self._calls.endings.begin(self._end_in_time())
        return self._ending

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ending is None:
            self._release()

    def _release(self) -> None:
        """Close its connection, now or when it stands."""
        if self._starting is not None:
            self._starting.add_done_callback(_close)
            self._starting.cancel()

    async def _end_in_time(self) -> str:
        if self._starting is None:
            return ""
        try:
            async with asyncio.timeout(LIMIT_S), self._calls.endings.places:
                left = await self._end(self._starting)
        except TimeoutError:
            left = f"they had not ended after {LIMIT_S} s"
        except RunnerError as error:
            left = error.message
        finally:
            self._release()
        if left:
            log.warning("processes of the exec %s may still run: %s", self._exec, left)
        else:
            log.info("the processes of the exec %s have been ended", self._exec)
        return left

    async def _end(self, starting: "asyncio.Task[EngineResponse]") -> str:
        # Until its start is answered, a look may come too early. What the answer is tells less than a look.
        await asyncio.wait((starting,))
        self._release()
        state = await self._state(self._exec)
        if state is None:
            return ""
        container = state.container_id
        try:
            with Looks(self._calls, container, self._arguments) as looks:
                await looks.end_all()
                # What was found and is no more has ended; the engine may take 2 s to note it.
                if looks.found_main or await self._has_ended() or await self._adopt(container, looks):
                    return looks.unknown()
        except RunnerError as error:
            # A container that runs no more has no processes.
            inspected = await _inspected(self._calls, container)
            return error.message if inspected is not None and inspected.state.running else ""
        return "the engine says that it runs on, and which process it is cannot be told"

    def _arguments(self) -> list[str]:
        """Of the shell but for its own mark."""
        age_s = asyncio.get_running_loop().time() - self._began
        return [self._mark, str(math.ceil((age_s + 1) * TICKS))]

    async def _state(self, exec_id: str) -> "_State | None":
        """What the engine says of an exec; None if it is gone, as with its container."""
        try:
            return await _asked(self._calls, f"/exec/{segment(Thing.EXEC, exec_id)}/json", _State, Thing.EXEC)
        except RunnerError as error:
            if error.code == "no_such_exec":
                return None
            raise

    async def _has_ended(self) -> bool:
        """Whether the engine says so, within a while."""
        pause_s, longest_s = PAUSE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while (state := await self._state(self._exec)) is not None and state.running:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
                return True
        return False

    async def _adopt(self, container: str, looks: Looks) -> bool:
        """End an exec whose own process has lost its mark, and nothing else of it has one.

        It is known only where it is the one exec that runs in the container, before and after a look that finds one
        process from outside: then that one is it.
        """
        if not await self._alone(container, looks):
            return False
        found = await looks.look("0")
        # Of a session that it leads: nothing else can be of that one.
        sessions = {session for pid, session in found.roots.items() if pid == session}
        if len(found.roots) != 1 or not sessions or not await self._alone(container, looks):
            return False
        looks.sessions |= sessions
        await looks.end_all()
        return await self._has_ended()

    async def _alone(self, container: str, looks: Looks) -> bool:
        """Whether it is the only exec that runs in the container, beside those that look."""
        inspected = await _inspected(self._calls, container)
        if inspected is None:
            return False
        others = set(inspected.exec_ids or ()) - looks.execs - {self._exec}
        states = [await self._state(each) for each in sorted(others)[:MAX_EXECS]]
        return len(others) <= MAX_EXECS and not any(state is not None and state.running for state in states)


class _State(msgspec.Struct, rename="pascal"):
    """What is read of an `ExecInspect`."""

    running: bool
    container_id: str = msgspec.field(name="ContainerID")


class _ContainerState(msgspec.Struct, rename="pascal"):
    running: bool


class _Container(msgspec.Struct, rename="pascal"):
    """What is read of a `ContainerInspect`."""

    state: _ContainerState
    exec_ids: list[str] | None = msgspec.field(default=None, name="ExecIDs")


async def _asked(calls: Calls, path: str, form: type[R], thing: Thing = Thing.CONTAINER) -> R:
    """A question of the runner's own, about what the engine itself has named."""
    return decoded(await calls.call("GET", path, thing=thing, own=True, resolved=True), form)


async def _inspected(calls: Calls, container: str) -> _Container | None:
    """A container; None if there is none any more."""
    try:
        return await _asked(calls, f"/containers/{segment(Thing.CONTAINER, container)}/json", _Container)
    except RunnerError as error:
        if error.code == "no_such_container":
            return None
        raise


def _close(starting: "asyncio.Task[EngineResponse]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
