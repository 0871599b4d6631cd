"""A running bridge for tests: the real program, in a process of its own, in front of a running docker-runner.

And a tool of the plainest kind, `Raw`, which sees an answer byte by byte: as good for the engine's own socket.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from scripted import ScriptedEngine
from service import ROOT, SECRET, read_to_end

Connection = socket.socket


class Bridge:
    """`runner.py bridge`. A context manager: it is ended, and waited for, at exit.

    Args:
        url: of the runner.
        listen: `unix:///path` or `tcp://127.0.0.1:0`.
        arguments: further arguments.
        environ: further variables.
        forced_gc: see `forced_gc.py`.
    """

    def __init__(
        self,
        url: str,
        listen: str,
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        forced_gc: bool = False,
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "PYTEST_"))}
        self.environ = {
            **kept,
            "DOCKER_RUNNER_SHARED_SECRET": SECRET,
            "DOCKER_RUNNER_ENV": "production",
            **(environ or {}),
        }
        program = "tests/forced_gc.py" if forced_gc else "runner.py"
        self.log: list[str] = []
        self._listens = threading.Event()
        self.host = ""
        """Where it listens, as `DOCKER_HOST` takes it."""
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / program), "bridge", "--url", url, "--listen", listen, *arguments],
            env=self.environ,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if not self._listens.wait(20) or not self.host:
            self.stop()
            raise AssertionError(f"the bridge did not start:\n{''.join(self.log)}")

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"bridge listens on ((?:unix|tcp)://\S+)", line):
                self.host = found[1].rstrip(",")
                self._listens.set()
        self._listens.set()

    @property
    def socket(self) -> str:
        """The path of its Unix socket."""
        return self.host.removeprefix("unix://")

    def connect(self, timeout: float = 20) -> Connection:
        """A raw connection."""
        return dial(self.host, timeout)

    def ask(self, *request: bytes) -> "Raw":
        """One request on a connection of its own; see `ask`."""
        with self.connect() as sock:
            return ask(sock, *request)

    def memory(self) -> int:
        """Resident memory of the process, in bytes."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def sockets(self) -> int:
        """How many sockets the process holds."""
        count = 0
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(link).startswith("socket:")
        return count

    def check_log(self) -> None:
        """The log tells of no defect."""
        log = "".join(self.log)
        assert not re.search("defect|Traceback|never retrieved|never awaited|was destroyed", log), log

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """End the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(5)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Raw(NamedTuple):
    """An answer as it travelled."""

    status_line: bytes
    headers: list[bytes]
    """Sorted, names lower-cased, a date's value taken out, without `Connection`."""
    body: bytes

    @property
    def status(self) -> int:
        return int(self.status_line.split()[1])

    def header(self, name: bytes) -> bytes | None:
        """The value of a header, by its lower-case name."""
        return next((line.partition(b": ")[2] for line in self.headers if line.startswith(name + b":")), None)


def dial(host: str, timeout: float = 20) -> socket.socket:
    """A raw connection to what `DOCKER_HOST` would name."""
    parts = urlsplit(host)
    if parts.scheme == "tcp":
        return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=timeout)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    sock.connect(parts.path)
    return sock


def request(method: str, target: str, *fields: str, body: bytes = b"") -> bytes:
    """A plain request, raw. A body gets its length."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *fields]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def ask(sock: socket.socket, *cuts: bytes) -> Raw:
    """Send a request, and read its answer."""
    for cut in cuts:
        sock.sendall(cut)
    return read_answer(sock, cuts[0].split(b" ", 1)[0])


def read_answer(sock: socket.socket, method: bytes = b"GET") -> Raw:
    """One answer, and nothing after it.

    Raises:
        http.client.IncompleteRead: it broke off.
    """
    head = read_head(sock)
    if not head.endswith(b"\r\n\r\n"):
        raise http.client.IncompleteRead(head)
    status_line, *lines = head[:-4].split(b"\r\n")
    fields = {line.partition(b":")[0].lower(): line.partition(b":")[2] for line in lines}
    for dropped in (b"connection", b"x-request-id"):  # The latter is the one header that the runner adds.
        fields.pop(dropped, None)
    if b"date" in fields:
        fields[b"date"] = b" a date"
    headers = sorted(name + b":" + value for name, value in fields.items())
    if method == b"HEAD" or status_line.split()[1] in (b"204", b"304"):
        body = b""
    elif fields.get(b"transfer-encoding") == b" chunked":
        body = b"".join(read_chunks(sock))
    elif b"content-length" in fields:
        body = read_exactly(sock, int(fields[b"content-length"]))
    else:
        body = read_to_end(sock)
    return Raw(status_line, headers, body)


def read_chunks(sock: socket.socket) -> Iterator[bytes]:
    """The chunks of a body, one by one."""
    while True:
        size = b""
        while not size.endswith(b"\r\n"):
            size += read_exactly(sock, 1)
        data = read_exactly(sock, int(size, 16) + 2)[:-2]
        if not data:
            return
        yield data


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        http.client.IncompleteRead: the connection ended before.
    """
    data = bytearray()
    while len(data) < size:
        try:
            more = sock.recv(min(size - len(data), 1 << 20))
        except ConnectionResetError:
            more = b""
        if not more:
            raise http.client.IncompleteRead(bytes(data), size - len(data))
        data += more
    return bytes(data)


def read_head(sock: socket.socket) -> bytes:
    """One head, and nothing after it; what came, if the connection ended."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        seen = sock.recv(1 << 16, socket.MSG_PEEK)
        if not seen:
            break
        end = (data + seen).find(b"\r\n\r\n")
        data += sock.recv(len(seen) if end < 0 else end + 4 - len(data))
    return data


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    """Everything up to a mark, and what came with it."""
    data = b""
    while mark not in data:
        more = sock.recv(1 << 16)
        assert more, f"the connection ended after {data[-200:]!r}"
        data += more
    return data


class ScriptedRunner(ScriptedEngine):
    """As a scripted engine, on loopback TCP: `url` is where."""

    port = 0

    def listen(self) -> None:
        """Begin to listen (again at the same port)."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        Path(self.path).touch()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
