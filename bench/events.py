"""Fan-out of events: delay and loss for 1, 100, 1,000 subscribers of the runner, and of the engine directly.

    .venv/bin/python -m bench.events [--events 1000] [--subscribers 1,100] [--socket /var/run/docker.sock]

The figures of the issue on speed are those of `--events 10000 --subscribers 1,100,1000`. Execs are created at a steady
rate; an event's delay is from its `timeNano` to when a subscriber has it. Streams that have nothing to say are measured
before: how long all of them take to open, and the memory that each costs the runner.
"""

import argparse
import base64
import contextlib
import http.client
import json
import multiprocessing
import select
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.peers import ROOT, SECRET, connect, free_port, running
from client import sign
from dev import busybox
from dev.engine import Engine

IMAGE = "docker-runner-bench-events:latest"
PATIENCE_S = 10.0
"""How long what is missing at the end may still come."""
_NANO = b'"timeNano":'
_DIGITS = 19

Address = tuple[str, int] | str


def ask(engine: str, method: str, target: str, body: Any = None) -> Any:
    """One request to the engine; its JSON."""
    connection = http.client.HTTPConnection("bench")
    connection.sock = connect(engine)
    with contextlib.closing(connection):
        connection.request(method, target, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {target}: {content!r}")
        return json.loads(content) if content else None


@contextlib.contextmanager
def sleeper(engine: str) -> Iterator[str]:
    """A running container of our own; its id."""
    busybox.import_image(Engine(engine), IMAGE)
    try:
        config = {"Image": IMAGE, "Cmd": ["sleep", "100000"], "HostConfig": {"NetworkMode": "none"}}
        container: str = ask(engine, "POST", "/containers/create", config)["Id"]
        try:
            ask(engine, "POST", f"/containers/{container}/start")
            yield container
        finally:
            ask(engine, "DELETE", f"/containers/{container}?force=1")
    finally:
        ask(engine, "DELETE", f"/images/{IMAGE}")


def cause_events(engine: str, container: str, count: int, rate: float) -> None:
    """Create execs, `rate` a second; each is an event."""
    body = b'{"Cmd":["true"]}'
    head = f"POST /containers/{container}/exec HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(engine) as sock:
        begin = time.perf_counter()
        for number in range(count):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            sock.sendall(request)
            answer = sock.recv(65536)
            if b" 201 " not in answer[:20]:
                raise RuntimeError(f"no exec: {answer!r}")


class Subscribers:
    """Many streams of events, read by one thread. Everything is signed before the clock starts.

    Args:
        address: of whom they are asked.
        target: the request target.
        count: how many.
        signed: whether the requests are to be signed.
    """

    def __init__(self, address: Address, target: str, count: int, *, signed: bool) -> None:
        heads = [_head(target, signed=signed) for _ in range(count)]
        started = time.perf_counter()
        self._socks = [_begin(address, head) for head in heads]
        self._poll = select.epoll()
        for sock in self._socks:
            self._poll.register(sock, select.EPOLLIN)
        self._by_number = {sock.fileno(): sock for sock in self._socks}
        self.delays_ms: list[float] = []
        self.repeated = 0
        self.ended = 0
        self._rest = dict.fromkeys(self._by_number, b"")
        self._newest = dict.fromkeys(self._by_number, 0)
        self._received = dict.fromkeys(self._by_number, 0)
        self._await_heads()
        self.open_ms = (time.perf_counter() - started) * 1000

    def _await_heads(self) -> None:
        opened: set[int] = set()
        deadline = time.monotonic() + 60
        while len(opened) < len(self._socks):
            for number, _ in self._poll.poll(1):
                data = self._by_number[number].recv(65536)
                if not data.startswith(b"HTTP/1.1 200") and number not in opened:
                    raise RuntimeError(f"not opened: {data!r}")
                opened.add(number)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(opened)} of {len(self._socks)} streams opened")

    def read(self, expected: int, within_s: float) -> None:
        """Read until each has so many events; what is missing may come until `PATIENCE_S` after the given time."""
        deadline = time.monotonic() + within_s + PATIENCE_S
        missing = len(self._socks) * expected
        while missing > 0 and self._by_number and time.monotonic() < deadline:
            for number, _ in self._poll.poll(0.5):
                missing -= self._take(number)

    def _take(self, number: int) -> int:
        try:
            data = self._by_number[number].recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            self.ended += 1
            self._poll.unregister(number)
            self._by_number.pop(number)
            return 0
        now = time.time_ns()
        data = self._rest[number] + data
        newest, count, at = self._newest[number], 0, data.find(_NANO)
        end = 0
        while at >= 0 and at + len(_NANO) + _DIGITS <= len(data):
            end = at + len(_NANO) + _DIGITS
            nano = int(data[at + len(_NANO) : end])
            if nano <= newest:
                self.repeated += 1  # They are caused one after the other, so none is older than the one before.
            newest = nano
            self.delays_ms.append((now - nano) / 1e6)
            count += 1
            at = data.find(_NANO, end)
        self._newest[number] = newest
        self._received[number] += count
        self._rest[number] = data[max(end, len(data) - len(_NANO) - _DIGITS) :]
        return count

    def lost(self, expected: int) -> int:
        """Events that were not received, of all subscribers together."""
        return sum(max(0, expected - count) for count in self._received.values())

    def close(self) -> None:
        """Leave."""
        self._poll.close()
        for sock in self._socks:
            sock.close()


