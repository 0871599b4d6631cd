"""What a create, an update, an exec, a build or a pull may ask for: one function for each operation that has rules.

Each takes the policy and the request as the engine will read it, and raises the first refusal. A refusal names the
rule, the value, and the line of policy that would allow it. What is not written down in a rule as harmless is refused.

To add a rule: a field in `policy.py` (with its value in each preset), a check here, a row in `tests/test_rules.py`.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn
from urllib.parse import parse_qsl

import msgspec

import engine_bodies as bodies
import operations
import strict_json
from errors import RunnerError
from operations import Operation
from policy import Container, Policy, matches

# Of tmpfs(5) and mount(8): size and ownership, and what only takes rights away. `bind` is one of mount's options, too.
_TMPFS_OPTION = re.compile(
    r"(size|mode|uid|gid|nr_inodes|nr_blocks)=[0-9a-zA-Z%]+|ro|rw|exec|noexec|suid|nosuid|dev|nodev|noatime|"
)
_BIND_OPTIONS = frozenset(("", "ro", "rw", "nocopy", "private", "rprivate", "consistent", "cached", "delegated"))
_NO_NEW_PRIVILEGES = ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true")
_HEXADECIMAL = re.compile(r"(sha256:)?[0-9a-f]+")


class Asked(msgspec.Struct, frozen=True):
    """A request as rules see it: what its path names, its query, and (of those that need it) its body."""

    name: str
    query: Mapping[str, str]
    body: bytes


Rule = Callable[[Policy, Asked], None]


def deny(rule: str, value: object, allow: str) -> NoReturn:
    """Refuse.

    Args:
        rule: what the caller asked for, in the engine's words: `HostConfig.Privileged`.
        value: its value.
        allow: the line of policy that would allow it.
    """
    shown = repr(value)[:200]
    raise RunnerError(
        "policy_denied",
        f"the policy denies {rule}: {shown} (`{allow}` would allow it)",
        details={"rule": rule, "value": shown, "allow": allow},
    )


def container_create(policy: Policy, asked: Asked) -> None:
    """`ContainerCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerCreate)
    misplaced = [name for name in unknown if strict_json.folded(name) in _HOST_CONFIG]
    if misplaced:
        raise RunnerError("ambiguous_body", f"{misplaced[0]} belongs into HostConfig: the engine may take it there")
    _check_unknown(policy, unknown)
    if body.image is not None:
        _image(policy, "Image", body.image)
    host = body.host_config or bodies.HostConfig()
    rules = policy.container
    _host_config(rules, host)
    _mounts(policy, host)
    _resources(rules, host, "HostConfig.")
    _required(rules, host)
    for name, endpoint in ((body.networking_config or bodies.NetworkingConfig()).endpoints_config or {}).items():
        _network_mode(rules, "NetworkingConfig.EndpointsConfig", name)
        if endpoint is not None and endpoint.driver_opts and not policy.network.options_allowed(endpoint.driver_opts):
            deny(
                "EndpointsConfig.DriverOpts", endpoint.driver_opts, _line("network", "options", [*endpoint.driver_opts])
            )


_HOST_CONFIG = strict_json.field_names(bodies.HostConfig)


def container_update(policy: Policy, asked: Asked) -> None:
    """`ContainerUpdate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerUpdate)
    _check_unknown(policy, unknown)
    _resources(policy.container, body, "")


def container_start(policy: Policy, asked: Asked) -> None:
    """`ContainerStart`. Old versions of the API take a HostConfig here; checkpoints are folders of the host."""
    if asked.body.strip() and not policy.container.start_body:
        deny("ContainerStart with a body", f"{len(asked.body)} bytes", "[container] start_body = true")
    for name in ("checkpoint", "checkpoint-dir"):
        if asked.query.get(name) and not policy.container.start_body:
            deny(f"ContainerStart {name}", asked.query[name], "[container] start_body = true")


