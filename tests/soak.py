"""The soak: all operations at once, well and badly behaved, while the engine halts, dies and comes again.

    make soak MINUTES=20

An engine and a runner of their own serve callers (`soak_work.py`) for so many minutes. In the end everything must be
accounted for: each event, held against the engine's own telling; each container that should be gone, removed or
expired; each exec that was ended; and the runner must be as it was in the beginning: sockets, files, tasks, threads,
memory, and nothing used of what is bounded. What is not so is printed, and the exit status is 1. The seed is printed
too, though what happens is never quite the same.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from client import RunnerClient, RunnerClientError
from conftest import EngineDirect
from dev import busybox, wait_until
from dev.private_engine import PrivateEngine
from resting import USED, Counted, held
from service import Runner
from soak_work import LABEL, OPERATIONS, Caller, Ledger

IMAGE = "docker-runner-soak/busybox:latest"
CALLERS = 6
MIB = 1024 * 1024
MOST_MORE_MEMORY = 32 * MIB
"""Between a quarter of the time and the end."""
AROUND_S = 2.0
"""Before the engine went, and after it came, in which an event may be lost: the engine itself forgets."""
GAP_S = 10.0
"""How far from an outage a gap may be told."""

Event = tuple[int, str, str]
"""Its time in ns, what happened, the id of what it happened to."""


class Watcher(threading.Thread):
    """Counts the events of containers as one source tells them, and asks again when it breaks off."""

    def __init__(self, follow: Callable[["Watcher"], None], ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self._follow = follow
        self.ended = ended
        self.seen: Counter[Event] = Counter()
        self.is_open = threading.Event()
        self.gaps: list[float] = []
        """When it was told that some may be missing."""

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self._follow(self)
            except (OSError, RunnerClientError):
                self.ended.wait(0.05)

    def take(self, event: dict[str, object]) -> None:
        actor = event["Actor"]
        assert isinstance(actor, dict)
        assert isinstance(event["timeNano"], int)
        self.seen[event["timeNano"], str(event["Action"]), str(actor["ID"])] += 1


def by_engine(engine: PrivateEngine) -> Callable[[Watcher], None]:
    """The engine's own telling; what comes twice is told twice by nobody, as it is never asked about the past."""

    def follow(watcher: Watcher) -> None:
        filters = json.dumps({"type": ["container"]})
        response = EngineDirect(engine.socket).request(
            "GET", "/events", params={"filters": filters}, stream=True, timeout=(5, 3600)
        )
        watcher.is_open.set()
        for line in response.iter_lines(chunk_size=None):
            watcher.take(json.loads(line))

    return follow


def by_runner(runner: Runner) -> Callable[[Watcher], None]:
    """The runner's."""

    def follow(watcher: Watcher) -> None:
        client = RunnerClient(runner.url, runner.secret)
        events = client.events(tries=100, on_gap=lambda _: watcher.gaps.append(time.time()))
        watcher.is_open.set()
        with contextlib.closing(events):
            for event in events:
                watcher.take(event)
                if watcher.ended.is_set():
                    return

    return follow


