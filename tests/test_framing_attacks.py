"""Attacks on framing, over raw sockets: bytes that two readers could take for different requests, or answers.

Each attack is correctly signed, so that nothing but its framing speaks against it. It is refused in the runner's own
shape, or the connection is closed; the engine, a scripted one that records, hears nothing of it. To add one: a line in
`ATTACKS` (or `ANSWERS`, for what an engine gone wrong may send).
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from client import sign
from scripted import OK, Peer, ScriptedEngine, chunked
from service import SECRET, Runner, read_to_end

HOST = b"Host: runner\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Attack(NamedTuple):
    """Bytes with a `{sign}` in them, where the signature of this method, target and body goes; and the refusal."""

    name: str
    data: bytes
    code: str = "bad_request"
    method: str = "GET"
    target: str = "/version"
    body: bytes = b""

    def signed(self) -> bytes:
        fields = sign(SECRET, self.method, self.target, self.body)
        return self.data.replace(b"{sign}", "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode())


def head(name: str, fields: bytes, code: str = "bad_request") -> Attack:
    """A GET with these header fields."""
    return Attack(name, b"GET /version HTTP/1.1\r\n" + HOST + b"{sign}" + fields + b"\r\n", code)


def line(name: str, data: bytes, code: str = "bad_request", method: str = "GET", target: str = "/version") -> Attack:
    """A request line."""
    return Attack(name, data + b"\r\n" + HOST + b"{sign}\r\n", code, method, target)


def post(name: str, fields: bytes, body: bytes, signed: bytes = b"abcde", code: str = "bad_request") -> Attack:
    """A POST with these header fields and these bytes after them; the signature is that of the body `signed`."""
    data = b"POST /auth HTTP/1.1\r\n" + HOST + b"{sign}" + fields + b"\r\n" + body
    return Attack(name, data, code, "POST", "/auth", signed)


def chunks(name: str, body: bytes, code: str = "bad_request") -> Attack:
    """A POST in the chunked coding."""
    return post(name, CHUNKED, body, code=code)


WHOLE = b"5\r\nabcde\r\n0\r\n\r\n"
SECOND = b"GET /info HTTP/1.1\r\nHost: runner\r\n\r\n"
PIPELINED = "pipelining_refused"

ATTACKS = (
    # Two lengths.
    post("lengths that differ", b"Content-Length: 5\r\nContent-Length: 6\r\n", b"abcde"),
    post("a length twice", b"Content-Length: 5\r\nContent-Length: 5\r\n", b"abcde"),
    post("a list of lengths", b"Content-Length: 5, 5\r\n", b"abcde"),
    post("a length and a coding", b"Content-Length: 5\r\n" + CHUNKED, WHOLE),
    post("a coding and a length", CHUNKED + b"Content-Length: 5\r\n", WHOLE),
    # A length that is none.
    post("a negative length", b"Content-Length: -5\r\n", b"abcde"),
    post("a length with a plus", b"Content-Length: +5\r\n", b"abcde"),
    post("a length in hexadecimal", b"Content-Length: 0x5\r\n", b"abcde"),
    post("a length with a fraction", b"Content-Length: 5.0\r\n", b"abcde"),
    post("a length with a blank in it", b"Content-Length: 1 5\r\n", b"abcde"),
    post("a length with a blank after it", b"Content-Length: 5 \r\n", b"abcde"),
    post("a length of zero with a blank after it", b"Content-Length: 0 \r\n", b"", b""),
    post("an empty length", b"Content-Length:\r\n", b"abcde"),
    post("a length in other digits", b"Content-Length: \xef\xbc\x95\r\n", b"abcde"),
    post("a length past 64 bits", b"Content-Length: 18446744073709551621\r\n", b"abcde"),
    post("an endless length", b"Content-Length: " + b"9" * 1000 + b"\r\n", b"abcde"),
    post("a length of 64 bits", b"Content-Length: 18446744073709551615\r\n", b"abcde", code="body_too_large"),
    # Codings.
    post("gzip, chunked", b"Transfer-Encoding: gzip, chunked\r\n", WHOLE),
    post("chunked, identity", b"Transfer-Encoding: chunked, identity\r\n", WHOLE),
    post("chunked, chunked", b"Transfer-Encoding: chunked, chunked\r\n", WHOLE),
    post("identity", b"Transfer-Encoding: identity\r\n", WHOLE),
    post("an unknown coding", b"Transfer-Encoding: xchunked\r\n", WHOLE),
    post("a quoted coding", b'Transfer-Encoding: "chunked"\r\n', WHOLE),
    post("a coding with a parameter", b"Transfer-Encoding: chunked;q=1\r\n", WHOLE),
    post("a coding in capitals", b"Transfer-Encoding: CHUNKED\r\n", WHOLE),
    post("an empty coding", b"Transfer-Encoding:\r\n", WHOLE),
    post("a coding with a comma", b"Transfer-Encoding: ,chunked\r\n", WHOLE),
    post("a coding with a vertical tab", b"Transfer-Encoding: \x0bchunked\r\n", WHOLE),
    post("a coding with a form feed", b"Transfer-Encoding: chunked\x0c\r\n", WHOLE),
    post("a coding with a blank after it", b"Transfer-Encoding: chunked \r\n", WHOLE),
    post("a coding with a tab after it", b"Transfer-Encoding: chunked\t\r\n", WHOLE),
    post("a coding twice", CHUNKED + CHUNKED, WHOLE),
    post("two codings", CHUNKED + b"Transfer-Encoding: gzip\r\n", WHOLE),
    post("two codings, the other way", b"Transfer-Encoding: gzip\r\n" + CHUNKED, WHOLE),
    post("a coding with a blank before the colon", b"Transfer-Encoding : chunked\r\n", WHOLE),
    post("a coding in a folded line", b"Transfer-Encoding:\r\n chunked\r\n", WHOLE),
    Attack(
        "a coding in HTTP/1.0",
        b"POST /auth HTTP/1.0\r\n" + HOST + b"{sign}" + CHUNKED + b"\r\n" + WHOLE,
        method="POST",
        target="/auth",
        body=b"abcde",
    ),
    # Chunks.
    chunks("a chunk size with a plus", b"+5\r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size with a minus", b"-5\r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size with 0x", b"0x5\r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size after a blank", b" 5\r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size before a blank", b"5 \r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size of underscores", b"0_5\r\nabcde\r\n0\r\n\r\n"),
    chunks("an empty chunk size", b"\r\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size of 64 bits and one", b"10000000000000005\r\nabcde\r\n0\r\n\r\n"),
    chunks("an endless chunk size", b"F" * 1000),
    chunks("a chunk size that ends with a bare line feed", b"5\nabcde\r\n0\r\n\r\n"),
    chunks("a chunk size that ends with a bare return", b"5\rabcde\r\n0\r\n\r\n"),
    chunks("a chunk that ends with a bare line feed", b"5\r\nabcde\n0\r\n\r\n"),
    chunks("a chunk without an end", b"5\r\nabcde0\r\n\r\n"),
    chunks("a chunk that is longer than it says", b"5\r\nabcdefgh\r\n0\r\n\r\n"),
    chunks("an extension that ends with a bare line feed", b"5;a\nabcde\r\n0\r\n\r\n"),
    chunks("an extension of line breaks in quotes", b'5;a="\r\n0\r\n\r\n"\r\nabcde\r\n0\r\n\r\n'),
    chunks("an extension of NUL", b"5;\0\r\nabcde\r\n0\r\n\r\n"),
    chunks("an endless extension", b"5;" + b"a" * 200_000, code="headers_too_large"),
    chunks("a last chunk that ends with a bare line feed", b"5\r\nabcde\r\n0\r\n\n"),
    chunks("a trailer with a length", b"5\r\nabcde\r\n0\r\nContent-Length: 5\r\n\r\n"),
    chunks("a trailer with a bare line feed", b"5\r\nabcde\r\n0\r\nX: y\n\r\n"),
    chunks("endless trailers", b"5\r\nabcde\r\n0\r\n" + b"X: y\r\n" * 40_000, code="headers_too_large"),
    # Hosts.
    Attack("no host", b"GET /version HTTP/1.1\r\n{sign}\r\n"),
    head("two hosts", b"Host: other\r\n"),
    head("the host twice", HOST),
    Attack("two hosts in HTTP/1.0", b"GET /version HTTP/1.0\r\n" + HOST + HOST + b"{sign}\r\n"),
    # Lines.
    Attack("bare line feeds", (b"GET /version HTTP/1.1\r\n" + HOST + b"{sign}\r\n").replace(b"\r\n", b"\n")),
    head("a bare line feed between fields", b"X: y\nZ: y\r\n"),
    Attack("a bare line feed at the head's end", b"GET /version HTTP/1.1\r\n" + HOST + b"{sign}\n"),
    head("a bare return in a value", b"X: y\rContent-Length: 5\r\n"),
    head("a return before the line break", b"X: y\r\r\n"),
    head("a folded line", b"X: y\r\n z\r\n"),
    head("a line folded with a tab", b"X: y\r\n\tz\r\n"),
    head("a folded empty line", b"X:\r\n \r\n"),
    Attack("a folded first line", b"GET /version HTTP/1.1\r\n " + HOST + b"{sign}\r\n"),
    # Values and names.
    head("NUL in a value", b"X: a\0b\r\n"),
    head("a control character in a value", b"X: a\x01b\r\n"),
    head("an escape in a value", b"X: a\x1b[31m\r\n"),
    head("a delete in a value", b"X: a\x7fb\r\n"),
    head("a vertical tab in a value", b"X: a\x0bb\r\n"),
    head("a blank before the colon", b"X : y\r\n"),
    head("a tab before the colon", b"X\t: y\r\n"),
    head("a blank in a name", b"X Y: y\r\n"),
    head("a name of nothing", b": y\r\n"),
    head("no colon", b"X\r\n"),
    head("NUL in a name", b"X\0: y\r\n"),
    head("a letter of another alphabet in a name", b"Content-Length\xc3\xa9: 5\r\n"),
    head("brackets in a name", b"X(y): z\r\n"),
    # Request lines.
    line("HTTP/0.9", b"GET /version"),
    line("HTTP/0.9, said", b"GET /version HTTP/0.9"),
    line("HTTP/1.2", b"GET /version HTTP/1.2"),
    line("HTTP/2.0", b"GET /version HTTP/2.0"),
    line("HTTP/1.10", b"GET /version HTTP/1.10"),
    line("HTTP/01.1", b"GET /version HTTP/01.1"),
    line("http/1.1", b"GET /version http/1.1"),
    line("a version with a blank after it", b"GET /version HTTP/1.1 "),
    line("a blank before the method", b" GET /version HTTP/1.1"),
    line("a tab for a blank", b"GET\t/version HTTP/1.1"),
    line("a method in small letters", b"get /version HTTP/1.1", method="GET"),
    line("a method in mixed letters", b"Get /version HTTP/1.1", method="GET"),
    line("an unknown method", b"FOO /version HTTP/1.1", method="FOO"),
    line("TRACE", b"TRACE /version HTTP/1.1", "method_not_allowed", "TRACE"),
    line("CONNECT", b"CONNECT runner:443 HTTP/1.1", "invalid_path|not_found", "CONNECT", "runner:443"),
    line("CONNECT to a path", b"CONNECT /version HTTP/1.1", "bad_request|method_not_allowed", "CONNECT"),
    line("an absolute target", b"GET http://runner/version HTTP/1.1", "not_found", target="http://runner/version"),
    line("an absolute target, signed as a path", b"GET http://runner/version HTTP/1.1", "invalid_signature"),
    line("an authority as target", b"GET runner:80 HTTP/1.1", target="runner:80"),
    line("an asterisk as target", b"OPTIONS * HTTP/1.1", "not_found", "OPTIONS", "*"),
    line("a relative target", b"GET version HTTP/1.1", target="version"),
    line("a control character in the target", b"GET /version\x01 HTTP/1.1"),
    line("an escape in the target", b"GET /version\x1b[31m HTTP/1.1"),
    line(
        "a byte past ASCII in the target", b"GET /version?\xff HTTP/1.1", "bad_request|invalid_path|invalid_signature"
    ),
    line("a backslash in the target", b"GET /images/..\\json/json HTTP/1.1", "invalid_signature"),
    Attack("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"),
    Attack("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100),
    line("ICE", b"SOURCE /version ICE/1.0", "method_not_allowed|bad_request", "SOURCE"),
    # More than one.
    Attack("two requests", b"GET /version HTTP/1.1\r\n" + HOST + b"{sign}\r\n" + SECOND, PIPELINED),
    post("a second request after a body", b"Content-Length: 5\r\n", b"abcde" + SECOND, code=PIPELINED),
    post("a second request after chunks", CHUNKED, WHOLE + SECOND, code=PIPELINED),
    post("a body that is longer than it says", b"Content-Length: 5\r\n", b"abcdefgh", code="bad_request|" + PIPELINED),
    head("a second request behind an upgrade", b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + SECOND, PIPELINED),
    post(
        "a second request behind an upgrade's body",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n",
        b"abcde" + SECOND,
        code=PIPELINED,
    ),
    post(
        "a second request behind an upgrade's chunks",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + CHUNKED,
        WHOLE + SECOND,
        code=PIPELINED,
    ),
    head("a second request behind a WebSocket's upgrade", WEBSOCKET + b"\r\n" + SECOND, PIPELINED),
    head("a WebSocket's upgrade with a wrong coding", WEBSOCKET + b"Transfer-Encoding: gzip, chunked\r\n"),
    # Giants.
    line("a giant target", b"GET /" + b"x" * 70_000 + b" HTTP/1.1", "target_too_long"),
    line("a giant method", b"G" * 70_000 + b" / HTTP/1.1"),
    head("a giant value", b"X: " + b"y" * 140_000 + b"\r\n", "headers_too_large"),
    head("a giant name", b"X" * 140_000 + b": y\r\n", "headers_too_large"),
    head("a crowd of fields", b"X: y\r\n" * 101, "headers_too_large"),
    Attack("a giant version", b"GET /version HTTP/1." + b"1" * 70_000 + b"\r\n\r\n"),
)


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
        yield engine


@pytest.fixture(scope="module")
def fronted(scripted: ScriptedEngine) -> Iterator[Runner]:
    with Runner(scripted.path, {"DOCKER_RUNNER_HEAD_TIMEOUT_MS": "300"}) as running:
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


def ask(runner: Runner, data: bytes) -> bytes:
    """What comes back of bytes, up to the runner's close; our half ends with them."""
    with runner.connect() as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # Refused while it was still being sent.
            sock.sendall(data)
        return read_to_end(sock)


