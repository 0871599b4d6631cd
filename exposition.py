"""What is counted, as Prometheus's families: one table, `FAMILIES`, and the collector that fills it when it is asked.

The format is the library's. Its text is made in pieces, so that whoever sends it can let others run in between.

To add a family: a row in `FAMILIES`, a panel on the dashboard (`deploy/monitoring/grafana`).
"""

import platform
from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import openapi
from app import App
from client import __version__
from metrics import BOUNDS_S, UNKNOWN_OF_RUNNER, Histogram

_Labels = tuple[str, ...]
_LE = [*map(str, BOUNDS_S), "+Inf"]
SAMPLES_AT_ONCE, HISTOGRAMS_AT_ONCE = 200, 10
"""As many are written in one go, and the event loop waits for it."""
ENGINE_FACE, RUNNER_FACE, UNKNOWN = "engine", "runner", "unknown"

STREAM_KINDS = {
    "SystemEvents": "events",
    "eventsSse": "events",
    "ContainerLogs": "logs",
    "containersLogsSse": "logs",
    "ContainerStats": "stats",
    "ContainerWait": "wait",
    "ContainerAttach": "attach",
    "ExecStart": "exec",
    "execInteractiveWs": "exec",
    "Session": "session",
    "Grpc": "session",
}
"""What kind of stream an operation gives that lasts."""


class Observed(msgspec.Struct, frozen=True):
    """What a scrape is told beside the counters: whether the engine answered a ping; connections of callers now."""

    engine_up: bool
    connections: int
    max_connections: int


_Samples = Iterator[tuple[_Labels, float | Histogram]]


