"""The engine face on Podman: streams; see the file of this name above."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlencode

import pytest
import test_engine_face_streams as docker
from test_engine_face_streams import *

from comparison import JSON, TWIN, Both, Containers, Seen, compares, http_chunks, shape
from conftest import EngineDirect, Names
from on_podman.differences import instead_of
from service import Runner, signed_head

PATIENCE_S = 0.5
"""How long is waited for what does not come."""


@instead_of(docker.TestLogs.test_logs_of_a_terminal_are_raw, "logs-of-terminals")
@compares("ContainerLogs")
@pytest.mark.parametrize(
    ("query", "end"),
    [
        ("stdout=1&stderr=1", b"err\r\nno newline"),
        ("stdout=1&timestamps=1&tail=1", b"err\rno newline\n"),
        ("stdout=1&follow=1", b"err\r\nno newline"),
    ],
)
def test_logs_of_a_terminal_are_raw(both: Both, spoken_on_terminal: str, query: str, end: bytes) -> None:
    seen = both.same("GET", f"/containers/{spoken_on_terminal}/logs?{query}")
    assert seen.body.endswith(end)
    assert b"\0" not in seen.body


@instead_of(docker.TestStats.test_one_sample_has_the_engines_shape, "slashes")
@compares("ContainerStats")
@pytest.mark.parametrize("query", ["stream=false", "stream=false&one-shot=true"])
def test_one_sample_has_the_engines_shape(both: Both, running: str, query: str) -> None:
    target = f"/containers/{running}/stats?{query}"
    seen = both.same("GET", target, view=lambda seen: (seen.status, seen.header("content-type"), shape(seen.json)))
    assert seen.json["name"] == running


@instead_of(docker.TestStats.test_a_stream_of_samples_leaves_in_whole_lines, "slashes")
def test_a_stream_of_samples_leaves_in_whole_lines(runner: Runner, running: str) -> None:
    chunks = http_chunks(runner, "GET", f"/containers/{running}/stats")
    for _ in range(2):
        chunk = next(chunks)
        assert chunk.endswith(b"\n")
        assert {json.loads(line)["name"] for line in chunk.splitlines()} == {running}
    chunks.close()


@instead_of(docker.TestEvents.test_past_events_are_relayed_byte_for_byte, "event-bounds")
@compares("SystemEvents")
def test_past_events_are_relayed_byte_for_byte(both: Both, containers: Containers, names: Names) -> None:
    label = {"burst": names("label")}
    since = time.time()
    name = containers("true", Labels={**names.labels, **label})
    containers.do("POST", f"/containers/{name}/wait?condition=not-running", 200)
    filters = json.dumps({"label": [f"{key}={value}" for key, value in label.items()]})
    query = urlencode({"since": f"{since - 1:.9f}", "stream": "false", "filters": filters})
    lines = both.same("GET", f"/v1.41/events?{query}").body.splitlines()
    assert {"create", "start", "die"} <= {json.loads(line)["Action"] for line in lines}
    cut = both.engine("GET", f"/v1.41/events?{query}&until={time.time():.9f}").body.splitlines()
    assert len(cut) < len(lines)


@instead_of(docker.TestEvents.test_a_bad_parameter_relays_the_engines_error, "event-bounds")
@compares("SystemEvents")
@pytest.mark.parametrize(
    ("query", "status"), [("filters=nonsense", 400), ("since=nonsense&until=1", 200), ("since=5&until=1", 200)]
)
def test_a_bad_parameter_relays_the_engines_error(both: Both, query: str, status: int) -> None:
    seen = both.same("GET", f"/events?{query}")
    assert (seen.status, seen.body) == (status, b"")


@instead_of(docker.TestExec.test_create_refused_by_the_engine_relays_its_error, "conflicts")
@compares("ContainerExec")
def test_create_refused_by_the_engine_relays_its_error(both: Both, running: str, spoken: str) -> None:
    assert both.same("POST", "/containers/no-such/exec", b'{"Cmd":["true"]}', JSON).status == 404
    seen = both.same("POST", f"/containers/{spoken}/exec", b'{"Cmd":["true"]}', JSON)
    assert (seen.status, seen.json["cause"]) == (500, "container state improper")
    for body in (b'{"Cmd":', b"{}"):
        assert both.same("POST", f"/containers/{running}/exec", body, JSON).status in (400, 500)


@instead_of(docker.TestExec.test_start_detached_relays_200_and_a_second_start_the_refusal, "exec")
@compares("ExecStart")
def test_start_detached_relays_200_and_a_second_start_the_refusal(
    both: Both, containers: Containers, running: str
) -> None:
    pair = (containers.exec(running, "sleep", "1d"), containers.exec(running, "sleep", "1d"))
    assert both.twins("POST", f"/exec/{TWIN}/start", pair, b'{"Detach":true}', JSON).status == 200
    seen = both.same("POST", f"/exec/{pair[1]}/start", docker.START, JSON)
    assert (seen.status, seen.json["cause"]) == (500, "exec session state improper")


@instead_of(docker.TestExec.test_start_of_a_missing_program_relays_what_the_engine_says, "exec-missing")
@compares("ExecStart")
def test_start_of_a_missing_program_relays_what_the_engine_says(
    both: Both, containers: Containers, running: str
) -> None:
    def first_message(seen: Seen) -> object:
        return seen.status, seen.headers, seen.body[: 8 + int.from_bytes(seen.body[4:8], "big")]

    pair = (containers.exec(running, "/no/such"), containers.exec(running, "/no/such"))
    seen = both.twins("POST", f"/exec/{TWIN}/start", pair, docker.START, JSON, view=first_message)
    assert seen.body[0] == 2
    assert b"no such file" in seen.body


def both_say(runner: Runner, target: str, is_all: Callable[[bytes], bool]) -> None:
    """Engine and runner answer an attach with all that was said, and then the answer does not end."""
    engine = socket.socket(socket.AF_UNIX)
    engine.connect(runner.engine_socket)
    plain = f"POST {target} HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n\r\n".encode()
    for sock, request in (
        (engine, plain),
        (runner.connect(), signed_head("POST", target, b"", "Content-Length: 0")),
    ):
        with sock:
            sock.settimeout(20)
            sock.sendall(request)
            response = http.client.HTTPResponse(sock, method="POST")
            response.begin()
            assert (response.status, response.headers["content-type"]) == (200, "application/vnd.docker.raw-stream")
            said = b""
            while not is_all(said):
                said += response.read1()
            sock.settimeout(PATIENCE_S)
            with pytest.raises(TimeoutError):
                response.read1(1)


@instead_of(docker.TestAttach.test_what_was_said_is_multiplexed, "attach-logs")
def test_what_was_said_is_framed_wrongly_and_the_stream_goes_on(runner: Runner, spoken: str) -> None:
    """What Podman gives goes to the caller as it is: the sizes leave out the newlines."""
    out = [b"\x01\0\0\0\0\0\0\x05out %d\n" % number for number in (1, 2, 3)]
    err = [b"\x02\0\0\0\0\0\0\x05err %d\n" % number for number in (1, 2, 3)]
    expected = b"".join([*out, b"\x01\0\0\0\0\0\0\x0ano newline", *err])
    target = f"/v1.41/containers/{spoken}/attach?logs=1&stdout=1&stderr=1"
    both_say(runner, target, lambda said: sorted(said) == sorted(expected))


@instead_of(docker.TestAttach.test_what_was_said_on_a_terminal_is_raw, "attach-logs")
def test_what_was_said_on_a_terminal_is_raw_and_the_stream_goes_on(runner: Runner, spoken_on_terminal: str) -> None:
    target = f"/containers/{spoken_on_terminal}/attach?logs=1&stdout=1&stderr=1"
    both_say(runner, target, lambda said: said == b"out\r\nerr\r\nno newline")


@instead_of(docker.TestAttach.test_a_paused_container_relays_409, "conflicts")
@compares("ContainerAttach")
def test_a_paused_container_relays_500(both: Both, containers: Containers) -> None:
    name = containers()
    containers.do("POST", f"/containers/{name}/pause", 204)
    seen = both.same("POST", f"/containers/{name}/attach?stream=1&stdout=1")
    assert (seen.status, seen.json["cause"]) == (500, "container state improper")
    containers.do("POST", f"/containers/{name}/unpause", 204)


@instead_of(docker.TestOutputOnly.test_bytes_that_come_after_the_answer_began_end_the_connection, "attach-stdin")
def test_bytes_that_come_after_the_answer_began_end_the_connection(
    runner: Runner, direct: EngineDirect, containers: Containers
) -> None:
    name = containers("cat", OpenStdin=True)
    target = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1"
    with runner.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(signed_head("POST", target, b"", "Content-Length: 0"))
        assert stream.readline().startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"smuggled\n")
        rest = docker.read_to_reset(sock)
    assert not rest.endswith(b"0\r\n\r\n")
    assert containers.do("POST", f"/containers/{name}/wait", 200)["StatusCode"] == 0
    assert direct.request("GET", f"/containers/{name}/logs?stdout=1").content == b""


@instead_of(
    docker.TestOutputOnly.test_an_upgrade_that_is_no_websocket_is_refused_with_426_and_nothing_happens, "exec-state"
)
@pytest.mark.parametrize("protocol", ["tcp", "h2c", "websocket"])
def test_an_upgrade_that_is_no_websocket_is_refused_with_426_and_nothing_happens(
    runner: Runner, containers: Containers, running: str, protocol: str
) -> None:
    found = containers.exec(running, "true")
    for target, body in (
        (f"/exec/{found}/start", docker.START),
        (f"/v1.41/containers/{running}/attach?stream=1&stdout=1", b""),
    ):
        fields = ("Content-Type: application/json", "Connection: Upgrade", f"Upgrade: {protocol}")
        answer = runner.raw(signed_head("POST", target, body, *fields) + body)
        assert answer.startswith(b"HTTP/1.1 426 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "upgrade_required"
    state = containers.do("GET", f"/exec/{found}/json", 200)
    assert (state["Running"], state["ExitCode"]) == (False, 0)
    containers.do("POST", f"/exec/{found}/start", 200, data=docker.START, headers=JSON)  # It had not been started.
