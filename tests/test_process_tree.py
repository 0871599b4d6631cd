"""Execs that end before their time leave nothing running: what is found, what is spared, and what cannot be done."""

import asyncio
import io
import json
import secrets
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from policed import Policed

import process_look
from client import RunnerClient, RunnerClientError
from comparison import Containers
from conftest import EngineDirect, Names
from dev import busybox, wait_until
from dev.engine import Engine
from service import Answer, Runner, signed_head
from sessions import session

JSON = {"Content-Type": "application/json"}
FIRST = "sleep 1d"
"""The first process of every container here."""
MARK = "DR_EXEC"
OTHER = "adduser -D -H -u 1234 other 2>/dev/null || echo other:x:1234:1234::/:/bin/sh >>/etc/passwd; "


SU = "/bin/busybox-su"
SETUID = f"cp /bin/busybox {SU}; chmod 4755 {SU}; mkdir -p /etc; echo root::0:0::/:/bin/sh >/etc/passwd"
"""Makes a program that becomes root; and what it then no longer needs to be, its environment stays closed to all."""


class Box:
    """A container of a test's own; `running` is what runs in it, beside its first process."""

    def __init__(self, direct: EngineDirect, name: str) -> None:
        self.name = name
        self._direct = direct

    @property
    def running(self) -> list[str]:
        """Command lines, without those of the shells that look."""
        answer = self._direct.request("GET", f"/containers/{self.name}/top?ps_args=-eo+pid,stat,args")
        assert answer.status_code == 200, answer.text
        found = [fields[-1] for fields in answer.json()["Processes"] if not fields[1].startswith("Z")]
        # In brackets: it has just let go of its memory, and is as good as gone.
        own = ("/bin/sh -c while IFS= read -r line", "docker-runner " + MARK)  # Its command has two lines: two rows.
        return [line for line in found if line != FIRST and line[0] != "[" and not any(part in line for part in own)]

    @property
    def all_gone(self) -> bool:
        """The shells that look have ended too."""
        answer = self._direct.request("GET", f"/containers/{self.name}/top?ps_args=-eo+pid,stat,args").json()
        return len([fields for fields in answer["Processes"] if not fields[1].startswith("Z")]) == 1

    def exec(self, command: str, user: str = "0") -> None:
        """Run something in it that is no exec of the runner's; returns at once if it ends with `&`."""
        config = {"Cmd": ["sh", "-c", command], "User": user, "AttachStdout": True}
        made = self._direct.request("POST", f"/containers/{self.name}/exec", json=config).json()["Id"]
        start = {"Detach": command.endswith("&")}
        assert self._direct.request("POST", f"/exec/{made}/start", json=start).status_code == 200

    def do(self, action: str) -> None:
        """Have the engine do something to it."""
        assert self._direct.request("POST", f"/containers/{self.name}/{action}").status_code == 204


Make = Callable[..., Box]


@pytest.fixture
def make(direct: EngineDirect, names: Names, image: str) -> Iterator[Make]:
    """Makes containers; they are removed at once, as what runs in them may be many."""
    containers = Containers(direct, names, image)
    made: list[str] = []

    def make(host: dict[str, Any] | None = None, **config: Any) -> Box:
        made.append(containers(HostConfig={"NetworkMode": "none", **(host or {})}, **config))
        return Box(direct, made[-1])

    yield make
    for name in made:
        direct.request("DELETE", f"/containers/{name}?force=1")


@pytest.fixture
def box(make: Make) -> Box:
    return make()


def run(runner: Runner, box: Box, command: str | list[str], **options: Any) -> Answer:
    body = json.dumps({"containerId": box.name, "command": command, "options": options}).encode()
    return runner.request("POST", "/v1/exec/run", body, JSON)


