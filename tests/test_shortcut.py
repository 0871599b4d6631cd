"""The short way of small requests, and each place where the ordinary way takes over. Against a scripted engine.

That answers and refusals are the same in both ways is what the other suites show: with a kept connection, their small
requests go the short way.
"""

import contextlib
import json
import signal
import socket
from collections.abc import Iterator

import pytest

from scripted import Peer, Script, ScriptedEngine, chunked
from service import Runner, read_to_end, signed_head

PING = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npong"


def after_a_ping(script: Script) -> Script:
    """A script that answers pings, so that there is a kept connection, and does the rest with what comes after."""

    def run(peer: Peer) -> None:
        while head := peer.read_head():
            if b" /_ping " not in head:
                peer.engine.requests.append(head)
                script(peer)
                return
            peer.send(PING)

    return run


def answers(*cuts: bytes) -> Script:
    def run(peer: Peer) -> None:
        peer.send(*cuts)
        peer.wait_closed()

    return after_a_ping(run)


@pytest.fixture
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(answers(PING)) as engine:
        yield engine


@pytest.fixture
def runner(scripted: ScriptedEngine) -> Iterator[Runner]:
    with Runner(scripted.path) as running:
        assert running.request("GET", "/_ping").body == b"pong"
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


def warm(runner: Runner, scripted: ScriptedEngine, script: Script) -> None:
    """A connection is kept, and what comes on it is the script's."""
    scripted.restart(script)
    assert runner.request("GET", "/_ping").body == b"pong"
    assert scripted.connections == 1


def asked(runner: Runner, method: str = "GET", version: str = "1.1") -> bytes:
    """All that one request is answered, without the request's id."""
    head = signed_head(method, "/info", b"", "X-Request-Id: mine", "Connection: close")
    answer = runner.raw(head.replace(b" HTTP/1.1\r\n", f" HTTP/{version}\r\n".encode()))
    assert answer.count(b"x-request-id: mine\r\n") == 1
    return answer.replace(b"x-request-id: mine\r\n", b"")


