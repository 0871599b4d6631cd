"""The ASGI layer that lets nothing unverified through, and what it hands on: `Request`, the verified request.

It finds the signature's headers, gathers the body within bounds, asks the verifier, and answers every `RunnerError`
that comes from further in, in one place. What the headers alone can refuse is refused before a byte of the body is
read. A nonce goes back exactly when the answer says `retryable`, before that answer's first byte.
"""

import asyncio
import base64
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from audit import Asked, Audit
from auth import STREAMING, Credentials, Headers, Verifier, read_credentials
from bodies import NO_BODY, Body, Budget, SignedChunks, too_large
from client import EMPTY_BODY_HASH
from errors import RunnerError
from logs import current_request, shown
from metrics import Metrics, unknown
from streams import SignedChunkReader

log = logging.getLogger("docker_runner.admission")

UNSIGNED_PATHS = (b"/v1/health", b"/v1/ready")
EMPTY_HASH = EMPTY_BODY_HASH.encode()


class Connection(Protocol):
    """What the server knows of a caller and ASGI cannot say; it puts it into `scope["docker_runner"]`."""

    method: str
    """Of the request, in upper case."""
    target: bytes
    """The request target, byte for byte as it stood in the request line."""
    headers: list[tuple[bytes, bytes]]
    """The header fields, in order, names in lower case."""
    disconnected: bool
    """The caller has gone."""
    response_started: bool
    """The head of the answer was given to the server."""
    request_id: str
    """The caller's `X-Request-Id`, or one made for it."""
    local: str
    """Who asks on the local socket, whose requests need no signature; empty for everyone else."""
    status: int
    """Of the answer; 0 while there is none."""
    received: int
    """Bytes of the request's body so far, verified or not."""
    sent: int
    """Bytes of the answer's body so far."""

    @property
    def scope(self) -> Scope:
        """ASGI's, of this request."""

    def abort(self) -> None:
        """Close the connection so that the caller cannot take what it has got for a complete answer."""

    def on_disconnect(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the caller goes (at once, if it has gone)."""

    def on_drain(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the service begins to shut down (at once, if it has)."""


class Places:
    """So many at once: a bound on what is being served.

    Args:
        code: of the refusal of one more.
        limit: how many.
    """

    def __init__(self, code: str, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._code = code

    def take(self) -> None:
        """Take a place; `taken` is lowered to give it back.

        Raises:
            RunnerError: there is none.
        """
        if self.taken >= self.limit:
            raise RunnerError(self._code, f"{self.limit} are being served at once, and no more; try again soon")
        self.taken += 1


class Limits(msgspec.Struct, frozen=True):
    """Bounds on request bodies, in bytes and seconds, and on how many requests and streams are served at once."""

    max_body: int
    max_upload: int
    max_unverified: int
    body_timeout_s: float
    max_requests: int
    max_streams: int


class Authentication:
    """The outermost ASGI layer: lets nothing unverified through, and answers every `RunnerError` from further in.

    How much is served at once is counted here too, of verified requests only, so that strangers take no places.

    Behind it `scope["docker_runner.request"]` is the verified `Request`; its body has been read already, so `receive`
    has nothing more to give. A caller that goes away has its request's task cancelled, wherever that is.

    Args:
        app: what is protected.
        verifier: who decides.
        limits: bounds on bodies, and on what is served at once.
        audit: told of each request's end.
        metrics: told, too.
        path_prefix: a prefix that a proxy in front puts before every target; taken off before anything else.
        local_key: the name under which unsigned requests of the local socket are served.
    """

    def __init__(
        self,
        app: ASGIApp,
        verifier: Verifier,
        limits: Limits,
        audit: Audit,
        metrics: Metrics,
        path_prefix: bytes = b"",
        local_key: str | None = None,
    ) -> None:
        self._app = app
        self._audit = audit
        self.metrics = metrics
        self.verifier = verifier
        self.limits = limits
        self.path_prefix = path_prefix
        self.local_key = local_key
        self.unverified = Budget(limits.max_unverified)
        self.requests = Places("too_many_requests", limits.max_requests)
        self.streams = Places("too_many_streams", limits.max_streams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request or WebSocket; lifespan passes through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection: Connection = scope["docker_runner"]
        task = asyncio.current_task()
        assert task is not None
        request: Request | None = scope.get("docker_runner.request")  # There, if the short way has verified it.
        if connection.disconnected:  # Refused by the server, or left, before this task began.
            if request is not None:
                self.ended(request, None)
            return
        connection.on_disconnect(task.cancel)
        current_request.set(connection.request_id)
        request = request or Request(self, connection, receive)
        told: RunnerError | None = None
        try:
            if not request.admitted:
                await request.admit()
            await self._app(scope, receive, send)
        except RunnerError as error:
            told = error
            if connection.response_started:
                log.error("%s after the answer had begun: %s", error.code, error.message)
                connection.abort()
                return
            request.refused(error)
            await _answer(scope, send, error, last=not request.admitted)
        except asyncio.CancelledError:
            if connection.disconnected:
                return  # There is nobody to tell.
            if connection.response_started:
                connection.abort()
                return
            reason = "the runner ended before the answer; the request may have happened"
            told = RunnerError("shutting_down", reason, retryable=False)
            await _answer(scope, send, told)
        except Exception:
            log.exception("a defect while serving %s", scope.get("method", "WebSocket"))
            told = RunnerError("internal_error", "a defect of the runner; its log says more")
            if connection.response_started:
                connection.abort()
            else:
                await _answer(scope, send, told)
        finally:
            self.ended(request, told)

    def ended(self, request: "Request", told: RunnerError | None) -> None:
        """A request has ended, with `told` if that was an error: free what it held, tell metrics and audit log."""
        request.close()
        connection = request.connection
        took_s = time.perf_counter() - request.started
        self.metrics.ended(
            unknown(request.target) if request.asked is None else request.asked.operation,
            connection,
            told or request.broke,
            took_s,
            verified=request.verified,
            lasting=request.lasting,
            key=request.key,
        )
        if told is not None or (request.asked is not None and request.asked.changes):
            self._audit.record(
                request_id=connection.request_id,
                client=request.client,
                method=request.method.decode(),
                target=connection.target,
                asked=request.asked,
                admitted=request.admitted,
                error=told,
                status=connection.status,
                sent=connection.sent,
                took_s=took_s,
                key=request.key,
            )


class Request:
    """A request on its way through verification, and behind it: once verified, all that the layers there look at.

    It holds what was taken for it: nonce, body, a place among those served, part of the budget.
    """

    body: Body | SignedChunks = NO_BODY
    key: str | None = None
    """The name of the key that signed, once that is verified."""
    signed = True
    """False for the local socket's unsigned requests."""
    admitted = False
    """It is verified whole, or needs not be."""
    verified = False
    """It needed to be, and is."""
    asked: Asked | None = None
    """What it asks for: said by the layer that knows, for the audit log and the metrics."""
    lasting = False
    """It is counted among the streams."""
    broke: RunnerError | None = None
    """What was told within an answer that had begun well, for the metrics."""
    _reserved = 0
    _nonce: bytes | None = None
    _place: Places | None = None

    def __init__(self, layer: Authentication, connection: Connection, receive: Receive) -> None:
        self.started = time.perf_counter()
        self.connection = connection
        self.method = connection.method.encode()
        self.headers: Headers = connection.headers
        target = connection.target
        prefix = layer.path_prefix
        if prefix and target.startswith(prefix + b"/"):
            target = target[len(prefix) :]
        self.target = target
        """As it was sent, without the prefix of a proxy in front."""
        self._layer = layer
        self._receive = receive

    async def admit(self) -> None:
        """Verify the request and put it into the scope, for what is behind.

        Raises:
            RunnerError: the request is refused.
        """
        scope = self.connection.scope
        if not (
            self.target.startswith(b"/v1/")
            and self.target.partition(b"?")[0] in UNSIGNED_PATHS
            and self.method in (b"GET", b"HEAD")
            and scope["type"] == "http"
        ):
            if self.connection.local and not any(name.startswith(b"x-dr-") for name, _ in self.headers):
                self.signed = False
                await self._trust()
            else:
                await self._verify()
            self.verified = True
        self.admitted = True
        scope["docker_runner.request"] = self

    def admit_bare(self, found: dict[bytes, bytes]) -> bool:
        """Verify a signed request for the engine face that is a head alone. False: it is something else.

        Args:
            found: the header fields by name, one for each.

        Raises:
            RunnerError: the request is refused.
        """
        if self.connection.local or self.target.startswith(b"/v1/"):
            return False
        credentials = read_credentials(self.headers, found)
        announces_body = b"transfer-encoding" in found or found.get(b"content-length", b"0").strip(b"0")
        if credentials.content_hash is not None or announces_body:
            return False
        self._take_in(credentials, EMPTY_HASH)
        self.verified = self.admitted = True
        return True

    @property
    def client(self) -> str:
        """Who asks, as text."""
        return self.connection.local or address(self.connection.scope["client"])

    def give_back(self) -> None:
        """Release the nonce: for a retryable failure, before that is told."""
        if self._nonce is not None:
            self._layer.verifier.nonces.release(self._nonce)
            self._nonce = None

    def as_stream(self) -> None:
        """Count it among the streams, because it may last; before its answer, for that may be `too_many_streams`."""
        self._enter(self._layer.streams)
        self.lasting = True
        self._layer.metrics.open_streams.add(self)

    async def _trust(self) -> None:
        """Take an unsigned request of the local socket."""
        layer = self._layer
        self._enter(layer.requests)
        self.key = layer.local_key
        has_body, length = _announced_body(self.headers)
        if length > layer.limits.max_upload:
            raise too_large(layer.limits.max_upload)
        if has_body and self.connection.scope["type"] == "http":
            await self._gather(layer.limits.max_upload, None)

    async def _verify(self) -> None:
        layer, verifier = self._layer, self._layer.verifier
        credentials = read_credentials(self.headers)
        has_body, length = _announced_body(self.headers) if self.connection.scope["type"] == "http" else (False, 0)
        announced = credentials.content_hash
        limit = layer.limits.max_body if announced is None else layer.limits.max_upload
        if has_body:
            verifier.check_time(credentials)  # Before a byte of it is read.
            if length > limit:
                raise too_large(limit)
        if announced is not None:
            secret = self._take_in(credentials, announced)
            if announced == STREAMING:
                await self._begin_chunks(secret, credentials)
                return
        actual = EMPTY_HASH
        if has_body:
            deadline_s = verifier.seconds_left(credentials) if announced is None else None
            actual = (await self._gather(limit, deadline_s)).encode()
        if announced is None:
            self._take_in(credentials, actual)
        elif actual != announced and self.connection.scope["type"] == "http":
            raise RunnerError("body_hash_mismatch", "the body is not the one that X-DR-Content-SHA256 announced")

    def _take_in(self, credentials: Credentials, content_hash: bytes) -> bytes:
        """Verify the signature, and count the request among those that are served. Returns the secret that signed."""
        verified = self._layer.verifier.verify(credentials, self.method, self.target, content_hash)
        self._nonce = verified.nonce
        self.key = credentials.key
        self._give_back_budget()
        self._enter(self._layer.requests)
        return verified.secret

    def _enter(self, places: Places) -> None:
        """Take a place among these, and give back the one that was held."""
        if self._place is not places:
            places.take()
            if self._place is not None:
                self._place.taken -= 1
            self._place = places

    async def _gather(self, limit: int, deadline_s: float | None) -> str:
        """Read the body; `deadline_s` bounds the whole of one that is still unverified. Returns its BODYHASH."""
        self.body = body = Body()
        now = asyncio.get_running_loop().time
        end = now() + deadline_s if deadline_s is not None else float("inf")
        try:
            async with asyncio.timeout_at(min(end, now() + self._layer.limits.body_timeout_s)) as patience:
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    chunk: bytes = message["body"]
                    if body.size + len(chunk) > limit:
                        raise too_large(limit)
                    if deadline_s is not None:
                        self._layer.unverified.take(len(chunk))
                        self._reserved += len(chunk)
                    await body.write(chunk)
                    if not message["more_body"]:
                        return await body.finish()
                    patience.reschedule(min(end, now() + self._layer.limits.body_timeout_s))
        except TimeoutError:
            raise RunnerError("request_timeout", "the body stopped arriving, or outlived its signature") from None
        except asyncio.CancelledError:
            self._broken_off()
            raise

    async def _begin_chunks(self, secret: bytes, credentials: Credentials) -> None:
        """The body comes as signed chunks: wait for the first; the others are verified as they are forwarded."""
        if self.connection.scope["type"] != "http":
            raise RunnerError("invalid_chunk", "a WebSocket's request body cannot come as signed chunks")
        reader = SignedChunkReader(secret, base64.b64decode(credentials.signature))
        body = self.body = SignedChunks(
            reader,
            self._receive,
            limit=self._layer.limits.max_upload,
            limit_in_memory=self._layer.limits.max_body,
            pause_s=self._layer.limits.body_timeout_s,
        )
        try:
            await body.begin()
        except asyncio.CancelledError:
            self._broken_off()
            raise

    def _broken_off(self) -> None:
        """The caller left before its body was complete, nothing was forwarded: it may come again as it was."""
        self.give_back()
        if not self.connection.disconnected:
            raise RunnerError("shutting_down", "the runner is ending and takes no new requests") from None

    def refused(self, error: RunnerError) -> None:
        """The request ends with `error`: before its first byte is sent, give the nonce back if it says retryable."""
        if error.retryable:
            self.give_back()
        path = self.target.partition(b"?")[0][:200].decode("latin-1")
        method = self.connection.scope.get("method", "WS")
        log.info("%s %r from %s: %s: %r", method, path, self.client, error.code, error.message)

    def close(self) -> None:
        """Give back everything but the nonce."""
        if self._place is not None:
            self._place.taken -= 1
            self._place = None
        if self.lasting:
            self._layer.metrics.open_streams.discard(self)
        self._give_back_budget()
        if self.body is not NO_BODY:
            self.body.close()

    def _give_back_budget(self) -> None:
        if self._reserved:
            self._layer.unverified.give(self._reserved)
            self._reserved = 0


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


def address(client: tuple[str, int] | None) -> str:
    """A caller's address as text. A proxy in front does not tell the port."""
    if client is None:
        return ""
    host, port = shown(client[0]), client[1]  # A proxy in front may say anything.
    return (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")


async def _answer(scope: Scope, send: Send, error: RunnerError, *, last: bool = False) -> None:
    """Send the answer that tells of an error; if `last`, the connection ends with it (strangers get no second try)."""
    status, headers, body = error.response()
    kind = "http" if scope["type"] == "http" else "websocket.http"
    if last and kind == "http":
        headers.append((b"connection", b"close"))
    await send({"type": f"{kind}.response.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body, "more_body": False})
