"""The engine face: logs, stats, events; attach and exec in their plain form, with what that form refuses."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest

from comparison import JSON, TWIN, Both, Containers, Seen, asking, compares, http_chunks, shape
from conftest import EngineDirect, Names
from dev import wait_until
from service import Runner, signed_head

MISSING = "0123456789abcdef" * 4
START = b'{"Detach":false,"Tty":false}'


@pytest.fixture
def both(request: pytest.FixtureRequest, runner: Runner, direct: EngineDirect) -> Iterator[Both]:
    yield from asking(request, runner, direct)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def running(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def spoken(containers: Containers) -> str:
    """A container that said something on both streams, and ended."""
    return containers.ended("sh", "-c", "for i in 1 2 3; do echo out $i; echo err $i >&2; done; printf 'no newline'")


@pytest.fixture(scope="module")
def spoken_on_terminal(containers: Containers) -> str:
    """The same on a terminal."""
    return containers.ended("sh", "-c", "echo out; echo err >&2; printf 'no newline'", Tty=True)


def event_counts(both: Both, name: str, action: str) -> int:
    """How often something has happened to a container, as the engine's events tell it."""
    filters = json.dumps({"container": [name], "event": [action]})
    now = time.time()
    # A little ahead: Podman does not give all events up to a time that has passed.
    query = urlencode({"filters": filters, "since": f"{now - 300:.9f}", "until": f"{now + 0.1:.9f}"})
    return len(both.engine("GET", f"/events?{query}").body.splitlines())


def unframed(body: bytes) -> dict[int, bytes]:
    """The payload of a multiplexed stream, by stream number."""
    found = {1: b"", 2: b""}
    while body:
        size = int.from_bytes(body[4:8], "big")
        found[body[0]] += body[8 : 8 + size]
        body = body[8 + size :]
    return found


def payload(seen: Seen) -> object:
    """A view of a multiplexed stream: the bytes of each output; in which order the two came is chance."""
    return seen.status, seen.headers, unframed(seen.body)


class TestLogs:
    @compares("ContainerLogs")
    @pytest.mark.parametrize(
        "query",
        [
            "stdout=1&stderr=1",
            "stdout=1",
            "stderr=1",
            "stdout=1&stderr=1&tail=2",
            "stdout=1&tail=0",
            "stdout=1&stderr=1&timestamps=1",
            "stdout=1&since=1&until=9999999999",
            "stdout=1&stderr=1&follow=1",
        ],
    )
    def test_logs_are_multiplexed_frames_byte_for_byte(self, both: Both, spoken: str, query: str) -> None:
        assert both.same("GET", f"/v1.41/containers/{spoken}/logs?{query}").status == 200

    @compares("ContainerLogs")
    @pytest.mark.parametrize("query", ["stdout=1&stderr=1", "stdout=1&timestamps=1&tail=1", "stdout=1&follow=1"])
    def test_logs_of_a_terminal_are_raw(self, both: Both, spoken_on_terminal: str, query: str) -> None:
        seen = both.same("GET", f"/containers/{spoken_on_terminal}/logs?{query}")
        assert seen.body.endswith(b"no newline")
        assert b"\0" not in seen.body

    @compares("ContainerLogs")
    @pytest.mark.parametrize("query", ["", "stdout=0", "stdout=1&since=nonsense"])
    def test_logs_with_a_bad_parameter_relay_the_engines_error(self, both: Both, spoken: str, query: str) -> None:
        target = f"/containers/{spoken}/logs" + (f"?{query}" if query else "")
        assert both.same("GET", target).status in (400, 500)


