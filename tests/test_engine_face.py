"""The engine face: the system's own operations, volumes, networks; targets and headers on their way to the engine.

Every operation of the table is compared with the engine here or in the other test_engine_face_* files; the last test
sees to it.
"""

import json
import re
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
import test_engine_face_containers
import test_engine_face_images
import test_engine_face_streams

import operations
from comparison import JSON, SHOWN, TWIN, Both, Containers, Seen, asking, compares, exchange, twin_names
from conftest import EngineDirect, Names
from scripted import OK, ScriptedEngine
from service import Runner, signed_head

# Imported, so that what they declare to compare is known to the last test.
OTHER_FILES = (test_engine_face_containers, test_engine_face_images, test_engine_face_streams)


@pytest.fixture
def both(request: pytest.FixtureRequest, runner: Runner, direct: EngineDirect) -> Iterator[Both]:
    yield from asking(request, runner, direct)


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def named(containers: Containers) -> str:
    """A container that no test changes."""
    return containers(start=False)


@pytest.fixture(scope="module")
def recorder() -> Iterator[ScriptedEngine]:
    """Stands in the engine's place to show what reaches it."""
    with ScriptedEngine(lambda peer: peer.answer(OK)) as engine:
        yield engine


@pytest.fixture(scope="module")
def recorded(recorder: ScriptedEngine) -> Iterator[Runner]:
    """A runner in front of the recorder."""
    with Runner(recorder.path) as running:
        yield running


def filtered(names: Names, **more: list[str]) -> str:
    """The query of a list that holds only what these tests made."""
    labels = [f"{key}={value}" for key, value in names.labels.items()]
    return urlencode({"filters": json.dumps({"label": labels, **more})})


def steady_info(seen: Seen) -> object:
    """A view of /info without what never stands still, nor its length."""
    moving = ("SystemTime", "NGoroutines", "NFd", "NEventsListener")
    fields = [field for field in seen.headers if field[0] != "content-length"]
    return seen.status, fields, {key: value for key, value in seen.json.items() if key not in moving}


def steady_usage(seen: Seen) -> object:
    """A view of /system/df without the sizes of what containers write, how long they have run, and the length."""
    fields = [field for field in seen.headers if field[0] != "content-length"]
    moving = re.compile(rb'("Size\w*":|"LayersSize":|"SharedSize":)-?\d+|("Status":")[^"]*')
    return seen.status, fields, moving.sub(rb"\1\2", seen.body)


class TestSystem:
    @compares("SystemPing")
    @pytest.mark.parametrize("target", ["/_ping", "/v1.41/_ping", "/v1.24/_ping?a=b"])
    def test_ping(self, both: Both, target: str) -> None:
        seen = both.same("GET", target)
        assert seen.body == b"OK"
        assert {"api-version", "docker-experimental", "ostype", "server"} <= dict(seen.headers).keys()

    @compares("SystemPingHead")
    @pytest.mark.parametrize("target", ["/_ping", "/v1.41/_ping"])
    def test_ping_by_head_has_no_body(self, both: Both, target: str) -> None:
        seen = both.same("HEAD", target)
        assert (seen.status, seen.body) == (200, b"")

    @compares("SystemVersion")
    @pytest.mark.parametrize("target", ["/version", "/v1.41/version"])
    def test_version(self, both: Both, target: str) -> None:
        assert both.same("GET", target).json["ApiVersion"]

    @compares("SystemInfo")
    @pytest.mark.parametrize("target", ["/info", "/v1.41/info"])
    def test_info(self, both: Both, target: str) -> None:
        assert both.same("GET", target, view=steady_info).json["ID"]

    @compares("SystemDataUsage")
    def test_data_usage(self, both: Both, named: str) -> None:
        seen = both.same("GET", "/v1.41/system/df", view=steady_usage)
        assert f"/{named}" in [name for found in seen.json["Containers"] for name in found["Names"]]

    def test_a_version_that_is_too_new_or_too_old_relays_400(self, both: Both) -> None:
        assert both.same("GET", "/v1.999/containers/json").status == 400
        assert both.same("GET", "/v1.0/containers/json").status == 400

    def test_doubled_slashes_relay_the_engines_redirect(self, both: Both) -> None:
        for target in ("/images//json", "//v1.41/images/json", "/v1.41//containers//json?all=1"):
            seen = both.same_raw("GET", target)
            assert seen.status == 301
            assert "//" not in (seen.header("location") or "//")


