"""The one file, built for the tests, and programs of it in processes of their own."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dev import dist
from service import ROOT, SECRET


@functools.cache
def one_file() -> Path:
    """What `make dist` makes, in `dist/`."""
    return dist.build(ROOT / "dist")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """An environment with nothing of this project's but the settings given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "PYTEST_", "PYTHON", "SHIV_"))}
    return {**kept, "DOCKER_RUNNER_ENV": "production", **settings}


def packed(*arguments: str) -> list[str]:
    """A command of the one file; isolated, so that nothing of the checkout or of `.venv` can help it."""
    return [str(Path(sys.executable).resolve()), "-I", str(one_file()), *arguments]


def run(command: Sequence[str], settings: Mapping[str, str], *, cwd: Path | None = None) -> tuple[int, str]:
    """A command run to its end: its status, and what it said."""
    done = subprocess.run(
        command,
        env=environment(settings),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


class Program:
    """A program that runs until told otherwise, and logs on stderr. A context manager: ended, and waited for, at exit.

    Args:
        command: with its arguments.
        ready: of the line that says it is; `found` is its match.
        settings: see `environment`; the secret is the tests'.
    """

    def __init__(
        self, command: Sequence[str], ready: str, settings: Mapping[str, str] | None = None, *, cwd: Path | None = None
    ) -> None:
        self.log: list[str] = []
        self._ready = threading.Event()
        self._found: re.Match[str] | None = None
        self._pattern = re.compile(ready)
        self.process = subprocess.Popen(
            command,
            env=environment({"DOCKER_RUNNER_SHARED_SECRET": SECRET, **(settings or {})}),
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(30) or self._found is None:
            self.stop()
            raise AssertionError(f"{command} did not start:\n{''.join(self.log)}")
        self.found: re.Match[str] = self._found

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if self._found is None and (found := self._pattern.search(line)):
                self._found = found
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
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


def serving(engine_socket: str, settings: Mapping[str, str] | None = None) -> Program:
    """The one file as a running service on a free loopback port: `found[1]` is its URL, `found[2]` the port."""
    usual = {"DOCKER_SOCKET": engine_socket, "DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": "0"}
    return Program(packed("serve"), r"listens on (http://127\.0\.0\.1:(\d+))", {**usual, **(settings or {})})
