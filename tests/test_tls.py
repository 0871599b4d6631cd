"""HTTPS, with client certificates if asked for: what holds without TLS, and what it adds. Certificates by openssl."""

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from bridged import Bridge
from client import body_hash, sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from scripted import OK, Peer, ScriptedEngine
from service import ROOT, SECRET, Runner, signed_head
from sessions import Session, session_target
from upgraded import MIB, SUBPROTOCOL, Upgraded, upgrade_headers

UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nContent-Type: x/y\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"


class Pair(NamedTuple):
    """Paths of a certificate and its key."""

    certificate: str
    key: str


class Authority:
    """A certificate authority that signs with the openssl program."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.certificate = str(self.folder / "ca.pem")
        self._key = str(self.folder / "ca.key")
        made = ("-keyout", self._key, "-out", self.certificate, "-subj", f"/CN={name}", "-days", "2")
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *made)

    def sign(self, name: str) -> Pair:
        """A certificate for a server on loopback, or for a client."""
        pair = Pair(str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key"))
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        made = ("-keyout", pair.key, "-out", str(request), "-subj", f"/CN={name}")
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *made)
        by = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-extfile", str(extensions))
        openssl("x509", "-req", "-in", str(request), "-out", pair.certificate, "-days", "2", *by)
        return pair

    def context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """A client that trusts this authority, and shows this certificate."""
        context = ssl.create_default_context(cafile=self.certificate)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("pki"), "stranger")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.sign("server")


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    return authority.context()


def served_with(pair: Pair, **more: str) -> dict[str, str]:
    """The settings of HTTPS."""
    files = {"DOCKER_RUNNER_TLS_CERT": pair.certificate, "DOCKER_RUNNER_TLS_KEY": pair.key}
    return {**files, **{f"DOCKER_RUNNER_{name}": value for name, value in more.items()}}


@pytest.fixture(scope="module")
def secure(engine: Engine, server: Pair) -> Iterator[Runner]:
    with Runner(engine.socket, served_with(server)) as running:
        yield running
    check_log(running)


def check_log(runner: Runner) -> None:
    log = "".join(runner.log)
    for sign_ in ("defect", "Traceback", "never retrieved", "was destroyed"):
        assert sign_ not in log, log


@pytest.fixture
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
        yield engine


@pytest.fixture
def fronted(scripted: ScriptedEngine, server: Pair) -> Iterator[Runner]:
    """HTTPS in front of the scripted engine, with short limits."""
    limits = {"HEAD_TIMEOUT_MS": "500", "MAX_CONNECTIONS": "4", "MAX_BODY": "2000"}
    with Runner(scripted.path, served_with(server, **limits)) as running:
        yield running
    check_log(running)


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that no test changes."""
    return Containers(direct, names, image)()


