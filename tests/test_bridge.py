"""The bridge beside the engine's own socket: the same bytes for requests, taken-over connections, uploads.

What goes wrong is in test_bridge_faults.py, TLS in test_bridge_tls.py, the real tools in files of their own.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_engine_face_streams import unframed
from websockets.asyncio.client import unix_connect

from bridged import Bridge, Raw, ask, dial, read_answer, read_chunks, read_head, read_until, request
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from service import Runner, read_to_end
from sessions import Session, session_target, stdin

MIB = 1024 * 1024
MANY = 200 * MIB
FLAT = 24 * MIB
"""Bytes that the memory of a bridge or a runner may grow by under one transfer, of whatever length."""
MISSING = "0123456789abcdef" * 4
JSON = "Content-Type: application/json"
UPGRADE = ("Connection: Upgrade", "Upgrade: tcp")
START = b'{"Detach":false,"Tty":false}'
START_TTY = b'{"Detach":false,"Tty":true}'
ATTACH = "stream=1&stdin=1&stdout=1&stderr=1"


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def ended(containers: Containers) -> str:
    """A container that said something, and ended."""
    return containers.ended("sh", "-c", "echo out; echo err >&2")


@pytest.fixture(scope="module", autouse=True)
def no_defect(bridge: Bridge) -> Iterator[None]:
    yield
    bridge.check_log()


class Both:
    """The engine's own socket, and the bridge's."""

    def __init__(self, engine: Engine, bridge: Bridge) -> None:
        self.bridge = bridge
        self.hosts = (f"unix://{engine.socket}", bridge.host)

    def same(self, *cuts: bytes) -> Raw:
        """Both give the same answer, but for what the engine itself does not give twice; returns the bridge's."""
        answers: list[Raw] = []
        for _ in range(20):
            answers = [self.ask(host, *cuts) for host in self.hosts]
            if answers[0] == answers[1]:
                return answers[1]
        assert answers[1] == answers[0]
        return answers[1]

    def alike(self, *requests: bytes) -> Raw:
        """The first request to the engine and the second to the bridge get the same answer."""
        answers = [self.ask(host, asked) for host, asked in zip(self.hosts, requests, strict=True)]
        assert answers[1] == answers[0]
        return answers[1]

    def ask(self, host: str, *cuts: bytes) -> Raw:
        with dial(host) as sock:
            return ask(sock, *cuts)


@pytest.fixture(scope="module")
def both(engine: Engine, bridge: Bridge) -> Both:
    return Both(engine, bridge)


