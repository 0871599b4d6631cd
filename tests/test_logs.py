"""Both logs of the real service: one form, one id, levels, streams that fail, and what neither ever shows."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import logs
import settings
from both_logs import NAMED, Watched, ask, keys_and_scopes, port_of, serving
from bridged import Bridge
from client import __version__, sign
from conftest import free_port
from dev import wait_until
from dev.engine import Engine
from service import ROOT, SECRET, read_to_end
from sessions import session_target

HEAD = ["time", "level", "logger", "message"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return keys_and_scopes(tmp_path_factory.mktemp("files"))


# The form.


def test_every_line_of_both_is_json_with_the_same_head(engine: Engine, files: dict[str, str]) -> None:
    with serving(engine.socket, {**files, "DOCKER_RUNNER_LOG_LEVEL": "trace"}) as watched:
        port = port_of(watched)
        ask(port, "POST", "/containers/no-such/start", {"X-Request-Id": "change"})
        ask(port, "GET", "/nowhere", {"X-Request-Id": "refusal"})
        watched.err.wait(logger="docker_runner.engine")
        watched.stop()
        lines = [*watched.out.lines, *watched.err.lines]
    assert all(list(line)[:4] == HEAD for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
    assert all(list(line)[4] == "request_id" for line in lines if "request_id" in line)
    assert {line["logger"].partition(".")[0] for line in lines} == {"docker_runner", "uvicorn"}
    assert [line["request_id"] for line in watched.out.lines] == ["change", "refusal"]
    assert [line["level"] for line in watched.out.lines] == ["info", "warn"]
    told = watched.err.find(request_id="refusal")
    assert told is not None
    assert told["logger"] == "docker_runner.admission"
    assert watched.err.find(request_id="change") is None


@pytest.mark.parametrize("terminals", [("out", "err"), ("out",), ("err",), ()])
def test_each_stream_goes_by_its_own_terminal(engine: Engine, terminals: tuple[str, ...]) -> None:
    with serving(engine.socket, terminals=terminals) as watched:
        ask(port_of(watched), "POST", "/containers/no-such/start")
        watched.out.wait_for("ContainerStart")
        for name, stream in (("out", watched.out), ("err", watched.err)):
            first = stream.text.split("\n")[0]
            assert (re.match(r"\S+Z info  [\w.]+: ", first) is not None) == (name in terminals), first
            assert first.startswith("{") == (name not in terminals), first


@pytest.mark.parametrize(
    ("given", "out", "err"),
    [
        ({"LOG_FORMAT": "text"}, "2", "2"),
        ({"LOG_FORMAT": "json"}, "{", "{"),
        ({"AUDIT": "text"}, "2", "{"),
        ({"LOG_FORMAT": "text", "AUDIT": "json"}, "{", "2"),
    ],
)
def test_settings_go_before_terminals(engine: Engine, given: dict[str, str], out: str, err: str) -> None:
    terminals = ("out", "err") if given.get("LOG_FORMAT") == "json" else ()
    named = {f"DOCKER_RUNNER_{name}": value for name, value in given.items()}
    with serving(engine.socket, named, terminals=terminals) as watched:
        ask(port_of(watched), "POST", "/containers/no-such/start")
        watched.out.wait_for("ContainerStart")
        assert (watched.out.text[0], watched.err.text[0]) == (out, err)


@pytest.mark.parametrize("level", list(logs.LEVELS))
def test_stderr_tells_what_the_level_says_and_the_audit_log_all(tmp_path: Path, level: str) -> None:
    """Of what goes on here there is a line of each level from info to error; there is no engine."""
    port = free_port()
    environ = {
        "DOCKER_RUNNER_LOG_LEVEL": level,
        "DOCKER_RUNNER_PORT": str(port),
        "DOCKER_RUNNER_SHARED_SECRET": "short",
        "DOCKER_RUNNER_AUDIT": "json",
    }

    def refused() -> bool:
        try:
            return ask(port, "GET", "/nowhere", secret="short").status == 404
        except OSError:
            return False

    with serving(str(tmp_path / "none"), environ) as watched:
        assert wait_until(refused, 20)
        watched.out.wait(decision="refused")
        if logs.LEVELS[level] <= logs.LEVELS["error"]:
            watched.err.wait(level="error")
        watched.stop()
        told = {line["level"] for line in watched.err.lines}
    expected = {name for name in ("info", "warn", "error") if logs.LEVELS[name] >= logs.LEVELS[level]}
    assert told - {"trace", "debug"} == expected
    assert logs.LEVELS[level] <= min((logs.LEVELS[name] for name in told), default=50)


def test_one_id_from_the_tool_to_both_logs(engine: Engine, tmp_path: Path) -> None:
    with serving(engine.socket, {"DOCKER_RUNNER_POLICY": "workloads"}) as watched:
        with Bridge(f"http://127.0.0.1:{port_of(watched)}", f"unix://{tmp_path}/b") as bridge:
            assert bridge.ask(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n").status == 404
            assert watched.out.wait(request_id="mine")["code"] == "not_found"
            assert watched.err.wait(request_id="mine")["logger"] == "docker_runner.admission"
            watched.stop()
            for given_id in ("X-Request-Id: lost\r\n", ""):
                request = f"GET /version HTTP/1.1\r\nHost: x\r\n{given_id}\r\n"
                assert bridge.ask(request.encode()).status == 503
            bridge.stop()
        lost = [json.loads(line) for line in bridge.log if "GET /version" in line]
        assert [list(line)[:5] for line in lost] == [[*HEAD, "request_id"]] * 2
        assert (lost[0]["request_id"], lost[0]["level"], lost[0]["logger"]) == ("lost", "warn", "docker_runner.bridge")
        assert re.fullmatch(r"[0-9a-f]{16}", lost[1]["request_id"])


def test_what_the_server_refuses_is_told_once(tmp_path: Path) -> None:
    with serving(str(tmp_path / "none")) as watched:
        with socket.create_connection(("127.0.0.1", port_of(watched)), timeout=10) as sock:
            sock.sendall(b"GET /version HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n")
            assert read_to_end(sock).startswith(b"HTTP/1.1 400 ")
        watched.stop()
        assert [line["request_id"] for line in watched.err.lines if "refused" in line["message"]] == ["mine"]


def test_the_id_that_a_bridge_gives_is_the_runners(engine: Engine, tmp_path: Path) -> None:
    with serving(engine.socket) as watched:
        with Bridge(f"http://127.0.0.1:{port_of(watched)}", f"unix://{tmp_path}/b") as bridge:
            bridge.ask(b"POST /containers/no-such/start HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert re.fullmatch(r"[0-9a-f]{16}", watched.out.wait(operation="ContainerStart")["request_id"])


def test_the_bridge_logs_in_the_same_form(tmp_path: Path) -> None:
    arguments = ["bridge", "--url", "http://127.0.0.1:9", "--listen", f"unix://{tmp_path}/b"]
    with Watched(arguments, {}) as watched:
        line = watched.err.wait(logger="docker_runner")
        assert line["message"] == f"bridge listens on unix://{tmp_path}/b, for the runner at http://127.0.0.1:9"
        assert (line["version"], line["key"]) == (__version__, "(unnamed)")
    with Watched(arguments, {}, terminals=("err",)) as watched:
        watched.err.wait_for(r"^\S+Z info  docker_runner: bridge listens on \S+, for the runner at \S+ version=")


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["serve"], {"DOCKER_RUNNER_PORT": "x"}, "DOCKER_RUNNER_PORT: must be a whole number"),
        (["bridge", "--url", "x", "--listen", "unix:///x"], {}, "--url: must be http"),
    ],
)
def test_what_does_not_start_says_so_in_the_form_that_was_asked_for(
    arguments: list[str], environ: dict[str, str], said: str
) -> None:
    for form in ("json", "auto"):
        with Watched(arguments, {**environ, "DOCKER_RUNNER_LOG_FORMAT": form}) as watched:
            assert watched.process.wait(20) in (1, 2)
            watched.err.wait_for(said)
            if form == "json":
                (line,) = watched.err.lines
                assert (line["level"], line["message"].startswith(said)) == ("fatal", True)
            else:
                assert watched.err.text.startswith(f"docker-runner: {said}")


# Streams that fail.


@pytest.mark.parametrize("closing", ["2>&-", ">&-", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_a_log_that_cannot_be_written_stops_nobody(engine: Engine, closing: str) -> None:
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    environ = {
        **kept,
        "DOCKER_RUNNER_ENV": "production",
        "DOCKER_RUNNER_SHARED_SECRET": SECRET,
        "DOCKER_RUNNER_HOST": "127.0.0.1",
        "DOCKER_RUNNER_PORT": str(port),
        "DOCKER_SOCKET": engine.socket,
    }
    command = ["bash", "-c", f"exec {sys.executable} {ROOT}/runner.py serve {closing}"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def served() -> bool:
        try:
            return ask(port, "POST", "/containers/no-such/start").status == 404
        except OSError:
            return False

    try:
        assert wait_until(served, 20)
        assert served()
    finally:
        process.terminate()
        assert process.wait(20) == 0


# What neither shows.


def both(watched: Watched) -> str:
    return (watched.out.data + watched.err.data).decode()


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secret_at_any_level_nor_on_failures(engine: Engine, tmp_path: Path, form: str) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"{SECRET}\nci:{NAMED}\n")
    hidden = ["hunter2hunter2", SECRET, NAMED]
    (mark, *_) = hidden
    environ = {
        "DOCKER_RUNNER_SHARED_SECRET": "",
        "DOCKER_RUNNER_SHARED_SECRET_FILE": str(file),
        "DOCKER_RUNNER_LOG_LEVEL": "trace",
        "DOCKER_RUNNER_LOG_FORMAT": form,
        "DOCKER_RUNNER_POLICY": "everything",
        "SOMETHING_ELSE": mark,
    }
    with serving(engine.socket, environ) as watched:
        port = port_of(watched)
        carried = {"X-Registry-Auth": mark, "Authorization": mark, "Cookie": mark}
        for method, target, body in (
            ("GET", f"/version?token={mark}", b""),
            ("GET", f"/nowhere?{mark}", b""),
            ("POST", f"/images/create?fromImage=127.0.0.1:9/x&fromSrc={mark}", b""),
            ("POST", "/auth", json.dumps({"username": "x", "password": mark, "serveraddress": "127.0.0.1:9"}).encode()),
            ("POST", "/v1/images/ensure", json.dumps({"image": "127.0.0.1:9/x", "auth": {"password": mark}}).encode()),
            ("POST", "/v1/exec/run", json.dumps({"containerId": "x", "command": mark, "options": mark}).encode()),
            ("POST", "/v1/exec/run", f'{{"containerId": "{mark}'.encode()),
        ):
            signed = sign(SECRET, method, target, body)
            hidden.append(signed["X-DR-Signature"])
            json_body = {"Content-Type": "application/json"} if body else {}
            first, again = (ask(port, method, target, {**signed, **json_body, **carried}, body) for _ in range(2))
            assert again.status == 401 or b'"retryable":true' in first.body
        target = session_target("no-such", mark, env=json.dumps({"X": mark}))
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        signed = sign(SECRET, "GET", target)
        hidden.append(signed["X-DR-Signature"])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", target, headers={**signed, **upgrade})
        assert connection.getresponse().status == 101
        connection.close()
        for wrong in (f"a:{NAMED}\nb:{NAMED}\n", f"{SECRET}\x07\n", "\n", None):
            file.unlink() if wrong is None else file.write_text(wrong)
            said = watched.err.text.count("kept the old secrets")
            watched.reload()
            assert wait_until(lambda said=said: watched.err.text.count("kept the old secrets") > said, 20)  # type: ignore[misc]
        file.write_text(f"{NAMED}\nci:{SECRET}\n")
        watched.reload()
        watched.err.wait_for("read the secrets again: 2 accepted")
        watched.stop()
        said_in_all = both(watched)
    for secret in hidden:
        assert secret not in said_in_all


def test_no_secret_at_failures_of_the_start(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    for wrong in (f"a:{NAMED}\nb:{NAMED}\n", f"{SECRET}\x07\n"):
        file.write_text(wrong)
        for form in ("json", "text"):
            environ = {
                "DOCKER_RUNNER_SHARED_SECRET": "",
                "DOCKER_RUNNER_SHARED_SECRET_FILE": str(file),
                "DOCKER_RUNNER_LOG_FORMAT": form,
            }
            with Watched(["serve"], environ) as watched:
                assert watched.process.wait(20) == 1
                watched.err.wait_for("holds")
                assert not any(secret in both(watched) for secret in (SECRET, NAMED))


def test_settings_as_text_hold_no_secret(files: dict[str, str]) -> None:
    read = settings.read_settings(files)
    assert len(read.keyring.secrets) == 3
    for text in (repr(read), str(read), repr(read.keyring), f"{read.keyring}", repr([read.keyring])):
        assert not any(secret in text for secret in (SECRET, NAMED))
    assert repr(read.keyring) == "Keyring(3 of [None, 'ci'])"


def test_a_url_with_a_password_is_refused_before_it_is_logged() -> None:
    for user in ("me:hunter2", ":hunter2"):
        arguments = ["bridge", "--url", f"http://{user}@127.0.0.1:9", "--listen", "unix:///nowhere/x"]
        with Watched(arguments, {}) as watched:
            assert watched.process.wait(20) == 2
            watched.err.wait_for("cannot hold a user")
            assert "hunter2" not in both(watched)
