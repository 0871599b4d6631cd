"""The runbook of docs/operations.md: each of its commands, run on a service in the state that it is for.

The service is a real one, in a folder that stands for `/etc/docker-runner` and `/opt/docker-runner`. `systemctl` is a
script of ours: `reload` sends SIGHUP, `restart` is noted, and done by the test.
"""

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from conftest import EngineDirect, Names, free_port
from dev import wait_until
from dev.engine import Engine
from documents import block, example, run_in
from packed import one_file
from service import SECRET, Runner

PAGE = "docs/operations.md"
FILE = "docker-runner-cp311-linux_x86_64.pyz"


class Service:
    """An installed service: its files in `folder`, its secret and its policy in files, its audit log kept.

    Args:
        engine_socket: path of the engine's socket.
        folder: empty.
    """

    def __init__(self, engine_socket: str, folder: Path) -> None:
        self.folder = folder
        self.secrets, self.policy = folder / "etc/docker-runner/secret", folder / "etc/docker-runner/policy.toml"
        self.programs, self.restarts = folder / "programs", folder / "restarts"
        for each in (self.secrets.parent, self.programs, folder / "opt/docker-runner"):
            each.mkdir(parents=True)
        self.secrets.write_text(SECRET + "\n")
        self.secrets.chmod(0o400)
        self.policy.write_text('preset = "everything"\n')
        self.metrics_port = free_port()
        self._engine_socket = engine_socket
        self.start()
        self.program(
            "systemctl", f'echo "$@" >> {self.restarts}\ntest "$1" != reload || kill -HUP $(cat {folder}/pid)\n'
        )

    def start(self) -> None:
        """Start it; anew, if it was stopped."""
        settings = {
            "DOCKER_RUNNER_SHARED_SECRET": "",
            "DOCKER_RUNNER_SHARED_SECRET_FILE": str(self.secrets),
            "DOCKER_RUNNER_POLICY": str(self.policy),
            "DOCKER_RUNNER_METRICS_PORT": str(self.metrics_port),
        }
        with (self.folder / "audit.log").open("ab") as audit:
            self.runner = Runner(self._engine_socket, settings, output=audit.fileno())
        (self.folder / "pid").write_text(str(self.runner.process.pid))

    def program(self, name: str, script: str) -> None:
        """A program that stands before others of its name."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)

    def shell(self, script: str, environ: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """A documented script, with this service's places and ports, and its settings in the environment."""
        for folder in ("/etc/docker-runner", "/opt/docker-runner"):
            script = script.replace(folder, f"{self.folder}{folder}")
        settings = {**self.runner.environ, "DOCKER_RUNNER_PORT": str(self.runner.port), **(environ or {})}
        first = {**settings, "PATH": f"{self.programs}:{Path(sys.executable).parent}:{settings['PATH']}"}
        return run_in(self.folder, f'PATH="{first["PATH"]}"\n{script.replace(":7072", f":{self.metrics_port}")}', first)

    def says(self, script: str, environ: Mapping[str, str] | None = None) -> str:
        """What a script prints that must succeed."""
        done = self.shell(script, environ)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def status(self, secret: str, target: str = "/_ping", method: str = "GET") -> int:
        """The status that a caller with this secret gets."""
        self.runner.secret = secret
        return self.runner.request(method, target).status

    def audited(self, count: int) -> None:
        """Wait until the audit log has so many lines."""
        assert wait_until(lambda: (self.folder / "audit.log").read_bytes().count(b"\n") >= count, 10)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Iterator[Service]:
    service = Service(engine.socket, tmp_path)
    yield service
    service.runner.stop()


@example(PAGE, "docker-runner check\n")
def test_it_does_not_start(script: str, service: Service) -> None:
    done = service.shell(script, {"DOCKER_RUNNER_PORT": "x"})
    assert done.returncode == 1
    assert "FAIL  settings: DOCKER_RUNNER_PORT" in done.stdout
    assert "      -> " in done.stdout


@example(PAGE, "check --ready || ")
def test_the_engine_is_down(script: str, tmp_path: Path) -> None:
    service = Service(str(tmp_path / "no-socket"), tmp_path / "service")
    try:
        done = service.shell(script)
    finally:
        service.runner.stop()
    assert done.returncode == 1
    assert "/v1/ready: 503" in done.stdout
    assert f"FAIL  engine: there is no socket at {tmp_path}/no-socket" in done.stdout


