"""Metrics: what is counted, where it can be read, and that neither can be made to grow by callers."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import openapi
import operations
from app import App
from audit import Asked
from client import sign
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from errors import CODES, RunnerError
from exposition import FAMILIES, OF_THE_PROCESS, STREAM_KINDS, Exposition, Observed, face_and_operation
from metrics import BOUNDS_S, OUTCOMES, REAPED, Histogram, Metrics, outcome_of
from scraped import PORT, Scrape, scrape, scraped
from scripted import OK, Peer, ScriptedEngine, chunked
from service import SECRET, Runner, read_to_end, signed_head, with_files
from sessions import EOF, session, stdin
from settings import read_settings
from upgraded import upgraded
from workloads import INTERACTIVE, ROUTES

OTHER = "another-secret-of-the-tests-0123456789"
REQUESTS = "docker_runner_requests_total"


@pytest.fixture(scope="module")
def metered(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with metrics, a named key, and the default policy."""
    settings = {
        **with_files(tmp_path_factory.mktemp("secrets"), f"{SECRET}\nci:{OTHER}\n"),
        "DOCKER_RUNNER_POLICY": "workloads",
        "DOCKER_RUNNER_MAX_BODY": "4096",
    }
    with Runner(engine.socket, {**settings, **PORT}) as running:
        yield running
    assert not any("defect" in line or "Traceback" in line for line in running.log)


@pytest.fixture(scope="module")
def box(direct: EngineDirect, names: Names, image: str) -> str:
    """A running container that reads."""
    return Containers(direct, names, image)("cat", OpenStdin=True)


def rises(runner: Runner, act: Callable[[], object], name: str, **labels: str) -> float:
    """By how much a figure rises because of an act; waits until it does."""
    before = scrape(runner).value(name, **labels)
    act()
    return scraped(runner, lambda now: now.value(name, **labels) > before).value(name, **labels) - before


class TestRequests:
    def test_what_the_engine_answers_is_relayed_with_its_status(self, metered: Runner, names: Names) -> None:
        labels = {"face": "engine", "operation": "ContainerInspect", "outcome": "relayed", "status": "404"}
        missing = f"/v1.41/containers/{names()}/json"
        assert rises(metered, lambda: metered.request("GET", missing), REQUESTS, **labels) == 1

    def test_so_it_is_on_the_runner_face(self, metered: Runner, names: Names) -> None:
        labels = {"face": "runner", "operation": "containersInspect", "outcome": "relayed", "status": "404"}
        missing = f"/v1/containers/inspect?containerId={names()}"
        assert rises(metered, lambda: metered.request("GET", missing), REQUESTS, **labels) == 1

    def test_what_is_not_signed_is_refused_by_auth(self, metered: Runner) -> None:
        labels = {"face": "engine", "operation": "unknown", "outcome": "refused_auth", "status": "401"}
        unsigned = b"GET /_ping HTTP/1.1\r\nHost: runner\r\n\r\n"
        assert rises(metered, lambda: metered.raw(unsigned), REQUESTS, **labels) == 1

    def test_the_face_of_what_is_unknown_is_known(self, metered: Runner) -> None:
        labels = {"face": "runner", "operation": "unknown", "outcome": "refused_request", "status": "404"}
        assert rises(metered, lambda: metered.request("GET", "/v1/nothing"), REQUESTS, **labels) == 1

    def test_policy(self, metered: Runner, image: str) -> None:
        labels = {"operation": "ContainerCreate", "outcome": "refused_policy", "status": "403"}
        config = json.dumps({"Image": image, "HostConfig": {"Privileged": True}}).encode()
        typed = {"Content-Type": "application/json"}
        act = partial(metered.request, "POST", "/containers/create", config, typed)
        assert rises(metered, act, REQUESTS, **labels) == 1

    def test_limits(self, metered: Runner) -> None:
        labels = {"outcome": "refused_limit", "status": "413"}
        act = partial(metered.request, "POST", "/images/load", b"x" * 5000)
        assert rises(metered, act, REQUESTS, **labels) == 1

    def test_what_the_server_refuses_by_itself(self, metered: Runner) -> None:
        labels = {"operation": "unknown", "outcome": "refused_request", "status": "400"}
        assert rises(metered, lambda: metered.raw(b"this is not HTTP\r\n\r\n"), REQUESTS, **labels) == 1

    def test_errors_by_code(self, metered: Runner) -> None:
        assert rises(metered, lambda: metered.raw(b"no\r\n\r\n"), "docker_runner_errors_total", code="bad_request") == 1
        codes = scrape(metered).families["docker_runner_errors"].samples
        assert {sample.labels["code"] for sample in codes} == set(CODES)

    @pytest.mark.parametrize("kept", [False, True], ids=["on a new connection", "on a kept one"])
    def test_a_caller_that_leaves_before_its_answer(self, kept: bool) -> None:
        def first_only(peer: Peer) -> None:
            while b"/containers/json" not in peer.read_request():
                peer.send(OK)
            peer.sees_close()

        settings = {**PORT, "DOCKER_RUNNER_ENGINE_WATCH_MS": "0"}
        with ScriptedEngine(first_only) as engine, Runner(engine.path, settings) as runner:
            if kept:
                runner.request("GET", "/version")
            asked = len(engine.requests)
            with runner.connect() as sock:
                sock.sendall(signed_head("GET", "/containers/json"))
                assert wait_until(lambda: len(engine.requests) > asked, 10)
            assert engine.closed.wait(10)
            seen = scraped(runner, lambda now: now.value(REQUESTS, outcome="caller_left") == 1)
            assert seen.value(REQUESTS, operation="ContainerList", status="none") == 1

    def test_health_is_of_no_key(self, metered: Runner) -> None:
        before = scrape(metered).value("docker_runner_key_requests_total")
        labels = {"face": "runner", "operation": "health"}
        plain = b"GET /v1/health HTTP/1.1\r\nHost: runner\r\nConnection: close\r\n\r\n"
        assert rises(metered, lambda: metered.raw(plain), REQUESTS, **labels) == 1
        assert scrape(metered).value("docker_runner_key_requests_total") == before

    def test_keys_by_name(self, metered: Runner) -> None:
        act = partial(metered.request, "GET", "/_ping", headers=sign(OTHER, "GET", "/_ping", key="ci"))
        assert rises(metered, act, "docker_runner_key_requests_total", key="ci") == 1
        act = partial(metered.request, "GET", "/_ping")
        assert rises(metered, act, "docker_runner_key_requests_total", key="") == 1

    def test_a_name_that_no_secret_has_is_no_label(self, metered: Runner) -> None:
        stranger = sign(OTHER, "GET", "/_ping", key="stranger")
        act = partial(metered.request, "GET", "/_ping", headers=stranger)
        assert rises(metered, act, "docker_runner_errors_total", code="invalid_signature") == 1
        assert "stranger" not in scrape(metered).text


