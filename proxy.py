"""The engine face: decide, relay. The engine's status, headers and bytes come back as they are.

One function, `EngineFace.__call__`, reads as the whole way of a request; what is behind it transforms headers or cuts
streams. A stream that breaks is told in-band where its format has a line for that (progress), else the caller's
connection is aborted: it never looks complete. Where the engine hands its connection over, see `upgrades.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from functools import partial
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

import operations
import rules
import upgrades
from admission import Connection, Request
from audit import Asked
from bodies import NO_BODY, too_large
from dockerapi import Engine
from engine_response import EngineResponse, NotProcessedError
from errors import RunnerError
from expiry import USES, Expiry
from headers import HOP_BY_HOP, NOT_FORWARDED, end_to_end, forwarded
from metrics import Metrics
from operations import Kind, Operation
from policy import Policies, Policy
from scope import Narrowed, Scopes
from scope_events import MAX_EVENT, own_events
from streams import GATHER_S, MIN_UNCOPIED, Data, LineFramer, progress_error
from strict_json import MAX_INSPECTED

_CUT_AT_LINES = frozenset((Kind.LINES, Kind.PROGRESS, Kind.EVENTS))
READING = ("GET", "HEAD")
_FALSE = ("", "0", "no", "false", "none")


class EngineFace:
    """ASGI application behind `Authentication`: relays the curated operations of the Engine API.

    Args:
        engine: where they go.
        head_s: time limit on the answer's head for quick operations.
        event_buffer: bytes of events held for one caller that reads slowly.
        first_frame_s: how long the request body of an upgraded stream may take to come.
        policies: asked anew for each request, so that they may be read again.
        scopes: who owns what.
        metrics: told how old events are that are passed on.
        expiry: told of what is used.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        head_s: float,
        event_buffer: int,
        first_frame_s: float,
        policies: Callable[[], Policies],
        scopes: Scopes,
        metrics: Metrics,
        expiry: Expiry,
    ) -> None:
        self._engine = engine
        self._witness = upgrades.Witness(engine.path)
        self._head_s = head_s
        self._event_buffer = event_buffer
        self._first_frame_s = first_frame_s
        self._policies = policies
        self._scopes = scopes
        self._metrics = metrics
        self._expiry = expiry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay one request, or refuse it with a `RunnerError`."""
        request: Request = scope["docker_runner.request"]
        connection = request.connection
        begun: EngineResponse | None = scope.pop("docker_runner.answer", None)
        if begun is not None and await _go_on(begun, connection, send):
            return
        upgraded = scope["type"] == "websocket"
        operation, policy = self._decide(request, b"POST" if upgraded else request.method)
        whole = await _read_whole(request) if rules.needs_body(policy, operation) else None
        rules.check(
            policy, operation, request.target, request.headers, whole or b"", has_body=request.body is not NO_BODY
        )
        if operation.lasting and _lasts(operation, request.target):
            request.as_stream()
        label = policy.scope.label
        async with self._scopes.turn(operation, label):
            asked = Narrowed(request.target, whole)
            if label:
                asked = await self._scopes.of(label).narrow(operation, request.target, whole or b"")
            if operation.id in USES:
                await self._expiry.use(operation, asked.target)
            if upgraded:
                await upgrades.serve(
                    self._engine, self._witness, operation, asked, scope, receive, send, self._first_frame_s
                )
                return
            is_own = await own_events(self._scopes.of(label)) if label and operation.kind is Kind.EVENTS else None
            event_buffer = max(self._event_buffer, MAX_EVENT) if label else self._event_buffer
            response = await self._ask(request, operation, asked, event_buffer)
        with response:
            if label and (asked.hidden is not None or response.status == 409):
                body = asked.revealed(await response.read(MAX_INSPECTED))
                await _give(response, await self._scopes.of(label).redacted(operation, response.status, body), send)
                return
            if operation.kind is Kind.HIJACK and response.status == 200:
                with self._witness.watching() as line:
                    await _relay(response, operation.kind, connection, send, check_whole=line.check_whole)
            else:
                if operation.kind is Kind.EVENTS:
                    send = self._metrics.watching_events(send)
                # What could be followed and is not: a log as far as it goes.
                gather = not isinstance(operation.lasting, bool) and not request.lasting
                await _relay(response, operation.kind, connection, send, is_own=is_own, gather=gather)
                if operation.kind is Kind.PROGRESS and isinstance(response.failure, RunnerError):
                    request.broke = response.failure  # It was told in-band.

    def begin(self, request: Request, found: Container[bytes]) -> EngineResponse | None:
        """Decide on a request that is a head alone, and send it, if nothing has to be waited for before.

        Args:
            found: the names of its headers.

        Raises:
            RunnerError: it is refused.
        """
        operation, policy = self._decide(request, request.method)
        if operation.kind is not Kind.PLAIN or operation.lasting or operation.id in USES:
            return None
        if policy.scope.label or self._scopes.must_wait(operation):
            return None
        rules.check(policy, operation, request.target, request.headers)
        return self._engine.begin(
            request.method,
            request.target,
            forwarded(request.headers, found),
            empty=b"content-length" in found,
            head_s=self._head_s if operation.quick else None,
            operation=operation.id,
        )

    def _decide(self, request: Request, method: bytes) -> tuple[Operation, Policy]:
        operation = operations.decide(method, request.target)
        changes = operation.method not in READING
        request.asked = Asked(operation.id, changes, partial(_named, operation, request.target))
        return operation, self._policies().of(request.key)

    async def _ask(self, request: Request, operation: Operation, asked: Narrowed, event_buffer: int) -> EngineResponse:
        """Send the request to the engine, as it was narrowed."""
        connection = request.connection
        if operation.kind is Kind.HIJACK and any(name == b"upgrade" for name, _ in request.headers):
            raise RunnerError(
                "upgrade_required",
                f"{operation.id} is upgraded as a WebSocket; without an Upgrade header it gives its output",
                headers=((b"upgrade", b"websocket"),),
            )
        if operation.kind is Kind.EVENTS:
            # This stream has no end of its own: on shutdown it ends at once, the others may use the time of grace.
            task = asyncio.current_task()
            assert task is not None
            connection.on_drain(task.cancel)
        return await self._engine.request(
            request.method,
            asked.target,
            end_to_end(request.headers, NOT_FORWARDED),
            _body(request) if asked.body is None else asked.body,
            length=request.body.size,
            head_s=self._head_s if operation.quick else None,
            buffer_limit=event_buffer if operation.kind is Kind.EVENTS else None,
            on_overflow=connection.abort,
            operation=operation.id,
        )


def _lasts(operation: Operation, target: bytes) -> bool:
    """Whether this is a stream that may last, or a request with an end of its own."""
    if isinstance(operation.lasting, bool):
        return operation.lasting
    return _in_query(target, *operation.lasting).lower() not in _FALSE


def _named(operation: Operation, target: bytes) -> str:
    """The object of an operation: what its path names, or its query."""
    if "{" in operation.template:
        return operations.parameter(operation, target)
    return _in_query(target, operation.named_by, "")


def _in_query(target: bytes, name: str, default: str) -> str:
    found = parse_qs(target.partition(b"?")[2].decode("latin-1"), keep_blank_values=True).get(name)
    return found[0].strip() if found else default


async def _give(response: EngineResponse, body: bytes, send: Send) -> None:
    """Give the engine's answer with another body: with the caller's words for what is missing, or without others'."""
    headers = [field for field in end_to_end(response.headers, HOP_BY_HOP) if field[0].lower() != b"content-length"]
    headers.append((b"Content-Length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _go_on(answer: EngineResponse, connection: Connection, send: Send) -> bool:
    """Give an answer that was asked for in the short way. False: the engine has not read the request."""
    with answer:
        try:
            await answer.head()
        except NotProcessedError:
            return False
        await _relay(answer, Kind.PLAIN, connection, send)
        return True


async def _relay(
    response: EngineResponse,
    kind: Kind,
    connection: Connection,
    send: Send,
    *,
    is_own: Callable[[bytes], Awaitable[bool]] | None = None,
    check_whole: Callable[[], Awaitable[None]] | None = None,
    gather: bool = False,
) -> None:
    """Give the engine's answer to the caller, as it comes.

    Of the lines of events, those that `is_own` says are the caller's; `check_whole` is asked before the end is told.
    With `gather`, small pieces may wait for more: see `streams.GATHER_S`.
    """
    if response.failure is not None:
        raise response.failure  # Broken before anything of it was passed on: that can still be said.
    framer = None
    if kind in _CUT_AT_LINES and response.status == 200:
        # Whose an event is can be said of the whole of it only.
        framer = LineFramer() if is_own is None else LineFramer(max_line=MAX_EVENT)
    headers = end_to_end(response.headers, HOP_BY_HOP)
    start = {"type": "http.response.start", "status": response.status, "headers": headers}
    if response.ready and framer is None and check_whole is None:
        start["docker_runner.held"] = True
    await send(start)
    try:
        ended = False
        while not ended:
            chunk = await response.next()
            ended = response.ended
            if ended and check_whole is not None:
                await check_whole()
            if framer is not None:
                chunk = framer.feed(chunk) + (framer.tail() if ended else b"")
            if is_own is not None:
                if framer is not None and framer.within_line:
                    raise RunnerError("engine_garbage", f"an event is longer than {MAX_EVENT} bytes")
                chunk = b"".join([line for line in chunk.splitlines(keepends=True) if await is_own(line)])
            if chunk or ended:
                await send({"type": "http.response.body", "body": chunk, "more_body": not ended})
            if gather and not ended and len(chunk) < MIN_UNCOPIED:
                await asyncio.sleep(GATHER_S)
    except (RunnerError, asyncio.CancelledError) as error:
        if kind is not Kind.PROGRESS or framer is None or framer.within_line or connection.disconnected:
            raise
        reason = error.message if isinstance(error, RunnerError) else "docker-runner is shutting down"
        await send({"type": "http.response.body", "body": progress_error(reason), "more_body": False})


async def _read_whole(request: Request) -> bytes | None:
    """The body, for the policy to look into; what it has seen is what the engine gets."""
    if request.body is NO_BODY:
        return None
    if (request.body.size or 0) > MAX_INSPECTED:
        raise too_large(MAX_INSPECTED)
    return bytes(await request.body.read(MAX_INSPECTED))


def _states_length(request: Request) -> bool:
    """Of a request without a body: a stated length of 0 is passed on, an absent one stays absent."""
    return b"content-length" in [name for name, _ in request.headers]


def _body(request: Request) -> bytes | AsyncIterator[Data] | None:
    if request.body is NO_BODY:
        return b"" if _states_length(request) else None
    data = request.body.data
    return request.body.chunks() if data is None else data