class TestVolumes:
    @compares("VolumeCreate", "VolumeInspect", "VolumeDelete")
    def test_a_volume_is_made_shown_and_removed(self, both: Both, names: Names) -> None:
        pair = twin_names(names, "volume")
        body = json.dumps({"Name": TWIN, "Labels": names.labels}).encode()
        assert both.twins("POST", "/v1.41/volumes/create", pair, body, JSON).status == 201
        assert both.same("GET", f"/v1.41/volumes/{pair[1]}").json["Name"] == pair[1]
        assert both.twins("DELETE", f"/volumes/{TWIN}", pair).status == 204
        assert both.same("GET", f"/volumes/{pair[1]}").status == 404

    @compares("VolumeCreate")
    @pytest.mark.parametrize("body", [b'{"Name":"a/b"}', b'{"Name":1}', b"{"])
    def test_create_refused_by_the_engine_relays_its_error(self, both: Both, body: bytes) -> None:
        assert both.same("POST", "/volumes/create", body, JSON).status in (400, 404, 500)

    @compares("VolumeDelete")
    def test_delete_of_a_volume_in_use_relays_409_and_of_a_missing_one_404(
        self, both: Both, containers: Containers, names: Names
    ) -> None:
        volume = names("volume")
        containers(start=False, HostConfig={"NetworkMode": "none", "Binds": [f"{volume}:/v"]})
        assert both.same("DELETE", f"/volumes/{volume}").status == 409
        assert both.same("DELETE", "/volumes/no-such-volume").status == 404

    @compares("VolumeList")
    def test_list(self, both: Both, containers: Containers, names: Names) -> None:
        containers.do("POST", "/volumes/create", 201, json={"Name": names("volume"), "Labels": names.labels})
        assert both.same("GET", f"/v1.41/volumes?{filtered(names)}").json["Volumes"]
        assert both.same("GET", "/volumes?filters=nonsense").status in (400, 500)

    @compares("VolumePrune")
    def test_prune_removes_what_its_filter_names(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "volume")
        for name in pair:
            labels = {**names.labels, "twin": name}
            containers.do("POST", "/volumes/create", 201, json={"Name": name, "Labels": labels})
        filters = urlencode({"filters": json.dumps({"label": [f"twin={TWIN}"]})})
        assert both.twins("POST", f"/v1.41/volumes/prune?{filters}", pair).json["VolumesDeleted"] == [pair[1]]
        assert both.same("POST", "/volumes/prune?filters=nonsense").status in (400, 500)


