"""Requests per second with many connections, each of which asks again as soon as it has its answer.

The generator is one thread on epoll, and does the same for every subject. What it computes is a figure too
(`generator_us`): 10 to 20 us for a request, most of them the kernel's, so that it is not what limits a proxy.
"""

import gc
import os
import select
import time
from contextlib import ExitStack, closing
from socket import socket
from typing import NamedTuple

from bench.exchange import BenchError, connect, request, whole
from bench.figures import Figures, Sizes, percentile
from bench.stage import Stage
from bench.subjects import Subject

PATIENCE_S = 30


class Driven(NamedTuple):
    """What came of many requests: seconds that each took, that all took; CPU seconds of the subject, and our own."""

    times: list[float]
    took: float
    cpu: float
    own: float


def throughput(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """`per_s`, `p99_ms`, `cpu_us` (of a request, in the subject) and `generator_us` (in the generator)."""
    count = sizes.requests_at_once
    for name, target in (("ping", "/_ping"), ("inspect", f"/containers/{stage.box()}/json")):
        for connections in sizes.connections:
            for _ in range(sizes.rounds_at_once):
                for subject in stage.subjects:
                    found = drive(subject, target, connections, count)
                    cost = {"cpu_us": found.cpu / count * 1e6} if subject.pids else {}
                    p99, own = percentile(found.times, 0.99) * 1000, found.own / count * 1e6
                    load = f"{name}, {connections} at once"
                    figures.add(load, subject.name, per_s=count / found.took, p99_ms=p99, generator_us=own, **cost)


def drive(subject: Subject, target: str, connections: int, count: int) -> Driven:
    """So many requests over so many connections, which are made before the clock starts. Raises BenchError, OSError."""
    prepared = [request("GET", target, signed=subject.signed) for _ in range(count)]
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(connect(subject.address))) for _ in range(min(connections, count))]
        cpu, own = subject.cpu_s(), time.process_time()
        gc.disable()
        started = time.perf_counter()
        try:
            times = _drive(socks, prepared)
        finally:
            gc.enable()
        took = time.perf_counter() - started
        return Driven(times, took, subject.cpu_s() - cpu, time.process_time() - own)


def _drive(socks: list[socket], prepared: list[bytes]) -> list[float]:
    """Send all requests, over all connections; seconds that each took. Raises BenchError."""
    poll, clock, times = select.epoll(), time.perf_counter, []
    asked: dict[int, float] = {}
    begun: dict[int, bytes] = {}
    with closing(poll):
        for sock in socks:
            poll.register(sock.fileno(), select.EPOLLIN)
        for sock in socks:
            asked[sock.fileno()] = clock()
            sock.sendall(prepared.pop())
        while asked:
            ready = poll.poll(PATIENCE_S)
            if not ready:
                raise BenchError(f"{len(asked)} requests were not answered within {PATIENCE_S} s")
            for number, _ in ready:
                data = os.read(number, 1 << 18)
                if number in begun:
                    data = begun.pop(number) + data
                if not (complete := whole(data)) and data:
                    begun[number] = data
                    continue
                if not complete or data[9:12] != b"200":
                    raise BenchError(f"a wrong answer: {data[:400]!r}")
                now = clock()
                times.append(now - asked[number])
                if prepared:
                    asked[number] = now
                    os.write(number, prepared.pop())
                else:
                    del asked[number]
    return times
