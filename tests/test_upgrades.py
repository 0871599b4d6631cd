"""Upgraded streams (WIRE, section 5) on a real engine, beside the engine's own hijacked streams: the same bytes both
ways, both halves, every end told, nothing held in memory, nothing left behind, whatever the caller does."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engine_face_streams import unframed
from websockets.exceptions import ConnectionClosed, InvalidStatus

from chunked import chunk_headers
from comparison import HOP_BY_HOP, Containers
from conftest import EngineDirect, Names
from dev import busybox
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from loops import run_on, until
from scripted import OK, Peer, ScriptedEngine, listener_that_never_accepts
from service import Runner
from upgraded import EOF, MIB, Upgraded, hijacked, socket_of, upgrade_headers, upgraded
from upgrades import Witness

START = '{"Detach":false,"Tty":false}'
START_TTY = '{"Detach":false,"Tty":true}'
WHOLE = (True, 1000)
"""How a stream that ended whole ends: with an eof, and a close."""
BROKEN = (False, 1011)
MANY = 200 * MIB
FLAT = 16 * MIB
"""Bytes that a runner's memory may grow by under one stream, of whatever length."""
SILENCE_S = int(os.environ.get("SILENCE_S", "15"))
UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nContent-Type: x/y\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
RAW = b"HTTP/1.1 200 OK\r\nContent-Type: x/y\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def watched(engine: Engine) -> Iterator[Runner]:
    """A runner whose log must not tell of a defect, whatever callers do to it."""
    with Runner(engine.socket) as running:
        yield running
    check_log(running)


def check_log(runner: Runner) -> None:
    log = "".join(runner.log)
    for sign in ("defect", "Traceback", "never retrieved", "was destroyed"):
        assert sign not in log, log


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: None) as engine:
        yield engine


@pytest.fixture(scope="module")
def fronted(scripted: ScriptedEngine) -> Iterator[Runner]:
    """A runner in front of the scripted engine that can have one connection only, and is impatient with callers."""
    settings = {"DOCKER_RUNNER_ENGINE_CONNECTIONS": "1", "DOCKER_RUNNER_BODY_TIMEOUT_MS": "300"}
    with Runner(scripted.path, settings) as running:
        yield running
    check_log(running)