class TestNetworks:
    @compares("NetworkCreate", "NetworkInspect", "NetworkConnect", "NetworkDisconnect", "NetworkDelete")
    def test_a_network_is_made_connected_and_removed(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "network")
        member = containers(start=False, HostConfig={"NetworkMode": "bridge"})
        body = json.dumps({"Name": TWIN, "Labels": names.labels, "Internal": True}).encode()
        assert both.twins("POST", "/v1.41/networks/create", pair, body, JSON).status == 201
        assert both.same("GET", f"/v1.41/networks/{pair[1]}?verbose=1").json["Labels"] == names.labels
        body = json.dumps({"Container": member}).encode()
        assert both.twins("POST", f"/networks/{TWIN}/connect", pair, body, JSON).status == 200
        assert both.twins("POST", f"/networks/{TWIN}/disconnect", pair, body, JSON).status == 200
        assert both.twins("DELETE", f"/networks/{TWIN}", pair).status == 204

    @compares("NetworkCreate", "NetworkInspect", "NetworkConnect", "NetworkDisconnect", "NetworkDelete")
    def test_what_the_engine_refuses_relays_its_error(self, both: Both) -> None:
        assert both.same("POST", "/networks/create", b"{", JSON).status in (400, 500)
        body = b'{"Name":"bridge","CheckDuplicate":true}'
        assert both.same("POST", "/networks/create", body, JSON).status in (403, 409)
        assert both.same("GET", "/networks/no-such-network").status == 404
        assert both.same("DELETE", "/networks/no-such-network").status == 404
        assert both.same("DELETE", "/networks/host").status == 403
        assert both.same("POST", "/networks/no-such-network/disconnect", b'{"Container":"no-such"}', JSON).status == 404
        for rest in ("connect", "disconnect"):
            assert both.same("POST", f"/networks/none/{rest}", b'{"Container":"no-such"}', JSON).status == 404
            assert both.same("POST", f"/networks/none/{rest}", b"{", JSON).status in (400, 500)

    @compares("NetworkList")
    def test_list(self, both: Both) -> None:
        seen = both.same("GET", "/v1.41/networks?filters=%7B%22name%22%3A%5B%22none%22%5D%7D")
        assert [found["Driver"] for found in seen.json] == ["null"]
        assert both.same("GET", "/networks?filters=nonsense").status in (400, 500)

    @compares("NetworkPrune")
    def test_prune_removes_what_its_filter_names(self, both: Both, containers: Containers, names: Names) -> None:
        pair = twin_names(names, "network")
        for name in pair:
            labels = {**names.labels, "twin": name}
            containers.do("POST", "/networks/create", 201, json={"Name": name, "Labels": labels})
        filters = urlencode({"filters": json.dumps({"label": [f"twin={TWIN}"]})})
        assert both.twins("POST", f"/v1.41/networks/prune?{filters}", pair).json["NetworksDeleted"] == [pair[1]]
        assert both.same("POST", "/networks/prune?filters=nonsense").status in (400, 500)


