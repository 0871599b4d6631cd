"""Expiry and an engine that fails, or that others use meanwhile: scripted, for no real one does so on demand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from minded import TTL_S, Minded, folder, minded

from conftest import Names
from dev import wait_until
from dev.engine import Engine
from leases import INSTANCE, TTL
from scripted import Peer, ScriptedEngine

__all__ = ["folder", "minded"]  # Fixtures.


ID = "d" * 64


def answered(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Scripted:
    """An engine with one idle container; `stops` and `removes` are its answers, the last one again and again."""

    def __init__(self, instance: str) -> None:
        self.labels = {INSTANCE: instance, TTL: str(TTL_S)}
        self.stops = [answered("204 No Content")]
        self.removes = [answered("204 No Content")]
        self.running = True

    def __call__(self, peer: Peer) -> None:
        while request := peer.read_request():
            method, path = request.split(b" ")[:2]
            match method, path.partition(b"?")[0].rpartition(b"/")[2]:
                case b"GET", b"json" if b"/images/" in path:
                    peer.send(answered("200 OK", b'{"Config":{"Labels":null}}'))
                case b"GET", b"json" if b"all=1" in path:
                    listed = [{"Id": ID, "Names": ["/box"], "ImageID": "sha256:0", "Labels": self.labels}]
                    peer.send(answered("200 OK", json.dumps(listed).encode()))
                case b"GET", _:
                    peer.send(answered("200 OK", json.dumps({"Id": ID, "State": {"Running": self.running}}).encode()))
                case b"POST", _:
                    peer.send(self.stops.pop(0) if len(self.stops) > 1 else self.stops[0])
                case _:
                    peer.send(self.removes.pop(0) if len(self.removes) > 1 else self.removes[0])


@pytest.fixture
def faulty(folder: Path, names: Names) -> Iterator[tuple[Scripted, ScriptedEngine, Minded]]:
    script = Scripted("faulty")
    with ScriptedEngine(script) as engine:
        minded = Minded(engine.path, folder, "", names, {"DOCKER_RUNNER_INSTANCE": "faulty"})
        try:
            minded.wait_minded(ID)
            yield script, engine, minded
        finally:
            assert minded.runner.stop() == 0


Faulty = tuple[Scripted, ScriptedEngine, Minded]


def asked(engine: ScriptedEngine, method: bytes) -> int:
    return sum(request.startswith(method) for request in engine.requests)


class TestFaults:
    def test_what_fails_is_tried_again_later_and_later(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        failure = answered("500 Internal Server Error", b'{"message":"no"}')
        script.stops = [failure, failure, answered("204 No Content")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("could not be removed: the engine answered 500")
        minded.runner.wait_for_log("tried again in 1 s")
        engine.wait(lambda: asked(engine, b"POST") == 2, "a second attempt")
        minded.runner.wait_for_log("tried again in 2 s")
        engine.wait(lambda: asked(engine, b"DELETE") == 1, "its removal")
        assert wait_until(lambda: len(minded.audit.read_text().splitlines()) == 3, 10)
        lines = [json.loads(line) for line in minded.audit.read_text().splitlines()]
        assert [(line["status"], line.get("code"), line["decision"]) for line in lines] == [
            (502, "stop_failed", "allowed"),
            (502, "stop_failed", "allowed"),
            (204, None, "allowed"),
        ]
        assert len({line["request_id"] for line in lines}) == 3

    def test_after_a_failure_a_use_counts(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.removes = [answered("500 Internal Server Error", b"{}")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("could not be removed")
        assert minded.wire.post("/v1/containers/touch", containerId="box").status == 204
        tried = asked(engine, b"DELETE")
        looked = asked(engine, b"GET /containers/json")
        minded.forward(0.9 * TTL_S)
        engine.wait(lambda: asked(engine, b"GET /containers/json") >= looked + 3, "it to be asked for")
        assert asked(engine, b"DELETE") == tried

    def test_one_that_somebody_started_again_stays(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.removes = [answered("409 Conflict", b'{"message":"You cannot remove a running container"}')]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("was started again while it was being removed: it stays")
        looked = asked(engine, b"GET /containers/json")
        minded.forward(0.9 * TTL_S)
        engine.wait(lambda: asked(engine, b"GET /containers/json") >= looked + 3, "it to be asked for")
        assert asked(engine, b"DELETE") == 1
        assert b"force" not in b"".join(engine.targets())

    def test_one_that_the_engine_is_removing_is_waited_for(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.running = False
        in_progress = answered("409 Conflict", b'{"message":"removal of container is already in progress"}')
        script.removes = [in_progress, in_progress, answered("404 Not Found", b"{}")]
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log("removed container")
        assert asked(engine, b"DELETE") == 3

    def test_one_that_is_gone_when_it_is_stopped_was_removed_by_somebody_else(self, faulty: Faulty) -> None:
        script, engine, minded = faulty
        script.stops = [answered("404 Not Found", b"{}")]
        minded.forward(TTL_S + 1)
        engine.wait(lambda: asked(engine, b"POST") >= 1, "the stop")
        assert asked(engine, b"DELETE") == 0
        assert minded.audit.read_text() == ""

    @pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", answered("200 OK", b"[{}]"), answered("500 No", b"{}")])
    def test_an_engine_that_tells_nonsense(self, folder: Path, names: Names, answer: bytes) -> None:
        script = Scripted("faulty")
        with ScriptedEngine(lambda peer: peer.answer(answer)) as engine:
            minded = Minded(engine.path, folder, "", names, {"DOCKER_RUNNER_INSTANCE": "faulty"})
            minded.runner.wait_for_log("cannot ask for containers with a time to live")
            engine.script = script
            engine.stop()
            engine.listen()
            minded.wait_minded(ID)
            assert minded.runner.stop() == 0
            assert "Traceback" not in "".join(minded.runner.log)


def test_it_can_be_turned_off(engine: Engine, folder: Path, image: str, names: Names) -> None:
    with ScriptedEngine(lambda peer: peer.answer(answered("200 OK", b"OK"))) as scripted:
        off = Minded(scripted.path, folder, image, names, {"DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "0"})
        assert off.ask("GET", "/_ping").status == 200
        assert off.runner.stop() == 0
        assert scripted.targets() == [b"/_ping"]
