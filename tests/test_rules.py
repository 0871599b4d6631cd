"""The rules, one row each: what is denied leaves the engine as it was, and the line that the refusal names allows it.

To add a row: `row(...)` with the request, and what the engine does with it once it is allowed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from policed import Policed, error_of, with_line

import operations
import rules
from conftest import EngineDirect, Names, Registry
from dev.engine import Engine
from policy import PRESETS
from service import Answer

ACCEPTED = (200, 201, 204)
REFUSED_BY_ENGINE = (400, 403, 404, 409, 500, 501)
"""What this engine cannot do, or what has no such object: the answer is its own."""


def row(
    name: str,
    target: str,
    body: Any = None,
    *,
    policy: str = "",
    then: tuple[int, ...] = ACCEPTED,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """One request. IMAGE, NAME, BOX, FOLDER stand for an image, a fresh name, a container, a folder of the host.

    Args:
        name: what is asked for.
        target, body, method, headers: the request; a body that is not bytes becomes JSON.
        policy: what the file says beside `workloads`.
        then: the statuses that are right once it is allowed.
    """
    return pytest.param(method, target, body, headers or {}, policy, then, id=name.replace(" ", "-"))


def create(name: str, *, policy: str = "", then: tuple[int, ...] = ACCEPTED, config: Any = None, **host: Any) -> Any:
    """The row of a create."""
    body = {"Image": "IMAGE", "Cmd": ["true"], "HostConfig": {"NetworkMode": "none", **host}, **(config or {})}
    return row(name, "/containers/create?name=NAME", body, policy=policy, then=then)


def mount(**fields: Any) -> list[dict[str, Any]]:
    return [{"Target": "/m", **fields}]


def query(path: str, **fields: str) -> str:
    return f"{path}?{urlencode(fields)}"


ANY_ANSWER = (*ACCEPTED, *REFUSED_BY_ENGINE)
LOCAL = {"type": "overlay", "o": "lowerdir=/etc,upperdir=/tmp/u,workdir=/tmp/w", "device": "overlay"}
ONLY = '[images]\nallow = ["allowed.example/*"]\n'

ROWS = [
    # What a container may be.
    create("Privileged", Privileged=True),
    create("PidMode host", PidMode="host"),
    create("PidMode container", PidMode="container:BOX"),
    create("IpcMode host", IpcMode="host"),
    create("IpcMode container", IpcMode="container:BOX", then=ANY_ANSWER),
    create("UTSMode host", UTSMode="host"),
    create("UsernsMode host", UsernsMode="host"),
    create("CgroupnsMode host", CgroupnsMode="host"),
    create("Cgroup container", Cgroup="container:BOX", then=ANY_ANSWER),
    create("NetworkMode host", NetworkMode="host"),
    create("NetworkMode container", NetworkMode="container:BOX"),
    create("NetworkMode ns", NetworkMode="ns:/proc/1/ns/net", then=ANY_ANSWER),
    create(
        "a network that is the host", config={"NetworkingConfig": {"EndpointsConfig": {"host": {}}}}, then=ANY_ANSWER
    ),
    create("CapAdd", CapAdd=["CHOWN", "SYS_ADMIN", "CAP_NET_ADMIN"]),
    create("CapAdd as a string", CapAdd="ALL"),
    create("Capabilities", Capabilities=["CAP_SYS_ADMIN"], then=ANY_ANSWER),
    create("Devices", Devices=[{"PathOnHost": "/dev/kmsg", "PathInContainer": "/dev/k", "CgroupPermissions": "r"}]),
    create(
        "Devices out of a folder",
        Devices=[{"PathOnHost": "/dev/net/../mem"}],
        policy='[container]\ndevices = ["/dev/net/*"]\n',
    ),
    create("DeviceRequests", DeviceRequests=[{"Count": -1, "Capabilities": [["gpu"]]}], then=ANY_ANSWER),
    create("DeviceCgroupRules", DeviceCgroupRules=["a *:* rwm"]),
    create("BlkioDeviceReadBps", BlkioDeviceReadBps=[{"Path": "/dev/null", "Rate": 1}], then=ANY_ANSWER),
    create("SecurityOpt", SecurityOpt=["no-new-privileges", "seccomp=unconfined"]),
    create("SecurityOpt with a profile", SecurityOpt=['seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[]}']),
    create("SecurityOpt with a long profile", SecurityOpt=['seccomp={"defaultAction":"SCMP_ACT_ALLOW"}' + " " * 200]),
    create("Sysctls", Sysctls={"net.ipv4.ip_forward": "1"}),
    create("Annotations", Annotations={"run.oci.keep_original_groups": "1"}),
    create("CgroupParent", CgroupParent="/", then=ANY_ANSWER),
    create("Runtime", Runtime="io.containerd.runtime.v1.linux"),
    create("OomScoreAdj", OomScoreAdj=-1000),
    create("OomKillDisable", OomKillDisable=True),
    create("MaskedPaths emptied", MaskedPaths=[]),
    create("ReadonlyPaths emptied", ReadonlyPaths=[]),
    create("PublishAllPorts", PublishAllPorts=True),
    create("PortBindings", PortBindings={"80/tcp": [{"HostPort": "18080"}]}),
    create("PortBindings of the engine's choice", PortBindings={"80/tcp": [{"HostPort": ""}]}),
    create("PortBindings without any", PortBindings={"80/tcp": []}),
    create("PortBindings of nothing", PortBindings={"80/tcp": None}),
    create(
        "PortBindings beside the allowed",
        PortBindings={"80/tcp": [{"HostPort": "18080-18090"}]},
        policy='[container]\nports = ["18080-18089"]\n',
    ),
    create("LogConfig Type", LogConfig={"Type": "syslog", "Config": {}}),
    create(
        "LogConfig Config", LogConfig={"Type": "", "Config": {"syslog-address": "tcp://127.0.0.1:1"}}, then=ANY_ANSWER
    ),
    create("Ulimits", Ulimits=[{"Name": "nofile", "Soft": 1, "Hard": 1}]),
    create("a field that nobody knows", Beside={"a": 1}),
    create("a field that nobody knows at the top", config={"Beside": [1]}),
    # The host's folders.
    create("Binds", Binds=["FOLDER:/m"]),
    create(
        "Binds, writable where only reading is allowed",
        Binds=["FOLDER:/m"],
        policy='[[container.binds]]\npath = "FOLDER"\nread_only = true\n',
    ),
    create("Binds below", Binds=["FOLDER/below:/m"], policy='[[container.binds]]\npath = "FOLDER"\n'),
    create("Binds beside", Binds=["FOLDER-beside:/m"], policy='[[container.binds]]\npath = "FOLDER"\nbelow = true\n'),
    create(
        "Binds out of the folder",
        Binds=["FOLDER/../:/m"],
        policy='[[container.binds]]\npath = "FOLDER"\nbelow = true\n',
    ),
    create("Binds that propagate", Binds=["FOLDER:/m:shared"], policy='[[container.binds]]\npath = "FOLDER"\n'),
    create("Binds of no plain name", Binds=["./etc:/m"], then=ANY_ANSWER),
    create("Mounts of type bind", Mounts=mount(Type="bind", Source="FOLDER")),
    create(
        "Mounts that are not read-only below",
        Mounts=mount(Type="bind", Source="FOLDER", ReadOnly=True, BindOptions={"ReadOnlyNonRecursive": True}),
        policy='[[container.binds]]\npath = "FOLDER"\nread_only = true\n',
    ),
    create("Mounts of an unknown type", Mounts=mount(Type="npipe", Source="x"), then=ANY_ANSWER),
    create("Mounts without a type", Mounts=mount(Source="/etc"), then=ANY_ANSWER),
    create("Mounts of a volume that is a path", Mounts=mount(Type="volume", Source="/etc"), then=ANY_ANSWER),
    create(
        "Mounts of an overlay",
        Mounts=mount(Type="volume", Source="NAME", VolumeOptions={"DriverConfig": {"Name": "local", "Options": LOCAL}}),
    ),
    create(
        "Mounts of a plugin's volume",
        Mounts=mount(Type="volume", Source="NAME", VolumeOptions={"DriverConfig": {"Name": "rclone"}}),
        then=ANY_ANSWER,
    ),
    create("VolumesFrom", VolumesFrom=["BOX"]),
    create("VolumeDriver", VolumeDriver="rclone", Binds=["NAME:/m"], then=ANY_ANSWER),
    create("Tmpfs with bind", Tmpfs={"/m": "bind"}, then=ANY_ANSWER),
    row(
        "DriverOpts of a folder",
        "/volumes/create",
        {"Name": "NAME", "DriverOpts": {"type": "none", "o": "bind", "device": "/etc"}},
    ),
    row(
        "DriverOpts of a tmpfs that binds",
        "/volumes/create",
        {"Name": "NAME", "DriverOpts": {"type": "tmpfs", "o": "size=1m,bind", "device": "/etc"}},
    ),
    row(
        "DriverOpts of a block device",
        "/volumes/create",
        {"Name": "NAME", "DriverOpts": {"type": "ext4", "device": "/dev/vda"}},
    ),
    row("DriverOpts of an overlay", "/volumes/create", {"Name": "NAME", "DriverOpts": LOCAL}),
    row("Driver of a volume", "/volumes/create", {"Name": "NAME", "Driver": "rclone"}, then=ANY_ANSWER),
    row("ClusterVolumeSpec", "/volumes/create", {"Name": "NAME", "ClusterVolumeSpec": {"Group": "x"}}, then=ANY_ANSWER),
    # Resources.
    create("more memory than there may be", Memory=200 << 20, policy="[container]\nmax_memory = 104857600\n"),
    create("no limit of memory", policy="[container]\nmax_memory = 104857600\n"),
    create("swap without a limit", Memory=50 << 20, MemorySwap=-1, policy="[container]\nmax_memory = 104857600\n"),
    create(
        "more swap than there may be",
        Memory=100 << 20,
        MemorySwap=900 << 20,
        policy="[container]\nmax_memory = 104857600\n",
    ),
    create("more CPUs than there may be", NanoCpus=1_500_000_000, policy="[container]\nmax_cpus = 0.5\n"),
    create("more CPUs by quota", CpuQuota=150_000, policy="[container]\nmax_cpus = 1\n"),
    create("more CPUs by period", CpuQuota=20_000, CpuPeriod=10_000, policy="[container]\nmax_cpus = 1\n"),
    create("no limit of PIDs", PidsLimit=0, policy="[container]\nmax_pids = 10\n"),
    create("PIDs without a limit", PidsLimit=-1, policy="[container]\nmax_pids = 10\n"),
    row(
        "an update to more memory",
        "/containers/BOX/update",
        {"Memory": 60 << 20, "MemorySwap": 60 << 20},
        policy="[container]\nmax_memory = 52428800\n",
    ),
    row(
        "an update to no limit of PIDs",
        "/containers/BOX/update",
        {"PidsLimit": 0},
        policy="[container]\nmax_pids = 10\n",
    ),
    row(
        "an update of the period alone",
        "/containers/BOX/update",
        {"CpuPeriod": 1000},
        policy="[container]\nmax_cpus = 1\n",
    ),
    row("an update with a device", "/containers/BOX/update", {"Devices": [{"PathOnHost": "/dev/kmsg"}]}),
    row("an update with an unknown field", "/containers/BOX/update", {"Privileged": True}),
    # Starts, execs.
    row("a start with a body", "/containers/BOX/start", {"Binds": ["/:/host"]}, then=ANY_ANSWER),
    row("a start from a checkpoint", "/containers/BOX/start?checkpoint=x&checkpoint-dir=/etc", then=ANY_ANSWER),
    row("an old version of the API", "/v1.20/containers/create?name=NAME", {"Image": "IMAGE"}, then=ANY_ANSWER),
    row("a privileged exec", "/containers/BOX/exec", {"Cmd": ["true"], "Privileged": True}),
    row(
        "an exec's user",
        "/containers/BOX/exec",
        {"Cmd": ["true"], "User": "root"},
        policy='[exec]\nusers = ["nobody"]\n',
    ),
    # Networks.
    row("macvlan", "/networks/create", {"Name": "NAME", "Driver": "macvlan", "Options": {}}, then=ANY_ANSWER),
    row(
        "ipvlan with its interface",
        "/networks/create",
        {"Name": "NAME", "Driver": "ipvlan", "Options": {"parent": "lo"}},
        policy='[network]\ndrivers = ["ipvlan"]\n',
        then=ANY_ANSWER,
    ),
    row(
        "a bridge of the host",
        "/networks/create",
        {"Name": "NAME", "Options": {"com.docker.network.bridge.name": "eth0"}},
        then=ANY_ANSWER,
    ),
    row("a driver for addresses", "/networks/create", {"Name": "NAME", "IPAM": {"Driver": "null"}}, then=ANY_ANSWER),
    row("options of the addresses", "/networks/create", {"Name": "NAME", "IPAM": {"Options": {"a": "b"}}}),
    row("addresses of others", "/networks/create", {"Name": "NAME", "IPAM": {"Config": [{"Subnet": "192.0.2.0/28"}]}}),
    row("a network of a swarm", "/networks/create", {"Name": "NAME", "Scope": "swarm"}, then=ANY_ANSWER),
    row("an ingress", "/networks/create", {"Name": "NAME", "Ingress": True}, then=ANY_ANSWER),
    row(
        "another's configuration", "/networks/create", {"Name": "NAME", "ConfigFrom": {"Network": "x"}}, then=ANY_ANSWER
    ),
    row("the host's network", "/networks/host/connect", {"Container": "BOX"}, then=ANY_ANSWER),
    row(
        "an endpoint's options",
        "/networks/bridge/connect",
        {"Container": "BOX", "EndpointConfig": {"DriverOpts": {"com.docker.network.endpoint.sysctls": "x"}}},
        then=ANY_ANSWER,
    ),
    # Images.
    row("an import from a URL", query("/images/create", fromSrc="http://127.0.0.1:9/x", repo="NAME"), then=ANY_ANSWER),
    row("a pull", query("/images/create", fromImage="REGISTRY/other", tag="1"), policy=ONLY, then=ANY_ANSWER),
    row(
        "a pull of every tag",
        query("/images/create", fromImage="REGISTRY/it"),
        policy='[images]\nallow = ["REGISTRY/it:latest"]\n',
        then=ANY_ANSWER,
    ),
    row(
        "a pull of another digest",
        query("/images/create", fromImage="REGISTRY/it:latest", tag="sha256:" + "a" * 64),
        policy='[images]\nallow = ["REGISTRY/it:latest"]\n',
        then=ANY_ANSWER,
    ),
    create("an image", policy=ONLY),
    create("an image by its id", config={"Image": "ID"}, policy=ONLY),
    create("an image by the beginning of its id", config={"Image": "SHORT"}, policy=ONLY),
    create("no image", config={"Image": ""}, policy=ONLY),
    row("an import", query("/images/create", fromSrc="-", repo="NAME"), b"", policy=ONLY, then=ANY_ANSWER),
    row("a tag", query("/images/allowed.example/it/tag", repo="NAME", tag="1"), policy=ONLY, then=ANY_ANSWER),
    row("a tag's source", query("/images/IMAGE/tag", repo="allowed.example/NAME", tag="1"), policy=ONLY),
    row("a commit", query("/commit", container="BOX", repo="NAME", tag="1"), policy=ONLY),
    row("a push", "/images/REGISTRY/NAME/push", policy=ONLY, then=ANY_ANSWER),
    row("a save", "/images/IMAGE/get", policy=ONLY, method="GET"),
    row(
        "a save of several",
        "/images/get?names=allowed.example/x&names=IMAGE",
        policy=ONLY,
        method="GET",
        then=ANY_ANSWER,
    ),
    row("a look at a registry", "/distribution/REGISTRY/it/json", policy=ONLY, method="GET", then=ANY_ANSWER),
    row("a load", "/images/load", b"", policy=ONLY, then=ANY_ANSWER),
    # Builds.
    row("a build of any image", "/build", b"", policy=ONLY, then=ANY_ANSWER),
    row("a build's name", "/build?t=NAME", b"", policy=ONLY + "build = true\n", then=ANY_ANSWER),
    row("a build without limits", "/build", b"", policy="[container]\nmax_pids = 10\n", then=ANY_ANSWER),
    row("a build from a URL", "/build?remote=http%3A%2F%2F127.0.0.1%3A9", then=ANY_ANSWER),
    row("a build on the host's network", "/build?networkmode=host", b"", then=ANY_ANSWER),
    row("a build in a container's network", "/build?networkmode=container%3ABOX", b"", then=ANY_ANSWER),
    *(
        row(f"a build with {name}", f"/build?{name}={quote(value)}", b"", then=ANY_ANSWER)
        for name, value in (
            ("extrahosts", "a:1.2.3.4"),
            ("securityopt", '["seccomp=unconfined"]'),
            ("cgroupparent", "/x"),
            ("ulimits", '[{"Name":"nofile","Hard":1,"Soft":1}]'),
            ("outputs", '[{"Type":"moby","Attrs":{"name":"x"}}]'),
        )
    ),
    # Operations.
    row("a session", "/session", then=ANY_ANSWER),
    row("an operation that is taken away", "/containers/BOX/pause", policy='preset = "read-only"\n'),
]


@pytest.fixture(scope="module")
def policed(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policed]:
    with Policed(engine.socket, tmp_path_factory.mktemp("policy") / "policy.toml") as runner:
        yield runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the host, with one below and one beside it."""
    folder = tmp_path_factory.mktemp("host") / "work"
    for path in (folder / "below", folder.with_name("work-beside")):
        path.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def bystander(direct: EngineDirect, image: str, names: Names) -> str:
    """A running container that everybody may touch."""
    body = {"Image": image, "Cmd": ["sleep", "1000000"], "Labels": names.labels, "HostConfig": {"NetworkMode": "none"}}
    body["HostConfig"] = {
        "NetworkMode": "none",
        "IpcMode": "shareable",
        "Memory": 20 << 20,
        "CpuQuota": 50_000,
        "PidsLimit": 5,
    }
    container: str = direct.request("POST", "/containers/create", json=body).json()["Id"]
    assert direct.request("POST", f"/containers/{container}/start").status_code == 204
    return container


