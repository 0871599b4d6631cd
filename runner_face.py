"""The way into the runner face: requests decoded, handed to their handlers in `workloads.py`; health and readiness.

Requests are decoded once, strictly: nothing is coerced, and an error names the field.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any
from urllib.parse import parse_qs, parse_qsl

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

import execs
from admission import Request as Verified
from audit import Asked
from calls import Calls, Endings, Operation
from dockerapi import Engine
from errors import RunnerError
from exec_connection import Exec
from expiry import Expiry
from flights import Flights
from policy import Policies
from process_tree import Tree
from scope import Scopes
from workloads import EXEC, INTERACTIVE, JSON, ROUTES, Handler, Interactive, Options, exec_config

Endpoint = Callable[[Request], Awaitable[Response]]

READY_MAX_AGE_S = 1.0
"""`/v1/ready` is open to strangers, so it asks the engine at most this often."""
READY_LIMIT_S = 2.0
"""An engine that needs longer for a ping is not ready."""
INVALID_QUERY = 4000
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012


# Decoding.


async def _decoded_body(request: Request, struct: type[msgspec.Struct]) -> msgspec.Struct:
    body = await _verified(request.scope).body.read()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and media_type != JSON:
        raise RunnerError("unsupported_media_type", f"the body must be {JSON}, not {media_type or 'untyped'}")
    try:
        return msgspec.json.decode(body or b"{}", type=struct)
    except msgspec.ValidationError as error:
        raise RunnerError("validation_error", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunnerError("invalid_json", f"the body is not JSON: {error}") from error


def _verified(scope: Mapping[str, Any]) -> Verified:
    request: Verified = scope["docker_runner.request"]
    return request


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@cache
def _booleans(struct: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(struct) if field.type is bool)


def decoded_query(target: bytes, struct: type[msgspec.Struct]) -> msgspec.Struct:
    """The parameters of a query as a struct.

    Raises:
        RunnerError: `validation_error`: one is missing, wrong, or stands twice.
    """
    try:
        pairs = parse_qsl(target.partition(b"?")[2].decode("ascii"), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise RunnerError("validation_error", "the query is not UTF-8") from error
    booleans = _booleans(struct)
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in given:
            raise RunnerError("validation_error", f"{name}: stands more than once")
        given[name] = text
        if name in booleans:
            if text not in _BOOLEANS:
                raise RunnerError("validation_error", f"{name}: must be true, false, 1 or 0, not {text!r}")
            given[name] = _BOOLEANS[text]
    try:
        return msgspec.convert(given, struct)
    except msgspec.ValidationError as error:
        raise RunnerError("validation_error", str(error)) from error


def _named(asked: msgspec.Struct) -> str:
    """The object of a request, for the audit log."""
    names = ("container_id", "exec_id", "volume_name", "name", "image")
    return next((value for name in names if isinstance(value := getattr(asked, name, None), str)), "")


def _in_query(target: bytes, name: str) -> str:
    found = parse_qs(target.partition(b"?")[2].decode("latin-1")).get(name)
    return found[0] if found else ""


# The interactive exec.


def interactive_config(asked: Interactive) -> dict[str, Any]:
    """The engine's `ContainerExec` of an interactive exec.

    Raises:
        RunnerError: `validation_error`.
    """
    command: str | list[str] = asked.command
    try:
        command = msgspec.json.decode(asked.command, type=Annotated[list[str], Meta(min_length=1)])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        command = asked.command  # No JSON array of strings: a shell command.
    env: dict[str, str] | list[str] | UnsetType = UNSET
    if asked.env is not UNSET and asked.env:
        try:
            env = msgspec.json.decode(asked.env, type=dict[str, str] | list[str])
        except (msgspec.DecodeError, RecursionError) as error:
            raise RunnerError("validation_error", f"env: {error}") from error
    return {**exec_config(execs.argv(command), asked.workdir, env, tty=asked.tty), "AttachStdin": True}


async def _interactive(socket: WebSocket, calls: Calls) -> None:
    """Serve one interactive exec; every end is told to the client, with a close code that says of what kind it is."""
    await socket.accept()
    try:
        asked = decoded_query(_verified(socket.scope).target, Interactive)
        assert isinstance(asked, Interactive)
        config = interactive_config(asked)
    except RunnerError as error:
        _verified(socket.scope).broke = error
        await execs.send(socket, execs.error_frame(error))
        await socket.close(INVALID_QUERY, "invalid_query")
        return
    try:
        await _session(socket, calls, asked, config)
        await socket.close()
    except RunnerError as error:
        _verified(socket.scope).broke = error
        if error.retryable:
            _verified(socket.scope).give_back()
        await execs.send(socket, execs.error_frame(error))
        await socket.close(INTERNAL_ERROR, "exec_failed")
    except asyncio.CancelledError:
        if _verified(socket.scope).connection.disconnected:
            raise
        ending = RunnerError("shutting_down", "docker-runner is shutting down", retryable=False)
        await execs.send(socket, execs.error_frame(ending))
        await socket.close(SERVICE_RESTART, "shutting_down")


async def _session(socket: WebSocket, calls: Calls, asked: Interactive, config: dict[str, Any]) -> None:
    merged = asked.tty or not asked.demux
    if not asked.kill_on_disconnect:
        with await Exec.start(calls, asked.container_id, config) as process:
            await execs.Session(socket, process, merged=merged).run()
        return
    with Tree(calls) as tree:
        try:
            with await Exec.start(calls, asked.container_id, tree.marked(config), tree.begun) as process:
                await execs.Session(socket, process, merged=merged).run()
        except BaseException:
            tree.end()  # The client left, or can hear of it no more; who it was that broke off does not matter.
            raise


# The application.


class Readiness:
    """Whether the engine answers, asked at most once in `READY_MAX_AGE_S`, whoever wants to know and leaves meanwhile.

    Args:
        engine: who is asked.
        clock: seconds, monotonic.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._asked_at = float("-inf")
        self._answer: asyncio.Task[bool] | None = None

    async def check(self) -> None:
        """Return if the engine is ready.

        Raises:
            RunnerError: `docker_unavailable`, without the reason: strangers may ask.
        """
        answer = self._answer
        if answer is None or (answer.done() and self._clock() - self._asked_at >= READY_MAX_AGE_S):
            self._asked_at = self._clock()
            answer = self._answer = asyncio.create_task(self._ping())
        # Shielded: a caller that leaves must not cancel it, or the next one would ask again.
        if not await asyncio.shield(answer):
            raise RunnerError("docker_unavailable", "the engine does not answer")

    async def _ping(self) -> bool:
        try:
            await self._engine.ping(READY_LIMIT_S)
        except RunnerError:
            return False
        return True


