"""The wire protocol as WIRE.md states it, section 4: the interactive exec, in raw WebSocket frames (`wire.py`)."""

import base64
import contextlib
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest

from conftest import EngineDirect
from dev import wait_until
from wire import WebSocket, Wire, b64, compact, refused, target

Start = Callable[..., str]
PATH = "/v1/exec/interactive/ws"
CLOSE = {"type": "close"}
EOF = {"type": "eof"}


class Ended:
    """A session that has ended: what came on each stream, the exit frame, the errors, the close."""

    def __init__(self, socket: WebSocket, *, ready: bool = True) -> None:
        frames = list(socket)
        self.exec_id = ""
        if ready:
            first = frames.pop(0)
            assert first.keys() == {"type", "execId"}
            assert first["type"] == "ready"
            self.exec_id = first["execId"]
        self.exit = frames.pop() if frames and frames[-1]["type"] == "exit" else None
        self.errors = [frame for frame in frames if frame["type"] == "error"]
        self.kinds = [frame["type"] for frame in frames]
        assert set(self.kinds) <= {"stdout", "stderr", "error"}, "ready first, exit last"
        self.stdout, self.stderr = (
            b"".join(base64.b64decode(frame["data"], validate=True) for frame in frames if frame["type"] == kind)
            for kind in ("stdout", "stderr")
        )
        self.closed = socket.closed

    def code(self) -> int:
        """The exit code of a session that ended well."""
        assert self.closed is not None
        assert self.closed[0] == 1000
        assert self.exit is not None
        assert self.exit.keys() == {"type", "execId", "exitCode", "stdout", "stderr"}
        assert self.exit["execId"] == self.exec_id != ""
        assert base64.b64decode(self.exit["stdout"], validate=True) == self.stdout[-256 * 1024 :]
        assert base64.b64decode(self.exit["stderr"], validate=True) == self.stderr[-256 * 1024 :]
        code: int = self.exit["exitCode"]
        return code

    def error(self) -> Any:
        """The one error frame of a session that failed."""
        assert self.exit is None
        (error,) = self.errors
        assert error.keys() == {"type", "error", "status", "code", "message", "retryable"}
        assert isinstance(error["error"], str)
        return error


def session(wire: Wire, *sent: Any, **query: Any) -> Ended:
    """A whole session, in which these messages are sent at once."""
    with wire.interactive(**query) as socket:
        if sent:
            socket.send(*sent)
        return Ended(socket)


def stdin(data: bytes) -> dict[str, str]:
    return {"type": "stdin", "data": b64(data)}


def test_ready_comes_first_then_output_then_the_exit_and_a_normal_close(wire: Wire, box: str) -> None:
    ended = session(wire, containerId=box, command="echo out; echo err >&2; exit 7")
    assert ended.code() == 7
    assert (ended.stdout, ended.stderr, ended.errors) == (b"out\n", b"err\n", [])


@pytest.mark.parametrize(
    ("command", "stdout"),
    [
        ('["printf","[%s]","a b","$HOME",""]', b"[a b][$HOME][]"),
        ("printf '[%s]' \"a b\" $0", b"[a b][/bin/sh]"),
        ("['", None),
        ('echo ["a"]', b"[a]\n"),
    ],
)
def test_the_command_is_a_json_array_or_a_shell_string(
    wire: Wire, box: str, command: str, stdout: bytes | None
) -> None:
    ended = session(wire, containerId=box, command=command)
    if stdout is None:
        assert ended.code() == 2
    else:
        assert (ended.code(), ended.stdout) == (0, stdout)


def test_a_container_is_addressed_by_prefix(wire: Wire, box: str) -> None:
    assert session(wire, containerId=box[:12], command="exit 3").code() == 3


@pytest.mark.parametrize("env", [{"A": "1", "B": "x=\xe4 \n"}, ["A=1", "B=x=\xe4 \n"]])
def test_env_is_json(wire: Wire, box: str, env: Any) -> None:
    command = '["sh","-c","printf \\"$A|$B\\""]'
    ended = session(wire, containerId=box, command=command, env=compact(env).decode())
    assert (ended.code(), ended.stdout.decode()) == (0, "1|x=\xe4 \n")


def test_workdir(wire: Wire, box: str) -> None:
    assert session(wire, containerId=box, command='["pwd"]', workdir="/bin").stdout == b"/bin\n"


def test_a_query_of_60_kb(wire: Wire, box: str) -> None:
    env = compact({"LARGE": "x" * 60_000}).decode()
    ended = session(wire, containerId=box, command="echo ${#LARGE}", env=env)
    assert (ended.code(), ended.stdout) == (0, b"60000\n")


