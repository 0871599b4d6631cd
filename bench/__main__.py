"""The command line: `.venv/bin/python -m bench --help`."""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.events import events, idle
from bench.exchange import BenchError
from bench.execs import execs
from bench.figures import FULL, QUICK, SMOKE, Figures, Sizes
from bench.latency import latency
from bench.marks import verdicts
from bench.profile import profile
from bench.report import DOCUMENT, as_json, documented, judgement, machine, read, summary, tables
from bench.stage import Stage, stage
from bench.startup import memory, startup
from bench.throughput import throughput
from bench.transfers import archives, logs
from dev import SetupError
from dev.prepare import ensure_engine, read_env

LOADS: dict[str, Callable[[Stage, Sizes, Figures], None]] = {
    "latency": latency,
    "throughput": throughput,
    "execs": execs,
    "archives": archives,
    "logs": logs,
    "events": events,
    "idle": idle,
    "startup": startup,
    "memory": memory,
    "profile": profile,
}
SIZES = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def run(loads: list[str], sizes: Sizes, engine: str, before: Path | None = None) -> Figures:
    """Measure. Raises BenchError where something does not do its work."""
    figures = Figures()
    with stage(engine, before) as made:
        for load in loads:
            started = time.monotonic()
            LOADS[load](made, sizes, figures)
            print(f"{load}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return figures


def _loads(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(LOADS):
        raise argparse.ArgumentTypeError(
            f"no load is called {', '.join(sorted(unknown))}; there are {', '.join(LOADS)}"
        )
    return names


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the runner beside the engine itself.")
    parser.add_argument("--only", type=_loads, default=list(LOADS), metavar="LOAD,..", help=", ".join(LOADS))
    parser.add_argument(
        "--quick", dest="size", action="store_const", const="quick", default="full", help="fewer and shorter rounds"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="smoke: each load once, its figures worth nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="FOLDER", help="where JSON and plot go: build/bench"
    )
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure that one's runner in the same rounds")
    parser.add_argument("--socket", help="the engine's; otherwise the one that `make run` would take")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: take an earlier run's JSON")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/performance.md, too")
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """The figures, and the machine. Raises BenchError, SetupError."""
    if options.read:
        return read(options.read.read_bytes())
    about = machine(options.size)
    engine = options.socket or ensure_engine({**read_env(Path(".env")), **os.environ}, []).socket
    return run(options.only, SIZES[options.size], engine, options.before), about


def main() -> None:
    """Measure, print the tables, write the files."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made on the engine is removed then, too
    try:
        figures, about = _measured(options)
    except (BenchError, SetupError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    found = verdicts(figures)
    print(summary(about))
    print("\n".join([*tables(figures), *judgement(figures, found)]))
    from bench.plot import plot  # Late: it takes a second, and none of that is to be measured.

    options.out.mkdir(parents=True, exist_ok=True)
    written, drawn = options.out / "bench.json", options.out / "bench.svg"
    written.write_bytes(as_json(figures, found, about) + b"\n")
    plot(figures, found, summary(about), drawn)
    print(f"\n{written}\n{drawn}")
    if options.docs:
        shutil.copyfile(drawn, DOCUMENT.with_suffix(".svg"))
        DOCUMENT.write_text(documented(DOCUMENT.read_text(), figures, found, summary(about)))
        print(DOCUMENT)


if __name__ == "__main__":
    main()
