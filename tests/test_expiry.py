"""Containers with a time to live on a real engine: idle for that long they are stopped and removed, used they stay.

The clock is the test's, so nothing waits for a time to pass. That something stays is seen at a `witness`: another
container, idle, whose time is over; when that is gone, the runner has decided on both.
"""

import contextlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from clocked import Ahead
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from answers import told
from client import body_hash, sign
from conftest import EngineDirect, Names
from dev import busybox, wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from leases import INSTANCE, LEASE, TTL
from scripted import Peer, ScriptedEngine
from service import Answer, Runner
from wire import Wire, b64, target

TAR = b"\0" * 1024
TTL_S = 1000
LIMIT_S = 20
JSON = {"Content-Type": "application/json"}


class Minded:
    """A runner on a clock of the test's own, and containers that it minds.

    Args:
        engine_socket: of the engine.
        folder: for its files.
        image: of the containers.
        names: theirs.
        environ: further settings.
    """

    def __init__(
        self, engine_socket: str, folder: Path, image: str, names: Names, environ: Mapping[str, str] | None = None
    ) -> None:
        self.engine = EngineDirect(engine_socket)
        self.names = names
        self.image = image
        self.clock = Ahead(folder / f"clock-{secrets.token_hex(4)}")
        self.audit = folder / f"audit-{secrets.token_hex(4)}"
        self.settings = {
            "DOCKER_RUNNER_INSTANCE": f"test-{secrets.token_hex(6)}",
            "DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "100",
            "DOCKER_RUNNER_LOG_LEVEL": "debug",
            **self.clock.environ,
            **(environ or {}),
        }
        self._socket = engine_socket
        self.start()

    def start(self) -> None:
        with self.audit.open("ab") as out:
            self.runner = Runner(self._socket, self.settings, program="tests/clocked.py", output=out.fileno())
        self.wire = Wire(self.runner.url, self.runner.secret)

    @property
    def instance(self) -> str:
        return self.settings["DOCKER_RUNNER_INSTANCE"]

    def make(self, ttl_s: int | None = TTL_S, **fields: Any) -> str:
        """Starts a container by the runner face, waits until its time runs, and returns its id."""
        labels = {**self.names.labels, **fields.pop("labels", {})}
        usual = {"image": self.image, "cmd": ["sleep", "1d"], "networkMode": "none", "autoRemove": False}
        extras = {"StopSignal": "SIGKILL", **fields.pop("createExtras", {})}
        if ttl_s is not None:
            usual["ttlSeconds"] = ttl_s
        reply = self.wire.post("/v1/containers/start", **{**usual, **fields, "createExtras": extras, "labels": labels})
        assert reply.status == 200, reply.body
        id_: str = reply.json["containerId"]
        if ttl_s is not None:
            self.wait_minded(id_)
        return id_

    def create(self, *, start: bool = True, **body: Any) -> str:
        """Makes a container by the engine itself; returns its id."""
        labels = {**self.names.labels, **body.pop("Labels", {})}
        usual = {"Image": self.image, "Cmd": ["sleep", "1d"], "StopSignal": "SIGKILL", "Labels": labels}
        host = {"NetworkMode": "none"}
        made = self.engine.request("POST", "/containers/create", json={**usual, "HostConfig": host, **body})
        assert made.status_code == 201, made.text
        id_: str = made.json()["Id"]
        if start:
            assert self.engine.request("POST", f"/containers/{id_}/start").status_code == 204
        return id_

    def own(self, ttl_s: int = TTL_S) -> dict[str, str]:
        """Labels as somebody sets them by hand."""
        return {INSTANCE: self.instance, TTL: str(ttl_s)}

    def wait_minded(self, id_: str) -> None:
        self.runner.wait_for_log(f"container {id_[:12]} has a time to live")

    def forward(self, seconds: float) -> None:
        self.clock.forward(seconds)

    def is_there(self, id_: str) -> bool:
        return self.engine.request("GET", f"/containers/{id_}/json").status_code == 200

    def is_running(self, id_: str) -> bool:
        state = self.engine.request("GET", f"/containers/{id_}/json").json()["State"]
        return bool(state["Running"])

    def wait_gone(self, *ids: str) -> None:
        for id_ in ids:
            assert wait_until(lambda id_=id_: not self.is_there(id_), LIMIT_S), "".join(self.runner.log)  # type: ignore[misc]

    def age(self, id_: str) -> None:
        """Let time pass until it is gone; the end of a use is noted a little later than it is answered."""

        def gone() -> bool:
            self.forward(TTL_S + 1)
            return not self.is_there(id_)

        assert wait_until(gone, LIMIT_S), "".join(self.runner.log)

    def line(self, id_: str) -> dict[str, Any]:
        """The one line of the audit log on the removal of a container."""

        def lines() -> list[dict[str, Any]]:
            found = [json.loads(line) for line in self.audit.read_text().splitlines()]
            return [line for line in found if line.get("operation") == "Expiry" and line["object"] == id_]

        assert wait_until(lambda: bool(lines()), 10)
        (line,) = lines()
        return line

    def ask(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] = JSON) -> Answer:
        return self.runner.request(method, target, body, headers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expiry")


@pytest.fixture(scope="module")
def minded(engine: Engine, folder: Path, image: str, names: Names) -> Iterator[Minded]:
    minded = Minded(engine.socket, folder, image, names)
    yield minded
    assert minded.runner.stop() == 0
    assert "Traceback" not in "".join(minded.runner.log)


class TestIdle:
    def test_one_that_was_idle_for_its_time_to_live_goes_with_its_anonymous_volumes(self, minded: Minded) -> None:
        named = minded.names("volume")
        name = minded.names("box")
        box = minded.make(name=name, anonymousVolumes=["/data"], binds=[f"{named}:/named"])
        mounts = minded.engine.request("GET", f"/containers/{box}/json").json()["Mounts"]
        (anonymous,) = [mount["Name"] for mount in mounts if mount["Destination"] == "/data"]
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.engine.request("GET", f"/volumes/{anonymous}").status_code == 404
        assert minded.engine.request("GET", f"/volumes/{named}").status_code == 200
        minded.runner.wait_for_log(f"removed container {box[:12]} ({name}): idle for 100")
        line = minded.line(box)
        assert re.fullmatch(r"[0-9a-f]{16}", line["request_id"])
        kept = {name: line.get(name) for name in ("decision", "operations", "status", "code", "key", "client")}
        assert kept == {
            "decision": "allowed",
            "operations": ["ContainerStop", "ContainerDelete"],
            "status": 204,
            "code": None,
            "key": None,
            "client": "expiry",
        }
        said = [json.loads(each) for each in minded.runner.log]
        assert [each["request_id"] for each in said if each["message"].startswith(f"removed container {box[:12]}")] == [
            line["request_id"]
        ]

    def test_one_that_the_engine_removes_by_itself_once_it_has_stopped(self, minded: Minded) -> None:
        box = minded.make(autoRemove=True, anonymousVolumes=["/data"])
        (mount,) = minded.engine.request("GET", f"/containers/{box}/json").json()["Mounts"]
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.line(box)["status"] == 204
        assert minded.engine.request("GET", f"/volumes/{mount['Name']}").status_code == 404

    @pytest.mark.parametrize("state", ["kill", "pause"])
    def test_one_that_does_not_run(self, minded: Minded, state: str) -> None:
        box = minded.make()
        assert minded.engine.request("POST", f"/containers/{box}/{state}").status_code == 204
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.line(box)["status"] == 204

    def test_one_that_never_ran_and_was_labelled_by_hand(self, minded: Minded) -> None:
        box = minded.create(start=False, Labels=minded.own())
        minded.wait_minded(box)
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)

    def test_one_with_a_restart_policy(self, minded: Minded) -> None:
        box = minded.make(createExtras={"HostConfig": {"RestartPolicy": {"Name": "always"}}})
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)

    def test_many_at_once(self, minded: Minded) -> None:
        boxes = [minded.create(start=False, Labels=minded.own()) for _ in range(20)]
        for box in boxes:
            minded.wait_minded(box)
        minded.forward(TTL_S + 1)
        minded.wait_gone(*boxes)
        assert len({minded.line(box)["request_id"] for box in boxes}) == 20

    def test_its_labels_are_nobodys_to_take_away(self, minded: Minded) -> None:
        for labels in ({"a": "b"}, None, {}, {TTL: "5", INSTANCE: "other", LEASE: "x"}):
            box = minded.make(createExtras={"Labels": labels})
            found = minded.engine.request("GET", f"/containers/{box}/json").json()["Config"]["Labels"]
            assert (found[INSTANCE], found[TTL]) == (minded.instance, str(TTL_S))
            assert re.fullmatch(r"[0-9a-f]{16}", found[LEASE])
            assert minded.engine.request("DELETE", f"/containers/{box}?force=1").status_code == 204

    def test_without_one_there_are_no_labels_and_no_end(self, minded: Minded) -> None:
        plain, others = minded.make(None), minded.create(Labels={INSTANCE: "another", TTL: "1"})
        wrong = minded.create(Labels={INSTANCE: minded.instance, TTL: "soon"})
        assert set(minded.wire.get("/v1/containers/labels", containerId=plain).json["labels"]) == set(
            minded.names.labels
        )
        witness = minded.make()
        minded.forward(100 * TTL_S)
        minded.wait_gone(witness)
        assert all(minded.is_running(each) for each in (plain, others, wrong))


