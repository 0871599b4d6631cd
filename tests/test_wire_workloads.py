"""The wire protocol as WIRE.md states it, section 4: the table without exec and streams."""

import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from conftest import EngineDirect, Names, Registry
from service import Runner
from wire import GETS, POSTS, Reply, Wire, b64, compact, done, refused, target

Start = Callable[..., str]
ESCAPES = ["..", ".", "../../info", "{id}/rename?name=x", "{id}?force=1", "{id}#", "{id}\0", "{id}/", "/{id}", "%2e%2e"]


def tar_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def volume(direct: EngineDirect, names: Names) -> str:
    name = names("volume")
    assert direct.request("POST", "/volumes/create", json={"Name": name, "Labels": names.labels}).status_code == 201
    return name


# 4. The table


@pytest.mark.parametrize("path", [path for path in POSTS if "containerId" in POSTS[path]])
@pytest.mark.parametrize("name", ESCAPES)
def test_a_container_id_stays_a_name(wire: Wire, box: str, path: str, name: str) -> None:
    fields = {**POSTS[path], "containerId": name.format(id=box)}
    refused(wire.post(path, **fields), 404, "no_such_container")
    assert wire.get("/v1/containers/inspect", containerId=box).json["Name"] != "/x"


@pytest.mark.parametrize("path", [path for path in GETS if "containerId" in GETS[path]])
@pytest.mark.parametrize("name", [*ESCAPES, "{id}/json", "{id}/logs?stdout=1", "json"])
def test_a_container_id_in_a_query_stays_a_name(wire: Wire, box: str, path: str, name: str) -> None:
    refused(wire.get(path, containerId=name.format(id=box)), 404, "no_such_container")


@pytest.mark.parametrize("name", ["..", ".", "../containers/{id}", "a/b", "a\0b", "a#b", "a?force=1", "%2e%2e"])
def test_volume_and_exec_names_stay_names(wire: Wire, box: str, name: str) -> None:
    name = name.format(id=box)
    refused(wire.post("/v1/volumes/remove", volumeName=name, force=False), 404, "no_such_volume")
    refused(wire.post("/v1/exec/resize", execId=name, size={"cols": 1, "rows": 1}), 404, "no_such_exec")
    assert wire.get("/v1/containers/listByVolume", volumeName=name).json == {"containerIds": []}


@pytest.mark.parametrize("name", ["..", "../containers/json", "a/../../info", "a//b", "a\0b", "a?b", "a#b", "A"])
def test_image_names_stay_names(wire: Wire, name: str) -> None:
    refused(wire.post("/v1/images/ensure", image=name), 400, "bad_parameter")


def test_a_container_is_addressed_by_id_prefix_and_name(wire: Wire, start: Start, names: Names) -> None:
    name = names("box")
    container = start(name=name)
    for address in (container, container[:12], name):
        for path, query in GETS.items():
            if "containerId" in query and not path.endswith("sse"):
                assert wire.get(path, containerId=address).status == 200
        done(wire.post("/v1/containers/touch", containerId=address))
        done(wire.post("/v1/containers/putArchive", containerId=address, path="/", payloadBase64=b64(tar_of(a=b"1"))))
        assert wire.post("/v1/exec/run", containerId=address, command="true").json["exitCode"] == 0
        asked: dict[str, Any] = {"containerId": address, "follow": False}
        assert wire.request("GET", target("/v1/containers/logs/sse", asked)).status == 200
    done(wire.post("/v1/containers/stop", containerId=name, timeoutSec=0))
    done(wire.post("/v1/containers/remove", containerId=container[:12]))


def test_ensure_of_a_present_image(wire: Wire, image: str) -> None:
    for name in (image, image.removesuffix(":latest")):
        done(wire.post("/v1/images/ensure", image=name))


@pytest.fixture(scope="module")
def pushed(direct: EngineDirect, registry: Registry, image: str, names: Names) -> tuple[str, str]:
    """A repository in our registry, and the digest of its `latest`."""
    repository = f"{registry.address}/{names('image')}"
    direct.request("POST", f"/images/{image}/tag", params={"repo": repository, "tag": "latest"})
    direct.request("POST", f"/images/{repository}/push", params={"tag": "latest"}, headers={"X-Registry-Auth": "e30="})
    digest: str = direct.request("GET", f"/images/{repository}/json").json()["RepoDigests"][-1].partition("@")[2]
    return repository, digest