class TestTargets:
    @pytest.mark.parametrize(
        "target",
        [
            "/containers/json?",
            "/containers/json?all=1&all=0&&=&limit=1",
            "/containers/json?filters=%7B%22label%22%3A%5B%22no=such%22%5D%7D",
            "/containers/json?a;b",
            "/containers/json?a=%zz",
            "/containers/json?a=/../..//b?c",
            "/v1.24/containers/json?all=1",
            "/v1.041/_ping",
            "/containers/NAME/json",
            "/containers/NAME%20/json",
            "/containers/%2e%2e%2e/json",
            "/containers/.../json",
            "/containers/a;b/json",
            "/containers/a%3Fb%23/json",
            "/containers/%C3%A9%e9/json",
            "/containers/a%255c/json",
            "/containers/create/json",
            "/containers/json/json",
            "/images/json/json",
            "/images/get/json",
            "/images/get/get",
            "/images/docker-runner-test%2Fbusybox%3Alatest/json",
            "/images/docker-runner-test/busybox:latest/json",
            "/images/a@sha256:00/json",
            "/images/a/json/json/history",
            "/volumes/create",
            "/volumes/prune",
            "/volumes/a%20b",
            "/networks/create",
            "/networks/%6eone",
            "/distribution/127.0.0.1:1/a/b/json",
        ],
    )
    def test_an_odd_target_gets_the_engines_own_answer(self, both: Both, named: str, target: str) -> None:
        both.same_raw("GET", target.replace("NAME", named))

    @pytest.mark.parametrize(
        "target",
        [
            "/containers/json",
            "/containers/json?",
            "/v1.41/images/a%2Fb/json?x=%20+%2B&x=/../;y=1&&",
            "/containers/%C3%a9/json?q=\\|{}\"'<>^`",
            "/containers/a/logs?since=1&since=2",
            "/images//json",
        ],
    )
    def test_path_and_query_reach_the_engine_byte_for_byte(
        self, recorder: ScriptedEngine, recorded: Runner, target: str
    ) -> None:
        assert recorded.raw(signed_head("GET", target, b"", "Connection: close")).endswith(b"ok")
        assert recorder.requests[-1].startswith(f"GET {target} HTTP/1.1\r\nHost: docker\r\n".encode())

    @pytest.mark.parametrize(
        ("method", "target", "status", "allow"),
        [
            ("GET", "/containers/a%2Fjson", 400, None),
            ("GET", "/containers/a%2Fb/json", 400, None),
            ("GET", "/containers%2Fjson", 404, None),
            ("GET", "/containers/../info", 400, None),
            ("GET", "/containers/../json", 400, None),
            ("GET", "/containers/./json", 400, None),
            ("GET", "/containers/%2e%2e/json", 400, None),
            ("GET", "/containers/%2E./json", 400, None),
            ("GET", "/images/a/%2e%2e/b/json", 400, None),
            ("GET", "/images/a%2F..%2Fb/json", 400, None),
            ("DELETE", "/images/..%2Fcontainers%2Fa", 400, None),
            ("GET", "/containers/a%00/json", 400, None),
            ("GET", "/containers/a%0d%0aX:y/json", 400, None),
            ("GET", "/containers/%zz/json", 400, None),
            ("GET", "/containers/a%/json", 400, None),
            ("GET", "/containers/json;a=b", 405, "DELETE"),
            ("GET", "/containers;a=b/json", 404, None),
            ("GET", "/%63ontainers/json", 404, None),
            ("GET", "/containers/a/j%73on", 405, "DELETE"),
            ("GET", "/v1.41/v1.41/containers/json", 404, None),
            ("GET", "/v1.41.2/containers/json", 404, None),
            ("GET", "/%761.41/containers/json", 404, None),
            ("GET", "/v1.41", 404, None),
            ("GET", "/", 404, None),
            ("GET", "//", 404, None),
            ("GET", "/containers/json/", 400, None),
            ("GET", "/containers/a/json/", 404, None),
            ("DELETE", "/containers/a/", 400, None),
            ("GET", "/volumes/a/", 404, None),
            ("GET", "/images//", 400, None),
            ("GET", "/networks/", 400, None),
            ("GET", "http://host/containers/json", 404, None),
            ("GET", "containers/json", 400, None),
            ("GET", "/containers/json#fragment", 400, None),
            ("GET", "/containers/json?a#fragment", 400, None),
            ("GET", "/containers/a/attach/ws", 404, None),
            ("GET", "/v1.41/swarm", 404, None),
            ("POST", "/swarm/init", 404, None),
            ("GET", "/services", 404, None),
            ("GET", "/plugins", 404, None),
            ("POST", "/plugins/pull?remote=a", 404, None),
            ("POST", "/build/cancel", 404, None),
            ("POST", "/containers/a/copy", 405, "DELETE"),
            ("POST", "/containers/a/checkpoints", 405, "DELETE"),
            ("DELETE", "/containers/a/checkpoints/c", 404, None),
            ("GET", "/metrics", 404, None),
            ("GET", "/debug/pprof/", 404, None),
            ("POST", "/containers/a/json", 405, "DELETE, GET"),
            ("GET", "/containers/a/start", 405, "DELETE, POST"),
            ("DELETE", "/exec/a/json", 405, "GET"),
            ("OPTIONS", "/_ping", 405, "GET, HEAD"),
            ("PATCH", "/v1.41/containers/create", 405, "DELETE, POST"),
            ("PUT", "/build", 405, "POST"),
        ],
    )
    def test_what_is_not_in_the_table_is_refused_and_reaches_nobody(
        self, recorder: ScriptedEngine, recorded: Runner, method: str, target: str, status: int, allow: str | None
    ) -> None:
        before = len(recorder.requests), recorder.connections
        seen = exchange(recorded.connect(), signed_head(method, target, b"", "Connection: close"), method)
        assert seen.status == status
        assert seen.json["message"] == seen.json["error"]["message"]
        assert seen.json["error"]["retryable"] is False
        assert seen.header("allow") == allow
        assert (len(recorder.requests), recorder.connections) == before


