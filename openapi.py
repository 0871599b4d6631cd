"""The API document, OpenAPI 3.1, made of what the service itself runs on: the structs of its requests and answers, the
routes, the error codes, the engine's operations. Pure; `docs/openapi.json` is a copy.

What a route may answer is worked out from its row in `ROUTES`. The engine face stands in it by operation id only
(`x-engine-operations`): its requests and answers are the engine's, and so is their document.
"""

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

import containers
import execs
import workloads
from calls import Operation, Thing
from client import __version__
from errors import CODES
from operations import OPERATIONS, Kind

Json = dict[str, Any]

PATH = "/v1/openapi.json"
ENGINE_DOCUMENT = "https://docs.docker.com/reference/api/engine/"

# Error codes by where they come from; those of one route are in its row of `ROUTES`, or in `OF_ROUTE`.

ANYWHERE = (
    *("bad_request", "pipelining_refused", "request_timeout", "body_too_large", "target_too_long"),
    *("headers_too_large", "too_many_connections", "shutting_down", "internal_error"),
)
SIGNED = (
    *("missing_headers", "duplicate_headers", "invalid_timestamp", "timestamp_out_of_range", "invalid_nonce"),
    *("invalid_signature", "replayed_nonce", "body_hash_mismatch", "invalid_chunk"),
    *("nonce_store_full", "unverified_bodies_full", "spool_failed", "too_many_requests", "too_many_streams"),
)
WITH_BODY = ("invalid_json", "unsupported_media_type")
ASKING_THE_ENGINE = (
    *("policy_denied", "ambiguous_body", "bad_parameter", "server_error"),
    *("engine_socket_missing", "engine_refused", "engine_permission_denied", "engine_connect_timeout"),
    *("engine_busy", "engine_timeout", "engine_cut_head", "engine_cut_body", "engine_garbage"),
)
OF_ROUTE: Mapping[str, tuple[str, ...]] = {
    "/v1/ready": ("docker_unavailable",),
    "/v1/containers/start": ("no_such_image", "no_such_network", "image_ensure_failed"),
    "/v1/exec/run": ("exec_timeout", "exec_idle_timeout", "output_too_large"),
    workloads.INTERACTIVE: ("upgrade_required",),
}
NOT_OF_ROUTES = (
    *("not_found", "method_not_allowed", "upgrade_unsupported", "invalid_path", "ambiguous_query"),
    *("foreign_origin", "runner_unreachable", "runner_cut"),
)
"""For what is no route, for the engine face, and for the bridge."""

ENGINES_STATUS = {
    **{f"no_such_{thing.name.lower()}": "404" for thing in Thing},
    "conflict": "409",
    "container_stopped_paused": "409",
    "bad_parameter": "400",
    "server_error": "5XX",
}
"""The status of the codes that come with the engine's own."""

# What a route answers if all is well.

EMPTY: Json = {"204": {"description": "Done."}}
ERROR_MESSAGE = '`{"type":"error","message","status","code","retryable"}`'


def _json(schema: Json, description: str = "Done.") -> Json:
    return {"200": {"description": description, "content": {workloads.JSON: {"schema": schema}}}}


def _answer(struct: type[msgspec.Struct]) -> Json:
    return _json({"$ref": f"#/components/schemas/{struct.__name__}"})


def _status(word: str) -> Json:
    return _json({"type": "object", "properties": {"status": {"const": word}}, "required": ["status"]})


def _sse(messages: str) -> Json:
    description = (
        "Server-sent events; the head is sent at once. Each message is one line `data: {JSON}` and an empty line, and "
        "its `type` says what it is. Comment lines (`: ...`) keep a quiet stream alive. Pass over other lines (`id:`) "
        f"and other types. {messages}"
    )
    return {"200": {"description": description, "content": {"text/event-stream": {}}}}


