"""The wire protocol as WIRE.md states it, section 4: exec, logs, events, and the interactive exec.

Raw HTTP and raw WebSocket frames only (`wire.py`); see `test_wire_contract.py`.
"""

import base64
import io
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from service import Runner
from wire import Feed, Wire, b64, compact, done, refused

Start = Callable[..., str]
EVENTS = "/v1/events/sse"
LOGS = "/v1/containers/logs/sse"


def run(wire: Wire, container: str, command: str | list[str], **options: Any) -> Any:
    """The answer of an exec that succeeds as a request."""
    fields = {"options": options} if options else {}
    reply = wire.post("/v1/exec/run", containerId=container, command=command, **fields)
    assert reply.status == 200, reply.body
    assert set(reply.json) == {"stdout", "stderr", "exitCode"}
    return reply.json


def is_running(direct: EngineDirect, container: str) -> bool:
    found: bool = direct.request("GET", f"/containers/{container}/json").json()["State"]["Running"]
    return found


# exec/run


def test_a_string_is_a_login_shells(wire: Wire, box: str) -> None:
    result = run(wire, box, "echo out; echo err >&2; echo $0; exit 7")
    assert result == {"stdout": "out\n/bin/sh\n", "stderr": "err\n", "exitCode": 7}
    flags = run(wire, box, "tr '\\0' ' ' </proc/$$/cmdline; true")["stdout"]
    assert flags.startswith("/bin/sh -lc tr")


def test_an_array_is_taken_as_it_is(wire: Wire, box: str) -> None:
    result = run(wire, box, ["printf", "[%s]", "a b", "$HOME", "", "*"])
    assert result == {"stdout": "[a b][$HOME][][*]", "stderr": "", "exitCode": 0}


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_exit_code_is_the_commands(wire: Wire, box: str, code: int) -> None:
    assert run(wire, box, f"exit {code}") == {"stdout": "", "stderr": "", "exitCode": code}


def test_a_signal_is_an_exit_code(wire: Wire, box: str) -> None:
    assert run(wire, box, "kill -9 $$")["exitCode"] == 137


def test_a_missing_program_is_no_error_of_the_request(wire: Wire, box: str) -> None:
    result = run(wire, box, ["/no/such/program"])
    assert result["exitCode"] in (126, 127)
    assert "/no/such/program" in result["stdout"] + result["stderr"]
    assert run(wire, box, "no-such-program")["exitCode"] == 127


def test_a_missing_folder_is_no_error_of_the_request(wire: Wire, box: str) -> None:
    result = run(wire, box, "true", workdir="/no/such/folder")
    assert result["exitCode"] in (126, 127)
    assert "/no/such/folder" in result["stdout"] + result["stderr"]


def test_a_container_that_does_not_run_is_409(wire: Wire, stopped_box: str) -> None:
    reply = wire.post("/v1/exec/run", containerId=stopped_box, command="true")
    assert "is not running" in refused(reply, 409, "container_stopped_paused")
    reply = wire.post("/v1/exec/run", containerId="missing", command="true")
    assert "No such container" in refused(reply, 404, "no_such_container")


@pytest.mark.parametrize("env", [{"A": "1", "B": "x=\xe4 \n$A"}, ["A=1", "B=x=\xe4 \n$A"]])
def test_env_is_a_map_or_a_list(wire: Wire, box: str, env: Any) -> None:
    assert run(wire, box, ["sh", "-c", 'printf "%s|%s" "$A" "$B"'], env=env)["stdout"] == "1|x=\xe4 \n$A"


def test_workdir(wire: Wire, box: str) -> None:
    assert run(wire, box, ["pwd"], workdir="/bin")["stdout"] == "/bin\n"


def test_with_a_terminal_all_is_stdout(wire: Wire, box: str) -> None:
    result = run(wire, box, "tty; echo err >&2; exit 3", tty=True)
    assert (result["stderr"], result["exitCode"]) == ("", 3)
    assert re.fullmatch(r"/dev/pts/\d+\r\nerr\r\n", result["stdout"])
    assert run(wire, box, ["tty"], tty=False)["stdout"] == "not a tty\n"


def test_unknown_options_are_ignored(wire: Wire, box: str) -> None:
    assert run(wire, box, ["echo", "a"], signal={}, demux=True, sessionId="x")["stdout"] == "a\n"
    reply = wire.post("/v1/exec/run", containerId=box, command=["echo", "a"], options={}, unknown=1)
    assert reply.json["stdout"] == "a\n"


