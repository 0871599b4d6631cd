"""docker-compose (version 1, from Debian) with DOCKER_HOST at the engine and at the bridge.

One project is up at each; the tests look at it in the order in which they stand, the last takes it down.
"""

import os
import pty
import signal
import subprocess
import termios
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridged import Bridge
from conftest import IMAGE, EngineDirect, Names
from dev import find_program
from dev.engine import Engine
from works import Side, Sides, row, shows

UP = row("compose: up", "`up -d` (with a build, a volume, a network), `ps`")
LOGS = row("compose: logs", "`logs`, `logs --follow`")
EXEC = row("compose: exec", "`exec -T` with stdin to its end, `exec` on a terminal with its size; `run`; exit statuses")
DOWN = row("compose: down", "`stop`, `start`, `rm`, `down`, with volumes and images")

PROJECT = f"""
version: "3.8"
services:
  web:
    image: {IMAGE}
    command: ["sh", "-c", "echo web is up; exec sleep 1d"]
    stop_signal: SIGKILL
    environment: {{GREETING: hello}}
    volumes: ["data:/data"]
    networks: [inside]
  built:
    build: {{context: ., network: none}}
    stop_signal: SIGKILL
    depends_on: [web]
    volumes: ["data:/data"]
    networks: [inside]
  once:
    image: {IMAGE}
    command: ["sh", "-c", "echo once; echo to stderr >&2; exit 3"]
    network_mode: none
    profiles: [once]
volumes:
  data:
networks:
  inside:
"""
DOCKERFILE = f"FROM {IMAGE}\nCOPY Dockerfile /built\nCMD echo built is up; exec sleep 1d\n"


class Said(NamedTuple):
    """How a command ended. The lines of standard error are sorted: services go side by side."""

    status: int
    out: str
    err: list[str]


class Compose:
    """`docker-compose` for a project in a folder; `host` as `DOCKER_HOST` takes it. Calling it runs a command."""

    def __init__(self, host: str, folder: Path, project: str) -> None:
        program = find_program("docker-compose")
        assert program is not None, "docker-compose is missing: python3 -m dev.prepare test installs it"
        self._command = [program, "--ansi", "never", "--project-name", project]
        self._folder = folder
        self.project = project
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))}
        # It builds itself, rather than with whatever docker CLI there is.
        self._environ = {**kept, "DOCKER_HOST": host, "COMPOSE_DOCKER_CLI_BUILD": "0", "COLUMNS": "999"}

    def start(self, *arguments: str, **more: Any) -> "subprocess.Popen[Any]":
        """Starts a command; takes what Popen takes."""
        return subprocess.Popen([*self._command, *arguments], cwd=self._folder, env=self._environ, **more)

    def __call__(self, *arguments: str, stdin: str = "") -> Said:
        pipe = subprocess.PIPE
        with self.start(*arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                out, err = process.communicate(stdin)
            except TimeoutError:
                process.kill()
                raise
        return Said(process.returncode, self._common(out), sorted(self._common(err).splitlines()))

    def _common(self, text: str) -> str:
        return text.replace(self.project, "PROJECT")


Project = Side[Compose]


@pytest.fixture(scope="module")
def up(engine: Engine, bridge: Bridge, names: Names, tmp_path_factory: pytest.TempPathFactory) -> Sides[Compose]:
    """A project at each side, up."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "docker-compose.yml").write_text(PROJECT)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    project = names("compose")
    marks = iter("eb")

    def make(host: str) -> Compose:
        return Compose(host, folder, project + next(marks))

    sides = Sides(f"unix://{engine.socket}", bridge.host, names, make)
    # What the first builds the second finds in the engine's cache, and says so.
    said = sides.same(lambda side: side.client("up", "-d"), lambda said: (said.status, said.err))
    assert said.status == 0, said
    return sides


@shows(UP)
def test_up_brings_up_what_the_project_says(up: Sides[Compose]) -> None:
    said = up.same(lambda side: side.client("ps"))
    assert [line.split()[0] for line in said.out.splitlines()[2:]] == ["PROJECT_built_1", "PROJECT_web_1"]
    assert said.out.count(" Up ") == 2


@shows(LOGS)
def test_logs(up: Sides[Compose]) -> None:
    said = up.same(lambda side: side.client("logs"), lambda said: sorted(said.out.splitlines()))
    assert "built_1  | built is up" in said.out
    assert "web_1    | web is up" in said.out


@shows(LOGS)
def test_logs_followed_come_as_they_are_written(up: Sides[Compose]) -> None:
    def scenario(side: Project) -> list[Any]:
        with side.client.start("logs", "--follow", "web", stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seen = [process.stdout.readline()]
            side.client("exec", "-T", "web", "sh", "-c", "echo said later > /proc/1/fd/1")
            seen += [process.stdout.readline(), process.stdout.readline()]
            process.send_signal(signal.SIGINT)
        return [seen[1:], process.returncode]

    assert up.same(scenario)[0] == ["web_1    | web is up\n", "web_1    | said later\n"]


@shows(EXEC)
def test_exec_takes_stdin_to_its_end_and_gives_output_and_status(up: Sides[Compose]) -> None:
    script = "wc -c; echo $GREETING >&2; exit 4"
    said = up.same(lambda side: side.client("exec", "-T", "web", "sh", "-c", script, stdin="x" * 100_000))
    assert said == (4, "100000\n", ["hello"])


@shows(EXEC)
def test_exec_on_a_terminal_has_its_size(up: Sides[Compose]) -> None:
    script = 'until [ "$(stty size 2>&1)" = "33 77" ]; do sleep .02; done; echo sized; read x; echo got $x; exit 5'

    def scenario(side: Project) -> list[Any]:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (33, 77))
        terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        with (
            open(ours, "r+b", buffering=0) as screen,
            side.client.start("exec", "web", "sh", "-c", script, **terminal) as process,
        ):
            os.close(theirs)
            seen = b""
            while b"sized" not in seen:
                seen += screen.readline()
            screen.write(b"this\r")
            while b"got this" not in seen:
                seen += screen.readline()
            return [seen, process.wait()]

    assert up.same(scenario) == [b"sized\r\nthis\r\ngot this\r\n", 5]


@shows(EXEC)
def test_run_gives_output_and_status(up: Sides[Compose]) -> None:
    said = up.same(lambda side: side.client("run", "--rm", "once"), lambda said: (said.status, said.out, len(said.err)))
    assert (said.status, said.out) == (3, "once\n")
    assert "to stderr" in said.err


@shows(DOWN)
def test_stop_start_and_rm(up: Sides[Compose]) -> None:
    def scenario(side: Project) -> list[Said]:
        compose = side.client
        return [compose("stop"), compose("start", "web"), compose("rm", "-f", "built")]

    seen = up.same(scenario)
    assert [said.status for said in seen] == [0] * 3


@shows(DOWN)
def test_down_leaves_nothing(up: Sides[Compose], direct: EngineDirect) -> None:
    def scenario(side: Project) -> tuple[Said, bool]:
        said = side.client("down", "--volumes", "--rmi", "local")
        project = side.client.project
        kinds = ("containers/json?all=1", "networks", "volumes", "images/json")
        return said, any(project in direct.request("GET", f"/{kind}").text for kind in kinds)

    said, left = up.same(scenario)
    assert said.status == 0
    assert not left
