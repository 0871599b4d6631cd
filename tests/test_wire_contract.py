"""The wire protocol as WIRE.md states it, section by section: here 2, signature, and 3, errors.

Raw HTTP only (`wire.py`); `DOCKER_RUNNER_WIRE_URL` and `DOCKER_RUNNER_WIRE_SECRET` point it at another implementation
in front of the same engine. Section 4 goes on in the other `test_wire_*.py`.
"""

import hashlib
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from conftest import Names, free_port
from wire import GETS, INTERACTIVE, POSTS, Reply, Wire, b64, compact, done, refused, target

# 2. Signature


@pytest.mark.parametrize(("path", "body"), [("/v1/health", b'{"status":"ok"}'), ("/v1/ready", b'{"status":"ready"}')])
def test_two_paths_are_unsigned(wire: Wire, path: str, body: bytes) -> None:
    for given in (path, f"{path}?a=b"):
        reply = wire.request("GET", given, sign=False)
        assert (reply.status, reply.body, reply.header("content-type")) == (200, body, "application/json")
        assert wire.request("HEAD", given, sign=False).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/health"),
        ("GET", "/v1/health/"),
        ("GET", "/v1//health"),
        ("GET", "/v1/healt%68"),
        ("GET", "/v1/x/../health"),
        ("GET", "/v1/no-such-route"),
        ("DELETE", "/v1/containers/inspect"),
        *(("POST", path) for path in POSTS),
        *(("GET", path) for path in [*GETS, INTERACTIVE]),
    ],
)
def test_everything_else_tells_strangers_nothing(wire: Wire, method: str, path: str) -> None:
    message = refused(wire.request(method, path, b"{", sign=False), 401, "missing_headers")
    assert message == wire.request("GET", "/v1/another", sign=False).json["message"]


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", ["X-DR-Timestamp", "X-DR-Nonce", "X-DR-Signature"])
def test_all_three_headers_are_required(wire: Wire, name: str, value: str | None) -> None:
    reply = wire.request("GET", "/v1/containers/inspect", headers={name: value})
    refused(reply, 401, "missing_headers")


@pytest.mark.parametrize("timestamp", ["now", "1.5", "-1", "0x10", "1e12", "12 34"])
def test_a_timestamp_is_decimal_digits(wire: Wire, timestamp: str) -> None:
    headers = wire.sign("GET", "/v1/events/sse", timestamp=timestamp)
    refused(wire.request("GET", "/v1/events/sse", headers=headers), 401, "invalid_timestamp")


