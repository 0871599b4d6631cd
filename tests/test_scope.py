"""Ownership: two tenants on one engine, each seeing and touching only what carries its label.

Whatever the one asks for of the other's, the answer is the engine's own for what does not exist.
"""

import asyncio
import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

import dockerapi
import operations
from client import body_hash, sign
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from scope import Scopes
from service import Answer, Runner, with_files

LABEL = "com.example.tenant"
MISSING = "nothing-has-this-name"
POLICY = f"""
preset = "everything"
[keys.blue.scope]
label = "{LABEL}=blue"
[keys.green.scope]
label = "{LABEL}=green"
"""


class Tenant:
    """A caller with a key of its own."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.name = name
        self.secret = f"the-secret-of-{name}-0123456789"
        self.port = runner.port
        self.mark: dict[str, str] = {}

    def ask(self, method: str, target: str, body: Any = None) -> Answer:
        """A signed request; `body` is JSON, or bytes."""
        data = body if isinstance(body, bytes) else (b"" if body is None else json.dumps(body).encode())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        headers = {"Content-Type": kind, **sign(self.secret, method, target, data, key=self.name)}
        connection.request(method, target, data or None, headers)
        try:
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def do(self, method: str, target: str, body: Any = None, status: int = 201) -> Any:
        """A step that must succeed; its JSON."""
        answer = self.ask(method, target, body)
        assert answer.status == status, answer.body
        return json.loads(answer.body) if answer.body else None


@pytest.fixture(scope="module")
def scoped(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    secrets = "".join(f"{name}:the-secret-of-{name}-0123456789\n" for name in ("blue", "green"))
    with Runner(engine.socket, with_files(tmp_path_factory.mktemp("scope"), secrets, POLICY)) as runner:
        yield runner


@pytest.fixture(scope="module")
def blue(scoped: Runner) -> Tenant:
    return Tenant(scoped, "blue")


@pytest.fixture(scope="module")
def green(scoped: Runner) -> Tenant:
    return Tenant(scoped, "green")


@pytest.fixture(scope="module")
def make(image: str, names: Names) -> Callable[..., tuple[str, str]]:
    """Makes a container through a tenant's key and starts it; gives its name and id."""

    def make(tenant: Tenant, *, start: bool = True, **config: Any) -> tuple[str, str]:
        name = names("box")
        host = {"NetworkMode": "none", **config.pop("HostConfig", {})}
        labels = {**names.labels, **config.pop("Labels", {})}
        body = {"Image": image, "Cmd": ["sleep", "1d"], "StopSignal": "SIGKILL", "Labels": labels, **config}
        created = tenant.do("POST", f"/containers/create?name={name}", {**body, "HostConfig": host})
        if start:
            tenant.do("POST", f"/containers/{name}/start", status=204)
        return name, created["Id"]

    return make


Make = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def box(blue: Tenant, make: Make) -> tuple[str, str]:
    """A running container of blue's."""
    return make(blue)


def error(answer: Answer) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["message"]


