"""Faults of the engine, and of what the runner stands on: what callers see, what is freed, and that all is well after.

The table in `docs/operations.md` says it, and names these tests and others. Callers that are at fault, and the end of
the runner, are in `test_faults_callers.py`, a memory limit is in `test_image.py`. What is freed `comes_to_rest` counts.
"""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from listening import Listener, events_of

from answers import refused
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from resting import Counted, comes_to_rest
from service import Answer, Runner, signed_head

JSON = {"Content-Type": "application/json"}
CUT = (http.client.IncompleteRead, ConnectionResetError)
MIB = 1024 * 1024
STOP_S = 30


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that no test changes."""
    return Containers(direct, names, image)()


def logs_of(container: str) -> str:
    """The target of the log of a container, followed."""
    return "/v1/containers/logs/sse?" + urlencode({"containerId": container})


def run(runner: Runner, container: str, command: str, **options: Any) -> Answer:
    """One `/v1/exec/run`."""
    body = json.dumps({"containerId": container, "command": command, "options": options}).encode()
    return runner.request("POST", "/v1/exec/run", body, JSON)


def has_exec(engine_socket: str, container: str) -> bool:
    """Whether a command runs in a container, beside its first process."""
    return bool(EngineDirect(engine_socket).request("GET", f"/containers/{container}/json").json()["ExecIDs"])


def rename(engine_socket: str, container: str) -> str:
    """Cause an event; returns the new name, which it tells."""
    name = f"renamed-{time.time_ns()}"
    asked = EngineDirect(engine_socket).request("POST", f"/containers/{container}/rename?name={name}")
    assert asked.status_code == 204
    return name


def told_of(name: str) -> Any:
    """Whether a listener was told of this new name."""

    def seen(listener: Listener) -> bool:
        events = [message["event"] for message in listener.messages if message["type"] == "event"]
        return any(event["Actor"]["Attributes"]["name"] == name for event in events)

    return seen


def last_message(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The last message of a stream that ends whole."""
    lines = [line for line in response.read().splitlines() if line.startswith(b"data: ")]
    message: dict[str, Any] = json.loads(lines[-1].removeprefix(b"data: "))
    return message


class TestTheEngineIsKilled:
    def test_every_caller_is_told_and_the_next_engine_is_served(
        self, private_engine: PrivateEngine, own_box: str
    ) -> None:
        with (
            Counted(private_engine.socket) as runner,
            comes_to_rest(runner),
            ThreadPoolExecutor(1) as pool,
            runner.stream("GET", "/events") as raw,
            runner.stream("GET", logs_of(own_box)) as log,
            Listener(runner.port, events_of(own_box, "rename")) as events,
        ):
            running = pool.submit(run, runner, own_box, "sleep 1d")
            assert wait_until(lambda: has_exec(private_engine.socket, own_box), 10)
            private_engine.kill()
            with pytest.raises(CUT):
                raw.read()
            assert last_message(log)["type"] == "error"
            assert refused(running.result()) == (502, "exec_failed", False)
            assert refused(runner.request("GET", "/version")) == (503, "engine_refused", True)
            private_engine.start()
            events.until(lambda each: each.types() == ["reconnected", "gap"], "the gap")
            events.until(told_of(rename(private_engine.socket, own_box)))


@contextlib.contextmanager
def stopped(engine: PrivateEngine) -> Iterator[None]:
    """The engine stands still."""
    pid = engine.pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class TestTheEngineIsStopped:
    def test_for_30_s_streams_wait_and_requests_have_their_limits(
        self, private_engine: PrivateEngine, own_box: str
    ) -> None:
        """One runner has the limits that it has by default, which are longer than that; the other's are shorter."""
        hasty = {"DOCKER_RUNNER_ENGINE_HEAD_MS": "1000", "DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": "500"}
        with (
            Counted(private_engine.socket) as patient,
            Counted(private_engine.socket, hasty) as runner,
            comes_to_rest(patient),
            comes_to_rest(runner),
            ThreadPoolExecutor(2) as pool,
            Listener(runner.port, events_of(own_box, "rename")) as events,
        ):
            running = pool.submit(run, runner, own_box, "sleep 1d", timeoutMs=4000)
            assert wait_until(lambda: has_exec(private_engine.socket, own_box), 3)
            with stopped(private_engine):
                since = time.monotonic()
                waiting = pool.submit(patient.request, "GET", "/version")
                assert refused(runner.request("GET", "/version")) == (504, "engine_timeout", False)
                assert refused(running.result()) == (504, "exec_timeout", False)
                assert "mayStillRun" in json.loads(running.result().body)["error"]["details"]
                assert refused(runner.request("GET", "/v1/ready")) == (503, "docker_unavailable", True)
                assert runner.request("GET", "/v1/health").status == 200
                comments = events.comments
                events.until(lambda each: each.comments >= comments + 3, "comments")
                assert wait_until(lambda: time.monotonic() - since >= STOP_S, STOP_S + 10)
                assert not waiting.done()
            assert waiting.result().status == 200
            events.until(told_of(rename(private_engine.socket, own_box)))
            assert events.types() == []