def test_there_is_no_stdin(wire: Wire, box: str) -> None:
    assert run(wire, box, "cat; echo end", timeoutMs=5000)["stdout"] == "end\n"


def test_early_output_is_not_lost(wire: Wire, box: str) -> None:
    for number in range(20):
        assert run(wire, box, ["echo", str(number)])["stdout"] == f"{number}\n"


def test_a_byte_order_mark_is_kept(wire: Wire, box: str) -> None:
    assert run(wire, box, ["printf", "\ufeffa"])["stdout"] == "\ufeffa"


def test_characters_across_chunk_borders_stay_whole(wire: Wire, box: str) -> None:
    text = "\u20ac\U0001f600\xe4" * 50_000
    assert run(wire, box, "yes '\u20ac\U0001f600\xe4' | head -n 50000 | tr -d '\\n'")["stdout"] == text
    pieces = "for piece in '\\360' '\\237\\230' '\\200'; do printf $piece; sleep 0.02; done"
    assert run(wire, box, pieces)["stdout"] == "\U0001f600"


def test_invalid_bytes_are_replaced(wire: Wire, box: str) -> None:
    result = run(wire, box, "printf 'a\\377b\\342\\202'; printf '\\300' >&2")
    assert result == {"stdout": "a\ufffdb\ufffd", "stderr": "\ufffd", "exitCode": 0}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"timeoutMs": 300}, "exec_timeout", "Exec timed out after 300ms"),
        ({"idleTimeoutMs": 300}, "exec_idle_timeout", "Exec idle timed out after 300ms"),
        ({"timeoutMs": 300, "idleTimeoutMs": 5000}, "exec_timeout", "Exec timed out after 300ms"),
        ({"timeoutMs": 5000, "idleTimeoutMs": 300}, "exec_idle_timeout", "Exec idle timed out after 300ms"),
        ({"timeoutMs": 300, "tty": True}, "exec_timeout", "Exec timed out after 300ms"),
    ],
)
def test_a_time_limit(wire: Wire, box: str, options: dict[str, Any], code: str, message: str) -> None:
    began = time.monotonic()
    fields = {"containerId": box, "command": ["sh", "-c", "echo so far; exec sleep 30"], "options": options}
    reply = wire.post("/v1/exec/run", **fields)
    assert 0.25 < time.monotonic() - began < 0.8
    assert refused(reply, 504, code).startswith(message)
    assert reply.json["error"]["details"] == {"stdout": "so far\r\n" if "tty" in options else "so far\n", "stderr": ""}


def test_a_time_limit_of_0_is_none(wire: Wire, box: str) -> None:
    assert run(wire, box, "sleep 0.3; echo a", timeoutMs=0, idleTimeoutMs=0)["stdout"] == "a\n"


def test_any_output_re_arms_the_idle_limit_and_no_output_the_whole_one(wire: Wire, box: str) -> None:
    dots = "for i in 1 2 3 4 5 6 7 8; do printf . >&%d; sleep 0.1; done"
    assert run(wire, box, dots % 2, idleTimeoutMs=500)["stderr"] == "........"
    reply = wire.post("/v1/exec/run", containerId=box, command=dots % 1, options={"timeoutMs": 400})
    refused(reply, 504, "exec_timeout")


@pytest.mark.parametrize("limit", ["timeoutMs", "idleTimeoutMs"])
def test_kill_on_timeout_stops_the_container_and_nobody_waits_for_it(
    wire: Wire, start: Start, direct: EngineDirect, limit: str
) -> None:
    container = start(cmd=["sh", "-c", 'trap "sleep 1; exit 7" TERM; while :; do sleep 0.05; done'])
    began = time.monotonic()
    options = {limit: 200, "killOnTimeout": True}
    reply = wire.post("/v1/exec/run", containerId=container, command="sleep 30", options=options)
    assert time.monotonic() - began < 0.7
    assert reply.status == 504
    assert is_running(direct, container)
    assert wait_until(lambda: not is_running(direct, container), 10)
    assert direct.request("GET", f"/containers/{container}/json").json()["State"]["ExitCode"] == 7


