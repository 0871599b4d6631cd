"""The wire protocol as WIRE.md states it, where only a scripted engine says what is needed: each of its errors, its
absence, an error within a pull; and what it is asked. See `test_wire_contract.py`.
"""

import json
from collections.abc import Iterator

import pytest

from scripted import Peer, Script, ScriptedEngine
from service import Runner
from wire import GETS, INTERACTIVE, POSTS, Reply, Wire, compact, refused, target

FALLBACKS = {
    "/v1/images/ensure": "image_ensure_failed",
    "/v1/containers/start": "start_failed",
    "/v1/containers/stop": "stop_failed",
    "/v1/containers/remove": "remove_failed",
    "/v1/containers/inspect": "inspect_failed",
    "/v1/containers/labels": "labels_failed",
    "/v1/containers/networks": "networks_failed",
    "/v1/containers/findByLabels": "find_failed",
    "/v1/containers/listByVolume": "list_volume_failed",
    "/v1/volumes/remove": "volume_remove_failed",
    "/v1/containers/touch": "touch_failed",
    "/v1/containers/putArchive": "put_archive_failed",
    "/v1/exec/run": "exec_failed",
    "/v1/exec/resize": "resize_failed",
    "/v1/containers/logs/sse": "logs_failed",
    "/v1/events/sse": "events_failed",
}


def call(wire: Wire, path: str) -> Reply:
    """The smallest valid request of a route."""
    return wire.post(path, **POSTS[path]) if path in POSTS else wire.get(path, **GETS[path])


@pytest.fixture(scope="module")
def refusing() -> Iterator[tuple[ScriptedEngine, Wire]]:
    """A runner in front of an engine that answers as it is told."""
    with ScriptedEngine(says(500)) as scripted, Runner(scripted.path) as runner:
        yield scripted, Wire(runner.url, runner.secret)


def says(status: int, body: bytes = compact({"message": "the engine's words, \xe4"})) -> Script:
    """An engine that answers everything alike."""
    head = f"HTTP/1.1 {status} Reason\r\nConnection: close\r\nContent-Type: application/json\r\n"
    answer = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def script(peer: Peer) -> None:
        if peer.read_request():
            peer.send(answer)

    return script


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_an_engine_error_keeps_its_status_and_words_and_the_code_tells_the_cause(
    refusing: tuple[ScriptedEngine, Wire], path: str
) -> None:
    engine, wire = refusing
    missing = {"/v1/images/ensure": "no_such_image", "/v1/volumes/remove": "no_such_volume"}
    missing |= {"/v1/exec/resize": "no_such_exec", "/v1/containers/start": "no_such_image"}
    clean = path in ("/v1/images/ensure", "/v1/containers/start")
    conflict = "container_stopped_paused" if path == "/v1/exec/run" else "conflict"
    expected = {
        400: ("bad_parameter", False),
        404: (missing.get(path, "no_such_container"), False),
        409: (conflict, False),
        403: (FALLBACKS[path], False),
        406: (FALLBACKS[path], False),
        500: ("server_error", clean),
        503: ("server_error", clean),
    }
    for status, (code, retryable) in expected.items():
        engine.restart(says(status))
        message = refused(call(wire, path), status, code, retryable=retryable)
        assert message == "the engine's words, \xe4"


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_an_unreachable_engine_is_503_on_every_route_and_the_request_may_be_repeated(
    refusing: tuple[ScriptedEngine, Wire], path: str
) -> None:
    engine, wire = refusing
    engine.stop()
    try:
        body = compact(POSTS[path]) if path in POSTS else b""
        method, where = ("POST", path) if path in POSTS else ("GET", target(path, GETS[path]))
        headers = wire.sign(method, where, body)
        for _ in range(2):
            reply = wire.request(method, where, body, headers)
            assert reply.status in (502, 503)
            refused(reply, reply.status, reply.json["error"]["code"], retryable=True)
    finally:
        engine.listen()
    engine.script = says(400)
    refused(wire.request(method, where, body, headers), 400, "bad_parameter")


def test_an_unreachable_engine_is_told_to_an_interactive_exec_and_the_upgrade_may_be_repeated(
    refusing: tuple[ScriptedEngine, Wire],
) -> None:
    engine, wire = refusing
    engine.stop()
    where = target(INTERACTIVE, {"containerId": "x", "command": "x"})
    headers: dict[str, str | None] = {**wire.sign("GET", where)}
    try:
        for _ in range(2):
            reply, socket = wire.upgrade(where, headers)
            assert reply.status == 101
            with socket:
                (error,) = socket
            assert (error["type"], error["status"] in (502, 503), error["retryable"]) == ("error", True, True)
            assert socket.closed is not None
            assert socket.closed[0] == 1011
    finally:
        engine.listen()


def test_an_error_inside_the_stream_of_a_pull_is_an_error(refusing: tuple[ScriptedEngine, Wire]) -> None:
    engine, wire = refusing
    progress = b'{"status":"Pulling"}\r\n{"errorDetail":{"message":"manifest broke"},"error":"manifest broke"}\r\n'
    engine.restart(says(200, progress))
    reply = wire.post("/v1/images/ensure", image="x", platform="linux/amd64")
    assert refused(reply, 502, "image_ensure_failed", retryable=True) == "manifest broke"
    reply = wire.post("/v1/containers/start", image="x", platform="linux/amd64")
    assert reply.json["message"] == "manifest broke"


def test_privileged_reaches_the_engine(refusing: tuple[ScriptedEngine, Wire]) -> None:
    engine, wire = refusing
    engine.restart(says(200, b'{"Id":"abc"}\n'))
    for value in (True, False):
        assert wire.post("/v1/containers/start", image="x", privileged=value).json["containerId"] == "abc"
        (create,) = [request for request in engine.requests if b"/containers/create" in request]
        assert json.loads(create.partition(b"\r\n\r\n")[2])["HostConfig"]["Privileged"] is value
        engine.requests.clear()


def test_options_of_create_go_in_the_body_and_only_name_and_platform_in_the_query(
    refusing: tuple[ScriptedEngine, Wire],
) -> None:
    engine, wire = refusing
    engine.restart(says(200, b'{"Id":"abc","Os":"linux","Architecture":"arm64"}\n'))
    fields = {"image": "x", "name": "n", "platform": "linux/arm64", "tty": True, "createExtras": {"StopTimeout": 1}}
    assert (reply := wire.post("/v1/containers/start", **fields)).status == 200, reply.body
    (create,) = [request for request in engine.requests if b"/containers/create" in request]
    head, _, body = create.partition(b"\r\n\r\n")
    assert head.split(b" ")[1].partition(b"?")[2] == b"name=n&platform=linux%2Farm64"
    assert set(json.loads(body)) == {"Image", "Tty", "Labels", "HostConfig", "StopTimeout"}
    pulls = [request for request in engine.requests if b"/images/create?" in request]
    assert len(pulls) == 1
    assert b"platform=linux%2Farm64" in pulls[0]
