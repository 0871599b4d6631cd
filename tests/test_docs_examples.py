"""The examples of README, client.md, wire.md, bridge.md and troubleshooting.md, run as they stand."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import EngineDirect, Names
from dev import find_program, wait_until
from dev.engine import Engine
from documents import block, example, run_in
from service import ROOT, SECRET, Runner

BUSYBOX = "docker-runner/busybox"


@pytest.fixture(scope="module")
def default_runner(engine: Engine) -> Iterator[Runner]:
    """With the policy that holds if none is set."""
    with Runner(engine.socket, {"DOCKER_RUNNER_POLICY": ""}) as running:
        yield running


@pytest.fixture
def checkout(tmp_path: Path, default_runner: Runner) -> Path:
    """A folder such as a checkout after `make run`, in front of the running runner."""
    (tmp_path / ".dev").mkdir()
    (tmp_path / ".dev/secret").write_text(SECRET + "\n")
    (tmp_path / ".dev/secret").chmod(0o600)
    (tmp_path / ".env").write_text(
        f"DOCKER_RUNNER_SHARED_SECRET_FILE={tmp_path}/.dev/secret\n"
        f"DOCKER_RUNNER_PORT={default_runner.port}\nDOCKER_SOCKET={default_runner.engine_socket}\n"
    )
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (tmp_path / "examples").mkdir()
    return tmp_path


@pytest.fixture
def environ(default_runner: Runner) -> dict[str, str]:
    """A person's, who has set nothing."""
    return {name: value for name, value in default_runner.environ.items() if not name.startswith("DOCKER_")}


def ours(script: str, runner: Runner, image: str = "", name: str = "") -> str:
    """A script at this runner's port, with an image and names of our own."""
    script = script.replace(":7071", f":{runner.port}")
    for documented in (f"{BUSYBOX}:latest", BUSYBOX):
        script = script.replace(documented, "THE-IMAGE")
    return script.replace("THE-IMAGE", image).replace("demo", name)


def said(folder: Path, script: str, environ: dict[str, str]) -> str:
    done = run_in(folder, script, environ)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


# README.md


@example("README.md", "sh examples/run-a-container.sh")
def test_the_example_runs_a_container_and_shows_its_output(
    script: str, checkout: Path, environ: dict[str, str], image: str, names: Names
) -> None:
    program = (ROOT / "examples/run-a-container.sh").read_text()
    program = program.replace(f"{BUSYBOX}:latest", image).replace("hello-", f"{names()}-")
    (checkout / "examples/run-a-container.sh").write_text(program)
    assert "Hello from container" in said(checkout, script, environ)


@example("README.md", "docker-runner check   ")
def test_asking_it_something(script: str, checkout: Path, environ: dict[str, str], default_runner: Runner) -> None:
    seen = said(checkout, ours(script, default_runner), environ)
    assert "ok    engine: version" in seen
    assert '[{"Id"' in seen or "[]" in seen
    assert '"ApiVersion"' in seen


@example("README.md", "docker-runner bridge")
def test_a_tool_through_the_bridge(
    script: str, checkout: Path, environ: dict[str, str], default_runner: Runner, image: str, names: Names
) -> None:
    assert find_program("docker")
    labelled = script.replace("run --rm", f"run --rm --label {next(iter(names.labels))}={names.mark}")
    assert said(checkout, ours(labelled, default_runner, image), environ).endswith("hello\n")


@example("README.md", "/v1/exec/run")
def test_the_runner_face(
    script: str, checkout: Path, environ: dict[str, str], default_runner: Runner, image: str, names: Names
) -> None:
    name = names()
    seen = said(checkout, ours(script, default_runner, image, name), environ)
    started, _, ran = seen.partition("}")
    assert json.loads(started + "}")["name"] == name
    assert json.loads(ran) == {"stdout": "hello\n", "stderr": "", "exitCode": 3}


