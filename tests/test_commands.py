"""The command line, as a person uses it: in a process of its own, its output read."""

import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from client import sign
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import ROOT, SECRET, Runner

Command = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def command(tmp_path: Path, runner: Runner) -> Command:
    """Run `docker-runner ARGUMENTS` in an empty folder, with settings that fit the running runner."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    fitting = {
        "DOCKER_RUNNER_SHARED_SECRET": SECRET,
        "DOCKER_SOCKET": runner.engine_socket,
        "DOCKER_RUNNER_PORT": str(runner.port),
    }

    def run(
        *arguments: str, environ: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> "subprocess.CompletedProcess[bytes]":
        settings = {name: value for name, value in {**clean, **fitting, **(environ or {})}.items() if value}
        return subprocess.run(
            [sys.executable, str(ROOT / "runner.py"), *arguments],
            cwd=tmp_path,
            env=settings,
            input=stdin,
            capture_output=True,
            timeout=60,
        )

    return run


# serve


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DOCKER_RUNNER_SHARED_SECRET", ""),
        ("DOCKER_RUNNER_PORT", "seventy"),
        ("DOCKER_RUNNER_PORT", "65536"),
        ("DOCKER_RUNNER_PORT", "-1"),
        ("DOCKER_RUNNER_PORT", "7071.0"),
        ("DOCKER_RUNNER_SIGNATURE_TTL_MS", "0"),
        ("DOCKER_RUNNER_SIGNATURE_TTL_MS", "1e5"),
        ("DOCKER_RUNNER_LOG_LEVEL", "verbose"),
        ("DOCKER_RUNNER_HOST", "no such host"),
        ("DOCKER_RUNNER_HOST", "203.0.113.7"),
        ("DOCKER_RUNNER_TRUSTED_PROXIES", "10.0.0.0/8,*"),
        ("DOCKER_RUNNER_MAX_BODY", "64M"),
        ("DOCKER_RUNNER_MAX_NONCES", "0"),
        ("DOCKER_RUNNER_PATH_PREFIX", "runner/"),
        ("DOCKER_SOCKET", "relative.sock"),
        ("DOCKER_SOCKET", "/" + "x" * 108),
    ],
)
def test_serve_ends_at_once_with_one_line_that_names_the_variable(command: Command, name: str, value: str) -> None:
    done = command("serve", environ={name: value})
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"docker-runner: {name}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read"),
        ("\n\n", "holds no secret"),
        ("same-secret-0123456789\nci:same-secret-0123456789", "holds one secret under two names"),
    ],
)
def test_serve_refuses_a_useless_secret_file(command: Command, tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "secrets").write_text(text)
    environ = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(tmp_path / "secrets")}
    done = command("serve", environ=environ)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("docker-runner: DOCKER_RUNNER_SHARED_SECRET_FILE: ")
    assert said in done.stderr.decode()


def test_serve_refuses_secret_and_secret_file_together(command: Command) -> None:
    done = command("serve", environ={"DOCKER_RUNNER_SHARED_SECRET_FILE": "/x"})
    assert (done.returncode, b"not both" in done.stderr) == (1, True)


def test_a_dotenv_file_counts_in_development_only(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DOCKER_RUNNER_LOG_LEVEL=nonsense\n")
    done = command("check")
    assert (done.returncode, b"DOCKER_RUNNER_LOG_LEVEL" in done.stdout) == (1, True)
    done = command("check", environ={"DOCKER_RUNNER_ENV": "production"})
    assert done.returncode == 0


def test_the_environment_wins_over_a_dotenv_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DOCKER_RUNNER_LOG_LEVEL=nonsense\n")
    assert command("check", environ={"DOCKER_RUNNER_LOG_LEVEL": "debug"}).returncode == 0


def test_a_taken_port_ends_serve_with_a_message(command: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command("serve", environ={"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": port})
    assert done.returncode == 1
    assert done.stderr.startswith(b"docker-runner: DOCKER_RUNNER_HOST, DOCKER_RUNNER_PORT: cannot listen on 127.0.0.1:")


def test_a_short_secret_is_warned_of(engine: Engine) -> None:
    with Runner(engine.socket, {"DOCKER_RUNNER_SHARED_SECRET": "short"}) as runner:
        runner.wait_for_log("shorter than 16 characters")


def test_sighup_rotates_secrets_without_downtime(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("first-secret-0123456789\n")
    settings = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(file)}

    def status(secret: str, key: str | None = None) -> int:
        return runner.request("GET", "/_ping", headers=sign(secret, "GET", "/_ping", key=key)).status

    def reload(text: str | None, said: str) -> None:
        file.unlink() if text is None else file.write_text(text)
        runner.log.clear()
        runner.process.send_signal(signal.SIGHUP)
        runner.wait_for_log(said)

    with Runner(engine.socket, settings) as runner:
        assert status("first-secret-0123456789") == 200
        assert status("second-secret-0123456789") == 401
        with runner.stream("GET", "/events", headers=sign("first-secret-0123456789", "GET", "/events")) as events:
            reload("second-secret-0123456789\nfirst-secret-0123456789\n", "2 accepted")
            assert status("first-secret-0123456789") == status("second-secret-0123456789") == 200
            reload("second-secret-0123456789\nmonitor:third-secret-0123456789\n", "2 accepted")
            assert status("first-secret-0123456789") == 401
            assert status("third-secret-0123456789", "monitor") == 200
            reload(None, "kept the old secrets")
            assert status("second-secret-0123456789") == 200
            assert not events.isclosed()
        assert not any("-secret-" in line for line in runner.log)


# check


def test_check_of_a_well_set_up_runner(command: Command, direct: EngineDirect) -> None:
    done = command("check")
    version = direct.request("GET", "/version").json()
    assert done.returncode == 0
    assert f"version {version['Version']}, API {version['ApiVersion']}" in done.stdout.decode()
    assert b"FAIL" not in done.stdout


@pytest.fixture
def silent_socket() -> Iterator[Path]:
    """A Unix socket that nothing listens on, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as dead:
        Path(folder).chmod(0o755)
        path = Path(folder) / "dead.sock"
        dead.bind(str(path))
        yield path


