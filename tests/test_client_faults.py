"""The vendored client when things break: retries, time limits, feeds that resume, frames of a WebSocket."""

import contextlib
import io
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import RunnerClient, RunnerClientError, frame, frames
from conftest import Names, free_port
from dev.engine import Engine
from service import SECRET, Runner

HEAD = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nRetry-After: 0\r\n\r\n%b"


def refusal(status: int, *, retryable: bool) -> bytes:
    told = {"message": "no", "error": {"code": "some_code", "message": "no", "retryable": retryable}}
    body = json.dumps(told).encode()
    return HEAD % (status, len(body), body)


OK = HEAD % (200, 2, b"{}")
FEED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(time_ns: int, name: str) -> bytes:
    told = {"type": "event", "event": {"timeNano": time_ns, "Action": name}}
    return piece(b"data: " + json.dumps(told).encode() + b"\n\n")


class Scripted:
    """A TCP server: each connection gets the next answer, after a request with its body was read, and is closed.

    None instead of an answer holds the connection open without a word. What was asked is in `requests`, heads whole.
    """

    def __init__(self, *answers: bytes | None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._answers = answers
        self._done = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        for answer in self._answers:
            with contextlib.suppress(OSError), self._listener.accept()[0] as connection:
                connection.settimeout(20)
                reader = connection.makefile("rb")
                lines = list(iter(reader.readline, b"\r\n"))
                length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"Content-Length")), 0)
                reader.read(length)
                if any(line.startswith(b"Transfer-Encoding") for line in lines):
                    while size := int(reader.readline(), 16):
                        reader.read(size + 2)
                    reader.readline()
                self.requests.append(b"".join(lines).decode())
                if answer is None:
                    self._done.wait(20)
                else:
                    connection.sendall(answer)
                connection.shutdown(socket.SHUT_RDWR)

    def nonces(self) -> list[str]:
        return [re.findall(r"X-DR-Nonce: (\S+)", request)[0] for request in self.requests]

    def __enter__(self) -> "Scripted":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


# Retries.


def test_a_retryable_refusal_is_asked_again_signed_anew() -> None:
    with Scripted(refusal(503, retryable=True), refusal(401, retryable=True), OK) as server:
        assert RunnerClient(server.url, SECRET).inspect("x") == {}
    assert len(set(server.nonces())) == 3


def test_retries_are_bounded_and_can_be_off() -> None:
    with Scripted(*[refusal(503, retryable=True)] * 3) as server:
        for retries in (1, 0):
            with pytest.raises(RunnerClientError) as refused:
                RunnerClient(server.url, SECRET, retries=retries).touch("x")
            assert (refused.value.status, refused.value.code, refused.value.retryable) == (503, "some_code", True)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "answer", [refusal(502, retryable=False), b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"]
)
def test_what_may_have_happened_is_not_asked_again(answer: bytes) -> None:
    with Scripted(answer, OK) as server:
        with pytest.raises(RunnerClientError) as failed:
            RunnerClient(server.url, SECRET).touch("x")
        assert not failed.value.retryable
        assert failed.value.code == ("some_code" if b"some_code" in answer else "connection_lost")
        assert len(server.requests) == 1


def test_a_file_is_not_sent_again() -> None:
    with Scripted(refusal(503, retryable=True), OK) as server:
        with pytest.raises(RunnerClientError, match="some_code"):
            RunnerClient(server.url, SECRET).put_archive("x", "/", io.BytesIO(b"tar"))
        assert len(server.requests) == 1


def test_a_connection_refused_is_tried_again_and_told_as_unreachable() -> None:
    with pytest.raises(RunnerClientError) as failed:
        RunnerClient(f"http://127.0.0.1:{free_port()}", SECRET, retries=1).health()
    assert (failed.value.status, failed.value.code, failed.value.retryable) == (0, "unreachable", True)


def test_retry_after_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("client.time.sleep", pauses.append)
    with Scripted(refusal(503, retryable=True).replace(b"Retry-After: 0", b"Retry-After: 7"), OK) as server:
        RunnerClient(server.url, SECRET).inspect("x")
    assert pauses == [7]


