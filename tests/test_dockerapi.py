"""The engine client: pool, resend, streams, cancellation, hijack. Against a scripted engine, and the real one.

Everything runs under uvloop, which serves in production, and under asyncio's own loop: they differ in what they tell
of a lost connection, and when.
"""

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import random
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import EngineDirect, Names
from dev.engine import Engine as RealEngine
from dockerapi import SPARE, Engine
from engine_connection import Connection
from engine_response import HIGH_WATER, EngineResponse
from errors import RunnerError
from loops import LOOPS, Run, run_on, until
from scripted import OK, PATIENCE_S, Peer, ScriptedEngine, chunked, listener_that_never_accepts

ONE_READ = 256 * 1024
"""What both loops read from a socket at most at once."""
CODED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
KERNEL = 1024 * 1024
"""More than a Unix socket's two buffers hold."""


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return run_on(request.param)


def client(engine: ScriptedEngine, max_connections: int = 4, queue_s: float = 5, connect_s: float = 2) -> Engine:
    return Engine(engine.path, max_connections=max_connections, queue_s=queue_s, connect_s=connect_s)


async def fetch(engine: Engine, target: bytes = b"/x", method: bytes = b"GET", **options: Any) -> tuple[int, bytes]:
    with await engine.request(method, target, **options) as response:
        return response.status, await response.read(1 << 30)


async def code_of(request: Coroutine[Any, Any, object]) -> str:
    """The code of the error that it ends with."""
    with pytest.raises(RunnerError) as raised:
        await request
    return raised.value.code


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


async def places(engine: Engine, target: bytes = b"/hold", limit: int = 100) -> int:
    """How many requests to an endless answer the engine takes at once before it says that it is busy."""
    held: list[EngineResponse] = []
    while len(held) < limit:
        try:
            held.append(await engine.request(b"GET", target))
        except RunnerError as error:
            assert error.code == "engine_busy", error.code  # noqa: PT017
            break
    for response in held:
        response.close()
    return len(held)


def hold(peer: Peer) -> None:
    """Answer with a stream that goes on until the caller closes it."""
    if peer.read_request():
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"begun", last=False))
        peer.sees_close()


def answers_once(peer: Peer) -> None:
    if peer.read_request():
        peer.send(OK)


def hold_or_answer(peer: Peer) -> None:
    while request := peer.read_request():
        if b" /hold " in request:
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"begun", last=False))
            peer.wait_closed()
            return
        peer.send(OK)