class TestNames:
    """What the other tenant has is not there, on every operation that names something."""

    ON_CONTAINERS = tuple(o for o in operations.OPERATIONS if o.template.startswith("/containers/{id}"))
    BODIES: ClassVar[dict[str, Any]] = {
        "ContainerExec": {"Cmd": ["true"], "AttachStdout": True},
        "ContainerUpdate": {"Memory": 64 << 20},
        "PutContainerArchive": b"\0" * 10240,
    }
    QUERIES: ClassVar[dict[str, str]] = {
        "ContainerRename": "?name=taken-over",
        "ContainerArchive": "?path=/etc",
        "ContainerArchiveInfo": "?path=/etc",
        "PutContainerArchive": "?path=/tmp",
        "ContainerLogs": "?stdout=1",
        "ContainerAttach": "?stream=1&stdout=1",
        "ContainerStats": "?stream=0",
        "ContainerResize": "?h=10&w=10",
        "ContainerKill": "?signal=KILL",
    }

    @pytest.mark.parametrize("operation", ON_CONTAINERS, ids=lambda operation: operation.id)
    @pytest.mark.parametrize("by", ["name", "id", "prefix"])
    def test_another_tenants_container_is_answered_as_a_missing_one(
        self, green: Tenant, direct: EngineDirect, box: tuple[str, str], operation: operations.Operation, by: str
    ) -> None:
        named = {"name": box[0], "id": box[1], "prefix": box[1][:12]}[by]
        body, query = self.BODIES.get(operation.id), self.QUERIES.get(operation.id, "")

        def target(name: str) -> str:
            return operation.template.replace("{id}", name) + query

        before = direct.request("GET", f"/containers/{box[1]}/json").json()["State"]
        answer = green.ask(operation.method, target(named), body)
        data = body if isinstance(body, bytes) else (json.dumps(body).encode() if body else b"")
        kind = {"Content-Type": "application/x-tar" if isinstance(body, bytes) else "application/json"}
        wanted = direct.request(operation.method, target(MISSING), data=data, headers=kind)
        assert (answer.status, answer.body) == (
            wanted.status_code,
            wanted.content.replace(MISSING.encode(), named.encode()),
        )
        assert answer.status == 404
        assert direct.request("GET", f"/containers/{box[1]}/json").json()["State"] == before

    def test_ones_own_container_is_found_by_name_id_and_prefix(self, blue: Tenant, box: tuple[str, str]) -> None:
        for named in (*box, box[1][:12], box[1][:6]):
            assert blue.do("GET", f"/containers/{named}/json", status=200)["Id"] == box[1]

    def test_a_prefix_that_others_share_is_looked_for_among_ones_own(
        self, blue: Tenant, green: Tenant, make: Make
    ) -> None:
        own = make(blue)[1]
        name_of_green = own[:8]  # Among all this is green's name, among blue's it is the beginning of an id.
        other = make(green, start=False)[0]
        green.do("POST", f"/containers/{other}/rename?name={name_of_green}", status=204)
        assert blue.do("GET", f"/containers/{name_of_green}/json", status=200)["Id"] == own
        green.do("DELETE", f"/containers/{name_of_green}", status=204)

    @pytest.mark.parametrize("twist", ["{upper}", "%2F{name}", "{name}%00", "{id}x", "./{name}", "{name}/alias"])
    def test_no_way_of_writing_a_name_leads_around(self, green: Tenant, box: tuple[str, str], twist: str) -> None:
        named = twist.format(upper=box[0].upper(), name=box[0], id=box[1])
        assert green.ask("GET", f"/containers/{named}/json").status in (400, 404)
        assert green.ask("DELETE", f"/containers/{named}?force=1").status in (400, 404)

    def test_execs_belong_to_their_container(self, blue: Tenant, green: Tenant, box: tuple[str, str]) -> None:
        made = blue.do("POST", f"/containers/{box[0]}/exec", {"Cmd": ["echo", "x"], "AttachStdout": True})["Id"]
        start = {"Detach": False, "Tty": False}
        for method, target, body in (
            ("GET", f"/exec/{made}/json", None),
            ("POST", f"/exec/{made}/start", start),
            ("POST", f"/exec/{made}/resize?h=1&w=1", None),
        ):
            assert error(green.ask(method, target, body)) == (404, f"No such exec instance: {made}")
        assert b"x\n" in blue.ask("POST", f"/exec/{made}/start", start).body

    def test_an_upgraded_stream_of_anothers_container_is_refused_with_the_engines_404(
        self, green: Tenant, box: tuple[str, str]
    ) -> None:
        target = f"/containers/{box[0]}/attach?stream=1&stdout=1"
        with connect(
            f"ws://127.0.0.1:{green.port}{target}",
            additional_headers=sign(green.secret, "GET", target, key=green.name, content_hash=body_hash(b"")),
            subprotocols=[Subprotocol("docker-runner.stream.v1")],
            proxy=None,
        ) as stream:
            stream.send("")
            answer = json.loads(stream.recv())
        assert answer["status"] == 404
        assert base64.b64decode(answer["body"]) == f"No such container: {box[0]}\r\n".encode()

    def test_networks_and_volumes_of_others_are_missing(self, blue: Tenant, green: Tenant, names: Names) -> None:
        network, volume = names("net"), names("vol")
        id_ = blue.do("POST", "/networks/create", {"Name": network, "Labels": names.labels})["Id"]
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        for named in (network, id_, id_[:12]):
            assert error(green.ask("GET", f"/networks/{named}")) == (404, f"network {named} not found")
            assert error(green.ask("DELETE", f"/networks/{named}")) == (404, f"network {named} not found")
            assert blue.ask("GET", f"/networks/{named}").status == 200
        assert error(green.ask("GET", f"/volumes/{volume}")) == (404, f"get {volume}: no such volume")
        assert green.ask("DELETE", f"/volumes/{volume}").status == 404
        assert green.ask("DELETE", f"/volumes/{volume}?force=1").status == 204  # As for one that is not there.
        assert blue.ask("GET", f"/volumes/{volume}").status == 200
        assert blue.ask("DELETE", f"/networks/{network}").status == 204
        assert blue.ask("DELETE", f"/volumes/{volume}").status == 204

    def test_a_volume_of_others_is_not_given_by_a_create(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, names: Names
    ) -> None:
        volume = names("vol")
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        assert error(green.ask("POST", "/volumes/create", {"Name": volume})) == (
            409,
            f"the volume name {volume} is in use",
        )
        again = blue.do("POST", "/volumes/create", {"Name": volume})
        assert again == direct.request("GET", f"/volumes/{volume}").json()

    def test_the_engines_own_networks_are_nobodys(self, blue: Tenant) -> None:
        assert blue.ask("GET", "/networks/none").status == 404