@example(PAGE, '"status":401')
def test_who_gets_401(script: str, service: Service) -> None:
    assert [service.status(secret) for secret in ("wrong" * 10, SECRET, "wrong" * 10)] == [401, 200, 401]
    assert service.runner.raw(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 401")
    service.audited(3)
    assert [line.split() for line in service.says(script).splitlines()] == [
        ["2", "invalid_signature", "127.0.0.1"],
        ["1", "missing_headers", "127.0.0.1"],
    ]


@example(PAGE, "curl -si /version")
def test_one_answer_with_all_its_words(script: str, service: Service) -> None:
    said = service.says(script)
    assert said.startswith("HTTP/1.1 200")
    assert '"ApiVersion"' in said


@example(PAGE, "key_requests_total")
def test_how_much_is_used(script: str, service: Service) -> None:
    service.status(SECRET)
    said = service.says(script)
    for name in ('used{resource="streams"}', 'limit{resource="streams"}', 'open_streams{kind="events"}'):
        assert f"docker_runner_{name} " in said, said
    assert 'docker_runner_key_requests_total{key=""} 1.0' in said


@example(PAGE, "engine_(connections|waiting)")
def test_what_holds_the_engines_connections(script: str, service: Service) -> None:
    said = service.says(script)
    for name in ("docker_runner_engine_connections", "docker_runner_engine_waiting", "docker_runner_open_streams"):
        assert name in said
    assert "process_open_fds" in said
    assert "process_max_fds" in said


@example(PAGE, 'resource="nonces"')
def test_how_many_nonces_are_held(script: str, service: Service) -> None:
    service.status(SECRET)
    assert service.says(script).splitlines() == [
        'docker_runner_used{resource="nonces"} 1.0',
        'docker_runner_limit{resource="nonces"} 1e+06',
    ]


@example(PAGE, "df -h")
def test_room_for_uploads(script: str, service: Service) -> None:
    assert "%" in service.says(script)


ADD, TAKE_AWAY = (block(PAGE, mark) for mark in (">> /etc/docker-runner/secret", "tail -n +2"))


def test_a_secret_is_rotated_and_nobody_is_refused(service: Service) -> None:
    service.says(ADD)
    service.runner.wait_for_log("read the secrets again: 2 accepted")
    _, new = service.secrets.read_text().splitlines()
    assert [service.status(SECRET), service.status(new)] == [200, 200]
    inode = service.secrets.stat().st_ino
    service.says(TAKE_AWAY)
    service.runner.wait_for_log("read the secrets again: 1 accepted")
    assert [service.status(SECRET), service.status(new)] == [401, 200]
    assert service.secrets.read_text() == new + "\n"
    assert (service.secrets.stat().st_ino, stat.S_IMODE(service.secrets.stat().st_mode)) == (inode, 0o400)


def test_a_file_of_secrets_that_cannot_be_read_keeps_the_old(service: Service) -> None:
    service.secrets.chmod(0o600)
    service.secrets.write_text("")
    service.runner.process.send_signal(signal.SIGHUP)
    service.runner.wait_for_log("kept the old secrets")
    assert service.status(SECRET) == 200


@example(PAGE, "rand -hex 32 > /etc/docker-runner/secret")
def test_a_leaked_secret_is_taken_away(script: str, service: Service) -> None:
    service.says(script)
    assert service.restarts.read_text() == "restart docker-runner\n"
    assert service.runner.stop() == 0
    service.start()
    assert [service.status(SECRET), service.status(service.secrets.read_text().strip())] == [401, 200]


@example(PAGE, 's/.*"decision":"allowed"')
def test_what_was_done_with_a_secret(script: str, service: Service, names: Names) -> None:
    for operation in ("start", "stop", "start"):
        service.status(SECRET, f"/containers/{names()}/{operation}", "POST")
    service.audited(3)
    assert [line.split() for line in service.says(script).splitlines()] == [
        ["2", "ContainerStart", '"client":"127.0.0.1'],
        ["1", "ContainerStop", '"client":"127.0.0.1'],
    ]


INSTALL, READY, BACK = (block(PAGE, mark) for mark in (".pyz.before\ninstall", "check --ready\n", "mv /opt"))


def test_a_new_file_is_tried_put_in_place_and_rolled_back(service: Service) -> None:
    installed = service.folder / "opt/docker-runner/docker-runner.pyz"
    installed.write_text("the version before")
    (service.folder / "dist").symlink_to(one_file().parent)
    (service.programs / "python3").symlink_to(Path(sys.executable).resolve())
    unpacked = {"SHIV_ROOT": str(service.folder / "unpacked")}
    assert "ok    engine: version" in service.says(INSTALL.replace(FILE, one_file().name), unpacked)
    assert installed.read_bytes() == one_file().read_bytes()
    assert '200 {"status":"ready"}' in service.says(READY)
    service.says(BACK)
    assert installed.read_text() == "the version before"
    assert service.restarts.read_text() == "restart docker-runner\n" * 2


CHANGE, DENIED, UNDO = (block(PAGE, mark) for mark in ("EDITOR", 's/.*"code":"policy_denied"', ".before > "))


def test_a_policy_is_changed_and_rolled_back(service: Service, names: Names) -> None:
    target = f"/containers/{names()}/start"
    service.program("edit", 'echo \'operations.deny = ["ContainerStart"]\' >> "$1"\n')
    assert "ok    policy: " in service.says(CHANGE, {"EDITOR": "edit"})
    service.runner.wait_for_log("read the policy again")
    assert service.status(SECRET, target, "POST") == 403
    service.audited(1)
    (line,) = service.says(DENIED).splitlines()
    assert line.split() == ["1", "operations", '"client":"127.0.0.1']
    read = sum("read the policy again" in line for line in service.runner.log)
    service.says(UNDO)
    assert wait_until(lambda: sum("read the policy again" in each for each in service.runner.log) > read, 10)
    assert service.status(SECRET, target, "POST") == 404


def test_a_wrong_policy_is_found_before_it_is_read(service: Service) -> None:
    service.program("edit", 'echo "preset = nonsense" > "$1"\n')
    done = service.shell(CHANGE, {"EDITOR": "edit"})
    assert done.returncode == 1
    assert "FAIL  settings: DOCKER_RUNNER_POLICY" in done.stdout
    assert not service.restarts.exists()


OF_OBJECT, OF_REQUEST = (block(PAGE, mark) for mark in ("""grep '"object\"""", """grep '"request_id\""""))


def test_who_did_it(service: Service, names: Names, direct: EngineDirect) -> None:
    name = names()
    answer = service.runner.request("POST", f"/containers/{name}/start", headers={"X-Request-Id": "of-this-test"})
    assert answer.header("x-request-id") == "of-this-test"
    service.audited(1)
    by_object = service.says(OF_OBJECT.replace('"web"', f'"{name}"'))
    by_request = service.says(OF_REQUEST.replace("2387eb3f7f806360", "of-this-test"))
    assert by_object == by_request
    line = json.loads(by_object)
    assert (line["operation"], line["status"], line["client"].partition(":")[0]) == ("ContainerStart", 404, "127.0.0.1")
