"""`POST /v1/images/ensure`: what is present is not pulled, what is pulled is pulled right, and every failure is told.

The registries are real ones on loopback, one of them with credentials; a scripted engine gives what no engine gives on
demand.
"""

import base64
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from answers import told
from conftest import EngineDirect, Names, Registry, free_port, tied
from dev import find_program, wait_until
from scripted import Peer, ScriptedEngine, chunked
from service import Runner
from wire import Connection, Feed, Reply, Wire, compact

ENSURE = "/v1/images/ensure"
ARCHITECTURE = "linux/amd64"
OTHER_ARCHITECTURE = "linux/arm64"
USER, PASSWORD = "somebody", "right-password"
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuuBO.kmgTJhdt40M5ZyHgFmcpBdUb9aS.\n"
"""bcrypt of the password."""


def as_registry_auth(auth: dict[str, str]) -> dict[str, str]:
    return {"X-Registry-Auth": base64.urlsafe_b64encode(compact(auth)).decode()}


class PrivateRegistry:
    """A registry that asks for credentials. `folder` holds its blobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.auth = {"username": USER, "password": PASSWORD, "serveraddress": self.address}
        program = find_program("docker-registry")
        assert program is not None
        (folder / "htpasswd").write_text(HTPASSWD)
        (folder / "config.yml").write_text(
            "version: 0.1\n"
            "log: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: '{folder}/data'}}}}\n"
            f"auth: {{htpasswd: {{realm: tests, path: '{folder}/htpasswd'}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                tied([program, "serve", str(folder / "config.yml")]), stdout=log, stderr=log
            )
        assert wait_until(self._asks_for_credentials, 20), (folder / "log").read_text()

    def _asks_for_credentials(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False
        return False

    def blobs(self) -> set[Path]:
        """The files of its blobs."""
        return set(self.folder.glob("data/docker/registry/v2/blobs/sha256/*/*/data"))


@pytest.fixture(scope="module")
def private_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRegistry]:
    registry = PrivateRegistry(tmp_path_factory.mktemp("private-registry"))
    try:
        yield registry
    finally:
        registry.process.terminate()
        registry.process.wait()


class Images:
    """Images on the engine, made and looked at directly."""

    def __init__(self, direct: EngineDirect, names: Names, image: str) -> None:
        self._direct = direct
        self._names = names
        self._image = image

    def publish(self, address: str, *tags: str, auth: dict[str, str] | None = None, content: bytes = b"") -> str:
        """An image of its own in a registry, and not on the engine; returns its repository.

        `content` is a tar: a layer that the engine has not.
        """
        repository = f"{address}/{self._names('image')}"
        body = {"Image": self._image, "Labels": {**self._names.labels, "is": repository}}
        container = self._direct.request("POST", "/containers/create", json=body).json()["Id"]
        if content:
            self.do("PUT", f"/containers/{container}/archive?path=/", 200, data=content)
        for tag in tags:
            self.do("POST", f"/commit?container={container}&repo={repository}&tag={tag}", 201)
            pushed = self.do("POST", f"/images/{repository}/push?tag={tag}", 200, headers=as_registry_auth(auth or {}))
            assert "error" not in pushed
        self.do("DELETE", f"/containers/{container}", 204)
        for tag in tags:
            self.remove(f"{repository}:{tag}")
        return repository

    def digest(self, name: str) -> str:
        """The digest that an image of the engine has in its registry."""
        (digest,) = self._direct.request("GET", f"/images/{name}/json").json()["RepoDigests"]
        return str(digest).partition("@")[2]

    def has(self, name: str) -> bool:
        return self._direct.request("GET", f"/images/{name}/json").status_code == 200

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository that the engine has."""
        tags = [tag for image in self._direct.request("GET", "/images/json").json() for tag in image["RepoTags"] or []]
        return sorted(tag.rpartition(":")[2] for tag in tags if tag.startswith(f"{repository}:"))

    def remove(self, name: str) -> None:
        self.do("DELETE", f"/images/{name}?force=1", 200)

    def do(self, method: str, target: str, status: int, **more: Any) -> str:
        answer = self._direct.request(method, target, **more)
        assert answer.status_code == status, answer.text
        return answer.text


@pytest.fixture(scope="module")
def images(direct: EngineDirect, names: Names, image: str) -> Images:
    return Images(direct, names, image)


@pytest.fixture(scope="module")
def asking(runner: Runner) -> Wire:
    return Wire(runner.url, runner.secret)


