"""What `deploy/` holds: read by the tools that know the formats, and started where that can be done here.

nginx and Caddy run for real, with TLS, in front of a real runner; compose starts the real image. There is no cluster
and no systemd here: manifests are held against the published schemas, units against systemd's own reading, and the
units' commands run.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

from bridged import Bridge
from client import __version__
from conftest import EngineDirect, Names, free_port, tied
from dev import find_program, wait_until
from dev.engine import Engine
from documents import block, example
from imaged import Docker, base, secret_file
from packed import Program, environment, one_file, run
from service import ROOT, SECRET, Runner
from wire import Connection, Wire

DEPLOY = ROOT / "deploy"


def program(name: str) -> str:
    """An installed program; a session without it fails."""
    found = find_program(name)
    assert found is not None, f"{name} is missing: python3 -m dev.prepare test"
    return found


def everything_in(folder: str) -> list[Path]:
    return sorted(path for path in (DEPLOY / folder).iterdir() if path.is_file())


# Proxies.


class TlsConnection(Connection):
    """A connection that trusts one certificate."""

    def __init__(self, host: str, port: int, certificate: Path) -> None:
        super().__init__(host, port)
        context = ssl.create_default_context(cafile=certificate)
        self.socket = context.wrap_socket(self.socket, server_hostname=host)


class TlsWire(Wire):
    """The caller's side, with TLS."""

    def __init__(self, port: int, certificate: Path) -> None:
        super().__init__(f"http://localhost:{port}", SECRET)
        self.certificate = certificate

    def connect(self) -> Connection:
        return TlsConnection(self.host, self.port, self.certificate)


class Proxy(NamedTuple):
    """A running proxy: signed requests through it, and past it; where it would put what it holds back."""

    through: TlsWire
    past: Wire
    runner: Runner
    folder: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `fullchain.pem` and `key.pem`, for `localhost`."""
    folder = tmp_path_factory.mktemp("tls")
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", f"{folder}/key.pem", "-out", f"{folder}/fullchain.pem"]
    subprocess.run([program("openssl"), *made, *named, *files], check=True, capture_output=True)
    return folder


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """A documented configuration with this machine's ports and paths; everything that is replaced must be there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx(folder: Path, certificate: Path, port: int, runner: Runner) -> tuple[list[str], list[str]]:
    """nginx with our file among its own minimum: how it is checked, and how it is run."""
    site = replaced(
        (DEPLOY / "proxy/nginx.conf").read_text(),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:7071", f"127.0.0.1:{runner.port}"),
        ("runner.example.com", "localhost"),
        ("/etc/docker-runner/tls", str(certificate)),
        ("/var/log/nginx", str(folder)),
    )
    (folder / "site.conf").write_text(site)
    held = "".join(
        f"{name}_temp_path {folder}/held;\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # or its workers could not write below our folder
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;\n"
        f"events {{}}\nhttp {{\n{held}include {folder}/site.conf;\n}}\n"
    )
    command = [program("nginx"), "-p", str(folder), "-c", f"{folder}/nginx.conf", "-e", "stderr"]
    return [*command, "-t"], command


