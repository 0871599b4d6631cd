"""The command line: `.venv/bin/python -m bench --help`."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.events import events, idle
from bench.exchange import BenchError
from bench.execs import execs
from bench.figures import FULL, QUICK, SMOKE, Figures, Sizes
from bench.latency import latency
from bench.marks import verdicts
from bench.profile import profile
from bench.report import as_json, judgement, machine, tables
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


def _options() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write the files."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made on the engine is removed then, too
    about = machine()
    try:
        engine = options.socket or ensure_engine({**read_env(Path(".env")), **os.environ}, []).socket
        figures = run(options.only, SIZES[options.size], engine, options.before)
    except (BenchError, SetupError) as error:
        sys.exit(f"error: {error}")
    found = verdicts(figures)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n".join([*tables(figures), *judgement(found)]))
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / "bench.json"
    written.write_bytes(as_json(figures, found, about) + b"\n")
    print(f"\n{written}")


if __name__ == "__main__":
    main()