@pytest.fixture
def chatty_socket(tmp_path: Path) -> Iterator[Path]:
    """A Unix socket on which something answers that is no engine."""
    path = tmp_path / "chatty.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        child = os.fork()
        if child == 0:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            os._exit(0)
        yield path
        os.waitpid(child, 0)


def test_check_of_a_missing_socket(command: Command) -> None:
    done = command("check", environ={"DOCKER_SOCKET": "/nowhere/docker.sock"})
    assert done.returncode == 1
    assert b"FAIL  engine: there is no socket at /nowhere/docker.sock" in done.stdout
    assert b"-> the engine does not run here" in done.stdout


def test_check_of_a_file_that_is_no_socket(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("check", environ={"DOCKER_SOCKET": str(tmp_path / "file")})
    assert (done.returncode, b"is not a socket" in done.stdout) == (1, True)


def test_check_of_an_engine_that_is_down(command: Command, silent_socket: Path) -> None:
    done = command("check", environ={"DOCKER_SOCKET": str(silent_socket)})
    assert done.returncode == 1
    assert b"nothing listens on its socket" in done.stdout
    assert b"-> the engine is down: start it" in done.stdout


def test_check_of_something_else_on_the_socket(command: Command, chatty_socket: Path) -> None:
    done = command("check", environ={"DOCKER_SOCKET": str(chatty_socket)})
    assert (done.returncode, b"is no Docker Engine" in done.stdout) == (1, True)


def test_check_without_permission(silent_socket: Path) -> None:
    silent_socket.chmod(0)
    nobody = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import commands, requests_unixsocket;"
        "os.geteuid() or os.setresuid(65534, 65534, 65534);"
        "commands._check_engine(sys.argv[2], print, lambda what, remedy: print('FAIL', what, '->', remedy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", nobody, str(ROOT), str(silent_socket)], capture_output=True, text=True, check=True
    )
    assert "no permission for" in done.stdout
    assert "usermod -aG docker" in done.stdout


def test_check_of_short_and_unprotected_secrets(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("short\n")
    file.chmod(0o644)
    environ = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(file)}
    done = command("check", environ=environ)
    assert done.returncode == 1
    assert b"FAIL  secret: shorter than 16 characters" in done.stdout
    assert b"-> chmod 600" in done.stdout
    assert b"short\n" not in done.stdout