def test_a_silent_runner_is_a_timeout() -> None:
    with Scripted(None) as server, pytest.raises(RunnerClientError) as failed:
        RunnerClient(server.url, SECRET, read_s=0.2).health()
    assert (failed.value.status, failed.value.code, failed.value.retryable) == (0, "timeout", False)


def test_an_answer_that_is_no_json_is_told() -> None:
    with Scripted(HEAD % (200, 2, b"no")) as server, pytest.raises(RunnerClientError, match="protocol_error"):
        RunnerClient(server.url, SECRET).inspect("x")


def test_an_answer_of_a_proxy_is_an_http_error() -> None:
    with Scripted(HEAD % (502, 3, b"bad")) as server, pytest.raises(RunnerClientError, match=r"bad \(http_error"):
        RunnerClient(server.url, SECRET).inspect("x")


# Feeds, scripted.


def test_events_of_one_nanosecond_are_told_apart_after_a_break() -> None:
    first = FEED + piece(b": keep-alive\n\n") + event(5, "a") + event(6, "b")
    again = FEED + event(5, "a") + event(6, "b") + event(6, "c") + event(7, "d")
    with Scripted(first, HEAD % (503, 2, b"{}"), again, refusal(404, retryable=False)) as server:
        events = RunnerClient(server.url, SECRET, retries=0).events(since_ns=5)
        assert [next(events)["Action"] for _ in range(2)] == ["a", "b"]
        with pytest.raises(RunnerClientError):
            next(events)
    with Scripted(first, again, refusal(404, retryable=False)) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5)
        assert [next(events)["Action"] for _ in range(4)] == ["a", "b", "c", "d"]
        with pytest.raises(RunnerClientError, match="some_code"):
            next(events)
    assert all("since=0.000000005" in request for request in server.requests)


def test_events_asked_for_without_a_time_resume_even_if_none_had_come() -> None:
    ping = HEAD.replace(b"Retry-After: 0", b"Date: Thu, 01 Jan 1970 00:00:09 GMT") % (200, 2, b"OK")
    first, second = event(9_000_000_007, "a"), event(9_000_000_008, "b")
    with Scripted(ping, FEED, FEED + first, FEED + first + second) as server:
        events = RunnerClient(server.url, SECRET).events()
        assert [next(events)["Action"] for _ in range(2)] == ["a", "b"]
    asked = [re.findall(r"since=([0-9.]+)", request) for request in server.requests]
    assert asked == [[], [], ["9.000000000"], ["9.000000007"]]


def identified(number: int, action: str) -> bytes:
    """As `event`, with an id."""
    told = json.dumps({"type": "event", "event": {"timeNano": number, "Action": action}})
    return piece(f"data: {told}\nid: id-of-{action}\n\n".encode())


GAP = piece(b'data: {"type":"gap","reason":"engine","message":"restarted"}\n\n')


def test_events_with_ids_resume_by_the_last_one_whose_event_came_whole() -> None:
    broken = piece(b'data: {"type":"event","event":{"timeNano":7,"Action":"b"}}\nid: id-of-b\n')
    here = piece(b": here\nid: begin\n\n")
    answers = (FEED + here, FEED + identified(5, "a") + broken, FEED + identified(5, "b") + identified(5, "b"))
    with Scripted(*answers, refusal(404, retryable=False)) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5)
        assert [next(events)["Action"] for _ in range(3)] == ["a", "b", "b"]
        with pytest.raises(RunnerClientError, match="some_code"):
            next(events)
    asked = [re.findall(r"(?i)last-event-id: (.*?)\r", request) for request in server.requests]
    assert asked == [[], ["begin"], ["id-of-a"], ["id-of-b"]]


def test_a_gap_is_raised() -> None:
    with Scripted(FEED + identified(5, "a") + GAP) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5)
        assert next(events)["Action"] == "a"
        with pytest.raises(RunnerClientError, match="restarted") as failed:
            next(events)
    assert (failed.value.code, failed.value.retryable, len(server.requests)) == ("gap", False, 1)


