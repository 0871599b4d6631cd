"""The docker CLI run twice: on the engine's own socket, and on the bridge's, which is bridge, runner and engine.

A test gives commands to `Twice`. Each runs on both sides, first on the engine, and its exit status, stdout and stderr
must be the same, byte for byte, but for what must differ:

- objects that a command makes or changes are twins, one of each side: `TWIN` in an argument, and in the names that
  `Twice.name` gives, becomes a word of the side's own, and is `TWIN` again in what is compared;
- ids become numbers, in the order in which a side's output first shows them;
- what else may differ is said by the test, as one of the functions in "What may differ" below: nothing does by default.

What takes more than one command, or input in the midst of it, is a script: a function that is called with each `Side`.
"""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import pytest

from bridged import Bridge
from conftest import Names
from dev.engine import Engine

TWIN = "TWIN"
"""Stands in an argument, or in input, for a side's own word."""
LIMIT_S = 60
"""No step of a test takes longer, or the test fails."""
DEBIAN_CLI = "/usr/bin/docker"

_Result = TypeVar("_Result")
_Test = TypeVar("_Test", bound=Callable[..., None])
Differs = Callable[[bytes], bytes]
"""Takes out of an output what may differ."""


class Ran(NamedTuple):
    """What a command gave: its exit status (negative: the signal that ended it), stdout, stderr."""

    status: int
    out: bytes
    err: bytes = b""


def clis() -> list[str]:
    """The docker CLIs of this machine: Debian's, and the one that `PATH` finds, if that is another."""
    found = shutil.which("docker")
    another = found is not None and os.path.realpath(found) != os.path.realpath(DEBIAN_CLI)
    return [DEBIAN_CLI, found] if another and found else [DEBIAN_CLI]


SHOWN: dict[str, set[str]] = {}
"""Commands by the test that runs them through the bridge; filled when the test files are imported."""


def through(*commands: str) -> Callable[[_Test], _Test]:
    """Declares the commands that a test runs through the bridge: `exec -i` is any `docker exec` that has `-i`.

    `twice` holds the test to it.
    """

    def declare(test: _Test) -> _Test:
        SHOWN[f"{test.__module__}.{test.__qualname__}"] = set(commands)
        return test

    return declare


def twice(request: pytest.FixtureRequest, cli: str, engine: Engine, bridge: Bridge, names: Names) -> Iterator["Twice"]:
    """The body of a fixture `docker`: after the test, what it declared with `through` must really have been run."""
    if not os.access(cli, os.X_OK):
        pytest.fail(f"{cli} is missing: apt-get install --no-install-recommends docker.io", False)
    with tempfile.TemporaryDirectory() as config:
        docker = Twice(cli, engine.socket, bridge.host, names, Path(config))
        try:
            yield docker
        finally:
            docker.end()
    declared = SHOWN.get(f"{request.function.__module__}.{request.function.__qualname__}", set())
    missing = {command for command in declared if not any(_is(command, ran) for ran in docker.bridge.commands)}
    assert not missing, f"declared, but not run through the bridge: {missing}"


def _is(command: str, ran: tuple[str, ...]) -> bool:
    words = [word for word in command.split() if not word.startswith("-")]
    options = [word for word in command.split() if word.startswith("-")]
    return list(ran[: len(words)]) == words and set(options) <= set(ran)