class TestWhatIsMade:
    """It carries the label, and refers to nothing of others."""

    def test_containers_networks_and_volumes_carry_the_label(
        self, blue: Tenant, direct: EngineDirect, box: tuple[str, str], names: Names
    ) -> None:
        network, volume = names("net"), names("vol")
        blue.do("POST", "/networks/create", {"Name": network, "labels": names.labels})  # In whatever case.
        blue.do("POST", "/volumes/create", {"Name": volume})
        container = direct.request("GET", f"/containers/{box[0]}/json").json()
        assert container["Config"]["Labels"][LABEL] == "blue"
        found = direct.request("GET", f"/networks/{network}").json()["Labels"]
        assert found == {**names.labels, LABEL: "blue"}
        assert direct.request("GET", f"/volumes/{volume}").json()["Labels"] == {LABEL: "blue"}

    @pytest.mark.parametrize("target", ["/containers/create", "/networks/create", "/volumes/create"])
    def test_anothers_label_is_refused(self, green: Tenant, image: str, names: Names, target: str) -> None:
        body = {"Name": names("stolen"), "Image": image, "Labels": {LABEL: "blue"}}
        fields = ("Image", "Labels") if "containers" in target else ("Name", "Labels")
        answer = green.ask("POST", target, {field: body[field] for field in fields})
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (403, "policy_denied")

    @pytest.mark.parametrize(
        ("field", "form"),
        [
            ("NetworkMode", "container:{}"),
            ("PidMode", "container:{}"),
            ("IpcMode", "container:{}"),
            ("Cgroup", "container:{}"),
            ("VolumesFrom", ["{}:ro"]),
            ("Links", ["{}:alias"]),
        ],
    )
    def test_no_container_of_others_is_referred_to(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, image: str, make: Make, field: str, form: Any
    ) -> None:
        name, id_ = make(blue, HostConfig={"IpcMode": "shareable"})

        def asked(named: str) -> dict[str, Any]:
            value = [form[0].format(named)] if isinstance(form, list) else form.format(named)
            return {"Image": image, "Cmd": ["true"], "HostConfig": {"NetworkMode": "none", field: value}}

        for named in (name, id_, id_[:12], f"/{name}"):
            assert error(green.ask("POST", "/containers/create", asked(named))) == (
                404,
                f"No such container: {named}",
            )
        created = blue.do("POST", "/containers/create", asked(name))["Id"]
        kept = direct.request("GET", f"/containers/{created}/json").json()["HostConfig"][field]
        if field != "Links":  # The engine tells these by names.
            assert id_ in json.dumps(kept)
        blue.do("DELETE", f"/containers/{created}", status=204)

    def test_no_network_of_others_is_joined(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, image: str, names: Names, make: Make
    ) -> None:
        network = names("net")
        id_ = blue.do("POST", "/networks/create", {"Name": network, "Labels": names.labels})["Id"]
        body = {"Image": image, "Cmd": ["sleep", "1d"], "Labels": names.labels, "HostConfig": {"NetworkMode": network}}
        assert error(green.ask("POST", "/containers/create", body)) == (404, f"network {network} not found")
        by_endpoint = {**body, "HostConfig": {}, "NetworkingConfig": {"EndpointsConfig": {network: {}}}}
        assert error(green.ask("POST", "/containers/create", by_endpoint)) == (404, f"network {network} not found")
        other = make(green)[0]
        assert green.ask("POST", f"/networks/{network}/connect", {"Container": other}).status == 404
        own = make(blue)[0]
        green_net = green.do("POST", "/networks/create", {"Name": names("net"), "Labels": names.labels})["Id"]
        assert error(green.ask("POST", f"/networks/{green_net}/connect", {"Container": own}))[0] == 404
        assert error(green.ask("POST", f"/networks/{green_net}/disconnect", {"Container": own}))[0] == 404
        created = blue.do("POST", "/containers/create", body)["Id"]
        blue.do("POST", f"/containers/{created}/start", status=204)
        joined = direct.request("GET", f"/containers/{created}/json").json()["NetworkSettings"]["Networks"]
        assert [found["NetworkID"] for found in joined.values()] == [id_]

    def test_named_volumes_are_ones_own_or_made_so(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, image: str, names: Names
    ) -> None:
        volume, fresh, mounted = names("vol"), names("vol"), names("vol")
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        mount = {"Type": "volume", "Source": volume, "Target": "/data"}
        for way in ({"Binds": [f"{volume}:/data"]}, {"Mounts": [mount]}):
            answer = green.ask("POST", "/containers/create", {"Image": image, "HostConfig": way})
            assert error(answer) == (404, f"get {volume}: no such volume")
        host = {
            "Binds": [f"{fresh}:/data", f"{volume}:/more"],
            "Mounts": [{"Type": "volume", "Source": mounted, "Target": "/m"}, {"Type": "volume", "Target": "/anon"}],
            "NetworkMode": "none",
        }
        config = {"Image": image, "Labels": names.labels, "HostConfig": host}
        created = blue.do("POST", "/containers/create", config)["Id"]
        for name in (fresh, mounted):
            assert direct.request("GET", f"/volumes/{name}").json()["Labels"] == {LABEL: "blue"}
        mounts = direct.request("GET", f"/containers/{created}/json").json()["Mounts"]
        anonymous = next(mount["Name"] for mount in mounts if mount["Destination"] == "/anon")
        assert direct.request("GET", f"/volumes/{anonymous}").json()["Labels"] == {LABEL: "blue"}
        blue.do("DELETE", f"/containers/{created}?v=1", status=204)

    def test_a_commit_takes_ones_own_container(self, green: Tenant, box: tuple[str, str], names: Names) -> None:
        answer = green.ask("POST", f"/commit?container={box[0]}&repo={names('stolen')}", {})
        assert error(answer) == (404, f"No such container: {box[0]}")