def check_refusal(answer: bytes, code: str) -> None:
    """One whole answer in the runner's own shape, that ends the connection and tells nothing about the service."""
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = top.decode("ascii").split("\r\n")
    fields = {name.lower(): value.strip() for name, value in (field.split(":", 1) for field in lines)}
    error = json.loads(body)
    assert set(error) == {"message", "error"}
    assert re.fullmatch(code, error["error"]["code"]), answer
    assert re.match(r"HTTP/1\.1 (4|5)\d\d ", status)
    assert len(body) == int(fields["content-length"])
    assert "server" not in fields
    assert "docker-runner" not in answer.decode("ascii").lower()
    assert re.fullmatch(r"[0-9a-f]{16}", fields["x-request-id"])


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused_and_the_engine_hears_nothing_of_it(
    scripted: ScriptedEngine, fronted: Runner, attack: Attack
) -> None:
    scripted.requests.clear()
    data = attack.signed()
    if attack.code.startswith(("method_", "invalid_", "not_found")):
        data = data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    check_refusal(ask(fronted, data), attack.code)
    assert fronted.request("GET", "/_ping").body == b"ok"
    assert [request.split(b" ", 2)[1] for request in scripted.requests] == [b"/_ping"]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_unsigned_attack_is_told_nothing_of_the_engine(
    scripted: ScriptedEngine, fronted: Runner, attack: Attack
) -> None:
    scripted.requests.clear()
    answer = ask(fronted, attack.data.replace(b"{sign}", b"Connection: close\r\n"))
    check_refusal(answer, r"bad_request|missing_headers|pipelining_refused|\w+_too_(long|large)")
    assert scripted.requests == []


