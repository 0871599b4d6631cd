"""Small requests one after the other, on one kept connection for each subject: latency, and CPU time of a request."""

import time
from contextlib import ExitStack, closing
from socket import socket

from bench.exchange import ask, connect, request
from bench.figures import Figures, Sizes, percentile
from bench.stage import Stage
from bench.subjects import Subject

WARM_UP = 20
LEAST_ROUNDS = 3


def targets(stage: Stage, sizes: Sizes) -> dict[str, str]:
    """What is asked for, by the name of the load."""
    lists = {f"list of {count}": stage.listed(count) for count in sizes.lists}
    return {"ping": "/_ping", "inspect": f"/containers/{stage.box()}/json", **lists}


def latency(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """Round by round, each subject in turn; `p50_ms`, `p99_ms`, `cpu_us`."""
    with ExitStack() as stack:
        socks = [(each, stack.enter_context(closing(connect(each.address)))) for each in stage.subjects]
        for load, target in targets(stage, sizes).items():
            for subject, sock in socks:
                part(subject, sock, target, min(WARM_UP, sizes.requests))
            slowest = max(min(part(*each, target, 3)[0]) for each in socks)
            fitting = int(sizes.load_s / (slowest * sizes.requests * len(socks)))
            for _ in range(min(sizes.rounds, max(LEAST_ROUNDS, fitting))):
                for subject, sock in socks:
                    times, cpu = part(subject, sock, target, sizes.requests)
                    p50, p99 = (percentile(times, share) * 1000 for share in (0.5, 0.99))
                    cost = {"cpu_us": cpu * 1e6} if subject.pids else {}
                    figures.add(load, subject.name, p50_ms=p50, p99_ms=p99, **cost)


def part(subject: Subject, sock: socket, target: str, count: int) -> tuple[list[float], float]:
    """Seconds that each request took; seconds of CPU time that one cost the subject."""
    prepared = [request("GET", target, signed=subject.signed) for _ in range(count)]
    times = []
    cpu = subject.cpu_s()
    for each in prepared:
        started = time.perf_counter()
        ask(sock, each)
        times.append(time.perf_counter() - started)
    return times, (subject.cpu_s() - cpu) / count
