"""The wire protocol on Podman, the table of routes: see the file of this name above."""

import json

import pytest
import test_wire_workloads as docker
from test_wire_workloads import *
from test_wire_workloads import Start

from conftest import EngineDirect, Names, Registry
from on_podman.differences import instead_of
from wire import Reply, Wire, b64, compact, done, refused


@instead_of(docker.test_image_names_stay_names, "pull-errors")
@pytest.mark.parametrize("name", ["..", "../containers/json", "a/../../info", "a//b", "a\0b"])
def test_image_names_stay_names_as_podman_does(wire: Wire, name: str) -> None:
    refused(wire.post("/v1/images/ensure", image=name), 400, "bad_parameter")


@instead_of(docker.test_image_names_stay_names, "pull-errors")
@pytest.mark.parametrize("name", ["a?b", "a#b", "A"])
def test_image_names_that_the_engine_refuses_are_told_in_the_pull(wire: Wire, name: str) -> None:
    refused(wire.post("/v1/images/ensure", image=name), 502, "image_ensure_failed", retryable=True)


@instead_of(docker.test_ensure_of_a_missing_image, "pull-errors")
def test_ensure_of_a_missing_image_as_podman_does(wire: Wire, registry: Registry) -> None:
    reply = wire.post("/v1/images/ensure", image=f"{registry.address}/missing")
    assert "manifest unknown" in refused(reply, 502, "image_ensure_failed", retryable=True)


@instead_of(docker.test_ensure_shows_its_progress_to_those_who_ask, "progress")
def test_ensure_shows_its_progress_to_those_who_ask_as_podman_does(wire: Wire, pushed: tuple[str, str]) -> None:
    body = compact({"image": pushed[0], "platform": "linux/amd64"})
    reply = wire.request("POST", "/v1/images/ensure", body, {"Accept": "text/event-stream"})
    messages = [json.loads(block.removeprefix(b"data: ")) for block in reply.body.split(b"\n\n")[:-1]]
    assert messages[-1] == {"type": "end"}
    assert [message["type"] for message in messages[:-1]] == ["progress"] * (len(messages) - 1)
    assert not messages[0]["event"].get("status", "").startswith("Pulling from")


@instead_of(docker.test_every_field_of_start_reaches_the_engine, "environment")
def test_every_field_of_start_reaches_the_engine_as_podman_does(
    wire: Wire, start: Start, direct: EngineDirect, volume: str, names: Names
) -> None:
    container = start(
        cmd=["-c", "sleep 100000"],
        entrypoint="/bin/sh",
        env={"A": "1", "B": "x=\xe4 y"},
        workingDir="/tmp",
        autoRemove=False,
        binds=[f"{volume}:/mnt:ro"],
        tty=True,
        labels={"a": "b"},
        anonymousVolumes=["/data"],
        ttlSeconds=3600,
    )
    found = direct.request("GET", f"/containers/{container}/json").json()
    config, host = found["Config"], found["HostConfig"]
    assert (config["Entrypoint"], config["Cmd"]) == (["/bin/sh"], ["-c", "sleep 100000"])
    assert {"A=1", "B=x=\xe4 y", "container=podman"} <= set(config["Env"])
    assert (config["WorkingDir"], config["Tty"]) == ("/tmp", True)
    assert config["Labels"].items() >= {**names.labels, "a": "b"}.items()
    assert (host["AutoRemove"], host["NetworkMode"]) == (False, "none")
    assert {(mount["Destination"], mount["RW"]) for mount in found["Mounts"]} == {("/mnt", False), ("/data", True)}


@instead_of(docker.test_a_container_whose_start_failed_is_removed_again, "malformed")
def test_a_container_whose_start_failed_is_removed_again_as_podman_does(wire: Wire, image: str, names: Names) -> None:
    name = names("broken")
    body = {"image": image, "name": name, "cmd": ["/no/such/program"], "networkMode": "none", "labels": names.labels}
    reply = wire.post("/v1/containers/start", **body, autoRemove=False)
    assert "no such file" in refused(reply, 500, "bad_parameter")
    refused(wire.get("/v1/containers/inspect", containerId=name), 404, "no_such_container")


@instead_of(docker.test_a_name_in_use, "conflicts")
def test_a_name_in_use_as_podman_does(wire: Wire, start: Start, image: str, names: Names) -> None:
    name = names("box")
    container = start(name=name)
    reply = wire.post("/v1/containers/start", image=image, name=name, labels=names.labels)
    assert container in refused(reply, 500, "conflict")
    assert wire.get("/v1/containers/inspect", containerId=name).json["Id"] == container


@instead_of(docker.test_remove_relays_204_404_and_409, "conflicts")
def test_remove_relays_204_404_and_the_conflict(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(anonymousVolumes=["/data"])
    volume = direct.request("GET", f"/containers/{container}/json").json()["Mounts"][0]["Name"]
    refused(wire.post("/v1/containers/remove", containerId=container), 500, "conflict")
    refused(wire.post("/v1/containers/remove", containerId=container, force=False), 500, "conflict")
    done(wire.post("/v1/containers/remove", containerId=container, force=True, removeVolumes=True))
    refused(wire.post("/v1/containers/remove", containerId=container, force=True), 404, "no_such_container")
    assert direct.request("GET", f"/volumes/{volume}").status_code == 404


@instead_of(docker.test_networks, "networks")
def test_networks_as_podman_does(wire: Wire, box: str, start: Start, direct: EngineDirect, names: Names) -> None:
    assert wire.get("/v1/containers/networks", containerId=box).json == {"networks": []}
    own = names("network")
    body = {"Name": own, "Labels": names.labels, "Internal": True}
    assert direct.request("POST", "/networks/create", json=body).status_code == 201
    container = start(networkMode=own)
    assert wire.get("/v1/containers/networks", containerId=container).json == {"networks": [own]}


@instead_of(docker.test_an_archive_for_a_missing_path_or_container_or_that_is_none, "upload")
def test_an_archive_for_a_missing_path_container_or_that_is_none_as_podman_does(wire: Wire, stopped_box: str) -> None:
    def put(container: str, path: str, payload: bytes) -> Reply:
        fields = {"containerId": container, "path": path, "payloadBase64": b64(payload)}
        return wire.post("/v1/containers/putArchive", **fields)

    done(put(stopped_box, "/no/such/folder", docker.tar_of(a=b"1")))
    refused(put("missing", "/", docker.tar_of(a=b"1")), 404, "no_such_container")
    refused(put(stopped_box, "/", b"no tar" * 1000), 500, "server_error")
