"""Commands in containers: run to their end within time limits, or interactive over a WebSocket."""

import asyncio
import codecs
import contextlib
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from admission import Connection
from calls import Calls, Thing, segment
from errors import RunnerError
from exec_connection import Exec
from process_tree import Tree
from streams import STDERR, STDOUT, Tail

KILL_GRACE_S = 10
"""Seconds that a container gets to end by itself, when a timed-out exec has it stopped."""
LEAVE_LIMIT_S = 10.0
"""Seconds for a client that has said goodbye to take what is on its way to it."""
LAST_INPUT_S = 0.2
"""Seconds for the end of the input to leave, before the engine's connection is closed."""
LAST_OUTPUT = 256 * 1024
"""Bytes of output that an exit frame repeats, of each stream."""

# Runs "$@", copying its output to the first process's: for logs that show what execs said. The copies must not
# change the outcome: a `tee` that cannot write there, or no longer (SIGPIPE), still passes on what it reads.
_LOG_TO_PID1 = (
    'exec 4>&1; { { "$@" 2>&3 3>&- 4>&- | { trap "" PIPE; tee /proc/1/fd/1 >&4 3>&- 2>/dev/null; true; }; } 3>&1'
    ' | { trap "" PIPE; tee /proc/1/fd/2 >&2 2>/dev/null; true; }; }'
)


