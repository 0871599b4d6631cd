"""What a request's CPU time goes to: a ping's and an inspect's, one after the other on a kept connection.

Two runners take turns. The one as it is gives `cpu_us`, user and system time of a request, and `kernel_us`, the system
time of it, which the kernel knows from samples (its timer's ticks), so that it needs a few seconds to settle. The other
has a clock on each of its parts (`parts.py`):

    server   a caller's bytes parsed, its head looked at, the answer's head made
    verify   signature, time, nonce, a place among those served
    policy   which operation it is, whether it is allowed
    relay    the request written anew for the engine, a connection from the pool, the engine's answer parsed
    record   metrics, and whether the audit log has to know

`rest` is what is left: mostly the event loop (uvloop, libuv), which calls all that and writes for it. The parts are
wall time of code that waits for nothing. A small system call in `relay` (does the kept connection still stand?) counts
twice, there and as the kernel's, so that `rest` is too small by a microsecond or two; in a short run or on a busy
machine it may be below zero. Between two runs, parts differ by a tenth; what differs by less says nothing.
"""

import json
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from bench import parts
from bench.exchange import BenchError, connect
from bench.figures import Figures, Sizes
from bench.latency import part
from bench.stage import Stage
from bench.subjects import RUNNER, Subject, runner
from dev import CHECKOUT

PARTS = (*parts.PARTS, "kernel", "rest")
"""They add up to `cpu_us`."""
BURST = 10 * parts.GROUP
COMMAND = [sys.executable, "-m", "bench.parts"]


class Cost(NamedTuple):
    """CPU seconds of a process, and the kernel's share of them."""

    cpu_s: float
    kernel: float


def load_of(name: str) -> str:
    """The load's name."""
    return f"parts of {name}"


def profile(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """`server_us`, `verify_us`, `policy_us`, `relay_us`, `record_us`, `kernel_us`, `rest_us`, `cpu_us`."""
    for name, target in (("ping", "/_ping"), ("inspect", f"/containers/{stage.box()}/json")):
        output = stage.folder / f"parts-{name}.json"
        environ = {"PYTHONPATH": str(CHECKOUT), parts.OUTPUT: str(output)}
        with runner(stage.engine, stage.folder, "runner in parts", command=COMMAND, environ=environ) as clocked:
            cost, count = _turns(stage.subject(RUNNER), clocked, target, sizes.profile_s)
        if not output.exists():
            raise BenchError(f"no parts were told:\n{(stage.folder / 'runner in parts.log').read_text()[-1000:]}")
        told: dict[str, float] = json.loads(output.read_text())
        whole = cost.cpu_s / count * 1e6
        told["kernel"] = whole * cost.kernel
        told["rest"] = whole - sum(told.values())
        figures.add(load_of(name), RUNNER, **{f"{each}_us": told[each] for each in PARTS}, cpu_us=whole)


def _turns(plain: Subject, clocked: Subject, target: str, for_s: float) -> tuple[Cost, int]:
    """Ask both in turns for so many seconds; what the plain one spent, for how many requests."""
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(connect(each.address))) for each in (plain, clocked)]
        part(plain, socks[0], target, BURST)  # warms up
        cpu_s, count, ticks = 0.0, 0, _ticks(plain)
        end = time.monotonic() + for_s
        while count < 2 * BURST or time.monotonic() < end:
            cpu_s += part(plain, socks[0], target, BURST)[1] * BURST
            part(clocked, socks[1], target, BURST)
            count += BURST
    user, kernel = (after - before for after, before in zip(_ticks(plain), ticks, strict=True))
    return Cost(cpu_s, kernel / max(1, user + kernel)), count


def _ticks(subject: Subject) -> tuple[int, int]:
    """User and system time so far."""
    fields = Path(f"/proc/{subject.pids[0]}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])
