"""The image of the `Containerfile`, on the real engine, run as an operator runs it."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import __version__
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from imaged import HARDENED, Docker, base, container, image, secret_file
from packed import one_file
from service import ROOT, SECRET, signed_head
from wire import Wire

SOCKET = "/var/run/docker.sock"
MIB = 1024 * 1024
STATE = "{{.State.Pid}} {{.State.StartedAt}} {{.State.OOMKilled}} {{.RestartCount}}"


@pytest.fixture(scope="module")
def docker(engine: Engine) -> Docker:
    return Docker(engine.socket)


@pytest.fixture(scope="module")
def built(docker: Docker, direct: EngineDirect, names: Names) -> str:
    return image(docker, direct, names)


def with_engine(docker: Docker) -> list[str]:
    """The engine's socket, and the group that may use it."""
    return [f"--volume={docker.socket}:{SOCKET}", f"--group-add={os.stat(docker.socket).st_gid}"]


@pytest.fixture(scope="module")
def sidecar(docker: Docker, built: str, names: Names, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running container of the image, beside the engine."""
    secret = secret_file(tmp_path_factory.mktemp("secret"))
    mounts = [f"--volume={secret}:/run/secrets/docker-runner:ro"]
    settings = [
        "--env=DOCKER_RUNNER_SHARED_SECRET_FILE=/run/secrets/docker-runner",
        "--env=DOCKER_RUNNER_POLICY=everything",
    ]
    quick = ["--health-interval=1s"]
    with container(docker, names, *HARDENED, *with_engine(docker), *mounts, *settings, *quick, built) as name:
        docker.wait_healthy(name)
        yield name


@pytest.fixture(scope="module")
def url(docker: Docker, sidecar: str) -> str:
    return f"http://{docker.address(sidecar)}:7071"


# What it is.


def test_it_says_how_it_runs(docker: Docker, built: str) -> None:
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", built))
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["7071/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python3", "/docker-runner.pyz", "check", "--health"]
    assert config["Labels"] == {
        "org.opencontainers.image.title": "docker-runner",
        "org.opencontainers.image.description": "The one small process that holds the Docker socket",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": "1.2.3",
        "org.opencontainers.image.revision": "abc",
    }


def test_it_has_the_one_file_and_what_it_unpacks_to(
    docker: Docker, direct: EngineDirect, names: Names, built: str
) -> None:
    """Beside those, the standard library's modules that it uses are compiled, where the base had them not."""
    script = "import os; [print(os.path.join(at, f)) for at, _, files in os.walk('/', onerror=print) for f in files]"
    walk = ["run", "--rm", "--user=0", "--network=none", "--entrypoint=python3"]
    listed = [
        {
            line
            for line in docker(*walk, name, "-B", "-c", script).splitlines()
            if not re.match("/(proc|sys|dev)/", line)
        }
        for name in (base(direct, names), built)
    ]
    added = {path for path in listed[1] - listed[0] if not re.match(r"/usr/local/lib/.*\.pyc", path)}
    unpacked = {path for path in added if path.startswith("/opt/docker-runner/docker-runner.pyz_")}
    locks = {path for path in added if path.startswith("/opt/docker-runner/.")}
    assert added - unpacked - locks == {"/docker-runner.pyz"}
    assert len(locks) == 1
    assert any(path.endswith("/runner.py") for path in unpacked)


def test_it_is_the_file_that_was_built(docker: Docker, built: str, names: Names, tmp_path: Path) -> None:
    name = names()
    docker("create", f"--name={name}", built)
    docker("cp", f"{name}:/docker-runner.pyz", str(tmp_path))
    docker("rm", name)
    assert (tmp_path / "docker-runner.pyz").read_bytes() == one_file().read_bytes()


def test_its_arguments_are_the_commands(docker: Docker, built: str) -> None:
    run = ["run", "--rm", *HARDENED, "--network=none"]
    assert docker(*run, built, "--version") == f"docker-runner {__version__}"
    assert docker(*run, f"--env=DOCKER_RUNNER_SHARED_SECRET={SECRET}", built, "sign", "GET", "/").startswith("-H X-DR-")


def test_it_needs_nothing_to_write_to(docker: Docker, built: str) -> None:
    run = ["run", "--rm", "--read-only", "--network=none"]
    assert docker(*run, built, "--version") == f"docker-runner {__version__}"


# Running, hardened.


def test_it_runs_as_nobody_with_nothing(docker: Docker, sidecar: str) -> None:
    pid = docker("inspect", "--format", "{{.State.Pid}}", sidecar)
    status = dict(re.findall(r"^(\w+):\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    assert status["Uid"].split() == ["65532"] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {0}


def test_check_is_content(docker: Docker, sidecar: str) -> None:
    said = docker("exec", sidecar, "python3", "/docker-runner.pyz", "check")
    assert "ok    engine: version" in said
    assert "FAIL" not in said


def test_the_wire_contract_holds(engine: Engine, url: str) -> None:
    """The suite of the wire protocol, against the container: signatures, starts, execs, errors, streams."""
    suite = ["tests/test_wire_contract.py", "tests/test_wire_workloads.py"]
    settings = {"DOCKER_RUNNER_WIRE_URL": url, "DOCKER_RUNNER_WIRE_SECRET": SECRET, "DOCKER_SOCKET": engine.socket}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite],
        cwd=ROOT,
        env={**kept, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


def test_the_engines_own_api_answers(url: str, direct: EngineDirect) -> None:
    assert Wire(url, SECRET).request("GET", "/version").json == direct.request("GET", "/version").json()


def test_large_bodies_find_room(url: str) -> None:
    """Past what is held in memory a body waits in /tmp until it is verified; this one is refused after that."""
    body = b'{"Image":"' + b"x" * (2 << 20) + b'"}'
    answer = Wire(url, SECRET).request("POST", "/containers/create", body)
    assert answer.status in (400, 404)
    assert "message" in answer.json


def test_without_its_engine_it_stays_well_but_is_not_ready(docker: Docker, built: str, names: Names) -> None:
    settings = [f"--env=DOCKER_RUNNER_SHARED_SECRET={SECRET}", "--health-interval=1s"]
    with container(docker, names, *HARDENED, *settings, built) as name:
        docker.wait_healthy(name)
        assert Wire(f"http://{docker.address(name)}:7071", SECRET).request("GET", "/v1/ready").status == 503


def test_docker_stop_ends_it_in_order(docker: Docker, built: str, names: Names) -> None:
    settings = [f"--env=DOCKER_RUNNER_SHARED_SECRET={SECRET}", "--health-interval=1s"]
    with container(docker, names, *HARDENED, *with_engine(docker), *settings, built) as name:
        docker.wait_healthy(name)
        docker("stop", name)
        assert docker.status(name) == 0


def test_under_load_it_stays_below_its_memory_limit_and_serves_on(
    docker: Docker, built: str, direct: EngineDirect, names: Names, image: str
) -> None:
    """Readers that take nothing of 30 MB each, and more and longer bodies at once than /tmp, which is memory, holds."""
    talker = Containers(direct, names, image).ended("sh", "-c", f"yes {'x' * 9999} | head -n 3000")
    log, upload = f"/containers/{talker}/logs?stdout=1", f"/containers/{talker}/archive?path=/tmp"
    body = bytes(8 * MIB)  # A tar may be zeros alone.
    settings = [f"--env=DOCKER_RUNNER_SHARED_SECRET={SECRET}", "--env=DOCKER_RUNNER_POLICY=everything"]
    limits = ["--memory=160m", "--memory-swap=160m", "--tmpfs=/tmp:size=32m,mode=1777", "--health-interval=1s"]
    hardened = [each for each in HARDENED if "tmpfs" not in each]

    with (
        container(docker, names, *hardened, *limits, *with_engine(docker), *settings, built) as name,
        contextlib.ExitStack() as held,
        ThreadPoolExecutor(12) as pool,
    ):
        docker.wait_healthy(name)
        before = docker("inspect", "--format", STATE, name)
        address = docker.address(name)
        wire = Wire(f"http://{address}:7071", SECRET)

        def put(_: int) -> int:
            with contextlib.suppress(ConnectionError):
                return wire.request("PUT", upload, body).status
            return 503  # Refused, and cut off before all of it was sent.

        for _ in range(30):
            sock = held.enter_context(socket.create_connection((address, 7071), timeout=20))
            sock.sendall(signed_head("GET", log))
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
        assert Counter(pool.map(put, range(36))).keys() == {200, 503}
        assert docker("inspect", "--format", STATE, name) == before
        held.close()
        assert wire.request("GET", "/version").status == 200
        assert wait_until(lambda: wire.request("PUT", upload, body).status == 200, 10)


# The one file on a bare Python, in the same straits.


@pytest.fixture(scope="module")
def bare(docker: Docker, direct: EngineDirect, names: Names) -> list[str]:
    """`docker run` of the one file, mounted, as a user without a name or a home."""
    mounted = f"--volume={one_file()}:/docker-runner.pyz:ro"
    return ["--rm", "--read-only", "--cap-drop=ALL", "--user=65532:65532", mounted, "--network=none"]


def test_the_file_needs_one_folder_to_unpack_in(
    docker: Docker, direct: EngineDirect, names: Names, bare: list[str]
) -> None:
    options = [
        "--tmpfs=/unpacked:exec,uid=65532",
        "--env=SHIV_ROOT=/unpacked",
        f"--env=DOCKER_RUNNER_SHARED_SECRET={SECRET}",
    ]
    command = [base(direct, names), "python3", "/docker-runner.pyz", "check"]
    said = docker("run", *bare, *options, *with_engine(docker), *command)
    assert "ok    engine: version" in said


def test_a_folder_mounted_noexec_is_named(docker: Docker, direct: EngineDirect, names: Names, bare: list[str]) -> None:
    options = ["--tmpfs=/unpacked", "--env=SHIV_ROOT=/unpacked"]
    with pytest.raises(AssertionError, match=r"docker-runner: /unpacked is mounted noexec\. SHIV_ROOT names"):
        docker("run", *bare, *options, base(direct, names), "python3", "/docker-runner.pyz", "--version")


def test_a_root_that_cannot_be_written_is_named(
    docker: Docker, direct: EngineDirect, names: Names, bare: list[str]
) -> None:
    with pytest.raises(AssertionError, match=r"docker-runner: cannot unpack in /\.shiv: Read-only file system\."):
        docker("run", *bare, base(direct, names), "python3", "/docker-runner.pyz", "--version")