def exec_of(minded: Minded, box: str, **more: Any) -> str:
    """An exec, made by the engine itself."""
    config = {"Cmd": ["cat"], "AttachStdin": True, "AttachStdout": True, **more}
    made = minded.engine.request("POST", f"/containers/{box}/exec", json=config)
    assert made.status_code == 201, made.text
    id_: str = made.json()["Id"]
    return id_


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


class TestWhose:
    def test_labels_that_are_an_images_say_nothing(self, minded: Minded) -> None:
        first = minded.make()
        images = []
        # A commit puts a container's labels on an image; and whoever makes images may label them as he likes.
        for more in ({}, {"Labels": {LEASE: ""}}, {"Labels": minded.own(1)}):
            repository = minded.names("image")
            made = minded.engine.request("POST", f"/commit?container={first}&repo={repository}", json=more)
            assert made.status_code == 201, made.text
            images.append(repository)
        victims = [minded.create(Image=each) for each in images]
        victims += [minded.make(None, image=each) for each in images]
        for victim in victims:
            minded.runner.wait_for_log(f"container {victim[:12]} has a time to live, but only its image says so")
        own = minded.make(image=images[0])
        minded.forward(100 * TTL_S)
        minded.wait_gone(first, own)
        assert all(minded.is_running(each) for each in victims)
        for victim in victims:
            minded.engine.request("DELETE", f"/containers/{victim}?force=1")

    def test_a_namesake_is_another(self, minded: Minded) -> None:
        name = minded.names("box")
        box, witness = minded.make(name=name), minded.make()
        minded.engine.request("DELETE", f"/containers/{box}?force=1")
        namesake = minded.make(None, name=name)
        minded.forward(TTL_S + 1)
        minded.wait_gone(witness)
        assert minded.is_running(namesake)

    def test_where_every_policy_has_a_scope_nothing_outside_of_them_is_touched(
        self, engine: Engine, folder: Path, image: str, names: Names
    ) -> None:
        policy = folder / "policy.toml"
        policy.write_text(
            'preset = "everything"\n[scope]\nlabel = "team=red"\n[keys.blue.scope]\nlabel = "team=blue"\n'
        )
        scoped = Minded(engine.socket, folder, image, names, {"DOCKER_RUNNER_POLICY": str(policy)})
        try:
            red = scoped.make()
            blue = scoped.create(Labels={**scoped.own(), "team": "blue"})
            scoped.wait_minded(blue)
            green, nobodys = scoped.create(Labels={**scoped.own(), "team": "green"}), scoped.create(Labels=scoped.own())
            witness = scoped.make()
            scoped.forward(TTL_S + 1)
            scoped.wait_gone(red, blue, witness)
            assert scoped.is_running(green)
            assert scoped.is_running(nobodys)
        finally:
            assert scoped.runner.stop() == 0


