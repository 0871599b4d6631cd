"""The ASGI layer that lets nothing unverified through, and what it hands on: `Request`, the verified request.

It finds the signature's headers, gathers the body within bounds, asks the verifier, and answers every `RunnerError`
that comes from further in, in one place. What the headers alone can refuse is refused before a byte of the body is
read. A nonce goes back exactly when the answer says `retryable`, before that answer's first byte.
"""

import asyncio
import base64
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from auth import STREAMING, Credentials, Headers, Verifier, read_credentials
from bodies import NO_BODY, Body, Budget, SignedChunks, too_large
from client import EMPTY_BODY_HASH
from errors import RunnerError
from streams import SignedChunkReader

log = logging.getLogger("docker_runner.admission")

UNSIGNED_PATHS = (b"/v1/health", b"/v1/ready")


class Connection(Protocol):
    """What the server knows of a caller and ASGI cannot say; `server.py` puts it into `scope["docker_runner"]`."""

    target: bytes
    """The request target, byte for byte as it stood in the request line."""
    disconnected: bool
    """The caller has gone."""
    response_started: bool
    """The head of the answer was given to the server."""

    def abort(self) -> None:
        """Close the connection so that the caller cannot take what it has got for a complete answer."""

    def on_disconnect(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the caller goes (at once, if it has gone)."""

    def on_drain(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the service begins to shut down (at once, if it has)."""


class Request:
    """A verified request: the only thing the layers behind this one look at."""

    __slots__ = ("body", "connection", "give_back", "headers", "key", "method", "target")

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        body: Body | SignedChunks,
        key: str | None,
        connection: Connection,
        give_back: Callable[[], None],
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.key = key
        self.connection = connection
        self.give_back = give_back
        """Release the nonce: for a retryable failure that is told after the answer has begun (a WebSocket's)."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds on request bodies, in bytes and seconds."""

    max_body: int
    max_upload: int
    max_unverified: int
    body_timeout_s: float


class Authentication:
    """The outermost ASGI layer: lets nothing unverified through, and answers every `RunnerError` from further in.

    Behind it `scope["docker_runner.request"]` is the verified `Request`; its body has been read already, so `receive`
    has nothing more to give. A caller that goes away has its request's task cancelled, wherever that is.

    Args:
        app: what is protected.
        verifier: who decides.
        limits: bounds on bodies.
        path_prefix: a prefix that a proxy in front puts before every target; taken off before anything else.
    """

    def __init__(self, app: ASGIApp, verifier: Verifier, limits: Limits, path_prefix: bytes = b"") -> None:
        self._app = app
        self._verifier = verifier
        self._limits = limits
        self._path_prefix = path_prefix
        self._unverified = Budget(limits.max_unverified)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request or WebSocket; lifespan passes through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection: Connection = scope["docker_runner"]
        task = asyncio.current_task()
        assert task is not None
        if connection.disconnected:
            return  # Refused by the server before this task began.
        connection.on_disconnect(task.cancel)
        admission = _Admission(self, scope, receive, connection)
        try:
            await admission.admit()
            await self._app(scope, receive, send)
        except RunnerError as error:
            if connection.response_started:
                log.error("%s after the answer had begun: %s", error.code, error.message)
                connection.abort()
                return
            admission.refused(error)
            await _answer(scope, send, error, last=not admission.admitted)
        except asyncio.CancelledError:
            if connection.disconnected:
                return  # There is nobody to tell.
            if connection.response_started:
                connection.abort()
                return
            reason = "the runner ended before the answer; the request may have happened"
            await _answer(scope, send, RunnerError("shutting_down", reason, retryable=False))
        except Exception:
            log.exception("a defect while serving %s", scope.get("method", "WebSocket"))
            if connection.response_started:
                connection.abort()
            else:
                await _answer(scope, send, RunnerError("internal_error", "a defect of the runner; its log says more"))
        finally:
            admission.close()


class _Admission:
    """One request on its way through verification, and what it holds meanwhile: nonce, body, part of the budget."""

    def __init__(self, layer: Authentication, scope: Scope, receive: Receive, connection: Connection) -> None:
        self._verifier = layer._verifier
        self._limits = layer._limits
        self._budget = layer._unverified
        self._scope = scope
        self._receive = receive
        self._connection = connection
        self._reserved = 0
        self._nonce: bytes | None = None
        self._body: Body | SignedChunks = NO_BODY
        self.admitted = False
        target = connection.target
        self._target = target[len(layer._path_prefix) :] if target.startswith(layer._path_prefix + b"/") else target

    async def admit(self) -> None:
        """Verify the request and put a `Request` into the scope for what is behind.

        Raises:
            RunnerError: the request is refused.
        """
        scope = self._scope
        method: bytes = scope.get("method", "GET").encode()
        headers: Headers = scope["headers"]
        key = None
        unsigned = method in (b"GET", b"HEAD") and self._target.partition(b"?")[0] in UNSIGNED_PATHS
        if not (unsigned and scope["type"] == "http"):
            key = await self._verify(method, headers)
        self.admitted = True
        scope["docker_runner.request"] = Request(
            method, self._target, headers, self._body, key, self._connection, self._release
        )

    async def _verify(self, method: bytes, headers: Headers) -> str | None:
        credentials = read_credentials(headers)
        self._verifier.check_time(credentials)
        has_body, length = _announced_body(headers) if self._scope["type"] == "http" else (False, 0)
        announced = credentials.content_hash
        limit = self._limits.max_body if announced is None else self._limits.max_upload
        if length > limit:
            raise too_large(limit)
        if announced is not None:
            self._nonce, secret = self._verifier.verify(credentials, method, self._target, announced)
            if announced == STREAMING:
                await self._begin_chunks(secret, credentials)
                return credentials.key
        if not has_body:
            actual = EMPTY_BODY_HASH
        else:
            deadline_s = self._verifier.seconds_left(credentials) if announced is None else None
            actual = await self._gather(limit, deadline_s)
        if announced is None:
            self._nonce, _ = self._verifier.verify(credentials, method, self._target, actual.encode())
            self._budget.give(self._reserved)
            self._reserved = 0
        elif actual.encode() != announced and self._scope["type"] == "http":
            raise RunnerError("body_hash_mismatch", "the body is not the one that X-DR-Content-SHA256 announced")
        return credentials.key

    async def _gather(self, limit: int, deadline_s: float | None) -> str:
        """Read the body; `deadline_s` bounds the whole of one that is still unverified. Returns its BODYHASH."""
        self._body = body = Body()
        now = asyncio.get_running_loop().time
        end = now() + deadline_s if deadline_s is not None else float("inf")
        try:
            async with asyncio.timeout_at(min(end, now() + self._limits.body_timeout_s)) as patience:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    chunk: bytes = message["body"]
                    if body.size + len(chunk) > limit:
                        raise too_large(limit)
                    if deadline_s is not None:
                        self._budget.take(len(chunk))
                        self._reserved += len(chunk)
                    await body.write(chunk)
                    if not message["more_body"]:
                        return await body.finish()
                    patience.reschedule(min(end, now() + self._limits.body_timeout_s))
        except TimeoutError:
            raise RunnerError("request_timeout", "the body stopped arriving, or outlived its signature") from None
        except asyncio.CancelledError:
            self._broken_off()
            raise

    async def _begin_chunks(self, secret: bytes, credentials: Credentials) -> None:
        """The body comes as signed chunks: wait for the first; the others are verified as they are forwarded."""
        if self._scope["type"] != "http":
            raise RunnerError("invalid_chunk", "a WebSocket's request body cannot come as signed chunks")
        reader = SignedChunkReader(secret, base64.b64decode(credentials.signature))
        body = self._body = SignedChunks(
            reader,
            self._receive,
            limit=self._limits.max_upload,
            limit_in_memory=self._limits.max_body,
            pause_s=self._limits.body_timeout_s,
        )
        try:
            await body.begin()
        except asyncio.CancelledError:
            self._broken_off()
            raise

    def _broken_off(self) -> None:
        """The caller left before its body was complete, nothing was forwarded: it may come again as it was."""
        self._release()
        if not self._connection.disconnected:
            raise RunnerError("shutting_down", "the runner is ending and takes no new requests") from None

    def refused(self, error: RunnerError) -> None:
        """The request ends with `error`: before its first byte is sent, give the nonce back if it says retryable."""
        if error.retryable:
            self._release()
        path = self._target.partition(b"?")[0][:200].decode("latin-1")
        caller = self._scope["client"]
        log.info("%s %r from %s: %s: %r", self._scope.get("method", "WS"), path, caller, error.code, error.message)

    def close(self) -> None:
        """Give back everything but the nonce."""
        self._budget.give(self._reserved)
        self._reserved = 0
        if self._body is not NO_BODY:
            self._body.close()

    def _release(self) -> None:
        if self._nonce is not None:
            self._verifier.nonces.release(self._nonce)
            self._nonce = None


def _announced_body(headers: Headers) -> tuple[bool, int]:
    """Whether a body follows the head, and its length if it is stated (else 0)."""
    has_body, length = False, 0
    for name, value in headers:
        if name == b"content-length":
            # The server's parser has checked that it is digits and fits 64 bits, but not how many zeros lead.
            digits = value.lstrip(b"0")
            length = int(digits or b"0") if len(digits) < 20 else 1 << 64
            has_body = length > 0
        elif name == b"transfer-encoding":
            return True, 0
    return has_body, length


async def _answer(scope: Scope, send: Send, error: RunnerError, *, last: bool = False) -> None:
    """Send the answer that tells of an error; if `last`, the connection ends with it (strangers get no second try)."""
    status, headers, body = error.response()
    kind = "http" if scope["type"] == "http" else "websocket.http"
    if last and kind == "http":
        headers.append((b"connection", b"close"))
    await send({"type": f"{kind}.response.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body, "more_body": False})
