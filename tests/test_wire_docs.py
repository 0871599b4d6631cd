"""docs/wire.md against the service: answers, headers, messages, frames, closes. For its tables see `test_docs.py`."""

import base64
import json
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

import containers
import execs
import openapi
import runner_face
import upgrades
import workloads
from conftest import Names, Registry
from dev.engine import Engine
from documents import TEXTS, section
from service import ROOT, Runner
from wire import Reply, Wire, compact, target

PAGE = "docs/wire.md"
ANSWERS: tuple[type[msgspec.Struct], ...] = (
    containers.Started,
    execs.Ran,
    workloads.Labels,
    workloads.Networks,
    workloads.ContainerIds,
)
STRUCTS = {each.__name__: each for each in ANSWERS}

Shape = tuple[str, tuple[str, ...]]
"""The type of a message, and its other keys in order."""


def shapes(text: str) -> set[Shape]:
    """The messages that a text names, such as `{"type":"gap","reason","message"}`; a value may follow a key."""
    found = re.findall(r'\{"type":"(\w+)"((?:,"\w+"(?::[A-Z]+)?)*)\}', text)
    return {(kind, tuple(re.findall(r'"(\w+)"', keys))) for kind, keys in found}


def table(name: str) -> dict[str, str]:
    """A table of messages: the first cell, and the second."""
    rows = re.findall(rf"<!-- {name}:.*?<!-- /{name} -->", TEXTS[PAGE], re.DOTALL)
    return dict(re.findall(r"^\| `(\{[^`]*\})` \| ([^|]*) \|", rows[0], re.MULTILINE))


MESSAGES, FRAMES = table("messages"), table("frames")
SSE, WEBSOCKET = shapes("".join(MESSAGES)), shapes("".join(FRAMES))


def shape(message: dict[str, Any]) -> Shape:
    kind, *keys = message
    assert kind == "type"
    return message["type"], tuple(keys)


# What the API document says, too.


def test_messages_and_frames_are_those_of_the_api_document() -> None:
    routes = {
        path: json.dumps(answers, ensure_ascii=False).replace('\\"', '"') for path, answers in openapi.SUCCESSES.items()
    }
    interactive = routes.pop(workloads.INTERACTIVE)
    assert shapes(interactive) == WEBSOCKET
    assert shapes("".join(routes.values())) == SSE


@pytest.mark.parametrize("route", workloads.ROUTES, ids=lambda route: route[1])
def test_the_success_of_a_route_is_the_documented_one(route: tuple[str, str, Any, Any, Any]) -> None:
    method, path = route[:2]
    text = section(PAGE, f"### `{method} {path}`").partition(f"<!-- /{openapi.operation_id(path)} -->\n\n")[2]
    success = openapi.SUCCESSES[path]
    if path == workloads.INTERACTIVE:
        assert text.startswith("A WebSocket")
        return
    assert text[:3] == ("204" if "204" in success else "200")
    schema = success.get("200", {}).get("content", {}).get(workloads.JSON, {}).get("schema", {})
    if "$ref" in schema:
        struct = STRUCTS[schema["$ref"].rpartition("/")[2]]
        documented = re.match(r"200 `\{([^}]*)\}`", text)
        assert documented is not None
        assert re.findall(r'"(\w+)"', documented[1]) == [each.encode_name for each in msgspec.structs.fields(struct)]


def test_the_headers_of_the_signature_are_those_that_are_read() -> None:
    named = {name.lower() for name in re.findall(r"^\| `(X-DR-[\w-]+)` \|", TEXTS[PAGE], re.MULTILINE)}
    source = (ROOT / "auth.py").read_text() + (ROOT / "admission.py").read_text()
    assert set(re.findall(r"b\"(x-dr-[\w-]+)\"", source)) == named


def closes(heading: str) -> set[int]:
    return {int(code) for code in re.findall(r"^\| (\d{4}) \|", section(PAGE, heading), re.MULTILINE)}


def test_the_close_codes_are_those_of_the_code() -> None:
    """1000 and 1009 are the protocol's own."""
    ours = {runner_face.INVALID_QUERY, runner_face.INTERNAL_ERROR, runner_face.SERVICE_RESTART}
    assert closes("## The interactive exec") == {1000, 1009, *ours}
    theirs = (upgrades.NORMAL, upgrades.PROTOCOL_ERROR, upgrades.POLICY_VIOLATION, upgrades.INTERNAL_ERROR)
    assert closes("### Upgraded streams") == {1009, upgrades.SERVICE_RESTART, *theirs}


