"""The escape hunt: every way in `data/escapes.toml` is first shown to be one, on the engine itself, and then refused
by a runner under the default policy: by every road to it, without a trace.
"""

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from policed import error_of
from websockets.exceptions import InvalidStatus

import rules
from bridged import Bridge
from chunked import send_chunks
from client import sign
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from errors import RunnerError
from operations import OPERATIONS
from policy_file import parse
from rules import RULES
from service import ROOT, Answer, Runner
from upgraded import socket_of

REFUSALS = frozenset(
    (
        *("policy_denied", "ambiguous_body", "ambiguous_query", "invalid_json", "invalid_path", "validation_error"),
        *("not_found", "method_not_allowed"),
    )
)
SECRET_OF_THE_HOST = "the host's own"


class Way(msgspec.Struct, forbid_unknown_fields=True):
    """A row of the file; see there."""

    name: str
    gives: str
    source: str
    host: str = ""
    method: str = "POST"
    target: str = "/containers/create?name=NAME"
    body: str | None = None
    type: str = "application/json"
    encode: str = "utf-8"
    before: str = ""
    shows: str = ""
    refused: tuple[int, ...] = (400, 403)


WAYS = [msgspec.convert(row, Way) for row in tomllib.loads((ROOT / "tests/data/escapes.toml").read_text())["way"]]
each_way = pytest.mark.parametrize("way", WAYS, ids=[way.name.replace(" ", "-") for way in WAYS])