def test_without_kill_on_timeout_the_container_goes_on(wire: Wire, box: str, direct: EngineDirect) -> None:
    options = {"timeoutMs": 100, "killOnTimeout": False}
    assert wire.post("/v1/exec/run", containerId=box, command="sleep 1", options=options).status == 504
    assert run(wire, box, ["echo", "a"], timeoutMs=5000)["stdout"] == "a\n"
    assert is_running(direct, box)


@pytest.fixture(scope="module")
def bash_box(wire: Wire, start: Start) -> str:
    """A container with bash."""
    container = start()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:
        linked = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
        for path in ["/bin/bash", *re.findall(r"(/\S+) \(0x", linked)]:
            tar.add(path)
    fields = {"path": "/", "payloadBase64": b64(buffer.getvalue())}
    done(wire.post("/v1/containers/putArchive", containerId=container, **fields))
    return container


def test_log_to_pid_1(wire: Wire, bash_box: str) -> None:
    command = "echo out; echo err >&2; tty; exit 5"
    result = run(wire, bash_box, command, logToPid1=True, tty=True)
    assert result == {"stdout": "out\nnot a tty\n", "stderr": "err\n", "exitCode": 5}
    streams = {"stdout": b"out\nnot a tty\n", "stderr": b"err\n"}
    for stream, text in streams.items():
        other = {each: each == stream for each in streams}
        assert demultiplexed(log_of(wire, bash_box, **other))[stream] == text


def test_output_past_the_limit(image: str, box: str, tuned: Wire) -> None:
    assert len(run(tuned, box, "head -c 100000 /dev/zero | tr '\\0' a")["stdout"]) == 100_000
    reply = tuned.post("/v1/exec/run", containerId=box, command="timeout 10 yes")
    refused(reply, 413, "output_too_large")


@pytest.fixture(scope="module")
def tuned(engine: Engine) -> Iterator[Wire]:
    """A runner with other settings."""
    settings = {"DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": "200", "DOCKER_RUNNER_MAX_OUTPUT": "1000000"}
    with Runner(engine.socket, settings) as runner:
        yield Wire(runner.url, runner.secret)


# exec/resize


def test_resize(wire: Wire, box: str) -> None:
    with wire.interactive(containerId=box, command="read a; stty size", tty=True) as socket:
        exec_id = socket.next()["execId"]
        done(wire.post("/v1/exec/resize", execId=exec_id, size={"cols": 101, "rows": 33}))
        socket.stdin(b"\n")
        socket.until(b"33 101\r\n")
    refused(wire.post("/v1/exec/resize", execId="missing", size={"cols": 1, "rows": 1}), 404, "no_such_exec")


# Logs


def log_of(wire: Wire, container: str, **query: Any) -> bytes:
    """What the chunks of an unfollowed log hold; it ends with the end message."""
    reply, feed = wire.feed(LOGS, containerId=container, follow=False, **query)
    with reply:
        messages = list(feed)
    assert messages[-1] == {"type": "end"}
    return b"".join(chunk(message) for message in messages[:-1])


def chunk(message: Any) -> bytes:
    assert message.keys() == {"type", "data"}, message
    assert message["type"] == "chunk"
    return base64.b64decode(message["data"], validate=True)


def demultiplexed(data: bytes) -> dict[str, bytes]:
    """The streams of whole multiplexed frames."""
    out = {"stdout": b"", "stderr": b""}
    while data:
        assert data[0] in (1, 2)
        assert data[1:4] == b"\0\0\0"
        size = int.from_bytes(data[4:8], "big")
        assert len(data) >= 8 + size, "a frame is not whole"
        out["stdout" if data[0] == 1 else "stderr"] += data[8 : 8 + size]
        data = data[8 + size :]
    return out


@pytest.fixture(scope="module")
def logged(start: Start, direct: EngineDirect) -> str:
    """A container that has said `one`, `two` on stdout and `bad` on stderr, and ended."""
    container = start(cmd=["sh", "-c", "echo one; echo two; echo bad >&2"])
    assert wait_until(lambda: not is_running(direct, container), 10)
    return container


def test_the_log_of_an_ended_container(wire: Wire, logged: str, direct: EngineDirect) -> None:
    data = log_of(wire, logged)
    assert demultiplexed(data) == {"stdout": b"one\ntwo\n", "stderr": b"bad\n"}
    assert data == direct.request("GET", f"/containers/{logged}/logs?stdout=1&stderr=1").content


