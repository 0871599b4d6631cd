"""The README against the code: its tables, and its commands run as they stand."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import errors
import operations as engine_operations
import settings
import workloads
from conftest import EngineDirect, Names
from dev import wait_until
from service import ROOT, SECRET, Runner

README = (ROOT / "README.md").read_text()


def table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in body])


def operations() -> str:
    rows = [(f"`{o.id}`", f"`{o.method} {o.template}`") for o in engine_operations.OPERATIONS]
    half = (len(rows) + 1) // 2
    padded = [*rows, ("", "")] if len(rows) % 2 else rows
    pairs = [(*padded[number], *padded[number + half]) for number in range(half)]
    return table([("operation", "request", "operation", "request"), *pairs])


def routes() -> str:
    rows = [("request", "parameters", "what it does")]
    for method, path, struct, handler, _ in workloads.ROUTES:
        asked = workloads.Interactive if path == workloads.INTERACTIVE else struct
        fields = [field.encode_name + ("" if field.required else "?") for field in msgspec.structs.fields(asked)]
        assert handler.__doc__ is not None
        rows.append((f"`{method} {path}`", f"`{', '.join(fields)}`", handler.__doc__))
    return table(rows)


def error_codes() -> str:
    rows = [
        (f"`{name}`", str(code.status or "engine's"), "yes" if code.retryable else "", code.meaning)
        for name, code in errors.CODES.items()
    ]
    return table([("code", "status", "retryable", "meaning"), *rows])


def variables() -> str:
    keys = [(f"`{name}`", "", meaning) for name, meaning in settings.KEY_VARIABLES.items()]
    rows = [
        (f"`{name}`", f"`{variable.default}`" if variable.default else "", variable.meaning)
        for name, variable in settings.VARIABLES.items()
    ]
    return table([("variable", "default", "meaning"), *keys, *rows])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("operations", operations()), ("routes", routes()), ("errors", error_codes()), ("settings", variables())],
)
def test_the_readmes_table_is_the_codes(name: str, expected: str) -> None:
    found = re.search(rf"<!-- {name}:[^>]*-->\n(.*?)\n?<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == expected


def test_every_variable_that_the_code_reads_is_in_a_table() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    read = set(re.findall(r"\"(DOCKER_[A-Z_]+)\"", sources))
    assert read == set(settings.VARIABLES) | set(settings.KEY_VARIABLES)


def test_every_error_code_is_used_and_every_used_one_is_in_the_table() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("*.py") if path.name != "errors.py")
    timed_out = set(re.findall(r"_timed_out\(\s*\"([a-z_]+)\"", sources))
    used = set(re.findall(r"(?:RunnerError|_violates|Places)\(\s*\"([a-z_]+)\"", sources))
    by_cause = set(re.findall(r"\"([a-z_]+)\"", (ROOT / "calls.py").read_text())) & set(errors.CODES)
    fallbacks = {operation.fallback for *_, operation in workloads.ROUTES}
    kinds = {operation.conflict for *_, operation in workloads.ROUTES}
    assert used | by_cause | fallbacks | kinds | timed_out == set(errors.CODES)


def test_the_map_names_every_file_in_an_order_that_the_imports_keep() -> None:
    house = re.findall(r"^\| \[(\w+)\.py\]", README, re.MULTILINE)
    assert sorted(house) == sorted(path.stem for path in ROOT.glob("*.py"))
    for place, name in enumerate(house):
        source = (ROOT / f"{name}.py").read_text()
        imported = re.findall(
            r"^ *(?:from|import) (\w+)", source.replace("if TYPE_CHECKING:\n    from", "#"), re.MULTILINE
        )
        below = set(house[place + 1 :]) & set(imported)
        assert not below, f"{name}.py imports {below}"


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, runner: Runner) -> Path:
    """A folder such as a checkout after `make run`, in front of the running runner."""
    (tmp_path / ".dev").mkdir()
    (tmp_path / ".dev/secret").write_text(SECRET + "\n")
    (tmp_path / ".dev/secret").chmod(0o600)
    (tmp_path / ".env").write_text(
        f"DOCKER_RUNNER_SHARED_SECRET_FILE={tmp_path}/.dev/secret\n"
        f"DOCKER_RUNNER_PORT={runner.port}\nDOCKER_SOCKET={runner.engine_socket}\n"
    )
    return tmp_path


def run_in(folder: Path, script: str, runner: Runner) -> str:
    """A documented script, as a person in `folder` runs it; the documented port becomes the running one's."""
    kept = {k: v for k, v in runner.environ.items() if not k.startswith("DOCKER_")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(":7071", f":{runner.port}")],
        cwd=folder,
        env={**kept, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_by_hand_works_as_it_stands(checkout: Path, runner: Runner) -> None:
    recipe = next(block for block in shell_blocks() if block.startswith("secret="))
    assert '"ApiVersion"' in run_in(checkout, recipe, runner)


@pytest.mark.parametrize(
    ("begins", "expected"),
    [
        ("docker-runner check", "ok    engine: version"),
        ("docker-runner curl", "["),
        ("curl -s $(docker-runner sign", '"ApiVersion"'),
        ("docker-runner sign POST", "openssl dgst -sha256 -hmac"),
    ],
)
def test_the_documented_commands_work_as_they_stand(checkout: Path, runner: Runner, begins: str, expected: str) -> None:
    line = next(line for block in shell_blocks() for line in block.splitlines() if line.startswith(begins))
    assert expected in run_in(checkout, line, runner)


def test_the_worked_examples_of_the_runner_face(
    checkout: Path, runner: Runner, image: str, names: Names, direct: EngineDirect
) -> None:
    start, run, events = (
        block.replace("docker-runner/busybox", image).replace("demo", name)
        for name in [names()]
        for block in shell_blocks()
        if "/v1/" in block and "docker-runner curl" in block
    )
    assert json.loads(run_in(checkout, start, runner))["status"] == "running"
    assert json.loads(run_in(checkout, run, runner)) == {"stdout": "hello\n", "stderr": "", "exitCode": 3}
    assert 'data: {"type":"event","event":{"status":"create"' in run_in(checkout, events, runner)


def test_the_example_runs_a_container_and_shows_its_output(
    checkout: Path, runner: Runner, image: str, names: Names
) -> None:
    script = (ROOT / "examples/run-a-container.sh").read_text()
    (checkout / "examples").mkdir()
    (checkout / ".venv").symlink_to(Path(sys.executable).parent.parent)
    example = checkout / "examples/run-a-container.sh"
    example.write_text(script.replace("docker-runner/busybox:latest", image).replace("hello-", f"{names()}-"))
    assert "Hello from container" in run_in(checkout, "sh examples/run-a-container.sh", runner)


def test_the_way_to_a_shell_through_the_bridge(checkout: Path, runner: Runner, image: str, names: Names) -> None:
    """The two terminals of the README; what a person types into the shell comes over a pseudo-terminal."""
    serve, use = (
        block.replace(":7071", f":{runner.port}").replace(".venv/bin/", f"{Path(sys.executable).parent}/")
        for block in shell_blocks()
        if ".dev/docker.sock" in block
    )
    use = use.replace("docker-runner/busybox:latest", image).replace("demo-box", names())
    kept = {name: value for name, value in runner.environ.items() if not name.startswith("DOCKER_")}
    bridge = subprocess.Popen(["bash", "-c", f"exec {serve.strip()}"], cwd=checkout, env=kept)
    try:
        assert wait_until((checkout / ".dev/docker.sock").exists, 10)
        outer, inner = os.openpty()
        command = ["bash", "-euo", "pipefail", "-c", use]
        tools = subprocess.Popen(
            command, cwd=checkout, env=kept, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
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