class TestAnswers:
    def test_header_fields_pass_as_they_stand(self, runner: Runner, scripted: ScriptedEngine) -> None:
        fields = b"Content-Length: 2\r\nX-ODD:  two  words \r\nx-odd:\r\nX-Te: te:\r\n"
        warm(runner, scripted, answers(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\nok"))
        assert asked(runner) == b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + fields + b"\r\nok"

    @pytest.mark.parametrize(
        "field",
        [b"Connection: keep-alive", b"KEEP-ALIVE: 5", b"x-dr-Anything: x", b"Upgrade: h2c", b"X-Request-ID: theirs"],
    )
    def test_what_stays_at_a_hop_stays(self, runner: Runner, scripted: ScriptedEngine, field: bytes) -> None:
        warm(
            runner, scripted, answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + field + b"\r\nX-Kept: 1\r\n\r\nok")
        )
        answer = asked(runner)
        assert field.lower() not in answer.lower().replace(b"connection: close", b"")
        assert b"X-Kept: 1\r\n" in answer
        assert answer.endswith(b"\r\n\r\nok")

    def test_what_connection_names_stays_too(self, runner: Runner, scripted: ScriptedEngine) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x-named\r\nX-Named: 1\r\n\r\nok"
        warm(runner, scripted, answers(head))
        assert b"x-named" not in asked(runner).lower()

    def test_a_chunked_answer(self, runner: Runner, scripted: ScriptedEngine) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        warm(runner, scripted, answers(head + b"\r\n" + chunked(b"one", b"two")))
        assert asked(runner).endswith(b"\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nonetwo\r\n0\r\n\r\n")

    @pytest.mark.parametrize("status_line", [b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK"])
    def test_an_answer_that_ends_with_its_connection_is_told_where_it_ends(
        self, runner: Runner, scripted: ScriptedEngine, status_line: bytes
    ) -> None:
        warm(runner, scripted, after_a_ping(lambda peer: peer.send(status_line + b"\r\nA: b\r\n\r\nall of it")))
        with runner.connect() as sock:
            sock.sendall(signed_head("GET", "/info", b"", "X-Request-Id: mine"))
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += sock.recv(65536)
        assert b"\r\ntransfer-encoding: chunked\r\n\r\n9\r\nall of it\r\n0\r\n\r\n" in answer

    def test_a_chunked_answer_to_http_1_0_is_not(self, runner: Runner, scripted: ScriptedEngine) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        warm(runner, scripted, answers(head + b"\r\n" + chunked(b"one", b"two")))
        answer = asked(runner, version="1.0")
        assert b"chunked" not in answer
        assert answer.endswith(b"\r\n\r\nonetwo")

    @pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified", b"404 Not Found", b"500 Oh"])
    def test_a_status(self, runner: Runner, scripted: ScriptedEngine, status: bytes) -> None:
        bodiless = status[:3] in (b"204", b"304")
        warm(
            runner,
            scripted,
            answers(b"HTTP/1.1 " + status + (b"\r\n\r\n" if bodiless else b"\r\nContent-Length: 2\r\n\r\nok")),
        )
        answer = asked(runner)
        assert answer.startswith(b"HTTP/1.1 " + status[:4])
        assert answer.endswith(b"\r\n\r\n" if bodiless else b"\r\n\r\nok")

    def test_empty_lines_before_an_answer_are_no_part_of_it(self, runner: Runner, scripted: ScriptedEngine) -> None:
        warm(runner, scripted, answers(b"\r\n\r\nHTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok"))
        assert asked(runner) == b"HTTP/1.1 200 OK\r\nconnection: close\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok"

    def test_a_body_that_is_chunked_twice_is_refused(self, runner: Runner, scripted: ScriptedEngine) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
        warm(runner, scripted, answers(head + chunked(b"one")))
        assert b"engine_garbage" in asked(runner)

    def test_a_folded_field_is_refused(self, runner: Runner, scripted: ScriptedEngine) -> None:
        warm(runner, scripted, answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\n x-dr-b: 2\r\n\r\nok"))
        assert b"engine_garbage" in asked(runner)

    def test_wherever_it_is_cut(self, runner: Runner, scripted: ScriptedEngine) -> None:
        whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\n\r\n" + chunked(b"one", b"two")
        for at in range(1, len(whole)):
            warm(runner, scripted, answers(whole[:at], whole[at:]))
            answer = runner.request("GET", "/info")
            assert (answer.status, answer.header("x-a"), answer.body) == (200, "1", b"onetwo")


class TestGoingOn:
    def test_a_head_is_not_held_back_for_its_body(self, runner: Runner, scripted: ScriptedEngine) -> None:
        def head_first(peer: Peer) -> None:
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            peer.engine.go.wait()
            peer.send(b"ok")

        warm(runner, scripted, after_a_ping(head_first))
        with runner.connect() as sock:
            sock.sendall(signed_head("GET", "/info"))
            assert sock.recv(65536).endswith(b"Content-Length: 2\r\n\r\n")
            scripted.go.set()
            assert sock.recv(65536) == b"ok"

    def test_an_answer_that_breaks_off_does_not_look_complete(self, runner: Runner, scripted: ScriptedEngine) -> None:
        def begins(peer: Peer) -> None:
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")
            peer.engine.go.wait()

        warm(runner, scripted, after_a_ping(begins))
        with runner.connect() as sock:
            sock.sendall(signed_head("GET", "/info"))
            assert sock.recv(65536).endswith(b"\r\n\r\nok")
            scripted.go.set()
            with pytest.raises(ConnectionResetError):
                sock.recv(65536)

    def test_one_that_breaks_off_before_any_of_it_was_given_is_told(
        self, runner: Runner, scripted: ScriptedEngine
    ) -> None:
        warm(runner, scripted, after_a_ping(lambda peer: peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")))
        answer = runner.request("GET", "/info")
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "engine_cut_body")

    def test_no_answer_is_told_and_not_asked_again(self, runner: Runner, scripted: ScriptedEngine) -> None:
        warm(runner, scripted, after_a_ping(lambda peer: None))
        answer = runner.request("GET", "/info")
        assert (answer.status, b"engine_cut_head" in answer.body) == (502, True)
        assert len(scripted.requests) == 1

    def test_a_connection_that_the_engine_has_closed_is_replaced(
        self, runner: Runner, scripted: ScriptedEngine
    ) -> None:
        def once(peer: Peer) -> None:
            peer.read_head()
            peer.send(PING)

        scripted.restart(once)
        assert runner.request("GET", "/_ping").body == b"pong"
        assert runner.request("GET", "/_ping").body == b"pong"
        assert scripted.connections == 2

    def test_a_caller_that_leaves_ends_the_engines_work(self, runner: Runner, scripted: ScriptedEngine) -> None:
        warm(runner, scripted, after_a_ping(Peer.sees_close))
        with runner.connect() as sock:
            sock.sendall(signed_head("GET", "/info"))
            scripted.wait(lambda: bool(scripted.requests), "the request")
        assert scripted.closed.wait(10)

    @pytest.mark.parametrize("more", [b"\x00", b"GET / HTTP/1.1\r\n", signed_head("GET", "/info")])
    def test_what_comes_with_a_request_keeps_it_from_the_engine(
        self, runner: Runner, scripted: ScriptedEngine, more: bytes
    ) -> None:
        warm(runner, scripted, answers(PING))
        answer = runner.raw(signed_head("GET", "/info") + more)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert runner.request("GET", "/_ping").body == b"pong"
        assert scripted.requests == []

    def test_a_caller_that_reads_nothing_is_held_for(self, runner: Runner, scripted: ScriptedEngine) -> None:
        body = b"x" * 200_000
        scripted.restart(lambda peer: peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + body))
        assert runner.request("GET", "/_ping").body == body
        before = runner.memory()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                sock = stack.enter_context(runner.connect(timeout=0.2))
                for _ in range(50):
                    with contextlib.suppress(TimeoutError):
                        sock.sendall(signed_head("GET", "/info"))
                        sock.recv(1)  # The answer has begun: the next request is no pipelining, once it is all written.
            assert runner.memory() - before < 32 * 1024 * 1024
        assert runner.request("GET", "/_ping").body == body

    def test_at_the_services_end_it_is_waited_for(self, runner: Runner, scripted: ScriptedEngine) -> None:
        def waits(peer: Peer) -> None:
            peer.engine.go.wait()
            peer.send(PING)

        warm(runner, scripted, after_a_ping(waits))
        with runner.connect() as sock:
            sock.sendall(signed_head("GET", "/info"))
            scripted.wait(lambda: bool(scripted.requests), "the request")
            runner.process.send_signal(signal.SIGTERM)
            _wait_until_refused(runner)
            scripted.go.set()
            assert read_to_end(sock).endswith(b"pong")
        assert runner.process.wait(10) == 0


def _wait_until_refused(runner: Runner) -> None:
    """The service has begun to end: it accepts no connection."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", runner.port), timeout=10).close()
        except ConnectionError:
            return