def ensure(wire: Wire, image: str, **fields: Any) -> Reply:
    return wire.post(ENSURE, image=image, **fields)


def progress(wire: Wire, **fields: Any) -> list[Any]:
    """The messages of an ensure that is asked for as a stream."""
    with wire.open("POST", ENSURE, compact(fields), {"Accept": "text/event-stream"}) as reply:
        assert (reply.status, reply.header("content-type")) == (200, "text/event-stream")
        return list(Feed(reply))


class TestPresent:
    def test_by_tag_id_and_without_a_tag_nothing_is_pulled(
        self, asking: Wire, images: Images, registry: Registry, direct: EngineDirect
    ) -> None:
        repository = images.publish(registry.address, "latest", "2")
        assert ensure(asking, repository).status == 204
        assert ensure(asking, f"{repository}:2").status == 204
        digest = images.digest(repository)
        id_ = direct.request("GET", f"/images/{repository}/json").json()["Id"]
        registry.stop()
        try:
            for name in (repository, f"{repository}:2", f"{repository}:latest", f"{repository}@{digest}", id_):
                reply = ensure(asking, name)
                assert (reply.status, reply.body) == (204, b"")
            assert ensure(asking, f"{repository}:3").status == 500
            assert ensure(asking, repository, platform=ARCHITECTURE).status == 500
        finally:
            registry.start()
        assert ensure(asking, f"{repository}:3").status == 404

    def test_as_a_stream_it_is_only_an_end(self, asking: Wire, image: str) -> None:
        assert progress(asking, image=image) == [{"type": "end"}]


class TestPull:
    def test_without_a_tag_is_latest_and_nothing_else(self, asking: Wire, images: Images, registry: Registry) -> None:
        repository = images.publish(registry.address, "latest", "old")
        assert ensure(asking, repository).status == 204
        assert images.tags(repository) == ["latest"]

    def test_by_tag(self, asking: Wire, images: Images, registry: Registry) -> None:
        repository = images.publish(registry.address, "latest", "old")
        assert ensure(asking, f"{repository}:old").status == 204
        assert images.tags(repository) == ["old"]

    @pytest.mark.parametrize("tag", ["", ":1"])
    def test_by_digest(self, asking: Wire, images: Images, registry: Registry, tag: str) -> None:
        repository = images.publish(registry.address, "1")
        assert ensure(asking, f"{repository}:1").status == 204
        digest = images.digest(f"{repository}:1")
        images.remove(f"{repository}:1")
        assert not images.has(f"{repository}@{digest}")
        assert ensure(asking, f"{repository}{tag}@{digest}").status == 204
        assert images.has(f"{repository}@{digest}")
        assert images.tags(repository) == []

    def test_with_a_platform_it_is_pulled_though_present(
        self, asking: Wire, images: Images, registry: Registry
    ) -> None:
        repository = images.publish(registry.address, "1")
        for _ in range(2):
            messages = progress(asking, image=f"{repository}:1", platform=ARCHITECTURE)
            assert [message["type"] for message in messages] == ["progress"] * (len(messages) - 1) + ["end"]
            assert messages[0]["event"]["status"].startswith("Pulling from")

    def test_another_platform_than_the_images_is_an_error(
        self, asking: Wire, images: Images, registry: Registry
    ) -> None:
        repository = images.publish(registry.address, "1")
        reply = ensure(asking, f"{repository}:1", platform=OTHER_ARCHITECTURE)
        assert told(reply) == (404, "no_such_image", False)
        assert OTHER_ARCHITECTURE in reply.json["message"]
        *_, error = progress(asking, image=f"{repository}:1", platform=OTHER_ARCHITECTURE)
        assert (error["type"], error["code"]) == ("error", "no_such_image")

    def test_a_missing_image_and_a_missing_tag_are_404(self, asking: Wire, images: Images, registry: Registry) -> None:
        repository = images.publish(registry.address, "1")
        assert told(ensure(asking, f"{repository}:2")) == (404, "no_such_image", False)
        assert told(ensure(asking, f"{registry.address}/none-such")) == (404, "no_such_image", False)

    @pytest.mark.parametrize("image", ["UPPER", "a:b:c", "a b", "a@sha256:12", "-x", "é", "a:" + "b" * 200, "a:", "a@"])
    @pytest.mark.parametrize("platform", [{}, {"platform": ARCHITECTURE}])
    def test_an_invalid_reference_is_400(self, asking: Wire, image: str, platform: dict[str, str]) -> None:
        reply = ensure(asking, image, **platform)
        assert told(reply) == (400, "bad_parameter", False)
        assert "invalid reference format" in reply.json["message"] or "invalid tag" in reply.json["message"]

    def test_a_registry_that_is_down_is_retryable_and_the_same_headers_succeed_later(
        self, asking: Wire, images: Images, registry: Registry
    ) -> None:
        repository = images.publish(registry.address, "latest")
        body = compact({"image": repository})
        headers = asking.sign("POST", ENSURE, body)
        registry.stop()
        try:
            for _ in range(2):
                reply = asking.request("POST", ENSURE, body, headers, sign=False)
                assert told(reply) == (500, "server_error", True)
                assert "connection refused" in reply.json["message"]
        finally:
            registry.start()
        assert asking.request("POST", ENSURE, body, headers, sign=False).status == 204
        assert images.has(repository)
        assert told(asking.request("POST", ENSURE, body, headers, sign=False)).code == "replayed_nonce"

    def test_as_a_stream_its_progress_is_the_engines(self, asking: Wire, images: Images, registry: Registry) -> None:
        repository = images.publish(registry.address, "1")
        *steps, end = progress(asking, image=f"{repository}:1")
        assert end == {"type": "end"}
        assert {step["type"] for step in steps} == {"progress"}
        said = [step["event"]["status"] for step in steps]
        assert said[0].startswith("Pulling from")
        assert said[-1] == f"Status: Downloaded newer image for {repository}:1"
        assert images.has(f"{repository}:1")

    def test_as_a_stream_its_failure_before_any_progress_is_an_http_error(
        self, asking: Wire, registry: Registry
    ) -> None:
        reply = asking.request(
            "POST", ENSURE, compact({"image": f"{registry.address}/none-such"}), {"Accept": "text/event-stream"}
        )
        assert (told(reply).status, reply.json["error"]["code"]) == (404, "no_such_image")


