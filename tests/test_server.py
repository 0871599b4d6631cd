"""Framing: what a caller may do to a connection, and what the runner then says. Raw sockets only."""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import sign
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import SECRET, Runner, read_to_end, signed_head


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with short time limits, in front of no engine."""
    limits = {"DOCKER_RUNNER_HEAD_TIMEOUT_MS": "300", "DOCKER_RUNNER_KEEP_ALIVE_MS": "600"}
    with Runner(str(tmp_path_factory.mktemp("none") / "no.sock"), limits) as running:
        yield running


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    return int(status.split(" ")[1]), {k.lower(): v.strip() for k, v in (f.split(":", 1) for f in fields)}, body


def refused(answer: bytes, status: int, code: str) -> None:
    """The answer is this error in the runner's shape, and says that the connection ends."""
    got, headers, body = split(answer)
    error = json.loads(body)
    assert (got, error["error"]["code"]) == (status, code)
    assert error["message"] == error["error"]["message"]
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)


def read_on(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET /version\r\n\r\n",
        b"get /version HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /version HTTP/3.9\r\nHost: x\r\n\r\n",
        b"GET /ver sion HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHo st: x\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nabcde",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\nabcde",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_a_400_in_the_runners_shape(runner: Runner, request_: bytes) -> None:
    refused(runner.raw(request_), 400, "bad_request")


def test_a_target_of_65535_bytes_passes_and_a_longer_one_is_414(runner: Runner) -> None:
    target = "/version?" + "x" * (65_535 - len("/version?"))
    assert split(runner.raw(signed_head("GET", target, b"", "Connection: close")))[0] == 200
    refused(runner.raw(signed_head("GET", target + "x")), 414, "target_too_long")


def test_a_head_with_too_many_fields_is_431(runner: Runner) -> None:
    refused(runner.raw(signed_head("GET", "/version", b"", *["X-A: b"] * 100)), 431, "headers_too_large")


def test_a_head_that_is_too_long_is_431_even_when_it_never_ends(runner: Runner) -> None:
    refused(runner.raw(b"GET / HTTP/1.1\r\nX-A: " + b"b" * 300_000), 431, "headers_too_large")


def test_a_long_registry_config_header_passes(runner: Runner) -> None:
    head = signed_head("GET", "/version", b"", f"X-Registry-Config: {'x' * 60_000}", "Connection: close")
    assert split(runner.raw(head))[0] == 200


def test_a_slow_head_is_408(hasty: Runner) -> None:
    with hasty.connect() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost:")
        refused(read_to_end(sock), 408, "request_timeout")


def test_a_head_that_trickles_in_gets_no_more_time(hasty: Runner) -> None:
    with hasty.connect(timeout=0.05) as sock:
        sock.sendall(b"GET /")
        answer = b""
        until = time.monotonic() + 5
        while not answer and time.monotonic() < until:
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(4096)
        refused(answer, 408, "request_timeout")


def test_line_breaks_alone_keep_no_connection(hasty: Runner) -> None:
    with hasty.connect() as sock:
        sock.sendall(b"\r\n")
        assert read_to_end(sock) == b""


@pytest.mark.parametrize("part", [b"0\r\nX: ", b"1;x="], ids=["trailer", "chunk extension"])
def test_endless_framing_of_a_body_is_431(runner: Runner, part: bytes) -> None:
    head = signed_head("POST", "/auth", b"", "Transfer-Encoding: chunked").replace(b"Signature: ", b"Signature: A")
    with runner.connect() as sock:
        sock.sendall(head + part)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"a" * 10_000)
        refused(read_to_end(sock), 431, "headers_too_large")


def test_more_connections_than_allowed_get_a_503(tmp_path: Path) -> None:
    with (
        Runner(str(tmp_path / "no.sock"), {"DOCKER_RUNNER_MAX_CONNECTIONS": "3"}) as narrow,
        contextlib.ExitStack() as held,
    ):
        for _ in range(3):
            held.enter_context(narrow.connect())
        refused(narrow.raw(b""), 503, "too_many_connections")
        held.close()
        assert narrow.request("GET", "/v1/health").status == 200


def test_an_idle_connection_is_closed_silently(hasty: Runner) -> None:
    with hasty.connect() as sock:
        assert read_to_end(sock) == b""


def test_the_first_request_of_a_pipelined_pair_does_nothing(runner: Runner, direct: EngineDirect, names: Names) -> None:
    name = names()
    body = json.dumps({"Name": name, "Labels": names.labels}).encode()
    first = signed_head("POST", "/volumes/create", body, "Content-Type: application/json") + body
    refused(runner.raw(first + signed_head("GET", "/version")), 400, "pipelining_refused")
    assert direct.request("GET", f"/volumes/{name}").status_code == 404


def test_bytes_after_a_request_are_refused_while_nothing_was_answered(runner: Runner) -> None:
    with runner.connect() as sock:
        sock.sendall(signed_head("GET", "/events?since=9999999999") + b"GET")
        refused(read_to_end(sock), 400, "pipelining_refused")


