"""docker (docker-py), used as its documentation shows, at the engine and at the bridge."""

import io
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeAlias

import docker
import pytest
from docker import DockerClient
from docker.errors import APIError, BuildError, ContainerError, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.utils.socket import frames_iter

from bridged import Bridge
from comparison import shape
from conftest import IMAGE, Names, Registry
from dev.engine import Engine
from works import Side, Sides, row, shows

RUN = row("docker-py: run", "`containers.run`: output, `detach`, `remove`, `stdin_open`, `tty`; `wait`")
LOGS = row("docker-py: logs", "`logs`: whole, `stream`, `follow`, `tail`, `since`, `timestamps`")
EXEC = row("docker-py: exec", "`exec_run`: whole, `stream`, `demux`, `tty`, `detach`, `socket` with stdin to its end")
ATTACH = row("docker-py: attach", "`attach` (streamed too), `attach_socket` with stdin to its end")
FILES = row("docker-py: files", "`put_archive`, `get_archive`, `diff`, `export`")
FEEDS = row("docker-py: feeds", "`events` (live, filtered, of the past), `stats` (one, and streamed), `top`")
LIFE = row("docker-py: life", "`start`, `stop`, `restart`, `kill`, `pause`, `rename`, `update`, `commit`, `prune`")
IMAGES = row("docker-py: images", "`images.build`, `pull`, `push`, `save`, `load`, `tag`, `history`, `remove`, `prune`")
VOLUMES = row("docker-py: volumes", "volumes and networks: create, get, list, connect, remove, prune")
LOW = row("docker-py: low", "the low-level `APIClient`; `from_env`, `ping`, `version`, `info`, `df`")
ERRORS = row("docker-py: errors", "errors: `NotFound`, `ImageNotFound`, `APIError` with the engine's explanation")
CROWD = row("docker-py: crowd", "20 followers of logs and an exec at once over one client's pool")

Docker: TypeAlias = Side[DockerClient]
Box: TypeAlias = Callable[[Docker], Container]


@pytest.fixture(scope="module")
def sides(engine: Engine, bridge: Bridge, names: Names) -> Iterator[Sides[DockerClient]]:
    sides = Sides(f"unix://{engine.socket}", bridge.host, names, lambda host: DockerClient(base_url=host))
    yield sides
    for side in (sides.engine, sides.bridge):
        side.client.close()


def options(side: Docker, **more: Any) -> dict[str, Any]:
    """What each container is made with: our labels, no network, killed at once when stopped."""
    usual = {"name": side.name(), "labels": side.labels, "network_mode": "none", "stop_signal": "SIGKILL"}
    return {**usual, **more}


def detached(side: Docker, *command: str, **more: Any) -> Container:
    """A running container, by default one that does not end."""
    return side.client.containers.run(IMAGE, list(command or ("sleep", "1d")), detach=True, **options(side, **more))


@pytest.fixture(scope="module")
def box(sides: Sides[DockerClient], names: Names) -> Box:
    """A container that runs for all tests of the module, as the side's client sees it."""
    sides.engine.begin(names("box"))
    box = detached(sides.engine)
    return lambda side: side.client.containers.get(box.id)


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def files_in(archive: bytes) -> dict[str, bytes | None]:
    """Names and contents of a tar's regular files; None for what is no file."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name: file.read() if (file := _regular(tar, entry)) else None for entry in tar}


def _regular(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes] | None:
    return tar.extractfile(entry) if entry.isreg() else None


def pruned(collection: Any, **filters: Any) -> Any:
    """What a prune answers. The engine runs one at a time, and somebody else may have begun one."""
    while True:
        try:
            return collection.prune(filters=filters)
        except APIError as error:
            if "already running" not in str(error.explanation):
                raise


def explained(function: Callable[[], object]) -> tuple[str, int | None, str]:
    """The error that the function raises: its class, the status, the engine's words."""
    with pytest.raises(APIError) as caught:
        function()
    return type(caught.value).__name__, caught.value.status_code, str(caught.value.explanation)


