"""What callers may ask for: the policy as frozen structs, its presets, and how its file is read. Pure functions.

The defaults of the structs *are* the preset `workloads`: what cannot reach the host is allowed, what can is not. A
policy file (TOML) begins from a preset and says what differs; `[keys.NAME]` gives a named key its own. The rules that
hold requests against it are in `rules.py`.
"""

import posixpath
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from errors import RunnerError
from operations import OPERATIONS, Operation

Patterns = tuple[str, ...]
"""Names, in which `*` stands for anything."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Bind(_Section, frozen=True):
    """A folder of the host that may be mounted. `below`: those below it too, and whoever can write in there can reach
    the whole host through a symbolic link, which the engine follows."""

    path: str
    below: bool = False
    read_only: bool = False


class Container(_Section, frozen=True):
    """`[container]`: what a create or an update may ask for."""

    privileged: bool = False
    namespaces: Patterns = ()
    """`KIND:MODE`, such as `network:host`, `pid:container`."""
    capabilities: Patterns = (
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
        *("NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
    """To be added; these are what a container has anyway."""
    devices: Patterns = ()
    device_requests: bool = False
    device_cgroup_rules: bool = False
    security_opt: Patterns = ()
    """Beside `no-new-privileges`, which takes rights away."""
    binds: tuple[Bind, ...] = ()
    mount_types: Patterns = ()
    """Beside `bind`, `volume` and `tmpfs`, which have rules of their own."""
    volumes_from: bool = False
    sysctls: Patterns = ()
    annotations: Patterns = ()
    cgroup_parent: bool = False
    runtimes: Patterns = ("runc", "io.containerd.runc.v2")
    oom_score_adj: bool = False
    masked_paths: bool = False
    ports: Patterns = ()
    """Published ports of the host: `8080`, `8000-8999`; `0` is one that the engine chooses; `*` any."""
    log_drivers: Patterns = ("json-file", "local", "none")
    ulimits: Patterns = ()
    start_body: bool = False
    max_memory: int = 0
    """Bytes; then a create must state a limit. 0: none."""
    max_cpus: float = 0
    max_pids: int = 0

    @property
    def any_bind(self) -> bool:
        """The whole host may be mounted."""
        return any(bind.path == "/" and bind.below and not bind.read_only for bind in self.binds)

    def bind_allowed(self, source: str, *, read_only: bool) -> bool:
        """Whether a folder of the host may be mounted. One that is not spelt plainly (`..`) may not."""
        if self.any_bind:
            return True
        if not source.startswith("/") or any(part in (".", "..") for part in source.split("/")):
            return False
        path = "/" + source.strip("/")
        path = re.sub("/+", "/", path)
        return any(
            (path == bind.path or (bind.below and path.startswith(bind.path.rstrip("/") + "/")))
            and (read_only or not bind.read_only)
            for bind in self.binds
        )

    def port_allowed(self, port: int) -> bool:
        """Whether a port of the host may be published; 0 for one that the engine chooses."""
        for pattern in self.ports:
            first, dash, last = pattern.partition("-")
            if pattern == "*" or (int(first) <= port <= int(last if dash else first)):
                return True
        return False


class Exec(_Section, frozen=True):
    """`[exec]`."""

    privileged: bool = False
    users: Patterns = ("*",)


class Images(_Section, frozen=True):
    """`[images]`: which may be pulled, run, pushed, and given as a name. With patterns, what hides its names (loads,
    builds) needs a word of its own."""

    allow: Patterns = ("*",)
    """`registry/repository:tag`, `...@digest`; without a tag any. As the docker CLI completes names."""
    load: bool = False
    build: bool = False
    fetch_urls: bool = False
    build_options: bool = False
    """Of a build: `extrahosts`, `securityopt`, `cgroupparent`, `ulimits`."""

    @property
    def everything(self) -> bool:
        """Nothing is restricted."""
        return "*" in self.allow

    def allows(self, reference: str) -> bool:
        """Whether an image may be used by this name."""
        name, version = _completed(reference)
        for pattern in self.allow:
            wanted, wanted_version = _completed(pattern)
            if fnmatchcase(name, wanted) and (not wanted_version or fnmatchcase(version or ":latest", wanted_version)):
                return True
        return False


class Volume(_Section, frozen=True):
    """`[volume]`."""

    drivers: Patterns = ("local",)
    driver_options: bool = False
    """Beside those of a tmpfs."""


class Network(_Section, frozen=True):
    """`[network]`."""

    drivers: Patterns = ("bridge",)
    options: Patterns = (
        "com.docker.network.driver.mtu",
        "com.docker.network.bridge.enable_icc",
        "com.docker.network.bridge.enable_ip_masquerade",
        "com.docker.network.enable_ipv4",
        "com.docker.network.enable_ipv6",
    )

    @property
    def any_option(self) -> bool:
        """Nothing is restricted."""
        return "*" in self.options

    def options_allowed(self, options: Mapping[str, str]) -> bool:
        """Whether all of these may be given."""
        return all(matches(name, self.options) for name in options)


class Ownership(_Section, frozen=True):
    """`[scope]`: only what carries the label is seen and touched, and what is made gets it. See `scope.py`."""

    label: str = ""
    """`NAME=VALUE`; empty: there is no scope."""


class Policy(_Section, frozen=True):
    """All of it. Beside the sections:"""

    name: str
    """The preset that it began from, for messages."""
    allowed: frozenset[str]
    """Ids of operations."""
    unrestricted: bool = False
    """There is nothing to look at: the preset `everything` as it is."""
    strict: bool = True
    """Fields that the policy does not know are refused."""
    min_api_version: str = "1.24"
    container: Container = Container()
    exec: Exec = Exec()
    images: Images = Images()
    volume: Volume = Volume()
    network: Network = Network()
    scope: Ownership = Ownership()

    def permit(self, operation: Operation) -> None:
        """Refuse an operation that is not allowed at all.

        Raises:
            RunnerError: `policy_denied`.
        """
        if operation.id not in self.allowed:
            allow = f'[operations] allow = ["{operation.id}"]'
            raise RunnerError(
                "policy_denied",
                f"the policy '{self.name}' denies {operation.id} (`{allow}` would allow it)",
                details={"rule": "operations", "value": operation.id, "allow": allow},
            )

    def permit_version(self, version: tuple[int, int] | None) -> None:
        """Refuse a version of the API from before the engine knew what it should not take.

        Raises:
            RunnerError: `policy_denied`.
        """
        major, _, minor = self.min_api_version.partition(".")
        if version is not None and version < (int(major), int(minor)):
            allow = f'min_api_version = "{version[0]}.{version[1]}"'
            raise RunnerError(
                "policy_denied",
                f"the policy '{self.name}' denies API versions before {self.min_api_version}"
                f" (`{allow}` would allow it)",
                details={"rule": "min_api_version", "value": f"{version[0]}.{version[1]}", "allow": allow},
            )


class Policies(msgspec.Struct, frozen=True):
    """The policy of the unnamed keys, and those of named ones that have their own."""

    default: Policy
    keys: Mapping[str, Policy] = {}

    def of(self, key: str | None) -> Policy:
        """The policy that holds for a key's name."""
        return self.default if key is None else self.keys.get(key, self.default)