def test_a_gap_is_told_to_who_wants_to_know_and_the_events_go_on() -> None:
    told: list[dict[str, Any]] = []
    with Scripted(FEED + GAP + identified(5, "a")) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5, on_gap=told.append)
        assert next(events)["Action"] == "a"
    assert [each["reason"] for each in told] == ["engine"]


def test_an_error_told_within_a_feed_is_raised() -> None:
    told = piece(b'data: {"type":"strange"}\n\ndata: {"type":"error","message":"broken","code":"events_failed"}\n\n')
    with Scripted(FEED + event(5, "a") + told) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5)
        assert next(events)["Action"] == "a"
        with pytest.raises(RunnerClientError, match="broken") as failed:
            next(events)
    assert failed.value.code == "events_failed"


def test_a_feed_gives_up_after_so_many_tries() -> None:
    with Scripted(FEED, FEED, FEED) as server:
        events = RunnerClient(server.url, SECRET).events(since_ns=5, tries=2)
        with pytest.raises(RunnerClientError, match="connection_lost"):
            next(events)
    assert len(server.requests) == 3


# Feeds, when the runner is killed.


class Restartable:
    """A runner of our own at a fixed port, to be killed and started again."""

    def __init__(self, engine_socket: str) -> None:
        self._engine_socket = engine_socket
        self._port = free_port()
        self._start()
        self.client = RunnerClient(self.runner.url, self.runner.secret)

    def _start(self) -> None:
        self.runner = Runner(self._engine_socket, {"DOCKER_RUNNER_PORT": str(self._port)})

    def replace(self) -> None:
        """Kill it, and start another."""
        self.runner.stop(signal.SIGKILL)
        self._start()


@pytest.fixture
def restartable(engine: Engine) -> Iterator[Restartable]:
    runner = Restartable(engine.socket)
    try:
        yield runner
    finally:
        runner.runner.stop()


COUNTING = 'i=0; while [ $i -lt 400 ]; do echo "out $i"; echo "err $i" >&2; i=$((i+1)); usleep 10000; done'


@pytest.mark.parametrize("tty", [False, True])
def test_a_log_goes_on_after_the_runner_was_killed(
    restartable: Restartable, start: Callable[..., str], tty: bool
) -> None:
    records = restartable.client.logs(start(tty=tty, cmd=["sh", "-c", COUNTING]))
    lines: dict[str, list[bytes]] = {"out": [], "err": []}
    for number, record in enumerate(records):
        lines["out" if record.data.startswith(b"out") else "err"].append(record.data.strip())
        if number in (100, 101, 400):
            restartable.replace()
    for name, found in lines.items():
        assert found == [b"%b %d" % (name.encode(), number) for number in range(400)]


def test_a_long_line_goes_on_after_the_runner_was_killed(restartable: Restartable, start: Callable[..., str]) -> None:
    program = "i=0; while [ $i -lt 40 ]; do printf %08192d $i; echo $i >&2; i=$((i+1)); usleep 50000; done; echo"
    records = restartable.client.logs(start(cmd=["sh", "-c", program]))
    out, err = b"", []
    for number, record in enumerate(records):
        if record.stream == "stdout":
            out += record.data
        else:
            err.append(int(record.data))
        if number == 30:
            restartable.replace()
    assert out == b"".join(b"%08192d" % number for number in range(40)) + b"\n"
    assert err == list(range(40))


def test_a_log_from_now_on_misses_nothing_while_the_runner_is_away(
    restartable: Restartable, runner: Runner, start: Callable[..., str]
) -> None:
    box = start(cmd=["sh", "-c", "mkfifo /go; echo before; read line < /go; echo after"])
    assert next(restartable.client.logs(box)).data == b"before\n"
    records = restartable.client.logs(box, tail=0, since_ns=None)
    restartable.runner.stop(signal.SIGKILL)
    RunnerClient(runner.url, runner.secret).exec_run(box, "echo > /go")
    restartable._start()
    assert [record.data for record in records][-1] == b"after\n"