class TestFaultsOfTheEngine:
    def test_an_engine_that_is_not_there(self, tmp_path: Path) -> None:
        with Runner(f"{tmp_path}/none.sock", PORT) as runner:
            assert runner.request("GET", "/containers/json").status == 503
            seen = scraped(runner, lambda now: now.value(REQUESTS, outcome="engine_error") == 1)
            assert seen.value("docker_runner_errors_total", code="engine_socket_missing") == 1
            assert seen.samples("docker_runner_engine_up") == [0]

    def test_an_engine_that_hangs_does_not_hold_up_a_scrape(self) -> None:
        with ScriptedEngine(Peer.sees_close) as engine, Runner(engine.path, PORT) as runner:
            assert scrape(runner).samples("docker_runner_engine_up") == [0]

    def test_progress_that_breaks_is_an_error_of_the_engine_though_its_status_was_200(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

        def breaks(peer: Peer) -> None:
            if b"/images/create" in peer.read_request():
                peer.send(head + chunked(b'{"status":"Pulling"}\r\n', last=False))
            else:
                peer.send(OK)

        with ScriptedEngine(breaks) as engine, Runner(engine.path, PORT) as runner:
            assert b"errorDetail" in runner.request("POST", "/images/create?fromImage=x").body
            labels = {"operation": "ImageCreate", "status": "200", "outcome": "engine_error"}
            scraped(runner, lambda now: now.value(REQUESTS, **labels) == 1)

    def test_a_pool_that_is_used_up(self) -> None:
        def waits(peer: Peer) -> None:
            while request := peer.read_request():
                if b"/containers/json" in request:
                    peer.engine.go.wait(20)
                peer.send(OK)

        settings = {"DOCKER_RUNNER_ENGINE_CONNECTIONS": "1", **PORT}
        with ScriptedEngine(waits) as engine, Runner(engine.path, settings) as runner:
            with runner.connect() as first, runner.connect() as second:
                for sock in (first, second):
                    sock.sendall(signed_head("GET", "/containers/json", b"", "Connection: close"))
                seen = scraped(runner, lambda now: now.value("docker_runner_engine_waiting") == 1)
                assert seen.value("docker_runner_engine_connections", state="busy") == 1
                assert seen.value("docker_runner_used", resource="engine_connections") == 1
                assert seen.value("docker_runner_limit", resource="engine_connections") == 1
                assert seen.value("docker_runner_used", resource="requests") == 2
                assert seen.value("docker_runner_used", resource="connections") == 2
                assert seen.value("docker_runner_engine_up") == 1, "its ping has a connection of its own"
                engine.go.set()
                assert read_to_end(first).endswith(b"ok")
                assert read_to_end(second).endswith(b"ok")
            seen = scraped(runner, lambda now: now.value("docker_runner_engine_waiting") == 0)
            assert seen.value("docker_runner_engine_waits_total") == 1
            assert seen.value("docker_runner_engine_wait_seconds_total") > 0


class TestDurations:
    def test_of_requests_and_of_the_engines_part(self, metered: Runner) -> None:
        whole = {"face": "engine", "operation": "SystemVersion"}
        act = partial(metered.request, "GET", "/version")
        assert rises(metered, act, "docker_runner_request_duration_seconds_count", **whole) == 1
        now = scrape(metered)
        took = now.value("docker_runner_request_duration_seconds_sum", **whole)
        engines = now.value("docker_runner_engine_duration_seconds_sum", operation="SystemVersion")
        assert 0 < engines < took < 60
        assert now.value("docker_runner_request_duration_seconds_bucket", le="+Inf", **whole) == now.value(
            "docker_runner_request_duration_seconds_count", **whole
        )

    def test_the_engines_part_of_the_runner_face(self, metered: Runner, box: str) -> None:
        act = partial(metered.request, "GET", f"/v1/containers/inspect?containerId={box}")
        name = "docker_runner_engine_duration_seconds_count"
        assert rises(metered, act, name, operation="ContainerInspect") == 1

    def test_a_histogram_counts_up_to_and_including_its_bounds(self) -> None:
        histogram = Histogram()
        for seconds in (0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1], BOUNDS_S[-1] + 1):
            histogram.observe(seconds)
        assert histogram.counts == [2, 1, *[0] * (len(BOUNDS_S) - 3), 1, 1]


