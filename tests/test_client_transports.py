"""The vendored client over TLS with a private authority and a client's certificate, and over a Unix socket."""

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from client import RunnerClient, RunnerClientError
from service import Runner


class Relay:
    """Carries each connection of a listener to the runner, both ways, until either side ends."""

    def __init__(self, listener: socket.socket, port: int, wrap: Callable[[socket.socket], socket.socket]) -> None:
        self._listener, self._port, self._wrap = listener, port, wrap
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        address = ("127.0.0.1", self._port)
        with contextlib.suppress(OSError), self._wrap(accepted) as near, socket.create_connection(address) as far:
            back = threading.Thread(target=self._carry, args=(far, near), daemon=True)
            back.start()
            self._carry(near, far)
            back.join()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's certificate, and with certificate and key of a server and of a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
    return folder


@pytest.fixture(scope="module")
def secure_url(runner: Runner, certificates: Path) -> Iterator[str]:
    """A relay in front of the runner that wants a certificate of its callers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with Relay(listener, runner.port, lambda accepted: context.wrap_socket(accepted, server_side=True)):
        yield f"https://127.0.0.1:{port}"


@pytest.fixture
def secure(secure_url: str, runner: Runner, certificates: Path) -> RunnerClient:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    return RunnerClient(secure_url, runner.secret, ssl_context=context)


def test_a_private_authority_and_a_clients_certificate(secure: RunnerClient, box: str) -> None:
    assert secure.exec_run(box, "echo safe").stdout == "safe\n"
    with secure.exec_interactive(box, ["cat"]) as session:
        session.send(bytes(300_000))
        session.eof()
        assert sum(len(data) for _, data in session) == 300_000


def test_an_unknown_authority_is_refused_and_not_tried_again(secure_url: str, runner: Runner) -> None:
    with pytest.raises(RunnerClientError, match="certificate verify failed") as failed:
        RunnerClient(secure_url, runner.secret).health()
    assert (failed.value.code, failed.value.retryable) == ("unreachable", False)


def test_a_missing_client_certificate_is_told(secure_url: str, runner: Runner, certificates: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with pytest.raises(RunnerClientError) as failed:
        RunnerClient(secure_url, runner.secret, ssl_context=context).health()
    assert failed.value.status == 0


@pytest.mark.parametrize("encoded", [True, False])
def test_a_unix_socket(runner: Runner, short_folder: Path, box: str, encoded: bool) -> None:
    path = short_folder / f"client-{encoded}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with Relay(listener, runner.port, lambda accepted: accepted):
        client = RunnerClient(f"http+unix://{quote(str(path), safe='') if encoded else path}", runner.secret)
        client.health()
        assert client.exec_run(box, "echo here").stdout == "here\n"
        with client.exec_interactive(box, "echo there") as session:
            assert list(session) == [("stdout", b"there\n")]


def test_a_socket_that_is_not_there_is_unreachable(short_folder: Path) -> None:
    with pytest.raises(RunnerClientError) as failed:
        RunnerClient(f"http+unix://{short_folder}/none.sock", "secret", retries=0).health()
    assert failed.value.code == "unreachable"


def test_another_scheme_is_no_runner() -> None:
    with pytest.raises(ValueError, match="no URL of a runner"):
        RunnerClient("ftp://127.0.0.1", "secret")