_INTERACTIVE = """\
The WebSocket. Its upgrade is signed as `GET`, its target and an empty body; a refused signature is an HTTP answer. \
Then frames are text, JSON with a `type`.

Server: `{"type":"ready","execId"}` first; `{"type":"stdout","data"}` and `{"type":"stderr","data"}` (base64; with \
`tty`, or `demux=false`, all is `stdout`); `{"type":"exit","execId","exitCode","stdout","stderr"}` last (the last \
256 KiB of each output, base64); `{"type":"error","error","status","code","message","retryable"}`.

Client: `{"type":"stdin","data"}` (base64), or a binary frame; `{"type":"eof"}` or `{"type":"close"}` (no more input: \
wait for the exit); `{"type":"resize","cols","rows"}`. Other types are passed over; what is no JSON gets an error frame.

Closed with 1000 after `exit`; after an error frame with 4000 (`invalid_query`), 1011 (`exec_failed`) or 1012 \
(`shutting_down`); with 1009 if a message is too large."""

SUCCESSES: Mapping[str, Json] = {
    "/v1/images/ensure": EMPTY
    | _sse(
        'Only with `Accept: text/event-stream`: `{"type":"progress","event":ENGINES}` each, then `{"type":"end"}` or '
        f"{ERROR_MESSAGE}. What fails before the first is an HTTP error."
    ),
    "/v1/containers/start": _answer(containers.Started),
    "/v1/containers/stop": EMPTY | {"304": {"description": "It did not run."}},
    "/v1/containers/remove": EMPTY,
    "/v1/containers/inspect": _json({"type": "object"}, f"As of the engine's `ContainerInspect`: {ENGINE_DOCUMENT}"),
    "/v1/containers/labels": _answer(workloads.Labels),
    "/v1/containers/networks": _answer(workloads.Networks),
    "/v1/containers/findByLabels": _answer(workloads.ContainerIds),
    "/v1/containers/listByVolume": _answer(workloads.ContainerIds),
    "/v1/volumes/remove": EMPTY,
    "/v1/containers/touch": EMPTY,
    "/v1/containers/putArchive": EMPTY,
    "/v1/exec/run": _answer(execs.Ran),
    "/v1/exec/resize": EMPTY,
    "/v1/containers/logs/sse": _sse(
        '`{"type":"chunk","data"}`: base64 of the engine\'s stream, without a terminal in whole multiplexed frames; '
        f'`{{"type":"end"}}` at its end, or {ERROR_MESSAGE}.'
    ),
    "/v1/events/sse": _sse(
        f'`{{"type":"event","event":ENGINES}}`: each event once. It has no end but {ERROR_MESSAGE}; a caller that '
        "reads too slowly is cut off. Each event has an `id:` line, and the stream begins with one; `Last-Event-ID` "
        'resumes after it. `{"type":"reconnected","message"}`: the engine was away, and nothing is missing, unless '
        '`{"type":"gap","reason","message"}` follows: events may be missing here, so look at what is there anew.'
    ),
    workloads.INTERACTIVE: {"101": {"description": _INTERACTIVE}},
}

HEADERS: Mapping[str, tuple[Json, ...]] = {
    "/v1/events/sse": (
        {
            "name": "Last-Event-ID",
            "in": "header",
            "description": "The `id` of the last message that was received; goes before `since`. Unknown, it is a gap.",
            "required": False,
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{0,400}$"},
        },
    ),
}

_DESCRIPTION = """\
Task-level operations on a Docker Engine for signed requests (`paths`), and the engine's own API, relayed \
(`x-engine-operations`).

Requests are JSON, decoded strictly: nothing is coerced, `1.0` is no integer, `null` is no absent field, a query key \
stands once. Unknown fields and parameters are ignored but where the schema says otherwise. Success is exactly the \
documented status. HEAD is answered where GET is. An unknown path is 404 `not_found`, another method 405 \
`method_not_allowed` with `Allow`; who has not signed learns neither."""

