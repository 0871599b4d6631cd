"""The docker CLI through the bridge: the system, containers' lives, volumes, networks, and the errors of all these.

Each command runs twice, on the engine and through bridge and runner, with one outcome: see `twice`.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_bridge_cli_images
import test_bridge_cli_streams

from bridged import Bridge
from comparison import Containers
from conftest import LABEL, EngineDirect, Names
from dev.engine import Engine
from documents import TEXTS
from twice import SHOWN, TWIN, Ran, Side, Twice, addresses, clis, counts, logged, numbers, order, through, times, twice

# Imported, so that what they declare is known to the last test.
OTHER_FILES = (test_bridge_cli_images, test_bridge_cli_streams)
RUN = ("run", "--network=none")
CREATE = ("create", "--network=none")


@pytest.fixture(params=clis(), ids=os.path.dirname)
def docker(request: pytest.FixtureRequest, engine: Engine, bridge: Bridge, names: Names) -> Iterator[Twice]:
    yield from twice(request, request.param, engine, bridge, names)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture
def twins(docker: Twice, image: str) -> str:
    """A running container on each side."""
    name = docker.name("c")
    assert docker(*RUN, "-d", "--name", name, "--stop-signal=KILL", image, "sleep", "1d").status == 0
    return name


class TestSystem:
    @through("version")
    def test_version(self, docker: Twice) -> None:
        ran = docker("version")
        assert ran.status == 0
        assert b"Server:" in ran.out
        assert docker("version", "--format", "{{json .Server}}").status == 0

    @through("info")
    def test_info(self, docker: Twice) -> None:
        ran = docker("info", but=counts)
        assert ran.status == 0
        assert b"Storage Driver" in ran.out

    @through("system df")
    def test_disk_usage(self, docker: Twice) -> None:
        ran = docker("system", "df", but=numbers)
        assert ran.status == 0
        assert ran.out.startswith(b"TYPE")

    @through("events --since --until")
    def test_past_events_with_a_filter(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        begin = time.time() - 1
        assert docker(*RUN, "--rm", "--name", name, image, "true") == Ran(0, b"")
        period = ("--since", f"{begin:.3f}", "--until", f"{time.time():.3f}")
        form = ("--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}")
        ran = docker("events", *period, "--filter", f"container={name}", "--filter", "type=container", *form)
        lines = [line.split()[1].decode() for line in ran.out.splitlines()]
        assert lines == ["create", "attach", "start", "die", "destroy"]
        whole = docker("events", *period, "--filter", f"container={name}", but=times)
        assert whole.out.count(b"\n") >= 5

    @through("events --until")
    def test_events_as_they_come_until_a_time_to_come(self, docker: Twice, image: str) -> None:
        name = docker.name("c")

        def script(side: Side) -> list[Ran]:
            until = f"{time.time() + 0.8:.3f}"
            with side.start("events", "--until", until, "--filter", f"container={name}", "--since=1m") as events:
                made = side("create", "--name", name, image)
                events.until(b"container create")
                return [made, events.wait(but=times)]

        events = docker.each(script)[1]
        assert events.status == 0
        assert events.out.count(b"\n") == 1


class TestLife:
    @through("create", "start", "stop", "ps", "rm")
    def test_a_container_lives_and_goes(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        assert docker(*CREATE, "--name", name, "--stop-signal=KILL", image, "sleep", "1d").status == 0
        mine = ("--filter", f"name={name}")
        assert b"Created" in docker("ps", "-a", *mine, but=times).out
        assert docker("ps", "-q", *mine).out == b""
        assert docker("start", name) == Ran(0, f"{name}\n".encode())
        assert b"Up SPAN" in docker("ps", *mine, but=times).out
        assert docker("ps", "-aqs", "--no-trunc", *mine).out.startswith(b"ID1")
        assert docker("rm", name).status == 1
        assert docker("stop", name) == Ran(0, f"{name}\n".encode())
        assert b"Exited (137)" in docker("ps", "-a", *mine, but=times).out
        assert docker("rm", name) == Ran(0, f"{name}\n".encode())
        assert docker("ps", "-aq", *mine).out == b""

    @through("rename", "pause", "unpause", "restart", "update", "kill", "wait", "inspect")
    def test_a_running_container_is_changed(self, docker: Twice, twins: str) -> None:
        new = docker.name("renamed")
        assert docker("rename", twins, new) == Ran(0, b"")
        assert docker("pause", new) == Ran(0, f"{new}\n".encode())
        assert docker("inspect", "--format={{.State.Status}}", new).out == b"paused\n"
        assert docker("pause", new).status == 1
        assert docker("unpause", new) == Ran(0, f"{new}\n".encode())
        assert docker("restart", "-t", "0", new) == Ran(0, f"{new}\n".encode())
        assert docker("update", "--cpu-shares=512", "--restart=no", new).status == 0
        assert docker("inspect", "--format={{.HostConfig.CpuShares}} {{.State.Status}}", new).out == b"512 running\n"
        assert docker("kill", "-s", "KILL", new) == Ran(0, f"{new}\n".encode())
        assert docker("wait", new) == Ran(0, b"137\n")
        assert docker("kill", new).status == 1
        assert docker("rm", "-f", new).status == 0

    @through("wait")
    def test_wait_waits(self, docker: Twice, twins: str) -> None:
        def script(side: Side) -> list[Ran]:
            with side.start("wait", twins) as waiting:
                return [side("kill", twins), waiting.wait()]

        assert docker.each(script)[1] == Ran(0, b"137\n")

    @through("inspect", "container inspect", "top", "port")
    def test_what_is_told_of_a_running_container(self, docker: Twice, box: str, image: str) -> None:
        ran = docker("inspect", "-s", box, image)
        assert ran.status == 0
        assert box.encode() in ran.out
        assert docker("container", "inspect", box).status == 0
        assert docker("inspect", "--type=volume", box).status == 1
        assert b"sleep 1d" in docker("top", box, "-o", "pid,ppid,tty,args").out
        assert docker("top", box, but=numbers).status == 0
        assert docker("port", box) == Ran(0, b"")

    @through("stats --no-stream")
    def test_stats_once(self, docker: Twice, box: str) -> None:
        ran = docker("stats", "--no-stream", box, but=numbers)
        assert ran.status == 0
        assert ran.out.splitlines()[0].split()[:2] == [b"CONTAINER", b"ID"]

    @through("diff", "commit", "history", "image inspect")
    def test_changes_become_an_image(self, docker: Twice, image: str, names: Names) -> None:
        name, made = docker.name("c"), docker.name("committed")
        assert docker(*RUN, "--name", name, image, "sh", "-c", "echo new >/new; rm /bin/vi").status == 0
        assert docker("diff", name, but=order).out.splitlines() == [b"A /new", b"C /bin", b"D /bin/vi"]
        label = f"LABEL {LABEL}={names.mark}"
        assert docker("commit", "-m", "why", "-a", "who", "-c", label, "-c", "CMD cat /new", name, made).status == 0
        assert docker("image", "inspect", "--format={{.Comment}} {{.Author}}", made).out == b"why who\n"
        assert docker("history", made, but=times).out.count(b"\n") == 3
        assert docker(*RUN, "--rm", made) == Ran(0, b"new\n")


class TestErrors:
    MISSING = "no-such-container"

    @pytest.mark.parametrize(
        "command",
        [
            ("inspect",),
            ("start",),
            ("start", "-a"),
            ("stop",),
            ("restart",),
            ("kill",),
            ("rm",),
            ("rm", "-f"),
            ("logs",),
            ("logs", "-f"),
            ("attach",),
            ("wait",),
            ("top",),
            ("stats", "--no-stream"),
            ("diff",),
            ("export",),
            ("pause",),
            ("commit",),
            ("port",),
            ("update", "--cpu-shares=2"),
        ],
    )
    def test_no_such_container(self, docker: Twice, command: tuple[str, ...]) -> None:
        ran = docker(*command, self.MISSING)
        assert b"no such" in ran.err.lower()
        assert ran.status == (0 if command == ("rm", "-f") else 1)

    @through("exec", "rename", "cp")
    def test_no_such_container_for_commands_with_more_arguments(self, docker: Twice, tmp_path: Path) -> None:
        assert docker("exec", self.MISSING, "true").status == 1
        assert docker("rename", self.MISSING, "new").status == 1
        assert docker("cp", f"{self.MISSING}:/bin", str(tmp_path)).status == 1
        assert docker("cp", str(tmp_path), f"{self.MISSING}:/").status == 1

    def test_a_name_in_use(self, docker: Twice, box: str, image: str) -> None:
        ran = docker(*RUN, "--name", box, image, "true")
        assert ran.status == 125
        assert b"is already in use" in ran.err
        assert docker(*CREATE, "--name", box, image, "true").status == 1

    def test_exec_in_a_stopped_container(self, docker: Twice, containers: Containers) -> None:
        stopped = containers.ended("true")
        ran = docker("exec", stopped, "true")
        assert ran.status == 1
        assert b"is not running" in ran.err
        ran = docker("exec", "-i", stopped, "cat", stdin=b"nobody reads this")
        assert ran.status == 1

    def test_exec_in_a_paused_container(self, docker: Twice, twins: str) -> None:
        assert docker("pause", twins).status == 0
        ran = docker("exec", twins, "true")
        assert ran.status == 1
        assert b"is paused" in ran.err

    def test_an_invalid_argument(self, docker: Twice, image: str) -> None:
        assert docker(*RUN, "--memory=1k", image, "true").status == 125
        assert docker(*RUN, "--name", "?", image, "true").status == 125
        assert docker(*RUN, "--no-such-option", image, "true").status == 125
        assert docker("ps", "--filter", "no=such").status == 1
        assert docker("kill", "-s", "NOSUCH", "no-such-container").status == 1

    def test_a_command_that_is_not_there(self, docker: Twice, box: str, image: str) -> None:
        ran = docker(*RUN, "--rm", image, "no-such-command", but=logged)
        assert ran.status == 127
        assert b"no-such-command" in ran.err
        assert docker(*RUN, "--rm", image, "/tmp", but=logged).status == 126
        assert docker("exec", box, "no-such-command").status in (126, 127)


class TestVolumes:
    @through("volume create", "volume ls", "volume inspect", "volume rm", "run -v")
    def test_a_volume_is_made_used_and_removed(self, docker: Twice, image: str) -> None:
        name = docker.name("v")
        assert docker("volume", "create", "--label", "a=b", name) == Ran(0, f"{name}\n".encode())
        assert name.encode() in docker("volume", "ls", "--filter", f"name={name}").out
        assert b'"a": "b"' in docker("volume", "inspect", name, but=times).out
        use = (*RUN, "--rm", "-v", f"{name}:/data", image, "sh", "-c")
        assert docker(*use, "echo kept >/data/file") == Ran(0, b"")
        assert docker(*use, "cat /data/file") == Ran(0, b"kept\n")
        assert docker("volume", "rm", name) == Ran(0, f"{name}\n".encode())
        assert docker("volume", "rm", name).status == 1
        assert docker("volume", "inspect", name).status == 1

    @through("volume rm")
    def test_a_volume_in_use_stays(self, docker: Twice, image: str) -> None:
        container, volume = docker.name("c"), docker.name("v")
        assert docker(*CREATE, "--name", container, "-v", f"{volume}:/data", image).status == 0
        ran = docker("volume", "rm", volume)
        assert ran.status == 1
        assert b"volume is in use" in ran.err
        assert docker("rm", "-v", container).status == 0
        assert docker("volume", "rm", volume).status == 0


class TestNetworks:
    @through("network create", "network ls", "network inspect", "network connect", "network disconnect", "network rm")
    def test_a_network_is_made_connected_and_removed(self, docker: Twice, image: str) -> None:
        network, member = docker.name("n"), docker.name("c")
        assert docker("network", "create", "--internal", "--label", "a=b", network).status == 0
        assert network.encode() in docker("network", "ls", "--filter", f"name={network}").out
        assert b'"Internal": true' in docker("network", "inspect", network, but=addresses).out
        assert docker("network", "create", network).status == 1
        assert docker("create", "--network=bridge", "--name", member, image).status == 0
        assert docker("network", "connect", "--alias=other", network, member) == Ran(0, b"")
        of_member = "{{range $name, $_ := .NetworkSettings.Networks}}{{println $name}}{{end}}"
        assert docker("inspect", "--format", of_member, member).out.split() == [b"bridge", network.encode()]
        assert docker("network", "disconnect", network, member) == Ran(0, b"")
        assert docker("network", "rm", network) == Ran(0, f"{network}\n".encode())
        assert docker("network", "inspect", network).status == 1
        assert docker("network", "rm", network).status == 1


class TestPrunes:
    """With a filter that only the side's own objects pass, because the engine may be others' too."""

    LABEL = f"docker-runner.test.prune={TWIN}"

    @through("container prune", "volume prune", "network prune", "image prune")
    def test_prunes_remove_what_their_filter_names(self, docker: Twice, image: str) -> None:
        label = ("--label", self.LABEL)
        prune = ("prune", "-f", "--filter", f"label={self.LABEL}")
        assert docker(*CREATE, *label, "--name", docker.name("c"), image).status == 0
        ran = docker("container", *prune)
        assert ran.status == 0
        assert re.search(rb"Deleted Containers:\nID\d", ran.out)
        volume = docker.name("v")
        assert docker("volume", "create", *label, volume).status == 0
        assert volume.encode() in docker("volume", *prune).out
        network = docker.name("n")
        assert docker("network", "create", "--internal", *label, network).status == 0
        assert network.encode() in docker("network", *prune).out
        assert docker("build", "-q", *label, "-", stdin=b"FROM scratch\nLABEL of=" + TWIN.encode()).status == 0
        assert b"deleted: sha256:" in docker("image", *prune).out


def test_the_pages_table_names_the_commands_that_are_run_here() -> None:
    found = re.search(r"<!-- works:[^>]*-->\n(.*?)\n?<!-- /works -->", TEXTS["docs/bridge.md"], re.DOTALL)
    assert found is not None
    rows = [line for line in found[1].splitlines() if line.startswith("| docker CLI")]
    named = [command for line in rows for command in re.findall(r"`([^`]+)`", line)]
    files = {__name__, *(file.__name__ for file in OTHER_FILES)}
    shown = {command for test, commands in SHOWN.items() if test.partition(".")[0] in files for command in commands}
    assert sorted(named) == sorted(shown)