def container_exec(policy: Policy, asked: Asked) -> None:
    """`ContainerExec`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerExec)
    _check_unknown(policy, unknown)
    if body.privileged and not policy.exec.privileged:
        deny("exec Privileged", True, "[exec] privileged = true")
    if not matches(body.user or "", policy.exec.users):
        deny("exec User", body.user or "", _line("exec", "users", [body.user or ""]))


def volume_create(policy: Policy, asked: Asked) -> None:
    """`VolumeCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.VolumeCreate)
    _check_unknown(policy, unknown)
    _volume_driver(policy, "volume", body.driver, body.driver_opts)


def network_create(policy: Policy, asked: Asked) -> None:
    """`NetworkCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkCreate)
    _check_unknown(policy, unknown)
    driver = body.driver or "bridge"
    if not matches(driver, policy.network.drivers):
        deny("network Driver", driver, _line("network", "drivers", [driver]))
    ipam = body.ipam or bodies.Ipam()
    if (ipam.driver or "default") != "default" and not policy.network.any_option:
        deny("network IPAM.Driver", ipam.driver, '[network] options = ["*"]')
    options = {**(body.options or {}), **(ipam.options or {})}
    if not policy.network.options_allowed(options):
        refused = [name for name in options if not matches(name, policy.network.options)]
        deny("network Options", refused[0], _line("network", "options", refused))
    for rule, value in (
        ("Scope", (body.scope or "local") != "local" and body.scope),
        ("Ingress", body.ingress),
        ("ConfigOnly", body.config_only),
        ("ConfigFrom", body.config_from),
    ):
        if value and not policy.network.any_option:
            deny(f"network {rule}", value, '[network] options = ["*"]')


