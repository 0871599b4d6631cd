"""The vendored client against the running runner: each method, and what it is as a file."""

import ast
import base64
import io
import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client import RunnerClient, RunnerClientError, log_items
from conftest import EngineDirect, Names
from documents import example
from service import ROOT, Runner


@pytest.fixture
def client(runner: Runner) -> RunnerClient:
    return RunnerClient(runner.url, runner.secret)


def tar(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


# The file.


def test_the_file_imports_the_standard_library_only_and_has_under_500_lines() -> None:
    source = (ROOT / "client.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names
    assert len(source.splitlines()) < 500


def test_a_copy_alone_in_a_folder_runs_a_container(tmp_path: Path, runner: Runner, image: str, names: Names) -> None:
    (tmp_path / "client.py").write_bytes((ROOT / "client.py").read_bytes())
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from client import RunnerClient\n"
        f"runner = RunnerClient({runner.url!r}, {runner.secret!r})\n"
        f"box = runner.start({image!r}, cmd=['sleep', '600'], network_mode='none', labels={names.labels!r})\n"
        "print(runner.exec_run(box, 'echo alone').stdout, runner.remove(box, force=True))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("alone\n 204\n", "")


def test_importing_it_loads_neither_ssl_nor_http() -> None:
    program = "import sys; sys.path.insert(0, '.'); import client; print({'ssl', 'http.client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


# Containers.


def test_health_and_readiness(client: RunnerClient) -> None:
    client.health()
    client.ready()


def test_start_gives_every_field_on_and_returns_the_id(client: RunnerClient, image: str, names: Names) -> None:
    name = names()
    box = client.start(
        image,
        name=name,
        cmd=["sleep", "600"],
        env={"A": "1"},
        working_dir="/bin",
        network_mode="none",
        auto_remove=False,
        labels=names.labels,
        create_extras={"Hostname": "inside"},
    )
    inspected = client.inspect(name)
    assert inspected["Id"] == box
    assert "A=1" in inspected["Config"]["Env"]
    assert inspected["Config"]["WorkingDir"] == "/bin"
    assert inspected["Config"]["Hostname"] == "inside"
    assert client.remove(box, force=True) == 204


def test_stop_and_remove_return_what_is_benign(client: RunnerClient, start: Callable[..., str]) -> None:
    box = start()
    assert client.remove(box) == 409
    assert client.stop(box, timeout_sec=0) == 204
    assert client.stop(box, timeout_sec=0) == 304
    assert client.remove(box, remove_volumes=True) == 204
    assert client.remove(box) == 404
    assert client.stop(box) == 404


def test_what_is_not_benign_is_raised(client: RunnerClient) -> None:
    with pytest.raises(RunnerClientError) as refused:
        client.inspect("no-such-box")
    error = refused.value
    assert (error.status, error.code, error.retryable) == (404, "no_such_container", False)
    assert "No such container" in error.message


def test_lookups(client: RunnerClient, start: Callable[..., str], names: Names, direct: EngineDirect) -> None:
    volume, mark = names(), names()
    box = start(labels={"mark": mark}, binds=[f"{volume}:/data"])
    assert client.labels(box)["mark"] == mark
    assert client.networks(box) == ["none"]
    assert client.find_by_labels({"mark": mark}) == [box]
    assert client.list_by_volume(volume) == [box]
    client.touch(box)
    assert client.remove_volume(volume) == 409
    assert client.stop(box, timeout_sec=0) == 204
    assert client.find_by_labels({"mark": mark}) == []
    assert client.find_by_labels({"mark": mark}, stopped=True) == [box]
    assert client.remove(box) == 204
    assert client.remove_volume(volume, force=False) == 204
    assert client.remove_volume(volume) == 404


def test_ensure_of_an_image_that_is_there(client: RunnerClient, image: str) -> None:
    client.ensure_image(image)
    assert list(client.ensure_image_progress(image)) == []


def test_ensure_of_a_missing_image_is_raised(client: RunnerClient, names: Names) -> None:
    with pytest.raises(RunnerClientError):
        RunnerClient(client._url.geturl(), client._secret, retries=0).ensure_image(f"127.0.0.1:1/{names()}")


@pytest.mark.parametrize("form", ["bytes", "file", "pieces"])
def test_an_archive_is_unpacked(client: RunnerClient, start: Callable[..., str], form: str) -> None:
    box, packed = start(), tar(greeting=b"hello")
    pieces = [packed[:100], packed[100:]]
    client.put_archive(box, "/bin", packed if form == "bytes" else io.BytesIO(packed) if form == "file" else pieces)
    assert client.exec_run(box, ["cat", "/bin/greeting"]).stdout == "hello"


@pytest.mark.parametrize("form", [bytes, io.BytesIO])
def test_an_archive_for_a_missing_container_is_raised(
    client: RunnerClient, form: Callable[[bytes], bytes | io.BytesIO]
) -> None:
    with pytest.raises(RunnerClientError, match="No such container") as refused:
        client.put_archive("no-such-box", "/", form(tar(a=b"")))
    assert refused.value.status == 404


# Execs.


def test_a_command_runs_to_its_end(client: RunnerClient, box: str) -> None:
    done = client.exec_run(box, 'echo "$A"; pwd >&2; exit 3', env={"A": "out"}, workdir="/bin", timeout_ms=20_000)
    assert done == ("out\n", "/bin\n", 3)


def test_a_time_limit_is_raised_with_the_output_so_far(client: RunnerClient, box: str) -> None:
    with pytest.raises(RunnerClientError, match="Exec timed out after 500ms") as refused:
        client.exec_run(box, "echo begun; sleep 600", timeout_ms=500)
    assert (refused.value.status, refused.value.code) == (504, "exec_timeout")
    assert refused.value.details["stdout"] == "begun\n"


def test_an_interactive_exec_takes_input_and_gives_output(client: RunnerClient, box: str) -> None:
    with client.exec_interactive(box, ["cat"]) as session:
        session.send(b"one")
        assert next(iter(session)) == ("stdout", b"one")
        session.eof()
        assert list(session) == []
        assert session.exit_code == 0


def test_an_interactive_exec_keeps_its_streams_apart(client: RunnerClient, box: str) -> None:
    with client.exec_interactive(box, "echo out; echo $A >&2; exit 7", env={"A": "err"}) as session:
        assert sorted(session) == [("stderr", b"err\n"), ("stdout", b"out\n")]
        assert session.exit_code == 7


@pytest.mark.parametrize("way", ["within the session", "by the exec's id"])
def test_a_terminal_has_the_size_it_is_given(client: RunnerClient, box: str, way: str) -> None:
    with client.exec_interactive(box, "read line; stty size", tty=True) as session:
        if way == "within the session":
            session.resize(cols=101, rows=31)
        else:
            client.exec_resize(session.exec_id, cols=101, rows=31)
        session.send(b"\n")
        assert b"31 101" in b"".join(data for _, data in session)


def test_input_and_output_flow_at_once_from_two_threads(client: RunnerClient, box: str) -> None:
    size = 8 * 1024 * 1024  # More than all buffers between hold.
    sent = bytes(range(256)) * (size // 256)
    with client.exec_interactive(box, ["cat"]) as session:

        def send() -> None:
            session.send(sent)
            session.eof()

        sender = threading.Thread(target=send)
        sender.start()
        received = b"".join(data for _, data in session)
        sender.join(20)
    assert received == sent
    assert session.exit_code == 0


def test_a_session_that_cannot_begin_is_raised(client: RunnerClient) -> None:
    with pytest.raises(RunnerClientError, match="No such container") as refused:
        client.exec_interactive("no-such-box", "true")
    assert refused.value.status == 404


def test_a_session_with_a_wrong_secret_is_refused(runner: Runner, box: str) -> None:
    with pytest.raises(RunnerClientError) as refused:
        RunnerClient(runner.url, "wrong").exec_interactive(box, "true")
    assert (refused.value.status, refused.value.code) == (401, "invalid_signature")


def test_close_wakes_a_reader(client: RunnerClient, box: str) -> None:
    session = client.exec_interactive(box, ["cat"])
    failed: list[RunnerClientError] = []

    def read() -> None:
        try:
            list(session)
        except RunnerClientError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    session.close()
    reader.join(20)
    assert [error.code for error in failed] == ["connection_lost"]


# Feeds.


def test_a_log_comes_in_records(client: RunnerClient, start: Callable[..., str]) -> None:
    box = start(cmd=["sh", "-c", "printf 'a%.0s' $(seq 1 20000); echo; echo err >&2; echo end"])
    records = list(client.logs(box))
    assert [(len(r.data), r.data[-1:]) for r in records if r.stream == "stdout"] == [
        (16384, b"a"),
        (3617, b"\n"),
        (4, b"\n"),
    ]
    assert [r.data for r in records if r.stream == "stderr"] == [b"err\n"]
    assert all(r.timestamp.endswith("Z") for r in records)


def test_a_terminals_log_comes_in_records(client: RunnerClient, start: Callable[..., str]) -> None:
    box = start(tty=True, cmd=["sh", "-c", "printf 'a%.0s' $(seq 1 20000); echo; echo err >&2; echo end"])
    assert [(r.stream, len(r.data)) for r in client.logs(box)] == [
        ("stdout", 16384),
        ("stdout", 3618),
        ("stdout", 5),
        ("stdout", 5),
    ]


def test_parts_of_a_log(client: RunnerClient, start: Callable[..., str]) -> None:
    box = start(cmd=["sh", "-c", "echo one; echo two; sleep 0.2; echo err >&2"])
    list(client.logs(box))
    assert [r.data for r in client.logs(box, tail=1, follow=False)] == [b"err\n"]
    assert [r.data for r in client.logs(box, stdout=False)] == [b"err\n"]
    assert list(client.logs(box, tail=0)) == []


def test_the_log_of_a_missing_container_is_raised_at_once(client: RunnerClient) -> None:
    with pytest.raises(RunnerClientError, match="No such container"):
        client.logs("no-such-box")


def test_events_are_listened_to_from_the_call_on(client: RunnerClient, start: Callable[..., str], names: Names) -> None:
    mark = names()
    events = client.events(filters={"label": [f"mark={mark}"], "type": ["container"]})
    box = start(labels={"mark": mark})
    assert [next(events)["Action"], next(events)["Action"]] == ["create", "start"]
    client.remove(box, force=True)
    again = client.events(since_ns=0, filters={"label": [f"mark={mark}"]})
    assert next(again)["Action"] == "create"
    events.close()
    again.close()


def test_log_items_do_not_depend_on_the_cuts() -> None:
    stamp = "2026-01-02T03:04:05.000000006Z "
    lines = [b"one\n", b"two", b"\n"]
    whole = b"".join(
        bytes((1 + i % 2, 0, 0, 0)) + (len(stamp) + len(t)).to_bytes(4, "big") + stamp.encode() + t
        for i, t in enumerate(lines)
    )
    for cut in range(len(whole)):
        messages = [
            {"type": "chunk", "data": base64.b64encode(part).decode()} for part in (whole[:cut], whole[cut:]) if part
        ]
        items = list(log_items(messages))
        assert [item[0].data for item in items] == lines
        assert {item[1] for item in items} == {1767323045000000006}
        assert [item[0].stream for item in items] == ["stdout", "stderr", "stdout"]


# Raw requests.


def test_the_engines_answers_come_back_whatever_they_are(client: RunnerClient, box: str) -> None:
    assert client.request("GET", "/_ping").body == b"OK"
    missing = client.request("GET", "/containers/no-such-box/json")
    assert missing.status == 404
    assert "No such container" in json.loads(missing.body)["message"]


def test_a_refusal_of_the_runners_is_raised(client: RunnerClient) -> None:
    with pytest.raises(RunnerClientError) as refused:
        client.request("GET", "/swarm")
    assert (refused.value.status, refused.value.code) == (404, "not_found")


def test_a_streamed_answer_comes_in_chunks(client: RunnerClient, box: str) -> None:
    with client.stream("GET", f"/containers/{box}/archive?path=/bin/busybox") as answer:
        assert answer.status == 200
        size = sum(len(chunk) for chunk in answer)
    assert size > 500_000


def test_a_long_body_of_bytes_is_sent(client: RunnerClient, start: Callable[..., str]) -> None:
    box = start()
    packed = tar(long=bytes(3 * 1024 * 1024))
    assert client.request("PUT", f"/containers/{box}/archive?path=/bin", packed).status == 200
    assert client.exec_run(box, "wc -c < /bin/long").stdout.strip() == str(3 * 1024 * 1024)


@pytest.mark.parametrize("body", [bytes(80 * 1024 * 1024), io.BytesIO(bytes(80 * 1024 * 1024))])
def test_an_early_refusal_of_an_upload_is_read(runner: Runner, body: bytes | io.BytesIO) -> None:
    with pytest.raises(RunnerClientError) as refused:
        RunnerClient(runner.url, "wrong").request("PUT", "/containers/x/archive?path=/", body)
    assert (refused.value.status, refused.value.code) == (401, "invalid_signature")


def test_a_body_that_cannot_be_read_is_told_as_that(client: RunnerClient, box: str) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise OSError("the disk is broken")

    with pytest.raises(RunnerClientError, match="the disk is broken") as failed:
        client.put_archive(box, "/", broken())
    assert (failed.value.status, failed.value.code) == (0, "body_failed")


MEMORY = """
import io, resource, sys
sys.path.insert(0, {root!r})
from client import RunnerClient
class Zeros(io.RawIOBase):
    head, left = {head!r}, 200 * 1024 * 1024 + 1024
    def read(self, size=-1):
        part, self.head = self.head, b""
        zeros = min(size - len(part), self.left)
        self.left -= zeros
        return part + bytes(zeros)
runner = RunnerClient({url!r}, {secret!r})
runner.health()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
runner.put_archive({box!r}, "/bin", Zeros())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_upload_of_200_mb_takes_constant_memory(runner: Runner, start: Callable[..., str]) -> None:
    member = tarfile.TarInfo("zeros")
    member.size = 200 * 1024 * 1024
    box = start()
    program = MEMORY.format(root=str(ROOT), head=member.tobuf(), url=runner.url, secret=runner.secret, box=box)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert int(done.stdout) < 16 * 1024  # KiB
    client = RunnerClient(runner.url, runner.secret)
    assert client.exec_run(box, "wc -c < /bin/zeros").stdout.strip() == str(member.size)
    assert client.remove(box, force=True) == 204


@example("docs/client.md", "from client import")
def test_the_documented_example_runs_as_it_stands(
    script: str, tmp_path: Path, runner: Runner, image: str, names: Names
) -> None:
    (tmp_path / "client.py").write_bytes((ROOT / "client.py").read_bytes())
    (tmp_path / ".dev").mkdir()
    (tmp_path / ".dev/secret").write_text(runner.secret + "\n")
    program = script.replace(":7071", f":{runner.port}").replace("docker-runner/busybox", image)
    (tmp_path / "example.py").write_text(program.replace("cmd=", f"labels={names.labels!r}, cmd="))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    expected = "ready\nhello\nstdout b'typed\\n'\nexit code 0\n504 exec_timeout\n204\n"
    assert (done.stdout, done.stderr) == (expected, "")
