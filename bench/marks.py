"""What the figures are held against: a ratio within the run (so that it holds on any machine), or a bound.

Where HAProxy is the base it is the one with `option http-no-delay`: without it, Docker's streams stutter.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from bench.execs import RUN
from bench.figures import Figures, Key
from bench.startup import ONE_FILE
from bench.subjects import BEFORE, ENGINE, HAPROXY, RUNNER
from bench.transfers import CHUNKED, HASHED


class Mark(NamedTuple):
    """A figure, what it is divided by (nothing: the figure itself counts), and the bound."""

    figure: Key
    base: Key | None
    bound: Literal["at most", "at least"]
    limit: float


class Verdict(NamedTuple):
    """A mark, and what was found: a ratio, or in the figure's unit. `before`: the same of the runner before."""

    mark: Mark
    found: float
    before: float | None = None

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


def _of_streams() -> Iterator[Mark]:
    yield _against(ENGINE, "exec of true", "ms", "at most", 1.03, RUNNER + RUN)
    for size in ("64 MB", "512 KB"):
        for form in (HASHED, CHUNKED):
            yield _against(ENGINE, f"upload of {size}", "mb_per_s", "at least", 0.9, RUNNER + form)
        yield _against(ENGINE, f"download of {size}", "mb_per_s", "at least", 0.9)
    for lines in ("short lines", "long lines"):
        yield _against(ENGINE, f"log of {lines}", "mb_per_s", "at least", 0.9)
    for count in ("1", "100", "1,000"):
        yield _against(ENGINE, f"10,000 events to {count}", "p50_ms", "at most", 1.5)


def _bounds() -> Iterator[Mark]:
    for load, subject, quantity, limit in (
        ("10,000 events to 1,000", RUNNER, "lost", 0.0),
        ("10,000 events to 1,000", RUNNER, "p99_ms", 250.0),
        ("500 idle streams", RUNNER, "open_ms", 100.0),
        ("1,000 idle streams", RUNNER, "kb_each", 20.0),
        ("start-up", RUNNER, "start_ms", 350.0),
        ("start-up", ONE_FILE, "start_ms", 600.0),
        ("memory", RUNNER, "idle_mb", 45.0),
    ):
        yield Mark(Key(load, subject, quantity), None, "at most", limit)


MARKS = (*_of_small_requests(), *_of_streams(), *_bounds())


def earlier(mark: Mark) -> Mark | None:
    """The same for the runner of `--before`; None if it is of something that is measured of this one only."""

    def of(key: Key) -> Key:
        form = key.subject.removeprefix(RUNNER)
        return key if form == key.subject else key._replace(subject=BEFORE + form)

    moved = mark._replace(figure=of(mark.figure), base=mark.base and of(mark.base))
    return None if moved == mark else moved


def verdicts(figures: Figures) -> list[Verdict]:
    """On the marks whose figures were measured."""
    found = []
    for mark in MARKS:
        value, before = _found(figures, mark), earlier(mark)
        if value is not None:
            found.append(Verdict(mark, value, before and _found(figures, before)))
    return found


def _found(figures: Figures, mark: Mark) -> float | None:
    if mark.figure not in figures or (mark.base is not None and mark.base not in figures):
        return None
    return figures.median(mark.figure) if mark.base is None else figures.ratio(mark.figure, mark.base)
