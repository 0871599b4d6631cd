"""Requests per second, p99 and the proxy's CPU time, with many connections: the engine, the runner (signed), HAProxy.

    .venv/bin/python bench/throughput.py [--connections 1,32,256] [--requests 4000] [--socket /var/run/docker.sock]

Each connection asks again as soon as it has its answer. The rounds are interleaved and the best of each peer counts;
signing is done before the clock starts. The generator shares the machine with what it measures: ratios count.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvloop
from peers import ROOT, SECRET, connect, free_port, runner, running

sys.path.insert(0, str(ROOT))

from client import sign


class Peer(NamedTuple):
    """Something that answers Engine API requests, and the process whose CPU time counts (0: none)."""

    name: str
    address: tuple[str, int] | str
    pid: int
    signed: bool


class Figures(NamedTuple):
    """Of one round."""

    per_second: float
    p99_ms: float
    cpu_us: float


class Asker(asyncio.Protocol):
    """One connection: asks, waits for the answer, asks again."""

    def __init__(self, heads: list[bytes], done: "asyncio.Future[None]", times: list[float]) -> None:
        self._heads = heads
        self._done = done
        self._times = times
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError("the peer closed"))

    def ask(self) -> None:
        """Send the next request, if one is left for anybody."""
        if not self._heads:
            self._done.set_result(None)
            return
        self._asked = time.perf_counter()
        self.transport.write(self._heads.pop())

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        if not end or (len(body) < int(length) if length else not body.endswith(b"0\r\n\r\n")):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._done.set_exception(RuntimeError(repr(self._got[:300])))
            self.transport.abort()
            return
        self._got = b""
        self._times.append(time.perf_counter() - self._asked)
        self.ask()


def cpu_s(pid: int) -> float:
    """CPU time of a process, all its threads."""
    threads = Path(f"/proc/{pid}/task").iterdir() if pid else ()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def heads(target: str, count: int, *, signed: bool) -> list[bytes]:
    """So many requests, each with a signature of its own."""
    made = []
    for _ in range(count):
        lines = [f"GET {target} HTTP/1.1", "Host: bench"]
        if signed:
            lines += [f"{name}: {value}" for name, value in sign(SECRET, "GET", target).items()]
        made.append(("\r\n".join(lines) + "\r\n\r\n").encode())
    return made


async def measure(peer: Peer, target: str, connections: int, requests: int) -> Figures:
    """One round with one peer."""
    loop = asyncio.get_running_loop()
    left = heads(target, requests, signed=peer.signed)
    times: list[float] = []
    askers: list[Asker] = []
    ends = [loop.create_future() for _ in range(connections)]
    for end in ends:
        asker = Asker(left, end, times)

        def same(asker: Asker = asker) -> Asker:
            return asker

        if isinstance(peer.address, str):
            await loop.create_unix_connection(same, peer.address)
        else:
            await loop.create_connection(same, *peer.address)
        askers.append(asker)
    cpu, started = cpu_s(peer.pid), time.perf_counter()
    for asker in askers:
        asker.ask()
    await asyncio.gather(*ends)
    took, used = time.perf_counter() - started, cpu_s(peer.pid) - cpu
    for asker in askers:
        asker.transport.close()
    return Figures(requests / took, sorted(times)[int(requests * 0.99)] * 1000, used / requests * 1e6)


@contextmanager
def haproxy(engine: str, folder: str) -> Iterator[Peer | None]:
    """HAProxy in front of an engine's socket, where it is installed."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        yield None
        return
    port = free_port()
    config = Path(folder) / "haproxy.cfg"
    config.write_text(
        "global\n maxconn 1000\ndefaults\n mode http\n timeout connect 5s\n timeout client 1m\n timeout server 1m\n"
        f" option http-no-delay\nlisten docker\n bind 127.0.0.1:{port}\n server engine unix@{engine}\n"
    )
    with running([program, "-f", str(config)]):
        connect(("127.0.0.1", port)).close()
        yield Peer("haproxy", ("127.0.0.1", port), listener(port), signed=False)


def listener(port: int) -> int:
    """The process that listens at a loopback port."""
    found = subprocess.check_output(["ss", "-Hltnp", f"sport = :{port}"], text=True)
    return int(found.partition("pid=")[2].partition(",")[0])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", default="1,32,256")
    parser.add_argument("--requests", type=int, default=4000, help="in each round, for each peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--socket", default="/var/run/docker.sock", help="the engine's")
    options = parser.parse_args()
    engine: str = options.socket
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        port = stack.enter_context(runner(engine))
        unsigned = Peer("engine", engine, 0, signed=False)
        peers = [unsigned, Peer("runner", ("127.0.0.1", port), listener(port), signed=True)]
        if (proxy := stack.enter_context(haproxy(engine, folder))) is not None:
            peers.append(proxy)
        images: list[dict[str, Any]] = json.loads(
            subprocess.check_output(["curl", "-s", "--unix-socket", engine, "http://e/images/json"])
        )
        loads = {"ping": "/_ping"}
        if images:
            loads["image inspect"] = f"/images/{images[0]['Id']}/json"
        print(f"{'load':<15}{'connections':>12}  {'peer':<9}{'req/s':>8}{'p99 ms':>9}{'CPU us':>8}")
        for load, target in loads.items():
            for connections in map(int, options.connections.split(",")):
                rounds = [
                    (peer.name, uvloop.run(measure(peer, target, connections, options.requests)))
                    for _ in range(options.rounds)
                    for peer in peers
                ]
                for peer in peers:
                    best = max(figures for name, figures in rounds if name == peer.name)
                    shown = f"{best.per_second:>8.0f}{best.p99_ms:>9.2f}{best.cpu_us:>8.0f}"
                    print(f"{load:<15}{connections:>12}  {peer.name:<9}{shown}")


if __name__ == "__main__":
    main()