def argv(command: str | list[str], *, log_to_pid1: bool = False) -> list[str]:
    """A command as the engine takes it: a string goes to a login shell, a list is taken as it is."""
    words = ["/bin/sh", "-lc", command] if isinstance(command, str) else command
    return ["bash", "-o", "pipefail", "-c", _LOG_TO_PID1, "bash", *words] if log_to_pid1 else words


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one command: milliseconds (0: none) and bytes."""

    timeout_ms: int
    idle_timeout_ms: int
    max_output: int


class _Output:
    """What a command has said, as text: characters across chunk borders whole, invalid bytes replaced."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._text: dict[int, list[str]] = {STDOUT: [], STDERR: []}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in self._text}

    def add(self, stream: int, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise RunnerError("output_too_large", f"the command's output is longer than {self._limit} bytes")
        self._text[stream].append(self._decoders[stream].decode(piece))

    def texts(self) -> dict[str, str]:
        """The answer's `stdout` and `stderr`."""
        ends = {stream: decoder.decode(b"", final=True) for stream, decoder in self._decoders.items()}
        return {
            "stdout": "".join((*self._text[STDOUT], ends[STDOUT])),
            "stderr": "".join((*self._text[STDERR], ends[STDERR])),
        }


class _Deadline:
    """When a command's time is up. Both limits run from here: a start that hangs is part of what the caller waits for.

    Args:
        limits: 0 is none.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._now = asyncio.get_running_loop().time
        self._end = self._now() + limits.timeout_ms / 1000 if limits.timeout_ms else None
        self._idle = False

    def next(self) -> float | None:
        """The loop's time at which it is, if nothing is said from now on; None for never."""
        idle_s = self._limits.idle_timeout_ms / 1000
        quiet = self._now() + idle_s if idle_s else None
        self._idle = quiet is not None and (self._end is None or quiet < self._end)
        return quiet if self._idle else self._end

    def passed(self, output: _Output) -> RunnerError:
        """The error that tells which limit it was, with the output so far."""
        details = output.texts()
        if self._idle:
            told = f"Exec idle timed out after {self._limits.idle_timeout_ms}ms"
            return RunnerError("exec_idle_timeout", told, details=details)
        return RunnerError("exec_timeout", f"Exec timed out after {self._limits.timeout_ms}ms", details=details)


class Ran(msgspec.Struct, rename="camel"):
    """The answer of `/v1/exec/run`. With a terminal everything is `stdout`."""

    stdout: str
    stderr: str
    exit_code: int


async def run(calls: Calls, container: str, config: dict[str, Any], limits: Limits, tree: Tree, *, stop: bool) -> Ran:
    """Run a command to its end: its output as text, and its exit code.

    Args:
        calls: the engine.
        container: id, prefix or name.
        config: fields of the engine's `ContainerExec`.
        limits: what ends it otherwise.
        tree: its processes; ended with it, at a limit.
        stop: at a time limit, have the container stopped instead.

    Raises:
        RunnerError: the engine refused; `exec_timeout`, `exec_idle_timeout`, `output_too_large`, `exec_failed`.
    """
    output = _Output(limits.max_output)
    deadline = _Deadline(limits)
    started = False
    try:
        async with asyncio.timeout_at(deadline.next()) as patience:
            with await Exec.start(calls, container, tree.marked(config), tree.begun) as process:
                started = True
                async for stream, piece in process.output():
                    output.add(stream, piece)
                    patience.reschedule(deadline.next())
                code = await process.exit_code()
    except TimeoutError:
        error = deadline.passed(output)
        if stop:
            path = f"/containers/{segment(Thing.CONTAINER, container)}/stop"
            calls.background(_quietly(calls, path))
            raise error from None
        raise await _ended(tree, error) from None
    except RunnerError as error:
        if error.code == "output_too_large":
            raise await _ended(tree, error) from None
        if started and error.retryable:
            raise RunnerError("exec_failed", error.message) from error
        raise
    return Ran(**output.texts(), exit_code=code)


async def _ended(tree: Tree, error: RunnerError) -> RunnerError:
    """The error that a command ends with, once its processes are ended too; it says so if they may not be."""
    left = await asyncio.shield(tree.end())
    if not left:
        return error
    message = f"{error.message}; its processes may still run: {left}"
    return RunnerError(error.code, message, details={**(error.details or {}), "mayStillRun": left})


async def _quietly(calls: Calls, path: str) -> None:
    with contextlib.suppress(RunnerError):
        await calls.call("POST", path, {"t": KILL_GRACE_S}, accept=(304,))


class _Frame(msgspec.Struct):
    """Any frame of the client's: what it is; the rest is decoded by that. Unknown types are ignored."""

    type: str = ""


class _Stdin(msgspec.Struct):
    data: bytes = b""


class _Size(msgspec.Struct):
    cols: int
    rows: int


class Session:
    """One interactive exec over an accepted WebSocket, from its start to the close of both.

    Args:
        socket: accepted.
        process: started; its connection is closed by who started it.
        merged: stderr goes in `stdout` frames.
    """

    def __init__(self, socket: WebSocket, process: Exec, *, merged: bool) -> None:
        self._socket = socket
        self._process = process
        self._merged = merged
        self._last = {STDOUT: Tail(LAST_OUTPUT), STDERR: Tail(LAST_OUTPUT)}

    async def run(self) -> None:
        """Carry bytes both ways until the process ends; the exit frame comes last.

        If the client leaves, this ends by the cancellation that its connection's loss brings.

        Raises:
            RunnerError: the engine's connection broke.
        """
        sending = asyncio.ensure_future(self._send_output())
        reading = asyncio.ensure_future(self._read_client())
        try:
            await asyncio.wait((sending, reading), return_when=asyncio.FIRST_COMPLETED)
            # Reading ends by an exception only, and comes first: once the client has left, nothing else matters.
            if reading.done():
                reading.result()
            sending.result()
        except WebSocketDisconnect:
            self._process.close()
            connection: Connection = self._socket.scope["docker_runner"]
            await asyncio.sleep(LEAVE_LIMIT_S)
            connection.abort()
            await asyncio.sleep(LEAVE_LIMIT_S)
        finally:
            sending.cancel()
            reading.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_INPUT_S):
                    await self._process.end_input()
            await asyncio.gather(sending, reading, return_exceptions=True)

    async def _send_output(self) -> None:
        await send(self._socket, {"type": "ready", "execId": self._process.id})
        async for stream, piece in self._process.output():
            stream = STDOUT if self._merged else stream
            self._last[stream].add(piece)
            await send(self._socket, {"type": "stdout" if stream == STDOUT else "stderr", "data": piece})
        code = await self._process.exit_code()
        ended = {"stdout": self._last[STDOUT].get(), "stderr": self._last[STDERR].get()}
        await send(self._socket, {"type": "exit", "execId": self._process.id, "exitCode": code, **ended})

    async def _read_client(self) -> None:
        """Take what the client sends; while the process does not read, neither does this."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            try:
                await self._take(message)
            except (msgspec.DecodeError, RecursionError) as error:
                await send(
                    self._socket,
                    {"type": "error", "error": f"not understood: {error}", **_error_fields("invalid_json")},
                )
            except RunnerError as error:
                await send(self._socket, error_frame(error))

    async def _take(self, message: Any) -> None:
        if message.get("bytes") is not None:
            await self._process.write(message["bytes"])
            return
        text = message.get("text") or "{}"
        match msgspec.json.decode(text, type=_Frame).type:
            case "stdin":
                await self._process.write(msgspec.json.decode(text, type=_Stdin).data)
            case "close" | "eof":
                await self._process.end_input()
            case "resize":
                size = msgspec.json.decode(text, type=_Size)
                if size.rows > 0 and size.cols > 0:
                    await self._process.resize(size.rows, size.cols)


async def send(socket: WebSocket, frame: dict[str, Any]) -> None:
    """One JSON text frame; bytes in it become base64."""
    await socket.send_text(msgspec.json.encode(frame).decode())


def error_frame(error: RunnerError) -> dict[str, Any]:
    """The frame that tells of an error."""
    fields = {"status": error.status, "code": error.code, "message": error.message, "retryable": error.retryable}
    return {"type": "error", "error": error.message, **fields}


def _error_fields(code: str) -> dict[str, Any]:
    return {"status": 400, "code": code, "message": "a frame must be JSON", "retryable": False}