class TestTheSocketIsReplaced:
    def test_the_engine_at_the_new_socket_is_served_though_the_old_one_lives(
        self, engine: Engine, private_engine: PrivateEngine, short_folder: Path
    ) -> None:
        """By symbolic links: so both can be engines, and the exchange is one step."""

        def which() -> str:
            found: str = json.loads(runner.request("GET", "/info").body)["ID"]
            return found

        old, new = (EngineDirect(each.socket).request("GET", "/info").json()["ID"] for each in (private_engine, engine))
        path = short_folder / "replaced.sock"
        path.symlink_to(private_engine.socket)
        with (
            Counted(str(path), {"DOCKER_RUNNER_ENGINE_WATCH_MS": "100"}) as runner,
            comes_to_rest(runner),
            runner.stream("GET", "/events") as raw,
            Listener(runner.port, "/v1/events/sse") as events,
        ):
            runner.wait_for_log("the engine is there")
            assert which() == old
            (short_folder / "new.sock").symlink_to(engine.socket)
            (short_folder / "new.sock").rename(path)
            with pytest.raises(CUT):
                raw.read()
            events.until(lambda each: each.types() == ["reconnected", "gap"], "the gap")
            assert {which() for _ in range(5)} == {new}
            runner.wait_for_log("another socket stands at the engine's path")
        path.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB; where none can be mounted, see `fill`."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", tmp_path], check=False).returncode == 0
    yield tmp_path
    if mounted:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def bound(runner: Runner, disk: Path) -> None:
    """Where the disk is not small, no file of the runner's may become longer than 4 MiB; the error is another."""
    if not disk.is_mount():
        resource.prlimit(runner.process.pid, resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))


class TestTheSpoolIsFull:
    def test_a_long_body_is_refused_and_leaves_its_room_to_the_next(self, engine: Engine, disk: Path, box: str) -> None:
        target = f"/containers/{box}/archive?path=/tmp"
        fits, too_long = bytes(2 * MIB), bytes(5 * MIB - 1)  # A tar may be zeros alone.
        with Counted(engine.socket, {"TMPDIR": str(disk)}) as runner, comes_to_rest(runner):
            bound(runner, disk)
            for _ in range(3):
                assert refused(runner.request("PUT", target, too_long)) == (503, "spool_failed", True)
                assert runner.request("PUT", target, fits).status == 200
            assert list(disk.iterdir()) == []
            runner.wait_for_log("could not be kept in a temporary file")


def open_still(socks: list[socket.socket]) -> list[socket.socket]:
    """Those whose end has not come; before an end comes no byte."""
    found = []
    for sock in socks:
        sock.setblocking(False)
        try:
            assert sock.recv(1) == b""
        except BlockingIOError:
            found.append(sock)
        finally:
            sock.settimeout(20)
    return found


def refused_on(sock: socket.socket, method: str, target: str, body: bytes = b"") -> str:
    """The code of the refusal of a request on a connection that is open already, and stays so."""
    sock.sendall(signed_head(method, target, body) + body)
    said = b""
    while not said.endswith(b"}}"):
        said += sock.recv(4096)
    head, _, error = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    code: str = json.loads(error)["error"]["code"]
    return code


class TestFileDescriptorsRunOut:
    def test_callers_past_them_are_closed_at_once_and_those_within_are_answered(self, engine: Engine, box: str) -> None:
        room, more = 10, 30
        with Counted(engine.socket) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            limit = len(runner.files()) + room
            resource.prlimit(runner.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
            socks = [held.enter_context(runner.connect()) for _ in range(room + more)]
            assert wait_until(lambda: 3 <= len(open_still(socks)) <= room, 10)
            first, second, third, *_ = open_still(socks)
            first.sendall(signed_head("GET", "/events"))  # It takes the one connection to the engine that is kept.
            assert first.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert refused_on(second, "GET", "/version") == "engine_busy"
            body = bytes(2 * MIB)
            assert refused_on(third, "PUT", f"/containers/{box}/archive?path=/tmp", body) == "spool_failed"
            held.close()
            assert wait_until(lambda: len(runner.files()) <= limit - room, 10)  # Before that nobody is let in.
