"""Long streams on a real engine: every event once, flat memory, slow readers, callers that leave."""

import base64
import contextlib
import http.client
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest

from client import body_hash, sign
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import Runner, read_to_end, signed_head

MIB = 1024 * 1024


def wait_until(what: Callable[[], bool], limit_s: float) -> bool:
    """Whether `what` came true in time."""
    deadline = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


def quoted(filters: dict[str, Any]) -> str:
    return quote(json.dumps(filters))


@pytest.fixture
def alone(engine: Engine) -> Iterator[Runner]:
    """A runner of this test's own, whose memory and connections nobody else uses."""
    with Runner(engine.socket) as running:
        yield running


@pytest.fixture
def container(direct: EngineDirect, names: Names, image: str) -> Callable[..., str]:
    """Make and start a container that runs a shell command; gives its name."""

    def make(command: str, **more: Any) -> str:
        name = names()
        create = {
            "Image": image,
            "Cmd": ["/bin/sh", "-c", command],
            "Labels": names.labels,
            "HostConfig": {"NetworkMode": "none"},
            **more,
        }
        assert direct.request("POST", f"/containers/create?name={name}", json=create).status_code == 201
        assert direct.request("POST", f"/containers/{name}/start").status_code == 204
        return name

    return make


def make_events(direct: EngineDirect, name: str, count: int) -> list[str]:
    """Cause `count` events on the engine, as fast as it makes them: execs of a container, created and never started.

    Gives the ids of the execs, which are attributes of their events.
    """
    made = []
    for _ in range(count):
        answer = direct.request("POST", f"/containers/{name}/exec", json={"Cmd": ["true"]})
        made.append(str(answer.json()["Id"]))
    return made


def exec_ids(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["Actor"]["Attributes"]["execID"] for line in lines]


def test_a_burst_of_1000_events_arrives_exactly_and_in_order(
    runner: Runner, direct: EngineDirect, container: Callable[..., str]
) -> None:
    name = container("sleep 600")
    filters = quoted({"container": [name], "event": ["exec_create"]})
    with runner.stream("GET", f"/events?filters={filters}") as response:
        made = make_events(direct, name, 1000)
        lines = [response.readline() for _ in range(1000)]
    assert exec_ids(lines) == made
    since = json.loads(lines[0])["time"] - 1
    until = json.loads(lines[-1])["time"] + 1
    kept = direct.request("GET", f"/events?filters={filters}&since={since}&until={until}").content.splitlines(True)
    assert len(kept) > 100
    assert lines[-len(kept) :] == kept


def test_a_stalled_reader_of_events_is_cut_off_while_another_gets_all_and_the_engine_is_not_slowed(
    engine: Engine, direct: EngineDirect, container: Callable[..., str], names: Names
) -> None:
    # Labels travel with each event: they make one about 20 KB long, so that 3,000 are far past the buffer.
    name = container("sleep 600", Labels={**names.labels, **{f"long-{number}": "x" * 1000 for number in range(20)}})
    target = f"/events?filters={quoted({'container': [name], 'event': ['exec_create']})}"
    with Runner(engine.socket) as runner, runner.connect() as stalled, ThreadPoolExecutor(1) as pool:
        stalled.sendall(signed_head("GET", target))
        assert stalled.recv(15) == b"HTTP/1.1 200 OK"
        reading = threading.Event()

        def read_all() -> list[str]:
            with runner.stream("GET", target) as response:
                reading.set()
                return exec_ids([response.readline() for _ in range(3000)])

        reader = pool.submit(read_all)
        assert reading.wait(10)
        before = runner.memory()
        started = time.monotonic()
        made = make_events(direct, name, 3000)
        with_stalled_s = time.monotonic() - started
        assert reader.result(60) == made
        with pytest.raises(ConnectionResetError):
            read_on(stalled)
        assert runner.memory() - before < 24 * MIB
    # An engine that waits for a stalled reader needs about 100 ms for each event: 300 s.
    assert with_stalled_s < 60