def test_a_terminal_is_raw_and_all_is_stdout(wire: Wire, box: str) -> None:
    ended = session(wire, containerId=box, command="tty; echo err >&2; exit 4", tty=True)
    assert ended.code() == 4
    assert (ended.stdout.splitlines()[1:], ended.stderr) == ([b"err"], b"")
    assert ended.stdout.startswith(b"/dev/pts/")
    assert session(wire, containerId=box, command="tty", tty=False).stdout == b"not a tty\n"


def test_without_demux_stderr_goes_with_stdout(wire: Wire, box: str) -> None:
    command = "echo out; echo err >&2; exit 4"
    ended = session(wire, containerId=box, command=command, demux=False)
    assert ended.code() == 4
    assert (sorted(ended.stdout.splitlines()), ended.stderr) == ([b"err", b"out"], b"")
    assert session(wire, containerId=box, command=command, demux=True).stderr == b"err\n"


def test_stdin_reaches_the_process_while_it_runs(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        assert socket.next()["type"] == "ready"
        for text in (b"one\n", b"\x00\xff\xc3", b"three"):
            socket.send(stdin(text))
            assert socket.until(text) == text
        socket.send(CLOSE)
        ended = Ended(socket, ready=False)
        assert ended.closed == (1000, ended.closed[1] if ended.closed else "")
        assert ended.exit is not None
        assert ended.exit["exitCode"] == 0
        assert base64.b64decode(ended.exit["stdout"]) == b"one\n\x00\xff\xc3three"


def test_binary_frames_are_stdin(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        data = os.urandom(100_000)
        socket.connection.send(WebSocket.frame(WebSocket.BINARY, data) + WebSocket.message(CLOSE))
        ended = Ended(socket)
        assert (ended.code(), ended.stdout) == (0, data)


def test_a_message_in_fragments_is_one(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        text = compact(stdin(b"whole"))
        first = bytearray(WebSocket.frame(WebSocket.TEXT, text[:10]))
        first[0] &= 0x7F
        socket.connection.send(bytes(first) + WebSocket.frame(0, text[10:]) + WebSocket.message(CLOSE))
        assert Ended(socket).stdout == b"whole"


@pytest.mark.parametrize("end", [CLOSE, EOF])
@pytest.mark.parametrize("tty", [False, True])
def test_close_and_eof_end_stdin_and_the_true_exit_comes(wire: Wire, box: str, end: dict[str, str], tty: bool) -> None:
    if tty:
        end = {"type": "stdin", "data": b64(b"\x04")}  # A terminal's input ends by its own character.
    ended = session(wire, end, containerId=box, command="cat; echo after; exit 9", tty=tty)
    assert ended.code() == 9
    assert ended.stdout.endswith(b"after\r\n" if tty else b"after\n")


@pytest.mark.parametrize("ends", [[CLOSE], [CLOSE, CLOSE], [EOF, CLOSE], [EOF, EOF, CLOSE, CLOSE]])
def test_close_in_one_segment_with_the_last_stdin_loses_nothing(wire: Wire, box: str, ends: list[Any]) -> None:
    data = os.urandom(300_000)
    messages = [stdin(data[at : at + 100_000]) for at in range(0, len(data), 100_000)]
    for _ in range(3):
        ended = session(wire, *messages, *ends, containerId=box, command="cat; exit 5")
        assert (ended.code(), ended.stdout == data) == (5, True)


def test_output_after_the_end_of_stdin_arrives(wire: Wire, box: str) -> None:
    command = "cat >/dev/null; sleep 0.3; echo late; sleep 0.2; echo later >&2; exit 6"
    ended = session(wire, CLOSE, containerId=box, command=command)
    assert (ended.code(), ended.stdout, ended.stderr) == (6, b"late\n", b"later\n")


def test_stdin_after_its_end_and_messages_after_close_do_no_harm(wire: Wire, box: str) -> None:
    sent = [stdin(b"a"), EOF, stdin(b"b"), {"type": "resize", "cols": 1, "rows": 1}, CLOSE, stdin(b"c"), {}, CLOSE]
    ended = session(wire, *sent, containerId=box, command="cat; sleep 0.2; exit 2")
    assert ended.exit is not None
    assert (ended.exit["exitCode"], ended.stdout) == (2, b"a")
    assert ended.closed is not None
    assert ended.closed[0] == 1000


def test_the_exit_frame_repeats_the_last_256_kib(wire: Wire, box: str) -> None:
    ended = session(wire, containerId=box, command="seq 200000; seq 100000 >&2")
    assert ended.code() == 0
    assert ended.stdout == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert len(ended.stderr) > 256 * 1024


def test_early_output_is_never_lost(wire: Wire, box: str) -> None:
    for number in range(20):
        ended = session(wire, containerId=box, command=f'["echo","{number}"]')
        assert (ended.code(), ended.stdout) == (0, b"%d\n" % number)


def test_resize_takes_effect(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command="read a; stty size", tty=True) as socket:
        assert socket.next()["type"] == "ready"
        socket.send({"type": "resize", "cols": 123, "rows": 45}, stdin(b"\n"))
        assert socket.until(b"45 123\r\n")


@pytest.mark.parametrize(
    "malformed",
    [b"{", b"nonsense", b'{"type":"stdin","data":1}', b'{"type":"stdin","data":"%"}', b"[" * 99_999, b"[]"],
)
def test_what_is_not_understood_gets_an_error_frame_and_the_session_stays(
    wire: Wire, box: str, malformed: bytes
) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        assert socket.next()["type"] == "ready"
        socket.connection.send(WebSocket.frame(WebSocket.TEXT, malformed))
        error = socket.next()
        assert error["type"] == "error"
        assert isinstance(error["error"], str)
        socket.send(stdin(b"still here"), CLOSE)
        assert socket.until(b"still here") == b"still here"
        ended = Ended(socket, ready=False)
        assert ended.exit is not None
        assert (ended.exit["exitCode"], ended.errors) == (0, [])


@pytest.mark.parametrize(
    "ignored", [b"", b"{}", b'{"type":"ping"}', b'{"type":"unknown","data":"x"}', b'{"unknown":1}', b'{"type":""}']
)
def test_unknown_and_empty_messages_are_ignored(wire: Wire, box: str, ignored: bytes) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        socket.connection.send(WebSocket.frame(WebSocket.TEXT, ignored) + WebSocket.frame(WebSocket.BINARY, b""))
        socket.send(stdin(b"a"), CLOSE)
        ended = Ended(socket)
        assert (ended.code(), ended.stdout, ended.errors) == (0, b"a", [])


def test_a_message_of_32_mib(wire: Wire, box: str) -> None:
    for frame in (
        WebSocket.frame(WebSocket.BINARY, bytes(32 << 20)),
        WebSocket.message(stdin(bytes(24 << 20))),
    ):
        with wire.interactive(containerId=box, command='["wc","-c"]') as socket:
            socket.connection.send(frame + WebSocket.message(CLOSE))
            ended = Ended(socket)
            assert ended.code() == 0
            assert int(ended.stdout) in (32 << 20, 24 << 20)


def test_a_message_too_large_closes_with_1009(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        assert socket.next()["type"] == "ready"
        socket.connection.send(b"\x82\xff" + (1 << 32).to_bytes(8, "big") + b"mask")
        assert [frame for frame in socket if frame["type"] != "error"] == []
        assert socket.closed is not None
        assert socket.closed[0] == 1009


@pytest.mark.parametrize(
    ("name", "status", "code", "words"),
    [
        ("missing", 404, "no_such_container", "No such container"),
        ("", 409, "container_stopped_paused", "is not running"),
        ("../../info", 404, "no_such_container", "No such container"),
    ],
    ids=["missing", "stopped", "escaping"],
)
def test_a_missing_or_stopped_container_is_told_in_the_engines_words(
    wire: Wire, stopped_box: str, name: str, status: int, code: str, words: str
) -> None:
    with wire.interactive(containerId=name or stopped_box, command="true") as socket:
        ended = Ended(socket, ready=False)
    error = ended.error()
    assert (error["status"], error["code"], error["retryable"]) == (status, code, False)
    assert words in error["error"]
    assert words in error["message"]
    assert ended.closed == (1011, "exec_failed")


def test_a_missing_program_is_an_exit_code(wire: Wire, box: str) -> None:
    ended = session(wire, containerId=box, command='["/no/such/program"]')
    assert ended.code() in (126, 127)
    assert b"/no/such/program" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "query",
    [
        "containerId=x",
        "command=x",
        "",
        "containerId=&command=x",
        "containerId=x&command=",
        "containerId=x&containerId=x&command=x",
        "containerId=x&command=x&tty=yes",
        "containerId=x&command=x&demux=",
        "containerId=x&command=x&env=nonsense",
        "containerId=x&command=x&env=%5B1%5D",
        "containerId=x&command=x&env=1",
        "containerId=x&command=x&env=" + "%5B" * 20_000,
        "containerId=x&command=%ff",
    ],
    ids=lambda query: query[:50] or "none",
)
def test_an_invalid_query_closes_with_4000(wire: Wire, query: str) -> None:
    reply, socket = wire.upgrade(f"{PATH}?{query}")
    assert reply.status == 101
    with socket:
        frames = list(socket)
        assert all(frame["type"] == "error" for frame in frames)
        assert socket.closed == (4000, "invalid_query")


def test_a_command_of_brackets_is_a_shell_string(wire: Wire, box: str) -> None:
    assert session(wire, containerId=box, command="[" * 20_000).code() in (2, 126, 127)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"X-DR-Signature": None}, "missing_headers"),
        ({"X-DR-Signature": "AAAA"}, "invalid_signature"),
        ({"X-DR-Timestamp": "1"}, "timestamp_out_of_range"),
    ],
)
def test_a_refused_signature_is_an_http_401(wire: Wire, headers: dict[str, str | None], code: str) -> None:
    reply, _ = wire.upgrade(f"{PATH}?containerId=x&command=x", headers)
    refused(reply.finish(), 401, code)


