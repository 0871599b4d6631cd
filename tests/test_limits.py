"""How much is served at once: places for requests and for streams, taken by the verified only, given back always."""

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from client import body_hash, sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from scripted import OK, Peer, ScriptedEngine
from service import SECRET, Answer, Runner, signed_head
from upgraded import SUBPROTOCOL
from wire import Wire

WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
START = b'{"Detach":false,"Tty":false}'


def holds(peer: Peer) -> None:
    """A script: an engine that answers pings, and anything else when it is told to."""
    while request := peer.read_request():
        if b" /_ping " not in request:
            peer.engine.go.wait()
        peer.send(OK)


@pytest.fixture
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(holds) as engine:
        yield engine


@pytest.fixture
def two(scripted: ScriptedEngine) -> Iterator[Runner]:
    """A runner that serves two requests at once."""
    with Runner(scripted.path, {"DOCKER_RUNNER_MAX_REQUESTS": "2"}) as running:
        yield running


@pytest.fixture(scope="module")
def one(engine: Engine) -> Iterator[Runner]:
    """A runner that serves one stream and one request at once."""
    limits = {"DOCKER_RUNNER_MAX_REQUESTS": "1", "DOCKER_RUNNER_MAX_STREAMS": "1"}
    with Runner(engine.socket, limits) as running:
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that no test changes."""
    return Containers(direct, names, image)()


@contextlib.contextmanager
def held(
    runner: Runner, engine: ScriptedEngine, count: int = 2, target: str = "/info"
) -> Iterator[list[socket.socket]]:
    """So many requests, each on a connection of its own, that the engine has and does not answer."""
    before = len(engine.requests)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(runner.connect()) for _ in range(count)]
        for sock in socks:
            sock.sendall(signed_head("GET", target))
        engine.wait(lambda: len(engine.requests) == before + count, "the requests to arrive")
        yield socks


def check_full(answer: Answer, code: str) -> None:
    """It is a refusal that says when to come again."""
    assert (answer.status, answer.header("retry-after")) == (429, "1")
    error = json.loads(answer.body)
    assert error["error"] == {"code": code, "message": error["message"], "retryable": True}


def comes_free(runner: Runner, target: str = "/_ping") -> None:
    """The next request is served, at once or as soon as the runner has seen the last one's end."""
    assert wait_until(lambda: runner.request("GET", target).status == 200, 10)


