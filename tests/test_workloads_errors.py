"""The runner face when something is wrong: an engine that is down, breaks off or talks nonsense, names that would be
paths, and input that makes no sense. Every route of the table is asked; none answers with anything but its JSON error.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from answers import Told, told
from conftest import IMAGE, EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from errors import CODES
from scripted import Peer, ScriptedEngine
from service import Runner
from wire import Reply, Wire, compact, target
from workloads import INTERACTIVE, ROUTES

ABSENT = "no-such-thing-anywhere"
TAR = "AAAA"

REQUESTS: dict[str, tuple[dict[str, Any], Told | int]] = {
    "/v1/images/ensure": ({"image": IMAGE}, 204),
    "/v1/containers/start": ({"image": IMAGE, "cmd": ["true"], "networkMode": "none"}, 200),
    "/v1/containers/stop": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/remove": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/inspect": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/labels": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/networks": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/findByLabels": ({"labels": {ABSENT: "x"}}, 200),
    "/v1/containers/listByVolume": ({"volumeName": ABSENT}, 200),
    "/v1/volumes/remove": ({"volumeName": ABSENT}, Told(404, "no_such_volume", False)),
    "/v1/containers/touch": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/containers/putArchive": (
        {"containerId": ABSENT, "path": "/tmp", "payloadBase64": TAR},
        Told(404, "no_such_container", False),
    ),
    "/v1/exec/run": ({"containerId": ABSENT, "command": "true"}, Told(404, "no_such_container", False)),
    "/v1/exec/resize": ({"execId": ABSENT, "size": {"cols": 1, "rows": 1}}, Told(404, "no_such_exec", False)),
    "/v1/containers/logs/sse": ({"containerId": ABSENT}, Told(404, "no_such_container", False)),
    "/v1/events/sse": ({}, 200),
    INTERACTIVE: ({"containerId": ABSENT, "command": "true"}, Told(426, "upgrade_required", False)),
}
"""For every route a request, and what it gets from an engine that has the image and nothing else."""

METHODS = {path: method for method, path, *_ in ROUTES}
STRUCTS = {path: struct for _, path, struct, *_ in ROUTES}
ASKS_ENGINE = sorted(set(METHODS) - {INTERACTIVE})


def test_every_route_is_asked_here() -> None:
    assert set(REQUESTS) == set(METHODS)


class Asked:
    """One signed request, to be sent as often as one likes."""

    def __init__(self, wire: Wire, path: str, fields: dict[str, Any]) -> None:
        self._wire = wire
        self.method = METHODS[path]
        self.target = path if self.method == "POST" else target(path, fields)
        self.body = compact(fields) if self.method == "POST" else b""
        self._headers = wire.sign(self.method, self.target, self.body)

    def send(self) -> Reply:
        """Send it; the answer is read whole, unless it is a stream."""
        reply = self._wire.open(self.method, self.target, self.body, self._headers, sign=False)
        if reply.header("content-type") == "text/event-stream":
            return reply
        return reply.finish()


def ask(runner: Runner, path: str, fields: dict[str, Any] | None = None) -> Reply:
    return Asked(Wire(runner.url, runner.secret), path, REQUESTS[path][0] if fields is None else fields).send()


def is_alive(runner: Runner) -> bool:
    """Whether the process lives and has noted no defect."""
    assert not any("Traceback" in line or "a defect" in line for line in runner.log), "".join(runner.log)[-5000:]
    return runner.process.poll() is None


# The engine is down.


class Returned:
    """A runner whose engine was away when every route was asked, and then came back."""

    def __init__(self, runner: Runner, socket: Path, engine: Engine) -> None:
        wire = Wire(runner.url, runner.secret)
        self.asked = {path: Asked(wire, path, fields) for path, (fields, _) in REQUESTS.items()}
        self.meanwhile = {path: asked.send() for path, asked in self.asked.items()}
        socket.symlink_to(engine.socket)


@pytest.fixture(scope="module")
def returned(short_folder: Path, engine: Engine, image: str) -> Iterator[Returned]:
    socket = short_folder / "comes-later"
    with Runner(str(socket)) as runner:
        yield Returned(runner, socket, engine)


@pytest.mark.parametrize("path", ASKS_ENGINE)
def test_without_an_engine_every_route_says_503_retryable(returned: Returned, path: str) -> None:
    assert told(returned.meanwhile[path]) == (503, "engine_socket_missing", True)


@pytest.mark.parametrize("path", REQUESTS)
def test_the_same_headers_get_the_true_answer_once_the_engine_is_back(returned: Returned, path: str) -> None:
    expected = REQUESTS[path][1]
    if path == INTERACTIVE:
        assert told(returned.meanwhile[path]) == expected
        return
    with returned.asked[path].send() as reply:
        assert (reply.status if isinstance(expected, int) else told(reply)) == expected
    assert told(returned.asked[path].send()) == (401, "replayed_nonce", False)


def test_an_engine_that_ends_and_begins_again_is_told_truly(private_engine: PrivateEngine) -> None:
    with Runner(private_engine.socket) as runner:
        wire = Wire(runner.url, runner.secret)
        path = "/v1/containers/inspect"
        assert told(ask(runner, path)).status == 404
        private_engine.kill()
        asked = Asked(wire, path, REQUESTS[path][0])
        assert told(asked.send()) == (503, "engine_refused", True)
        private_engine.start()
        assert told(asked.send()) == (404, "no_such_container", False)


def test_an_interactive_exec_without_an_engine_is_told_in_a_frame(short_folder: Path) -> None:
    with Runner(str(short_folder / "absent")) as runner:
        socket = Wire(runner.url, runner.secret).interactive(containerId=ABSENT, command="true")
        (frame,) = list(socket)
        assert (frame["type"], frame["status"], frame["code"]) == ("error", 503, "engine_socket_missing")
        assert socket.closed == (1011, "exec_failed")


# The engine breaks off, or talks nonsense.


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
def fronted(listening: ScriptedEngine) -> Iterator[Runner]:
    """A runner in front of the scripted engine; one for all tests: each also shows that it survived the last."""
    with Runner(listening.path) as runner:
        yield runner
        assert is_alive(runner)


def answer(status: int, body: bytes, reason: str = "Whatever") -> bytes:
    return b"HTTP/1.1 %d %b\r\nContent-Length: %d\r\n\r\n%b" % (status, reason.encode(), len(body), body)


def says(data: bytes) -> Any:
    """A script that reads one request, sends this, and closes."""

    def script(peer: Peer) -> None:
        if peer.read_request():
            peer.send(data)

    return script


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "engine_cut_head"),
        (b"HTTP/1.1 200 OK\r\nContent-", "engine_cut_head"),
        (b"What?\r\n\r\n", "engine_garbage"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", "engine_garbage"),
        (answer(999, b"{}"), "engine_garbage"),
    ],
)
@pytest.mark.parametrize("path", ASKS_ENGINE)
def test_an_engine_that_breaks_off_is_a_502_that_is_not_retryable(
    scripted: ScriptedEngine, fronted: Runner, path: str, data: bytes, code: str
) -> None:
    scripted.restart(says(data))
    assert told(ask(fronted, path)) == (502, code, False)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("path", sorted(set(ASKS_ENGINE) - {"/v1/events/sse"}))
def test_an_answer_cut_in_its_body_is_a_502_that_is_not_retryable(
    scripted: ScriptedEngine, fronted: Runner, path: str
) -> None:
    scripted.restart(says(answer(200, b"{" * 100)[:-50]))
    assert told(ask(fronted, path)) == (502, "engine_cut_body", False)


def test_events_of_the_past_that_break_off_are_a_502_before_the_stream(
    scripted: ScriptedEngine, fronted: Runner
) -> None:
    scripted.restart(says(answer(200, b'{"Type":"container"}\n' + b" " * 100)[:-50]))
    assert told(ask(fronted, "/v1/events/sse")) == (502, "engine_cut_body", False)


DECODES = (
    "/v1/containers/labels",
    "/v1/containers/networks",
    "/v1/containers/findByLabels",
    "/v1/containers/listByVolume",
    "/v1/containers/logs/sse",
    "/v1/containers/start",
)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b'"text"', b'{"Id":"\xff"}', b"[" * 100_000, b'{"Id":5}'])
@pytest.mark.parametrize("path", DECODES)
def test_an_answer_that_is_not_the_json_asked_for_is_a_502(
    scripted: ScriptedEngine, fronted: Runner, path: str, body: bytes
) -> None:
    scripted.restart(lambda peer: peer.answer(answer(200, body)))
    assert told(ask(fronted, path)) == (502, "engine_garbage", False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"message":"the reason"}', "the reason"),
        (b"plain text\n", "plain text"),
        (b"", "the engine answered 500"),
        (b'{"message":5}', '{"message":5}'),
        (b'{"message":"\xff"}', '{"message":"�"}'),
    ],
)
@pytest.mark.parametrize("path", ASKS_ENGINE)
def test_the_engines_own_error_keeps_its_status_and_words(
    scripted: ScriptedEngine, fronted: Runner, path: str, body: bytes, message: str
) -> None:
    scripted.restart(lambda peer: peer.answer(answer(500, body)))
    reply = ask(fronted, path)
    clean = path in ("/v1/images/ensure", "/v1/containers/start")
    assert told(reply) == (500, "server_error", clean)
    assert reply.json["message"] == message


FALLBACKS = {path: operation.fallback for _, path, _, _, operation in ROUTES}


@pytest.mark.parametrize("status", [403, 418, 429, 451])
@pytest.mark.parametrize("path", ASKS_ENGINE)
def test_another_status_of_the_engine_is_told_with_the_code_of_the_operation(
    scripted: ScriptedEngine, fronted: Runner, path: str, status: int
) -> None:
    scripted.restart(lambda peer: peer.answer(answer(status, b'{"message":"no"}')))
    assert told(ask(fronted, path)) == (status, FALLBACKS[path], False)


# Names cannot escape.

WITHOUT_REQUEST = ["..", ".", "a/b", "../../info", "/", "x/rename?name=y", "a\0b", "x\r\nEvil: 1"]
WITHOUT_REQUEST += ["..%2f/", "x/../../version", "a\x7fb"]
ENCODED = ["x?force=1", "x#y", "a%2Fb", "%2e%2e", "a b", "ü\U0001f40b", "x;y", "..%2Finfo", "x&all=1"]
NAMED = [
    (path, field, thing)
    for path, (fields, _) in REQUESTS.items()
    for field, thing in (("containerId", "container"), ("execId", "exec"), ("volumeName", "volume"))
    if field in fields and path not in (INTERACTIVE, "/v1/containers/listByVolume")
]
NOT_FOUND = answer(404, b'{"message":"No such thing"}')


@pytest.mark.parametrize("name", WITHOUT_REQUEST)
@pytest.mark.parametrize(("path", "field", "thing"), NAMED)
def test_a_name_that_would_be_another_path_is_the_name_of_nothing(
    scripted: ScriptedEngine, fronted: Runner, path: str, field: str, thing: str, name: str
) -> None:
    scripted.restart(lambda peer: peer.answer(NOT_FOUND))
    reply = ask(fronted, path, {**REQUESTS[path][0], field: name})
    assert told(reply) == (404, f"no_such_{thing}", False)
    assert scripted.connections == 0


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize(("path", "field", "thing"), NAMED)
def test_a_name_of_odd_characters_is_one_segment_of_the_path(
    scripted: ScriptedEngine, fronted: Runner, path: str, field: str, thing: str, name: str
) -> None:
    scripted.restart(lambda peer: peer.answer(NOT_FOUND))
    assert told(ask(fronted, path, {**REQUESTS[path][0], field: name})) == (404, f"no_such_{thing}", False)
    (asked,) = scripted.targets()
    segments = asked.decode().partition("?")[0].split("/")
    plural = {"container": "containers", "exec": "exec", "volume": "volumes"}[thing]
    assert segments[:3] == ["", plural, quote(name, safe="")]
    assert len(segments) <= 4


@pytest.mark.parametrize("name", WITHOUT_REQUEST + ENCODED)
def test_a_volume_to_look_for_is_a_filter_and_nothing_else(
    scripted: ScriptedEngine, fronted: Runner, name: str
) -> None:
    scripted.restart(lambda peer: peer.answer(answer(200, b"[]")))
    reply = ask(fronted, "/v1/containers/listByVolume", {"volumeName": name})
    assert (reply.status, reply.json) == (200, {"containerIds": []})
    (asked,) = scripted.targets()
    path, _, query = asked.decode().partition("?")
    assert path == "/containers/json"
    assert parse_qs(query, strict_parsing=True) == {
        "all": ["1"],
        "filters": [f'{{"volume":[{json.dumps(name)}]}}'],
    } or (json.loads(parse_qs(query)["filters"][0]) == {"volume": [name]})


@pytest.mark.parametrize("image", ["..", "a/../../info", "/x", "x/", "a//b", "./x", "x\0y/z", "x\r\nE: 1", "x:", "x@"])
@pytest.mark.parametrize("path", ["/v1/images/ensure", "/v1/containers/start"])
@pytest.mark.parametrize("platform", [{}, {"platform": "linux/amd64"}])
def test_an_image_that_would_be_another_path_is_a_bad_parameter(
    scripted: ScriptedEngine, fronted: Runner, path: str, image: str, platform: dict[str, str]
) -> None:
    scripted.restart(lambda peer: peer.answer(NOT_FOUND))
    assert told(ask(fronted, path, {"image": image, **platform})) == (400, "bad_parameter", False)
    assert scripted.connections == 0


@pytest.mark.parametrize("image", ["x?fromSrc=-", "x#y", "a%2F..%2Finfo", "a b", "x&tag=y"])
def test_an_image_of_odd_characters_stays_one_name(scripted: ScriptedEngine, fronted: Runner, image: str) -> None:
    scripted.restart(lambda peer: peer.answer(NOT_FOUND))
    assert told(ask(fronted, "/v1/images/ensure", {"image": image})) == (404, "no_such_image", False)
    inspected, pulled = (asked.decode() for asked in scripted.targets())
    assert unquote(inspected) in (f"/images/{image}:latest/json", f"/images/{image}/json")
    assert inspected.count("/") == 3
    assert "?" not in inspected
    query = parse_qs(pulled.partition("?")[2], strict_parsing=True)
    assert {name: values for name, values in query.items() if name in ("fromSrc",)} == {}
    assert ":".join((query["fromImage"][0], query["tag"][0])) in (image, f"{image}:latest")


def test_a_containers_name_stays_a_parameter(scripted: ScriptedEngine, fronted: Runner) -> None:
    scripted.restart(lambda peer: peer.answer(answer(200, b'{"Id":"abc"}')))
    name = "x&platform=y#z/../?"
    reply = ask(fronted, "/v1/containers/start", {"image": "x", "name": name})
    assert (reply.status, reply.json["name"]) == (200, name)
    assert parse_qs(scripted.targets()[1].decode().partition("?")[2]) == {"name": [name]}


def test_on_a_real_engine_a_name_does_nothing_but_name(
    runner: Runner, direct: EngineDirect, names: Names, image: str
) -> None:
    name = names("box")
    body = {"Image": image, "Labels": names.labels, "NetworkDisabled": True}
    created = direct.request("POST", f"/containers/create?name={name}", json=body).json()["Id"]
    for path in ("/v1/containers/stop", "/v1/containers/remove", "/v1/containers/touch"):
        for odd in (f"{created}/rename?name=x", f"{created}?force=1", f"../containers/{created}", f"{created}%2Fjson"):
            assert told(ask(runner, path, {"containerId": odd})) == (404, "no_such_container", False)
    assert told(ask(runner, "/v1/containers/inspect", {"containerId": "../../info"})).status == 404
    assert told(ask(runner, "/v1/volumes/remove", {"volumeName": ".."})) == (404, "no_such_volume", False)
    assert direct.request("GET", f"/containers/{created}/json").json()["Name"] == f"/{name}"


# No input ends the process.


@pytest.fixture(scope="module")
def alone(short_folder: Path) -> Iterator[Runner]:
    """A runner without an engine: whatever it is asked, its answer is an error."""
    with Runner(str(short_folder / "absent")) as runner:
        yield runner
        assert is_alive(runner)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)
THOROUGH = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
REFUSALS = {400, 404, 415, 426, 503}


def is_refused(runner: Runner, reply: Reply) -> bool:
    status, code, retryable = told(reply)
    assert status in REFUSALS
    assert code in CODES
    assert retryable == (status == 503)
    return runner.process.poll() is None


def deep(depth: int) -> bytes:
    return b'{"createExtras":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize("path", REQUESTS)
@THOROUGH
@given(data=st.data())
def test_any_fields_get_a_clean_error(alone: Runner, path: str, data: st.DataObject) -> None:
    fields = [field.encode_name for field in msgspec.structs.fields(STRUCTS[path])]
    odd = data.draw(st.dictionaries(st.sampled_from([*fields, "other"]), VALUES, max_size=3))
    assert is_refused(alone, ask(alone, path, {**REQUESTS[path][0], **odd}))


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if method == "POST"])
@THOROUGH
@given(body=st.binary() | VALUES.map(compact) | st.text().map(lambda text: b'{"containerId":"' + text.encode()))
@example(body=b"[" * 100_000)
@example(body=deep(100_000))
@example(body=b'{"containerId":"\xff"}')
@example(body=b'{"containerId":"\\ud800"}')
@example(body=b'{"containerId":1e999,"image":1e999}')
@example(body=b"\xef\xbb\xbf{}")
def test_any_body_gets_a_clean_error(alone: Runner, path: str, body: bytes) -> None:
    wire = Wire(alone.url, alone.secret)
    assert is_refused(alone, wire.request("POST", path, body, {"Content-Type": "application/json"}))


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if method == "GET"])
@THOROUGH
@given(query=st.binary(max_size=200).map(quote) | st.text("containerId=&;%+0aF\"<>[]{}|^`'", max_size=80))
@example(query="containerId=%ff")
@example(query="containerId=%ed%a0%80")
@example(query="containerId=x&containerId=y")
@example(query="&" * 60_000)
@example(query="x=%00" * 10_000)
@example(query="containerId=x&follow=maybe")
def test_any_query_gets_a_clean_error(alone: Runner, path: str, query: str) -> None:
    assert is_refused(alone, Wire(alone.url, alone.secret).request("GET", f"{path}?{query}"))


@pytest.mark.parametrize("path", REQUESTS)
def test_a_body_of_another_media_type_is_refused(alone: Runner, path: str) -> None:
    wire = Wire(alone.url, alone.secret)
    reply = wire.request("POST", path, b"{}", {"Content-Type": "text/plain"})
    assert told(reply).code == ("unsupported_media_type" if METHODS[path] == "POST" else "method_not_allowed")


def test_the_process_has_survived_all_that(alone: Runner) -> None:
    assert wait_until(lambda: is_alive(alone), 1)
    assert Wire(alone.url, alone.secret).request("GET", "/v1/health", sign=False).json == {"status": "ok"}
