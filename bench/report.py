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
from bench.marks import Mark, Verdict, earlier
from bench.subjects import ENGINE, HAPROXY, RUNNER
from dev import CHECKOUT

DOCUMENT = CHECKOUT / "docs" / "performance.md"
"""Beside it lies the plot."""
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


def judgement(figures: Figures, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The marks, in Markdown: medians, what was found, whether that will do, and what the runner before had."""
    if not verdicts:
        return
    has_before = any(verdict.before is not None for verdict in verdicts)
    yield from _head("figure", "engine", "HAProxy", "runner", "ratio", "mark", "", *(["before"] if has_before else []))
    for verdict in verdicts:
        mark = verdict.mark
        values = [_median(figures, mark.figure._replace(subject=each)) for each in (ENGINE, HAPROXY)]
        ratio = found(verdict) if mark.base else ""
        of = f" x {_base(mark.figure, mark.base)}" if mark.base else ""
        result = "met" if verdict.met else "**missed**"
        before = [_before(figures, verdict)] if has_before else []
        runner = _median(figures, mark.figure)
        yield _row(of_what(mark, with_quantity=True), *values, runner, ratio, bound(mark) + of, result, *before)


def _before(figures: Figures, verdict: Verdict) -> str:
    mark = earlier(verdict.mark)
    if mark is None or verdict.before is None:
        return ""
    return _median(figures, mark.figure) + (f" ({verdict.before:.2f})" if mark.base else "")


def _median(figures: Figures, key: Key) -> str:
    return number(figures.median(key)) if key in figures else ""


def _base(figure: Key, base: Key) -> str:
    if base.subject == figure.subject:
        return base.load.rpartition(", ")[2]
    return "HAProxy" if base.subject == HAPROXY else base.subject


def found(verdict: Verdict) -> str:
    """What was found, in digits that set it apart from the mark."""
    return f"{verdict.found:.2f}" if verdict.mark.base and verdict.found < 10 else number(verdict.found)


def bound(mark: Mark) -> str:
    """`≤ 1.15`."""
    return f"{'≤' if mark.bound == 'at most' else '≥'} {number(mark.limit)}"


def of_what(mark: Mark, *, with_quantity: bool) -> str:
    """`upload of 64 MB, hash: MB/s`."""
    form = mark.figure.subject.removeprefix(RUNNER)
    if form == mark.figure.subject:
        form = f", {form}"
    load = mark.figure.load
    if mark.base is not None and mark.base.subject == mark.figure.subject:
        load = load.replace(" at once", f" / {_base(mark.figure, mark.base)}")
    return load + form + (f": {heading(mark.figure.quantity)}" if with_quantity else "")


def documented(text: str, figures: Figures, verdicts: Sequence[Verdict], about: str) -> str:
    """A document with the results of a run in place of those between its marks. Raises ValueError."""
    begin, end = text.index("<!-- bench:"), text.index("<!-- /bench -->")
    head = text[: text.index("-->", begin) + 3]
    every = ["", "<details>", "<summary>Every figure of that run</summary>", *tables(figures), "", "</details>"]
    return "\n".join([head, f"{about}.", *judgement(figures, verdicts), *every, text[end:]])


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _head(*names: str) -> Iterator[str]:
    yield ""
    yield _row(*names)
    yield _row("---", "---", *["---:"] * (len(names) - 2))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def machine(size: str) -> dict[str, Any]:
    """What the figures were measured on, of which commit, and how large the run is."""
    commit = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "size": size,
        "commit": commit.stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def summary(about: dict[str, Any]) -> str:
    """The machine in one line."""
    made = f"{about['time'][:10]}, {about['commit']}, {about['cores']} cores of {about['processor']}"
    software = f"Linux {about['kernel']}, Python {about['python']}, {about['size']} size"
    return f"{made}, {software}, load average {about['load_average']:.1f} before"


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


def read(data: bytes) -> tuple[Figures, dict[str, Any]]:
    """What `as_json` has written: the figures, and the machine. Raises msgspec.DecodeError, KeyError."""
    run = msgspec.json.decode(data)
    figures = Figures()
    for each in run["figures"]:
        for value in each["rounds"]:
            figures.add(each["load"], each["subject"], **{each["quantity"]: value})
    return figures, run["machine"]
