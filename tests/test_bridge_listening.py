"""Where the bridge listens, whom it lets in, how it begins and ends, and which secret it signs with."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_bridge import ATTACH, MISSING, UPGRADE

from bridged import Bridge, ask, read_head, request
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from service import ROOT, SECRET, Runner, read_to_end

START_LIMIT_S = 3.0
"""A start takes a sixth of a second where nothing else runs; machines of tests are busy."""


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def on_tcp(runner: Runner) -> Iterator[Bridge]:
    with Bridge(runner.url, "tcp://127.0.0.1:0") as bridge:
        yield bridge
    bridge.check_log()


@pytest.fixture
def path(short_folder: Path) -> Iterator[Path]:
    """Where a socket file may be made."""
    path = short_folder / "listening.sock"
    yield path
    path.unlink(missing_ok=True)


def refused(
    *arguments: str, url: str = "http://127.0.0.1:1", listen: str = "tcp://127.0.0.1:0", **environ: str
) -> tuple[int, str]:
    """Exit status and the one line that a bridge ends with, instead of listening."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "runner.py"), "bridge", "--url", url, "--listen", listen, *arguments],
        env={"PATH": os.environ["PATH"], "DOCKER_RUNNER_ENV": "production"}
        | ({} if environ else {"DOCKER_RUNNER_SHARED_SECRET": SECRET})
        | environ,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stderr.startswith("docker-runner: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr.removeprefix("docker-runner: ").rstrip()


class TestUnix:
    def test_only_its_owner_may_connect(self, runner: Runner, path: Path) -> None:
        with Bridge(runner.url, f"unix://{path}"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not path.exists()

    def test_a_socket_that_a_dead_bridge_left_is_replaced(self, runner: Runner, path: Path) -> None:
        with Bridge(runner.url, f"unix://{path}") as dead:
            dead.stop(signal.SIGKILL)
        assert path.exists()
        with Bridge(runner.url, f"unix://{path}") as bridge:
            assert bridge.ask(request("GET", "/_ping")).body == b"OK"

    def test_a_socket_where_somebody_listens_is_refused(self, bridge: Bridge) -> None:
        status, said = refused(listen=bridge.host)
        assert (status, said) == (2, f"--listen {bridge.host}: somebody listens there")
        assert bridge.ask(request("GET", "/_ping")).body == b"OK"

    def test_a_socket_whose_listener_hangs_is_refused(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
            busy.bind(str(path))
            busy.listen(0)
            first.connect(str(path))
            assert refused(listen=f"unix://{path}") == (2, f"--listen unix://{path}: somebody listens there")

    def test_a_file_is_refused_and_stays(self, path: Path) -> None:
        path.write_text("precious")
        assert refused(listen=f"unix://{path}") == (2, f"--listen unix://{path}: there is something else")
        assert path.read_text() == "precious"

    @pytest.mark.parametrize(
        ("listen", "said"),
        [
            ("unix:///no/such/folder/x.sock", "No such file or directory"),
            ("unix://relative.sock", "must be unix:// and an absolute path"),
            (f"unix:///tmp/{'x' * 200}", "AF_UNIX path too long"),
        ],
    )
    def test_a_path_that_cannot_be_is_told(self, listen: str, said: str) -> None:
        assert refused(listen=listen) == (2, f"--listen {listen}: {said}")


class TestTcp:
    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "169.254.1.1"])
    def test_anything_but_loopback_is_refused(self, host: str) -> None:
        status, said = refused(listen=f"tcp://{host}:0")
        assert status == 2
        assert said == f"--listen tcp://{host}:0: must be loopback: whoever can connect is root on the engine's host"

    @pytest.mark.parametrize(
        "listen", ["tcp://127.0.0.1", "tcp://127.0.0.1:x", "http://127.0.0.1:1", "127.0.0.1:1", ""]
    )
    def test_what_is_no_address_is_refused(self, listen: str) -> None:
        status, said = refused(listen=listen)
        assert status == 2
        assert said.startswith(f"--listen {listen}: ")

    @pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1", "127.0.0.1:{port}", "[::1]:{port}", "LocalHost"])
    def test_local_hosts_pass(self, on_tcp: Bridge, host: str) -> None:
        host = host.format(port=on_tcp.host.rpartition(":")[2])
        with on_tcp.connect() as sock:
            assert ask(sock, f"GET /_ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).body == b"OK"

    @pytest.mark.parametrize(
        "host", ["evil.example", "127.0.0.1.evil.example:2375", "localhost.evil.example", "10.0.0.1", ""]
    )
    def test_a_foreign_host_is_refused(self, on_tcp: Bridge, host: str) -> None:
        with on_tcp.connect() as sock:
            answer = ask(sock, f"GET /_ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.status == 403
        assert json.loads(answer.body)["error"]["code"] == "foreign_origin"

    @pytest.mark.parametrize("field", ["Origin: http://localhost", "Origin: null", "Sec-Fetch-Mode: cors"])
    @pytest.mark.parametrize("target", ["/_ping", f"/containers/{MISSING}/attach?{ATTACH}"])
    def test_a_browser_is_refused(self, on_tcp: Bridge, field: str, target: str) -> None:
        for method, fields in (("GET", ()), ("POST", ()), ("POST", UPGRADE)):
            assert on_tcp.ask(request(method, target, field, *fields)).status == 403

    def test_on_a_unix_socket_any_host_passes(self, bridge: Bridge) -> None:
        with bridge.connect() as sock:
            assert ask(sock, b"GET /_ping HTTP/1.1\r\nHost: api.moby.localhost\r\n\r\n").body == b"OK"

    def test_ipv6_is_told_as_it_is_written(self, runner: Runner) -> None:
        with Bridge(runner.url, "tcp://[::1]:0") as bridge:
            assert bridge.host.startswith("tcp://[::1]:")
            assert bridge.ask(request("GET", "/_ping")).body == b"OK"


class TestLife:
    def test_it_starts_fast(self, runner: Runner, path: Path) -> None:
        begun = time.monotonic()
        with Bridge(runner.url, f"unix://{path}"):
            assert time.monotonic() - begun < START_LIMIT_S

    @pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
    def test_it_ends_within_a_second_whatever_is_open(
        self, runner: Runner, path: Path, containers: Containers, sig: signal.Signals
    ) -> None:
        box = containers()
        with Bridge(runner.url, f"unix://{path}") as bridge, bridge.connect() as follower, bridge.connect() as attached:
            follower.sendall(request("GET", f"/containers/{box}/logs?follow=1&stdout=1"))
            read_head(follower)
            attached.sendall(request("POST", f"/containers/{box}/attach?{ATTACH}", *UPGRADE))
            read_head(attached)
            begun = time.monotonic()
            assert bridge.stop(sig) == 0
            assert time.monotonic() - begun < 1
            assert not path.exists()
            assert not read_to_end(follower).endswith(b"0\r\n\r\n")
            assert read_to_end(attached) == b""
            bridge.check_log()

    @pytest.mark.parametrize(
        "url", ["", "runner:7071", "ftp://x", "http://", "http://x:port", "http://u:p@x", "http://x/?q", "http://x/#f"]
    )
    def test_a_url_that_is_none_is_one_line(self, url: str) -> None:
        status, said = refused(url=url)
        assert status == 2
        assert said.startswith("--url: ")

    def test_a_missing_secret_is_one_line(self) -> None:
        status, said = refused(DOCKER_RUNNER_SHARED_SECRET="")
        assert status == 1
        assert "DOCKER_RUNNER_SHARED_SECRET" in said


class TestSecrets:
    def test_a_wrong_secret_is_told_in_the_runners_words(self, runner: Runner, path: Path) -> None:
        environ = {"DOCKER_RUNNER_SHARED_SECRET": "a-wrong-secret-0123456789"}
        with Bridge(runner.url, f"unix://{path}", environ=environ) as bridge, bridge.connect() as sock:
            for asked in (
                request("GET", "/containers/json"),
                request("POST", f"/containers/{MISSING}/attach?{ATTACH}", *UPGRADE),
                request("POST", f"/containers/{MISSING}/attach?{ATTACH}"),
            ):
                answer = ask(sock, asked)
                assert answer.status == 401
                said = json.loads(answer.body)
                assert said["error"]["code"] == "invalid_signature"
                assert "signature" in said["message"]

    def test_a_named_key_signs_and_sighup_reads_the_file_again(
        self, engine: Engine, path: Path, tmp_path: Path
    ) -> None:
        accepted, used = tmp_path / "accepted", tmp_path / "used"
        accepted.write_text("alice:the-secret-of-alice-01234\nbob:the-secret-of-bob-0123456\n")
        used.write_text("alice:the-secret-of-alice-01234\n")
        settings = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(accepted)}
        environ = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(used)}
        attach = request("POST", f"/containers/{MISSING}/attach?{ATTACH}", *UPGRADE)
        with Runner(engine.socket, settings) as runner, Bridge(runner.url, f"unix://{path}", environ=environ) as bridge:

            def status() -> tuple[int, int]:
                return bridge.ask(request("GET", "/_ping")).status, bridge.ask(attach).status

            assert status() == (200, 404)
            used.write_text("alice:no-longer-the-secret-012")
            bridge.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: status() == (401, 401), 5)
            used.write_text("bob:the-secret-of-bob-0123456")
            bridge.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: status() == (200, 404), 5)
            used.write_text("")
            bridge.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: any("kept the old secret" in line for line in bridge.log), 5)
            assert status() == (200, 404)
