"""A program of docker-runner with both its streams watched, each a pipe or a terminal."""

import contextlib
import http.client
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client import sign
from dev import wait_until
from service import ROOT, SECRET, Answer

NAMED = "another-secret-of-the-tests-0123456789"


class Stream:
    """One stream: what came of it so far, read as it comes."""

    def __init__(self, *, terminal: bool) -> None:
        self.reader, self.writer = pty.openpty() if terminal else os.pipe()
        self._data = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # So a terminal ends.
            while piece := os.read(self.reader, 65536):
                self._data += piece

    @property
    def data(self) -> bytes:
        return self._data

    @property
    def text(self) -> str:
        """Its whole lines, as they were written."""
        return self._data.decode().replace("\r\n", "\n").rpartition("\n")[0]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its whole lines as JSON: each must be an object."""
        return [json.loads(line) for line in self.text.split("\n") if line]

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The first line with these fields."""
        return next((line for line in self.lines if fields.items() <= line.items()), None)

    def wait(self, **fields: Any) -> dict[str, Any]:
        """The same, as soon as it is there."""
        assert wait_until(lambda: self.find(**fields) is not None, 20), (fields, self._data)
        found = self.find(**fields)
        assert found is not None
        return found

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a text that matches."""
        assert wait_until(lambda: re.search(pattern, self.text) is not None, 20), (pattern, self._data)
        found = re.search(pattern, self.text)
        assert found is not None
        return found

    def end(self) -> None:
        """Read what is left; nobody writes any more."""
        self._thread.join(10)
        os.close(self.reader)


class Watched:
    """A program that runs until told otherwise. A context manager: ended, and waited for, at exit.

    Args:
        arguments: of `runner.py`.
        settings: its whole environment, beside what is not ours.
        terminals: which of `out` and `err` are one; the others are pipes.
    """

    def __init__(self, arguments: Sequence[str], settings: Mapping[str, str], *, terminals: Sequence[str] = ()) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "PYTEST_"))}
        self.out, self.err = (Stream(terminal=name in terminals) for name in ("out", "err"))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "runner.py"), *arguments],
            env={**kept, "DOCKER_RUNNER_ENV": "production", "DOCKER_RUNNER_SHARED_SECRET": SECRET, **settings},
            stdin=subprocess.DEVNULL,
            stdout=self.out.writer,
            stderr=self.err.writer,
        )
        os.close(self.out.writer)
        os.close(self.err.writer)

    def reload(self) -> None:
        """SIGHUP."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self.out.end()
            self.err.end()


def serving(engine: str, settings: Mapping[str, str] | None = None, *, terminals: Sequence[str] = ()) -> Watched:
    """A service on a free loopback port, that watches its engine closely; `port_of` says which, when it listens."""
    usual = {"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": "0", "DOCKER_RUNNER_ENGINE_WATCH_MS": "100"}
    return Watched(["serve"], {**usual, "DOCKER_SOCKET": engine, **(settings or {})}, terminals=terminals)


def port_of(watched: Watched) -> int:
    """Wait until it listens."""
    return int(watched.err.wait_for(r"docker-runner \S+ listens on https?://127\.0\.0\.1:(\d+)")[1])


def ask(
    port: int,
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    secret: str = SECRET,
) -> Answer:
    """One signed request to a service on loopback; `headers` go before those of the signature."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        signed = sign(secret, method, target, body)
        connection.request(method, target, body or None, {**signed, **(headers or {})})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def keys_and_scopes(folder: Path) -> dict[str, str]:
    """Settings with two keys (`ci` has `NAMED`), and a policy file with scopes, made in a folder."""
    (folder / "secrets").write_text(f"{SECRET}\nci:{NAMED}\nci:{NAMED}-rotated\n")
    (folder / "policy.toml").write_text('[scope]\nlabel = "team=blue"\n[keys.ci]\npreset = "read-only"\n')
    return {
        "DOCKER_RUNNER_SHARED_SECRET": "",
        "DOCKER_RUNNER_SHARED_SECRET_FILE": f"{folder}/secrets",
        "DOCKER_RUNNER_POLICY": f"{folder}/policy.toml",
    }