class TestNetworks:
    """The engine keeps a container's networks by name, and joins at its start what has that name, or that id, then."""

    @pytest.fixture
    def theirs(self, blue: Tenant, names: Names) -> tuple[str, str]:
        name = names("net")
        return name, blue.do("POST", "/networks/create", {"Name": name, "Labels": names.labels})["Id"]

    @pytest.fixture
    def ours(self, green: Tenant, names: Names) -> str:
        id_: str = green.do("POST", "/networks/create", {"Name": names("net"), "Labels": names.labels})["Id"]
        return id_

    def joined(self, direct: EngineDirect, container: str) -> set[str]:
        networks = direct.request("GET", f"/containers/{container}/json").json()["NetworkSettings"]["Networks"]
        return {network["NetworkID"] for network in networks.values() if network["EndpointID"]}

    @pytest.mark.parametrize("field", ["NetworkID", "networkid"])
    @pytest.mark.parametrize("mode", ["its own", "bridge"])
    def test_a_create_joins_the_network_that_it_names(
        self, green: Tenant, direct: EngineDirect, make: Make, theirs: tuple[str, str], ours: str, mode: str, field: str
    ) -> None:
        host = {"NetworkMode": ours if mode == "its own" else mode}
        endpoints = {host["NetworkMode"]: {field: theirs[1]}}
        id_ = make(green, HostConfig=host, NetworkingConfig={"EndpointsConfig": endpoints})[1]
        assert len(self.joined(direct, id_)) == 1
        assert theirs[1] not in self.joined(direct, id_)

    @pytest.mark.parametrize("start", [True, False])
    def test_a_connect_joins_the_network_that_it_names(
        self, green: Tenant, direct: EngineDirect, make: Make, theirs: tuple[str, str], ours: str, start: bool
    ) -> None:
        id_ = make(green, start=start, HostConfig={"NetworkMode": "bridge"})[1]
        body = {"Container": id_, "EndpointConfig": {"NetworkID": theirs[1]}}
        green.do("POST", f"/networks/{ours}/connect", body, status=200)
        green.do("POST", f"/containers/{id_}/start", status=304 if start else 204)
        assert ours in self.joined(direct, id_)
        assert theirs[1] not in self.joined(direct, id_)

    @pytest.mark.parametrize("named", ["as theirs", "as the beginning of their id"])
    @pytest.mark.parametrize("by", ["create", "connect"])
    def test_a_start_joins_no_other_network_once_ones_own_is_gone(
        self,
        green: Tenant,
        direct: EngineDirect,
        make: Make,
        theirs: tuple[str, str],
        names: Names,
        named: str,
        by: str,
    ) -> None:
        body = {"Name": theirs[0] if named == "as theirs" else theirs[1][:12], "Labels": names.labels}
        own = green.do("POST", "/networks/create", body)["Id"]
        id_ = make(green, start=False, HostConfig={"NetworkMode": own if by == "create" else "bridge"})[1]
        if by == "connect":
            green.do("POST", f"/networks/{own}/connect", {"Container": id_}, status=200)
        green.do("DELETE", f"/networks/{own}", status=204)
        assert error(green.ask("POST", f"/containers/{id_}/start")) == (404, f"network {own} not found")
        assert theirs[1] not in self.joined(direct, id_)

    def test_a_network_of_the_same_name_does_not_keep_a_container_from_starting(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, make: Make, theirs: tuple[str, str], names: Names
    ) -> None:
        id_ = make(blue, start=False, HostConfig={"NetworkMode": theirs[0]})[1]
        green.do("POST", "/networks/create", {"Name": theirs[0], "Labels": names.labels})
        blue.do("POST", f"/containers/{id_}/start", status=204)
        assert self.joined(direct, id_) == {theirs[1]}

    def test_a_colon_in_a_networks_name_leads_nowhere(
        self, blue: Tenant, green: Tenant, image: str, names: Names
    ) -> None:
        name = f"{names('net')}:more"
        blue.do("POST", "/networks/create", {"Name": name, "Labels": names.labels})
        body = {"Image": image, "Labels": names.labels, "HostConfig": {"NetworkMode": name}}
        assert error(green.ask("POST", "/containers/create", body)) == (404, f"network {name} not found")
        assert blue.ask("POST", "/containers/create", body).status == 201

    def test_no_network_is_made_from_one_that_is_known_by_name_only(
        self, blue: Tenant, green: Tenant, names: Names
    ) -> None:
        name = names("net")
        blue.do("POST", "/networks/create", {"Name": name, "Labels": names.labels, "ConfigOnly": True})
        body = {"Name": names("net"), "Labels": names.labels, "ConfigFrom": {"Network": name}}
        assert green.ask("POST", "/networks/create", body).status == 403

    def test_nothing_is_named_as_an_id(self, green: Tenant, image: str, box: tuple[str, str], make: Make) -> None:
        """When what has the id is gone, containers that refer to it by its id would refer to this."""
        own = make(green, start=False)[1]
        for target, body in (
            ("/networks/create", {"Name": box[1]}),
            (f"/containers/create?name={box[1]}", {"Image": image}),
            (f"/containers/create?name=/{box[1]}", {"Image": image}),
            (f"/containers/{own}/rename?name={box[1]}", None),
        ):
            assert green.ask("POST", target, body).status == 403, target


