"""The benchmark: every load does its work, on the real engine, and leaves nothing. No figure is judged.

What it computes from figures is tested on figures that are made up.
"""

import contextlib
import math
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import msgspec
import pytest

from bench import marks, report
from bench.__main__ import LOADS, read_options
from bench.exchange import BenchError, whole
from bench.figures import Figures, Key, percentile
from bench.marks import MARKS, Mark, Verdict, earlier, verdicts
from bench.plot import plot
from bench.profile import PARTS, load_of
from bench.stage import LABEL, Stage, stage
from bench.subjects import BEFORE, BRIDGE, ENGINE, HAPROXY, HAPROXY_DELAYING, RUNNER
from conftest import EngineDirect
from dev.engine import Engine
from documents import TEXTS, block, section
from service import ROOT

PAGE = "docs/performance.md"
SMOKE = block(PAGE, "--size smoke")
SUBJECTS = {ENGINE, HAPROXY, HAPROXY_DELAYING, RUNNER, BRIDGE}
SSE, RUN, HASHED, CHUNKED = (f"{RUNNER}, {form}" for form in ("/v1 SSE", "/v1/exec/run", "hash", "signed chunks"))
MEASURED = {
    **dict.fromkeys(("ping", "inspect", "list of 2"), SUBJECTS),
    **{f"{name}, {count} at once": SUBJECTS for name in ("ping", "inspect") for count in (1, 4)},
    "exec of true": SUBJECTS | {RUN},
    "upload of 97 KB": SUBJECTS - {RUNNER} | {HASHED, CHUNKED},
    "download of 97 KB": SUBJECTS,
    **dict.fromkeys(("log of short lines", "log of long lines"), SUBJECTS | {SSE}),
    "20 events to 1": SUBJECTS - {BRIDGE},
    "20 events to 3": {ENGINE, RUNNER},
    **{f"{count} idle streams": {ENGINE, RUNNER} for count in (5, 10)},
    "start-up": {RUNNER, "one file", "one file, first start"},
    **{load: {RUNNER} for load in ("memory", load_of("ping"), load_of("inspect"))},
}
"""By load, who is measured in the smoke test."""


# The whole, small.


class Smoke(NamedTuple):
    """What the documented command left: its output, the folders with its files and for temporary ones, its session."""

    output: list[str]
    out: Path
    temporary: Path
    session: int

    @property
    def run(self) -> Any:
        """The JSON."""
        return msgspec.json.decode((self.out / "bench.json").read_bytes())


