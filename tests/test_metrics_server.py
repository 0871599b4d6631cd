"""The listener of the metrics: off by default, one path, and bounds of its own."""

import socket
from collections.abc import Iterator

import pytest

from dev import wait_until
from dev.engine import Engine
from metrics_server import MAX_CONNECTIONS
from runner import main
from scraped import PORT, ask, metrics_port, scrape, scraped
from scripted import OK, Peer, ScriptedEngine
from service import SECRET, Runner, read_to_end, signed_head


@pytest.fixture(scope="module")
def metered(engine: Engine) -> Iterator[Runner]:
    """A runner with metrics."""
    with Runner(engine.socket, PORT) as running:
        yield running


def test_it_is_off_if_no_port_is_set(runner: Runner) -> None:
    assert not any("metrics" in line for line in runner.log)


def test_the_main_port_has_no_metrics(metered: Runner) -> None:
    assert metered.request("GET", "/metrics").status == 404
    assert metered.raw(b"GET /metrics HTTP/1.1\r\nHost: runner\r\n\r\n").startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("target", ["/", "/metrics/", "/_ping", "/v1/health", "/%6detrics", "//metrics"])
def test_it_has_no_other_path(metered: Runner, target: str) -> None:
    assert ask(metered, target=target).status == 404


def test_it_only_gives(metered: Runner) -> None:
    answer = ask(metered, "POST")
    assert (answer.status, answer.header("allow")) == (405, "GET, HEAD")


def test_head(metered: Runner) -> None:
    answer = ask(metered, "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"


def test_no_websocket(metered: Runner) -> None:
    upgrade = (
        b"GET /metrics HTTP/1.1\r\nHost: runner\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert raw(metered, upgrade).startswith(b"HTTP/1.1 403 ")


def test_an_answer_ends_its_connection(metered: Runner) -> None:
    said = raw(metered, b"GET /metrics HTTP/1.1\r\nHost: runner\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in said


def test_a_long_head_is_refused(metered: Runner) -> None:
    head = b"GET /metrics HTTP/1.1\r\nHost: runner\r\nX: " + b"x" * 200_000
    assert raw(metered, head).startswith(b"HTTP/1.1 431 ")


def test_connections_are_bounded_in_number_and_time(metered: Runner) -> None:
    address = ("127.0.0.1", metrics_port(metered))
    held = [socket.create_connection(address, timeout=20) for _ in range(MAX_CONNECTIONS)]
    try:
        held[0].sendall(b"GET /metrics HTTP/1.1\r\n")
        assert wait_until(lambda: ask(metered).status == 503, 5)
        assert metered.request("GET", "/_ping").status == 200
        assert [read_to_end(sock)[:13] for sock in held] == [b"HTTP/1.1 408 ", *[b""] * (MAX_CONNECTIONS - 1)]
    finally:
        for sock in held:
            sock.close()
    assert wait_until(lambda: ask(metered).status == 200, 5)


def test_it_is_served_while_the_runner_drains_and_is_gone_after() -> None:
    def waits(peer: Peer) -> None:
        while request := peer.read_request():
            if b"/containers/json" in request:
                peer.engine.go.wait(20)
            peer.send(OK)

    with ScriptedEngine(waits) as engine, Runner(engine.path, PORT) as runner, runner.connect() as sock:
        sock.sendall(signed_head("GET", "/containers/json"))
        scraped(runner, lambda now: now.value("docker_runner_used", resource="requests") == 1)
        runner.process.terminate()
        assert wait_until(lambda: refuses(runner.port), 10)
        assert scrape(runner).value("docker_runner_used", resource="requests") == 1
        engine.go.set()
        assert b"ok" in read_to_end(sock)
        assert runner.process.wait(20) == 0
        assert refuses(metrics_port(runner))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DOCKER_RUNNER_METRICS_PORT", "x"),
        ("DOCKER_RUNNER_METRICS_PORT", "65536"),
        ("DOCKER_RUNNER_METRICS_HOST", "192.0.2.1"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_RUNNER_ENV": "production"}
    environ |= {"DOCKER_RUNNER_PORT": "0", **PORT, name: value}
    with pytest.MonkeyPatch.context() as patched:
        for variable, text in environ.items():
            patched.setenv(variable, text)
        assert main(["serve"]) != 0
    assert name in capsys.readouterr().err


def raw(runner: Runner, data: bytes) -> bytes:
    """Raw bytes to the listener of the metrics; what comes back until it closes."""
    with socket.create_connection(("127.0.0.1", metrics_port(runner)), timeout=20) as sock:
        sock.sendall(data)
        return read_to_end(sock)


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
