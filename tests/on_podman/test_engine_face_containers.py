"""The engine face on Podman: containers; see the file of this name above."""

import json

import pytest
import test_engine_face_containers as docker
from test_engine_face_containers import *

from comparison import JSON, Both, Containers, Seen, compares
from on_podman.differences import instead_of


def refused(seen: Seen, cause: str) -> None:
    """It is a 500 of this cause."""
    assert (seen.status, seen.json["response"]) == (500, 500)
    assert cause in seen.json["cause"]


@instead_of(docker.TestCreateAndDelete.test_create_with_a_name_in_use_relays_409, "conflicts")
@compares("ContainerCreate")
def test_create_with_a_name_in_use_relays_500(both: Both, containers: Containers, running: str) -> None:
    body = json.dumps(containers.base).encode()
    refused(both.same("POST", f"/containers/create?name={running}", body, JSON), "that name is already in use")


@instead_of(docker.TestCreateAndDelete.test_create_with_a_malformed_name_relays_400, "malformed")
@compares("ContainerCreate")
def test_create_with_a_malformed_name_relays_500(both: Both, containers: Containers) -> None:
    body = json.dumps(containers.base).encode()
    refused(both.same("POST", "/containers/create?name=%2Fa%2Fb", body, JSON), "invalid argument")


@instead_of(docker.TestCreateAndDelete.test_delete_of_a_running_container_relays_409, "conflicts")
@compares("ContainerDelete")
def test_delete_of_a_running_container_relays_500(both: Both, running: str) -> None:
    refused(both.same("DELETE", f"/containers/{running}"), "container state improper")


@instead_of(docker.TestReading.test_whatever_is_asked_of_a_missing_container_relays_404, "changes")
@pytest.mark.parametrize(("method", "rest"), docker.REQUESTS)
def test_whatever_is_asked_of_a_missing_container_relays_the_engines_error(both: Both, method: str, rest: str) -> None:
    seen = both.same(method, f"/v1.41/containers/{docker.MISSING}{rest}")
    assert seen.status == (500 if rest == "/changes" else 404)


@instead_of(docker.TestReading.test_top_of_a_stopped_container_relays_409, "top")
@compares("ContainerTop")
def test_top_of_a_stopped_container_relays_nothing(both: Both, created: str) -> None:
    seen = both.same("GET", f"/containers/{created}/top")
    assert (seen.status, seen.body) == (200, b"")


@instead_of(docker.TestReading.test_top_with_arguments_that_ps_refuses_relays_500, "top")
@compares("ContainerTop")
def test_top_with_arguments_that_ps_refuses_relays_nothing(both: Both, running: str) -> None:
    seen = both.same("GET", f"/containers/{running}/top?ps_args=-Zzz%20--nonsense")
    assert (seen.status, seen.body) == (200, b"")


@instead_of(docker.TestRunning.test_start_of_a_missing_program_relays_400, "malformed")
@compares("ContainerStart")
def test_start_of_a_missing_program_relays_500(both: Both, containers: Containers) -> None:
    name = containers("/no/such", start=False)
    refused(both.same("POST", f"/containers/{name}/start"), "a command that was not found")


@instead_of(docker.TestRunning.test_stop_of_a_stopped_container_relays_304, "stop")
@compares("ContainerStop")
def test_stop_of_a_stopped_container_relays_304_and_of_one_never_started_204(
    both: Both, containers: Containers
) -> None:
    assert both.same("POST", f"/containers/{containers(start=False)}/stop").status == 204
    ended = containers.ended("true")
    seen = both.same("POST", f"/containers/{ended}/stop")
    assert (seen.status, seen.body) == (304, b"")
    assert seen.header("api-version")


@instead_of(docker.TestRunning.test_kill_of_a_stopped_container_relays_409, "conflicts")
@compares("ContainerKill")
def test_kill_of_a_stopped_container_relays_500(both: Both, created: str) -> None:
    refused(both.same("POST", f"/containers/{created}/kill"), "container state improper")


@instead_of(docker.TestRunning.test_update_relays_its_warnings, "absent")
@compares("ContainerUpdate")
def test_there_is_no_update(both: Both, running: str) -> None:
    seen = both.same("POST", f"/v1.41/containers/{running}/update", b'{"CpuShares":512}', JSON)
    assert (seen.status, seen.body) == (404, b"Not Found\n")


@instead_of(docker.TestRunning.test_update_refused_by_the_engine_relays_its_error, "absent")
@compares("ContainerUpdate")
def test_an_update_of_nothing_is_not_there_either(both: Both) -> None:
    assert both.same("POST", f"/containers/{docker.MISSING}/update", b"{", JSON).body == b"Not Found\n"


@instead_of(docker.TestFiles.test_a_compressed_download_passes_as_it_is, "compression")
@compares("ContainerArchive")
def test_a_download_is_not_compressed(both: Both, running: str) -> None:
    target = f"/containers/{running}/archive?path=/bin/busybox"
    seen = both.same("GET", target, headers={"Accept-Encoding": "gzip"})
    assert (seen.status, seen.header("content-encoding")) == (200, None)


@instead_of(docker.TestFiles.test_an_upload_that_the_engine_refuses_relays_its_error, "upload")
@compares("PutContainerArchive")
@pytest.mark.parametrize(
    ("query", "status"),
    [("", 200), ("path=/no/such", 200), ("path=/bin/busybox", 500), ("path=/&noOverwriteDirNonDir=1", 500)],
)
def test_an_upload_makes_the_folder_it_is_for(both: Both, containers: Containers, query: str, status: int) -> None:
    body = docker.tar_of(bin=b"a file where a folder is")
    name = containers(start=False)
    assert both.same("PUT", f"/containers/{name}/archive?{query}", body).status == status


@instead_of(docker.TestFiles.test_an_upload_into_a_read_only_container_relays_the_engines_error, "upload")
@compares("PutContainerArchive")
def test_an_upload_into_a_read_only_container_is_written(both: Both, containers: Containers) -> None:
    name = containers(start=False, HostConfig={"NetworkMode": "none", "ReadonlyRootfs": True})
    assert both.same("PUT", f"/containers/{name}/archive?path=/", docker.tar_of(a=b"b")).status == 200
    assert both.same("HEAD", f"/containers/{name}/archive?path=/a").status == 200