def test_events_go_on_after_the_runner_was_killed(
    restartable: Restartable, runner: Runner, start: Callable[..., str], names: Names
) -> None:
    mark = names()
    events = restartable.client.events(filters={"label": [f"mark={mark}"]})
    restartable.runner.stop(signal.SIGKILL)
    boxes = [start(labels={"mark": mark}) for _ in range(2)]  # Through the other runner, while ours is away.
    restartable._start()
    seen: list[tuple[str, str]] = []
    for found in events:
        seen.append((found["Action"], found["id"]))
        if len(seen) == 2:
            restartable.runner.stop(signal.SIGKILL)
            boxes.append(start(labels={"mark": mark}))
            restartable._start()
        if len(seen) == 6:
            break
    assert seen == [(action, box) for box in boxes for action in ("create", "start")]


# The WebSocket's frames.


def reader(transport: bytes, cuts: list[int]) -> Callable[[int], bytes]:
    """Reads so many bytes, as a buffered reader does, from a transport that gives its bytes in these cuts."""

    class Raw(io.RawIOBase):
        left = transport

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            size = min(cuts.pop() if cuts else len(self.left), len(buffer), len(self.left))
            buffer[:size], self.left = self.left[:size], self.left[size:]
            return size

    return io.BufferedReader(Raw()).read


def server_frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


payloads = st.one_of(st.binary(max_size=300), st.sampled_from([bytes(125), bytes(126), bytes(65535), bytes(65536)]))


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.lists(payloads, min_size=1, max_size=3), st.binary(max_size=125))),
    st.lists(st.integers(1, 100), max_size=50),
)
def test_messages_come_out_as_they_went_in(sent: list[tuple[int, list[bytes], bytes]], cuts: list[int]) -> None:
    transport, expected = b"", []
    for opcode, parts, ping in sent:
        for number, part in enumerate(parts):
            first = (opcode if number == 0 else 0) | (0x80 if number == len(parts) - 1 else 0)
            transport += server_frame(0x89, ping) + server_frame(first, part)
            expected.append((9, ping))
        expected.append((opcode, b"".join(parts)))
    assert list(frames(reader(transport + server_frame(0x88, b"\x03\xe8") + b"more", cuts))) == expected


@given(payloads, st.integers(0, 20))
def test_a_transport_that_ends_within_a_frame_ends_the_messages(payload: bytes, missing: int) -> None:
    whole = server_frame(0x82, payload)
    found = list(frames(reader(whole[: len(whole) - missing], [])))
    assert found == ([(2, payload)] if missing == 0 else [])


@pytest.mark.parametrize(
    "bad",
    [
        b"\xc2\x00",  # a reserved bit
        b"\x83\x00",  # an unknown opcode
        b"\x80\x00",  # goes on with nothing
        b"\x02\x00\x82\x00",  # a message within another
        b"\x82\x80\0\0\0\0",  # masked
        b"\x09\x00",  # a ping in parts
        b"\x89\x7e\x00\x80" + bytes(128),  # a long ping
        b"\x82\x7f" + (1 << 40).to_bytes(8, "big"),  # longer than the bound
    ],
)
def test_what_is_no_frame_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="no WebSocket frame begins with"):
        list(frames(reader(bad, [])))


@given(st.sampled_from([1, 2, 10]), st.binary(max_size=70000).filter(lambda payload: len(payload) < 65536))
def test_a_frame_of_the_clients_is_masked(opcode: int, payload: bytes) -> None:
    made = frame(opcode, payload)
    at = 2 if len(payload) < 126 else 4
    assert made[0] == 0x80 | opcode
    assert made[1] == 0x80 | (len(payload) if at == 2 else 126)
    assert at == 2 or made[2:4] == len(payload).to_bytes(2, "big")
    mask, masked = made[at : at + 4], made[at + 4 :]
    assert bytes(byte ^ mask[number % 4] for number, byte in enumerate(masked)) == payload
