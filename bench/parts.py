"""The runner with a clock on each of its parts: `profile.py` starts it in place of `runner.py serve`.

Where a part begins, a function is replaced by one that reads a clock before and after it. A part's time is without that
of the parts within it, and without what the clock itself costs, which is measured at the start. It is wall time: the
clock for CPU time takes a system call, which costs more than some parts. The figures are those of a typical request:
the median over groups of `GROUP` requests, so that what interrupted one does not count.

Only the short way is covered, which small requests go. A function that is not there any more is an error, so that a
part cannot silently become part of another.
"""

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import serving

GROUP = 10
OUTPUT = "BENCH_PARTS"
"""The variable with the file's name that the figures go to when the runner ends: JSON, microseconds by part."""

PARTS = {
    "server": ("protocols:HttpProtocol.data_received", "shortcut:_Exchange.__init__", "cycle:Cycle.pass_on"),
    "verify": ("admission:Request.__init__", "admission:Request.admit_bare"),
    "policy": ("proxy:EngineFace.begin",),
    "relay": ("proxy:end_to_end", "dockerapi:Engine.begin", "engine_connection:Connection.data_received"),
    "record": ("admission:Authentication.ended", "metrics:Metrics.engine_answered"),
}
"""Where each part begins: `MODULE:NAME`, or `MODULE:CLASS.NAME`."""
TRANSPORTS = ("protocols:HttpProtocol.connection_made", "engine_connection:Connection.connection_made")
"""Are given the transports that the event loop writes to."""
LAST = "admission:Authentication.ended"
"""Is called once for each request."""


class Clocks:
    """Time spent in each part, in nanoseconds; `outside` stands for all that belongs to none.

    Args:
        parts: how many there are.
    """

    def __init__(self, parts: int) -> None:
        self.outside = parts
        self.spent = [0] * (parts + 1)
        self._within = parts
        self._since = time.perf_counter_ns()
        self._own = [0] * (parts + 1)
        self._inner = self._outer = 0
        self._calibrate()

    def on(self, part: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time that of the part."""
        clock, spent, own = time.perf_counter_ns, self.spent, self._own

        def clocked(*given: Any, **named: Any) -> Any:
            outer = self._within
            spent[outer] += clock() - self._since
            own[outer] += self._outer
            own[part] += self._inner
            self._within = part
            self._since = clock()
            try:
                return function(*given, **named)
            finally:
                spent[part] += clock() - self._since
                self._within = outer
                self._since = clock()

        return clocked

    def net(self) -> list[int]:
        """By part, so far, without what the clocks cost."""
        return [spent - own for spent, own in zip(self.spent, self._own, strict=True)][: self.outside]

    def _calibrate(self, times: int = 20_000) -> None:
        """What a clocked call adds: within the part, and outside of it."""

        def nothing(_: object) -> None:
            pass

        best_inner = best_outer = sys.maxsize
        clocked = self.on(0, nothing)
        for _ in range(5):
            self.spent[:] = [0] * len(self.spent)
            self._since = time.perf_counter_ns()
            for _ in range(times):
                clocked(None)
            outside = self.spent[self.outside] + time.perf_counter_ns() - self._since
            started = time.perf_counter_ns()
            for _ in range(times):
                nothing(None)
            bare = time.perf_counter_ns() - started
            best_inner = min(best_inner, self.spent[0] // times)
            best_outer = min(best_outer, (outside - bare) // times)
        self._inner, self._outer = best_inner, best_outer
        self.spent[:] = [0] * len(self.spent)


class Transport:
    """A transport of the event loop, whose writing is the loop's time, and the kernel's: not that of who writes.

    Args:
        transport: the real one, to which all goes.
        clocks: those of the parts.
    """

    def __init__(self, transport: Any, clocks: Clocks) -> None:
        self._transport = transport
        self.write = clocks.on(clocks.outside, transport.write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Groups:
    """What each part took in groups of requests, one group after the other.

    Args:
        clocks: the parts'.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._requests = 0
        self._last = clocks.net()
        self._groups: list[list[float]] = []

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, each call the end of a request."""

        def counted(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            self._requests += 1
            if self._requests % GROUP == 0:
                now = self._clocks.net()
                self._groups.append([(new - old) / GROUP for new, old in zip(now, self._last, strict=True)])
                self._last = now
            return result

        return counted

    def medians_us(self) -> list[float]:
        """By part, of a request. The first group warms up."""
        return [statistics.median(values) / 1000 for values in zip(*self._groups[1:], strict=True)]


def install() -> Groups:
    """Put the clocks in. Raises AttributeError, ModuleNotFoundError."""
    clocks = Clocks(len(PARTS))
    groups = Groups(clocks)
    for part, places in enumerate(PARTS.values()):
        for place in places:
            _replace(place, partial(clocks.on, part))
    for place in TRANSPORTS:
        _replace(place, lambda made: lambda protocol, transport: made(protocol, Transport(transport, clocks)))
    _replace(LAST, groups.counting)
    return groups


def _replace(place: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    setattr(owner, name, by(getattr(owner, name)))


def main() -> None:
    """Serve until SIGTERM, then write."""
    groups = install()
    serving.serve(os.environ)
    Path(os.environ[OUTPUT]).write_text(json.dumps(dict(zip(PARTS, groups.medians_us(), strict=False))))


if __name__ == "__main__":
    main()