_SCHEMES = {
    "timestamp": ("X-DR-Timestamp", "Milliseconds since the epoch, in decimal digits, close to the runner's clock."),
    "nonce": (
        "X-DR-Nonce",
        "1 to 128 visible ASCII characters, never used twice (a UUID). An answer with `retryable: true` gives it back: "
        "that request may be repeated as it is.",
    ),
    "signature": (
        "X-DR-Signature",
        "base64(HMAC-SHA256(secret, METHOD \\n TARGET \\n TIMESTAMP \\n NONCE \\n BODYHASH)). METHOD in upper case; "
        "TARGET is path and query, byte for byte as sent; BODYHASH is base64(SHA-256(the body's raw bytes)), of no "
        "bytes if there is none. Optional headers: `X-DR-Content-SHA256`, the BODYHASH up front, so that it is "
        "verified before its body is read; `X-DR-Key`, the name of a named key.",
    ),
}


# Putting it together.


@functools.cache
def document() -> bytes:
    """The document, as it is served and as it stands in `docs/openapi.json`."""
    structs: list[type[msgspec.Struct]] = [row[2] for row in workloads.ROUTES if row[0] == "POST"]
    structs += [containers.Started, execs.Ran, workloads.Labels, workloads.Networks, workloads.ContainerIds]
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    paths = dict(_paths())
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "docker-runner",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "externalDocs": {"description": "The engine's own API", "url": ENGINE_DOCUMENT},
        "servers": [{"url": "/"}],
        "security": [{scheme: [] for scheme in _SCHEMES}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                scheme: {"type": "apiKey", "in": "header", "name": name, "description": description}
                for scheme, (name, description) in _SCHEMES.items()
            },
            "responses": _shared_answers(paths),
            "schemas": {**schemas, **_error_schemas()},
        },
        "x-engine-operations": list(_engine_operations()),
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"


def _paths() -> Iterator[tuple[str, Json]]:
    for path, word, meaning in (
        ("/v1/health", "ok", "Whether the process answers; needs no signature."),
        ("/v1/ready", "ready", "Whether the engine answers, too; needs no signature."),
    ):
        answers = {**_status(word), **_errors((*ANYWHERE, *OF_ROUTE.get(path, ())))}
        yield path, {"get": {**_titles(path, meaning), "security": [], "responses": answers}}
    answers = {**_json({"type": "object"}, "OpenAPI 3.1."), **_errors((*ANYWHERE, *SIGNED))}
    yield PATH, {"get": {**_titles(PATH, "This document."), "responses": answers}}
    for method, path, struct, handler, operation in workloads.ROUTES:
        asked: Json
        codes = [*ANYWHERE, *SIGNED, "validation_error", *OF_ROUTE.get(path, ())]
        if path == workloads.INTERACTIVE:
            asked, answers = {"parameters": _parameters(workloads.Interactive)}, _errors(codes)
        else:
            missing = f"no_such_{operation.thing.name.lower()}"
            codes += [*ASKING_THE_ENGINE, missing, operation.conflict, operation.fallback]
            if method == "POST":
                codes += WITH_BODY
                asked = {"requestBody": _body(struct)}
            else:
                asked = {"parameters": [*_parameters(struct), *HEADERS.get(path, ())]}
            answers = _errors(codes, operation)
        titles = _titles(path, handler.__doc__ or "")
        yield path, {method.lower(): {**titles, **asked, "responses": SUCCESSES[path] | answers}}


def _titles(path: str, meaning: str) -> Json:
    first, *others = path.removesuffix(".json").split("/")[2:]
    return {"operationId": operation_id(path), "summary": meaning, "tags": [first if others else "service"]}


def operation_id(path: str) -> str:
    """The id of a route of the runner face."""
    first, *others = path.removesuffix(".json").split("/")[2:]
    return first + "".join(word[0].upper() + word[1:] for word in others)


def _body(struct: type[msgspec.Struct]) -> Json:
    required = any(field.required for field in msgspec.structs.fields(struct))
    schema = {"$ref": f"#/components/schemas/{struct.__name__}"}
    return {"required": required, "content": {workloads.JSON: {"schema": schema}}}


