"""What a create, an update, an exec, a build or a pull may ask for: one function for each operation that has rules.

Each takes the policy and the request as the engine will read it, and raises the first refusal. A refusal names the
rule, the value, and the line of policy that would allow it. What is not written down in a rule as harmless is refused.

To add a rule: a field in `policy.py` (with its value in each preset), a check here, a row in `tests/test_rules.py`.
"""

import math
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
from policy import Policy, matches, refusal, toml

# Of tmpfs(5) and mount(8): size and ownership, and what only takes rights away. `bind` is one of mount's options, too.
_TMPFS_OPTION = re.compile(
    r"(size|mode|uid|gid|nr_inodes|nr_blocks)=[0-9a-zA-Z%]+|ro|rw|exec|noexec|suid|nosuid|dev|nodev|noatime|"
)
_BIND_OPTIONS = frozenset(("", "ro", "rw", "nocopy", "private", "rprivate", "consistent", "cached", "delegated"))
_NO_NEW_PRIVILEGES = ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true")
_HEXADECIMAL = re.compile(r"(sha256:)?[0-9a-f]+")
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_WHOLE_HOST = '[container] binds = [{path = "/", below = true}]'


_FLAGS = r"-?[AacdefFHjlLTuvwx]+"
_PS_ARGS = re.compile(rf"({_FLAGS}( {_FLAGS})*)?|(-?[aAdewx]+ )?-?[aAdewx]*o ?pid(,(?!pid\b)[a-z]+)*")
"""Options of ps(1) with which nothing that holds a blank stands before the process id, whose column has one name."""


class Asked(msgspec.Struct, frozen=True):
    """A request as rules see it: what its path names, its query, and (of those that need it) its body."""

    name: str
    query: Mapping[str, str]
    body: bytes


Rule = Callable[[Policy, Asked], None]


def container_create(policy: Policy, asked: Asked) -> None:
    """`ContainerCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerCreate)
    misplaced = [name for name in unknown if strict_json.folded(name) in _HOST_CONFIG]
    if misplaced:
        raise RunnerError("ambiguous_body", f"{misplaced[0]} belongs into HostConfig: the engine may take it there")
    if body.volumes_from:
        raise RunnerError("ambiguous_body", "VolumesFrom belongs into HostConfig: the engine may take it there")
    _check_unknown(policy, unknown)
    # Without an image a container begins empty, to be filled with whatever its maker has.
    _image(policy, "Image", body.image or "")
    host = body.host_config or bodies.HostConfig()
    _host_config(policy, host)
    _mounts(policy, host)
    _resources(policy, host, "HostConfig.")
    _required(policy, host)
    for name, endpoint in ((body.networking_config or bodies.NetworkingConfig()).endpoints_config or {}).items():
        _network_mode(policy, "NetworkingConfig.EndpointsConfig", name)
        _network_options(policy, "EndpointsConfig.DriverOpts", (endpoint or bodies.Endpoint()).driver_opts)


_HOST_CONFIG = strict_json.field_names(bodies.HostConfig)


def container_update(policy: Policy, asked: Asked) -> None:
    """`ContainerUpdate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerUpdate)
    _check_unknown(policy, unknown)
    _resources(policy, body, "")
    rules = policy.container
    # Half of what a limit is made of says nothing without the other half, which the engine has.
    if rules.max_cpus and (body.cpu_quota is None) != (body.cpu_period is None):
        policy.deny("CpuQuota and CpuPeriod", "one without the other", "[container] max_cpus = 0")
    if rules.max_pids and body.pids_limit == 0:
        policy.deny("PidsLimit", 0, "[container] max_pids = 0")


def container_start(policy: Policy, asked: Asked) -> None:
    """`ContainerStart`. Old versions of the API take a HostConfig here; checkpoints are folders of the host."""
    if policy.container.start_body:
        return
    # Nothing that means something to the engine is as short; dockerode sends such.
    if len(asked.body) > 7:
        policy.deny("ContainerStart with a body", f"{len(asked.body)} bytes", "[container] start_body = true")
    for name in ("checkpoint", "checkpoint-dir"):
        if asked.query.get(name):
            policy.deny(f"ContainerStart {name}", asked.query[name], "[container] start_body = true")


def container_exec(policy: Policy, asked: Asked) -> None:
    """`ContainerExec`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerExec)
    _check_unknown(policy, unknown)
    if body.privileged and not policy.exec.privileged:
        policy.deny("exec Privileged", True, "[exec] privileged = true")
    if not matches(body.user or "", policy.exec.users):
        policy.deny("exec User", body.user or "", policy.line("exec", "users", [body.user or ""]))


def volume_create(policy: Policy, asked: Asked) -> None:
    """`VolumeCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.VolumeCreate)
    _check_unknown(policy, unknown)
    _volume_driver(policy, "volume", body.driver, body.driver_opts)
    if body.cluster_volume_spec and not matches("cluster", policy.volume.drivers):
        policy.deny("ClusterVolumeSpec", "a cluster's volume", policy.line("volume", "drivers", ["cluster"]))


