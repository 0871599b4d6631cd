"""What is hard about the SSE streams, on a real engine: whole, in order, at once, in flat memory, with a told end."""

import asyncio
import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import pytest

from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from feeds import HEAD_WAIT_S
from scripted import Peer, ScriptedEngine
from service import Runner, read_to_end, signed_head
from sessions import session

MIB = 1024 * 1024
LOGS = "/v1/containers/logs/sse?"
EVENTS = "/v1/events/sse?"

INSPECTED = b'{"Id":"c","Config":{"Tty":false},"State":{},"NetworkSettings":{}}'
PODMAN = b"HTTP/1.1 200 OK\r\nLibpod-API-Version: 4.3.1\r\nContent-Length: %d\r\n\r\n" % len(INSPECTED)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def long_log(containers: Containers) -> str:
    """A container that has said 100 MB, in lines of 9 KB, and ended."""
    line = "x" * 99
    return containers.ended("sh", "-c", f"yes '{line}' | head -c 102000000 | tr -d '\\n' | fold -w 9000; echo end >&2")


@pytest.fixture
def alone(engine: Engine) -> Iterator[Runner]:
    """A runner whose memory and connections nobody else uses."""
    with Runner(engine.socket) as running:
        yield running


def messages(response: http.client.HTTPResponse) -> Generator[dict[str, Any], None, None]:
    """The messages of a stream as they come; what is neither a whole message nor a whole comment fails."""
    while line := response.readline():
        assert line.startswith((b"data: ", b":")), line[:200]
        end = response.readline()
        assert end == b"\n" or (end.startswith(b"id: ") and response.readline() == b"\n")
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def raw_log(found: list[dict[str, Any]]) -> bytes:
    """The engine's stream out of messages of a log, which must have ended well."""
    assert found[-1] == {"type": "end"}, found[-1]
    assert {message["type"] for message in found[:-1]} <= {"chunk"}
    return b"".join(base64.b64decode(message["data"]) for message in found[:-1])


def filters(**given: list[str]) -> str:
    return base64.b64encode(json.dumps(given).encode()).decode()


def events_of(container: str, action: str = "exec_create") -> str:
    """The target of the events of one kind of one container."""
    return EVENTS + urlencode({"filters": filters(container=[container], event=[action])})