class TestStreams:
    def test_an_open_one_is_seen_and_what_passes_on_it_counted_as_it_passes(
        self, metered: Runner, direct: EngineDirect, names: Names, image: str
    ) -> None:
        of_face = {"face": "runner", "operation": "eventsSse"}
        before = scrape(metered)
        with metered.stream("GET", "/v1/events/sse") as feed:
            scraped(metered, lambda now: now.value("docker_runner_open_streams", kind="events") == 1)
            name = Containers(direct, names, image)("true", start=False)
            while name.encode() not in feed.readline():
                pass
            seen = scraped(metered, lambda now: now.value("docker_runner_event_lag_seconds_count") > 0)
            passed = seen.value("docker_runner_response_bytes_total", **of_face)
            assert passed > before.value("docker_runner_response_bytes_total", **of_face)
            assert seen.value("docker_runner_used", resource="streams") == 1
            assert seen.value("docker_runner_event_lag_seconds_sum") < 60
        after = scraped(metered, lambda now: now.value("docker_runner_open_streams", kind="events") == 0)
        assert after.value("docker_runner_response_bytes_total", **of_face) >= passed
        assert after.value(REQUESTS, outcome="relayed", status="200", **of_face) == 1, "its caller's leaving is its end"
        assert after.value("docker_runner_request_duration_seconds_count", **of_face) == 0, "its length is no duration"

    def test_history_does_not_lag(self, metered: Runner) -> None:
        before = scrape(metered).value("docker_runner_event_lag_seconds_count")
        history = f"/events?since=1&until={int(time.time())}"
        act = partial(metered.request, "GET", history)
        rises(metered, act, REQUESTS, operation="SystemEvents")
        assert scrape(metered).value("docker_runner_event_lag_seconds_count") == before

    def test_events_of_the_engine_face_lag(
        self, metered: Runner, direct: EngineDirect, names: Names, image: str
    ) -> None:
        with metered.stream("GET", "/events") as feed:
            make = partial(Containers(direct, names, image), "true", start=False)
            assert rises(metered, make, "docker_runner_event_lag_seconds_count") >= 1
            assert b'"timeNano"' in feed.readline()

    def test_an_interactive_exec(self, metered: Runner, box: str) -> None:
        async def run() -> None:
            async with session(metered, box, ["cat"]) as each:
                await each.send(stdin(b"x" * 1000), EOF)
                while await each.receive():
                    pass
                assert bytes(each.out) == b"x" * 1000

        labels = {"face": "runner", "operation": "execInteractiveWs"}
        before = scrape(metered)
        assert rises(metered, lambda: asyncio.run(run()), REQUESTS, status="101", outcome="relayed", **labels) == 1
        after = scrape(metered)
        for direction in ("request", "response"):
            name = f"docker_runner_{direction}_bytes_total"
            assert after.value(name, **labels) - before.value(name, **labels) > 1000

    def test_an_upgraded_stream(self, metered: Runner, box: str) -> None:
        async def run() -> None:
            async with upgraded(metered, f"/containers/{box}/attach?stream=1&stdin=1&stdout=1") as stream:
                await stream.send(b"hello\n")
                await stream.until(b"hello\n")
                opened = await asyncio.to_thread(
                    scraped, metered, lambda now: now.value("docker_runner_open_streams", kind="attach") == 1
                )
                assert opened.value("docker_runner_request_bytes_total", operation="ContainerAttach") >= 6

        labels = {"operation": "ContainerAttach", "status": "101", "outcome": "relayed"}
        assert rises(metered, lambda: asyncio.run(run()), REQUESTS, **labels) == 1