def network_create(policy: Policy, asked: Asked) -> None:
    """`NetworkCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkCreate)
    _check_unknown(policy, unknown)
    network = policy.network
    driver = body.driver or "bridge"
    if not matches(driver, network.drivers):
        policy.deny("network Driver", driver, policy.line("network", "drivers", [driver]))
    ipam = body.ipam or bodies.Ipam()
    _network_options(policy, "network Options", {**(body.options or {}), **(ipam.options or {})})
    for rule, value in (
        ("IPAM.Driver", (ipam.driver or "default") != "default" and ipam.driver),
        ("Scope", (body.scope or "local") != "local" and body.scope),
        ("Ingress", body.ingress),
        ("ConfigOnly", body.config_only),
        ("ConfigFrom", body.config_from),
    ):
        if value and not network.any_option:
            policy.deny(f"network {rule}", value, '[network] options = ["*"]')
    for config in ipam.config or []:
        for addresses in (config.subnet, config.ip_range, config.gateway):
            _subnet(policy, addresses or "")


def network_connect(policy: Policy, asked: Asked) -> None:
    """`NetworkConnect`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkConnect)
    _check_unknown(policy, unknown)
    _network_mode(policy, "NetworkConnect", asked.name)
    _network_options(policy, "EndpointConfig.DriverOpts", (body.endpoint_config or bodies.Endpoint()).driver_opts)


def network_disconnect(policy: Policy, asked: Asked) -> None:
    """`NetworkDisconnect`: nothing is refused but a body of two readings, for the sake of scopes."""
    strict_json.read(asked.body or b"{}", bodies.NetworkDisconnect)


def image_create(policy: Policy, asked: Asked) -> None:
    """`ImageCreate`: a pull, or an import."""
    source = asked.query.get("fromSrc", "")
    if source not in ("", "-") and not policy.images.fetch_urls:
        policy.deny("ImageCreate fromSrc", source, "[images] fetch_urls = true")
    if asked.query.get("fromImage"):
        _every_tag(policy, "fromImage", asked.query["fromImage"], asked.query.get("tag", ""))
    elif source:
        _target(policy, asked)


def image_build(policy: Policy, asked: Asked) -> None:
    """`ImageBuild`. What a Dockerfile is built from is not seen here, so restricted images take builds away."""
    images, rules = policy.images, policy.container
    if not images.build:
        if not images.everything:
            policy.deny("ImageBuild", "FROM any image", "[images] build = true")
        if rules.max_memory or rules.max_cpus or rules.max_pids:
            policy.deny("ImageBuild", "a build without limits", "[images] build = true")
    # What comes over a session comes from the caller.
    remote = asked.query.get("remote", "")
    if remote not in ("", "client-session", "upload-request") and not images.fetch_urls:
        policy.deny("ImageBuild remote", remote, "[images] fetch_urls = true")
    _network_mode(policy, "ImageBuild networkmode", asked.query.get("networkmode", ""))
    for name in ("extrahosts", "securityopt", "cgroupparent", "ulimits", "outputs"):
        if asked.query.get(name) not in (None, "", "null", "[]") and not images.build_options:
            policy.deny(f"ImageBuild {name}", asked.query[name], "[images] build_options = true")
    for tag in asked.query.get("t", "").split("\n"):
        if tag:
            _image(policy, "ImageBuild t", tag)


def image_tag(policy: Policy, asked: Asked) -> None:
    """`ImageTag`: the name that is given, and the image that gets it: what may not be run gets no name that may."""
    _image(policy, "the image", asked.name)
    _target(policy, asked)