@pytest.mark.parametrize("suffix", ["", ":latest", "@{digest}", ":latest@{digest}"])
def test_ensure_pulls_by_tag_digest_and_neither(
    wire: Wire, direct: EngineDirect, pushed: tuple[str, str], suffix: str
) -> None:
    repository, digest = pushed
    direct.request("DELETE", f"/images/{repository}:latest")
    direct.request("DELETE", f"/images/{repository}@{digest}")
    name = repository + suffix.format(digest=digest)
    for _ in range(2):
        done(wire.post("/v1/images/ensure", image=name))
    found = repository + ("@" + digest if "@" in suffix else ":latest")
    assert direct.request("GET", f"/images/{found}/json").status_code == 200


def test_ensure_with_a_platform_always_pulls(wire: Wire, registry: Registry, pushed: tuple[str, str]) -> None:
    done(wire.post("/v1/images/ensure", image=pushed[0], platform="linux/amd64"))
    registry.stop()
    try:
        done(wire.post("/v1/images/ensure", image=pushed[0]))
        reply = wire.post("/v1/images/ensure", image=pushed[0], platform="linux/amd64")
        assert reply.status >= 500
        assert reply.json["error"]["retryable"] is True
    finally:
        registry.start()


def test_ensure_of_a_missing_image(wire: Wire, registry: Registry) -> None:
    refused(wire.post("/v1/images/ensure", image=f"{registry.address}/missing"), 404, "no_such_image")
    refused(wire.post("/v1/images/ensure", image="x", platform="bogus"), 400, "bad_parameter")


def test_ensure_shows_its_progress_to_those_who_ask(wire: Wire, registry: Registry, pushed: tuple[str, str]) -> None:
    asked = {"Accept": "text/event-stream"}
    body = compact({"image": pushed[0], "platform": "linux/amd64"})
    reply = wire.request("POST", "/v1/images/ensure", body, asked)
    messages = [json.loads(block.removeprefix(b"data: ")) for block in reply.body.split(b"\n\n")[:-1]]
    assert messages[-1] == {"type": "end"}
    assert [message["type"] for message in messages[:-1]] == ["progress"] * (len(messages) - 1)
    assert messages[0]["event"]["status"].startswith("Pulling from")


def test_start_answers_id_name_and_status(wire: Wire, image: str, names: Names, direct: EngineDirect) -> None:
    name = names("box")
    fields = {"image": image, "cmd": ["sleep", "100000"], "networkMode": "none", "labels": names.labels}
    reply = wire.post("/v1/containers/start", **fields, name=name)
    assert reply.status == 200
    container = reply.json["containerId"]
    assert reply.json == {"containerId": container, "name": name, "status": "running"}
    found = direct.request("GET", f"/containers/{container}/json").json()
    assert (found["Id"], found["Name"], found["State"]["Running"]) == (container, f"/{name}", True)
    assert found["HostConfig"]["AutoRemove"] is True
    unnamed = wire.post("/v1/containers/start", **fields)
    assert set(unnamed.json) == {"containerId", "status"}
    for each in (container, unnamed.json["containerId"]):
        done(wire.post("/v1/containers/remove", containerId=each, force=True))


