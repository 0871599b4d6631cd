"""The audit log: who asked for what, and what came of it, in lines that nobody can forge; and the ids of requests."""

import asyncio
import json
import os
import pty
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit import Asked, Audit, is_failure
from client import sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from errors import CODES, RunnerError
from scripted import OK, ScriptedEngine
from service import SECRET, Runner, read_to_end, signed_head, with_files
from sessions import session
from upgraded import socket_of, upgrade_headers, upgraded
from wire import Wire

OTHER = "another-secret-of-the-tests-0123456789"
JSON = {"Content-Type": "application/json"}
MADE = re.compile(r"[0-9a-f]{16}")


class Told:
    """What a runner has written to its standard output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = iter(range(1, 1_000_000))

    def fresh(self) -> str:
        """An id for a request."""
        return f"request-{next(self._numbers)}"

    def text(self) -> str:
        return self.path.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]

    def of(self, request_id: str) -> dict[str, Any]:
        """The one line about a request, as soon as it is there."""
        assert wait_until(lambda: f'"{request_id}"' in self.text(), 10), f"no line about {request_id}"
        (line,) = [line for line in self.lines() if line["request_id"] == request_id]
        return line


Started = Callable[..., Runner]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    path = tmp_path_factory.mktemp("audit") / "out"
    path.touch()
    return Told(path)


@pytest.fixture(scope="module")
def audited(engine: Engine, told: Told, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with a named key, under the default policy."""
    settings = {
        **with_files(tmp_path_factory.mktemp("secrets"), f"{SECRET}\nci:{OTHER}\n"),
        "DOCKER_RUNNER_POLICY": "workloads",
    }
    with told.path.open("ab") as out, Runner(engine.socket, settings, output=out.fileno()) as running:
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container."""
    return Containers(direct, names, image)()


def send(
    runner: Runner, told: Told, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """Send a request; the line about it."""
    request_id = told.fresh()
    data = None if body is None else json.dumps(body).encode()
    fields = {"X-Request-Id": request_id, **(JSON if body is not None else {}), **(headers or {})}
    answer = runner.request(method, target, data, fields)
    line = told.of(request_id)
    assert line.get("status") == answer.status
    assert line.get("bytes", 0) == len(answer.body)
    return line


def known(line: dict[str, Any], **fields: Any) -> None:
    """The line says this, and beside it only when, how long, how much, and from where."""
    meanwhile = ("time", "ms", "bytes", "client", "request_id")
    assert {name: value for name, value in line.items() if name not in meanwhile} == {
        "level": "info" if fields["decision"] == "allowed" else "warn",
        "logger": "docker_runner.audit",
        "message": f"{fields['decision']} {fields.get('operation', '')}".strip(),
        **fields,
    }


def test_behind_a_trusted_proxy_the_line_tells_who_asked_there(
    engine: Engine, box: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = Told(tmp_path_factory.mktemp("audit") / "behind")
    settings = {"DOCKER_RUNNER_TRUSTED_PROXIES": "127.0.0.1"}
    proxied = {"X-Forwarded-For": "203.0.113.9"}
    with told.path.open("wb") as out, Runner(engine.socket, settings, output=out.fileno()) as runner:
        assert runner.request("GET", "/_ping", headers=proxied).body == b"OK"
        for method, target, status in (
            ("POST", f"/containers/{box}/pause", 204),
            ("POST", f"/containers/{box}/unpause", 204),
            ("GET", "/nowhere", 404),
        ):
            line = send(runner, told, method, target, headers=proxied)
            assert (line["status"], line["client"].rpartition(":")[0] or line["client"]) == (status, "203.0.113.9")
        assert runner.request("GET", f"/containers/{box}/json", headers=proxied).status == 200


class TestWhatIsTold:
    def test_a_change(self, audited: Runner, told: Told, names: Names, image: str) -> None:
        name = names()
        config = {"Image": image, "Labels": names.labels}
        line = send(audited, told, "POST", f"/v1.41/containers/create?name={name}", config)
        known(line, decision="allowed", operation="ContainerCreate", object=name, status=201)
        assert re.fullmatch(r"127\.0\.0\.1:\d+", line["client"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(seconds=20)
        assert 0 < line["ms"] < 20_000

    @pytest.mark.parametrize(
        ("method", "target", "operation"),
        [
            ("POST", "/containers/{}/pause", "ContainerPause"),
            ("POST", "/v1.41/containers/{}/unpause", "ContainerUnpause"),
            ("POST", "/containers/{}/kill?signal=CONT", "ContainerKill"),
            ("PUT", "/containers/{}/archive?path=/nowhere", "PutContainerArchive"),
            ("DELETE", "/containers/{}", "ContainerDelete"),
            ("DELETE", "/images/{}", "ImageDelete"),
            ("DELETE", "/volumes/{}", "VolumeDelete"),
            ("POST", "/networks/{}/connect", "NetworkConnect"),
        ],
    )
    def test_a_change_by_what_its_path_names(
        self, audited: Runner, told: Told, box: str, method: str, target: str, operation: str
    ) -> None:
        line = send(audited, told, method, target.format(box), {} if "connect" in target else None)
        known(line, decision="allowed", operation=operation, object=box, status=line["status"])

    def test_an_image_with_slashes_in_its_name(self, audited: Runner, told: Told) -> None:
        line = send(audited, told, "DELETE", "/images/registry.test/a/b%3Ac")
        known(line, decision="allowed", operation="ImageDelete", object="registry.test/a/b:c", status=404)

    def test_the_image_of_a_pull(self, audited: Runner, told: Told) -> None:
        line = send(audited, told, "POST", "/images/create?fromImage=127.0.0.1:9/none&tag=x")
        known(line, decision="allowed", operation="ImageCreate", object="127.0.0.1:9/none", status=line["status"])

    def test_a_change_by_the_runner_face(self, audited: Runner, told: Told, names: Names, image: str) -> None:
        name = names()
        body = {"image": image, "name": name, "networkMode": "none", "labels": names.labels, "cmd": ["sleep", "60"]}
        known(
            send(audited, told, "POST", "/v1/containers/start", body),
            decision="allowed",
            operation="POST /v1/containers/start",
            operations=["ImageCreate", "ContainerCreate", "ContainerStart"],
            object=name,
            status=200,
        )
        known(
            send(audited, told, "POST", "/v1/containers/remove", {"containerId": name, "force": True}),
            decision="allowed",
            operation="POST /v1/containers/remove",
            operations=["ContainerDelete"],
            object=name,
            status=204,
        )

    def test_a_change_that_the_engine_refuses_is_no_refusal(self, audited: Runner, told: Told) -> None:
        line = send(audited, told, "POST", "/containers/no-such/start")
        known(line, decision="allowed", operation="ContainerStart", object="no-such", status=404)
        line = send(audited, told, "POST", "/v1/containers/stop", {"containerId": "no-such"})
        known(
            line,
            decision="allowed",
            operation="POST /v1/containers/stop",
            operations=["ContainerStop"],
            object="no-such",
            status=404,
            code="no_such_container",
        )

    def test_the_name_of_the_key(self, audited: Runner, told: Told) -> None:
        target = "/containers/no-such/start"
        line = send(audited, told, "POST", target, headers=sign(OTHER, "POST", target, key="ci"))
        assert line["key"] == "ci"

    def test_a_key_is_not_named_by_who_has_not_its_secret(self, audited: Runner, told: Told) -> None:
        line = send(audited, told, "POST", "/containers/no-such/start", headers={"X-DR-Key": "ci"})
        assert (line["decision"], line["code"], "key" in line) == ("refused", "invalid_signature", False)

    def test_what_reads_and_passes_is_not_told(self, audited: Runner, told: Told, box: str) -> None:
        before = len(told.lines())
        for target in ("/version", f"/containers/{box}/json", "/containers/no-such/json", "/v1/health", "/v1/ready"):
            audited.request("GET", target)
        audited.request("HEAD", "/_ping")
        audited.request("GET", "/v1/containers/inspect?containerId=no-such")
        audited.request("POST", "/v1/containers/touch", json.dumps({"containerId": box}).encode(), JSON)
        send(audited, told, "POST", "/containers/no-such/start")
        assert len(told.lines()) == before + 1

    @pytest.mark.parametrize(
        ("method", "target", "headers", "code", "asked"),
        [
            ("GET", "/version?token=x", {"X-DR-Nonce": ""}, "missing_headers", {"request": "GET /version"}),
            ("GET", "/version", {"X-DR-Signature": "x"}, "invalid_signature", {"request": "GET /version"}),
            ("GET", "/nowhere", {}, "not_found", {"request": "GET /nowhere"}),
            ("GET", "/v1/nowhere", {}, "not_found", {"request": "GET /v1/nowhere"}),
            ("POST", "/version", {}, "method_not_allowed", {"request": "POST /version"}),
            ("POST", "/session", {}, "policy_denied", {"operation": "Session", "rule": "operations"}),
            ("GET", "/v1/containers/inspect", {}, "validation_error", {"operation": "GET /v1/containers/inspect"}),
        ],
    )
    def test_a_refusal(
        self,
        audited: Runner,
        told: Told,
        method: str,
        target: str,
        headers: dict[str, str],
        code: str,
        asked: dict[str, str],
    ) -> None:
        line = send(audited, told, method, target, headers=headers)
        known(line, decision="refused", code=code, status=CODES[code].status, **asked)

    def test_a_refusal_by_a_rule_of_the_policy(self, audited: Runner, told: Told, names: Names, image: str) -> None:
        config = {"Image": image, "HostConfig": {"Privileged": True}}
        name = names()
        line = send(audited, told, "POST", f"/containers/create?name={name}", config)
        known(
            line,
            decision="refused",
            operation="ContainerCreate",
            object=name,
            status=403,
            code="policy_denied",
            rule="HostConfig.Privileged",
        )

    def test_what_is_no_request(self, audited: Runner, told: Told) -> None:
        request_id = told.fresh()
        audited.raw(f"GET /version?x HTTP/1.1\r\nX-Request-Id: {request_id}\r\n\r\n".encode())
        known(told.of(request_id), decision="refused", request="GET /version", code="bad_request", status=400)

    def test_bytes_that_are_no_request(self, audited: Runner, told: Told) -> None:
        found = re.search(rb"\r\nx-request-id: ([0-9a-f]{16})\r\n", audited.raw(b"\0"))
        assert found is not None
        known(told.of(found[1].decode()), decision="refused", code="bad_request", status=400)

    def test_a_stream_when_it_ends(self, audited: Runner, told: Told, box: str) -> None:
        config = {"Cmd": ["sh", "-c", "sleep 0.2; head -c 100000 /dev/zero"], "AttachStdout": True, "Tty": True}
        made = audited.request("POST", f"/containers/{box}/exec", json.dumps(config).encode(), JSON)
        execution = json.loads(made.body)["Id"]
        line = send(audited, told, "POST", f"/exec/{execution}/start", {"Detach": False, "Tty": True})
        known(line, decision="allowed", operation="ExecStart", object=execution, status=200)
        assert line["bytes"] == 100_000
        assert line["ms"] > 200

    def test_an_upgraded_stream_when_it_ends(self, audited: Runner, told: Told, box: str) -> None:
        request_id = told.fresh()
        target = f"/containers/{box}/attach?stream=1&stdout=1"

        async def run() -> None:
            async with upgraded(audited, target, fields={"X-Request-Id": request_id}):
                assert f'"{request_id}"' not in told.text()

        asyncio.run(run())
        known(told.of(request_id), decision="allowed", operation="ContainerAttach", object=box, status=101)

    def test_an_upgraded_stream_that_the_engine_refuses(self, audited: Runner, told: Told) -> None:
        request_id = told.fresh()

        async def run() -> None:
            fields = {"X-Request-Id": request_id}
            async with upgraded(audited, "/exec/no-such/start", '{"Detach":false}', status=404, fields=fields):
                pass

        asyncio.run(run())
        known(told.of(request_id), decision="allowed", operation="ExecStart", object="no-such", status=404)

    def test_an_interactive_exec(self, audited: Runner, told: Told, box: str) -> None:
        before = len(told.lines())

        async def run() -> None:
            async with session(audited, box, "true") as opened:
                assert (await opened.to_end()).code == 0

        asyncio.run(run())
        assert wait_until(lambda: len(told.lines()) > before, 10)
        known(
            told.lines()[-1],
            decision="allowed",
            operation="GET /v1/exec/interactive/ws",
            operations=["ContainerExec", "ExecStart"],
            object=box,
            status=101,
        )

    def test_a_caller_that_left_before_the_answer(self, audited: Runner, told: Told, box: str) -> None:
        request_id = told.fresh()
        body = json.dumps({"containerId": box, "command": "sleep 60"}).encode()
        with audited.connect() as sock:
            fields = (f"X-Request-Id: {request_id}", "Content-Type: application/json")
            sock.sendall(signed_head("POST", "/v1/exec/run", body, *fields) + body)
            assert wait_until(lambda: "sleep 60" in str(audited.request("GET", f"/containers/{box}/top").body), 10)
        line = told.of(request_id)
        assert (line["decision"], line["operation"], "status" in line) == ("allowed", "POST /v1/exec/run", False)


class TestWhatIsNotTold:
    def test_secrets(self, audited: Runner, told: Told, image: str, names: Names) -> None:
        mark = "hunter2hunter2"
        headers = {"X-Registry-Auth": mark, "Authorization": mark, "Cookie": mark, "X-Other": mark}
        config = {"Image": image, "Env": [f"TOKEN={mark}"], "Labels": names.labels}
        signed = sign(SECRET, "POST", f"/containers/create?name={names()}&token={mark}", json.dumps(config).encode())
        send(audited, told, "POST", f"/containers/create?name={names()}&token={mark}", config, headers)
        send(audited, told, "POST", f"/images/create?fromImage=127.0.0.1:9/x&fromSrc={mark}", None, headers)
        send(audited, told, "POST", f"/nowhere?{mark}", config, headers)
        send(audited, told, "POST", "/auth", {"username": "x", "password": mark, "serveraddress": "127.0.0.1:9"})
        send(audited, told, "POST", "/v1/images/ensure", {"image": "127.0.0.1:9/x", "auth": {"password": mark}})
        send(audited, told, "POST", "/v1/exec/run", {"containerId": "x", "command": mark, "options": {"env": [mark]}})
        send(audited, told, "POST", f"/version?{mark}", None, {**signed, **headers})
        said = told.text()
        assert not any(secret in said for secret in (mark, SECRET, OTHER, signed["X-DR-Signature"]))

    def test_off_tells_nothing(self, engine: Engine, tmp_path: Path) -> None:
        with (tmp_path / "out").open("ab") as out:
            with Runner(engine.socket, {"DOCKER_RUNNER_AUDIT": "off"}, output=out.fileno()) as runner:
                runner.request("POST", "/containers/no-such/start")
                runner.request("GET", "/nowhere")
            assert (tmp_path / "out").read_bytes() == b""


FORGED = '\n{"time":"2026-01-01T00:00:00.000Z","decision":"allowed"}\r\x1b[2K\x07\x9b31m\u2028\u202e" status=200'


class TestForgery:
    def test_a_name_ends_no_line(self, audited: Runner, told: Told) -> None:
        before = len(told.lines())
        line = send(audited, told, "POST", "/v1/containers/stop", {"containerId": FORGED})
        assert line["object"] == repr(FORGED)[1:-1]
        line = send(audited, told, "POST", "/containers/create?name=%0a%7b%7d%1b%5b31m", {"Image": "x"})
        assert line["object"] == "{}\\x1b[31m"
        assert len(told.lines()) == before + 2
        assert told.text().isprintable() or set(told.text()) <= {"\n", *map(chr, range(32, 127))}

    def test_a_long_name_is_cut(self, audited: Runner, told: Told) -> None:
        line = send(audited, told, "POST", "/v1/containers/stop", {"containerId": "x" * 100_000})
        assert line["object"] == "x" * 256 + "..."

    @given(texts=st.lists(st.text() | st.sampled_from([FORGED, "a b=c", '"', "\\n", "\x7f"]), min_size=5, max_size=5))
    def test_any_text_is_one_line_and_one_value(self, texts: list[str]) -> None:
        name, key, client, rule, path = texts
        error = RunnerError("policy_denied", "x", details={"rule": rule})
        for form in ("json", "text"):
            written: list[bytes] = []
            audit = Audit(form, written.append, lambda: 0.0)
            target = path.encode("utf-8", "replace")
            for asked in (Asked("ContainerStop", True, lambda: name), None):
                audit.record(
                    request_id="i",
                    client=client,
                    method="GET",
                    target=target,
                    asked=asked,
                    error=error,
                    key=key,
                    status=403,
                    took_s=0.001,
                )
            for line in written:
                text = line.decode()
                assert text.endswith("\n")
                assert text[:-1].isprintable()
                assert len(line) < 9 * 1024
                if form == "json":
                    assert msgspec.json.decode(line)["decision"] == "refused"
                else:
                    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
                    found = re.findall(r"(\S+?)=", bare)
                    assert [field for field in found if field == "status"] == ["status"]
                    assert set(found) <= {"request", "object", "status", "code", "rule", "ms", "key", "client"}


class TestForms:
    def test_text_on_a_terminal(self, engine: Engine) -> None:
        ours, theirs = pty.openpty()
        try:
            with Runner(engine.socket, output=theirs) as runner:
                runner.request("POST", "/containers/no-such/start", headers={"X-Request-Id": "me"})
                line = os.read(ours, 65536).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert re.fullmatch(
            r"\S+Z info  docker_runner\.audit: \[me\] allowed ContainerStart object=no-such status=404 ms=\d+\.\d+"
            r" bytes=\d+ client=127\.0\.0\.1:\d+\r\n",
            line,
        )

    def test_a_reader_that_is_gone_stops_nobody(self, engine: Engine) -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        try:
            with Runner(engine.socket, output=theirs) as runner:
                for _ in range(3):
                    assert runner.request("POST", "/containers/no-such/start").status == 404
                runner.wait_for_log("the audit log cannot be written: [Errno 32] Broken pipe")
                assert sum("audit log" in line for line in runner.log) == 1
        finally:
            os.close(theirs)

    def test_a_full_pipe_that_does_not_block_loses_nothing(self, engine: Engine) -> None:
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        try:
            with Runner(engine.socket, output=theirs) as runner:
                filled = 0
                while True:
                    try:
                        filled += os.write(theirs, b"\n" * 4096)
                    except BlockingIOError:
                        break
                with runner.connect() as sock:
                    sock.sendall(signed_head("POST", "/containers/no-such/start", b"", "Connection: close"))
                    said = b""
                    while b"ContainerStart" not in said:
                        said += os.read(ours, 4096)
                    assert read_to_end(sock).startswith(b"HTTP/1.1 404 ")
            assert json.loads(said.strip())["object"] == "no-such"
        finally:
            os.close(ours)
            os.close(theirs)


def test_every_code_is_a_refusal_or_a_failure() -> None:
    """Codes that say that the engine failed at something allowed; every other is a refusal, and told as one."""
    failures = {code for code in CODES if is_failure(code)}
    refusals = set(CODES) - failures
    assert {"policy_denied", "not_found", "ambiguous_body", "too_many_requests", "shutting_down"} <= refusals
    assert {"start_failed", "no_such_image", "conflict", "engine_cut_body", "exec_timeout"} <= failures


class TestRequestIds:
    def ids(self, headers: Any) -> list[str]:
        return [value for name, value in headers if name.lower() == "x-request-id"]

    @pytest.mark.parametrize("given_id", ["a", "Trace-1.2_3~x:y/z+=@", "x" * 128])
    def test_the_callers_comes_back(self, runner: Runner, given_id: str) -> None:
        for target in ("/version", "/nowhere", "/v1/health", "/v1/nowhere"):
            answer = runner.request("GET", target, headers={"X-Request-Id": given_id})
            assert self.ids(answer.headers) == [given_id]

    @pytest.mark.parametrize("given_id", ["", "x" * 129, "a b", "a\tb", 'a"b', "<a>", "a\\b", "a;b", "\xe9", "a,b"])
    def test_one_that_is_odd_is_replaced(self, runner: Runner, given_id: str) -> None:
        (made,) = self.ids(runner.request("GET", "/version", headers={"X-Request-Id": given_id}).headers)
        assert MADE.fullmatch(made)

    def test_two_are_none(self, runner: Runner) -> None:
        answer = runner.raw(
            signed_head("GET", "/version", b"", "X-Request-Id: a", "X-Request-Id: a", "Connection: close")
        )
        found = re.findall(rb"(?i)x-request-id: (.*)\r\n", answer)
        assert len(found) == 1
        assert MADE.fullmatch(found[0].decode())

    def test_each_request_gets_its_own(self, runner: Runner) -> None:
        made = {self.ids(runner.request("GET", "/version").headers)[0] for _ in range(20)}
        assert len(made) == 20

    def test_what_is_no_request_gets_one(self, runner: Runner) -> None:
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{16}\r\n", runner.raw(b"\x16\x03\x01"))
        assert b"\r\nx-request-id: mine\r\n" in runner.raw(b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n")

    def test_upgrades_and_their_refusals(self, runner: Runner, box: str) -> None:
        async def run() -> None:
            target = f"/containers/{box}/attach?stream=1&stdin=1"
            headers = {**upgrade_headers(target), "X-Request-Id": "mine"}
            async with socket_of(runner, target, headers) as opened:
                assert opened.socket.response is not None
                assert opened.socket.response.headers.get_all("X-Request-Id") == ["mine"]

        asyncio.run(run())
        reply, _ = Wire(runner.url, SECRET).upgrade("/nowhere", {"X-Request-Id": "mine"})
        assert (reply.status, reply.header("x-request-id")) == (404, "mine")

    def test_only_the_callers_goes_on_to_the_engine(self) -> None:
        with ScriptedEngine(lambda peer: peer.answer(OK)) as scripted, Runner(scripted.path) as runner:
            runner.request("GET", "/version")
            assert b"request-id" not in scripted.requests[-1].lower()
            runner.request("GET", "/version", headers={"X-Request-Id": "mine"})
            assert b"\r\nx-request-id: mine\r\n" in scripted.requests[-1]

    def test_the_log_names_them(self, runner: Runner) -> None:
        runner.request("GET", "/nowhere", headers={"X-Request-Id": "in-the-log"})
        line = runner.wait_for_line(request_id="in-the-log")
        assert line["logger"] == "docker_runner.admission"
        assert line["message"].startswith("GET '/nowhere' from 127.0.0.1:")
        runner.raw(b"GET / HTTP/1.1\r\nX-Request-Id: in-the-log-too\r\n\r\n")
        assert runner.wait_for_line(request_id="in-the-log-too")["message"].startswith("127.0.0.1:")