def error(answer: Answer, code: str = "exec_timeout") -> tuple[str, str]:
    """The message of an exec that was ended, and why it may still run (empty: it does not)."""
    found = json.loads(answer.body)["error"]
    assert (answer.status, found["code"]) == (413 if code == "output_too_large" else 504, code), answer.body
    left = found.get("details", {}).get("mayStillRun", "")
    assert found["message"].endswith(f"; its processes may still run: {left}" if left else ("ms", "bytes"))
    return found["message"], left


TREES: dict[str, str | list[str]] = {
    "a process": "exec sleep 60",
    "children": "sleep 61 & sleep 62 & (sleep 63; sleep 64)",
    "a session of its own": "setsid sleep 65 & exec sleep 66",
    "a daemon": "(setsid sh -c 'sleep 67 & exec >/dev/null 2>&1 </dev/null; sleep 68' &); exec sleep 69",
    "an orphan without the mark": "(env -i sleep 70 &); exec sleep 71",
    "a session without the mark": "env -i setsid sleep 72 & wait",
    "the process itself without the mark": ["env", "-i", "sleep", "73"],
    "orphans of one without the mark": ["env", "-i", "/bin/sh", "-c", "(sleep 74 &); setsid sleep 75 & exec sleep 76"],
    "one that ignores SIGTERM": "trap '' TERM; (setsid sleep 77 &); while :; do sleep 0.1; done",
    "one that is stopped": "sleep 78 & kill -STOP $!; wait",
    "one that forks and forks": "trap '' TERM; while :; do (sleep 0.05 &); usleep 1000; done",
    "one that starts another when told to end": "trap 'setsid sleep 79 & exit' TERM; while :; do sleep 0.1; done",
    "another user": OTHER + "su other -c 'sleep 80 & setsid sleep 81 & exec sleep 82' & wait",
    "another user's daemon": OTHER + "(setsid su other -c '(setsid sleep 83 &); exec true' &); exec sleep 84",
    "a name that looks like a state": r"cp /bin/busybox '/tmp/x) Z 1 (y'; cd /tmp; exec -a sleep './x) Z 1 (y' 85",
}


class TestFound:
    @pytest.mark.parametrize(
        ("tree", "limit"), [*((tree, "timeoutMs") for tree in TREES), ("children", "idleTimeoutMs")]
    )
    def test_nothing_runs_once_the_time_limit_is_told(self, runner: Runner, box: Box, tree: str, limit: str) -> None:
        began = time.monotonic()
        answer = run(runner, box, TREES[tree], **{limit: 700})
        assert error(answer, "exec_timeout" if limit == "timeoutMs" else "exec_idle_timeout")[1] == ""
        assert box.running == []
        assert time.monotonic() - began < 5
        assert wait_until(lambda: box.all_gone, 5)

    def test_with_a_terminal(self, runner: Runner, box: Box) -> None:
        assert error(run(runner, box, "sleep 60 & (setsid sleep 61 &); sleep 62", tty=True, timeoutMs=500))[1] == ""
        assert box.running == []

    def test_too_much_output_ends_it_too(self, engine: Engine, box: Box) -> None:
        with Runner(engine.socket, {"DOCKER_RUNNER_MAX_OUTPUT": "100000"}) as runner:
            answer = run(runner, box, "setsid sleep 60 & cat /dev/zero")
            assert error(answer, "output_too_large")[1] == ""
            assert box.running == []

    def test_sigterm_comes_first_and_leaves_time_to_tidy_up(self, runner: Runner, box: Box) -> None:
        command = "trap 'sleep 0.3; touch /tidy; exit' TERM; touch /begun; while :; do sleep 0.05; done"
        assert error(run(runner, box, command, timeoutMs=500))[1] == ""
        assert run(runner, box, "test -e /tidy").status == 200
        assert json.loads(run(runner, box, "ls /begun /tidy").body)["exitCode"] == 0

    def test_the_user_of_a_container_who_is_not_root(self, runner: Runner, make: Make) -> None:
        box = make(User="1234:1234")
        assert error(run(runner, box, "trap '' TERM; (setsid sleep 60 &); env -i sleep 61", timeoutMs=500))[1] == ""
        assert box.running == []

    def test_a_process_that_became_root(self, runner: Runner, make: Make) -> None:
        box = make(User="1234:1234")
        box.exec(SETUID)
        command = f"{SU} su root -c 'id -u; setsid sleep 60 & sleep 61'; sleep 62"
        answer = run(runner, box, command, timeoutMs=700)
        assert json.loads(answer.body)["error"]["details"]["stdout"] == "0\n"
        assert error(answer)[1] == ""
        assert box.running == []

    def test_root_without_the_capability_to_signal_others(self, runner: Runner, make: Make) -> None:
        box = make({"CapDrop": ["KILL"]})
        assert error(run(runner, box, OTHER + "su other -c 'sleep 60 & sleep 61'", timeoutMs=500))[1] == ""
        assert box.running == []

    def test_a_read_only_container(self, runner: Runner, make: Make) -> None:
        box = make({"ReadonlyRootfs": True, "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"]})
        assert error(run(runner, box, "(setsid sleep 60 &); sleep 61", timeoutMs=500))[1] == ""
        assert box.running == []

    def test_a_container_whose_processes_are_as_many_as_may_be(self, runner: Runner, make: Make) -> None:
        """The engine may start one more, from outside, though not always; that one needs no other."""
        box = make({"PidsLimit": 23})
        command = "n=0; while [ $n -lt 21 ]; do sleep 60 & n=$((n+1)); done; wait"
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, command, timeoutMs=4000)
            assert wait_until(lambda: box.running.count("sleep 60") == 21, 10)
            assert "can't fork" in json.loads(run(runner, box, "true & true & wait").body)["stderr"]
            left = error(running.result())[1]
        assert left.startswith("no shell could look") if left else box.running == []