class TestCredentials:
    def test_the_right_ones_pull(self, asking: Wire, images: Images, private_registry: PrivateRegistry) -> None:
        repository = images.publish(private_registry.address, "latest", auth=private_registry.auth)
        assert ensure(asking, repository, auth=private_registry.auth).status == 204
        assert images.has(repository)

    @pytest.mark.parametrize(
        "wrong", [{}, {"auth": {}}, {"auth": {"username": USER, "password": "wr0ng-password"}}], ids=str
    )
    def test_none_and_wrong_ones_are_an_error(
        self, asking: Wire, images: Images, private_registry: PrivateRegistry, wrong: dict[str, Any]
    ) -> None:
        repository = images.publish(private_registry.address, "latest", auth=private_registry.auth)
        reply = ensure(asking, repository, **wrong)
        assert told(reply).status in (404, 500)
        assert any(word in reply.json["message"] for word in ("unauthorized", "no basic auth credentials", "denied"))
        assert not images.has(repository)

    def test_they_are_in_no_log_and_no_answer(
        self, engine: Any, images: Images, private_registry: PrivateRegistry
    ) -> None:
        repository = images.publish(private_registry.address, "latest", auth=private_registry.auth)
        with Runner(engine.socket, {"DOCKER_RUNNER_LOG_LEVEL": "trace"}) as runner:
            wire = Wire(runner.url, runner.secret)
            bad = {**private_registry.auth, "password": "wr0ng-password"}
            replies = [ensure(wire, repository, auth=bad), ensure(wire, repository, auth=private_registry.auth)]
            asked = compact({"image": repository, "auth": bad, "platform": ARCHITECTURE})
            streamed = wire.request("POST", ENSURE, asked, {"Accept": "text/event-stream"})
            runner.wait_for_log(ENSURE)
        assert [reply.status == 204 for reply in replies] == [False, True]
        assert streamed.status >= 400
        everything = "".join(runner.log) + repr([reply.body for reply in [*replies, streamed]])
        encoded = [as_registry_auth(auth)["X-Registry-Auth"] for auth in (bad, private_registry.auth)]
        for secret in (PASSWORD, "wr0ng-password", *encoded):
            assert secret not in everything

    @pytest.mark.parametrize("auth", [None, "text", [], {"username": 5}, {"username": None}])
    def test_those_of_a_wrong_form_are_400(self, asking: Wire, image: str, auth: Any) -> None:
        reply = ensure(asking, image, auth=auth)
        assert told(reply) == (400, "validation_error", False)
        assert "auth" in reply.json["message"]


