"""What was measured. Every figure keeps one value for each round: subjects take turns within a round, so that what else
the machine does hits all alike, and a ratio is taken within a round before the median is taken over the rounds.
"""

import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec


class Key(NamedTuple):
    """What a figure is of. `quantity` ends in its unit: `p50_ms`, `cpu_us`, `mb_per_s`."""

    load: str
    subject: str
    quantity: str


class Sizes(msgspec.Struct, frozen=True):
    """How large a run is."""

    requests: int = 200
    """One after the other, in one subject's part of a round."""
    rounds: int = 15
    load_s: float = 40
    """Rounds of slow requests are fewer (but three), so that a load takes about so long at most."""
    lists: tuple[int, ...] = (20, 500)
    """Containers that are listed."""
    connections: tuple[int, ...] = (1, 32, 256)
    requests_at_once: int = 3000
    """Over all connections, in one subject's part of a round."""
    rounds_at_once: int = 7
    execs: int = 60
    archives: tuple[int, ...] = (64 << 20, 512 << 10)
    """Bytes."""
    log: int = 4 << 20
    """Bytes in short lines; four times as many in long ones, which the engine reads as much faster."""
    transfers: int = 9
    """Rounds of each archive and log."""
    events: int = 10_000
    rate: float = 100
    """Of events, a second."""
    subscribers: tuple[int, ...] = (1, 100, 1000)
    idle: tuple[int, ...] = (500, 1000)
    """Streams that are opened and held."""
    starts: int = 10
    requests_for_memory: int = 20_000
    profile_s: float = 8


FULL = Sizes()
QUICK = Sizes(
    rounds=5,
    load_s=10,
    lists=(20,),
    requests_at_once=1500,
    rounds_at_once=3,
    execs=15,
    log=1 << 20,
    transfers=3,
    events=300,
    subscribers=(1, 100),
    starts=3,
    profile_s=2,
)
SMOKE = Sizes(
    requests=3,
    rounds=1,
    load_s=0,
    lists=(2,),
    connections=(1, 4),
    requests_at_once=20,
    rounds_at_once=1,
    execs=1,
    archives=(100_000,),
    log=100_000,
    transfers=1,
    events=20,
    subscribers=(1, 3),
    idle=(5, 10),
    starts=1,
    requests_for_memory=20,
    profile_s=0.3,
)


class Figures:
    """The figures of a run, in the order in which they came."""

    def __init__(self) -> None:
        self._values: dict[Key, list[float]] = {}

    def add(self, load: str, subject: str, **values: float) -> None:
        """One round's values of a subject under a load, by quantity."""
        for quantity, value in values.items():
            self._values.setdefault(Key(load, subject, quantity), []).append(value)

    def __iter__(self) -> Iterator[tuple[Key, list[float]]]:
        return iter(self._values.items())

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def median(self, key: Key) -> float:
        """Over the rounds. Raises KeyError."""
        return statistics.median(self._values[key])

    def ratio(self, key: Key, base: Key) -> float:
        """Of two figures: the median of the rounds' ratios. Raises KeyError."""
        pairs = zip(self._values[key], self._values[base], strict=False)
        return statistics.median(value / other for value, other in pairs if other)


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them (0 to 1) do not pass."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