def within(limit_s: float, test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine to its end, in bounded time."""

    async def bounded() -> None:
        async with asyncio.timeout(limit_s):
            await test

    asyncio.run(bounded())


def start_of(found: str) -> str:
    """The target that starts an exec."""
    return f"/v1.41/exec/{found}/start"


@contextlib.asynccontextmanager
async def command(
    runner: Runner, containers: Containers, name: str, script: str, *, tty: bool = False, **kw: Any
) -> AsyncIterator[Upgraded]:
    """The stream of a shell command, with its input."""
    found = containers.exec(name, "sh", "-c", script, AttachStdin=True, Tty=tty)
    async with upgraded(runner, start_of(found), START_TTY if tty else START, **kw) as stream:
        yield stream


def output(stream: Upgraded) -> bytes:
    """What a command without a terminal wrote to its output."""
    return unframed(bytes(stream.data))[1]


def end_to_end(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in HOP_BY_HOP and name != "date"}


def hand_over(peer: Peer) -> None:
    """A script: the engine hands the first connection over, and ends its half; it answers whatever else is asked."""
    if peer.number == 1:
        peer.read_request()
        peer.send(UPGRADED + b"out")
    else:
        peer.answer(OK)


class TestSameAsTheEngine:
    SCRIPTS = (
        "true",
        "echo out; echo err >&2; exit 3",
        "head -c 3000000 /dev/zero | tr '\\0' '\\377'",
        "seq 100000",
        "printf '\\000\\001\\r\\n\\377'",
    )

    @pytest.mark.parametrize("script", SCRIPTS)
    @pytest.mark.parametrize("tty", [False, True])
    def test_the_output_of_an_exec(
        self, watched: Runner, engine: Engine, containers: Containers, box: str, script: str, tty: bool
    ) -> None:
        body = START_TTY if tty else START

        async def test() -> None:
            first, second = (containers.exec(box, "sh", "-c", script, Tty=tty) for _ in range(2))
            async with hijacked(engine.socket, start_of(first), body) as direct:
                expected = await direct.to_end()
            async with upgraded(watched, start_of(second), body) as stream:
                await stream.to_end()
            assert stream.end == WHOLE
            assert end_to_end(stream.headers) == end_to_end(direct.headers)
            if tty:
                assert bytes(stream.data) == expected
            else:
                assert unframed(bytes(stream.data)) == unframed(expected)

        within(60, test())

    @pytest.mark.parametrize("tty", [False, True])
    def test_the_output_of_an_attach(self, watched: Runner, engine: Engine, containers: Containers, tty: bool) -> None:
        name = containers("sh", "-c", "seq 20000; echo err >&2", start=False, Tty=tty)
        target = f"/containers/{name}/attach?stream=1&stdout=1&stderr=1"

        async def test() -> None:
            async with hijacked(engine.socket, target) as direct, upgraded(watched, target) as stream:
                containers.do("POST", f"/containers/{name}/start", 204)
                expected = await direct.to_end()
                await stream.to_end()
            assert end_to_end(stream.headers) == end_to_end(direct.headers)
            if tty:
                assert bytes(stream.data) == expected
            else:
                assert unframed(bytes(stream.data)) == unframed(expected)
            assert stream.end == WHOLE

        within(60, test())

    def test_the_answer_says_what_the_engine_says(
        self, watched: Runner, engine: Engine, containers: Containers, box: str
    ) -> None:
        """The head of the 101, but for what concerns a hop."""

        async def test() -> None:
            first, second = (containers.exec(box, "true") for _ in range(2))
            async with hijacked(engine.socket, start_of(first), START) as direct:
                pass
            async with upgraded(watched, start_of(second), START) as stream:
                pass
            assert (direct.status, stream.status) == (101, 101)
            assert stream.headers["content-type"] == direct.headers["content-type"]
            assert end_to_end(stream.headers) == end_to_end(direct.headers)

        within(20, test())

    @pytest.mark.parametrize(
        ("target", "body"),
        [
            (start_of("0" * 64), START),
            ("/containers/no-such/attach?stream=1&stdout=1", ""),
            ("/exec/EXEC/start", "{not json"),
            ("/exec/ORPHAN/start", START),
            ("/containers/PAUSED/attach?stream=1&stdout=1", ""),
            ("/v9.99/exec/EXEC/start", START),
        ],
    )
    def test_a_refusal_comes_with_status_headers_and_body(
        self, watched: Runner, direct: EngineDirect, containers: Containers, box: str, target: str, body: str
    ) -> None:
        paused, ended = containers(), containers()
        orphan = containers.exec(ended, "true")
        containers.do("POST", f"/containers/{paused}/pause", 204)
        containers.do("POST", f"/containers/{ended}/kill", 204)
        for word, name in (("EXEC", containers.exec(box, "true")), ("ORPHAN", orphan), ("PAUSED", paused)):
            target = target.replace(word, name)

        async def test() -> None:
            json_type = {"Content-Type": "application/json"}
            expected = direct.request("POST", target, data=body, headers=json_type if body else {})
            assert expected.status_code >= 400
            async with upgraded(watched, target, body, status=expected.status_code) as stream:
                assert stream.body == expected.content
                assert end_to_end(stream.headers) == end_to_end({k.lower(): v for k, v in expected.headers.items()})
                assert await stream.receive() == b""
                assert stream.end == (False, 1000)

        within(20, test())
        containers.do("POST", f"/containers/{paused}/unpause", 204)

    def test_a_detached_start_is_answered_with_200_and_no_stream(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            found = containers.exec(box, "sleep", "1d")
            async with upgraded(watched, start_of(found), '{"Detach":true}', status=200) as stream:
                assert stream.body == b""
                assert await stream.receive() == b""
                assert stream.end == (False, 1000)
            assert containers.do("GET", f"/exec/{found}/json", 200)["Running"]

        within(20, test())


class TestInput:
    @pytest.mark.parametrize("tty", [False, True])
    def test_what_is_typed_reaches_the_process_and_its_answer_comes_back(
        self, watched: Runner, containers: Containers, box: str, tty: bool
    ) -> None:
        async def test() -> None:
            script = "while read line; do echo heard-$line; done; echo done"
            async with command(watched, containers, box, script, tty=tty) as stream:
                for number in range(20):
                    await stream.send(f"{number}\n".encode())
                    await stream.until(f"heard-{number}".encode())
                assert not stream.eof
                await stream.send(b"\4" if tty else EOF)
                await stream.to_end()
            assert bytes(stream.data).rstrip().endswith(b"done")
            assert stream.end == WHOLE

        within(30, test())

    def test_bytes_arrive_whatever_frames_they_come_in(self, watched: Runner, containers: Containers, box: str) -> None:
        data = bytes(range(256)) * 2000
        sizes = (1, 0, 7, 4096, 100_000, 65_536, len(data))

        async def test() -> None:
            async with command(watched, containers, box, "cat") as stream:
                at = 0
                for size in sizes:
                    await stream.send(data[at : at + size])
                    at += size
                await stream.send(EOF)
                await stream.to_end()
            assert output(stream) == data
            assert stream.end == WHOLE

        within(30, test())

    def test_a_message_in_fragments_is_data_like_any_other(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            async with command(watched, containers, box, "cat") as stream:
                await stream.socket.send([b"a", b"b", b"", b"c"])
                await stream.send(EOF)
                await stream.to_end()
            assert output(stream) == b"abc"

        within(20, test())

    def test_the_end_of_input_reaches_the_process_and_its_remaining_output_still_arrives(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            async with command(watched, containers, box, "sort; seq 50000; echo last") as stream:
                await stream.send(b"b\na\n", EOF)
                await stream.to_end()
            assert output(stream).startswith(b"a\nb\n1\n2\n")
            assert output(stream).endswith(b"50000\nlast\n")
            assert stream.end == WHOLE

        within(30, test())

    def test_the_end_of_input_reaches_an_attached_container(self, watched: Runner, containers: Containers) -> None:
        name = containers("sh", "-c", "cat; echo done", start=False, OpenStdin=True, StdinOnce=True)

        async def test() -> None:
            target = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1&stderr=1"
            async with upgraded(watched, target) as stream:
                containers.do("POST", f"/containers/{name}/start", 204)
                await stream.send(b"typed\n", EOF)
                await stream.to_end()
            assert output(stream) == b"typed\ndone\n"
            assert stream.end == WHOLE

        within(30, test())

    def test_an_end_of_input_that_is_told_twice_counts_once(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            async with command(watched, containers, box, "cat; read x; echo ended") as stream:
                await stream.send(b"x", EOF, '{"eof": true}')
                await stream.to_end()
            assert output(stream) == b"xended\n"
            assert stream.end == WHOLE

        within(20, test())

    def test_input_that_nobody_wants_any_more_goes_nowhere(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        """The process ends with input unread: the engine closes on it, and that is an end like any other."""

        async def test() -> None:
            async with command(watched, containers, box, "read line; echo got-$line") as stream:
                await stream.send(b"one\n" + bytes(2 * MIB))
                with contextlib.suppress(ConnectionClosed):
                    await stream.send(b"more")
                await stream.to_end()
            assert output(stream) == b"got-one\n"
            assert stream.end == WHOLE

        within(20, test())


class TestFirstFrame:
    """Nothing of a request reaches the engine, not even as a connection, before its body was seen to be the signed one.

    (`fronted` has no engine that answers: who comes through would be told so.)
    """

    TARGET = start_of("x")

    def refused(
        self, runner: Runner, scripted: ScriptedEngine, signed: str, sent: str | bytes | None, **kw: Any
    ) -> Upgraded:
        """The stream of an upgrade that was signed for one body and got another; the engine saw nothing."""
        scripted.restart(lambda peer: peer.answer(b""))
        found: list[Upgraded] = []

        async def test() -> None:
            async with socket_of(runner, self.TARGET, upgrade_headers(self.TARGET, signed), **kw) as stream:
                found.append(stream)
                try:
                    if sent is not None:
                        await stream.send(sent)
                    await stream.answer()
                except ConnectionClosed:
                    pass
                await stream.receive()

        within(20, test())
        assert (scripted.connections, scripted.requests) == (0, [])
        return found[0]

    @pytest.mark.parametrize(
        ("signed", "sent"),
        [
            (START, '{"Detach":false,"Tty":true}'),
            (START, START + " "),
            (START, ""),
            ("", START),
            ("", " "),
            (START, f"{START}\r\n\r\nPOST /containers/prune HTTP/1.1\r\nHost: docker\r\n\r\n"),
        ],
    )
    def test_another_body_is_refused(self, fronted: Runner, scripted: ScriptedEngine, signed: str, sent: str) -> None:
        stream = self.refused(fronted, scripted, signed, sent)
        assert (stream.status, stream.error["code"], stream.error["retryable"]) == (401, "body_hash_mismatch", False)
        assert stream.end == (False, 1008)

    def test_a_binary_one_is_refused(self, fronted: Runner, scripted: ScriptedEngine) -> None:
        assert self.refused(fronted, scripted, START, START.encode()).end == (False, 1002)

    def test_one_that_does_not_come_in_time_is_a_408(self, fronted: Runner, scripted: ScriptedEngine) -> None:
        stream = self.refused(fronted, scripted, START, None)
        assert (stream.status, stream.error["code"]) == (408, "request_timeout")

    def test_a_huge_one_is_refused(self, scripted: ScriptedEngine) -> None:
        with Runner(scripted.path) as patient:
            assert self.refused(patient, scripted, START, " " * (49 * MIB)).end == (False, 1009)

    def test_a_caller_that_leaves_before_it_may_come_again_as_it_was(
        self, fronted: Runner, scripted: ScriptedEngine
    ) -> None:
        scripted.restart(hand_over)
        headers = upgrade_headers(self.TARGET, START)

        async def test() -> None:
            async with socket_of(fronted, self.TARGET, headers):
                pass
            async with socket_of(fronted, self.TARGET, headers) as leaving:
                leaving.socket.transport.abort()
            async with socket_of(fronted, self.TARGET, headers) as stream:
                assert (await stream.ask(START)).status == 101
            with pytest.raises(InvalidStatus) as refused:
                async with socket_of(fronted, self.TARGET, headers):
                    pass
            assert refused.value.response.status_code == 401

        within(20, test())

    def test_a_request_that_did_not_reach_the_engine_may_come_again_as_it_was(
        self, fronted: Runner, scripted: ScriptedEngine
    ) -> None:
        scripted.stop()
        headers = upgrade_headers(self.TARGET, START)

        async def test() -> None:
            for _ in range(3):
                async with socket_of(fronted, self.TARGET, headers) as stream:
                    await stream.ask(START)
                    assert (stream.status, stream.error["code"]) == (503, "engine_socket_missing")
                    assert stream.error["retryable"]
                    assert stream.headers["retry-after"] == "1"

        within(20, test())


class TestRequest:
    def test_what_the_engine_gets(self, fronted: Runner, scripted: ScriptedEngine) -> None:
        """The operation's request, with the upgrade that its connection asks for, and nothing of the WebSocket's."""
        scripted.restart(hand_over)

        async def test() -> None:
            fields = {"User-Agent": "Docker-Client/1", "X-Registry-Auth": "e30=", "Origin": "http://x"}
            async with upgraded(fronted, start_of("x"), START, fields=fields) as stream:
                await stream.to_end()

        within(20, test())
        head, _, body = scripted.requests[0].partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        assert line == b"POST /v1.41/exec/x/start HTTP/1.1"
        assert body == START.encode()
        lowered = {name.lower(): value for name, _, value in (field.partition(b": ") for field in fields)}
        assert lowered == {
            b"host": b"docker",
            b"connection": b"Upgrade",
            b"upgrade": b"tcp",
            b"content-type": b"application/json",
            b"content-length": str(len(START)).encode(),
            b"user-agent": b"Docker-Client/1",
            b"x-registry-auth": b"e30=",
        }

    def refusal(self, runner: Runner, target: str, headers: dict[str, str], **kw: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of an upgrade that is refused as HTTP."""
        found: list[tuple[int, dict[str, Any]]] = []

        async def test() -> None:
            with pytest.raises(InvalidStatus) as refused:
                async with socket_of(runner, target, headers, **kw):
                    pass
            response = refused.value.response
            assert response.headers["content-type"] == "application/json"
            found.append((response.status_code, json.loads(response.body or b"")["error"]))

        within(20, test())
        return found[0]

    @pytest.mark.parametrize("subprotocols", [("other.v1",), ("docker-runner.stream.v2",)])
    def test_another_subprotocol_is_refused(self, watched: Runner, box: str, subprotocols: tuple[str, ...]) -> None:
        target = f"/containers/{box}/attach?stream=1"
        status, error = self.refusal(watched, target, upgrade_headers(target), subprotocols=subprotocols)
        assert (status, error["code"]) == (400, "upgrade_unsupported")

    def test_no_subprotocol_is_refused(self, watched: Runner, box: str) -> None:
        target = f"/containers/{box}/attach?stream=1"
        status, error = self.refusal(watched, target, upgrade_headers(target), subprotocols=None)
        assert (status, error["code"]) == (400, "upgrade_unsupported")

    @pytest.mark.parametrize(
        ("target", "status", "code"),
        [
            ("/containers/x/start", 400, "upgrade_unsupported"),
            ("/containers/json", 405, "method_not_allowed"),
            ("/no/such", 404, "not_found"),
            ("/containers/a%2Fb/attach", 400, "invalid_path"),
        ],
    )
    def test_what_has_no_stream_is_refused(self, watched: Runner, target: str, status: int, code: str) -> None:
        assert self.refusal(watched, target, upgrade_headers(target))[0] == status
        assert self.refusal(watched, target, upgrade_headers(target))[1]["code"] == code

    def test_a_replay_is_refused(self, watched: Runner, containers: Containers, box: str) -> None:
        target = start_of(containers.exec(box, "true"))
        headers = upgrade_headers(target, START)

        async def test() -> None:
            async with socket_of(watched, target, {**headers, "Content-Type": "application/json"}) as stream:
                await stream.ask(START)
                await stream.to_end()

        within(20, test())
        status, error = self.refusal(watched, target, headers)
        assert (status, error["code"]) == (401, "replayed_nonce")

    def test_a_body_hash_that_was_not_signed_is_refused(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        target = start_of(containers.exec(box, "true"))
        headers = {
            **upgrade_headers(target, START),
            "X-DR-Content-SHA256": upgrade_headers(target, "{}")["X-DR-Content-SHA256"],
        }
        status, error = self.refusal(watched, target, headers)
        assert (status, error["code"]) == (401, "invalid_signature")

    def test_a_body_in_signed_chunks_is_refused(self, watched: Runner, box: str) -> None:
        target = f"/containers/{box}/attach?stream=1"
        status, error = self.refusal(watched, target, chunk_headers("GET", target))
        assert (status, error["code"]) == (401, "invalid_chunk")


class TestEnds:
    @pytest.mark.parametrize("manner", ["close", "abort"])
    @pytest.mark.parametrize("script", ["sleep 600", "cat", "timeout 10 yes", "cat; sleep 600"])
    def test_a_caller_that_leaves_takes_the_engines_connection_with_it_within_a_second(
        self, watched: Runner, containers: Containers, box: str, script: str, manner: str
    ) -> None:
        async def test() -> None:
            idle = watched.sockets()
            async with command(watched, containers, box, script) as stream:
                await stream.send(b"some input\n")
                await until(lambda: watched.sockets() == idle + 3)  # The caller's, the engine's, the witness.
                if manner == "close":
                    await stream.socket.close()
                else:
                    stream.socket.transport.abort()
                await until(lambda: watched.sockets() == idle, 1)

        within(20, test())

    def test_a_caller_that_leaves_while_its_input_is_not_read_is_noticed(
        self, watched: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            idle = watched.sockets()
            async with command(watched, containers, box, "timeout 10 yes & sleep 600") as stream:
                writing = asyncio.ensure_future(stream.send(*[bytes(100_000)] * 100))
                done, _ = await asyncio.wait((writing,), timeout=0.5)
                assert not done
                stream.socket.transport.abort()
                await until(lambda: watched.sockets() == idle, 1)
                with contextlib.suppress(ConnectionClosed):
                    await writing

        within(20, test())

    def test_an_engine_that_is_killed_breaks_the_stream_within_a_second(
        self, private_engine: PrivateEngine, names: Names
    ) -> None:
        image = f"{names('image')}:x"
        busybox.import_image(private_engine, image)
        direct = EngineDirect(private_engine.socket)
        there = Containers(direct, names, image)
        name = there()

        async def test(runner: Runner) -> None:
            async with (
                command(runner, there, name, "echo up; cat") as first,
                command(runner, there, name, "echo up; cat") as half_closed,
                upgraded(runner, f"/containers/{name}/attach?stream=1&stdout=1") as attached,
            ):
                await first.until(b"up")
                await half_closed.until(b"up")
                private_engine.kill()
                async with asyncio.timeout(2):
                    for stream in (first, half_closed, attached):
                        await stream.to_end()
                        assert stream.end == BROKEN
                        assert stream.close_reason == "engine_cut_body"

        with Runner(private_engine.socket) as runner:
            within(30, test(runner))
            check_log(runner)
        private_engine.start()
        direct.request("DELETE", f"/containers/{name}?force=1")
        direct.request("DELETE", f"/images/{image}?force=1")

    def test_an_end_is_whole_when_every_connection_to_the_engine_is_in_use(
        self, engine: Engine, containers: Containers, box: str
    ) -> None:
        async def test(runner: Runner) -> None:
            async with (
                command(runner, containers, box, "cat") as other,
                command(runner, containers, box, "echo out") as stream,
            ):
                await stream.to_end()
                assert stream.end == WHOLE
                assert not other.eof

        with Runner(engine.socket, {"DOCKER_RUNNER_ENGINE_CONNECTIONS": "2"}) as runner:
            within(20, test(runner))

    def test_an_end_is_whole_when_the_engine_is_slow_to_say_that_it_is_there(
        self, fronted: Runner, scripted: ScriptedEngine
    ) -> None:
        def script(peer: Peer) -> None:
            if peer.number == 1:
                peer.read_request()
                peer.send(UPGRADED + b"out")
            else:
                peer.read_head()
                peer.engine.go.wait(5)
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        scripted.restart(script)

        async def test() -> None:
            async with upgraded(fronted, start_of("x"), START) as stream:
                await stream.until(b"out")
                ending = asyncio.ensure_future(stream.receive())
                done, _ = await asyncio.wait((ending,), timeout=2.5)
                assert not done
                scripted.go.set()
                assert await ending == b""
                assert stream.end == WHOLE

        within(20, test())

    def test_an_end_is_whole_when_the_engine_is_seen_to_live_and_does_not_answer(
        self, fronted: Runner, scripted: ScriptedEngine
    ) -> None:
        def script(peer: Peer) -> None:
            head = peer.read_head()
            if b"/start" in head:
                peer.read_exactly(len(START))
                peer.send(UPGRADED + b"out")
                peer.engine.go.wait(5)
            elif b"/events" in head:
                peer.send(ENDLESS)
                peer.engine.go.set()
                peer.wait_closed()
            else:
                peer.wait_closed()

        scripted.restart(script)

        async def test() -> None:
            async with upgraded(fronted, start_of("x"), START) as stream:
                await stream.to_end()
                assert (bytes(stream.data), stream.end) == (b"out", WHOLE)

        within(9, test())

    def test_an_engine_that_accepts_nobody_just_now_is_there(self) -> None:
        async def test(path: str) -> None:
            with Witness(path).watching() as line:
                await line.check_whole()

        with listener_that_never_accepts() as path:
            run_on("uvloop")(test(path))

    @pytest.mark.parametrize("upgrade", [True, False])
    def test_a_stream_that_a_slow_reader_takes_after_the_engine_was_replaced_is_broken(
        self, fronted: Runner, scripted: ScriptedEngine, upgrade: bool
    ) -> None:
        """What the old engine sent still lies there; the new one says that it is there, and was never asked for it."""
        watching = threading.Event()
        sent = 0

        def old(peer: Peer) -> None:
            nonlocal sent
            head = peer.read_head()
            if b"/start" in head:
                peer.read_exactly(len(START))
                peer.send((UPGRADED if upgrade else RAW) + b"out")
                while True:
                    sent += peer.sock.send(bytes(65536))
            elif b"/events" in head:
                peer.send(ENDLESS)
                watching.set()
                peer.wait_closed()

        scripted.restart(old)

        def replace() -> None:
            """When every buffer on the way is full."""
            assert watching.wait(5)
            seen = -1
            while seen != sent:
                seen = sent
                threading.Event().wait(0.3)
            scripted.restart(lambda peer: peer.answer(OK))

        async def test() -> None:
            async with upgraded(fronted, start_of("x"), START, max_queue=1) as stream:
                await stream.until(b"out")
                await asyncio.to_thread(replace)
                await stream.to_end()
                assert stream.end == BROKEN

        if upgrade:
            within(30, test())
            return
        headers = {"Content-Type": "application/json"}
        with fronted.stream("POST", start_of("x"), START.encode(), headers) as answer:
            assert answer.read(3) == b"out"
            replace()
            with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
                answer.read()

    @pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n"])
    def test_an_engine_that_goes_without_a_word_breaks_the_stream(
        self, fronted: Runner, scripted: ScriptedEngine, answer: bytes
    ) -> None:
        def script(peer: Peer) -> None:
            peer.read_request() if peer.number == 1 else peer.read_head()
            peer.send(UPGRADED + b"out" if peer.number == 1 else answer)

        scripted.restart(script)

        async def test() -> None:
            async with upgraded(fronted, start_of("x"), START) as stream:
                await stream.to_end()
                assert (bytes(stream.data), stream.end) == (b"out", BROKEN)

        within(20, test())

    def test_sigterm_closes_streams_cleanly_and_ends_with_0(
        self, engine: Engine, containers: Containers, box: str
    ) -> None:
        async def test(runner: Runner) -> None:
            async with (
                command(runner, containers, box, "echo up; cat") as stream,
                command(runner, containers, box, "echo up; sleep 600") as half_closed,
                socket_of(runner, start_of("x"), upgrade_headers(start_of("x"))) as unasked,
            ):
                await half_closed.send(EOF)
                await stream.until(b"up")
                await half_closed.until(b"up")
                runner.process.terminate()
                for cut in (stream, half_closed):
                    await cut.to_end()
                    assert (cut.end, cut.close_reason) == ((False, 1012), "shutting_down")
                await unasked.answer()
                assert (unasked.status, unasked.error["code"]) == (503, "shutting_down")
            assert await asyncio.to_thread(runner.process.wait, 10) == 0

        with Runner(engine.socket, {"DOCKER_RUNNER_GRACE_MS": "300"}) as runner:
            within(20, test(runner))
            check_log(runner)

    def test_a_stream_that_ends_in_its_time_of_grace_ends_whole(
        self, engine: Engine, containers: Containers, box: str
    ) -> None:
        async def test(runner: Runner) -> None:
            async with command(runner, containers, box, "echo up; read x; echo done-$x") as stream:
                await stream.until(b"up")
                runner.process.terminate()
                await until(lambda: not accepts(runner.port))
                await stream.send(b"late\n")
                await stream.to_end()
                assert (output(stream), stream.end) == (b"up\ndone-late\n", WHOLE)
            assert await asyncio.to_thread(runner.process.wait, 10) == 0

        with Runner(engine.socket) as runner:
            within(30, test(runner))

    def test_a_silent_stream_is_not_cut(self, watched: Runner, containers: Containers, box: str) -> None:
        async def test() -> None:
            script = f"echo up; sleep {SILENCE_S}; read x; echo still-$x"
            async with command(watched, containers, box, script) as stream:
                await stream.send(b"there\n")
                await stream.to_end()
                assert (output(stream), stream.end) == (b"up\nstill-there\n", WHOLE)

        within(SILENCE_S + 20, test())


def accepts(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class TestMemory:
    """A runner of the test's own, whose memory nobody else uses."""

    @pytest.fixture
    def alone(self, engine: Engine) -> Iterator[Runner]:
        with Runner(engine.socket) as running:
            running.request("GET", "/_ping")
            yield running
        check_log(running)

    def test_a_reader_that_stops_pauses_the_engine(self, alone: Runner, containers: Containers, box: str) -> None:
        async def test() -> None:
            before = peak = alone.memory()
            found = containers.exec(box, "sh", "-c", f"head -c {MANY} /dev/zero")
            size = 0
            async with upgraded(alone, start_of(found), START, max_queue=1) as stream:
                size += len(await stream.receive())
                for _ in range(10):
                    await asyncio.sleep(0.1)
                    peak = max(peak, alone.memory())
                assert containers.do("GET", f"/exec/{found}/json", 200)["Running"]
                while piece := await stream.receive():
                    size += len(piece)
                    peak = max(peak, alone.memory())
                assert stream.end == WHOLE
            assert size > MANY
            assert peak - before < FLAT

        within(120, test())

    def test_a_process_that_does_not_read_pauses_the_caller(
        self, alone: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            before = peak = alone.memory()
            frame = bytes(64 * 1024)
            async with command(alone, containers, box, "read go; wc -c") as stream:
                sent = 0

                async def send() -> None:
                    nonlocal sent
                    await stream.send(b"now wait\n")
                    while sent < MANY:
                        await stream.send(frame)
                        sent += len(frame)
                    await stream.send(EOF)

                writing = asyncio.ensure_future(send())
                await stream.to_end()
                await writing
                peak = max(peak, alone.memory())
                assert stream.end == WHOLE
            assert output(stream).strip() == str(MANY).encode()
            assert peak - before < FLAT

        within(120, test())

    def test_input_that_is_not_read_is_not_taken_from_the_caller(
        self, alone: Runner, containers: Containers, box: str
    ) -> None:
        async def test() -> None:
            before = alone.memory()
            sent = 0
            async with command(alone, containers, box, "until [ -e /go-on ]; do sleep 0.1; done; wc -c") as stream:

                async def send() -> None:
                    nonlocal sent
                    for _ in range(MANY // MIB):
                        await stream.send(bytes(MIB))
                        sent += MIB
                    await stream.send(EOF)

                writing = asyncio.ensure_future(send())
                seen = -1
                while seen != sent:  # Until nothing moves any more.
                    seen = sent
                    await asyncio.sleep(0.5)
                assert sent < 32 * MIB
                assert alone.memory() - before < FLAT
                async with command(alone, containers, box, "touch /go-on") as other:
                    await other.to_end()
                await stream.to_end()
                await writing
                assert output(stream).strip() == str(MANY).encode()
                assert alone.memory() - before < FLAT

        within(120, test())

    def test_a_hundred_streams_at_once(self, alone: Runner, containers: Containers) -> None:
        """Each attached to a container of its own kind: what one types, all hear."""
        name = containers("sh", "-c", "while read line; do echo heard-$line; done", OpenStdin=True)
        target = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1"
        idle = alone.sockets()

        async def test() -> None:
            async with contextlib.AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(upgraded(alone, target)) for _ in range(100)]
                await until(lambda: alone.sockets() >= idle + 199)  # One to the engine may have been kept.
                for number in (0, 57, 99):
                    await streams[number].send(f"{number}\n".encode())
                    await asyncio.gather(*(stream.until(f"heard-{number}".encode()) for stream in streams))
                containers.do("POST", f"/containers/{name}/kill", 204)
                await asyncio.gather(*(stream.to_end() for stream in streams))
                assert {stream.end for stream in streams} == {WHOLE}
            await until(lambda: alone.sockets() <= idle, 3)

        within(60, test())


class TestHostileCallers:
    def closed_with(self, runner: Runner, containers: Containers, box: str, *frames: bytes | str) -> int | None:
        found: list[int | None] = []

        async def test() -> None:
            idle = runner.sockets()
            async with command(runner, containers, box, "cat") as stream:
                with contextlib.suppress(ConnectionClosed):
                    await stream.send(*frames)
                await stream.to_end()
                found.append(stream.close_code)
            await until(lambda: runner.sockets() == idle, 1)

        within(20, test())
        return found[0]

    @pytest.mark.parametrize("text", ["typed", "", "{}", '{"eof":false}', '{"eof":true,"x":1}', '["eof"]', START])
    def test_text_within_the_stream_breaks_the_protocol(
        self, watched: Runner, containers: Containers, box: str, text: str
    ) -> None:
        assert self.closed_with(watched, containers, box, b"data", text) == 1002

    def test_data_after_eof_breaks_the_protocol(self, watched: Runner, containers: Containers, box: str) -> None:
        name = containers()  # Whose process does not end at the end of its input.
        found: list[int | None] = []

        async def test() -> None:
            async with command(watched, containers, name, "cat; sleep 600") as stream:
                await stream.send(EOF, b"more")
                await stream.to_end()
                found.append(stream.close_code)

        within(20, test())
        assert found == [1002]

    def test_a_frame_past_the_limit_is_refused(self, watched: Runner, containers: Containers, box: str) -> None:
        assert self.closed_with(watched, containers, box, bytes(49 * MIB)) == 1009

    def test_a_frame_that_is_not_masked_is_refused(self, watched: Runner, containers: Containers, box: str) -> None:
        async def test() -> None:
            idle = watched.sockets()
            async with command(watched, containers, box, "timeout 10 yes") as stream:
                stream.socket.transport.write(b"\x82\x04data")
                await stream.to_end()
                assert stream.close_code == 1002
            await until(lambda: watched.sockets() == idle, 1)

        within(20, test())

    def test_tiny_frames_do_not_hold_up_the_others(self, watched: Runner, containers: Containers, box: str) -> None:
        count = 100_000

        async def test() -> None:
            async with command(watched, containers, box, "wc -c") as stream:
                masked = b"\x82\x81\0\0\0\0x"  # One byte of data, masked with zeros.
                stream.socket.transport.write(masked * count)
                longest = 0.0
                for _ in range(50):
                    longest = max(longest, await asyncio.to_thread(work_before_a_ping, watched))
                await stream.send(EOF)
                await stream.to_end()
                assert output(stream).strip() == str(count).encode()
            assert longest < 0.3

        within(60, test())

    def test_pings_whose_answers_are_not_read_do_not_fill_the_memory(
        self, engine: Engine, containers: Containers, box: str
    ) -> None:
        async def test(runner: Runner) -> None:
            before = runner.memory()
            async with command(runner, containers, box, "sleep 600") as stream:
                transport = stream.socket.transport
                transport.pause_reading()
                flood = (b"\x89\xfd\0\0\0\0" + bytes(125)) * 10_000
                for _ in range(60):  # 78 MB
                    transport.write(flood)
                    await until(lambda: transport.get_write_buffer_size() < MIB)
                assert runner.memory() - before < FLAT
                transport.abort()

        with Runner(engine.socket) as runner:
            within(60, test(runner))


def work_before_a_ping(runner: Runner) -> float:
    """Seconds that the runner computes until a ping is answered; its own time, whatever else the machine does."""
    before = cpu_time(runner)
    assert runner.request("GET", "/_ping").body == b"OK"
    return cpu_time(runner) - before


def cpu_time(runner: Runner) -> float:
    fields = Path(f"/proc/{runner.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class TestForcedCollection:
    """The event loop holds a half-closed connection only weakly: under a collector that runs all the time, no stream
    may end without a word."""

    @pytest.fixture
    def collected(self, engine: Engine) -> Iterator[Runner]:
        with Runner(engine.socket, forced_gc=True) as running:
            yield running
        check_log(running)

    def test_half_closed_execs_live(self, collected: Runner, containers: Containers, box: str) -> None:
        async def one(number: int) -> None:
            script = f"cat; for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo {number}-$i; done; seq 5000"
            async with command(collected, containers, box, script) as stream:
                await stream.send(b"in\n", EOF)
                await stream.to_end()
            assert output(stream).startswith(f"in\n{number}-1\n".encode())
            assert output(stream).endswith(b"\n5000\n")
            assert stream.end == WHOLE

        async def test() -> None:
            await asyncio.gather(*(one(number) for number in range(15)))

        within(60, test())

    def test_half_closed_attaches_live(self, collected: Runner, containers: Containers) -> None:
        name = containers("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo $i; done", start=False)

        async def test() -> None:
            target = f"/containers/{name}/attach?stream=1&stdout=1"
            async with contextlib.AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(upgraded(collected, target)) for _ in range(15)]
                for stream in streams:
                    await stream.send(EOF)
                containers.do("POST", f"/containers/{name}/start", 204)
                await asyncio.gather(*(stream.to_end() for stream in streams))
            assert {output(stream) for stream in streams} == {b"1\n2\n3\n4\n5\n6\n7\n8\n"}
            assert {stream.end for stream in streams} == {WHOLE}

        within(60, test())

    def test_plain_streams_live(self, collected: Runner, containers: Containers) -> None:
        name = containers("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo $i; done", start=False)
        target = f"/containers/{name}/attach?stream=1&stdout=1"
        with contextlib.ExitStack() as stack:
            answers = [stack.enter_context(collected.stream("POST", target, b"")) for _ in range(15)]
            containers.do("POST", f"/containers/{name}/start", 204)
            assert {unframed(answer.read())[1] for answer in answers} == {b"1\n2\n3\n4\n5\n6\n7\n8\n"}
