"""The examples of signing in other clients: held to the test vectors, and run as programs against a real engine."""

import asyncio
import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
import httpx
import pytest
import requests
from yarl import URL

import client
from conftest import EngineDirect, Names
from documents import TEXTS
from documents import example as example_of
from service import ROOT, Runner

EXAMPLES = ROOT / "examples"
PAGE = "docs/client.md"
VECTORS: list[dict[str, Any]] = json.loads((ROOT / "tests/data/signature-vectors.json").read_text())
NORMALISED = "a lone question mark counts"
"""The vector whose target the Python libraries do not send as it stands: they drop the question mark."""
PROGRAMS: dict[str, list[str]] = {
    "sign_requests.py": [sys.executable],
    "sign_httpx.py": [sys.executable],
    "sign_aiohttp.py": [sys.executable],
    "sign.mjs": ["node"],
    "signed-curl.sh": ["sh"],
}
BINARY = bytes(range(256)) * 300

every_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["what"])
every_sent_vector = pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["what"] != NORMALISED], ids=lambda vector: vector["what"]
)
every_program = pytest.mark.parametrize("program", PROGRAMS)

Example = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(
    command: list[str], environ: Mapping[str, str], *, cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    return subprocess.run(command, env={**kept, **environ}, cwd=cwd, capture_output=True, timeout=60)


@pytest.fixture
def example(runner: Runner) -> Example:
    """Runs an example as a program, against the runner unless `environ` says otherwise."""

    def example(
        program: str, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        settings = {"DOCKER_RUNNER_URL": runner.url, "DOCKER_RUNNER_SHARED_SECRET": runner.secret}
        return run([*PROGRAMS[program], str(EXAMPLES / program), *arguments], {**settings, **(environ or {})})

    return example


@pytest.fixture(scope="module")
def container(direct: EngineDirect, image: str, names: Names) -> str:
    """The name of a container (it need not run) with a label whose value is awkward in a query."""
    name = names("examples-")
    labels = {**names.labels, name: "a+b=ü /?&#%41"}
    created = direct.request(
        "POST", f"/containers/create?name={name}", json={"Image": image, "Cmd": ["true"], "Labels": labels}
    )
    assert created.status_code == 201, created.text
    return name


def archive(name: str, content: bytes) -> bytes:
    """A tar archive with one file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def archived(data: bytes) -> bytes:
    """The content of the one file in a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        (member,) = tar.getmembers()
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


# The test vectors.


@pytest.fixture
def vector_time(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python examples sign with the vector's timestamp and nonce."""
    monkeypatch.setattr(client, "time", SimpleNamespace(time_ns=lambda: int(vector["timestamp"]) * 1_000_000))
    nonce = SimpleNamespace(hex=lambda: vector["nonce"])
    monkeypatch.setattr(client, "os", SimpleNamespace(urandom=lambda size: nonce))


def check(headers: Mapping[str, str], vector: dict[str, Any]) -> None:
    assert headers["X-DR-Signature"] == vector["signature"]
    assert headers["X-DR-Content-SHA256"] == vector["bodyHash"]
    assert headers["X-DR-Key"] == "ci"


@every_sent_vector
@pytest.mark.usefixtures("vector_time")
def test_requests_signs_as_the_vectors_do(vector: dict[str, Any]) -> None:
    auth = importlib.import_module("sign_requests").RunnerAuth(vector["secret"], "ci")
    body = base64.b64decode(vector["bodyBase64"])
    asked = requests.Request(vector["method"], "http://runner" + vector["target"], data=body, auth=auth)
    check(asked.prepare().headers, vector)


@every_sent_vector
@pytest.mark.usefixtures("vector_time")
def test_httpx_signs_as_the_vectors_do(vector: dict[str, Any]) -> None:
    auth = importlib.import_module("sign_httpx").RunnerAuth(vector["secret"], "ci")
    body = base64.b64decode(vector["bodyBase64"])
    asked = httpx.Request(vector["method"], "http://runner" + vector["target"], content=body)
    check(next(auth.sync_auth_flow(asked)).headers, vector)


@every_sent_vector
@pytest.mark.usefixtures("vector_time")
def test_aiohttp_signs_as_the_vectors_do(vector: dict[str, Any]) -> None:
    auth = importlib.import_module("sign_aiohttp").RunnerAuth("http://runner", vector["secret"], "ci")
    url, body = URL("http://runner" + vector["target"], encoded=True), base64.b64decode(vector["bodyBase64"])
    seen: list[Mapping[str, str]] = []

    async def instead_of_sending(request: aiohttp.ClientRequest, _: aiohttp.ClientHandlerType) -> NoReturn:
        seen.append(request.headers)
        raise aiohttp.ClientError

    async def ask() -> None:
        async with aiohttp.ClientSession(middlewares=[auth, instead_of_sending]) as session:
            with contextlib.suppress(aiohttp.ClientError):
                await session.request(vector["method"], url, data=body or None)

    asyncio.run(ask())
    check(seen[0], vector)


def test_javascript_signs_as_the_vectors_do() -> None:
    script = f"""
        import {{ sign }} from {json.dumps((EXAMPLES / "sign.mjs").as_uri())}
        import {{ readFileSync }} from "node:fs"
        const headers = JSON.parse(readFileSync("tests/data/signature-vectors.json")).map(v => sign(
            v.secret, v.method, v.target, Buffer.from(v.bodyBase64, "base64"),
            {{ key: "ci", timestamp: v.timestamp, nonce: v.nonce }}))
        console.log(JSON.stringify(headers))
    """
    done = run(["node", "--input-type=module", "--eval", script], {}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for headers, vector in zip(json.loads(done.stdout), VECTORS, strict=True):
        check(headers, vector)
        assert (headers["X-DR-Timestamp"], headers["X-DR-Nonce"]) == (vector["timestamp"], vector["nonce"])


def shell_signature(secret: str, *parts: str) -> str:
    script = f'. {EXAMPLES}/signed-curl.sh; signature "$@"'
    done = run(["sh", "-euc", script, "sh", *parts], {"DOCKER_RUNNER_SHARED_SECRET": secret})
    assert not done.stderr
    return done.stdout.decode()


@every_vector
def test_the_shell_signs_as_the_vectors_do(vector: dict[str, Any]) -> None:
    parts = [vector[name] for name in ("method", "target", "timestamp", "nonce", "bodyHash")]
    assert shell_signature(vector["secret"], *parts) == vector["signature"]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_the_shells_hmac_takes_secrets_of_any_length(length: int) -> None:
    secret = "s%\\n" * length
    for key in (secret[:length], "ü" * length):
        expected = client.signature(key.encode(), client.string_to_sign(b"GET", b"/", b"1", b"n", b"h"))
        assert shell_signature(key, "GET", "/", "1", "n", "h") == expected.decode()


# Against the engine, as programs.

FILTERS = [
    pytest.param(lambda text: quote(text, safe=""), id="escaped"),
    pytest.param(lambda text: quote(text, safe="").lower(), id="escaped in lower case"),
    pytest.param(lambda text: quote(text, safe='{}[]":=,/?').replace("%20", "+"), id="bare JSON"),
]


@every_program
@pytest.mark.parametrize("escape", FILTERS)
def test_an_awkward_query_arrives_as_signed(
    example: Example, program: str, container: str, escape: Callable[[str], str]
) -> None:
    filters = json.dumps({"label": [f"{container}=a+b=ü /?&#%41"]}, ensure_ascii=False)
    done = example(program, "GET", f"/containers/json?all=1&filters={escape(filters)}")
    assert done.returncode == 0, done
    assert [found["Names"] for found in json.loads(done.stdout)] == [[f"/{container}"]]


@every_program
def test_a_json_body_creates_a_container(
    example: Example, program: str, image: str, names: Names, direct: EngineDirect, tmp_path: Path
) -> None:
    name, body = names(), tmp_path / "create.json"
    body.write_text(json.dumps({"Image": image, "Cmd": ["echo", "grüße 漢字"], "Labels": names.labels}))
    done = example(program, "POST", f"/containers/create?name={name}", str(body))
    assert done.returncode == 0, done
    assert direct.request("GET", f"/containers/{name}/json").json()["Config"]["Cmd"] == ["echo", "grüße 漢字"]


@every_program
def test_a_binary_body_arrives_and_comes_back(
    example: Example, program: str, container: str, direct: EngineDirect, tmp_path: Path
) -> None:
    name, body = f"grüße + {program}", tmp_path / "upload.tar"
    body.write_bytes(archive(name, BINARY))
    target = f"/containers/{container}/archive?path=%2Ftmp"
    put = example(program, "PUT", target, str(body))
    assert put.returncode == 0, put
    got = example(program, "GET", f"{target}%2F{quote(name)}")
    assert got.returncode == 0, got.stderr
    assert archived(got.stdout) == BINARY
    assert archived(direct.request("GET", f"{target}%2F{quote(name)}").content) == BINARY


@every_program
def test_an_empty_body_is_signed_as_none(example: Example, program: str, tmp_path: Path) -> None:
    body = tmp_path / "empty.json"
    body.write_bytes(b"")
    done = example(
        program, "POST", "/containers/prune?filters=%7B%22label%22%3A%5B%22none-has-this%22%5D%7D", str(body)
    )
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["ContainersDeleted"] is None


@every_program
def test_every_run_has_a_fresh_nonce(example: Example, program: str) -> None:
    first, second = (example(program, "GET", "/version") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == second.stdout


@every_program
def test_a_wrong_secret_is_told(example: Example, program: str) -> None:
    done = example(program, "GET", "/version", environ={"DOCKER_RUNNER_SHARED_SECRET": "another"})
    assert done.returncode != 0
    assert json.loads(done.stdout)["message"] == "the signature does not match this request"
    assert b"401" in done.stderr


@pytest.fixture(scope="module")
def keyed(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner that knows the named key `ci` alone."""
    file = tmp_path_factory.mktemp("keyed") / "secret"
    file.write_text("ci:secret-of-ci-0123456789\n")
    file.chmod(0o600)
    settings = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(file)}
    with Runner(runner.engine_socket, settings) as running:
        yield running


@every_program
def test_a_named_key_is_named(example: Example, program: str, keyed: Runner) -> None:
    named = {"DOCKER_RUNNER_URL": keyed.url, "DOCKER_RUNNER_SHARED_SECRET": "secret-of-ci-0123456789"}
    assert example(program, "GET", "/_ping", environ={**named, "DOCKER_RUNNER_KEY": "ci"}).stdout == b"OK"
    assert example(program, "GET", "/_ping", environ=named).returncode != 0


@every_program
def test_a_head_request_ends(example: Example, program: str) -> None:
    done = example(program, "HEAD", "/_ping")
    assert done.returncode == 0, done


@every_program
def test_a_slash_at_the_end_of_the_url_does_no_harm(example: Example, program: str, runner: Runner) -> None:
    assert example(program, "GET", "/_ping", environ={"DOCKER_RUNNER_URL": f"{runner.url}/"}).stdout == b"OK"


def test_curl_takes_further_arguments(example: Example) -> None:
    done = example("signed-curl.sh", "GET", "/_ping", "", "--write-out", " %{http_code}")
    assert done.stdout == b"OK 200"


def test_curl_sends_no_file_that_is_not_there(example: Example, tmp_path: Path) -> None:
    done = example("signed-curl.sh", "POST", "/containers/create", str(tmp_path / "missing.json"))
    assert done.returncode == 2
    assert b"not a regular file" in done.stderr


# Against the engine, as modules: two requests in a row on one session, the second with a body.


def test_a_session_of_requests(runner: Runner, container: str) -> None:
    with requests.Session() as session:
        session.auth = importlib.import_module("sign_requests").RunnerAuth(runner.secret)
        found = session.get(f"{runner.url}/containers/json", params={"all": "1", "filters": by_name(container)})
        put = session.put(f"{runner.url}/containers/{container}/archive?path=/tmp", data=archive("requests", BINARY))
    assert (len(found.json()), put.status_code) == (1, 200)


def test_a_client_of_httpx(runner: Runner, container: str) -> None:
    auth = importlib.import_module("sign_httpx").RunnerAuth(runner.secret)
    with httpx.Client(base_url=runner.url, auth=auth) as session:
        found = session.get("/containers/json", params={"all": "1", "filters": by_name(container)})
        put = session.put(f"/containers/{container}/archive?path=/tmp", content=archive("httpx", BINARY))
    assert (len(found.json()), put.status_code) == (1, 200)


def test_an_async_client_of_httpx(runner: Runner, container: str) -> None:
    auth = importlib.import_module("sign_httpx").RunnerAuth(runner.secret)

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=runner.url, auth=auth) as session:
            found = await session.get("/containers/json", params={"all": "1", "filters": by_name(container)})
            put = await session.put(f"/containers/{container}/archive?path=/tmp", content=archive("async", BINARY))
        return found, put

    found, put = asyncio.run(ask())
    assert (len(found.json()), put.status_code) == (1, 200)


def test_a_session_of_aiohttp(runner: Runner, container: str) -> None:
    auth = importlib.import_module("sign_aiohttp").RunnerAuth(runner.url, runner.secret)

    async def ask() -> tuple[list[Any], int]:
        async with aiohttp.ClientSession(runner.url, middlewares=[auth]) as session:
            query = {"all": "1", "filters": by_name(container)}
            async with session.get("/containers/json", params=query) as answer:
                found = await answer.json()
            data = archive("aiohttp", BINARY)
            async with session.put(f"/containers/{container}/archive?path=/tmp", data=data) as answer:
                return found, answer.status

    found, status = asyncio.run(ask())
    assert (len(found), status) == (1, 200)


def test_a_websocket_of_aiohttp(runner: Runner, box: str) -> None:
    auth = importlib.import_module("sign_aiohttp").RunnerAuth(runner.url, runner.secret)
    query = {"containerId": box, "command": "echo héllo"}

    async def ask() -> str:
        async with (
            aiohttp.ClientSession(runner.url, middlewares=[auth]) as session,
            session.ws_connect("/v1/exec/interactive/ws", params=query) as socket,
        ):
            *_, last = [json.loads(message.data) async for message in socket]
        return base64.b64decode(last["stdout"]).decode()

    assert asyncio.run(ask()) == "héllo\n"


def test_javascripts_fetch_and_http(runner: Runner, container: str) -> None:
    script = f"""
        import {{ sign, signedFetch }} from {json.dumps((EXAMPLES / "sign.mjs").as_uri())}
        import http from "node:http"
        const {{ DOCKER_RUNNER_URL: url, DOCKER_RUNNER_SHARED_SECRET: secret, BOX: box }} = process.env
        const query = new URLSearchParams({{ all: 1, filters: JSON.stringify({{ name: [box] }}) }})
        const found = await signedFetch(secret, `${{url}}/containers/json?${{query}}`)
        console.log((await found.json()).length)

        const method = "POST", body = JSON.stringify({{ Cmd: ["echo", "grüße"] }})
        const headers = {{ "Content-Type": "application/json" }}
        const posted = await signedFetch(secret, `${{url}}/containers/${{box}}/exec`, {{ method, body, headers }})
        console.log(posted.status) // the container does not run

        const target = `/containers/json?all=1&filters={{"name":["${{box}}"]}}`
        const {{ hostname: host, port }} = new URL(url)
        for (let round = 0; round < 2; round++)
            await new Promise(done => http.get(
                {{ host, port, path: target, headers: sign(secret, "GET", target) }},
                answer => console.log(answer.statusCode) ?? answer.resume().on("end", done)))
    """
    environ = {"DOCKER_RUNNER_URL": runner.url, "DOCKER_RUNNER_SHARED_SECRET": runner.secret, "BOX": container}
    done = run(["node", "--input-type=module", "--eval", script], environ)
    assert done.stdout.split() == [b"1", b"409", b"200", b"200"], done


def by_name(container: str) -> str:
    return json.dumps({"name": [container]})


def test_the_shell_has_the_secret_on_no_command_line(runner: Runner, tmp_path: Path) -> None:
    """Every program that the script may start is a wrapper of ours, which notes its arguments."""
    log, programs = tmp_path / "log", tmp_path / "bin"
    programs.mkdir()
    for name in ("cat", "curl", "date", "od", "openssl", "printf", "tr"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\nexec {shutil.which(name)} "$@"\n')
        (programs / name).chmod(0o755)
    environ = {
        "DOCKER_RUNNER_URL": runner.url,
        "DOCKER_RUNNER_SHARED_SECRET": runner.secret,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    assert run(["sh", str(EXAMPLES / "signed-curl.sh"), "GET", "/_ping"], environ).stdout == b"OK"
    said = log.read_text()
    assert set(re.findall(r"^([a-z]+)\b", said, re.MULTILINE)) >= {"curl", "openssl"}
    assert runner.secret not in said
    assert runner.secret.encode().hex() not in said


# Redirects: the engine's for a path with `//`, or of whatever stands in front of the runner.


class Redirecting(ThreadingHTTPServer):
    """Answers every request with a redirect, but for those of `/end`.

    `seen` are the targets it got, with their headers (names in lower case).
    """

    def __init__(self, location: str = "/end") -> None:
        self.location = location
        self.seen: list[tuple[str, Mapping[str, str]]] = []
        super().__init__(("127.0.0.1", 0), Redirection)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Redirection(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Redirecting)
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(200 if self.path == "/end" else 307)
        self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextlib.contextmanager
def redirecting(location: str = "/end") -> Iterator[Redirecting]:
    with Redirecting(location) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@every_program
def test_a_redirected_request_is_signed_anew_or_not_sent(example: Example, program: str, runner: Runner) -> None:
    with redirecting() as server:
        example(program, "GET", "/begin", environ={"DOCKER_RUNNER_URL": server.url})
    assert len({headers["x-dr-nonce"] for _, headers in server.seen}) == len(server.seen)
    for target, headers in server.seen:
        names = ("x-dr-timestamp", "x-dr-nonce", "x-dr-content-sha256")
        parts = ["GET", target, *(headers[name] for name in names)]
        expected = client.signature(runner.secret.encode(), "\n".join(parts).encode())
        assert headers["x-dr-signature"] == expected.decode()
    assert [target for target, _ in server.seen] == ["/begin", "/end"][: 2 if program == "sign_aiohttp.py" else 1]


def test_aiohttp_signs_nothing_for_another_host(example: Example) -> None:
    with redirecting() as stranger, redirecting(f"{stranger.url}/end") as server:
        done = example("sign_aiohttp.py", "GET", "/begin", environ={"DOCKER_RUNNER_URL": server.url})
    assert done.returncode == 0
    ((_, headers),) = stranger.seen
    assert not [name for name in headers if name.startswith("x-dr-")]


# What the page says.


def test_the_table_names_every_example() -> None:
    listed = re.findall(r"^\| [^|]+ \| \[[^\]]+\]\(\.\./examples/([^)]+)\)", TEXTS[PAGE], re.MULTILINE)
    assert listed == list(PROGRAMS)
    assert {*listed, "run-a-container.sh"} == {path.name for path in EXAMPLES.iterdir() if path.is_file()}


@example_of(PAGE, "sign_requests.py GET")
def test_the_commands_work_as_they_stand(script: str, runner: Runner, container: str, tmp_path: Path) -> None:
    for name in ("examples", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".dev").mkdir()
    (tmp_path / ".dev/secret").write_text(f"{runner.secret}\n")
    commands = script.replace(":7071", f":{runner.port}").replace(".venv/bin/python", sys.executable)
    done = run(["bash", "-euo", "pipefail", "-c", commands], {}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.replace(b"\n", b"").count(f'"Names":["/{container}"]'.encode())
    assert answers == 3