class TestLogs:
    def test_100_mb_come_at_once_in_flat_memory_and_are_the_engines_bytes(
        self, alone: Runner, direct: EngineDirect, long_log: str
    ) -> None:
        target = LOGS + urlencode({"containerId": long_log, "follow": "false"})
        assert alone.request("GET", target + "&tail=1").status == 200
        kept = direct.request("GET", f"/containers/{long_log}/logs?stdout=1&stderr=1").content
        before, most, at = alone.memory(), 0, 0
        with alone.stream("GET", target) as response:
            assert response.status == 200
            assert response.getheader("content-type") == "text/event-stream"
            assert response.getheader("cache-control") == "no-cache, no-transform"
            head = time.monotonic()
            assert response.peek(1)
            first = time.monotonic() - head
            ended = False
            for message in messages(response):
                assert not ended
                ended = message["type"] == "end"
                if not ended:
                    piece = base64.b64decode(message["data"])
                    assert kept[at : at + len(piece)] == piece
                    at += len(piece)
                most = max(most, alone.memory())
            assert ended
        took = time.monotonic() - head
        print(f"100 MB of log: first byte {first * 1000:.1f} ms, {took:.1f} s, {(most - before) / MIB:.1f} MiB more")
        assert at == len(kept) > 100_000_000
        assert first < 0.25
        assert most - before < 16 * MIB

    def test_a_slow_reader_makes_the_engine_wait(self, alone: Runner, long_log: str) -> None:
        target = LOGS + urlencode({"containerId": long_log, "follow": "0"})
        assert alone.request("GET", target + "&tail=1").status == 200
        before = alone.memory()
        with alone.connect() as sock:
            sock.sendall(signed_head("GET", target))
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            samples = [alone.memory()]
            assert wait_until(lambda: samples.append(alone.memory()) or len(samples) > 100, 30)  # type: ignore[func-returns-value]
        assert max(samples) - before < 16 * MIB

    def test_every_chunk_is_of_whole_frames(self, runner: Runner, direct: EngineDirect, containers: Containers) -> None:
        own = containers.ended("sh", "-c", "seq 5000; seq 5000 >&2; head -c 40000 /dev/zero; printf 'no newline'")
        target = LOGS + urlencode({"containerId": own, "follow": "false"})
        with runner.stream("GET", target) as response:
            found = list(messages(response))
        assert raw_log(found) == direct.request("GET", f"/containers/{own}/logs?stdout=1&stderr=1").content
        for message in found[:-1]:
            data = base64.b64decode(message["data"])
            while data:
                assert data[0] in (1, 2)
                size = 8 + int.from_bytes(data[4:8], "big")
                assert len(data) >= size
                data = data[size:]

    def test_comments_come_only_between_messages_and_the_head_at_once(
        self, engine: Engine, containers: Containers
    ) -> None:
        speak = "head -c 3000000 /dev/zero | tr '\\0' x"
        own = containers("sh", "-c", f'trap "{speak}; echo" USR1; while :; do usleep 50000; done')
        with Runner(engine.socket, {"DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": "100"}) as runner:
            began = time.monotonic()
            with runner.stream("GET", LOGS + urlencode({"containerId": own})) as response:
                assert time.monotonic() - began < 1
                for _ in range(3):
                    assert response.readline() == b": keep-alive\n"
                    assert response.readline() == b"\n"
                containers.do("POST", f"/containers/{own}/kill?signal=USR1", 204)
                said = 0
                for message in messages(response):
                    said += base64.b64decode(message["data"]).count(b"x")
                    if said >= 3_000_000:
                        break
        assert said == 3_000_000

    def test_a_caller_that_leaves_closes_the_engines_connection(self, alone: Runner, containers: Containers) -> None:
        own = containers("sh", "-c", "echo said; exec sleep 1d")
        target = LOGS + urlencode({"containerId": own})
        at_rest = alone.sockets()
        assert alone.request("GET", target + "&follow=false").status == 200
        before = at_rest + 1  # A kept connection to the engine.
        assert wait_until(lambda: alone.sockets() <= before, 5)
        with alone.stream("GET", target) as response:
            assert next(messages(response))["type"] == "chunk"
            assert alone.sockets() > before
        assert wait_until(lambda: alone.sockets() <= before, 1)

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"8\r\n\1\0\0\0\0\0\0\x04\r\n4\r\nsaid\r\n4\r\n\1\0\0\0", b"\1\0\0\0\0\0\0\x04said"),
            (b"c\r\n\1\0\0\0\0\0\0\x04said\r\n8\r\nno frame\r\n", b"\1\0\0\0\0\0\0\x04said"),
            (b"no chunk\r\n", b""),
        ],
        ids=["cut", "no frame", "no chunk"],
    )
    def test_a_stream_that_breaks_is_told_in_band(self, body: bytes, said: bytes) -> None:
        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/logs?" in request:
                    peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", body)
                    return
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(INSPECTED), INSPECTED))

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            with runner.stream("GET", LOGS + "containerId=c") as response:
                found = list(messages(response))
            assert found[-1]["type"] == "error"
            assert found[-1]["message"]
            got = b"".join(base64.b64decode(message["data"]) for message in found[:-1])
            assert got in (said, b"") if b"no frame" in body else got == said  # What came with it may be lost.
            assert "defect" not in "".join(runner.log)

    def test_of_podman_it_begins_before_the_answer_does_which_may_still_refuse(self) -> None:
        """Podman answers with the first line that is said."""
        begun = threading.Event()

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/logs?" in request:
                    assert begun.wait(20)
                    peer.send(b"HTTP/1.1 500 No\r\nContent-Length: 16\r\n\r\n", b'{"message":"no"}')
                else:
                    peer.send(PODMAN, INSPECTED)

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            with runner.stream("GET", LOGS + "containerId=c") as response:
                assert response.status == 200
                begun.set()
                (error,) = messages(response)
            assert (error["type"], error["status"], error["code"]) == ("error", 500, "server_error")
            assert error["message"] == "no"
            assert "defect" not in "".join(runner.log)

    def test_a_caller_that_leaves_before_podmans_answer_closes_its_connection(self) -> None:
        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/logs?" in request:
                    peer.sees_close()
                    return
                peer.send(PODMAN, INSPECTED)

        with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
            with runner.stream("GET", LOGS + "containerId=c") as response:
                assert response.status == 200
            assert engine.closed.wait(5)
            assert "defect" not in "".join(runner.log)

    def test_a_refusal_that_comes_late_keeps_its_status(self) -> None:
        """Docker Engine is waited for, however long it takes."""

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/logs?" in request:
                    time.sleep(2 * HEAD_WAIT_S)  # The lateness itself: Podman would be waited for no longer.
                    peer.send(b"HTTP/1.1 404 No\r\nContent-Length: 16\r\n\r\n", b'{"message":"no"}')
                else:
                    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(INSPECTED), INSPECTED))

        with (
            ScriptedEngine(script) as engine,
            Runner(engine.path) as runner,
            runner.stream("GET", LOGS + "containerId=c") as response,
        ):
            assert response.status == 404


