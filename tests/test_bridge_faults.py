"""What goes wrong around the bridge: tools that leave, deaths at either end, runners that answer garbage, bad requests.

Whoever leaves or dies, the others learn it within a second, and nothing of it stays.
"""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_bridge import ATTACH, FLAT, JSON, MIB, MISSING, START, UPGRADE, Upload
from test_engine_face_streams import unframed

from bridged import (
    Bridge,
    ScriptedRunner,
    ask,
    read_answer,
    read_chunks,
    read_head,
    request,
)
from comparison import Containers
from conftest import EngineDirect, Names
from dev import busybox, wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from scripted import OK, Peer, chunked
from service import Runner, read_to_end

SILENCE_S = int(os.environ.get("SILENCE_S", "15"))
"""How long streams are silent; tools have been seen to wait for more than 40."""


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def pair(engine: Engine, short_folder: Path) -> Iterator[tuple[Runner, Bridge]]:
    """A runner and a bridge that nobody else uses, so that their sockets can be counted."""
    with Runner(engine.socket) as runner, Bridge(runner.url, f"unix://{short_folder}/pair.sock") as bridge:
        yield runner, bridge
    bridge.check_log()


@pytest.fixture(params=["unix", "tcp"], scope="module")
def either(request: pytest.FixtureRequest, engine: Engine, short_folder: Path) -> Iterator[tuple[Runner, Bridge]]:
    """The same on either kind of socket."""
    listen = f"unix://{short_folder}/either.sock" if request.param == "unix" else "tcp://127.0.0.1:0"
    with Runner(engine.socket) as runner, Bridge(runner.url, listen) as bridge:
        yield runner, bridge
    bridge.check_log()


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedRunner]:
    with ScriptedRunner(lambda peer: peer.answer(OK)) as runner:
        yield runner


@pytest.fixture(scope="module")
def fronting(scripted: ScriptedRunner, short_folder: Path) -> Iterator[Bridge]:
    """A bridge in front of the scripted runner; one for all tests: each also shows that it survived the last."""
    with Bridge(scripted.url, f"unix://{short_folder}/fronting.sock") as bridge:
        yield bridge
    bridge.check_log()


def exec_request(containers: Containers, box: str, *command: str, **config: object) -> bytes:
    """A request that starts a fresh exec."""
    target = f"/exec/{containers.exec(box, *command, **config)}/start"
    return request("POST", target, JSON, *UPGRADE, body=START)


def silent_requests(containers: Containers, box: str) -> dict[str, bytes]:
    """What begins to answer, and then says nothing."""
    return {
        "events": request("GET", f'/events?filters={{"container":["{MISSING}"]}}'),
        "logs": request("GET", f"/containers/{box}/logs?follow=1&stdout=1"),
        "wait": request("POST", f"/containers/{box}/wait"),
        "attach": request("POST", f"/containers/{box}/attach?{ATTACH}", *UPGRADE),
        "exec": exec_request(containers, box, "sleep", "1000"),
        "exec with input": exec_request(containers, box, "sleep", "1000", AttachStdin=True),
    }


SILENT = ("events", "logs", "wait", "attach", "exec", "exec with input")