def test_bytes_during_an_answer_abort_it(runner: Runner) -> None:
    with runner.connect() as sock:
        sock.sendall(signed_head("GET", "/events"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /version HTTP/1.1\r\n")
        with pytest.raises(ConnectionResetError):
            read_on(sock)


def test_a_line_break_after_a_request_is_no_second_request(runner: Runner) -> None:
    with runner.connect() as sock:
        for _ in range(2):
            sock.sendall(signed_head("GET", "/_ping") + b"\r\n")
            answer = sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"OK")


def test_connections_are_kept_alive(runner: Runner) -> None:
    with runner.connect() as sock:
        for _ in range(20):
            sock.sendall(signed_head("GET", "/_ping"))
            assert sock.recv(65536).endswith(b"\r\n\r\nOK")


def test_an_http_1_0_caller_gets_no_chunks_and_the_close_as_end(runner: Runner, direct: EngineDirect) -> None:
    answer = runner.raw(signed_head("GET", "/images/json").replace(b"HTTP/1.1", b"HTTP/1.0"))
    status, headers, body = split(answer)
    assert status == 200
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    listed = direct.request("GET", "/images/json").json()
    assert {image["Id"] for image in json.loads(body)} == {image["Id"] for image in listed}


def test_an_http_1_0_caller_is_not_told_to_continue(runner: Runner) -> None:
    head = signed_head("POST", "/auth", b"{}", "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert not runner.raw(head + b"{}").startswith(b"HTTP/1.1 100 ")


def test_a_refusal_of_a_head_request_has_no_body(runner: Runner) -> None:
    answer = runner.raw(b"HEAD /version HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")


def test_a_whole_url_as_target_reaches_no_operation(runner: Runner) -> None:
    for target in ("http://runner/version", "http://runner/v1/health", "version", "*"):
        answer = runner.raw(signed_head("GET", target, b"", "Connection: close"))
        assert split(answer)[0] in (400, 404), target


def test_the_raw_target_is_what_is_signed(runner: Runner) -> None:
    for target in ("/version?", "/version?#x", "/version#", "/%76ersion", "/version?a=%zz&b=\\", "/version;x"):
        answer = runner.raw(signed_head("GET", target, b"", "Connection: close"))
        assert b"invalid_signature" not in answer, target
        assert b"401" not in answer[:15], target


def test_an_unknown_upgrade_is_ignored_and_the_connection_closed_after_the_answer(runner: Runner) -> None:
    for upgrade in ("h2c", "TLS/1.0", "websocket"):
        head = signed_head("GET", "/version", b"", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}")
        status, headers, _ = split(runner.raw(head))
        assert (status, headers["connection"]) == (200, "close")


@pytest.mark.parametrize("signed", [False, True])
def test_a_websocket_upgrade_is_answered_in_http(runner: Runner, signed: bool) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    target = "/v1.41/containers/x/attach/ws" if signed else "/v1.41/exec/x/start"
    head = signed_head("GET", target, b"", *lines)
    if not signed:
        head = head.replace(b"X-DR-Signature: ", b"X-DR-Signature: A")
    status, headers, body = split(runner.raw(head))
    assert headers["content-type"] == "application/json"
    assert (status, json.loads(body)["error"]["code"]) == ((404, "not_found") if signed else (401, "invalid_signature"))


def test_a_websocket_upgrade_with_a_target_of_60_kilobytes_is_understood(runner: Runner) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    head = signed_head("GET", "/v1/nowhere?x=" + "y" * 60_000, b"", *lines)
    assert split(runner.raw(head))[0] == 404


@pytest.mark.parametrize("key", ["", "short", "!!!!", "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ=="])
def test_an_upgrade_with_a_bad_key_tells_strangers_nothing(runner: Runner, key: str) -> None:
    lines = ["Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    head = "\r\n".join(["GET /v1/x HTTP/1.1", *lines, f"Sec-WebSocket-Key: {key}"]) + "\r\n\r\n"
    assert split(runner.raw(head.encode()))[0] == 401


def test_an_upgrade_with_a_long_header_is_answered(runner: Runner) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "X-Long: " + "x" * 120_000]
    assert split(runner.raw(signed_head("GET", "/v1/nowhere", b"", *lines)))[0] == 404


def test_a_replayed_websocket_upgrade_is_refused(runner: Runner) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    head = signed_head("GET", "/v1/nowhere", b"", *lines)
    assert split(runner.raw(head))[0] == 404
    assert b"replayed_nonce" in runner.raw(head)


def test_a_reset_during_the_answer_leaves_the_service_well(runner: Runner) -> None:
    for _ in range(20):
        sock = runner.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(signed_head("GET", "/info"))
        sock.close()
    assert runner.request("GET", "/_ping").body == b"OK"
    assert not any("Traceback" in line for line in runner.log)


def test_a_path_prefix_of_a_proxy_is_taken_off_before_verification(engine: Engine) -> None:
    with Runner(engine.socket, {"DOCKER_RUNNER_PATH_PREFIX": "/runner"}) as behind:
        for target in ("/_ping", "/v1/ready"):
            headers = sign(SECRET, "GET", target)
            assert behind.request("GET", "/runner" + target, headers=headers).status == 200
        assert behind.request("GET", "/_ping").status == 200
        assert behind.request("GET", "/runner/_ping").status == 401


def test_a_caller_that_never_reads_its_refusals_is_let_go(engine: Engine) -> None:
    with Runner(engine.socket) as alone, contextlib.ExitStack() as held:
        alone.request("GET", "/_ping")
        idle = alone.sockets()
        bad = signed_head("GET", "/version?" + "x" * 60_000).replace(b"Signature: ", b"Signature: A")
        for _ in range(5):
            sock = held.enter_context(alone.connect())
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                for _ in range(80):
                    sock.send(bad)
        deadline = time.monotonic() + 10
        while alone.sockets() > idle and time.monotonic() < deadline:
            alone.request("GET", "/_ping")
        assert alone.sockets() <= idle


def test_callers_that_vanish_are_looked_for(runner: Runner) -> None:
    with runner.connect() as sock:
        sock.sendall(signed_head("GET", "/_ping"))
        assert sock.recv(4096)
        port = sock.getsockname()[1]
        lines = Path(f"/proc/{runner.process.pid}/net/tcp").read_text().splitlines()
        ours = next(line for line in lines if f":{port:04X} 01 " in line)
        assert ours.split()[5].startswith("02:")  # A keep-alive timer runs; see proc(5), net/tcp.
