"""BuildKit through the bridge: HTTP/2 sessions in upgraded streams, where the runner's policy allows them."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridged import Bridge
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import Runner

CLI = Path("/usr/bin/docker")
"""Debian's: newer ones need a plugin for BuildKit that Debian 12 does not have."""

# RFC 9113, section 3.4: the client's preface, and an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture(scope="module")
def usual(engine: Engine, short_folder: Path) -> Iterator[Bridge]:
    """A bridge in front of a runner with the default policy."""
    with (
        Runner(engine.socket, {"DOCKER_RUNNER_POLICY": "workloads"}) as runner,
        Bridge(runner.url, f"unix://{short_folder}/usual.sock") as bridge,
    ):
        yield bridge


@pytest.fixture
def context(tmp_path: Path, image: str, names: Names) -> Path:
    """A build's folder: it copies a file in, and shows it."""
    (label, value), *_ = names.labels.items()
    lines = [f"FROM {image}", f"LABEL {label}={value}", "COPY content /content", "RUN cat /content"]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    (tmp_path / "content").write_text("what the session carried\n")
    return tmp_path


def build(host: str, context: Path, tag: str) -> subprocess.CompletedProcess[str]:
    assert CLI.exists(), "the docker CLI is missing: apt-get install --no-install-recommends docker.io"
    return subprocess.run(
        [CLI, "build", "--network=none", "--no-cache", "--progress=plain", f"--tag={tag}", str(context)],
        env={"PATH": "/usr/bin:/bin", "DOCKER_HOST": host, "DOCKER_BUILDKIT": "1", "DOCKER_CONFIG": str(context)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def steps(output: str) -> set[str]:
    """What was done, as the progress names it. The numbers before it follow the order in which that began."""
    return set(re.findall(r"^#\d+ (\[.+)$", output, re.MULTILINE))


def test_a_build_through_the_bridge_is_that_of_the_engine(
    engine: Engine, bridge: Bridge, direct: EngineDirect, names: Names, context: Path
) -> None:
    tags = names("built"), names("built")
    alone = build(f"unix://{engine.socket}", context, tags[0])
    bridged = build(bridge.host, context, tags[1])
    assert (alone.returncode, bridged.returncode) == (0, 0), bridged.stderr
    assert "what the session carried" in bridged.stderr
    assert len(steps(alone.stderr)) >= 5
    assert steps(bridged.stderr) == steps(alone.stderr)
    built = [direct.request("GET", f"/images/{tag}/json").json() for tag in tags]
    assert built[0]["Config"] == built[1]["Config"]


def test_a_failing_step_fails_the_build(bridge: Bridge, names: Names, context: Path) -> None:
    with (context / "Dockerfile").open("a") as file:
        file.write("\nRUN exit 7\n")
    done = build(bridge.host, context, names("built"))
    assert done.returncode == 1
    assert "exit code: 7" in done.stderr


def test_the_default_policy_denies_it(usual: Bridge, names: Names, context: Path) -> None:
    done = build(usual.host, context, names("built"))
    assert done.returncode == 1
    assert "unable to upgrade to h2c, received 403" in done.stderr


def upgraded(path: str, target: str) -> bytes:
    """What comes back, up to the first HTTP/2 frame, when an upgrade to HTTP/2 is asked for."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += sock.recv(1)
        sock.sendall(PREFACE)
        while len(answer.partition(b"\r\n\r\n")[2]) < 9:
            answer += sock.recv(9)
        return answer


def test_buildkits_own_endpoint_speaks_http_2(engine: Engine, bridge: Bridge) -> None:
    answers = [upgraded(path, "/v1.41/grpc") for path in (engine.socket, bridge.socket)]
    for answer in answers:
        head, _, frame = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"\r\nUpgrade: h2c" in head
        assert frame[3] == 4  # SETTINGS
    assert answers[0].partition(b"\r\n\r\n")[2] == answers[1].partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("target", ["/grpc", "/v1.41/session"])
def test_the_default_policy_denies_both_endpoints(usual: Bridge, target: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(usual.socket)
        sock.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 403 ")