class TestPool:
    def test_requests_one_after_another_share_a_connection(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                docker = client(engine)
                for _ in range(20):
                    assert await fetch(docker) == (200, b"ok")
                docker.close()
            assert engine.connections == 1
            assert len(engine.requests) == 20

        run(test())

    def test_the_bound_holds(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                docker = client(engine, max_connections=3)
                answers = await asyncio.gather(*(fetch(docker) for _ in range(60)))
                docker.close()
            assert answers == [(200, b"ok")] * 60
            assert engine.most_open <= 3

        run(test())

    def test_who_waits_too_long_is_told_that_the_engine_is_busy(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(hold) as engine:
                docker = client(engine, max_connections=1, queue_s=0.05)
                with await docker.request(b"GET", b"/hold"):
                    with pytest.raises(RunnerError) as raised:
                        await docker.request(b"GET", b"/x")
                    assert (raised.value.code, raised.value.status) == ("engine_busy", 503)
                    assert raised.value.retryable
                    assert not docker._waiting, "nothing is kept of who has gone"
            assert len(engine.requests) == 1

        run(test())

    def test_who_waits_is_served_in_order(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(hold_or_answer) as engine:
                docker = client(engine, max_connections=1)
                held = await docker.request(b"GET", b"/hold")
                waiting = [asyncio.ensure_future(fetch(docker, b"/%d" % number)) for number in range(5)]
                await until(lambda: len(docker._waiting) == 5)
                held.close()
                await asyncio.gather(*waiting)
                docker.close()
            assert engine.targets() == [b"/hold", *(b"/%d" % number for number in range(5))]

        run(test())

    @pytest.mark.parametrize("what", ["place", "connection"])
    def test_what_a_cancelled_waiter_was_given_goes_to_the_next(
        self, run: Run, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def test() -> None:
            def script(peer: Peer) -> None:
                while peer.read_request():
                    engine.go.wait(PATIENCE_S)
                    peer.send(OK)

            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1)
                holder = asyncio.ensure_future(docker.request(b"GET", b"/first"))
                await until(lambda: len(engine.requests) == 1)
                leaver = asyncio.ensure_future(fetch(docker, b"/leaver"))
                stayer = asyncio.ensure_future(fetch(docker, b"/stayer"))
                await until(lambda: len(docker._waiting) == 2)
                choose = docker._next_waiting

                def choose_who_leaves() -> asyncio.Future[Any] | None:
                    # Cancelled between the moment in which it is given something and its next step.
                    asyncio.get_running_loop().call_soon(leaver.cancel)
                    return choose()

                monkeypatch.setattr(docker, "_next_waiting", choose_who_leaves)
                if what == "place":
                    holder.cancel()
                engine.go.set()
                assert await stayer == (200, b"ok")
                with pytest.raises(asyncio.CancelledError):
                    await leaver
                await asyncio.wait([holder])
                assert b"/leaver" not in engine.targets()
                docker.close()

        run(test())

    @pytest.mark.parametrize("seed", range(4))
    def test_after_any_mix_of_failures_every_place_is_there(self, run: Run, seed: int) -> None:
        chance = random.Random(seed)

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                match request.split(b" ")[1]:
                    case b"/answer":
                        peer.send(OK)
                    case b"/cut-head":
                        peer.send(b"HTTP/1.1 200 OK\r\n")
                        return
                    case b"/cut-body":
                        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort")
                        return
                    case b"/garbage":
                        peer.send(b"no HTTP at all\r\n\r\n")
                        return
                    case b"/close-after":
                        peer.send(OK)
                        return
                    case b"/never":
                        peer.wait_closed()
                        return
                    case b"/out-of-turn":
                        peer.send(OK + b"HTTP/1.1 408 Late\r\n\r\n")
                    case b"/hold":
                        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbegun")
                        peer.wait_closed()
                        return

        async def caller(docker: Engine) -> None:
            target = chance.choice(
                [b"/answer"] * 4
                + [b"/cut-head", b"/cut-body", b"/garbage", b"/close-after", b"/never", b"/out-of-turn", b"/hold"]
            )
            body = chance.choice([None, b"small", b"x" * 100_000, pieces(b"a", b"b" * 70_000)])
            head_s = chance.choice([0.002, 0.02])
            with contextlib.suppress(RunnerError, TimeoutError):
                async with asyncio.timeout(chance.choice([0.0005, 0.002, 0.005, 0.02])):
                    with await docker.request(b"POST", target, body=body, head_s=head_s) as response:
                        if chance.random() < 0.8:
                            await response.read(100)

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=5, queue_s=0.01, connect_s=0.005)
                running: set[asyncio.Task[None]] = set()
                for _ in range(400):
                    task = asyncio.ensure_future(caller(docker))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    if chance.random() < 0.3:
                        chance.choice(list(running)).cancel()
                    assert len(docker._open) <= 5
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                    if len(running) > 30:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(running | {asyncio.ensure_future(asyncio.sleep(0))})
                assert not docker._waiting
                docker._connect_s = 5
                assert await places(docker) == 5
                docker.close()
                await until(lambda: engine.open == 0)

        run(test())

    def test_on_the_real_engine_cancelled_requests_cost_no_place(self, run: Run, engine: RealEngine) -> None:
        chance = random.Random(5)

        async def caller(docker: Engine) -> None:
            target = chance.choice([b"/_ping", b"/version", b"/events", b"/containers/none/json"])
            with contextlib.suppress(RunnerError, TimeoutError):
                async with asyncio.timeout(chance.choice([0.0005, 0.002, 0.01])):
                    await fetch(docker, target)

        async def test() -> None:
            docker = Engine(engine.socket, max_connections=8, queue_s=0.02, connect_s=2)
            for _ in range(20):
                tasks = [asyncio.ensure_future(caller(docker)) for _ in range(20)]
                for task in chance.sample(tasks, 5):
                    await asyncio.sleep(0)
                    task.cancel()
                await asyncio.wait(tasks)
            assert await places(docker, b"/events") == 8
            docker.close()

        run(test())

    def test_connections_that_nobody_needs_any_more_are_closed_but_for_a_few(self, run: Run) -> None:
        async def test() -> None:
            many, few = SPARE + 20, 4
            together = threading.Barrier(many)
            begun = threading.Barrier(few)

            def script(peer: Peer) -> None:
                while request := peer.read_request():
                    (begun if b"/few" in request else together).wait(PATIENCE_S)
                    peer.send(OK)

            with ScriptedEngine(script) as engine:
                docker = Engine(engine.path, max_connections=many, queue_s=5, connect_s=2, spare_s=0.2)
                await asyncio.gather(*(fetch(docker) for _ in range(many)))
                assert docker.use().idle == many
                await asyncio.gather(*(fetch(docker, b"/few") for _ in range(few)))
                await until(lambda: engine.open == SPARE)
                await asyncio.gather(*(fetch(docker, b"/few") for _ in range(few)))
                assert docker.use().idle == SPARE
                docker.close()
                await until(lambda: engine.open == 0)

        run(test())

    def test_those_that_the_engine_closes_count_as_gone(self, run: Run) -> None:
        async def test() -> None:
            many, kept = 2 * SPARE, 4
            together = threading.Barrier(many)

            def script(peer: Peer) -> None:
                while peer.read_request():
                    together.wait(PATIENCE_S)
                    peer.send(OK)
                    if peer.number > kept:
                        peer.engine.go.wait()
                        return

            with ScriptedEngine(script) as engine:
                docker = Engine(engine.path, max_connections=many, queue_s=5, connect_s=2, spare_s=0.5)
                await asyncio.gather(*(fetch(docker) for _ in range(many)))
                engine.go.set()
                await until(lambda: docker.use().idle <= kept)
                ended = asyncio.get_running_loop().time() + 1
                await until(lambda: asyncio.get_running_loop().time() > ended)  # Past the next look.
                assert docker.use().idle == kept
                docker.close()

        run(test())

    def test_connections_that_are_needed_again_and_again_stay(self, run: Run) -> None:
        async def test() -> None:
            many = SPARE + 4
            together = threading.Barrier(many)

            def script(peer: Peer) -> None:
                while peer.read_request():
                    together.wait(PATIENCE_S)
                    peer.send(OK)

            with ScriptedEngine(script) as engine:
                docker = Engine(engine.path, max_connections=many, queue_s=5, connect_s=2, spare_s=0.2)
                ended = asyncio.get_running_loop().time() + 1
                while asyncio.get_running_loop().time() < ended:
                    await asyncio.gather(*(fetch(docker) for _ in range(many)))
                assert engine.connections == many
                docker.close()

        run(test())

    def test_an_answer_left_before_its_end_closes_its_connection(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(hold) as engine:
                docker = client(engine, max_connections=1, queue_s=0.1)
                with await docker.request(b"GET", b"/hold") as response:
                    assert await response.next() == b"begun"
                await until(engine.closed.is_set, 1)
                assert await places(docker) == 1

        run(test())

    def test_a_complete_answer_frees_its_connection_before_it_is_taken(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                docker = client(engine, max_connections=1, queue_s=0)
                first = await docker.request(b"GET", b"/1")
                assert await fetch(docker, b"/2") == (200, b"ok")
                assert await first.read(10) == b"ok"
                docker.close()
            assert engine.connections == 1

        run(test())

    def test_after_a_restart_of_the_engine_no_stale_connection_is_used(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                docker = client(engine)
                await asyncio.gather(*(fetch(docker) for _ in range(4)))
                for _ in range(3):
                    engine.stop()  # Blocks this loop: it learns nothing before the next request.
                    engine.listen()
                    assert await fetch(docker, b"/after", b"POST", body=b"once") == (200, b"ok")
                assert engine.targets().count(b"/after") == 3
                docker.close()

        run(test())

    def test_bytes_out_of_turn_cost_the_kept_connection(self, run: Run) -> None:
        async def test() -> None:
            def script(peer: Peer) -> None:
                peer.read_request()
                peer.send(OK)
                engine.go.wait(PATIENCE_S)
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong")
                peer.sees_close()

            with ScriptedEngine(script) as engine:
                docker = client(engine)
                await fetch(docker)
                engine.script = lambda peer: peer.answer(OK)
                engine.go.set()
                await until(engine.closed.is_set, 1)
                assert await fetch(docker) == (200, b"ok")
                assert engine.connections == 2
                docker.close()

        run(test())

    def test_bytes_out_of_turn_are_seen_before_the_loop_tells(self, run: Run) -> None:
        async def test() -> None:
            def script(peer: Peer) -> None:
                peer.read_request()
                peer.send(OK)
                engine.go.wait(PATIENCE_S)
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong")
                spoken.set()
                peer.wait_closed()

            spoken = threading.Event()
            with ScriptedEngine(script) as engine:
                docker = client(engine)
                await fetch(docker)
                engine.script = lambda peer: peer.answer(OK)
                engine.go.set()
                assert spoken.wait(PATIENCE_S)  # Blocks the loop.
                assert await fetch(docker) == (200, b"ok")
                docker.close()

        run(test())


class TestResend:
    """What is sent twice, and what never is."""

    @pytest.mark.parametrize("loop_knows", [True, False])
    def test_a_connection_closed_while_idle_is_replaced(self, run: Run, loop_knows: bool) -> None:
        async def test() -> None:
            with ScriptedEngine(answers_once) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                if loop_knows:
                    await until(lambda: not docker._open)
                else:
                    engine.wait(lambda: engine.open == 0)
                assert await fetch(docker, b"/second", b"POST", body=b"once") == (200, b"ok")
            assert engine.targets() == [b"/first", b"/second"]

        run(test())

    @pytest.mark.parametrize("read", [0, 1, 20])
    def test_a_head_that_was_not_read_whole_is_sent_again(self, run: Run, read: int) -> None:
        async def test() -> None:
            with ScriptedEngine(answers_then_closes_unread(read)) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                engine.script = lambda peer: peer.answer(OK)
                assert await fetch(docker, b"/second") == (200, b"ok")
                docker.close()
            assert engine.connections == 2
            assert engine.targets() == [b"/first", b"/second"]

        run(test())

    def test_a_write_that_takes_no_byte_is_repeated(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        # The engine closes between the look at the connection and the write: the look sees nothing.
        monkeypatch.setattr(Connection, "alive", lambda self: True)

        async def test() -> None:
            with ScriptedEngine(answers_once) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                engine.wait(lambda: engine.open == 0)
                assert await fetch(docker, b"/second") == (200, b"ok")
            assert engine.targets() == [b"/first", b"/second"]

        run(test())

    def test_a_request_that_was_read_is_never_repeated(self, run: Run) -> None:
        async def test() -> None:
            def script(peer: Peer) -> None:
                peer.read_request()
                peer.send(OK)
                peer.read_request()

            with ScriptedEngine(script) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                assert await code_of(fetch(docker, b"/second", b"POST")) == "engine_cut_head"
            assert engine.targets() == [b"/first", b"/second"]
            assert engine.connections == 1

        run(test())

    @pytest.mark.parametrize("form", ["small", "long", "streamed"])
    @pytest.mark.parametrize("head_read", [True, False])
    def test_a_request_with_a_body_is_never_repeated(self, run: Run, form: str, head_read: bool) -> None:
        # An engine may act on a head that is whole while the body lies unread: a reset proves nothing.
        async def test() -> None:
            def script(peer: Peer) -> None:
                peer.read_request()
                peer.send(OK)
                if head_read:
                    peer.read_head()
                peer.sock.recv(1, socket.MSG_PEEK)

            with ScriptedEngine(script) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                body = {"small": b"x" * 100, "long": b"x" * 100_000, "streamed": pieces(b"x" * 100, b"y" * 100)}[form]
                code = await code_of(fetch(docker, b"/second", b"POST", body=body))
                assert code == "engine_cut_head"
            assert engine.connections == 1

        run(test())

    def test_a_fresh_connection_is_no_reason_to_repeat(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.sock.recv(1, socket.MSG_PEEK)) as engine:
                assert await code_of(fetch(client(engine))) == "engine_cut_head"
            assert engine.connections == 1

        run(test())

    @pytest.mark.parametrize("turns", range(10))
    def test_an_engine_that_ends_before_it_takes_the_connection_was_asked_nothing(
        self, run: Run, turns: int, tmp_path: Path
    ) -> None:
        """Whenever that is: it is told at once, and costs no place."""
        path = str(tmp_path / "engine.sock")

        async def test() -> None:
            engine = Engine(path, max_connections=2, queue_s=1, connect_s=1)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                asking = asyncio.ensure_future(engine.request(b"GET", b"/x"))
                for _ in range(turns):
                    await asyncio.sleep(0)
            async with asyncio.timeout(5):
                with pytest.raises(RunnerError, match=r"nothing accepts|closed as it was|closed the connection"):
                    await asking
            assert engine._places == 2

        run(test())

    def test_there_is_no_third_time(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(answers_then_closes_unread(0)) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                engine.script = lambda peer: peer.sock.recv(1, socket.MSG_PEEK)
                assert await code_of(fetch(docker, b"/second")) == "engine_cut_head"
            assert engine.connections == 2

        run(test())

    def test_an_answer_that_began_is_not_asked_for_again(self, run: Run) -> None:
        async def test() -> None:
            def script(peer: Peer) -> None:
                peer.read_request()
                peer.send(OK)
                peer.sock.recv(1, socket.MSG_PEEK)
                peer.send(b"H")  # and a reset

            with ScriptedEngine(script) as engine:
                docker = client(engine)
                await fetch(docker, b"/first")
                assert await code_of(fetch(docker, b"/second")) == "engine_cut_head"
            assert engine.connections == 1

        run(test())

    @pytest.mark.parametrize(("read", "told"), [(0, ConnectionResetError), (5, ConnectionResetError), (10, None)])
    def test_the_proof_is_the_kernels(self, run: Run, read: int, told: type[Exception] | None) -> None:
        """A reset means bytes left unread, and an end without one that all were read: in both loops."""

        class Protocol(asyncio.Protocol):
            def __init__(self) -> None:
                self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

            def connection_lost(self, exc: Exception | None) -> None:
                self.lost.set_result(exc)

        async def test() -> None:
            ours, theirs = socket.socketpair()
            transport, protocol = await asyncio.get_running_loop().create_unix_connection(Protocol, sock=ours)
            transport.write(b"0123456789")
            await until(lambda: select.select([theirs], [], [], 0)[0])
            if read:
                theirs.recv(read)
            theirs.close()
            lost = await protocol.lost
            assert lost is None if told is None else isinstance(lost, told)

        run(test())


def answers_then_closes_unread(read: int) -> Callable[[Peer], object]:
    """Answer one request; of the next, read so many bytes, then close."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(OK)
        peer.sock.recv(1, socket.MSG_PEEK)
        if read:
            peer.sock.recv(read)

    return script


ANSWER_BODY = [b"first", b"x" * 300, b"\r\n", b"0\r\n\r\n", b"last"]
ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Some: thing\r\n\r\n" + chunked(*ANSWER_BODY)


class TestStreams:
    @pytest.mark.parametrize("loop", LOOPS)
    @given(cuts=st.lists(st.integers(1, len(ANSWER) - 1), max_size=8, unique=True).map(sorted))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_the_body_is_the_same_however_the_answer_is_cut(self, loop: str, cuts: list[int]) -> None:
        async def test() -> None:
            parts = [ANSWER[start:end] for start, end in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True)]
            with ScriptedEngine(lambda peer: peer.answer(*parts)) as engine:
                docker = client(engine)
                for _ in range(2):
                    assert await fetch(docker) == (200, b"".join(ANSWER_BODY))
                assert engine.connections == 1
                docker.close()

        run_on(loop)(test())

    def test_the_body_is_the_same_when_every_byte_comes_alone(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(*(bytes([byte]) for byte in ANSWER))) as engine:
                docker = client(engine)
                assert await fetch(docker) == (200, b"".join(ANSWER_BODY))
                docker.close()

        run(test())

    def test_an_answer_that_is_not_taken_is_not_read_on(self, run: Run) -> None:
        size = 32 * 1024 * 1024
        sent = 0
        blocked = threading.Event()

        def script(peer: Peer) -> None:
            nonlocal sent
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            block = os.urandom(65536)
            digest.update(block * (size // len(block)))
            peer.sock.setblocking(False)
            while sent < size:
                if not select.select([], [peer.sock], [], 0.3)[1]:
                    blocked.set()
                    select.select([], [peer.sock], [], PATIENCE_S)
                sent += peer.sock.send(block[sent % len(block) :])
            peer.sock.settimeout(PATIENCE_S)
            peer.wait_closed()

        digest = hashlib.sha256()

        async def test() -> None:
            with ScriptedEngine(script) as engine, await client(engine).request(b"GET", b"/x") as response:
                await until(blocked.is_set)
                assert response._size <= HIGH_WATER + ONE_READ
                assert sent <= HIGH_WATER + ONE_READ + KERNEL
                got = hashlib.sha256()
                most = 0
                async for chunk in response.chunks():
                    got.update(chunk)
                    most = max(most, len(chunk))
                assert most <= HIGH_WATER + ONE_READ
                assert got.digest() == digest.digest()

        run(test())

    @pytest.mark.parametrize("length", [50 * 1024 * 1024, None], ids=["length", "chunked"])
    def test_a_body_that_is_read_slowly_is_not_piled_up(self, run: Run, length: int | None) -> None:
        size = 50 * 1024 * 1024
        piece = os.urandom(1024 * 1024)
        made = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal made
            while made < size:
                made += len(piece)
                yield piece

        def script(peer: Peer) -> None:
            peer.read_head()
            engine.go.wait(PATIENCE_S)
            left = size if length else size + 50 * len(b"100000\r\n\r\n") + len(b"0\r\n\r\n")
            got = peer.read_exactly(left)
            correct.append(got.count(piece) == 50)
            peer.send(OK)
            peer.wait_closed()

        correct: list[bool] = []
        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine:
                docker = client(engine)
                asked = asyncio.ensure_future(fetch(docker, b"/x", b"POST", body=body(), length=length))
                await until(lambda: any(connection._writable for connection in docker._open))
                for _ in range(100):
                    await asyncio.sleep(0)
                assert made <= 3 * len(piece)
                engine.go.set()
                assert await asked == (200, b"ok")
                assert correct == [True]
                docker.close()

        run(test())

    @pytest.mark.parametrize("then", ["closes", "stays"])
    @pytest.mark.parametrize("status", [b"413 Too Large", b"404 Not Found"])
    def test_an_answer_before_the_body_was_read_arrives(self, run: Run, then: str, status: bytes) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.send(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % status)
            if then == "stays":
                peer.wait_hangup()

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine)
                for number in range(1, 21):
                    body = pieces(*[b"x" * 100_000] * 20)
                    assert await fetch(docker, b"/x", b"POST", body=body) == (int(status[:3]), b"no")
                    await until(lambda: engine.open == 0)
                    assert engine.connections == number

        run(test())

    def test_an_answer_is_taken_though_the_write_failed_first(self, run: Run) -> None:
        # The engine answers and closes while this loop is busy: its next step is a write, which fails.
        async def body() -> AsyncIterator[bytes]:
            yield b"x" * 1000
            engine.wait(lambda: engine.open == 0)
            yield b"y" * 1000

        def script(peer: Peer) -> None:
            peer.read_head()
            peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")

        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine:
                assert await fetch(client(engine), b"/x", b"POST", body=body()) == (413, b"no")

        run(test())

    def test_a_body_that_fails_fails_the_request(self, run: Run) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            raise OSError("the disk is gone")

        def script(peer: Peer) -> None:
            peer.read_head()
            peer.sees_close()

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1)
                with pytest.raises(OSError, match="disk"):
                    await docker.request(b"POST", b"/x", body=body())
                await until(engine.closed.is_set, 1)

        run(test())

    @pytest.mark.parametrize("in_one_read", [True, False])
    def test_an_answer_past_its_buffer_is_dropped_and_told_once(self, run: Run, in_one_read: bool) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            if in_one_read:  # the end of the answer too
                peer.send(head + chunked(*[b"x" * 100] * 50))
            else:
                peer.send(head, *[chunked(b"x" * 100, last=False)] * 50)
            peer.sees_close()

        async def test() -> None:
            told: list[bool] = []
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1)
                response = await docker.request(b"GET", b"/x", buffer_limit=1000, on_overflow=lambda: told.append(True))
                await until(lambda: response.failure)
                assert not response.complete
                assert not response.ended
                assert not response._chunks
                assert await code_of(response.next()) == "engine_cut_body"
                assert told == [True]
                await until(lambda: engine.open == 0, 1)
                assert not docker._open

        run(test())

    def test_a_buffered_answer_is_read_past_the_high_water_mark(self, run: Run) -> None:
        size = 4 * HIGH_WATER

        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            peer.drain()
            engine.go.set()
            peer.wait_closed()

        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine:
                docker = client(engine)
                with await docker.request(b"GET", b"/x", buffer_limit=2 * size) as response:
                    await until(engine.go.is_set)
                    assert len(await response.read(size)) == size
                docker.close()

        run(test())


class TestAnswers:
    """Forms of answers that HTTP/1.1 allows, and what becomes of their connections."""

    @pytest.mark.parametrize(
        ("method", "answer", "status", "body", "kept"),
        [
            (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", 200, b"", True),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"", True),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nX-Docker-Container-Path-Stat: e30=\r\n\r\n", 200, b"", True),
            (b"HEAD", b"HTTP/1.1 404 No\r\nContent-Length: 9\r\nConnection: close\r\n\r\n", 404, b"", False),
            (b"HEAD", b"HTTP/1.1 404 No\r\nContent-Length: 9\r\nConnection: x, Close\r\n\r\n", 404, b"", False),
            (b"HEAD", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n", 200, b"", False),
            (b"POST", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
            (b"POST", b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b"", True),
            (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, b"", True),
            (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
            (b"GET", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", False),
            (b"GET", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", False),
            (b"POST", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok", True),
            (b"POST", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK, 200, b"ok", True),
            (b"GET", CODED + b"2\r\nok\r\n0\r\nConnection: close\r\n\r\n", 200, b"ok", False),
            (b"GET", OK + OK, 200, b"ok", False),
            (b"GET", OK + b"garbage", 200, b"ok", False),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", 200, b"", False),
            (b"POST", b"HTTP/1.1 204 No Content\r\n\r\nbody", 204, b"", False),
        ],
    )
    def test_form(self, run: Run, method: bytes, answer: bytes, status: int, body: bytes, kept: bool) -> None:
        async def test() -> None:
            for cuts in [(answer,), tuple(answer[at : at + 7] for at in range(0, len(answer), 7))]:
                with ScriptedEngine(lambda peer, cuts=cuts: peer.answer(*cuts)) as engine:  # type: ignore[misc]
                    docker = client(engine)
                    assert await fetch(docker, method=method) == (status, body)
                    if kept:
                        assert await fetch(docker, method=method) == (status, body)
                        assert engine.connections == 1
                    else:
                        await until(lambda engine=engine: engine.open == 0)  # type: ignore[misc]
                    docker.close()

        run(test())

    @pytest.mark.parametrize(
        ("method", "answer"),
        [
            (b"GET", b"HTTP/1.1 150 Odd\r\nContent-Length: 5\r\n\r\nhello" + OK),
            (b"GET", b"HTTP/1.1 199 Odd\r\ncontent-length:11\r\n\r\nH\r\nX-Y: z\r\n" + OK),
            (b"GET", b"HTTP/1.1 150 Odd\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + OK),
            (b"GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 150 Odd\r\nContent-Length: 5\r\n\r\nhello" + OK),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
            (b"GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: gzip\r\n\r\n"),
            (b"GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: xchunked\r\n\r\n"),
        ],
    )
    def test_what_two_readers_could_take_for_different_answers_is_none(
        self, run: Run, method: bytes, answer: bytes
    ) -> None:
        async def test() -> None:
            for cuts in [(answer,), tuple(answer[at : at + 7] for at in range(0, len(answer), 7))]:
                with ScriptedEngine(lambda peer, cuts=cuts: peer.read_request() and peer.send(*cuts)) as engine:  # type: ignore[misc]
                    docker = client(engine)
                    assert await code_of(fetch(docker, method=method)) == "engine_garbage"
                    docker.close()

        run(test())

    def test_headers_come_as_sent_without_those_of_interim_answers_and_trailers(self, run: Run) -> None:
        answer = (
            b"HTTP/1.1 100 Continue\r\nX-Interim: 1\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nX-Twice: a\r\ncontent-TYPE: b\r\nX-Twice: c\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nX-Trailer: t\r\n\r\n"
        )

        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(answer)) as engine:
                docker = client(engine)
                with await docker.request(b"GET", b"/x") as response:
                    assert await response.read(10) == b"ok"
                    assert response.headers == [
                        (b"X-Twice", b"a"),
                        (b"content-TYPE", b"b"),
                        (b"X-Twice", b"c"),
                        (b"Transfer-Encoding", b"chunked"),
                    ]
                docker.close()

        run(test())

    def test_a_body_without_a_length_ends_with_the_connection(self, run: Run) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\n\r\n", b"all of", b" it")

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1)
                for _ in range(2):
                    assert await fetch(docker) == (200, b"all of it")

        run(test())

    def test_requests_are_framed_by_their_body(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
                docker = client(engine)
                for body, length in ((None, None), (b"", None), (b"abc", None), (pieces(b"ab", b"", b"c"), 3)):
                    await fetch(docker, b"/p?q=%2F", b"POST", body=body, length=length, headers=[(b"X-Y", b"z")])
                await fetch(docker, b"/", b"POST", body=pieces(b"ab", b"", b"c"))
                docker.close()
            head = b"POST /p?q=%2F HTTP/1.1\r\nHost: docker\r\nX-Y: z\r\n"
            assert engine.requests == [
                head + b"\r\n",
                head + b"Content-Length: 0\r\n\r\n",
                head + b"Content-Length: 3\r\n\r\nabc",
                head + b"Content-Length: 3\r\n\r\nabc",
                b"POST / HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            ]

        run(test())


class TestCancellation:
    """Wherever a caller is when it leaves: the engine learns at once, and its place is free."""

    async def _cancel(self, docker: Engine, task: asyncio.Future[Any]) -> None:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def test_in_the_queue(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(hold) as engine:
                docker = client(engine, max_connections=1)
                with await docker.request(b"GET", b"/hold"):
                    waiting = asyncio.ensure_future(docker.request(b"GET", b"/x"))
                    await until(lambda: docker._waiting)
                    await self._cancel(docker, waiting)
                    assert not docker._waiting
                assert await places(docker, limit=1) == 1

        run(test())

    def test_while_connecting(self, run: Run) -> None:
        async def test() -> None:
            with listener_that_never_accepts() as path:
                docker = Engine(path, max_connections=1, queue_s=0, connect_s=PATIENCE_S)
                connecting = asyncio.ensure_future(docker.request(b"GET", b"/x"))
                await until(lambda: not docker._places)
                await self._cancel(docker, connecting)
                assert docker._places == 1

        run(test())

    @pytest.mark.parametrize("turns", range(8))
    def test_at_any_turn_of_the_loop(self, run: Run, turns: int) -> None:
        async def test() -> None:
            with ScriptedEngine(hold) as engine:
                docker = client(engine, max_connections=2, queue_s=0.2)
                for _ in range(5):
                    asking = asyncio.ensure_future(docker.request(b"GET", b"/hold"))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    asking.cancel()
                    await asyncio.wait([asking])
                    if not asking.cancelled():
                        asking.result().close()
                    await until(lambda: not docker._open and engine.open == 0, 1)
                assert docker._places == 2
                assert await places(docker) == 2

        run(test())

    def test_while_sending(self, run: Run) -> None:
        async def endless() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 100_000
            finally:
                ended.append(True)

        def script(peer: Peer) -> None:
            peer.read_head()
            engine.go.wait(PATIENCE_S)
            peer.sees_close()

        ended: list[bool] = []
        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine:
                docker = client(engine, max_connections=1, queue_s=0)
                sending = asyncio.ensure_future(docker.request(b"POST", b"/x", body=endless()))
                await until(lambda: any(connection._writable for connection in docker._open))
                await self._cancel(docker, sending)
                engine.go.set()
                await until(engine.closed.is_set, 1)
                await until(lambda: docker._places == 1)
                gc.collect()
                await until(lambda: ended)

        run(test())

    def test_while_waiting_for_the_head(self, run: Run) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.sees_close()

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1, queue_s=0)
                waiting = asyncio.ensure_future(docker.request(b"GET", b"/x", head_s=60))
                await until(lambda: engine.requests)
                await self._cancel(docker, waiting)
                await until(engine.closed.is_set, 1)
                assert docker._places == 1

        run(test())

    def test_while_reading(self, run: Run) -> None:
        async def test() -> None:
            with ScriptedEngine(hold) as engine:
                docker = client(engine, max_connections=1, queue_s=0)
                reading = asyncio.ensure_future(fetch(docker))
                await until(lambda: any(c._answer and c._answer.status for c in docker._open))
                await self._cancel(docker, reading)
                await until(engine.closed.is_set, 1)
                assert docker._places == 1

        run(test())

    def test_a_cancelled_take_loses_nothing(self, run: Run) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
            engine.go.wait(PATIENCE_S)
            peer.send(b"whole")
            peer.wait_closed()

        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine:
                docker = client(engine)
                with await docker.request(b"GET", b"/x") as response:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(response.next(), 0.01)
                    engine.go.set()
                    assert await response.read(10) == b"whole"
                docker.close()

        run(test())


UPGRADE = [(b"Connection", b"Upgrade"), (b"Upgrade", b"tcp"), (b"Content-Type", b"application/json")]


def hijacked(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")


class TestHijackScripted:
    def test_bytes_behind_the_head_belong_to_the_stream(self, run: Run) -> None:
        def script(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                assert await fetch(client(engine), headers=UPGRADE) == (101, b"HTTP/1.1 200 OK\r\n\r\n")

        run(test())

    def test_a_write_given_up_does_not_spoil_the_next(self, run: Run) -> None:
        size = 4 * 1024 * 1024

        def script(peer: Peer) -> None:
            hijacked(peer)
            engine.go.wait(PATIENCE_S)
            peer.read_exactly(size + 4)
            peer.send(b"all")

        engine = ScriptedEngine(script)

        async def test() -> None:
            with engine, await client(engine).request(b"POST", b"/x", UPGRADE) as response:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(response.write(b"x" * size), 0.02)
                engine.go.set()
                await response.write(b"more")
                assert await response.read(10) == b"all"

        run(test())

    def test_output_is_taken_though_the_input_was_refused(self, run: Run) -> None:
        # A process that ends without reading its input: the engine closes on what we write, after its last output.
        def script(peer: Peer) -> None:
            hijacked(peer)
            peer.send(b"last words")

        async def test() -> None:
            with ScriptedEngine(script) as engine, await client(engine).request(b"POST", b"/x", UPGRADE) as response:
                engine.wait(lambda: engine.open == 0)
                with contextlib.suppress(RunnerError):
                    for _ in range(3):
                        await response.write(b"input that nobody wants")
                assert await response.read(100) == b"last words"

        run(test())

    def test_leaving_it_closes_it(self, run: Run) -> None:
        def script(peer: Peer) -> None:
            hijacked(peer)
            peer.sees_close()

        async def test() -> None:
            with ScriptedEngine(script) as engine:
                docker = client(engine, max_connections=1)
                with await docker.request(b"POST", b"/x", UPGRADE) as response:
                    assert not response.complete
                await until(engine.closed.is_set, 1)
                assert docker._places == 1

        run(test())


def demultiplexed(stream: bytes) -> bytes:
    """The payload of a stream of frames: https://docs.docker.com/engine/api/v1.41/#operation/ContainerAttach."""
    out = []
    while stream:
        (size,) = struct.unpack(">I", stream[4:8])
        out.append(stream[8 : 8 + size])
        assert len(out[-1]) == size, "the last frame is whole"
        stream = stream[8 + size :]
    return b"".join(out)


@contextlib.contextmanager
def collecting_garbage() -> Iterator[None]:
    """Collects garbage every 5 ms: nothing that a half-closed stream needs may be held weakly."""
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(0.005):
            gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def container(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container."""
    body = {
        "Image": image,
        "Cmd": ["sleep", "600"],
        "Labels": names.labels,
        "HostConfig": {"NetworkMode": "none", "Init": False},
    }
    name = names("hijack-")
    assert direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201
    assert direct.request("POST", f"/containers/{name}/start").status_code == 204
    return name


class TestHijack:
    """On the real engine."""

    async def _exec(self, docker: Engine, container: str, *command: str) -> EngineResponse:
        made = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "Cmd": command}
        json_type = [(b"Content-Type", b"application/json")]
        target = b"/containers/%b/exec" % container.encode()
        _, answer = await fetch(docker, target, b"POST", headers=json_type, body=json.dumps(made).encode())
        exec_id = json.loads(answer)["Id"].encode()
        return await docker.request(b"POST", b"/exec/%b/start" % exec_id, UPGRADE, b'{"Detach":false,"Tty":false}')

    async def _through(self, response: EngineResponse, data: bytes) -> None:
        """What is written comes back, all of it, though our half closes first."""

        async def write() -> None:
            for start in range(0, len(data), 65536):
                await response.write(data[start : start + 65536])
            response.write_eof()

        assert response.status == 101
        with response:
            writing = asyncio.ensure_future(write())
            got = await response.read(2 * len(data))
            await writing
        assert demultiplexed(got) == data

    def test_exec_gives_back_5_megabytes(self, run: Run, engine: RealEngine, container: str) -> None:
        async def test() -> None:
            docker = Engine(engine.socket, max_connections=2, queue_s=1, connect_s=2)
            await self._through(await self._exec(docker, container, "cat"), os.urandom(5 * 1024 * 1024))
            docker.close()

        run(test())

    def test_output_goes_on_after_our_half_is_closed(self, run: Run, engine: RealEngine, container: str) -> None:
        async def test() -> None:
            docker = Engine(engine.socket, max_connections=2, queue_s=1, connect_s=2)
            script = "cat >/dev/null; echo one; usleep 200000; echo two"
            with await self._exec(docker, container, "sh", "-c", script) as response:
                await response.write(b"input")
                response.write_eof()
                assert demultiplexed(await response.read(1000)) == b"one\ntwo\n"
            docker.close()

        run(test())

    def test_exec_loses_nothing_to_the_garbage_collector(self, run: Run, engine: RealEngine, container: str) -> None:
        async def test() -> None:
            docker = Engine(engine.socket, max_connections=2, queue_s=1, connect_s=2)
            with collecting_garbage():
                for _ in range(20):
                    script = "cat; usleep 20000; echo end"
                    with await self._exec(docker, container, "sh", "-c", script) as response:
                        data = os.urandom(200_000)
                        await response.write(data)
                        response.write_eof()
                        assert demultiplexed(await response.read(1 << 20)) == data + b"end\n"
            docker.close()

        run(test())

    def test_attach(self, run: Run, engine: RealEngine, direct: EngineDirect, names: Names, image: str) -> None:
        name = names("attach-")
        body = {
            "Image": image,
            "Cmd": ["cat"],
            "Labels": names.labels,
            "OpenStdin": True,
            "StdinOnce": True,
            "AttachStdin": True,
            "AttachStdout": True,
            "HostConfig": {"NetworkMode": "none"},
        }
        assert direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201

        async def test() -> None:
            docker = Engine(engine.socket, max_connections=2, queue_s=1, connect_s=2)
            target = b"/containers/%b/attach?stream=1&stdin=1&stdout=1" % name.encode()
            response = await docker.request(b"POST", target, UPGRADE)
            status, _ = await fetch(docker, b"/containers/%b/start" % name.encode(), b"POST")
            assert status == 204
            await self._through(response, os.urandom(1024 * 1024))
            docker.close()

        run(test())


class _Heads:
    """What the parser itself says of an answer."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        self.in_head = False


_PART = st.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b": ",
        b"\0",
        b"\xff",
        b"X-A",
        b"a",
        b"Transfer-Encoding: chunked",
        b"\r\nX-B: c",
    ]
)


@given(parts=st.lists(_PART, max_size=12), before=st.sampled_from([b"", b"\r\n", b"\n", b"\r\n\r\n"]))
def test_header_fields_are_those_that_the_parser_has_seen(parts: list[bytes], before: bytes) -> None:
    data = before + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: 1" + b"".join(parts) + b"\r\n\r\nok"
    seen = _Heads()
    with contextlib.suppress(httptools.HttpParserError):
        httptools.HttpResponseParser(seen).feed_data(data)

    async def test() -> list[tuple[bytes, bytes]] | None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            connection = Connection(ours, lambda _: None, lambda _: None)
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
            answer = connection.begin(
                b"GET", b"x", whole=True, bare=True, upgrade=False, head_s=None, overflow=None, operation=""
            )
            connection.data_received(data)
            connection.close()
            return answer.headers if answer.status else None

    got = asyncio.run(test())
    if not seen.in_head:
        assert got is None or got == [(name, value.strip(b" \t")) for name, value in seen.fields]
    else:
        assert got is None