def network_connect(policy: Policy, asked: Asked) -> None:
    """`NetworkConnect`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkConnect)
    _check_unknown(policy, unknown)
    options = (body.endpoint_config or bodies.Endpoint()).driver_opts
    if options and not policy.network.options_allowed(options):
        deny("EndpointConfig.DriverOpts", options, _line("network", "options", [*options]))


def image_create(policy: Policy, asked: Asked) -> None:
    """`ImageCreate`: a pull, or an import."""
    source = asked.query.get("fromSrc", "")
    if source not in ("", "-") and not policy.images.fetch_urls:
        deny("ImageCreate fromSrc", source, "[images] fetch_urls = true")
    if asked.query.get("fromImage"):
        _image(policy, "fromImage", _reference(asked.query["fromImage"], asked.query.get("tag", "")))
    elif source:
        _target(policy, "repo", asked.query.get("repo", ""), asked.query.get("tag", ""))


def image_build(policy: Policy, asked: Asked) -> None:
    """`ImageBuild`. What a Dockerfile is built from is not seen here, so restricted images take builds away."""
    if not policy.images.everything and not policy.images.build:
        deny("ImageBuild", "FROM any image", "[images] build = true")
    if asked.query.get("remote") and not policy.images.fetch_urls:
        deny("ImageBuild remote", asked.query["remote"], "[images] fetch_urls = true")
    mode = asked.query.get("networkmode", "")
    if mode:
        _network_mode(policy.container, "ImageBuild networkmode", mode)
    for name in ("extrahosts", "securityopt", "cgroupparent", "ulimits"):
        if asked.query.get(name) not in (None, "", "null", "[]") and not policy.images.build_options:
            deny(f"ImageBuild {name}", asked.query[name], "[images] build_options = true")
    _maximum(policy.container, "ImageBuild memory", _number(asked.query.get("memory", "")), "max_memory")
    for tag in asked.query.get("t", "\n").split("\n"):
        if tag:
            _image(policy, "ImageBuild t", tag)


def image_target(policy: Policy, asked: Asked) -> None:
    """`ImageTag`, `ImageCommit`: the name that is given."""
    _target(policy, "repo", asked.query.get("repo", ""), asked.query.get("tag", ""))


def image_named(policy: Policy, asked: Asked) -> None:
    """`ImagePush`, `DistributionInspect`: the engine asks the registry that the name begins with."""
    _image(policy, "the image", _reference(asked.name, asked.query.get("tag", "")))


def image_load(policy: Policy, asked: Asked) -> None:
    """`ImageLoad`: the names stand within the archive."""
    if not policy.images.everything and not policy.images.load:
        deny("ImageLoad", "any image", "[images] load = true")


_SINGLE = frozenset(
    ("fromSrc", "fromImage", "tag", "repo", "remote", "networkmode", "memory", "cgroupparent", "filters", "name")
)
"""Parameters of which the engine takes the first; others may stand several times."""


def parameters(target: bytes) -> dict[str, str]:
    """The query as the engine reads it. A parameter that stands twice is given as its lines.

    Raises:
        RunnerError: `ambiguous_query`: the engine could read it otherwise.
    """
    query = target.partition(b"?")[2]
    if not query:
        return {}
    text = query.decode("latin-1")
    if ";" in text or re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise RunnerError("ambiguous_query", "the query holds a bare ; or a % that is no escape")
    found: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True, encoding="utf-8", errors="surrogateescape"):
        if name in found and name in _SINGLE:
            raise RunnerError("ambiguous_query", f"{name} stands more than once in the query")
        found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def network_disconnect(policy: Policy, asked: Asked) -> None:
    """`NetworkDisconnect`: nothing is refused but a body of two readings, for the sake of scopes."""
    strict_json.read(asked.body or b"{}", bodies.NetworkDisconnect)


RULES: Mapping[str, Rule] = {
    "ContainerCreate": container_create,
    "ContainerUpdate": container_update,
    "ContainerStart": container_start,
    "ContainerExec": container_exec,
    "VolumeCreate": volume_create,
    "NetworkCreate": network_create,
    "NetworkConnect": network_connect,
    "NetworkDisconnect": network_disconnect,
    "ImageCreate": image_create,
    "ImageBuild": image_build,
    "ImageTag": image_target,
    "ImageCommit": image_target,
    "ImagePush": image_named,
    "DistributionInspect": image_named,
    "ImageLoad": image_load,
}
READ_WHOLE = frozenset(
    (
        *("ContainerCreate", "ContainerUpdate", "ContainerStart", "ContainerExec"),
        *("VolumeCreate", "NetworkCreate", "NetworkConnect", "NetworkDisconnect"),
    )
)
"""Operations whose body is looked into."""
_FORM = b"application/x-www-form-urlencoded"


def needs_body(policy: Policy, operation: Operation) -> bool:
    """Whether the body must be read whole, for `check` to look into or for a scope to write in."""
    return not policy.unrestricted and operation.id in READ_WHOLE


def check(
    policy: Policy,
    operation: Operation,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes = b"",
    *,
    has_body: bool = False,
) -> None:
    """Refuse what the policy does not allow.

    Args:
        policy: the caller's.
        operation: the one that the target chose.
        target: as the engine will get it.
        headers: names in lower case.
        body: whole, if `needs_body`.
        has_body: there is one, whether or not it is given here.

    Raises:
        RunnerError: `policy_denied`, `ambiguous_body`, `ambiguous_query`, and those of a body that cannot be read.
    """
    policy.permit(operation)
    if policy.unrestricted:
        return
    policy.permit_version(operations.api_version(target))
    if has_body and operation.method == "POST":
        for field, value in headers:
            if field == b"content-type" and value.strip().lower().startswith(_FORM):
                raise RunnerError("ambiguous_query", "the engine would take a form's fields for the query's")
    rule = RULES.get(operation.id)
    if rule is not None:
        name = operations.parameter(operation, target) if "{" in operation.template else ""
        rule(policy, Asked(name, parameters(target), body))


# The parts of a create.


def _check_unknown(policy: Policy, unknown: Iterable[str]) -> None:
    for name in unknown:
        if policy.strict:
            deny("a field that the policy does not know", name, "strict = false")


def _host_config(rules: Container, host: bodies.HostConfig) -> None:
    if host.privileged and not rules.privileged:
        deny("HostConfig.Privileged", True, "[container] privileged = true")
    _network_mode(rules, "HostConfig.NetworkMode", host.network_mode or "")
    for kind, value, harmless in (
        ("pid", host.pid_mode, ("", "private")),
        ("ipc", host.ipc_mode, ("", "none", "private", "shareable")),
        ("uts", host.uts_mode, ("",)),
        ("user", host.userns_mode, ("",)),
        ("cgroup", host.cgroupns_mode, ("", "private")),
        ("cgroup", host.cgroup, ("",)),
    ):
        if (value or "") not in harmless:
            _namespace(rules, kind, value or "")
    for name in (
        [host.cap_add] if isinstance(host.cap_add, str) else [*(host.cap_add or []), *(host.capabilities or [])]
    ):
        plain = name.upper().removeprefix("CAP_")
        if not matches(plain, rules.capabilities):
            deny("HostConfig.CapAdd", name, _line("container", "capabilities", [plain]))
    for option in host.security_opt or []:
        if option not in _NO_NEW_PRIVILEGES and not matches(option, rules.security_opt):
            deny("HostConfig.SecurityOpt", option, _line("container", "security_opt", [option]))
    for name in host.sysctls or {}:
        if not matches(name, rules.sysctls):
            deny("HostConfig.Sysctls", name, _line("container", "sysctls", [name]))
    for name in host.annotations or {}:
        if not matches(name, rules.annotations):
            deny("HostConfig.Annotations", name, _line("container", "annotations", [name]))
    if host.runtime and not matches(host.runtime, rules.runtimes):
        deny("HostConfig.Runtime", host.runtime, _line("container", "runtimes", [host.runtime]))
    if host.oom_score_adj and not rules.oom_score_adj:
        deny("HostConfig.OomScoreAdj", host.oom_score_adj, "[container] oom_score_adj = true")
    for rule, paths in (("MaskedPaths", host.masked_paths), ("ReadonlyPaths", host.readonly_paths)):
        if paths is not None and not rules.masked_paths:
            deny(f"HostConfig.{rule}", paths, "[container] masked_paths = true")
    log = host.log_config or bodies.LogConfig()
    if log.type and not matches(log.type, rules.log_drivers):
        deny("HostConfig.LogConfig.Type", log.type, _line("container", "log_drivers", [log.type]))
    _ports(rules, host)


def _namespace(rules: Container, kind: str, value: str) -> None:
    asked = f"{kind}:{value.partition(':')[0]}"
    if not matches(asked, rules.namespaces):
        deny(f"the {kind} namespace", value, _line("container", "namespaces", [asked]))


def _network_mode(rules: Container, rule: str, mode: str) -> None:
    """The network of a container: a name, but not the host's, another container's, or a path's."""
    if mode == "host" or ":" in mode:
        _namespace(rules, "network", mode)


