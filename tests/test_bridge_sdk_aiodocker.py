"""aiodocker, used as its documentation shows, at the engine and at the bridge."""

import asyncio
import io
import json
import tarfile
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer
from aiodocker.stream import Stream

from bridged import Bridge
from comparison import shape
from conftest import IMAGE, Names, Registry
from dev.engine import Engine
from works import Side, Sides, row, shows

CONTAINERS = row("aiodocker: containers", "`create`, `run`, `start`, `log` (followed too), `wait`, `stats`, `delete`")
STREAMS = row("aiodocker: streams", "`exec` (with stdin, `tty`, `detach`) and `attach` (with stdin), read and written")
FILES = row("aiodocker: files", "`put_archive`, `get_archive`; volumes and networks")
EVENTS = row("aiodocker: events", "`events.subscribe` and `stop`; `version`, `system.info`")
IMAGES = row(
    "aiodocker: images",
    "images: `build`, `pull`, `push` (streamed too), `export_image`, `import_image`, `tag`",
)
ERRORS = row("aiodocker: errors", "`DockerError` with the engine's status and message")

Scenario: TypeAlias = Callable[[Docker, Side[None]], Awaitable[Any]]
Same: TypeAlias = Callable[..., Any]


@pytest.fixture(scope="module")
def same(engine: Engine, bridge: Bridge, names: Names) -> Same:
    """Runs a scenario at both sides, each time with a fresh client in an event loop of its own."""
    sides: Sides[None] = Sides(f"unix://{engine.socket}", bridge.host, names, lambda _: None)

    def same(scenario: Scenario, view: Callable[[Any], object] = lambda seen: seen) -> Any:
        async def run(side: Side[None]) -> Any:
            async with Docker(url=side.host) as docker:
                return await scenario(docker, side)

        return sides.same(lambda side: asyncio.run(run(side)), view)

    return same


def config(side: Side[None], *command: str, **more: Any) -> dict[str, Any]:
    usual = {"Image": IMAGE, "Cmd": command or ["sleep", "1d"], "Labels": side.labels, "StopSignal": "SIGKILL"}
    return {**usual, "HostConfig": {"NetworkMode": "none"}, **more}


async def running(docker: Docker, side: Side[None], *command: str, **more: Any) -> DockerContainer:
    return await docker.containers.run(config=config(side, *command, **more), name=side.name())


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


async def read_to_end(stream: Stream) -> list[tuple[int, bytes]]:
    """All that a stream gives, the pieces of one kind put together."""
    output = {1: b"", 2: b""}
    while (message := await stream.read_out()) is not None:
        output[message.stream] += message.data
    return list(output.items())