@pytest.fixture(scope="module")
def smoke(engine: Engine, short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """In a copy of the checkout, so that what a real run has written stays."""
    folder, temporary = tmp_path_factory.mktemp("checkout"), short_folder / "bench"
    temporary.mkdir()
    for path in ROOT.iterdir():
        if path.name == ".venv" or not (path.name.startswith(".") or path.name == "build"):
            (folder / path.name).symlink_to(path)
    environ = {**os.environ, "DOCKER_SOCKET": engine.socket, "TMPDIR": str(temporary)}
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # Of the `make test` that runs this: a make within it says more.
        environ.pop(name, None)
    command = ["bash", "-euo", "pipefail", "-c", SMOKE]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return Smoke(output.splitlines(), folder / "build/bench", temporary, process.pid)


def test_every_load_gives_its_figures_of_every_subject(smoke: Smoke) -> None:
    measured: dict[str, set[str]] = {}
    for figure in smoke.run["figures"]:
        measured.setdefault(figure["load"], set()).add(figure["subject"])
        assert figure["rounds"]
        assert all(map(math.isfinite, figure["rounds"])), figure
    assert measured == MEASURED


def test_the_runner_lost_no_event(smoke: Smoke) -> None:
    faults = [
        (figure["quantity"], figure["median"])
        for figure in smoke.run["figures"]
        if figure["quantity"] in ("lost", "again", "cut_off") and figure["subject"] == RUNNER
    ]
    assert sorted(faults) == [("again", 0), ("again", 0), ("cut_off", 0), ("cut_off", 0), ("lost", 0), ("lost", 0)]


def test_the_parts_of_a_request_add_up(smoke: Smoke) -> None:
    figures, _ = report.read((smoke.out / "bench.json").read_bytes())
    for load in (load_of("ping"), load_of("inspect")):
        parts = {part: figures.median(Key(load, RUNNER, f"{part}_us")) for part in PARTS}
        assert sum(parts.values()) == pytest.approx(figures.median(Key(load, RUNNER, "cpu_us")), rel=0.01)
        assert all(value > 0 for part, value in parts.items() if part not in ("kernel", "rest")), parts


def test_it_tells_what_it_wrote_and_the_plot_is_one_picture(smoke: Smoke) -> None:
    assert smoke.output[-2:] == ["build/bench/bench.json", "build/bench/bench.svg"]
    assert {path.name for path in smoke.out.iterdir()} == {"bench.json", "bench.svg"}
    picture = ElementTree.parse(smoke.out / "bench.svg").getroot()
    assert {"ping", "inspect"} <= set(picture.itertext())
    references = [value for each in picture.iter() for name, value in each.attrib.items() if name.endswith("href")]
    assert all(value.startswith("#") for value in references)


def test_nothing_of_it_is_left(smoke: Smoke) -> None:
    assert not list(smoke.temporary.iterdir())
    assert smoke.session not in [int(fields[3]) for fields in _stats()]


def _stats() -> Iterator[list[str]]:
    """Of the processes that there are: what /proc/PID/stat says after the name."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_text().rpartition(")")[2].split()


def test_a_run_that_fails_leaves_nothing_on_the_engine(engine: Engine, direct: EngineDirect) -> None:
    def fail() -> NoReturn:
        with stage(engine.socket) as made:
            stages.append(made)
            made.box()
            made.listed(2)
            assert (_containers(direct, made.mark), _has_image(direct, made.image)) == (3, True)
            raise BenchError("enough")

    stages: list[Stage] = []
    with pytest.raises(BenchError, match="enough"):
        fail()
    (made,) = stages
    assert (_containers(direct, made.mark), _has_image(direct, made.image)) == (0, False)
    assert not made.folder.exists()


def _containers(direct: EngineDirect, mark: str) -> int:
    filters = quote(msgspec.json.encode({"label": [LABEL]}))
    found = direct.request("GET", f"/containers/json?all=1&filters={filters}").json()
    return sum(container["Labels"][LABEL].startswith(mark) for container in found)


def _has_image(direct: EngineDirect, image: str) -> bool:
    return direct.request("GET", f"/images/{image}/json").status_code == 200


# What is computed.


def test_a_ratio_is_taken_within_a_round() -> None:
    figures = Figures()
    for ours, theirs in ((2, 1), (4, 4), (60, 40)):
        figures.add("ping", RUNNER, p50_ms=ours)
        figures.add("ping", HAPROXY, p50_ms=theirs)
    key, base = (Key("ping", subject, "p50_ms") for subject in (RUNNER, HAPROXY))
    assert figures.median(key) / figures.median(base) == 1
    assert figures.ratio(key, base) == 1.5


@pytest.mark.parametrize(("share", "value"), [(0, 1), (0.5, 51), (0.99, 100), (1, 100)])
def test_a_percentile_is_a_value_that_was_found(share: float, value: float) -> None:
    assert percentile(range(100, 0, -1), share) == value


@pytest.mark.parametrize(
    ("bound", "found", "met"),
    [("at most", 1.15, True), ("at most", 1.151, False), ("at least", 1.15, True), ("at least", 1.149, False)],
)
def test_a_mark_is_met_at_its_bound(bound: Any, found: float, met: bool) -> None:
    assert Verdict(Mark(Key("ping", RUNNER, "p50_ms"), None, bound, 1.15), found).met is met


def made_up(share: float, *, before: float | None = None) -> Figures:
    """Figures in which everything is `share` of its mark, and was `before` of it."""
    figures = Figures()
    for mark in MARKS:
        for key, value in ((mark.figure, mark.limit * share), (mark.base, 1.0)):
            if key is not None and key not in figures:
                figures.add(key.load, key.subject, **{key.quantity: value})
        old = earlier(mark)
        if before is not None and old is not None and old.figure not in figures:
            figures.add(old.figure.load, old.figure.subject, **{old.figure.quantity: mark.limit * before})
    for load in (load_of("ping"), load_of("inspect")):
        figures.add(load, RUNNER, **{f"{part}_us": 10.0 for part in PARTS}, cpu_us=10.0 * len(PARTS))
    return figures


def test_every_mark_is_judged_once_it_is_measured() -> None:
    found = verdicts(made_up(1, before=2))
    assert [verdict.mark for verdict in found] == list(MARKS)
    assert len({mark.figure for mark in MARKS}) == len(MARKS)
    assert not verdicts(Figures())


def test_what_was_before_is_of_the_same_form() -> None:
    figures = Figures()
    for subject, value in ((ENGINE, 10), (HASHED, 5), (f"{BEFORE}, hash", 4), (BEFORE, 1)):
        figures.add("upload of 64 MB", subject, mb_per_s=value)
    (verdict,) = verdicts(figures)
    assert (verdict.found, verdict.before, verdict.met) == (0.5, 0.4, False)


@pytest.mark.parametrize(
    ("quantity", "heading"), [("p50_ms", "p50 ms"), ("cpu_us", "cpu µs"), ("per_s", "1/s"), ("mb_per_s", "MB/s")]
)
def test_a_quantity_tells_its_unit(quantity: str, heading: str) -> None:
    assert report.heading(quantity) == heading


ABOUT = {"time": "2026-01-02T03:04:05Z", "commit": "abc", "cores": 2, "processor": "Z80", "kernel": "6.1"}
ABOUT |= {"python": "3.11.2", "load_average": 0.04, "size": "full"}


def test_what_was_written_is_read_again() -> None:
    figures = made_up(0.5, before=2)
    written = report.as_json(figures, verdicts(figures), ABOUT)
    again, about = report.read(written)
    assert (list(again), about) == (list(figures), ABOUT)


def test_the_results_replace_those_in_the_page_and_nothing_else() -> None:
    figures = made_up(0.5, before=2)
    text = report.documented(TEXTS[PAGE], figures, verdicts(figures), report.summary(ABOUT))
    before, _, rest = text.partition("<!-- bench:")
    results, _, after = rest.partition("<!-- /bench -->")
    assert TEXTS[PAGE].startswith(before)
    assert TEXTS[PAGE].endswith(after)
    assert "| ping: p50 ms |  | 1 | 0.575 | 0.57 | ≤ 1.15 x HAProxy | met | 2.3 (2.30) |" in results
    assert results.index("2 cores of Z80") < results.index("| ping: p50 ms |") < results.index("<details>")
    assert report.documented(text, figures, verdicts(figures), report.summary(ABOUT)) == text


@pytest.mark.parametrize("share", [0.01, 0.5, 100.0])
def test_the_plot_shows_every_mark_whatever_was_found(share: float, tmp_path: Path) -> None:
    figures = made_up(share, before=1)
    plot(figures, verdicts(figures), "about", tmp_path / "plot.svg")
    shown = set(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())
    for mark in MARKS:
        assert {report.of_what(mark, with_quantity=mark.base is None), report.bound(mark)} <= shown


def test_there_is_a_plot_of_nothing(tmp_path: Path) -> None:
    plot(Figures(), [], "about", tmp_path / "plot.svg")
    assert "about" in set(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())


@pytest.mark.parametrize(
    ("answer", "is_whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Le", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nO", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n", True),
    ],
)
def test_an_answer_is_read_to_its_end(answer: bytes, is_whole: bool) -> None:
    assert whole(answer) is is_whole


# The page.


def test_the_page_names_the_loads_and_options_that_there_are() -> None:
    text = section(PAGE, "## What is measured")
    assert all(f"\n| {load} | " in text for load in LOADS)
    for line in section(PAGE, "## Run it").splitlines():
        if line.startswith('| `make bench ARGS="') and "--help" not in line:
            read_options(line.partition('ARGS="')[2].partition('"')[0].split())


@pytest.mark.parametrize("name", ["1.15", "1.5", "1.6", "0.8"])
def test_the_marks_of_the_page_are_the_marks(name: str) -> None:
    assert name in section(PAGE, "## Marks")
    assert float(name) in {mark.limit for mark in marks.MARKS if mark.base and mark.base.subject == HAPROXY}
