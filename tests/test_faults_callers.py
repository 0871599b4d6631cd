"""Callers that are at fault, and the end of the runner in the midst of everything; see `test_faults.py`."""

import asyncio
import contextlib
import http.client
import json
import re
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from listening import Listener, events_of
from test_flights import HELD, layer, streamed, until_held
from test_workloads_images import ENSURE, Images, images

from answers import refused
from client import body_hash, sign
from comparison import Containers
from conftest import EngineDirect, Names, Registry
from dev import wait_until
from dev.engine import Engine
from gated import Gate
from resting import Counted, comes_to_rest
from scraped import scrape
from scripted import Peer, ScriptedEngine
from service import SECRET, Answer, Runner, read_to_end, signed_head
from sessions import session
from wire import Wire

__all__ = ["images"]  # A fixture.

CUT = (http.client.IncompleteRead, ConnectionResetError)
JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024
MANY = 2000


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that has said 30 MB."""
    containers = Containers(direct, names, image)
    name = containers("sh", "-c", f"yes {'x' * 9999} | head -n 3000; touch /ready; exec sleep 1d")
    ready = f"/containers/{name}/archive?path=/ready"
    assert wait_until(lambda: direct.request("HEAD", ready).status_code == 200, 20)
    return name


def unready(runner: Runner) -> socket.socket:
    """A connection of a caller that can take few bytes before it reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", runner.port))
    return sock


def used(runner: Runner, resource_: str) -> float:
    return scrape(runner).value("docker_runner_used", resource=resource_)


class TestACallerNeverReads:
    def test_downloads_wait_for_it_in_flat_memory_while_others_are_served(self, engine: Engine, box: str) -> None:
        with Counted(engine.socket) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            before = runner.memory()
            for _ in range(20):
                sock = held.enter_context(unready(runner))
                sock.sendall(signed_head("GET", f"/containers/{box}/logs?stdout=1"))
                assert sock.recv(15) == b"HTTP/1.1 200 OK"
            assert used(runner, "requests") == 20
            assert runner.request("GET", "/version").status == 200
            assert runner.memory() - before < 20 * MIB  # Of 600.

    @pytest.fixture
    def sized(self) -> Iterator[ScriptedEngine]:
        """An engine that answers as many bytes as the query says, so that some answer is longer than the kernel holds,
        and by less than the runner waits for."""

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                asked = re.search(rb"limit=(\d+)", request)
                size = int(asked[1]) if asked else 2
                peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(size)))

        with ScriptedEngine(script) as engine:
            yield engine

    def ask_for_more_than_the_kernel_holds(
        self, runner: Runner, sized: ScriptedEngine, held: contextlib.ExitStack
    ) -> list[socket.socket]:
        """Returns connections with an answer each, which in some of them is complete but for the caller's reading."""
        socks = [held.enter_context(unready(runner)) for _ in range(60)]
        for number, sock in enumerate(socks):
            sock.sendall(signed_head("GET", f"/containers/json?limit={2_000_000 + number * 50_000}"))
        sized.wait(lambda: sum(b"limit" in each for each in sized.requests) == len(socks), "the requests")
        return socks

    def test_a_complete_answer_that_nobody_takes_keeps_no_connection(self, sized: ScriptedEngine) -> None:
        quick = {"DOCKER_RUNNER_KEEP_ALIVE_MS": "500"}
        with Counted(sized.path, quick) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            self.ask_for_more_than_the_kernel_holds(runner, sized, held)
            assert wait_until(lambda: 0 < used(runner, "requests") == used(runner, "connections") < 60, 20)

    def test_its_next_request_ends_it(self, sized: ScriptedEngine) -> None:
        quick = {"DOCKER_RUNNER_KEEP_ALIVE_MS": "3000"}
        with Counted(sized.path, quick) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            socks = self.ask_for_more_than_the_kernel_holds(runner, sized, held)
            assert wait_until(lambda: 0 < used(runner, "requests") < 60, 20)
            for sock in socks:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(signed_head("GET", "/_ping"))
            assert wait_until(lambda: used(runner, "connections") == 0, 20)


def trickle(sock: socket.socket, data: bytes, every_s: float) -> bytes:
    """Send byte by byte until there is an answer; returns its beginning."""
    sock.settimeout(every_s)
    for byte in data:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.send(bytes((byte,)))
        with contextlib.suppress(TimeoutError):
            return sock.recv(4096)
    sock.settimeout(20)
    return sock.recv(4096)


LIMITS = {
    "DOCKER_RUNNER_HEAD_TIMEOUT_MS": "1000",
    "DOCKER_RUNNER_BODY_TIMEOUT_MS": "1000",
    "DOCKER_RUNNER_SIGNATURE_TTL_MS": "2000",
}
"""A tenth, and less, of what they are by default; so ten bytes a second stand for one."""


