"""The API document: valid OpenAPI 3.1, the same in the repository and from the service, and nothing left out of it.

That it says what the service does is for `test_schemathesis.py`.
"""

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

import admission
import errors
import openapi
import operations
import workloads
from client import sign
from service import ROOT, Runner
from wire import Reply, Wire, refused, target

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
OPERATIONS = {
    (method.upper(), path): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
SIGNED = [key for key in OPERATIONS if key[1].encode() not in admission.UNSIGNED_PATHS]


def answers(operation: Any) -> dict[str, Any]:
    """The answers of an operation by status, those that it has in common with others in their place."""
    shared = DOCUMENT["components"]["responses"]
    return {
        status: shared[answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer
        for status, answer in operation["responses"].items()
    }


def codes(answer: Any) -> list[str]:
    """The error codes that an answer may have."""
    _, narrowed = answer["content"]["application/json"]["schema"]["allOf"]
    found: list[str] = narrowed["properties"]["error"]["properties"]["code"]["enum"]
    return found


def test_it_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_the_copy_in_the_repository_is_what_is_generated() -> None:
    """To make it again: `docker-runner openapi > docs/openapi.json`."""
    assert (ROOT / "docs/openapi.json").read_bytes() == openapi.document()


def test_the_service_serves_it(runner: Runner) -> None:
    answer = runner.request("GET", openapi.PATH)
    assert answer.status == 200
    assert answer.header("content-type") == "application/json"
    assert answer.body == openapi.document()


def test_it_is_signed_like_the_rest(wire: Wire) -> None:
    refused(wire.request("GET", openapi.PATH, sign=False), 401, "missing_headers")


def test_a_wrong_method_on_it(wire: Wire) -> None:
    reply = wire.request("POST", openapi.PATH)
    refused(reply, 405, "method_not_allowed")
    assert "GET" in (reply.header("allow") or "")


def test_the_command_prints_it(tmp_path: Any) -> None:
    done = subprocess.run([sys.executable, ROOT / "runner.py", "openapi"], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, openapi.document(), b"")


def test_the_service_starts_without_it() -> None:
    code = "import runner, runner_face, sys; assert 'openapi' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


GET_PATHS = [path for method, path in OPERATIONS if method == "GET"]


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_is_answered_where_get_is_and_the_connection_goes_on(wire: Wire, box: str, path: str) -> None:
    where = target(path, {"containerId": box, "volumeName": "none"})
    with wire.connect() as connection:
        expected = answers(OPERATIONS["GET", path])
        for _ in range(2):
            connection.send(wire.head("HEAD", where, wire.sign("HEAD", where)))
            reply = Reply(connection, "HEAD")
            assert str(reply.status) in expected
            assert reply.header("content-type") in expected[str(reply.status)]["content"]


def test_every_route_is_in_it_and_nothing_else() -> None:
    routes = {(method, path) for method, path, *_ in workloads.ROUTES}
    unsigned = {("GET", path.decode()) for path in admission.UNSIGNED_PATHS}
    assert set(OPERATIONS) == routes | unsigned | {("GET", openapi.PATH)}


def test_every_operation_has_an_id_of_its_own_and_a_summary() -> None:
    ids = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] for operation in OPERATIONS.values())


def test_the_exempt_paths_need_no_signature_and_all_others_do() -> None:
    exempt = {path for (_, path), operation in OPERATIONS.items() if operation.get("security") == []}
    assert exempt == {path.decode() for path in admission.UNSIGNED_PATHS}
    assert all("security" not in OPERATIONS[key] for key in SIGNED)


def test_the_signature_is_the_headers_that_the_client_sends() -> None:
    schemes = DOCUMENT["components"]["securitySchemes"]
    assert DOCUMENT["security"] == [{name: [] for name in schemes}]
    assert {scheme["name"] for scheme in schemes.values()} == set(sign("secret", "GET", "/"))
    assert {(scheme["type"], scheme["in"]) for scheme in schemes.values()} == {("apiKey", "header")}


@pytest.mark.parametrize(("method", "path", "struct"), [row[:3] for row in workloads.ROUTES])
def test_a_route_asks_for_what_its_struct_holds(method: str, path: str, struct: type[msgspec.Struct]) -> None:
    operation = OPERATIONS[method, path]
    if method == "POST":
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]
        documented = {name: name in schema["required"] for name in schema["properties"]}
    else:
        parameters = [parameter for parameter in operation["parameters"] if parameter["in"] == "query"]
        documented = {parameter["name"]: parameter["required"] for parameter in parameters}
    asked = workloads.Interactive if path == workloads.INTERACTIVE else struct
    assert documented == {field.encode_name: field.required for field in msgspec.structs.fields(asked)}


def test_every_error_code_is_in_it_with_its_status_its_meaning_and_whether_to_retry() -> None:
    schema = DOCUMENT["components"]["schemas"]["ErrorCode"]
    assert schema["enum"] == list(errors.CODES)
    assert schema["x-codes"] == {name: msgspec.structs.asdict(code) for name, code in errors.CODES.items()}


def test_every_error_code_is_an_answer_of_some_route_or_known_to_be_none() -> None:
    documented = {
        code
        for operation in OPERATIONS.values()
        for status, answer in answers(operation).items()
        if status[0] in "45"
        for code in codes(answer)
    }
    assert documented | set(openapi.NOT_OF_ROUTES) == set(errors.CODES)
    assert not documented & set(openapi.NOT_OF_ROUTES)


@pytest.mark.parametrize(("method", "path", "fallback"), [(*row[:2], row[4].fallback) for row in workloads.ROUTES])
def test_a_route_may_fail_as_its_row_says(method: str, path: str, fallback: str) -> None:
    told = answers(OPERATIONS[method, path])
    if path == workloads.INTERACTIVE:
        assert codes(told["426"]) == ["upgrade_required"]  # What fails after the upgrade is told in its frames.
    else:
        assert fallback in codes(told["502"])
        assert codes(told["4XX"]) == [fallback]
        assert "engine_refused" in codes(told["503"])


def test_a_stream_of_events_says_how_it_is_framed() -> None:
    streams = {path for (_, path), operation in OPERATIONS.items() if "text/event-stream" in str(operation)}
    assert streams == {"/v1/images/ensure", "/v1/containers/logs/sse", "/v1/events/sse"}
    for (_, path), operation in OPERATIONS.items():
        if path in streams:
            assert "`data: {JSON}`" in operation["responses"]["200"]["description"]


def test_the_websocket_says_which_frames_there_are() -> None:
    words = OPERATIONS["GET", workloads.INTERACTIVE]["responses"]["101"]["description"]
    for kind in ("ready", "stdout", "stderr", "exit", "error", "stdin", "eof", "close", "resize"):
        assert f'{{"type":"{kind}"' in words


def test_the_engine_face_is_listed_by_operation_id_with_the_engines_own_document() -> None:
    listed = {row["operationId"]: (row["method"], row["path"]) for row in DOCUMENT["x-engine-operations"]}
    assert listed == {each.id: (each.method, each.template) for each in operations.OPERATIONS}
    upgraded = {row["operationId"] for row in DOCUMENT["x-engine-operations"] if "websocket" in row}
    assert upgraded == {each.id for each in operations.OPERATIONS if each.kind is operations.Kind.HIJACK}
    assert DOCUMENT["externalDocs"]["url"].startswith("https://docs.docker.com/")
