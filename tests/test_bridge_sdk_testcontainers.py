"""testcontainers (Python), used as its documentation shows: `tests/sdk/with_testcontainers.py`.

Its settings are read from the environment when it is imported, so it runs as a program of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bridged import Bridge
from conftest import IMAGE, Names
from dev.engine import Engine
from service import ROOT
from works import Side, Sides, row, shows

CONTAINER = row("testcontainers: container", "`DockerContainer`: waits for a log, a command, HTTP; `exec`, `get_logs`")
PORTS = row("testcontainers: ports", "`Network`, aliases, `with_exposed_ports` and `get_exposed_port`")
FILES = row("testcontainers: files", "`with_copy_into_container`, `copy_from_container`; `DockerImage`")

SETTINGS = {
    "TESTCONTAINERS_RYUK_DISABLED": "true",  # the reaper is an image of its own, from a registry
    # Where the tests themselves run in a container, testcontainers would look for the engine outside of it.
    "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
    "TC_MAX_TRIES": "20",
}


@pytest.fixture(scope="module")
def results(engine: Engine, bridge: Bridge, names: Names) -> dict[str, Any]:
    """What the program printed at both sides."""

    def scenario(side: Side[None]) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "TC_"))}
        side.name()
        run = subprocess.run(
            [
                *(sys.executable, str(ROOT / "tests/sdk/with_testcontainers.py")),
                *(IMAGE, side.names_begin_with, json.dumps(side.labels)),
            ],
            env={**kept, **SETTINGS, "DOCKER_HOST": side.host},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        printed: dict[str, Any] = json.loads(run.stdout)
        return printed

    sides: Sides[None] = Sides(f"unix://{engine.socket}", bridge.host, names, lambda _: None)
    return sides.same(scenario)


@shows(CONTAINER)
def test_waits_for_a_log_and_runs_a_command(results: dict[str, Any]) -> None:
    assert results["logs_and_exec"] == [3, "hello\n", "starting\nready to serve\n", "running", True]


@shows(CONTAINER)
def test_waits_for_a_command(results: dict[str, Any]) -> None:
    assert results["waiting_for_a_command"] == ["/ready\n"]


@shows(PORTS)
def test_reaches_a_server_by_its_mapped_port_and_finds_it_by_its_alias(results: dict[str, Any]) -> None:
    assert results["ports"] == ["served\n", True]


@shows(FILES)
def test_copies_files_in_and_out(results: dict[str, Any]) -> None:
    assert results["files"] == ["copied in\n", "copied in\n"]


@shows(FILES)
def test_builds_an_image(results: dict[str, Any]) -> None:
    assert results["image"] == [True, "/built\n"]