class TestRequests:
    """What reaches the engine of a request's headers and body."""

    def test_headers_travel_unchanged_but_for_hop_by_hop_and_the_signatures(
        self, recorder: ScriptedEngine, recorded: Runner
    ) -> None:
        kept = ["X-Registry-Auth: e30=", "X-Registry-Config: {}", "Accept: a, b", "User-Agent: Docker-Client/1 (x)"]
        kept += ["X-Twice: 1", "X-Twice: 2", "X-Empty: ", "X-Latin: \xe9", "X-Forwarded-For: 1.2.3.4"]
        dropped = ["TE: trailers", "Trailer: x", "Keep-Alive: timeout=5", "Proxy-Connection: close", "X-DR-Other: 1"]
        dropped += ["HTTP2-Settings: a", "Connection: close, X-Foo", "X-Foo: hop"]
        assert recorded.raw(signed_head("GET", "/_ping", b"", *kept, *dropped)).endswith(b"ok")
        _, _, *fields = recorder.requests[-1].removesuffix(b"\r\n\r\n").decode("latin-1").split("\r\n")
        lowered = [f"{name.lower()}:{value}" for name, _, value in (field.partition(":") for field in kept)]
        assert [field.rstrip() for field in fields] == [field.rstrip() for field in lowered]

    def test_an_expectation_is_not_forwarded(self, recorder: ScriptedEngine, recorded: Runner) -> None:
        head = signed_head("POST", "/containers/create", b"{}", "Expect: 100-continue", "Connection: close")
        assert recorded.raw(head + b"{}").endswith(b"ok")
        assert b"expect" not in recorder.requests[-1].lower()
        assert recorder.requests[-1].endswith(b"\r\n\r\n{}")

    def test_a_chunked_body_arrives_whole_with_its_length(self, recorder: ScriptedEngine, recorded: Runner) -> None:
        body = b'{"a":1}'
        head = signed_head("POST", "/containers/create", body, "Connection: close").decode()
        head = head.replace(f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")
        assert recorded.raw(head.encode() + b'3\r\n{"a\r\n4;ext=1\r\n":1}\r\n0\r\n\r\n').endswith(b"ok")
        request = recorder.requests[-1]
        assert b"transfer-encoding" not in request.lower()
        assert b"Content-Length: 7\r\n" in request
        assert request.endswith(b"\r\n\r\n" + body)

    def test_a_long_body_arrives_whole(self, recorder: ScriptedEngine, recorded: Runner) -> None:
        body = bytes(range(256)) * 12_000
        assert recorded.request("PUT", "/containers/a/archive?path=/", body).body == b"ok"
        assert recorder.requests[-1].endswith(b"\r\n\r\n" + body)

    def test_a_stated_length_of_0_stays_and_an_absent_one_stays_absent(
        self, recorder: ScriptedEngine, recorded: Runner
    ) -> None:
        recorded.raw(signed_head("POST", "/containers/a/start", b"", "Content-Length: 0", "Connection: close"))
        assert b"\r\ncontent-length: 0\r\n" in recorder.requests[-1].lower()
        recorded.raw(signed_head("POST", "/containers/a/start", b"", "Connection: close"))
        assert b"content-length" not in recorder.requests[-1].lower()

    @pytest.mark.parametrize("protocol", ["h2c", "tcp", "foo/2"])
    @pytest.mark.parametrize("body", [b"", b'{"Image":"no/such"}'])
    def test_an_upgrade_of_another_operation_is_ignored_and_the_connection_closed(
        self, both: Both, runner: Runner, protocol: str, body: bytes
    ) -> None:
        fields = [f"Upgrade: {protocol}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQ"]
        fields += ["Content-Type: application/json", *([] if body else ["Content-Length: 0"])]
        answer = runner.raw(signed_head("POST", "/v1.41/containers/create", body, *fields) + body)  # Until it closes.
        engine = both.engine("POST", "/v1.41/containers/create", body, JSON)
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % engine.status)
        assert b"\r\nconnection: close" in head.lower()
        assert rest == engine.body


def test_every_operation_of_the_table_is_compared_with_the_engine() -> None:
    files = {__name__, *(file.__name__ for file in OTHER_FILES)}
    speaking_http_2 = {"Session", "Grpc"}  # Compared in test_bridge_buildkit.py, by builds.
    shown = {name for test, names in SHOWN.items() if test.partition(".")[0] in files for name in names}
    assert shown | speaking_http_2 == {operation.id for operation in operations.OPERATIONS}