@pytest.mark.parametrize("target", ["/", "/version", "/info", "/v1/nowhere", "/v1/health", "/v1/ready", "/v1/health?x"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("fields", [b"", WEBSOCKET], ids=["plain", "upgrade"])
def test_strangers_learn_neither_name_nor_version(fronted: Runner, method: str, target: str, fields: bytes) -> None:
    said = ask(
        fronted, f"{method} {target} HTTP/1.1\r\n".encode() + HOST + fields + b"Expect: x\r\nConnection: close\r\n\r\n"
    )
    top, _, body = said.lower().partition(b"\r\n\r\n")
    names = {field.partition(b":")[0] for field in top.split(b"\r\n")[1:]}
    assert names <= {b"content-type", b"content-length", b"connection", b"x-request-id", b"date"}
    assert not re.search(rb"docker.runner|uvicorn|python|websockets|[0-9]\.[0-9]+\.[0-9]", body)
    if b"200 ok" not in top:
        assert top.startswith(b"http/1.1 401 ")


@pytest.mark.parametrize(
    "twin",
    [
        head("a head", b""),
        head("fields", b"X: y \t\xc3\xa9\r\nEmpty:\r\n"),
        post("a length", b"Content-Length: 5\r\n", b"abcde"),
        post("a length with zeros", b"Content-Length: 005\r\n", b"abcde"),
        post("chunks", CHUNKED, WHOLE),
        post("chunks with an extension", CHUNKED, b"5;a=b\r\nabcde\r\n0\r\n\r\n"),
        post("chunks with a trailer", CHUNKED, b"5\r\nabcde\r\n0\r\nX: y\r\n\r\n"),
        Attack("HTTP/1.0 without a host", b"GET /version HTTP/1.0\r\n{sign}\r\n"),
    ],
    ids=lambda twin: twin.name,
)
def test_the_honest_twin_passes(scripted: ScriptedEngine, fronted: Runner, twin: Attack) -> None:
    scripted.requests.clear()
    answer = ask(fronted, twin.signed().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert len(scripted.requests) == 1
    assert scripted.requests[0].endswith(b"\r\n\r\n" + twin.body)


def test_what_arrives_byte_by_byte_is_refused_alike(scripted: ScriptedEngine, fronted: Runner) -> None:
    scripted.requests.clear()
    data = post("", b"Transfer-Encoding: gzip, chunked\r\n", WHOLE).signed()
    with fronted.connect() as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for at in range(len(data)):
                sock.sendall(data[at : at + 1])
        check_refusal(read_to_end(sock), "bad_request")
    assert scripted.requests == []


class Wrong(NamedTuple):
    """What an engine gone wrong sends to a GET, and the code of what the caller is told; None: it passes, cleaned."""

    name: str
    data: bytes
    code: str | None = "engine_garbage"


def answer(name: str, fields: bytes, code: str | None = "engine_garbage", body: bytes = b"ok") -> Wrong:
    return Wrong(name, b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n" + body, code)


LENGTH = b"Content-Length: 2\r\n"

ANSWERS = (
    answer("a bare return in a value", LENGTH + b"X: a\rInjected: y\r\n"),
    answer("a bare line feed in a value", LENGTH + b"X: a\nInjected: y\r\n"),
    answer("NUL in a value", LENGTH + b"X: a\0b\r\n"),
    answer("an escape in a value", LENGTH + b"X: a\x1b[31m\r\n"),
    answer("a folded line", LENGTH + b"X: a\r\n Injected: y\r\n"),
    answer("a blank in a name", LENGTH + b"X Y: a\r\n"),
    answer("a blank before a colon", LENGTH + b"X : a\r\n"),
    answer("a return in a name", LENGTH + b"X\rInjected: a\r\n"),
    answer("NUL in a name", LENGTH + b"X\0: a\r\n"),
    answer("a name of nothing", LENGTH + b": a\r\n"),
    answer("a letter past ASCII in a name", LENGTH + b"X\xff: a\r\n"),
    answer("a length twice", LENGTH + LENGTH),
    answer("two lengths", LENGTH + b"Content-Length: 3\r\n"),
    answer("a list of lengths", b"Content-Length: 2, 2\r\n"),
    answer("a length with a plus", b"Content-Length: +2\r\n"),
    answer("a negative length", b"Content-Length: -2\r\n"),
    answer("a length and a coding", LENGTH + CHUNKED, body=chunked(b"ok")),
    answer("a coding and a length", CHUNKED + LENGTH, body=chunked(b"ok")),
    answer("an unasked coding", b"Transfer-Encoding: gzip, chunked\r\n", body=chunked(b"ok")),
    answer("an unknown coding", b"Transfer-Encoding: gzip\r\n"),
    Wrong("a line feed in the status line", b"HTTP/1.1 200 OK\nInjected: y\r\n" + LENGTH + b"\r\nok"),
    Wrong("a return in the status line", b"HTTP/1.1 200 OK\rInjected: y\r\n" + LENGTH + b"\r\nok"),
    Wrong("a status of two digits", b"HTTP/1.1 20 OK\r\n" + LENGTH + b"\r\nok"),
    Wrong("a status of four digits", b"HTTP/1.1 2000 OK\r\n" + LENGTH + b"\r\nok"),
    Wrong("a status past all", b"HTTP/1.1 999 OK\r\n" + LENGTH + b"\r\nok"),
    Wrong("a protocol that nobody asked for", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
    Wrong(
        "an interim answer with a body",
        b"HTTP/1.1 150 X\r\nContent-Length: 1\r\n\r\n!HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\nok",
    ),
    Wrong("a coding where there is no body", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: gzip\r\n\r\n"),
    Wrong("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n"),
    Wrong("an escape in the reason", b"HTTP/1.1 200 \x1b[31m\r\n" + LENGTH + b"\r\nok", None),
    answer("a length with a blank after it", b"Content-Length: 2 \r\n", None),
    answer("fields of the connection", LENGTH + b"Connection: X-Secret\r\nX-Secret: y\r\nKeep-Alive: 5\r\n", None),
    answer("a request's id", LENGTH + b"X-Request-Id: forged\r\n", None),
    answer("an answer after the answer", LENGTH, None, body=b"okHTTP/1.1 200 OK\r\nInjected: y\r\n\r\n"),
    Wrong("a length where there is no body", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
)


@pytest.mark.parametrize("wrong", ANSWERS, ids=lambda wrong: wrong.name)
def test_an_answer_gone_wrong_injects_nothing(scripted: ScriptedEngine, fronted: Runner, wrong: Wrong) -> None:
    def script(peer: Peer) -> None:
        if peer.read_request():
            peer.send(wrong.data)

    scripted.restart(script)
    data = head("", b"X-Request-Id: mine\r\nConnection: close\r\n").signed()
    top, _, body = ask(fronted, data).partition(b"\r\n\r\n")
    status, *lines = top.split(b"\r\n")
    assert all(re.fullmatch(rb"[A-Za-z0-9-]+: ?[\t\x20-\x7e]*", field) for field in lines), top
    names = [field.partition(b":")[0].lower() for field in lines]
    values = dict(zip(names, (field.partition(b":")[2].strip() for field in lines), strict=True))
    assert len(set(names)) == len(names)
    assert values[b"x-request-id"] == b"mine"
    assert not {b"injected", b"x-secret", b"keep-alive"} & set(names)
    if wrong.code is None:
        assert re.fullmatch(rb"HTTP/1\.1 20[04] [A-Za-z ]+", status)
        assert body == (b"ok" if status.startswith(b"HTTP/1.1 200") else b"")
    else:
        assert status == b"HTTP/1.1 502 Bad Gateway"
        assert json.loads(body)["error"]["code"] == wrong.code
    assert (b"content-length" in names) != (b"HTTP/1.1 204" in status)
    assert int(values.get(b"content-length", b"0")) == len(body)