class TestACallerSendsOneByteASecond:
    def test_a_head_or_an_unverified_body_is_408_when_its_time_is_over(self, engine: Engine) -> None:
        head = signed_head("GET", "/version")
        with Counted(engine.socket, LIMITS) as runner, comes_to_rest(runner), runner.connect() as sock:
            assert trickle(sock, head, 0.1).startswith(b"HTTP/1.1 408 ")
            with runner.connect() as other:
                body = bytes(1000)
                other.sendall(signed_head("POST", "/images/load", body))
                began = time.monotonic()
                assert trickle(other, body, 0.1).startswith(b"HTTP/1.1 408 ")
                assert time.monotonic() - began < 10  # It would take 100 s.

    def test_a_body_that_was_verified_up_front_has_the_time_it_takes(self, engine: Engine, box: str) -> None:
        body = b'{"Cmd":["true"],"AttachStdout":true}'
        target = f"/containers/{box}/exec"
        with Counted(engine.socket, LIMITS) as runner, comes_to_rest(runner), runner.connect() as sock:
            headers = sign(SECRET, "POST", target, content_hash=body_hash(body))
            fields = {**headers, **JSON, "Content-Length": str(len(body))}
            lines = [f"POST {target} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in fields.items())]
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            assert trickle(sock, body, 0.1).startswith(b"HTTP/1.1 201 ")


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many files as there are callers in it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
class TestManyConnectionsAreLeftOpen:
    def test_2000_keep_nobody_out_and_cost_little_memory(self, engine: Engine) -> None:
        with Counted(engine.socket) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            before = runner.memory()
            for _ in range(MANY):
                held.enter_context(runner.connect())
            assert wait_until(lambda: used(runner, "connections") == MANY, 10)
            assert runner.request("GET", "/version").status == 200
            assert (runner.memory() - before) / MANY < 16 * 1024

    def test_each_is_closed_silently_when_its_time_is_over(self, engine: Engine) -> None:
        quick = {"DOCKER_RUNNER_KEEP_ALIVE_MS": "1000"}
        with Counted(engine.socket, quick) as runner, comes_to_rest(runner), contextlib.ExitStack() as held:
            socks = [held.enter_context(runner.connect()) for _ in range(MANY)]
            assert all(read_to_end(sock) == b"" for sock in socks)
            assert used(runner, "connections") == 0


def last_message(response: http.client.HTTPResponse) -> tuple[str, str]:
    """Type and code of the last message of a stream that ends whole."""
    lines = [line for line in response.read().splitlines() if line.startswith(b"data: ")]
    message = json.loads(lines[-1].removeprefix(b"data: "))
    return message["type"], message["code"]


def exec_run(runner: Runner, container: str, command: str) -> Answer:
    """One `/v1/exec/run`, to be ended if its caller goes."""
    fields = {"containerId": container, "command": command, "options": {"killOnDisconnect": True}}
    return runner.request("POST", "/v1/exec/run", json.dumps(fields).encode(), JSON)


async def type_nothing(runner: Runner, container: str) -> tuple[list[str], int | None]:
    """An interactive exec that goes on until it is ended: the codes of its errors, and of its close."""
    async with session(runner, container, "exec sleep 9008") as one:
        await one.to_end()
        return [error["code"] for error in one.errors], one.close_code


class TestSigtermInTheMidstOfEverything:
    @pytest.fixture
    def gated_image(self, registry: Registry, images: Images) -> Iterator[str]:
        """The name of an image whose pull stands still when it has begun."""
        repository = images.publish(registry.address, "1", content=layer())
        with Gate(registry.address, HELD) as gate:
            yield repository.replace(registry.address, gate.address) + ":1"

    def test_each_is_told_all_is_freed_and_the_next_one_serves(
        self, engine: Engine, direct: EngineDirect, box: str, gated_image: str, tmp_path: Path
    ) -> None:
        def runs(command: str) -> bool:
            return command in direct.request("GET", f"/containers/{box}/top").text

        settings = {"DOCKER_RUNNER_GRACE_MS": "1000", "TMPDIR": str(tmp_path)}
        ensure = json.dumps({"image": gated_image}).encode()
        body = bytes(3 * MIB)
        with (
            Counted(engine.socket, settings) as runner,
            ThreadPoolExecutor(3) as pool,
            runner.stream("GET", "/events") as raw,
            Listener(runner.port, events_of(box)) as events,
            runner.stream("GET", f"/v1/containers/logs/sse?containerId={box}&tail=1") as log,
            runner.stream("GET", f"/containers/{box}/logs?stdout=1") as download,
            streamed(Wire(runner.url, SECRET), image=gated_image) as progress,
            runner.connect() as upload,
        ):
            until_held(progress)
            pulled = pool.submit(runner.request, "POST", ENSURE, ensure, JSON)
            ran = pool.submit(exec_run, runner, box, "exec sleep 9007")
            typed = pool.submit(asyncio.run, type_nothing(runner, box))
            upload.sendall(signed_head("POST", "/images/load", body) + body[: 2 * MIB])
            assert wait_until(lambda: runs("sleep 9007") and runs("sleep 9008"), 10)
            assert wait_until(lambda: any(str(tmp_path) in name for name in runner.files()), 10)
            assert wait_until(lambda: used(runner, "requests") >= 4, 10)

            assert runner.stop() == 0
            for stream in (raw, download):
                with pytest.raises(CUT):
                    stream.read()
            told = ("error", "shutting_down")
            events.until(lambda each: each.ended, "the end")
            assert (events.messages[-1]["type"], events.messages[-1]["code"]) == told
            assert last_message(log) == told
            assert [(each["type"], each.get("code")) for each in progress][-1] == told
            for answer in (pulled.result(), ran.result()):
                assert refused(answer) == (503, "shutting_down", False)
            assert typed.result() == (["shutting_down"], 1012)
            refusal = read_to_end(upload)
            assert refusal.startswith(b"HTTP/1.1 503 ")
            assert b'"code":"shutting_down"' in refusal
            assert b'"retryable":true' in refusal
        assert list(tmp_path.iterdir()) == []
        assert wait_until(lambda: not runs("sleep 9007"), 10)
        with Runner(engine.socket) as again, Listener(again.port, events_of(box), events.last_id) as resumed:
            assert again.request("GET", "/version").status == 200
            made = direct.request("POST", f"/containers/{box}/exec", json={"Cmd": ["true"]}).json()["Id"]
            resumed.until(lambda each: made in each.execs())
            assert resumed.types() == []
