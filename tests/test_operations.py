"""The table of operations, against the official API document and against the router that the engine uses."""

import json
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import operations
from errors import RunnerError

# What the table has and the document has not.
UNDOCUMENTED = {"Grpc": ("POST", "/grpc")}

DOCUMENT = Path(__file__).parent / "data" / "operations-v1.41.json"

# What the document has and the table has not, and why.
LEFT_OUT = {
    "needs a swarm": {
        *("SwarmInspect", "SwarmInit", "SwarmJoin", "SwarmLeave", "SwarmUpdate", "SwarmUnlockkey", "SwarmUnlock"),
        *("NodeList", "NodeInspect", "NodeDelete", "NodeUpdate"),
        *("ServiceList", "ServiceCreate", "ServiceInspect", "ServiceDelete", "ServiceUpdate", "ServiceLogs"),
        *("TaskList", "TaskInspect", "TaskLogs"),
        *("SecretList", "SecretCreate", "SecretInspect", "SecretDelete", "SecretUpdate"),
        *("ConfigList", "ConfigCreate", "ConfigInspect", "ConfigDelete", "ConfigUpdate"),
    },
    "a plugin runs as root on the engine's host": {
        *("PluginList", "GetPluginPrivileges", "PluginPull", "PluginInspect", "PluginDelete", "PluginEnable"),
        *("PluginDisable", "PluginUpgrade", "PluginCreate", "PluginPush", "PluginSet"),
    },
    "the engine's own WebSocket": {"ContainerAttachWebsocket"},
}


@pytest.fixture(scope="module")
def document() -> dict[str, tuple[str, str]]:
    """Method and path of every operation of the official document, by its id.

    Made from the document `v1.41.yaml` of moby's `docs/api`, all operations kept, in its order: for each path and each
    method below it, `{"id": operationId, "method": METHOD, "path": path}`.
    """
    return {row["id"]: (row["method"], row["path"]) for row in json.loads(DOCUMENT.read_text())} | UNDOCUMENTED


class TestTable:
    def test_every_operation_stands_in_the_document_with_this_method_and_path(
        self, document: dict[str, tuple[str, str]]
    ) -> None:
        table = {operation.id: (operation.method, operation.template) for operation in operations.OPERATIONS}
        assert table == {name: document[name] for name in table}

    def test_every_operation_of_the_document_stands_in_the_table_or_is_left_out_for_a_reason(
        self, document: dict[str, tuple[str, str]]
    ) -> None:
        left_out = [name for names in LEFT_OUT.values() for name in names]
        assert sorted([*left_out, *(operation.id for operation in operations.OPERATIONS)]) == sorted(document)

    def test_every_template_chooses_its_own_operation_with_and_without_a_version(self) -> None:
        for operation in operations.OPERATIONS:
            target = re.sub(r"\{\w+\}", "a", operation.template).encode()
            for version in (b"", b"/v1.41", b"/v1.24"):
                for query in (b"", b"?", b"?a=/b/../c&d=%2F;e"):
                    assert operations.decide(operation.method.encode(), version + target + query) is operation


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "target", "allow"),
        [
            (b"DELETE", b"/_ping", b"GET, HEAD"),
            (b"POST", b"/v1.41/containers/json", b"DELETE, GET"),  # DELETE: of a container called json
            (b"PUT", b"/v1.41/volumes/a", b"DELETE, GET"),
            (b"PATCH", b"/exec/a/start", b"POST"),
            (b"GET", b"/containers/a", b"DELETE"),
            (b"GET", b"/containers/create", b"DELETE, POST"),
            (b"OPTIONS", b"/images/json", b"DELETE, GET"),
        ],
    )
    def test_another_method_is_405_with_those_that_are_allowed(
        self, method: bytes, target: bytes, allow: bytes
    ) -> None:
        with pytest.raises(RunnerError) as caught:
            operations.decide(method, target)
        assert (caught.value.code, caught.value.headers) == ("method_not_allowed", ((b"allow", allow),))

    @pytest.mark.parametrize(
        ("method", "target"),
        [
            (b"GET", b"/containers/json/"),
            (b"DELETE", b"/containers/a/"),
            (b"DELETE", b"/containers/a/b/"),
            (b"DELETE", b"/images/a/b/"),
            (b"GET", b"/volumes/a/"),
            (b"GET", b"/networks/a/"),
            (b"GET", b"/networks/"),
            (b"POST", b"/build/"),
        ],
    )
    def test_a_slash_at_the_end_is_no_part_of_a_name(self, method: bytes, target: bytes) -> None:
        with pytest.raises(RunnerError) as caught:
            operations.decide(method, target)
        assert caught.value.code in ("invalid_path", "not_found")

    @pytest.mark.parametrize("byte", [*range(0x21), *range(0x7F, 0x100), ord("#")])
    def test_a_byte_that_no_target_holds_is_refused_wherever_it_stands(self, byte: int) -> None:
        for target in (b"/images/a%bb/json", b"/images/json?a=%b"):
            with pytest.raises(RunnerError) as caught:
                operations.decide(b"GET", target.replace(b"%b", bytes([byte])))
            assert caught.value.code == "invalid_path"