def test_each_message_is_one_data_line_and_an_empty_line(wire: Wire, logged: str) -> None:
    body = wire.get(LOGS, containerId=logged, follow=False).body
    *messages, rest = body.split(b"\n\n")
    assert rest == b""
    assert messages[-1] == b'data: {"type":"end"}'
    assert all(
        message.startswith(b'data: {"type":"chunk","data":"') and b"\n" not in message for message in messages[:-1]
    )


@pytest.mark.parametrize(
    ("query", "stdout", "stderr"),
    [
        ({"tail": 0}, b"", b""),
        ({"tail": "all"}, b"one\ntwo\n", b"bad\n"),
        ({"since": 0}, b"one\ntwo\n", b"bad\n"),
        ({"since": 2**31}, b"", b""),
        ({"stdout": False}, b"", b"bad\n"),
        ({"stderr": 0}, b"one\ntwo\n", b""),
        ({"stdout": 1, "stderr": "true", "timestamps": 0}, b"one\ntwo\n", b"bad\n"),
    ],
)
def test_what_of_a_log_is_asked_for(
    wire: Wire, logged: str, query: dict[str, Any], stdout: bytes, stderr: bytes
) -> None:
    assert demultiplexed(log_of(wire, logged, **query)) == {"stdout": stdout, "stderr": stderr}


def test_the_tail_of_a_log(wire: Wire, logged: str) -> None:
    shown = demultiplexed(log_of(wire, logged, tail=1))
    assert sum(text.count(b"\n") for text in shown.values()) == 1


def test_timestamps(wire: Wire, logged: str) -> None:
    lines = demultiplexed(log_of(wire, logged, timestamps=True, stderr=False))["stdout"].decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:.]+Z one\n\d{4}-\d\d-\d\dT[0-9:.]+Z two\n", lines)


def test_the_log_of_a_terminal_is_raw(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(cmd=["sh", "-c", "echo one; echo bad >&2"], tty=True)
    assert wait_until(lambda: not is_running(direct, container), 10)
    assert log_of(wire, container) == b"one\r\nbad\r\n"


def test_the_frames_of_a_long_log_are_whole_in_each_chunk(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(cmd=["sh", "-c", "for i in $(seq 3000); do echo $i; echo e$i >&2; done"])
    assert wait_until(lambda: not is_running(direct, container), 20)
    reply, feed = wire.feed(LOGS, containerId=container, follow=False)
    with reply:
        pieces = [demultiplexed(chunk(message)) for message in feed if message["type"] != "end"]
    assert b"".join(piece["stdout"] for piece in pieces) == b"".join(b"%d\n" % n for n in range(1, 3001))
    assert b"".join(piece["stderr"] for piece in pieces) == b"".join(b"e%d\n" % n for n in range(1, 3001))


@pytest.mark.parametrize("query", [{}, {"follow": True}, {"follow": 1, "tail": 0}])
def test_a_followed_log_begins_at_once_on_a_silent_container_and_ends_with_it(
    wire: Wire, start: Start, query: dict[str, Any]
) -> None:
    container = start()
    began = time.monotonic()
    reply, feed = wire.feed(LOGS, containerId=container, **query)
    with reply:
        assert time.monotonic() - began < 0.5
        done(wire.post("/v1/containers/stop", containerId=container, timeoutSec=0))
        assert list(feed) == [{"type": "end"}]


def test_a_followed_log_shows_a_line_when_it_is_said(wire: Wire, start: Start) -> None:
    container = start()
    reply, feed = wire.feed(LOGS, containerId=container)
    with reply:
        messages = iter(feed)
        for text in ("one", "two \xe4"):
            run(wire, container, f"echo '{text}' >/proc/1/fd/1")
            assert demultiplexed(chunk(next(messages)))["stdout"] == f"{text}\n".encode()
        done(wire.post("/v1/containers/stop", containerId=container, timeoutSec=0))
        assert next(messages) == {"type": "end"}
        assert next(messages, None) is None


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"containerId": "missing"}, 404, "no_such_container"),
        ({"stdout": False, "stderr": False}, 400, "bad_parameter"),
    ],
)
def test_a_log_that_the_engine_refuses_is_an_http_error(
    wire: Wire, box: str, query: dict[str, Any], status: int, code: str
) -> None:
    refused(wire.get(LOGS, **{"containerId": box, **query}), status, code)


