"""The local socket: unsigned requests from this host, for its owner alone, under the same policy; and nowhere else."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from client import body_hash, sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from scripted import OK, ScriptedEngine
from service import ROOT, SECRET, Runner, read_to_end
from sessions import Session, session_target
from upgraded import SUBPROTOCOL, Upgraded

POLICY = """
preset = "workloads"
[keys.sidecar]
preset = "read-only"
"""


@pytest.fixture(scope="module")
def path(short_folder: Path) -> str:
    return str(short_folder / "local.sock")


@pytest.fixture(scope="module")
def local(engine: Engine, path: str) -> Iterator[Runner]:
    """A runner with a local socket, under the default policy."""
    settings = {"DOCKER_RUNNER_LOCAL_SOCKET": path, "DOCKER_RUNNER_POLICY": "workloads"}
    with Runner(engine.socket, settings) as running:
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that no test changes."""
    return Containers(direct, names, image)()


def curl(path: str, *arguments: str, data: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of what curl gets at a Unix socket."""
    done = subprocess.run(
        ["curl", "-sg", "--path-as-is", "--unix-socket", path, "-w", "%{http_code}", *arguments],
        input=data,
        capture_output=True,
        check=True,
    )
    return int(done.stdout[-3:]), done.stdout[:-3]


def code(answer: tuple[int, bytes]) -> str:
    found: str = json.loads(answer[1])["error"]["code"]
    return found


def raw(path: str, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(data)
        return read_to_end(sock)


class TestUnsigned:
    def test_both_faces_answer_plain_curl(self, local: Runner, path: str, box: str) -> None:
        assert curl(path, "http://x/_ping") == (200, b"OK")
        status, body = curl(path, f"http://x/v1.41/containers/{box}/json")
        assert (status, json.loads(body)["Name"]) == (200, f"/{box}")
        assert curl(path, f"http://x/v1/containers/labels?containerId={box}")[0] == 200
        assert curl(path, "http://x/v1/ready")[0] == 200

    def test_a_body(self, local: Runner, path: str, names: Names, direct: EngineDirect) -> None:
        name = names()
        body = json.dumps({"Name": name, "Labels": names.labels})
        arguments = ("-H", "Content-Type: application/json", "-d", body, "http://x/volumes/create")
        assert curl(path, *arguments)[0] == 201
        assert direct.request("GET", f"/volumes/{name}").status_code == 200

    @pytest.mark.parametrize("framing", [(), ("-H", "Transfer-Encoding: chunked")])
    def test_a_long_body_arrives_whole(self, path: str, short_folder: Path, framing: tuple[str, ...]) -> None:
        body = os.urandom(8 * 1024 * 1024)
        own = str(short_folder / "own.sock")
        with (
            ScriptedEngine(lambda peer: peer.answer(OK)) as scripted,
            Runner(scripted.path, {"DOCKER_RUNNER_LOCAL_SOCKET": own}),
        ):
            arguments = ("-X", "PUT", "-H", "Expect:", "--data-binary", "@-", *framing)
            assert curl(own, *arguments, "http://x/containers/x/archive?path=/", data=body) == (200, b"ok")
            assert scripted.requests[-1].endswith(b"\r\n\r\n" + body)

    def test_a_body_over_the_limit_is_413(self, engine: Engine, short_folder: Path) -> None:
        own = str(short_folder / "own.sock")
        with Runner(engine.socket, {"DOCKER_RUNNER_LOCAL_SOCKET": own, "DOCKER_RUNNER_MAX_UPLOAD": "2000"}):
            arguments = ("--data-binary", "@-", "-H", "Expect:", "http://x/images/load")
            assert curl(own, *arguments, data=b"x" * 3000)[0] == 413
            assert curl(own, *arguments, "-H", "Transfer-Encoding: chunked", data=b"x" * 3000)[0] == 413

    def test_the_policy_holds(self, local: Runner, path: str) -> None:
        body = '{"Image":"x","HostConfig":{"Privileged":true}}'
        arguments = ("-H", "Content-Type: application/json", "-d", body, "http://x/containers/create")
        assert code(curl(path, *arguments)) == "policy_denied"
        assert code(curl(path, "-X", "POST", "http://x/session")) == "policy_denied"

    def test_limits_hold(self, short_folder: Path) -> None:
        own = str(short_folder / "own.sock")
        settings = {"DOCKER_RUNNER_LOCAL_SOCKET": own, "DOCKER_RUNNER_MAX_REQUESTS": "1"}
        with (
            ScriptedEngine(lambda peer: (peer.read_request(), peer.engine.go.wait())) as scripted,
            Runner(scripted.path, settings),
            socket.socket(socket.AF_UNIX) as sock,
        ):
            sock.connect(own)
            sock.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
            scripted.wait(lambda: len(scripted.requests) == 1, "the request to arrive")
            assert code(curl(own, "http://x/version")) == "too_many_requests"

    def test_framing_is_checked(self, local: Runner, path: str) -> None:
        assert raw(path, b"GET /version HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        second = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
        assert b"pipelining_refused" in raw(path, second + second)

    @pytest.mark.parametrize("upgrade", [True, False])
    def test_a_route_that_is_not_there(self, local: Runner, path: str, upgrade: bool) -> None:
        fields = ["-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Version: 13"]
        fields += ["-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        assert curl(path, *(fields if upgrade else []), "http://x/nowhere")[0] == 404


class TestSigned:
    def test_a_signature_is_accepted_and_named(self, local: Runner, path: str) -> None:
        fields = [
            part for name, value in sign(SECRET, "GET", "/version").items() for part in ("-H", f"{name}: {value}")
        ]
        assert curl(path, *fields, "http://x/version")[0] == 200
        assert code(curl(path, *fields, "http://x/version")) == "replayed_nonce"

    @pytest.mark.parametrize(
        ("field", "expected"),
        [
            ("X-DR-Signature: x", "missing_headers"),
            ("X-DR-Key: sidecar", "missing_headers"),
            ("X-DR-Content-SHA256: x", "missing_headers"),
            ("X-DR-Anything: x", "missing_headers"),
        ],
    )
    def test_a_part_of_a_signature_is_held_to_the_whole(
        self, local: Runner, path: str, field: str, expected: str
    ) -> None:
        assert code(curl(path, "-H", field, "http://x/version")) == expected

    def test_a_wrong_signature_is_refused(self, local: Runner, path: str) -> None:
        signed = sign("another-secret-0123456789", "GET", "/version")
        fields = [part for name, value in signed.items() for part in ("-H", f"{name}: {value}")]
        assert code(curl(path, *fields, "http://x/version")) == "invalid_signature"


class TestStreams:
    def test_an_interactive_exec(self, local: Runner, path: str, box: str) -> None:
        async def run() -> None:
            target = session_target(box, ["sh", "-c", "read line; echo got $line; exit 3"])
            async with unix_connect(path, f"ws://x{target}", max_size=None, compression=None, close_timeout=2) as ws:
                opened = Session(ws)
                assert await opened.receive() == "ready"
                await opened.send({"type": "stdin", "data": "aGkK"})
                await opened.to_end()
            assert (bytes(opened.out), opened.code, opened.close_code) == (b"got hi\n", 3, 1000)

        asyncio.run(run())

    def test_an_upgraded_stream_needs_no_hash(
        self, local: Runner, path: str, box: str, direct: EngineDirect, names: Names, image: str
    ) -> None:
        execution = Containers(direct, names, image).exec(box, "cat", AttachStdin=True)

        async def run() -> None:
            async with upgraded_at(path, f"/exec/{execution}/start") as opened:
                await opened.ask('{"Detach":false,"Tty":false}')
                assert opened.status == 101
                await opened.send(b"through", '{"eof":true}')
                await opened.to_end()
            assert opened.data.endswith(b"through")
            assert opened.end == (True, 1000)

        asyncio.run(run())

    def test_a_hash_that_is_given_is_part_of_a_signature(self, local: Runner, path: str, box: str) -> None:
        async def run() -> None:
            headers = {"X-DR-Content-SHA256": body_hash(b"{}")}
            with pytest.raises(InvalidStatus) as refused:
                async with upgraded_at(path, f"/containers/{box}/attach?stream=1&stdout=1", headers):
                    pass
            assert refused.value.response.status_code == 401

        asyncio.run(run())

    def test_a_caller_that_leaves_takes_its_stream_with_it(self, local: Runner, path: str) -> None:
        curl(path, "http://x/_ping")
        idle = local.sockets()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(path)
                sock.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
                assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert wait_until(lambda: local.sockets() <= idle, 10)


@contextlib.asynccontextmanager
async def upgraded_at(path: str, target: str, headers: dict[str, str] | None = None) -> AsyncIterator[Upgraded]:
    """An upgraded stream over a Unix socket."""
    async with unix_connect(
        path,
        f"ws://x{target}",
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        additional_headers={"Content-Type": "application/json", **(headers or {})},
        max_size=None,
        compression=None,
        close_timeout=2,
    ) as ws:
        yield Upgraded(ws)


class TestTheOtherWay:
    """What makes a request local is the socket that it came on: nothing that a caller can say."""

    @pytest.mark.parametrize(
        "fields",
        [
            "Host: localhost",
            "Host: unix",
            "X-Forwarded-For: unix",
            "X-Forwarded-For: 127.0.0.1",
            "Forwarded: for=unix",
            "X-DR-Local: 1",
            "Via: 1.1 local",
        ],
    )
    def test_tcp_takes_no_unsigned_request(self, local: Runner, fields: str) -> None:
        host = "" if fields.startswith("Host") else "Host: x\r\n"
        answer = local.raw(f"GET /version HTTP/1.1\r\n{host}{fields}\r\nConnection: close\r\n\r\n".encode())
        assert b'"missing_headers"' in answer

    def test_nor_does_an_upgrade(self, local: Runner, box: str) -> None:
        lines = ["Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", f"Sec-WebSocket-Protocol: {SUBPROTOCOL}"]
        for target in (session_target(box, "id"), f"/containers/{box}/attach?stream=1"):
            answer = local.raw("\r\n".join([f"GET {target} HTTP/1.1", *lines, "", ""]).encode())
            assert answer.startswith(b"HTTP/1.1 401 ")

    def test_a_trusted_proxy_makes_nobody_local(self, engine: Engine, short_folder: Path) -> None:
        settings = {
            "DOCKER_RUNNER_LOCAL_SOCKET": str(short_folder / "own.sock"),
            "DOCKER_RUNNER_TRUSTED_PROXIES": "127.0.0.1",
        }
        with Runner(engine.socket, settings) as behind:
            answer = behind.raw(
                b"GET /version HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: unix\r\nConnection: close\r\n\r\n"
            )
            assert b'"missing_headers"' in answer


class TestTheKey:
    def test_its_policy_holds_for_the_unsigned(self, engine: Engine, short_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "policy.toml").write_text(POLICY)
        own = str(short_folder / "own.sock")
        settings = {
            "DOCKER_RUNNER_LOCAL_SOCKET": own,
            "DOCKER_RUNNER_LOCAL_KEY": "sidecar",
            "DOCKER_RUNNER_POLICY": str(tmp_path / "policy.toml"),
        }
        with (tmp_path / "out").open("ab") as out, Runner(engine.socket, settings, output=out.fileno()) as runner:
            assert curl(own, "http://x/version")[0] == 200
            assert code(curl(own, "-X", "POST", "http://x/containers/no-such/start")) == "policy_denied"
            assert runner.request("POST", "/containers/no-such/start").status == 404
            (tmp_path / "policy.toml").write_text('preset = "workloads"\n')
            runner.process.send_signal(signal.SIGHUP)
            runner.wait_for_log("kept the old policy: DOCKER_RUNNER_LOCAL_KEY: the policy has no [keys.sidecar]")
            assert code(curl(own, "-X", "POST", "http://x/containers/no-such/start")) == "policy_denied"
        first, *_ = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert first["key"] == "sidecar"
        assert first["client"].startswith(f"unix:uid={os.getuid()},pid=")

    def test_one_without_a_policy_ends_the_start(self, engine: Engine, path: str) -> None:
        failed(
            engine, {"DOCKER_RUNNER_LOCAL_KEY": "nobody"}, "DOCKER_RUNNER_LOCAL_KEY: the policy has no [keys.nobody]"
        )


def failed(engine: Engine, settings: dict[str, str], message: str) -> None:
    """`serve` ends at once with this line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "runner.py"), "serve"],
        env={
            "PATH": os.environ["PATH"],
            "DOCKER_RUNNER_ENV": "production",
            "DOCKER_RUNNER_SHARED_SECRET": SECRET,
            "DOCKER_RUNNER_HOST": "127.0.0.1",
            "DOCKER_RUNNER_PORT": "0",
            "DOCKER_SOCKET": engine.socket,
            **settings,
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (1, f"docker-runner: {message}\n")


class TestTheFile:
    def test_its_mode_is_0600(self, local: Runner, path: str) -> None:
        found = os.lstat(path)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600

    def test_there_is_none_by_default(self, runner: Runner) -> None:
        listening = Path(f"/proc/{runner.process.pid}/net/unix").read_text().splitlines()
        own = {os.readlink(link)[8:-1] for link in Path(f"/proc/{runner.process.pid}/fd").iterdir() if link.exists()}
        assert not [line for line in listening if line.split()[6] in own and line.split()[3] == "00010000"]

    def test_one_left_behind_is_replaced_and_one_in_use_is_not(self, engine: Engine, short_folder: Path) -> None:
        own = str(short_folder / "own.sock")
        settings = {"DOCKER_RUNNER_LOCAL_SOCKET": own}
        with Runner(engine.socket, settings) as killed:
            killed.stop(signal.SIGKILL)
        assert os.path.exists(own)
        with Runner(engine.socket, settings) as second:
            assert curl(own, "http://x/_ping") == (200, b"OK")
            failed(engine, settings, f"DOCKER_RUNNER_LOCAL_SOCKET: {own}: somebody listens there")
            assert curl(own, "http://x/_ping") == (200, b"OK")
            assert second.stop() == 0
        assert not os.path.lexists(own)

    def test_something_else_is_left_alone(self, engine: Engine, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        settings = {"DOCKER_RUNNER_LOCAL_SOCKET": str(tmp_path / "file")}
        failed(engine, settings, f"DOCKER_RUNNER_LOCAL_SOCKET: {tmp_path}/file: there is something else")
        assert (tmp_path / "file").read_text() == "precious"

    def test_what_took_its_place_meanwhile_is_not_removed(self, engine: Engine, short_folder: Path) -> None:
        own = short_folder / "own.sock"
        with Runner(engine.socket, {"DOCKER_RUNNER_LOCAL_SOCKET": str(own)}) as runner:
            own.unlink()
            own.write_text("another's")
            runner.stop()
        assert own.read_text() == "another's"
        own.unlink()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("relative.sock", "must be an absolute path, not 'relative.sock'"),
            ("/" + "x" * 107, f"must be no longer than the 107 bytes of a Unix socket's address, not '/{'x' * 107}'"),
            ("/no/such/folder/sock", "/no/such/folder/sock: No such file or directory"),
        ],
    )
    def test_a_wrong_path_ends_the_start(self, engine: Engine, value: str, message: str) -> None:
        failed(engine, {"DOCKER_RUNNER_LOCAL_SOCKET": value}, f"DOCKER_RUNNER_LOCAL_SOCKET: {message}")