async def read_until(stream: Stream, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        message = await stream.read_out()
        assert message is not None, seen
        seen += message.data
    return seen


async def told(call: Awaitable[object]) -> tuple[int, str]:
    """The error of a call: status and message."""
    with pytest.raises(DockerError) as caught:
        await call
    return caught.value.status, caught.value.message


class TestContainers:
    @shows(CONTAINERS)
    def test_create_start_log_wait_delete(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            script = "echo out; echo err >&2; exit 3"
            container = await docker.containers.create_or_replace(side.name(), config(side, "sh", "-c", script))
            await container.start()
            ended = await container.wait()
            listed = await docker.containers.list(all=1, filters=json.dumps({"id": [container.id]}))
            seen = [ended, await container.log(stdout=True), await container.log(stderr=True), len(listed)]
            shown = await container.show()
            await container.delete(v=True)
            return [*seen, shown["State"]["ExitCode"]]

        ended, out, err, listed, status = same(scenario)
        assert ended["StatusCode"] == status == 3
        assert (out, err, listed) == (["out\n"], ["err\n"], 1)

    @shows(CONTAINERS)
    def test_log_followed_comes_as_it_is_written(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            script = "echo one; until [ -e /go ]; do sleep .02; done; echo two; read x"
            container = await running(docker, side, "sh", "-c", script, OpenStdin=True)
            log = container.log(stdout=True, follow=True)
            first = await anext(log)
            execution = await container.exec(["touch", "/go"])
            async with execution.start() as stream:
                await read_to_end(stream)
            return [first, await anext(log)]

        assert same(scenario) == ["one\n", "two\n"]

    @shows(CONTAINERS)
    def test_stats_one_and_streamed(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            first, one = await asyncio.gather(anext(aiter(container.stats())), container.stats(stream=False))
            return [first, *one]

        assert len(same(scenario, shape)) == 2

    @shows(CONTAINERS)
    def test_of_which_the_state_is_changed(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            top = await container.top(ps_args="-o pid,comm")
            seen = []
            for step, state in (
                (container.pause, "paused"),
                (container.unpause, "running"),
                (lambda: container.restart(t=0), "running"),
                (lambda: container.stop(t=0), "exited"),
                (lambda: container.rename(side.name()), "exited"),
            ):
                await step()
                while (await container.show())["State"]["Status"] != state:
                    pass  # the engine says so a little later than it does it
                seen.append(state)
            name = side.name()
            await container.commit(repository=name, tag="v1", message="said")
            committed = await docker.images.inspect(f"{name}:v1")
            return [seen, [process[1] for process in top["Processes"]], committed["Comment"]]

        assert same(scenario) == [["paused", "running", "running", "exited", "exited"], ["sleep"], "said"]


class TestStreams:
    @shows(STREAMS)
    def test_exec_gives_output_and_status(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            execution = await container.exec(["sh", "-c", "echo out; echo err >&2; exit 4"])
            async with execution.start() as stream:
                output = await read_to_end(stream)
            return [output, (await execution.inspect())["ExitCode"]]

        assert same(scenario) == [[(1, b"out\n"), (2, b"err\n")], 4]

    @shows(STREAMS)
    def test_exec_with_stdin_is_a_conversation(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            script = "read x; echo $((x * 7)); head -c 100000 | wc -c; read x; exit $x"
            execution = await container.exec(["sh", "-c", script], stdin=True)
            async with execution.start(detach=False) as stream:
                await stream.write_in(b"6\n")
                answer = await read_until(stream, b"\n")
                await stream.write_in(b"x" * 100_000)
                count = await read_until(stream, b"\n")
                await stream.write_in(b"5\n")
                rest = await read_to_end(stream)
            return [answer, count, rest, (await execution.inspect())["ExitCode"]]

        assert same(scenario) == [b"42\n", b"100000\n", [(1, b""), (2, b"")], 5]

    @shows(STREAMS)
    def test_exec_on_a_terminal_has_its_size(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            execution = await container.exec(["sh", "-c", "read x; stty size"], stdin=True, tty=True)
            async with execution.start() as stream:
                await stream.write_in(b"")
                await execution.resize(h=33, w=77)
                await stream.write_in(b"\n")
                return (await read_to_end(stream))[0][1].strip()

        assert same(scenario) == b"33 77"

    @shows(STREAMS)
    def test_exec_detached_runs(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await running(docker, side)
            execution = await container.exec(["touch", "/there"])
            answer = await execution.start(detach=True)
            waits = await container.exec(["sh", "-c", "until [ -e /there ]; do sleep .02; done; echo there"])
            async with waits.start() as stream:
                return [answer, await read_to_end(stream)]

        assert same(scenario) == [b"", [(1, b"there\n"), (2, b"")]]

    @shows(STREAMS)
    def test_attach_takes_stdin_and_gives_the_output(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            script = "read x; echo got $x; echo err >&2; exit 6"
            container = await docker.containers.create(
                config(side, "sh", "-c", script, OpenStdin=True), name=side.name()
            )
            async with container.attach(stdin=True, stdout=True, stderr=True) as stream:
                await container.start()
                await stream.write_in(b"this\n")
                output = await read_to_end(stream)
            return [output, (await container.wait())["StatusCode"]]

        assert same(scenario) == [[(1, b"got this\n"), (2, b"err\n")], 6]

    @shows(STREAMS)
    def test_attach_to_a_terminal(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await docker.containers.create(config(side, "cat", OpenStdin=True, Tty=True), name=side.name())
            async with container.attach(stdin=True, stdout=True, stderr=True) as stream:
                await container.start()
                await container.resize(h=20, w=60)
                await stream.write_in(b"hello\n\x04")
                return await read_to_end(stream)

        assert same(scenario)[0] == (1, b"hello\r\nhello\r\n")


class TestFiles:
    @shows(FILES)
    def test_go_in_and_come_out_whole(self, same: Same) -> None:
        content = bytes(range(256)) * 4096

        async def scenario(docker: Docker, side: Side[None]) -> Any:
            container = await docker.containers.create(config(side), name=side.name())
            await container.put_archive("/tmp", tar_of(file=content))
            with await container.get_archive("/tmp/file") as archive:
                file = archive.extractfile("file")
                assert file is not None
                return file.read()

        assert same(scenario) == content

    @shows(FILES)
    def test_volumes_and_networks(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            label = side.name()
            labels = {**side.labels, label: "1"}
            volume = await docker.volumes.create({"Name": side.name(), "Labels": labels})
            volumes = await docker.volumes.list(filters={"label": label})
            shown = await volume.show()
            await volume.delete()
            network = await docker.networks.create({"Name": side.name(), "Internal": True, "Labels": labels})
            container = await docker.containers.create(config(side, HostConfig={}), name=side.name())
            await network.connect({"Container": container.id})
            await network.disconnect({"Container": container.id})
            networks = await docker.networks.list(filters={"label": label})
            deleted = await network.delete()
            await container.delete()
            return [shown["Name"], len(volumes["Volumes"]), len(networks), deleted]

        assert same(scenario)[1:] == [1, 1, True]


class TestEvents:
    @shows(EVENTS)
    def test_come_to_a_subscriber(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            name = side.name()
            # What happens before the engine listens comes too, for `since`.
            subscriber = docker.events.subscribe(since="0", filters=json.dumps({"container": [name]}))
            container = await docker.containers.create(config(side, "true"), name=name)
            await container.start()
            await container.wait()
            await container.delete()
            seen = []
            while "destroy" not in seen:
                seen.append((await subscriber.get())["Action"])
            await docker.events.stop()
            return [seen, await subscriber.get()]

        assert same(scenario) == [["create", "start", "die", "destroy"], None]

    @shows(EVENTS)
    def test_version_and_info(self, same: Same) -> None:
        async def scenario(docker: Docker, _: Side[None]) -> Any:
            info = await docker.system.info()
            return [await docker.version(), info["ID"], sorted(info)]

        assert same(scenario)[0]["ApiVersion"]


class TestImages:
    @shows(IMAGES)
    def test_build_tag_export_import_delete(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            name = side.name()
            dockerfile = f"FROM {IMAGE}\nLABEL a=b\nCOPY said /\n".encode()
            log = await docker.images.build(
                fileobj=io.BytesIO(tar_of(Dockerfile=dockerfile, said=b"hello\n")),
                encoding="identity",
                tag=name,
                labels=side.labels,
                nocache=True,
            )
            await docker.images.tag(name, repo=side.name(), tag="v2")
            history = await docker.images.history(name)
            async with docker.images.export_image(name) as exported:
                archive = await exported.read()
            await docker.images.delete(name, noprune=True)
            loaded = [line async for line in docker.images.import_image(archive, stream=True)]
            container = await running(docker, side, "cat", "/said", Image=name)
            await container.wait()
            return [log, len(history), loaded[-1], await container.log(stdout=True)]

        seen = same(scenario)
        assert seen[-1] == ["hello\n"]
        assert "Successfully built" in str(seen[0])

    @shows(IMAGES)
    def test_pull_and_push_show_their_progress(self, same: Same, registry: Registry) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            name = f"{registry.address}/{side.name()}"
            await docker.images.tag(IMAGE, repo=name, tag="latest")
            auth = {"username": "nobody", "password": "nothing", "email": "nobody@nowhere"}
            pushed = [line async for line in docker.images.push(name, auth=auth, stream=True)]
            await docker.images.delete(name)
            streamed = [line async for line in docker.images.pull(name, tag="latest", auth=auth, stream=True)]
            pulled = await docker.images.pull(name, tag="latest")
            await docker.images.delete(name)
            return [pushed[0], pushed[-1], streamed[-1], pulled[-1]]

        assert "Image is up to date" in str(same(scenario)[-1])


class TestErrors:
    @shows(ERRORS)
    def test_have_the_engines_status_and_message(self, same: Same) -> None:
        async def scenario(docker: Docker, side: Side[None]) -> Any:
            missing = side.name()
            container = await docker.containers.create(config(side), name=side.name())
            name = side.name()
            await docker.containers.create(config(side), name=name)

            async def attach() -> None:
                async with docker.containers.container(missing).attach(stdout=True):
                    pass

            return [
                await told(docker.containers.get(missing)),
                await told(docker.images.inspect(missing)),
                await told(docker.volumes.get(missing)),
                await told(docker.networks.get(missing)),
                await told(docker.containers.create(config(side), name=name)),
                await told(docker.containers.create(config(side, Image=missing))),
                await told(container.exec(["true"])),
                await told(container.kill()),
                await told(container.get_archive("/no/such")),
                await told(attach()),
            ]

        seen = same(scenario)
        assert [status for status, _ in seen] == [404, 404, 404, 404, 409, 404, 409, 409, 404, 404]
        assert "No such container" in seen[0][1]