class TestRun:
    @shows(RUN)
    def test_gives_the_output(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> bytes:
            out: bytes = side.client.containers.run(IMAGE, "echo hello world", **options(side), remove=True)
            return out

        assert sides.same(scenario) == b"hello world\n"

    @shows(RUN)
    def test_gives_stderr_and_the_status_of_a_failure(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> tuple[int, bytes]:
            with pytest.raises(ContainerError) as caught:
                side.client.containers.run(IMAGE, ["sh", "-c", "echo no >&2; exit 7"], **options(side))
            return caught.value.exit_status, caught.value.stderr

        assert sides.same(scenario) == (7, b"no\n")

    @shows(RUN)
    def test_detached_with_remove_is_gone_after_its_end(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = detached(side, "sh", "-c", "read x; exit 3", stdin_open=True, remove=True)
            container.reload()
            seen = container.status
            with ThreadPoolExecutor(1) as pool:
                removed = pool.submit(lambda: container.wait(condition="removed"))
                attached = container.attach_socket(params={"stdin": 1, "stream": 1})
                attached._sock.sendall(b"\n")
                attached.close()
                ended = removed.result(30)
            with pytest.raises(NotFound):
                side.client.containers.get(container.id)
            return [seen, ended["StatusCode"]]

        assert sides.same(scenario) == ["running", 3]

    @shows(RUN)
    def test_stream_gives_the_output_in_pieces(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> bytes:
            # The engine itself may leave out what a follower has not read when the container ends: it ends later.
            script = ["sh", "-c", "seq 5000; sleep .5"]
            return b"".join(side.client.containers.run(IMAGE, script, stream=True, **options(side)))

        assert sides.same(scenario) == b"".join(b"%d\n" % number for number in range(1, 5001))

    @shows(RUN)
    def test_wait_gives_the_status_and_the_container_its_state(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = detached(side, "sh", "-c", "exit 5", tty=True)
            ended = container.wait(timeout=30)
            container.reload()
            return [ended, container.status, container.attrs["State"]["ExitCode"]]

        assert sides.same(scenario)[1:] == ["exited", 5]


class TestLogs:
    @shows(LOGS)
    def test_whole_and_in_parts(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = detached(side, "sh", "-c", "echo one; echo two >&2; sleep .05; echo three")
            container.wait()
            return [
                container.logs(stderr=False),
                container.logs(stdout=False),
                container.logs(tail=1),
                container.logs(timestamps=True, stderr=False),
                container.logs(since=2_000_000_000),
                sorted(container.logs().splitlines()),
            ]

        seen = sides.same(scenario)
        assert seen[:3] == [b"one\nthree\n", b"two\n", b"three\n"]
        assert seen[4:] == [b"", [b"one", b"three", b"two"]]

    @shows(LOGS)
    def test_followed_come_as_they_are_written(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[bytes]:
            container = detached(side, "sh", "-c", "echo one; until [ -e /go ]; do sleep .02; done; echo two")
            lines = container.logs(stream=True, follow=True)
            first = next(lines)
            container.exec_run(["touch", "/go"])
            return [first, *lines]

        assert sides.same(scenario) == [b"one\n", b"two\n"]

    @shows(LOGS)
    def test_followed_can_be_given_up(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> bytes:
            lines = detached(side, "sh", "-c", "echo one; sleep 1d").logs(stream=True, follow=True)
            first: bytes = next(lines)
            lines.close()
            return b"".join([first, *lines])

        assert sides.same(scenario) == b"one\n"


class TestExec:
    @shows(EXEC)
    def test_gives_status_and_output(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> list[Any]:
            return [
                box(side).exec_run("echo hello"),
                box(side).exec_run(["sh", "-c", "echo $A; pwd; exit 4"], environment={"A": "b"}, workdir="/tmp"),
                box(side).exec_run(["sh", "-c", "echo out; echo err >&2"], demux=True),
                box(side).exec_run("nothing-such")[0],
                box(side).exec_run(["sh", "-c", "[ -t 1 ] && echo terminal"], tty=True),
            ]

        seen = sides.same(scenario)
        assert seen[0] == (0, b"hello\n")
        assert seen[1] == (4, b"b\n/tmp\n")
        assert seen[2] == (0, (b"out\n", b"err\n"))
        assert seen[4] == (0, b"terminal\r\n")

    @shows(EXEC)
    def test_stream_gives_output_as_it_comes(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> list[Any]:
            flag = side.name()
            script = f"echo one; until [ -e /tmp/{flag} ]; do sleep .02; done; echo two >&2"
            _, output = box(side).exec_run(["sh", "-c", script], stream=True, demux=True)
            first = next(output)
            box(side).exec_run(["touch", f"/tmp/{flag}"])
            return [first, *output]

        assert sides.same(scenario) == [(b"one\n", None), (None, b"two\n")]

    @shows(EXEC)
    def test_detached_gives_nothing_and_runs(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> list[Any]:
            flag = f"/tmp/{side.name()}"
            answer = box(side).exec_run(["touch", flag], detach=True).output
            script = f"until [ -e {flag} ]; do sleep .02; done; echo there"
            return [answer, box(side).exec_run(["sh", "-c", script])]

        assert sides.same(scenario) == ["", (0, b"there\n")]

    @shows(EXEC)
    def test_socket_takes_stdin_to_its_end_and_gives_what_comes_after(
        self, sides: Sides[DockerClient], box: Box
    ) -> None:
        def scenario(side: Docker) -> list[Any]:
            created = side.client.api.exec_create(box(side).id, ["sh", "-c", "wc -c; echo end >&2"], stdin=True)
            connection = side.client.api.exec_start(created["Id"], socket=True)
            connection._sock.sendall(b"x" * 100_000)
            connection._sock.shutdown(socket.SHUT_WR)
            output = sorted(frames_iter(connection, tty=False))
            connection.close()
            return [output, side.client.api.exec_inspect(created["Id"])["ExitCode"]]

        assert sides.same(scenario) == [[(1, b"100000\n"), (2, b"end\n")], 0]

    @shows(EXEC)
    def test_socket_is_a_conversation(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> bytes:
            _, connection = box(side).exec_run("sh", stdin=True, tty=True, socket=True)
            stream = connection._sock
            stream.sendall(b"stty -echo; PS1=; echo re''ady\n")
            seen = b""
            while b"ready" not in seen:
                seen += stream.recv(4096)
            stream.sendall(b"echo $((6 * 7))\n")
            answer = b""
            while b"42" not in answer:
                answer += stream.recv(4096)
            stream.sendall(b"exit\n")
            while piece := stream.recv(4096):
                answer += piece
            connection.close()
            return answer.strip()

        assert sides.same(scenario) == b"42"

    @shows(EXEC)
    def test_of_a_fast_command_loses_nothing_in_100_times(self, sides: Sides[DockerClient], box: Box) -> None:
        """The engine's first bytes can come together with its 101: who reads both at once must not lose them."""

        def scenario(side: Docker) -> bool:
            container, times = box(side), 100 if side is sides.bridge else 3
            with ThreadPoolExecutor(2) as pool:
                seen = list(pool.map(lambda number: container.exec_run(["echo", str(number)]), range(times)))
            return seen == [(0, b"%d\n" % number) for number in range(times)]

        assert sides.same(scenario)

    @shows(EXEC)
    def test_resize_sets_the_terminal(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> bytes:
            created = side.client.api.exec_create(box(side).id, ["sh", "-c", "read x; stty size"], stdin=True, tty=True)
            connection = side.client.api.exec_start(created["Id"], tty=True, socket=True)
            side.client.api.exec_resize(created["Id"], height=33, width=77)
            connection._sock.sendall(b"\n")
            output = b"".join(iter(lambda: connection._sock.recv(4096), b""))
            connection.close()
            return output.strip()

        assert sides.same(scenario) == b"33 77"


class TestAttach:
    @shows(ATTACH)
    def test_gives_the_output_to_its_end(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = side.client.containers.create(
                IMAGE, ["sh", "-c", "echo out; sleep .05; echo err >&2"], **options(side)
            )
            output = container.attach(stream=True, logs=True, demux=True)
            container.start()
            return list(output)

        assert sides.same(scenario) == [(b"out\n", None), (None, b"err\n")]

    @shows(ATTACH)
    def test_socket_takes_stdin_to_its_end_and_gives_what_comes_after(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = side.client.containers.create(
                IMAGE, ["sh", "-c", "cat; sleep .2; echo end"], stdin_open=True, **options(side)
            )
            params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            connection = container.attach_socket(params=params)
            container.start()
            connection._sock.sendall(b"one\ntwo\n")
            connection._sock.shutdown(socket.SHUT_WR)
            frames = list(frames_iter(connection, tty=False))
            connection.close()
            return [b"".join(payload for _, payload in frames), container.wait()["StatusCode"]]

        assert sides.same(scenario) == [b"one\ntwo\nend\n", 0]

    @shows(ATTACH)
    def test_socket_of_a_terminal_is_a_conversation(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> bytes:
            container = side.client.containers.create(IMAGE, ["cat"], stdin_open=True, tty=True, **options(side))
            connection = container.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1})
            container.start()
            container.resize(24, 80)
            connection._sock.sendall(b"hello\n\x04")
            output = b"".join(iter(lambda: connection._sock.recv(4096), b""))
            connection.close()
            return output

        assert sides.same(scenario) == b"hello\r\nhello\r\n"


class TestFiles:
    @shows(FILES)
    def test_go_in_and_come_out_whole(self, sides: Sides[DockerClient], box: Box) -> None:
        content = bytes(range(256)) * 8192

        def scenario(side: Docker) -> list[Any]:
            folder = f"/tmp/{side.name()}"
            box(side).exec_run(["mkdir", folder])
            put = box(side).put_archive(folder, tar_of(small=b"hello", large=content))
            pieces, stat = box(side).get_archive(folder)
            archive = b"".join(pieces)
            summed = box(side).exec_run(["sh", "-c", f"cat {folder}/* | md5sum"])
            return [put, stat["name"], stat["size"], summed, files_in(archive)]

        seen = sides.same(scenario, lambda seen: [*seen[:-1], list(seen[-1].values())])
        assert seen[0] is True
        assert list(seen[-1].values()) == [None, content, b"hello"]

    @shows(FILES)
    def test_streamed_in_from_a_file_object(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> list[Any]:
            name = side.name()
            put = box(side).put_archive("/tmp", iter([tar_of(**{name: b"from a generator"})]))
            return [put, box(side).exec_run(["cat", f"/tmp/{name}"]).output]

        assert sides.same(scenario) == [True, b"from a generator"]

    @shows(FILES)
    def test_diff_and_export(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = detached(side, "sh", "-c", "echo made > /made")
            container.wait()
            return [container.diff(), sorted(files_in(b"".join(container.export())))]

        seen = sides.same(scenario)
        assert {"Path": "/made", "Kind": 1} in seen[0]
        assert "made" in seen[1]


class TestFeeds:
    @shows(FEEDS)
    def test_events_come_live_and_from_the_past(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            name = side.name()
            live = side.client.events(decode=True, filters={"container": name})
            container = side.client.containers.create(IMAGE, ["true"], **options(side, name=name))
            seen = [next(live)]
            container.start()
            while seen[-1]["Action"] != "die":
                seen.append(next(live))
            container.wait()
            container.remove()
            seen.append(next(live))
            live.close()
            actions = [event["Action"] for event in seen]
            created, destroyed = seen[0]["time"], seen[-1]["time"] + 1
            past = side.client.events(since=created, until=destroyed, filters={"container": name}, decode=True)
            return [actions, [event["Action"] for event in past], list(live)]

        assert sides.same(scenario) == [["create", "start", "die", "destroy"]] * 2 + [[]]

    @shows(FEEDS)
    def test_stats_one_and_streamed(self, sides: Sides[DockerClient], box: Box) -> None:
        def scenario(side: Docker) -> list[Any]:
            stream = box(side).stats(decode=True)
            streamed = [next(stream), next(stream)]
            stream.close()
            return [*streamed, side.client.api.stats(box(side).id, stream=False, one_shot=True)]

        seen = sides.same(scenario, shape)
        assert all(set(one) >= {"cpu_stats", "memory_stats", "read"} for one in seen)

    @shows(FEEDS)
    def test_top_lists_the_processes(self, sides: Sides[DockerClient], box: Box) -> None:
        seen = sides.same(lambda side: box(side).top(ps_args="-o pid,comm"))
        assert [process[1] for process in seen["Processes"]] == ["sleep"]


class TestLife:
    @shows(LIFE)
    def test_of_a_container(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            container = detached(side)
            names = []
            steps: list[tuple[Callable[[], object], str]] = [
                (container.pause, "paused"),
                (container.unpause, "running"),
                (lambda: container.rename(side.name()), "running"),
                (lambda: container.update(mem_limit="64m", memswap_limit="64m"), "running"),
                (lambda: container.restart(timeout=0), "running"),
                (lambda: container.stop(timeout=0), "exited"),
                (container.start, "running"),
                (lambda: container.kill("SIGKILL"), "exited"),
            ]
            for step, state in steps:
                step()
                container.reload()
                while container.status != state:  # the engine says so a little later than it does it
                    container.reload()
                names.append(container.name)
            listed = side.client.containers.list(all=True, filters={"name": container.name})
            return [names, [one.name for one in listed], container.attrs["HostConfig"]["Memory"]]

        names, listed, memory = sides.same(scenario)
        assert names[-1:] == listed
        assert memory == 64 << 20

    @shows(LIFE)
    def test_commit_and_prune(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            label = side.name()
            container = detached(side, "sh", "-c", "echo made > /made", labels={**side.labels, label: "1"})
            container.wait()
            image = container.commit(side.name(), "v1", message="said", author="us", changes="CMD cat /made")
            output = side.client.containers.run(image.tags[0], **options(side))
            removed = pruned(side.client.containers, label=label)["ContainersDeleted"]
            return [output, image.tags, image.attrs["Comment"], removed]

        output, *_, removed = sides.same(scenario, lambda seen: [*seen[:-1], len(seen[-1])])
        assert output == b"made\n"
        assert len(removed) == 2  # the image has the container's labels


DOCKERFILE = b"""
ARG BASE
FROM $BASE
ARG SAID
LABEL made=yes
COPY file /copied
RUN echo $SAID > /said
CMD ["cat", "/copied", "/said"]
"""


class TestImages:
    def build(self, side: Docker, tag: str, **more: Any) -> Any:
        context = io.BytesIO(tar_of(Dockerfile=DOCKERFILE, file=b"copied\n"))
        usual = {"buildargs": {"BASE": IMAGE, "SAID": "hello"}, "labels": side.labels, "network_mode": "none"}
        return side.client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, **{**usual, **more})

    @shows(IMAGES)
    def test_build_gives_the_image_and_its_log(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            image, log = self.build(side, side.name(), nocache=True)
            lines = "".join(line.get("stream", "") for line in log)
            output = side.client.containers.run(image, **options(side))
            return [output, image.tags, lines, [layer["CreatedBy"] for layer in image.history()]]

        assert sides.same(scenario)[0] == b"copied\nhello\n"

    @shows(IMAGES)
    def test_build_of_a_folder(self, sides: Sides[DockerClient], tmp_path: Path) -> None:
        (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY . /in\n")
        (tmp_path / ".dockerignore").write_text("ignored\n")
        (tmp_path / "ignored").write_text("")
        (tmp_path / "kept").write_bytes(b"k" * 3_000_000)

        def scenario(side: Docker) -> bytes:
            image, _ = side.client.images.build(path=str(tmp_path), tag=side.name(), labels=side.labels)
            output: bytes = side.client.containers.run(image, ["ls", "/in"], **options(side))
            return output

        assert sides.same(scenario) == b"Dockerfile\nkept\n"

    @shows(IMAGES, ERRORS)
    def test_build_that_fails_says_where(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            dockerfile = io.BytesIO(f"FROM {IMAGE}\nRUN exit 9\n".encode())
            with pytest.raises(BuildError) as caught:
                side.client.images.build(fileobj=dockerfile, network_mode="none", labels=side.labels, rm=True)
            return [caught.value.msg, list(caught.value.build_log)[-1]]

        seen = sides.same(scenario)
        assert "returned a non-zero code: 9" in str(seen[0])

    @shows(IMAGES)
    def test_push_and_pull_show_their_progress(self, sides: Sides[DockerClient], registry: Registry) -> None:
        def scenario(side: Docker) -> list[Any]:
            repository = f"{registry.address}/{side.name()}"
            image = side.client.images.get(IMAGE)
            tagged = image.tag(repository, tag="v1")
            pushed = list(side.client.images.push(repository, tag="v1", stream=True, decode=True))
            side.client.images.remove(f"{repository}:v1")
            pulled = list(side.client.api.pull(repository, tag="v1", stream=True, decode=True))
            again = side.client.images.pull(repository, tag="v1")
            same = again.attrs["RootFS"] == image.attrs["RootFS"]
            side.client.images.remove(f"{repository}:v1")
            return [tagged, same, pushed[0]["status"], pushed[-1], pulled[-1]]

        tagged, same, *_, pulled = sides.same(scenario)
        assert tagged
        assert same
        assert "Status: " in str(pulled)

    @shows(IMAGES)
    def test_saved_is_loaded_again(self, sides: Sides[DockerClient], tmp_path: Path) -> None:
        def scenario(side: Docker) -> list[Any]:
            name = f"{side.name()}:v1"
            self.build(side, name)
            file = tmp_path / side.name()
            with file.open("wb") as archive:
                for piece in side.client.images.get(name).save(named=True):
                    archive.write(piece)
            side.client.images.remove(name)
            with file.open("rb") as archive:
                loaded = side.client.images.load(archive)
            output = side.client.containers.run(loaded[0], **options(side))
            return [[image.tags for image in loaded], output]

        assert sides.same(scenario)[1] == b"copied\nhello\n"

    @shows(IMAGES)
    def test_list_remove_and_prune_with_a_label(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            label = side.name()
            image, _ = self.build(side, side.name(), labels={label: "1"})
            listed = side.client.images.list(filters={"label": label})
            side.client.images.remove(image.tags[0], noprune=True)
            self.build(side, name := side.name(), labels={label: "2"})
            side.client.images.remove(name, noprune=True)
            removed = pruned(side.client.images, label=[label], dangling=True)["ImagesDeleted"]
            return [[one.tags for one in listed], len(removed or [])]

        assert sides.same(scenario)[0] != []


class TestVolumesAndNetworks:
    @shows(VOLUMES)
    def test_a_volumes_life(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            label = side.name()
            volume = side.client.volumes.create(name=side.name(), driver="local", labels={**side.labels, label: "1"})
            mount = {volume.name: {"bind": "/data", "mode": "rw"}}
            for command in ("echo kept > /data/file", "cat /data/file"):
                output = side.client.containers.run(
                    IMAGE, ["sh", "-c", command], volumes=mount, remove=True, **options(side)
                )
            listed = [one.name for one in side.client.volumes.list(filters={"label": label})]
            same = side.client.volumes.get(volume.name) == volume
            side.client.volumes.create(name=side.name(), labels={**side.labels, label: "1"})
            volume.remove()
            removed = pruned(side.client.volumes, label=label)["VolumesDeleted"]
            return [output, listed, same, removed]

        output, _, same, removed = sides.same(scenario)
        assert output == b"kept\n"
        assert same
        assert len(removed) == 1

    @shows(VOLUMES)
    def test_a_networks_life(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            label = side.name()
            labels = {**side.labels, label: "1"}
            network = side.client.networks.create(side.name(), driver="bridge", internal=True, labels=labels)
            container = side.client.containers.create(
                IMAGE, ["sleep", "1d"], **options(side, network_mode=None), network=network.name
            )
            container.start()
            network.reload()
            members = [one.name for one in network.containers]
            network.disconnect(container, force=True)
            network.connect(container, aliases=["alias"])
            network.disconnect(container)
            listed = [one.name for one in side.client.networks.list(filters={"label": label})]
            network.remove()
            left = side.client.networks.create(side.name(), internal=True, labels=labels)
            removed = pruned(side.client.networks, label=label)["NetworksDeleted"]
            container.remove(force=True)
            return [members, listed, removed == [left.name]]

        members, listed, removed = sides.same(scenario)
        assert len(members) == len(listed) == 1
        assert removed


class TestLowLevel:
    @shows(LOW)
    def test_from_env_finds_the_engine(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            client = docker.from_env(environment={"DOCKER_HOST": side.host})
            try:
                info = client.info()
                return [client.ping(), client.version(), info["ID"], sorted(info), sorted(client.df())]
            finally:
                client.close()

        assert sides.same(scenario)[0] is True

    @shows(LOW)
    def test_api_client_creates_starts_and_inspects(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[Any]:
            with docker.APIClient(base_url=side.host, version="1.41") as api:
                created = api.create_container(
                    image=IMAGE,
                    command=["sh", "-c", "echo $GREETING"],
                    environment={"GREETING": "hello"},
                    name=side.name(),
                    labels=side.labels,
                    host_config=api.create_host_config(network_mode="none", mem_limit="64m"),
                )
                api.start(created["Id"])
                ended = api.wait(created["Id"])
                inspected = api.inspect_container(created["Id"])
                listed = api.containers(all=True, filters={"id": created["Id"]})
                output = api.logs(created["Id"])
                api.remove_container(created["Id"], v=True)
                return [ended, output, inspected["Config"]["Env"], listed[0]["Command"], created["Warnings"]]

        ended, output, *_ = sides.same(scenario)
        assert ended["StatusCode"] == 0
        assert output == b"hello\n"


class TestErrors:
    @shows(ERRORS)
    def test_have_the_engines_status_and_words(self, sides: Sides[DockerClient]) -> None:
        def scenario(side: Docker) -> list[tuple[str, int | None, str]]:
            client = side.client
            missing = side.name()
            container = client.containers.create(IMAGE, ["true"], **options(side))
            return [
                explained(lambda: client.containers.get(missing)),
                explained(lambda: client.images.get(missing)),
                explained(lambda: client.volumes.get(missing)),
                explained(lambda: client.networks.get(missing)),
                explained(lambda: client.containers.create(IMAGE, name=container.name)),
                explained(lambda: container.exec_run("true")),
                explained(lambda: container.kill()),
                explained(lambda: client.api.exec_start(missing)),
                explained(lambda: client.api.attach(missing)),
                explained(lambda: client.api.attach_socket(missing)),
                explained(lambda: container.put_archive("/no/such", tar_of(a=b""))),
                explained(lambda: container.get_archive("/no/such")),
                explained(lambda: client.containers.run(IMAGE, ["/no/such"], **options(side))),
            ]

        seen = sides.same(scenario)
        assert seen[0] == ("NotFound", 404, seen[0][2])
        assert seen[1][:2] == (ImageNotFound.__name__, 404)
        assert "No such container" in seen[0][2]
        assert [status for _, status, _ in seen[4:10]] == [409, 409, 409, 404, 404, 404]


class TestCrowd:
    @shows(CROWD)
    def test_of_followers_leaves_room_for_an_exec(self, sides: Sides[DockerClient]) -> None:
        followers = 20

        def scenario(side: Docker) -> list[Any]:
            # It lives on: the engine itself may cut followers short at a container's end.
            script = "echo one; until [ -e /go ]; do sleep .02; done; seq 500; sleep 1d"
            container = detached(side, "sh", "-c", script)
            under_way = threading.Barrier(followers + 1)

            def follow(_: int) -> bytes:
                lines = container.logs(stream=True, follow=True)
                seen: bytes = next(lines)
                under_way.wait(30)
                while not seen.endswith(b"\n500\n"):
                    seen += next(lines)
                lines.close()
                return seen

            with ThreadPoolExecutor(followers) as pool:
                logs = [pool.submit(follow, number) for number in range(followers)]
                under_way.wait(30)
                done = container.exec_run(["touch", "/go"])
                return [done, [log.result(30) for log in logs]]

        done, logs = sides.same(scenario)
        assert done == (0, b"")
        assert logs == [b"one\n" + b"".join(b"%d\n" % number for number in range(1, 501))] * followers