@pytest.mark.parametrize("ahead_ms", [-61_000, 61_000, -(10**12)])
def test_a_timestamp_is_at_most_a_minute_off(wire: Wire, ahead_ms: int) -> None:
    timestamp = str(time.time_ns() // 1_000_000 + ahead_ms)
    headers = wire.sign("GET", "/v1/events/sse", timestamp=timestamp)
    refused(wire.request("GET", "/v1/events/sse", headers=headers), 401, "timestamp_out_of_range")


def test_a_clock_that_runs_half_a_minute_ahead_is_accepted(wire: Wire, box: str) -> None:
    where = target("/v1/containers/labels", {"containerId": box})
    headers = wire.sign("GET", where, timestamp=str(time.time_ns() // 1_000_000 + 30_000))
    assert wire.request("GET", where, headers=headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        lambda wire: Wire(f"http://{wire.host}:{wire.port}", "wrong").sign("POST", "/v1/containers/touch", b"{}"),
        lambda wire: wire.sign("PUT", "/v1/containers/touch", b"{}"),
        lambda wire: wire.sign("POST", "/v1/containers/touch?", b"{}"),
        lambda wire: wire.sign("POST", "/v1/containers/Touch", b"{}"),
        lambda wire: wire.sign("POST", "/v1/containers/touch", b"{ }"),
        lambda wire: wire.sign("POST", "/v1/containers/touch"),
        lambda wire: {**wire.sign("POST", "/v1/containers/touch", b"{}"), "X-DR-Nonce": "another"},
        lambda wire: {**wire.sign("POST", "/v1/containers/touch", b"{}"), "X-DR-Signature": "AAAA"},
    ],
    ids=["secret", "method", "query", "case", "body", "no body", "nonce", "garbage"],
)
def test_a_signature_that_does_not_match(wire: Wire, headers: Callable[[Wire], dict[str, str]]) -> None:
    reply = wire.request("POST", "/v1/containers/touch", b"{}", headers(wire))
    refused(reply, 401, "invalid_signature")
    assert reply.json["error"]["details"]["string_to_sign"].startswith("POST\\n/v1/containers/touch\\n")


@pytest.mark.parametrize("query", ["containerId={}&", "&containerId={}", "containerId=%{:02x}{}&&x=a+b%2fc%2F~'()*!"])
def test_the_target_is_signed_byte_for_byte(wire: Wire, box: str, query: str) -> None:
    given = query.format(ord(box[0]), box[1:]) if "02x" in query else query.format(box)
    assert wire.request("GET", f"/v1/containers/labels?{given}").status == 200


def test_the_body_is_signed_as_its_raw_bytes(wire: Wire, box: str) -> None:
    done(wire.request("POST", "/v1/containers/touch", b'\n{ "z" : 1.0, "containerId":\t"%b" }\r\n' % box.encode()))


def test_a_nonce_is_used_once(wire: Wire, box: str) -> None:
    where = target("/v1/containers/labels", {"containerId": box})
    headers = wire.sign("GET", where)
    assert wire.request("GET", where, headers=headers).status == 200
    refused(wire.request("GET", where, headers=headers), 401, "replayed_nonce")


def test_an_error_that_is_not_retryable_keeps_the_nonce(wire: Wire) -> None:
    headers = wire.sign("GET", "/v1/containers/labels?containerId=missing")
    where = "/v1/containers/labels?containerId=missing"
    refused(wire.request("GET", where, headers=headers), 404, "no_such_container")
    refused(wire.request("GET", where, headers=headers), 401, "replayed_nonce")


def test_a_retryable_error_releases_the_nonce(wire: Wire) -> None:
    body = compact({"image": f"127.0.0.1:{free_port()}/nothing"})
    headers = wire.sign("POST", "/v1/images/ensure", body)
    for _ in range(3):
        reply = wire.request("POST", "/v1/images/ensure", body, headers)
        refused(reply, reply.status, "server_error", retryable=True)


def test_the_signature_is_checked_before_the_nonce(wire: Wire, box: str) -> None:
    where, nonce = target("/v1/containers/labels", {"containerId": box}), str(uuid.uuid4())
    for _ in range(2):
        wrong = {**wire.sign("GET", where, nonce=nonce), "X-DR-Signature": "AAAA"}
        refused(wire.request("GET", where, headers=wrong), 401, "invalid_signature")
    assert wire.request("GET", where, headers=wire.sign("GET", where, nonce=nonce)).status == 200


@pytest.mark.parametrize("nonce", ["x" * 129, "a b", "\xe4"])
def test_a_nonce_is_1_to_128_visible_characters(wire: Wire, nonce: str) -> None:
    headers = {**wire.sign("GET", "/v1/events/sse"), "X-DR-Nonce": nonce}
    refused(wire.request("GET", "/v1/events/sse", headers=headers), 401, "invalid_nonce")


def test_a_header_given_twice(wire: Wire) -> None:
    headers = wire.sign("GET", "/v1/events/sse")
    reply = wire.request("GET", "/v1/events/sse", headers={**headers, "x-dr-nonce": headers["X-DR-Nonce"]})
    refused(reply, 401, "duplicate_headers")


def test_the_hash_of_the_body_up_front(wire: Wire, box: str) -> None:
    body = compact({"containerId": box})
    digest = b64(hashlib.sha256(body).digest())
    headers = {**wire.sign("POST", "/v1/containers/touch", body), "X-DR-Content-SHA256": digest}
    done(wire.request("POST", "/v1/containers/touch", body, headers))
    headers = {**wire.sign("POST", "/v1/containers/touch", body), "X-DR-Content-SHA256": digest}
    other = body.replace(b":", b": ")[: len(body)]
    refused(wire.request("POST", "/v1/containers/touch", other, headers), 401, "body_hash_mismatch")


@pytest.mark.parametrize(
    ("drop", "status", "code"), [("X-DR-Signature", 401, "missing_headers"), ("", 413, "body_too_large")]
)
def test_what_the_headers_show_is_refused_before_the_body_is_sent(
    wire: Wire, drop: str, status: int, code: str
) -> None:
    headers = {**wire.sign("POST", "/v1/containers/touch", b"x"), "Content-Length": str(1 << 40)}
    headers |= {"Expect": "100-continue"}
    headers.pop(drop, None)
    with wire.connect() as connection:
        connection.send(wire.head("POST", "/v1/containers/touch", headers))
        reply = Reply(connection, "POST").finish()
    assert reply.header("connection") == "close"
    refused(reply, status, code)


def test_continue_is_said_once_the_headers_are_verified(wire: Wire, box: str) -> None:
    body = compact({"containerId": box})
    fields = {"Content-Length": str(len(body)), "Content-Type": "application/json", "Expect": "100-continue"}
    with wire.connect() as connection:
        headers = {**wire.sign("POST", "/v1/containers/touch", body), **fields, "Connection": "close"}
        connection.send(wire.head("POST", "/v1/containers/touch", headers))
        assert Reply(connection, "POST").status == 100
        connection.send(body)
        done(Reply(connection, "POST").finish())


# 3. Errors


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nothing", "/v1/containers", "/v1/Containers/inspect", "/v1/exec"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_route(wire: Wire, method: str, path: str) -> None:
    refused(wire.request(method, path), 404, "not_found")


@pytest.mark.parametrize("path", [*POSTS, *GETS, INTERACTIVE])
def test_a_slash_at_the_end_is_another_route(wire: Wire, path: str) -> None:
    refused(wire.request("POST" if path in POSTS else "GET", path + "/"), 404, "not_found")


@pytest.mark.parametrize("path", [*POSTS, *GETS, INTERACTIVE])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_wrong_method(wire: Wire, method: str, path: str) -> None:
    right = "POST" if path in POSTS else "GET"
    if method != right:
        reply = wire.request(method, path)
        refused(reply, 405, "method_not_allowed")
        assert right in (reply.header("allow") or "").split(", ")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_of_another_media_type(wire: Wire, path: str) -> None:
    body = compact(POSTS[path])
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", None):
        headers = {"Content-Type": media_type}
        refused(wire.request("POST", path, body, headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_with_parameters_is_json(wire: Wire, box: str, media_type: str) -> None:
    body = compact({"containerId": box})
    done(wire.request("POST", "/v1/containers/touch", body, {"Content-Type": media_type}))


@pytest.mark.parametrize("path", POSTS)
def test_malformed_json(wire: Wire, path: str) -> None:
    for body in (b"{", b"nonsense", b"{'a':1}", b"\xef\xbb\xbf", b'{"image":NaN}'):
        refused(wire.request("POST", path, body), 400, "invalid_json")


@pytest.mark.parametrize("body", [b'{"containerId":"x"}{}', b'{"containerId":"x\xff"}', b'{"containerId":"\\ud800"}'])
def test_json_is_one_document_of_unicode(wire: Wire, body: bytes) -> None:
    refused(wire.request("POST", "/v1/containers/touch", body), 400, "invalid_json")


@pytest.mark.parametrize("path", POSTS)
def test_json_that_is_no_object(wire: Wire, path: str) -> None:
    for body in (b"[]", b"null", b'"x"', b"1"):
        refused(wire.request("POST", path, body), 400, "validation_error")


@pytest.mark.parametrize("path", ["/v1/containers/touch", "/v1/containers/start"])
def test_json_without_a_bottom(wire: Wire, path: str) -> None:
    body = b'{"createExtras":' + b"[" * 200_000
    assert wire.request("POST", path, body).status == 400
    body = b'{"containerId":"x","createExtras":{"a":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_002
    assert wire.request("POST", path, body).status in (400, 404)


@pytest.mark.parametrize("path", POSTS)
def test_every_required_field_is_required(wire: Wire, path: str) -> None:
    if path == "/v1/containers/start":
        return  # It has none.
    good = POSTS[path]
    message = refused(wire.request("POST", path), 400, "validation_error")
    assert next(iter(good)) in message
    for name in good:
        rest = {other: value for other, value in good.items() if other != name}
        assert name in refused(wire.post(path, **rest), 400, "validation_error")
        wrong: list[Any] = [None, [], 7, True, 1.5, *([""] if name != "payloadBase64" else [])]
        for value in wrong:
            assert name in refused(wire.post(path, **{**good, name: value}), 400, "validation_error")


WRONG_FIELDS: list[tuple[str, str, list[Any]]] = [
    ("/v1/images/ensure", "platform", [None, 1, []]),
    ("/v1/images/ensure", "auth", [None, 1, [], "x"]),
    *(("/v1/containers/start", name, [None, 1, []]) for name in ("name", "entrypoint", "workingDir", "networkMode")),
    ("/v1/containers/start", "image", [None, 1, []]),
    ("/v1/containers/start", "platform", [None, 1, []]),
    ("/v1/containers/start", "cmd", [None, "sh", 1, [1], {}]),
    ("/v1/containers/start", "env", [None, "A=B", 1, [1], {"A": 1}, {"A": None}]),
    ("/v1/containers/start", "binds", [None, "a:b", [1], {}]),
    ("/v1/containers/start", "anonymousVolumes", [None, "/a", [1], {}]),
    ("/v1/containers/start", "labels", [None, "a", [], {"a": 1}]),
    ("/v1/containers/start", "createExtras", [None, "a", []]),
    *(("/v1/containers/start", name, [None, "true", 1, 0, []]) for name in ("autoRemove", "tty", "privileged")),
    ("/v1/containers/start", "ttlSeconds", [None, 0, -1, 1.5, "60", True]),
    ("/v1/containers/stop", "timeoutSec", [None, -1, 1.5, "1", True]),
    ("/v1/containers/remove", "force", [None, "true", 1]),
    ("/v1/containers/remove", "removeVolumes", [None, "true", 1]),
    ("/v1/containers/findByLabels", "labels", [{}, {"a": 1}, {"a": None}]),
    ("/v1/containers/findByLabels", "all", [None, "true", 1]),
    ("/v1/volumes/remove", "force", [None, "true", 1]),
    ("/v1/containers/putArchive", "payloadBase64", ["%%%", "YQ", "YQ=", "YWJ\n", "a-_b", "Y\xe4=="]),
    ("/v1/exec/run", "command", [[], [1], {}, ""]),
    ("/v1/exec/run", "options", [None, [], "x"]),
    ("/v1/exec/run", "options.workdir", [None, 1]),
    ("/v1/exec/run", "options.env", [None, "A=B", {"A": 1}, [1]]),
    *(("/v1/exec/run", f"options.{name}", [None, -1, 1.5, "1", True]) for name in ("timeoutMs", "idleTimeoutMs")),
    *(("/v1/exec/run", f"options.{n}", [None, "true", 1]) for n in ("tty", "killOnTimeout", "logToPid1")),
    ("/v1/exec/resize", "size", [{}, {"cols": 1}, {"rows": 1}]),
    *(("/v1/exec/resize", f"size.{name}", [None, 0, -1, 1.5, "80", True]) for name in ("cols", "rows")),
]


@pytest.mark.parametrize(("path", "field", "values"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_nothing_is_coerced(wire: Wire, path: str, field: str, values: list[Any]) -> None:
    outer, _, inner = field.partition(".")
    for value in values:
        wrong = {**POSTS[path].get(outer, {}), inner: value} if inner else value
        message = refused(wire.post(path, **{**POSTS[path], outer: wrong}), 400, "validation_error")
        assert (inner or outer) in message or outer in message


@pytest.mark.parametrize("path", [path for path, query in GETS.items() if query])
def test_every_required_parameter_is_required_once(wire: Wire, path: str) -> None:
    name = next(iter(GETS[path]))
    for query in ("", "?", f"?{name}=", f"?{name}", f"?{name.upper()}=x", f"?{name}=x&{name}=x", f"?{name}=%ff"):
        message = refused(wire.request("GET", path + query), 400, "validation_error")
        assert name in message or "%ff" in query


def test_any_parameter_given_twice_is_refused(wire: Wire, box: str) -> None:
    for extra in ("tail=1&tail=2", "follow=0&follow=0", "since=0&since=0", "x=1&x=1"):
        reply = wire.request("GET", f"/v1/containers/logs/sse?containerId={box}&follow=0&{extra}")
        refused(reply, 400, "validation_error")


@pytest.mark.parametrize("name", ["follow", "stdout", "stderr", "timestamps"])
def test_booleans_of_a_query(wire: Wire, box: str, name: str) -> None:
    for value in ("yes", "", "TRUE", "False", "2", "on", "null", "01"):
        query = {"containerId": box, "follow": "0", name: value}
        assert name in refused(wire.get("/v1/containers/logs/sse", **query), 400, "validation_error")
    for value in ("true", "false", "1", "0"):
        query = {"containerId": box, "follow": "0", name: value}
        with wire.open("GET", target("/v1/containers/logs/sse", query)) as reply:
            assert reply.status == 200


def test_unknown_fields_and_parameters_are_ignored(wire: Wire, box: str) -> None:
    done(wire.post("/v1/containers/touch", containerId=box, unknown={"a": [None, 1.5]}, image=7))
    assert wire.get("/v1/containers/labels", containerId=box, unknown="x").status == 200


def test_unknown_fields_of_start_are_refused(wire: Wire, image: str, names: Names) -> None:
    name = names("never")
    reply = wire.post("/v1/containers/start", image=image, name=name, networkmode="none")
    assert "networkmode" in refused(reply, 400, "validation_error")
    refused(wire.get("/v1/containers/inspect", containerId=name), 404, "no_such_container")


@pytest.mark.parametrize("number", [10**30, 10**400])
def test_numbers_beyond_all_bounds_are_the_callers_error(wire: Wire, box: str, number: int) -> None:
    limits = {"timeoutMs": number}
    refused(wire.post("/v1/exec/run", containerId=box, command="true", options=limits), 400, "validation_error")
    limits = {"idleTimeoutMs": number}
    refused(wire.post("/v1/exec/run", containerId=box, command="true", options=limits), 400, "validation_error")
    assert wire.post("/v1/exec/resize", execId="x", size={"cols": number, "rows": 1}).status == 400


def test_the_size_of_a_target(wire: Wire, box: str) -> None:
    where = target("/v1/containers/labels", {"containerId": box, "x": ""})
    assert wire.request("GET", where + "x" * (65_535 - len(where))).status == 200
    assert wire.request("GET", where + "x" * (65_536 - len(where))).status == 414