class TestRequests:
    def test_one_more_is_429_and_may_come_again_as_it_was(self, scripted: ScriptedEngine, two: Runner) -> None:
        headers = sign(SECRET, "GET", "/_ping")
        with held(two, scripted) as socks:
            check_full(two.request("GET", "/_ping", headers=headers), "too_many_requests")
            check_full(two.request("GET", "/_ping", headers=headers), "too_many_requests")
            scripted.go.set()
            assert all(sock.recv(65536).endswith(b"ok") for sock in socks)
        assert two.request("GET", "/_ping", headers=headers).body == b"ok"
        assert json.loads(two.request("GET", "/_ping", headers=headers).body)["error"]["code"] == "replayed_nonce"

    @pytest.mark.parametrize(
        ("method", "target"),
        [("POST", "/containers/create"), ("POST", "/v1/exec/run"), ("GET", "/v1/containers/inspect?containerId=x")],
    )
    def test_on_both_faces(self, scripted: ScriptedEngine, two: Runner, method: str, target: str) -> None:
        with held(two, scripted):
            check_full(two.request(method, target, b"{}" if method == "POST" else None), "too_many_requests")

    @pytest.mark.parametrize("target", ["/containers/x/attach", "/v1/exec/interactive/ws?containerId=x&command=sh"])
    def test_an_upgrade_is_answered_in_http(self, scripted: ScriptedEngine, two: Runner, target: str) -> None:
        headers = {**WEBSOCKET, "Sec-WebSocket-Protocol": SUBPROTOCOL, **sign(SECRET, "GET", target)}
        with held(two, scripted):
            for _ in range(2):
                check_full(two.request("GET", target, headers=headers), "too_many_requests")

    def test_a_body_that_cannot_be_served_is_not_waited_for(self, scripted: ScriptedEngine, two: Runner) -> None:
        body = b"x" * 1_000_000
        headers = sign(SECRET, "POST", "/images/load", content_hash=body_hash(body))
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["POST /images/load HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines, "", ""])
        with held(two, scripted), two.connect() as sock:
            sock.sendall(head.encode())
            assert sock.recv(4096).startswith(b"HTTP/1.1 429 ")

    def test_health_and_readiness_are_not_counted(self, scripted: ScriptedEngine, two: Runner) -> None:
        with held(two, scripted):
            assert two.request("GET", "/v1/health", headers={"X-DR-Signature": ""}).status == 200
            assert two.request("GET", "/v1/ready", headers={"X-DR-Signature": ""}).status == 200
        comes_free(two)

    def test_strangers_take_no_places(self, scripted: ScriptedEngine, two: Runner) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                sock = stack.enter_context(two.connect())
                sock.sendall(signed_head("POST", "/auth", b"abc").replace(b"Signature: ", b"Signature: A") + b"a")
            assert two.request("GET", "/_ping").status == 200
            assert two.request("GET", "/_ping").status == 200

    def test_a_caller_that_leaves_gives_its_place_back(self, scripted: ScriptedEngine, two: Runner) -> None:
        with held(two, scripted):
            pass
        with held(two, scripted, 1):
            comes_free(two)

    @pytest.mark.parametrize(
        ("method", "target", "headers"),
        [
            ("GET", "/nowhere", {}),
            ("POST", "/version", {}),
            ("GET", "/containers/%2e%2e/json", {}),
            ("GET", "/version", {"X-DR-Nonce": ""}),
            ("GET", "/version", {"X-DR-Signature": "A" * 43 + "="}),
            ("GET", "/v1/containers/inspect", {}),
            ("GET", "/exec/x/json", WEBSOCKET),
        ],
    )
    def test_a_refused_one_gives_its_place_back(
        self, scripted: ScriptedEngine, two: Runner, method: str, target: str, headers: dict[str, str]
    ) -> None:
        for _ in range(5):
            assert two.request(method, target, headers=headers).status in (400, 401, 404, 405)
        with held(two, scripted, 1):
            assert two.request("GET", "/_ping").status == 200

    def test_one_that_fails_gives_its_place_back(self, scripted: ScriptedEngine, two: Runner) -> None:
        scripted.restart(lambda peer: peer.read_request())
        for _ in range(5):
            assert two.request("GET", "/version").status == 502
        scripted.restart(lambda peer: peer.answer(OK[:-1]))
        for _ in range(5):
            with two.stream("GET", "/version") as response, contextlib.suppress(http.client.IncompleteRead):
                response.read(1)
        scripted.restart(holds)
        comes_free(two)
        with held(two, scripted, 1):
            comes_free(two)

    def test_a_kept_connection_goes_on_after_the_refusal(self, scripted: ScriptedEngine, two: Runner) -> None:
        with held(two, scripted):
            assert two.request("GET", "/_ping").status == 429
        comes_free(two)


Open = Callable[[Runner, str], contextlib.AbstractContextManager[Any]]


def opened(
    runner: Runner, method: str, target: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> Any:
    return runner.stream(method, target, body, headers)


@contextlib.contextmanager
def upgrade(runner: Runner, target: str, headers: dict[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    """An upgrade's answer, its connection held until the end."""
    connection = http.client.HTTPConnection("127.0.0.1", runner.port, timeout=20)
    try:
        connection.putrequest("GET", target, skip_accept_encoding=True)
        for name, value in {**WEBSOCKET, **sign(SECRET, "GET", target), **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders()
        yield connection.getresponse()
    finally:
        connection.close()


def exec_start(runner: Runner, box: str) -> Any:
    config = {"Cmd": ["sleep", "60"], "AttachStdout": True}
    made = runner.request(
        "POST", f"/containers/{box}/exec", json.dumps(config).encode(), {"Content-Type": "application/json"}
    )
    return runner.stream(
        "POST", f"/exec/{json.loads(made.body)['Id']}/start", START, {"Content-Type": "application/json"}
    )


INTERACTIVE = "/v1/exec/interactive/ws?"
STREAMS: dict[str, Open] = {
    "events": lambda runner, box: opened(runner, "GET", "/events"),
    "followed logs": lambda runner, box: opened(runner, "GET", f"/containers/{box}/logs?stdout=1&follow=1"),
    "followed logs, said otherwise": lambda runner, box: opened(
        runner, "GET", f"/containers/{box}/logs?stdout=1&%66ollow=yes&follow=0"
    ),
    "stats": lambda runner, box: opened(runner, "GET", f"/containers/{box}/stats"),
    "wait": lambda runner, box: opened(runner, "POST", f"/containers/{box}/wait"),
    "attach": lambda runner, box: opened(runner, "POST", f"/containers/{box}/attach?stream=1&stdout=1"),
    "exec": exec_start,
    "an upgraded attach": lambda runner, box: upgrade(
        runner, f"/containers/{box}/attach?stream=1&stdout=1", {"Sec-WebSocket-Protocol": SUBPROTOCOL}
    ),
    "events of the runner face": lambda runner, box: opened(runner, "GET", "/v1/events/sse"),
    "logs of the runner face": lambda runner, box: opened(runner, "GET", f"/v1/containers/logs/sse?containerId={box}"),
    "an interactive exec": lambda runner, box: upgrade(
        runner, INTERACTIVE + urlencode({"containerId": box, "command": "cat"})
    ),
}


class TestStreams:
    @pytest.mark.parametrize("kind", STREAMS)
    def test_one_more_is_429_until_one_ends(self, one: Runner, box: str, kind: str) -> None:
        with one.stream("GET", "/events") as first, STREAMS[kind](one, box) as refused:
            assert first.status == 200
            check_full(Answer(refused), "too_many_streams")

        def opens() -> bool:
            with STREAMS[kind](one, box) as response:
                status: int = response.status
                return status != 429

        if kind != "wait":  # Its answer comes with the container's end.
            assert wait_until(opens, 10)

    @pytest.mark.parametrize("kind", [kind for kind in STREAMS if kind != "wait"])
    def test_a_caller_that_leaves_gives_its_place_back(self, one: Runner, box: str, kind: str) -> None:
        def opens() -> bool:
            with STREAMS[kind](one, box) as response:
                return response.status in (101, 200)

        for _ in range(3):
            assert wait_until(opens, 10)

        def events() -> bool:
            with one.stream("GET", "/events") as response:
                return response.status == 200

        assert wait_until(events, 10)

    def test_a_stream_takes_no_place_of_a_request(self, one: Runner, box: str) -> None:
        with one.stream("GET", "/events") as events:
            assert events.status == 200
            assert one.request("GET", "/_ping").status == 200

    @pytest.mark.parametrize(
        "target",
        [
            "/containers/{}/logs?stdout=1",
            "/containers/{}/logs?stdout=1&follow=false",
            "/containers/{}/stats?stream=0",
            "/v1/containers/logs/sse?containerId={}&follow=false",
        ],
    )
    def test_what_has_an_end_of_its_own_is_no_stream(self, one: Runner, box: str, target: str) -> None:
        with one.stream("GET", "/events") as events:
            assert events.status == 200
            assert one.request("GET", target.format(box)).status == 200

    def test_a_refused_stream_may_come_again_as_it_was(self, one: Runner, box: str) -> None:
        wire = Wire(one.url, SECRET)
        target = INTERACTIVE + urlencode({"containerId": box, "command": "true"})
        headers = dict(wire.sign("GET", target))
        with one.stream("GET", "/events") as events:
            assert events.status == 200
            reply, _ = wire.upgrade(target, headers)
            assert (reply.status, reply.header("retry-after")) == (429, "1")

        def upgrades() -> bool:
            reply, socket = wire.upgrade(target, headers)
            with socket:
                return reply.status == 101

        assert wait_until(upgrades, 10)

    def test_one_that_the_engine_refuses_gives_its_place_back(self, one: Runner) -> None:
        for _ in range(3):
            assert one.request("GET", "/containers/no-such/logs?follow=1&stdout=1").status == 404
            assert one.request("GET", "/v1/containers/logs/sse?containerId=no-such").status == 404
