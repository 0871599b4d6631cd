"""The runner face on a real engine: what `/v1/containers/start` makes of its fields, what is left when it fails,
what the lookups find, and what `putArchive` unpacks. What the engine is asked, and when, a scripted engine records.
"""

import base64
import hashlib
import io
import json
import random
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from answers import told
from conftest import IMAGE, EngineDirect, Names, free_port
from dev import wait_until
from dev.engine import Engine
from scripted import Peer, ScriptedEngine
from service import Runner, signed_head
from wire import Connection, Reply, Wire, compact

START = "/v1/containers/start"
PUT_ARCHIVE = "/v1/containers/putArchive"
MIB = 1024 * 1024
FOREVER = ["sleep", "1000000"]
SETTINGS = {
    "DOCKER_RUNNER_DEFAULT_IMAGE": IMAGE,
    "DOCKER_RUNNER_MAX_BODY": str(160 * MIB),
    "DOCKER_RUNNER_LOG_LEVEL": "trace",
}


@pytest.fixture(scope="module")
def configured(engine: Engine, image: str) -> Iterator[Runner]:
    """A runner with settings of its own."""
    with Runner(engine.socket, SETTINGS) as runner:
        yield runner
        assert "Traceback" not in "".join(runner.log)


class Starting:
    """Starts containers through the runner, of names and labels that the session removes, and looks at them."""

    def __init__(self, wire: Wire, direct: EngineDirect, names: Names) -> None:
        self.wire = wire
        self.direct = direct
        self.names = names

    def ask(self, **fields: Any) -> Reply:
        """A start, as asked, with the session's labels beside the given ones and no network unless one is given."""
        labels = {**self.names.labels, **fields.pop("labels", {})}
        return self.wire.post(START, **{"networkMode": "none", "cmd": FOREVER, **fields, "labels": labels})

    def __call__(self, **fields: Any) -> dict[str, Any]:
        """A start that succeeds; the engine's inspect of the container."""
        reply = self.ask(**fields)
        assert reply.status == 200, reply.body
        assert reply.json["status"] == "running"
        return self.inspect(reply.json["containerId"])

    def only_created(self, **labels: str) -> str:
        """A container of these labels that never ran, made by the engine directly: it costs less."""
        body = {"Image": IMAGE, "Labels": {**self.names.labels, **labels}}
        id_: str = self.direct.request("POST", "/containers/create", json=body).json()["Id"]
        return id_

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.direct.request("GET", f"/containers/{name}/json").json()
        return found

    def exists(self, name: str) -> bool:
        return self.direct.request("GET", f"/containers/{name}/json").status_code == 200

    def log(self, container: dict[str, Any]) -> bytes:
        """What a container that has ended said on stdout."""
        self.direct.request("POST", f"/containers/{container['Id']}/wait")
        raw = self.direct.request("GET", f"/containers/{container['Id']}/logs?stdout=1").content
        said = b""
        while raw:
            size = int.from_bytes(raw[4:8], "big")
            said, raw = said + raw[8 : 8 + size], raw[8 + size :]
        return said

    def everything(self) -> set[str]:
        """The ids of all of the session's containers."""
        filters = compact({"label": [f"{name}={value}" for name, value in self.names.labels.items()]}).decode()
        query = {"all": "1", "filters": filters}
        return {each["Id"] for each in self.direct.request("GET", "/containers/json", params=query).json()}


@pytest.fixture(scope="module")
def start(configured: Runner, direct: EngineDirect, names: Names) -> Starting:
    return Starting(Wire(configured.url, configured.secret), direct, names)


