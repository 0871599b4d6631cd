"""A running bridge for tests: the real program, in a process of its own, in front of a running docker-runner."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from service import ROOT, SECRET


class Bridge:
    """`runner.py bridge`. A context manager: it is ended, and waited for, at exit.

    Args:
        url: of the runner.
        listen: `unix:///path` or `tcp://127.0.0.1:0`.
        arguments: further arguments.
        environ: further variables.
    """

    def __init__(self, url: str, listen: str, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "PYTEST_"))}
        self.environ = {
            **kept,
            "DOCKER_RUNNER_SHARED_SECRET": SECRET,
            "DOCKER_RUNNER_ENV": "production",
            **(environ or {}),
        }
        self.log: list[str] = []
        self._listens = threading.Event()
        self.host = ""
        """Where it listens, as `DOCKER_HOST` takes it."""
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "runner.py"), "bridge", "--url", url, "--listen", listen, *arguments],
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
