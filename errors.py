"""The runner's own errors: one table of codes, one exception, one JSON shape.

What the engine answers is never turned into one of these on the engine face; they say what the *runner* refuses or
could not do. The shape serves both kinds of callers (Docker tools print ``message``, runner clients read ``error``)::

    {"message": "...", "error": {"code": "...", "message": "...", "retryable": false}}

``retryable`` means: the same request may succeed later and nothing of this one is left behind. The verification layer
releases a request's nonce exactly then, so it must never be set where the engine may have seen the request.
"""

from collections.abc import Mapping

import msgspec


class Code(msgspec.Struct, frozen=True):
    """One row of the table: the HTTP status (0: the engine's own), whether the same request may be repeated, and what
    it means."""

    status: int
    retryable: bool
    meaning: str


CODES: Mapping[str, Code] = {
    # The request line, the head, the framing: seen by the server before anything else.
    "bad_request": Code(400, False, "The bytes are not a well-formed HTTP/1.1 request."),
    "pipelining_refused": Code(400, False, "More bytes came after a request before its answer was complete."),
    "request_timeout": Code(408, False, "The head or the body of the request did not arrive in time."),
    "body_too_large": Code(413, False, "The body is longer than `DOCKER_RUNNER_MAX_BODY` or `..._MAX_UPLOAD`."),
    "target_too_long": Code(414, False, "The request target is longer than 65,535 bytes."),
    "headers_too_large": Code(
        431, False, "The head of the request, or its trailers, are over the limit of bytes or of fields."
    ),
    "too_many_connections": Code(503, True, "As many callers as `DOCKER_RUNNER_MAX_CONNECTIONS` are connected."),
    # Verification.
    "missing_headers": Code(401, False, "`X-DR-Timestamp`, `X-DR-Nonce` or `X-DR-Signature` is missing or empty."),
    "duplicate_headers": Code(401, False, "An `X-DR-*` header, `Content-Length` or `Host` stands more than once."),
    "invalid_timestamp": Code(401, False, "`X-DR-Timestamp` is not milliseconds since the epoch in decimal digits."),
    "timestamp_out_of_range": Code(
        401, False, "The timestamp is too far from the runner's clock (retryable: it is older than the process)."
    ),
    "invalid_nonce": Code(401, False, "`X-DR-Nonce` is not 1 to 128 visible ASCII characters."),
    "invalid_signature": Code(401, False, "The signature does not match; `details.string_to_sign` says what counts."),
    "replayed_nonce": Code(401, False, "This nonce was used before."),
    "body_hash_mismatch": Code(401, False, "The body is not the one that `X-DR-Content-SHA256` announced."),
    "invalid_chunk": Code(401, False, "A signed chunk is malformed, missing, out of place, or not what was signed."),
    "nonce_store_full": Code(503, True, "As many nonces as `DOCKER_RUNNER_MAX_NONCES` are held; none is forgotten."),
    "unverified_bodies_full": Code(503, True, "Bodies not yet verified reached `DOCKER_RUNNER_MAX_UNVERIFIED`."),
    "spool_failed": Code(503, True, "A long body could not be kept in a temporary file (disk full?)."),
    # How much is served at once.
    "too_many_requests": Code(429, True, "As many requests as `DOCKER_RUNNER_MAX_REQUESTS` are being served."),
    "too_many_streams": Code(429, True, "As many streams as `DOCKER_RUNNER_MAX_STREAMS` are open."),
    # Choosing the operation.
    "invalid_path": Code(400, False, "The path holds a dot segment, an encoded slash, or a byte that no name has."),
    "not_found": Code(404, False, "No such route, or not among the curated operations."),
    "method_not_allowed": Code(405, False, "The path exists with other methods (see `Allow`)."),
    "ambiguous_body": Code(400, False, "The engine could read the body otherwise than the policy does."),
    "ambiguous_query": Code(400, False, "The engine could read the query otherwise than the policy does."),
    "policy_denied": Code(
        403, False, "The policy (`DOCKER_RUNNER_POLICY`) does not allow this; the message names the rule."
    ),
    "upgrade_unsupported": Code(400, False, "A WebSocket where the operation has none, or of another subprotocol."),
    # The runner face: the request.
    "invalid_json": Code(400, False, "The body is not JSON."),
    "validation_error": Code(400, False, "A field or query parameter is missing or wrong; the message names it."),
    "unsupported_media_type": Code(415, False, "The body is of another media type than JSON."),
    "upgrade_required": Code(426, False, "This is served as a WebSocket (attach and exec: their upgraded form)."),
    # The runner face: what the engine answered, by cause.
    "no_such_container": Code(0, False, "The engine does not know the container."),
    "no_such_exec": Code(0, False, "The engine does not know the exec."),
    "no_such_image": Code(0, False, "Neither the engine nor the registry knows the image."),
    "no_such_volume": Code(0, False, "The engine does not know the volume."),
    "no_such_network": Code(0, False, "The engine does not know the network."),
    "conflict": Code(0, False, "A name or a volume is in use, or the container's state forbids it."),
    "container_stopped_paused": Code(0, False, "An exec in a container that is stopped or paused."),
    "bad_parameter": Code(0, False, "The engine refuses a parameter."),
    "server_error": Code(0, False, "The engine failed (retryable: an ensure, or a start that was cleaned up)."),
    # The runner face: the fallbacks of its operations.
    "image_ensure_failed": Code(502, True, "The pull failed in the midst of its progress."),
    "start_failed": Code(502, True, "The container could not be started; it was removed again."),
    "stop_failed": Code(502, False, "The container could not be stopped."),
    "remove_failed": Code(502, False, "The container could not be removed."),
    "inspect_failed": Code(502, False, "The container could not be inspected."),
    "labels_failed": Code(502, False, "The container's labels could not be read."),
    "networks_failed": Code(502, False, "The container's networks could not be read."),
    "find_failed": Code(502, False, "The containers could not be searched."),
    "list_volume_failed": Code(502, False, "The containers of a volume could not be listed."),
    "volume_remove_failed": Code(502, False, "The volume could not be removed."),
    "touch_failed": Code(502, False, "The container could not be marked as used."),
    "put_archive_failed": Code(502, False, "The archive could not be unpacked in the container."),
    "exec_failed": Code(502, False, "The command could not be run, or what became of it is not known."),
    "exec_timeout": Code(
        504, False, "The command ran longer than `timeoutMs`, and was ended; `details` holds its output so far."
    ),
    "exec_idle_timeout": Code(
        504, False, "The command was silent for `idleTimeoutMs`, and was ended; `details` holds its output so far."
    ),
    "output_too_large": Code(413, False, "The command's output passed `DOCKER_RUNNER_MAX_OUTPUT`; it was ended."),
    "resize_failed": Code(502, False, "The terminal could not be resized."),
    "logs_failed": Code(502, False, "The log could not be read."),
    "events_failed": Code(502, False, "The events could not be read."),
    # The engine.
    "docker_unavailable": Code(503, True, "`/v1/ready`: the engine does not answer a ping."),
    "engine_socket_missing": Code(
        503, True, "There is no socket at the engine's address: not running, or a wrong path."
    ),
    "engine_refused": Code(503, True, "Nothing listens on the engine's socket."),
    "engine_permission_denied": Code(503, True, "The runner's user may not open the engine's socket."),
    "engine_connect_timeout": Code(503, True, "The engine did not accept a connection in time."),
    "engine_busy": Code(503, True, "All connections to the engine were in use for too long, or no file was left."),
    "engine_timeout": Code(504, False, "The engine began no answer in time; the operation may have happened."),
    "engine_cut_head": Code(502, False, "The engine closed the connection before its answer; it may have happened."),
    "engine_cut_body": Code(502, False, "The engine's answer broke off; the operation may have happened."),
    "engine_garbage": Code(502, False, "What the engine sent is not HTTP; the operation may have happened."),
    # The bridge.
    "foreign_origin": Code(403, False, "Bridge on TCP: a browser, or a `Host` other than loopback, asks."),
    "runner_unreachable": Code(503, True, "Bridge: there is no way to the runner."),
    "runner_cut": Code(502, False, "Bridge: the runner's answer did not come; the operation may have happened."),
    # The runner itself.
    "shutting_down": Code(503, True, "The runner is ending and takes no new requests."),
    "internal_error": Code(500, False, "A defect of the runner; its log says more."),
}


class RunnerError(Exception):
    """A refusal or failure of the runner's own, rendered once, by the outermost layer.

    Args:
        code: a key of `CODES`; gives the status and `retryable` unless overridden.
        message: one sentence for a person; never a secret or a body.
        status: the engine's, where the table has 0, or where one code has several.
        retryable: overrides the table where one code has both cases.
        details: what a machine may want beside the message (`error.details`).
        headers: extra response headers, such as `Allow` or `Retry-After`.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        retryable: bool | None = None,
        details: Mapping[str, str] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        row = CODES[code]
        self.code = code
        self.message = message
        self.status = row.status if status is None else status
        self.retryable = row.retryable if retryable is None else retryable
        self.details = details
        self.headers = headers
        if self.status in (429, 503) and not any(name == b"retry-after" for name, _ in headers):
            self.headers = (*headers, (b"retry-after", b"1"))

    def body(self) -> bytes:
        """The JSON of this error, as both faces send it."""
        error: dict[str, object] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        if self.details:
            error["details"] = self.details
        return msgspec.json.encode({"message": self.message, "error": error})

    def response(self) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body of the answer that tells of this error."""
        body = self.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self.headers]
        return self.status, headers, body