class TestStats:
    @compares("ContainerStats")
    @pytest.mark.parametrize("query", ["stream=false", "stream=false&one-shot=true"])
    def test_one_sample_has_the_engines_shape(self, both: Both, running: str, query: str) -> None:
        target = f"/containers/{running}/stats?{query}"
        seen = both.same("GET", target, view=lambda seen: (seen.status, seen.header("content-type"), shape(seen.json)))
        assert seen.json["name"] == f"/{running}"

    @compares("ContainerStats")
    def test_a_sample_of_a_container_that_does_not_run_is_the_engines(self, both: Both, spoken: str) -> None:
        assert both.same("GET", f"/containers/{spoken}/stats?stream=false").status == 200

    def test_a_stream_of_samples_leaves_in_whole_lines(self, runner: Runner, running: str) -> None:
        chunks = http_chunks(runner, "GET", f"/containers/{running}/stats")
        for _ in range(2):
            chunk = next(chunks)
            assert chunk.endswith(b"\n")
            assert {json.loads(line)["name"] for line in chunk.splitlines()} == {f"/{running}"}
        chunks.close()


class TestEvents:
    @compares("SystemEvents")
    def test_past_events_are_relayed_byte_for_byte(self, both: Both, containers: Containers, names: Names) -> None:
        label = {"burst": names("label")}
        since = time.time()
        name = containers("true", Labels={**names.labels, **label})
        containers.do("POST", f"/containers/{name}/wait?condition=not-running", 200)
        filters = json.dumps({"label": [f"{key}={value}" for key, value in label.items()]})
        query = urlencode({"since": f"{since - 1:.9f}", "until": f"{time.time():.9f}", "filters": filters})
        seen = both.same("GET", f"/v1.41/events?{query}")
        assert {"create", "start", "die"} <= {json.loads(line)["Action"] for line in seen.body.splitlines()}

    @compares("SystemEvents")
    @pytest.mark.parametrize("query", ["filters=nonsense", "since=nonsense&until=1", "since=5&until=1"])
    def test_a_bad_parameter_relays_the_engines_error(self, both: Both, query: str) -> None:
        assert both.same("GET", f"/events?{query}").status in (400, 500)


class TestExec:
    @compares("ContainerExec")
    def test_create_relays_201_with_the_new_id(self, both: Both, containers: Containers) -> None:
        assert (
            both.twins("POST", f"/containers/{TWIN}/exec", containers.pair(), b'{"Cmd":["true"]}', JSON).status == 201
        )

    @compares("ContainerExec")
    def test_create_refused_by_the_engine_relays_its_error(self, both: Both, running: str, spoken: str) -> None:
        assert both.same("POST", "/containers/no-such/exec", b'{"Cmd":["true"]}', JSON).status == 404
        assert both.same("POST", f"/containers/{spoken}/exec", b'{"Cmd":["true"]}', JSON).status == 409
        assert both.same("POST", f"/containers/{running}/exec", b'{"Cmd":', JSON).status in (400, 500)
        assert both.same("POST", f"/containers/{running}/exec", b"{}", JSON).status in (400, 500)

    @compares("ExecStart", "ExecInspect")
    @pytest.mark.parametrize("command", ["echo out; echo err >&2; exit 3", "head -c 300000 /dev/zero", "true"])
    def test_start_relays_a_multiplexed_stream(
        self, both: Both, containers: Containers, running: str, command: str
    ) -> None:
        pair = tuple(containers.exec(running, "sh", "-c", command) for _ in range(2))
        seen = both.twins("POST", f"/v1.41/exec/{TWIN}/start", (pair[0], pair[1]), START, JSON, view=payload)
        assert seen.status == 200
        assert seen.header("content-type") == "application/vnd.docker.raw-stream"
        assert both.twins("GET", f"/exec/{TWIN}/json", (pair[0], pair[1]), view=without_pid).json["Running"] is False

    @compares("ExecStart")
    def test_start_on_a_terminal_relays_a_raw_stream(self, both: Both, containers: Containers, running: str) -> None:
        first, second = (containers.exec(running, "sh", "-c", "tty; echo err >&2", Tty=True) for _ in range(2))
        body = b'{"Detach":false,"Tty":true}'
        seen = both.twins("POST", f"/exec/{TWIN}/start", (first, second), body, JSON, view=without_tty)
        assert seen.body.startswith(b"/dev/pts/")
        assert seen.body.endswith(b"err\r\n")

    @compares("ExecStart")
    def test_start_detached_relays_200_and_a_second_start_the_refusal(
        self, both: Both, containers: Containers, running: str
    ) -> None:
        pair = (containers.exec(running, "sleep", "1d"), containers.exec(running, "sleep", "1d"))
        assert both.twins("POST", f"/exec/{TWIN}/start", pair, b'{"Detach":true}', JSON).status == 200
        assert b"already running" in both.same("POST", f"/exec/{pair[1]}/start", START, JSON).body

    @compares("ExecStart")
    def test_start_of_a_missing_program_relays_what_the_engine_says(
        self, both: Both, containers: Containers, running: str
    ) -> None:
        pair = (containers.exec(running, "/no/such"), containers.exec(running, "/no/such"))
        assert b"no such file" in both.twins("POST", f"/exec/{TWIN}/start", pair, START, JSON).body

    @compares("ExecStart", "ExecInspect", "ExecResize")
    def test_whatever_is_asked_of_a_missing_exec_relays_404(self, both: Both) -> None:
        assert both.same("POST", f"/exec/{MISSING}/start", START, JSON).status == 404
        assert both.same("GET", f"/exec/{MISSING}/json").status == 404
        assert both.same("POST", f"/exec/{MISSING}/resize?h=1&w=1").status == 404

    @compares("ExecResize")
    def test_resize_relays_its_status(self, both: Both, containers: Containers, running: str) -> None:
        found = containers.exec(running, "sleep", "1d", Tty=True)
        assert both.same("POST", f"/exec/{found}/resize?h=x&w=1").status in (400, 500)
        containers.do("POST", f"/exec/{found}/start", 200, json={"Detach": True, "Tty": True})
        assert both.same("POST", f"/exec/{found}/resize?h=40&w=100").status in (200, 201)