class Family(msgspec.Struct, frozen=True):
    """A row of the table. A counter's name has no `_total` here; it is added in the text."""

    name: str
    kind: str
    labels: _Labels
    meaning: str
    samples: Callable[[App, Observed], _Samples]

    @property
    def exported(self) -> str:
        """The name as Prometheus knows it; a histogram has `_bucket`, `_sum`, `_count` after it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def face_and_operation(asked: str) -> tuple[str, str]:
    """The labels of an operation, as `Asked` has it or as it is counted where nothing was known."""
    if asked == UNKNOWN_OF_RUNNER:
        return RUNNER_FACE, UNKNOWN
    _, blank, path = asked.partition(" ")
    return (RUNNER_FACE, openapi.operation_id(path)) if blank else (ENGINE_FACE, asked or UNKNOWN)


def _requests(app: App, now: Observed) -> _Samples:
    for asked, of in app.metrics.operations.items():
        labels = face_and_operation(asked)
        for (status, outcome), count in of.ends.items():
            yield (*labels, str(status) if status else "none", outcome), count


def _durations(app: App, now: Observed) -> _Samples:
    for asked, of in app.metrics.operations.items():
        yield face_and_operation(asked), of.durations


def _engine_durations(app: App, now: Observed) -> _Samples:
    for operation, histogram in app.metrics.engine.items():
        yield (operation,), histogram


def _bytes(direction: str) -> Callable[[App, Observed], _Samples]:
    def samples(app: App, now: Observed) -> _Samples:
        sizes = {asked: getattr(of, direction) for asked, of in app.metrics.operations.items()}
        for stream in app.metrics.open_streams:
            if stream.asked is not None:
                asked = stream.asked.operation
                sizes[asked] = sizes.get(asked, 0) + getattr(stream.connection, direction)
        for asked, size in sizes.items():
            yield face_and_operation(asked), size

    return samples


def _streams(app: App, now: Observed) -> _Samples:
    counts = dict.fromkeys(STREAM_KINDS.values(), 0)
    for stream in app.metrics.open_streams:
        if stream.asked is not None:
            counts[STREAM_KINDS[face_and_operation(stream.asked.operation)[1]]] += 1
    for kind, count in counts.items():
        yield (kind,), count


def _keys(app: App, now: Observed) -> _Samples:
    names = {name or "": 0 for name, _ in app.verifier.keyring.secrets}
    for key, count in (names | app.metrics.keys).items():
        yield (key,), count


def _errors(app: App, now: Observed) -> _Samples:
    for code, count in app.metrics.errors.items():
        yield (code,), count


def _resources(app: App, now: Observed) -> Iterator[tuple[str, int, int]]:
    """What is bounded by a setting: name, use, bound."""
    admission, pool, nonces = app.protected, app.engine.use(), app.verifier.nonces
    yield "requests", admission.requests.taken, admission.requests.limit
    yield "streams", admission.streams.taken, admission.streams.limit
    yield "connections", now.connections, now.max_connections
    yield "engine_connections", pool.busy, pool.limit
    yield "nonces", len(nonces), nonces.limit
    yield "unverified_bytes", admission.unverified.used, admission.unverified.limit


def _used(app: App, now: Observed) -> _Samples:
    for name, used, _ in _resources(app, now):
        yield (name,), used


def _limits(app: App, now: Observed) -> _Samples:
    for name, _, limit in _resources(app, now):
        yield (name,), limit


def _pool(app: App, now: Observed) -> _Samples:
    pool = app.engine.use()
    yield ("busy",), pool.busy
    yield ("idle",), pool.idle


def _reaped(app: App, now: Observed) -> _Samples:
    for action, count in app.metrics.reaps.items():
        yield (action,), count


def _one(value: Callable[[App, Observed], float]) -> Callable[[App, Observed], _Samples]:
    return lambda app, now: iter([((), value(app, now))])


_OF_OPERATION = ("face", "operation")

FAMILIES: tuple[Family, ...] = (
    Family(
        "docker_runner_build_info",
        "gauge",
        ("version", "python"),
        "Always 1: the version that runs, on which Python.",
        lambda app, now: iter([((__version__, platform.python_version()), 1)]),
    ),
    Family(
        "docker_runner_requests",
        "counter",
        (*_OF_OPERATION, "status", "outcome"),
        "Requests and WebSockets that have ended, by the status that was answered and what became of them.",
        _requests,
    ),
    Family(
        "docker_runner_errors",
        "counter",
        ("code",),
        "What the runner told of its own accord, by error code.",
        _errors,
    ),
    Family(
        "docker_runner_key_requests",
        "counter",
        ("key",),
        "Verified requests, by the name of the key; that of unnamed secrets is empty.",
        _keys,
    ),
    Family(
        "docker_runner_request_duration_seconds",
        "histogram",
        _OF_OPERATION,
        "From a request's head to the end of its answer; without streams, which last.",
        _durations,
    ),
    Family(
        "docker_runner_engine_duration_seconds",
        "histogram",
        ("operation",),
        "The engine's part: from sending it a request, of either face, to the head of its answer.",
        _engine_durations,
    ),
    Family(
        "docker_runner_request_bytes",
        "counter",
        _OF_OPERATION,
        "Bytes of bodies and WebSocket messages from callers; of open streams as they come, else at the end.",
        _bytes("received"),
    ),
    Family(
        "docker_runner_response_bytes",
        "counter",
        _OF_OPERATION,
        "Bytes of bodies and WebSocket messages to callers; of open streams as they go, else at the end.",
        _bytes("sent"),
    ),
    Family("docker_runner_open_streams", "gauge", ("kind",), "Streams that are open.", _streams),
    Family(
        "docker_runner_used",
        "gauge",
        ("resource",),
        "How much is used of what is bounded; `nonces` are those held.",
        _used,
    ),
    Family("docker_runner_limit", "gauge", ("resource",), "Its bound, from the settings.", _limits),
    Family(
        "docker_runner_engine_up",
        "gauge",
        (),
        "1 if the engine answered a ping, sent for this scrape or within the second before, else 0.",
        _one(lambda app, now: int(now.engine_up)),
    ),
    Family(
        "docker_runner_engine_connections", "gauge", ("state",), "Connections to the engine, busy and kept idle.", _pool
    ),
    Family(
        "docker_runner_engine_waiting",
        "gauge",
        (),
        "Requests that wait for a connection to the engine.",
        _one(lambda app, now: app.engine.use().waiting),
    ),
    Family(
        "docker_runner_engine_waits",
        "counter",
        (),
        "Requests that had to wait for one.",
        _one(lambda app, now: app.engine.use().waits),
    ),
    Family(
        "docker_runner_engine_wait_seconds",
        "counter",
        (),
        "How long they waited, all together.",
        _one(lambda app, now: app.engine.use().waited_s),
    ),
    Family(
        "docker_runner_event_lag_seconds",
        "histogram",
        (),
        "How old an event is, by the engine's time, when it leaves for a caller; without history.",
        lambda app, now: iter([((), app.metrics.event_lag)]),
    ),
    Family(
        "docker_runner_expiring_containers",
        "gauge",
        (),
        "Containers with a time to live.",
        _one(lambda app, now: app.metrics.expiring()),
    ),
    Family(
        "docker_runner_expiry_actions",
        "counter",
        ("action",),
        "What was done about containers whose time was over; `failed` is tried again.",
        _reaped,
    ),
)

OF_THE_PROCESS = (
    ("process_cpu_seconds_total", "counter", "Processor time."),
    ("process_resident_memory_bytes", "gauge", "Memory that is resident."),
    ("process_virtual_memory_bytes", "gauge", "Address space."),
    ("process_open_fds", "gauge", "File descriptors that are open."),
    ("process_max_fds", "gauge", "How many may be."),
    ("process_start_time_seconds", "gauge", "When it started, in seconds since the epoch."),
)
"""What the library tells of the process: name, kind, meaning."""


class _Single(Collector):
    """One family, for the library to write."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """prometheus_client."""
        return (self._family,)


class Exposition:
    """The metrics of one service as text."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._process = ProcessCollector(registry=None)

    def pieces(self, now: Observed) -> Iterator[bytes]:
        """The text, in pieces that take about a millisecond each. A family is looked at once, in its first piece."""
        for family in FAMILIES:
            samples = list(family.samples(self._app, now))
            size = HISTOGRAMS_AT_ONCE if family.kind == "histogram" else SAMPLES_AT_ONCE
            for start in range(0, max(1, len(samples)), size):
                text = generate_latest(_Single(_filled(family, samples[start : start + size])))
                # Each text begins with the family's HELP and TYPE, which may stand once only.
                yield text.split(b"\n", 2)[2] if start else text
        yield generate_latest(self._process)


def _filled(family: Family, samples: Iterable[tuple[_Labels, float | Histogram]]) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.meaning, labels=family.labels)
        for labels, value in samples:
            assert isinstance(value, Histogram)
            histogram.add_metric(labels, _buckets(value), value.sum)
        return histogram
    made = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = made(family.name, family.meaning, labels=family.labels)
    for labels, value in samples:
        assert not isinstance(value, Histogram)
        metric.add_metric(labels, value)
    return metric


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as the format wants them."""
    total = 0
    buckets = []
    for bound, count in zip(_LE, histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
