"""Events: delay and loss for many subscribers at once; and what streams cost that have nothing to say.

Execs are created at a steady rate by a process of its own; an event's delay is from its `timeNano` to when a
subscriber has it. All subscribers are read by one thread, so that with 1,000 of them a good part of the delay is the
reader's: the same for every subject.
"""

import base64
import contextlib
import json
import multiprocessing
import os
import select
import time
from urllib.parse import quote

from bench.exchange import Address, BenchError, ask, connect, request
from bench.figures import Figures, Sizes, percentile
from bench.stage import Stage
from bench.subjects import BEFORE, ENGINE, HAPROXY, HAPROXY_DELAYING, RUNNER, Subject, memory_kb, runner
from dev import CHECKOUT

PATIENCE_S = 10.0
"""How long what is missing at the end may still come."""
_NANO = b'"timeNano":'
_DIGITS = 19


def events(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """The engine's own stream, and the runner's SSE: `p50_ms`, `p99_ms`, `max_ms`, `lost`, `repeated`, `cut_off`.

    HAProxy is measured with the fewest subscribers only: what one more process in between costs.
    """
    container = stage.sleeper()
    filters = json.dumps({"container": [container], "event": ["exec_create"], "type": ["container"]})
    names = [ENGINE, RUNNER] + ([BEFORE] if stage.before else [])
    for count in sizes.subscribers:
        among = [*names, HAPROXY, HAPROXY_DELAYING] if count == min(sizes.subscribers) else names
        load = f"{sizes.events:,} events to {count:,}"
        for subject in map(stage.subject, among):
            streams = Subscribers(subject.address, _target(subject, filters), count, signed=subject.signed)
            with contextlib.closing(streams):
                _settle(stage.engine, container, streams)
                cpu = subject.cpu_s()
                _delivery(stage.engine, container, streams, sizes)
                cost = {"cpu_ms": (subject.cpu_s() - cpu) * 1000 / sizes.events} if subject.pids else {}
                delays = {"p50_ms": percentile(streams.delays_ms, 0.5), "p99_ms": percentile(streams.delays_ms, 0.99)}
                counted = {"lost": streams.lost(sizes.events), "again": streams.repeated, "cut_off": streams.ended}
                figures.add(load, subject.name, **delays, max_ms=max(streams.delays_ms), **counted, **cost)


def idle(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """Streams of events that never come, of runners that were just started: `open_ms`, and the memory of each."""
    filters = json.dumps({"container": ["there is none"], "type": ["container"]})
    checkouts = {RUNNER: CHECKOUT} | ({BEFORE: stage.before} if stage.before else {})
    for _ in range(min(3, sizes.starts)):
        for name, checkout in checkouts.items():
            with runner(stage.engine, stage.folder, name, checkout) as subject:
                _open(subject, _target(subject, filters), sizes.idle, figures)
        _open(stage.subject(ENGINE), _target(stage.subject(ENGINE), filters), sizes.idle, figures)


def _open(subject: Subject, target: str, counts: tuple[int, ...], figures: Figures) -> None:
    with contextlib.closing(Subscribers(subject.address, target, 5, signed=subject.signed)):
        before = memory_kb(subject.pids[0]) if subject.pids else 0
        for count in counts:
            with contextlib.closing(Subscribers(subject.address, target, count, signed=subject.signed)) as streams:
                time.sleep(0.2)  # what a stream needs later is its cost, too
                # What earlier ones left behind is used again: memory is that of the most so far.
                cost = {"kb_each": (memory_kb(subject.pids[0]) - before) / count} if subject.pids else {}
                figures.add(f"{count:,} idle streams", subject.name, open_ms=streams.open_ms, **cost)


def _target(subject: Subject, filters: str) -> str:
    if subject.signed:
        return f"/v1/events/sse?filters={base64.urlsafe_b64encode(filters.encode()).decode().rstrip('=')}"
    return f"/events?filters={quote(filters)}"


class Subscribers:
    """Many streams of events, read by one thread. Everything is signed before the clock starts.

    Args:
        address: of whom they are asked.
        target: the request target.
        count: how many.
        signed: whether the requests are to be signed.
    """

    def __init__(self, address: Address, target: str, count: int, *, signed: bool) -> None:
        heads = [request("GET", target, signed=signed) for _ in range(count)]
        self._socks = []
        self._poll = select.epoll()
        started = time.perf_counter()
        for head in heads:
            sock = connect(address)
            self._socks.append(sock)
            sock.sendall(head)
            self._poll.register(sock, select.EPOLLIN)
        self._open = {sock.fileno() for sock in self._socks}
        self._rest = dict.fromkeys(self._open, b"")
        self._newest = dict.fromkeys(self._open, 0)
        self._received = dict.fromkeys(self._open, 0)
        self.delays_ms: list[float] = []
        self.repeated = 0
        self.ended = 0
        self._await_heads()
        self.open_ms = (time.perf_counter() - started) * 1000

    def _await_heads(self) -> None:
        opened: set[int] = set()
        deadline = time.monotonic() + 60
        while len(opened) < len(self._socks):
            for number, _ in self._poll.poll(1):
                data = os.read(number, 65536)
                if not data.startswith(b"HTTP/1.1 200") and number not in opened:
                    raise BenchError(f"not opened: {data!r}")
                opened.add(number)
            if time.monotonic() > deadline:
                raise BenchError(f"{len(opened)} of {len(self._socks)} streams opened")

    def forget(self) -> None:
        """Begin to count anew."""
        self.delays_ms.clear()
        self.repeated = 0
        self._received = dict.fromkeys(self._received, 0)

    def all_have(self, count: int) -> bool:
        """Whether each has so many."""
        return all(received >= count for received in self._received.values())

    def read(self, expected: int, within_s: float) -> None:
        """Read until each has so many events, or the time is over."""
        deadline = time.monotonic() + within_s
        missing = self.lost(expected)
        while missing > 0 and self._open and time.monotonic() < deadline:
            for number, _ in self._poll.poll(0.1):
                missing -= self._take(number)

    def _take(self, number: int) -> int:
        try:
            data = os.read(number, 1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            self.ended += 1
            self._poll.unregister(number)
            self._open.remove(number)
            return 0
        now = time.time_ns()
        data = self._rest[number] + data
        newest, count, end, at = self._newest[number], 0, 0, data.find(_NANO)
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


def _settle(engine: str, container: str, streams: Subscribers) -> None:
    """The engine sends a stream's head before it listens: so until each has had an event, more are caused."""
    deadline = time.monotonic() + 30
    caused = 0
    while not streams.all_have(1):
        _cause(engine, container, 1, 100)
        caused += 1
        streams.read(caused, 0.2)
        if time.monotonic() > deadline:
            raise BenchError(f"{streams.lost(1)} streams gave no event within 30 s")
    streams.read(caused, 0.2)
    streams.forget()


def _delivery(engine: str, container: str, streams: Subscribers, sizes: Sizes) -> None:
    """Cause events, and see what the subscribers get."""
    caused = (engine, container, sizes.events, sizes.rate)
    process = multiprocessing.get_context("fork").Process(target=_cause, args=caused, daemon=True)
    process.start()
    try:
        streams.read(sizes.events, sizes.events / sizes.rate + PATIENCE_S)
        process.join()
    finally:
        process.kill()  # It has ended, unless we are told to end.
    if process.exitcode or not streams.delays_ms:
        raise BenchError("no events were caused, or none came")


def _cause(engine: str, container: str, count: int, rate: float) -> None:
    """Create execs, `rate` a second; each is an event."""
    prepared = request("POST", f"/containers/{container}/exec", b'{"Cmd":["true"]}', signed=False)
    with contextlib.closing(connect(engine)) as sock:
        begin = time.perf_counter()
        for number in range(count):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            ask(sock, prepared, b"201")
