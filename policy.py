"""What callers may ask for: the policy as frozen structs, its presets, and its words. Pure functions.

The defaults of the structs *are* the preset `workloads`: what cannot reach the host is allowed, what can is not. How a
policy file is read is in `policy_file.py`; the rules that hold requests against a policy, in `rules.py`.
"""

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import msgspec

from errors import RunnerError
from operations import OPERATIONS, Operation

Patterns = tuple[str, ...]
"""Names, in which `*` stands for anything, and every other character for itself. In a policy file, `...` in a list
stands for what the list holds without the file."""

STANDING = "..."


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a policy."""


class Bind(Section, frozen=True):
    """A folder of the host that may be mounted. `below`: those below it too, and whoever can write in there can reach
    the whole host through a symbolic link, which the engine follows. `read_only` is of the folder itself: what the
    host has mounted below it may stay writable (before Engine 25.0, or API 1.44)."""

    path: str
    below: bool = False
    read_only: bool = False


class Container(Section, frozen=True):
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
    """Paths on the host, spelt plainly."""
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
    """And `OomKillDisable`."""
    masked_paths: bool = False
    ports: Patterns = ()
    """Published ports of the host: `8080`, `8000-8999`; `0` is one that the engine chooses; `*` any."""
    log_drivers: Patterns = ("json-file", "local", "none")
    log_options: Patterns = (
        "max-size",
        "max-file",
        "compress",
        "labels",
        "labels-regex",
        "env",
        "env-regex",
        "tag",
        "mode",
    )
    """Without a driver they go to the engine's own default one, whichever that is."""
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

    def ports_allowed(self, first: int, last: int) -> bool:
        """Whether these ports of the host may be published; 0 is one that the engine chooses."""
        if "*" in self.ports:
            return True
        for low, high in sorted(port_range(pattern) for pattern in self.ports):
            if low <= first <= high:
                first = high + 1
            if first > last:
                return True
        return False


def port_range(pattern: str) -> tuple[int, int]:
    """The first and the last of a pattern of ports."""
    first, _, last = pattern.partition("-")
    return int(first), int(last or first)


class Exec(Section, frozen=True):
    """`[exec]`."""

    privileged: bool = False
    users: Patterns = ("*",)


class Images(Section, frozen=True):
    """`[images]`: which may be pulled, run, saved, pushed, and given as a name. With patterns, what hides its names
    (loads, builds) needs a word of its own."""

    allow: Patterns = ("*",)
    """`registry/repository:tag`, `...@digest`; without a tag any. As the docker CLI completes names: a first part that
    holds a `*` is a registry. An image's whole id may be listed, too."""
    load: bool = False
    build: bool = False
    """Also where a container's resources have a maximum: those of a build cannot be held to it."""
    fetch_urls: bool = False
    """`ImageCreate` with `fromSrc=URL`, `ImageBuild` with `remote=`. What a Dockerfile fetches is not seen."""
    build_options: bool = False
    """Of a build: `extrahosts`, `securityopt`, `cgroupparent`, `ulimits`, `outputs`."""

    @property
    def everything(self) -> bool:
        """Nothing is restricted."""
        return "*" in self.allow

    def allows(self, reference: str) -> bool:
        """Whether an image may be used by this name. `name:*` stands for all its tags."""
        if _ID.fullmatch(reference):  # Of an image, or its beginning: then it names any that there is.
            return reference in self.allow and len(reference.removeprefix("sha256:")) == 64
        registry, name, version = completed(reference)
        for pattern in self.allow:
            # Apart: a `*` in the registry's name must not reach beyond it.
            of_registry, of_name, of_version = completed(pattern)
            if (
                _matches(registry, of_registry)
                and _matches(name, of_name)
                and (not of_version or _matches(version or ":latest", of_version))
            ):
                return True
        return False


_ID = re.compile(r"(sha256:)?[0-9a-f]+")


class Volume(Section, frozen=True):
    """`[volume]`."""

    drivers: Patterns = ("local",)
    driver_options: bool = False
    """Beside those of a tmpfs."""


class Network(Section, frozen=True):
    """`[network]`."""

    drivers: Patterns = ("bridge",)
    options: Patterns = (
        "com.docker.network.driver.mtu",
        "com.docker.network.bridge.enable_icc",
        "com.docker.network.bridge.enable_ip_masquerade",
        "com.docker.network.enable_ipv4",
        "com.docker.network.enable_ipv6",
    )
    """Of the driver, of IPAM, of an endpoint. `*` also allows other IPAM drivers, scopes and sources of options."""
    subnets: Patterns = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
    """The host routes a network's addresses into that network: public ones would be taken from whom they belong to."""

    @property
    def any_option(self) -> bool:
        """Nothing is restricted."""
        return "*" in self.options

    def subnet_allowed(self, addresses: str) -> bool:
        """Whether a network may have these addresses (`10.1.0.0/16`, or one).

        Raises:
            ValueError: they are none.
        """
        asked = ipaddress.ip_network(addresses, strict=False)
        return "*" in self.subnets or any(_holds(ipaddress.ip_network(each), asked) for each in self.subnets)


_Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def _holds(outer: _Subnet, inner: _Subnet) -> bool:
    if isinstance(outer, ipaddress.IPv4Network):
        return isinstance(inner, ipaddress.IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, ipaddress.IPv6Network) and inner.subnet_of(outer)


class Ownership(Section, frozen=True):
    """`[scope]`: only what carries the label is seen and touched, and what is made gets it. See `scope.py`."""

    label: str = ""
    """`NAME=VALUE`; empty: there is no scope."""