class TestPlain:
    @pytest.mark.parametrize(
        ("status", "method", "target"),
        [
            (200, "GET", "/_ping"),
            (200, "HEAD", "/_ping"),
            (200, "GET", "/v1.41/_ping"),
            (200, "GET", "/version"),
            (200, "GET", "/containers/{box}/json"),
            (200, "GET", "/v1.41/containers/{ended}/logs?stdout=1&stderr=1"),
            (200, "GET", "/containers/{ended}/logs?stdout=1&stderr=1&follow=1"),
            (200, "GET", "/containers/{ended}/archive?path=/bin"),
            (200, "HEAD", "/containers/{ended}/archive?path=/bin"),
            (200, "POST", "/containers/{ended}/wait"),
            (301, "GET", "/images//json"),
            (304, "POST", "/containers/{box}/start"),
            (500, "GET", "/containers/json?filters=nonsense"),
            (404, "GET", f"/containers/{MISSING}/json"),
            (404, "HEAD", f"/containers/{MISSING}/archive?path=/"),
            (404, "DELETE", f"/containers/{MISSING}/alias?link=1"),
            (404, "PUT", f"/containers/{MISSING}/archive?path=/"),
            (409, "POST", "/containers/{ended}/kill"),
        ],
    )
    def test_an_answer_is_the_engines_byte_for_byte(
        self, both: Both, box: str, ended: str, status: int, method: str, target: str
    ) -> None:
        asked = request(method, target.format(box=box, ended=ended))
        assert both.same(asked).status == status

    def test_a_204_is_the_engines(self, both: Both, containers: Containers) -> None:
        first, second = containers.pair()
        asked = [request("POST", f"/containers/{name}/pause") for name in (first, second)]
        assert both.alike(*asked).status == 204
        for name in (first, second):
            containers.do("POST", f"/containers/{name}/unpause", 204)

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_a_body_with_either_framing_reaches_the_engine(self, both: Both, box: str, framing: str) -> None:
        body = b'{"Memory":33554432,"MemorySwap":33554432}'
        target = f"/containers/{box}/update"
        if framing == "length":
            asked = request("POST", target, JSON, body=body)
        else:
            cut = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:])]
            asked = request("POST", target, JSON, "Transfer-Encoding: chunked") + b"".join(cut) + b"0\r\n\r\n"
        assert both.same(asked).status == 200

    def test_a_request_may_come_byte_by_byte(self, bridge: Bridge, box: str) -> None:
        chunk = b"28\r\n" + b'{"Memory":33554432,"MemorySwap":33554432}'[:40] + b"\r\n1\r\n}\r\n0\r\n\r\n"
        asked = request("POST", f"/containers/{box}/update", JSON, "Transfer-Encoding: chunked") + chunk
        with bridge.connect() as sock:
            for _ in range(2):
                assert ask(sock, *[bytes((byte,)) for byte in asked]).status == 200

    def test_each_piece_of_a_stream_arrives_at_once(self, both: Both, containers: Containers) -> None:
        for host in both.hosts:
            name = containers("sh", "-c", "while read line; do echo got $line; done", OpenStdin=True)
            with dial(host) as follower, dial(host) as typist:
                follower.sendall(request("GET", f"/containers/{name}/logs?stdout=1&follow=1"))
                assert b"Transfer-Encoding: chunked" in read_head(follower)
                typist.sendall(request("POST", f"/containers/{name}/attach?stream=1&stdin=1", *UPGRADE))
                assert b" 101 " in read_head(typist)
                chunks = read_chunks(follower)
                for number in range(5):
                    typist.sendall(b"%d\n" % number)
                    said = b""
                    while not said.endswith(b"got %d\n" % number):
                        said += next(chunks)

    def test_a_progress_stream_is_chunked_line_by_line(self, bridge: Bridge, image: str, names: Names) -> None:
        with bridge.connect() as sock:
            sock.sendall(request("POST", f"/images/create?fromImage={names('none')}&tag=x"))
            assert read_answer(sock).status in (404, 500)

    def test_long_headers_pass_unchanged_and_reach_no_log(
        self, engine: Engine, short_folder: Path, runner: Runner
    ) -> None:
        secret = "s3cr3t" * 8_000  # 48 KB
        with Bridge(runner.url, f"unix://{short_folder}/long.sock") as bridge:
            for name in ("X-Registry-Auth", "X-Registry-Config"):
                assert bridge.ask(request("POST", "/images/create?fromImage=127.0.0.1:1/x&tag=y", f"{name}: {secret}"))
        assert "s3cr3t" not in "".join([*bridge.log, *runner.log])

    def test_many_requests_on_one_connection(self, bridge: Bridge, box: str) -> None:
        with bridge.connect() as sock:
            for _ in range(50):
                assert ask(sock, request("GET", f"/containers/{box}/json")).status == 200
                assert ask(sock, request("HEAD", "/_ping")).status == 200
                assert ask(sock, request("POST", f"/containers/{box}/start")).status == 304
                assert ask(sock, request("GET", f"/containers/{MISSING}/json")).status == 404

    def test_pipelined_requests_are_answered_in_order(self, bridge: Bridge, box: str) -> None:
        asked = [request("GET", f"/containers/{box}/json"), request("HEAD", "/_ping"), request("GET", "/_ping")]
        with bridge.connect() as sock:
            sock.sendall(b"".join(asked))
            answers = [read_answer(sock, one.split(b" ")[0]) for one in asked]
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert json.loads(answers[0].body)["Name"] == f"/{box}"
        assert answers[2].body == b"OK"

    def test_an_answer_to_http_1_0_ends_with_the_connection(self, both: Both, ended: str) -> None:
        for target in ("/_ping", f"/containers/{ended}/logs?stdout=1"):
            asked = request("GET", target).replace(b"HTTP/1.1", b"HTTP/1.0")
            answers = [both.ask(host, asked) for host in both.hosts]
            assert answers[1].status == 200
            assert answers[1][1:] == answers[0][1:]

    def test_a_tool_that_asks_for_the_end_of_the_connection_gets_it(self, bridge: Bridge) -> None:
        with bridge.connect() as sock:
            sock.sendall(request("GET", "/_ping", "Connection: close"))
            assert b"Connection: close" in read_head(sock)
            assert read_to_end(sock) == b"OK"

    @pytest.mark.parametrize("length", [1000, 2 * MIB])
    def test_a_tool_that_expects_100_continue_is_told_to(self, bridge: Bridge, box: str, length: int) -> None:
        with bridge.connect() as sock:
            target = f"/containers/{box}/archive?path=/missing"
            sock.sendall(request("PUT", target, "Expect: 100-continue", f"Content-Length: {length}"))
            assert read_head(sock).startswith(b"HTTP/1.1 100 ")
            sock.sendall(bytes(length))
            assert read_answer(sock).status == 404

    def test_a_connection_without_a_request_is_no_request(self, bridge: Bridge) -> None:
        with bridge.connect() as sock:
            sock.sendall(b"\r\n")
            assert ask(sock, b"\r\n", request("GET", "/_ping")).body == b"OK"

    def test_the_signature_headers_of_a_tool_do_not_travel(self, bridge: Bridge) -> None:
        answer = bridge.ask(request("GET", "/_ping", "X-DR-Nonce: one", "X-DR-Signature: two", "X-DR-Key: three"))
        assert answer.status == 200