class TestWhatIsTold:
    def test_a_scrape_shows_every_family_of_the_table_and_no_other(self, metered: Runner) -> None:
        families = scrape(metered).families
        told = {(name, family.type, family.documentation) for name, family in families.items()}
        own = {(family.name, family.kind, family.meaning) for family in FAMILIES}
        assert own <= told
        others = {name + "_total" * (kind == "counter") for name, kind, _ in told - own}
        assert others == {name for name, _, _ in OF_THE_PROCESS}

    def test_labels_are_those_of_the_table(self, metered: Runner) -> None:
        families = scrape(metered).families
        for family in FAMILIES:
            for sample in families[family.name].samples:
                assert set(sample.labels) - {"le"} == set(family.labels), family.name

    def test_bytes_of_bodies_both_ways(self, metered: Runner, names: Names, image: str) -> None:
        config = json.dumps({"Image": image, "Labels": names.labels}).encode()
        before = scrape(metered)
        answer = metered.request(
            "POST", f"/containers/create?name={names()}", config, {"Content-Type": "application/json"}
        )
        assert answer.status == 201
        labels = {"operation": "ContainerCreate", "status": "201"}
        after = scraped(metered, lambda now: now.value(REQUESTS, **labels) > before.value(REQUESTS, **labels))
        for direction, size in (("request", len(config)), ("response", len(answer.body))):
            name = f"docker_runner_{direction}_bytes_total"
            assert (
                after.value(name, operation="ContainerCreate") - before.value(name, operation="ContainerCreate") == size
            )

    def test_nonces_held(self, metered: Runner) -> None:
        act = partial(metered.request, "GET", "/_ping")
        assert rises(metered, act, "docker_runner_used", resource="nonces") >= 1
        assert scrape(metered).value("docker_runner_limit", resource="nonces") == 1_000_000

    def test_the_engine_is_up(self, metered: Runner) -> None:
        assert scrape(metered).samples("docker_runner_engine_up") == [1]

    def test_no_label_grows_by_what_callers_choose(self, metered: Runner, box: str, names: Names) -> None:
        chosen = f"chosen-{names()}"
        for method in ("GET", "PUT", "DELETE", "CHOSEN"):
            for path in (
                f"/containers/{chosen}/json",
                f"/{chosen}",
                f"/v1/{chosen}",
                f"/images/{chosen}/json?a={chosen}",
            ):
                metered.request(method, path, headers={"X-Request-Id": chosen, "X-DR-Key": chosen})
                metered.request(method, path, headers={"X-Request-Id": chosen})
        metered.request("GET", f"/containers/{box}/json")
        seen = scraped(metered, lambda now: now.value(REQUESTS, operation="ContainerInspect", status="200") > 0)
        assert "chosen" not in seen.text.lower()
        assert box not in seen.text
        routes = {"health", "ready", "openapi", *(openapi.operation_id(path) for _, path, *_ in ROUTES)}
        known = {("runner", name) for name in {*routes, "unknown"}}
        known |= {("engine", name) for name in {*(each.id for each in operations.OPERATIONS), "unknown"}}
        for sample in seen.families["docker_runner_requests"].samples:
            assert (sample.labels["face"], sample.labels["operation"]) in known
            assert sample.labels["outcome"] in OUTCOMES
            assert re.fullmatch(r"[1-5]\d\d|none", sample.labels["status"])