class TestStart:
    def test_the_answer_is_exactly_the_contracts(self, start: Starting) -> None:
        name = start.names("box")
        reply = start.ask(name=name)
        assert re.fullmatch("[0-9a-f]{64}", reply.json["containerId"])
        assert reply.json == {"containerId": start.inspect(name)["Id"], "name": name, "status": "running"}
        assert set(start.ask().json) == {"containerId", "status"}
        assert start.inspect(name)["State"]["Running"]

    def test_no_field_is_needed(self, start: Starting) -> None:
        reply = start.wire.post(START)
        assert reply.status == 200, reply.body
        start.direct.request("DELETE", f"/containers/{reply.json['containerId']}?force=1")

    def test_the_default_image_is_a_setting(self, start: Starting, image: str) -> None:
        assert start()["Config"]["Image"] == image

    def test_the_default_image_of_the_default_settings(self, runner: Runner, names: Names) -> None:
        reply = Wire(runner.url, runner.secret).post(START, networkMode="none", labels=names.labels)
        assert "mcr.microsoft.com" in reply.json["message"]

    def test_cmd_and_entrypoint_are_honoured(self, start: Starting) -> None:
        only_cmd = start(cmd=["echo", "a  b", "c"], autoRemove=False)
        assert start.log(only_cmd) == b"a  b c\n"
        both = start(entrypoint="/bin/echo", cmd=["-n", "x"], autoRemove=False)
        assert start.log(both) == b"x"
        assert (both["Path"], both["Args"]) == ("/bin/echo", ["-n", "x"])

    @pytest.mark.parametrize(
        "env", [{"A": "1", "B": "x=y z\n", "Ü": ""}, ["A=1", "B=x=y z\n", "Ü="]], ids=["map", "list"]
    )
    def test_env(self, start: Starting, env: Any) -> None:
        container = start(env=env, cmd=["sh", "-c", 'printf "%s|%s" "$A" "$B"'], autoRemove=False)
        assert [each for each in container["Config"]["Env"] if not each.startswith("PATH=")] == [
            "A=1",
            "B=x=y z\n",
            "Ü=",
        ]
        assert start.log(container) == b"1|x=y z\n"

    def test_100_kb_of_env_arrive(self, start: Starting) -> None:
        env = {f"NAME_{number}": random.Random(number).randbytes(500).hex() for number in range(100)}
        container = start(env=env, cmd=["env"], autoRemove=False)
        said = dict(line.split("=", 1) for line in start.log(container).decode().splitlines())
        assert sum(map(len, env.values())) == 100_000
        assert {name: said.get(name) for name in env} == env

    def test_working_dir(self, start: Starting) -> None:
        assert start.log(start(workingDir="/tmp/deep er", cmd=["pwd"], autoRemove=False)) == b"/tmp/deep er\n"

    def test_auto_remove_is_the_default(self, start: Starting) -> None:
        container = start(cmd=["true"])
        assert wait_until(lambda: not start.exists(container["Id"]), 10)
        assert start()["HostConfig"]["AutoRemove"] is True

    def test_auto_remove_can_be_refused(self, start: Starting) -> None:
        container = start(cmd=["true"], autoRemove=False)
        start.direct.request("POST", f"/containers/{container['Id']}/wait")
        assert start.inspect(container["Id"])["State"]["Status"] == "exited"

    def test_binds(self, start: Starting, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"from outside")
        volume = start.names("volume")
        container = start(
            binds=[f"{tmp_path}:/outside:ro", f"{volume}:/volume"], cmd=["cat", "/outside/file"], autoRemove=False
        )
        assert start.log(container) == b"from outside"
        mounts = {mount["Destination"]: mount for mount in container["Mounts"]}
        assert mounts["/outside"]["RW"] is False
        assert mounts["/volume"]["Name"] == volume

    @pytest.mark.parametrize("mode", ["none", "host"])
    def test_network_mode(self, start: Starting, mode: str) -> None:
        container = start(networkMode=mode)
        assert container["HostConfig"]["NetworkMode"] == mode
        assert list(container["NetworkSettings"]["Networks"]) == [mode]
        reply = start.wire.get("/v1/containers/networks", containerId=container["Id"])
        assert (reply.status, reply.json) == (200, {"networks": [mode]})

    @pytest.mark.parametrize("tty", [True, False])
    def test_tty(self, start: Starting, tty: bool) -> None:
        assert start(tty=tty)["Config"]["Tty"] is tty

    def test_labels(self, start: Starting) -> None:
        labels = {"a": "", "b.c/d": "x=y, z", "ü": "\U0001f40b", "": "empty", "e=f": "g"}
        container = start(labels=labels)
        assert labels.items() <= container["Config"]["Labels"].items()
        reply = start.wire.get("/v1/containers/labels", containerId=container["Id"])
        assert (reply.status, reply.json) == (200, {"labels": {**labels, **start.names.labels}})

    def test_privileged_is_as_the_engine_says(self, start: Starting) -> None:
        body = {"Image": IMAGE, "Cmd": FOREVER, "Labels": start.names.labels, "HostConfig": {"Privileged": True}}
        id_ = start.direct.request("POST", "/containers/create", json=body).json()["Id"]
        direct = start.direct.request("POST", f"/containers/{id_}/start")
        name = start.names("box")
        reply = start.ask(privileged=True, name=name)
        if direct.status_code == 204:
            assert start.inspect(name)["HostConfig"]["Privileged"] is True
        else:  # An engine within a container may not.
            assert told(reply) == (direct.status_code, "server_error", True)
            assert reply.json["message"] == direct.json()["message"]
            assert not start.exists(name)
        assert start(privileged=False)["HostConfig"]["Privileged"] is False

    def test_anonymous_volumes(self, start: Starting) -> None:
        container = start(anonymousVolumes=["/data", "/more"])
        mounts = {mount["Destination"]: mount for mount in container["Mounts"]}
        assert set(mounts) == {"/data", "/more"}
        assert all(re.fullmatch("[0-9a-f]{64}", mount["Name"]) for mount in mounts.values())

    @pytest.mark.parametrize("seconds", [1, 3600])
    def test_a_ttl_is_accepted(self, start: Starting, seconds: int) -> None:
        assert start(ttlSeconds=seconds)["State"]["Running"]

    def test_an_id_is_an_image_too(self, start: Starting, image: str) -> None:
        id_ = start.direct.request("GET", f"/images/{image}/json").json()["Id"]
        assert start(image=id_)["Image"] == id_