def state(direct: EngineDirect, names: Names, bystander: str) -> Any:
    """What our own things on the engine are."""
    label = quote(json.dumps({"label": [f"{next(iter(names.labels))}={names.mark}"]}))
    named = quote(json.dumps({"name": [names.prefix]}))
    box = direct.request("GET", f"/containers/{bystander}/json").json()
    return (
        sorted(each["Id"] for each in direct.request("GET", f"/containers/json?all=1&filters={label}").json()),
        sorted(each["Id"] for each in direct.request("GET", f"/containers/json?all=1&filters={named}").json()),
        sorted(each["Name"] for each in direct.request("GET", f"/volumes?filters={named}").json()["Volumes"] or []),
        sorted(each["Id"] for each in direct.request("GET", f"/networks?filters={named}").json()),
        sorted(
            tag
            for each in direct.request("GET", "/images/json").json()
            for tag in each["RepoTags"] or []
            if names.prefix in tag
        ),
        box["HostConfig"],
        sorted(box["ExecIDs"] or []),
        box["State"],
        box["NetworkSettings"]["Networks"].keys(),
    )


@pytest.mark.parametrize(("method", "target", "body", "headers", "policy", "then"), ROWS)
def test_what_is_denied_leaves_no_trace_and_the_line_that_is_named_allows_it(
    policed: Policed,
    direct: EngineDirect,
    names: Names,
    image: str,
    registry: Registry,
    folder: Path,
    bystander: str,
    method: str,
    target: str,
    body: Any,
    headers: dict[str, str],
    policy: str,
    then: tuple[int, ...],
) -> None:
    image_id: str = direct.request("GET", f"/images/{image}/json").json()["Id"]
    stand_ins = {
        "REGISTRY": registry.address,
        "FOLDER": str(folder),
        "IMAGE": image,
        "NAME": names(),
        "BOX": bystander,
        "SHORT": image_id.removeprefix("sha256:")[:12],
        "ID": image_id,
    }

    def real(text: str) -> str:
        for name, value in stand_ins.items():
            text = text.replace(name, value) if name != "ID" else text.replace('"ID"', f'"{value}"')
        return text

    if isinstance(body, dict):
        if "Image" in body or "Name" in body:
            body = {"Labels": names.labels, **body}
        body = real(json.dumps(body)).encode()
        headers = {"Content-Type": "application/json", **headers}
    target, policy = real(target), real(policy)

    def ask() -> Answer:
        return policed.request(method, target, body, headers)

    policed.set(policy)
    before = state(direct, names, bystander)
    answer = ask()
    error = error_of(answer)
    assert (answer.status, error.get("code")) == (403, "policy_denied"), answer.body
    assert error["details"].keys() == {"rule", "value", "allow"}
    assert all(part in error["message"] for part in error["details"].values())
    assert state(direct, names, bystander) == before

    assert "again" in policed.set(with_line(policy, error["details"]["allow"]))
    answer = ask()
    assert not error_of(answer), answer.body
    assert answer.status in then, answer.body
    if target == "/networks/create":  # Its addresses are whose comes first.
        direct.request("DELETE", f"/networks/{stand_ins['NAME']}")


