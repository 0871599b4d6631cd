"""What rules are made of: one check for each part of a request that could reach the host. Pure functions.

Each raises `policy_denied` for the first thing that the policy does not allow. What is not written down here as
harmless is refused.
"""

import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

import engine_bodies as bodies
from errors import RunnerError
from policy import Policy, matches, toml

# Of tmpfs(5) and mount(8): size and ownership, and what only takes rights away. `bind` is one of mount's options, too.
_TMPFS_OPTION = re.compile(
    r"(size|mode|uid|gid|nr_inodes|nr_blocks)=[0-9a-zA-Z%]+|ro|rw|exec|noexec|suid|nosuid|dev|nodev|noatime|"
)
_BIND_OPTIONS = frozenset(("", "ro", "rw", "nocopy", "private", "rprivate", "consistent", "cached", "delegated"))
_NO_NEW_PRIVILEGES = ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true")
_HEXADECIMAL = re.compile(r"(sha256:)?[0-9a-f]+")
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_WHOLE_HOST = '[container] binds = [{path = "/", below = true}]'


def unknown_fields(policy: Policy, unknown: Iterable[str]) -> None:
    """Fields that the policy does not know, where it is strict."""
    for name in unknown:
        if policy.strict:
            policy.deny("a field that the policy does not know", name, "strict = false")


def _each(policy: Policy, rule: str, asked: Iterable[str], name: str) -> None:
    """Hold values against a list of `[container]`; a refusal names them all in its line."""
    standing = getattr(policy.container, name)
    refused = [value for value in asked if not matches(value, standing)]
    if refused:
        policy.deny(rule, refused[0], policy.line("container", name, refused[:20]))


def host_config(policy: Policy, host: bodies.HostConfig) -> None:
    """What of a HostConfig is neither a mount nor a resource: privileges, namespaces, the kernel, ports, logs."""
    rules = policy.container
    if host.privileged and not rules.privileged:
        policy.deny("HostConfig.Privileged", True, "[container] privileged = true")
    network_mode(policy, "HostConfig.NetworkMode", host.network_mode or "")
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


def network_mode(policy: Policy, rule: str, mode: str) -> None:
    """The network of a container: a name, but not the host's, another container's, or a path's."""
    if mode == "host" or ":" in mode:
        _namespace(policy, rule, "network", mode)


def network_options(policy: Policy, rule: str, options: Mapping[str, str] | None) -> None:
    """Options of a network's driver, of its addresses, of an endpoint."""
    refused = [name for name in options or {} if not matches(name, policy.network.options)]
    if refused:
        policy.deny(rule, refused[0], policy.line("network", "options", refused[:20]))


def subnet(policy: Policy, addresses: str) -> None:
    """Addresses of a network: the host gets a route to them."""
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


def mounts(policy: Policy, host: bodies.HostConfig) -> None:
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
        volume_driver(policy, "HostConfig.VolumeDriver", host.volume_driver, None)
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
            volume_driver(policy, rule, driver.name, driver.options)
        case "tmpfs":
            for option in (mount.tmpfs_options or bodies.TmpfsOptions()).options or []:
                _tmpfs(policy, rule, "=".join(option))
        case kind:
            _each(policy, "HostConfig.Mounts.Type", [kind], "mount_types")
            if kind == "image":
                image(policy, "HostConfig.Mounts.Source", source)


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


def volume_driver(policy: Policy, rule: str, driver: str | None, options: Mapping[str, str] | None) -> None:
    """The driver of a volume, and its options."""
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


def resources(policy: Policy, asked: bodies.Resources, place: str) -> None:
    """Devices, groups and limits, of a create or an update; `place` stands before their names."""
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


def required(policy: Policy, host: bodies.HostConfig) -> None:
    """Where a maximum is set, a create must state a limit: without one it has none."""
    for limit, rule, stated in (
        ("max_memory", "HostConfig.Memory", host.memory),
        ("max_cpus", "HostConfig.NanoCpus", host.nano_cpus or host.cpu_quota),
        ("max_pids", "HostConfig.PidsLimit", host.pids_limit),
    ):
        if getattr(policy.container, limit) and not stated:
            policy.deny(f"a container without {rule}", 0, f"[container] {limit} = 0")


# Images.


def image(policy: Policy, rule: str, reference: str) -> None:
    """An image by its name, or a name that is given to one."""
    images = policy.images
    if images.everything or images.allows(reference):
        return
    # What could be the beginning of an id names any image that the engine has; what is no name cannot be listed.
    listed = len(reference) < 300 and (
        len(reference.removeprefix("sha256:")) == 64 or not _HEXADECIMAL.fullmatch(reference)
    )
    policy.deny(rule, reference, policy.line("images", "allow", [reference if listed and reference else "*"]))


def every_tag(policy: Policy, rule: str, name: str, tag: str) -> None:
    """Without a tag, a pull or a push is of every tag that there is."""
    versioned = tag or "@" in name or ":" in name.rpartition("/")[2]
    image(policy, rule, reference(name, tag) if versioned else f"{name}:*")


def reference(name: str, tag: str) -> str:
    """A name and a tag (or digest) as one."""
    if not tag:
        return name
    return f"{name}@{tag}" if ":" in tag else f"{name}:{tag}"