class TestCreateExtras:
    def test_the_host_config_is_merged_field_by_field(self, start: Starting) -> None:
        extras = {"HostConfig": {"Memory": 64 * MIB, "NetworkMode": "none", "Init": True}}
        host = start(createExtras=extras, networkMode="host")["HostConfig"]
        assert (host["Memory"], host["NetworkMode"], host["Init"]) == (64 * MIB, "none", True)
        assert host["AutoRemove"] is True

    def test_any_other_key_replaces_the_whole_value(self, start: Starting) -> None:
        extras = {"Env": ["B=2"], "Labels": start.names.labels, "StopSignal": "SIGKILL", "Cmd": ["sleep", "99"]}
        config = start(createExtras=extras, env={"A": "1"}, labels={"gone": "x"})["Config"]
        assert [each for each in config["Env"] if not each.startswith("PATH=")] == ["B=2"]
        assert config["Labels"] == start.names.labels
        assert (config["StopSignal"], config["Cmd"]) == ("SIGKILL", ["sleep", "99"])

    def test_its_name_works_as_the_name(self, start: Starting) -> None:
        name = start.names("box")
        reply = start.ask(createExtras={"name": name}, name="not-this-one")
        assert reply.json == {"containerId": start.inspect(name)["Id"], "name": name, "status": "running"}

    def test_its_image_is_the_one_that_is_ensured(self, runner: Runner, start: Starting, image: str) -> None:
        fields = {"cmd": FOREVER, "networkMode": "none", "labels": start.names.labels}
        reply = Wire(runner.url, runner.secret).post(START, **fields, createExtras={"Image": image})
        assert reply.status == 200, reply.body
        assert start.inspect(reply.json["containerId"])["Config"]["Image"] == image

    @pytest.mark.parametrize(
        ("extras", "named"),
        [
            ({"name": 5}, "name"),
            ({"name": None}, "name"),
            ({"name": ""}, "name"),
            ({"HostConfig": None}, "HostConfig"),
            ({"HostConfig": "text"}, "HostConfig"),
            ({"Image": 5}, "Image"),
        ],
        ids=str,
    )
    def test_what_is_of_a_wrong_form_is_400(self, start: Starting, extras: dict[str, Any], named: str) -> None:
        reply = start.ask(createExtras=extras)
        assert told(reply) == (400, "validation_error", False)
        assert "createExtras" in reply.json["message"]
        assert named in reply.json["message"]


FIELDS: dict[str, list[Any]] = {
    "image": ["", 5],
    "name": ["", 5],
    "cmd": ["text", [5]],
    "entrypoint": [["a"], 5],
    "env": ["A=1", {"A": 5}, [5], {"A": None}],
    "workingDir": [5],
    "autoRemove": ["true", 1],
    "binds": ["a:b", {}],
    "networkMode": [5],
    "tty": ["true", 0],
    "labels": [["a=b"], {"a": 1}],
    "platform": [5],
    "privileged": ["true"],
    "anonymousVolumes": ["/a", {"/a": {}}],
    "createExtras": ["text", []],
    "ttlSeconds": [0, -1, 1.5, "60", True],
    "unknownField": [1],
    "Image": ["x"],
    "working_dir": ["/"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in FIELDS for value in [*FIELDS[field], None]])
def test_a_wrong_an_unknown_or_a_null_field_is_400_and_starts_nothing(start: Starting, field: str, value: Any) -> None:
    before = start.everything()
    labels = start.names.labels
    reply = start.wire.post(START, **{"networkMode": "none", "labels": labels, field: value})
    assert told(reply) == (400, "validation_error", False)
    assert field in reply.json["message"]
    assert start.everything() == before


