"""Latency and throughput of small requests: the engine, the runner (signed), the bridge before it, HAProxy (unsigned).

    .venv/bin/python bench/latency.py [--rounds 20] [--requests 200] [--socket /var/run/docker.sock]

Sequential requests on one kept connection each, in interleaved rounds, so that whatever else the machine does hits all
alike; the ratios are what counts. HAProxy takes part where it is installed. Signing is done before the clock starts: it
is the client's part.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from peers import ROOT, SECRET, bridge, connect, free_port, runner, running

sys.path.insert(0, str(ROOT))

from client import sign


class Peer:
    """Something that answers Engine API requests on a stream socket."""

    def __init__(self, name: str, sock: socket.socket, *, signed: bool) -> None:
        self.name = name
        self.signed = signed
        self.sock = sock

    def ask(self, targets: list[str]) -> list[float]:
        """Seconds that each request took, on one connection."""
        heads = []
        for target in targets:
            lines = [f"GET {target} HTTP/1.1", "Host: bench"]
            if self.signed:
                lines += [f"{name}: {value}" for name, value in sign(SECRET, "GET", target).items()]
            heads.append(("\r\n".join(lines) + "\r\n\r\n").encode())
        times = []
        for head in heads:
            started = time.perf_counter()
            self.sock.sendall(head)
            self._read_answer()
            times.append(time.perf_counter() - started)
        return times

    def _read_answer(self) -> None:
        data = self.sock.recv(1 << 20)
        while b"\r\n\r\n" not in data:
            data += self.sock.recv(1 << 20)
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{self.name}: {data[:300]!r}")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = len(body)
        if length is None:
            while not data.endswith(b"0\r\n\r\n"):
                data += self.sock.recv(1 << 20)
            return
        while size < int(length[1]):
            size += len(self.sock.recv(1 << 20))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="in each round, for each peer")
    parser.add_argument("--socket", default="/var/run/docker.sock", help="the engine's")
    options = parser.parse_args()
    engine: str = options.socket
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        port = stack.enter_context(runner(engine))
        bridged = stack.enter_context(bridge(port, f"{folder}/bridge.sock"))
        peers = [
            Peer("engine", connect(engine), signed=False),
            Peer("runner", connect(("127.0.0.1", port)), signed=True),
            Peer("bridge+runner", connect(bridged), signed=False),
        ]
        haproxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if haproxy:
            port = free_port()
            config = Path(folder) / "haproxy.cfg"
            config.write_text(
                "global\n maxconn 1000\ndefaults\n mode http\n timeout connect 5s\n timeout client 1m\n"
                f" timeout server 1m\nlisten docker\n bind 127.0.0.1:{port}\n server engine unix@{engine}\n"
            )
            stack.enter_context(running([haproxy, "-f", str(config)]))
            peers.append(Peer("haproxy", connect(("127.0.0.1", port)), signed=False))
        images = json.loads(subprocess.check_output(["curl", "-s", "--unix-socket", engine, "http://e/images/json"]))
        loads = {"ping": "/_ping", "version": "/version"}
        if images:
            loads["image inspect"] = f"/images/{images[0]['Id']}/json"
        print(f"{'load':<15}{'peer':<15}{'p50 ms':>9}{'p99 ms':>9}{'x engine':>10}")
        for load, target in loads.items():
            times: dict[str, list[float]] = {peer.name: [] for peer in peers}
            for _ in range(options.rounds):
                for peer in peers:
                    times[peer.name] += peer.ask([target] * options.requests)
            base = statistics.median(times["engine"])
            for name, taken in times.items():
                p50, p99 = statistics.median(taken), sorted(taken)[int(len(taken) * 0.99)]
                print(f"{load:<15}{name:<15}{p50 * 1000:>9.3f}{p99 * 1000:>9.3f}{p50 / base:>10.2f}")


if __name__ == "__main__":
    main()
