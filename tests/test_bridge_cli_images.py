"""The docker CLI through the bridge: images, from files, from registries, and built; prunes that no filter limits.

Each command runs twice, on the engine and through bridge and runner, with one outcome: see `twice`.
"""

import io
import os
import random
import re
import signal
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridged import Bridge
from conftest import LABEL, EngineDirect, Names, Registry
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from gated import Gate
from service import Runner
from twice import TWIN, Ran, Side, Twice, clis, numbers, progress, sent, through, times, twice

RUN = ("run", "--network=none")
MIB = 1024 * 1024


@pytest.fixture(params=clis(), ids=os.path.dirname)
def docker(request: pytest.FixtureRequest, engine: Engine, bridge: Bridge, names: Names) -> Iterator[Twice]:
    yield from twice(request, request.param, engine, bridge, names)


@pytest.fixture
def build(docker: Twice, names: Names) -> tuple[str, ...]:
    """`docker build` for what the session's end removes."""
    return ("build", "--network=none", "--force-rm", "--label", f"{LABEL}={names.mark}")


def tar_of(**files: bytes) -> bytes:
    """A tar of files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def members(archive: bytes) -> list[tuple[str, int]]:
    """The names and sizes in a tar."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(entry.name, entry.size) for entry in tar.getmembers()]


class TestLocal:
    @through("tag", "images", "image ls", "history", "rmi")
    def test_an_image_is_tagged_listed_and_untagged(self, docker: Twice, image: str) -> None:
        name = docker.name("i")
        assert docker("tag", image, f"{name}:one") == Ran(0, b"")
        listed = docker("images", "--filter", f"reference={name}", but=times)
        assert listed.out.count(b"\n") == 2
        assert docker("image", "ls", "--no-trunc", "--digests", name, but=times).out.count(b"\n") == 2
        assert docker("history", f"{name}:one", but=times).status == 0
        assert docker("rmi", f"{name}:one") == Ran(0, f"Untagged: {name}:one\n".encode())
        assert docker("rmi", f"{name}:one").status == 1
        assert docker("tag", "no-such-image", name).status == 1
        assert docker("tag", image, "NoSuchForm").status == 1

    @through("rmi")
    def test_an_image_in_use_stays(self, docker: Twice, image: str) -> None:
        name = docker.name("i")
        assert docker("import", "-", name, stdin=tar_of(file=b"x")).status == 0
        assert docker("create", "--network=none", "--name", docker.name("c"), name, "x").status == 0
        ran = docker("rmi", name)
        assert ran.status == 1
        assert b"conflict" in ran.err

    @through("export", "export -o")
    def test_export(self, docker: Twice, image: str, tmp_path: Path) -> None:
        name = docker.name("c")
        assert docker("create", "--network=none", "--name", name, image).status == 0

        def script(side: Side) -> tuple[list[tuple[str, int]], bool]:
            file = tmp_path / f"{side.word}.tar"
            assert side("export", "-o", str(file), name) == Ran(0, b"")
            piped = side.raw("export", name)
            assert piped.status == 0
            return members(file.read_bytes()), members(piped.out) == members(file.read_bytes())

        exported, same = docker.each(script)
        assert same
        assert ("bin/sh", 0) in exported

    @through("save", "save -o", "load", "load -i")
    def test_save_and_load(self, docker: Twice, image: str, tmp_path: Path) -> None:
        name = docker.name("i")

        def script(side: Side) -> list[Ran]:
            file = tmp_path / f"{side.word}.tar"
            assert side("import", "-", name, stdin=tar_of(file=side.word.encode() * 100)).status == 0
            saved = side.raw("save", name)
            assert saved.status == 0
            ran = [side("rmi", name), side("load", stdin=saved.out)]
            ran.append(side("save", "-o", str(file), name))
            ran.append(side("rmi", name))
            ran.append(side("load", "-i", str(file)))
            ran.append(side("image", "inspect", "--format={{.RootFS.Layers}}", name))
            return ran

        assert [ran.status for ran in docker.each(script)] == [0] * 6

    @through("import", "import -c", "image inspect")
    def test_import_from_a_file_and_from_input(self, docker: Twice, tmp_path: Path) -> None:
        (tmp_path / "root.tar").write_bytes(tar_of(file=b"content"))
        first, second = docker.name("i"), docker.name("i")
        assert docker("import", str(tmp_path / "root.tar"), first).status == 0
        options = ("-c", 'CMD ["/file"]', "-c", f"LABEL of={TWIN}", "-m", "why")
        assert docker("import", *options, "-", f"{second}:tagged", stdin=tar_of(file=b"content")).status == 0
        form = "--format={{.Comment}} {{.Config.Cmd}} {{.Config.Labels}} {{.Size}}"
        assert docker("image", "inspect", form, f"{second}:tagged").out == b"why [/file] map[of:TWIN] 7\n"
        assert docker("import", "-", stdin=b"this is no tar").status == 1

    @through("load")
    def test_what_cannot_be_loaded(self, docker: Twice) -> None:
        assert docker("load", stdin=b"this is no tar").status == 1
        assert docker("load", stdin=tar_of(file=b"content"), but=numbers).status == 1