class TestBrokenRegistry:
    """The pull has begun, with 200, when it fails: an error within the stream is an error here."""

    @pytest.fixture
    def broken(self, images: Images, private_registry: PrivateRegistry) -> str:
        before = private_registry.blobs()
        repository = images.publish(private_registry.address, "latest", auth=private_registry.auth)
        # Of the new blobs, the manifest (JSON with layers) stays; the image's configuration is damaged.
        for blob in private_registry.blobs() - before:
            content = blob.read_bytes()
            if b'"rootfs"' in content:
                blob.write_bytes(content.replace(b'"rootfs"', b'"r00tfs"'))
        return repository

    def test_a_damaged_blob(self, asking: Wire, images: Images, private_registry: PrivateRegistry, broken: str) -> None:
        reply = ensure(asking, broken, auth=private_registry.auth)
        assert told(reply) == (502, "image_ensure_failed", True)
        assert "verification failed" in reply.json["message"]
        assert not images.has(broken)

    def test_a_damaged_blob_as_a_stream(self, asking: Wire, private_registry: PrivateRegistry, broken: str) -> None:
        *steps, error = progress(asking, image=broken, auth=private_registry.auth)
        assert {step["type"] for step in steps} == {"progress"}
        assert (error["type"], error["code"]) == ("error", "image_ensure_failed")
        assert "verification failed" in error["message"]


MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 16\r\n\r\n" + b'{"message":"no"}'
PROGRESS_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STEP = b'{"status":"Pulling \xc3\xa9","id":"1"}\r\n'
FAILED = b'{"errorDetail":{"message":"disk full"},"error":"disk full"}\r\n'


@pytest.fixture(scope="module")
def listening() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: None) as engine:
        yield engine


@pytest.fixture
def scripted(listening: ScriptedEngine) -> Iterator[ScriptedEngine]:
    """A scripted engine; it lets go of its connections at a test's end, so that none waits for a later one."""
    yield listening
    listening.restart(lambda peer: None)


@pytest.fixture(scope="module")
def fronted(listening: ScriptedEngine) -> Iterator[Wire]:
    with Runner(listening.path) as runner:
        yield Wire(runner.url, runner.secret)
        assert runner.process.poll() is None
        assert "Traceback" not in "".join(runner.log)


def pulling(*cuts: bytes) -> Any:
    """A script: the image is missing, and its pull says this."""

    def script(peer: Peer) -> None:
        while request := peer.read_request():
            if request.startswith(b"GET "):
                peer.send(MISSING)
            else:
                peer.send(PROGRESS_HEAD, *cuts)
                return

    return script