@pytest.mark.parametrize(
    "body",
    [
        {"Runtime": None, "Privileged": None, "name": "x", "platform": "", "VolumesFrom": []},
        {"HostConfig": {"Beside": None, "Binds": [], "VolumesFrom": [], "LogConfig": {"Type": "", "Config": {}}}},
        {"HostConfig": {"Binds": ["data:/data:rw", "data:/x:z"], "Mounts": [{"Type": "volume", "Target": "/v"}]}},
        {"HostConfig": {"Mounts": [{"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1, "Mode": 448}}]}},
        {"HostConfig": {"Tmpfs": {"/t": "", "/u": "rw,noexec,nosuid,size=65536k,mode=1777"}}},
        {"HostConfig": {"NetworkMode": "default", "IpcMode": "private", "CgroupnsMode": "private", "PidMode": ""}},
        {"HostConfig": {"SecurityOpt": ["no-new-privileges:true"], "CapDrop": ["ALL"], "CapAdd": ["CAP_CHOWN"]}},
        {"HostConfig": {"LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "3"}}}},
        {"HostConfig": {"RestartPolicy": {"Name": "unless-stopped", "MaximumRetryCount": 0}, "Init": True}},
        {"HostConfig": {"Memory": 1 << 30, "NanoCpus": 10**9, "PidsLimit": 100, "OomKillDisable": False}},
        {"NetworkingConfig": {"EndpointsConfig": {"some": {"Aliases": ["a"], "IPAMConfig": {"IPv4Address": ""}}}}},
        {"Healthcheck": {"Test": ["CMD", "true"]}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/v": {}}},
    ],
)  # fmt: skip
def test_workloads_is_not_in_the_way_of_what_people_do(body: dict[str, Any]) -> None:
    create = next(each for each in operations.OPERATIONS if each.id == "ContainerCreate")
    rules.check(PRESETS["workloads"], create, b"/containers/create", body=json.dumps({"Image": "x", **body}).encode())