def _ports(rules: Container, host: bodies.HostConfig) -> None:
    if host.publish_all_ports and not rules.port_allowed(0):
        deny("HostConfig.PublishAllPorts", True, '[container] ports = ["0"]')
    for inner, bindings in (host.port_bindings or {}).items():
        for binding in bindings or []:
            text = binding.host_port or "0"
            first, dash, last = text.partition("-")
            if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", text):
                raise RunnerError("validation_error", f"HostConfig.PortBindings: {text!r} is no port")
            if not all(rules.port_allowed(port) for port in range(int(first), int(last if dash else first) + 1)):
                deny(f"HostConfig.PortBindings {inner}", text, _line("container", "ports", [text]))


def _mounts(policy: Policy, host: bodies.HostConfig) -> None:
    """Every way in which a folder of the host gets into a container."""
    rules = policy.container
    for bind in host.binds or []:
        source, colon, rest = bind.partition(":")
        if not colon or not source.startswith(("/", ".", "~", "\\")):
            continue  # A place for an anonymous volume, or a volume's name.
        options = rest.partition(":")[2].split(",")
        _bind(rules, "HostConfig.Binds", source, options)
    for mount in host.mounts or []:
        match (mount.type or "").lower():
            case "bind":
                options = [
                    "ro" if mount.read_only else "rw",
                    (mount.bind_options or bodies.BindOptions()).propagation or "",
                ]
                _bind(rules, "HostConfig.Mounts", mount.source or "", options)
            case "volume":
                driver = (mount.volume_options or bodies.VolumeOptions()).driver_config or bodies.Driver()
                _volume_driver(policy, "HostConfig.Mounts", driver.name, driver.options)
            case "tmpfs":
                for option in (mount.tmpfs_options or bodies.TmpfsOptions()).options or []:
                    _tmpfs("HostConfig.Mounts", "=".join(option), rules)
            case kind:
                if not matches(kind, rules.mount_types):
                    deny("HostConfig.Mounts.Type", mount.type, _line("container", "mount_types", [kind]))
    for options_text in (host.tmpfs or {}).values():
        for option_text in options_text.split(","):
            _tmpfs("HostConfig.Tmpfs", option_text, rules)
    if host.volume_driver:
        _volume_driver(policy, "HostConfig.VolumeDriver", host.volume_driver, None)
    if host.volumes_from and not rules.volumes_from:
        deny("HostConfig.VolumesFrom", host.volumes_from, "[container] volumes_from = true")


def _bind(rules: Container, rule: str, source: str, options: Iterable[str]) -> None:
    given = [option for option in options if option]
    allowed = rules.bind_allowed(source, read_only="ro" in given and "rw" not in given)
    if not allowed:
        clean = posixpath.normpath("/" + source.lstrip("/"))
        deny(rule, source, f'[[container.binds]] path = "{clean}"')
    for option in given:
        if option not in _BIND_OPTIONS and not rules.any_bind:
            deny(f"{rule} option", option, '[[container.binds]] path = "/", below = true')


