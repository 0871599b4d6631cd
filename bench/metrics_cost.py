"""What metrics cost: a request's part in the counting, an event's, and a scrape with every operation in use.

    .venv/bin/python bench/metrics_cost.py

Microseconds of one core, the least of several runs. A scrape is made in pieces; callers are served between any two, so
that its longest piece is what one of them may wait for.
"""

import itertools
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app import App
from exposition import Exposition, Observed
from metrics import Metrics
from operations import OPERATIONS
from settings import read_settings
from workloads import ROUTES

TIMES = 100_000
EVENT = b'{"status":"start","Actor":{"Attributes":{"image":"busybox","name":"web"}},"timeNano":%d}\n'


class Traffic:
    """As a connection after a small request."""

    status = 200
    received, sent = 0, 2
    disconnected = False


def least_us(function: Callable[[], object]) -> float:
    """Microseconds that a call takes."""
    return min(timeit.repeat(function, number=TIMES, repeat=5)) / TIMES * 1e6


def main() -> None:
    """Measure, and print a table."""
    metrics, traffic, now = Metrics(), Traffic(), Observed(engine_up=True, connections=0, max_connections=1)
    event = EVENT % time.time_ns()

    def request() -> None:
        started = time.perf_counter()
        metrics.engine_answered("SystemPing", time.perf_counter() - started)
        metrics.ended("SystemPing", traffic, None, 0.0004, verified=True, lasting=False, key=None)

    print(f"{'a request':<40}{least_us(request):>8.2f} us")
    print(f"{'an event, for each who gets it':<40}{least_us(lambda: metrics.events_passed(event, 0)):>8.2f} us")
    app = App(read_settings({"DOCKER_RUNNER_SHARED_SECRET": "bench-secret-0123456789abcdef"}))
    for asked in [each.id for each in OPERATIONS] + [f"{method} {path}" for method, path, *_ in ROUTES]:
        app.metrics.ended(asked, traffic, None, 0.1, verified=True, lasting=False, key=None)
        app.metrics.engine_answered(asked, 0.1)
    exposition = Exposition(app)
    whole = longest = float("inf")
    for _ in range(10):
        marks, size = [time.perf_counter()], 0
        for piece in exposition.pieces(now):
            marks.append(time.perf_counter())
            size += len(piece)
        whole = min(whole, marks[-1] - marks[0])
        longest = min(longest, max(after - before for before, after in itertools.pairwise(marks)))
    print(f"{f'a scrape of every operation ({size:,} bytes)':<40}{whole * 1e6:>8.0f} us")
    print(f"{'its longest piece':<40}{longest * 1e6:>8.0f} us")


if __name__ == "__main__":
    main()