def read_on(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def test_a_download_of_200_mb_of_archive_keeps_memory_flat_under_a_slow_reader(
    alone: Runner, direct: EngineDirect, container: Callable[..., str]
) -> None:
    name = container("head -c 200000000 /dev/urandom > /big; touch /ready; sleep 600")
    assert wait_until(lambda: direct.request("HEAD", f"/containers/{name}/archive?path=/ready").status_code == 200, 30)
    check_flat_download(alone, f"/containers/{name}/archive?path=/big", 200_000_000)
    direct.request("DELETE", f"/containers/{name}?force=1")


def test_a_download_of_200_mb_of_log_keeps_memory_flat_under_a_slow_reader(
    alone: Runner, direct: EngineDirect, container: Callable[..., str]
) -> None:
    line = "x" * 999
    name = container(
        f"yes {line} | head -n 200000", HostConfig={"NetworkMode": "none", "LogConfig": {"Type": "json-file"}}
    )
    assert direct.request("POST", f"/containers/{name}/wait", timeout=120).json()["StatusCode"] == 0
    check_flat_download(alone, f"/containers/{name}/logs?stdout=1", 200_000_000)
    direct.request("DELETE", f"/containers/{name}?force=1")


def check_flat_download(runner: Runner, target: str, at_least: int) -> None:
    """Read a little and slowly first, then all: the runner's memory grows by a bounded amount only."""
    runner.request("GET", "/_ping")
    before = runner.memory()
    size = 0
    peak = before
    with runner.stream("GET", target) as response:
        assert response.status == 200
        for _ in range(20):  # The socket's buffers are full between these reads.
            size += len(response.read(1000))
            threading.Event().wait(0.02)
            peak = max(peak, runner.memory())
        while part := response.read(MIB):
            size += len(part)
            peak = max(peak, runner.memory())
    assert size >= at_least
    assert peak - before < 16 * MIB


def test_an_upload_of_200_mb_keeps_memory_flat_and_arrives_whole(
    alone: Runner, direct: EngineDirect, container: Callable[..., str]
) -> None:
    name = container("sleep 600")
    body = tar_of("upload", 200 * MIB)
    target = f"/containers/{name}/archive?path=/"
    headers = sign(alone.secret, "PUT", target, content_hash=body_hash(body))
    alone.request("GET", "/_ping")
    before = alone.memory()
    peaks = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(alone.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = alone.request("PUT", target, body, {**headers, "Content-Type": "application/x-tar"}, timeout=120)
    done.set()
    watcher.join()
    assert (answer.status, answer.body) == (200, b"")
    assert max(peaks) - before < 24 * MIB
    stat = direct.request("HEAD", f"/containers/{name}/archive?path=/upload").headers["X-Docker-Container-Path-Stat"]
    assert json.loads(base64.b64decode(stat))["size"] == 200 * MIB
    direct.request("DELETE", f"/containers/{name}?force=1")


def tar_of(name: str, size: int) -> bytes:
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
        return out.getvalue()


@pytest.mark.parametrize("operation", ["events", "logs", "wait", "stats", "attach", "archive"])
def test_a_caller_that_leaves_takes_its_engine_connection_with_it_within_a_second(
    alone: Runner, container: Callable[..., str], operation: str
) -> None:
    name = container("echo started; head -c 50000000 /dev/zero > /big; sleep 600")
    method, target = {
        "events": ("GET", "/events"),
        "logs": ("GET", f"/containers/{name}/logs?follow=1&stdout=1"),
        "wait": ("POST", f"/containers/{name}/wait"),
        "stats": ("GET", f"/containers/{name}/stats"),
        "attach": ("POST", f"/containers/{name}/attach?stream=1&stdout=1"),
        "archive": ("GET", f"/containers/{name}/archive?path=/"),
    }[operation]
    idle = alone.sockets()
    with alone.connect() as sock:
        sock.sendall(signed_head(method, target))
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        # The caller's, the engine's, and for a raw stream that which tells whether it ends whole.
        assert wait_until(lambda: alone.sockets() == idle + 2 + (operation == "attach"), 5)
    assert wait_until(lambda: alone.sockets() == idle, 1)


def test_a_caller_that_leaves_before_the_answer_takes_its_engine_connection_with_it(
    alone: Runner, container: Callable[..., str]
) -> None:
    name = container("trap '' TERM; sleep 600 & wait; sleep 600")
    idle = alone.sockets()
    with alone.connect() as sock:
        sock.sendall(signed_head("POST", f"/containers/{name}/stop?t=60"))
        assert wait_until(lambda: alone.sockets() == idle + 2, 5)
    assert wait_until(lambda: alone.sockets() == idle, 1)


def test_the_head_of_a_silent_stream_arrives_at_once(runner: Runner) -> None:
    with runner.connect(timeout=5) as sock:
        sock.sendall(signed_head("GET", "/events?filters=" + quoted({"container": ["nobody"]})))
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


# Shutdown.


def test_sigterm_ends_an_idle_service_with_0(engine: Engine) -> None:
    with Runner(engine.socket) as runner, runner.connect() as kept:
        kept.sendall(signed_head("GET", "/_ping"))
        assert kept.recv(65536).endswith(b"OK")
        started = time.monotonic()
        assert runner.stop() == 0
        assert time.monotonic() - started < 2
        assert read_to_end(kept) == b""


def test_sigterm_gives_a_running_request_its_time_and_takes_no_new_ones(
    engine: Engine, container: Callable[..., str]
) -> None:
    name = container("trap '' TERM; echo up; while :; do sleep 1; done")
    with Runner(engine.socket) as runner, ThreadPoolExecutor(1) as pool:
        idle = runner.sockets()
        stopping = pool.submit(runner.request, "POST", f"/containers/{name}/stop?t=2")
        assert wait_until(lambda: runner.sockets() == idle + 2, 5)
        runner.process.terminate()
        assert wait_until(lambda: not accepts(runner.port), 5)
        assert not stopping.done()
        assert stopping.result(20).status == 204
        assert runner.process.wait(20) == 0


def accepts(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_sigterm_cuts_off_what_has_no_end_of_its_own_abortively(engine: Engine, container: Callable[..., str]) -> None:
    name = container("echo one; sleep 600")
    with (
        Runner(engine.socket, {"DOCKER_RUNNER_GRACE_MS": "300"}) as runner,
        runner.stream("GET", "/events") as events,
        runner.stream("GET", f"/containers/{name}/logs?follow=1&stdout=1") as logs,
    ):
        assert logs.read(8)
        assert runner.stop() == 0
        for response in (events, logs):
            with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
                response.read()