class TestStarts:
    @pytest.mark.parametrize("version", ["/v1.12", "/v1.23", ""])
    def test_a_body_of_a_start_brings_in_nothing_of_others(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, box: tuple[str, str], make: Make, version: str
    ) -> None:
        id_ = make(green, start=False)[1]
        before = direct.request("GET", f"/containers/{id_}/json").json()["HostConfig"]
        for host in ({"VolumesFrom": [box[0]]}, {"PidMode": f"container:{box[1]}"}):
            answer = green.ask("POST", f"{version}/containers/{id_}/start", host)
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (403, "policy_denied")
        assert direct.request("GET", f"/containers/{id_}/json").json()["HostConfig"] == before
        green.do("POST", f"/containers/{id_}/start", {}, status=204)


class TestTop:
    """The engine runs ps(1) with the caller's options, on all of the host."""

    @pytest.mark.parametrize(
        "options",
        [
            "-C sleep -o args,pid",
            "-p 1 -o args= -o pid",
            "-e -o lstart=A -o pid",
            "-e -o tty=A\fB -o pid",
            "-eo pid,args,pid",
            "-eo args,pid",
            "-eM",
            "-e -o %a%p",
            "ax k pid",
        ],
    )
    def test_tells_of_no_process_of_others(self, blue: Tenant, green: Tenant, make: Make, options: str) -> None:
        own = make(green)[1]
        for extra in ("", "&ps_args=aux"):
            answer = green.ask("GET", f"/containers/{own}/top?ps_args={quote(options)}{extra}")
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (403, "policy_denied")

    @pytest.mark.parametrize("options", ["", "aux", "-ef", "-e -f", "-eo pid,args", "-o pid,user", "ax -o pid,comm"])
    def test_takes_what_is_usual(self, blue: Tenant, box: tuple[str, str], options: str) -> None:
        found = blue.do("GET", f"/containers/{box[0]}/top?ps_args={quote(options)}", status=200)
        assert len(found["Processes"]) == 1


