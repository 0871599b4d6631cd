"""The private Podman service of the tests: apart from all others, and nothing of it stays."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import EngineDirect
from dev import busybox, wait_until
from dev.podman_service import PodmanService
from dev.private_engine import mounts_below
from service import ROOT

IMAGE = "localhost/docker-runner-test/busybox:latest"


@pytest.fixture
def service(short_folder: Path) -> Iterator[PodmanService]:
    podman = PodmanService(short_folder / "podman-a")
    try:
        podman.start()
        busybox.import_image(podman, IMAGE)
        yield podman
    finally:
        podman.remove()


def run(podman: PodmanService, network: str) -> str:
    """A running container; returns its id."""
    direct = EngineDirect(podman.socket)
    body = {"Image": IMAGE, "Cmd": ["sleep", "1d"], "HostConfig": {"NetworkMode": network}}
    container: str = direct.request("POST", "/containers/create", json=body).json()["Id"]
    assert direct.request("POST", f"/containers/{container}/start").status_code == 204
    return container


def processes(home: Path) -> list[str]:
    """The command lines that name the home."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [each for each in listed if re.search(rf"\b(podman|conmon|socat)\b.*{re.escape(str(home))}/", each)]


def interfaces() -> set[str]:
    return {each.name for each in Path("/sys/class/net").iterdir() if each.name.startswith("cni")}


def cgroups(container: str) -> list[Path]:
    return [found for top in ("", "*/") for found in Path("/sys/fs/cgroup").glob(f"{top}libpod_parent/*{container}*")]


def test_nothing_stays_but_images_and_with_remove_not_even_those(service: PodmanService) -> None:
    plain, paused, bridged = run(service, "none"), run(service, "none"), run(service, "bridge")
    direct = EngineDirect(service.socket)
    assert direct.request("POST", f"/containers/{paused}/pause").status_code == 204
    assert processes(service.home)
    assert not mounts_below(service.home)
    assert not interfaces()
    service.stop()
    assert not processes(service.home)
    assert not [each for container in (plain, paused, bridged) for each in cgroups(container)]
    service.start()
    assert busybox.has_image(service, IMAGE)
    service.remove()
    assert not service.home.exists()


def test_two_know_nothing_of_each_other(service: PodmanService, short_folder: Path) -> None:
    other = PodmanService(short_folder / "podman-b")
    try:
        other.start()
        run(service, "bridge")
        assert not busybox.has_image(other, IMAGE)
        busybox.import_image(other, IMAGE)
        assert len(json.loads(other.request("GET", "/containers/json?all=1")[1])) == 0
        run(other, "bridge")
    finally:
        other.remove()
    assert len(json.loads(service.request("GET", "/containers/json")[1])) == 1


def test_it_ends_with_who_started_it_whatever_ends_that(short_folder: Path) -> None:
    home = short_folder / "podman-c"
    script = (
        "import pathlib, sys; from dev.podman_service import PodmanService;"
        "PodmanService(pathlib.Path(sys.argv[1]), registry_ports=[1]).start(); print('runs', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, home], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"runs\n"
        assert processes(home)
        starter.kill()
    assert wait_until(lambda: not processes(home), 10)


def test_a_home_that_is_private_to_it_or_too_long_is_refused() -> None:
    for home in ("relative", "/run/podman", "/var/lib/docker-runner", f"/var/tmp/{'x' * 100}"):
        with pytest.raises(ValueError, match="home"):
            PodmanService(Path(home))