class TestRestart:
    def test_of_the_runner_nothing_expires_early(self, engine: Engine, folder: Path, image: str, names: Names) -> None:
        minded = Minded(engine.socket, folder, image, names)
        box = minded.make()
        minded.forward(0.9 * TTL_S)
        assert minded.runner.stop() == 0
        minded.start()
        try:
            minded.wait_minded(box)
            witness = minded.make(TTL_S // 2)
            minded.forward(0.9 * TTL_S)
            minded.wait_gone(witness)
            assert minded.is_running(box)
            minded.forward(0.2 * TTL_S)
            minded.wait_gone(box)
        finally:
            assert minded.runner.stop() == 0

    def test_of_the_engine_its_absence_is_not_idle_time(
        self, private_engine: PrivateEngine, folder: Path, names: Names
    ) -> None:
        busybox.import_image(private_engine, "box:latest")
        minded = Minded(private_engine.socket, folder, "box:latest", names)
        try:
            box, witness = minded.make(), minded.make(TTL_S * 2)
            minded.forward(0.9 * TTL_S)
            private_engine.kill()
            minded.runner.wait_for_log("cannot ask for containers with a time to live")
            minded.forward(50 * TTL_S)
            private_engine.start()
            minded.runner.wait_for_log("asked for containers with a time to live again", 30)
            assert minded.is_there(box)
            # The engine has stopped it; somebody still may want it.
            assert minded.wire.post("/v1/containers/touch", containerId=witness).status == 204
            minded.forward(TTL_S)
            minded.wait_gone(box)
            assert minded.is_there(witness)
        finally:
            minded.runner.stop()


class TestRaces:
    def test_while_it_is_being_removed_it_cannot_be_used_but_read(self, minded: Minded) -> None:
        name = minded.names("box")
        script = "trap '' TERM; echo said; sleep 1d"
        stubborn = minded.make(name=name, cmd=["sh", "-c", script], createExtras={"StopSignal": "TERM"})
        waiting = exec_of(minded, stubborn)
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log(f"({name}) has expired: it is stopped and removed")
        reply = minded.wire.post("/v1/containers/touch", containerId=stubborn)
        assert told(reply) == (409, "conflict", False)
        assert "is not running: it has expired" in reply.json["message"]
        run = minded.wire.post("/v1/exec/run", containerId=stubborn, command="true")
        assert told(run) == (409, "container_stopped_paused", False)
        for path in (f"/containers/{stubborn}/exec", f"/exec/{waiting}/start"):
            answer = minded.ask("POST", path, b'{"Cmd":["true"]}' if path.endswith("exec") else b"{}")
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (409, "conflict")
        assert b"said" in minded.ask("GET", f"/containers/{stubborn}/logs?stdout=1").body
        minded.wait_gone(stubborn)
        assert minded.wire.post("/v1/containers/touch", containerId=stubborn).status == 404


ID = "d" * 64


def answered(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Scripted:
    """An engine with one idle container; `stops` and `removes` are its answers, the last one again and again."""

    def __init__(self, instance: str) -> None:
        self.labels = {INSTANCE: instance, TTL: str(TTL_S)}
        self.stops = [answered("204 No Content")]
        self.removes = [answered("204 No Content")]
        self.running = True

    def __call__(self, peer: Peer) -> None:
        while request := peer.read_request():
            method, path = request.split(b" ")[:2]
            match method, path.partition(b"?")[0].rpartition(b"/")[2]:
                case b"GET", b"json" if b"/images/" in path:
                    peer.send(answered("200 OK", b'{"Config":{"Labels":null}}'))
                case b"GET", b"json" if b"all=1" in path:
                    listed = [{"Id": ID, "Names": ["/box"], "ImageID": "sha256:0", "Labels": self.labels}]
                    peer.send(answered("200 OK", json.dumps(listed).encode()))
                case b"GET", _:
                    peer.send(answered("200 OK", json.dumps({"Id": ID, "State": {"Running": self.running}}).encode()))
                case b"POST", _:
                    peer.send(self.stops.pop(0) if len(self.stops) > 1 else self.stops[0])
                case _:
                    peer.send(self.removes.pop(0) if len(self.removes) > 1 else self.removes[0])


@pytest.fixture
def faulty(folder: Path, names: Names) -> Iterator[tuple[Scripted, ScriptedEngine, Minded]]:
    script = Scripted("faulty")
    with ScriptedEngine(script) as engine:
        minded = Minded(engine.path, folder, "", names, {"DOCKER_RUNNER_INSTANCE": "faulty"})
        try:
            minded.wait_minded(ID)
            yield script, engine, minded
        finally:
            assert minded.runner.stop() == 0


Faulty = tuple[Scripted, ScriptedEngine, Minded]


def asked(engine: ScriptedEngine, method: bytes) -> int:
    return sum(request.startswith(method) for request in engine.requests)


class TestFaults:
    def test_what_fails_is_tried_again_later_and_later(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        failure = answered("500 Internal Server Error", b'{"message":"no"}')
        script.stops = [failure, failure, answered("204 No Content")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("could not be removed: the engine answered 500")
        minded.runner.wait_for_log("tried again in 1 s")
        engine.wait(lambda: asked(engine, b"POST") == 2, "a second attempt")
        minded.runner.wait_for_log("tried again in 2 s")
        engine.wait(lambda: asked(engine, b"DELETE") == 1, "its removal")
        assert wait_until(lambda: len(minded.audit.read_text().splitlines()) == 3, 10)
        lines = [json.loads(line) for line in minded.audit.read_text().splitlines()]
        assert [(line["status"], line.get("code"), line["decision"]) for line in lines] == [
            (502, "stop_failed", "allowed"),
            (502, "stop_failed", "allowed"),
            (204, None, "allowed"),
        ]
        assert len({line["request_id"] for line in lines}) == 3

    def test_after_a_failure_a_use_counts(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.removes = [answered("500 Internal Server Error", b"{}")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("could not be removed")
        assert minded.wire.post("/v1/containers/touch", containerId="box").status == 204
        tried = asked(engine, b"DELETE")
        looked = asked(engine, b"GET /containers/json")
        minded.forward(0.9 * TTL_S)
        engine.wait(lambda: asked(engine, b"GET /containers/json") >= looked + 3, "it to be asked for")
        assert asked(engine, b"DELETE") == tried

    def test_one_that_somebody_started_again_stays(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.removes = [answered("409 Conflict", b'{"message":"You cannot remove a running container"}')]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("was started again while it was being removed: it stays")
        looked = asked(engine, b"GET /containers/json")
        minded.forward(0.9 * TTL_S)
        engine.wait(lambda: asked(engine, b"GET /containers/json") >= looked + 3, "it to be asked for")
        assert asked(engine, b"DELETE") == 1
        assert b"force" not in b"".join(engine.targets())

    def test_one_that_the_engine_is_removing_is_waited_for(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.running = False
        in_progress = answered("409 Conflict", b'{"message":"removal of container is already in progress"}')
        script.removes = [in_progress, in_progress, answered("404 Not Found", b"{}")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("removed container")
        assert asked(engine, b"DELETE") == 3

    def test_one_that_is_gone_when_it_is_stopped_was_removed_by_somebody_else(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.stops = [answered("404 Not Found", b"{}")]
        minded.forward(TTL_S + 1)
        engine.wait(lambda: asked(engine, b"POST") >= 1, "the stop")
        assert asked(engine, b"DELETE") == 0
        assert minded.audit.read_text() == ""

    @pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", answered("200 OK", b"[{}]"), answered("500 No", b"{}")])
    def test_an_engine_that_tells_nonsense(self, folder: Path, names: Names, answer: bytes) -> None:
        script = Scripted("faulty")
        with ScriptedEngine(lambda peer: peer.answer(answer)) as engine:
            minded = Minded(engine.path, folder, "", names, {"DOCKER_RUNNER_INSTANCE": "faulty"})
            minded.runner.wait_for_log("cannot ask for containers with a time to live")
            engine.script = script
            engine.stop()
            engine.listen()
            minded.wait_minded(ID)
            assert minded.runner.stop() == 0
            assert "Traceback" not in "".join(minded.runner.log)


def test_it_can_be_turned_off(engine: Engine, folder: Path, image: str, names: Names) -> None:
    with ScriptedEngine(lambda peer: peer.answer(answered("200 OK", b"OK"))) as scripted:
        off = Minded(scripted.path, folder, image, names, {"DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "0"})
        assert off.ask("GET", "/_ping").status == 200
        assert off.runner.stop() == 0
        assert scripted.targets() == [b"/_ping"]
