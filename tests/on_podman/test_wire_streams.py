"""The wire protocol on Podman, exec, logs and events: see the file of this name above."""

import base64
import json
import time
from collections.abc import Callable

import pytest
import requests
import test_wire_streams as docker
from test_wire_streams import *
from test_wire_streams import EVENTS, Start

from conftest import EngineDirect, Names
from dev import wait_until
from on_podman.differences import instead_of, shows
from wire import Feed, Wire, b64, compact, refused


@instead_of(docker.test_a_container_that_does_not_run_is_409, "words", "conflicts")
def test_a_container_that_does_not_run_is_a_conflict(wire: Wire, stopped_box: str) -> None:
    reply = wire.post("/v1/exec/run", containerId=stopped_box, command="true")
    assert "container state improper" in refused(reply, 500, "container_stopped_paused")
    reply = wire.post("/v1/exec/run", containerId="missing", command="true")
    assert "no such container" in refused(reply, 404, "no_such_container")


@instead_of(docker.test_kill_on_timeout_stops_the_container_and_nobody_waits_for_it, "stopping")
@pytest.mark.parametrize("limit", ["timeoutMs", "idleTimeoutMs"])
def test_kill_on_timeout_stops_the_container_and_nobody_waits_for_it_as_podman_does(
    wire: Wire, start: Start, direct: EngineDirect, limit: str
) -> None:
    def state() -> tuple[str, bool, int]:
        found = direct.request("GET", f"/containers/{container}/json").json()["State"]
        return found["Status"], found["Running"], found["ExitCode"]

    container = start(cmd=["sh", "-c", 'trap "sleep 1; exit 7" TERM; while :; do sleep 0.05; done'])
    options = {limit: 200, "killOnTimeout": True}
    reply = wire.post("/v1/exec/run", containerId=container, command="sleep 30", options=options)
    assert reply.status == 504
    assert state()[0] in ("running", "stopping")
    assert wait_until(lambda: state() == ("stopping", False, 0), 10)
    assert wait_until(lambda: state() == ("exited", False, 7), 10)


def first_named(feed: Feed, name: str) -> str:
    """The first event about something, by its name: what it is."""
    for message in feed:
        actor = message["event"]["Actor"]
        if actor["Attributes"]["name"] == name:
            assert actor["ID"] == ""
            return f"{message['event']['Type']} {message['event']['Action']}"
    raise AssertionError("the events ended")


@instead_of(docker.test_filters_are_base64_of_json, "event-filters")
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["standard", "url-safe"])
def test_filters_are_base64_of_json_as_podman_does(
    wire: Wire, direct: EngineDirect, names: Names, encode: Callable[[bytes], bytes]
) -> None:
    filters = encode(compact({"type": ["volume"], "event": ["create", "destroy"], "x": []}))
    reply, feed = wire.feed(EVENTS, filters=filters.decode())
    with reply:
        assert first_named(feed, docker.make_volume(direct, names)) == "volume create"


@instead_of(docker.test_events_since_are_the_engines_json, "event-filters")
def test_events_since_are_the_engines_json_as_podman_does(wire: Wire, direct: EngineDirect, start: Start) -> None:
    since = time.time() - 1
    container = start()
    filters = compact({"container": [container], "event": ["create"]})
    own = direct.request("GET", "/events", params={"since": since, "stream": "false", "filters": filters})
    for _ in range(2):
        reply, feed = wire.feed(EVENTS, since=f"{since:.6f}", filters=b64(filters))
        with reply:
            assert next(iter(feed)) == {"type": "event", "event": json.loads(own.content.splitlines()[0])}


@instead_of(docker.test_events_that_the_engine_refuses_are_an_http_error, "event-bounds")
def test_events_that_the_engine_cannot_begin_are_those_to_come(wire: Wire, start: Start) -> None:
    reply, feed = wire.feed(EVENTS, since="yesterday")
    with reply:
        messages = iter(feed)
        assert next(messages)["type"] == "reconnected"
        container = start()
        assert any(message.get("event", {}).get("Actor", {}).get("ID") == container for message in messages)


@shows("logs-head")
def test_a_followed_log_of_a_silent_container_has_no_head_at_the_engine(direct: EngineDirect, start: Start) -> None:
    """That it has one at the runner is among the tests of both engines."""
    container = start()
    with pytest.raises(requests.Timeout):
        direct.request("GET", f"/containers/{container}/logs?stdout=1&follow=1", stream=True, timeout=1)