def matches(value: str, patterns: Sequence[str]) -> bool:
    """Whether a value is one of the patterns."""
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def _ids(allow: Sequence[str], deny: Sequence[str] = ()) -> frozenset[str]:
    """The operations that patterns name.

    Raises:
        ValueError: one names none.
    """
    for pattern in (*allow, *deny):
        if not any(fnmatchcase(operation.id, pattern) for operation in OPERATIONS):
            raise ValueError(f"no operation is called {pattern!r}")
    return frozenset(
        operation.id for operation in OPERATIONS if matches(operation.id, allow) and not matches(operation.id, deny)
    )


# What shows the state of things, and no content of theirs: no files, no logs.
_READING = (
    *("System*", "ContainerList", "ContainerInspect", "ContainerTop", "ContainerStats", "ContainerChanges"),
    *("ExecInspect", "ImageList", "ImageInspect", "ImageHistory", "VolumeList", "VolumeInspect"),
    *("NetworkList", "NetworkInspect"),
)
_ANY: Patterns = ("*",)

PRESETS: Mapping[str, Policy] = {
    "read-only": Policy(name="read-only", allowed=_ids(_READING, ("SystemAuth",))),
    # What BuildKit does over Session and Grpc no policy can see: calls of HTTP/2, and reads of the caller's files.
    "workloads": Policy(name="workloads", allowed=_ids(_ANY, ("Session", "Grpc"))),
    "everything": Policy(
        name="everything",
        allowed=_ids(_ANY),
        unrestricted=True,
        strict=False,
        min_api_version="0.0",
        container=Container(
            privileged=True,
            namespaces=_ANY,
            capabilities=_ANY,
            devices=_ANY,
            device_requests=True,
            device_cgroup_rules=True,
            security_opt=_ANY,
            binds=(Bind(path="/", below=True),),
            mount_types=_ANY,
            volumes_from=True,
            sysctls=_ANY,
            annotations=_ANY,
            cgroup_parent=True,
            runtimes=_ANY,
            oom_score_adj=True,
            masked_paths=True,
            ports=_ANY,
            log_drivers=_ANY,
            ulimits=_ANY,
            start_body=True,
        ),
        exec=Exec(privileged=True),
        images=Images(load=True, build=True, fetch_urls=True, build_options=True),
        volume=Volume(drivers=_ANY, driver_options=True),
        network=Network(drivers=_ANY, options=_ANY),
    ),
}


class _Operations(_Section, frozen=True):
    allow: Patterns | None = None
    deny: Patterns = ()