class TestRefusals:
    """That a name is taken can be seen; by which container cannot."""

    def test_a_name_in_use_does_not_tell_whose_it_is(
        self, blue: Tenant, green: Tenant, image: str, box: tuple[str, str], make: Make
    ) -> None:
        own = make(green, start=False)[1]
        for tenant, container, tells in ((green, own, False), (blue, box[1], True)):
            create = tenant.ask("POST", f"/containers/create?name={box[0]}", {"Image": image})
            other = make(tenant, start=False)[1] if tells else container
            rename = tenant.ask("POST", f"/containers/{other}/rename?name={box[0]}")
            for answer in (create, rename):
                assert answer.status == 409
                assert (box[1] in error(answer)[1]) == tells, answer.body
        start = {"image": image, "name": box[0], "networkMode": "none"}
        answer = green.ask("POST", "/v1/containers/start", start)
        assert answer.status == 409
        assert box[1].encode() not in answer.body

    def test_an_image_in_use_does_not_tell_by_whose_container(
        self, blue: Tenant, green: Tenant, image: str, names: Names
    ) -> None:
        base = blue.do("POST", "/containers/create", {"Image": image, "Cmd": ["true"], "Labels": names.labels})["Id"]
        query = f"container={base}&repo={names('image')}&tag=in-use"
        tagged = blue.do("POST", f"/commit?{query}", {"Labels": names.labels})["Id"]
        used = blue.do("POST", "/containers/create", {"Image": tagged, "Cmd": ["true"], "Labels": names.labels})["Id"]
        for tenant, tells in ((green, False), (blue, True)):
            answer = tenant.ask("DELETE", f"/images/{tagged}")
            assert answer.status == 409
            assert (used[:12] in error(answer)[1]) == tells, answer.body
        blue.do("DELETE", f"/containers/{used}", status=204)
        blue.do("DELETE", f"/images/{tagged}?force=1", status=200)

    @pytest.mark.parametrize("query", ["name=%ff", "filters=null", "filters=[]", 'filters={"label":null}'])
    def test_a_query_that_means_nothing_is_no_defect(self, green: Tenant, query: str) -> None:
        assert green.ask("GET", f"/containers/json?{quote(query, safe='=%')}").status in (200, 400)

    def test_a_mount_without_a_type_is_the_engines_to_refuse(self, green: Tenant, image: str) -> None:
        mount = {"Type": None, "Target": "/data"}
        assert (
            green.ask("POST", "/containers/create", {"Image": image, "HostConfig": {"Mounts": [mount]}}).status == 400
        )