def create_runner_face(
    engine: Engine,
    options: Options,
    policies: Callable[[], Policies],
    scopes: Scopes,
    expiry: Expiry,
    endings: Endings,
    clock: Callable[[], float],
) -> ASGIApp:
    """The ASGI application of the runner face; a `RunnerError` leaves it for the layer around it to answer."""
    readiness = Readiness(engine, clock)
    flights = Flights(engine)
    tasks: set[asyncio.Task[Any]] = set()

    def calls(operation: Operation, scope: Mapping[str, Any]) -> Calls:
        policy = policies().of(_verified(scope).key)
        return Calls(engine, operation, tasks, policy, scopes, expiry, flights, endings, options.head_s)

    def endpoint(
        method: str, path: str, struct: type[msgspec.Struct], handler: Handler, operation: Operation
    ) -> Endpoint:
        async def serve(request: Request) -> Response:
            verified = _verified(request.scope)
            route, changes = f"{method} {path}", bool(operation.stands_for)
            verified.asked = Asked(route, changes, str, operation.stands_for)
            if method == "POST":
                asked = await _decoded_body(request, struct)
            else:
                asked = decoded_query(verified.target, struct)
            verified.asked = Asked(route, changes, partial(_named, asked), operation.stands_for)
            return await handler(calls(operation, request.scope), asked, request, options)

        return serve

    async def health(request: Request) -> Response:
        _verified(request.scope).asked = Asked("GET /v1/health", changes=False, named=str)
        return Response(b'{"status":"ok"}', media_type=JSON)

    async def ready(request: Request) -> Response:
        _verified(request.scope).asked = Asked("GET /v1/ready", changes=False, named=str)
        await readiness.check()
        return Response(b'{"status":"ready"}', media_type=JSON)

    async def document(request: Request) -> Response:
        import openapi  # Late: it is made for the first who asks.

        _verified(request.scope).asked = Asked(f"GET {openapi.PATH}", changes=False, named=str)

        return Response(openapi.document(), media_type=JSON)

    async def interactive(socket: WebSocket) -> None:
        verified = _verified(socket.scope)
        in_query = partial(_in_query, verified.target, "containerId")
        verified.asked = Asked(f"GET {INTERACTIVE}", changes=True, named=in_query, stands_for=EXEC.stands_for)
        verified.as_stream()
        await _interactive(socket, calls(EXEC, socket.scope))

    endpoints = {
        (method, path): endpoint(method, path, struct, handler, operation)
        for method, path, struct, handler, operation in ROUTES
    }
    routes = [
        Route("/v1/health", health),
        Route("/v1/ready", ready),
        Route("/v1/openapi.json", document),
        WebSocketRoute(INTERACTIVE, interactive),
        *(Route(path, serve, methods=[method]) for (method, path), serve in endpoints.items()),
    ]
    return _RunnerFace(routes, endpoints)


class _RunnerFace(Starlette):
    """Starlette without its answers to errors: every one is left to the layer around, which gives nonces back.

    Its routes match one after the other, by regular expressions, and a stream would hold their frames for as long as it
    lasts. So what is found by method and path at once is served without them.
    """

    def __init__(self, routes: Sequence[BaseRoute], endpoints: Mapping[tuple[str, str], Endpoint]) -> None:
        super().__init__(routes=routes)
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        serve = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if serve is None:
            await super().__call__(scope, receive, send)
        else:
            await (await serve(Request(scope, receive, send)))(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        self.router.redirect_slashes = False
        self.router.default = _no_route
        return ExceptionMiddleware(self.router, handlers={405: _wrong_method})


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise RunnerError("not_found", "no such route")


async def _wrong_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Starlette's are in the order of a set, which is another with each start.
    allow = (b"allow", ", ".join(sorted((error.headers or {})["Allow"].split(", "))).encode())
    raise RunnerError("method_not_allowed", f"{request.method} is not allowed here", headers=(allow,))