def _head(target: str, *, signed: bool) -> bytes:
    fields = sign(SECRET, "GET", target) if signed else {}
    lines = [f"GET {target} HTTP/1.1", "Host: bench", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _begin(address: Address, head: bytes) -> socket.socket:
    sock = connect(address)
    sock.sendall(head)
    sock.setblocking(False)
    return sock


def resident_kb(pid: int) -> int:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def _delivery(engine: str, container: str, subscribers: Subscribers, events: int, rate: float) -> dict[str, Any]:
    """Cause events, and see what the subscribers get."""
    process = multiprocessing.get_context("fork").Process(
        target=cause_events, args=(engine, container, events, rate), daemon=True
    )
    time.sleep(0.3)  # The engine sends a stream's head before it listens.
    process.start()
    subscribers.read(events, events / rate)
    process.join()
    delays = sorted(subscribers.delays_ms) or [float("nan")]
    return {
        "p50_ms": statistics.median(delays),
        "p99_ms": delays[int(len(delays) * 0.99)],
        "max_ms": delays[-1],
        "lost": subscribers.lost(events),
        "repeated": subscribers.repeated,
        "cut_off": subscribers.ended,
    }


def run(
    engine: str, *, subscribers: tuple[int, ...] = (1, 100), events: int = 1000, rate: float = 100, idle: int = 500
) -> dict[str, Any]:
    """All loads, the engine and the runner in turn.

    Args:
        engine: the engine's socket.
        subscribers: how many at once, for each of which all events are caused.
        events: how many, caused `rate` a second.
        idle: streams that are only opened and held, of the runner.

    Returns:
        `{"delivery": [{"peer", "subscribers", "p50_ms", "p99_ms", "max_ms", "lost", "repeated", "cut_off",
        "cpu_ms_per_event"}], "idle": {"streams", "open_ms", "kb_each"}}`. CPU time is the runner's alone.
    """
    delivery: list[dict[str, Any]] = []
    with sleeper(engine) as container, _runner(engine) as (port, pid):
        filters = json.dumps({"container": [container], "event": ["exec_create"], "type": ["container"]})
        plain = "/events?filters=" + filters.replace('"', "%22").replace(" ", "")
        feed = "/v1/events/sse?filters=" + base64.urlsafe_b64encode(filters.encode()).decode().rstrip("=")
        idle_found = _idle(port, pid, feed, idle)
        for count in subscribers:
            for peer in ("engine", "runner"):
                address: Address = engine if peer == "engine" else ("127.0.0.1", port)
                streams = Subscribers(address, plain if peer == "engine" else feed, count, signed=peer == "runner")
                with contextlib.closing(streams):
                    before = _cpu_s(pid)
                    found = _delivery(engine, container, streams, events, rate)
                    cpu = (_cpu_s(pid) - before) * 1000 / events
                delivery.append({"peer": peer, "subscribers": count, **found, "cpu_ms_per_event": cpu})
    return {"delivery": delivery, "idle": idle_found}


@contextlib.contextmanager
def _runner(engine: str) -> Iterator[tuple[int, int]]:
    """A runner of our own: its port and process id."""
    port = free_port()
    settings = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_SOCKET": engine, "DOCKER_RUNNER_ENV": "production"}
    settings |= {"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": str(port)}
    settings |= {"DOCKER_RUNNER_MAX_STREAMS": "10000", "DOCKER_RUNNER_MAX_CONNECTIONS": "10000"}
    settings |= {"DOCKER_RUNNER_MAX_REQUESTS": "10000", "DOCKER_RUNNER_ENGINE_CONNECTIONS": "10000"}
    with running([sys.executable, str(ROOT / "runner.py"), "serve"], settings) as process:
        connect(("127.0.0.1", port)).close()
        yield port, process.pid


def _idle(port: int, pid: int, target: str, count: int) -> dict[str, Any]:
    """Open streams that say nothing: the first time for warmth, then measured."""
    with contextlib.closing(Subscribers(("127.0.0.1", port), target, 20, signed=True)):
        before = resident_kb(pid)
        streams = Subscribers(("127.0.0.1", port), target, count, signed=True)
        with contextlib.closing(streams):
            time.sleep(0.2)
            each = (resident_kb(pid) - before) / count
    return {"streams": count, "open_ms": streams.open_ms, "kb_each": each}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100, help="events a second")
    parser.add_argument("--subscribers", default="1,100", help="how many at once, one after the other")
    parser.add_argument("--idle", type=int, default=500, help="streams that are only opened")
    parser.add_argument("--socket", default="/var/run/docker.sock", help="the engine's")
    options = parser.parse_args()
    counts = tuple(int(count) for count in options.subscribers.split(","))
    found = run(options.socket, subscribers=counts, events=options.events, rate=options.rate, idle=options.idle)
    idle = found["idle"]
    print(f"{idle['streams']} idle streams: {idle['open_ms']:.0f} ms to open, {idle['kb_each']:.1f} KB each")
    print(
        f"{'subscribers':>11} {'peer':<8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'lost':>8}{'again':>7}{'cut off':>9}"
    )
    for row in found["delivery"]:
        figures = f"{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{row['max_ms']:>9.2f}"
        counted = f"{row['lost']:>8}{row['repeated']:>7}{row['cut_off']:>9}"
        cpu = f"   {row['cpu_ms_per_event']:.2f} ms CPU an event" if row["peer"] == "runner" else ""
        print(f"{row['subscribers']:>11} {row['peer']:<8}{figures}{counted}{cpu}")


if __name__ == "__main__":
    main()