class TestProgress:
    @pytest.mark.parametrize(
        "cuts",
        [
            (chunked(STEP, FAILED),),
            (chunked(STEP[:10], last=False), chunked(STEP[10:] + FAILED[:20], last=False), chunked(FAILED[20:])),
            (chunked(STEP + FAILED + STEP),),
        ],
    )
    def test_an_error_within_it_is_an_error(
        self, scripted: ScriptedEngine, fronted: Wire, cuts: tuple[bytes, ...]
    ) -> None:
        scripted.restart(pulling(*cuts))
        reply = ensure(fronted, "x")
        assert told(reply) == (502, "image_ensure_failed", True)
        assert reply.json["message"] == "disk full"
        scripted.restart(pulling(*cuts))
        step, error = progress(fronted, image="x")
        assert step == {"type": "progress", "event": {"status": "Pulling é", "id": "1"}}
        assert (error["type"], error["message"], error["code"]) == ("error", "disk full", "image_ensure_failed")

    def test_whatever_chunks_it_comes_in(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(pulling(*(chunked(STEP[at : at + 1], last=False) for at in range(len(STEP))), b"0\r\n\r\n"))
        assert progress(fronted, image="x") == [
            {"type": "progress", "event": {"status": "Pulling é", "id": "1"}},
            {"type": "end"},
        ]

    @pytest.mark.parametrize("rest", [STEP[:-10], FAILED[:-10], b"{", b'{"status":"\xc3'])
    def test_an_end_within_a_line_is_an_error(self, scripted: ScriptedEngine, fronted: Wire, rest: bytes) -> None:
        scripted.restart(pulling(chunked(STEP + rest)))
        assert told(ensure(fronted, "x")) == (502, "image_ensure_failed", True)
        scripted.restart(pulling(chunked(STEP + rest)))
        step, error = progress(fronted, image="x")
        assert (step["type"], error["type"], error["code"]) == ("progress", "error", "image_ensure_failed")

    @pytest.mark.parametrize("line", [b"not JSON\r\n", b"[]\r\n", b'{"error":5}\r\n', b'{"error":"\xff"}\r\n', b"\0\n"])
    def test_a_line_that_is_none_is_an_error(self, scripted: ScriptedEngine, fronted: Wire, line: bytes) -> None:
        scripted.restart(pulling(chunked(STEP + line)))
        assert told(ensure(fronted, "x")) == (502, "image_ensure_failed", True)

    def test_a_connection_that_breaks_is_an_error(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(pulling(chunked(STEP, last=False)))
        assert told(ensure(fronted, "x")) == (502, "engine_cut_body", False)
        scripted.restart(pulling(chunked(STEP, last=False)))
        step, error = progress(fronted, image="x")
        assert (step["type"], error["type"], error["code"]) == ("progress", "error", "engine_cut_body")

    def test_blank_lines_are_no_progress(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(pulling(chunked(b"\r\n", STEP, b"\r\n\n")))
        assert [message["type"] for message in progress(fronted, image="x")] == ["progress", "end"]

    def test_credentials_go_as_a_header_and_only_to_the_pull(self, scripted: ScriptedEngine, fronted: Wire) -> None:
        scripted.restart(pulling(chunked(STEP)))
        auth = {"username": "ü", "password": "p?p>p~p"}
        assert ensure(fronted, "x", auth=auth).status == 204
        inspect, pull = scripted.requests
        assert b"registry-auth" not in inspect.lower()
        head = dict(line.split(b": ", 1) for line in pull.split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
        assert json.loads(base64.urlsafe_b64decode(head[b"X-Registry-Auth"])) == auth

    @pytest.mark.parametrize(
        ("image", "query"),
        [
            ("x", b"fromImage=x&tag=latest"),
            ("x:1", b"fromImage=x&tag=1"),
            ("localhost:5000/a/x", b"fromImage=localhost%3A5000%2Fa%2Fx&tag=latest"),
            ("localhost:5000/x:1", b"fromImage=localhost%3A5000%2Fx&tag=1"),
            ("h:1/x@sha256:ab", b"fromImage=h%3A1%2Fx&tag=sha256%3Aab"),
            ("h:1/x:2@sha256:ab", b"fromImage=h%3A1%2Fx&tag=sha256%3Aab"),
        ],
    )
    def test_what_is_pulled(self, scripted: ScriptedEngine, fronted: Wire, image: str, query: bytes) -> None:
        scripted.restart(pulling(chunked(STEP)))
        assert ensure(fronted, image).status == 204
        assert scripted.targets()[1] == b"/images/create?" + query
        inspected = scripted.targets()[0]
        arm = b'{"Os":"linux","Architecture":"arm64"}'

        def script(peer: Peer) -> None:
            while request := peer.read_request():
                peer.send(PROGRESS_HEAD + chunked(STEP if request.startswith(b"POST ") else arm))

        scripted.restart(script)
        assert ensure(fronted, image, platform=OTHER_ARCHITECTURE).status == 204
        assert scripted.targets() == [b"/images/create?" + query + b"&platform=linux%2Farm64", inspected]

    @pytest.mark.parametrize("headers", [{}, {"Accept": "text/event-stream"}])
    def test_a_caller_that_leaves_ends_the_pull(
        self, scripted: ScriptedEngine, fronted: Wire, headers: dict[str, str]
    ) -> None:
        def script(peer: Peer) -> None:
            while peer.read_request().startswith(b"GET "):
                peer.send(MISSING)
            peer.send(PROGRESS_HEAD + chunked(STEP, last=False))
            peer.sees_close()

        scripted.restart(script)
        body = compact({"image": "x"})
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        with Connection(fronted.host, fronted.port) as caller:
            caller.send(fronted.head("POST", ENSURE, {**fields, **fronted.sign("POST", ENSURE, body)}) + body)
            scripted.wait(lambda: len(scripted.requests) == 2, "the pull")
            if headers:
                assert next(iter(Feed(Reply(caller, "POST"))))["type"] == "progress"
        assert scripted.closed.wait(5)