def test_the_nonce_of_an_upgrade_is_used_up(wire: Wire, box: str) -> None:
    where = target(PATH, {"containerId": box, "command": "true"})
    headers: dict[str, str | None] = {**wire.sign("GET", where)}
    reply, socket = wire.upgrade(where, headers)
    assert reply.status == 101
    with socket:
        assert Ended(socket).code() == 0
    refused(wire.upgrade(where, headers)[0].finish(), 401, "replayed_nonce")


def test_without_an_upgrade_it_is_426(wire: Wire, box: str) -> None:
    for reply in (wire.get(PATH), wire.get(PATH, containerId=box, command="true")):
        refused(reply, 426, "upgrade_required")
        assert reply.header("upgrade") == "websocket"


def test_an_upgrade_elsewhere_is_not_given(wire: Wire) -> None:
    for path in ("/v1/nothing", f"{PATH}/"):
        reply, socket = wire.upgrade(path)
        with socket:
            assert reply.status == 404


@pytest.mark.parametrize("leave", ["close", "vanish", "reset"])
def test_a_client_that_goes_away_closes_stdin(wire: Wire, box: str, leave: str) -> None:
    mark = f"/tmp/{secrets.token_hex(4)}"
    with wire.interactive(containerId=box, command=f"cat >/dev/null; touch {mark}") as socket:
        assert socket.next()["type"] == "ready"
        if leave == "close":
            socket.connection.send(WebSocket.frame(WebSocket.CLOSE, (1000).to_bytes(2, "big")))
        elif leave == "reset":
            socket.connection.socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER, 0 s
    assert wait_until(lambda: run_code(wire, box, f"test -e {mark}") == 0, 5)


