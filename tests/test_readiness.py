"""`/v1/ready` tells the engine's state, and asks the engine at most once a second, whatever strangers do."""

import json
import threading

from scripted import OK, Peer, ScriptedEngine
from service import Runner

ASK = b"GET /v1/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_an_engine_that_is_there_is_ready(runner: Runner) -> None:
    answer = runner.raw(ASK)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"ready"}')


def test_a_missing_engine_is_not_and_strangers_learn_no_reason() -> None:
    with Runner("/nowhere/at/all.sock") as lonely:
        answer = lonely.raw(ASK)
        assert answer.startswith(b"HTTP/1.1 503 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["code"], error["retryable"]) == ("docker_unavailable", True)
        assert b"nowhere" not in answer
        assert lonely.raw(ASK.replace(b"ready", b"health")).startswith(b"HTTP/1.1 200 ")


def test_the_engine_is_asked_once_while_many_ask_and_leave() -> None:
    release = threading.Event()

    def slow(peer: Peer) -> None:
        peer.read_request()
        release.wait(10)
        peer.send(OK)

    with ScriptedEngine(slow) as engine, Runner(engine.path) as runner:
        for _ in range(30):
            with runner.connect() as stranger:
                stranger.sendall(ASK)
                engine.wait(lambda: len(engine.requests) >= 1, "a ping")
        with runner.connect() as patient:
            patient.sendall(ASK)
            release.set()
            assert patient.recv(12) == b"HTTP/1.1 200"
        assert len(engine.requests) == 1