class TestAttach:
    @compares("ContainerAttach")
    def test_what_was_said_is_multiplexed(self, both: Both, spoken: str) -> None:
        seen = both.same("POST", f"/v1.41/containers/{spoken}/attach?logs=1&stdout=1&stderr=1")
        assert seen.header("content-type") == "application/vnd.docker.raw-stream"
        assert unframed(seen.body) == {1: b"out 1\nout 2\nout 3\nno newline", 2: b"err 1\nerr 2\nerr 3\n"}

    @compares("ContainerAttach")
    def test_what_was_said_on_a_terminal_is_raw(self, both: Both, spoken_on_terminal: str) -> None:
        seen = both.same("POST", f"/containers/{spoken_on_terminal}/attach?logs=1&stdout=1&stderr=1")
        assert seen.body == b"out\r\nerr\r\nno newline"

    @compares("ContainerAttach")
    @pytest.mark.parametrize("tty", [False, True])
    def test_two_that_listen_from_the_start_get_the_same_to_the_end(
        self, both: Both, containers: Containers, tty: bool
    ) -> None:
        name = containers("sh", "-c", "seq 20000; echo err >&2", start=False, Tty=tty)
        target = f"/containers/{name}/attach?stream=1&stdout=1&stderr=1"
        with ThreadPoolExecutor(2) as pool:
            engine = pool.submit(both.engine, "POST", target)
            through = pool.submit(both.through, "POST", target)
            assert wait_until(lambda: event_counts(both, name, "attach") == 2, 20)
            containers.do("POST", f"/containers/{name}/start", 204)
            if tty:
                assert through.result() == engine.result()
            else:
                assert payload(through.result()) == payload(engine.result())
                assert unframed(through.result().body)[1].endswith(b"19999\n20000\n")

    @compares("ContainerAttach")
    def test_a_paused_container_relays_409(self, both: Both, containers: Containers) -> None:
        name = containers()
        containers.do("POST", f"/containers/{name}/pause", 204)
        assert both.same("POST", f"/containers/{name}/attach?stream=1&stdout=1").status == 409
        containers.do("POST", f"/containers/{name}/unpause", 204)