class TestSpared:
    def test_another_exec_and_the_container(self, runner: Runner, box: Box, direct: EngineDirect) -> None:
        box.exec("exec env -i sleep 90 &")
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(run, runner, box, "(setsid sleep 91 &); touch /begun; sleep 3; exit 7")
            assert wait_until(lambda: {"sleep 90", "sleep 91", "sleep 3"} <= set(box.running), 10)
            assert error(run(runner, box, "trap '' TERM; setsid sleep 60 & sleep 61; sleep 62", timeoutMs=300))[1] == ""
            assert {"sleep 90", "sleep 91"} <= set(box.running)
            assert not any(line.startswith("sleep 6") for line in box.running)
            assert json.loads(other.result().body)["exitCode"] == 7
        assert direct.request("GET", f"/containers/{box.name}/json").json()["State"]["Running"]

    def test_two_at_their_limits_at_once(self, runner: Runner, box: Box) -> None:
        with ThreadPoolExecutor(6) as pool:
            running = [
                pool.submit(run, runner, box, f"setsid sleep 6{n} & sleep 7{n}", timeoutMs=400) for n in range(6)
            ]
            assert {error(each.result())[1] for each in running} == {""}
        assert box.running == []

    def test_what_an_exec_that_ended_by_itself_left_to_run(self, runner: Runner, box: Box) -> None:
        assert run(runner, box, "setsid sleep 60 >/dev/null 2>&1 </dev/null & exit 3").status == 200
        assert wait_until(lambda: box.running == ["sleep 60"], 5)

    def test_the_mark_is_the_runners_and_nothing_else_of_the_environment_changes(
        self, runner: Runner, box: Box
    ) -> None:
        answer = run(runner, box, "env", env={"A": "1", MARK: "mine"})
        lines = json.loads(answer.body)["stdout"].splitlines()
        assert "A=1" in lines
        (mark,) = [line for line in lines if line.startswith(MARK)]
        assert len(mark) == len(MARK) + 1 + 32