class TestEvents:
    def test_a_burst_of_1000_arrives_once_in_order_and_undamaged(
        self, runner: Runner, direct: EngineDirect, containers: Containers, names: Names
    ) -> None:
        own = containers(Labels={**names.labels, "grüße": "日本語 😀 \u2028 é"})
        # From some seconds ago on: the engine sends the head of the stream, and only then begins to listen.
        with runner.stream("GET", f"{events_of(own)}&since={int(time.time()) - 5}") as response:
            made = [containers.exec(own, "echo", f"Nº {number} ✓ 😀\u2028") for number in range(1000)]
            lines: list[bytes] = []
            while len(lines) < 1000:
                line = response.readline()
                if line.startswith(b"data: ") and b'"Action":"exec_create' in line:
                    lines.append(line.removeprefix(b'data: {"type":"event","event":').removesuffix(b"}\n"))
        found = [json.loads(line) for line in lines]
        assert [event["Actor"]["Attributes"]["execID"] for event in found] == made
        assert [event["Action"] for event in found] == [f"exec_create: echo Nº {n} ✓ 😀\u2028" for n in range(1000)]
        query = urlencode(
            {
                "filters": json.dumps({"container": [own], "event": ["exec_create"]}),
                "since": found[0]["time"] - 1,
                "until": found[-1]["time"] + 1,
            }
        )
        kept = direct.request("GET", f"/events?{query}").content.splitlines()
        assert len(kept) > 100  # The engine keeps its last 256.
        assert lines[-len(kept) :] == kept

    def test_an_event_of_megabytes_is_whole(self, runner: Runner, containers: Containers) -> None:
        own = containers()
        long = "x" * (3 * MIB)
        with runner.stream("GET", events_of(own)) as response:
            containers.exec(own, "echo", long)
            found = next(messages(response))
        assert found["event"]["Action"] == f"exec_create: echo {long}"

    def test_a_stalled_reader_is_cut_off_and_another_feels_nothing(
        self, engine: Engine, containers: Containers, names: Names
    ) -> None:
        count = 700
        labels = {**names.labels, **{f"long-{number}": "é" * 500 for number in range(20)}}
        own = containers(Labels=labels)
        target = events_of(own)
        with (
            Runner(engine.socket, {"DOCKER_RUNNER_EVENT_BUFFER": str(MIB)}) as runner,
            runner.connect() as stalled,
            ThreadPoolExecutor(1) as pool,
            runner.stream("GET", target) as response,
        ):
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            stalled.sendall(signed_head("GET", target))
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            before, sockets = runner.memory(), runner.sockets()

            def read_all() -> list[str]:
                found = messages(response)
                return [next(found)["event"]["Actor"]["Attributes"]["execID"] for _ in range(count)]

            reading = pool.submit(read_all)
            made = [containers.exec(own, "true") for _ in range(count)]
            assert reading.result(30) == made
            assert wait_until(lambda: runner.sockets() <= sockets - 1, 1)
            assert runner.memory() - before < 16 * MIB
            stalled.settimeout(20)
            rest = read_to_end(stalled)
            assert not rest.endswith(b"0\r\n\r\n"), "it must not look complete"

    def test_a_caller_that_leaves_closes_the_engines_connection(self, alone: Runner, containers: Containers) -> None:
        target = events_of(containers())
        before = alone.sockets()
        for _ in range(5):
            with alone.stream("GET", target) as response:
                assert response.status == 200
                assert alone.sockets() > before
            assert wait_until(lambda: alone.sockets() <= before, 1)


def test_an_engine_that_is_killed_is_told_in_band(private_engine: PrivateEngine, own_box: str) -> None:
    with (
        Runner(private_engine.socket) as runner,
        runner.stream("GET", LOGS + urlencode({"containerId": own_box})) as log,
        runner.stream("GET", EVENTS) as events,
    ):
        found = messages(log)
        assert next(found)["type"] == "chunk"
        private_engine.kill()
        last = list(found)
        assert [message["type"] for message in last] == ["error"]
        assert isinstance(last[0]["message"], str)
        private_engine.start()
        told = messages(events)
        assert [next(told)["type"] for _ in range(2)] == ["reconnected", "gap"]


def test_sigterm_is_told_in_band_to_every_stream_and_the_status_is_0(engine: Engine, containers: Containers) -> None:
    own = containers("sh", "-c", "echo said; exec sleep 1d")

    async def test(runner: Runner, log: Any, events: Any) -> None:
        async with session(runner, own, "cat") as one:
            stopped = asyncio.ensure_future(asyncio.to_thread(runner.stop))
            await one.to_end()
            assert [error["code"] for error in one.errors] == ["shutting_down"]
            assert one.close_code == 1012
            for rest in (log, events):
                last = await asyncio.to_thread(list, rest)
                assert [message["type"] for message in last] == ["error"]
            assert await stopped == 0
        assert "defect" not in "".join(runner.log)

    with (
        Runner(engine.socket, {"DOCKER_RUNNER_GRACE_MS": "300"}) as runner,
        runner.stream("GET", LOGS + urlencode({"containerId": own})) as log,
        runner.stream("GET", events_of(own, "die")) as events,
    ):
        lines = messages(log)
        assert next(lines)["type"] == "chunk"
        asyncio.run(test(runner, lines, messages(events)))