class TestFailedStart:
    @pytest.mark.parametrize("auto_remove", [True, False])
    @pytest.mark.parametrize(
        ("fields", "status", "code"),
        [
            ({"cmd": ["/no/such/command"]}, 400, "bad_parameter"),
            ({"entrypoint": "/tmp"}, 400, "bad_parameter"),
            ({"networkMode": "no-such-network"}, 404, "no_such_network"),
            (
                {"createExtras": {"HostConfig": {"Mounts": [{"Type": "bind", "Source": "/no/such", "Target": "/x"}]}}},
                400,
                "bad_parameter",
            ),
            ({"binds": ["relative/path:/x"]}, 400, "bad_parameter"),
            ({"networkMode": "container:no-such-container"}, 404, "no_such_container"),
        ],
        ids=str,
    )
    def test_it_leaves_no_container_and_says_why(
        self, start: Starting, fields: dict[str, Any], status: int, code: str, auto_remove: bool
    ) -> None:
        before = start.everything()
        name = start.names("box")
        reply = start.ask(**fields, name=name, autoRemove=auto_remove)
        assert told(reply)[:2] == (status, code), reply.body
        assert reply.json["error"]["retryable"] is False
        assert not start.exists(name)
        assert start.everything() == before

    def test_a_name_in_use_is_a_conflict_and_its_container_stays(self, start: Starting) -> None:
        name = start.names("box")
        container = start(name=name)
        reply = start.ask(name=name)
        assert told(reply) == (409, "conflict", False)
        assert "already in use" in reply.json["message"]
        assert start.inspect(name)["Id"] == container["Id"]
        assert start.inspect(name)["State"]["Running"]

    def test_a_missing_image_is_404(self, start: Starting) -> None:
        address = f"127.0.0.1:{free_port()}"
        assert told(start.ask(image=f"{address}/none-such")) == (500, "server_error", True)
        assert told(start.ask(image="UPPER")) == (400, "bad_parameter", False)


# When the engine fails, and when the caller leaves.

CREATED = b'HTTP/1.1 201 Created\r\nContent-Length: 12\r\n\r\n{"Id":"abc"}'
FOUND = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
DONE = b"HTTP/1.1 204 No Content\r\n\r\n"
FAILED = b'HTTP/1.1 500 No\r\nContent-Length: 21\r\n\r\n{"message":"no luck"}'
CREATE, RUN, DELETE = b"/containers/create", b"/containers/abc/start", b"/containers/abc?force=1&v=1"

Answers = dict[str, bytes | Callable[[Peer], object]]


@pytest.fixture(scope="module")
def listening() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: None) as engine:
        yield engine


@pytest.fixture
def scripted(listening: ScriptedEngine) -> Iterator[ScriptedEngine]:
    """A scripted engine; it lets go of its connections at a test's end, so that none waits for a later one."""
    yield listening
    listening.restart(lambda peer: None)


@pytest.fixture(scope="module")
def fronted(listening: ScriptedEngine) -> Iterator[Wire]:
    with Runner(listening.path) as runner:
        yield Wire(runner.url, runner.secret)
        assert "Traceback" not in "".join(runner.log)


def step(request: bytes) -> str:
    """Which step of a start a request to the engine is."""
    method, asked, _ = request.split(b" ", 2)
    if b"/images/" in asked:
        return "pull" if method == b"POST" else "look"
    return {b"DELETE": "delete"}.get(method) or ("create" if asked.startswith(CREATE) else "start")


def engine_that(**answers: bytes | Callable[[Peer], object]) -> Callable[[Peer], None]:
    """A script: a start that succeeds, but for the steps that are given; a function answers by itself."""
    usual: Answers = {"look": FOUND, "create": CREATED, "start": DONE, "delete": DONE}

    def script(peer: Peer) -> None:
        while request := peer.read_request():
            answer = {**usual, **answers}[step(request)]
            if callable(answer):
                if not answer(peer):
                    return
            else:
                peer.send(answer)

    return script


def steps(engine: ScriptedEngine) -> list[str]:
    return [step(request) for request in engine.requests]


