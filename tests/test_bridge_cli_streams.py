"""The docker CLI through the bridge: input and output, on pipes and on terminals; logs and events as they come; cp.

Each command runs twice, on the engine and through bridge and runner, with one outcome: see `twice`.
"""

import hashlib
import io
import os
import random
import shutil
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridged import Bridge
from comparison import Containers
from conftest import EngineDirect, Names
from dev.engine import Engine
from twice import TWIN, Ran, Side, Twice, clis, logged, numbers, through, twice

RUN = ("run", "--network=none")
CREATE = ("create", "--network=none")
MIB = 1024 * 1024
WHEN_SIZED = 'until [ "$(stty size 2>/dev/null)" = "%d %d" ]; do sleep 0.02; done; echo sized %d %d'
"""A shell command that waits until its terminal has a size, and says so."""


@pytest.fixture(params=clis(), ids=os.path.dirname)
def docker(request: pytest.FixtureRequest, engine: Engine, bridge: Bridge, names: Names) -> Iterator[Twice]:
    yield from twice(request, request.param, engine, bridge, names)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container that no test changes but for files below /tmp."""
    return containers()


def when_sized(rows: int, columns: int) -> str:
    return WHEN_SIZED % (rows, columns, rows, columns)


class TestRun:
    @through("run --rm")
    def test_output_and_exit_code(self, docker: Twice, image: str) -> None:
        ran = docker(*RUN, "--rm", image, "sh", "-c", "echo out; echo err >&2; printf 'no newline'; exit 3")
        assert ran == Ran(3, b"out\nno newline", b"err\n")

    @through("run -d", "logs", "wait", "rm")
    def test_in_the_background(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        ran = docker(*RUN, "-d", "--name", name, image, "sh", "-c", "echo out; echo err >&2; exit 4")
        assert ran.out.startswith(b"ID1.")
        assert docker("wait", name) == Ran(0, b"4\n")
        assert docker("logs", name) == Ran(0, b"out\n", b"err\n")
        assert docker("rm", name).status == 0

    @through("run -i")
    def test_input_to_its_end(self, docker: Twice, image: str) -> None:
        ran = docker(*RUN, "-i", "--rm", image, "sh", "-c", "wc -c; echo all read >&2; exit 5", stdin=b"1234567")
        assert ran == Ran(5, b"7\n", b"all read\n")

    @through("run -i")
    def test_output_that_comes_after_the_end_of_input(self, docker: Twice, image: str) -> None:
        command = "cat >/dev/null; for i in 1 2 3; do sleep 0.1; echo $i; done"
        assert docker(*RUN, "-i", "--rm", image, "sh", "-c", command, stdin=b"x") == Ran(0, b"1\n2\n3\n")

    @through("run -i")
    def test_a_dialogue_on_pipes(self, docker: Twice, image: str) -> None:
        def script(side: Side) -> Ran:
            with side.start(
                *RUN, "-i", "--rm", image, "sh", "-c", "while read x; do echo got $x; done; exit 6"
            ) as live:
                for number in range(3):
                    live.send(b"%d\n" % number)
                    live.until(b"got %d\n" % number)
                live.end_input()
                return live.wait()

        assert docker.each(script) == Ran(6, b"got 0\ngot 1\ngot 2\n")

    @through("run -it")
    def test_a_terminal_with_its_window_size(self, docker: Twice, image: str) -> None:
        def script(side: Side) -> Ran:
            command = f"{when_sized(33, 101)}; read x; echo got $x; {when_sized(20, 60)}; stty size; tty; exit 7"
            with side.terminal(*RUN, "-it", "--rm", image, "sh", "-c", command, rows=33, columns=101) as live:
                live.until(b"sized 33 101\r\n")
                live.send(b"hello\r")
                live.until(b"got hello\r\n")
                live.resize(20, 60)
                live.until(b"sized 20 60\r\n")
                return live.wait()

        ran = docker.each(script)
        assert ran == Ran(7, b"sized 33 101\r\nhello\r\ngot hello\r\nsized 20 60\r\n20 60\r\n/dev/pts/0\r\n")

    @through("run -it")
    def test_keys_of_a_terminal(self, docker: Twice, image: str) -> None:
        def script(side: Side) -> Ran:
            command = "trap 'echo interrupted' INT; echo ready; cat; echo ended"
            with side.terminal(*RUN, "-it", "--rm", image, "sh", "-c", command) as live:
                live.until(b"ready\r\n")
                live.send(b"line\r")
                live.until(b"line\r\nline\r\n")
                live.send(b"\x03")
                live.until(b"ended\r\n")
                return live.wait()

        assert docker.each(script) == Ran(0, b"ready\r\nline\r\nline\r\n^Cinterrupted\r\nended\r\n")

    @through("run --rm")
    def test_signals_reach_the_process(self, docker: Twice, image: str) -> None:
        def script(side: Side) -> Ran:
            command = "trap 'echo told to end; exit 8' TERM; echo ready; while :; do sleep 0.02; done"
            with side.start(*RUN, "--rm", image, "sh", "-c", command) as live:
                live.until(b"ready\n")
                live.signal(signal.SIGTERM)
                return live.wait()

        assert docker.each(script) == Ran(8, b"ready\ntold to end\n")


class TestExec:
    @through("exec")
    def test_output_and_exit_code(self, docker: Twice, box: str) -> None:
        ran = docker("exec", "-e", "A=b", "-w", "/tmp", box, "sh", "-c", "echo $A; pwd >&2; exit 3")
        assert ran == Ran(3, b"b\n", b"/tmp\n")

    @through("exec -d")
    def test_in_the_background(self, docker: Twice, box: str) -> None:
        mark = f"/tmp/mark-{TWIN}"
        assert docker("exec", "-d", box, "touch", mark) == Ran(0, b"")
        assert docker("exec", box, "sh", "-c", f"until [ -e {mark} ]; do sleep 0.02; done") == Ran(0, b"")

    @through("exec -i")
    def test_input_to_its_end(self, docker: Twice, box: str) -> None:
        ran = docker("exec", "-i", box, "sh", "-c", "cat; echo all read >&2; exit 5", stdin=b"input\0\xff")
        assert ran == Ran(5, b"input\0\xff", b"all read\n")
        assert docker("exec", "-i", box, "cat") == Ran(0, b"")

    @through("exec -i")
    def test_input_that_nobody_reads(self, docker: Twice, box: str) -> None:
        assert docker("exec", "-i", box, "echo", "done", stdin=bytes(MIB)) == Ran(0, b"done\n")

    @through("exec -i")
    def test_much_input_and_output(self, docker: Twice, box: str) -> None:
        data = random.Random(4).randbytes(32 * MIB)
        digest = hashlib.sha256(data).hexdigest()

        def script(side: Side) -> Ran:
            ran = side.raw("exec", "-i", box, "cat", stdin=data)
            return Ran(ran.status, hashlib.sha256(ran.out).hexdigest().encode(), ran.err)

        assert docker.each(script) == Ran(0, digest.encode())

    @through("exec -it")
    def test_a_terminal_with_its_window_size(self, docker: Twice, box: str) -> None:
        def script(side: Side) -> Ran:
            command = f"{when_sized(33, 101)}; read x; echo got $x; {when_sized(20, 60)}; stty size; exit 7"
            with side.terminal("exec", "-it", box, "sh", "-c", command, rows=33, columns=101) as live:
                live.until(b"sized 33 101\r\n")
                live.send(b"hello\r")
                live.until(b"got hello\r\n")
                live.resize(20, 60)
                live.until(b"sized 20 60\r\n")
                return live.wait()

        ran = docker.each(script)
        assert ran == Ran(7, b"sized 33 101\r\nhello\r\ngot hello\r\nsized 20 60\r\n20 60\r\n")

    @through("exec -it")
    def test_a_shell_on_a_terminal(self, docker: Twice, box: str) -> None:
        def script(side: Side) -> int:
            with side.terminal("exec", "-it", box, "sh") as live:
                live.until(b"/ # ")
                live.send(b"echo $((40 + 2))\r")
                live.until(b"\n42\r\n/ # ")  # Until the prompt the terminal, not the shell, would take the next key.
                live.send(b"\x04")
                return live.wait().status

        assert docker.each(script) == 0


class TestAttach:
    @through("create -i", "start -a -i")
    def test_start_with_input(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        assert docker(*CREATE, "-i", "--name", name, image, "sh", "-c", "cat; exit 9").status == 0
        assert docker("start", "-a", "-i", name, stdin=b"input\n") == Ran(9, b"input\n")

    @through("start -a")
    def test_start_with_output(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        assert docker(*CREATE, "--name", name, image, "sh", "-c", "echo out; echo err >&2; exit 9").status == 0
        assert docker("start", "-a", name) == Ran(9, b"out\n", b"err\n")

    @through("attach")
    def test_attach_with_input(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        command = "for i in 1 2; do read x; echo got $x; done; exit 9"
        assert docker(*RUN, "-d", "-i", "--name", name, image, "sh", "-c", command).status == 0

        def script(side: Side) -> Ran:
            with side.start("attach", name) as live:
                for number in range(2):
                    live.send(b"%d\n" % number)
                    live.until(b"got %d\n" % number)
                return live.wait()

        assert docker.each(script) == Ran(9, b"got 0\ngot 1\n")

    @through("attach --no-stdin")
    def test_attach_without_input(self, docker: Twice, image: str) -> None:
        name = docker.name("c")

        def script(side: Side) -> Ran:
            command = "while [ ! -e /go ]; do echo waits; sleep 0.02; done; exit 9"
            assert side(*RUN, "-d", "--name", name, image, "sh", "-c", command).status == 0
            with side.start("attach", "--no-stdin", name) as live:
                live.until(b"waits\n", 3)
                assert side("exec", name, "touch", "/go").status == 0
                ran = live.wait()
                return Ran(ran.status, b"".join(sorted(set(ran.out.splitlines()))), ran.err)

        assert docker.each(script) == Ran(9, b"waits")

    @through("attach")
    def test_detach_keys(self, docker: Twice, image: str) -> None:
        name = docker.name("c")

        def script(side: Side) -> list[Ran]:
            command = "while read x; do echo got $x; done"
            assert side(*RUN, "-dit", "--name", name, image, "sh", "-c", command).status == 0
            ran = []
            for options, keys in ((), b"\x10\x11"), (("--detach-keys=ctrl-x,x",), b"\x18x"):
                with side.terminal("attach", *options, name) as live:
                    live.send(b"one\r")
                    live.until(b"got one\r\n")
                    live.send(keys)
                    ran.append(live.wait())
            ran.append(side("inspect", "--format={{.State.Running}}", name))
            assert side("rm", "-f", name).status == 0
            return ran

        first, second, inspected = docker.each(script)
        assert first == second
        assert b"read escape sequence" in first.out
        assert inspected == Ran(0, b"true\n")

    @through("run -it")
    def test_detach_keys_while_it_is_run(self, docker: Twice, image: str) -> None:
        name = docker.name("c")

        def script(side: Side) -> list[Ran]:
            with side.terminal(*RUN, "-it", "--name", name, image, "sh", "-c", "echo ready; cat") as live:
                live.until(b"ready\r\n")
                live.send(b"\x10\x11")
                ran = live.wait()
            return [ran, side("inspect", "--format={{.State.Running}}", name), side("rm", "-f", name)]

        ran, inspected, _ = docker.each(script)
        assert ran.status == 0
        assert inspected == Ran(0, b"true\n")


class TestFollowing:
    @through("logs", "logs --tail", "logs -t", "logs --since --until")
    def test_logs(self, docker: Twice, containers: Containers) -> None:
        spoken = containers.ended("sh", "-c", "for i in 1 2 3; do echo out $i; echo err $i >&2; done; printf end")
        assert docker("logs", spoken) == Ran(0, b"out 1\nout 2\nout 3\nend", b"err 1\nerr 2\nerr 3\n")
        assert docker("logs", "--tail", "1", spoken) == Ran(0, b"end")
        assert docker("logs", "-t", spoken).out.count(b"Z out ") == 3
        assert docker("logs", "--since", "1h", "--until", "30m", spoken) == Ran(0, b"")

    @through("logs -f")
    def test_a_log_is_followed_to_its_end(self, docker: Twice, image: str) -> None:
        name = docker.name("c")
        command = "echo first; while [ ! -e /go ]; do sleep 0.02; done; echo err >&2; echo last"

        def script(side: Side) -> list[Ran]:
            assert side(*RUN, "-d", "--name", name, image, "sh", "-c", command).status == 0
            with side.start("logs", "-f", name) as live:
                live.until(b"first\n")
                return [side("exec", name, "touch", "/go"), live.wait()]

        assert docker.each(script)[1] == Ran(0, b"first\nlast\n", b"err\n")

    @through("logs -f")
    def test_a_follower_that_is_interrupted(self, docker: Twice, box: str, containers: Containers) -> None:
        talking = containers("sh", "-c", "echo ready; sleep 1d")

        def script(side: Side) -> Ran:
            with side.start("logs", "-f", talking) as live:
                live.until(b"ready\n")
                live.signal(signal.SIGINT)
                return live.wait()

        assert docker.each(script).out == b"ready\n"

    @through("events --filter")
    def test_events_as_they_come(self, docker: Twice, image: str) -> None:
        name = docker.name("c")

        def script(side: Side) -> list[Ran]:
            form = ("--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}")
            with side.start("events", "--since=1m", "--filter", f"container={name}", *form) as live:
                ran = [side(*CREATE, "--name", name, image, "true")]
                live.until(b"container create ")
                ran.append(side("start", name))
                live.until(b"container die ")
                ran.append(side("rm", name))
                live.until(b"container destroy ")
                live.signal(signal.SIGINT)
                return [*ran, live.wait()]

        told = docker.each(script)[-1].out.splitlines()
        assert [line.split()[1] for line in told] == [b"create", b"start", b"die", b"destroy"]

    @through("stats")
    def test_stats_as_they_come(self, docker: Twice, box: str) -> None:
        def script(side: Side) -> tuple[bytes, list[bytes]]:
            with side.start("stats", "--no-trunc", box) as live:
                live.until(box.encode(), 3)
                live.until(b"GiB", 2)  # Some screens, and among them one with what was measured.
                live.signal(signal.SIGKILL)
                lines = live.wait(numbers).out.splitlines()
            return lines[0], sorted({line for line in lines if b"GiB" in line})

        assert b"NAME" in docker.each(script)[0]


def tree_of(folder: Path, megabytes: int) -> None:
    """A tree of files, among them empty and nested ones, links, and modes of all kinds."""
    source = random.Random(2)
    folder.mkdir()
    (folder / "empty").mkdir()
    (folder / "empty file").touch()
    (folder / "link").symlink_to("empty file")
    deep = folder
    for level in range(megabytes // 4):
        deep = deep / f"level{level}"
        deep.mkdir()
        for number in range(4):
            file = deep / f"{number} \N{SNOWMAN}"
            file.write_bytes(source.randbytes(MIB))
            file.chmod(0o600 + 0o11 * number)
        if level % 10 == 9:
            deep = folder


def digest_of(folder: Path) -> str:
    """The digest of a tree: names, kinds, modes, times, contents."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found.update(f"{path.relative_to(folder)} {stat.st_mode:o} {int(stat.st_mtime)}\n".encode())
        if path.is_symlink():
            found.update(os.fsencode(path.readlink()))
        elif path.is_file():
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


