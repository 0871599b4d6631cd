"""One stream of the engine's events for many callers: shared where it is exact, and nobody's business but their own."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from listening import Listener, events_of

import event_hub
from audit import Audit
from calls import Calls, Endings
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from dockerapi import Engine as EngineClient
from errors import RunnerError
from event_fanout import Subscriber
from event_hub import EventHub, Wish
from expiry import Expiry
from flights import Flights
from policy import PRESETS, Policies
from scope import Scopes
from scripted import Peer, ScriptedEngine, chunked
from service import Runner, read_to_end, signed_head, with_files
from workloads import ROUTES

LABEL = "com.example.tenant"
POLICY = f"""
preset = "everything"
[keys.blue.scope]
label = "{LABEL}=blue"
[keys.green.scope]
label = "{LABEL}=green"
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture
def alone(engine: Engine) -> Iterator[Runner]:
    """A runner whose connections nobody else uses."""
    with Runner(engine.socket) as running:
        yield running


def sse_target(filters: dict[str, list[str]]) -> str:
    return "/v1/events/sse?filters=" + base64.b64encode(json.dumps(filters).encode()).decode().replace("+", "%2B")


class TestSharing:
    def test_equal_filters_share_one_connection_to_the_engine(self, alone: Runner, containers: Containers) -> None:
        box = containers()
        at_rest = alone.sockets()
        same = ({"container": [box], "type": ["container"]}, {"type": ["container", "container"], "container": [box]})
        listeners = [Listener(alone.port, sse_target(filters)) for filters in same * 10]
        assert alone.sockets() == at_rest + 20 + 1
        made = [containers.exec(box, "true") for _ in range(20)]
        for each in listeners:
            assert each.until(lambda one: len(one.execs()) == 20).execs() == made
        assert len({each.last_id for each in listeners}) == 1
        for each in listeners:
            each.close()
        assert wait_until(lambda: alone.sockets() == at_rest, 5)

    def test_other_filters_have_one_of_their_own(self, alone: Runner, containers: Containers) -> None:
        boxes = [containers(), containers()]
        at_rest = alone.sockets()
        listeners = [Listener(alone.port, events_of(box)) for box in boxes]
        assert alone.sockets() == at_rest + 4
        made = [containers.exec(box, "true") for box in boxes]
        for each, own in zip(listeners, made, strict=True):
            assert each.until(lambda one: bool(one.execs())).execs() == [own]
            each.close()

    def test_callers_that_come_and_go_do_not_disturb_others(self, alone: Runner, containers: Containers) -> None:
        box = containers()
        with Listener(alone.port, events_of(box)) as steady, ThreadPoolExecutor(4) as pool:

            def come_and_go(_: int) -> list[str]:
                with Listener(alone.port, events_of(box)) as listener:
                    listener.until(lambda each: len(each.execs()) >= 5)
                    return listener.execs()

            visits = [pool.submit(come_and_go, number) for number in range(40)]
            made: list[str] = []
            while not all(each.done() for each in visits):
                made.append(containers.exec(box, "true"))
            steady.until(lambda each: len(each.execs()) == len(made))
            assert steady.execs() == made
            for each in visits:
                seen = each.result()
                at = made.index(seen[0])
                assert seen == made[at : at + len(seen)]
        assert "defect" not in "".join(alone.log)

    def test_a_caller_that_does_not_read_is_cut_off_and_99_others_get_all(
        self, engine: Engine, containers: Containers, names: Names
    ) -> None:
        labels = {**names.labels, **{f"long-{number}": "é" * 500 for number in range(20)}}
        box = containers(Labels=labels)
        with (
            Runner(engine.socket, {"DOCKER_RUNNER_EVENT_BUFFER": str(1024 * 1024)}) as runner,
            runner.connect() as stalled,
        ):
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            stalled.sendall(signed_head("GET", events_of(box)))
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            listeners = [Listener(runner.port, events_of(box)) for _ in range(20)]
            before = runner.memory()
            made = [containers.exec(box, "true") for _ in range(500)]
            for each in listeners:
                assert each.until(lambda one: len(one.execs()) == 500).execs() == made
                each.close()
            assert not read_to_end(stalled).endswith(b"0\r\n\r\n"), "it must not look complete"
            assert runner.memory() - before < 32 * 1024 * 1024

    def test_a_caller_that_reads_late_gets_all(self, alone: Runner, containers: Containers, names: Names) -> None:
        labels = {**names.labels, **{f"long-{number}": "x" * 500 for number in range(20)}}
        box = containers(Labels=labels)
        with alone.connect() as late:
            late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            late.sendall(signed_head("GET", events_of(box)))
            data = late.recv(15)
            made = [containers.exec(box, "true") for _ in range(300)]
            while data.count(b'"timeNano":') < 300:
                data += late.recv(1 << 20)
        body = b"".join(_chunks(data.partition(b"\r\n\r\n")[2]))
        told = [json.loads(line[6:])["event"] for line in body.split(b"\n") if line.startswith(b"data: {")]
        assert [event["Actor"]["Attributes"]["execID"] for event in told] == made

    def test_a_head_request_opens_nothing_for_long(self, alone: Runner, containers: Containers) -> None:
        at_rest = alone.sockets()
        answer = alone.request("HEAD", events_of(containers()))
        assert (answer.status, answer.body) == (200, b"")
        assert wait_until(lambda: alone.sockets() == at_rest, 5)