class TestLeaving:
    @pytest.mark.parametrize("kind", SILENT)
    def test_a_tool_that_leaves_takes_all_connections_with_it_within_a_second(
        self, pair: tuple[Runner, Bridge], containers: Containers, box: str, kind: str
    ) -> None:
        runner, bridge = pair
        asked = silent_requests(containers, box)[kind]
        ask_and_close(bridge)  # So that a kept connection is there to be used.
        with bridge.connect() as sock:
            sock.sendall(asked)
            read_head(sock)
            during = (runner.sockets(), bridge.sockets())
        # At either: the way in, and the way on.
        assert wait_until(lambda: runner.sockets() <= during[0] - 2 and bridge.sockets() <= during[1] - 2, 1)

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_tool_that_leaves_before_the_answers_head_is_noticed(
        self, scripted: ScriptedRunner, fronting: Bridge, method: str
    ) -> None:
        def silent(peer: Peer) -> None:
            peer.read_request()
            peer.send(OK)
            peer.read_request()
            peer.sees_close()

        scripted.restart(silent)
        ask_and_close(fronting)  # What follows comes on a kept connection.
        with fronting.connect() as sock:
            sock.sendall(request(method, "/containers/json"))
            scripted.wait(lambda: len(scripted.requests) == 2, "the request")
        assert scripted.closed.wait(1)

    def test_a_tool_that_is_reset_on_tcp_is_noticed(
        self, either: tuple[Runner, Bridge], containers: Containers, box: str
    ) -> None:
        runner, bridge = either
        ask_and_close(bridge)
        before = (runner.sockets(), bridge.sockets())
        sock = bridge.connect()
        sock.sendall(exec_request(containers, box, "sleep", "1000"))
        read_head(sock)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        assert wait_until(lambda: runner.sockets() <= before[0] and bridge.sockets() <= before[1], 1)

    def test_a_half_closed_tool_still_gets_its_answer(self, either: tuple[Runner, Bridge], box: str) -> None:
        _, bridge = either
        with bridge.connect() as sock:
            sock.sendall(request("GET", f"/containers/{box}/json"))
            sock.shutdown(socket.SHUT_WR)
            assert read_answer(sock).status == 200
            assert read_to_end(sock) == b""

    def test_a_half_closed_follower_on_a_unix_socket_lives_on(
        self, pair: tuple[Runner, Bridge], containers: Containers
    ) -> None:
        name = containers("sh", "-c", "sleep 2; echo late")
        with pair[1].connect() as sock:
            sock.sendall(request("GET", f"/containers/{name}/logs?follow=1&stdout=1"))
            sock.shutdown(socket.SHUT_WR)
            assert unframed(read_answer(sock).body)[1] == b"late\n"

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_a_tool_that_leaves_in_the_midst_of_an_upload_completes_nothing(
        self, pair: tuple[Runner, Bridge], containers: Containers, direct: EngineDirect, framing: str
    ) -> None:
        runner, bridge = pair
        name = containers(start=False)
        before = (runner.sockets(), bridge.sockets())
        upload = Upload("cut", 8 * MIB)
        with bridge.connect() as sock:
            target = f"/containers/{name}/archive?path=/tmp"
            fields = f"Content-Length: {upload.length}" if framing == "length" else "Transfer-Encoding: chunked"
            sock.sendall(request("PUT", target, fields))
            for number, piece in enumerate(upload):
                if number == 16:
                    break
                sock.sendall(piece if framing == "length" else b"%x\r\n%b\r\n" % (len(piece), piece))
        assert wait_until(lambda: runner.sockets() <= before[0] and bridge.sockets() <= before[1], 1)
        found = direct.request("HEAD", f"/containers/{name}/archive?path=/tmp/cut")
        stat = base64.b64decode(found.headers.get("X-Docker-Container-Path-Stat", ""))
        assert b'"size":8388608' not in stat

    def test_a_tool_that_leaves_while_its_input_is_not_read_is_noticed(
        self, pair: tuple[Runner, Bridge], containers: Containers, box: str
    ) -> None:
        runner, bridge = pair
        with bridge.connect() as sock:
            sock.sendall(exec_request(containers, box, "sleep", "1000", AttachStdin=True))
            read_head(sock)
            during = (runner.sockets(), bridge.sockets())
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                sock.sendall(bytes(64 * MIB))
        assert wait_until(lambda: runner.sockets() <= during[0] - 2 and bridge.sockets() <= during[1] - 2, 1)

    def test_a_tool_that_leaves_while_its_upload_is_not_read_is_noticed(
        self, scripted: ScriptedRunner, fronting: Bridge
    ) -> None:
        def reads_nothing(peer: Peer) -> None:
            peer.read_head()
            scripted.go.set()
            peer.wait_hangup()
            scripted.closed.set()

        scripted.restart(reads_nothing)
        with fronting.connect() as sock:
            sock.sendall(request("PUT", "/containers/x/archive?path=/", f"Content-Length: {64 * MIB}"))
            assert scripted.go.wait(5)
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                sock.sendall(bytes(64 * MIB))
        assert scripted.closed.wait(1)

    def test_a_tool_that_does_not_read_costs_no_memory_and_disturbs_nobody(
        self, pair: tuple[Runner, Bridge], containers: Containers, box: str
    ) -> None:
        runner, bridge = pair
        before = (bridge.memory(), runner.memory())
        with bridge.connect() as lazy, bridge.connect() as lazy_too:
            lazy.sendall(exec_request(containers, box, "timeout", "30", "yes"))
            lazy_too.sendall(request("GET", f"/containers/{box}/archive?path=/bin"))
            read_head(lazy)
            for _ in range(50):
                assert bridge.ask(request("GET", f"/containers/{box}/json")).status == 200
            assert bridge.memory() - before[0] < FLAT
            assert runner.memory() - before[1] < FLAT