class TestLists:
    """Lists and prunes are narrowed, whatever filters the caller gives."""

    def test_lists_show_ones_own(self, blue: Tenant, green: Tenant, box: tuple[str, str], names: Names) -> None:
        network, volume = names("net"), names("vol")
        blue.do("POST", "/networks/create", {"Name": network, "Labels": names.labels})
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        label = quote(json.dumps({"label": [f"{key}={value}" for key, value in names.labels.items()]}))
        older = quote(json.dumps({"label": {f"{LABEL}=blue": True}}))
        for filters in ("", f"&filters={label}", f"&filters={older}"):
            mine = [found["Id"] for found in blue.do("GET", f"/containers/json?all=1{filters}", status=200)]
            others = [found["Id"] for found in green.do("GET", f"/containers/json?all=1{filters}", status=200)]
            assert box[1] in mine
            assert box[1] not in others
        for target, name, key in (("/networks", network, None), ("/volumes", volume, "Volumes")):
            own, foreign = (each.do("GET", target, status=200) for each in (blue, green))
            assert name in [found["Name"] for found in (own[key] if key else own)]
            assert name not in [found["Name"] for found in ((foreign[key] or []) if key else foreign)]

    def test_a_second_filters_parameter_changes_nothing(self, green: Tenant, box: tuple[str, str]) -> None:
        other = quote(json.dumps({"label": [f"{LABEL}=blue"]}))
        found = green.do("GET", f"/containers/json?all=1&filters={other}&filters={other}", status=200)
        assert found == []

    def test_a_list_relative_to_anothers_container_is_404(self, green: Tenant, box: tuple[str, str]) -> None:
        filters = quote(json.dumps({"since": [box[0]]}))
        answer = green.ask("GET", f"/containers/json?all=1&filters={filters}")
        assert error(answer) == (404, f"No such container: {box[0]}")

    def test_prunes_take_ones_own_only(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, names: Names, make: Make
    ) -> None:
        stopped = make(blue, start=False)[1]
        network, volume = names("net"), names("vol")
        blue.do("POST", "/networks/create", {"Name": network, "Labels": names.labels})
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        any_ = quote(json.dumps({"label!": ["never"]}))
        for target in ("/containers/prune", "/networks/prune", "/volumes/prune"):
            for query in ("", f"?filters={any_}"):
                green.do("POST", target + query, status=200)
        for target in (f"/containers/{stopped}/json", f"/networks/{network}", f"/volumes/{volume}"):
            assert direct.request("GET", target).status_code == 200
        assert stopped in blue.do("POST", "/containers/prune", status=200)["ContainersDeleted"]
        assert network in blue.do("POST", "/networks/prune", status=200)["NetworksDeleted"]
        assert volume in blue.do("POST", "/volumes/prune", status=200)["VolumesDeleted"]

    def test_a_forms_fields_do_not_replace_the_filter(self, green: Tenant) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", green.port, timeout=20)
        body = b"filters=" + quote(json.dumps({"label": [f"{LABEL}=blue"]})).encode()
        headers = sign(green.secret, "POST", "/containers/prune", body, key=green.name)
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/containers/prune", body, {**headers, **kind})
        answer = Answer(connection.getresponse())
        connection.close()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "ambiguous_query")

    def test_disk_usage_is_refused(self, blue: Tenant) -> None:
        answer = blue.ask("GET", "/system/df")
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (403, "policy_denied")


class TestEvents:
    @pytest.mark.parametrize("face", ["engine", "runner"])
    def test_are_those_of_ones_own_containers_networks_and_volumes(
        self, blue: Tenant, green: Tenant, names: Names, make: Make, face: str
    ) -> None:
        seen: list[tuple[str, str, str]] = []
        listening = threading.Event()
        everything = {"type": ["container", "network", "volume"]}
        if face == "engine":
            target = f"/events?filters={quote(json.dumps(everything))}"
        else:
            target = f"/v1/events/sse?filters={base64.urlsafe_b64encode(json.dumps(everything).encode()).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", blue.port, timeout=60)

        def listen() -> None:
            connection.request("GET", target, headers=sign(blue.secret, "GET", target, key=blue.name))
            response = connection.getresponse()
            listening.set()
            for line in iter(response.readline, b""):
                text = line.removeprefix(b"data: ").strip()
                if text.startswith(b"{"):
                    event = json.loads(text)
                    event = event.get("event", event)
                    seen.append((event["Type"], event["Action"], event["Actor"]["ID"]))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        assert listening.wait(10)
        made = {}
        for tenant in (green, blue):
            network, volume = names("net"), names("vol")
            id_ = tenant.do("POST", "/networks/create", {"Name": network, "Labels": names.labels})["Id"]
            tenant.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
            container = make(tenant, HostConfig={"NetworkMode": network})[1]
            tenant.do("DELETE", f"/containers/{container}?force=1", status=204)
            tenant.do("DELETE", f"/networks/{network}", status=204)
            tenant.do("DELETE", f"/volumes/{volume}", status=204)
            made[tenant.name] = {id_, volume, container}
        last = ("volume", "destroy", next(iter(made["blue"] - {id_, container})))
        assert wait_until(lambda: last in seen, 20), seen
        connection.sock.shutdown(2)
        listener.join(10)
        assert {id_ for _, _, id_ in seen} & made["green"] == set()
        for wanted in (
            ("container", "create", container),
            ("container", "start", container),
            ("container", "destroy", container),
            ("network", "create", id_),
            ("network", "connect", id_),
            ("network", "destroy", id_),
            ("volume", "create", volume),
        ):
            assert seen.count(wanted) == 1, (wanted, seen)

    def test_an_event_of_others_may_be_long(
        self, blue: Tenant, green: Tenant, box: tuple[str, str], make: Make
    ) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", green.port, timeout=20)
        connection.request("GET", "/events", headers=sign(green.secret, "GET", "/events", key=green.name))
        response = connection.getresponse()
        command = ["true", "<" * 200_000]  # Six bytes each, as the engine writes it.
        blue.do("POST", f"/containers/{box[0]}/exec", {"Cmd": command})
        own = make(green, start=False)[1]
        assert json.loads(response.readline())["Actor"]["ID"] == own
        connection.close()

    def test_what_had_a_volumes_name_before_is_not_told(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, names: Names, make: Make
    ) -> None:
        volume = names("vol")
        blue.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        container = make(blue, HostConfig={"Binds": [f"{volume}:/data"]})[1]
        blue.do("DELETE", f"/containers/{container}?force=1", status=204)
        blue.do("DELETE", f"/volumes/{volume}", status=204)
        gone = int(time.time())
        # The engine tells of a volume's age in whole seconds, by the file system's clock, which lags by some ms.
        assert wait_until(lambda: time.time() > gone + 1.1, 5)
        green.do("POST", "/volumes/create", {"Name": volume, "Labels": names.labels})
        query = f"since={gone - 60}&until={int(time.time()) + 1}"
        told = [json.loads(line) for line in green.ask("GET", f"/events?{query}").body.splitlines()]
        assert [event["Action"] for event in told if event["Actor"]["ID"] == volume] == ["create"]


