"""Expiry: containers with a time to live that nobody has used for that long are stopped and removed.

One task minds them. It asks the engine which there are (by label, at an interval, and before it acts), and sleeps until
the next one's time could be over; what counts as their use, and what labels mean, is in `leases.py`. What goes through
the runner is told to `Expiry.use` before it goes to the engine, and is a use for as long as the task that serves it.

Everything here runs on one event loop, so the order is clear: a use that comes before a container is marked as ending
keeps it, one that comes later is refused, and nothing comes between the look at its uses and the mark. A container is
stopped and removed by its id, never by force: one that somebody started again meanwhile stays, and counts as used.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

import operations
from audit import Asked, Audit
from dockerapi import Engine
from errors import RunnerError
from leases import INSTANCE, TTL, Found, Lease, Leases, Use, inherited, labels
from logs import current_request
from operations import Operation
from policy import Policies

log = logging.getLogger("docker_runner.expiry")

_READS = frozenset(("ContainerArchive", "ContainerExport", "ContainerLogs"))
USES = _READS | {
    *("ContainerAttach", "ContainerExec", "ContainerRestart", "ContainerStart", "ContainerUnpause", "ExecStart"),
    "PutContainerArchive",
}
"""Operations that are use of a container. To look at it (inspect, list, stats, top, wait, events) is none: a monitor
would keep everything."""

MAX_AT_ONCE = 8
"""Containers that are ended at the same time."""
STOP_GRACE_S = 10
"""Seconds for a container to end by itself, as `docker stop` has it. Not its own `StopTimeout`, which may be years."""
LOOK_UP_S = 30.0
"""Seconds for the engine to begin an answer."""
REMOVAL_S = 10.0
"""Seconds for the engine to end a removal that it has begun by itself (`AutoRemove`)."""
RETRY_S = (1.0, 300.0)
"""Seconds until what failed is tried again, at first and at last."""
MIN_PAUSE_S = 1.0
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an engine's answer."""


class _Labelled(msgspec.Struct, rename="pascal"):
    labels: dict[str, str] | None = None


class _Image(msgspec.Struct, rename="pascal"):
    config: _Labelled | None = None


class _Exec(msgspec.Struct):
    container: str = msgspec.field(name="ContainerID")


class _State(msgspec.Struct, rename="pascal"):
    running: bool


class _Container(msgspec.Struct, rename="pascal"):
    state: _State


class _Restarted(Exception):  # noqa: N818
    """Somebody has started the container again."""


