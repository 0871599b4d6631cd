"""The engine as the runner face sees it: JSON calls, safe paths, and errors turned into the runner's in one place.

The engine decodes a path before it routes, so percent-encoding alone does not keep a name in its place: `a%2F..` is a
path again by then. A name that could become one is answered here as what it is: the name of nothing.
"""

import asyncio
import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

import operations
import rules
from dockerapi import Engine
from engine_response import EngineResponse
from errors import RunnerError
from expiry import USES, Expiry
from flights import Flights
from policy import Policy
from scope import Narrowed, Scopes
from scope_events import MAX_EVENT, own_events

R = TypeVar("R")

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of one answer of the engine that is held in memory (an inspect, a list)."""
_JSON = (b"Content-Type", b"application/json")


class _EngineError(msgspec.Struct):
    message: str
    cause: str = ""  # Podman's own


class Thing(enum.Enum):
    """What a name names; the value is the engine's word for it."""

    CONTAINER = "container"
    EXEC = "exec instance"
    IMAGE = "image"
    VOLUME = "volume"
    NETWORK = "network"


_MISSING = {
    Thing.CONTAINER: "no_such_container",
    Thing.EXEC: "no_such_exec",
    Thing.IMAGE: "no_such_image",
    Thing.VOLUME: "no_such_volume",
    Thing.NETWORK: "no_such_network",
}

# Podman says in a field of their own what its errors come from, and answers 500 to much of what Docker Engine answers
# 400 or 409 to. The texts are constants: libpod/define/errors.go, containers/storage/errors.go, docker/distribution.
_PODMANS_MISSING = {
    "no such container": Thing.CONTAINER,
    "no such exec session": Thing.EXEC,
    "image not known": Thing.IMAGE,
    "no such volume": Thing.VOLUME,
    "network not found": Thing.NETWORK,
}
_CONFLICT = ""
"""The code of a conflict is the operation's."""
_PODMANS_REFUSALS = {
    "container state improper": _CONFLICT,
    "that name is already in use": _CONFLICT,
    "volume is being used": _CONFLICT,
    "invalid argument": "bad_parameter",
    "invalid reference format": "bad_parameter",
    "repository name must be lowercase": "bad_parameter",
    "OCI runtime attempted to invoke a command that was not found": "bad_parameter",
}
_NO_NAME = re.compile(r"[/\x00-\x1f\x7f]")


def segment(thing: Thing, name: str) -> str:
    """A name as one segment of a path.

    Raises:
        RunnerError: `no_such_...`: nothing can have this name, and in a path it would become another path.
    """
    if name in ("", ".", "..") or _NO_NAME.search(name):
        raise RunnerError(_MISSING[thing], f"No such {thing.value}: {name}", status=404)
    return quote(name, safe="")


class Operation(msgspec.Struct, frozen=True):
    """How failures of one operation of the runner face are told.

    Args:
        fallback: the code where the cause says none.
        thing: what a 404 of the engine means.
        conflict: the code of a 409.
        clean: a failure of the engine's making leaves nothing behind, so the same request may be repeated.
        stands_for: the operations by which it changes something, for the audit log.
    """

    fallback: str
    thing: Thing = Thing.CONTAINER
    conflict: str = "conflict"
    clean: bool = False
    stands_for: tuple[str, ...] = ()


ENDING_PLACES = 16
"""Execs that are being ended; more wait."""
MAX_ENDINGS = 1024
"""Execs that are being ended or wait for it; one more is not."""


class Endings:
    """Execs that are being ended: held until they are, few at once, waited for when the runner ends."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(ENDING_PLACES)
        self._tasks: set[asyncio.Task[str]] = set()

    def begin(self, ending: Coroutine[Any, Any, str]) -> "asyncio.Task[str]":
        """Run the ending of one exec, whatever becomes of who asks for it; its result is why it failed, or empty."""
        if len(self._tasks) >= MAX_ENDINGS:
            ending.close()
            ending = _too_many()
        task = asyncio.ensure_future(ending)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self, limit_s: float) -> None:
        """Wait for those under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)


async def _too_many() -> str:
    return f"{MAX_ENDINGS} execs are being ended already"


