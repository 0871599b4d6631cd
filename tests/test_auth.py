"""Verification: each refusal, the nonce's whole life, and bodies. Over HTTP where callers are concerned."""

import concurrent.futures
import contextlib
import hashlib
import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from auth import Credentials, Keyring, NonceStore, Verifier, read_credentials
from client import EMPTY_BODY_HASH, sign
from conftest import EngineDirect, Names
from errors import RunnerError
from service import SECRET, Answer, Runner, read_to_end, signed_head

MIB = 1024 * 1024
TTL_MS = 60_000


class Clock:
    """A clock that a test sets."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def verifier(clock: Clock, *, max_nonces: int = 100, keyring: Keyring | None = None) -> Verifier:
    return Verifier(keyring or Keyring(((None, SECRET),)), ttl_ms=TTL_MS, max_nonces=max_nonces, clock_ms=clock)


def credentials(stamped_ms: int, nonce: str = "n", *, secret: str = SECRET, key: str | None = None) -> Credentials:
    headers = sign(secret, "GET", "/version", timestamp_ms=stamped_ms, nonce=nonce, key=key)
    return read_credentials([(name.lower().encode(), value.encode()) for name, value in headers.items()])


def ask(who: Verifier, given: Credentials) -> bytes:
    who.check_time(given)
    return who.verify(given, b"GET", b"/version", EMPTY_BODY_HASH.encode()).nonce


def refusal(who: Verifier, given: Credentials) -> RunnerError:
    with pytest.raises(RunnerError) as refused:
        ask(who, given)
    return refused.value


def code(answer: Answer) -> str:
    error = json.loads(answer.body)["error"]
    assert isinstance(error["retryable"], bool)
    assert answer.header("content-type") == "application/json"
    return str(error["code"])


# The clock.


@pytest.mark.parametrize("skew_ms", [-TTL_MS, -1, 0, 1, TTL_MS])
def test_a_timestamp_within_the_skew_is_accepted(skew_ms: int) -> None:
    clock = Clock()
    who = verifier(clock)
    clock.now_ms += 10 * TTL_MS
    ask(who, credentials(clock.now_ms + skew_ms))


@pytest.mark.parametrize("skew_ms", [-TTL_MS - 1, TTL_MS + 1, -(10**12), 10**15])
def test_a_timestamp_out_of_the_skew_is_refused(skew_ms: int) -> None:
    clock = Clock()
    who = verifier(clock)
    clock.now_ms += 10 * TTL_MS
    error = refusal(who, credentials(clock.now_ms + skew_ms))
    assert (error.code, error.retryable) == ("timestamp_out_of_range", False)


def test_a_request_stamped_before_the_process_started_is_refused_as_retryable() -> None:
    clock = Clock()
    error = refusal(verifier(clock), credentials(clock.now_ms - 1))
    assert (error.code, error.retryable) == ("timestamp_out_of_range", True)


def test_a_clock_that_goes_back_opens_no_window_for_replays() -> None:
    clock = Clock()
    who = verifier(clock)
    used = credentials(clock.now_ms)
    ask(who, used)
    clock.now_ms += 3 * TTL_MS
    ask(who, credentials(clock.now_ms, "later"))  # Drops what is past.
    clock.now_ms -= 3 * TTL_MS
    assert refusal(who, used).code == "timestamp_out_of_range"


# Nonces.


@pytest.mark.parametrize("ahead_ms", [-TTL_MS, 0, TTL_MS])
def test_a_nonce_is_remembered_for_as_long_as_its_timestamp_is_accepted(ahead_ms: int) -> None:
    clock = Clock()
    who = verifier(clock)
    clock.now_ms += 10 * TTL_MS
    used = credentials(clock.now_ms + ahead_ms)
    ask(who, used)
    last_ms = used.timestamp_ms + TTL_MS
    while clock.now_ms < last_ms:
        clock.now_ms = min(clock.now_ms + 997, last_ms)
        assert refusal(who, used).code == "replayed_nonce"
    clock.now_ms += 1
    assert refusal(who, used).code == "timestamp_out_of_range"


def test_a_nonce_is_refused_with_another_timestamp_too() -> None:
    clock = Clock()
    who = verifier(clock)
    ask(who, credentials(clock.now_ms))
    assert refusal(who, credentials(clock.now_ms + 5)).code == "replayed_nonce"


def test_a_full_store_refuses_and_forgets_nothing() -> None:
    clock = Clock()
    who = verifier(clock, max_nonces=3)
    for number in range(3):
        ask(who, credentials(clock.now_ms, f"n-{number}"))
    error = refusal(who, credentials(clock.now_ms, "one-more"))
    assert (error.code, error.status, error.retryable) == ("nonce_store_full", 503, True)
    assert refusal(who, credentials(clock.now_ms, "n-0")).code == "replayed_nonce"
    clock.now_ms += 2 * TTL_MS
    ask(who, credentials(clock.now_ms, "room-again"))
    assert len(who.nonces) == 1


def test_a_released_nonce_is_accepted_once_more() -> None:
    clock = Clock()
    who = verifier(clock)
    given = credentials(clock.now_ms)
    for _ in range(50):
        who.nonces.release(ask(who, given))
    ask(who, given)
    assert refusal(who, given).code == "replayed_nonce"
    assert len(who.nonces) == 1


def test_a_released_nonce_taken_with_a_later_timestamp_is_held_to_the_later_end() -> None:
    store = NonceStore(10)
    store.take(b"digest", 10_000, 0)
    store.release(b"digest")
    store.take(b"digest", 90_000, 1_000)
    with pytest.raises(RunnerError, match="used before"):
        store.take(b"digest", 95_000, 89_000)


def test_releases_and_retakes_with_changing_timestamps_grow_nothing() -> None:
    store = NonceStore(10)
    for number in range(1000):
        store.take(b"digest", 10_000 + 50_000 * (number % 2), 0)
        store.release(b"digest")
    assert sum(len(digests) for digests in store._by_end.values()) == 1


def test_a_leap_of_the_clock_is_no_long_loop() -> None:
    store = NonceStore(10)
    store.take(b"one", 10_000, 0)
    store.take(b"two", 10**15, 10**15 - 10)  # 1970 to 33658, as a board without a battery may see it.
    assert len(store) == 1


def test_the_store_is_empty_when_everything_is_past() -> None:
    store = NonceStore(1000)
    for number in range(1000):
        store.take(str(number).encode(), 1000 * (number % 7), 0)
        if number % 2:
            store.release(str(number).encode())
    store.take(b"last", 10**9, 10**8)
    assert len(store) == 1


def test_an_unsigned_request_takes_no_nonce() -> None:
    clock = Clock()
    who = verifier(clock)
    assert refusal(who, credentials(clock.now_ms, "n", secret="another")).code == "invalid_signature"
    assert len(who.nonces) == 0
    ask(who, credentials(clock.now_ms, "n"))


def test_of_50_copies_at_once_exactly_one_passes(runner: Runner) -> None:
    head = signed_head("GET", "/_ping", b"", "Connection: close")
    together = threading.Barrier(50)

    def send() -> bytes:
        with runner.connect() as sock:
            together.wait()
            sock.sendall(head)
            return read_to_end(sock)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = [future.result() for future in [pool.submit(send) for _ in range(50)]]
    statuses = sorted(answer.split(b" ")[1] for answer in answers)
    assert statuses == [b"200"] + [b"401"] * 49
    assert sum(b'"replayed_nonce"' in answer for answer in answers) == 49


def test_of_50_copies_with_a_body_at_once_exactly_one_passes(
    runner: Runner, direct: EngineDirect, names: Names, image: str
) -> None:
    name = names()
    body = json.dumps({"Image": image, "Labels": names.labels, "Cmd": ["x" * 3000]}).encode()
    target = f"/containers/create?name={name}"
    request = signed_head("POST", target, body, "Content-Type: application/json", "Connection: close") + body
    together = threading.Barrier(50)

    def send() -> bytes:
        with runner.connect() as sock:
            sock.sendall(request[:-1])
            together.wait()
            sock.sendall(request[-1:])
            return read_to_end(sock)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = [future.result() for future in [pool.submit(send) for _ in range(50)]]
    statuses = sorted(answer.split(b" ")[1] for answer in answers)
    assert statuses == [b"201"] + [b"401"] * 49
    assert sum(b'"replayed_nonce"' in answer for answer in answers) == 49
    assert direct.request("GET", f"/containers/{name}/json").status_code == 200


# Refusals over HTTP.


@pytest.mark.parametrize("missing", ["X-DR-Timestamp", "X-DR-Nonce", "X-DR-Signature"])
@pytest.mark.parametrize("empty", [False, True], ids=["absent", "empty"])
def test_each_signature_header_is_required(runner: Runner, missing: str, empty: bool) -> None:
    headers = sign(SECRET, "GET", "/version")
    del headers[missing]
    if empty:
        headers[missing] = ""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    answer = runner.raw(f"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b'"missing_headers"' in answer


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("X-DR-Timestamp", "tomorrow", "invalid_timestamp"),
        ("X-DR-Timestamp", "-5", "invalid_timestamp"),
        ("X-DR-Timestamp", "1e12", "invalid_timestamp"),
        ("X-DR-Timestamp", "1700000000000.0", "invalid_timestamp"),
        ("X-DR-Timestamp", "\u0661\u0662".encode().decode("latin-1"), "invalid_timestamp"),
        ("X-DR-Timestamp", "9" * 17, "invalid_timestamp"),
        ("X-DR-Timestamp", "1000", "timestamp_out_of_range"),
        ("X-DR-Nonce", "two words", "invalid_nonce"),
        ("X-DR-Nonce", "n" * 129, "invalid_nonce"),
        ("X-DR-Nonce", "caf\u00e9", "invalid_nonce"),
        ("X-DR-Signature", "short", "invalid_signature"),
        ("X-DR-Signature", "A" * 5000, "invalid_signature"),
        ("X-DR-Signature", "\u00e9" * 44, "invalid_signature"),
        ("X-DR-Content-SHA256", "not a hash", "body_hash_mismatch"),
        ("X-DR-Key", "nobody", "invalid_signature"),
    ],
)
def test_a_malformed_header_is_refused(runner: Runner, header: str, value: str, expected: str) -> None:
    answer = runner.request("GET", "/version", headers={header: value})
    assert (answer.status, code(answer)) == (401, expected)


@pytest.mark.parametrize(
    "header", ["X-DR-Timestamp", "X-DR-Nonce", "X-DR-Signature", "x-dr-key", "X-Dr-Content-Sha256"]
)
def test_a_header_that_stands_twice_is_refused(runner: Runner, header: str) -> None:
    headers = {name.lower(): value for name, value in sign(SECRET, "GET", "/version").items()}
    value = headers.get(header.lower(), "x")
    extra = [f"{header}: {value}"] * (1 if header.lower() in headers else 2)
    answer = runner.raw(signed_head("GET", "/version", b"", "Connection: close", *extra))
    assert b'"duplicate_headers"' in answer


def test_a_signature_for_another_method_target_or_body_is_refused(runner: Runner) -> None:
    for headers in (
        sign(SECRET, "HEAD", "/version"),
        sign(SECRET, "GET", "/version?"),
        sign(SECRET, "GET", "/v1.41/version"),
        sign(SECRET, "GET", "/version", b"{}"),
        sign("another secret", "GET", "/version"),
    ):
        answer = runner.request("GET", "/version", headers=headers)
        assert (answer.status, code(answer)) == (401, "invalid_signature")


def test_an_invalid_signature_tells_the_string_that_should_have_been_signed(runner: Runner) -> None:
    answer = runner.request("POST", "/auth?x=1", b"{}", headers={"X-DR-Signature": "wrong", "X-DR-Nonce": "n-7"})
    details = json.loads(answer.body)["error"]["details"]
    stamp = details["string_to_sign"].split("\\n")[2]
    body_hash = b64encode(hashlib.sha256(b"{}").digest()).decode()
    assert details["string_to_sign"] == f"POST\\n/auth?x=1\\n{stamp}\\nn-7\\n{body_hash}"


def test_a_long_string_to_sign_is_not_repeated(runner: Runner) -> None:
    target = "/version?" + "\\" * 60_000
    answer = runner.request("GET", target, headers={"X-DR-Signature": "wrong"})
    assert code(answer) == "invalid_signature"
    assert len(answer.body) < 500


def test_a_refusal_before_verification_ends_the_connection(runner: Runner) -> None:
    assert runner.request("GET", "/version", headers={"X-DR-Signature": "x"}).header("connection") == "close"
    assert runner.request("GET", "/nowhere").header("connection") is None


def test_strangers_learn_nothing_not_even_that_a_route_is_missing(runner: Runner) -> None:
    for target in ("/version", "/nowhere", "/v1/nowhere", "/v1/health/", "/v1/%68ealth", "//v1/health", "/v1/ready2"):
        answer = runner.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b'"missing_headers"' in answer, target
    answer = runner.raw(b"POST /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b'"missing_headers"' in answer


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", ["/v1/health", "/v1/ready", "/v1/health?x=1", "/v1/ready?"])
def test_health_and_readiness_need_no_signature(runner: Runner, method: str, target: str) -> None:
    answer = runner.raw(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_forwarded_headers_are_not_believed(runner: Runner) -> None:
    runner.request("GET", "/nowhere-at-all", headers={"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"})
    runner.wait_for_log("nowhere-at-all")
    assert not any("203.0.113.9" in line for line in runner.log)


def test_neither_secret_nor_signature_is_logged(runner: Runner) -> None:
    headers = sign(SECRET, "GET", "/nope")
    runner.request("GET", "/nope", headers=headers)
    runner.wait_for_log("/nope")
    assert not any(SECRET in line or headers["X-DR-Signature"] in line for line in runner.log)


# Several secrets and named keys.


def test_every_secret_of_the_ring_is_accepted_and_a_name_binds() -> None:
    ring = Keyring.parse("first-secret\n\n second-secret \nmonitor:watch-secret\nmonitor:rotated-secret\n")
    clock = Clock()
    who = verifier(clock, keyring=ring)
    for number, (secret, key) in enumerate(
        [("first-secret", None), ("second-secret", None), ("watch-secret", "monitor"), ("rotated-secret", "monitor")]
    ):
        ask(who, credentials(clock.now_ms, f"n-{number}", secret=secret, key=key))
    for secret, key in [("first-secret", "monitor"), ("watch-secret", None), ("first-secret", "nobody")]:
        assert refusal(who, credentials(clock.now_ms, "m", secret=secret, key=key)).code == "invalid_signature"


def test_a_captured_request_does_not_pass_again_under_another_name() -> None:
    # The name is not signed. Were one secret to stand under two, a request would be another's with a header changed.
    with pytest.raises(ValueError, match="two names"):
        Keyring.parse(f"{SECRET}\nci:{SECRET}")
    clock = Clock()
    who = verifier(clock, keyring=Keyring(((None, SECRET), ("ci", SECRET))))
    given = credentials(clock.now_ms)
    ask(who, given)
    assert refusal(who, msgspec.structs.replace(given, key="ci")).code == "replayed_nonce"


def test_the_same_nonce_under_two_names_is_two_nonces() -> None:
    clock = Clock()
    who = verifier(clock, keyring=Keyring.parse("a:secret-a\nb:secret-b"))
    ask(who, credentials(clock.now_ms, "same", secret="secret-a", key="a"))
    ask(who, credentials(clock.now_ms, "same", secret="secret-b", key="b"))


def test_a_secret_with_a_control_character_is_an_error() -> None:
    with pytest.raises(ValueError, match="control character"):
        Keyring.parse("a:0123456789abcdef\nb:0123456789abcdef\0")


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_a_file_without_a_secret_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no secret"):
        Keyring.parse(text)


# Bodies.


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with small limits, in front of no engine: what is refused here reached none."""
    socket_path = tmp_path_factory.mktemp("none") / "no.sock"
    limits = {
        "DOCKER_RUNNER_MAX_BODY": str(2 * MIB),
        "DOCKER_RUNNER_MAX_UPLOAD": str(4 * MIB),
        "DOCKER_RUNNER_MAX_UNVERIFIED": str(3 * MIB),
        "DOCKER_RUNNER_BODY_TIMEOUT_MS": "500",
    }
    with Runner(str(socket_path), limits) as running:
        yield running


