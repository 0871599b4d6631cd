"""What the service counts of itself, in plain Python: a request costs one look-up, a few additions and a bisection.

`exposition.py` makes Prometheus's families of it when somebody asks. What knows a figure at any time (a pool, a bound)
is asked then, and pushes nothing.

Nothing here grows by what callers choose: the keys are ids of operations and routes, statuses, outcomes, error codes,
and the names of verified keys.
"""

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.types import Message, Send

from audit import Asked
from errors import CODES, RunnerError

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
"""Upper bounds of the buckets of every histogram, in seconds."""

UNKNOWN_OF_ENGINE, UNKNOWN_OF_RUNNER = "", "/v1/"
"""Stand for the operation of a request of either face that was refused before it was known what it asked for."""

RELAYED = "relayed"
LEFT = "caller_left"
ENGINE_ERROR = "engine_error"
_OUTCOMES: Mapping[str, tuple[str, ...]] = {
    "refused_auth": (
        *("missing_headers", "duplicate_headers", "invalid_timestamp", "timestamp_out_of_range", "invalid_nonce"),
        *("invalid_signature", "replayed_nonce", "body_hash_mismatch", "invalid_chunk"),
    ),
    "refused_policy": ("policy_denied", "ambiguous_body", "ambiguous_query"),
    "refused_limit": (
        *("body_too_large", "target_too_long", "headers_too_large", "request_timeout"),
        *("too_many_connections", "too_many_requests", "too_many_streams", "nonce_store_full"),
        *("unverified_bodies_full", "engine_busy", "output_too_large", "exec_timeout", "exec_idle_timeout"),
    ),
    "refused_request": (
        *("bad_request", "pipelining_refused", "invalid_path", "not_found", "method_not_allowed"),
        *("upgrade_unsupported", "upgrade_required", "invalid_json", "validation_error", "unsupported_media_type"),
        "foreign_origin",
    ),
    "shutting_down": ("shutting_down",),
    "internal_error": ("internal_error", "spool_failed"),
    RELAYED: tuple(code for code, row in CODES.items() if row.status == 0),
}
_OUTCOME_OF = {code: outcome for outcome, codes in _OUTCOMES.items() for code in codes}
OUTCOMES = (*_OUTCOMES, ENGINE_ERROR, LEFT)

REAPED = ("stopped", "removed", "failed")
"""What can become of a container whose time is over; `failed` is tried again."""

_TIME_NANO = re.compile(rb'"timeNano":(\d{1,19})')


def outcome_of(error: RunnerError) -> str:
    """What kind of end an error is. The engine's own answer is relayed, whatever it says, on both faces."""
    outcome = _OUTCOME_OF.get(error.code, ENGINE_ERROR)
    return RELAYED if outcome is ENGINE_ERROR and error.status < 500 else outcome


class Histogram:
    """How often a duration fell between which of `BOUNDS_S`, and the sum of all, in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum += seconds


class OfOperation:
    """What is counted of one operation: its ends by status and outcome, times, bytes of bodies."""

    __slots__ = ("durations", "ends", "received", "sent")

    def __init__(self) -> None:
        self.ends: dict[tuple[int, str], int] = {}
        self.durations = Histogram()
        self.received = 0
        self.sent = 0


class Traffic(Protocol):
    """The part of an `admission.Connection` that is counted."""

    status: int
    received: int
    sent: int
    disconnected: bool


class Stream(Protocol):
    """The part of a request (`admission.Request`) that is looked at while it is an open stream."""

    asked: Asked | None

    @property
    def connection(self) -> Traffic:
        """The caller's."""


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        self.operations: dict[str, OfOperation] = {}
        """By `Asked.operation`, or one of the two that stand for the unknown."""
        self.engine: dict[str, Histogram] = {}
        """Seconds from sending a request to the head of the engine's answer, by the engine's operation."""
        self.keys: dict[str, int] = {}
        """Verified requests, by the name of the key that signed; the unnamed one's is empty."""
        self.errors: dict[str, int] = dict.fromkeys(CODES, 0)
        """By code. All are there from the start: the rise of a series that begins with 1 is not seen."""
        self.event_lag = Histogram()
        self.reaps: dict[str, int] = dict.fromkeys(REAPED, 0)
        self.expiring: Callable[[], int] = lambda: 0
        """How many containers have a time to live; replaced by who knows."""
        self.open_streams: set[Stream] = set()
        """They last: what has passed on them is added up when it is asked for, not at their end."""

    def ended(
        self,
        operation: str,
        traffic: Traffic,
        error: RunnerError | None,
        took_s: float,
        *,
        verified: bool,
        lasting: bool,
        key: str | None,
    ) -> None:
        """Count a request that has ended.

        Args:
            operation: as `Asked` has it, or one of the unknown.
            traffic: its connection.
            error: what the runner told instead of the engine's answer, or at its end.
            took_s: from the request's head to its end.
            verified: by a key, or taken without on the local socket.
            lasting: it was a stream, whose length says nothing of speed.
            key: the name of the key that signed.
        """
        of = self.operations.get(operation)
        if of is None:
            of = self.operations[operation] = OfOperation()
        if error is not None:
            outcome = outcome_of(error)
            self.errors[error.code] += 1
        elif traffic.disconnected and not (lasting and traffic.status):
            outcome = LEFT
        else:
            outcome = RELAYED
        end = (traffic.status, outcome)
        of.ends[end] = of.ends.get(end, 0) + 1
        of.received += traffic.received
        of.sent += traffic.sent
        if not lasting:
            of.durations.observe(took_s)
        if verified:
            name = key or ""
            self.keys[name] = self.keys.get(name, 0) + 1

    def refused(self, target: bytes, error: RunnerError) -> None:
        """Count what the server refused by itself."""
        of = self.operations.setdefault(unknown(target), OfOperation())
        end = (error.status, outcome_of(error))
        of.ends[end] = of.ends.get(end, 0) + 1
        self.errors[error.code] += 1

    def engine_answered(self, operation: str, took_s: float) -> None:
        """The engine has begun its answer to an operation, so long after the request was sent."""
        histogram = self.engine.get(operation)
        if histogram is None:
            histogram = self.engine[operation] = Histogram()
        histogram.observe(took_s)

    def events_passed(self, piece: bytes, since_ns: int) -> None:
        """Whole events leave for a caller: how old each is. Not of history: only those younger than `since_ns`."""
        now = time.time_ns()
        for found in _TIME_NANO.findall(piece):
            if (happened := int(found)) >= since_ns:
                self.event_lag.observe(max(0, now - happened) / 1e9)

    def watching_events(self, send: Send) -> Send:
        """An ASGI `send` for a stream of events that leaves in whole lines; it counts how old they are."""
        since_ns = time.time_ns()

        async def watched(message: Message) -> None:
            self.events_passed(message.get("body", b""), since_ns)
            await send(message)

        return watched

    def reaped(self, action: str) -> None:
        """Something was done (one of `REAPED`) about a container whose time is over."""
        self.reaps[action] += 1


def unknown(target: bytes) -> str:
    """Which face a request was for, of which no more is known."""
    return UNKNOWN_OF_RUNNER if target.startswith(b"/v1/") else UNKNOWN_OF_ENGINE
