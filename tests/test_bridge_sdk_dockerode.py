"""dockerode (Node.js), used as its documentation shows, at the engine and at the bridge: `tests/sdk/dockerode.mjs`."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bridged import Bridge
from conftest import IMAGE, Names, Registry
from dev import find_program
from dev.engine import Engine
from service import ROOT
from works import Side, Sides, row, shows

RUN = row("dockerode: run", "`docker.run` with streams and on a terminal; `wait`; start, stop, pause, kill, `remove`")
EXEC = row(
    "dockerode: exec", "`exec.start` with `hijack` and without, with stdin too; `demuxStream`; terminals, `resize`"
)
ATTACH = row("dockerode: attach", "`attach` with `hijack` and without, with stdin too; `demuxStream`; terminals")
FEEDS = row("dockerode: feeds", "`logs` (followed), `getEvents`, `stats`; `version`, `info`, `ping`")
IMAGES = row("dockerode: images", "`buildImage` of a tar stream, `pull`, `push`, `followProgress`, `get`, `loadImage`")
FILES = row("dockerode: files", "`putArchive`, `getArchive`, `infoArchive`; volumes and networks")
ERRORS = row("dockerode: errors", "errors with the engine's status and message")


class Program:
    """`dockerode.mjs`, running, with DOCKER_HOST at a host."""

    def __init__(self, host: str) -> None:
        node = find_program("node")
        assert node is not None, "Node.js is missing: python3 -m dev.prepare test installs it"
        self._command = [node, str(ROOT / "tests/sdk/dockerode.mjs")]
        self._environ = {**os.environ, "DOCKER_HOST": host}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environ
        )

    def ask(self, **asked: Any) -> Any:
        """Runs a scenario; returns its result, or fails with its failure."""
        if self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        try:
            answer = json.loads(self.process.stdout.readline() or '{"failure": "the program ended"}')
        except TimeoutError:
            self.end()  # its answer would be taken for the next one's
            raise
        assert "failure" not in answer, answer["failure"]
        return answer["result"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def sides(engine: Engine, bridge: Bridge, names: Names) -> Iterator[Sides[Program]]:
    sides = Sides(f"unix://{engine.socket}", bridge.host, names, Program)
    yield sides
    for side in (sides.engine, sides.bridge):
        side.client.end()


def same(sides: Sides[Program], scenario: str, **more: str) -> Any:
    """Runs a scenario of the program at both sides."""

    def ask(side: Side[Program]) -> Any:
        side.name()
        return side.client.ask(scenario=scenario, name=side.names_begin_with, image=IMAGE, labels=side.labels, **more)

    return sides.same(ask)


@shows(RUN)
def test_run_gives_both_outputs_and_the_status(sides: Sides[Program]) -> None:
    assert same(sides, "run") == [3, ["out\n", "err\n"]]


@shows(RUN)
def test_run_on_a_terminal(sides: Sides[Program]) -> None:
    assert same(sides, "runOnATerminal") == [0, "1\r\n2\r\n3\r\n"]


@shows(RUN)
def test_a_containers_life(sides: Sides[Program]) -> None:
    again, listed, top = same(sides, "life")
    assert (again[0], listed) == (409, 1)
    assert "is not running" in top[2]


@shows(RUN)
def test_wait_begun_before_the_start(sides: Sides[Program]) -> None:
    assert same(sides, "waitBeforeStart") == 7


@shows(EXEC)
def test_exec_with_upgrade_and_without(sides: Sides[Program]) -> None:
    assert same(sides, "exec") == [[["out\n", "err\n"], 4]] * 2


@shows(EXEC)
def test_exec_takes_stdin_to_its_end_and_gives_what_comes_after(sides: Sides[Program]) -> None:
    assert same(sides, "execWithStdin") == [["200000\n", "end\n"], 0]


@shows(EXEC)
def test_exec_without_upgrade_takes_stdin(sides: Sides[Program]) -> None:
    assert same(sides, "execWithStdinWithoutUpgrade") == [[[1, "got one\n"]], [[1, "and two\n"]], 0]


@shows(EXEC)
def test_exec_on_a_terminal_has_its_size(sides: Sides[Program]) -> None:
    assert same(sides, "execOnATerminal").strip() == "33 77"


@shows(ATTACH)
def test_attach_with_upgrade_and_without(sides: Sides[Program]) -> None:
    assert same(sides, "attach") == [["out\n", "err\n"]] * 2


@shows(ATTACH)
def test_attach_takes_stdin_to_its_end_and_gives_what_comes_after(sides: Sides[Program]) -> None:
    assert same(sides, "attachWithStdin") == [["one\ntwo\nend\n", ""], 0]


@shows(ATTACH)
def test_attach_without_upgrade_takes_stdin(sides: Sides[Program]) -> None:
    assert same(sides, "attachWithStdinWithoutUpgrade") == [[[1, "got one\n"]], [[1, "and two\n"]], 6]


@shows(ATTACH)
def test_attach_to_a_terminal(sides: Sides[Program]) -> None:
    assert same(sides, "attachToATerminal") == "hello\r\nhello\r\n"


@shows(FEEDS)
def test_logs_followed_come_as_they_are_written(sides: Sides[Program]) -> None:
    assert same(sides, "logs") == [[[1, "one\n"]], [[1, "two\n"]], [[1, "two\n"]]]


@shows(FEEDS)
def test_events_come_live(sides: Sides[Program]) -> None:
    assert same(sides, "events") == ["create", "start", "die", "destroy"]


@shows(FEEDS)
def test_stats_one_and_streamed(sides: Sides[Program]) -> None:
    assert all("cpu_stats" in keys for keys in same(sides, "stats"))


@shows(FEEDS)
def test_version_info_and_ping(sides: Sides[Program]) -> None:
    assert same(sides, "system")[-1] == "OK"


@shows(IMAGES)
def test_build_from_a_tar_stream(sides: Sides[Program]) -> None:
    log, live, output = same(sides, "build")
    assert output == "hello\r\nfrom the tar\r\n"
    assert live
    assert "Successfully built" in str(log)


@shows(IMAGES)
def test_push_and_pull_show_their_progress(sides: Sides[Program], registry: Registry) -> None:
    *_, pulled, tagged = same(sides, "pushAndPull", registry=registry.address)
    assert "Status: " in str(pulled)
    assert tagged


@shows(IMAGES)
def test_saved_is_loaded_again(sides: Sides[Program]) -> None:
    assert same(sides, "saveAndLoad")[1] == "b"


@shows(FILES)
def test_files_go_in_and_come_out_whole(sides: Sides[Program]) -> None:
    _, found, _ = same(sides, "files")
    assert found["tmp/small"].startswith("5 ")
    assert found["tmp/large"].startswith("3000000 ")


@shows(FILES)
def test_volumes_and_networks(sides: Sides[Program]) -> None:
    assert same(sides, "volumesAndNetworks") == [1, "local", 1, "1"]


@shows(ERRORS)
def test_errors_have_the_engines_status_and_message(sides: Sides[Program]) -> None:
    seen = same(sides, "errors")
    assert [status for status, *_ in seen] == [404, 404, 404, 404, 404, 404, 404, 404, 404, 409, 409, 404, 400]
    assert "No such container" in seen[0][2]
