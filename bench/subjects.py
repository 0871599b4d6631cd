"""What is measured, each as a process of its own for the length of a run.

The runner runs as in production: default policy, audit log to a file, metrics. HAProxy is the mark: one server on the
engine's socket, nothing verified, nothing chosen; with `option http-no-delay`, without which it holds small pieces of
a stream back by up to 200 ms, and without.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bench.exchange import SECRET, Address, BenchError, connect
from dev import CHECKOUT, find_program

ENGINE = "engine"
RUNNER = "runner"
BRIDGE = "bridge + runner"
HAPROXY = "haproxy"
HAPROXY_DELAYING = "haproxy, delaying"
BEFORE = "runner before"

BOUNDS = {
    # Ten times what the loads need, so that a bound is never what is measured.
    "DOCKER_RUNNER_MAX_STREAMS": "10000",
    "DOCKER_RUNNER_MAX_CONNECTIONS": "20000",
    "DOCKER_RUNNER_MAX_REQUESTS": "10000",
    "DOCKER_RUNNER_ENGINE_CONNECTIONS": "10000",
}


class Subject(NamedTuple):
    """Something that answers Engine API requests, and the processes whose CPU time it costs (of the engine: none)."""

    name: str
    address: Address
    pids: tuple[int, ...] = ()
    signed: bool = False

    def cpu_s(self) -> float:
        """CPU time so far, in seconds: of all threads, in nanoseconds where the kernel keeps schedstat."""
        return sum(map(_cpu_s, self.pids))


def _cpu_s(pid: int) -> float:
    total = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return total


def memory_kb(pid: int, kind: str = "VmRSS") -> int:
    """Memory of a process: `VmRSS` now, `VmHWM` the most so far."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{kind}:")[2].split()[0])


def free_port() -> int:
    """A loopback port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the context lasts, or this process does; stdout and stderr go to files.

    Nothing of `DOCKER_*` is inherited: whoever runs the benchmark may have settings of their own.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    with log.open("ab") as errors, log.with_suffix(".out").open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], env={**kept, **environ}, stdout=output, stderr=errors
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def production(checkout: Path, engine: str, port: int) -> dict[str, str]:
    """The settings of a runner as in production, as far as that checkout knows them."""
    known = set(re.findall(r'"(DOCKER_[A-Z_]+)"', (checkout / "settings.py").read_text()))
    settings = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_SOCKET": engine, "DOCKER_RUNNER_ENV": "production"}
    settings |= {"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": str(port)}
    wished = {"DOCKER_RUNNER_AUDIT": "json", "DOCKER_RUNNER_LOG_FORMAT": "json", "DOCKER_RUNNER_METRICS_PORT": "0"}
    # The engine may be somebody's; nobody's containers are ended because of a measurement.
    wished |= {"DOCKER_RUNNER_INSTANCE": f"bench-{port}"}
    return settings | {name: value for name, value in {**wished, **BOUNDS}.items() if name in known}


@contextmanager
def runner(
    engine: str,
    folder: Path,
    name: str = RUNNER,
    checkout: Path = CHECKOUT,
    *,
    command: Sequence[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Subject]:
    """The runner of a checkout, in front of an engine's socket. Its audit log is `NAME.out` in the folder.

    `command` starts it in another way than its own, with more in its environment.
    """
    port = free_port()
    command = command or [sys.executable, str(checkout / "runner.py"), "serve"]
    settings = {**production(checkout, engine, port), **environ}
    with running(command, folder / f"{name}.log", settings) as process:
        yield _listening(name, ("127.0.0.1", port), process, folder, signed=True)


@contextmanager
def bridge(runner: Subject, folder: Path) -> Iterator[Subject]:
    """A bridge in front of a runner, at a Unix socket. Its CPU time is that of both."""
    path = str(folder / "bridge.sock")
    command = [sys.executable, str(CHECKOUT / "runner.py"), "bridge"]
    command += ["--url", f"http://127.0.0.1:{runner.address[1]}", "--listen", f"unix://{path}"]
    settings = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_RUNNER_ENV": "production"}
    with running(command, folder / "bridge.log", settings) as process:
        subject = _listening(BRIDGE, path, process, folder)
        yield subject._replace(pids=(*subject.pids, *runner.pids))


@contextmanager
def haproxy(engine: str, folder: Path, name: str = HAPROXY) -> Iterator[Subject]:
    """HAProxy in front of an engine's socket, with as many threads as it takes by itself. Raises BenchError."""
    program = find_program("haproxy")
    if program is None:
        raise BenchError("haproxy is missing: python3 -m dev.prepare bench")
    port = free_port()
    config = folder / f"{name}.cfg"
    config.write_text(
        "global\n maxconn 4000\ndefaults\n mode http\n timeout connect 5s\n timeout client 10m\n timeout server 10m\n"
        + (" option http-no-delay\n" if name == HAPROXY else "")
        + f"listen docker\n bind 127.0.0.1:{port}\n server engine unix@{engine}\n"
    )
    with running([program, "-f", str(config)], folder / f"{name}.log", {}) as process:
        yield _listening(name, ("127.0.0.1", port), process, folder)


def _listening(
    name: str, address: Address, process: subprocess.Popen[bytes], folder: Path, *, signed: bool = False
) -> Subject:
    deadline = time.monotonic() + 20
    while True:
        try:
            connect(address, patience_s=0).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                said = "\n".join(log.read_text()[-1000:] for log in sorted(folder.glob("*.log")))
                raise BenchError(f"{name} does not listen:\n{said}") from None
            time.sleep(0.02)
        else:
            return Subject(name, address, (process.pid,), signed)