# What the service really sends.


def test_the_frames_that_come(wire: Wire, box: str) -> None:
    seen = set()
    command = json.dumps(["sh", "-c", "cat; echo wrong >&2"])
    with wire.interactive(containerId=box, command=command) as socket:
        socket.connection.send(socket.frame(socket.TEXT, b"{"))
        socket.stdin(b"typed\n")
        socket.send({"type": "eof"}, {"type": "close"})
        seen = {shape(frame) for frame in socket}
    assert seen == shapes("".join(frame for frame, sender in FRAMES.items() if sender == "server"))
    assert socket.closed == (1000, "")


def test_the_frames_that_go(wire: Wire, box: str) -> None:
    """Each documented one has its effect; the documented keys are all that it needs."""
    values: dict[str, Any] = {"data": base64.b64encode(b"stty size; exit\n").decode(), "cols": 97, "rows": 31}
    going = shapes("".join(frame for frame, sender in FRAMES.items() if sender == "client"))
    resize, stdin = ({"type": kind, **{key: values[key] for key in keys}} for kind, keys in sorted(going) if keys)
    with wire.interactive(containerId=box, command="sh", tty=True) as socket:
        assert socket.next()["type"] == "ready"
        socket.send(resize, stdin)
        socket.until(b"31 97")
        assert [frame["exitCode"] for frame in socket if frame["type"] == "exit"] == [0]
    for kind, keys in going:
        if not keys:
            with wire.interactive(containerId=box, command=json.dumps(["cat"])) as socket:
                socket.send({"type": kind})
                assert [frame["exitCode"] for frame in socket if frame["type"] == "exit"] == [0]


def told(reply: Reply) -> Iterator[dict[str, Any]]:
    """The messages of an answer of server-sent events, whatever other lines there are."""
    rest = b""
    for piece in reply.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: "))


def test_the_messages_of_logs(wire: Wire, start: Callable[..., str]) -> None:
    box = start(cmd=["echo", "hello"])
    with wire.open("GET", target("/v1/containers/logs/sse", {"containerId": box})) as reply:
        seen = {shape(message) for message in told(reply)}
    assert seen == {each for each in SSE if each[0] in ("chunk", "end")}


@pytest.mark.parametrize(("kind", "headers"), [("event", {}), ("gap", {"Last-Event-ID": "of-another-service"})])
def test_the_messages_of_events(wire: Wire, box: str, kind: str, headers: dict[str, str]) -> None:
    filters = base64.b64encode(compact({"container": [box]})).decode()
    query = {"filters": filters, "since": "0"}
    with wire.open("GET", target("/v1/events/sse", query), headers=headers) as reply:
        message = next(message for message in told(reply) if message["type"] == kind)
    assert shape(message) in SSE


def test_the_message_of_an_error(engine: Engine, box: str) -> None:
    with Runner(engine.socket) as runner:
        wire = Wire(runner.url, runner.secret)
        with wire.open("GET", target("/v1/containers/logs/sse", {"containerId": box})) as reply:
            runner.process.send_signal(signal.SIGTERM)
            (message,) = told(reply)
    assert (message["code"], shape(message) in SSE) == ("shutting_down", True)


def test_the_messages_of_an_ensure(runner: Runner, registry: Registry, image: str, names: Names) -> None:
    reference = f"{registry.address}/{names()}"
    where = f"/images/{image}/tag?repo={reference}&tag=1"
    assert runner.request("POST", where).status == 201
    pushed = runner.request("POST", f"/images/{reference}/push?tag=1", headers={"X-Registry-Auth": "e30="})
    assert b'"error"' not in pushed.body
    assert runner.request("DELETE", f"/images/{reference}:1").status == 200
    body = compact({"image": f"{reference}:1"})
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    answer = runner.request("POST", "/v1/images/ensure", body, headers)
    lines = [line.removeprefix(b"data: ") for line in answer.body.splitlines() if line.startswith(b"data: ")]
    assert {shape(json.loads(line)) for line in lines} == {each for each in SSE if each[0] in ("progress", "end")}
