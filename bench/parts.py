"""The runner with a clock on each of its parts: `profile.py` starts it in place of `runner.py serve`.

Where a part begins, a function is replaced by one that reads a clock before and after it. A part's time is without that
of the parts within it. It is wall time: the clock for CPU time takes a system call, which costs more than some parts.
The figures are those of a typical request: the median over groups of `GROUP` requests, so that what interrupted one
does not count. What the clocks cost is in them, and is taken off by `profile.py`, which can tell.

Only the short way is covered, which small requests go; what an answer in several pieces takes in the ordinary way is
outside of all parts. A function that is not there any more is an error, so that a part cannot silently become part of
another.
"""

import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

import serving

GROUP = 10
OUTPUT = "BENCH_PARTS"
"""The variable with the name of the file that the figures go to when the runner ends: `Part` by name, as JSON."""

PARTS = {
    "server": ("protocols:HttpProtocol.data_received", "shortcut:_Exchange.__init__", "cycle:Cycle.pass_on"),
    "verify": ("admission:Request.__init__", "admission:Request.admit_bare"),
    "policy": ("proxy:EngineFace.begin",),
    "relay": ("proxy:forwarded", "dockerapi:Engine.begin", "engine_connection:Connection.data_received"),
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
        self.turns = [0] * (parts + 1)
        """How often a clocked call has begun in a part, or led out of it."""
        self._now = [parts, time.perf_counter_ns()]
        """Where we are, since when: a list, which is quicker than attributes."""

    def on(self, part: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time that of the part."""
        clock, spent, turns, now = time.perf_counter_ns, self.spent, self.turns, self._now

        def clocked(*given: Any, **named: Any) -> Any:
            outer, since = now
            now[0] = part
            turns[outer] += 1
            turns[part] += 1
            now[1] = began = clock()
            spent[outer] += began - since
            try:
                return function(*given, **named)
            finally:
                ended = clock()
                spent[part] += ended - now[1]
                now[0] = outer
                now[1] = ended

        return clocked


class Transport:
    """A transport of the event loop, whose writing is the loop's time, and the kernel's: not that of who writes.

    Args:
        transport: the real one, to which all goes.
        clocks: those of the parts.
    """

    def __init__(self, transport: Any, clocks: Clocks) -> None:
        self._transport = transport
        self.write = clocks.on(clocks.outside, transport.write)
        self.writelines = clocks.on(clocks.outside, transport.writelines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Part(msgspec.Struct):
    """What a request took of a part, in microseconds, and how many turns (`Clocks.turns`)."""

    us: float
    turns: float


class Groups:
    """What each part took in groups of requests, one group after the other.

    Args:
        clocks: the parts'.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._requests = 0
        self._groups: list[tuple[list[int], list[int]]] = []

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, each call the end of a request."""

        def counted(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            self._requests += 1
            if self._requests % GROUP == 0:
                self._groups.append((self._clocks.spent[:], self._clocks.turns[:]))
            return result

        return counted

    def medians(self) -> dict[str, Part]:
        """By part, `outside` included, of a request."""
        spent, turns = zip(*self._groups, strict=True)
        names = (*PARTS, "outside")
        each = zip(names, _typical(spent), _typical(turns), strict=True)
        return {name: Part(nanoseconds / 1000, count) for name, nanoseconds, count in each}


def _typical(sums: Sequence[list[int]]) -> list[float]:
    """What a request adds to each of the sums, which were taken after every group."""
    groups = [[after - before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(sums)]
    return [statistics.median(values) / GROUP for values in zip(*groups, strict=True)]


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
    Path(os.environ[OUTPUT]).write_bytes(msgspec.json.encode(groups.medians()))


if __name__ == "__main__":
    main()
