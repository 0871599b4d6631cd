"""What is use of a container with a time to live, and what is none, on a real engine: by either face, by any name."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from minded import JSON, TAR, TTL_S, Minded, exec_of, folder, minded
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from client import body_hash, sign
from conftest import Names
from dev import wait_until
from dev.engine import Engine
from service import Answer
from wire import b64, target

__all__ = ["folder", "minded"]  # Fixtures.


def start_exec(minded: Minded, box: str) -> None:
    """An exec that was made at the engine, some time ago, started by the runner."""
    done(minded.ask("POST", f"/exec/{exec_of(minded, box, Cmd=['true'])}/start", b'{"Detach":true}'))


def interact(minded: Minded, box: str) -> None:
    with minded.wire.interactive(containerId=box, command='["true"]') as session:
        assert [frame["type"] for frame in session][-1] == "exit"


def done(answer: Answer) -> None:
    assert answer.status in (200, 201, 204, 304), answer.body


def succeeded(reply: Any) -> None:
    assert reply.status in (200, 204), reply.body


def face(method: str, rest: str, body: bytes | None = None, headers: Mapping[str, str] = JSON) -> "Using":
    return lambda minded, box: done(minded.ask(method, f"/v1.41/containers/{box}{rest}", body, headers))


Using = Callable[[Minded, str], None]
PUT = {"Content-Type": "application/x-tar"}
USES: dict[str, Using] = {
    "touch": lambda minded, box: succeeded(minded.wire.post("/v1/containers/touch", containerId=box)),
    "exec/run": lambda minded, box: succeeded(minded.wire.post("/v1/exec/run", containerId=box, command="true")),
    "exec/interactive": interact,
    "logs": lambda minded, box: succeeded(minded.wire.get("/v1/containers/logs/sse", containerId=box, follow=False)),
    "putArchive": lambda minded, box: succeeded(
        minded.wire.post("/v1/containers/putArchive", containerId=box, path="/", payloadBase64=b64(TAR))
    ),
    "ContainerExec": face("POST", "/exec", b'{"Cmd":["true"]}'),
    "ExecStart": start_exec,
    "ContainerLogs": face("GET", "/logs?stdout=1"),
    "ContainerArchive": face("GET", "/archive?path=/etc"),
    "ContainerExport": face("GET", "/export"),
    "PutContainerArchive": face("PUT", "/archive?path=/", TAR, PUT),
    "ContainerAttach": face("POST", "/attach?logs=1", b""),
    "ContainerStart": face("POST", "/start", b""),
    "ContainerRestart": face("POST", "/restart?t=0", b""),
}
LOOKS: dict[str, Using] = {
    "inspect": lambda minded, box: succeeded(minded.wire.get("/v1/containers/inspect", containerId=box)),
    "ContainerInspect": face("GET", "/json"),
    "ContainerTop": face("GET", "/top"),
    "ContainerStats": face("GET", "/stats?stream=0"),
    "ContainerList": lambda minded, box: done(minded.ask("GET", "/containers/json?all=1")),
    "another's": lambda minded, box: succeeded(
        minded.wire.post("/v1/exec/run", containerId=minded.make(None), command="true")
    ),
}


class TestUse:
    @pytest.mark.parametrize("kind", USES)
    def test_it_begins_the_time_anew(self, minded: Minded, kind: str) -> None:
        box, witness = minded.make(), minded.make()
        minded.forward(0.9 * TTL_S)
        USES[kind](minded, box)
        minded.forward(0.9 * TTL_S)
        minded.wait_gone(witness)
        assert minded.is_running(box)
        minded.age(box)

    @pytest.mark.parametrize("named", ["name", "beginning"])
    @pytest.mark.parametrize("kind", ["touch", "exec/run", "ContainerLogs"])
    def test_by_whatever_name(self, minded: Minded, kind: str, named: str) -> None:
        name = minded.names("box")
        box, witness = minded.make(name=name), minded.make()
        minded.forward(0.9 * TTL_S)
        USES[kind](minded, {"name": name, "beginning": box[:14]}[named])
        minded.forward(0.9 * TTL_S)
        minded.wait_gone(witness)
        assert minded.is_running(box)
        minded.age(box)

    @pytest.mark.parametrize("kind", LOOKS)
    def test_a_look_is_none(self, minded: Minded, kind: str) -> None:
        box = minded.make()
        minded.forward(0.9 * TTL_S)
        LOOKS[kind](minded, box)
        minded.forward(0.2 * TTL_S)
        minded.wait_gone(box)

    def test_it_ends_with_its_request_though_the_connection_stays(self, minded: Minded) -> None:
        box = minded.make()
        path = target("/v1/containers/logs/sse", {"containerId": box, "follow": False})
        with minded.wire.connect() as connection:
            connection.send(minded.wire.head("GET", path, minded.wire.sign("GET", path)))
            assert connection.line().startswith("HTTP/1.1 200")
            minded.age(box)


@contextlib.contextmanager
def followed(minded: Minded, box: str) -> Iterator[None]:
    reply, _ = minded.wire.feed("/v1/containers/logs/sse", containerId=box)
    with reply:
        yield


@contextlib.contextmanager
def interactive(minded: Minded, box: str) -> Iterator[None]:
    with minded.wire.interactive(containerId=box, command='["cat"]') as session:
        assert session.next()["type"] == "ready"
        yield


@contextlib.contextmanager
def running(minded: Minded, box: str) -> Iterator[None]:
    """An `/v1/exec/run` that waits for its container."""
    script = "touch /began; while [ ! -e /go ]; do sleep 0.05; done"
    replies: list[Any] = []
    thread = threading.Thread(
        target=lambda: replies.append(minded.wire.post("/v1/exec/run", containerId=box, command=script))
    )
    thread.start()
    began = f"/containers/{box}/archive?path=/began"
    assert wait_until(lambda: minded.engine.request("HEAD", began).status_code == 200, 10)
    yield
    done = minded.engine.request("POST", f"/containers/{box}/exec", json={"Cmd": ["touch", "/go"]}).json()["Id"]
    minded.engine.request("POST", f"/exec/{done}/start", json={"Detach": True})
    thread.join(10)
    assert replies[0].json["exitCode"] == 0


@contextlib.contextmanager
def upgraded(minded: Minded, path: str, body: str) -> Iterator[None]:
    signed = sign(minded.runner.secret, "GET", path, content_hash=body_hash(body.encode()))
    with connect(
        f"ws://127.0.0.1:{minded.runner.port}{path}",
        additional_headers={**JSON, **signed},
        subprotocols=[Subprotocol("docker-runner.stream.v1")],
        compression=None,
        proxy=None,
    ) as socket:
        socket.send(body)
        assert json.loads(socket.recv())["status"] == 101
        yield


@contextlib.contextmanager
def relayed(minded: Minded, path: str) -> Iterator[None]:
    with minded.runner.stream("GET", path) as response:
        assert response.status == 200
        yield


STREAMS: dict[str, Callable[[Minded, str], contextlib.AbstractContextManager[None]]] = {
    "logs": followed,
    "exec/interactive": interactive,
    "exec/run": running,
    "ContainerLogs": lambda minded, box: relayed(minded, f"/containers/{box}/logs?follow=1&stdout=1"),
    "ContainerAttach": lambda minded, box: upgraded(minded, f"/containers/{box}/attach?stream=1&stdout=1", ""),
    "ExecStart": lambda minded, box: upgraded(minded, f"/exec/{exec_of(minded, box)}/start", '{"Detach":false}'),
}


class TestOpen:
    @pytest.mark.parametrize("kind", STREAMS)
    def test_while_it_is_open_it_is_a_use(self, minded: Minded, kind: str) -> None:
        box, witness = minded.make(), minded.make()
        with STREAMS[kind](minded, box):
            minded.forward(5 * TTL_S)
            minded.wait_gone(witness)
            assert minded.is_running(box)
        minded.age(box)

    def test_one_that_was_opened_before_the_engine_was_asked_for_it(
        self, engine: Engine, folder: Path, image: str, names: Names
    ) -> None:
        slow = Minded(engine.socket, folder, image, names, {"DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "2000"})
        try:
            # Just after it was asked: the next time is two seconds away.
            first = slow.make()
            box = slow.create(Labels=slow.own())
            with interactive(slow, box), upgraded(slow, f"/exec/{exec_of(slow, box)}/start", '{"Detach":false}'):
                slow.wait_minded(box)
                slow.forward(5 * TTL_S)
                slow.wait_gone(first)
                assert slow.is_running(box)
        finally:
            assert slow.runner.stop() == 0