class TestCopy:
    @through("cp")
    def test_a_file_both_ways(self, docker: Twice, box: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"content\n" * 1000)
        (tmp_path / "file").chmod(0o640)
        there = f"{box}:/tmp/{docker.name()}"
        assert docker("cp", str(tmp_path / "file"), there).status == 0

        def script(side: Side) -> bytes:
            back = tmp_path / f"back-{side.word}"
            assert side("cp", there, str(back)).status == 0
            assert back.stat().st_mode & 0o777 == 0o640
            return back.read_bytes()

        assert docker.each(script) == b"content\n" * 1000

    @through("cp -")
    def test_tar_streams(self, docker: Twice, box: str) -> None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            entry = tarfile.TarInfo("file")
            entry.size = 5
            tar.addfile(entry, io.BytesIO(b"12345"))
        folder = f"/tmp/{docker.name()}"
        assert docker("exec", box, "mkdir", folder).status == 0
        assert docker("cp", "-", f"{box}:{folder}", stdin=content.getvalue()).status == 0
        ran = docker("cp", f"{box}:{folder}/file", "-")
        assert ran.status == 0
        with tarfile.open(fileobj=io.BytesIO(ran.out)) as tar:
            file = tar.extractfile("file")
            assert file is not None
            assert file.read() == b"12345"

    @through("cp")
    def test_what_cannot_be_copied(self, docker: Twice, box: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert docker("cp", f"{box}:/no-such-file", str(tmp_path / "new")).status == 1
        assert docker("cp", str(tmp_path / "no-such-file"), f"{box}:/").status == 1
        assert docker("cp", str(tmp_path / "file"), f"{box}:/no-such-folder/file").status == 1
        assert docker("cp", str(tmp_path), f"{box}:/bin/busybox", but=logged).status == 1

    @through("cp -a")
    def test_a_tree_of_200_megabytes_both_ways(self, docker: Twice, image: str, tmp_path: Path) -> None:
        tree_of(tmp_path / "tree", 200)

        def script(side: Side) -> str:
            name = f"{docker.name('c')}"
            assert side(*CREATE, "--name", name, image).status == 0
            assert side("cp", "-a", str(tmp_path / "tree"), f"{name}:/tmp/").status == 0
            assert side("cp", "-a", f"{name}:/tmp/tree", str(tmp_path / side.word)).status == 0
            assert side("rm", name).status == 0
            digest = digest_of(tmp_path / side.word)
            shutil.rmtree(tmp_path / side.word)
            return digest

        try:
            assert docker.each(script) == digest_of(tmp_path / "tree")
        finally:
            shutil.rmtree(tmp_path / "tree")