class TestEngineFails:
    def test_in_the_create(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(engine_that(create=FAILED))
        assert told(fronted.post(START, image="x")) == (500, "server_error", True)
        assert steps(scripted) == ["look", "create"]

    def test_in_the_start_it_is_removed_before_the_answer(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(engine_that(start=FAILED))
        reply = fronted.post(START, image="x")
        assert told(reply) == (500, "server_error", True)
        assert reply.json["message"] == "no luck"
        assert scripted.targets()[1:] == [CREATE, RUN, DELETE]

    def test_the_same_headers_start_it_when_the_engine_has_recovered(
        self, scripted: ScriptedEngine, fronted: Wire
    ) -> None:
        body = compact({"image": "x"})
        headers = fronted.sign("POST", START, body)
        scripted.restart(engine_that(start=FAILED))
        assert told(fronted.request("POST", START, body, headers, sign=False)).retryable
        scripted.restart(engine_that())
        reply = fronted.request("POST", START, body, headers, sign=False)
        assert (reply.status, reply.json) == (200, {"containerId": "abc", "status": "running"})

    def test_in_the_removal_too_what_is_left_is_told_and_not_retryable(
        self, scripted: ScriptedEngine, fronted: Wire
    ) -> None:
        scripted.restart(engine_that(start=FAILED, delete=FAILED))
        reply = fronted.post(START, image="x")
        assert told(reply) == (500, "server_error", False)
        assert "left behind" in reply.json["message"]

    @pytest.mark.parametrize("status", [b"404 Gone", b"409 In Progress"])
    def test_an_engine_that_removes_it_by_itself(self, scripted: ScriptedEngine, fronted: Wire, status: bytes) -> None:
        gone = b"HTTP/1.1 %b\r\nContent-Length: 15\r\n\r\n" % status + b'{"message":"x"}'
        scripted.restart(engine_that(start=FAILED, delete=gone))
        assert told(fronted.post(START, image="x")) == (500, "server_error", True)

    def test_by_breaking_off_at_the_start(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(engine_that(start=lambda peer: False))
        assert told(fronted.post(START, image="x")) == (502, "engine_cut_head", False)
        assert steps(scripted) == ["look", "create", "start", "delete"]

    def test_by_breaking_off_at_the_create(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(engine_that(create=lambda peer: False))
        assert told(fronted.post(START, image="x")) == (502, "engine_cut_head", False)

    def test_in_the_pull_nothing_is_created(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        missing = FAILED.replace(b"500", b"404")
        broken = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{"error":"broken"}\n'
        scripted.restart(engine_that(look=missing, pull=broken))
        reply = fronted.post(START, image="x")
        assert told(reply) == (502, "image_ensure_failed", True)
        assert reply.json["message"] == "broken"
        assert steps(scripted) == ["look", "pull"]


class TestCallerLeaves:
    def leave_at(self, scripted: ScriptedEngine, wire: Wire, where: str, **answers: Any) -> threading.Event:
        """A start whose caller leaves while the engine holds its answer to a step; returns what lets the engine go."""
        scripted.restart(engine_that(**answers))
        body = compact({"image": "x"})
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        with Connection(wire.host, wire.port) as caller:
            caller.send(wire.head("POST", START, {**fields, **wire.sign("POST", START, body)}) + body)
            scripted.wait(lambda: where in steps(scripted), where)
        return scripted.go

    @staticmethod
    def until_told(answer: bytes) -> Callable[[Peer], bool]:
        def hold(peer: Peer) -> bool:
            assert peer.engine.go.wait(5)
            peer.send(answer)
            return True

        return hold

    @pytest.mark.parametrize("where", ["look", "pull"])
    def test_during_the_ensure_the_engine_is_let_go_and_nothing_is_created(
        self, scripted: ScriptedEngine, fronted: Wire, where: str
    ) -> None:
        missing = FAILED.replace(b"500", b"404")
        held = {"look": missing, where: Peer.sees_close}
        self.leave_at(scripted, fronted, where, **held)
        assert scripted.closed.wait(5)
        scripted.wait(lambda: scripted.open == 0, "the runner to be done")
        assert set(steps(scripted)) <= {"look", "pull"}

    def test_during_the_create_it_is_removed_when_the_engine_says_what_it_is(
        self, scripted: ScriptedEngine, fronted: Wire
    ) -> None:
        go = self.leave_at(scripted, fronted, "create", create=self.until_told(CREATED))
        go.set()
        scripted.wait(lambda: DELETE in scripted.targets(), "the removal")

    def test_during_a_create_that_fails_nothing_is_removed(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        go = self.leave_at(scripted, fronted, "create", create=self.until_told(FAILED))
        go.set()
        assert fronted.post(START, image="x").status == 500
        assert set(steps(scripted)) == {"look", "create"}

    def test_during_the_start_it_is_removed(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        self.leave_at(scripted, fronted, "start", start=Peer.sees_close)
        assert scripted.closed.wait(5)
        scripted.wait(lambda: DELETE in scripted.targets(), "the removal")


class TestWhatTheEngineIsAsked:
    def test_name_and_platform_are_its_only_parameters(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        arm = b'HTTP/1.1 200 OK\r\nContent-Length: 37\r\n\r\n{"Os":"linux","Architecture":"arm64"}'
        pulled = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        scripted.restart(engine_that(look=arm, pull=pulled))
        reply = fronted.post(
            START, image="x", name="n", platform="linux/arm64", labels={"a": "b"}, ttlSeconds=5, workingDir="/w"
        )
        assert reply.status == 200, reply.body
        assert steps(scripted) == ["pull", "look", "create", "start"]
        assert scripted.targets()[0] == b"/images/create?fromImage=x&tag=latest&platform=linux%2Farm64"
        assert scripted.targets()[2] == CREATE + b"?name=n&platform=linux%2Farm64"
        body = json.loads(scripted.requests[2].partition(b"\r\n\r\n")[2])
        assert re.fullmatch(r"[0-9a-f]{16}", body["Labels"].pop("docker-runner.lease"))
        ttl = {"docker-runner.ttl-seconds": "5", "docker-runner.instance": "default"}
        assert body == {
            "Image": "x",
            "WorkingDir": "/w",
            "Labels": {"a": "b", "hautech.ai/platform": "linux/arm64", **ttl},
            "HostConfig": {"AutoRemove": True},
        }

    def test_what_is_left_out_stays_out(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(engine_that())
        assert fronted.post(START, image="x").status == 200
        assert scripted.targets()[1] == CREATE
        body = json.loads(scripted.requests[1].partition(b"\r\n\r\n")[2])
        assert body == {"Image": "x", "Labels": {}, "HostConfig": {"AutoRemove": True}}


def test_a_platform_is_kept_as_a_label(start: Starting, registry: Any) -> None:
    repository = f"{registry.address}/{start.names('image')}"
    start.direct.request("POST", f"/images/{IMAGE}/tag?repo={repository}&tag=1")
    auth = {"X-Registry-Auth": base64.urlsafe_b64encode(b"{}").decode()}
    start.direct.request("POST", f"/images/{repository}/push?tag=1", headers=auth)
    container = start(image=f"{repository}:1", platform="linux/amd64", labels={"a": "b"})
    assert container["Config"]["Labels"] == {"a": "b", "hautech.ai/platform": "linux/amd64", **start.names.labels}


class TestLookups:
    def find(self, start: Starting, labels: dict[str, str], **more: Any) -> list[str]:
        reply = start.wire.post("/v1/containers/findByLabels", labels=labels, **more)
        assert (reply.status, set(reply.json)) == (200, {"containerIds"})
        found: list[str] = reply.json["containerIds"]
        return found

    def ordered(self, start: Starting, ids: list[str]) -> list[str]:
        """As the contract orders: by creation time, then id."""
        listed = {each["Id"]: each["Created"] for each in start.direct.request("GET", "/containers/json?all=1").json()}
        return sorted(ids, key=lambda id_: (listed[id_], id_))

    def test_by_labels_in_the_order_of_creation(self, start: Starting) -> None:
        labels = {start.names("label"): "x"}
        ids = [start.only_created(**labels) for _ in range(10)]
        assert self.find(start, labels, all=True) == self.ordered(start, ids)

    def test_the_order_is_of_time_then_id_whatever_the_engines(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        listed = [
            {"Id": id_, "Created": created, "Labels": {"a": "b"}, "Mounts": [{"Type": "volume", "Name": "v"}]}
            for id_, created in (("d", 2), ("b", 3), ("c", 1), ("a", 2))
        ]
        body = compact(listed)
        scripted.restart(lambda peer: peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
        expected = {"containerIds": ["c", "a", "d", "b"]}
        assert fronted.post("/v1/containers/findByLabels", labels={"a": "b"}).json == expected
        assert fronted.get("/v1/containers/listByVolume", volumeName="v").json == expected

    def test_all_labels_match_and_only_whole_ones(self, start: Starting) -> None:
        name = start.names("label")
        both = start.only_created(**{name: "x", f"{name}-2": "y"})
        start.only_created(**{name: "xy", f"{name}-2": "y"})
        one = start.only_created(**{name: "x"})
        start.only_created(**{name: ""})
        assert self.find(start, {name: "x"}, all=True) == self.ordered(start, [both, one])
        assert self.find(start, {name: "x", f"{name}-2": "y"}, all=True) == [both]
        assert self.find(start, {name: "x", f"{name}-2": "z"}, all=True) == []
        assert self.find(start, {name: "X"}, all=True) == []

    @pytest.mark.parametrize(
        ("suffix", "value"),
        [
            ("", ""),
            ("", "a=b=c"),
            ("=b", "c"),
            ("=", "="),
            (" ü\U0001f40b", "\U0001f40b \n\t"),
            ("%2C,;&", "%00+&?#"),
            ('"{}[]', '"}],"label":["x"'),
            ("*", ".*"),
        ],
    )
    def test_labels_of_odd_characters(self, start: Starting, suffix: str, value: str) -> None:
        name = start.names("label")
        container = start.only_created(**{name + suffix: value})
        start.only_created(**{name + suffix: value + "x"})
        split = f"{name}{suffix}={value}".split("=", 1)  # As the engine's filter takes it apart.
        if split[0] != name + suffix:
            start.only_created(**{split[0]: split[1]})
        assert self.find(start, {name + suffix: value}, all=True) == [container]
        assert self.find(start, {name + suffix: value + "y"}, all=True) == []

    def test_stopped_ones_only_when_asked_for(self, start: Starting) -> None:
        labels = {start.names("label"): "x"}
        container = start(labels=labels, cmd=["true"], autoRemove=False)["Id"]
        start.direct.request("POST", f"/containers/{container}/wait")
        assert self.find(start, labels) == self.find(start, labels, all=False) == []
        assert self.find(start, labels, all=True) == [container]

    def test_by_volume_exactly_and_stopped_ones_too(self, start: Starting) -> None:
        volume = start.names("volume")
        running = start(binds=[f"{volume}:/data"])["Id"]
        stopped = start(binds=[f"{volume}:/other"], cmd=["true"], autoRemove=False)["Id"]
        start.direct.request("POST", f"/containers/{stopped}/wait")
        start(binds=[f"{volume}-2:/data"])
        start(anonymousVolumes=[f"/{volume}"])

        def by(name: str) -> Any:
            reply = start.wire.get("/v1/containers/listByVolume", volumeName=name)
            assert reply.status == 200
            return reply.json

        assert by(volume) == {"containerIds": self.ordered(start, [running, stopped])}
        for other in (volume[1:], f"{volume}-", "/data", f"/{volume}", "no such volume"):
            assert by(other) == {"containerIds": []}

    def test_a_container_that_is_removed_between_calls(self, start: Starting) -> None:
        labels = {start.names("label"): "x"}
        volume = start.names("volume")
        container = start(labels=labels, binds=[f"{volume}:/data"])["Id"]
        assert start.wire.get("/v1/containers/inspect", containerId=container).status == 200
        assert self.find(start, labels) == [container]
        assert start.wire.post("/v1/containers/remove", containerId=container, force=True).status == 204
        assert self.find(start, labels, all=True) == []
        assert start.wire.get("/v1/containers/listByVolume", volumeName=volume).json == {"containerIds": []}
        for path in ("inspect", "labels", "networks", "logs/sse"):
            reply = start.wire.get(f"/v1/containers/{path}", containerId=container)
            assert told(reply) == (404, "no_such_container", False)
        for path in ("stop", "remove", "touch"):
            reply = start.wire.post(f"/v1/containers/{path}", containerId=container)
            assert told(reply) == (404, "no_such_container", False)

    def test_a_prefix_of_an_id_and_a_name_name_it(self, start: Starting) -> None:
        name = start.names("box")
        container = start(name=name)["Id"]
        for known in (container, container[:12], name):
            reply = start.wire.get("/v1/containers/inspect", containerId=known)
            assert (reply.status, reply.json["Id"]) == (200, container)
            assert start.wire.post("/v1/containers/touch", containerId=known).status == 204


# Archives.


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def archive_body(container: str, path: str, tar: bytes) -> bytes:
    payload = base64.b64encode(tar)
    return b'{"containerId":"%b","path":"%b","payloadBase64":"%b"}' % (container.encode(), path.encode(), payload)


class TestArchives:
    def read_back(self, direct: EngineDirect, container: str, path: str) -> bytes:
        """The content of one file of a container, from the engine's own archive."""
        answer = direct.request("GET", f"/containers/{container}/archive?path={path}")
        assert answer.status_code == 200, answer.text
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            content = tar.extractfile(tar.getmembers()[0])
            assert content is not None
            return content.read()

    @pytest.mark.parametrize("size", [20 * MIB, 100 * MIB])
    def test_a_large_one_arrives_whole_in_bounded_memory(
        self, engine: Engine, direct: EngineDirect, start: Starting, size: int
    ) -> None:
        container = start()["Id"]
        content = random.Random(size).randbytes(size)
        body = archive_body(container, "/tmp", tar_of(file=content))
        with Runner(engine.socket, SETTINGS) as runner:
            before = runner.memory()
            reply = Wire(runner.url, runner.secret).request("POST", PUT_ARCHIVE, body)
            assert (reply.status, reply.body) == (204, b"")
            status = Path(f"/proc/{runner.process.pid}/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
            # Base64 is a third longer: the JSON in pieces and joined, and the tar.
            assert peak - before < 4 * size
        assert (
            hashlib.sha256(self.read_back(direct, container, "/tmp/file")).digest() == hashlib.sha256(content).digest()
        )

    def test_every_byte_of_the_tar_is_the_callers(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(lambda peer: peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
        tar = bytes(range(256)) * 1000 + b"\0"
        assert fronted.request("POST", PUT_ARCHIVE, archive_body("c", "/a b&x=y", tar)).status == 204
        (request,) = scripted.requests
        head, _, body = request.partition(b"\r\n\r\n")
        assert body == tar
        assert head.startswith(b"PUT /containers/c/archive?path=%2Fa+b%26x%3Dy HTTP/1.1\r\n")
        assert b"Content-Type: application/x-tar" in head

    def test_over_the_limit_is_413_before_it_is_sent(self, runner: Runner) -> None:
        head = signed_head(
            "POST", PUT_ARCHIVE, b"", f"Content-Length: {64 * MIB + 1}", "Content-Type: application/json"
        )
        answer = runner.raw(head)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"

    def test_over_a_smaller_limit_is_413(self, engine: Engine) -> None:
        with Runner(engine.socket, {"DOCKER_RUNNER_MAX_BODY": str(MIB)}) as runner:
            wire = Wire(runner.url, runner.secret)
            body = archive_body("no-such-container", "/", bytes(900_000))
            assert told(wire.request("POST", PUT_ARCHIVE, body)) == (413, "body_too_large", False)

    def test_the_container_need_not_run(self, direct: EngineDirect, start: Starting) -> None:
        container = start(cmd=["true"], autoRemove=False)["Id"]
        direct.request("POST", f"/containers/{container}/wait")
        body = archive_body(container, "/tmp", tar_of(file=b"x"))
        assert start.wire.request("POST", PUT_ARCHIVE, body).status == 204
        assert self.read_back(direct, container, "/tmp/file") == b"x"

    def test_a_missing_path_is_the_engines_404_and_not_a_missing_container(self, start: Starting) -> None:
        body = archive_body(start()["Id"], "/no/such", tar_of(file=b"x"))
        reply = start.wire.request("POST", PUT_ARCHIVE, body)
        assert told(reply) == (404, "put_archive_failed", False)
        assert "/no/such" in reply.json["message"]
        missing = archive_body("no-such-container", "/tmp", tar_of(file=b"x"))
        assert told(start.wire.request("POST", PUT_ARCHIVE, missing)) == (404, "no_such_container", False)

    def test_a_file_is_no_folder(self, start: Starting) -> None:
        container, tar = start()["Id"], tar_of(file=b"x")
        direct = start.direct.request("PUT", f"/containers/{container}/archive?path=/bin/busybox", data=tar)
        reply = start.wire.request("POST", PUT_ARCHIVE, archive_body(container, "/bin/busybox", tar))
        assert told(reply)[::2] == (direct.status_code, False)
        assert reply.json["message"] == direct.json()["message"]

    @pytest.mark.parametrize("payload", ["not base64", "AAA", "A===", "AAAA\n", "-_-_", "AA=A", 5, None, ["AAAA"]])
    def test_what_is_not_base64_is_400(self, start: Starting, payload: Any) -> None:
        reply = start.wire.post(PUT_ARCHIVE, containerId="x", path="/", payloadBase64=payload)
        assert told(reply) == (400, "validation_error", False)
        assert "payloadBase64" in reply.json["message"]

    def test_what_is_no_tar_is_the_engines_error(self, start: Starting) -> None:
        reply = start.wire.request("POST", PUT_ARCHIVE, archive_body(start()["Id"], "/tmp", b"no tar at all" * 100))
        assert told(reply) == (500, "server_error", False)
