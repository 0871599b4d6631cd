"""Policy files: what they can say, how an error is told, when they are read, whose policy it is."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policed import Policed, error_of

import operations
from client import sign
from conftest import EngineDirect, Names
from dev.engine import Engine
from dev.tables import RULE_SECTIONS
from documents import TEXTS, example
from errors import RunnerError
from policy import PRESETS, Policy
from policy_file import PolicyError, parse
from rules import check
from service import ROOT, SECRET, Runner, with_files

PAGE = "docs/policy.md"


def operation(name: str) -> operations.Operation:
    return next(each for each in operations.OPERATIONS if each.id == name)


def refusal(policy: Policy, name: str, target: str, body: Any = None) -> RunnerError | None:
    try:
        check(policy, operation(name), target.encode(), body=json.dumps(body).encode() if body else b"")
    except RunnerError as error:
        return error
    return None


def created(policy: Policy, **host: Any) -> bool:
    """Whether a create may ask for this."""
    return refusal(policy, "ContainerCreate", "/containers/create", {"Image": "x", "HostConfig": host}) is None


# The page on it.


@example(PAGE, "[container]\nports")
def test_the_pages_example_says_what_it_seems_to_say(script: str) -> None:
    policies = parse(script)
    policy = policies.default
    assert created(policy, PortBindings={"80/tcp": [{"HostPort": "8010"}]}, Memory=1 << 30, PidsLimit=10)
    assert not created(policy, PortBindings={"80/tcp": [{"HostPort": "80"}]}, Memory=1 << 30, PidsLimit=10)
    assert not created(policy, Memory=1 << 30)
    assert created(policy, Binds=["/srv/data:/data:ro"], Memory=1 << 30, PidsLimit=10)
    assert not created(policy, Binds=["/srv/data:/data"], Memory=1 << 30, PidsLimit=10)
    assert refusal(policy, "ContainerPrune", "/containers/prune") is not None
    assert refusal(policy, "ImageCreate", "/images/create?fromImage=busybox&tag=1") is None
    assert refusal(policy, "ImageCreate", "/images/create?fromImage=evil.example/x&tag=1") is not None
    monitoring = policies.of("monitoring")
    assert refusal(monitoring, "ContainerList", "/containers/json") is None
    assert refusal(monitoring, "ContainerLogs", "/containers/x/logs") is not None
    ci = policies.of("ci")
    assert created(ci, CapAdd=["SYS_PTRACE", "CHOWN"], Memory=1 << 30, PidsLimit=10)
    assert not created(policy, CapAdd=["SYS_PTRACE"], Memory=1 << 30, PidsLimit=10)


@example(PAGE, "[keys.ci.scope]")
def test_the_pages_scopes_are_of_the_keys_that_they_name(script: str) -> None:
    policies = parse(script)
    assert (policies.default.scope.label, policies.of("ci").scope.label) == ("team=a", "team=b")


def test_the_pages_lines_for_tools_are_policy() -> None:
    lines = re.findall(r"`(\[[^`]*\] \w+ = [^`]*)`", TEXTS[PAGE])
    assert lines
    for line in lines:
        header, _, assignment = line.partition("] ")
        parse(f"{header}]\n{assignment}\n" if not assignment.startswith("]") else line.replace("]] ", "]]\n"))


# What a file can say.


def test_an_empty_file_is_the_preset_workloads() -> None:
    assert parse("").default == PRESETS["workloads"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_begins_from_its_preset(preset: str) -> None:
    assert parse(f'preset = "{preset}"').default == PRESETS[preset]


def test_three_dots_in_a_list_are_what_it_holds_already() -> None:
    policy = parse(
        '[container]\ncapabilities = ["...", "SYS_PTRACE"]\n[operations]\nallow = ["...", "Session"]'
    ).default
    usual = PRESETS["workloads"]
    assert policy.container.capabilities == (*usual.container.capabilities, "SYS_PTRACE")
    assert policy.allowed == usual.allowed | {"Session"}


def test_a_list_without_them_takes_its_place() -> None:
    policy = parse(
        '[container]\ncapabilities = ["CHOWN"]\n[operations]\nallow = ["Container*"]\ndeny = ["*Prune"]'
    ).default
    assert created(policy, CapAdd=["CHOWN"])
    assert not created(policy, CapAdd=["KILL"])
    assert refusal(policy, "ImageList", "/images/json") is not None
    assert refusal(policy, "ContainerPrune", "/containers/prune") is not None


def test_a_key_begins_from_the_default_and_a_preset_of_its_own_from_that() -> None:
    policies = parse(
        '[container]\nprivileged = true\n[keys.a.exec]\nprivileged = true\n[keys.b]\npreset = "read-only"\n'
        '[keys."c d".container]\nprivileged = false\n'
    )
    assert created(policies.of("a"), Privileged=True)
    assert policies.of("a").exec.privileged
    assert not policies.of("b").container.privileged
    assert not created(policies.of("c d"), Privileged=True)
    assert policies.of("somebody") == policies.of(None) == policies.default


@pytest.mark.parametrize(
    ("name", "target", "body", "line"),
    [
        ("ContainerCreate", "", {"HostConfig": {"Privileged": True}}, "[keys.ci.container] privileged = true"),
        ("ContainerCreate", "", {"Beside": 1}, "[keys.ci] strict = false"),
        ("ContainerCreate", "", {"HostConfig": {"Binds": ["/a:/x"]}}, '[[keys.ci.container.binds]] path = "/a"'),
        ("ContainerList", "/v1.1/containers/json", None, '[keys.ci] min_api_version = "1.1"'),
        ("Session", "/session", None, '[keys.ci.operations] allow = ["...", "Session"]'),
    ],
)
def test_the_line_that_would_allow_it_stands_in_the_keys_own_table(
    name: str, target: str, body: Any, line: str
) -> None:
    policy = parse("[keys.ci]").of("ci")
    error = refusal(policy, name, target or "/containers/create", body)
    assert error is not None
    assert error.details is not None
    assert error.details["allow"] == line
    allowed = parse(re.sub(r"^(\[+[^\]]*\]+) ", r"\1\n", line))
    assert refusal(allowed.of("ci"), name, target or "/containers/create", body) is None


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("busybox", ["busybox", "busybox:1", "docker.io/library/busybox"], ["busyboxes", "x/busybox"]),
        ("busybox", ["index.docker.io/busybox"], ["evil.example/busybox"]),
        ("busybox:1", ["busybox:1"], ["busybox", "busybox:2", "busybox:*", "busybox:1@sha256:" + "a" * 64]),
        ("team/*", ["team/a:1", "docker.io/team/a/b"], ["teams/a", "evil.example/team/a", "library/team/a"]),
        ("reg.example:5000/a/*:v*", ["reg.example:5000/a/b:v1"], ["reg.example:5000/a/b", "reg.example/a/b:v1"]),
        ("*.example/app", ["a.example/app:1"], ["evil.com/a.example/app", "a.example/x/app"]),
        ("a@sha256:" + "b" * 64, ["a@sha256:" + "b" * 64], ["a", "a@sha256:" + "c" * 64, "a:latest"]),
        ("a[bc]?", ["a[bc]?"], ["ab1", "ac2"]),
        ("sha256:" + "a" * 64, ["sha256:" + "a" * 64], ["a" * 64, "a" * 12, "sha256:aaaa"]),
        ("cafe", ["cafe:latest", "library/cafe"], ["cafe"]),
    ],
)  # fmt: skip
def test_images_are_allowed_by_their_whole_names(pattern: str, yes: list[str], no: list[str]) -> None:
    images = parse(f'[images]\nallow = ["{pattern}"]').default.images
    assert [name for name in yes if not images.allows(name)] == []
    assert [name for name in no if images.allows(name)] == []


@pytest.mark.parametrize(
    ("rule", "source", "allowed"),
    [
        ('path = "/srv/work"', "/srv/work", True),
        ('path = "/srv/work"', "//srv//work/", True),
        ('path = "/srv/work"', "/srv/work/a", False),
        ('path = "/srv/work"\nbelow = true', "/srv/work/a", True),
        ('path = "/srv/work"\nbelow = true', "/srv/workspace", False),
        ('path = "/srv/work"\nbelow = true', "/srv/work/../x", False),
        ('path = "/srv/work"\nbelow = true', "/srv/work/./a", False),
        ('path = "/srv/work"\nbelow = true', "/srv/work\0/a", False),
        ('path = "/srv/work"\nbelow = true', "/SRV/work", False),
        ('path = "/"', "/", True),
        ('path = "/"', "/etc", False),
        ('path = "/"\nbelow = true', "/etc/..", True),
        ('path = "/"\nbelow = true\nread_only = true', "/etc", False),
    ],
)
def test_a_bind_is_of_the_folder_that_is_listed(rule: str, source: str, allowed: bool) -> None:
    policy = parse(f"[[container.binds]]\n{rule}").default
    assert created(policy, Binds=[f"{source}:/m"]) is allowed
    assert created(policy, Mounts=[{"Type": "bind", "Source": source, "Target": "/m"}]) is allowed


@pytest.mark.parametrize(
    ("ports", "asked", "allowed"),
    [
        ('"80"', "80", True),
        ('"80"', "", False),
        ('"0"', "", True),
        ('"80-90"', "85-90", True),
        ('"80-90"', "85-91", False),
        ('"80-84", "85-90"', "82-88", True),
        ('"80-83", "85-90"', "82-88", False),
        ('"*"', "1-65535", True),
    ],
)
def test_a_port_is_within_what_is_listed(ports: str, asked: str, allowed: bool) -> None:
    policy = parse(f"[container]\nports = [{ports}]").default
    assert created(policy, PortBindings={"80/tcp": [{"HostPort": asked}]}) is allowed


# What is wrong with a file.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("preset = ", "line 1: not TOML"),
        ("[container]\nprivileged = yes", "line 2: not TOML"),
        ("[container]\n\n[container]\n", "line 3: not TOML"),
        ('preset = "work"', "line 1: preset: must be one of read-only, workloads, everything"),
        ("preset = [1]", "line 1: preset: must be one of"),
        ("# a\n\nstrict = 1", "line 3: strict: Expected `bool`, got `int`"),
        ("min_api_version = 1.24", "line 1: min_api_version: Expected `str`, got `float`"),
        ('min_api_version = "1"', 'line 1: min_api_version: must be a version, such as "1.24"'),
        ("[containers]\n", "line 1: containers: a policy has no such part"),
        ("allowed = []", "line 1: allowed: a policy has no such part"),
        ("key = 'x'", "line 1: key: a policy has no such part"),
        ("container = 1", "line 1: container: must be a table, [container]"),
        ("[container]\nprivilege = true", "line 2: container.privilege: there is no such rule"),
        ('[container]\nprivileged = "yes"', "line 2: container.privileged: Expected `bool`, got `str`"),
        ("container.privileged = 1", "line 1: container.privileged: Expected `bool`, got `int`"),
        ("container = {privileged = 1}", "line 1: container.privileged: Expected `bool`, got `int`"),
        ("[container]\ncapabilities = [\n  1,\n]", "line 2: container.capabilities: Expected `str`, got `int`"),
        ('[container]\ncapabilities = "ALL"', "line 2: container.capabilities: Expected `array`, got `str`"),
        ('[operations]\nallow = ["ContainerLst"]', "line 2: operations.allow: no operation is called 'ContainerLst'"),
        ('[operations]\ndeny = ["Plugin*"]', "line 2: operations.deny: no operation is called 'Plugin*'"),
        ("[operations]\nother = []", "line 2: operations.other: there is no such rule"),
        ('[[container.binds]]\npath = "srv"', "line 1: container.binds: 'srv' is no plain absolute path"),
        ('[[container.binds]]\npath = "/srv/"', "line 1: container.binds: '/srv/' is no plain absolute path"),
        ('[[container.binds]]\npath = "/a/../b"', "line 1: container.binds: '/a/../b' is no plain absolute path"),
        ('[[container.binds]]\npath = "/a"\nread = 1', "line 1: container.binds: Object contains unknown field `read`"),
        ("[[container.binds]]\nbelow = true", "line 1: container.binds: Object missing required field `path`"),
        ('[container]\nports = ["http"]', "line 2: container.ports: 'http' is no port and no range"),
        ('[container]\nports = ["90-80"]', "line 2: container.ports: '90-80' is no port and no range"),
        ('[container]\nports = ["65536"]', "line 2: container.ports: '65536' is no port and no range"),
        ('[container]\nnamespaces = ["host"]', "line 2: container.namespaces: 'host' is no KIND:MODE"),
        ("[container]\nmax_memory = -1", "line 2: container.max_memory: must be 0 (none) or more"),
        ("[container]\nmax_cpus = nan", "line 2: container.max_cpus: must be 0 (none) or more"),
        ("[container]\nmax_cpus = inf", "line 2: container.max_cpus: must be 0 (none) or more"),
        ('[network]\nsubnets = ["10.0.0.1/8"]', "line 2: network.subnets: '10.0.0.1/8' is no subnet"),
        ("keys = 1", "line 1: keys: must be a table, [keys]"),
        ("[keys]\nci = 1", "line 2: keys.ci: must be a table, [keys.ci]"),
        ("[keys.ci]\nx = 1", "line 2: keys.ci.x: a policy has no such part"),
        ("[keys.ci.keys.x]\n", "line 1: keys.ci.keys: a policy has no such part"),
        ('[container]\n[keys."a.b".exec]\nprivileged = 1', 'line 3: keys."a.b".exec.privileged: Expected `bool`'),
        ("x = " + "[" * 5000, "not TOML"),
        ("x = " + "9" * 5000, "not TOML"),
        ("[container]\nmax_memory = " + "9" * 400, "line 2: container.max_memory: "),
    ],
)  # fmt: skip
def test_an_error_names_the_line_and_the_reason(text: str, error: str) -> None:
    with pytest.raises(PolicyError) as raised:
        parse(text)
    assert error in str(raised.value)


VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["*", "...", "80", "1.24", "/srv", "10.0.0.0/8", "network:host", "workloads", "everything"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "below", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from(
    [
        "preset",
        "strict",
        "min_api_version",
        "operations",
        "allow",
        "deny",
        "keys",
        "ci",
        *RULE_SECTIONS,
        "scope",
        "label",
    ]
    + [field for part in RULE_SECTIONS for field in getattr(PRESETS["workloads"], part).__struct_fields__]
) | st.text(max_size=4)


def toml_value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(map(toml_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml_value(name)} = {toml_value(item)}' for name, item in value.items())}}}"
        case str():
            return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
        case _:
            return repr(value)


@st.composite
def files(draw: Callable[[Any], Any]) -> str:
    """Files that are near to policies."""
    lines = []
    for _ in range(draw(st.integers(0, 6))):
        path = draw(st.lists(NAMES, min_size=1, max_size=4))
        dotted = ".".join(toml_value(name.encode("utf-8", "replace").decode()) for name in path)
        value = toml_value(draw(VALUES))
        lines.append(draw(st.sampled_from([f"{dotted} = {value}", f"[{dotted}]", f"[[{dotted}]]", f"{dotted}"])))
    return "\n".join(lines)


@given(files() | st.text(max_size=60))
def test_whatever_a_file_holds_it_is_a_policy_or_a_policy_error(text: str) -> None:
    try:
        policies = parse(text)
    except PolicyError as error:
        message = str(error)
    else:
        message = ""
        for policy in (policies.default, *policies.keys.values()):
            assert policy.name in PRESETS
            for name, target in (("ContainerCreate", "/v1.41/containers/create"), ("ImageBuild", "/build?t=a")):
                body = {"Image": "a", "HostConfig": {"Memory": 1, "PortBindings": {"1/tcp": [{"HostPort": "1-9"}]}}}
                refused = refusal(policy, name, target, body)
                assert refused is None or refused.code == "policy_denied"
    assert message.encode() is not None


# When it is read.


def test_it_is_read_again_on_sighup_and_a_wrong_one_changes_nothing(
    engine: Engine, tmp_path: Path, names: Names, image: str
) -> None:
    def create() -> int:
        body = {"Image": image, "Labels": names.labels, "HostConfig": {"NetworkMode": "none", "Privileged": True}}
        return runner.request("POST", "/containers/create", json.dumps(body).encode(), JSON).status

    with Policed(engine.socket, tmp_path / "policy.toml") as runner:
        assert create() == 403
        assert '"level":"info"' in runner.set("[container]\nprivileged = true\n")
        assert create() == 201
        told = runner.set("[container]\nprivileged = 1\n")
        assert '"level":"error"' in told
        assert (
            f"kept the old policy: DOCKER_RUNNER_POLICY: {tmp_path}/policy.toml: line 2: container.privileged" in told
        )
        assert create() == 201
        (tmp_path / "policy.toml").unlink()
        runner.process.send_signal(signal.SIGHUP)
        runner.wait_for_log("cannot read")
        assert create() == 201


JSON = {"Content-Type": "application/json"}


@pytest.fixture
def serve(engine: Engine, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`docker-runner COMMAND` under a policy file."""

    def run(command: str, policy: str | bytes | None, secrets: str = SECRET) -> "subprocess.CompletedProcess[str]":
        file = tmp_path / "policy.toml"
        if policy is not None:
            file.write_bytes(policy if isinstance(policy, bytes) else policy.encode())
        (tmp_path / "secrets").write_text(secrets)
        (tmp_path / "secrets").chmod(0o600)
        settings = {
            "DOCKER_RUNNER_SHARED_SECRET_FILE": str(tmp_path / "secrets"),
            "DOCKER_SOCKET": engine.socket,
            "DOCKER_RUNNER_ENV": "production",
            "DOCKER_RUNNER_PORT": "0",
            "DOCKER_RUNNER_POLICY": str(file),
        }
        return subprocess.run(
            [sys.executable, str(ROOT / "runner.py"), command], env=settings, capture_output=True, text=True, timeout=30
        )

    return run


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (None, "No such file"),
        (b"\xff", "can't decode"),
        ("[container]\nports = [1]", "line 2: container.ports"),
    ],
)
def test_a_wrong_policy_at_start_ends_serve_with_one_line(
    serve: Callable[..., "subprocess.CompletedProcess[str]"], policy: Any, reason: str
) -> None:
    done = serve("serve", policy)
    assert done.returncode == 1
    assert done.stderr.startswith("docker-runner: DOCKER_RUNNER_POLICY: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_shows_the_policy_in_force(
    serve: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    done = serve("check", '[keys.monitoring]\npreset = "read-only"\n', f"{SECRET}\nmonitoring:{SECRET}2\n")
    assert done.returncode == 0, done.stdout
    assert f"ok    policy: workloads, from {tmp_path}/policy.toml\n" in done.stdout
    assert "ok    policy: of named keys: monitoring: read-only\n" in done.stdout


def test_check_tells_of_a_key_that_nobody_has(serve: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = serve("check", '[keys.monitring]\npreset = "read-only"\n', f"{SECRET}\nmonitoring:{SECRET}2\n")
    assert done.returncode == 1
    assert "FAIL  policy: no secret has the name of [keys.monitring]\n" in done.stdout


# Whose it is.

MONITORING = "a-secret-for-monitoring-0123456789"


def test_where_a_deny_takes_an_operation_away_the_refusal_names_it() -> None:
    policies = parse('[operations]\ndeny = ["*Prune"]\n[keys.a.operations]\nallow = ["...", "ContainerPrune"]\n')
    found = refusal(policies.default, "ContainerPrune", "/containers/prune")
    assert found is not None
    assert found.details is not None
    assert found.details["allow"] == "[operations] deny, without what names ContainerPrune,"
    assert refusal(policies.of("a"), "ContainerPrune", "/containers/prune") is None


def test_a_writable_bind_of_what_may_be_read_names_the_way_out() -> None:
    policy = parse('[container]\nbinds = [{path = "/srv/data", read_only = true}]\n').default
    asked = {"Image": "x", "HostConfig": {"Binds": ["/srv/data:/data"]}}
    found = refusal(policy, "ContainerCreate", "/containers/create", asked)
    assert found is not None
    assert "denies HostConfig.Binds that is not `ro`: '/srv/data'" in found.message
    assert created(policy, Binds=["/srv/data:/data:ro"])


def test_a_key_keeps_the_files_scope_whatever_its_preset() -> None:
    keys = '[keys.a]\npreset = "everything"\n[keys.b.scope]\nlabel = ""\n[keys.c.scope]\nlabel = "team=c"\n'
    policies = parse(f'[scope]\nlabel = "team=all"\n{keys}')
    assert [policies.of(name).scope.label for name in (None, "a", "b", "c")] == ["team=all", "team=all", "", "team=c"]
    assert not policies.of("a").unrestricted


@pytest.mark.parametrize("options", ["-o args,pid", "-C sh -o args,pid", "-eo args,pid", "ax k pid"])
def test_a_list_of_processes_tells_of_none_of_the_host(options: str) -> None:
    for query in (quote(options), f"aux&ps_args={quote(options)}"):
        target = f"/containers/x/top?ps_args={query}"
        found = refusal(PRESETS["workloads"], "ContainerTop", target)
        assert found is not None
        assert found.code == "policy_denied"
    assert refusal(PRESETS["workloads"], "ContainerTop", "/containers/x/top?ps_args=-o%20pid,args") is None


def test_a_policy_of_no_key_is_told(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('[keys.monitorng]\npreset = "read-only"\n')
    with Runner(engine.socket, {"DOCKER_RUNNER_POLICY": str(tmp_path / "policy.toml")}) as runner:
        runner.wait_for_log("the policy [keys.monitorng] is nobody's")


@pytest.fixture(scope="module")
def shared(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with an unnamed key, and a named one that may only read."""
    secrets, policy = f"{SECRET}\nmonitoring:{MONITORING}\n", '[keys.monitoring]\npreset = "read-only"\n'
    with Runner(engine.socket, with_files(tmp_path_factory.mktemp("keys"), secrets, policy)) as runner:
        yield runner


def monitored(runner: Runner, method: str, target: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    content = json.dumps(body).encode() if body else b""
    headers = {**sign(MONITORING, method, target, content, key="monitoring"), **(JSON if body else {})}
    answer = runner.request(method, target, content if body else None, headers)
    return answer.status, error_of(answer)


@pytest.fixture(scope="module")
def quiet_box(direct: EngineDirect, image: str, names: Names) -> str:
    body = {"Image": image, "Cmd": ["sleep", "1000000"], "Labels": names.labels, "HostConfig": {"NetworkMode": "none"}}
    container: str = direct.request("POST", "/containers/create", json=body).json()["Id"]
    assert direct.request("POST", f"/containers/{container}/start").status_code == 204
    return container


@pytest.mark.parametrize(
    "target",
    [
        *("/_ping", "/info", "/containers/json", "/containers/BOX/json", "/containers/BOX/top", "/images/json"),
        *("/v1.41/networks", "/v1/containers/inspect?containerId=BOX", "/v1/containers/labels?containerId=BOX"),
    ],
)
def test_a_key_for_monitoring_reads_the_state_of_things(shared: Runner, quiet_box: str, target: str) -> None:
    assert monitored(shared, "GET", target.replace("BOX", quiet_box))[0] == 200


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/containers/BOX/logs?stdout=1", None),
        ("GET", "/containers/BOX/archive?path=/etc", None),
        ("GET", "/containers/BOX/export", None),
        ("POST", "/containers/BOX/exec", {"Cmd": ["true"]}),
        ("POST", "/containers/BOX/pause", None),
        ("POST", "/containers/create", {"Image": "x"}),
        ("DELETE", "/containers/BOX?force=1", None),
        ("GET", "/v1/containers/logs/sse?containerId=BOX", None),
        ("POST", "/v1/containers/start", {"image": "x"}),
        ("POST", "/v1/containers/remove", {"containerId": "BOX", "force": True}),
        ("POST", "/v1/exec/run", {"containerId": "BOX", "command": "true"}),
        ("POST", "/v1/containers/putArchive", {"containerId": "BOX", "path": "/", "payloadBase64": ""}),
    ],
)
def test_a_key_for_monitoring_does_nothing_else(
    shared: Runner, direct: EngineDirect, quiet_box: str, method: str, target: str, body: Any
) -> None:
    text = json.dumps(body).replace("BOX", quiet_box)
    status, error = monitored(shared, method, target.replace("BOX", quiet_box), json.loads(text))
    assert (status, error["code"]) == (403, "policy_denied")
    assert "[keys.monitoring.operations] allow = " in error["message"]
    state = direct.request("GET", f"/containers/{quiet_box}/json").json()
    assert state["State"]["Status"] == "running"
    assert not state["ExecIDs"]


def test_the_unnamed_key_has_the_default_policy(shared: Runner, quiet_box: str) -> None:
    assert shared.request("GET", f"/containers/{quiet_box}/logs?stdout=1").status == 200
