"""The short way: a small request verified, decided and relayed in callbacks, without a task of its own.

Most requests are a head alone, and the engine answers them in one piece. A task, its futures and ASGI's messages are
more than half of what such a request costs here; so nothing is made to wait with while nothing has to wait. What is
checked, and by which functions, is the ordinary way's (`Request.admit_bare`, `EngineFace.begin`): here is only the
order. Whatever turns out to need more (a refusal to be told, a body, a stream, a scope, a pool without a free
connection, an answer that takes its time, an engine that fails, the end of the service) goes on in the ordinary way
from where it stands.
"""

import asyncio
import logging

from admission import Authentication, Request
from cycle import Cycle
from engine_response import EngineResponse, NotProcessedError
from errors import RunnerError
from headers import HOP_BY_HOP, end_to_end
from proxy import READING, EngineFace

HOLD_S = 0.001
"""How long the beginning of an answer waits for the rest: the engine writes what is longer than 4 KiB in two pieces."""

log = logging.getLogger("docker_runner.shortcut")


class Shortcut:
    """What the server asks before it makes a task for a request.

    Args:
        authentication: lets nothing unverified through.
        engine_face: decides, and sends.
        reads_only: what may change something goes the ordinary way. So it must behind a trusted proxy, since who asks,
            which the audit log tells, is found out by a layer around the ordinary way.
    """

    def __init__(self, authentication: Authentication, engine_face: EngineFace, *, reads_only: bool) -> None:
        self._authentication = authentication
        self._engine_face = engine_face
        self._reads_only = reads_only

    def __call__(self, cycle: Cycle) -> bool:
        """Begin to serve a request whose bytes have all come. False: it is the ordinary way's.

        The ordinary way then finds in its scope the verified request; what was refused here is refused there again, and
        told.
        """
        if self._reads_only and cycle.method not in READING:
            return False
        request = Request(self._authentication, cycle, cycle.receive)
        try:
            if not request.admit_bare(cycle.found):
                return False
        except RunnerError:
            request.give_back()
            return False
        try:
            answer = self._engine_face.begin(request, cycle.found)
        except RunnerError:
            answer = None
        if answer is None:
            cycle.scope["docker_runner.request"] = request
            return False
        _Exchange(self._authentication, request, cycle, answer)
        return True


class _Exchange:
    """A request that was sent to the engine, until its answer is there or the ordinary way takes over."""

    __slots__ = ("_answer", "_authentication", "_cycle", "_request", "_timer")

    def __init__(self, authentication: Authentication, request: Request, cycle: Cycle, answer: EngineResponse) -> None:
        self._authentication = authentication
        self._request = request
        self._cycle = cycle
        self._answer = answer
        self._timer: asyncio.TimerHandle | None = None
        answer.on_change = self._look
        cycle.on_disconnect(self._left)
        cycle.on_drain(self._go_on)

    def _look(self) -> None:
        answer = self._answer
        if answer.complete:
            self._give()
        elif answer.failure is not None:
            self._go_on()
        elif answer.status and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(HOLD_S, self._go_on)

    def _give(self) -> None:
        """The whole answer is there."""
        answer, cycle = self._answer, self._cycle
        self._stop_watching()
        cycle.forget()
        try:
            if answer.status != 204 and cycle.version == "1.1" and answer.travels_whole:
                cycle.pass_on(answer.status, answer.fields, answer.take(), chunked=answer.chunked)
            else:
                cycle.respond(answer.status, end_to_end(answer.headers, HOP_BY_HOP), answer.take())
        except Exception:
            log.exception("a defect while an answer was given", extra={"request_id": cycle.request_id})
            cycle.abort()
        self._authentication.ended(self._request, None)

    def _go_on(self) -> None:
        """The ordinary way goes on, with the answer as far as it has come; until it begins, `_left` holds."""
        answer, cycle = self._answer, self._cycle
        if answer.on_change is None:
            return
        self._stop_watching()
        cycle.scope["docker_runner.request"] = self._request
        if not isinstance(answer.failure, NotProcessedError):
            cycle.scope["docker_runner.answer"] = answer
        cycle.serve()

    def _stop_watching(self) -> None:
        self._answer.on_change = None
        if self._timer is not None:
            self._timer.cancel()

    def _left(self) -> None:
        """The caller has gone."""
        self._stop_watching()
        self._answer.close()
        self._cycle.scope.pop("docker_runner.request", None)  # A task that was to go on with it finds nothing to end.
        self._authentication.ended(self._request, None)
