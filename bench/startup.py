"""Start-up and memory: of the checkout, of the one file that unpacks itself, and of that file once it has.

Start-up is from the process's start to the first answer of `/v1/health`. `check --health` is what a container's health
check runs. Memory is asked for then, and again after many requests and a download.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from bench.exchange import Address, BenchError, ask, connect, drain, request
from bench.figures import Figures, Sizes
from bench.stage import Stage
from bench.subjects import BEFORE, RUNNER, Subject, free_port, memory_kb, production, runner, running
from bench.throughput import drive
from dev import CHECKOUT, dist

PYTHON = str(Path(sys.executable).resolve())
ONE_FILE = "one file"
HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: bench\r\n\r\n"


def startup(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """`start_ms`, `cpu_ms` of it, `rss_mb` then, and `check_ms`: a health check's time."""
    file, unpacked = str(dist.build(stage.folder)), stage.folder / "first"
    programs: dict[str, tuple[list[str], Mapping[str, str]]] = {
        RUNNER: ([sys.executable, str(CHECKOUT / "runner.py")], {}),
        ONE_FILE: ([PYTHON, "-I", file], {"SHIV_ROOT": str(stage.folder / "kept")}),
        "one file, first start": ([PYTHON, "-I", file], {"SHIV_ROOT": str(unpacked)}),
    }
    if stage.before:
        programs[BEFORE] = ([sys.executable, str(stage.before / "runner.py")], {})
    _start(stage, *programs[ONE_FILE])  # unpacks
    for _ in range(sizes.starts):
        shutil.rmtree(unpacked, ignore_errors=True)
        for name, (command, environ) in programs.items():
            checkout = stage.before if name == BEFORE and stage.before else CHECKOUT
            figures.add("start-up", name, **_start(stage, command, environ, checkout))


def _start(stage: Stage, command: list[str], environ: Mapping[str, str], checkout: Path = CHECKOUT) -> dict[str, float]:
    port = free_port()
    settings = {**production(checkout, stage.engine, port), **environ}
    started = time.perf_counter()
    with running([*command, "serve"], stage.folder / "start.log", settings) as process:
        _first_answer(("127.0.0.1", port), lambda: process.poll() is None)
        ready = time.perf_counter() - started
        subject = Subject("", ("127.0.0.1", port), (process.pid,))
        cpu, resident = subject.cpu_s(), memory_kb(process.pid)
        started = time.perf_counter()
        check = [*command, "check", "--health"]
        subprocess.run(check, env={"PATH": os.environ["PATH"], **settings}, check=True, stdout=subprocess.DEVNULL)
        checked = time.perf_counter() - started
    return {"start_ms": ready * 1000, "cpu_ms": cpu * 1000, "rss_mb": resident / 1024, "check_ms": checked * 1000}


def _first_answer(address: Address, lives: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with closing(connect(address, patience_s=0)) as sock:
                ask(sock, HEALTH)
        except OSError:
            if not lives() or time.monotonic() > deadline:
                raise BenchError("the service did not start") from None
            time.sleep(0.002)
        else:
            return


def memory(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """Of a runner that was just started: `idle_mb`; after many requests and a download `then_mb`, at most `most_mb`."""
    checkouts = {RUNNER: CHECKOUT} | ({BEFORE: stage.before} if stage.before else {})
    for name, checkout in checkouts.items():
        with runner(stage.engine, stage.folder, name, checkout) as subject:
            pid = subject.pids[0]
            at_rest = memory_kb(pid) / 1024
            _work(stage, subject, sizes)
            then, most = memory_kb(pid) / 1024, memory_kb(pid, "VmHWM") / 1024
            figures.add("memory", name, idle_mb=at_rest, then_mb=then, most_mb=most)


def _work(stage: Stage, subject: Subject, sizes: Sizes) -> None:
    drive(subject, f"/containers/{stage.box()}/json", max(sizes.connections), sizes.requests_for_memory)
    target = f"/containers/{stage.box()}/archive?path=/bin/busybox"
    with closing(connect(subject.address)) as sock:
        drain(sock, [request("GET", target, signed=True, headers=("Connection: close",))])