class TestRegistry:
    @through("push", "pull", "rmi", "pull -q")
    def test_an_image_is_pushed_and_pulled(self, docker: Twice, registry: Registry) -> None:
        name = f"{registry.address}/{docker.name('i')}"
        pushed, pulled = [], []

        def script(side: Side) -> list[Ran]:
            content = tar_of(file=random.Random(name + side.word).randbytes(MIB))
            assert side.raw("import", "-", name, stdin=content).status == 0
            pushed.append(side("push", name, but=progress))
            assert side("rmi", name).status == 0
            pulled.append(side("pull", name, but=progress))
            again = side("pull", name, but=progress)
            assert side("rmi", name).status == 0
            return [pushed[-1], pulled[-1], again, side("pull", "-q", name), side("pull", name + ":no-such-tag")]

        docker.each(script)
        assert b"Pushed" in pushed[0].out
        assert b"Pull complete" in pulled[0].out
        assert pulled[0].status == pushed[0].status == 0

    @through("pull")
    def test_progress_of_a_pull_is_shown_as_it_comes(self, docker: Twice, registry: Registry) -> None:
        repository = docker.name("i")

        def script(side: Side) -> tuple[int, int]:
            name = f"{registry.address}/{repository}"
            content = tar_of(file=random.Random(name + side.word).randbytes(8 * MIB))
            assert side.raw("import", "-", name, stdin=content).status == 0
            assert side("push", name).status == 0
            assert side("rmi", name).status == 0
            with Gate(registry.address, MIB) as gate:
                with side.terminal("pull", f"{gate.address}/{repository}") as live:
                    live.until(b": Downloading ")
                    gate.open()
                    live.until(b"Pull complete")
                    status = live.wait().status
                return status, side("rmi", f"{gate.address}/{repository}").status

        assert docker.each(script) == (0, 0)

    @through("push")
    def test_progress_of_a_push_is_shown_as_it_comes(self, docker: Twice, image: str) -> None:
        def script(side: Side) -> bytes:
            with socket.create_server(("127.0.0.1", 0)) as silent:
                name = f"127.0.0.1:{silent.getsockname()[1]}/{docker.name('i')}"
                assert side("tag", image, name).status == 0
                with side.start("push", name) as live:
                    live.until(b"The push refers to repository")
                    return live.out.split(b" [")[0]

        docker.each(script)

    @through("pull", "push")
    def test_a_missing_image(self, docker: Twice, registry: Registry) -> None:
        name = f"{registry.address}/no-such-image"
        ran = docker("pull", name)
        assert ran.status == 1
        assert b"manifest unknown" in ran.err or b"not found" in ran.err
        assert docker("push", name).status == 1
        assert docker("run", "--network=none", name).status == 125

    @through("pull", "push")
    def test_a_registry_that_is_down(self, docker: Twice, registry: Registry, image: str) -> None:
        name = f"{registry.address}/{docker.name('i')}"
        assert docker("tag", image, name).status == 0
        registry.stop()
        try:
            ran = docker("pull", name)
            assert ran.status == 1
            assert b"connection refused" in ran.err
            assert docker("push", name, but=progress).status == 1
        finally:
            registry.start()

    @through("login", "logout", "push")
    def test_with_credentials(self, docker: Twice, registry: Registry) -> None:
        name = f"{registry.address}/{docker.name('i')}"
        ran = docker("login", "-u", "somebody", "--password-stdin", registry.address, stdin=b"a-password")
        assert ran.status == 0
        assert b"Login Succeeded" in ran.out
        assert docker("import", "-", name, stdin=tar_of(file=name.encode())).status == 0
        assert docker("push", name, but=progress).status == 0
        assert docker("logout", registry.address).status == 0