def image_commit(policy: Policy, asked: Asked) -> None:
    """`ImageCommit`: the name that is given."""
    _target(policy, asked)


def image_push(policy: Policy, asked: Asked) -> None:
    """`ImagePush`."""
    _every_tag(policy, "the image", asked.name, asked.query.get("tag", ""))


def image_named(policy: Policy, asked: Asked) -> None:
    """`ImageGet`, and `DistributionInspect`, for which the engine asks the registry that the name begins with."""
    _image(policy, "the image", asked.name)


def image_get_all(policy: Policy, asked: Asked) -> None:
    """`ImageGetAll`."""
    for name in asked.query.get("names", "").split("\n"):
        _image(policy, "names", name)


def image_load(policy: Policy, asked: Asked) -> None:
    """`ImageLoad`: the names stand within the archive."""
    if not policy.images.everything and not policy.images.load:
        policy.deny("ImageLoad", "any image", "[images] load = true")


_SINGLE = frozenset(
    ("fromSrc", "fromImage", "tag", "repo", "remote", "networkmode", "cgroupparent", "filters", "name", "container")
)
"""Parameters of which the engine takes the first; others may stand several times."""


def container_top(policy: Policy, asked: Asked) -> None:
    """`ContainerTop`: the options of ps(1).

    The engine runs ps on all of the host, and keeps the lines whose so-many-th word is a process of the container: so
    many as the head has before `PID`. Where a value has more words, any word of any process is compared, or told as
    being no number.
    """
    if not all(_PS_ARGS.fullmatch(options) for options in asked.query.get("ps_args", "").split("\n")):
        reason = "ContainerTop takes plain flags, or a list of columns that begins with pid (`-o pid,args`)"
        raise RunnerError("policy_denied", f"the policy denies these options: {reason}")


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
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise RunnerError("ambiguous_query", "the query is not UTF-8") from error
    for name, value in pairs:
        if name in found and name in _SINGLE:
            raise RunnerError("ambiguous_query", f"{name} stands more than once in the query")
        found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