class PolicyError(Exception):
    """A policy file is wrong; the message names the line, if it is known, and the reason."""


def parse(text: str) -> Policies:
    """A policy file.

    Raises:
        PolicyError: it is not TOML, or says what no policy can say.
    """
    try:
        document = tomllib.loads(text)
        keys = document.pop("keys", {})
        if not isinstance(keys, dict) or not all(isinstance(table, dict) for table in keys.values()):
            raise PolicyError("keys: must be tables, [keys.NAME]")
        default = _policy(document, PRESETS["workloads"], "")
        return Policies(default, {name: _policy(table, default, f"keys.{name}.") for name, table in keys.items()})
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"not TOML: {error}") from error
    except msgspec.ValidationError as error:
        place, reason = str(error).split("\0")
        raise PolicyError(f"line {_line_of(text, place)}: {place}: {reason}") from error


def _policy(table: dict[str, Any], base: Policy, place: str) -> Policy:
    preset = table.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise msgspec.ValidationError(f"{place}preset\0must be one of {', '.join(PRESETS)}")
        base = PRESETS[preset]
    operations = _section(table.pop("operations", {}), _Operations(), f"{place}operations")
    fields: dict[str, Any] = {"name": base.name, "unrestricted": base.unrestricted and not table}
    try:
        allowed = base.allowed if operations.allow is None else _ids(operations.allow)
        fields["allowed"] = allowed - _ids(operations.deny)
    except ValueError as error:
        raise msgspec.ValidationError(f"{place}operations\0{error}") from error
    for name, value in table.items():
        standing = getattr(base, name, None)
        if isinstance(standing, _Section):
            fields[name] = _section(value, standing, f"{place}{name}")
        elif name in ("strict", "min_api_version"):
            try:
                fields[name] = msgspec.convert(value, type(standing))
            except msgspec.ValidationError as error:
                raise msgspec.ValidationError(f"{place}{name}\0{error}") from error
        else:
            raise msgspec.ValidationError(f"{place}{name}\0a policy has no such part")
    policy = msgspec.structs.replace(base, **fields)
    _check(policy, place)
    return policy


def _section(value: Any, standing: Any, place: str) -> Any:
    """A section with what the file says of it in place of what stands."""
    if not isinstance(value, dict):
        raise msgspec.ValidationError(f"{place}\0must be a table, [{place}]")
    kept = {field: getattr(standing, field) for field in standing.__struct_fields__ if field not in value}
    for name, item in value.items():
        field = next((field for field in msgspec.structs.fields(standing) if field.name == name), None)
        if field is None:
            raise msgspec.ValidationError(f"{place}.{name}\0there is no such rule")
        try:
            kept[name] = msgspec.convert(item, field.type)
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"{place}.{name}\0{error}") from error
    return type(standing)(**kept)


def _check(policy: Policy, place: str) -> None:
    if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", policy.min_api_version):
        raise msgspec.ValidationError(f'{place}min_api_version\0must be a version, such as "1.24"')
    if policy.scope.label and not re.fullmatch(r"[^=\s,]+=[^\s,]+", policy.scope.label):
        raise msgspec.ValidationError(f"{place}scope.label\0must be NAME=VALUE, without blanks and commas")
    for bind in policy.container.binds:
        if bind.path != posixpath.normpath(bind.path) or not bind.path.startswith("/") or bind.path.startswith("//"):
            raise msgspec.ValidationError(f"{place}container.binds\0{bind.path!r} is no plain absolute path")
    for ports in policy.container.ports:
        if not re.fullmatch(r"\*|[0-9]{1,5}(-[0-9]{1,5})?", ports):
            raise msgspec.ValidationError(f"{place}container.ports\0{ports!r} is no port and no range")


def _line_of(text: str, place: str) -> str:
    """The line of a policy file that says something, as far as plain tables go; `?` where it is written otherwise."""
    *tables, name = place.split(".")
    current: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            current = [part.strip(' "') for part in header[1].split(".")]
            if current == [*tables, name]:
                return str(number)
        elif current == tables and re.match(rf'\s*"?{re.escape(name)}"?\s*[.=]', line):
            return str(number)
    return "?"


def _completed(reference: str) -> tuple[str, str]:
    """A reference as the engine completes it: `docker.io/library/busybox`, and `:tag` or `@digest` (or nothing).

    Source: the reference grammar of the distribution project.
    """
    name, at, digest = reference.partition("@")
    head, colon, tag = name.rpartition(":")
    version = f"@{digest}" if at else ""
    if colon and "/" not in tag:
        name, version = head, version or f":{tag}"
    first, slash, rest = name.partition("/")
    if not slash or not (
        "." in first or ":" in first or first == "localhost" or "*" in first or first != first.lower()
    ):
        first, rest = "docker.io", name
    if first == "index.docker.io":
        first = "docker.io"
    if first == "docker.io" and "/" not in rest:
        rest = f"library/{rest}"
    return f"{first}/{rest}", version