class TestBuild:
    @through("build -t")
    def test_a_context_on_disk_with_arguments(
        self, docker: Twice, build: tuple[str, ...], image: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("from the context\n")
        (tmp_path / "left out").write_bytes(bytes(MIB))
        (tmp_path / ".dockerignore").write_text("left out\nDockerfile*\n")
        name = docker.name("i")

        def script(side: Side) -> list[Ran]:
            dockerfile = tmp_path / f"Dockerfile-{side.word}"
            dockerfile.write_text(
                f"FROM {image}\nLABEL of={side.word}\nARG WHO=nobody\nCOPY file /copied\n"
                "RUN echo for $WHO >>/copied\nCMD cat /copied\n"
            )
            what = ("-t", name, "--build-arg", f"WHO={TWIN}", "-f", str(dockerfile), str(tmp_path))
            return [
                side(*build, "--no-cache", *what, but=sent),
                side(*RUN, "--rm", name),
                side(*build, *what, but=sent),
            ]

        built, run, again = docker.each(script)
        assert built.status == 0
        assert b"Step 6/7" in built.out
        assert b"Successfully tagged" in built.out
        assert run == Ran(0, b"from the context\nfor TWIN\n")
        assert again.out.count(b"Using cache") == 6

    @through("build -q")
    def test_a_dockerfile_on_input(self, docker: Twice, build: tuple[str, ...], image: str) -> None:
        dockerfile = f"FROM {image}\nLABEL of={TWIN}\n".encode()
        assert docker(*build, "-q", "-", stdin=dockerfile).out.startswith(b"sha256:ID1.")

    @through("build -t")
    def test_a_context_on_input(self, docker: Twice, build: tuple[str, ...], tmp_path: Path) -> None:
        name = docker.name("i")
        context = tar_of(Dockerfile=b"FROM scratch\nCOPY file /\n", file=random.Random(5).randbytes(5 * MIB))
        assert docker(*build, "--no-cache", "-t", name, "-", stdin=context).status == 0
        (tmp_path / "file").write_bytes(b"content")
        dockerfile = f"FROM scratch\nLABEL of={TWIN}\nCOPY file /\n".encode()
        assert docker(*build, "-f", "-", str(tmp_path), stdin=dockerfile, but=sent).status == 0

    @through("build")
    def test_a_step_that_fails(self, docker: Twice, build: tuple[str, ...], image: str) -> None:
        ran = docker(*build, "-", stdin=f"FROM {image}\nRUN echo {TWIN} >&2; exit 7\n".encode())
        assert ran.status == 7
        assert b"returned a non-zero code: 7" in ran.err

    @through("build")
    @pytest.mark.parametrize(
        "dockerfile", [b"NONSENSE\n", b"", b"FROM no-such.invalid/image\n", b"FROM scratch\nCOPY a /\n"]
    )
    def test_what_cannot_be_built(self, docker: Twice, build: tuple[str, ...], dockerfile: bytes) -> None:
        assert docker(*build, "-", stdin=dockerfile).status == 1

    @through("build")
    def test_output_comes_while_a_step_runs(self, docker: Twice, build: tuple[str, ...], image: str) -> None:
        dockerfile = f"FROM {image}\nRUN echo runs; while [ ! -e /go ]; do sleep 0.02; done\n".encode()

        def script(side: Side) -> Ran:
            with side.start(*build, "--no-cache", "-") as live:
                live.send(dockerfile)
                live.end_input()
                live.until(b"runs\n")
                found = re.search(rb"Running in ([0-9a-f]{12})", live.out)
                assert found is not None
                assert side("exec", found[1].decode(), "touch", "/go").status == 0
                return live.wait()

        assert docker.each(script).status == 0

    @through("build")
    def test_a_build_that_is_interrupted_ends(self, docker: Twice, build: tuple[str, ...], image: str) -> None:
        dockerfile = f"FROM {image}\nRUN echo runs; sleep 1d\n".encode()

        def script(side: Side) -> int:
            with side.start(*build, "--no-cache", "-") as live:
                live.send(dockerfile)
                live.end_input()
                live.until(b"runs\n")
                found = re.search(rb"Running in ([0-9a-f]{12})", live.out)
                assert found is not None
                live.signal(signal.SIGINT)
                status = live.wait().status
                gone = wait_until(lambda: side("container", "inspect", found[1].decode()).status == 1, 20)
                assert gone, "the engine still builds"
                return status

        docker.each(script)


class TestPrunesOfAll:
    """On an engine that nobody else uses: no filter limits what these do to the build cache."""

    @pytest.fixture(params=clis(), ids=os.path.dirname)
    def alone(
        self, request: pytest.FixtureRequest, private_engine: PrivateEngine, names: Names, short_folder: Path
    ) -> Iterator[Twice]:
        direct = EngineDirect(private_engine.socket)
        for kind in ("containers", "networks", "images", "build"):  # What tests before this one left there.
            assert direct.request("POST", f"/{kind}/prune").status_code == 200
        with (
            Runner(private_engine.socket) as runner,
            Bridge(runner.url, f"unix://{short_folder}/alone.sock") as bridge,
        ):
            yield from twice(request, request.param, private_engine, bridge, names)

    @through("system prune", "builder prune")
    def test_prunes_without_a_filter(self, alone: Twice) -> None:
        name = alone.name("v")

        def script(side: Side) -> list[Ran]:
            return [
                side("system", "prune", "-f"),
                side("volume", "create", name),
                side("import", "-", stdin=tar_of(file=TWIN.encode())),
                side("system", "prune", "-f", "--volumes"),
                side("builder", "prune", "-f"),
            ]

        ran = alone.each(script)
        assert [ran.status for ran in ran] == [0] * 5
        assert name.encode() in ran[3].out
        assert b"deleted: sha256:ID1." in ran[3].out