def test_since_that_is_no_time_is_an_http_error(wire: Wire, box: str, direct: EngineDirect) -> None:
    own = direct.request("GET", f"/containers/{box}/logs?stdout=1&since=x")
    reply = wire.get(LOGS, containerId=box, since="x")
    assert (reply.status, reply.json["message"]) == (own.status_code, own.json()["message"])


@pytest.mark.parametrize("path", [LOGS, EVENTS])
def test_quiet_streams_carry_comments(tuned: Wire, box: str, path: str) -> None:
    # Events of a kind that nothing makes, so that the stream is quiet.
    query = {"containerId": box} if path == LOGS else {"filters": b64(b'{"type":["plugin"]}')}
    reply, feed = tuned.feed(path, **query)
    with reply:
        for _ in range(3):
            block = feed.block()
            assert block is not None
            assert re.fullmatch(rb":[^\r\n]*", block)


# Events


def make_volume(direct: EngineDirect, names: Names) -> str:
    name = names("volume")
    assert direct.request("POST", "/volumes/create", json={"Name": name, "Labels": names.labels}).status_code == 201
    return name


def first_of(feed: Feed, names: set[str]) -> Any:
    """The first event about one of these."""
    for message in feed:
        assert message.keys() == {"type", "event"}
        assert message["type"] == "event"
        if message["event"]["Actor"]["ID"] in names:
            return message["event"]
    raise AssertionError("the events ended")


# A list of strings is what base64 of JSON decodes to; none of these is.
UNDECODABLE = ["%%%", "e", "!!!!", b64(b"not json"), b64(b"\xff\xfe"), b64(b'{"type":'), b64(b"[" * 3000), ""]


@pytest.mark.parametrize("filters", [None, *UNDECODABLE])
def test_without_filters_that_can_be_read_events_are_of_containers_only(
    wire: Wire, start: Start, direct: EngineDirect, names: Names, filters: str | None
) -> None:
    reply, feed = wire.feed(EVENTS, **({} if filters is None else {"filters": filters}))
    with reply:
        volume = make_volume(direct, names)
        assert direct.request("DELETE", f"/volumes/{volume}").status_code == 204
        body = {"Image": "no-such-image", "Cmd": ["true"]}
        assert direct.request("POST", "/containers/create", json=body).status_code == 404
        container = start(cmd=["true"])
        event = first_of(feed, {volume, container})
        assert (event["Type"], event["Action"], event["Actor"]["ID"]) == ("container", "create", container)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["standard", "url-safe"])
def test_filters_are_base64_of_json(
    wire: Wire, direct: EngineDirect, names: Names, encode: Callable[[bytes], bytes]
) -> None:
    filters = encode(compact({"type": ["volume"], "event": ["create", "destroy"], "label": [], "x": []}))
    reply, feed = wire.feed(EVENTS, filters=filters.decode())
    with reply:
        volume = make_volume(direct, names)
        event = first_of(feed, {volume})
        assert (event["Type"], event["Action"]) == ("volume", "create")


@pytest.mark.parametrize("filters", [b"[]", b"1", b'"x"', b"null", b'{"type":"container"}', b'{"type":[1]}'])
def test_filters_of_a_wrong_structure(wire: Wire, filters: bytes) -> None:
    assert "filters" in refused(wire.get(EVENTS, filters=b64(filters)), 400, "validation_error")


def test_events_since_are_the_engines_json(wire: Wire, direct: EngineDirect, names: Names) -> None:
    since = time.time() - 1
    volume = make_volume(direct, names)
    filters = compact({"type": ["volume"], "volume": [volume]})
    own = direct.request("GET", "/events", params={"since": since, "until": time.time() + 1, "filters": filters})
    for _ in range(2):
        reply, feed = wire.feed(EVENTS, since=f"{since:.6f}", filters=b64(filters))
        with reply:
            assert feed.block() == b'data: {"type":"event","event":' + own.content.splitlines()[0] + b"}"


def test_events_that_the_engine_refuses_are_an_http_error(wire: Wire) -> None:
    reply = wire.get(EVENTS, since="yesterday")
    assert reply.status >= 400
    refused(reply, reply.status, "bad_parameter" if reply.status == 400 else "server_error")