# The engine's router, as moby 20.10 registers its routes (api/server/router/*, in the order of cmd/dockerd/daemon.go):
# gorilla/mux, on the path decoded as a whole; each route with a version before it first; the first that matches serves.
# Routes that are not curated have names of their own, so that taking one for another would be seen.
_ROUTES = """
    GET    /containers/{n:.*}/checkpoints            CheckpointList
    POST   /containers/{n:.*}/checkpoints            CheckpointCreate
    DELETE /containers/{n}/checkpoints/{c}           CheckpointDelete
    HEAD   /containers/{n:.*}/archive                ContainerArchiveInfo
    GET    /containers/json                          ContainerList
    GET    /containers/{n:.*}/export                 ContainerExport
    GET    /containers/{n:.*}/changes                ContainerChanges
    GET    /containers/{n:.*}/json                   ContainerInspect
    GET    /containers/{n:.*}/top                    ContainerTop
    GET    /containers/{n:.*}/logs                   ContainerLogs
    GET    /containers/{n:.*}/stats                  ContainerStats
    GET    /containers/{n:.*}/attach/ws              ContainerAttachWebsocket
    GET    /exec/{n:.*}/json                         ExecInspect
    GET    /containers/{n:.*}/archive                ContainerArchive
    POST   /containers/create                        ContainerCreate
    POST   /containers/{n:.*}/kill                   ContainerKill
    POST   /containers/{n:.*}/pause                  ContainerPause
    POST   /containers/{n:.*}/unpause                ContainerUnpause
    POST   /containers/{n:.*}/restart                ContainerRestart
    POST   /containers/{n:.*}/start                  ContainerStart
    POST   /containers/{n:.*}/stop                   ContainerStop
    POST   /containers/{n:.*}/wait                   ContainerWait
    POST   /containers/{n:.*}/resize                 ContainerResize
    POST   /containers/{n:.*}/attach                 ContainerAttach
    POST   /containers/{n:.*}/copy                   ContainerCopy
    POST   /containers/{n:.*}/exec                   ContainerExec
    POST   /exec/{n:.*}/start                        ExecStart
    POST   /exec/{n:.*}/resize                       ExecResize
    POST   /containers/{n:.*}/rename                 ContainerRename
    POST   /containers/{n:.*}/update                 ContainerUpdate
    POST   /containers/prune                         ContainerPrune
    POST   /commit                                   ImageCommit
    PUT    /containers/{n:.*}/archive                PutContainerArchive
    DELETE /containers/{n:.*}                        ContainerDelete
    GET    /images/json                              ImageList
    GET    /images/search                            ImageSearch
    GET    /images/get                               ImageGetAll
    GET    /images/{n:.*}/get                        ImageGet
    GET    /images/{n:.*}/history                    ImageHistory
    GET    /images/{n:.*}/json                       ImageInspect
    POST   /images/load                              ImageLoad
    POST   /images/create                            ImageCreate
    POST   /images/{n:.*}/push                       ImagePush
    POST   /images/{n:.*}/tag                        ImageTag
    POST   /images/prune                             ImagePrune
    DELETE /images/{n:.*}                            ImageDelete
    OPTIONS /{n:.*}                                  Options
    GET    /_ping                                    SystemPing
    HEAD   /_ping                                    SystemPingHead
    GET    /events                                   SystemEvents
    GET    /info                                     SystemInfo
    GET    /version                                  SystemVersion
    GET    /system/df                                SystemDataUsage
    POST   /auth                                     SystemAuth
    GET    /volumes                                  VolumeList
    GET    /volumes/{n:.*}                           VolumeInspect
    POST   /volumes/create                           VolumeCreate
    POST   /volumes/prune                            VolumePrune
    DELETE /volumes/{n:.*}                           VolumeDelete
    POST   /build                                    ImageBuild
    POST   /build/prune                              BuildPrune
    POST   /build/cancel                             BuildCancel
    POST   /session                                  Session
    GET    /swarm                                    SwarmInspect
    POST   /swarm/{n:.*}                             Swarm
    GET    /services                                 ServiceList
    GET    /services/{n:.*}                          ServiceInspect
    GET    /nodes                                    NodeList
    GET    /tasks                                    TaskList
    GET    /secrets                                  SecretList
    GET    /configs                                  ConfigList
    GET    /plugins                                  PluginList
    GET    /plugins/{n:.*}/json                      PluginInspect
    DELETE /plugins/{n:.*}                           PluginDelete
    POST   /plugins/{n:.*}/enable                    PluginEnable
    POST   /plugins/pull                             PluginPull
    GET    /distribution/{n:.*}/json                 DistributionInspect
    POST   /grpc                                     Grpc
    GET    /networks                                 NetworkList
    GET    /networks/                                NetworkList
    GET    /networks/{n:.+}                          NetworkInspect
    POST   /networks/create                          NetworkCreate
    POST   /networks/{n:.*}/connect                  NetworkConnect
    POST   /networks/{n:.*}/disconnect               NetworkDisconnect
    POST   /networks/prune                           NetworkPrune
    DELETE /networks/{n:.*}                          NetworkDelete
"""


