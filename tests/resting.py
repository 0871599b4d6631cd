"""What a runner holds, counted from outside: so that a test sees that after a fault it holds what it held before."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from dev import wait_until
from scraped import PORT, scrape
from service import Runner

USED = ("requests", "streams", "connections", "engine_connections", "unverified_bytes")
"""What is bounded by a setting and comes back; nonces are remembered."""
PATIENCE_S = 20


class Counted(Runner):
    """A runner whose tasks can be counted; it has metrics."""

    def __init__(self, engine_socket: str, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(engine_socket, {**PORT, **(environ or {})}, program="tests/counted.py")

    def tasks(self) -> int:
        """How many it has."""
        said = len(self.log)
        self.process.send_signal(signal.SIGUSR1)
        assert wait_until(lambda: any(line.startswith("tasks ") for line in self.log[said:]), 10)
        line = next(line for line in self.log[said:] if line.startswith("tasks "))
        return int(line.split()[1].rstrip(":"))

    def files(self) -> list[str]:
        """What its file descriptors are."""
        found = []
        for each in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
                found.append(os.readlink(each))
        return found

    def threads(self) -> int:
        """How many it has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


def held(runner: Counted) -> dict[str, float]:
    """What it holds by name; connections to the engine that are merely kept are none of it."""
    now = scrape(runner)
    files = runner.files()
    return {
        "files": len(files) - now.value("docker_runner_engine_connections", state="idle"),
        "deleted files": sum(name.endswith("(deleted)") for name in files),
        "tasks": runner.tasks(),
        "open streams": now.value("docker_runner_open_streams"),
        **{name: now.value("docker_runner_used", resource=name) for name in USED},
    }


@contextlib.contextmanager
def comes_to_rest(runner: Counted) -> Iterator[None]:
    """After what happens within, the runner holds no more than before, has found no defect, and serves."""
    assert runner.request("GET", "/_ping").status == 200
    before = held(runner)
    yield
    now: dict[str, float] = {}

    def is_at_rest() -> bool:
        nonlocal now
        now = held(runner)
        return all(now[name] <= count for name, count in before.items())

    assert wait_until(is_at_rest, PATIENCE_S), (before, now)
    assert runner.request("GET", "/version").status == 200
    assert not any("defect" in line or "Traceback" in line or "never retrieved" in line for line in runner.log)