def ask_and_close(bridge: Bridge) -> None:
    assert bridge.ask(request("GET", "/_ping")).status == 200


class Transfers:
    """One of each kind of transfer, in its midst. A context manager."""

    def __init__(self, bridge: Bridge, containers: Containers) -> None:
        self._bridge = bridge
        self.sockets: dict[str, socket.socket] = {}
        box = containers()
        self._begin("attach", request("POST", f"/containers/{box}/attach?{ATTACH}", *UPGRADE))
        self._begin("exec", exec_request(containers, box, "cat", AttachStdin=True))
        self._begin("events", request("GET", f'/events?filters={{"container":["{MISSING}"]}}'))
        self._begin("download", request("GET", f"/containers/{box}/logs?follow=1&stdout=1"))
        upload = self.sockets["upload"] = bridge.connect()
        upload.sendall(request("PUT", f"/containers/{box}/archive?path=/tmp", f"Content-Length: {100 * MIB}"))
        upload.sendall(next(iter(Upload("cut", 90 * MIB))) + bytes(3 * MIB))

    def _begin(self, kind: str, asked: bytes) -> None:
        sock = self.sockets[kind] = self._bridge.connect()
        sock.sendall(asked)
        assert read_head(sock).split()[1] in (b"200", b"101")

    def check_ends(self, *, answered: bool) -> None:
        """Each tool learns within a second that this was not all.

        Args:
            answered: the upload gets an error for its answer.
        """
        begun = time.monotonic()
        with ThreadPoolExecutor(len(self.sockets)) as pool:
            ends = dict(zip(self.sockets, pool.map(read_to_end, self.sockets.values()), strict=True))
        assert time.monotonic() - begun < 1.5
        assert ends["attach"] == ends["exec"] == b""
        assert not ends["events"].endswith(b"0\r\n\r\n")
        assert not ends["download"].endswith(b"0\r\n\r\n")
        if answered:
            assert ends["upload"].startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        else:
            assert ends["upload"] == b""

    def __enter__(self) -> "Transfers":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets.values():
            sock.close()


