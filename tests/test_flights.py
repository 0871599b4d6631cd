"""Single flight: many who want the same image, one pull; each sees its progress or its error, and nobody another's.

The pulls are the real engine's, held in the midst by a gate in front of a real registry; a scripted engine counts what
is asked, and fails when it is told to.
"""

import asyncio
import contextlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
from test_workloads_images import (
    ENSURE,
    FAILED,
    MISSING,
    PROGRESS_HEAD,
    STEP,
    Images,
    PrivateRegistry,
    ensure,
    images,
    private_registry,
)

from answers import told
from client import sign
from conftest import EngineDirect, Names, Registry
from dockerapi import Engine
from flights import MAX_PENDING, MAX_SUMMARY, Flights, Wanted
from gated import Gate
from loops import LOOPS, Run, run_on
from scripted import Peer, ScriptedEngine, chunked
from service import Runner
from wire import Connection, Feed, Reply, Wire, compact

__all__ = ["images", "private_registry"]  # Fixtures.

HELD = 100_000
"""Bytes from which a blob is a layer, and held."""


def layer() -> bytes:
    """A tar that no engine has, and that is held."""
    kept = io.BytesIO()
    with tarfile.open(fileobj=kept, mode="w") as tar:
        file = tarfile.TarInfo("random")
        file.size = 3 * HELD
        tar.addfile(file, io.BytesIO(os.urandom(file.size)))
    return kept.getvalue()


@pytest.fixture
def asking(runner: Runner) -> Wire:
    return Wire(runner.url, runner.secret)