def _tmpfs(rule: str, option: str, rules: Container) -> None:
    if not _TMPFS_OPTION.fullmatch(option) and not rules.any_bind:
        deny(f"{rule} option", option, '[[container.binds]] path = "/", below = true')


def _volume_driver(policy: Policy, rule: str, driver: str | None, options: Mapping[str, str] | None) -> None:
    name = driver or "local"
    if not matches(name, policy.volume.drivers):
        deny(f"{rule} Driver", name, _line("volume", "drivers", [name]))
    if not options or policy.volume.driver_options:
        return
    # The local driver hands these to mount(2): with `bind` among the options, whatever the type is, it is a bind mount.
    given = {key.lower(): value for key, value in options.items()}
    harmless = (
        len(given) == len(options)
        and given.get("type") == "tmpfs"
        and given.get("device", "tmpfs") in ("tmpfs", "none", "")
        and all(_TMPFS_OPTION.fullmatch(option) for option in given.get("o", "").split(","))
        and given.keys() <= {"type", "device", "o"}
    )
    if name != "local" or not harmless:
        deny(f"{rule} DriverOpts", dict(options), "[volume] driver_options = true")


# Resources.


def _resources(rules: Container, asked: bodies.Resources, place: str) -> None:
    for device in asked.devices or []:
        if not matches(device.path_on_host or "", rules.devices):
            deny(f"{place}Devices", device.path_on_host, _line("container", "devices", [device.path_on_host or ""]))
    if asked.device_requests and not rules.device_requests:
        deny(f"{place}DeviceRequests", asked.device_requests, "[container] device_requests = true")
    if asked.device_cgroup_rules and not rules.device_cgroup_rules:
        deny(f"{place}DeviceCgroupRules", asked.device_cgroup_rules, "[container] device_cgroup_rules = true")
    if asked.cgroup_parent and not rules.cgroup_parent:
        deny(f"{place}CgroupParent", asked.cgroup_parent, "[container] cgroup_parent = true")
    for limit in asked.ulimits or []:
        if not matches(limit.name or "", rules.ulimits):
            deny(f"{place}Ulimits", limit.name, _line("container", "ulimits", [limit.name or ""]))
    _maximum(rules, f"{place}Memory", asked.memory, "max_memory")
    _maximum(rules, f"{place}NanoCpus", asked.nano_cpus and asked.nano_cpus / 1e9, "max_cpus")
    if asked.cpu_quota:
        _maximum(rules, f"{place}CpuQuota", asked.cpu_quota / (asked.cpu_period or 100_000), "max_cpus")
    _maximum(rules, f"{place}PidsLimit", asked.pids_limit, "max_pids")


def _maximum(rules: Container, rule: str, value: float | None, limit: str) -> None:
    """0 and absent say nothing; below that there is no limit at all."""
    most: float = getattr(rules, limit)
    if most and value and (value < 0 or value > most):
        deny(rule, value, f"[container] {limit} = {value:g}" if value > 0 else f"[container] {limit} = 0")


def _required(rules: Container, host: bodies.HostConfig) -> None:
    """Where a maximum is set, a create must state a limit: without one it has none."""
    for limit, rule, stated in (
        ("max_memory", "HostConfig.Memory", host.memory),
        ("max_cpus", "HostConfig.NanoCpus", host.nano_cpus or host.cpu_quota),
        ("max_pids", "HostConfig.PidsLimit", host.pids_limit),
    ):
        if getattr(rules, limit) and not stated:
            deny(f"a container without {rule}", 0, f"[container] {limit} = 0")


# Images.


def _image(policy: Policy, rule: str, reference: str) -> None:
    images = policy.images
    if images.everything:
        return
    # What could be an id's beginning names any image that the engine has.
    if _HEXADECIMAL.fullmatch(reference) or not images.allows(reference):
        deny(rule, reference, _line("images", "allow", [reference]))


def _target(policy: Policy, rule: str, repository: str, tag: str) -> None:
    if repository:
        _image(policy, rule, _reference(repository, tag))


def _reference(name: str, tag: str) -> str:
    if not tag:
        return name
    return f"{name}@{tag}" if ":" in tag else f"{name}:{tag}"


def _number(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}|", text):
        raise RunnerError("validation_error", f"memory: {text!r} is no number of bytes")
    return int(text or "0")


def _line(section: str, name: str, values: list[str]) -> str:
    return f"[{section}] {name} = {str(values).replace(chr(39), chr(34))}"
