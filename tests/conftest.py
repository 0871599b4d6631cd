"""What the tests stand on: a real engine, a real registry, names of our own, and nothing left behind.

Nothing here is a stand-in. An engine that answers at `DOCKER_HOST` or `/var/run/docker.sock` is used with care (own
names, all removed at the end); where none answers, or with `DOCKER_RUNNER_TEST_ENGINE=private`, one is started for the
session. A session that can have no engine fails, and says why; it never skips.
"""

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import requests_unixsocket

from bridged import Bridge
from dev import SetupError, busybox, find_program, wait_until
from dev.engine import Engine, find_engine
from dev.private_engine import PrivateEngine
from service import Runner
from wire import Wire

IMAGE = f"docker-runner-test-{secrets.token_hex(4)}/busybox:latest"
"""Of this session alone: it is removed at its end, and another may share the engine."""
LABEL = "docker-runner.test"


class EngineDirect:
    """The engine asked directly, to compare its answers with the runner's."""

    def __init__(self, socket_path: str) -> None:
        self.session = requests_unixsocket.Session()
        self.base_url = f"http+unix://{quote(socket_path, safe='')}"

    def request(self, method: str, target: str, **kw: Any) -> requests.Response:
        """One request for `target` (path and query). Takes what requests takes; redirects are not followed."""
        options = {"allow_redirects": False, "timeout": 60, **kw}
        response: requests.Response = self.session.request(method, self.base_url + target, **options)
        return response


class Registry:
    """A registry of our own on a free loopback port; `address` is its host and port, as image names begin with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        """Starts it; again at the same address, with the same content, after a `stop`."""
        program = find_program("docker-registry")
        if program is None:
            pytest.fail("docker-registry is missing: apt-get install --no-install-recommends docker-registry", False)
        fixed = bool(self.address)
        for _ in range(5):  # somebody else may take the port between our look and the registry's bind
            if not fixed:
                self.address = f"127.0.0.1:{free_port()}"
            if self._try(program):
                return
        pytest.fail(f"docker-registry did not start at {self.address}: {(self._folder / 'log').read_text()}", False)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _try(self, program: str) -> bool:
        config = self._folder / "config.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: '{self._folder}/data'}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        with (self._folder / "log").open("wb") as log:
            process = subprocess.Popen(tied([program, "serve", str(config)]), stdout=log, stderr=log)
        if wait_until(lambda: process.poll() is not None or self._answers(), 20) and process.poll() is None:
            self._process = process
            return True
        process.kill()
        process.wait()
        return False

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            return False


class Names:
    """Names that nobody else uses. What bears one, or the labels, is removed from the engine at the session's end."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(4)
        self.prefix = f"dr-test-{self.mark}-"
        self.labels = {LABEL: self.mark}
        self._numbers = itertools.count(1)

    def __call__(self, kind: str = "") -> str:
        """A fresh name: for a container, a volume, a network, or (all lower case) an image's repository."""
        return f"{self.prefix}{kind}{next(self._numbers)}"

    def remove_all(self, direct: EngineDirect) -> None:
        for container in direct.request("GET", "/containers/json?all=1").json():
            if self._ours(container, container["Names"]):
                direct.request("DELETE", f"/containers/{container['Id']}?force=1&v=1")
        for network in direct.request("GET", "/networks").json():
            if self._ours(network, [network["Name"]]):
                direct.request("DELETE", f"/networks/{network['Id']}")
        for volume in direct.request("GET", "/volumes").json()["Volumes"] or []:
            if self._ours(volume, [volume["Name"]]):
                direct.request("DELETE", f"/volumes/{quote(volume['Name'], safe='')}?force=1")
        for image in direct.request("GET", "/images/json").json():
            tags = [tag for tag in [*(image["RepoTags"] or []), *(image["RepoDigests"] or [])] if self.prefix in tag]
            labelled = [image["Id"]] if self._ours(image, []) else []
            for name in [*tags, *labelled]:
                direct.request("DELETE", f"/images/{quote(name, safe=':@')}?force=1")

    def _ours(self, found: dict[str, Any], names: list[str]) -> bool:
        return (found.get("Labels") or {}).get(LABEL) == self.mark or any(self.prefix in name for name in names)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listened at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tied(command: list[str]) -> list[str]:
    """The command, to be ended by the kernel when this process ends, whatever ends it."""
    return ["setpriv", "--pdeathsig", signal.Signals.SIGTERM.name.removeprefix("SIG"), *command]


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path is short enough for Unix sockets anywhere below it."""
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def engine(short_folder: Path) -> Iterator[Engine]:
    """The engine of the session: `socket` is its path; `private` says that it was started for this session."""
    found = None if os.environ.get("DOCKER_RUNNER_TEST_ENGINE") == "private" else find_engine(os.environ)
    if found is not None:
        yield found
    else:
        yield from _private_engine(short_folder / "engine")


@pytest.fixture(scope="session")
def restartable_engine(short_folder: Path) -> Iterator[PrivateEngine]:
    yield from _private_engine(short_folder / "restartable")


@pytest.fixture
def private_engine(restartable_engine: PrivateEngine) -> PrivateEngine:
    """An engine of our own, running, to kill(), start() and stop(). It is not the session's `engine`."""
    restartable_engine.start()
    return restartable_engine