class TestOutputOnly:
    """What a caller sends after its request's body goes nowhere."""

    def test_bytes_that_come_with_the_request_are_refused(
        self, runner: Runner, direct: EngineDirect, containers: Containers
    ) -> None:
        name = containers("cat", OpenStdin=True)
        target = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1"
        answer = runner.raw(signed_head("POST", target, b"", "Content-Length: 0") + b"smuggled\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "pipelining_refused"
        assert heard(direct, runner, name) == b"spoken\n"

    def test_bytes_that_come_after_the_answer_began_end_the_connection(
        self, runner: Runner, direct: EngineDirect, containers: Containers
    ) -> None:
        name = containers("cat", OpenStdin=True)
        target = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1"
        with runner.connect() as sock, sock.makefile("rb") as stream:
            sock.sendall(signed_head("POST", target, b"", "Content-Length: 0"))
            assert stream.readline().startswith(b"HTTP/1.1 200 ")
            sock.sendall(b"smuggled\n")
            rest = read_to_reset(sock)
        assert not rest.endswith(b"0\r\n\r\n")
        assert heard(direct, runner, name) == b"spoken\n"

    def test_an_exec_gets_nothing_either(self, runner: Runner, containers: Containers) -> None:
        name = containers()
        found = containers.exec(name, "sh", "-c", "cat > /heard; touch /ended", AttachStdin=True)
        head = signed_head("POST", f"/exec/{found}/start", START, "Content-Type: application/json")
        with runner.connect() as sock, sock.makefile("rb") as stream:
            sock.sendall(head + START)
            assert stream.readline().startswith(b"HTTP/1.1 200 ")
            sock.sendall(b"smuggled\n")
            read_to_reset(sock)
        size = containers.exec(name, "sh", "-c", "until [ -e /ended ]; do sleep 0.05; done; cat /heard", Tty=True)
        body = b'{"Tty":true}'
        assert runner.request("POST", f"/exec/{size}/start", body, JSON).body == b""

    @pytest.mark.parametrize("protocol", ["tcp", "h2c", "websocket"])
    def test_an_upgrade_that_is_no_websocket_is_refused_with_426_and_nothing_happens(
        self, runner: Runner, containers: Containers, running: str, protocol: str
    ) -> None:
        found = containers.exec(running, "true")
        for target, body in (
            (f"/exec/{found}/start", START),
            (f"/v1.41/containers/{running}/attach?stream=1&stdout=1", b""),
        ):
            fields = ("Content-Type: application/json", "Connection: Upgrade", f"Upgrade: {protocol}")
            answer = runner.raw(signed_head("POST", target, body, *fields) + body)
            head, _, text = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 426 ")
            error = json.loads(text)["error"]
            assert (error["code"], error["retryable"]) == ("upgrade_required", False)
        state = containers.do("GET", f"/exec/{found}/json", 200)
        assert (state["Running"], state["ExitCode"]) == (False, None)


def without_pid(seen: Seen) -> object:
    """A view of an exec's inspect: its process number is its own, and its container shared."""
    return seen.status, seen.headers, {**seen.json, "Pid": 0}


def without_tty(seen: Seen) -> object:
    """A view of a terminal's output whose first line names the terminal."""
    return seen.status, seen.headers, seen.body.partition(b"\n")[2]


def read_to_reset(sock: socket.socket) -> bytes:
    """What comes before the peer resets the connection; a quiet end would look like a complete answer."""
    sock.settimeout(20)
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        return b"".join(parts)
    raise AssertionError("the connection ended as if the answer were complete")


def heard(direct: EngineDirect, runner: Runner, name: str) -> bytes:
    """What a container that runs `cat` has read: one line is put in on the engine itself, and waited for."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(runner.engine_socket)
        fields = "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        sock.sendall(f"POST /containers/{name}/attach?stream=1&stdin=1 HTTP/1.1\r\n{fields}".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 101 ")
        sock.sendall(b"spoken\n")
        sock.shutdown(socket.SHUT_WR)
        target = f"/containers/{name}/logs?stdout=1"
        assert wait_until(lambda: b"spoken" in direct.request("GET", target).content, 20)
        return unframed(direct.request("GET", target).content)[1]
