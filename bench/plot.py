"""The plot: what was found beside its marks, as one SVG that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Whole
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.figures import Figures, Key
from bench.marks import Mark, Verdict
from bench.profile import PARTS, load_of
from bench.report import bound, found, heading, number, of_what
from bench.subjects import ENGINE, RUNNER

OF_REQUESTS = {
    "p50_ms": "Latency, median / HAProxy's",
    "p99_ms": "Latency, 99th percentile / HAProxy's",
    "cpu_us": "CPU time of a request / HAProxy's",
    "per_s": "Requests per second / HAProxy's",
}
BULK, WAITS, BOUNDS = "Bulk, bytes per second / the engine's", "Execs and events / the engine's", "Bounds"
PANELS = (*OF_REQUESTS.values(), BULK, WAITS, BOUNDS)

MET, MISSED, BEFORE, INK, FAINT = "#2f6f9f", "#d9822b", "#c3c9cf", "#1d232a", "#5b646c"
SHADES = ("#2f6f9f", "#b3565f", "#8a6fb0", "#3f8f83", "#9a8a3c", "#5b646c", "#8d979f")
SPAN = 1.9
"""A bar ends at so many times the farthest mark of its panel, whatever was found."""
COLUMNS = (1.18, 1.42, 1.77)
"""Where the words beside the bars end, times the longest bar."""
WORDS: tuple[dict[str, Any], ...] = ({"weight": "bold"}, {"color": FAINT}, {})
WIDTH_IN, BAR_IN, HEAD_IN, TOP_IN, FOOT_IN = 12.0, 0.26, 0.6, 0.75, 0.35
LEFTS, WIDTH = (0.175, 0.675), 0.29
"""Where the bars of the two columns begin, and how wide a panel is with its words, in shares of the picture."""
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "docker-runner",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "axes.spines.left": False,
    "text.color": INK,
}


def plot(figures: Figures, verdicts: Sequence[Verdict], about: str, target: Path) -> None:
    """Write the picture; its form (.svg, .png) is that of the name. `about` stands below it."""
    bars = {title: [each for each in verdicts if _panel(each.mark) == title] for title in PANELS}
    columns = _balanced({title: len(each) * BAR_IN + HEAD_IN for title, each in bars.items() if each})
    profiled = [load for load in map(load_of, ("inspect", "ping")) if Key(load, RUNNER, "cpu_us") in figures]
    upper = max((sum(column.values()) for column in columns), default=0)
    lower = len(profiled) * 1.3 * BAR_IN + 1.2 * HEAD_IN if profiled else 0
    height = upper + lower + TOP_IN + FOOT_IN
    with rc_context(STYLE):
        whole = Whole(figsize=(WIDTH_IN, height))
        for left, column in zip(LEFTS, columns, strict=True):
            top = height - TOP_IN
            for title, needed in column.items():
                box = (left, (top - needed + 0.3) / height, WIDTH, (needed - HEAD_IN) / height)
                _draw(whole.add_axes(box), figures, title, bars[title])
                top -= needed
        if profiled:
            box = (LEFTS[0], (FOOT_IN + 0.3) / height, LEFTS[1] + WIDTH - LEFTS[0], (lower - HEAD_IN * 1.2) / height)
            _draw_profile(whole.add_axes(box), figures, profiled)
        _explain(whole, about, height, has_before=any(each.before is not None for each in verdicts))
        whole.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _panel(mark: Mark) -> str:
    if mark.base is None:
        return BOUNDS
    if mark.base.subject == ENGINE:
        return BULK if mark.figure.quantity == "mb_per_s" else WAITS
    return OF_REQUESTS[mark.figure.quantity]


def _balanced(heights: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Two columns, read downwards, the left one as long as the right one or not much longer."""
    left: dict[str, float] = {}
    rest = dict(heights)
    while sum(left.values()) < sum(rest.values()):
        title = next(iter(rest))
        left[title] = rest.pop(title)
    return left, rest


