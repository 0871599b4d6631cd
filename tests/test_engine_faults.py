"""What goes wrong between the runner and the engine, told with one code each: by the client, and over HTTP.

A stream that breaks never looks complete: the caller's connection is aborted, or, where the format has a line for
errors, the last line tells.
"""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dev import wait_until
from dev.private_engine import PrivateEngine
from dockerapi import Engine
from engine_connection import MAX_HEAD
from errors import CODES, RunnerError
from loops import LOOPS, Run, run_on, until
from scripted import OK, PATIENCE_S, Peer, Script, ScriptedEngine, chunked, listener_that_never_accepts
from service import Answer, Runner, signed_head

SETTINGS = {
    "DOCKER_RUNNER_ENGINE_HEAD_MS": "300",
    "DOCKER_RUNNER_ENGINE_CONNECT_MS": "200",
    "DOCKER_RUNNER_ENGINE_QUEUE_MS": "200",
    "DOCKER_RUNNER_ENGINE_CONNECTIONS": "2",
}

HEAD_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
HEAD_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return run_on(request.param)


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: None) as engine:
        yield engine


@pytest.fixture(scope="module")
def fronted(scripted: ScriptedEngine) -> Iterator[Runner]:
    """A runner in front of the scripted engine; one for all tests: each also shows that it survived the last."""
    with Runner(scripted.path, SETTINGS) as runner:
        yield runner


def is_error(answer: Answer, code: str) -> bool:
    """Whether the answer is this error, as the table has it."""
    error = json.loads(answer.body)["error"]
    row = CODES[code]
    assert (answer.status, error["code"], error["retryable"]) == (row.status, code, row.retryable)
    assert answer.header("retry-after") == ("1" if row.status == 503 else None)
    return True


def request_of(path: str, **options: Any) -> Any:
    engine = Engine(path, max_connections=2, queue_s=0.2, connect_s=0.2)
    return engine.request(b"GET", b"/version", head_s=0.3, **options)


async def code_of(path: str) -> str:
    with pytest.raises(RunnerError) as raised, await request_of(path) as response:
        await response.read(1 << 20)
    return raised.value.code


# No connection.


def no_socket(folder: Path) -> Path:
    return folder / "absent"


def no_folder(folder: Path) -> Path:
    return folder / "absent" / "s"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "s"


def a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def a_folder(folder: Path) -> Path:
    return folder


def a_socket_without_a_listener(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "s"))
    return folder / "s"


UNREACHABLE: list[tuple[Callable[[Path], Path], str]] = [
    (no_socket, "engine_socket_missing"),
    (no_folder, "engine_socket_missing"),
    (below_a_file, "engine_socket_missing"),
    (a_file, "engine_refused"),
    (a_folder, "engine_refused"),
    (a_socket_without_a_listener, "engine_refused"),
]


@pytest.fixture
def folder(short_folder: Path) -> Path:
    made = short_folder / f"f{time.monotonic_ns()}"
    made.mkdir()
    return made