class TestDeaths:
    @pytest.fixture
    def listen(self, short_folder: Path) -> str:
        return f"unix://{short_folder}/deaths.sock"

    def test_of_the_runner(self, engine: Engine, listen: str, containers: Containers) -> None:
        with Runner(engine.socket) as runner, Bridge(runner.url, listen) as bridge:
            before = bridge.sockets()
            with Transfers(bridge, containers) as transfers:
                runner.process.kill()
                runner.process.wait()
                transfers.check_ends(answered=True)
            assert wait_until(lambda: bridge.sockets() <= before, 2)
            bridge.check_log()

    def test_of_the_bridge(self, engine: Engine, listen: str, containers: Containers) -> None:
        with Runner(engine.socket) as runner:
            before = runner.sockets()
            with Bridge(runner.url, listen) as bridge, Transfers(bridge, containers) as transfers:
                bridge.process.kill()
                bridge.process.wait()
                transfers.check_ends(answered=False)
                assert wait_until(lambda: runner.sockets() <= before + 2, 1)  # Kept connections to the engine.
            with Bridge(runner.url, listen) as bridge:  # The socket file that was left is replaced.
                ask_and_close(bridge)

    def test_of_the_engine(self, private_engine: PrivateEngine, listen: str, names: Names) -> None:
        image = names("image") + ":latest"
        busybox.import_image(private_engine, image)
        containers = Containers(EngineDirect(private_engine.socket), names, image)
        with Runner(private_engine.socket) as runner, Bridge(runner.url, listen) as bridge:
            before = (runner.sockets(), bridge.sockets())
            with Transfers(bridge, containers) as transfers:
                private_engine.kill()
                transfers.check_ends(answered=True)
            assert wait_until(lambda: runner.sockets() <= before[0] and bridge.sockets() <= before[1] + 5, 2)
            bridge.check_log()
            refused = bridge.ask(request("GET", "/_ping"))
            assert refused.status == 503
            private_engine.start()
            assert bridge.ask(request("GET", "/_ping")).body == b"OK"