def _draw(axes: Axes, figures: Figures, title: str, verdicts: Sequence[Verdict]) -> None:
    """A panel: for each mark a bar, the mark as a line through it, what was found in words."""
    scaled = [_scaled(each) for each in verdicts]
    end = SPAN * max(limit for _, _, limit in scaled)
    for place, (verdict, (value, before, limit)) in enumerate(zip(verdicts, scaled, strict=True)):
        if before is not None:
            axes.barh(place + 0.27, min(before, end), height=0.2, color=BEFORE)
        colour = MET if verdict.met else MISSED
        axes.barh(place - (0.1 if before is not None else 0), min(value, end), height=0.5, color=colour)
        axes.plot([limit, limit], [place - 0.42, place + 0.42], color=INK, linewidth=1.6, solid_capstyle="butt")
        for at, text, style in zip(COLUMNS, _words(figures, verdict), WORDS, strict=True):
            axes.text(end * at, place, text, va="center", ha="right", fontsize=8, **style)
    labels = [of_what(each.mark, with_quantity=title == BOUNDS) for each in verdicts]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, end * COLUMNS[-1])
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    if title != BOUNDS:
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=(0, (2, 3)), zorder=0)
    better = "more" if verdicts[0].mark.bound == "at least" else "less"
    axes.set_title(title, loc="left", fontsize=10, weight="bold", x=-0.56, pad=8)
    axes.set_title(f"{better} is better", loc="right", fontsize=8, color=FAINT, pad=8)


def _scaled(verdict: Verdict) -> tuple[float, float | None, float]:
    """What was found, what was before, and the limit, on the panel's scale: of a bound, the share that is used."""
    found, before, limit = verdict.found, verdict.before, verdict.mark.limit
    if verdict.mark.base is not None:
        return found, before, limit
    share = limit or 1
    return found / share, None if before is None else before / share, 1.0


def _words(figures: Figures, verdict: Verdict) -> tuple[str, str, str]:
    """What was found, the bound, and the figure where the first is a ratio."""
    mark = verdict.mark
    unit = heading(mark.figure.quantity).rpartition(" ")[2]
    value = f"{number(figures.median(mark.figure))} {unit}" if mark.base else ""
    return found(verdict), bound(mark), value


def _draw_profile(axes: Axes, figures: Figures, loads: Sequence[str]) -> None:
    """One bar for each load, cut into its parts."""
    parts = {load: [max(0.0, figures.median(Key(load, RUNNER, f"{part}_us"))) for part in PARTS] for load in loads}
    whole = max(map(sum, parts.values()))
    for place, load in enumerate(loads):
        left = 0.0
        for value, colour in zip(parts[load], SHADES, strict=True):
            axes.barh(place, value, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.8)
            if value > whole * 0.022:
                axes.text(left + value / 2, place, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white")
            left += value
        axes.text(
            left + whole * 0.008,
            place,
            f"{number(figures.median(Key(load, RUNNER, 'cpu_us')))} µs",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(loads)), [load.removeprefix("parts of ") for load in loads])
    axes.set_ylim(-0.5, len(loads) - 0.4)
    axes.set_xlim(0, whole * 1.08)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        "What the runner's CPU time of a request goes to", loc="left", fontsize=10, weight="bold", x=-0.205, pad=8
    )
    handles = [Patch(color=colour, label=part) for part, colour in zip(PARTS, SHADES, strict=True)]
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=len(PARTS),
        frameon=False,
        fontsize=8,
        handlelength=1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _explain(whole: Whole, about: str, height: float, *, has_before: bool) -> None:
    """Title, legend and foot."""
    top = 1 - 0.3 / height
    whole.text(0.012, top, "docker-runner beside HAProxy and the engine", fontsize=13, weight="bold", va="center")
    whole.text(
        0.012,
        top - 0.24 / height,
        "Bars are ratios within a round, their median over the rounds",
        color=FAINT,
        va="center",
    )
    handles: list[Patch | Line2D] = [Patch(color=MET, label="mark met"), Patch(color=MISSED, label="mark missed")]
    if has_before:
        handles.append(Patch(color=BEFORE, label="the runner before"))
    handles.append(Line2D([], [], color=INK, linewidth=1.6, marker="", label="the mark"))
    handles.append(
        Line2D([], [], color=INK, linewidth=0.7, linestyle=(0, (2, 3)), label="as HAProxy, or as the engine")
    )
    whole.legend(
        handles=handles,
        loc="center right",
        bbox_to_anchor=(0.985, top - 0.24 / height),
        ncols=len(handles),
        frameon=False,
    )
    whole.text(0.012, 0.16 / height, about, fontsize=7.5, color=FAINT, va="center")