class TestTold:
    """Where it could not be done, the error says so, and why."""

    @pytest.fixture
    def no_shell(self, direct: EngineDirect, names: Names) -> str:
        """An image with one program, statically linked, and no shell."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(busybox._static_busybox(), "busybox")
        name = names("scratch")
        query = urlencode({"fromSrc": "-", "repo": name, "tag": "latest"})
        answer = direct.request("POST", f"/images/create?{query}", data=archive.getvalue())
        assert answer.status_code == 200, answer.text
        return name

    def test_an_image_without_a_shell(self, runner: Runner, make: Make, no_shell: str) -> None:
        box = make(Image=no_shell, Entrypoint=["/busybox"])
        answer = run(runner, box, ["/busybox", "sleep", "60"], timeoutMs=300)
        message, left = error(answer)
        assert message.startswith("Exec timed out after 300ms; its processes may still run: no shell could look")
        assert "/bin/sh" in left
        assert box.running == ["/busybox sleep 1d", "/busybox sleep 60"]

    @pytest.mark.parametrize(
        ("shell", "told"),
        [
            ("#!/bin/yes", "no shell could look at the processes: "),
            ("#!/bin/ash\necho 'ready 1 0:0'; yes 'other 7 0:0'", "no shell could look at the processes: it says too"),
            ("#!/bin/ash\necho 'ready 1 0:0'; head -c 1000000 /dev/zero", "no shell could look at the processes: "),
            ("#!/bin/ash\nwhile :; do usleep 100000; done", "had not ended after 3.5 s"),
            ("#!/bin/ash\nexit", "no shell could look at the processes: it ended"),
        ],
        ids=["garbage", "too many lines", "too long a line", "silence", "an end"],
    )
    def test_a_shell_of_somebodys_own(self, runner: Runner, box: Box, shell: str, told: str) -> None:
        put = ["/bin/ash", "-c", 'rm /bin/sh; echo "$0" >/bin/sh; chmod +x /bin/sh', shell]
        assert json.loads(run(runner, box, put).body)["exitCode"] == 0
        assert told in error(run(runner, box, ["sleep", "60"], timeoutMs=300))[1]

    def test_a_container_that_is_paused(self, runner: Runner, box: Box, direct: EngineDirect) -> None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, "sleep 60", timeoutMs=1500)
            assert wait_until(lambda: "sleep 60" in box.running, 10)
            box.do("pause")
            try:
                assert "is paused" in error(running.result())[1]
            finally:
                box.do("unpause")
        assert box.running == ["sleep 60"]

    def test_an_exec_that_cannot_be_told_from_another(self, runner: Runner, box: Box, direct: EngineDirect) -> None:
        made = direct.request("POST", f"/containers/{box.name}/exec", json={"Cmd": ["sleep", "90"]}).json()["Id"]
        assert direct.request("POST", f"/exec/{made}/start", json={"Detach": True}).status_code == 200
        assert "cannot be told" in error(run(runner, box, ["env", "-i", "sleep", "60"], timeoutMs=300))[1]
        assert box.running == ["sleep 90", "sleep 60"]

    def test_a_process_that_nobody_may_look_into(self, runner: Runner, make: Make) -> None:
        box = make(User="1234:1234")
        box.exec(SETUID)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, "sleep 60", timeoutMs=1500)
            assert wait_until(lambda: "sleep 60" in box.running, 10)
            box.exec(f"{SU} sleep 90; true &", user="1234")
            assert error(running.result())[1] == "1 processes as young as it may not be looked into"
        assert not any("sleep 60" in line for line in box.running)

    def test_a_container_that_is_gone_has_nothing_that_runs(self, runner: Runner, box: Box) -> None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, "trap '' TERM; while :; do sleep 0.1; done", timeoutMs=500)
            assert wait_until(lambda: any("trap" in line for line in box.running), 10)
            assert wait_until(lambda: any("sh -c" in line for line in box.running) or running.done(), 10)
            box.do("kill")
            answer = running.result()
        assert answer.status == 200 or error(answer)[1] == ""


class TestLeaving:
    @pytest.mark.parametrize("kill", [True, False])
    def test_a_run(self, runner: Runner, box: Box, kill: bool) -> None:
        options = {"killOnDisconnect": kill, "timeoutMs": 60_000}
        command = "(setsid sleep 60 &); exec sleep 61"
        body = json.dumps({"containerId": box.name, "command": command, "options": options}).encode()
        with runner.connect() as sock:
            sock.sendall(signed_head("POST", "/v1/exec/run", body, "Content-Type: application/json") + body)
            assert wait_until(lambda: len(box.running) == 2, 10)
        if kill:
            assert wait_until(lambda: box.all_gone, 5)
        else:
            assert run(runner, box, "true").status == 200
            assert len(box.running) == 2

    def test_a_run_that_has_not_begun(self, runner: Runner, box: Box) -> None:
        body = json.dumps(
            {"containerId": box.name, "command": "exec sleep 60", "options": {"killOnDisconnect": True}}
        ).encode()
        for _ in range(10):
            with runner.connect() as sock:
                sock.sendall(signed_head("POST", "/v1/exec/run", body, "Content-Type: application/json") + body)
        assert run(runner, box, "true").status == 200
        assert wait_until(lambda: box.all_gone, 10)

    @pytest.mark.parametrize("kill", ["true", "false"])
    @pytest.mark.parametrize("tty", ["true", "false"])
    def test_a_session(self, runner: Runner, box: Box, kill: str, tty: str) -> None:
        async def test() -> None:
            command = "trap '' HUP; setsid sleep 60 & echo begun; sleep 61"
            async with session(runner, box.name, command, killOnDisconnect=kill, tty=tty) as one:
                await one.until(b"begun")
                one.socket.transport.abort()

        asyncio.run(test())
        if kill == "true":
            assert wait_until(lambda: box.all_gone, 5)
        else:
            assert run(runner, box, "true").status == 200
            assert "sleep 60" in box.running

    def test_a_session_that_ends_by_itself_leaves_what_it_left(self, runner: Runner, box: Box) -> None:
        async def test() -> None:
            command = "setsid sleep 60 >/dev/null 2>&1 </dev/null & exit 4"
            async with session(runner, box.name, command, killOnDisconnect="true") as one:
                assert (await one.to_end()).code == 4

        asyncio.run(test())
        assert run(runner, box, "true").status == 200
        assert wait_until(lambda: box.running == ["sleep 60"], 5)

    def test_by_the_client(self, runner: Runner, box: Box) -> None:
        client = RunnerClient(runner.url, runner.secret)
        with client.exec_interactive(box.name, "setsid sleep 60 & echo; sleep 61", kill_on_disconnect=True) as one:
            next(iter(one))
        assert wait_until(lambda: box.all_gone, 5)
        with pytest.raises(RunnerClientError, match=r"timed out after 300ms \("):
            client.exec_run(box.name, "sleep 60", timeout_ms=300, kill_on_disconnect=True)


class TestTheRunnerEnds:
    @pytest.mark.parametrize(
        ("options", "ended"),
        [
            ({"timeoutMs": 60_000}, True),
            ({"idleTimeoutMs": 60_000}, True),
            ({"killOnDisconnect": True}, True),
            ({}, False),
        ],
    )
    def test_no_limit_is_left_unkept(self, engine: Engine, box: Box, options: dict[str, Any], ended: bool) -> None:
        with Runner(engine.socket, {"DOCKER_RUNNER_GRACE_MS": "0"}) as runner, ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, "setsid sleep 60 & exec sleep 61", **options)
            assert wait_until(lambda: len(box.running) == 2, 10)
            assert runner.stop() == 0
            assert running.result().status == 503
            assert len(box.running) == (0 if ended else 2)

    def test_a_session_that_asked_for_it(self, engine: Engine, box: Box) -> None:
        async def test(runner: Runner) -> None:
            async with session(runner, box.name, "setsid sleep 60 & sleep 61", killOnDisconnect="true") as one:
                assert await asyncio.to_thread(wait_until, lambda: {"sleep 60", "sleep 61"} <= set(box.running), 10)
                runner.process.send_signal(signal.SIGTERM)
                assert (await one.to_end()).close_code == 1012

        with Runner(engine.socket, {"DOCKER_RUNNER_GRACE_MS": "0"}) as runner:
            asyncio.run(test(runner))
            assert runner.stop() == 0
            assert box.running == []

    def test_within_the_grace_a_limit_is_kept_as_ever(self, engine: Engine, box: Box) -> None:
        with Runner(engine.socket) as runner, ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, runner, box, "setsid sleep 60 & exec sleep 61", timeoutMs=1500)
            assert wait_until(lambda: len(box.running) == 2, 10)
            runner.process.send_signal(signal.SIGTERM)
            assert error(running.result())[1] == ""
            assert box.running == []


LABEL = "docker-runner.test.tree"
POLICY = f"""
[operations]
allow = ["ContainerExec", "ExecStart"]
[exec]
users = [""]
[scope]
label = "{LABEL}=x"
"""
"""A caller may do no more than run commands, as the container's own user, in its own containers."""