class TestRunnerDown:
    def test_it_is_told_clearly_and_works_again_after_a_restart(self, engine: Engine, short_folder: Path) -> None:
        with Runner(engine.socket) as first:
            port = first.port
            bridge = Bridge(first.url, f"unix://{short_folder}/down.sock")
            kept = bridge.connect()
            assert ask(kept, request("GET", "/_ping")).status == 200
        with bridge, kept:
            for asked in (
                request("GET", "/containers/json"),
                request("POST", f"/containers/{MISSING}/attach?{ATTACH}", *UPGRADE),
                request("POST", f"/exec/{MISSING}/start", JSON, body=START),
            ):
                answer = ask(kept, asked)
                assert answer.status == 503
                assert answer.header(b"content-type") == b"application/json"
                said = json.loads(answer.body)
                assert said["message"].startswith(f"docker-runner bridge: no way to the runner at {first.url}: ")
                assert said["error"] == {"code": "runner_unreachable", "message": said["message"], "retryable": True}
            with Runner(engine.socket, {"DOCKER_RUNNER_PORT": str(port)}):
                assert ask(kept, request("GET", "/_ping")).body == b"OK"
            bridge.check_log()

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_restart_between_two_requests_is_not_noticed(
        self, engine: Engine, short_folder: Path, method: str
    ) -> None:
        with Runner(engine.socket) as first:
            port = first.port
            bridge = Bridge(first.url, f"unix://{short_folder}/restart.sock")
            ask_and_close(bridge)
            first.stop(signal.SIGKILL)
        with bridge, Runner(engine.socket, {"DOCKER_RUNNER_PORT": str(port)}):
            target = "/_ping" if method == "GET" else f"/containers/{MISSING}/start"
            assert bridge.ask(request(method, target)).status == (200 if method == "GET" else 404)

    @pytest.mark.parametrize(("method", "times"), [("GET", 2), ("HEAD", 2), ("POST", 1), ("DELETE", 1)])
    def test_what_a_kept_connection_lost_is_asked_again_only_if_it_changes_nothing(
        self, scripted: ScriptedRunner, fronting: Bridge, method: str, times: int
    ) -> None:
        def dies_at_the_second(peer: Peer) -> None:
            peer.read_request()
            peer.send(OK)
            if peer.number == 1:
                peer.read_request()
            else:
                peer.answer(OK)

        scripted.restart(dies_at_the_second)
        ask_and_close(fronting)
        status = fronting.ask(request(method, "/containers/x")).status
        assert status == (200 if times == 2 else 502)
        sent = [sent for sent in scripted.requests if sent.startswith(f"{method} /containers/x".encode())]
        assert len(sent) == times
        nonces = [line for one in sent for line in one.split(b"\r\n") if line.startswith(b"X-DR-Nonce:")]
        assert len(set(nonces)) == times

    def test_a_late_word_on_a_kept_connection_is_no_answer(self, scripted: ScriptedRunner, fronting: Bridge) -> None:
        late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

        def times_out(peer: Peer) -> None:
            peer.read_request()
            peer.send(OK)
            if peer.number == 1:
                peer.send(late, b"")
            else:
                peer.answer(OK)

        scripted.restart(times_out)
        ask_and_close(fronting)
        scripted.wait(lambda: scripted.open == 0, "the end")
        assert fronting.ask(request("GET", "/_ping")).status == 200

    @pytest.mark.parametrize(
        "answer",
        [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 101 Ha\r\n\r\n", bytes(600_000)],
    )
    @pytest.mark.parametrize("kind", ["plain", "taken over", "upload"])
    def test_what_is_no_answer_is_a_502(
        self, scripted: ScriptedRunner, fronting: Bridge, answer: bytes, kind: str
    ) -> None:
        def garbage(peer: Peer) -> None:
            peer.read_request()
            peer.sock.sendall(answer)

        scripted.restart(garbage)
        asked = {
            "plain": request("GET", "/containers/json"),
            "taken over": request("POST", f"/containers/{MISSING}/attach?{ATTACH}", *UPGRADE),
            "upload": request("POST", "/images/load", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n",
        }[kind]
        with fronting.connect() as sock:
            got = ask(sock, asked)
        assert got.status in ((502, 503) if kind == "taken over" else (502,))
        assert json.loads(got.body)["error"]["code"] in ("runner_cut", "runner_unreachable")

    @pytest.mark.parametrize(
        "cut",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"some", last=False),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"some", last=False) + b"zz\r\n",
        ],
    )
    def test_an_answer_that_breaks_off_is_seen_to_be_incomplete(
        self, scripted: ScriptedRunner, fronting: Bridge, cut: bytes
    ) -> None:
        def breaks_off(peer: Peer) -> None:
            peer.read_request()
            peer.send(cut)

        scripted.restart(breaks_off)
        with pytest.raises(http.client.IncompleteRead):
            fronting.ask(request("GET", "/containers/json"))

    def test_a_slow_answer_is_given_as_it_comes(self, scripted: ScriptedRunner, fronting: Bridge) -> None:
        def slow(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Enc", b"oding: chunked\r\n\r\n4\r\nso", b"me\r\n")
            assert scripted.go.wait(10)
            peer.send(chunked(b"more"))

        scripted.restart(slow)
        with fronting.connect() as sock:
            sock.sendall(request("GET", "/events"))
            read_head(sock)
            chunks = read_chunks(sock)
            assert next(chunks) == b"some"
            scripted.go.set()
            assert list(chunks) == [b"more"]


class TestBadRequests:
    """What two readers of one request could read in two ways is refused, and goes no further."""

    @pytest.mark.parametrize(
        ("status", "sent"),
        [
            (400, b"GET /_ping HTTP/1.1\nHost: x\n\n"),
            (400, b"GET /_ping HTTP/1.1\r\nHost: x\nX: y\r\n\r\n"),
            (400, b"GET /_ping HTTP/1.1\r\n\r\n"),
            (400, b"GET /_ping HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
            (400, b"GET http://x/_ping HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, b"GET /_ping#x HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, b"GET /_ping\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, b"GET /_ping x HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"),
            (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (400, b"GET /_ping HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n"),
            (400, b"GET /_ping HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n"),
            (
                400,
                b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            (400, b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx"),
            (400, b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\nx"),
            (400, b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx"),
            (400, b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            (431, b"GET /_ping HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"),
            (431, b"GET /_ping HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000),
        ],
    )
    def test_a_malformed_head_is_refused_at_once(
        self, scripted: ScriptedRunner, fronting: Bridge, status: int, sent: bytes
    ) -> None:
        scripted.restart(lambda peer: peer.answer(OK))
        begun = time.monotonic()
        with fronting.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(sent + request("GET", "/smuggled"))
            answer = read_answer(sock)
            assert read_to_end(sock) == b""
        assert time.monotonic() - begun < 0.5
        assert answer.status == status
        assert json.loads(answer.body)["message"]
        assert scripted.requests == []

    @pytest.mark.parametrize("body", [b"zz\r\nx\r\n", b"1\r\nxy0\r\n\r\n", b"1;" + b"x" * 200_000])
    def test_lost_count_of_chunks_ends_the_connection(
        self, scripted: ScriptedRunner, fronting: Bridge, body: bytes
    ) -> None:
        scripted.restart(lambda peer: peer.answer(OK))
        with fronting.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(request("POST", "/commit", "Transfer-Encoding: chunked") + body)
                sock.sendall(request("GET", "/smuggled"))
            assert b" 200 " not in read_to_end(sock)
        assert scripted.requests == []


class TestLasting:
    def test_silent_streams_last(self, pair: tuple[Runner, Bridge], containers: Containers, box: str) -> None:
        _, bridge = pair
        words = f"sleep {SILENCE_S}; echo late"
        with contextlib.ExitStack() as stack:
            ends: list[tuple[socket.socket, bytes]] = []
            spoken = containers("sh", "-c", words)
            for asked in (
                request("POST", f"/containers/{spoken}/wait"),
                request("POST", f"/containers/{spoken}/attach?stream=1&stdout=1", *UPGRADE),
                exec_request(containers, box, "sh", "-c", words),
                *[request("GET", f"/containers/{spoken}/logs?follow=1&stdout=1")] * 20,
            ):
                sock = stack.enter_context(bridge.connect(SILENCE_S + 20))
                sock.sendall(asked)
                head = read_head(sock)
                ends.append((sock, head))
            with bridge.connect() as sock:
                sock.sendall(exec_request(containers, box, "echo", "now"))
                assert read_to_end(sock).endswith(b"now\n")
            for number, (sock, head) in enumerate(ends):
                data = b"".join(read_chunks(sock)) if b"chunked" in head else read_to_end(sock)
                assert b'"StatusCode":0' in data if number == 0 else data.endswith(b"late\n")

    def test_half_closed_streams_survive_the_garbage_collector(
        self, engine: Engine, short_folder: Path, containers: Containers, box: str
    ) -> None:
        with (
            Runner(engine.socket, forced_gc=True) as runner,
            Bridge(runner.url, f"unix://{short_folder}/gc.sock", forced_gc=True) as bridge,
        ):

            def one(number: int) -> bytes:
                script = f"cat; for i in 1 2 3; do sleep 0.3; echo {number}-$i; done"
                if number % 4:
                    asked = exec_request(containers, box, "sh", "-c", script, AttachStdin=True)
                else:
                    name = containers("sh", "-c", script, OpenStdin=True, StdinOnce=True, start=False)
                    asked = request("POST", f"/containers/{name}/attach?{ATTACH}", *UPGRADE)
                with bridge.connect(60) as sock:
                    sock.sendall(asked)
                    read_head(sock)
                    if not number % 4:
                        containers.do("POST", f"/containers/{name}/start", 204)
                    sock.sendall(b"in\n")
                    sock.shutdown(socket.SHUT_WR)
                    return unframed(read_to_end(sock))[1]

            with ThreadPoolExecutor(15) as pool:
                assert list(pool.map(one, range(60))) == [
                    f"in\n{number}-1\n{number}-2\n{number}-3\n".encode() for number in range(60)
                ]
            bridge.check_log()