def test_a_client_that_leaves_before_ready_leaves_nothing_behind(
    wire: Wire, start: Start, direct: EngineDirect
) -> None:
    container = start()
    where = target(PATH, {"containerId": container, "command": "exec cat"})
    for _ in range(10):
        reply, socket = wire.upgrade(where)
        assert reply.status == 101
        socket.connection.close()

    def only_the_first() -> bool:
        # Of the container's own processes; the first one sleeps.
        top = direct.request("GET", f"/containers/{container}/top").json()
        return len(top["Processes"]) == 1

    assert wait_until(only_the_first, 10)


def run_code(wire: Wire, container: str, command: str) -> int:
    code: int = wire.post("/v1/exec/run", containerId=container, command=command).json["exitCode"]
    return code


def test_several_sessions_run_beside_each_other(wire: Wire, box: str) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(wire.interactive(containerId=box, command='["cat"]')) for _ in range(8)]
        for number, socket in enumerate(sockets):
            socket.send(stdin(b"%d" % number), CLOSE)
        for number, socket in enumerate(sockets):
            ended = Ended(socket)
            assert (ended.code(), ended.stdout) == (0, b"%d" % number)


def test_the_end_of_the_container_ends_the_session(wire: Wire, start: Start) -> None:
    container = start()
    with wire.interactive(containerId=container, command="cat; echo never") as socket:
        assert socket.next()["type"] == "ready"
        began = time.monotonic()
        assert wire.post("/v1/containers/stop", containerId=container, timeoutSec=0).status == 204
        ended = Ended(socket, ready=False)
        assert time.monotonic() - began < 5
    assert ended.exit is not None or ended.errors
    if ended.exit is not None:
        assert ended.exit["exitCode"] != 0
        assert ended.closed is not None
        assert ended.closed[0] == 1000


def test_pings_are_answered(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command='["cat"]') as socket:
        assert socket.next()["type"] == "ready"
        socket.connection.send(WebSocket.frame(WebSocket.PING, b"are you there"))
        assert socket.connection.exactly(2 + 13) == b"\x8a\x0dare you there"
