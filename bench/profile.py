"""What a request's CPU time goes to: a ping's and an inspect's, one after the other on a kept connection.

Two runners take turns. The one as it is gives `cpu_us`, user and system time of a request, and `kernel_us`, the system
time of it, which the kernel knows from samples (its timer's ticks), so that it needs a few seconds to settle. The other
has a clock on each of its parts (`parts.py`):

    server   a caller's bytes parsed, its head looked at, the answer's head made
    verify   signature, time, nonce, a place among those served
    policy   which operation it is, whether it is allowed
    relay    the request written anew for the engine, a connection from the pool, the engine's answer parsed
    record   metrics, and whether the audit log has to know

`rest` is what is left: mostly the event loop (uvloop, libuv), which calls all that and writes for it; of
inspects also the tasks of those whose answer came in two pieces.

The clocks cost as much CPU time as the second runner takes more than the first. That is taken off the parts by how
often a clock was read in each. The parts are wall time of code that waits for nothing. A small system call in `relay`
(does the kept connection still stand?) counts twice, there and as the kernel's, so that `rest` is too small by a
microsecond or two; in a short run or on a busy machine it may be below zero. Between two runs, parts differ by a tenth;
what differs by less says nothing.
"""

import statistics
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import msgspec

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
    """CPU microseconds of a request: of the runner as it is, of that the kernel's, and of the one with clocks."""

    plain: float
    kernel: float
    clocked: float


def load_of(name: str) -> str:
    """The load's name."""
    return f"parts of {name}"


def profile(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """`server_us`, `verify_us`, `policy_us`, `relay_us`, `record_us`, `kernel_us`, `rest_us`, `cpu_us`."""
    for name, target in (("ping", "/_ping"), ("inspect", f"/containers/{stage.box()}/json")):
        output = stage.folder / f"parts-{name}.json"
        environ = {"PYTHONPATH": str(CHECKOUT), parts.OUTPUT: str(output)}
        with runner(stage.engine, stage.folder, "runner in parts", command=COMMAND, environ=environ) as clocked:
            cost = _turns(stage.subject(RUNNER), clocked, target, sizes.profile_s)
        if not output.exists():
            raise BenchError(f"no parts were told:\n{(stage.folder / 'runner in parts.log').read_text()[-1000:]}")
        told = msgspec.json.decode(output.read_bytes(), type=dict[str, parts.Part])
        of_a_turn = (cost.clocked - cost.plain) / sum(part.turns for part in told.values())
        values = {part: told[part].us - told[part].turns * of_a_turn for part in parts.PARTS} | {"kernel": cost.kernel}
        values["rest"] = cost.plain - sum(values.values())
        figures.add(load_of(name), RUNNER, **{f"{part}_us": values[part] for part in PARTS}, cpu_us=cost.plain)


def _turns(plain: Subject, clocked: Subject, target: str, for_s: float) -> Cost:
    """Ask both in turns, for so many seconds."""
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(connect(each.address))) for each in (plain, clocked)]
        for subject, sock in zip((plain, clocked), socks, strict=True):
            part(subject, sock, target, BURST)  # warms up
        bursts: list[tuple[float, float]] = []
        ticks, end = _ticks(plain), time.monotonic() + for_s
        while len(bursts) < 2 or time.monotonic() < end:
            bursts.append((part(plain, socks[0], target, BURST)[1], part(clocked, socks[1], target, BURST)[1]))
    user, kernel = (after - before for after, before in zip(_ticks(plain), ticks, strict=True))
    whole, with_clocks = (statistics.median(values) * 1e6 for values in zip(*bursts, strict=True))
    return Cost(whole, whole * kernel / max(1, user + kernel), with_clocks)


def _ticks(subject: Subject) -> tuple[int, int]:
    """User and system time so far."""
    fields = Path(f"/proc/{subject.pids[0]}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])