def test_check_goes_on_after_a_wrong_setting(command: Command) -> None:
    done = command("check", environ={"DOCKER_RUNNER_SHARED_SECRET": ""})
    assert done.returncode == 1
    assert b"FAIL  settings: DOCKER_RUNNER_SHARED_SECRET" in done.stdout
    assert b"ok    engine: version" in done.stdout


# sign


def test_sign_prints_arguments_for_curl(command: Command, runner: Runner) -> None:
    done = command("sign", "get", "/images/json?all=1")
    arguments = shlex.split(done.stdout.decode())
    assert "'" not in done.stdout.decode()
    answer = subprocess.run(
        ["curl", "-sf", *arguments, f"{runner.url}/images/json?all=1"], capture_output=True, check=True
    )
    assert json.loads(answer.stdout) is not None


def test_sign_prints_json(command: Command, runner: Runner) -> None:
    headers = json.loads(command("sign", "POST", "/nowhere", "--data", "{}", "--format", "json").stdout)
    assert b"not_found" in runner.request("POST", "/nowhere", b"{}", headers).body


def test_sign_covers_a_file(command: Command, tmp_path: Path, runner: Runner) -> None:
    body = json.dumps({"x": "\u00e4" * 1000}).encode()
    (tmp_path / "body").write_bytes(body)
    headers = json.loads(command("sign", "POST", "/nowhere", "--data-file", "body", "--format", "json").stdout)
    assert b"not_found" in runner.request("POST", "/nowhere", body, headers).body


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [("GET", "/version?", []), ("POST", "/nowhere?q=%27", ["--data", '{"it\'s": "$HOME `x`"}'])],
)
def test_the_openssl_recipe_needs_no_python(
    command: Command, runner: Runner, method: str, target: str, body: list[str]
) -> None:
    recipe = command("sign", method, target, *body, "--format", "openssl").stdout.decode()
    assert SECRET not in recipe
    environ = {"PATH": os.environ["PATH"], "DOCKER_RUNNER_SHARED_SECRET": SECRET}
    done = subprocess.run(["sh", "-euc", recipe], env=environ, capture_output=True, check=True)
    assert (b"ApiVersion" in done.stdout) if method == "GET" else (b"not_found" in done.stdout)


def test_the_openssl_recipe_reads_a_secret_file_and_a_body_file(
    command: Command, runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "a secret").write_text(f"\n  {SECRET} \nanother\n")
    (tmp_path / "a body").write_bytes(bytes(range(256)))
    environ = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(tmp_path / "a secret")}
    recipe = command(
        "sign", "PUT", "/nowhere", "--data-file", str(tmp_path / "a body"), "--format", "openssl", environ=environ
    )
    done = subprocess.run(["sh", "-euc", recipe.stdout.decode()], capture_output=True, check=True)
    assert b"not_found" in done.stdout


def test_the_openssl_recipe_knows_named_keys(command: Command, tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "secrets").write_text("\nci.1:named-secret-0123456789\n")
    environ = {"DOCKER_RUNNER_SHARED_SECRET": "", "DOCKER_RUNNER_SHARED_SECRET_FILE": str(tmp_path / "secrets")}
    with Runner(engine.socket, environ) as runner:
        recipe = command(
            "sign", "GET", "/_ping", "--format", "openssl", environ={**environ, "DOCKER_RUNNER_PORT": str(runner.port)}
        )
        assert subprocess.run(["sh", "-euc", recipe.stdout.decode()], capture_output=True, check=True).stdout == b"OK"


