"""The bridge's way to a runner behind HTTPS: whom it trusts, who it is itself, and a proxy's path prefix.

The runner speaks plain HTTP; a small relay in front of it ends TLS, as a proxy would, with certificates of our own.
"""

import contextlib
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_bridge import JSON, MIB, START, UPGRADE, Upload
from test_bridge_listening import refused

from bridged import Bridge, Raw, ask, read_answer, read_head, request
from comparison import Containers
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import Runner, read_to_end


class Certificates:
    """An authority, a server's certificate for `localhost`, and a client's, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca, self._ca_key = folder / "ca.pem", folder / "ca.key"
        self._openssl("req", "-x509", "-subj", "/CN=tests", "-out", self.ca, "-keyout", self._ca_key)
        self.server, self.server_key = self._signed("server", "subjectAltName=DNS:localhost")
        self.client, self.client_key = self._signed("client", "extendedKeyUsage=clientAuth")

    def _signed(self, name: str, extension: str) -> tuple[Path, Path]:
        asked, signed, key, extensions = (self._folder / f"{name}.{kind}" for kind in ("csr", "pem", "key", "ext"))
        extensions.write_text(extension)
        self._openssl("req", "-new", "-subj", f"/CN={name}", "-out", asked, "-keyout", key)
        authority = ("-CA", self.ca, "-CAkey", self._ca_key, "-CAcreateserial")
        self._run("x509", "-req", "-in", asked, *authority, "-extfile", extensions, "-out", signed)
        return signed, key

    def _openssl(self, *arguments: str | Path) -> None:
        self._run(*arguments, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")

    def _run(self, *arguments: str | Path) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Proxy:
    """Ends TLS in front of a runner, and takes a prefix off the path. A context manager.

    Args:
        runner: what is behind it.
        context: its certificate, and what it demands of clients.
        prefix: of every path.
    """

    def __init__(self, runner: Runner, context: ssl.SSLContext, prefix: str = "") -> None:
        self._runner = runner
        self._context = context
        self._prefix = prefix.encode()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),  # A refused handshake; a bridge that leaves.
            plain,
            self._context.wrap_socket(plain, server_side=True) as caller,
            self._runner.connect(60) as behind,
        ):
            threading.Thread(target=self._copy, args=(behind, caller, lambda data: data), daemon=True).start()
            self._copy(caller, behind, self._without_prefix)

    def _without_prefix(self, data: bytes) -> bytes:
        method, _, rest = data.partition(b" ")
        if self._prefix and method in (b"GET", b"HEAD", b"POST", b"PUT"):
            assert rest.startswith(self._prefix + b"/")
            return method + b" " + rest.removeprefix(self._prefix)
        return data

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(change(data))
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def server_context(certificates: Certificates, *, demanding: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server, certificates.server_key)
    if demanding:
        context.load_verify_locations(certificates.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture(scope="module")
def https(runner: Runner, certificates: Certificates) -> Iterator[Proxy]:
    with Proxy(runner, server_context(certificates)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def demanding(runner: Runner, certificates: Certificates) -> Iterator[Proxy]:
    """It lets nobody in without a certificate."""
    with Proxy(runner, server_context(certificates, demanding=True)) as proxy:
        yield proxy


@pytest.fixture
def listen(short_folder: Path) -> str:
    return f"unix://{short_folder}/tls.sock"


def exec_request(containers: Containers) -> bytes:
    """A request that starts a fresh exec, `cat`."""
    target = f"/exec/{containers.exec(containers(), 'cat', AttachStdin=True)}/start"
    return request("POST", target, JSON, *UPGRADE, body=START)


def check_works(bridge: Bridge, containers: Containers) -> None:
    """Plain requests, uploads and taken-over connections work."""
    with bridge.connect() as sock:
        for _ in range(3):
            assert ask(sock, request("GET", "/_ping")).body == b"OK"
        Upload("zeros", 3 * MIB).put(sock, f"/containers/{containers()}/archive?path=/tmp", "length")
        assert read_answer(sock).status == 200
    with bridge.connect() as sock:
        sock.sendall(exec_request(containers))
        assert b" 101 " in read_head(sock)
        sock.sendall(b"hello\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock).endswith(b"hello\n")
    bridge.check_log()


def check_refused(bridge: Bridge, containers: Containers, reason: str) -> None:
    """Neither plain requests nor taken-over connections work, and the tool is told why."""
    for asked in (request("GET", "/_ping"), exec_request(containers)):
        answer: Raw = bridge.ask(asked)
        assert answer.status in (502, 503)
        assert reason in json.loads(answer.body)["message"]
    bridge.check_log()


class TestTrust:
    def test_a_private_authority_is_refused_unless_it_is_named(
        self, https: Proxy, certificates: Certificates, listen: str, containers: Containers
    ) -> None:
        url = f"https://localhost:{https.port}"
        with Bridge(url, listen) as bridge:
            check_refused(bridge, containers, "certificate verify failed")
        with Bridge(url, listen, "--ca", str(certificates.ca)) as bridge:
            check_works(bridge, containers)

    def test_a_wrong_host_name_is_refused(
        self, https: Proxy, certificates: Certificates, listen: str, containers: Containers
    ) -> None:
        with Bridge(f"https://127.0.0.1:{https.port}", listen, "--ca", str(certificates.ca)) as bridge:
            check_refused(bridge, containers, "IP address mismatch")

    def test_plain_http_where_tls_is_spoken_is_told(self, https: Proxy, listen: str, containers: Containers) -> None:
        with Bridge(f"http://localhost:{https.port}", listen) as bridge:
            check_refused(bridge, containers, "docker-runner bridge: ")

    def test_tls_where_plain_http_is_spoken_is_told(self, runner: Runner, listen: str, containers: Containers) -> None:
        with Bridge(f"https://localhost:{runner.port}", listen) as bridge:
            check_refused(bridge, containers, "no way to the runner")


class TestClientCertificate:
    def test_one_that_is_demanded_is_given(
        self, demanding: Proxy, certificates: Certificates, listen: str, containers: Containers
    ) -> None:
        url, ca = f"https://localhost:{demanding.port}", str(certificates.ca)
        with Bridge(url, listen, "--ca", ca) as bridge:
            check_refused(bridge, containers, "docker-runner bridge: ")
        cert = ("--cert", str(certificates.client), "--key", str(certificates.client_key))
        with Bridge(url, listen, "--ca", ca, *cert) as bridge:
            check_works(bridge, containers)

    def test_certificate_and_key_may_share_a_file(
        self, demanding: Proxy, certificates: Certificates, listen: str, containers: Containers, tmp_path: Path
    ) -> None:
        both = tmp_path / "both.pem"
        both.write_text(certificates.client.read_text() + certificates.client_key.read_text())
        url = f"https://localhost:{demanding.port}"
        with Bridge(url, listen, "--ca", str(certificates.ca), "--cert", str(both)) as bridge:
            check_works(bridge, containers)

    def test_wrong_files_are_one_line(self, certificates: Certificates, tmp_path: Path) -> None:
        encrypted = tmp_path / "encrypted.key"
        subprocess.run(
            ["openssl", "ec", "-in", certificates.client_key, "-aes256", "-passout", "pass:x", "-out", encrypted],
            check=True,
            capture_output=True,
        )
        cert = ("--cert", str(certificates.client))
        for arguments in (
            ("--ca", "/no/such/file"),
            ("--cert", "/no/such/file"),
            ("--ca", str(certificates.server_key)),
            ("--key", str(certificates.client_key)),
            (*cert, "--key", str(certificates.server_key)),
            (*cert, "--key", str(encrypted)),
        ):
            status, said = refused(*arguments, url="https://localhost:1")
            assert status == 2
            assert said.startswith("--")

    def test_they_are_for_https(self, certificates: Certificates) -> None:
        assert refused("--ca", str(certificates.ca), url="http://x") == (2, "--ca, --cert, --key: are for https")


def test_a_path_prefix_is_sent_and_not_signed(
    runner: Runner, certificates: Certificates, listen: str, containers: Containers
) -> None:
    with Proxy(runner, server_context(certificates), "/engines/one") as proxy:
        url = f"https://localhost:{proxy.port}/engines/one/"
        with Bridge(url, listen, "--ca", str(certificates.ca)) as bridge:
            check_works(bridge, containers)


def test_a_path_prefix_may_be_the_runners_own(engine: Engine, listen: str, containers: Containers) -> None:
    with (
        Runner(engine.socket, {"DOCKER_RUNNER_PATH_PREFIX": "/engines/one"}) as runner,
        Bridge(f"{runner.url}/engines/one", listen) as bridge,
    ):
        check_works(bridge, containers)
