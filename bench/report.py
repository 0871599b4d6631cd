"""What a run gives: tables for people, JSON for whatever comes after."""

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.figures import Figures, Key
from bench.marks import Verdict
from dev import CHECKOUT

_UNITS = {"ms": "ms", "us": "µs", "s": "s", "kb": "KB", "mb": "MB"}


def heading(quantity: str) -> str:
    """`mb_per_s` as `MB/s`, `per_s` as `1/s`, `p50_ms` as `p50 ms`."""
    name, slash, per = quantity.partition("per_")
    words = [_UNITS.get(word, word) for word in name.split("_") if word]
    return (
        f"{' '.join(words) or '1'}/{' '.join(_UNITS.get(word, word) for word in per.split('_'))}"
        if slash
        else " ".join(words)
    )


def tables(figures: Figures) -> Iterator[str]:
    """In Markdown, one for each set of quantities: a row is a load and a subject, a value the rounds' median."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for key, _ in figures:
        rows.setdefault((key.load, key.subject), {})[key.quantity] = figures.median(key)
    columns: tuple[str, ...] = ()
    last = ""
    for (load, subject), values in rows.items():
        if not set(values) <= set(columns):
            columns = tuple(_columns_of(rows, load))
            yield from _head("load", "subject", *map(heading, columns))
        cells = [number(values[column]) if column in values else "" for column in columns]
        yield _row("" if load == last else load, subject, *cells)
        last = load


def _columns_of(rows: dict[tuple[str, str], dict[str, float]], load: str) -> list[str]:
    return list(dict.fromkeys(column for (of, _), values in rows.items() if of == load for column in values))


def judgement(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The marks, in Markdown."""
    if not verdicts:
        return
    yield from _head("mark", "of", "bound", "found", "")
    for verdict in verdicts:
        figure, base = verdict.mark.figure, verdict.mark.base
        bound = f"{verdict.mark.bound} {number(verdict.mark.limit)}" + (f" x {_base(figure, base)}" if base else "")
        result = "met" if verdict.met else "**missed**"
        yield _row(f"{figure.load}: {heading(figure.quantity)}", figure.subject, bound, number(verdict.found), result)


def _base(figure: Key, base: Key) -> str:
    return base.load if base.subject == figure.subject else base.subject


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _head(*names: str) -> Iterator[str]:
    yield ""
    yield _row(*names)
    yield _row("---", "---", *["---:"] * (len(names) - 2))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    """What the figures were measured on, and of which commit."""
    commit = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def as_json(figures: Figures, verdicts: Sequence[Verdict], about: dict[str, Any]) -> bytes:
    """`{"machine": {..}, "figures": [{"load", "subject", "quantity", "median", "rounds": [..]}], "marks": [..]}`."""
    measured = [
        {**key._asdict(), "median": figures.median(key), "rounds": [float(f"{value:.5g}") for value in rounds]}
        for key, rounds in figures
    ]
    marks = [
        {
            "figure": verdict.mark.figure._asdict(),
            "base": verdict.mark.base._asdict() if verdict.mark.base else None,
            "bound": verdict.mark.bound,
            "limit": verdict.mark.limit,
            "found": verdict.found,
            "met": verdict.met,
        }
        for verdict in verdicts
    ]
    return msgspec.json.format(msgspec.json.encode({"machine": about, "figures": measured, "marks": marks}))
