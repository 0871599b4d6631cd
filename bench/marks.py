"""What the figures are held against: a ratio within the run (so that it holds on any machine), or a bound.

Where HAProxy is the base it is the one with `option http-no-delay`: without it, Docker's streams stutter.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from bench.figures import Figures, Key
from bench.subjects import HAPROXY, RUNNER


class Mark(NamedTuple):
    """A figure, what it is divided by (nothing: the figure itself counts), and the bound."""

    figure: Key
    base: Key | None
    bound: Literal["at most", "at least"]
    limit: float


class Verdict(NamedTuple):
    """A mark, and what was found; both are ratios, or in the figure's unit."""

    mark: Mark
    found: float

    @property
    def met(self) -> bool:
        """Whether the mark is reached."""
        below = self.found <= self.mark.limit
        return below if self.mark.bound == "at most" else self.found >= self.mark.limit


def _of_small_requests() -> Iterator[Mark]:
    for load in ("ping", "inspect", "list of 20", "list of 500"):
        for quantity, limit in (("p50_ms", 1.15), ("p99_ms", 1.5), ("cpu_us", 1.6)):
            yield _against(HAPROXY, load, quantity, "at most", limit)
    for load in ("ping", "inspect"):
        yield _against(HAPROXY, f"{load}, 32 at once", "per_s", "at least", 0.8)
        yield _against(HAPROXY, f"{load}, 32 at once", "cpu_us", "at most", 1.6)
        many, some = (Key(f"{load}, {count} at once", RUNNER, "per_s") for count in (256, 32))
        yield Mark(many, some, "at least", 1.0)


def _against(
    base: str, load: str, quantity: str, bound: Literal["at most", "at least"], limit: float, subject: str = RUNNER
) -> Mark:
    return Mark(Key(load, subject, quantity), Key(load, base, quantity), bound, limit)


MARKS = (*_of_small_requests(),)


def verdicts(figures: Figures) -> list[Verdict]:
    """On the marks whose figures were measured."""
    found = []
    for mark in MARKS:
        if mark.figure not in figures or (mark.base is not None and mark.base not in figures):
            continue
        ratio = figures.median(mark.figure) if mark.base is None else figures.ratio(mark.figure, mark.base)
        found.append(Verdict(mark, ratio))
    return found