class Fetched:
    """Something on the host's loopback that the engine should not ask for its callers; counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.visits += 1
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Ground:
    """What the ways are tried on."""

    def __init__(
        self, direct: EngineDirect, names: Names, image: str, folder: Path, box: str, fetched: Fetched
    ) -> None:
        self.direct = direct
        self.names = names
        self.image = image
        self.folder = folder
        self.box = box
        self.fetched = fetched

    def ask(self, way: Way, name: str) -> tuple[str, bytes | None, dict[str, str]]:
        """Target, body and headers of a way."""

        def real(text: str) -> str:
            given = {"IMAGE": self.image, "NAME": name, "BOX": self.box, "FOLDER": str(self.folder)}
            text = text.replace("PORT", str(self.fetched.port))
            for stand_in, value in given.items():
                text = re.sub(rf"\b{stand_in}\b", value, text)
            return text

        body = way.body
        if way.host:
            host = way.host if "NetworkMode" in way.host else '{"NetworkMode": "none", ' + way.host[1:]
            body = f'{{"Image": "IMAGE", "Cmd": ["cat", "/m/secret"], "HostConfig": {host}}}'
        if body is None:
            return real(way.target), None, {}
        text = real(body)
        headers = {"Content-Type": way.type.encode().decode("latin-1")}
        if way.encode == "gzip":
            return real(way.target), gzip.compress(text.encode()), {**headers, "Content-Encoding": "gzip"}
        return real(way.target), text.encode(way.encode), headers

    def prepare(self, way: Way, name: str) -> None:
        if way.before == "stopped":
            body = {"Image": self.image, "Cmd": ["cat", "/m/secret"], "HostConfig": {"NetworkMode": "none"}}
            assert self.direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201

    def logs(self, name: str) -> bytes:
        self.direct.request("POST", f"/containers/{name}/wait")
        return self.direct.request("GET", f"/containers/{name}/logs?stdout=1&stderr=1").content

    def traces(self, name: str) -> Any:
        """What there is under a name, and how the bystander is."""
        box = self.direct.request("GET", f"/containers/{self.box}/json").json()
        container = self.direct.request("GET", f"/containers/{name}/json")
        return (
            container.status_code == 200 and (container.json()["State"], container.json()["HostConfig"]),
            self.direct.request("GET", f"/volumes/{name}").status_code,
            self.direct.request("GET", f"/networks/{name}").status_code,
            self.direct.request("GET", f"/images/{name}/json").status_code,
            (box["HostConfig"], box["State"], sorted(box["ExecIDs"] or []), sorted(box["NetworkSettings"]["Networks"])),
            self.fetched.visits,
        )


@pytest.fixture(scope="module")
def ground(
    direct: EngineDirect, names: Names, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("of-the-host")
    (folder / "secret").write_text(SECRET_OF_THE_HOST)
    folder.with_name(folder.name + "-empty").mkdir()
    (folder / "x").mkdir()
    body = {"Image": image, "Cmd": ["sleep", "1000000"], "Labels": names.labels, "HostConfig": {"NetworkMode": "none"}}
    box: str = direct.request("POST", f"/containers/create?name={names('box-')}", json=body).json()["Id"]
    assert direct.request("POST", f"/containers/{box}/start").status_code == 204
    fetched = Fetched()
    yield Ground(direct, names, image, folder, box, fetched)
    fetched.close()


@pytest.fixture(scope="module")
def guarded(engine: Engine) -> Iterator[Runner]:
    """A runner under its default policy."""
    with Runner(engine.socket, {"DOCKER_RUNNER_POLICY": "workloads"}) as runner:
        yield runner


@pytest.fixture(scope="module")
def guarded_bridge(guarded: Runner, short_folder: Path) -> Iterator[Bridge]:
    with Bridge(guarded.url, f"unix://{short_folder}/guarded.sock") as bridge:
        yield bridge


def plainly(path: str, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> Answer:
    """An unsigned request on a Unix socket, its target and headers sent as they are."""
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    try:
        connection.sock.connect(path)
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def test_at_least_sixty_ways_are_tried_and_each_says_where_it_is_known_from() -> None:
    assert len(WAYS) >= 60
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert all(way.gives and way.source for way in WAYS)


@pytest.mark.parametrize(
    "way", [way for way in WAYS if way.shows], ids=[way.name.replace(" ", "-") for way in WAYS if way.shows]
)
def test_it_is_a_way_on_the_engine_itself(way: Way, engine: Engine, ground: Ground) -> None:
    name = ground.names()
    ground.prepare(way, name)
    visits = ground.fetched.visits
    answer = plainly(engine.socket, way.method, *ground.ask(way, name))
    if way.shows == "fetched":
        assert wait_until(lambda: ground.fetched.visits > visits, 10), answer.body
        return
    assert answer.status < 300, answer.body
    if way.shows == "secret":
        if way.target.startswith("/volumes"):
            body = {"Image": ground.image, "Cmd": ["cat", "/m/secret"], "HostConfig": {"NetworkMode": "none"}}
            body = {**body, "HostConfig": {"NetworkMode": "none", "Binds": [f"{name}:/m"]}}
            assert ground.direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201
        if not way.before:
            assert ground.direct.request("POST", f"/containers/{name}/start").status_code == 204
        assert SECRET_OF_THE_HOST.encode() in ground.logs(name)
    elif way.shows != "accepted":
        found = ground.direct.request("GET", f"/containers/{name}/json").json()
        for part in way.shows.split("."):
            found = found[part]
        assert found
    for made in (f"/containers/{name}?force=1&v=1", f"/networks/{name}"):
        ground.direct.request("DELETE", made)


@each_way
def test_it_is_refused_by_every_road(way: Way, ground: Ground, guarded: Runner, guarded_bridge: Bridge) -> None:
    name = ground.names()
    ground.prepare(way, name)
    target, body, headers = ground.ask(way, name)
    before = ground.traces(name)
    versions = ["", "/v1.24", "/v1.41", "/v1.99"] if re.match(r"/(?!v1/|v\d|/|%)", target) else [""]
    answers = {
        f"signed {version}": guarded.request(way.method, version + target, body, headers) for version in versions
    }
    if body:
        answers["in signed chunks"] = send_chunks(guarded, way.method, target, [body[:7], body[7:]], headers)
    if not target.startswith("/v1/"):
        answers["by the bridge"] = plainly(guarded_bridge.socket, way.method, target, body, headers)
    for road, answer in answers.items():
        error = error_of(answer)
        assert error.get("code") in REFUSALS, (road, answer.status, answer.body)
        assert answer.status in way.refused, (road, answer.status, answer.body)
        assert error["retryable"] is False
    assert ground.traces(name) == before


def test_an_upgrade_is_no_way_to_an_operation_with_rules(guarded: Runner, ground: Ground) -> None:
    async def status(target: str) -> int:
        async with socket_of(guarded, target, sign(guarded.secret, "GET", target)) as stream:
            return (await stream.ask("{}")).status

    for operation in OPERATIONS:
        if operation.id in RULES or operation.id in ("Session", "Grpc"):
            if operation.method != "POST":
                continue
            target = re.sub(r"\{\w+\}", ground.box, operation.template)
            with pytest.raises(InvalidStatus) as refused:
                asyncio.run(status(target))
            assert refused.value.response.status_code in (400, 403), operation.id


MIB = 1024 * 1024
HEAVY = {
    "arrays in arrays": b"[" * MIB,
    "objects in objects": b'{"a":' * (MIB // 5),
    "arrays in arrays, closed": b'{"Cmd":' + b"[" * 900 + b"]" * 900 + b"}",
    "tiny values": b'{"Cmd":[' + b"0," * (MIB // 2 - 10) + b"0]}",
    "as many values as may be": b'{"Cmd":[' + b"0," * 16_000 + b"0]}",
    "tiny objects": b'{"HostConfig":{"PortBindings":{"80/tcp":[' + b"{}," * 8_000 + b"{}]}}}",
    "unknown fields": b"{" + b",".join(b'"%030d":0' % i for i in range(16_000)) + b"}",
    "a long name with many below": b'{"'
    + b"a" * 700_000
    + b'":{'
    + b",".join(b'"%d":0' % i for i in range(16_000))
    + b"}}",
    "long names": b"{" + b",".join(b'"%s%d":0' % (b"a" * 1000, i) for i in range(1_000)) + b"}",
    "a number": b'{"StopTimeout":' + b"9" * (MIB - 100) + b"}",
    "numbers": b'{"Cmd":[' + b",".join([b"9" * 4200] * 240) + b"]}",
    "a fraction": b'{"StopTimeout":0.' + b"9" * (MIB - 100) + b"}",
    "escapes": b'{"Image":"' + b"\\u017f" * (MIB // 6 - 10) + b'"}',
    "backslashes": b'{"' + b"\\\\" * (MIB // 2 - 10) + b'":0}',
    "blanks": b" " * (MIB - 10) + b"x",
    "ranges of ports": b'{"HostConfig":{"PortBindings":{"1/tcp":['
    + b",".join([b'{"HostPort":"0-65535"}'] * 8_000)
    + b"]}}}",
    "options": b'{"HostConfig":{"Tmpfs":{"/m":"' + b"ro," * 300_000 + b'"}}}',
    "binds": b'{"HostConfig":{"Binds":["' + b'/a:/b","' * 16_000 + b'x:/y"]}}',
    "half pairs": b'{"Image":"' + b"\\ud800" * 100_000 + b'"}',
}


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize(
    "policy", ["", '[container]\nports = ["0-30000", "30001-65535"]\n'], ids=["workloads", "ports"]
)
def test_a_heavy_body_does_not_stop_the_event_loop(name: str, policy: str) -> None:
    """How long the processor is at it; about 0.1 s on a slow machine."""
    operation = next(operation for operation in OPERATIONS if operation.id == "ContainerCreate")
    held = parse(policy).default
    started = time.thread_time()
    with contextlib.suppress(RunnerError):
        rules.check(held, operation, b"/containers/create", body=HEAVY[name])
    assert time.thread_time() - started < 0.25


def test_the_hosts_network_by_its_id_is_not_the_hosts(guarded: Runner, ground: Ground) -> None:
    """No rule sees what an id names. To the engine only the name `host` is the host's; if that changed, this tells."""
    [host] = [each["Id"] for each in ground.direct.request("GET", "/networks").json() if each["Name"] == "host"]
    for mode in (host, host[:12]):
        name = ground.names()
        body = {"Image": ground.image, "Cmd": ["ls", "/sys/class/net"], "HostConfig": {"NetworkMode": mode}}
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        assert guarded.request("POST", f"/containers/create?name={name}", content, headers).status == 201
        assert guarded.request("POST", f"/containers/{name}/start").status == 204
        seen = ground.logs(name)
        assert b"lo" in seen
        assert not [each for _, each in socket.if_nameindex() if each != "lo" and each.encode() in seen]
