"""What is hard about execs, on a real engine: nothing lost, nothing left behind, every end told."""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client import sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import busybox, wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from loops import until
from scripted import Peer, ScriptedEngine
from service import Answer, Runner, signed_head
from sessions import CLOSE, EOF, Session, session, session_target, stdin

MIB = 1024 * 1024
JSON = {"Content-Type": "application/json"}
BLOCKED_S = int(os.environ.get("BLOCKED_S", "10"))
"""How long the process of the blocked input does not read; the issue speaks of 60."""
TOGETHER = 8
"""Execs at once, where there are many."""


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def watched(engine: Engine) -> Iterator[Runner]:
    """A runner whose log must not tell of a defect, whatever clients do to it."""
    with Runner(engine.socket) as running:
        yield running
    log = "".join(running.log)
    assert not re.search("defect|Traceback|never retrieved|was destroyed", log), log


def within(limit_s: float, test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine to its end, in bounded time."""

    async def bounded() -> None:
        async with asyncio.timeout(limit_s):
            await test

    asyncio.run(bounded())


def run(runner: Runner, container: str, command: str | list[str], **options: Any) -> Answer:
    """One `/v1/exec/run`."""
    body = json.dumps({"containerId": container, "command": command, "options": options}).encode()
    return runner.request("POST", "/v1/exec/run", body, JSON)


def said(answer: Answer) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that was run."""
    assert answer.status == 200, answer.body
    found = json.loads(answer.body)
    return found["exitCode"], found["stdout"], found["stderr"]


def refused(answer: Answer) -> tuple[int, str, bool]:
    """Status, code and `retryable` of an error."""
    error = json.loads(answer.body)["error"]
    return answer.status, error["code"], error["retryable"]


# What takes long runs beside everything else, from the first test on; its tests stand last and look at how it went.


@pytest.fixture(scope="module", autouse=True)
def meanwhile(engine: Engine, containers: Containers) -> Iterator[dict[Callable[..., object], "Future[Any]"]]:
    boxes = [containers() for _ in range(3)]
    with Runner(engine.socket) as runner, ThreadPoolExecutor(4) as pool:
        yield {
            input_blocked: pool.submit(input_blocked, runner, boxes[0]),
            output_closed_early: pool.submit(output_closed_early, runner, boxes[1]),
            closed_early_in_a_session: pool.submit(closed_early_in_a_session, runner, boxes[2]),
            exit_never_told: pool.submit(exit_never_told),
        }


def input_blocked(runner: Runner, box: str) -> Session:
    """A process that does not read for a long time, then reads all."""
    data = os.urandom(MIB) * 64  # More than the buffers of every socket on the way.

    async def blocked() -> Session:
        async with session(runner, box, f"sleep {BLOCKED_S}; exec md5sum") as one:
            writing = asyncio.ensure_future(send_all(one, data))
            _, still = await asyncio.wait((writing,), timeout=BLOCKED_S / 2)
            assert still, "all of it was taken by a process that does not read"
            await one.to_end()
            await writing
            assert one.out.startswith(hashlib.md5(data).hexdigest().encode())
            return one

    return asyncio.run(blocked())


async def send_all(one: Session, data: bytes, size: int = 65_536) -> None:
    for start in range(0, len(data), size):
        await one.send(stdin(data[start : start + size]))
    await one.send(EOF, CLOSE, CLOSE)


CLOSED_EARLY = "echo said; exec >/dev/null 2>&1; sleep 11; exit 6"


def output_closed_early(runner: Runner, box: str) -> Answer:
    return run(runner, box, CLOSED_EARLY)


def closed_early_in_a_session(runner: Runner, box: str) -> Session:
    async def silent() -> Session:
        async with session(runner, box, CLOSED_EARLY) as one:
            return await one.to_end()

    return asyncio.run(silent())


# A scripted engine's exec: created, started with a 101 and these bytes, then whatever is said of it.

CREATED = b'HTTP/1.1 201 Created\r\nContent-Length: 13\r\n\r\n{"Id":"made"}'
UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"


def ok_json(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def frame(stream: int, data: bytes) -> bytes:
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


def exec_script(output: bytes, inspected: bytes) -> Callable[[Peer], None]:
    """An engine whose execs say `output` and end, and which says `inspected` of them."""

    def script(peer: Peer) -> None:
        while request := peer.read_request():
            target = request.split(b" ", 2)[1]
            if target.endswith(b"/start"):
                peer.send(UPGRADED + output)
                return
            peer.send(CREATED if request.startswith(b"POST") else ok_json(inspected))

    return script


def exit_never_told() -> Answer:
    with (
        ScriptedEngine(exec_script(b"", b'{"Running":false,"ExitCode":null}')) as engine,
        Runner(engine.path) as runner,
    ):
        return run(runner, "c", "true")


class TestNothingIsLost:
    def test_what_is_said_at_once_200_times_by_run(self, runner: Runner, box: str) -> None:
        def once(number: int) -> None:
            assert said(run(runner, box, ["echo", f"said {number}"])) == (0, f"said {number}\n", "")

        with ThreadPoolExecutor(TOGETHER) as pool:
            assert len(list(pool.map(once, range(200)))) == 200

    def test_what_is_said_at_once_200_times_interactive(self, runner: Runner, box: str) -> None:
        async def some(numbers: range) -> None:
            for number in numbers:
                async with session(runner, box, ["echo", f"said {number}"]) as one:
                    await one.to_end()
                    assert (bytes(one.out), one.code, one.close_code) == (b"said %d\n" % number, 0, 1000)

        async def all_of_them() -> None:
            await asyncio.gather(*(some(range(first, 200, TOGETHER)) for first in range(TOGETHER)))

        within(60, all_of_them())

    def test_the_exit_frame_has_the_true_code_and_the_last_output_and_the_close_is_normal(
        self, runner: Runner, box: str
    ) -> None:
        async def test() -> None:
            async with session(runner, box, "seq 60000; echo err >&2; exit 42") as one:
                await one.to_end()
                assert bytes(one.out) == b"".join(b"%d\n" % number for number in range(1, 60_001))
                assert (bytes(one.err), one.code, one.close_code) == (b"err\n", 42, 1000)
                assert one.exit is not None
                last = json.loads(json.dumps(one.exit))
                assert stdin(bytes(one.out[-262_144:]))["data"] == last["stdout"]
                assert stdin(b"err\n")["data"] == last["stderr"]

        within(20, test())

    def test_stdin_its_end_and_close_in_one_breath_lose_nothing(self, runner: Runner, box: str) -> None:
        async def test() -> None:
            for ends in ((EOF,), (CLOSE,), (EOF, CLOSE), (EOF, CLOSE, CLOSE), (CLOSE, EOF, stdin(b"late"))):
                async with session(runner, box, "cat; echo after; exit 3", ready=False) as one:
                    await one.send(stdin(b"one "), stdin(b"two "), *ends)
                    await one.to_end()
                    assert (bytes(one.out), one.code, one.close_code) == (b"one two after\n", 3, 1000)
                    assert not one.errors

        within(20, test())

    def test_20_mb_through_stdin_and_back_are_the_same_in_flat_memory(self, engine: Engine, box: str) -> None:
        data = os.urandom(MIB) * 20

        async def test(runner: Runner) -> None:
            async with session(runner, box, "cat") as warm:
                await warm.send(stdin(bytes(262_144)), EOF)
                await warm.to_end()
            before, most = runner.memory(), 0
            async with session(runner, box, "cat") as one:
                sending = asyncio.ensure_future(send_all(one, data, 262_144))
                while await one.receive():
                    most = max(most, runner.memory())
                await sending
                assert one.out == data
                assert (one.code, one.close_code) == (0, 1000)
            print(f"20 MB through cat: {(most - before) / MIB:.1f} MiB more")
            assert most - before < 32 * MIB

        with Runner(engine.socket) as runner:
            within(60, test(runner))

    def test_binary_frames_are_input_too(self, runner: Runner, box: str) -> None:
        async def test() -> None:
            async with session(runner, box, "cat") as one:
                await one.socket.send(bytes(range(256)))
                await one.send(EOF)
                assert (await one.to_end()).out == bytes(range(256))

        within(20, test())

    def test_a_process_that_ends_before_it_has_read_everything_tells_its_exit(self, runner: Runner, box: str) -> None:
        async def test() -> None:
            async with session(runner, box, "head -c 3; exit 9") as one:
                sending = asyncio.ensure_future(send_all(one, b"abc" + bytes(5 * MIB)))
                await one.to_end()
                assert (bytes(one.out), one.code, one.close_code) == (b"abc", 9, 1000)
                await asyncio.gather(sending, return_exceptions=True)

        within(20, test())

    def test_a_slow_client_makes_the_process_wait_and_gets_everything(self, engine: Engine, box: str) -> None:
        async def test(runner: Runner) -> None:
            async with session(runner, box, "head -c 30000000 /dev/zero; echo done >&2") as one:
                before = runner.memory()
                # It reads no further than its own buffers; the process stands still when all between are full.
                await asyncio.wait((asyncio.ensure_future(until_still(runner)),))
                assert runner.memory() - before < 32 * MIB
                assert (await one.to_end()).out == bytes(30_000_000)
                assert (bytes(one.err), one.code) == (b"done\n", 0)

        with Runner(engine.socket) as runner:
            within(60, test(runner))


async def until_still(runner: Runner) -> None:
    """Wait until the process has used no processor time between two looks."""
    stat = Path(f"/proc/{runner.process.pid}/stat")
    seen = ""

    def still() -> bool:
        nonlocal seen
        last, seen = seen, " ".join(stat.read_text().split()[13:15])
        return last == seen

    await until(lambda: still() and still(), 30)
    await asyncio.get_running_loop().run_in_executor(None, wait_until, still, 5)


class TestText:
    CUT = r"printf '\357\273\277\342'; usleep 30000; printf '\202'; usleep 30000; printf '\254\360\237'; usleep 30000;"

    def test_run_keeps_characters_and_the_byte_order_mark_whole(self, runner: Runner, box: str) -> None:
        command = self.CUT + r"printf '\230\200'; printf '\342\202' >&2; usleep 30000; printf '\254\377\342' >&2"
        assert said(run(runner, box, command)) == (0, "\ufeff€😀", "€\ufffd\ufffd")

    def test_the_two_outputs_are_decoded_apart(self, runner: Runner, box: str) -> None:
        command = (
            r"printf '\342'; usleep 30000; printf '\303' >&2; usleep 30000; printf '\202\254'; usleep 30000; "
            r"printf '\274' >&2"
        )
        assert said(run(runner, box, command)) == (0, "€", "ü")

    def test_a_session_gets_the_bytes(self, runner: Runner, box: str) -> None:
        async def test() -> None:
            async with session(runner, box, self.CUT + r"printf '\230\200\377'") as one:
                assert (await one.to_end()).out == "\ufeff€😀".encode() + b"\xff"

        within(20, test())


class TestTerminal:
    def test_bytes_are_clean(self, runner: Runner, box: str) -> None:
        every = bytes(range(256)) * 20

        async def test() -> None:
            async with session(runner, box, "stty raw -echo; echo go; head -c 5120; tty >&2", tty="true") as one:
                await one.until(b"go")
                await one.send(stdin(every))
                await one.to_end()
                assert re.fullmatch(rb"go\r?\n" + re.escape(every) + rb"/dev/pts/\d+\r?\n", one.out, re.DOTALL)
                assert (bytes(one.err), one.code, one.close_code) == (b"", 0, 1000)

        within(20, test())
        assert said(run(runner, box, "echo out; tty; echo err >&2; exit 4", tty=True))[1].startswith("out\r\n/dev/pts/")

    def test_window_size_by_frame_and_by_request(self, runner: Runner, box: str) -> None:
        async def test() -> None:
            command = "while read -r x; do stty size; done"
            async with session(runner, box, command, tty="true") as one:
                await one.send({"type": "resize", "cols": 101, "rows": 41}, stdin(b"\n"))
                await one.until(b"41 101\r\n")
                size = json.dumps({"execId": one.id, "size": {"cols": 77, "rows": 33}}).encode()
                answer = await asyncio.to_thread(runner.request, "POST", "/v1/exec/resize", size, JSON)
                assert (answer.status, answer.body) == (204, b"")
                await one.send(stdin(b"\n"))
                await one.until(b"33 77\r\n")
                await one.send(CLOSE)
                assert (await one.to_end()).close_code == 1000
                assert not one.errors

        within(20, test())

    @pytest.mark.parametrize("typed", [b"", b"line\n", b"within a line"])
    def test_the_end_of_input_is_what_ends_it_for_a_person(self, runner: Runner, box: str, typed: bytes) -> None:
        async def test() -> None:
            async with session(runner, box, "cat; echo after; exit 5", tty="true") as one:
                await one.send(stdin(typed), CLOSE, CLOSE)
                await one.to_end()
                assert bytes(one.out).replace(b"^D\b\b", b"").endswith(typed.replace(b"\n", b"\r\n") + b"after\r\n")
                assert (one.code, one.close_code) == (5, 1000)

        within(8, test())

    def test_a_client_that_leaves_ends_the_input_of_a_terminal(
        self, watched: Runner, direct: EngineDirect, box: str
    ) -> None:
        async def test() -> str:
            async with session(watched, box, "cat", tty="true") as one:
                await one.send(stdin(b"x\n"))
                await one.until(b"x\r\nx\r\n")
                one.socket.transport.abort()
                return one.id

        found = asyncio.run(test())
        assert wait_until(lambda: not direct.request("GET", f"/exec/{found}/json").json()["Running"], 5)


class TestLeavingWhileBlocked:
    @pytest.mark.parametrize("abortive", [True, False])
    def test_a_client_that_leaves_while_nobody_reads_its_input_is_noticed(
        self, watched: Runner, box: str, abortive: bool
    ) -> None:
        """With a reset, however full the buffers are; with a plain close, once all it sent fits the runner's socket."""
        before = settled(watched, box)

        async def test() -> None:
            async with session(watched, box, "sleep 1d") as one:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2):
                        for _ in range(1000 if abortive else 5):
                            await one.send(stdin(b"x" * 200_000))
                if abortive:
                    sock = one.socket.transport.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.socket.transport.abort()

        within(15, test())
        assert wait_until(lambda: watched.sockets() <= before, 3)


class TestBackgroundChildren:
    """The engine waits 2 s for a child that holds the output open, then ends the stream; the runner adds nothing."""

    def test_a_child_that_holds_the_output_open_does_not_hold_up_the_end(
        self, runner: Runner, containers: Containers, direct: EngineDirect, box: str
    ) -> None:
        command = "sleep 1d & echo said; exit 5"
        made = containers.exec(box, "sh", "-c", command)

        async def by_session() -> None:
            async with session(runner, box, command) as one:
                await one.to_end()
                assert (bytes(one.out), one.code, one.close_code) == (b"said\n", 5, 1000)

        with ThreadPoolExecutor(3) as pool:
            by_run = pool.submit(run, runner, box, command)
            engine = pool.submit(direct.request, "POST", f"/exec/{made}/start", json={"Detach": False, "Tty": False})
            pool.submit(within, 20, by_session()).result()
        assert said(by_run.result()) == (5, "said\n", "")
        assert engine.result().content == frame(1, b"said\n")

    def test_a_client_that_leaves_meanwhile_leaves_nothing(self, watched: Runner, box: str) -> None:
        before = settled(watched, box)

        async def test() -> None:
            async with session(watched, box, "sleep 1d & echo said") as one:
                await one.until(b"said")

        within(10, test())
        assert wait_until(lambda: watched.sockets() <= before, 1)


def settled(runner: Runner, box: str) -> int:
    """How many sockets the runner holds with nobody there; a connection to the engine is kept for the next."""
    assert said(run(runner, box, "true"))[0] == 0
    counts: list[int] = []

    def steady() -> bool:
        counts.append(runner.sockets())
        return len(counts) >= 5 and len(set(counts[-5:])) == 1

    assert wait_until(steady, 10)
    return counts[-1]


class TestLeaving:
    """Whenever the caller goes, the engine's connection goes within a second, and the exec's input with it."""

    @pytest.fixture
    def own(self, containers: Containers) -> Iterator[str]:
        """Removed at once: the engine goes on taking output that nobody gets, so what writes never ends."""
        name = containers()
        yield name
        containers.do("DELETE", f"/containers/{name}?force=1", 204)

    @staticmethod
    def nothing_runs(direct: EngineDirect, container: str) -> bool:
        """No exec of the container runs; one that was made and never started stays, and is nothing but its name."""
        made = direct.request("GET", f"/containers/{container}/json").json()["ExecIDs"] or []
        return not any(direct.request("GET", f"/exec/{each}/json").json().get("Running") for each in made)

    @pytest.mark.parametrize("politely", [True, False])
    @pytest.mark.parametrize("moment", ["at once", "ready", "during output", "during input", "after the exit"])
    def test_a_session(self, watched: Runner, direct: EngineDirect, own: str, moment: str, politely: bool) -> None:
        before = settled(watched, own)
        command = {
            "during output": "cat >/dev/null & yes $(seq 500) & wait $!",
            "after the exit": "true",
        }.get(moment, "cat")

        async def test() -> None:
            async with session(watched, own, command, ready=False) as one:
                if moment != "at once":
                    assert await one.receive() == "ready"
                if moment == "during output":
                    while len(one.out) < MIB:
                        await one.receive()
                if moment == "during input":
                    for _ in range(50):
                        await one.send(stdin(bytes(50_000)))
                if moment == "after the exit":
                    while one.exit is None:
                        await one.receive()
                if politely:
                    await one.socket.close()
                else:
                    one.socket.transport.abort()

        within(20, test())
        assert wait_until(lambda: watched.sockets() <= before, 1)
        if moment != "during output":
            assert wait_until(lambda: self.nothing_runs(direct, own), 5)

    def test_a_session_before_its_upgrade_is_answered(self, watched: Runner, direct: EngineDirect, own: str) -> None:
        before = settled(watched, own)
        target = session_target(own, "cat")
        fields = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        head = signed_head("GET", target, b"", *fields, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        for _ in range(20):
            with watched.connect() as sock:
                sock.sendall(head)
            head = signed_head("GET", target, b"", *fields, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        assert wait_until(lambda: watched.sockets() <= before, 3)
        assert wait_until(lambda: self.nothing_runs(direct, own), 5)

    def test_a_run(self, watched: Runner, own: str) -> None:
        before = settled(watched, own)
        body = json.dumps({"containerId": own, "command": "touch /begun; cat /dev/zero"}).encode()
        with watched.connect() as sock:
            sock.sendall(signed_head("POST", "/v1/exec/run", body, "Content-Type: application/json") + body)
            assert wait_until(lambda: said(run(watched, own, "test -e /begun"))[0] == 0, 10)
        assert wait_until(lambda: watched.sockets() <= before + 1, 1)
        assert settled(watched, own) <= before


class TestTheEngineBreaks:
    @pytest.fixture
    def broken_box(self, private_engine: PrivateEngine) -> Iterator[str]:
        """A container on an engine that is about to be killed."""
        busybox.import_image(private_engine, "broken/busybox:latest")
        ask = partial(EngineDirect(private_engine.socket).request)
        create = {"Image": "broken/busybox:latest", "Cmd": ["sleep", "1d"], "HostConfig": {"NetworkMode": "none"}}
        name: str = ask("POST", "/containers/create", json=create).json()["Id"]
        assert ask("POST", f"/containers/{name}/start").status_code == 204
        yield name
        private_engine.start()
        ask("DELETE", f"/containers/{name}?force=1")

    def test_a_session_is_told_within_a_second_and_a_run_is_not_to_be_repeated(
        self, private_engine: PrivateEngine, broken_box: str
    ) -> None:
        async def test(runner: Runner, pool: ThreadPoolExecutor) -> None:
            async with (
                session(runner, broken_box, "cat") as one,
                session(runner, broken_box, "cat", tty="true") as terminal,
            ):
                await one.send(stdin(b"hello"))
                await one.until(b"hello")
                running = pool.submit(run, runner, broken_box, "touch /begun; sleep 1d")
                await asyncio.to_thread(wait_until, lambda: said(run(runner, broken_box, "test -e /begun"))[0] == 0, 10)
                await asyncio.to_thread(private_engine.kill)
                since = time.monotonic()
                for each in (one, terminal):
                    await each.to_end()
                    assert [error["code"] for error in each.errors] == ["exec_failed"]
                    assert isinstance(each.errors[0]["error"], str)
                    assert (each.exit, each.close_code) == (None, 1011)
                assert refused(await asyncio.to_thread(running.result)) == (502, "exec_failed", False)
                print(f"told after {time.monotonic() - since:.2f} s")
                assert time.monotonic() - since < 1

        with Runner(private_engine.socket) as runner, ThreadPoolExecutor(1) as pool:
            within(40, test(runner, pool))

    @pytest.mark.parametrize(
        ("output", "inspected"),
        [
            (frame(1, b"said")[:-2], b'{"Running":false,"ExitCode":0}'),
            (b"\1\0\0", b'{"Running":false,"ExitCode":0}'),
            (frame(1, b"said") + b"this is no frame", b'{"Running":false,"ExitCode":0}'),
            (frame(1, b"said"), b"no JSON"),
            (b"", b'{"Running":"perhaps"}'),
        ],
        ids=["cut within a frame", "cut within a header", "no frame", "inspect of no JSON", "inspect of nonsense"],
    )
    def test_what_is_not_an_end_is_no_success(self, output: bytes, inspected: bytes) -> None:
        with ScriptedEngine(exec_script(output, inspected)) as engine, Runner(engine.path) as runner:
            assert refused(run(runner, "c", "true")) == (502, "exec_failed", False)

            async def test() -> None:
                async with session(runner, "c", "true") as one:
                    await one.to_end()
                    assert [error["code"] for error in one.errors] == ["exec_failed"]
                    assert (one.exit, one.close_code) == (None, 1011)

            within(10, test())
            assert "defect" not in "".join(runner.log)


class TestLimits:
    def test_a_limit_of_0_is_none_and_no_default_of_the_server_is_shorter(self, engine: Engine, box: str) -> None:
        short = dict.fromkeys(
            (
                "DOCKER_RUNNER_ENGINE_HEAD_MS",
                "DOCKER_RUNNER_BODY_TIMEOUT_MS",
                "DOCKER_RUNNER_KEEP_ALIVE_MS",
                "DOCKER_RUNNER_HEAD_TIMEOUT_MS",
                "DOCKER_RUNNER_ENGINE_QUEUE_MS",
            ),
            "100",
        )
        with Runner(engine.socket, short) as runner:
            command = "sleep 1; echo said"
            assert said(run(runner, box, command, timeoutMs=0, idleTimeoutMs=0)) == (0, "said\n", "")
            assert said(run(runner, box, command, timeoutMs=60_000, idleTimeoutMs=60_000))[0] == 0

    @pytest.mark.parametrize("kill", [False, True])
    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ({"timeoutMs": 700}, "exec_timeout", "Exec timed out after 700ms"),
            ({"timeoutMs": 700, "idleTimeoutMs": 60_000}, "exec_timeout", "Exec timed out after 700ms"),
            ({"idleTimeoutMs": 700}, "exec_idle_timeout", "Exec idle timed out after 700ms"),
        ],
    )
    def test_the_answer_comes_within_half_a_second_of_the_limit(
        self, runner: Runner, containers: Containers, options: dict[str, int], code: str, message: str, kill: bool
    ) -> None:
        # As the first process sleep ignores SIGTERM: its container takes all of the grace time to stop.
        own = containers(StopSignal="SIGTERM")
        began = time.monotonic()
        answer = run(runner, own, "echo out; echo err >&2; sleep 1d", killOnTimeout=kill, **options)
        took = time.monotonic() - began
        assert refused(answer) == (504, code, False)
        found = json.loads(answer.body)
        assert found["message"].startswith(message)
        assert found["error"]["details"] == {"stdout": "out\n", "stderr": "err\n"}
        assert 0.7 <= took < 1.2
        if kill:
            state = partial(containers.do, "GET", f"/containers/{own}/json", 200)
            containers.do("POST", f"/containers/{own}/kill", 204)
            assert wait_until(lambda: not state()["State"]["Running"], 5)

    def test_kill_on_timeout_stops_the_container(self, runner: Runner, containers: Containers) -> None:
        own = containers()
        assert refused(run(runner, own, "sleep 1d", timeoutMs=100, killOnTimeout=True))[0] == 504
        state = partial(containers.do, "GET", f"/containers/{own}/json", 200)
        assert wait_until(lambda: not state()["State"]["Running"], 10)

    def test_any_output_re_arms_the_idle_limit(self, runner: Runner, box: str) -> None:
        command = "for i in 1 2 3 4 5; do usleep 150000; echo x >&2; usleep 150000; echo y; done; sleep 1d"
        answer = run(runner, box, command, idleTimeoutMs=600)
        assert refused(answer) == (504, "exec_idle_timeout", False)
        details = json.loads(answer.body)["error"]["details"]
        assert details == {"stdout": "y\n" * 5, "stderr": "x\n" * 5}

    def test_the_whole_limit_holds_though_output_keeps_coming(self, runner: Runner, box: str) -> None:
        began = time.monotonic()
        answer = run(runner, box, "while :; do echo x; usleep 10000; done", timeoutMs=500, idleTimeoutMs=400)
        assert refused(answer) == (504, "exec_timeout", False)
        assert 0.5 <= time.monotonic() - began < 1
        assert json.loads(answer.body)["error"]["details"]["stdout"].startswith("x\nx\n")

    @pytest.mark.parametrize(("hangs", "told_after_s"), [(b"/exec ", 0.8), (b"/start ", 4.5), (b"/json ", 4.5)])
    def test_the_limit_holds_at_every_step_of_an_engine_that_hangs(self, hangs: bytes, told_after_s: float) -> None:
        """Where something may have been started, an answer comes once it could not be ended: callers wait 5 s."""

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if hangs in request.partition(b"\r\n")[0]:
                    peer.sees_close()
                    return
                if b"/start " in request:
                    peer.send(UPGRADED + frame(1, b"said"))
                    return
                peer.send(CREATED)

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            began = time.monotonic()
            answer = run(runner, "c", "true", timeoutMs=300)
            assert refused(answer) == (504, "exec_timeout", False)
            assert time.monotonic() - began < told_after_s
            assert (b"may still run" in answer.body) == (hangs != b"/exec ")
            assert engine.closed.wait(1)

    @pytest.mark.parametrize("options", [{}, {"timeoutMs": 60_000, "idleTimeoutMs": 60_000}])
    def test_output_past_its_bound_is_a_413_and_ends_the_engines_connection(
        self, engine: Engine, box: str, options: dict[str, int]
    ) -> None:
        with Runner(engine.socket, {"DOCKER_RUNNER_MAX_OUTPUT": "100000"}) as runner:
            before = settled(runner, box)
            assert len(said(run(runner, box, "head -c 60000 /dev/zero; head -c 40000 /dev/zero >&2"))[1]) == 60_000
            assert refused(run(runner, box, "head -c 100001 /dev/zero; sleep 1d", **options)) == (
                413,
                "output_too_large",
                False,
            )
            assert wait_until(lambda: runner.sockets() <= before, 1)


class TestClientsFrames:
    def test_nonsense_is_told_and_the_session_lives(self, watched: Runner, box: str) -> None:
        nonsense = ["{", "[1]", '{"type":5}', '{"type":"stdin","data":"?"}', '{"x":' + "[" * 100_000]

        async def test() -> None:
            async with session(watched, box, "cat") as one:
                for text in nonsense:
                    await one.socket.send(text)
                    assert await one.receive() == "error"
                    assert isinstance(one.errors[-1]["error"], str)
                await one.socket.send("")
                await one.send({}, {"type": "unknown", "x": 1}, stdin(b"alive"), CLOSE)
                await one.to_end()
                assert (bytes(one.out), one.code, len(one.errors)) == (b"alive", 0, len(nonsense))

        within(20, test())

    def test_a_resize_that_the_engine_refuses_is_told_and_the_session_lives(self, watched: Runner, box: str) -> None:
        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/start " in request:
                    peer.send(UPGRADED)
                    assert peer.read_exactly(5) == b"alive"
                    peer.send(frame(1, b"alive"))
                    return
                refusal = b'HTTP/1.1 500 No\r\nContent-Length: 16\r\n\r\n{"message":"no"}'
                peer.send(
                    refusal
                    if b"/resize" in request
                    else CREATED
                    if request.startswith(b"POST")
                    else ok_json(b'{"Running":false,"ExitCode":0}')
                )

        async def test(runner: Runner) -> None:
            async with session(runner, "c", "cat") as one:
                await one.send({"type": "resize", "cols": 1, "rows": 1})
                assert await one.receive() == "error"
                await one.send(stdin(b"alive"))
                await one.to_end()
                assert (bytes(one.out), one.code, len(one.errors)) == (b"alive", 0, 1)

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            within(10, test(runner))


def test_the_environment_reaches_no_log(engine: Engine, box: str) -> None:
    hidden = "hidden-value-of-the-environment"
    with Runner(engine.socket, {"DOCKER_RUNNER_LOG_LEVEL": "trace"}) as runner:
        assert said(run(runner, box, "echo $X", env={"X": hidden}))[1] == hidden + "\n"
        assert refused(run(runner, "no-such", "true", env=[f"X={hidden}"]))[0] == 404
        body = json.dumps({"containerId": box, "command": 5, "options": {"env": {"X": hidden}}}).encode()
        assert runner.request("POST", "/v1/exec/run", body, JSON).status == 400

        async def test() -> None:
            async with session(runner, box, "echo $X", env=json.dumps({"X": hidden})) as one:
                assert bytes((await one.to_end()).out).decode() == hidden + "\n"
            async with session(runner, "no-such", "true", ready=False, env=json.dumps({"X": hidden})) as one:
                assert (await one.to_end()).close_code == 1011
            async with session(runner, box, "cat", env=json.dumps({"X": hidden})) as one:
                one.socket.transport.abort()

        within(20, test())
        target = session_target(box, "true", env=json.dumps({"X": hidden}))
        assert runner.request("GET", target).status == 426
        headers = {**sign(runner.secret, "GET", target), "X-DR-Signature": "wrong"}
        assert runner.request("GET", target, headers=headers).status in (400, 401)
        runner.stop()
        assert runner.log
        assert hidden not in "".join(runner.log)


@pytest.fixture(scope="module")
def bash(engine: Engine, direct: EngineDirect, names: Names, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with busybox, and the machine's own bash with its libraries."""
    found = names("bash")
    archive = io.BytesIO(busybox._root_filesystem(busybox._static_busybox()))
    listed = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    with tarfile.open(fileobj=archive, mode="a") as tar:
        for path in ["/bin/bash", *re.findall(r"(/\S+) \(0x", listed)]:
            tar.add(os.path.realpath(path), path.lstrip("/"))
    status, answer = engine.request("POST", f"/images/create?fromSrc=-&repo={found}&tag=1", archive.getvalue())
    assert status == 200, answer
    return f"{found}:1"


COMMAND = "echo out; echo err >&2; seq 20000; exit 7"
OUT = "out\n" + "".join(f"{number}\n" for number in range(1, 20_001))


class TestLogToPid1:
    def test_the_output_is_true_and_in_the_log_too(self, runner: Runner, containers: Containers, bash: str) -> None:
        own = containers(Image=bash)
        assert said(run(runner, own, COMMAND, logToPid1=True)) == (7, OUT, "err\n")
        assert said(run(runner, own, ["printf", "%s\\n", "a  b $X"], logToPid1=True)) == (0, "a  b $X\n", "")
        target = f"/containers/{own}/logs?"

        def log(query: str) -> str:
            body: bytes = containers._direct.request("GET", target + query).content
            text = b""
            while body:
                size = 8 + int.from_bytes(body[4:8], "big")
                text, body = text + body[8:size], body[size:]
            return text.decode()

        assert wait_until(lambda: log("stdout=1") == OUT + "a  b $X\n", 5)
        assert log("stderr=1") == "err\n"

    @pytest.mark.parametrize(
        "config",
        [
            {"Cmd": ["sh", "-c", "exec sleep 1d >&- 2>&-"]},
            {"Cmd": ["sh", "-c", "exec sleep 1d >/dev/full 2>/dev/full"]},
            {"User": "65534:65534"},
            {"Tty": True},
        ],
        ids=["closed", "full", "no root", "terminal"],
    )
    def test_a_first_process_that_cannot_be_written_to_changes_nothing(
        self, runner: Runner, containers: Containers, bash: str, config: dict[str, Any]
    ) -> None:
        own = containers(**{"Cmd": ["sleep", "1d"], "Image": bash, **config})
        assert said(run(runner, own, COMMAND, logToPid1=True)) == (7, OUT, "err\n")

    def test_a_missing_program_is_127(self, runner: Runner, containers: Containers, bash: str) -> None:
        code, out, err = said(run(runner, containers(Image=bash), ["/no/such"], logToPid1=True))
        assert (code, out) == (127, "")
        assert "No such file" in err


class TestWhatTakesLong:
    def test_input_that_is_not_read_for_long_is_not_lost_and_the_session_lives(
        self, meanwhile: dict[Callable[..., object], "Future[Session]"]
    ) -> None:
        one = meanwhile[input_blocked].result(BLOCKED_S + 20)
        assert (one.code, one.close_code, one.errors) == (0, 1000, [])

    def test_a_process_that_closed_its_output_is_waited_for(
        self, meanwhile: dict[Callable[..., object], "Future[Any]"]
    ) -> None:
        assert said(meanwhile[output_closed_early].result(30)) == (6, "said\n", "")
        one = meanwhile[closed_early_in_a_session].result(30)
        assert (bytes(one.out), one.code, one.close_code) == (b"said\n", 6, 1000)

    def test_an_exit_that_the_engine_never_tells_is_an_error(
        self, meanwhile: dict[Callable[..., object], "Future[Answer]"]
    ) -> None:
        assert refused(meanwhile[exit_never_told].result(20)) == (502, "exec_failed", False)