class Expiry:
    """Minds the containers of this runner that have a time to live.

    Args:
        engine: where they are.
        audit: told of each removal.
        policies: asked anew each time: if all of them have scopes, what is outside of these is not touched.
        instance: the name of this runner among those on the engine.
        interval_s: how often the engine is asked for them.
        clock: seconds, monotonic.
        on_reaped: told what was done to a container: `stopped`, `removed`, or `failed`, to be tried again.
    """

    def __init__(
        self,
        engine: Engine,
        audit: Audit,
        policies: Callable[[], Policies],
        *,
        instance: str,
        interval_s: float,
        clock: Callable[[], float],
        on_reaped: Callable[[str], object] = lambda action: None,
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._policies = policies
        self._instance = instance
        self._interval_s = interval_s
        self._clock = clock
        self._on_reaped = on_reaped
        self._leases = Leases(clock)
        self._passed_over: set[str] = set()
        self._looked_at = clock()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        filters = quote(msgspec.json.encode({"label": [f"{INSTANCE}={instance}", TTL]}))
        self._list = f"/containers/json?all=1&filters={filters}"

    def __len__(self) -> int:
        """How many there are."""
        return len(self._leases)

    def begin(self) -> None:
        """Begin to mind them, on the running loop; until then there are no uses to note."""
        self._task = asyncio.create_task(self._mind())

    async def end(self) -> None:
        """Stop to; what was begun on the engine goes on there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def labels(self, ttl_s: int) -> dict[str, str]:
        """What a container with a time to live is labelled with."""
        return labels(self._instance, ttl_s)

    # Use.

    async def use(self, operation: Operation, target: bytes, conflict: str = "conflict") -> None:
        """An operation of `USES` is about to go to the engine. It is a use until the running task ends.

        Args:
            operation: that of the target.
            target: as it goes to the engine: names are the caller's to use.
            conflict: the code of the refusal.

        Raises:
            RunnerError: the container has expired and is being removed; reading from it goes on.
        """
        if self._task is None:
            return
        name = operations.parameter(operation, target)
        use = self._leases.begin(name, of_exec=operation.id == "ExecStart")
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._leases.end(use))
        if use.of_exec and len(self._leases):
            await self._resolve(use)
        if use.lease is not None and use.lease.ending and operation.id not in _READS:
            raise _expired(name, conflict)

    def touch(self, container: str) -> None:
        """A container counts as used just now.

        Args:
            container: its whole id, as the engine tells it.

        Raises:
            RunnerError: it has expired and is being removed.
        """
        if self._task is None:
            return
        use = self._leases.begin(container)
        self._leases.end(use)
        if use.lease is not None and use.lease.ending:
            raise _expired(container, "conflict")

    async def _resolve(self, use: Use) -> None:
        """Ask the engine in which container an exec is; if it does not say, it will tell the caller why."""
        with contextlib.suppress(RunnerError):
            status, answer = await self._ask(b"GET", f"/exec/{quote(use.name, safe='')}/json")
            if status == 200:
                self._leases.resolve(use, _decoded(answer, _Exec).container)

    # The task.

    async def _mind(self) -> None:
        while True:
            pause_s = 0.0
            try:
                await self._look()
                if not await self._end_due():
                    await self._sleep()
            except RunnerError as error:
                pause_s = self._failed(error)
            except Exception:
                log.exception("a defect of expiry; it goes on")
                pause_s = RETRY_S[1]
            await asyncio.sleep(pause_s)

    def _failed(self, error: RunnerError) -> float:
        """The engine could not be asked. Returns when it is asked again, in seconds."""
        self._failures += 1
        if self._failures == 1:
            log.warning("cannot ask for containers with a time to live: %s; it is tried again", error.message)
        return min(_backoff_s(self._failures), max(self._interval_s, MIN_PAUSE_S))

    async def _look(self) -> None:
        """Ask the engine which there are."""
        status, answer = await self._ask(b"GET", self._list)
        if status != 200:
            raise _failure("find_failed", status, answer)
        scopes = self._scopes()
        found = [each for each in _decoded(answer, list[Found]) if _within(each.labels or {}, scopes)]
        self._passed_over &= {each.id for each in found}
        minded = [(each, ttl_s) for each in found if (ttl_s := each.ttl_s()) is not None]
        images: dict[str, Mapping[str, str] | None] = {}
        minded = [each for each in minded if each[0].id in self._leases or await self._is_own(each[0], images)]
        now = self._clock()
        if self._failures:
            log.info("asked for containers with a time to live again")
            self._leases.postpone(now - self._looked_at)
            self._failures = 0
        self._looked_at = now
        new = [each for each in minded if each[0].id not in self._leases]
        known = len(self._leases)
        self._leases.update(minded)
        for container, ttl_s in new:
            log.debug("container %s has a time to live of %d s", container.id[:12], ttl_s)
        if len(self._leases) != known:
            log.info("%d containers have a time to live", len(self._leases))
        for use in self._leases.unresolved() if len(self._leases) else ():
            await self._resolve(use)

    def _scopes(self) -> set[str] | None:
        """The labels of what may be touched; None if there is a policy without a scope."""
        policies = self._policies()
        scopes = {policy.scope.label for policy in (policies.default, *policies.keys.values())}
        return None if "" in scopes else scopes

    async def _is_own(self, container: Found, images: dict[str, Mapping[str, str] | None]) -> bool:
        """Whether a container was given its time to live itself, by whoever created it. `images` is a memory."""
        if container.id in self._passed_over:
            return False
        if container.image_id not in images:
            status, answer = await self._ask(b"GET", f"/images/{quote(container.image_id, safe=':')}/json")
            if status not in (200, 404):
                log.warning("cannot tell whose the labels of container %s are: %s", container.id[:12], answer[:200])
                return False
            images[container.image_id] = _labels_of_image(answer) if status == 200 else None
        image = images[container.image_id]
        if image is not None and not inherited(container.labels or {}, image):
            return True
        reason = "its image is gone, which may have set that" if image is None else "only its image says so"
        log.warning("container %s has a time to live, but %s: it is left alone", container.id[:12], reason)
        self._passed_over.add(container.id)
        return False

    async def _sleep(self) -> None:
        """Until the engine is to be asked again, or the time of one is over."""
        now = asyncio.get_running_loop().time
        end = now() + self._interval_s
        while now() < end and self._leases.next_due() > self._clock():
            left_s = min(end - now(), self._leases.next_due() - self._clock())
            await asyncio.sleep(max(left_s, min(MIN_PAUSE_S, self._interval_s)))

    # Ending containers.

    async def _end_due(self) -> bool:
        """End those whose time is over, some at once; False if there was none."""
        due = self._leases.due()[:MAX_AT_ONCE]
        for lease in due:
            lease.ending = True
            log.info("container %s has expired: it is stopped and removed", lease.called())
        async with asyncio.TaskGroup() as group:
            for lease in due:
                group.create_task(self._end(lease))
        return bool(due)

    async def _end(self, lease: Lease) -> None:
        """End one, and tell of it. Whatever fails is tried again later."""
        request_id = secrets.token_hex(8)
        current_request.set(request_id)
        began = time.perf_counter()
        idle_s = round(self._clock() - lease.used_at)
        status, told = 0, None
        try:
            status = await self._stop_and_remove(lease)
        except _Restarted:
            lease.used_at = self._clock()
            log.info("container %s was started again while it was being removed: it stays", lease.called())
            return
        except RunnerError as error:
            status, told = error.status, error
            self._try_again(lease, error)
        except asyncio.CancelledError:
            told = RunnerError("engine_cut_head", "the runner ended before the engine's answer; it may have happened")
            raise
        else:
            self._leases.forget(lease)
            if not status:
                return  # Somebody else did it.
            self._on_reaped("removed")
            log.info(
                "removed container %s: idle for %d s, its time to live is %d s; %d with one are left",
                *(lease.called(), idle_s, lease.ttl_s, len(self._leases)),
            )
        finally:
            lease.ending = False
            if status or told:
                self._record(request_id, lease, told, status, time.perf_counter() - began)

    def _try_again(self, lease: Lease, error: RunnerError) -> None:
        lease.failures += 1
        pause_s = _backoff_s(lease.failures)
        lease.not_before = self._clock() + pause_s
        self._on_reaped("failed")
        log.warning(
            "container %s has expired, and could not be removed: %s; tried again in %d s",
            *(lease.called(), error.message, pause_s),
        )

    def _record(self, request_id: str, lease: Lease, error: RunnerError | None, status: int, took_s: float) -> None:
        self._audit.record(
            request_id=request_id,
            client="expiry",
            method="DELETE",
            target=f"/containers/{lease.id}".encode(),
            asked=Asked("Expiry", True, lambda: lease.id, ("ContainerStop", "ContainerDelete")),
            error=error,
            status=status,
            took_s=took_s,
        )

    async def _stop_and_remove(self, lease: Lease) -> int:
        """Returns the status of the removal; 0 if the container was gone before."""
        path = f"/containers/{lease.id}"
        status, answer = await self._ask(b"POST", f"{path}/stop?t={STOP_GRACE_S}", STOP_GRACE_S + LOOK_UP_S)
        if status == 404:
            return 0
        if status not in (204, 304):
            raise _failure("stop_failed", status, answer)
        if status == 204:
            self._on_reaped("stopped")
        try:
            async with asyncio.timeout(REMOVAL_S):
                pause_s = 0.05
                while True:
                    status, answer = await self._ask(b"DELETE", f"{path}?v=1")
                    if status in (204, 404):
                        return 204
                    if status != 409:
                        raise _failure("remove_failed", status, answer)
                    # It runs again, or the engine is removing it by itself.
                    found, state = await self._ask(b"GET", f"{path}/json")
                    if found == 200 and _decoded(state, _Container).state.running:
                        raise _Restarted
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1.0)
        except TimeoutError:
            raise _failure("remove_failed", status, answer) from None

    async def _ask(self, method: bytes, target: str, head_s: float = LOOK_UP_S) -> tuple[int, bytes]:
        body = b"" if method == b"POST" else None
        with await self._engine.request(method, target.encode(), body=body, head_s=head_s) as response:
            return response.status, await response.read(MAX_ANSWER)


def _within(own: Mapping[str, str], scopes: set[str] | None) -> bool:
    if scopes is None:
        return True
    return any(own.get(name) == value for name, _, value in (scope.partition("=") for scope in scopes))


def _labels_of_image(answer: bytes) -> Mapping[str, str]:
    config: _Labelled | None = _decoded(answer, _Image).config
    return (config and config.labels) or {}


def _expired(container: str, code: str) -> RunnerError:
    message = f"Container {container} is not running: it has expired and is being removed"
    return RunnerError(code, message, status=409)


def _failure(code: str, status: int, answer: bytes) -> RunnerError:
    return RunnerError(code, f"the engine answered {status}: {answer[:500].decode('utf-8', 'replace').strip()}")


def _backoff_s(failures: int) -> float:
    first_s, last_s = RETRY_S
    return min(first_s * 2.0 ** min(failures - 1, 16), last_s)


def _decoded(answer: bytes, form: Any) -> Any:
    try:
        return msgspec.json.decode(answer, type=form)
    except msgspec.MsgspecError as error:
        raise RunnerError("engine_garbage", f"the engine's answer is not what was asked for: {error}") from error
