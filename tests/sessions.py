"""A client of interactive execs for tests: signed upgrades, JSON frames, over a real socket."""

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from client import sign
from service import Runner

EOF = {"type": "eof"}
CLOSE = {"type": "close"}


def session_target(container: str, command: str | list[str], **query: str) -> str:
    """The target of an upgrade."""
    text = command if isinstance(command, str) else json.dumps(command)
    return "/v1/exec/interactive/ws?" + urlencode({"containerId": container, "command": text, **query})


def stdin(data: bytes) -> dict[str, str]:
    """A frame of input."""
    return {"type": "stdin", "data": base64.b64encode(data).decode()}


class Session:
    """One session; what came is in `out`, `err`, `errors`, and at its end `exit` and `close_code`."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.id = ""
        self.out = bytearray()
        self.err = bytearray()
        self.errors: list[dict[str, Any]] = []
        self.exit: dict[str, Any] | None = None
        self.close_code: int | None = None

    async def send(self, *frames: dict[str, Any]) -> None:
        """Send frames."""
        for frame in frames:
            await self.socket.send(json.dumps(frame))

    async def receive(self) -> str:
        """Take in one frame and give its type; empty at the close."""
        try:
            frame = json.loads(await self.socket.recv())
        except ConnectionClosed:
            self.close_code = self.socket.close_code
            return ""
        assert self.exit is None, f"after the exit frame came {frame}"
        match frame["type"]:
            case "ready":
                self.id = frame["execId"]
            case "stdout":
                self.out += base64.b64decode(frame["data"])
            case "stderr":
                self.err += base64.b64decode(frame["data"])
            case "error":
                self.errors.append(frame)
            case "exit":
                assert frame["execId"] == self.id
                self.exit = frame
            case other:
                raise AssertionError(f"an unknown frame {other!r}")
        kind: str = frame["type"]
        return kind

    async def until(self, text: bytes) -> None:
        """Take in frames until stdout holds `text`."""
        while text not in self.out:
            assert await self.receive(), f"closed; stdout was {bytes(self.out)[-500:]!r}, errors {self.errors}"

    async def to_end(self) -> "Session":
        """Take in everything up to the close."""
        while await self.receive():
            pass
        return self

    @property
    def code(self) -> int:
        """The exit code of the exit frame."""
        assert self.exit is not None, f"no exit frame; errors {self.errors}"
        code: int = self.exit["exitCode"]
        return code


@contextlib.asynccontextmanager
async def session(
    runner: Runner, container: str, command: str | list[str], *, ready: bool = True, **query: str
) -> AsyncIterator[Session]:
    """A session, its `ready` frame taken in unless told otherwise."""
    target = session_target(container, command, **query)
    async with connect(
        f"ws://127.0.0.1:{runner.port}{target}",
        additional_headers=sign(runner.secret, "GET", target),
        ping_interval=None,
        max_size=None,
        compression=None,
        close_timeout=2,
        proxy=None,
    ) as socket:
        opened = Session(socket)
        if ready:
            assert await opened.receive() == "ready", opened.errors
        yield opened