class Asked:
    """Requests on connections of their own, sent, and their answers still to come. A context manager."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._connections: list[Connection] = []

    def add(self, path: str, **fields: Any) -> Connection:
        body = compact(fields)
        connection = self._wire.connect()
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        connection.send(self._wire.head("POST", path, {**kind, **self._wire.sign("POST", path, body)}) + body)
        self._connections.append(connection)
        return connection

    def settle(self) -> None:
        """Wait until all have been let in: what was sent before a request is read no later than that is answered."""
        for _ in range(3):
            assert self._wire.get("/v1/health").status == 200

    def answers(self) -> list[Reply]:
        return [Reply(connection, "POST").finish() for connection in self._connections]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for connection in self._connections:
            connection.close()


@contextlib.contextmanager
def streamed(wire: Wire, **fields: Any) -> Iterator[Iterator[Any]]:
    """The messages of an ensure that is asked for as a stream, one by one."""
    with wire.open("POST", ENSURE, compact(fields), {"Accept": "text/event-stream"}) as reply:
        assert reply.status == 200, reply.finish().body
        yield iter(Feed(reply))


def until_held(messages: Iterator[Any]) -> list[Any]:
    """The progress up to where a layer is on its way."""
    seen = []
    for message in messages:
        assert message["type"] == "progress", message
        seen.append(message["event"])
        if message["event"]["status"] in ("Pulling fs layer", "Downloading"):
            return seen
    raise AssertionError(f"it ended before it was held: {seen}")


def pulls(direct: EngineDirect, name: str, since: float) -> int:
    """How many pulls of an image the engine has done."""
    filters = quote(json.dumps({"type": ["image"], "event": ["pull"]}))
    answer = direct.request("GET", f"/events?since={since}&until={time.time()}&filters={filters}")
    events = [json.loads(line) for line in answer.text.splitlines()]
    return sum(event["id"] == name for event in events)


class TestOnePull:
    def test_of_ten_callers(
        self, asking: Wire, images: Images, registry: Registry, direct: EngineDirect, names: Names
    ) -> None:
        published = images.publish(registry.address, "1", content=layer())
        with (
            Asked(asking) as callers,
            Gate(registry.address, HELD) as gate,
            streamed(asking, image=(name := published.replace(registry.address, gate.address) + ":1")) as first,
        ):
            since = time.time() - 1
            until_held(first)
            for _ in range(5):
                callers.add(ENSURE, image=name)
            with contextlib.ExitStack() as others:
                rest = [others.enter_context(streamed(asking, image=name)) for _ in range(3)]
                for messages in rest:
                    assert until_held(messages)[0]["status"].startswith("Pulling from")
                start = {"image": name, "cmd": ["true"], "networkMode": "none", "labels": names.labels}
                callers.add("/v1/containers/start", **start)
                callers.settle()
                gate.open()
                for messages in [first, *rest]:
                    *_, last, end = messages
                    assert last["event"]["status"] == f"Status: Downloaded newer image for {name}"
                    assert end == {"type": "end"}
            assert [reply.status for reply in callers.answers()] == [204] * 5 + [200]
        assert pulls(direct, name, since) == 1

    def test_who_comes_late_is_told_where_it_stands(self, asking: Wire, images: Images, registry: Registry) -> None:
        published = images.publish(registry.address, "1", content=layer())
        with Gate(registry.address, HELD) as gate:
            name = published.replace(registry.address, gate.address) + ":1"
            with streamed(asking, image=name) as first:
                until_held(first)
                with streamed(asking, image=name) as late:
                    gate.open()
                    seen = [message["event"] for message in late if message["type"] == "progress"]
        assert seen[0]["status"] == "Pulling from " + name.partition("/")[2].partition(":")[0]
        assert seen[-1]["status"].startswith("Status: Downloaded")

    def test_whoever_leaves_the_others_have_it(self, asking: Wire, images: Images, registry: Registry) -> None:
        published = images.publish(registry.address, "1", content=layer())
        with Gate(registry.address, HELD) as gate:
            name = published.replace(registry.address, gate.address) + ":1"
            with contextlib.ExitStack() as leaving:
                first = leaving.enter_context(streamed(asking, image=name))
                until_held(first)
                with streamed(asking, image=name) as second:
                    until_held(second)
                    leaving.close()
                    gate.open()
                    assert [message["type"] for message in second][-1] == "end"
        assert images.has(name)

    def test_credentials_are_nobody_elses(
        self, asking: Wire, images: Images, private_registry: PrivateRegistry
    ) -> None:
        published = images.publish(private_registry.address, "1", auth=private_registry.auth, content=layer())
        with Gate(private_registry.address, HELD) as gate:
            name = published.replace(private_registry.address, gate.address) + ":1"
            with streamed(asking, image=name, auth=private_registry.auth) as rightful:
                until_held(rightful)
                wrong: list[dict[str, Any]] = [
                    {},
                    {"auth": {}},
                    {"auth": {**private_registry.auth, "password": "wr0ng"}},
                ]
                for auth in wrong:
                    for reply in (ensure(asking, name, **auth), streamed_refusal(asking, image=name, **auth)):
                        assert reply.status in (404, 500), reply.body
                        assert "Pulling" not in reply.body.decode()
                gate.open()
                assert [message["type"] for message in rightful][-1] == "end"


def streamed_refusal(wire: Wire, **fields: Any) -> Reply:
    return wire.request("POST", ENSURE, compact(fields), {"Accept": "text/event-stream"})


class Counted:
    """A script: an image that is missing; its pull takes a step, and goes on as `rest` says once the test says `go`."""

    def __init__(self, rest: bytes) -> None:
        self.rest = rest
        self.ended = threading.Semaphore(0)
        """Released for each pull whose caller has gone."""

    def __call__(self, peer: Peer) -> None:
        while request := peer.read_request():
            if request.startswith(b"GET "):
                peer.send(MISSING)
                continue
            peer.send(PROGRESS_HEAD + chunked(STEP, last=False))
            if self.rest:
                peer.engine.go.wait(10)
                peer.send(self.rest)
            else:
                peer.wait_closed()
                self.ended.release()
            return


def posts(engine: ScriptedEngine) -> int:
    return sum(request.startswith(b"POST ") for request in engine.requests)


class TestScripted:
    def test_each_sees_the_error_and_may_come_again(self) -> None:
        with ScriptedEngine(Counted(chunked(FAILED))) as engine, Runner(engine.path) as runner:
            wire = Wire(runner.url, runner.secret)
            with Asked(wire) as callers, contextlib.ExitStack() as open_:
                feeds = [open_.enter_context(streamed(wire, image="x")) for _ in range(3)]
                assert [next(feed)["type"] for feed in feeds] == ["progress"] * 3
                for _ in range(3):
                    callers.add(ENSURE, image="x")
                callers.settle()
                engine.go.set()
                errors = [next(feed) for feed in feeds]
                assert [told(reply) for reply in callers.answers()] == [(502, "image_ensure_failed", True)] * 3
            assert [(each["code"], each["message"], each["retryable"]) for each in errors] == [
                ("image_ensure_failed", "disk full", True)
            ] * 3
            assert posts(engine) == 1
            assert told(ensure(wire, "x")) == (502, "image_ensure_failed", True)
            assert posts(engine) == 2

    def test_a_refusal_is_each_ones_own(self) -> None:
        refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 16\r\n\r\n" + b'{"message":"no"}'

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if request.startswith(b"POST "):
                    peer.engine.go.wait(10)
                peer.send(refusal if request.startswith(b"POST ") else MISSING)

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner, contextlib.ExitStack() as open_:
            callers = open_.enter_context(Asked(Wire(runner.url, runner.secret)))
            callers.add(ENSURE, image="x")
            callers.add("/v1/containers/start", image="x")
            engine.wait(lambda: posts(engine) == 1, "the pull")
            callers.settle()
            engine.go.set()
            assert [told(reply) for reply in callers.answers()] == [
                (403, "image_ensure_failed", False),
                (403, "start_failed", False),
            ]
            assert posts(engine) == 1

    def test_the_last_one_that_leaves_ends_the_pull(self) -> None:
        script = Counted(b"")
        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            wire = Wire(runner.url, runner.secret)
            with Asked(wire) as callers, contextlib.ExitStack() as first, contextlib.ExitStack() as second:
                for caller in (first, second):
                    assert next(caller.enter_context(streamed(wire, image="x")))["type"] == "progress"
                plain = callers.add(ENSURE, image="x")
                callers.settle()
                first.close()
                plain.close()
                # Whoever is left is told what comes: a caller that comes now joins that pull.
                with streamed(wire, image="x") as third:
                    assert next(third)["type"] == "progress"
                assert posts(engine) == 1
                assert not script.ended.acquire(blocking=False)
                second.close()
                assert script.ended.acquire(timeout=10)
            with streamed(wire, image="x") as later:
                assert next(later)["type"] == "progress"
                assert posts(engine) == 2
            assert script.ended.acquire(timeout=10)

    def test_what_differs_is_another_pull(self) -> None:
        script = Counted(chunked(STEP))
        wanted: list[dict[str, Any]] = [
            {"image": "x"},
            {"image": "x:2"},
            {"image": "y"},
            {"image": "x", "platform": "linux/amd64"},
            {"image": "x", "auth": {}},
            {"image": "x", "auth": {"username": "a", "password": "b"}},
            {"image": "x", "auth": {"username": "a", "password": "c"}},
        ]
        with ScriptedEngine(script) as engine, Runner(engine.path) as runner, contextlib.ExitStack() as open_:
            wire = Wire(runner.url, runner.secret)
            for number, fields in enumerate(wanted, 1):
                for _ in range(2):
                    next(open_.enter_context(streamed(wire, **fields)))
                assert posts(engine) == number
            # The same, in other words.
            next(open_.enter_context(streamed(wire, image="x:latest")))
            next(open_.enter_context(streamed(wire, image="x", auth={"password": "b", "username": "a"})))
            assert posts(engine) == len(wanted)
            engine.go.set()

    def test_who_may_not_pull_does_not_join(self, tmp_path: Path) -> None:
        (tmp_path / "policy.toml").write_text('preset = "everything"\n[keys.ci.images]\nallow = ["other"]\n')
        (tmp_path / "secrets").write_text("all:all-0123456789abcdef\nci:ci-0123456789abcdef\n")
        settings = {
            "DOCKER_RUNNER_POLICY": str(tmp_path / "policy.toml"),
            "DOCKER_RUNNER_SHARED_SECRET": "",
            "DOCKER_RUNNER_SHARED_SECRET_FILE": str(tmp_path / "secrets"),
        }
        with ScriptedEngine(Counted(chunked(STEP))) as engine, Runner(engine.path, settings) as runner:
            wire = Wire(runner.url, "")
            body = compact({"image": "x"})

            def signed(key: str) -> dict[str, str]:
                return sign(f"{key}-0123456789abcdef", "POST", ENSURE, body, key=key)

            accept = {"Accept": "text/event-stream"}
            with wire.open("POST", ENSURE, body, {**signed("all"), **accept}, sign=False) as allowed:
                assert next(iter(Feed(allowed)))["type"] == "progress"
                for more in ({}, accept):
                    reply = wire.request("POST", ENSURE, body, {**signed("ci"), **more}, sign=False)
                    assert told(reply) == (403, "policy_denied", False)
                engine.go.set()
            assert posts(engine) == 1


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return run_on(request.param)


class TestReaders:
    """On the flights themselves."""

    WANTED = Wanted(None, "x", "latest", None, None)

    def test_one_that_is_slow_is_given_a_summary_and_holds_nobody(self, run: Run) -> None:
        layers, rounds = 20, 2000
        lines = [
            b'{"status":"%d of %s","id":"%d"}' % (done, b"x" * 50, n) for done in range(rounds) for n in range(layers)
        ]
        assert sum(map(len, lines)) > 4 * MAX_PENDING

        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(PROGRESS_HEAD + chunked(b"\r\n".join([b'{"status":"begins"}', lines[0], b""]), last=False))
            peer.engine.go.wait(10)
            peer.send(chunked(b"\r\n".join([*lines[1:], b""])))

        async def test() -> None:
            with ScriptedEngine(script) as scripted:
                engine = Engine(scripted.path, max_connections=4, queue_s=1, connect_s=1)
                flights = Flights(engine)
                async with (
                    contextlib.aclosing(flights.ensure(self.WANTED)) as slow,
                    contextlib.aclosing(flights.ensure(self.WANTED)) as quick,
                ):
                    assert await anext(slow) == b'{"status":"begins"}'
                    scripted.go.set()
                    seen = [line async for line in quick]
                    assert seen[-1] == lines[-1]
                    left = [line async for line in slow]
                assert len(b"".join(left)) < 2 * MAX_PENDING
                assert left[-layers:] == lines[-layers:]
                assert len(flights) == 0
                engine.close()

        run(test())

    def test_a_summary_is_bounded(self, run: Run) -> None:
        lines = [b'{"status":"x","id":"%d"}' % n for n in range(MAX_SUMMARY + 100)]
        lines.append(b'{"status":"%s","id":"long"}' % (b"x" * 5000))

        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(PROGRESS_HEAD + chunked(b"\r\n".join([*lines, b""]), last=False))
            peer.engine.go.wait(10)
            peer.send(chunked())

        async def test() -> None:
            with ScriptedEngine(script) as scripted:
                engine = Engine(scripted.path, max_connections=4, queue_s=1, connect_s=1)
                flights = Flights(engine)
                async with contextlib.aclosing(flights.ensure(self.WANTED)) as first:
                    seen = []
                    while lines[-1] not in seen:
                        seen.append(await anext(first))
                    async with contextlib.aclosing(flights.ensure(self.WANTED)) as late:
                        scripted.go.set()
                        told = [line async for line in late]
                assert told == lines[100:-1]
                engine.close()

        run(test())

    def test_one_that_is_cancelled_leaves_the_others(self, run: Run) -> None:
        async def wait(flights: Flights) -> list[bytes]:
            async with contextlib.aclosing(flights.ensure(self.WANTED)) as lines:
                return [line async for line in lines]

        async def test() -> None:
            with ScriptedEngine(Counted(chunked(STEP))) as scripted:
                engine = Engine(scripted.path, max_connections=4, queue_s=1, connect_s=1)
                flights = Flights(engine)
                tasks = [asyncio.create_task(wait(flights)) for _ in range(10)]
                async with contextlib.aclosing(flights.ensure(self.WANTED)) as lines:
                    await anext(lines)
                    for task in tasks[:9]:
                        task.cancel()
                    await asyncio.wait(tasks[:9])
                scripted.go.set()
                assert len(await tasks[9]) == 2
                assert posts(scripted) == 1
                assert len(flights) == 0
                engine.close()

        run(test())