def _parameters(struct: type[msgspec.Struct]) -> list[Json]:
    """The fields of a query; a boolean is one of four words."""
    _, schemas = msgspec.json.schema_components([struct])
    whole = schemas[struct.__name__]
    parameters = []
    for name, schema in whole["properties"].items():
        if schema.get("type") == "boolean":
            schema = {"enum": ["true", "false", "1", "0"], "default": str(schema["default"]).lower()}
        described = {"description": schema.pop("description")} if "description" in schema else {}
        parameters.append(
            {"name": name, "in": "query", **described, "required": name in whole["required"], "schema": schema}
        )
    return parameters


def _errors(codes: tuple[str, ...] | list[str], operation: Operation | None = None) -> Json:
    """The answers that tell of errors, by status.

    The engine may answer with statuses of its own: those of 5xx are `server_error`; of 4xx, the operation's fallback
    where no other code says more.
    """
    by_status: dict[str, list[str]] = {}
    for code in codes:
        by_status.setdefault(ENGINES_STATUS.get(code) or str(CODES[code].status), []).append(code)
    if operation is not None:
        by_status["4XX"] = []
        for status, those in by_status.items():
            if status[0] == "5" and status != "5XX":
                those.append("server_error")
            elif status in ("401", "403", "404", "4XX"):
                those.append(operation.fallback)
    return {status: _error(status, those) for status, those in sorted(by_status.items())}


def _error(status: str, codes: list[str]) -> Json:
    narrowed = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, narrowed]}
    response: Json = {
        "description": ", ".join(f"`{code}`" for code in codes),
        "content": {workloads.JSON: {"schema": schema}},
    }
    if status in ("429", "503"):
        response["headers"] = {"Retry-After": {"required": True, "schema": {"const": "1"}}}
    return response


def _shared_answers(paths: Json) -> Json:
    """Take the answers that several routes have in common out of them; returns these, by the names put there."""
    all_answers = [operation["responses"] for path in paths.values() for operation in path.values()]
    times = collections.Counter(msgspec.json.encode(answer) for answers in all_answers for answer in answers.values())
    shared: Json = {}
    names: dict[bytes, str] = {}
    for answers in all_answers:
        for status, answer in answers.items():
            encoded = msgspec.json.encode(answer)
            if times[encoded] > 1:
                if encoded not in names:
                    names[encoded] = f"{status}.{sum(name.startswith(status) for name in shared) + 1}"
                    shared[names[encoded]] = answer
                answers[status] = {"$ref": f"#/components/responses/{names[encoded]}"}
    return shared


def _error_schemas() -> Json:
    codes = {name: msgspec.structs.asdict(code) for name, code in CODES.items()}
    error = {
        "code": {"$ref": "#/components/schemas/ErrorCode"},
        "message": {"type": "string"},
        "retryable": {
            "type": "boolean",
            "description": "The same request may succeed later, nothing of this one is left behind.",
        },
        "details": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    inner = {"type": "object", "properties": error, "required": ["code", "message", "retryable"]}
    return {
        "Error": {
            "description": "What the runner refuses or could not do, and what the engine did, as the runner tells it.",
            "type": "object",
            "properties": {"message": {"type": "string"}, "error": inner},
            "required": ["message", "error"],
        },
        "ErrorCode": {
            "description": "`x-codes` says of each its status (0: the engine's own), whether it is retryable if not "
            "told otherwise, and what it means.",
            "type": "string",
            "enum": list(codes),
            "x-codes": codes,
        },
    }


def _engine_operations() -> Iterator[Json]:
    """With or without a version before the path (`/v1.41/...`)."""
    for operation in OPERATIONS:
        row = {"operationId": operation.id, "method": operation.method, "path": operation.template}
        upgraded = {"websocket": "docker-runner.stream.v1"} if operation.kind is Kind.HIJACK else {}
        yield row | upgraded