def caddy(folder: Path, certificate: Path, port: int, runner: Runner) -> tuple[list[str], list[str]]:
    """Caddy with our file."""
    site = replaced(
        (DEPLOY / "proxy/Caddyfile").read_text(),
        ("\nrunner.example.com {", f"\nhttps://localhost:{port} {{\n\tbind 127.0.0.1"),
        ("127.0.0.1:7071", f"127.0.0.1:{runner.port}"),
        ("/etc/docker-runner/tls", str(certificate)),
        # No port 80 on this machine.
        ("\tadmin off\n", "\tadmin off\n\tauto_https disable_redirects\n"),
    )
    (folder / "Caddyfile").write_text(site)
    options = ["--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]
    return [program("caddy"), "validate", *options], [program("caddy"), "run", *options]


PROXIES: dict[str, Callable[[Path, Path, int, Runner], tuple[list[str], list[str]]]] = {"nginx": nginx, "caddy": caddy}


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, runner: Runner, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy by its file in `deploy/proxy`, which it has checked itself, in front of the running runner."""
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    (folder / "held").mkdir()
    checked, command = PROXIES[request.param](folder, certificate, port, runner)
    settings = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    status, said = run(checked, settings)
    assert status == 0, said
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(tied(command), env=environment(settings), stdout=log, stderr=log)
    try:
        assert wait_until(lambda: process.poll() is not None or listens(port), 20), (folder / "log").read_text()
        assert process.poll() is None, (folder / "log").read_text()
        wire = TlsWire(port, certificate / "fullchain.pem")
        yield Proxy(wire, Wire(runner.url, runner.secret), runner, folder)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


ODD_TARGETS = [
    "/v1.41/containers/json?all=1",
    "/containers/json?",
    "/containers/json?all=1&filters={%22label%22:[%22a=b+c%20d%22]}",
    "/containers/json?filters=%7b%22id%22%3a%5b%22ff%22%5d%7d&all=1?",
    "/images/no%2Fsuch%2fimage/json",
    "/images/no/such/image%3Atag/json",
    "/containers/%61bc/json",
    "/v1.41//containers/json",
    "/v1.41/containers/./json",
    "/v1.41/containers/../version",
    "/containers/a;b/json?c;d=e",
    "/v1/containers/labels?containerId=a%00b",
]


@pytest.mark.parametrize("target", ODD_TARGETS)
def test_a_proxy_leaves_an_odd_target_as_it_is(proxy: Proxy, target: str) -> None:
    """Otherwise the signature would not match: the answer would be a 401."""
    past, through = (wire.request("GET", target) for wire in (proxy.past, proxy.through))
    assert past.status != 401
    assert through.status == past.status
    assert through.status == 200 or through.body == past.body  # A list says how long its containers have run.


def test_a_proxy_passes_a_refusal_on(proxy: Proxy) -> None:
    answer = proxy.through.request("GET", "/version", sign=False)
    assert (answer.status, answer.json["error"]["code"]) == (401, "missing_headers")


def events_of(volume: str) -> str:
    return f"/events?filters=%7B%22volume%22%3A%5B%22{volume}%22%5D%7D"


def test_a_proxy_passes_an_event_at_once(proxy: Proxy, names: Names, direct: EngineDirect) -> None:
    """The stream's head, too, which comes before any event."""
    volume = names()
    with proxy.through.open("GET", events_of(volume)) as reply:
        assert reply.status == 200
        direct.request("POST", "/volumes/create", json={"Name": volume, "Labels": names.labels})
        assert json.loads(next(reply.pieces()))["Action"] == "create"


def test_a_proxy_passes_server_sent_events_at_once(proxy: Proxy, start: Callable[..., str]) -> None:
    container = start(cmd=["sh", "-c", "echo one; sleep 1000000"])
    reply, feed = proxy.through.feed("/v1/containers/logs/sse", containerId=container)
    with reply:
        assert b"one\n" in base64.b64decode(next(iter(feed))["data"])


def test_a_caller_that_leaves_a_proxy_takes_its_stream_with_it(proxy: Proxy, names: Names) -> None:
    """The runner's connections on both sides: to the proxy, and to the engine."""
    with proxy.through.open("GET", events_of(names())) as reply:
        assert reply.status == 200
        during = proxy.runner.sockets()
    assert wait_until(lambda: proxy.runner.sockets() <= during - 2, 10)


def test_a_proxy_passes_a_websocket(proxy: Proxy, box: str) -> None:
    with proxy.through.interactive(containerId=box, command="cat") as socket:
        assert socket.next()["type"] == "ready"
        socket.send({"type": "stdin", "data": base64.b64encode(b"there and back\n").decode()})
        assert socket.until(b"back\n") == b"there and back\n"
        socket.send({"type": "close"})
        assert socket.next()["exitCode"] == 0


def test_a_proxy_passes_a_large_upload_and_gathers_none_of_it(proxy: Proxy, start: Callable[..., str]) -> None:
    """50 MB into a container; half of it is at the runner before the rest is sent."""
    container = start()
    content = os.urandom(1 << 20) * 50
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("upload")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    body = packed.getvalue()
    target = f"/containers/{container}/archive?path=/tmp"
    hashed = base64.b64encode(hashlib.sha256(body).digest()).decode()
    fields = {"X-DR-Content-SHA256": hashed, "Content-Length": str(len(body)), "Content-Type": "application/x-tar"}
    signed = proxy.through.sign("PUT", target, body)
    with proxy.through.connect() as connection:
        connection.send(proxy.through.head("PUT", target, {**fields, **signed, "Connection": "close"}))
        half = len(body) // 2
        connection.send(body[:half])
        assert wait_until(lambda: spooled(proxy.runner) > half - (8 << 20), 20)
        assert not [path for path in (proxy.folder / "held").rglob("*") if path.is_file()]
        connection.send(body[half:])
        assert connection.line().split()[1] == "200"
    answer = proxy.through.post("/v1/exec/run", containerId=container, command=["sha256sum", "/tmp/upload"])
    assert answer.json["stdout"].split()[0] == hashlib.sha256(content).hexdigest()


def spooled(runner: Runner) -> int:
    """Bytes that a runner holds in unlinked temporary files."""
    size = 0
    for link in Path(f"/proc/{runner.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).endswith("(deleted)"):
                size += link.stat().st_size
    return size


def test_the_bridge_works_through_a_proxy(proxy: Proxy, short_folder: Path, box: str) -> None:
    """The docker CLI, unaware of it all: an exec with input is a WebSocket on its way."""
    listen = f"unix://{short_folder}/{proxy.folder.name}.sock"
    authority = str(proxy.through.certificate)
    with Bridge(f"https://localhost:{proxy.through.port}", listen, "--ca", authority):
        done = subprocess.run(
            [program("docker"), "--host", listen, "exec", "-i", box, "rev"],
            input=b"through it all\n",
            env=environment({}),
            capture_output=True,
            timeout=30,
        )
    assert (done.returncode, done.stdout) == (0, b"lla ti hguorht\n"), done.stderr


# Compose.


@pytest.fixture(scope="module")
def docker(engine: Engine) -> Docker:
    return Docker(engine.socket)


def compose(settings: dict[str, str], project: str, *command: str) -> str:
    options = [f"--file={DEPLOY}/compose.yaml", f"--project-name={project}"]
    done = subprocess.run(
        [program("docker-compose"), *options, *command],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compose_asks_for_the_sockets_group() -> None:
    with pytest.raises(AssertionError, match="the group of the engine's socket"):
        compose({}, "none", "config")


def test_compose_gives_the_runner_no_more_than_it_needs() -> None:
    service = yaml.safe_load(compose({"DOCKER_GID": "999"}, "none", "config"))["services"]["docker-runner"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in service
    assert "privileged" not in service


def test_compose_looks_after_the_runner_as_the_image_does() -> None:
    check = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["docker-runner"]["healthcheck"]
    flags = {"--interval": "interval", "--timeout": "timeout", "--start-period": "start_period"}
    given = " ".join(f"{flag}={check[name]}" for flag, name in flags.items())
    assert f"HEALTHCHECK {given} CMD {json.dumps(check['test'][1:])}\n" in (ROOT / "Containerfile").read_text()


# Kubernetes.

MANIFESTS = [
    (path, document) for path in everything_in("kubernetes") for document in yaml.safe_load_all(path.read_text())
]
PODS = [
    pytest.param(document["spec"]["template"]["spec"], id=path.stem)
    for path, document in MANIFESTS
    if document["kind"] == "Deployment"
]


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("manifest", [pytest.param(document, id=path.stem) for path, document in MANIFESTS])
def test_a_manifest_is_valid_to_the_letter(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_an_invalid_manifest_would_be_noticed() -> None:
    wrong = json.loads(json.dumps(next(document for _, document in MANIFESTS if document["kind"] == "Deployment")))
    wrong["spec"]["template"]["spec"]["initContainers"][-1]["readinessProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProbes"):
        kubernetes_validate.validate(wrong, "1.29", strict=True)


def the_runner(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in pod["initContainers"] if each["name"] == "docker-runner")
    return found


@pytest.mark.parametrize("pod", PODS)
def test_the_pods_runner_is_this_version_and_confined(pod: dict[str, Any]) -> None:
    runner = the_runner(pod)
    assert runner["image"] == f"docker-runner:{__version__}"
    context = runner["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["readOnlyRootFilesystem"]) == (True, 65532, True)
    assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})


@pytest.mark.parametrize("pod", PODS)
def test_the_pods_probes_ask_what_needs_no_signature(pod: dict[str, Any], runner: Runner) -> None:
    sidecar = the_runner(pod)
    paths = {name: sidecar[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/v1/ready", "readinessProbe": "/v1/ready", "livenessProbe": "/v1/health"}
    for path in paths.values():
        assert Wire(runner.url, "none").request("GET", path, sign=False).status == 200
    assert sidecar["ports"] == [{"name": "runner", "containerPort": 7071}]


@pytest.mark.parametrize("pod", PODS)
def test_the_pods_parts_fit(pod: dict[str, Any]) -> None:
    """Every volume is used and there; the engine's socket is where the runner looks; nobody else has it."""
    containers = [*pod["initContainers"], *pod["containers"]]
    mounts = {
        (each["name"], mount["name"]): mount["mountPath"] for each in containers for mount in each["volumeMounts"]
    }
    assert {volume for _, volume in mounts} == {volume["name"] for volume in pod["volumes"]}
    socket_path = next(each["value"] for each in the_runner(pod)["env"] if each["name"] == "DOCKER_SOCKET")
    assert socket_path.startswith(mounts["docker-runner", "engine"])
    assert {name for name, volume in mounts if volume == "engine"} - {"engine"} == {"docker-runner"}
    names = {document["metadata"]["name"] for _, document in MANIFESTS if document["kind"] == "Secret"}
    secrets = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
    assert set(secrets) == names


def test_the_network_policy_is_for_these_pods() -> None:
    policy = next(document for _, document in MANIFESTS if document["kind"] == "NetworkPolicy")
    for _, document in MANIFESTS:
        if document["kind"] == "Deployment":
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


# systemd.

UNITS = {path.name: path for path in everything_in("systemd")}
SYSTEM, USER = "docker-runner.service", "docker-runner-bridge.service"


def analyze(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    return run([program("systemd-analyze"), *arguments], {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)})


def test_there_are_these_units() -> None:
    assert set(UNITS) == {SYSTEM, USER}


def test_systemd_takes_the_system_unit(tmp_path: Path) -> None:
    assert analyze(tmp_path, "verify", "--man=no", str(UNITS[SYSTEM])) == (0, "")


def test_systemd_takes_the_users_unit(tmp_path: Path) -> None:
    assert analyze(tmp_path, "verify", "--man=no", "--user", str(UNITS[USER])) == (0, "")


def test_systemd_would_notice_a_wrong_unit(tmp_path: Path) -> None:
    wrong = tmp_path / SYSTEM
    wrong.write_text(UNITS[SYSTEM].read_text().replace("ProtectHome=yes", "ProtectHomes=yes"))
    _, said = analyze(tmp_path, "verify", "--man=no", str(wrong))
    assert "ProtectHomes" in said


def test_systemd_finds_the_service_little_exposed(tmp_path: Path) -> None:
    status, said = analyze(tmp_path, "security", "--offline=yes", "--threshold=20", "--no-pager", str(UNITS[SYSTEM]))
    assert status == 0, said


def of_unit(name: str, specifiers: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command of a unit and its environment, specifiers and paths replaced, as systemd would run it."""
    text = replaced(UNITS[name].read_text(), *specifiers.items())
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    words = [word for line in re.findall(r"^Environment=(.*)$", text, re.MULTILINE) for word in line.split()]
    return shlex.split(command), dict(word.split("=", 1) for word in words)


def test_the_system_units_command_serves(engine: Engine, tmp_path: Path) -> None:
    paths = {
        "/opt/docker-runner/docker-runner.pyz": str(one_file()),
        "/etc/docker-runner/secret": str(secret_file(tmp_path, os.geteuid())),
        "SHIV_ROOT=/var/cache/docker-runner": f"SHIV_ROOT={tmp_path}/cache",
        "/usr/bin/python3": str(Path(sys.executable).resolve()),
    }
    command, settings = of_unit(SYSTEM, paths)
    given = {**settings, "DOCKER_SOCKET": engine.socket, "DOCKER_RUNNER_PORT": "0", "DOCKER_RUNNER_SHARED_SECRET": ""}
    with Program(command, r"listens on (http://127\.0\.0\.1:\d+)", given, cwd=Path("/")) as running:
        assert Wire(running.found[1], SECRET).request("GET", "/_ping").body == b"OK"
        assert running.stop() == 0


def test_the_users_units_command_bridges(runner: Runner, tmp_path: Path, short_folder: Path) -> None:
    (tmp_path / "docker-runner").mkdir()
    secret_file(tmp_path / "docker-runner", os.geteuid())
    paths = {
        "%h/.local/lib/docker-runner.pyz": str(one_file()),
        "%E": str(tmp_path),
        "%C": str(tmp_path),
        "%t": str(short_folder),
        "${DOCKER_RUNNER_URL}": runner.url,
        "/usr/bin/python3": str(Path(sys.executable).resolve()),
    }
    command, settings = of_unit(USER, paths)
    socket_path = f"{short_folder}/docker-runner.sock"
    with Program(command, "bridge listens", {**settings, "DOCKER_RUNNER_SHARED_SECRET": ""}, cwd=Path("/")):
        assert Engine(socket_path).answers()


# docs/deploy.md: every block of commands runs as it stands, but for names that are this machine's.

PAGE = "docs/deploy.md"
DOCUMENTED_FILE = "docker-runner-cp311-linux_x86_64.pyz"
SERVE, DOCKER_RUN, COMPOSE = (block(PAGE, mark) for mark in ("pyz serve", "docker run", "docker-compose"))


def of_this_python(script: str) -> str:
    return script.replace(DOCUMENTED_FILE, one_file().name)


def shell(script: str, settings: dict[str, str], cwd: Path) -> str:
    """A script run by a shell that stops at the first failure; python3 is the one that the file was made with."""
    programs = cwd / "programs"
    programs.mkdir(exist_ok=True)
    if not (programs / "python3").exists():
        (programs / "python3").symlink_to(Path(sys.executable).resolve())
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    status, said = run(["bash", "-euo", "pipefail", "-c", script], {**settings, **path}, cwd=cwd)
    assert status == 0, said
    return said


@example(PAGE, "make dist")
def test_make_dist_as_documented(script: str, tmp_path: Path) -> None:
    assert one_file().name in shell(f"cd {ROOT} && {script}", {}, tmp_path)


@example(PAGE, "pyz check")
def test_the_file_as_documented(script: str, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / one_file().name).symlink_to(one_file())
    settings = {"DOCKER_SOCKET": engine.socket, "DOCKER_RUNNER_PORT": "0"}
    checked = of_this_python(script)
    said = shell(checked, settings, tmp_path)
    assert "ok    engine: version" in said
    assert "FAIL" not in said
    exports = next(line for line in checked.splitlines() if line.startswith("export"))
    served = ["bash", "-c", f"{exports}\nexec env {of_this_python(SERVE)}"]
    given = {**settings, "DOCKER_RUNNER_SHARED_SECRET": "", "PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    with Program(served, r"listens on (http://127\.0\.0\.1:\d+)", given, cwd=tmp_path) as running:
        secret = (tmp_path / "secret").read_text().strip()
        assert Wire(running.found[1], secret).request("GET", "/_ping").body == b"OK"


@example(PAGE, "useradd")
def test_the_service_as_documented(script: str, tmp_path: Path) -> None:
    """In another root folder; users and services are left alone, their commands noted."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("useradd", "systemctl"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (programs / name).chmod(0o755)
    script = replaced(of_this_python(script), ("/opt/", f"{tmp_path}/opt/"), ("/etc/", f"{tmp_path}/etc/"))
    script = replaced(script, ("-o docker-runner", f"-o {os.geteuid()}"), ("dist/", f"{ROOT}/dist/"))
    said = shell(script.replace(" deploy/", f" {ROOT}/deploy/"), {}, tmp_path)
    assert said.splitlines()[-2:] == ["systemctl daemon-reload", "systemctl enable --now docker-runner"]
    unit = (tmp_path / "etc/systemd/system/docker-runner.service").read_text()
    for path in ("/opt/docker-runner/docker-runner.pyz", "/etc/docker-runner/secret"):
        assert path in unit
        assert (tmp_path / path.lstrip("/")).stat().st_size > 0
    assert (tmp_path / "etc/docker-runner/secret").stat().st_mode & 0o777 == 0o400


@example(PAGE, "docker build")
def test_the_image_as_documented(
    script: str, docker: Docker, direct: EngineDirect, names: Names, tmp_path: Path
) -> None:
    """Built, run, and composed; on this engine under names of this session, on a port and a network of its own."""
    tag, name, network, port = names("image"), names(), names("net"), free_port()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "programs").mkdir()
    owner = "65532" if os.geteuid() == 0 else str(os.geteuid())
    ours = [
        ("/var/run/docker.sock:", f"{docker.socket}:"),
        ("%g /var/run/docker.sock", f"%g {docker.socket}"),
        ("--name docker-runner ", f"--name {name} --label docker-runner.test={names.mark} "),
        ("127.0.0.1:7071:7071", f"127.0.0.1:{port}:7071"),
        ("/run/secrets/docker-runner docker-runner\n", f"/run/secrets/docker-runner {tag}\n"),
        ("-o 65532", f"-o {owner}"),
    ]
    built = replaced(
        of_this_python(script),
        ("--tag docker-runner", f"--tag {tag} --network none"),
        ("python:3.11-slim", base(direct, names)),
    )
    settings = {"DOCKER_HOST": f"unix://{docker.socket}", "DOCKER_BUILDKIT": "0"}
    shell(f"cd {ROOT}\n{built}", settings, tmp_path)
    try:
        shell(replaced(DOCKER_RUN, *ours), settings, tmp_path)
        secret = (tmp_path / "deploy/secret").read_text().strip()
        wire = Wire(f"http://127.0.0.1:{port}", secret)
        assert wait_until(lambda: listens(port) and answers(wire), 30), docker("logs", name)
        assert wire.request("GET", "/_ping").body == b"OK"
        project = names("compose")
        composed = replaced(
            COMPOSE,
            ("-p docker-runner", f"-p {project}"),
            ("deploy/compose", f"{DEPLOY}/compose"),
            ("%g /var/run/docker.sock", f"%g {docker.socket}"),
        )
        settings |= {
            "DOCKER_SOCKET": docker.socket,
            "DOCKER_RUNNER_IMAGE": tag,
            "DOCKER_RUNNER_NETWORK": network,
            "DOCKER_RUNNER_SECRET": f"{tmp_path}/deploy/secret",
        }
        try:
            shell(composed, settings, tmp_path)
            container = docker("ps", "--quiet", f"--filter=label=com.docker.compose.project={project}")
            address = docker.address(container)
            wire = Wire(f"http://{address}:7071", secret)
            assert wait_until(lambda: answers(wire), 30), docker("logs", container)
            assert wire.request("GET", "/version").json == direct.request("GET", "/version").json()
            assert direct.request("GET", f"/networks/{network}").json()["Internal"] is True
            lookup = "import socket; print(socket.gethostbyname('docker-runner'))"
            caller = ["run", "--rm", f"--network={network}", "--entrypoint=python3", tag, "-c", lookup]
            assert docker(*caller) == address
            docker("stop", container)
            assert docker.status(container) == 0
        finally:
            compose({**settings, "DOCKER_GID": "0"}, project, "down")
    finally:
        docker("rm", "--force", name)


def answers(wire: Wire) -> bool:
    try:
        return wire.request("GET", "/v1/ready", sign=False).status == 200
    except (OSError, AssertionError):
        return False