def _chunks(data: bytes) -> Iterator[bytes]:
    while data:
        size, _, data = data.partition(b"\r\n")
        yield data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]


@pytest.fixture(scope="module")
def scoped(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    secrets = "".join(f"{name}:{secret_of(name)}\n" for name in ("blue", "green"))
    with Runner(engine.socket, with_files(tmp_path_factory.mktemp("scope"), secrets, POLICY)) as runner:
        yield runner


def secret_of(name: str) -> str:
    return f"the-secret-of-{name}-0123456789"


class TestScopes:
    TARGET = sse_target({"type": ["container"], "event": ["exec_create"]})

    def listen(self, runner: Runner, name: str, last_id: str | None = None) -> Listener:
        return Listener(runner.port, self.TARGET, last_id, secret=secret_of(name), key=name)

    @pytest.fixture
    def boxes(self, containers: Containers, names: Names) -> dict[str, str]:
        return {name: containers(Labels={**names.labels, LABEL: name}) for name in ("blue", "green")}

    def test_nothing_of_another_scope_is_told_live_or_again(
        self, scoped: Runner, containers: Containers, boxes: dict[str, str]
    ) -> None:
        with self.listen(scoped, "blue") as blue, self.listen(scoped, "green") as green:
            made: dict[str, list[str]] = {"blue": [], "green": []}
            for number in range(20):
                name = ("blue", "green", "green")[number % 3]
                made[name].append(containers.exec(boxes[name], "true"))
            assert blue.until(lambda each: len(each.execs()) == len(made["blue"])).execs() == made["blue"]
            assert green.until(lambda each: len(each.execs()) == len(made["green"])).execs() == made["green"]
        away = {name: [containers.exec(boxes[name], "true") for _ in range(5)] for name in ("green", "blue")}
        for name, before in (("blue", blue), ("green", green)):
            with self.listen(scoped, name, before.last_id) as again:
                again.until(lambda each: len(each.execs()) == 5)
                assert (again.execs(), again.types()) == (away[name], [])

    def test_an_id_says_nothing_of_what_happens_to_others(
        self, scoped: Runner, containers: Containers, boxes: dict[str, str]
    ) -> None:
        with self.listen(scoped, "blue") as blue:
            own = containers.exec(boxes["blue"], "true")
            blue.until(lambda each: each.execs() == [own])
            id_ = blue.last_id
            with self.listen(scoped, "green") as green:
                other = containers.exec(boxes["green"], "true")
                green.until(lambda each: each.execs() == [other])
            with self.listen(scoped, "blue") as later:
                later.until(lambda each: each.last_id is not None)
                assert later.last_id == id_

    def test_the_id_of_another_scope_is_a_gap_and_opens_nothing(
        self, scoped: Runner, containers: Containers, boxes: dict[str, str]
    ) -> None:
        with self.listen(scoped, "green") as green:
            first = containers.exec(boxes["green"], "true")
            green.until(lambda each: each.execs() == [first])
        containers.exec(boxes["green"], "true")
        with self.listen(scoped, "blue", green.last_id) as blue:
            own = containers.exec(boxes["blue"], "true")
            blue.until(lambda each: own in each.execs())
            assert (blue.execs(), blue.types()) == ([own], ["gap"])


class TestEqualEvents:
    """Events of one nanosecond, equal ones too, from an engine that is a script."""

    @staticmethod
    def line(time_ns: int, name: str) -> bytes:
        return b'{"Type":"container","Action":"%b","Actor":{"ID":"c"},"timeNano":%d}\n' % (name.encode(), time_ns)

    def script(self, kept: list[list[bytes]], live: list[list[bytes]], cut: list[Any]) -> Any:
        """What the engine keeps, and tells, in each of its lives; one is cut when its turn comes."""
        lives = iter(range(len(kept)))
        current: list[int] = []

        def run(peer: Peer) -> None:
            while request := peer.read_request():
                if b"until=" in request:
                    peer.send(HEAD + chunked(b"".join(kept[current[-1]])))
                    continue
                current.append(next(lives))
                number = current[-1]
                peer.send(HEAD + chunked(b"".join([*kept[number], *live[number]]), last=False))
                if cut[number] is not None:
                    peer.engine.wait(cut[number].is_set, "the test to cut")
                    return
                peer.wait_closed()
                return

        return run

    def test_each_is_told_as_often_as_it_happened(self) -> None:
        now = time.time_ns()
        a, b, c = (self.line(now, name) for name in "abc")
        later = self.line(now + 5, "d")
        cut = threading.Event()
        kept = [[], [a, b, b, b, c, later]]
        live = [[a, b, b], [later.replace(b'"d"', b'"e"')]]
        target = f"/v1/events/sse?since={now // 10**9}"
        with (
            ScriptedEngine(self.script(kept, live, [cut, None])) as engine,
            Runner(engine.path) as runner,
            Listener(runner.port, target) as listener,
        ):
            listener.until(lambda each: len(each.messages) == 3)
            first = listener.last_id
            cut.set()
            listener.until(lambda each: len(each.messages) == 8)
            assert self.told(listener) == ["a", "b", "b", "reconnected", "b", "c", "d", "e"]
            with Listener(runner.port, target, first) as again:
                again.until(lambda each: len(each.messages) == 5)
                assert self.told(again) == ["reconnected", "b", "c", "d", "e"]

    @staticmethod
    def told(listener: Listener) -> list[str]:
        return [each.get("event", {}).get("Action", each["type"]) for each in listener.messages]

    def test_what_the_engine_sends_twice_as_the_stream_begins_is_told_once(self) -> None:
        now = time.time_ns()
        a, b = self.line(now, "a"), self.line(now + 1, "b")
        with (
            ScriptedEngine(self.script([[a, b]], [[b, self.line(now + 2, "c")]], [None])) as engine,
            Runner(engine.path) as runner,
            Listener(runner.port, "/v1/events/sse?since=1") as listener,
        ):
            listener.until(lambda each: len(each.messages) >= 3)
            assert self.told(listener) == ["a", "b", "c"]


class _Nowhere:
    """A connection that takes nothing at once."""

    def push(self, body: bytes, chunk: bytes) -> bool:
        return False

    def abort(self) -> None:
        raise AssertionError("cut off")


def test_an_engine_that_stays_away_is_the_end_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_hub, "GIVE_UP_S", 0.3)

    def script(peer: Peer) -> None:
        while request := peer.read_request():
            last = b"until=" in request
            peer.send(HEAD + chunked(last=last))
            if not last:
                peer.engine.wait(peer.engine.go.is_set, "the test to cut")
                return

    async def test(engine: ScriptedEngine) -> bytes:
        client = EngineClient(engine.path, max_connections=10, queue_s=1, connect_s=1)
        operation = next(operation for _, path, _, _, operation in ROUTES if path == "/v1/events/sse")
        policies = Policies(PRESETS["everything"])
        expiry = Expiry(client, Audit("off"), lambda: policies, instance="x", interval_s=60, clock=time.monotonic)
        calls = Calls(client, operation, set(), policies.default, Scopes(client), expiry, Flights(client), Endings())
        subscriber = Subscriber(_Nowhere(), 1000)
        stream = await EventHub(60, lambda events, since_ns: None).subscribe(calls, "{}", Wish(), subscriber)
        sent: list[bytes] = []

        async def send(piece: bytes) -> None:
            sent.append(piece)

        engine.go.set()
        await asyncio.to_thread(engine.stop)
        with pytest.raises(RunnerError, match="no engine socket"):
            await asyncio.wait_for(subscriber.deliver(send), 10)
        stream.leave(subscriber)
        client.close()
        return b"".join(sent)

    with ScriptedEngine(script) as engine:
        assert asyncio.run(test(engine)).count(b"data:") == 0