class TestTakenOver:
    """Attach and exec: the connection becomes a raw stream."""

    def exec(self, containers: Containers, box: str, *command: str, **config: object) -> str:
        return f"/exec/{containers.exec(box, *command, **config)}/start"

    @pytest.mark.parametrize("fields", [UPGRADE, ()], ids=["upgraded", "older form"])
    @pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
    def test_an_exec_is_the_engines_byte_for_byte(
        self, both: Both, containers: Containers, box: str, fields: tuple[str, ...], tty: bool
    ) -> None:
        seen = []
        for host in both.hosts:
            target = self.exec(containers, box, "sh", "-c", "echo out; exit 3", Tty=tty)
            with dial(host) as sock:
                sock.sendall(request("POST", target, JSON, *fields, body=START_TTY if tty else START))
                seen.append((sorted(read_head(sock).split(b"\r\n")), read_to_end(sock)))
            assert containers.do("GET", target.replace("start", "json"), 200)["ExitCode"] == 3
        assert seen[1] == seen[0]
        head, data = seen[1]
        if fields:
            assert {b"HTTP/1.1 101 UPGRADED", b"Connection: Upgrade", b"Upgrade: tcp"} <= set(head)
        else:
            assert b"HTTP/1.1 200 OK" in head
            assert not [line for line in head if line.lower().startswith((b"content-length", b"transfer-encoding"))]
        assert data == (b"out\r\n" if tty else b"\1\0\0\0\0\0\0\4out\n")

    @pytest.mark.parametrize("fields", [UPGRADE, ()], ids=["upgraded", "older form"])
    def test_an_attach_is_the_engines_byte_for_byte(
        self, both: Both, containers: Containers, fields: tuple[str, ...]
    ) -> None:
        seen = []
        for host in both.hosts:
            name = containers("cat", OpenStdin=True, StdinOnce=True)
            with dial(host) as sock:
                sock.sendall(request("POST", f"/v1.41/containers/{name}/attach?{ATTACH}", *fields))
                head = read_head(sock)
                sock.sendall(b"one\n")
                read_until(sock, b"one\n")
                sock.sendall(b"two\n")
                sock.shutdown(socket.SHUT_WR)
                seen.append((sorted(head.split(b"\r\n")), read_to_end(sock)))
        assert seen[1] == seen[0]
        assert seen[1][1] == b"\1\0\0\0\0\0\0\4two\n"

    def test_the_head_arrives_alone(self, bridge: Bridge, containers: Containers, box: str) -> None:
        def once(_: int) -> None:
            target = self.exec(containers, box, "echo", "at once")
            with bridge.connect() as sock:
                sock.sendall(request("POST", target, JSON, *UPGRADE, body=START))
                first = sock.recv(MIB)
                assert first.endswith(b"\r\n\r\n"), first
                assert first.count(b"\r\n\r\n") == 1
                assert read_to_end(sock).endswith(b"at once\n")

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(once, range(50)))

    def test_the_older_form_ends_before_its_request_does(self, bridge: Bridge, containers: Containers) -> None:
        name = containers("head", "-n1", OpenStdin=True, StdinOnce=True)
        with bridge.connect() as sock:
            sock.sendall(request("POST", f"/containers/{name}/attach?{ATTACH}", "Transfer-Encoding: chunked"))
            assert read_head(sock).startswith(b"HTTP/1.1 200 OK\r\n")
            sock.sendall(b"5\r\nhello\r\n")
            # As the engine does: what comes after the head is input, the marks of the chunks too.
            assert unframed(read_to_end(sock))[1] == b"5\r\n"

    def test_the_end_of_input_reaches_the_process_and_its_output_still_arrives(
        self, bridge: Bridge, containers: Containers, box: str
    ) -> None:
        target = self.exec(containers, box, "sh", "-c", "wc -c; sleep 0.5; echo later", AttachStdin=True)
        with bridge.connect() as sock:
            sock.sendall(request("POST", target, JSON, *UPGRADE, body=START))
            read_head(sock)
            sock.sendall(bytes(1000))
            sock.shutdown(socket.SHUT_WR)
            assert unframed(read_to_end(sock))[1] == b"1000\nlater\n"

    def test_nothing_adds_an_end_of_input(self, bridge: Bridge, containers: Containers) -> None:
        name = containers("sh", "-c", "read line; echo got $line", OpenStdin=True, StdinOnce=True)
        with bridge.connect() as sock:
            sock.sendall(request("POST", f"/containers/{name}/attach?{ATTACH}", *UPGRADE))
            read_head(sock)
            sock.settimeout(2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(20)
            sock.sendall(b"late\n")
            assert unframed(read_to_end(sock))[1] == b"got late\n"

    @pytest.mark.parametrize("fields", [UPGRADE, ()], ids=["upgraded", "older form"])
    def test_a_refusal_is_the_engines(
        self, both: Both, containers: Containers, ended: str, fields: tuple[str, ...]
    ) -> None:
        assert both.same(request("POST", f"/exec/{MISSING}/start", JSON, *fields, body=START)).status == 404
        assert both.same(request("POST", f"/exec/{MISSING}/start", JSON, *fields, body=b"nonsense")).status == 400
        # The engine gives this one without a length, and ends the connection; the bridge keeps it.
        asked = request("POST", f"/containers/{MISSING}/attach?{ATTACH}", *fields)
        answers = [both.ask(host, asked) for host in both.hosts]
        assert answers[1].status == 404
        assert answers[1].body == answers[0].body

    def test_a_refused_upgrade_leaves_the_connection_for_more(self, bridge: Bridge) -> None:
        with bridge.connect() as sock:
            asked = request("POST", f"/exec/{MISSING}/start", JSON, *UPGRADE, body=START)
            assert ask(sock, asked).status == 404
            assert ask(sock, asked).status == 404
            assert ask(sock, request("GET", "/_ping")).body == b"OK"

    @pytest.mark.parametrize("fields", [UPGRADE, ()], ids=["upgraded", "older form"])
    def test_a_detached_start_is_answered_as_the_engine_does(
        self, both: Both, containers: Containers, box: str, fields: tuple[str, ...]
    ) -> None:
        targets = [self.exec(containers, box, "true") for _ in both.hosts]
        body = b'{"Detach":true,"Tty":false}'
        answer = both.alike(*[request("POST", target, JSON, *fields, body=body) for target in targets])
        assert answer.status == 200
        assert both.same(request("POST", targets[0], JSON, *fields, body=body)).status == 409

    def test_input_in_the_same_write_as_the_request_is_not_lost(
        self, bridge: Bridge, containers: Containers, box: str
    ) -> None:
        target = self.exec(containers, box, "cat", AttachStdin=True)
        with bridge.connect() as sock:
            sock.sendall(request("POST", target, JSON, *UPGRADE, body=START) + b"eager\n")
            read_head(sock)
            sock.shutdown(socket.SHUT_WR)
            assert unframed(read_to_end(sock))[1] == b"eager\n"

    def test_much_passes_both_ways_whole_and_at_flat_memory(
        self, bridge: Bridge, runner: Runner, containers: Containers, box: str
    ) -> None:
        target = self.exec(containers, box, "cat", AttachStdin=True, Tty=False)
        piece = os.urandom(MIB)
        before = (bridge.memory(), runner.memory())
        with bridge.connect(60) as sock:
            sock.sendall(request("POST", target, JSON, *UPGRADE, body=START))
            read_head(sock)

            def feed() -> None:
                for _ in range(MANY // MIB):
                    sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)

            feeder = threading.Thread(target=feed)
            feeder.start()
            found = hashlib.sha256()
            size = 0
            with sock.makefile("rb") as stream:
                while frame := stream.read(8):
                    data = stream.read(int.from_bytes(frame[4:], "big"))
                    size += len(data)
                    found.update(data)
            feeder.join()
        sent = hashlib.sha256()
        for _ in range(MANY // MIB):
            sent.update(piece)
        assert size == MANY
        assert found.digest() == sent.digest()
        assert bridge.memory() - before[0] < FLAT
        assert runner.memory() - before[1] < FLAT


class TestWebSocket:
    """The runner face's own: a tool that speaks it need not sign."""

    def test_an_interactive_exec_goes_through(self, bridge: Bridge, box: str) -> None:
        async def test() -> None:
            target = session_target(box, "read line; echo got $line; exit 7")
            async with unix_connect(bridge.socket, f"ws://localhost{target}", ping_interval=None) as socket:
                session = Session(socket)
                await session.send(stdin(b"hello\n"))
                await session.to_end()
            assert bytes(session.out) == b"got hello\n"
            assert session.code == 7
            assert session.close_code == 1000

        asyncio.run(asyncio.wait_for(test(), 20))

    @pytest.mark.parametrize("abruptly", [False, True])
    def test_a_tool_that_leaves_ends_it(self, bridge: Bridge, box: str, abruptly: bool) -> None:
        async def test() -> int:
            target = session_target(box, ["sleep", "1000"])
            async with unix_connect(bridge.socket, f"ws://localhost{target}", ping_interval=None) as socket:
                assert await Session(socket).receive() == "ready"
                during = bridge.sockets()
                if abruptly:
                    socket.transport.abort()
            return during

        during = asyncio.run(asyncio.wait_for(test(), 20))
        assert wait_until(lambda: bridge.sockets() <= during - 2, 1)

    def test_a_refusal_is_the_runners(self, bridge: Bridge) -> None:
        fields = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        with bridge.connect() as sock:
            assert ask(sock, request("GET", "/v1/nonsense", *fields, key)).status == 404


class Upload:
    """A tar of one file of zeros, as a stream; of any size, without holding it."""

    def __init__(self, name: str, size: int) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = size
        self._head = entry.tobuf()
        self._size = size
        padding = -size % 512 + 1024
        self.length = len(self._head) + size + padding
        self._tail = bytes(padding)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        zeros = bytes(256 * 1024)
        left = self._size
        while left:
            piece = zeros[: min(left, len(zeros))]
            left -= len(piece)
            yield piece
        yield self._tail

    def put(self, sock: socket.socket, target: str, framing: str) -> None:
        """PUT it with a stated length, or chunked."""
        if framing == "length":
            sock.sendall(request("PUT", target, f"Content-Length: {self.length}"))
            for piece in self:
                sock.sendall(piece)
        else:
            sock.sendall(request("PUT", target, "Transfer-Encoding: chunked"))
            for piece in self:
                sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            sock.sendall(b"0\r\n\r\n")


class TestUploads:
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    @pytest.mark.parametrize("size", [1000, 3 * MIB, MANY])
    def test_an_archive_arrives_whole_at_flat_memory(
        self, bridge: Bridge, runner: Runner, containers: Containers, size: int, framing: str
    ) -> None:
        name = containers()
        before = (bridge.memory(), runner.memory())
        with bridge.connect(60) as sock:
            Upload("zeros", size).put(sock, f"/containers/{name}/archive?path=/tmp", framing)
            assert read_answer(sock).status == 200
            assert ask(sock, request("GET", "/_ping")).body == b"OK"
        assert bridge.memory() - before[0] < FLAT
        assert runner.memory() - before[1] < FLAT
        with bridge.connect(60) as sock:
            sock.sendall(request("GET", f"/containers/{name}/archive?path=/tmp/zeros", "Connection: close"))
            read_head(sock)
            got = b"".join(read_chunks(sock)) if size < MANY else None
            if got is not None:
                with tarfile.open(fileobj=io.BytesIO(got)) as tar:
                    content = tar.extractfile("zeros")
                    assert content is not None
                    assert content.read() == bytes(size)
            else:
                assert sum(map(len, read_chunks(sock))) >= size
        assert bridge.memory() - before[0] < FLAT
        assert runner.memory() - before[1] < FLAT
        containers.do("DELETE", f"/containers/{name}?force=1", 204)

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_an_early_refusal_is_read_in_the_midst_of_an_upload(self, bridge: Bridge, framing: str) -> None:
        def send(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):
                Upload("zeros", 100 * MIB).put(sock, f"/containers/{MISSING}/archive?path=/", framing)

        for _ in range(10):
            with bridge.connect() as sock:
                sender = threading.Thread(target=send, args=(sock,))
                sender.start()
                answer = read_answer(sock)
                sender.join()
            assert answer.status == 404
            assert MISSING in json.loads(answer.body)["message"]

    def test_a_tool_that_reads_only_after_it_has_sent_all_still_reads_the_refusal(self, bridge: Bridge) -> None:
        with bridge.connect() as sock:
            Upload("zeros", 10 * MIB).put(sock, f"/containers/{MISSING}/archive?path=/", "length")
            assert read_answer(sock).status == 404