class Policy(Section, frozen=True):
    """All of it. Beside the sections:"""

    name: str
    """The preset that it began from, for messages."""
    allowed: frozenset[str]
    """Ids of operations."""
    denied: frozenset[str] = frozenset()
    """Of operations, those that its own `deny` takes away, whatever it allows."""
    key: str = ""
    """The named key that it is of, for messages."""
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
            allow = f'[operations] allow = ["{STANDING}", "{operation.id}"]'
            without = f"[operations] deny, without what names {operation.id},"
            self.deny("operations", operation.id, without if operation.id in self.denied else allow)

    def permit_version(self, version: tuple[int, int] | None) -> None:
        """Refuse a version of the API from before the engine knew what it should not take.

        Raises:
            RunnerError: `policy_denied`.
        """
        if version is None:
            return
        major, _, minor = self.min_api_version.partition(".")
        if version < (int(major), int(minor)):
            asked = f"{version[0]}.{version[1]}"
            self.deny("API versions before min_api_version", asked, f'min_api_version = "{asked}"')

    def deny(self, rule: str, value: object, allow: str) -> NoReturn:
        """Refuse.

        Args:
            rule: what the caller asked for, in the engine's words: `HostConfig.Privileged`.
            value: its value.
            allow: the line of policy that would allow it.

        Raises:
            RunnerError: `policy_denied`.
        """
        if self.key:
            place = f"keys.{toml_key(self.key)}"
            head, bracket, rest = allow.partition("]")
            if bracket and allow.startswith("["):
                brackets = head.rpartition("[")
                allow = f"{brackets[0]}[{place}.{brackets[2]}]{rest}"
            else:
                allow = f"[{place}] {allow}"
        raise refusal(f"the policy '{self.name}'", rule, value, allow)

    def line(self, section: str, name: str, values: Iterable[str]) -> str:
        """The line of policy that lets values into a list: `[section] name = [...]`, with what the list holds."""
        standing: Patterns = getattr(getattr(self, section), name)
        usual = getattr(getattr(PRESETS[self.name], section), name)
        held = () if not standing else (STANDING,) if standing == usual else standing
        return f"[{section}] {name} = [{', '.join([*map(toml, held), *map(_toml_pattern, values)])}]"


def refusal(whose: str, rule: str, value: object, allow: str) -> RunnerError:
    """What a policy says where it denies; arguments as `Policy.deny`."""
    shown, line = plain(repr(value)[:200]), plain(allow)
    return RunnerError(
        "policy_denied",
        f"{whose} denies {rule}: {shown} (`{line}` would allow it)",
        details={"rule": rule, "value": shown, "allow": line},
    )


def toml(text: str) -> str:
    """A string as a policy file writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_pattern(value: str) -> str:
    """A pattern for a value: itself, or what it begins with where nobody would want to read it."""
    return toml("..*" if value == STANDING else value if len(value) <= 100 else value[:80] + "*")


def toml_key(name: str) -> str:
    """A name as a policy file writes it before `=`, or in the head of a table."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)


def plain(text: str) -> str:
    """Text that UTF-8 can hold, whatever bytes a path held."""
    return text.encode("utf-8", "replace").decode()


class Policies(msgspec.Struct, frozen=True):
    """The policy of the unnamed keys, and those of named ones that have their own."""

    default: Policy
    keys: Mapping[str, Policy] = {}

    def of(self, key: str | None) -> Policy:
        """The policy that holds for a key's name."""
        return self.default if key is None else self.keys.get(key, self.default)


def matches(value: str, patterns: Sequence[str]) -> bool:
    """Whether a value is one of the patterns."""
    return any(_matches(value, pattern) for pattern in patterns)


def _matches(value: str, pattern: str) -> bool:
    """Not `fnmatch`, to which brackets and question marks are more than themselves."""
    first, *rest = pattern.split("*")
    if not rest:
        return value == pattern
    *middle, last = rest
    if not value.startswith(first) or len(value) < len(first) + len(last) or not value.endswith(last):
        return False
    at, end = len(first), len(value) - len(last)
    for part in middle:
        at = value.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def ids(allow: Sequence[str], deny: Sequence[str] = ()) -> frozenset[str]:
    """The operations that patterns name.

    Raises:
        ValueError: one names none.
    """
    for pattern in (*allow, *deny):
        if not any(_matches(operation.id, pattern) for operation in OPERATIONS):
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
    "read-only": Policy(name="read-only", allowed=ids(_READING, ("SystemAuth",))),
    # What BuildKit does over Session and Grpc no policy can see: calls of HTTP/2, and reads of the caller's files.
    "workloads": Policy(name="workloads", allowed=ids(_ANY, ("Session", "Grpc"))),
    "everything": Policy(
        name="everything",
        allowed=ids(_ANY),
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
            log_options=_ANY,
            ulimits=_ANY,
            start_body=True,
        ),
        exec=Exec(privileged=True),
        images=Images(load=True, build=True, fetch_urls=True, build_options=True),
        volume=Volume(drivers=_ANY, driver_options=True),
        network=Network(drivers=_ANY, options=_ANY, subnets=_ANY),
    ),
}


def completed(reference: str) -> tuple[str, str, str]:
    """A reference as the engine completes it: `docker.io`, `library/busybox`, and `:tag` or `@digest` (or nothing).

    Source: the reference grammar of the distribution project.
    """
    name, at, digest = reference.partition("@")
    head, colon, tag = name.rpartition(":")
    version = f"@{digest}" if at else ""
    if colon and "/" not in tag:
        name, version = head, version or f":{tag}"
    first, slash, rest = name.partition("/")
    registry = "." in first or ":" in first or first == "localhost" or "*" in first or first != first.lower()
    if not slash or not registry:
        first, rest = "docker.io", name
    if first == "index.docker.io":
        first = "docker.io"
    if first == "docker.io" and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest, version