class Calls:
    """The engine, asked on behalf of one operation; failures are `RunnerError`s of that operation.

    Args:
        engine: who is asked.
        operation: for whom.
        tasks: holds what goes on in the background.
        policy: of the caller: what it may not ask the engine for, it may not have done here either.
        scopes: who owns what.
        expiry: told of what is used.
        flights: pulls that are shared.
        endings: holds the execs that are being ended.
        head_s: how long the engine may take to begin an answer that is only looked up.
    """

    def __init__(
        self,
        engine: Engine,
        operation: Operation,
        tasks: "set[asyncio.Task[Any]]",
        policy: Policy,
        scopes: Scopes,
        expiry: Expiry,
        flights: Flights,
        endings: Endings,
        head_s: float | None = None,
    ) -> None:
        self.engine = engine
        self.operation = operation
        self.expiry = expiry
        self.flights = flights
        self.endings = endings
        self.of_podman = False
        """Whether Podman gave the latest answer."""
        self._policy = policy
        self._scopes = scopes
        self._tasks = tasks
        self._head_s = head_s

    def background(self, work: Coroutine[Any, Any, R]) -> "asyncio.Task[R]":
        """Run something that goes on if its caller leaves; held until it ends (the event loop would let it go)."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int | bool | None] | None = None,
        *,
        json: Any = None,
        body: bytes | AsyncIterator[bytes] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        thing: Thing | None = None,
        accept: tuple[int, ...] = (),
        own: bool = False,
        resolved: bool = False,
        **stream: Any,
    ) -> EngineResponse:
        """Begin a call; the answer is still to be read, by `with`.

        Args:
            method, path: of the engine's API; names in the path by `segment`.
            query: parameters; None values are left out.
            json: a body, to be encoded.
            body, headers: another body, with its type.
            thing: what a 404 means here, if not what it means for the operation.
            accept: statuses of 300 and above that are no failure here.
            own: asked by the runner to do its work (how did the exec end?), not by the caller: policy has no say.
            resolved: what the path names the engine itself has named to us: it is the caller's.
            stream: further arguments of `Engine.request`.

        Raises:
            RunnerError: the engine refused, failed, or could not be reached.
        """
        given = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        target = path + ("?" + urlencode(given) if given else "")
        if json is not None:
            body, headers = msgspec.json.encode(json), (_JSON, *headers)
        elif body is None and method in ("POST", "PUT"):
            body = b""
        operation = operations.decide(method.encode(), target.encode())
        inspected = body if isinstance(body, bytes) else b""
        if not own:
            rules.check(self._policy, operation, target.encode(), body=inspected)
        label = "" if resolved else self._policy.scope.label
        async with self._scopes.turn(operation, label):
            asked = Narrowed(target.encode())
            if label:
                asked = await self._scopes.of(label).narrow(operation, target.encode(), inspected)
                if "buffer_limit" in stream:
                    stream["buffer_limit"] = max(stream["buffer_limit"], MAX_EVENT)
            if operation.id in USES and not (own or resolved):
                await self.expiry.use(operation, asked.target, self.operation.conflict)
            body = body if asked.body is None else asked.body
            response = await self.engine.request(
                method.encode(), asked.target, headers, body, operation=operation.id, **stream
            )
        self.of_podman = response.from_podman
        if response.status < 300 or response.status in accept:
            return response
        with response:
            refusal = asked.revealed(await response.read(MAX_ANSWER))
            if label:
                refusal = await self._scopes.of(label).redacted(operation, response.status, refusal)
            raise self.failure(response.status, refusal, thing)

    @property
    def scope_label(self) -> str:
        """The label of what the caller may know of; empty: all."""
        return self._policy.scope.label

    async def is_own_event(self) -> Callable[[bytes], Awaitable[bool]]:
        """Tells of which lines of the engine's events the caller may know."""
        label = self._policy.scope.label
        return await own_events(self._scopes.of(label)) if label else _any

    def check(self, method: str, target: bytes, body: bytes) -> None:
        """Refuse what the caller's policy does not allow; `open` does it by itself.

        Raises:
            RunnerError: `policy_denied` and the others of `rules.check`.
        """
        rules.check(self._policy, operations.decide(method.encode(), target), target, body=body)

    async def call(
        self, method: str, path: str, query: Mapping[str, str | int | bool | None] | None = None, **more: Any
    ) -> bytes:
        """A whole call: the body of the answer. Arguments and errors as `open`; a look-up has a time limit."""
        if method == "GET":
            more["head_s"] = self._head_s
        with await self.open(method, path, query, **more) as response:
            return await response.read(MAX_ANSWER)

    def failure(self, status: int, body: bytes, thing: Thing | None = None) -> RunnerError:
        """The engine's error as the runner's: its status, its message, the code by cause."""
        told = _told(body)
        message = told.message or f"the engine answered {status}"
        if not 400 <= status < 600:
            return RunnerError("engine_garbage", f"the engine answered {status}, which says nothing here: {message}")
        code = self._cause(status, told, thing)
        return RunnerError(code, message, status=status, retryable=self.operation.clean and code == "server_error")

    def _cause(self, status: int, told: _EngineError, thing: Thing | None) -> str:
        conflict = self.operation.conflict
        match status:
            case 404 if told.cause in _PODMANS_MISSING:
                return _MISSING[_PODMANS_MISSING[told.cause]]
            case 404 if told.message.lower().startswith("could not find the file"):
                return self.operation.fallback  # A path within a container, which is there.
            case 404 if told.message.lower().startswith(("network ", "no such network")):
                return _MISSING[Thing.NETWORK]
            case 404:
                return _MISSING[thing or self.operation.thing]
            case 409:
                return conflict
            case 400:
                return "bad_parameter"
            case 500 if told.cause in _PODMANS_REFUSALS:
                return _PODMANS_REFUSALS[told.cause] or conflict
            case _ if status >= 500:
                return "server_error"
            case _:
                return self.operation.fallback


def decoded(answer: bytes, form: type[R]) -> R:
    """The engine's JSON as a type.

    Raises:
        RunnerError: `engine_garbage`: it is none, or of another form.
    """
    try:
        return msgspec.json.decode(answer, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunnerError("engine_garbage", f"the engine's answer is not what was asked for: {error}") from error


async def _any(line: bytes) -> bool:
    return True


def _text(value: str | int | bool) -> str:
    return ("1" if value else "0") if isinstance(value, bool) else str(value)


def _told(body: bytes) -> _EngineError:
    try:
        return msgspec.json.decode(body, type=_EngineError)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _EngineError(body[:500].decode("utf-8", "replace").strip())
