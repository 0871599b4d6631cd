"""A running docker-runner for tests: the real program, in a process of its own, on a free loopback port."""

import contextlib
import http.client
import json
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
from typing import Any, Self

from client import sign

SECRET = "a-secret-of-the-tests-0123456789abcdef"
ROOT = Path(__file__).parent.parent


class Answer:
    """A whole answer: `status`, `headers` (lower-cased names, in order), `body`."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = [(name.lower(), value) for name, value in response.getheaders()]
        self.body = response.read()

    def header(self, name: str) -> str | None:
        """The value of a header, by its lower-case name."""
        return next((value for other, value in self.headers if other == name), None)


class Runner:
    """`runner.py serve` against an engine's socket. A context manager: it is ended, and waited for, at exit.

    Args:
        engine_socket: path of the engine's socket (there need not be one).
        environ: further settings.
        forced_gc: see `forced_gc.py`.
        program: that is run, in the place of `runner.py`.
        output: a file descriptor for the standard output, the audit log.
    """

    def __init__(
        self,
        engine_socket: str,
        environ: Mapping[str, str] | None = None,
        *,
        forced_gc: bool = False,
        program: str = "runner.py",
        output: int = subprocess.DEVNULL,
    ) -> None:
        self.engine_socket = engine_socket
        self.secret = SECRET
        settings = {
            "DOCKER_RUNNER_SHARED_SECRET": SECRET,
            "DOCKER_SOCKET": engine_socket,
            "DOCKER_RUNNER_HOST": "127.0.0.1",
            "DOCKER_RUNNER_PORT": "0",
            "DOCKER_RUNNER_ENV": "production",
            "DOCKER_RUNNER_ENGINE_WATCH_MS": "0",  # An engine of a script counts what comes.
            "DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "0",  # Others share the engine; and scripts expect what a test asks.
            "DOCKER_RUNNER_POLICY": "everything",  # What a policy refuses is a matter of tests of their own.
            **(environ or {}),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "PYTEST_"))}
        self.environ = {**kept, **{name: value for name, value in settings.items() if value}}
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._listens = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / ("tests/forced_gc.py" if forced_gc else program)), "serve"],
            env=self.environ,
            stderr=subprocess.PIPE,
            stdout=output,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.port = 0
        if not self._listens.wait(20) or not self.port:
            self.stop()
            raise AssertionError(f"the runner did not start:\n{''.join(self.log)}")

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}"

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._logged:
                self.log.append(line)
                self._logged.notify_all()
            if found := re.search(r"listens on https?://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                self._listens.set()
        self._listens.set()

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60,
    ) -> Answer:
        """One signed request on a connection of its own, its whole answer read. `target` is sent as it is."""
        with self.stream(method, target, body, headers, timeout=timeout) as response:
            return Answer(response)

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60,
    ) -> Iterator[http.client.HTTPResponse]:
        """As `request`, but with the answer still to be read; the connection closes at exit."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            signed = sign(self.secret, method, target, body or b"")
            for name, value in {**signed, **(headers or {})}.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def connect(self, timeout: float = 20) -> socket.socket:
        """A raw connection, for requests that no HTTP client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def raw(self, data: bytes, *, timeout: float = 20) -> bytes:
        """Send raw bytes on a connection of their own; everything that comes back until the runner closes it."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return read_to_end(sock)

    def memory(self) -> int:
        """Resident memory of the process, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def wait_for_log(self, text: str, limit_s: float = 10) -> None:
        """Wait until a line of the log holds `text`."""
        with self._logged:
            said = self._logged.wait_for(lambda: any(text in line for line in self.log), limit_s)
        assert said, f"the log does not say {text!r}"

    def wait_for_line(self, limit_s: float = 10, **fields: Any) -> dict[str, Any]:
        """Wait for a line of the log, which is JSON, with these fields; the first there is."""

        def found() -> dict[str, Any] | None:
            lines = (json.loads(line) for line in self.log)
            return next((line for line in lines if fields.items() <= line.items()), None)

        with self._logged:
            line = self._logged.wait_for(found, limit_s)
        assert line is not None, f"the log has no line with {fields}"
        return line

    def sockets(self) -> int:
        """How many sockets the process holds: its listener, its callers, its connections to the engine, its own."""
        count = 0
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(link).startswith("socket:")
        return count

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


def with_files(folder: Path, secrets: str, policy: str = "") -> dict[str, str]:
    """The settings of a runner that has its secrets, and its policy if one is given, in files of this folder."""
    (folder / "secrets").write_text(secrets)
    settings = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(folder / "secrets")}
    if policy:
        (folder / "policy.toml").write_text(policy)
        settings["DOCKER_RUNNER_POLICY"] = str(folder / "policy.toml")
    return settings


def signed_head(method: str, target: str, body: bytes = b"", *extra: str, secret: str = SECRET) -> bytes:
    """The raw bytes of a signed request's head, `extra` header lines included; its body is not."""
    lines = [f"{method} {target} HTTP/1.1", "Host: runner"]
    lines += [f"{name}: {value}" for name, value in sign(secret, method, target, body).items()]
    lines += extra
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_to_end(sock: socket.socket) -> bytes:
    """Everything up to the peer's close; a reset counts as one."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