def tls(runner: Runner, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection, its handshake done."""
    return context.wrap_socket(runner.connect(), server_hostname="localhost", suppress_ragged_eofs=False)


def read_whole(sock: ssl.SSLSocket) -> bytes:
    """Everything up to the end, which TLS must tell: a mere end of the connection is an error."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def ask(runner: Runner, context: ssl.SSLContext, data: bytes) -> bytes:
    """What comes back of bytes, up to the end."""
    with tls(runner, context) as sock:
        sock.sendall(data)
        return read_whole(sock)


CLOSE = "Connection: close"


class TestRequests:
    @pytest.mark.parametrize("target", ["/version", "/v1.41/_ping", "/v1/ready"])
    def test_both_faces(self, secure: Runner, trusting: ssl.SSLContext, target: str) -> None:
        assert ask(secure, trusting, signed_head("GET", target, b"", CLOSE)).startswith(b"HTTP/1.1 200 ")

    def test_a_signature_is_needed_all_the_same(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        answer = ask(secure, trusting, b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b'"missing_headers"' in answer
        assert b"\r\nserver:" not in answer.lower()

    def test_the_raw_target_is_what_is_signed(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        for target in ("/version?", "/version?a=%zz&b=\\", "/%76ersion", "/version;x"):
            assert b"invalid_signature" not in ask(secure, trusting, signed_head("GET", target, b"", CLOSE)), target

    def test_a_connection_is_kept(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        with tls(secure, trusting) as sock:
            for _ in range(5):
                sock.sendall(signed_head("GET", "/_ping"))
                assert sock.recv(65536).endswith(b"\r\n\r\nOK")

    def test_pipelining_is_refused(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        answer = ask(secure, trusting, signed_head("GET", "/version") + signed_head("GET", "/version"))
        assert b'"pipelining_refused"' in answer

    def test_a_body_past_the_limit_is_refused_so_that_it_can_be_read(
        self, fronted: Runner, trusting: ssl.SSLContext
    ) -> None:
        body = b"x" * 500_000
        with tls(fronted, trusting) as sock:
            sock.sendall(signed_head("POST", "/auth", body) + body)
            assert b'"body_too_large"' in sock.recv(65536)

    def test_a_long_body_and_a_long_answer_pass_whole(
        self, scripted: ScriptedEngine, fronted: Runner, trusting: ssl.SSLContext
    ) -> None:
        body = os.urandom(8 * MIB)

        def echoes(peer: Peer) -> None:
            request = peer.read_request()
            _, _, sent = request.partition(b"\r\n\r\n")
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)

        scripted.script = echoes
        signed = sign(SECRET, "PUT", "/containers/x/archive?path=/", content_hash=body_hash(body))
        lines = [f"{name}: {value}" for name, value in signed.items()]
        head = ["PUT /containers/x/archive?path=/ HTTP/1.1", "Host: x", CLOSE, f"Content-Length: {len(body)}", *lines]
        answer = ask(fronted, trusting, "\r\n".join([*head, "", ""]).encode() + body)
        assert answer.endswith(b"\r\n\r\n" + body)

    def test_a_slow_reader_does_not_grow_the_memory(
        self, scripted: ScriptedEngine, fronted: Runner, trusting: ssl.SSLContext
    ) -> None:
        size = 100 * MIB

        def pours(peer: Peer) -> None:
            peer.sock.settimeout(60)
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(100):
                peer.sock.sendall(b"x" * MIB)

        scripted.script = pours
        with tls(fronted, trusting) as sock:
            before = fronted.memory()
            sock.sendall(signed_head("GET", "/containers/x/export", b"", CLOSE))
            read, most = 0, 0
            while part := sock.recv(65536):
                read += len(part)
                if read % (1 << 20) < 65536:
                    most = max(most, fronted.memory())
        assert read > size
        assert most - before < 16 * MIB


def test_the_health_check_asks_by_tls(secure: Runner) -> None:
    environ = {**secure.environ, "DOCKER_RUNNER_PORT": str(secure.port)}
    for option in ("--health", "--ready"):
        command = [sys.executable, str(ROOT / "runner.py"), "check", option]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, "https://127.0.0.1" in done.stdout) == (0, True), done.stdout


def test_the_health_check_asks_at_the_local_socket_where_callers_need_a_certificate(
    engine: Engine, server: Pair, authority: Authority, short_folder: Path
) -> None:
    local = str(short_folder / "health.sock")
    settings = served_with(server, TLS_CLIENT_CA=authority.certificate, LOCAL_SOCKET=local)
    with Runner(engine.socket, settings) as runner:
        command = [sys.executable, str(ROOT / "runner.py"), "check", "--ready"]
        done = subprocess.run(command, env=runner.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class TestEnds:
    def test_callers_that_never_read_are_let_go(
        self, scripted: ScriptedEngine, server: Pair, trusting: ssl.SSLContext
    ) -> None:
        with Runner(scripted.path, served_with(server)) as runner, contextlib.ExitStack() as held:
            assert works(runner, trusting)
            idle = runner.sockets()
            bad = signed_head("GET", "/version?" + "x" * 60_000).replace(b"Signature: ", b"Signature: A")
            for _ in range(5):
                sock = held.enter_context(tls(runner, trusting))
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    for _ in range(80):
                        sock.send(bad)
            assert wait_until(lambda: runner.sockets() <= idle, 10)

    def test_an_answer_that_breaks_off_has_no_end(
        self, scripted: ScriptedEngine, fronted: Runner, trusting: ssl.SSLContext
    ) -> None:
        def breaks(peer: Peer) -> None:
            peer.read_request()
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
            peer.engine.go.wait()

        scripted.script = breaks
        with tls(fronted, trusting) as sock:
            sock.sendall(signed_head("GET", "/version", b"", CLOSE))
            said = b""
            while b"ok" not in said:
                said += sock.recv(65536)
            scripted.go.set()
            with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                read_whole(sock)

    @pytest.mark.parametrize("politely", [True, False])
    @pytest.mark.parametrize("target", ["/version", "/events"])
    def test_a_caller_that_leaves_takes_its_work_with_it(
        self, scripted: ScriptedEngine, fronted: Runner, trusting: ssl.SSLContext, target: str, politely: bool
    ) -> None:
        scripted.script = lambda peer: peer.read_request() and peer.sees_close()
        sock = tls(fronted, trusting)
        sock.sendall(signed_head("GET", target))
        scripted.wait(lambda: len(scripted.requests) == 1, "the request to arrive")
        if politely:
            with contextlib.suppress(OSError):
                sock.settimeout(0.2)
                sock.unwrap()
        sock.close()
        assert scripted.closed.wait(10)

    def test_a_caller_that_vanishes_behind_a_full_pipe_is_looked_for(
        self, scripted: ScriptedEngine, fronted: Runner, trusting: ssl.SSLContext
    ) -> None:
        def reads_nothing(peer: Peer) -> None:
            if b"/_ping" in peer.read_head():
                peer.send(OK)
                return
            peer.send(UPGRADED)
            peer.wait_hangup()
            peer.engine.closed.set()

        scripted.script = reads_nothing
        target = "/exec/x/start"

        async def run() -> None:
            async with upgraded_at(fronted, trusting, target, upgrade_headers(target)) as opened:
                await opened.ask("")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        while True:
                            await opened.send(b"x" * MIB)
                sock = opened.socket.transport.get_extra_info("socket")
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # Else the pipe holds it up.
                opened.socket.transport.abort()

        asyncio.run(run())
        assert scripted.closed.wait(10)

    def test_sigterm_ends_streams_in_band_and_the_process_well(
        self, engine: Engine, server: Pair, trusting: ssl.SSLContext, box: str
    ) -> None:
        with Runner(engine.socket, served_with(server, GRACE_MS="0")) as runner, tls(runner, trusting) as sock:
            sock.sendall(signed_head("GET", f"/v1/containers/logs/sse?containerId={box}", b"", CLOSE))
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert runner.stop() == 0
            assert b"shutting" in read_whole(sock)

    def test_connections_do_not_delay_the_end(self, engine: Engine, server: Pair, trusting: ssl.SSLContext) -> None:
        with Runner(engine.socket, served_with(server)) as runner, tls(runner, trusting), runner.connect():
            started = time.monotonic()
            assert runner.stop() == 0
            assert time.monotonic() - started < 5


class TestStreams:
    def test_events(
        self, secure: Runner, trusting: ssl.SSLContext, direct: EngineDirect, names: Names, image: str
    ) -> None:
        containers = Containers(direct, names, image)
        name = containers()
        with tls(secure, trusting) as sock:
            sock.sendall(signed_head("GET", "/events?filters=" + quote(json.dumps({"container": [name]}))))
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
            for _ in range(50):
                containers.exec(name, "true")
            said = b""
            while said.count(b'"Action":"exec_create') < 50:
                said += sock.recv(65536)

    def test_an_interactive_exec(self, secure: Runner, trusting: ssl.SSLContext, box: str) -> None:
        async def run() -> None:
            target = session_target(box, ["sh", "-c", "cat | wc -c; exit 3"])
            async with connect(
                f"wss://localhost:{secure.port}{target}",
                additional_headers=sign(SECRET, "GET", target),
                ssl=trusting,
                max_size=None,
                compression=None,
                close_timeout=2,
                proxy=None,
            ) as ws:
                opened = Session(ws)
                assert await opened.receive() == "ready"
                for _ in range(20):
                    await opened.socket.send(b"x" * 100_000)
                await opened.send({"type": "eof"})
                await opened.to_end()
            assert (bytes(opened.out), opened.code, opened.close_code) == (b"2000000\n", 3, 1000)

        asyncio.run(run())

    def test_an_upgraded_stream_keeps_its_halves(
        self, secure: Runner, trusting: ssl.SSLContext, box: str, direct: EngineDirect, names: Names, image: str
    ) -> None:
        command = ("sh", "-c", "cat > /dev/null; echo after the end")
        execution = Containers(direct, names, image).exec(box, *command, AttachStdin=True)
        target, body = f"/exec/{execution}/start", '{"Detach":false,"Tty":false}'

        async def run() -> None:
            headers = {"Content-Type": "application/json", **upgrade_headers(target, body)}
            async with upgraded_at(secure, trusting, target, headers) as opened:
                await opened.ask(body)
                assert opened.status == 101
                await opened.send(b"x" * MIB, '{"eof":true}')
                await opened.to_end()
            assert opened.data.endswith(b"after the end\n")
            assert opened.end == (True, 1000)

        asyncio.run(run())

    def test_a_refused_upgrade_is_answered_in_http(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        async def run() -> None:
            with pytest.raises(InvalidStatus) as refused:
                async with upgraded_at(secure, trusting, "/exec/x/start", {}):
                    pass
            assert refused.value.response.status_code == 401
            assert b'"missing_headers"' in refused.value.response.body

        asyncio.run(run())

    def test_the_bridge_with_a_certificate_of_its_own(
        self, engine: Engine, server: Pair, authority: Authority, box: str, short_folder: Path
    ) -> None:
        ours = authority.sign("bridge")
        files = ("--ca", authority.certificate, "--cert", ours.certificate, "--key", ours.key)
        with (
            Runner(engine.socket, served_with(server, TLS_CLIENT_CA=authority.certificate)) as runner,
            Bridge(f"https://localhost:{runner.port}", f"unix://{short_folder}/tls.sock", *files) as bridge,
        ):
            done = subprocess.run(
                ["docker", "exec", "-i", box, "sh", "-c", "cat; exit 3"],
                input=b"through both",
                capture_output=True,
                env={"PATH": os.environ["PATH"], "DOCKER_HOST": bridge.host},
                timeout=30,
            )
        assert (done.stdout, done.returncode) == (b"through both", 3), done.stderr


@contextlib.asynccontextmanager
async def upgraded_at(
    runner: Runner, context: ssl.SSLContext, target: str, headers: dict[str, str]
) -> AsyncIterator[Upgraded]:
    """An upgraded stream by TLS, its first frame still to be sent."""
    async with connect(
        f"wss://localhost:{runner.port}{target}",
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        additional_headers=headers,
        ssl=context,
        max_size=None,
        compression=None,
        ping_interval=None,
        close_timeout=2,
        proxy=None,
    ) as ws:
        yield Upgraded(ws)


class TestHandshakes:
    @pytest.mark.parametrize(
        ("version", "works"), [("tls1", False), ("tls1_1", False), ("tls1_2", True), ("tls1_3", True)]
    )
    def test_tls_1_2_is_the_least(self, secure: Runner, authority: Authority, version: str, works: bool) -> None:
        done = subprocess.run(
            [
                *("openssl", "s_client", "-connect", f"127.0.0.1:{secure.port}", f"-{version}"),
                *("-CAfile", authority.certificate, "-verify_return_error", "-cipher", "DEFAULT@SECLEVEL=0"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
        )
        assert (done.returncode == 0) is works

    def test_http_1_1_is_agreed_upon(self, secure: Runner, authority: Authority) -> None:
        context = authority.context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        with tls(secure, context) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"

    def test_plain_http_gets_nothing(self, secure: Runner) -> None:
        assert not secure.raw(signed_head("GET", "/version")).startswith(b"HTTP/")

    def test_one_that_does_not_go_on_is_ended(self, fronted: Runner) -> None:
        for data in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            assert fronted.raw(data) == b""

    def test_they_count_as_connections(self, fronted: Runner, trusting: ssl.SSLContext) -> None:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(fronted.connect()) for _ in range(8)]
            # Those past the limit are closed at once, the others only when their time is up.
            poll = select.poll()
            for sock in held:
                poll.register(sock, select.POLLRDHUP)
            assert wait_until(lambda: len(poll.poll(0)) >= 3, 0.4)
        assert wait_until(lambda: works(fronted, trusting), 10)

    def test_a_storm_of_broken_ones_leaves_the_service_well(self, secure: Runner, trusting: ssl.SSLContext) -> None:
        idle = secure.sockets()
        for number in range(60):
            with secure.connect() as sock:
                sock.sendall(os.urandom(50) if number % 2 else b"\x16\x03\x01\x00\x05hello")
        assert works(secure, trusting)
        assert wait_until(lambda: secure.sockets() <= idle, 10)


def works(runner: Runner, context: ssl.SSLContext) -> bool:
    """Whether a request is served."""
    try:
        return ask(runner, context, signed_head("GET", "/v1/health", b"", CLOSE)).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


@pytest.fixture(scope="module")
def mutual(engine: Engine, server: Pair, authority: Authority) -> Iterator[Runner]:
    with Runner(engine.socket, served_with(server, TLS_CLIENT_CA=authority.certificate)) as running:
        yield running
    check_log(running)


class TestClientCertificates:
    def test_one_by_the_authority_passes(self, mutual: Runner, authority: Authority) -> None:
        context = authority.context(authority.sign("caller"))
        assert works(mutual, context)
        assert b'"missing_headers"' in ask(mutual, context, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_none_or_a_strangers_does_not(
        self, mutual: Runner, authority: Authority, stranger: Authority, version: ssl.TLSVersion
    ) -> None:
        for pair in (None, stranger.sign("caller")):
            context = authority.context(pair)
            context.minimum_version = context.maximum_version = version
            assert not works(mutual, context)


class TestReload:
    def test_new_files_are_for_new_connections(self, engine: Engine, authority: Authority, stranger: Authority) -> None:
        ours, theirs = authority.sign("renewed"), stranger.sign("renewed")
        old_caller, new_caller = authority.sign("old"), stranger.sign("new")
        settings = served_with(ours, TLS_CLIENT_CA=str(Path(ours.key).parent / "client-ca.pem"))
        Path(settings["DOCKER_RUNNER_TLS_CLIENT_CA"]).write_text(Path(authority.certificate).read_text())
        old, new = authority.context(old_caller), stranger.context(new_caller)
        with Runner(engine.socket, settings) as runner, tls(runner, old) as kept:
            kept.sendall(signed_head("GET", "/_ping"))
            assert kept.recv(65536).endswith(b"OK")
            assert not works(runner, new)
            for file, content in (
                (ours.certificate, theirs.certificate),
                (ours.key, theirs.key),
                (settings["DOCKER_RUNNER_TLS_CLIENT_CA"], stranger.certificate),
            ):
                Path(file).write_text(Path(content).read_text())
            runner.process.send_signal(signal.SIGHUP)
            runner.wait_for_log("read the certificate again")
            assert works(runner, new)
            assert not works(runner, old)
            assert not works(runner, stranger.context(old_caller))
            assert not resumes(runner, old, kept.session)
            kept.sendall(signed_head("GET", "/_ping"))
            assert kept.recv(65536).endswith(b"OK")

    def test_wrong_files_keep_the_old_ones(
        self, engine: Engine, authority: Authority, trusting: ssl.SSLContext
    ) -> None:
        pair = authority.sign("spoiled")
        with Runner(engine.socket, served_with(pair)) as runner:
            Path(pair.key).write_text("nothing")
            runner.process.send_signal(signal.SIGHUP)
            runner.wait_for_log("kept the old certificate: DOCKER_RUNNER_TLS_CERT, DOCKER_RUNNER_TLS_KEY: ")
            assert works(runner, trusting)


def resumes(runner: Runner, context: ssl.SSLContext, session: ssl.SSLSession | None) -> bool:
    """Whether a session that began before goes on in a new connection."""
    try:
        with context.wrap_socket(runner.connect(), server_hostname="localhost", session=session) as sock:
            sock.sendall(signed_head("GET", "/_ping"))
            return bool(sock.recv(65536))
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def spoiled(authority: Authority, server: Pair) -> dict[str, str]:
    """Paths by what is there."""
    folder = authority.folder
    (folder / "text").write_text("no certificate")
    encrypted = str(folder / "encrypted.key")
    openssl("pkcs8", "-topk8", "-in", server.key, "-out", encrypted, "-passout", "pass:word")
    (folder / "both").write_text(Path(server.certificate).read_text() + Path(server.key).read_text())
    other = authority.sign("other")
    return {
        "cert": server.certificate,
        "key": server.key,
        "other": other.key,
        "text": str(folder / "text"),
        "none": str(folder / "none"),
        "folder": str(folder),
        "encrypted": encrypted,
        "both": str(folder / "both"),
    }


class TestSettings:
    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"KEY": "key"}, r"DOCKER_RUNNER_TLS_KEY: goes with DOCKER_RUNNER_TLS_CERT"),
            ({"CLIENT_CA": "cert"}, r"DOCKER_RUNNER_TLS_CLIENT_CA: goes with DOCKER_RUNNER_TLS_CERT"),
            ({"CERT": "none", "KEY": "key"}, r"DOCKER_RUNNER_TLS_CERT: cannot read \S+: No such file or directory"),
            ({"CERT": "cert", "KEY": "none"}, r"DOCKER_RUNNER_TLS_KEY: cannot read \S+: No such file or directory"),
            ({"CERT": "folder", "KEY": "key"}, r"DOCKER_RUNNER_TLS_CERT: cannot read \S+: Is a directory"),
            ({"CERT": "cert"}, r"DOCKER_RUNNER_TLS_CERT: .+"),
            ({"CERT": "text", "KEY": "key"}, r"DOCKER_RUNNER_TLS_CERT, DOCKER_RUNNER_TLS_KEY: .+"),
            ({"CERT": "cert", "KEY": "other"}, r"DOCKER_RUNNER_TLS_CERT, DOCKER_RUNNER_TLS_KEY: key values mismatch"),
            ({"CERT": "cert", "KEY": "encrypted"}, r"DOCKER_RUNNER_TLS_CERT, DOCKER_RUNNER_TLS_KEY: .+"),
            ({"CERT": "both", "CLIENT_CA": "text"}, r"DOCKER_RUNNER_TLS_CLIENT_CA: \S+ holds no certificates in PEM"),
            ({"CERT": "both", "CLIENT_CA": "none"}, r"DOCKER_RUNNER_TLS_CLIENT_CA: cannot read .+"),
        ],
    )
    def test_a_wrong_one_ends_the_start(self, spoiled: dict[str, str], files: dict[str, str], message: str) -> None:
        done = subprocess.run(
            [sys.executable, str(ROOT / "runner.py"), "serve"],
            env={
                "PATH": os.environ["PATH"],
                "DOCKER_RUNNER_ENV": "production",
                "DOCKER_RUNNER_SHARED_SECRET": SECRET,
                **{f"DOCKER_RUNNER_TLS_{name}": spoiled[file] for name, file in files.items()},
            },
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=20,
        )
        assert done.returncode == 1
        assert re.fullmatch(f"docker-runner: {message}\n", done.stderr), done.stderr

    def test_one_file_may_hold_both(self, engine: Engine, spoiled: dict[str, str], trusting: ssl.SSLContext) -> None:
        with Runner(engine.socket, {"DOCKER_RUNNER_TLS_CERT": spoiled["both"]}) as runner:
            assert works(runner, trusting)
            runner.wait_for_log("listens on https://")