class Soak:
    """One soak; `failures` is what was found."""

    def __init__(self, engine: PrivateEngine, runner: Counted, spool: Path, seed: int) -> None:
        self.failures: list[str] = []
        self._engine = engine
        self._runner = runner
        self._direct = EngineDirect(engine.socket)
        self._spool = spool
        self._chance = random.Random(seed)
        self._ended = threading.Event()
        self._over = threading.Event()
        self._outages: list[tuple[float, float]] = []
        self._began = 0.0
        self.ledger = Ledger()
        self._callers = [Caller(runner, IMAGE, self.ledger, seed + number, self._ended) for number in range(CALLERS)]
        self._told = Watcher(by_runner(runner), self._over)
        self._truth = Watcher(by_engine(engine), self._over)

    def run(self, seconds: float) -> None:
        """Begin, trouble the engine now and then, end, and check."""
        runner = self._runner
        for said in ("metrics are at", "the engine is there"):
            runner.wait_for_log(said)
        runner.request("GET", "/_ping")  # A connection is kept then, as it is in the end.
        before = (runner.sockets(), len(runner.files()), runner.tasks(), runner.threads())
        began = time.monotonic()
        self._truth.start()
        self._told.start()
        # Both are there: from here on nothing may be missed in silence.
        assert wait_until(lambda: bool(self._told.is_open.is_set() and self._truth.is_open.is_set()), 20)
        self._began = time.time()
        self._outages.append((0, self._began))
        for caller in self._callers:
            caller.start()
        memory = 0
        while (left := seconds - (time.monotonic() - began)) > 0:
            self._ended.wait(min(left, 3 + 7 * self._chance.random()))
            self._trouble()
            if not memory and left < seconds * 3 / 4:
                memory = runner.memory()
        self._ended.set()
        for caller in self._callers:
            caller.join(60)
        self._check("a caller hangs", [each.name for each in self._callers if each.is_alive()])
        self._check("unexpected", self.ledger.unexpected)
        idle = {operation.__name__ for operation, _ in OPERATIONS} - set(self.ledger.done)
        self._check("never went well", sorted(idle - {"start_what_cannot", "exec_past_its_limit"}))
        self._check_containers()
        self._check_execs()
        self._check_events()
        self._check_runner(before, memory)

    def _trouble(self) -> None:
        """Something happens to the engine, or to the runner."""
        match self._chance.choice(("halt", "halt", "kill", "reload", "nothing")):
            case "halt":
                if (pid := self._engine.pid()) is not None:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.5 + 2 * self._chance.random())  # The fault itself lasts.
                    os.kill(pid, signal.SIGCONT)
            case "kill":
                self._restart()
            case "reload":
                self._runner.process.send_signal(signal.SIGHUP)
            case _:
                pass

    def _restart(self) -> None:
        gone = time.time()
        self._engine.kill()
        self._engine.start()
        self._outages.append((gone - AROUND_S, time.time() + AROUND_S))

    def _away(self, at_s: float, around_s: float = 0) -> bool:
        return any(gone - around_s <= at_s <= came + around_s for gone, came in self._outages)

    def _check(self, what: str, found: list[str]) -> None:
        if found:
            self.failures.append(f"{what} ({len(found)}): " + "; ".join(found[:5]))

    def _names(self) -> dict[str, str]:
        listed = self._direct.request("GET", f'/containers/json?all=1&filters={{"label":["{LABEL}"]}}').json()
        return {each["Names"][0].lstrip("/"): each["Id"] for each in listed}

    def _check_containers(self) -> None:
        ledger = self.ledger
        wait_until(lambda: not ledger.gone & self._names().keys(), 40)
        names = self._names().keys()
        self._check("should be gone", sorted(names & ledger.gone))
        self._check("nobody made", sorted(names - ledger.gone - ledger.there.keys() - ledger.doubtful))

    def _check_execs(self) -> None:
        unsure = self.ledger.left | {each for at, each in self.ledger.abandoned if self._away(at, 6)}

        def left() -> list[str]:
            found = []
            for container in set(self._names().values()) - unsure:
                top = self._direct.request("GET", f"/containers/{container}/top?ps_args=-eo+pid,stat,args").json()
                lines = [fields[-1] for fields in top.get("Processes", []) if not fields[1].startswith("Z")]
                found += [f"{container[:12]}: {line}" for line in lines if re.search("sleep 900[0-9]", line)]
            return found

        wait_until(lambda: not left(), 10)
        self._check("execs run on", left())

    def _check_events(self) -> None:
        def sure(seen: Counter[Event]) -> Counter[Event]:
            return Counter({event: count for event, count in dict(seen).items() if not self._away(event[0] / 1e9)})

        wait_until(lambda: sure(self._told.seen) == sure(self._truth.seen), 5)
        told, truth = sure(self._told.seen), sure(self._truth.seen)
        print(
            f"events: {sum(truth.values())} sure, {self._truth.seen.total()} in all, {len(self._told.gaps)} gaps told"
        )
        self._check("events lost", [str(event) for event in truth - told])
        self._check("events told twice, or made up", [str(event) for event in told - truth])
        self._check("events told twice", [str(event) for event, count in dict(self._told.seen).items() if count > 1])
        self._check("gaps with the engine there", [str(at) for at in self._told.gaps if not self._away(at, GAP_S)])
        silent = [
            event
            for event in self._truth.seen - self._told.seen
            if not any(abs(at - event[0] / 1e9) < GAP_S for at in self._told.gaps)
        ]
        self._check("events lost, and no gap told", [str(event) for event in silent if event[0] / 1e9 > self._began])

    def _check_runner(self, before: tuple[int, int, int, int], memory: int) -> None:
        """It is as in the beginning; the engine is restarted once more, so that no kept connection is left."""
        self._over.set()
        runner = self._runner
        made = self._direct.request("POST", "/containers/create", json={"Image": IMAGE}).json()["Id"]
        self._direct.request("DELETE", f"/containers/{made}")  # Events, by which the watchers see that it is over.
        self._told.join(10)
        self._restart()
        self._truth.join(10)
        self._check("a watcher hangs", [each.name for each in (self._told, self._truth) if each.is_alive()])
        now = (0, 0, 0, 0)

        def settled() -> bool:
            nonlocal now
            now = (runner.sockets(), len(runner.files()), runner.tasks(), runner.threads())
            return all(count <= first for count, first in zip(now[:3], before[:3], strict=True))

        wait_until(settled, 20)
        print(f"sockets, files, tasks, threads: {before} before, {now} after")
        for name, count, most in zip(("sockets", "files", "tasks"), now, before, strict=False):
            self._check(f"{name} left", [f"{count} where there were {most}"] if count > most else [])
        self._check("threads left", [str(now[3])] if now[3] > before[3] + 2 * (os.cpu_count() or 1) + 8 else [])
        used = ["never looked at"]

        def unused() -> bool:
            nonlocal used
            counts = {name: count for name, count in held(runner).items() if name in (*USED, "open streams")}
            used = [f"{name} {count:g}" for name, count in counts.items() if count]
            return not used

        wait_until(unused, 20)  # Now and then the runner asks the engine something of its own.
        self._check("still used, by the metrics", used)
        self._check("files left in the spool", [str(path) for path in self._spool.iterdir()])
        self._check("deleted files held", [name for name in runner.files() if name.endswith("(deleted)")])
        more = runner.memory() - memory
        print(f"memory: {memory / MIB:.0f} MiB after a quarter of the time, {more / MIB:+.1f} MiB at the end")
        self._check("memory", [f"{more / MIB:.1f} MiB more"] if more > MOST_MORE_MEMORY else [])
        self._check(
            "the log", re.findall("(?m)^.*(?:defect|Traceback|never retrieved|was destroyed).*$", "".join(runner.log))
        )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="A soak on an engine of its own.")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dr-soak-", dir="/var/tmp"))
    spool = folder / "spool"
    spool.mkdir()
    engine = PrivateEngine(folder / "engine", tied=True)
    settings = {
        "TMPDIR": str(spool),
        "DOCKER_RUNNER_BODY_TIMEOUT_MS": "5000",
        "DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "1000",
        "DOCKER_RUNNER_ENGINE_WATCH_MS": "1000",
    }
    print(f"soak: {options.minutes:g} minutes, seed {options.seed}", flush=True)
    try:
        engine.start()
        busybox.import_image(engine, IMAGE)
        with Counted(engine.socket, settings) as runner:
            soak = Soak(engine, runner, spool, options.seed)
            soak.run(options.minutes * 60)
        ledger = soak.ledger
        print("done:", ", ".join(f"{name} {count}" for name, count in sorted(ledger.done.items())))
        print("refused:", ", ".join(f"{name} {code} {n}" for (name, code), n in sorted(ledger.failed.items())))
        for failure in soak.failures:
            print("FAILED:", failure)
        return 1 if soak.failures else 0
    finally:
        engine.remove()
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