@example("README.md", '"Privileged": true')
def test_the_policy_refuses_and_says_what_would_allow_it(
    script: str, checkout: Path, environ: dict[str, str], default_runner: Runner
) -> None:
    error = json.loads(said(checkout, ours(script, default_runner), environ))["error"]
    assert error["code"] == "policy_denied"
    assert "[container] privileged = true" in error["message"]


# client.md


@example("docs/client.md", "secret=$(head")
def test_the_recipe_by_hand(script: str, checkout: Path, environ: dict[str, str], default_runner: Runner) -> None:
    assert '"ApiVersion"' in said(checkout, ours(script, default_runner), environ)


@example("docs/client.md", "--format openssl")
def test_a_recipe_is_printed(script: str, checkout: Path, environ: dict[str, str]) -> None:
    assert "openssl dgst -sha256 -hmac" in said(checkout, script, environ)


# wire.md

START, RUN, EVENTS = (
    block("docs/wire.md", mark) for mark in ("containers/start --data", "exec/run --data", "events/sse?")
)


def test_the_worked_examples_of_the_runner_face(
    checkout: Path, environ: dict[str, str], default_runner: Runner, image: str, names: Names, direct: EngineDirect
) -> None:
    name = names()
    start, run, events = (ours(script, default_runner, image, name) for script in (START, RUN, EVENTS))
    assert json.loads(said(checkout, start, environ))["status"] == "running"
    assert json.loads(said(checkout, run, environ)) == {"stdout": "hello\n", "stderr": "", "exitCode": 3}
    assert 'data: {"type":"event","event":{"status":"create"' in said(checkout, events, environ)
    assert direct.request("DELETE", f"/containers/{name}?force=1").status_code == 204


# troubleshooting.md


@example("docs/troubleshooting.md", "docker-runner check --ready")
def test_what_to_look_at_first(script: str, checkout: Path, environ: dict[str, str], default_runner: Runner) -> None:
    seen = said(checkout, script, environ)
    assert "ok    engine: version" in seen
    assert '/v1/ready: 200 {"status":"ready"}' in seen
    assert "x-request-id: " in seen.lower()
    assert '"ApiVersion"' in seen


# policy.md


@example("docs/policy.md", 'echo "monitoring:')
def test_a_key_is_added(script: str, checkout: Path, environ: dict[str, str]) -> None:
    said(checkout, script, environ)
    first, second = (checkout / ".dev/secret").read_text().splitlines()
    assert (first, second[:11], len(second)) == (SECRET, "monitoring:", 75)


# bridge.md

SERVE, USE = (block("docs/bridge.md", mark) for mark in ("docker-runner bridge", "docker exec -it"))


def test_the_way_to_a_shell_through_the_bridge(
    checkout: Path, environ: dict[str, str], default_runner: Runner, image: str, names: Names
) -> None:
    """Its two terminals; what a person types into the shell comes over a pseudo-terminal."""
    serve = ours(SERVE, default_runner)
    use = ours(USE.replace("demo-box", "demo"), default_runner, image, names())
    bridge = subprocess.Popen(["bash", "-c", f"exec {serve.strip()}"], cwd=checkout, env=environ)
    try:
        assert wait_until((checkout / ".dev/docker.sock").exists, 10)
        outer, inner = os.openpty()
        command = ["bash", "-euo", "pipefail", "-c", use]
        tools = subprocess.Popen(
            command, cwd=checkout, env=environ, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        seen = b""
        with contextlib.suppress(OSError):  # The end of a terminal.
            while piece := os.read(outer, 65536):
                if b"# " in piece and b"# " not in seen:
                    os.write(outer, b"echo from-$((40 + 2)) && exit\n")
                seen += piece
        os.close(outer)
        assert tools.wait(30) == 0, seen
        assert b"from-42" in seen
    finally:
        bridge.terminate()
        assert bridge.wait(10) == 0
