"""schemathesis against the running service: it does what the API document says, for what that allows and what not.

Every operation is asked with the edges of its parameters, with random ones, with wrong ones, with wrong methods and
with wrong signatures. It is the same each time. The engine is one of our own: a random id could be the beginning of
somebody's. What is generated is aimed at objects made for this, or at names that begin as nobody's do.
"""

import base64
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import settings
from requests.auth import AuthBase

import openapi
from client import body_hash, sign
from conftest import IMAGE, EngineDirect, Names, Registry
from dev import busybox
from dev.private_engine import PrivateEngine
from service import SECRET, Runner

EXAMPLES = 20
"""Random requests for each operation, beside the edges of its parameters."""
STARTED = "/v1/containers/start"
NOT_DECODED = ("validation_error", "invalid_json", "unsupported_media_type", "invalid_path", "bad_request")
SENT_TYPES = {"/v1/images/ensure": {"end", "progress", "error"}, "/v1/events/sse": {"event", "gap"}}
SENT_TYPES["/v1/containers/logs/sse"] = {"chunk", "end"}


class Signature(AuthBase):
    """Signs what is about to be sent."""

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        body = r.body or b""
        hashed = body_hash(body.encode() if isinstance(body, str) else body)
        r.headers.update(sign(SECRET, r.method or "", r.path_url, content_hash=hashed))
        return r


CHECKS = {
    # 426: the WebSocket's route, asked without an upgrade. 400: the engine refuses; what the runner does is below.
    "positive_data_acceptance": {"expected-statuses": ["2xx", "304", "400", "404", "409", "426"]},
    "negative_data_rejection": {"expected-statuses": ["400", "401", "404", "405", "409", "415", "426"]},
}
schema = schemathesis.openapi.from_dict(
    json.loads(openapi.document()),
    config=schemathesis.Config.from_dict(
        {"seed": 1, "checks": CHECKS, "generation": {"deterministic": True, "with-security-parameters": False}}
    ),
)
schema.auth.set_from_requests(Signature())


class Target:
    """The service, and what requests are aimed at."""

    def __init__(self, engine: PrivateEngine, registry: Registry, url: str) -> None:
        self.url = url
        self.direct = EngineDirect(engine.socket)
        self.session = requests.Session()
        self.names = Names()
        self.registry = registry.address
        self.box = self._box("sleep", "1000000")
        self.boxes = {
            "/v1/containers/stop": self._box("sh", "-c", "trap exit TERM; while true; do sleep 0.1; done"),
            "/v1/containers/remove": self._box("true"),
            "/v1/containers/logs/sse": self._box("echo", "hello"),  # One that has ended, so that its log does.
        }
        self._ask("POST", f"/containers/{self.boxes['/v1/containers/logs/sse']}/wait")
        self.volume = self._ask("POST", "/volumes/create", Name=self.names("volume"))["Name"]
        self.exec = self._ask("POST", f"/containers/{self.box}/exec", Cmd=["sleep", "1000000"], Tty=True)["Id"]
        self._ask("POST", f"/exec/{self.exec}/start", Detach=True, Tty=True)

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        answer = self.direct.request(method, path, json=body)
        assert answer.ok, answer.text
        return answer.json() if answer.content else None

    def _box(self, *cmd: str) -> str:
        host = {"NetworkMode": "none"}
        body = {"Image": IMAGE, "Cmd": cmd, "HostConfig": host, "Labels": self.names.labels}
        box: str = self._ask("POST", f"/containers/create?name={self.names()}", **body)["Id"]
        self._ask("POST", f"/containers/{box}/start")
        return box

    def aim(self, case: schemathesis.Case[Any]) -> None:
        """Have a request ask for what it may touch. What is wrong about it stays wrong."""
        given = case.query if case.method == "GET" else case.body
        if not isinstance(given, dict):
            return
        given = _with_whole_numbers(given)
        given.pop("", None)  # An unknown parameter without a name: schemathesis does not take it for one.
        hit = zlib.crc32(repr(given).encode()) % 2 == 0

        def put(name: str, ours: Any, otherwise: Any = None) -> None:
            if isinstance(given.get(name), str) and given[name]:
                given[name] = ours if hit else otherwise or self.names.prefix + given[name]

        put("containerId", self.boxes.get(case.path, self.box))
        put("volumeName", self.volume)
        put("execId", self.exec)
        put("payloadBase64", base64.b64encode(_tar()).decode(), given.get("payloadBase64"))
        put("path", "/tmp", given.get("path"))
        if case.path in (STARTED, "/v1/images/ensure"):
            elsewhere = f"{self.registry}/{given.get('image')}"
            put("image", elsewhere if given.get("platform") else IMAGE, elsewhere)
        if case.path == STARTED:
            self._aim_start(given, hit=hit)
            put("name", self.names.prefix + str(given.get("name")))
        if case.path == "/v1/exec/run" and isinstance(given.get("options"), dict):
            _give_time(given["options"])
        if case.path.endswith("/sse") and isinstance(given.get("since", ""), str):
            # Events that have happened already come at once; and the engine answers 500 to what is no time.
            given["since"] = "1"
        if case.method == "GET":
            case.query = given
        else:
            case.body = given

    def _aim_start(self, given: dict[str, Any], *, hit: bool) -> None:
        given.setdefault("image", f"{self.registry}/{self.names.prefix}" if given.get("platform") else IMAGE)
        if isinstance(given.setdefault("labels", {}), dict):
            given["labels"] = {**given["labels"], **self.names.labels}
        if isinstance(given.setdefault("networkMode", "none"), str):
            given["networkMode"] = "none"
        if hit and isinstance(given.setdefault("cmd", []), list):
            given["cmd"] = ["true", *given["cmd"]]
        for name, path in (("binds", "/tmp:/binds/"), ("anonymousVolumes", "/volumes/")):
            if isinstance(given.get(name), list):  # The engine answers 500 to a path that is not absolute.
                each = [path + str(at) if isinstance(one, str) else one for at, one in enumerate(given[name])]
                given[name] = each
        if given.get("privileged") is True:
            given["privileged"] = False  # Not every machine can.