class Twice:
    """One docker CLI on both sides. `config` is a folder for its configuration: nobody's own is read or written."""

    def __init__(self, cli: str, engine_socket: str, bridge_host: str, names: Names, config: Path) -> None:
        self._names = names
        self.engine = Side(cli, f"unix://{engine_socket}", "twin-a", config / "twin-a")
        self.bridge = Side(cli, bridge_host, "twin-b", config / "twin-b")

    def name(self, kind: str = "") -> str:
        """A fresh name for a container, volume, network or image; of each side's own."""
        return f"{self._names(kind)}-{TWIN}"

    def __call__(
        self,
        *command: str,
        stdin: bytes = b"",
        but: Differs | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Ran:
        """Run a command on both sides; returns what both gave.

        Args:
            command: the arguments of `docker`.
            stdin: all of its input.
            but: what may differ.
            environ: further variables.
        """
        return self.each(lambda side: side(*command, stdin=stdin, but=but, environ=environ))

    def each(self, script: Callable[["Side"], _Result]) -> _Result:
        """Call the script with each side; both must give the same, and that is returned."""
        engine = script(self.engine)
        bridge = script(self.bridge)
        assert bridge == engine, f"\n  bridge: {_short(bridge)}\n  engine: {_short(engine)}"
        return bridge

    def end(self) -> None:
        """End the commands that still run."""
        self.engine.end()
        self.bridge.end()


class Side:
    """The docker CLI with its `DOCKER_HOST` at one place.

    Args:
        cli: path of the program.
        host: the `DOCKER_HOST`.
        word: what `TWIN` stands for on this side. All sides' words are of one length.
        config: folder for its configuration (made here).
    """

    def __init__(self, cli: str, host: str, word: str, config: Path) -> None:
        self.host = host
        self.word = word
        self.commands: list[tuple[str, ...]] = []
        """The arguments of every command that was run."""
        self._cli = cli
        self._ids: dict[bytes, bytes] = {}
        self._live: list[Live] = []
        config.mkdir()
        self._environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(config),
            "DOCKER_CONFIG": str(config),
            "DOCKER_HOST": host,
            "DOCKER_BUILDKIT": "0",
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
        }

    def __call__(
        self,
        *command: str,
        stdin: bytes = b"",
        but: Differs | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Ran:
        """Run a command to its end; see `Twice`."""
        stdin = stdin.replace(TWIN.encode(), self.word.encode())
        return self.alike(self.raw(*command, stdin=stdin, environ=environ), but)

    def raw(self, *command: str, stdin: bytes = b"", environ: Mapping[str, str] | None = None) -> Ran:
        """Run a command to its end; what it gave, and its input, as it is."""
        try:
            done = subprocess.run(
                self._argv(command),
                input=stdin,
                capture_output=True,
                env={**self._environ, **(environ or {})},
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise AssertionError(
                f"docker {command} on {self.host} did not end; it said {_short(late.stdout)}"
            ) from None
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *command: str) -> "Live":
        """Start a command, with pipes for its input and outputs."""
        process = subprocess.Popen(
            self._argv(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environ,
            bufsize=0,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        descriptors = [os.dup(stream.fileno()) for stream in (process.stdin, process.stdout, process.stderr)]
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        return self._keep(Live(self, process, *descriptors))

    def terminal(self, *command: str, rows: int = 24, columns: int = 80) -> "Live":
        """Start a command on a terminal of its own, with a window of that size."""
        ours, theirs = pty.openpty()
        _set_window(theirs, rows, columns)
        try:
            process = subprocess.Popen(
                ["setsid", "--ctty", *self._argv(command)],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=self._environ,
            )
        finally:
            os.close(theirs)
        return self._keep(Live(self, process, os.dup(ours), ours, None))

    def end(self) -> None:
        """End the commands that still run."""
        for live in self._live:
            live.end()

    def alike(self, ran: Ran, but: Differs | None = None) -> Ran:
        """What a command gave, without what must and may differ between the sides."""
        return Ran(ran.status, *(self._alike(output, but) for output in ran[1:]))

    def _alike(self, output: bytes, but: Differs | None) -> bytes:
        output = output.replace(self.host.encode(), b"DOCKER_HOST").replace(self.word.encode(), TWIN.encode())
        output = _ID.sub(self._numbered, output)
        return but(output) if but is not None else output

    def _numbered(self, found: re.Match[bytes]) -> bytes:
        number = self._ids.setdefault(found[0][:12], b"ID%d" % (len(self._ids) + 1))
        return number.ljust(len(found[0]), b".")  # Of the same width, so that tables keep their columns.

    def _argv(self, command: tuple[str, ...]) -> list[str]:
        self.commands.append(command)
        return [self._cli, *(argument.replace(TWIN, self.word) for argument in command)]

    def _keep(self, live: "Live") -> "Live":
        self._live.append(live)
        return live


class Live:
    """A command that runs. A context manager: it is ended at exit, if it has not ended by itself.

    Args:
        side: where it runs.
        process: the command's.
        keys: a descriptor that leads to its input.
        out: one that its output comes from.
        err: one that its errors come from; on a terminal there is none.
    """

    def __init__(self, side: Side, process: "subprocess.Popen[bytes]", keys: int, out: int, err: int | None) -> None:
        self._side = side
        self._process = process
        self._input = keys
        self._outputs = {out: bytearray()} if err is None else {out: bytearray(), err: bytearray()}
        self._open = set(self._outputs)
        self._came = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in self._outputs.items()]
        for reader in self._readers:
            reader.start()

    @property
    def out(self) -> bytes:
        """Its output so far, as it came."""
        return bytes(next(iter(self._outputs.values())))

    def send(self, data: bytes) -> None:
        """Give it input."""
        while data:
            data = data[os.write(self._input, data) :]

    def end_input(self) -> None:
        """End its input."""
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def until(self, text: bytes, times: int = 1) -> None:
        """Wait until its output holds `text`, so many times."""
        with self._came:
            came = self._came.wait_for(lambda: self.out.count(text) >= times or not self._open, LIMIT_S)
        assert came, f"{text!r} did not come; {self}"
        assert self.out.count(text) >= times, f"{text!r} did not come before the end; {self}"

    def resize(self, rows: int, columns: int) -> None:
        """Set its terminal's window size, and let it know."""
        _set_window(self._input, rows, columns)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, but: Differs | None = None) -> Ran:
        """Wait for its end; returns what it gave."""
        try:
            status = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end; {self}") from None
        for reader in self._readers:
            reader.join(LIMIT_S)
        return self._side.alike(Ran(status, *(bytes(output) for output in self._outputs.values())), but)

    def end(self) -> None:
        """End it, if it still runs, and close what belongs to it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.end_input()
        for reader in self._readers:
            reader.join(5)

    def _read(self, descriptor: int, output: bytearray) -> None:
        with contextlib.suppress(OSError):  # A terminal's end is an error (EIO).
            while part := os.read(descriptor, 65536):
                with self._came:
                    output += part
                    self._came.notify_all()
        os.close(descriptor)
        with self._came:
            self._open.discard(descriptor)
            self._came.notify_all()

    def __str__(self) -> str:
        return f"on {self._side.host} it said {[_short(bytes(output)) for output in self._outputs.values()]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _set_window(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _short(result: Any) -> str:
    text = repr(result)
    return text if len(text) <= 4000 else f"{text[:2000]} ... {text[-2000:]}"


# What may differ ------------------------------------------------------------------------------------------------------

_ID = re.compile(rb"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b")
_INSTANT = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d| [+-]\d{4} [A-Z]+)")
_SPAN = re.compile(rb"Less than a second|About a minute|\d+ (second|minute)s?")
_NUMBER = re.compile(rb"\d+(\.\d+)?([kMG]?i?B)?")
_ADDRESS = re.compile(rb"\b\d+\.\d+\.\d+\.\d+(/\d+)?\b|\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b")
_LAYER = re.compile(rb"(ID\d+\.*): ")
_COUNTED = re.compile(rb"(?m)^( *(?:Containers|Running|Paused|Stopped|Images)): \d+$")
_RUNTIMES = re.compile(rb"(?m)^ Runtimes:.*$")


def times(output: bytes) -> bytes:
    """Points in time, and spans of it up to now; with the width of columns, which depends on those."""
    return re.sub(rb"  +", b"  ", _SPAN.sub(b"SPAN", _INSTANT.sub(b"TIME", output)))


def numbers(output: bytes) -> bytes:
    """Every number, its unit with it: what is measured; with the width of columns."""
    return re.sub(rb"  +", b"  ", _NUMBER.sub(b"N", output))


def addresses(output: bytes) -> bytes:
    """IP and MAC addresses, and times."""
    return _ADDRESS.sub(b"ADDRESS", times(output))


def counts(output: bytes) -> bytes:
    """In `info`: how many containers and images there are (others may use the engine too); the runtimes' order."""
    output = _RUNTIMES.sub(lambda found: b" ".join(sorted(found[0].split())), output)
    return _COUNTED.sub(rb"\1: N", output)


def sent(output: bytes) -> bytes:
    """The size of a build's context, where that holds a file whose name is made up."""
    return re.sub(rb"(Sending build context to Docker daemon) +\S+", rb"\1 SIZE", output)


def logged(output: bytes) -> bytes:
    """What the CLI logs of its own tasks that an error ends: which of them is first to learn of it is a race."""
    return re.sub(rb'time="\S+" level=error msg=".*"\n', b"", output)


def order(output: bytes) -> bytes:
    """The order of the lines."""
    return b"".join(sorted(output.splitlines(keepends=True)))


def progress(output: bytes) -> bytes:
    """Of each layer all but the last line: the engine leaves some out when a layer comes fast."""
    lines = output.splitlines(keepends=True)
    last = {found[1]: number for number, line in enumerate(lines) if (found := _LAYER.match(line))}
    return b"".join(
        line for number, line in enumerate(lines) if not (found := _LAYER.match(line)) or last[found[1]] == number
    )