def hashed(body: bytes, content: bytes | None = None, **more: Any) -> dict[str, str]:
    """Headers with the hash up front; of other content than `body`, if wanted."""
    content_hash = b64encode(hashlib.sha256(body if content is None else content).digest()).decode()
    return sign(SECRET, "POST", "/images/load", content_hash=content_hash, **more)


def waiting_post(body: bytes, headers: dict[str, str]) -> bytes:
    """The head of a POST that waits for 100 Continue before it sends `body`."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    lines = ["POST /images/load HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Expect: 100-continue", *lines]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_body_over_the_limit_is_refused_before_it_is_read(strict: Runner) -> None:
    head = signed_head("POST", "/images/load", b"", f"Content-Length: {2 * MIB + 1}", "Expect: 100-continue")
    answer = strict.raw(head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"body_too_large"' in answer
    assert b"connection: close" in answer.lower()


def test_a_chunked_body_over_the_limit_is_refused(strict: Runner) -> None:
    with strict.connect() as sock:
        sock.sendall(signed_head("POST", "/images/load", b"", "Transfer-Encoding: chunked"))
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sock.sendall(piece * 33)
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_caller_that_is_still_sending_gets_to_read_the_refusal(strict: Runner) -> None:
    answer = strict.request("POST", "/images/load", b"x" * (MIB - 70_000), {"X-DR-Nonce": ""})
    assert (answer.status, code(answer)) == (401, "missing_headers")
    assert answer.header("connection") == "close"


def test_an_announced_hash_is_verified_before_the_body_and_unsigned_requests_get_no_continue(strict: Runner) -> None:
    body = b"x" * 1000
    forged = {**hashed(body), "X-DR-Nonce": "n"}
    for headers, expected in ((hashed(body), b"HTTP/1.1 100 "), (forged, b"HTTP/1.1 401 ")):
        with strict.connect() as sock:
            sock.sendall(waiting_post(body, headers))
            assert sock.recv(len(expected), socket.MSG_WAITALL) == expected


def test_a_body_that_is_not_the_announced_one_is_refused_and_its_nonce_is_spent(strict: Runner) -> None:
    for size in (10, MIB + 50_000):  # kept in memory, and in a file
        body = b"x" * size
        headers = hashed(body, body[:-1] + b"y")
        answer = strict.request("POST", "/images/load", body, headers)
        assert (answer.status, code(answer)) == (401, "body_hash_mismatch")
        again = strict.request("POST", "/images/load", body[:-1] + b"y", headers)
        assert (again.status, code(again)) == (401, "replayed_nonce")


def test_a_body_past_the_plain_limit_passes_with_its_hash_up_front(strict: Runner) -> None:
    body = b"x" * (4 * MIB)
    answer = strict.request("POST", "/images/load", body, hashed(body))
    assert (answer.status, code(answer)) == (503, "engine_socket_missing")
    refused = strict.raw(waiting_post(body + b"x", hashed(body + b"x")))
    assert refused.startswith(b"HTTP/1.1 413 ")


def test_a_retryable_answer_gives_the_nonce_back(strict: Runner) -> None:
    for body, headers in ((None, sign(SECRET, "GET", "/version")), (b"{}", sign(SECRET, "POST", "/auth", b"{}"))):
        for _ in range(3):
            method, target = ("GET", "/version") if body is None else ("POST", "/auth")
            answer = strict.request(method, target, body, headers)
            assert (answer.status, code(answer)) == (503, "engine_socket_missing")
            assert json.loads(answer.body)["error"]["retryable"] is True
            assert answer.header("retry-after") is not None


def test_an_answer_that_is_not_retryable_keeps_the_nonce(strict: Runner) -> None:
    headers = sign(SECRET, "GET", "/nowhere")
    assert code(strict.request("GET", "/nowhere", headers=headers)) == "not_found"
    assert code(strict.request("GET", "/nowhere", headers=headers)) == "replayed_nonce"


def test_a_caller_that_leaves_before_its_body_is_complete_may_repeat_the_request(strict: Runner) -> None:
    body = b"x" * 1000
    headers = hashed(body)
    with strict.connect() as sock:
        sock.sendall(waiting_post(body, headers))
        assert sock.recv(4096).startswith(b"HTTP/1.1 100 ")  # Verified: the nonce is taken.
        assert code(strict.request("POST", "/images/load", body, headers)) == "replayed_nonce"
        sock.sendall(body[:-1])
    answer = wait_for_other_than("replayed_nonce", strict, body, headers)
    assert (answer.status, code(answer)) == (503, "engine_socket_missing")


def wait_for_other_than(unwanted: str, runner: Runner, body: bytes, headers: dict[str, str]) -> Answer:
    deadline = time.monotonic() + 5
    while True:
        answer = runner.request("POST", "/images/load", body, headers)
        if code(answer) != unwanted or time.monotonic() > deadline:
            return answer


def test_a_body_that_trickles_in_does_not_outlive_its_signature(tmp_path: Path) -> None:
    limits = {"DOCKER_RUNNER_SIGNATURE_TTL_MS": "1000", "DOCKER_RUNNER_BODY_TIMEOUT_MS": "800"}
    with Runner(str(tmp_path / "no.sock"), limits) as brief, brief.connect(timeout=0.1) as sock:
        sock.sendall(signed_head("POST", "/auth", b"", "Content-Length: 10000"))
        answer = b""
        until = time.monotonic() + 5
        while not answer and time.monotonic() < until:
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_content_length_of_many_zeros_is_no_defect(strict: Runner) -> None:
    answer = strict.raw(signed_head("POST", "/images/load", b"", "Content-Length: " + "0" * 5000 + "9" * 19))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_trailers_are_not_headers(strict: Runner) -> None:
    head = signed_head("POST", "/auth", b"x", "Transfer-Encoding: chunked", "Connection: close")
    head = head.replace(b"Content-Length: 1\r\n", b"")
    nonce = next(line for line in head.split(b"\r\n") if line.startswith(b"X-DR-Nonce"))
    moved = head.replace(nonce + b"\r\n", b"") + b"1\r\nx\r\n0\r\n" + nonce + b"\r\n\r\n"
    assert b"missing_headers" in strict.raw(moved)


def test_a_body_that_stops_arriving_is_refused(strict: Runner) -> None:
    with strict.connect() as sock:
        sock.sendall(signed_head("POST", "/auth", b"", "Content-Length: 10") + b"12345")
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_unverified_bodies_are_bounded_together_and_the_bound_is_given_back(strict: Runner) -> None:
    for _ in range(2):
        with strict.connect() as first, strict.connect() as second:
            piece = b"x" * (2 * MIB - 1)
            for sock in (first, second):
                sock.sendall(signed_head("POST", "/images/load", b"", f"Content-Length: {2 * MIB}"))
            first.sendall(piece)
            second.sendall(piece)
            answers = [read_to_end(sock) for sock in (first, second)]  # One is over the bound, one times out.
        assert sorted(answer.split(b" ")[1] for answer in answers) == [b"408", b"503"]
        over = next(answer for answer in answers if b" 503 " in answer[:20])
        assert b'"unverified_bodies_full"' in over
        assert b"retry-after" in over.lower()


def test_a_signed_chunk_upload_without_a_chunk_is_refused(strict: Runner) -> None:
    headers = sign(SECRET, "POST", "/images/load", content_hash="STREAMING-HMAC-SHA256")
    answer = strict.request("POST", "/images/load", b"", headers)
    assert (answer.status, code(answer)) == (401, "invalid_chunk")
