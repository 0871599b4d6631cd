"""The runner face, `/v1/...`: task-level operations in JSON, on top of the engine client."""

import asyncio
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dockerapi import Engine
from errors import RunnerError

READY_MAX_AGE_S = 1.0
"""`/v1/ready` is open to strangers, so it asks the engine at most this often."""
READY_LIMIT_S = 2.0
"""An engine that needs longer for a ping is not ready."""

_JSON = "application/json"


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


def create_runner_face(engine: Engine, clock: Callable[[], float]) -> Starlette:
    """The ASGI application of the runner face; a `RunnerError` leaves it for the layer around it to answer."""
    readiness = Readiness(engine, clock)

    async def health(request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type=_JSON)

    async def ready(request: Request) -> Response:
        await readiness.check()
        return Response(b'{"status":"ready"}', media_type=_JSON)

    return _RunnerFace(routes=[Route("/v1/health", health), Route("/v1/ready", ready)])


class _RunnerFace(Starlette):
    """Starlette without its answers to errors: every one is left to the layer around, which gives nonces back."""

    def build_middleware_stack(self) -> ASGIApp:
        self.router.redirect_slashes = False
        self.router.default = _no_route
        return ExceptionMiddleware(self.router, handlers={405: _wrong_method})


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise RunnerError("not_found", "no such route")


async def _wrong_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allow = (b"allow", (error.headers or {})["Allow"].encode())
    raise RunnerError("method_not_allowed", f"{request.method} is not allowed here", headers=(allow,))