@pytest.fixture
def policed(engine: Engine, tmp_path: Path) -> Iterator[Policed]:
    with Policed(engine.socket, tmp_path / "policy") as runner:
        said = runner.set(POLICY)
        assert "read the policy again" in said, said
        yield runner


class TestUnderAPolicy:
    def test_what_the_engine_is_asked_need_not_be_allowed_to_the_caller(self, policed: Policed, make: Make) -> None:
        box = make(Labels={LABEL: "x"})
        assert error(run(policed, box, OTHER + "su other -c 'setsid sleep 60 & sleep 61'", timeoutMs=500))[1] == ""
        assert error(run(policed, box, ["env", "-i", "sleep", "62"], timeoutMs=300))[1] == ""
        assert box.running == []
        assert run(policed, make(), "true").status == 404

    def test_nothing_is_done_as_a_user_that_the_caller_may_not_be(
        self, policed: Policed, make: Make, direct: EngineDirect
    ) -> None:
        box = make({"CapDrop": ["KILL"]}, Labels={LABEL: "x"})
        assert "had not ended" in error(run(policed, box, OTHER + "su other -c 'sleep 60'; true", timeoutMs=500))[1]
        assert "sleep 60" in box.running


@pytest.mark.parametrize("shell", [["dash"], ["bash"], ["bash", "--posix"], ["busybox", "sh"]], ids=" ".join)
def test_the_shells_of_common_images_look_alike(shell: list[str]) -> None:
    program = shutil.which(shell[0])
    assert program is not None
    value = secrets.token_hex(16)
    script = "setsid sleep 60 & (env -i sleep 61 &); env -i setsid sleep 62 & echo begun; exec sleep 63"
    tree = subprocess.Popen(
        ["setsid", "sh", "-c", script],
        env={"PATH": "/usr/bin:/bin", MARK: value, "AFTER": "two\nlines"},
        stdout=subprocess.PIPE,
    )
    assert tree.stdout is not None
    assert tree.stdout.readline() == b"begun\n"
    looking = subprocess.run(
        [program, *shell[1:], "-c", process_look._LOAD, "docker-runner", f"{MARK}={value}", "CHECK=x", "300"],
        env={"A": "1", "CHECK": "x"},
        input=f"{process_look._LOOK}\n\n0\nTERM\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert tree.wait(5) == -signal.SIGTERM
    tree.stdout.close()
    found = [line.split() for line in looking.stdout.splitlines() if line.startswith("found")]
    assert [line[1:4] for line in found] == [["4", "0", "0"], ["4", "0", "0"]], looking
    assert len(found[0]) == 4 + 3
