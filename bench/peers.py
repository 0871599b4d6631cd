"""What the benchmarks share: processes for the length of a run, connections, the peers' addresses."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECRET = "bench-secret-0123456789abcdef"


def connect(address: tuple[str, int] | str) -> socket.socket:
    """A connection, to a TCP address or a Unix socket; waits until something listens there."""
    deadline = time.monotonic() + 10
    while True:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            if not isinstance(address, str):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], environ: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the context lasts."""
    process = subprocess.Popen(
        command, env={**os.environ, **(environ or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def runner(engine: str, environ: dict[str, str] | None = None) -> Iterator[int]:
    """A docker-runner in front of an engine's socket; gives its port."""
    port = free_port()
    settings = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_SOCKET": engine, "DOCKER_RUNNER_ENV": "production"}
    settings |= {"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": str(port), **(environ or {})}
    with running([sys.executable, str(ROOT / "runner.py"), "serve"], settings):
        connect(("127.0.0.1", port)).close()
        yield port


@contextmanager
def bridge(port: int, path: str) -> Iterator[str]:
    """A bridge in front of a runner, at a Unix socket; gives its path."""
    command = [sys.executable, str(ROOT / "runner.py"), "bridge"]
    command += ["--url", f"http://127.0.0.1:{port}", "--listen", f"unix://{path}"]
    with running(command, {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_RUNNER_ENV": "production"}):
        connect(path).close()
        yield path