class TestRunnerFace:
    """The same holds for tasks."""

    def test_containers_of_others_are_missing(self, blue: Tenant, green: Tenant, box: tuple[str, str]) -> None:
        for method, target, body in (
            ("GET", f"/v1/containers/inspect?containerId={box[0]}", None),
            ("GET", f"/v1/containers/labels?containerId={box[1]}", None),
            ("POST", "/v1/containers/stop", {"containerId": box[1][:12]}),
            ("POST", "/v1/containers/remove", {"containerId": box[0], "force": True}),
            ("POST", "/v1/containers/touch", {"containerId": box[0]}),
            ("POST", "/v1/exec/run", {"containerId": box[0], "command": "true"}),
            ("GET", f"/v1/containers/logs/sse?containerId={box[0]}", None),
        ):
            answer = green.ask(method, target, body)
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "no_such_container"), target
            assert f"No such container: {body['containerId'] if body else target.partition('=')[2]}" in error(answer)[1]
        ran = blue.do("POST", "/v1/exec/run", {"containerId": box[0], "command": "echo own"}, status=200)
        assert ran == {"stdout": "own\n", "stderr": "", "exitCode": 0}

    def test_finds_and_starts_are_ones_own(
        self, blue: Tenant, green: Tenant, direct: EngineDirect, image: str, names: Names
    ) -> None:
        start = {"image": image, "cmd": ["sleep", "1d"], "networkMode": "none", "labels": names.labels}
        started = blue.do("POST", "/v1/containers/start", start, status=200)["containerId"]
        assert direct.request("GET", f"/containers/{started}/json").json()["Config"]["Labels"][LABEL] == "blue"
        labels = {"labels": names.labels}
        assert started in blue.do("POST", "/v1/containers/findByLabels", labels, status=200)["containerIds"]
        assert started not in green.do("POST", "/v1/containers/findByLabels", labels, status=200)["containerIds"]
        blue.do("POST", "/v1/containers/remove", {"containerId": started, "force": True}, status=204)

    def test_what_breaks_out_in_create_extras_is_refused(self, green: Tenant, image: str, box: tuple[str, str]) -> None:
        extras = {"HostConfig": {"VolumesFrom": [box[0]]}}
        body = {"image": image, "networkMode": "none", "createExtras": extras}
        assert error(green.ask("POST", "/v1/containers/start", body)) == (404, f"No such container: {box[0]}")


def test_who_has_no_scope_waits_for_nobody_where_nobody_has_one() -> None:
    async def both() -> None:
        scopes = Scopes(dockerapi.Engine("/nowhere", max_connections=1, queue_s=1, connect_s=1))
        create = next(operation for operation in operations.OPERATIONS if operation.id == "ContainerCreate")
        async with asyncio.timeout(5), scopes.turn(create, ""), scopes.turn(create, ""):
            pass

    asyncio.run(both())


def test_a_restart_forgets_nothing(engine: Engine, scoped: Runner, box: tuple[str, str]) -> None:
    """Who owns what is written on the objects."""
    kept = ("DOCKER_RUNNER_POLICY", "DOCKER_RUNNER_SHARED_SECRET_FILE")
    settings = {"DOCKER_RUNNER_SHARED_SECRET": "", **{name: scoped.environ[name] for name in kept}}
    with Runner(engine.socket, settings) as another:
        assert Tenant(another, "blue").ask("GET", f"/containers/{box[0]}/json").status == 200
        assert Tenant(another, "green").ask("GET", f"/containers/{box[0]}/json").status == 404