class TestUnreachable:
    @pytest.mark.parametrize(("make", "code"), UNREACHABLE)
    def test_client(self, run: Run, folder: Path, make: Callable[[Path], Path], code: str) -> None:
        async def test() -> None:
            assert await code_of(str(make(folder))) == code

        run(test())

    def test_client_at_a_full_backlog(self, run: Run) -> None:
        async def test() -> None:
            with listener_that_never_accepts() as path:
                assert await code_of(path) == "engine_connect_timeout"

        run(test())

    def test_http(self, folder: Path) -> None:
        # One runner: its socket is a link that is made to lead to one place after another.
        link = folder / "link"
        with Runner(str(link), SETTINGS) as runner:
            for make, code in UNREACHABLE:
                below = folder / make.__name__
                below.mkdir()
                link.symlink_to(make(below))
                assert is_error(runner.request("GET", "/version"), code), make.__name__
                link.unlink()
            with listener_that_never_accepts() as path:
                link.symlink_to(path)
                assert is_error(runner.request("GET", "/version"), "engine_connect_timeout")
                link.unlink()
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                link.symlink_to(engine.path)
                assert runner.request("GET", "/version").status == 200

    @pytest.mark.parametrize("closed", ["socket", "folder"])
    def test_http_without_permission(self, folder: Path, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.geteuid() == 0:
            # Root without the right to pass over permissions is stopped by them like anybody.
            python = folder / "python"
            python.write_text(
                f'#!/bin/sh\nexec setpriv --bounding-set=-dac_override,-dac_read_search {sys.executable} "$@"\n'
            )
            python.chmod(0o700)
            monkeypatch.setattr(sys, "executable", str(python))
        with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
            shut = Path(engine.path) if closed == "socket" else Path(engine.path).parent
            before = stat.S_IMODE(shut.stat().st_mode)
            with Runner(engine.path, SETTINGS) as runner:
                assert runner.request("GET", "/version").status == 200
                engine.stop()
                engine.listen()
                shut.chmod(0)
                try:
                    assert is_error(runner.request("GET", "/version"), "engine_permission_denied")
                finally:
                    shut.chmod(before)


# No answer.


def cut_before_the_head(peer: Peer) -> None:
    peer.read_request()


def reset_before_the_head(peer: Peer) -> None:
    peer.sock.recv(1, socket.MSG_PEEK)


def cut_within_the_head(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Le")


def cut_after_an_interim_answer(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def another_protocol(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")
    peer.wait_closed()


def a_status_that_answers_nothing(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 000 Z\r\nContent-Length: 0\r\n\r\n")
    peer.wait_closed()


def a_status_past_all(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 999 Z\r\nContent-Length: 0\r\n\r\n")
    peer.wait_closed()


def an_upgrade_that_nobody_asked_for(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nraw")
    peer.wait_closed()


def garbage_within_the_head(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n")
    peer.wait_closed()


def a_length_that_is_no_number(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n")
    peer.wait_closed()


def two_lengths(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")
    peer.wait_closed()


def a_head_too_long(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(MAX_HEAD // 1000 + 1000):
            peer.send(b"X-Long: %b\r\n" % (b"x" * 1000))
        raise AssertionError("the caller would read for ever")


def interim_answers_without_end(peer: Peer) -> None:
    peer.read_request()
    with contextlib.suppress(ConnectionError):
        for _ in range(MAX_HEAD):
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        raise AssertionError("the caller would read for ever")


def no_answer(peer: Peer) -> None:
    peer.read_request()
    peer.wait_closed()


def a_head_in_drops(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(ConnectionError):
        while not peer.engine.closed.wait(0.01):
            peer.send(b"X: y\r\n")


NO_ANSWER: list[tuple[Script, str]] = [
    (cut_before_the_head, "engine_cut_head"),
    (reset_before_the_head, "engine_cut_head"),
    (cut_within_the_head, "engine_cut_head"),
    (cut_after_an_interim_answer, "engine_cut_head"),
    (another_protocol, "engine_garbage"),
    (garbage_within_the_head, "engine_garbage"),
    (a_status_that_answers_nothing, "engine_garbage"),
    (a_status_past_all, "engine_garbage"),
    (an_upgrade_that_nobody_asked_for, "engine_garbage"),
    (a_length_that_is_no_number, "engine_garbage"),
    (two_lengths, "engine_garbage"),
    (a_head_too_long, "engine_garbage"),
    (interim_answers_without_end, "engine_garbage"),
    (no_answer, "engine_timeout"),
    (a_head_in_drops, "engine_timeout"),
]


class TestNoAnswer:
    @pytest.mark.parametrize(("script", "code"), NO_ANSWER)
    def test_client(self, run: Run, script: Script, code: str) -> None:
        async def test() -> None:
            with ScriptedEngine(script) as engine:
                assert await code_of(engine.path) == code
                await until(lambda: engine.open == 0)
                assert engine.connections == 1

        run(test())

    @pytest.mark.parametrize(("script", "code"), NO_ANSWER)
    def test_http(self, scripted: ScriptedEngine, fronted: Runner, script: Script, code: str) -> None:
        scripted.restart(script)
        assert is_error(fronted.request("GET", "/version"), code)
        scripted.wait(lambda: scripted.open == 0, "the runner to close")
        assert scripted.connections == 1
        scripted.restart(lambda peer: peer.answer(OK))
        assert fronted.request("GET", "/version").body == b"ok"

    def test_http_when_all_connections_are_in_use(self, scripted: ScriptedEngine, fronted: Runner) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(HEAD_CHUNKED + chunked(b"{}\n", last=False))
            peer.wait_closed()

        scripted.restart(script)
        with fronted.stream("GET", "/containers/a/stats"), fronted.stream("GET", "/containers/b/stats"):
            assert is_error(fronted.request("GET", "/version"), "engine_busy")
        scripted.wait(lambda: scripted.open == 0, "the runner to close")
        scripted.restart(lambda peer: peer.answer(OK))
        assert fronted.request("GET", "/version").body == b"ok"


# Half an answer.


def receive_all(sock: socket.socket) -> None:
    while sock.recv(1000):
        pass


@contextlib.contextmanager
def logged(runner: Runner, code: str) -> Iterator[None]:
    """Within it the runner's log names this code (its lines come a little later than the answers)."""
    before = len(runner.log)
    yield
    assert wait_until(lambda: any(code in line for line in runner.log[before:]), PATIENCE_S), runner.log[before:]


def broken(*parts: bytes) -> Script:
    """Send the first part, wait for `go`, send the rest, close."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(parts[0])
        peer.engine.go.wait(PATIENCE_S)
        for part in parts[1:]:
            peer.send(part)

    return script


HALF: dict[str, tuple[tuple[bytes, ...], str]] = {
    "length": ((HEAD_LENGTH + b"part",), "engine_cut_body"),
    "chunked": ((HEAD_CHUNKED + chunked(b"part", last=False),), "engine_cut_body"),
    "within a chunk": ((HEAD_CHUNKED + b"8\r\npart",), "engine_cut_body"),
    "within the last chunk": ((HEAD_CHUNKED + chunked(b"part", last=False), b"0\r\n"), "engine_cut_body"),
    "chunk without its end": ((HEAD_CHUNKED + chunked(b"part", last=False), b"2\r\nxxyy"), "engine_garbage"),
    "no chunk": ((HEAD_CHUNKED + chunked(b"part", last=False), b"garbage\r\n"), "engine_garbage"),
}


@pytest.mark.parametrize(("parts", "code"), HALF.values(), ids=HALF)
class TestHalfAnAnswer:
    def test_client(self, run: Run, parts: tuple[bytes, ...], code: str) -> None:
        async def test() -> None:
            with ScriptedEngine(broken(*parts)) as engine, await request_of(engine.path) as response:
                assert await response.next() == b"part"
                engine.go.set()
                with pytest.raises(RunnerError) as raised:
                    await response.read(1 << 20)
                assert raised.value.code == code
                assert not response.ended

        run(test())

    def test_http_gives_what_came_and_aborts(
        self, scripted: ScriptedEngine, fronted: Runner, parts: tuple[bytes, ...], code: str
    ) -> None:
        scripted.restart(broken(*parts))
        with logged(fronted, code), fronted.stream("GET", "/containers/x/logs") as response:
            assert response.status == 200
            assert response.read(4) == b"part"
            scripted.go.set()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()

    def test_http_1_0_is_told_by_a_reset(
        self, scripted: ScriptedEngine, fronted: Runner, parts: tuple[bytes, ...], code: str
    ) -> None:
        scripted.restart(broken(*parts))
        head = signed_head("GET", "/containers/x/logs").replace(b"HTTP/1.1", b"HTTP/1.0")
        with fronted.connect() as sock:
            sock.sendall(head)
            got = b""
            while not got.endswith(b"part"):
                got += sock.recv(1000)
            assert b"transfer-encoding" not in got.lower()
            scripted.go.set()
            with pytest.raises(ConnectionResetError):  # An end without one would be the end of the body.
                receive_all(sock)

    def test_http_in_one_piece_is_an_error_or_an_abort(
        self, scripted: ScriptedEngine, fronted: Runner, parts: tuple[bytes, ...], code: str
    ) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.sock.sendall(b"".join(parts))

        # Whether the break is known by then is a race that either side may win; a complete answer is the only defect.
        scripted.restart(script)
        aborts = (http.client.IncompleteRead, ConnectionResetError, http.client.RemoteDisconnected)
        for _ in range(5):
            with logged(fronted, code), contextlib.suppress(*aborts):
                assert is_error(fronted.request("GET", "/containers/x/logs"), code)


class TestHalfALine:
    """Operations whose answers leave in whole lines."""

    def test_progress_tells_in_its_last_line(self, scripted: ScriptedEngine, fronted: Runner) -> None:
        scripted.restart(broken(HEAD_CHUNKED + chunked(b'{"a":1}\r\n{"b"', last=False)))
        with fronted.stream("POST", "/images/create?fromImage=x&tag=y") as response:
            assert response.readline() == b'{"a":1}\r\n'
            scripted.go.set()
            last = json.loads(response.read())
        assert last["errorDetail"]["message"] == last["error"]
        assert "broke off" in last["error"]

    def test_lines_abort_without_the_part_of_a_line(self, scripted: ScriptedEngine, fronted: Runner) -> None:
        scripted.restart(broken(HEAD_CHUNKED + chunked(b'{"a":1}\n{"b"', last=False)))
        with fronted.stream("GET", "/containers/x/stats") as response:
            assert response.readline() == b'{"a":1}\n'
            scripted.go.set()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)) as raised:
                response.read()
            assert getattr(raised.value, "partial", b"") == b""

    def test_a_progress_that_ends_whole_ends_as_the_engine_ended_it(
        self, scripted: ScriptedEngine, fronted: Runner
    ) -> None:
        scripted.restart(lambda peer: peer.answer(HEAD_CHUNKED + chunked(b'{"a":1}\r\n{"no newline":2}')))
        answer = fronted.request("POST", "/images/create?fromImage=x&tag=y")
        assert answer.body == b'{"a":1}\r\n{"no newline":2}'


class TestOddButWhole:
    """Answers that are unusual, and complete, over HTTP."""

    @pytest.mark.parametrize(
        ("method", "engines", "status", "body"),
        [
            ("GET", OK + OK, 200, b"ok"),
            ("GET", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", 200, b""),
            ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b""),
            ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        ],
    )
    def test_is_relayed_and_the_next_request_is_served(
        self, scripted: ScriptedEngine, fronted: Runner, method: str, engines: bytes, status: int, body: bytes
    ) -> None:
        scripted.restart(lambda peer: peer.answer(engines))
        for _ in range(3):
            answer = fronted.request(method, "/_ping")
            assert (answer.status, answer.body) == (status, body)

    def test_a_body_until_the_connection_ends(self, scripted: ScriptedEngine, fronted: Runner) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n", b"all of it")

        scripted.restart(script)
        assert fronted.request("POST", "/containers/x/attach?stream=1&stdout=1").body == b"all of it"

    def test_an_engine_that_refuses_a_long_body_unread_is_heard(
        self, scripted: ScriptedEngine, fronted: Runner
    ) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 16\r\n\r\n" + b'{"message":"no"}')

        scripted.restart(script)
        for _ in range(5):
            answer = fronted.request("PUT", "/containers/x/archive?path=/", b"x" * 3_000_000)
            assert (answer.status, answer.body) == (404, b'{"message":"no"}')

    def test_a_request_with_a_body_is_seen_once(self, scripted: ScriptedEngine, fronted: Runner) -> None:
        def script(peer: Peer) -> None:
            if peer.number == 1:
                peer.read_request()
                peer.send(OK)
            peer.read_request()

        scripted.restart(script)
        assert fronted.request("GET", "/version").status == 200
        assert is_error(fronted.request("POST", "/containers/create", b"{}"), "engine_cut_head")
        assert scripted.connections == 1
        assert scripted.targets() == [b"/version", b"/containers/create"]


class TestKilledEngine:
    def test_callers_learn_at_once_and_the_next_engine_is_served(self, private_engine: PrivateEngine) -> None:
        with Runner(private_engine.socket) as runner:
            assert runner.request("GET", "/version").status == 200
            with contextlib.ExitStack() as stack:
                events = stack.enter_context(runner.stream("GET", "/events?filters=%7B%7D"))
                quiet = stack.enter_context(runner.stream("GET", "/v1.41/events"))
                made = runner.request(
                    "POST", "/volumes/create", b'{"Name":"dr-test-killed"}', {"Content-Type": "application/json"}
                )
                assert made.status == 201
                assert b"dr-test-killed" in events.readline()
                private_engine.kill()
                killed = time.monotonic()
                for stream in (events, quiet):
                    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                        stream.read()
                assert time.monotonic() - killed < 1
            answer = runner.request("GET", "/version")
            assert is_error(answer, "engine_refused")
            assert runner.request("GET", "/v1/ready").status == 503
            private_engine.start()
            assert runner.request("GET", "/version").status == 200
            assert runner.request("DELETE", "/volumes/dr-test-killed").status == 204

    def test_the_client_learns_at_once(self, run: Run, private_engine: PrivateEngine) -> None:
        async def test() -> None:
            docker = Engine(private_engine.socket, max_connections=4, queue_s=1, connect_s=2)
            with await docker.request(b"GET", b"/events") as response:
                await asyncio.to_thread(private_engine.kill)
                async with asyncio.timeout(1):
                    with pytest.raises(RunnerError) as raised:
                        await response.next()
                assert raised.value.code == "engine_cut_body"
            assert not docker._open
            private_engine.start()  # In this thread, with which it would end.
            await docker.ping(5)
            docker.close()

        run(test())
