"""The engine face: containers, from create to prune, and the files in them."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from urllib.parse import quote, urlencode

import pytest

from comparison import JSON, TWIN, Both, Containers, Seen, asking, compares, twin_names
from conftest import EngineDirect, Names
from service import Runner

MISSING = "no-such-container"
REQUESTS = [
    ("GET", "/json"),
    ("GET", "/top"),
    ("GET", "/changes"),
    ("GET", "/export"),
    ("GET", "/stats?stream=false"),
    ("GET", "/logs?stdout=1"),
    ("GET", "/archive?path=/"),
    ("HEAD", "/archive?path=/"),
    ("PUT", "/archive?path=/"),
    ("POST", "/start"),
    ("POST", "/stop"),
    ("POST", "/restart"),
    ("POST", "/kill"),
    ("POST", "/pause"),
    ("POST", "/unpause"),
    ("POST", "/wait"),
    ("POST", "/rename?name=x"),
    ("POST", "/resize?h=1&w=1"),
    ("POST", "/attach?stream=1&stdout=1"),
]
"""Whatever can be asked of a container, without its name."""


@pytest.fixture
def both(request: pytest.FixtureRequest, runner: Runner, direct: EngineDirect) -> Iterator[Both]:
    yield from asking(request, runner, direct)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def running(containers: Containers) -> str:
    """A running container that no test changes."""
    return containers()


@pytest.fixture(scope="module")
def created(containers: Containers) -> str:
    """A container that was never started, and that no test changes."""
    return containers(start=False)


def tar_of(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1_600_000_000
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def labelled(names: Names, **more: list[str]) -> str:
    """The query of a list that holds only what these tests made."""
    labels = [f"{key}={value}" for key, value in names.labels.items()]
    return urlencode({"filters": json.dumps({"label": labels, **more})})


class TestCreateAndDelete:
    @compares("ContainerCreate")
    def test_create_relays_201_with_the_new_id(self, both: Both, containers: Containers, names: Names) -> None:
        body = json.dumps({**containers.base, "Cmd": ["true"]}).encode()
        seen = both.twins("POST", f"/v1.41/containers/create?name={TWIN}", twin_names(names, "c"), body, JSON)
        assert seen.status == 201
        assert both.engine("GET", f"/containers/{seen.json['Id']}/json").status == 200

    @compares("ContainerCreate")
    def test_create_with_a_name_in_use_relays_409(self, both: Both, containers: Containers, running: str) -> None:
        body = json.dumps(containers.base).encode()
        assert both.same("POST", f"/containers/create?name={running}", body, JSON).status == 409

    @compares("ContainerCreate")
    def test_create_from_a_missing_image_relays_404(self, both: Both) -> None:
        assert both.same("POST", "/containers/create", b'{"Image":"no/such:image"}', JSON).status == 404

    @compares("ContainerCreate")
    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            (b'{"Image":', JSON),
            (b"", JSON),
            (b"{}", {"Content-Type": "text/plain"}),
            (b"{}", {}),
            (b'{"Image":1}', JSON),
        ],
    )
    def test_create_with_a_malformed_body_relays_the_engines_error(
        self, both: Both, body: bytes, headers: dict[str, str]
    ) -> None:
        assert both.same("POST", "/containers/create", body, headers).status in (400, 500)

    @compares("ContainerCreate")
    def test_create_with_a_malformed_name_relays_400(self, both: Both, containers: Containers) -> None:
        body = json.dumps(containers.base).encode()
        assert both.same("POST", "/containers/create?name=%2Fa%2Fb", body, JSON).status == 400

    @compares("ContainerDelete")
    def test_delete_relays_204(self, both: Both, containers: Containers) -> None:
        seen = both.twins("DELETE", f"/containers/{TWIN}?v=1", containers.pair(start=False))
        assert (seen.status, seen.body) == (204, b"")

    @compares("ContainerDelete")
    def test_delete_of_a_running_container_relays_409(self, both: Both, running: str) -> None:
        assert both.same("DELETE", f"/containers/{running}").status == 409

    @compares("ContainerDelete")
    def test_delete_of_a_missing_container_relays_404(self, both: Both) -> None:
        assert both.same("DELETE", f"/containers/{MISSING}?force=1").status == 404

    @compares("ContainerDelete")
    def test_delete_of_a_link_of_two_segments_relays_the_engines_error(self, both: Both, running: str) -> None:
        assert both.same("DELETE", f"/containers/{running}/alias?link=1").status >= 400

    @compares("ContainerPrune")
    def test_prune_removes_what_its_filter_names(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "prune")
        for label in pair:
            containers(start=False, Labels={**names.labels, "twin": label})
        filters = quote(json.dumps({"label": [f"twin={TWIN}"]}), safe="")
        seen = both.twins("POST", f"/containers/prune?filters={filters}", pair)
        assert seen.status == 200
        assert len(seen.json["ContainersDeleted"]) == 1

    @compares("ContainerPrune")
    def test_prune_with_a_filter_that_does_not_exist_relays_the_engines_error(self, both: Both) -> None:
        assert both.same("POST", "/containers/prune?filters=%7B%22zz%22%3A%5B%221%22%5D%7D").status in (400, 500)


class TestReading:
    @compares("ContainerList")
    def test_list_relays_the_engines_json(self, both: Both, running: str, created: str, names: Names) -> None:
        seen = both.same("GET", f"/v1.41/containers/json?all=1&size=1&{labelled(names)}")
        assert seen.status == 200
        assert {f"/{running}", f"/{created}"} <= {name for found in seen.json for name in found["Names"]}

    @compares("ContainerList")
    @pytest.mark.parametrize("query", ["filters=nonsense", "limit=x", "filters=%7B%22zz%22%3A%5B%221%22%5D%7D"])
    def test_list_with_a_bad_parameter_relays_the_engines_error(self, both: Both, query: str) -> None:
        assert both.same("GET", f"/containers/json?{query}").status in (400, 500)

    @compares("ContainerInspect")
    @pytest.mark.parametrize("query", ["", "?size=1"])
    def test_inspect_relays_the_engines_json(self, both: Both, running: str, query: str) -> None:
        assert both.same("GET", f"/containers/{running}/json{query}").json["Name"] == f"/{running}"

    @compares("ContainerInspect")
    def test_inspect_takes_an_id_and_its_prefix(self, both: Both, running: str) -> None:
        found = both.same("GET", f"/containers/{running}/json").json["Id"]
        assert both.same("GET", f"/containers/{found}/json").json["Id"] == found
        assert both.same("GET", f"/v1.24/containers/{found[:12]}/json").json["Id"] == found

    @pytest.mark.parametrize(
        ("method", "rest"),
        REQUESTS,
    )
    def test_whatever_is_asked_of_a_missing_container_relays_404(self, both: Both, method: str, rest: str) -> None:
        assert both.same(method, f"/v1.41/containers/{MISSING}{rest}").status == 404

    @compares("ContainerTop")
    @pytest.mark.parametrize("query", ["", "?ps_args=-o%20pid,args"])
    def test_top_relays_the_processes(self, both: Both, running: str, query: str) -> None:
        assert both.same("GET", f"/containers/{running}/top{query}").status == 200

    @compares("ContainerTop")
    def test_top_of_a_stopped_container_relays_409(self, both: Both, created: str) -> None:
        assert both.same("GET", f"/containers/{created}/top").status == 409

    @compares("ContainerTop")
    def test_top_with_arguments_that_ps_refuses_relays_500(self, both: Both, running: str) -> None:
        assert both.same("GET", f"/containers/{running}/top?ps_args=-Zzz%20--nonsense").status == 500

    @compares("ContainerChanges")
    def test_changes_relays_what_was_made_and_removed(self, both: Both, containers: Containers) -> None:
        name = containers.ended("sh", "-c", "touch /made; rm -r /tmp")
        changes = both.same("GET", f"/containers/{name}/changes").json
        assert {(change["Path"], change["Kind"]) for change in changes} >= {("/made", 1), ("/tmp", 2)}


class TestRunning:
    @compares("ContainerStart")
    def test_start_relays_204(self, both: Both, containers: Containers) -> None:
        assert both.twins("POST", f"/containers/{TWIN}/start", containers.pair(start=False)).status == 204

    @compares("ContainerStart")
    def test_start_of_a_running_container_relays_304(self, both: Both, running: str) -> None:
        seen = both.same("POST", f"/containers/{running}/start")
        assert (seen.status, seen.body) == (304, b"")

    @compares("ContainerStart")
    def test_start_of_a_missing_program_relays_400(self, both: Both, containers: Containers) -> None:
        assert both.same("POST", f"/containers/{containers('/no/such', start=False)}/start").status == 400

    @compares("ContainerStop")
    def test_stop_relays_204(self, both: Both, containers: Containers) -> None:
        assert both.twins("POST", f"/v1.41/containers/{TWIN}/stop?t=5", containers.pair()).status == 204

    @compares("ContainerStop")
    def test_stop_of_a_stopped_container_relays_304(self, both: Both, created: str) -> None:
        seen = both.same("POST", f"/containers/{created}/stop")
        assert (seen.status, seen.body) == (304, b"")
        assert seen.header("api-version")

    @compares("ContainerRestart")
    def test_restart_relays_204(self, both: Both, containers: Containers) -> None:
        assert both.twins("POST", f"/containers/{TWIN}/restart?t=0", containers.pair(start=False)).status == 204

    @compares("ContainerKill")
    def test_kill_relays_204(self, both: Both, containers: Containers) -> None:
        assert both.twins("POST", f"/containers/{TWIN}/kill?signal=KILL", containers.pair()).status == 204

    @compares("ContainerKill")
    def test_kill_of_a_stopped_container_relays_409(self, both: Both, created: str) -> None:
        assert both.same("POST", f"/containers/{created}/kill").status == 409

    @compares("ContainerKill")
    def test_kill_with_a_signal_that_does_not_exist_relays_the_engines_error(self, both: Both, running: str) -> None:
        assert both.same("POST", f"/containers/{running}/kill?signal=NONSENSE").status in (400, 500)

    @compares("ContainerPause", "ContainerUnpause")
    def test_pause_and_unpause_relay_204_and_then_the_conflict(self, both: Both, containers: Containers) -> None:
        pair = containers.pair()
        assert both.twins("POST", f"/containers/{TWIN}/pause", pair).status == 204
        assert both.same("POST", f"/containers/{pair[0]}/pause").status in (409, 500)
        assert both.same("POST", f"/containers/{pair[0]}/exec", b'{"Cmd":["true"]}', JSON).status == 409
        assert both.twins("POST", f"/containers/{TWIN}/unpause", pair).status == 204
        assert both.same("POST", f"/containers/{pair[0]}/unpause").status in (409, 500)

    @compares("ContainerUpdate")
    def test_update_relays_its_warnings(self, both: Both, containers: Containers) -> None:
        body = b'{"RestartPolicy":{"Name":"no"},"CpuShares":512}'
        assert "Warnings" in both.twins("POST", f"/containers/{TWIN}/update", containers.pair(), body, JSON).json

    @compares("ContainerUpdate")
    def test_update_refused_by_the_engine_relays_its_error(self, both: Both, running: str) -> None:
        assert both.same("POST", f"/containers/{running}/update", b'{"Memory":1}', JSON).status in (400, 500)
        assert both.same("POST", f"/containers/{running}/update", b'{"Memory":', JSON).status in (400, 500)
        assert both.same("POST", f"/containers/{MISSING}/update", b"{}", JSON).status == 404

    @compares("ContainerRename")
    def test_rename_relays_204(self, both: Both, containers: Containers) -> None:
        pair = containers.pair(start=False)
        assert both.twins("POST", f"/containers/{TWIN}/rename?name={TWIN}-new", pair).status == 204
        assert both.engine("GET", f"/containers/{pair[1]}-new/json").status == 200

    @compares("ContainerRename")
    def test_rename_to_a_name_in_use_relays_409(self, both: Both, running: str, created: str) -> None:
        assert both.same("POST", f"/containers/{created}/rename?name={running}").status == 409

    @compares("ContainerRename")
    def test_rename_to_nothing_relays_the_engines_error(self, both: Both, created: str) -> None:
        assert both.same("POST", f"/containers/{created}/rename?name=").status in (400, 500)

    @compares("ContainerResize")
    def test_resize_relays_200(self, both: Both, containers: Containers) -> None:
        assert both.same("POST", f"/containers/{containers(Tty=True)}/resize?h=40&w=100").status == 200

    @compares("ContainerResize")
    def test_resize_without_a_size_relays_the_engines_error(self, both: Both, running: str) -> None:
        assert both.same("POST", f"/containers/{running}/resize?h=x").status in (400, 500)

    @compares("ContainerResize")
    def test_resize_of_a_stopped_container_relays_409(self, both: Both, created: str) -> None:
        assert both.same("POST", f"/containers/{created}/resize?h=40&w=100").status == 409

    @compares("ContainerWait")
    def test_wait_for_an_ended_container_relays_its_status_at_once(self, both: Both, containers: Containers) -> None:
        name = containers.ended("sh", "-c", "exit 7")
        assert both.same("POST", f"/containers/{name}/wait").json["StatusCode"] == 7

    @compares("ContainerWait")
    def test_wait_relays_the_head_at_once_and_the_status_at_the_end(self, both: Both, containers: Containers) -> None:
        pair = containers.pair()
        target = f"/containers/{pair[1]}/wait?condition=next-exit"
        with both.runner.stream("POST", target, b"") as response:
            assert response.status == 200
            threading.Thread(target=containers.do, args=("POST", f"/containers/{pair[1]}/kill", 204)).start()
            body = response.read()
        containers.do("POST", f"/containers/{pair[0]}/kill", 204)
        assert both.twins("POST", f"/containers/{TWIN}/wait", pair).body == body


class TestFiles:
    @compares("ContainerArchive")
    def test_a_folder_is_downloaded_byte_for_byte(self, both: Both, running: str) -> None:
        seen = both.same("GET", f"/containers/{running}/archive?path=/bin")
        assert seen.header("content-type") == "application/x-tar"
        assert seen.header("x-docker-container-path-stat")
        assert len(seen.body) > 1_000_000

    @compares("ContainerArchive")
    def test_a_compressed_download_passes_as_it_is(self, both: Both, running: str) -> None:
        target = f"/containers/{running}/archive?path=/etc"
        seen = both.same("GET", target, headers={"Accept-Encoding": "gzip"})
        assert seen.header("content-encoding") == "gzip"

    @compares("ContainerArchiveInfo")
    def test_a_stat_is_relayed_in_its_header_without_a_body(self, both: Both, running: str) -> None:
        seen = both.same("HEAD", f"/containers/{running}/archive?path=/bin/busybox")
        assert (seen.status, seen.body) == (200, b"")
        assert seen.header("x-docker-container-path-stat")

    @compares("PutContainerArchive", "ContainerArchive")
    def test_what_was_uploaded_is_downloaded_again(self, both: Both, containers: Containers) -> None:
        pair = containers.pair(start=False)
        content = bytes(range(256)) * 3000
        put = both.twins("PUT", f"/containers/{TWIN}/archive?path=/tmp", pair, tar_of(file=content))
        assert put.status == 200
        got = both.twins("GET", f"/containers/{TWIN}/archive?path=/tmp/file", pair)
        with tarfile.open(fileobj=io.BytesIO(got.body)) as tar:
            extracted = tar.extractfile("file")
            assert extracted is not None
            assert extracted.read() == content

    @compares("PutContainerArchive")
    @pytest.mark.parametrize("query", ["", "path=/no/such", "path=/bin/busybox", "path=/&noOverwriteDirNonDir=1"])
    def test_an_upload_that_the_engine_refuses_relays_its_error(self, both: Both, created: str, query: str) -> None:
        body = tar_of(bin=b"a file where a folder is")
        assert both.same("PUT", f"/containers/{created}/archive?{query}", body).status >= 400

    @compares("PutContainerArchive")
    def test_an_upload_into_a_read_only_container_relays_the_engines_error(
        self, both: Both, containers: Containers
    ) -> None:
        name = containers(start=False, HostConfig={"NetworkMode": "none", "ReadonlyRootfs": True})
        assert both.same("PUT", f"/containers/{name}/archive?path=/", tar_of(a=b"b")).status in (403, 500)

    @pytest.mark.parametrize(("query", "status"), [("", 400), ("path=/no/such", 404)])
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_download_that_the_engine_refuses_relays_its_error(
        self, both: Both, running: str, method: str, query: str, status: int
    ) -> None:
        assert both.same(method, f"/containers/{running}/archive?{query}").status == status

    @compares("ContainerExport")
    def test_an_export_is_the_whole_file_system_byte_for_byte(self, both: Both, containers: Containers) -> None:
        seen: Seen = both.same("GET", f"/containers/{containers.ended('touch', '/made')}/export")
        with tarfile.open(fileobj=io.BytesIO(seen.body)) as tar:
            assert {"made", "bin/busybox"} <= set(tar.getnames())