def test_every_field_of_start_reaches_the_engine(
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
    assert [item for item in config["Env"] if not item.startswith("PATH=")] == ["A=1", "B=x=\xe4 y"]
    assert (config["WorkingDir"], config["Tty"]) == ("/tmp", True)
    assert config["Labels"].items() >= {**names.labels, "a": "b"}.items()
    assert (host["AutoRemove"], host["Binds"]) == (False, [f"{volume}:/mnt:ro"])
    assert host["NetworkMode"] == "none"
    assert {mount["Destination"] for mount in found["Mounts"]} == {"/mnt", "/data"}
    listed = start(env=["A=1", "B=2=3"], cmd=["sleep", "100000"])
    env = direct.request("GET", f"/containers/{listed}/json").json()["Config"]["Env"]
    assert [item for item in env if not item.startswith("PATH=")] == ["A=1", "B=2=3"]


def test_create_extras_are_merged_last(wire: Wire, start: Start, direct: EngineDirect, names: Names) -> None:
    name = names("extra")
    extras = {
        "name": name,
        "Hostname": "other",
        "Labels": {**names.labels, "replaced": "yes"},
        "HostConfig": {"Memory": 64 << 20, "AutoRemove": False},
    }
    container = start(labels={"gone": "1"}, autoRemove=True, env={"A": "1"}, createExtras=extras)
    found = direct.request("GET", f"/containers/{container}/json").json()
    assert (found["Name"], found["Config"]["Hostname"]) == (f"/{name}", "other")
    assert found["Config"]["Labels"] == {**names.labels, "replaced": "yes"}
    assert "A=1" in found["Config"]["Env"]
    host = found["HostConfig"]
    assert (host["Memory"], host["AutoRemove"], host["NetworkMode"]) == (64 << 20, False, "none")


def test_the_platform_of_start_is_kept_as_a_label(
    wire: Wire, start: Start, pushed: tuple[str, str], names: Names
) -> None:
    container = start(image=pushed[0], platform="linux/amd64", labels={"a": "b"})
    labels = wire.get("/v1/containers/labels", containerId=container).json
    assert labels == {"labels": {**names.labels, "a": "b", "hautech.ai/platform": "linux/amd64"}}


def test_an_environment_of_100_kb(wire: Wire, start: Start) -> None:
    container = start(env={"LARGE": "x" * 100_000})
    result = wire.post("/v1/exec/run", containerId=container, command="printf %s $LARGE | wc -c")
    assert result.json["stdout"].strip() == "100000"


def test_the_default_image(image: str, names: Names, engine: Any) -> None:
    with Runner(engine.socket, {"DOCKER_RUNNER_DEFAULT_IMAGE": image}) as runner:
        extras = {"HostConfig": {"NetworkMode": "none"}, "Cmd": ["sleep", "100000"]}
        reply = Wire(runner.url, runner.secret).post("/v1/containers/start", labels=names.labels, createExtras=extras)
        assert reply.status == 200


def test_a_container_whose_start_failed_is_removed_again(wire: Wire, image: str, names: Names) -> None:
    name = names("broken")
    body = {"image": image, "name": name, "cmd": ["/no/such/program"], "networkMode": "none", "labels": names.labels}
    reply = wire.post("/v1/containers/start", **body, autoRemove=False)
    assert "no such file" in refused(reply, 400, "bad_parameter")
    refused(wire.get("/v1/containers/inspect", containerId=name), 404, "no_such_container")


def test_a_name_in_use(wire: Wire, start: Start, image: str, names: Names) -> None:
    name = names("box")
    container = start(name=name)
    reply = wire.post("/v1/containers/start", image=image, name=name, labels=names.labels)
    assert container in refused(reply, 409, "conflict")
    assert wire.get("/v1/containers/inspect", containerId=name).json["Id"] == container


def test_stop_relays_204_304_and_404(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(cmd=["sh", "-c", 'trap "exit 3" TERM; while :; do sleep 0.05; done'])
    done(wire.post("/v1/containers/stop", containerId=container))
    state = direct.request("GET", f"/containers/{container}/json").json()["State"]
    assert (state["Running"], state["ExitCode"]) == (False, 3)
    reply = wire.post("/v1/containers/stop", containerId=container)
    assert (reply.status, reply.body) == (304, b"")
    refused(wire.post("/v1/containers/stop", containerId="missing"), 404, "no_such_container")


def test_remove_relays_204_404_and_409(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(anonymousVolumes=["/data"])
    volume = direct.request("GET", f"/containers/{container}/json").json()["Mounts"][0]["Name"]
    refused(wire.post("/v1/containers/remove", containerId=container), 409, "conflict")
    refused(wire.post("/v1/containers/remove", containerId=container, force=False), 409, "conflict")
    done(wire.post("/v1/containers/remove", containerId=container, force=True, removeVolumes=True))
    refused(wire.post("/v1/containers/remove", containerId=container, force=True), 404, "no_such_container")
    assert direct.request("GET", f"/volumes/{volume}").status_code == 404


def test_remove_keeps_anonymous_volumes_unless_told(wire: Wire, start: Start, direct: EngineDirect) -> None:
    container = start(anonymousVolumes=["/data"])
    volume = direct.request("GET", f"/containers/{container}/json").json()["Mounts"][0]["Name"]
    done(wire.post("/v1/containers/remove", containerId=container, force=True))
    done(wire.post("/v1/volumes/remove", volumeName=volume))


def test_inspect_is_the_engines_json_unchanged(wire: Wire, stopped_box: str, direct: EngineDirect) -> None:
    reply = wire.get("/v1/containers/inspect", containerId=stopped_box)
    assert (reply.status, reply.header("content-type")) == (200, "application/json")
    assert reply.body == direct.request("GET", f"/containers/{stopped_box}/json").content
    for path in ("inspect", "labels", "networks"):
        refused(wire.get(f"/v1/containers/{path}", containerId="missing"), 404, "no_such_container")


def test_networks(wire: Wire, box: str, start: Start, direct: EngineDirect, names: Names) -> None:
    assert wire.get("/v1/containers/networks", containerId=box).json == {"networks": ["none"]}
    own = names("network")
    body = {"Name": own, "Labels": names.labels, "Internal": True}
    assert direct.request("POST", "/networks/create", json=body).status_code == 201
    container = start(networkMode=own)
    assert wire.get("/v1/containers/networks", containerId=container).json == {"networks": [own]}


def test_find_by_labels_wants_all_of_them_in_order(wire: Wire, start: Start, direct: EngineDirect) -> None:
    mark = secrets.token_hex(4)
    both = [start(labels={"mark": mark, "second": "2"}) for _ in range(3)]
    one = start(labels={"mark": mark, "second": ""})
    ended = start(labels={"mark": mark, "second": "2"})
    done(wire.post("/v1/containers/stop", containerId=ended, timeoutSec=0))
    created = {each["Id"]: each["Created"] for each in direct.request("GET", "/containers/json?all=1").json()}

    def ordered(*containers: str) -> dict[str, list[str]]:
        return {"containerIds": sorted(containers, key=lambda container: (created[container], container))}

    def find(**fields: Any) -> Any:
        reply = wire.post("/v1/containers/findByLabels", **fields)
        assert reply.status == 200
        return reply.json

    assert find(labels={"mark": mark, "second": "2"}) == ordered(*both)
    assert find(labels={"mark": mark, "second": "2"}, all=True) == ordered(*both, ended)
    assert find(labels={"mark": mark, "second": ""}) == ordered(one)
    assert find(labels={"mark": mark}, all=False) == ordered(*both, one)
    assert find(labels={"mark": mark, "third": "3"}) == {"containerIds": []}
    assert find(labels={"mark": mark[:-1]}, all=True) == {"containerIds": []}


def test_list_by_volume_finds_stopped_ones_too_and_no_folders(wire: Wire, start: Start, volume: str) -> None:
    running = start(binds=[f"{volume}:/mnt/folder"])
    ended = start(binds=[f"{volume}:/mnt/folder"])
    done(wire.post("/v1/containers/stop", containerId=ended, timeoutSec=0))
    reply = wire.get("/v1/containers/listByVolume", volumeName=volume)
    assert reply.status == 200
    assert set(reply.json) == {"containerIds"}
    assert sorted(reply.json["containerIds"]) == sorted([running, ended])
    for name in ("/mnt/folder", volume[:-1], "missing", volume + "/"):
        assert wire.get("/v1/containers/listByVolume", volumeName=name).json == {"containerIds": []}


def test_remove_of_a_volume(wire: Wire, start: Start, volume: str) -> None:
    container = start(binds=[f"{volume}:/mnt"])
    refused(wire.post("/v1/volumes/remove", volumeName=volume), 409, "conflict")
    refused(wire.post("/v1/volumes/remove", volumeName=volume, force=True), 409, "conflict")
    done(wire.post("/v1/containers/remove", containerId=container, force=True))
    done(wire.post("/v1/volumes/remove", volumeName=volume))
    refused(wire.post("/v1/volumes/remove", volumeName=volume), 404, "no_such_volume")
    done(wire.post("/v1/volumes/remove", volumeName=volume, force=True))


def test_touch(wire: Wire, box: str, stopped_box: str) -> None:
    done(wire.post("/v1/containers/touch", containerId=box))
    done(wire.post("/v1/containers/touch", containerId=stopped_box))
    refused(wire.post("/v1/containers/touch", containerId="missing"), 404, "no_such_container")


@pytest.mark.parametrize("folder", ["/tmp", "/tmp/a b?c=d#e&f%41+\xe4"])
def test_an_archive_is_unpacked_byte_for_byte(wire: Wire, start: Start, direct: EngineDirect, folder: str) -> None:
    container = start()
    assert wire.post("/v1/exec/run", containerId=container, command=["mkdir", "-p", folder]).json["exitCode"] == 0
    done(wire.post("/v1/containers/stop", containerId=container, timeoutSec=0))  # It need not run.
    content = os.urandom(3_000_000)
    fields = {"containerId": container, "path": folder, "payloadBase64": b64(tar_of(result=content))}
    done(wire.post("/v1/containers/putArchive", **fields))
    got = direct.request("GET", f"/containers/{container}/archive?path={quote(folder + '/result')}")
    with tarfile.open(fileobj=io.BytesIO(got.content)) as tar:
        unpacked = tar.extractfile("result")
        assert unpacked is not None
        assert unpacked.read() == content


def test_an_archive_for_a_missing_path_or_container_or_that_is_none(wire: Wire, stopped_box: str) -> None:
    def put(container: str, path: str, payload: bytes) -> Reply:
        fields = {"containerId": container, "path": path, "payloadBase64": b64(payload)}
        return wire.post("/v1/containers/putArchive", **fields)

    message = refused(put(stopped_box, "/no/such/folder", tar_of(a=b"1")), 404, "put_archive_failed")
    assert "/no/such/folder" in message
    refused(put("missing", "/", tar_of(a=b"1")), 404, "no_such_container")
    refused(put(stopped_box, "/", b"no tar" * 1000), 500, "server_error")