@pytest.fixture
def own_box(private_engine: PrivateEngine) -> Iterator[str]:
    """A container that has said something, on an engine of our own that the test may kill."""
    busybox.import_image(private_engine, "killed/busybox:latest")
    ask = EngineDirect(private_engine.socket).request
    command = ["sh", "-c", "echo said; exec sleep 1d"]
    create = {"Image": "killed/busybox:latest", "Cmd": command, "HostConfig": {"NetworkMode": "none"}}
    name: str = ask("POST", "/containers/create", json=create).json()["Id"]
    assert ask("POST", f"/containers/{name}/start").status_code == 204
    yield name
    private_engine.start()
    ask("DELETE", f"/containers/{name}?force=1")


def _private_engine(home: Path) -> Iterator[PrivateEngine]:
    engine = PrivateEngine(home, tied=True)
    try:
        engine.start()
        yield engine
    except SetupError as error:
        pytest.fail(f"the tests need a Docker Engine: none answers, and none could be started: {error}", False)
    finally:
        engine.remove()


@pytest.fixture(scope="session")
def direct(engine: Engine) -> EngineDirect:
    return EngineDirect(engine.socket)


@pytest.fixture(scope="session")
def image(engine: Engine, direct: EngineDirect) -> Iterator[str]:
    """The name of a busybox image on the engine."""
    busybox.import_image(engine, IMAGE)
    yield IMAGE
    direct.request("DELETE", f"/images/{IMAGE}?force=1")


@pytest.fixture(scope="session")
def names(direct: EngineDirect, image: str) -> Iterator[Names]:
    """Fresh names and labels for what a test makes on the engine; all of it goes at the end, before the image does."""
    names = Names()
    try:
        yield names
    finally:
        names.remove_all(direct)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A running registry. A test that stops it starts it again."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    try:
        registry.start()
        yield registry
    finally:
        registry.stop()


@pytest.fixture(scope="session")
def runner(engine: Engine) -> Iterator[Runner]:
    """The runner in front of the session's engine, with its default settings."""
    with Runner(engine.socket) as running:
        yield running


@pytest.fixture(scope="session")
def bridge(runner: Runner, short_folder: Path) -> Iterator[Bridge]:
    """A bridge on a Unix socket in front of the runner: `host` is what `DOCKER_HOST` takes."""
    with Bridge(runner.url, f"unix://{short_folder}/bridge.sock") as running:
        yield running


@pytest.fixture(scope="session")
def wire(request: pytest.FixtureRequest) -> Wire:
    """The implementation that the wire contract is tested on: the one named by the environment, else the runner."""
    url, secret = os.environ.get("DOCKER_RUNNER_WIRE_URL"), os.environ.get("DOCKER_RUNNER_WIRE_SECRET")
    if url and secret:
        return Wire(url, secret)
    runner: Runner = request.getfixturevalue("runner")
    return Wire(runner.url, runner.secret)


@pytest.fixture(scope="session")
def start(wire: Wire, image: str, names: Names) -> Callable[..., str]:
    """Starts a container that sleeps, by `/v1/containers/start`; the fields given go before. Returns its id."""

    def start(**fields: Any) -> str:
        usual = {"image": image, "cmd": ["sleep", "1000000"], "networkMode": "none", "autoRemove": False}
        labels = {**names.labels, **fields.pop("labels", {})}
        reply = wire.post("/v1/containers/start", **{**usual, **fields, "labels": labels})
        assert reply.status == 200, reply.body
        container: str = reply.json["containerId"]
        return container

    return start


@pytest.fixture(scope="session")
def box(start: Callable[..., str]) -> str:
    """A running container, for tests that leave it as it is."""
    return start()


@pytest.fixture(scope="session")
def stopped_box(wire: Wire, start: Callable[..., str]) -> str:
    """A container whose process has ended."""
    container = start()
    assert wire.post("/v1/containers/stop", containerId=container, timeoutSec=0).status == 204
    return container
