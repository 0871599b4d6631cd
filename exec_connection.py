"""One exec whose connection is taken over from the engine.

It is taken over (101) before anything else is asked, so that output which comes at once is not lost. It ends when the
process has closed its output; only then is the exit code asked for. A process that closed its output and runs on is
waited for.

A terminal's input cannot be ended by closing it: the engine would close the output with it, and the process would
never know. What ends it is what a person types, Ctrl-D. Nor does the engine pass it on unread: at a sequence of keys
(Ctrl-P, Ctrl-Q, unless told otherwise) it detaches, so it is given one that nobody types.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from calls import Calls, Thing, segment
from engine_response import EngineResponse
from errors import RunnerError
from streams import STDOUT, FrameReader, FramingError

EXIT_LIMIT_S = 10.0
"""Seconds between the end of a process and its exit code; the engine needs a moment to note it."""
EXIT_POLL_S = (0.005, 0.25)
"""Seconds between two questions for an exit code, at first and at last."""

_END_OF_TRANSMISSION = b"\x04"
_UPGRADE = ((b"Connection", b"Upgrade"), (b"Upgrade", b"tcp"))

Begun = Callable[[str, "asyncio.Task[EngineResponse]"], None]
"""Told of an exec's id, and of its start while that is under way; whoever is told has it closed."""


class _Created(msgspec.Struct, rename="pascal"):
    id: str


class _State(msgspec.Struct, rename="pascal"):
    running: bool
    exit_code: int | None = None


class Exec:
    """An exec whose connection is taken over: `output`, `write`, `end_input`, `exit_code`. A context manager."""

    def __init__(self, calls: Calls, id_: str, stream: EngineResponse, *, tty: bool) -> None:
        self.id = id_
        self._calls = calls
        self._stream = stream
        self._tty = tty
        self._input_ended = False
        self._within_line = False

    @classmethod
    async def start(
        cls, calls: Calls, container: str, config: dict[str, Any], begun: Begun | None = None, *, resolved: bool = False
    ) -> "Exec":
        """Create an exec in a container and start it.

        Args:
            calls: the engine.
            container: id, prefix or name.
            config: fields of the engine's `ContainerExec`.
            begun: if given, the start goes on though its caller is cancelled: the engine may start what nobody waits
                for any more, and only its answer tells.
            resolved: the engine itself has named the container to us; see `Calls.open`.

        Raises:
            RunnerError: the engine refused, failed, or could not be reached.
        """
        path = f"/containers/{segment(Thing.CONTAINER, container)}/exec"
        tty = bool(config.get("Tty"))
        if tty:
            config = {**config, "DetachKeys": ",".join(("ctrl-^", *secrets.token_hex(8)))}
        try:
            answer = await calls.call("POST", path, json=config, resolved=resolved)
            created = msgspec.json.decode(answer, type=_Created)
        except msgspec.DecodeError as error:
            raise RunnerError("engine_garbage", f"the engine created an exec and gave no id: {error}") from error
        opening = calls.open(
            "POST",
            f"/exec/{created.id}/start",
            json={"Detach": False, "Tty": tty},
            headers=_UPGRADE,
            thing=Thing.EXEC,
            resolved=True,
        )
        if begun is None:
            return cls(calls, created.id, await opening, tty=tty)
        starting = calls.background(opening)
        begun(created.id, starting)
        return cls(calls, created.id, await asyncio.shield(starting), tty=tty)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Its output as it comes: (`STDOUT` or `STDERR`, bytes). With a terminal everything is `STDOUT`.

        Raises:
            RunnerError: `exec_failed`: the stream broke.
        """
        reader = FrameReader()
        try:
            async for chunk in self._stream.chunks():
                if self._tty:
                    yield STDOUT, chunk
                else:
                    for piece in reader.feed(chunk):
                        yield piece
        except (RunnerError, FramingError) as error:
            raise RunnerError("exec_failed", f"the exec's output broke off: {error}") from error
        if not reader.between_frames:
            raise RunnerError("exec_failed", "the exec's output broke off")

    async def write(self, data: bytes) -> None:
        """Give it input; waits while it does not read. After the input's or the process's end this does nothing."""
        if data and not self._input_ended:
            self._within_line = data[-1:] not in b"\r\n"
            with contextlib.suppress(RunnerError):
                await self._stream.write(data)

    async def end_input(self) -> None:
        """End its input; may be said more than once. Waits while it does not read."""
        if self._input_ended:
            return
        self._input_ended = True
        if self._tty:
            # Within a line the first only hands over what was typed of it.
            with contextlib.suppress(RunnerError):
                await self._stream.write(_END_OF_TRANSMISSION * (2 if self._within_line else 1))
        else:
            self._stream.write_eof()

    async def exit_code(self) -> int:
        """Its exit code, once its output has ended; waits while it runs on without any.

        Raises:
            RunnerError: `exec_failed`: the engine does not say. The command may have run: never retryable.
        """
        now = asyncio.get_running_loop().time
        pause_s, longest_s = EXIT_POLL_S
        try:
            async with asyncio.timeout(EXIT_LIMIT_S) as patience:
                while True:
                    answer = await self._calls.call(
                        "GET", f"/exec/{self.id}/json", thing=Thing.EXEC, own=True, resolved=True
                    )
                    state = msgspec.json.decode(answer, type=_State)
                    if state.running:
                        patience.reschedule(now() + EXIT_LIMIT_S)
                    elif state.exit_code is not None:
                        return state.exit_code
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
        except TimeoutError:
            raise RunnerError("exec_failed", "the exec ended, but the engine does not say how") from None
        except (RunnerError, msgspec.DecodeError) as error:
            raise RunnerError("exec_failed", f"the exec ended, but not how is known: {error}") from error

    async def resize(self, rows: int, cols: int) -> None:
        """Set the size of its terminal."""
        await resize(self._calls, self.id, rows, cols)

    def close(self) -> None:
        """Close its connection now; whether the process goes on is its own affair."""
        self._stream.close()

    def __enter__(self) -> "Exec":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def resize(calls: Calls, exec_id: str, rows: int, cols: int) -> None:
    """Set the size of an exec's terminal."""
    await calls.call("POST", f"/exec/{segment(Thing.EXEC, exec_id)}/resize", {"h": rows, "w": cols}, thing=Thing.EXEC)