def _with_whole_numbers(value: Any) -> Any:
    """JSON Schema takes 1.0 for an integer; the document says in words that it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _with_whole_numbers(each) for name, each in value.items()}
    return [_with_whole_numbers(each) for each in value] if isinstance(value, list) else value


def _give_time(options: dict[str, Any]) -> None:
    for name in ("timeoutMs", "idleTimeoutMs"):
        limit = options.get(name)
        if type(limit) is int and 0 < limit < 60_000:
            options[name] = 60_000


def _tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("file"))
    return packed.getvalue()


@pytest.fixture(scope="module")
def target(restartable_engine: PrivateEngine, registry: Registry) -> Iterator[Target]:
    restartable_engine.start()
    busybox.import_image(restartable_engine, IMAGE)
    environ = {"DOCKER_RUNNER_DEFAULT_IMAGE": IMAGE, "DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": "200"}
    with Runner(restartable_engine.socket, environ) as runner:
        target = Target(restartable_engine, registry, runner.url)
        yield target
        target.names.remove_all(target.direct)
        target.direct.request("DELETE", f"/images/{IMAGE}?force=1")


@schemathesis.check
def what_the_document_allows_is_decoded(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """Whatever comes of it: the runner does not say that a request is wrong which the document allows."""
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code >= 400:
        assert response.json()["error"]["code"] not in NOT_DECODED


@schemathesis.check
def messages_are_framed_as_the_document_says(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """Server-sent events: JSON, its type one of those that the document names."""
    if response.headers.get("content-type") == ["text/event-stream"]:
        for block in response.content.split(b"\n\n")[:-1]:
            assert re.fullmatch(rb"(data: \{[^\r\n]*\}|: ?[^\r\n]*)(\nid: [A-Za-z0-9_-]+)?", block)
            if block.startswith(b"data: "):
                assert json.loads(block[6:].split(b"\n")[0])["type"] in SENT_TYPES[case.path]


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
def test_the_service_does_what_the_document_says(case: schemathesis.Case[Any], target: Target) -> None:
    target.aim(case)
    # Events have no end, and after a `Last-Event-ID` there may be none.
    limit_s = 1 if case.path == "/v1/events/sse" else 20
    case.call_and_validate(base_url=target.url, session=target.session, timeout=limit_s)