def _expression(path: str) -> str:
    """As gorilla/mux builds it: a variable is its own expression, or a run of anything but slashes."""
    parts = re.split(r"\{\w+(?::(\.[*+]))?\}", path)
    joined = re.escape(parts[0])
    for pattern, literal in zip(parts[1::2], parts[2::2], strict=True):
        joined += f"({pattern or '[^/]+'}){re.escape(literal)}"
    return joined


ROUTES = [
    (method, re.compile(version + _expression(path)), name)
    for method, path, name in (line.split() for line in _ROUTES.strip().splitlines())
    for version in ("/v[0-9.]+", "")
]
REDIRECT = "a redirect to the clean path"


def engine_chooses(method: str, target: str) -> str | None:
    """The operation that the engine serves for a target; None where it refuses it."""
    raw = target.partition("?")[0]
    if re.search(r"%(?![0-9A-Fa-f]{2})", raw):
        return None
    path = unquote(raw, "latin-1")
    clean = posixpath.normpath("/" + path.lstrip("/")) + ("/" if path.endswith("/") and path.strip("/") else "")
    if path != clean:
        return REDIRECT
    return next((name for verb, route, name in ROUTES if verb == method and route.fullmatch(path)), None)


SEGMENTS = (
    *("a", "4a5f", "my.name", "img:tag", "img@sha256:0a", "127.0.0.1:5000", "json", "create", "prune", "get", "search"),
    *("start", "stop", "kill", "attach", "ws", "exec", "archive", "logs", "push", "tag", "history", "connect", "load"),
    *("checkpoints", "c", "copy", "containers", "images", "networks", "volumes", "distribution", "build", "system"),
    *(
        "df",
        "plugins",
        "enable",
        "swarm",
        "session",
        "grpc",
        "_ping",
        "version",
        "v1.41",
        "v1",
        "v1.",
        "v1.41.2",
        "v..",
    ),
    *(
        ".",
        "..",
        "...",
        "%2e",
        "%2E%2e",
        ".%2e",
        "%2F",
        "a%2fb",
        "%2Fjson",
        "json%2F",
        "..%2F",
        "%2F..",
        "%5c",
        "a%5c..",
    ),
    *("%63ontainers", "j%73on", "%6Cogs", "%00", "%0a", "a%0Ajson", "%7f", "%", "%2", "%zz", "%25", "%252F", "%20"),
    *(";", "a;b", "json;", "%3B", "%3Fjson", "%23", "%e9", "%c3%a9", "%c0%af", "+", "*", "~", ":", "@", "a=b", ""),
)
HEADS = ("containers", "images", "exec", "networks", "volumes", "distribution", "build")
LAST = sorted(
    {operation.template.rpartition("/")[2] for operation in operations.OPERATIONS if operation.template[-1] != "}"}
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


@st.composite
def targets(draw: st.DrawFn) -> str:
    """Targets around the templates: near enough to be accepted often, odd enough to be read in two ways."""
    version = draw(st.sampled_from(("", "", "/v1.41", "/v1.24", "/v1", "/v1.41/v1.41", "/%761.41", "//v1.41")))
    head = draw(st.sampled_from((*HEADS, *HEADS, *SEGMENTS)))
    middle = draw(st.lists(st.sampled_from(SEGMENTS), max_size=3))
    last = draw(st.sampled_from(LAST))
    ends = draw(st.booleans())
    slash = draw(st.sampled_from(("/", "/", "/", "/", "//", "%2f")))
    query = draw(st.sampled_from(("", "?", "?a=b", "?/../json", "?a=%2F..")))
    return f"{version}/" + slash.join([head, *middle, *([last] if ends else [])]) + query


class TestAgainstTheEnginesRouter:
    @settings(max_examples=1500, deadline=None)
    @given(st.sampled_from(METHODS), targets())
    @example("GET", "/containers/a%2Fjson")
    @example("GET", "/containers/x%2Farchive/json")
    @example("DELETE", "/containers/a/checkpoints/c")
    @example("DELETE", "/containers/a%2Fcheckpoints/c")
    @example("GET", "/images/a%2Fget/json")
    @example("GET", "/images/get/json")
    @example("POST", "/images/prune/push")
    @example("GET", "/containers/a/attach/ws")
    @example("GET", "/v1.41/v1.41/containers/json")
    @example("GET", "//v1.41//images//json")
    def test_what_is_accepted_is_what_the_engine_serves(self, method: str, target: str) -> None:
        try:
            chosen = operations.decide(method.encode(), target.encode())
        except RunnerError:
            return
        doubled = "//" in target.partition("?")[0]
        assert engine_chooses(method, target) == (REDIRECT if doubled else chosen.id)

    def test_the_oracle_serves_every_operation_of_the_table(self) -> None:
        for operation in operations.OPERATIONS:
            target = re.sub(r"\{\w+\}", "a", operation.template)
            assert engine_chooses(operation.method, target) == operation.id
            assert engine_chooses(operation.method, f"/v1.41{target}") == operation.id