RULES: Mapping[str, Rule] = {
    "ContainerCreate": container_create,
    "ContainerUpdate": container_update,
    "ContainerStart": container_start,
    "ContainerExec": container_exec,
    "ContainerTop": container_top,
    "VolumeCreate": volume_create,
    "NetworkCreate": network_create,
    "NetworkConnect": network_connect,
    "NetworkDisconnect": network_disconnect,
    "ImageCreate": image_create,
    "ImageBuild": image_build,
    "ImageTag": image_tag,
    "ImageCommit": image_commit,
    "ImagePush": image_push,
    "ImageGet": image_named,
    "ImageGetAll": image_get_all,
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
_TYPE = re.compile(rb"[ \t\x21-\x7e]*")


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
    if has_body:
        for field, value in headers:
            # The engine lowers and trims as Unicode does: U+0130 becomes an i, a no-break space nothing.
            if field == b"content-type" and (b"form" in value.lower() or not _TYPE.fullmatch(value)):
                raise RunnerError("ambiguous_query", "the engine would take a form's fields for the query's")
    rule = RULES.get(operation.id)
    if rule is not None:
        name = operations.parameter(operation, target) if "{" in operation.template else ""
        rule(policy, Asked(name, parameters(target), body))


def deny(rule: str, value: object, allow: str) -> NoReturn:
    """Refuse where no policy is at hand; see `Policy.deny`."""
    raise refusal("the policy", rule, value, allow)


# The parts of a create.


def _check_unknown(policy: Policy, unknown: Iterable[str]) -> None:
    for name in unknown:
        if policy.strict:
            policy.deny("a field that the policy does not know", name, "strict = false")


def _each(policy: Policy, rule: str, asked: Iterable[str], name: str) -> None:
    """Hold values against a list of `[container]`; a refusal names them all in its line."""
    standing = getattr(policy.container, name)
    refused = [value for value in asked if not matches(value, standing)]
    if refused:
        policy.deny(rule, refused[0], policy.line("container", name, refused[:20]))


def _host_config(policy: Policy, host: bodies.HostConfig) -> None:
    rules = policy.container
    if host.privileged and not rules.privileged:
        policy.deny("HostConfig.Privileged", True, "[container] privileged = true")
    _network_mode(policy, "HostConfig.NetworkMode", host.network_mode or "")
    for kind, value, harmless in (
        ("pid", host.pid_mode, ("", "private")),
        ("ipc", host.ipc_mode, ("", "none", "private", "shareable")),
        ("uts", host.uts_mode, ("",)),
        ("user", host.userns_mode, ("",)),
        ("cgroup", host.cgroupns_mode, ("", "private")),
        ("cgroup", host.cgroup, ("",)),
    ):
        if (value or "") not in harmless:
            _namespace(policy, f"the {kind} namespace", kind, value or "")
    added = [host.cap_add] if isinstance(host.cap_add, str) else host.cap_add or []
    plain = [name.upper().removeprefix("CAP_") for name in [*added, *(host.capabilities or [])]]
    _each(policy, "HostConfig.CapAdd", plain, "capabilities")
    options = [option for option in host.security_opt or [] if option not in _NO_NEW_PRIVILEGES]
    _each(policy, "HostConfig.SecurityOpt", options, "security_opt")
    _each(policy, "HostConfig.Sysctls", host.sysctls or {}, "sysctls")
    _each(policy, "HostConfig.Annotations", host.annotations or {}, "annotations")
    _each(policy, "HostConfig.Runtime", [host.runtime] if host.runtime else [], "runtimes")
    for rule, asked in (("OomScoreAdj", host.oom_score_adj), ("OomKillDisable", host.oom_kill_disable)):
        if asked and not rules.oom_score_adj:
            policy.deny(f"HostConfig.{rule}", asked, "[container] oom_score_adj = true")
    for rule, paths in (("MaskedPaths", host.masked_paths), ("ReadonlyPaths", host.readonly_paths)):
        if paths is not None and not rules.masked_paths:
            policy.deny(f"HostConfig.{rule}", paths, "[container] masked_paths = true")
    log = host.log_config or bodies.LogConfig()
    _each(policy, "HostConfig.LogConfig.Type", [log.type] if log.type else [], "log_drivers")
    _each(policy, "HostConfig.LogConfig.Config", log.config or {}, "log_options")
    _ports(policy, host)


def _namespace(policy: Policy, rule: str, kind: str, value: str) -> None:
    asked = f"{kind}:{value.partition(':')[0]}"
    if not matches(asked, policy.container.namespaces):
        policy.deny(rule, value, policy.line("container", "namespaces", [asked]))


def _network_mode(policy: Policy, rule: str, mode: str) -> None:
    """The network of a container: a name, but not the host's, another container's, or a path's."""
    if mode == "host" or ":" in mode:
        _namespace(policy, rule, "network", mode)


def _network_options(policy: Policy, rule: str, options: Mapping[str, str] | None) -> None:
    refused = [name for name in options or {} if not matches(name, policy.network.options)]
    if refused:
        policy.deny(rule, refused[0], policy.line("network", "options", refused[:20]))


def _subnet(policy: Policy, addresses: str) -> None:
    try:
        allowed = not addresses or policy.network.subnet_allowed(addresses)
    except ValueError as error:
        raise RunnerError("validation_error", f"IPAM.Config: {error}") from error
    if not allowed:
        policy.deny("network IPAM.Config", addresses, policy.line("network", "subnets", [addresses]))


def _ports(policy: Policy, host: bodies.HostConfig) -> None:
    rules = policy.container
    if host.publish_all_ports and not rules.ports_allowed(0, 0):
        policy.deny("HostConfig.PublishAllPorts", True, policy.line("container", "ports", ["0"]))
    for inner, bindings in (host.port_bindings or {}).items():
        # Before its version 29 the engine takes none for one of its own choice.
        for binding in bindings or [bodies.PortBinding()]:
            text = binding.host_port or "0"
            first, dash, last = text.partition("-")
            if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", text):
                raise RunnerError("validation_error", f"HostConfig.PortBindings: {text!r} is no port")
            low, high = int(first), int(last if dash else first)
            if not low <= high <= 65535:
                raise RunnerError("validation_error", f"HostConfig.PortBindings: {text!r} is no port and no range")
            if not rules.ports_allowed(low, high):
                policy.deny(f"HostConfig.PortBindings {inner}", text, policy.line("container", "ports", [text]))


def _mounts(policy: Policy, host: bodies.HostConfig) -> None:
    """Every way in which a folder of the host gets into a container."""
    for bind in host.binds or []:
        source, colon, rest = bind.partition(":")
        if colon and not _VOLUME_NAME.fullmatch(source):  # Else a volume's name, or a place for an anonymous volume.
            _bind(policy, "HostConfig.Binds", source, rest.partition(":")[2].split(","))
    for mount in host.mounts or []:
        _mount(policy, mount)
    for options in (host.tmpfs or {}).values():
        for option in options.split(","):
            _tmpfs(policy, "HostConfig.Tmpfs", option)
    if host.volume_driver:
        _volume_driver(policy, "HostConfig.VolumeDriver", host.volume_driver, None)
    if host.volumes_from and not policy.container.volumes_from:
        policy.deny("HostConfig.VolumesFrom", host.volumes_from, "[container] volumes_from = true")


def _mount(policy: Policy, mount: bodies.Mount) -> None:
    rule, source = "HostConfig.Mounts", mount.source or ""
    match mount.type or "":
        case "bind":
            bind = mount.bind_options or bodies.BindOptions()
            read_only = mount.read_only and not bind.read_only_non_recursive
            _bind(policy, rule, source, ["ro" if read_only else "rw", bind.propagation or ""])
        case "volume":
            if source and not _VOLUME_NAME.fullmatch(source):
                _bind(policy, rule, source, [])
            driver = (mount.volume_options or bodies.VolumeOptions()).driver_config or bodies.Driver()
            _volume_driver(policy, rule, driver.name, driver.options)
        case "tmpfs":
            for option in (mount.tmpfs_options or bodies.TmpfsOptions()).options or []:
                _tmpfs(policy, rule, "=".join(option))
        case kind:
            _each(policy, "HostConfig.Mounts.Type", [kind], "mount_types")
            if kind == "image":
                _image(policy, "HostConfig.Mounts.Source", source)


def _bind(policy: Policy, rule: str, source: str, options: Iterable[str]) -> None:
    rules = policy.container
    given = [option for option in options if option]
    if not rules.bind_allowed(source, read_only="ro" in given and "rw" not in given):
        if rules.bind_allowed(source, read_only=True):
            rule = f"{rule} that is not `ro`"
        plain = source.startswith("/") and posixpath.normpath("/" + source.strip("/")) == re.sub("/+", "/", source)
        policy.deny(rule, source, f"[[container.binds]] path = {toml(source)}" if plain else _WHOLE_HOST)
    for option in given:
        if option not in _BIND_OPTIONS and not rules.any_bind:
            policy.deny(f"{rule} option", option, _WHOLE_HOST)


def _tmpfs(policy: Policy, rule: str, option: str) -> None:
    if not _TMPFS_OPTION.fullmatch(option) and not policy.container.any_bind:
        policy.deny(f"{rule} option", option, _WHOLE_HOST)


def _volume_driver(policy: Policy, rule: str, driver: str | None, options: Mapping[str, str] | None) -> None:
    name = driver or "local"
    if not matches(name, policy.volume.drivers):
        policy.deny(f"{rule} Driver", name, policy.line("volume", "drivers", [name]))
    if not options or policy.volume.driver_options:
        return
    # The local driver hands these to mount(2): with `bind` among the options, whatever the type is, it is a bind mount.
    harmless = (
        options.get("type") == "tmpfs"
        and options.get("device", "tmpfs") in ("tmpfs", "none", "")
        and all(_TMPFS_OPTION.fullmatch(option) for option in options.get("o", "").split(","))
        and options.keys() <= {"type", "device", "o"}
    )
    if name != "local" or not harmless:
        policy.deny(f"{rule} DriverOpts", dict(options), "[volume] driver_options = true")


# Resources.


def _resources(policy: Policy, asked: bodies.Resources, place: str) -> None:
    rules = policy.container
    devices = [device.path_on_host or "" for device in asked.devices or []]
    _devices(policy, f"{place}Devices", devices)
    for throttled in (
        asked.blkio_weight_device,
        asked.blkio_device_read_bps,
        asked.blkio_device_write_bps,
        asked.blkio_device_read_i_ops,
        asked.blkio_device_write_i_ops,
    ):
        # The engine looks for the path on the host, and says whether it is there.
        _devices(policy, f"{place}Blkio... Path", [device.path or "" for device in throttled or []])
    for rule, value, allowed, name in (
        ("DeviceRequests", asked.device_requests, rules.device_requests, "device_requests"),
        ("DeviceCgroupRules", asked.device_cgroup_rules, rules.device_cgroup_rules, "device_cgroup_rules"),
        ("CgroupParent", asked.cgroup_parent, rules.cgroup_parent, "cgroup_parent"),
    ):
        if value and not allowed:
            policy.deny(f"{place}{rule}", value, f"[container] {name} = true")
    _each(policy, f"{place}Ulimits", [limit.name or "" for limit in asked.ulimits or []], "ulimits")
    _maximum(policy, f"{place}Memory", asked.memory, "max_memory")
    if rules.max_memory and asked.memory_swap:
        # It counts both; without it the engine takes twice the memory.
        _maximum(policy, f"{place}MemorySwap", asked.memory_swap, "max_memory", rules.max_memory * 2)
    _maximum(policy, f"{place}NanoCpus", asked.nano_cpus and asked.nano_cpus / 1e9, "max_cpus")
    if asked.cpu_quota:
        _maximum(policy, f"{place}CpuQuota", asked.cpu_quota / (asked.cpu_period or 100_000), "max_cpus")
    _maximum(policy, f"{place}PidsLimit", asked.pids_limit, "max_pids")


def _devices(policy: Policy, rule: str, paths: Sequence[str]) -> None:
    """A pattern's `*` must not reach out of its folder by `..`."""
    allowed = policy.container.devices
    crooked = [path for path in paths if path != posixpath.normpath(path) and path not in allowed]
    if crooked and "*" not in allowed:
        policy.deny(rule, crooked[0], policy.line("container", "devices", crooked[:20]))
    _each(policy, rule, paths, "devices")


def _maximum(policy: Policy, rule: str, value: float | None, limit: str, most: float | None = None) -> None:
    """0 and absent say nothing; below that there is no limit at all."""
    standing: float = getattr(policy.container, limit)
    most = standing if most is None else most
    if standing and value and (value < 0 or value > most):
        wanted = value if most == standing else value / (most / standing)
        policy.deny(rule, value, f"[container] {limit} = {_number(wanted) if value > 0 else 0}")


def _number(value: float) -> str:
    """As a policy file takes it: whole, but for a few CPUs."""
    return repr(value) if isinstance(value, float) and value < 1000 and value != int(value) else str(math.ceil(value))


def _required(policy: Policy, host: bodies.HostConfig) -> None:
    """Where a maximum is set, a create must state a limit: without one it has none."""
    for limit, rule, stated in (
        ("max_memory", "HostConfig.Memory", host.memory),
        ("max_cpus", "HostConfig.NanoCpus", host.nano_cpus or host.cpu_quota),
        ("max_pids", "HostConfig.PidsLimit", host.pids_limit),
    ):
        if getattr(policy.container, limit) and not stated:
            policy.deny(f"a container without {rule}", 0, f"[container] {limit} = 0")


# Images.


def _image(policy: Policy, rule: str, reference: str) -> None:
    images = policy.images
    if images.everything or images.allows(reference):
        return
    # What could be the beginning of an id names any image that the engine has; what is no name cannot be listed.
    listed = len(reference) < 300 and (
        len(reference.removeprefix("sha256:")) == 64 or not _HEXADECIMAL.fullmatch(reference)
    )
    policy.deny(rule, reference, policy.line("images", "allow", [reference if listed and reference else "*"]))


def _target(policy: Policy, asked: Asked) -> None:
    repository = asked.query.get("repo", "")
    if repository:
        _image(policy, "repo", _reference(repository, asked.query.get("tag", "")))


def _every_tag(policy: Policy, rule: str, name: str, tag: str) -> None:
    """Without a tag, a pull or a push is of every tag that there is."""
    versioned = tag or "@" in name or ":" in name.rpartition("/")[2]
    _image(policy, rule, _reference(name, tag) if versioned else f"{name}:*")


def _reference(name: str, tag: str) -> str:
    if not tag:
        return name
    return f"{name}@{tag}" if ":" in tag else f"{name}:{tag}"