@pytest.mark.parametrize("arguments", [["GET;id", "/x"], ["GET", "version"], ["GET", "/x", "--data-file", "/nowhere"]])
def test_sign_says_what_is_wrong_with_its_arguments(command: Command, arguments: list[str]) -> None:
    done = command("sign", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(b"docker-runner: ")


# curl


def test_curl_gets(command: Command, direct: EngineDirect) -> None:
    done = command("curl", "-sS", "/version")
    assert done.stdout == direct.request("GET", "/version").content


@pytest.mark.parametrize(
    "arguments",
    [
        ["-sSiX", "POST", "-d{}", "/nowhere"],
        ["-s", "-i", "--request", "POST", "--data", "a=1", "-d", "b=2", "/nowhere?x=[1-3]&y={a,b}"],
        ["-si", "--json", "{}", "/nowhere"],
        ["-si", "--data-raw", "@not-a-file", "/nowhere"],
        ["-si", "--data-binary", "@body", "/nowhere"],
        ["-si", "-d", "@body", "/nowhere"],
        ["-si", "-d", "@-", "/nowhere"],
        ["-si", "-T", "body", "/nowhere"],
        ["-si", "-T", "-", "/nowhere"],
        ["-si", "-o", "/dev/stdout", "-H", "X-A: /b", "/nowhere/../x%2Fy"],
        ["-si", "--url", "/nowhere#fragment"],
        ["-si", "--max-time", "20", "--", "/nowhere"],
        ["-si", "-Xdelete", "/nowhere"],
        ["-si", "--no-buffer", "-N", "/nowhere"],
        ["-si", "--max-ti", "20", "-d", "", "/nowhere"],
    ],
)
def test_curl_signs_what_curl_sends(command: Command, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "body").write_bytes(b"line 1\r\nline 2\n\0end\n")
    done = command("curl", *arguments, stdin=b"from\nstandard input")
    assert done.returncode == 0, done.stderr
    # The signature was right, so the answer is about the path.
    assert b'"not_found"' in done.stdout or b'"invalid_path"' in done.stdout, done.stdout


def test_curl_sends_a_head_request(command: Command) -> None:
    assert command("curl", "-sI", "/_ping").stdout.startswith(b"HTTP/1.1 200")


def test_curl_takes_a_whole_url(command: Command, runner: Runner) -> None:
    assert command("curl", "-s", f"{runner.url}/_ping").stdout == b"OK"
    assert command("curl", "-s", f"127.0.0.1:{runner.port}/_ping").stdout == b"OK"


def test_curl_uploads_a_large_file_with_its_hash_up_front(command: Command, tmp_path: Path, runner: Runner) -> None:
    (tmp_path / "big").write_bytes(os.urandom(80 * 1024 * 1024))  # Past DOCKER_RUNNER_MAX_BODY.
    done = command("curl", "-s", "-T", "big", "/nowhere")
    assert b'"not_found"' in done.stdout


def test_curl_types_a_body_for_the_engine(command: Command, direct: EngineDirect, names: Names, image: str) -> None:
    name = names()
    body = json.dumps({"Image": image, "Labels": names.labels})
    done = command("curl", "-s", f"/containers/create?name={name}", "-d", body)
    assert direct.request("GET", f"/containers/{name}/json").json()["Id"] == json.loads(done.stdout)["Id"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-s"],
        ["/a", "/b"],
        ["-F", "x=1", "/a"],
        ["-G", "-d", "x=1", "/a"],
        ["-K", "file", "/a"],
        ["/a", "--next", "/b"],
        ["-L", "/a"],
        ["http://203.0.113.7/a"],
        ["-T", "body", "/a/"],
        ["-T", "body", "-d", "x", "/a"],
        ["-d", "@/nowhere", "/a"],
        ["--no-such-option", "/a"],
        ["/a", "-X"],
    ],
)
def test_curl_refuses_what_it_cannot_sign(command: Command, arguments: list[str]) -> None:
    done = command("curl", *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(b"docker-runner: ")


def test_the_secret_is_on_no_command_line(runner: Runner, tmp_path: Path, command: Command) -> None:
    fake = tmp_path / "curl"
    fake.write_text('#!/bin/sh\n[ "$1" = --help ] && exec /usr/bin/curl "$@"\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = command("curl", "/version", environ={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert b"X-DR-Signature" in done.stdout
    assert SECRET.encode() not in done.stdout
    assert hashlib.sha256(SECRET.encode()).hexdigest().encode() not in done.stdout


# help


@pytest.mark.parametrize(
    "words", [["--help"], ["serve", "--help"], ["check", "-h"], ["sign", "--help"], ["curl", "--help"]]
)
def test_help_teaches(command: Command, words: list[str]) -> None:
    done = command(*words)
    assert done.returncode == 0
    assert b"docker-runner" in done.stdout
    assert b"Example:" in done.stdout or b"check && docker-runner serve" in done.stdout


def test_an_unknown_command_is_refused(command: Command) -> None:
    assert command("destroy").returncode == 2
