"""What is told at the start, and of the engine: which it is, that it is not there, that it goes and comes."""

import json
import re
import ssl
import sys
from pathlib import Path

import pytest

import serving as service_program
from auth import Keyring
from both_logs import ask, keys_and_scopes, port_of, serving
from client import __version__
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from scripted import Peer, ScriptedEngine

FORGED = '\n{"level":"fatal"}\r\x1b[2K\x9b31m\x07\u2028\u202e" x=1'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return keys_and_scopes(tmp_path_factory.mktemp("files"))


# What is told at the start, and of the engine.


def test_the_start(engine: Engine, files: dict[str, str], tmp_path: Path) -> None:
    with serving(engine.socket, {**files, "DOCKER_RUNNER_LOCAL_SOCKET": f"{tmp_path}/s"}) as watched:
        port = port_of(watched)
        line = watched.err.wait(version=__version__)
        version = json.loads(ask(port, "GET", "/version").body)
        told = watched.err.wait(logger="docker_runner.engine")
    assert line["message"] == (
        f"docker-runner {__version__} listens on http://127.0.0.1:{port}, unix://{tmp_path}/s (unsigned)"
    )
    assert {name: line[name] for name in list(line)[4:]} == {
        "version": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "engine": engine.socket,
        "tls": "off",
        "policy": "workloads",
        "policy_file": files["DOCKER_RUNNER_POLICY"],
        "key_policies": ["ci:read-only"],
        "scopes": ["default:team=blue", "ci:team=blue"],
        "keys": ["(unnamed)", "ci"],
        "secrets": 3,
        "audit": "json",
    }
    assert (told["engine_version"], told["api_version"]) == (version["Version"], version["ApiVersion"])
    assert told["message"].startswith("the engine is there: ")


@pytest.mark.parametrize(("mode", "expected"), [(None, "off"), (ssl.CERT_NONE, "on"), (ssl.CERT_REQUIRED, "mutual")])
def test_the_start_tells_of_tls(mode: ssl.VerifyMode | None, expected: str) -> None:
    context = None
    if mode is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = mode
    assert service_program._tls(context) == expected


def test_the_start_names_so_many_keys_and_counts_the_rest() -> None:
    told = service_program._keys(Keyring.parse("".join(f"key-{n}:secret-{n}\n" for n in range(100))))
    assert told == {"keys": (*(f"key-{n}" for n in range(32)), "(68 more)"), "secrets": 100}


def test_nobody_waits_for_an_engine_that_says_nothing() -> None:
    with ScriptedEngine(lambda peer: peer.wait_closed()) as mute, serving(mute.path) as watched:
        assert ask(port_of(watched), "GET", "/v1/health").status == 200
        assert watched.err.find(logger="docker_runner.engine") is None


def test_the_engines_going_and_coming_are_told_once_each(private_engine: PrivateEngine) -> None:
    def told() -> list[tuple[str, str]]:
        lines = [line for line in watched.err.lines if line["logger"] == "docker_runner.engine"]
        return [(line["level"], re.sub(r"[:;].*", "", line["message"])) for line in lines]

    there, gone, back = (
        ("info", "the engine is there"),
        ("error", "the engine has gone"),
        ("info", "the engine is back"),
    )
    with serving(private_engine.socket) as watched:
        assert wait_until(lambda: told() == [there], 20)
        private_engine.kill()
        assert wait_until(lambda: told() == [there, gone], 20)
        private_engine.start()
        assert wait_until(lambda: told() == [there, gone, back], 20)
        line = watched.err.lines[-1]
        assert line["away_s"].isdigit()
        assert line["engine_version"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (None, "engine_socket_missing"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "engine_garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe", "engine_garbage"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}", "docker_unavailable"),
        (b"SSH-2.0-x\r\n", "engine_garbage"),
        (b"", "engine_cut_head"),
    ],
)
def test_what_is_no_engine_is_told_once_with_what_to_do(tmp_path: Path, answer: bytes | None, code: str) -> None:
    def script(peer: Peer) -> None:
        if answer:
            peer.answer(answer)
        else:
            peer.read_request()

    with ScriptedEngine(script) as scripted:
        path = scripted.path if answer is not None else str(tmp_path / "none")
        with serving(path) as watched:
            line = watched.err.wait(logger="docker_runner.engine")
            if answer is not None:
                scripted.wait(lambda: scripted.connections > 2 or len(scripted.requests) > 2, "three looks")
            else:
                ask(port_of(watched), "GET", "/v1/ready")
            assert sum(line["logger"] == "docker_runner.engine" for line in watched.err.lines) == 1
    assert (line["level"], line["code"]) == ("error", code)
    assert line["message"].startswith("the engine is not there: ")


def test_an_engines_texts_forge_nothing() -> None:
    said = {"Version": FORGED, "ApiVersion": FORGED, "Components": [{"Name": FORGED}], "Os": FORGED}
    body = json.dumps(said).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    for form in ("json", "text"):
        told = {"DOCKER_RUNNER_LOG_FORMAT": form}
        with ScriptedEngine(lambda peer: peer.answer(answer)) as forger, serving(forger.path, told) as watched:
            watched.err.wait_for("the engine is there: ")
            assert all(line.isprintable() for line in watched.err.text.split("\n"))
            assert '\n{"level":"fatal"}' not in watched.err.text