class _Traffic:
    status = 200
    received = sent = 1
    disconnected = False


def app() -> App:
    return App(read_settings({"DOCKER_RUNNER_SHARED_SECRET": SECRET}))


NOW = Observed(engine_up=True, connections=0, max_connections=1)


class TestWithoutAService:
    def test_two_in_one_process_count_apart(self) -> None:
        one, other = app(), app()
        one.metrics.engine_answered("SystemPing", 0.1)
        texts = [b"".join(Exposition(each).pieces(NOW)).decode() for each in (one, other)]
        name = "docker_runner_engine_duration_seconds_count"
        assert [Scrape(text).value(name) for text in texts] == [1, 0]

    def test_every_operation_in_use_gives_one_text_in_small_pieces(self) -> None:
        busy = app()
        asked = [each.id for each in operations.OPERATIONS] + [f"{method} {path}" for method, path, *_ in ROUTES]
        for operation in asked:
            busy.metrics.ended(operation, _Traffic(), None, 0.1, verified=True, lasting=False, key=None)
            busy.metrics.engine_answered(operation, 0.1)
        pieces = list(Exposition(busy).pieces(NOW))
        text = b"".join(pieces).decode()
        families = [family.name for family in text_string_to_metric_families(text)]
        assert len(families) == len(set(families)) == len(FAMILIES) + len(OF_THE_PROCESS)
        assert Scrape(text).value("docker_runner_request_duration_seconds_count") == len(asked)
        assert max(piece.count(b"\n") for piece in pieces) < 250

    def test_expiry_is_told_by_who_knows(self) -> None:
        told = app()
        for action in REAPED:
            told.metrics.reaped(action)
        told.metrics.expiring = lambda: 7
        seen = Scrape(b"".join(Exposition(told).pieces(NOW)).decode())
        assert [seen.value("docker_runner_expiry_actions_total", action=action) for action in REAPED] == [1, 1, 1]
        assert seen.value("docker_runner_expiring_containers") == 7
        with pytest.raises(KeyError):
            told.metrics.reaped("something of a caller's")

    def test_every_code_has_an_outcome(self) -> None:
        assert {outcome_of(RunnerError(code, "")) for code in CODES} == set(OUTCOMES) - {"caller_left"}
        engines = {code for code in CODES if outcome_of(RunnerError(code, "")) == "engine_error"}
        assert all(
            code.startswith(("engine_", "runner_")) or code.endswith(("_failed", "unavailable")) for code in engines
        )

    def test_what_the_engine_answered_is_relayed_on_the_runner_face_too(self) -> None:
        assert outcome_of(RunnerError("put_archive_failed", "", status=404)) == "relayed"
        assert outcome_of(RunnerError("put_archive_failed", "")) == "engine_error"

    def test_whatever_may_last_is_of_a_kind_of_stream(self) -> None:
        lasting = {each.id for each in operations.OPERATIONS if each.lasting}
        of_routes = {
            openapi.operation_id(path) for _, path, *_ in ROUTES if path.endswith("/sse") or path == INTERACTIVE
        }
        assert set(STREAM_KINDS) == lasting | of_routes

    def test_faces(self) -> None:
        assert face_and_operation("SystemPing") == ("engine", "SystemPing")
        assert face_and_operation("POST /v1/containers/start") == ("runner", "containersStart")
        assert face_and_operation("") == ("engine", "unknown")
        assert face_and_operation("/v1/") == ("runner", "unknown")

    def test_an_event_cannot_claim_another_age_by_what_a_caller_wrote_in_it(self) -> None:
        metrics = Metrics()
        written = rb'{"Actor":{"Attributes":{"timeNano":"1","a":"\"timeNano\":1"}},"timeNano":%d}' % time.time_ns()
        metrics.events_passed(written + b"\n", since_ns=0)
        assert sum(metrics.event_lag.counts) == 1
        assert metrics.event_lag.sum < 60

    def test_an_open_stream_counts_for_its_operation(self) -> None:
        class Stream:
            asked: Asked | None = Asked("ContainerLogs", changes=False, named=str)
            connection = _Traffic()

        busy = app()
        busy.metrics.open_streams.add(Stream())
        seen = Scrape(b"".join(Exposition(busy).pieces(NOW)).decode())
        assert seen.value("docker_runner_open_streams", kind="logs") == 1
        assert seen.value("docker_runner_response_bytes_total", operation="ContainerLogs") == 1
