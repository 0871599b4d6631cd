"""What a create, an update, an exec, a build or a pull may ask for: one function for each operation that has rules.

Each takes the policy and the request as the engine will read it, and raises the first refusal. A refusal names the
rule, the value, and the line of policy that would allow it. What is not written down in a rule as harmless is refused.

To add a rule: a field in `policy.py` (with its value in each preset), a check in `checks.py`, a row in
`tests/test_rules.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn
from urllib.parse import parse_qsl

import msgspec

import checks
import engine_bodies as bodies
import operations
import strict_json
from errors import RunnerError
from operations import Operation
from policy import Policy, matches, refusal

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
    checks.unknown_fields(policy, unknown)
    # Without an image a container begins empty, to be filled with whatever its maker has.
    checks.image(policy, "Image", body.image or "")
    host = body.host_config or bodies.HostConfig()
    checks.host_config(policy, host)
    checks.mounts(policy, host)
    checks.resources(policy, host, "HostConfig.")
    checks.required(policy, host)
    for name, endpoint in ((body.networking_config or bodies.NetworkingConfig()).endpoints_config or {}).items():
        checks.network_mode(policy, "NetworkingConfig.EndpointsConfig", name)
        checks.network_options(policy, "EndpointsConfig.DriverOpts", (endpoint or bodies.Endpoint()).driver_opts)


_HOST_CONFIG = strict_json.field_names(bodies.HostConfig)


def container_update(policy: Policy, asked: Asked) -> None:
    """`ContainerUpdate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.ContainerUpdate)
    checks.unknown_fields(policy, unknown)
    checks.resources(policy, body, "")
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
    checks.unknown_fields(policy, unknown)
    if body.privileged and not policy.exec.privileged:
        policy.deny("exec Privileged", True, "[exec] privileged = true")
    if not matches(body.user or "", policy.exec.users):
        policy.deny("exec User", body.user or "", policy.line("exec", "users", [body.user or ""]))


def volume_create(policy: Policy, asked: Asked) -> None:
    """`VolumeCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.VolumeCreate)
    checks.unknown_fields(policy, unknown)
    checks.volume_driver(policy, "volume", body.driver, body.driver_opts)
    if body.cluster_volume_spec and not matches("cluster", policy.volume.drivers):
        policy.deny("ClusterVolumeSpec", "a cluster's volume", policy.line("volume", "drivers", ["cluster"]))


def network_create(policy: Policy, asked: Asked) -> None:
    """`NetworkCreate`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkCreate)
    checks.unknown_fields(policy, unknown)
    network = policy.network
    driver = body.driver or "bridge"
    if not matches(driver, network.drivers):
        policy.deny("network Driver", driver, policy.line("network", "drivers", [driver]))
    ipam = body.ipam or bodies.Ipam()
    checks.network_options(policy, "network Options", {**(body.options or {}), **(ipam.options or {})})
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
            checks.subnet(policy, addresses or "")


def network_connect(policy: Policy, asked: Asked) -> None:
    """`NetworkConnect`."""
    body, unknown = strict_json.read(asked.body or b"{}", bodies.NetworkConnect)
    checks.unknown_fields(policy, unknown)
    checks.network_mode(policy, "NetworkConnect", asked.name)
    checks.network_options(policy, "EndpointConfig.DriverOpts", (body.endpoint_config or bodies.Endpoint()).driver_opts)


def network_disconnect(policy: Policy, asked: Asked) -> None:
    """`NetworkDisconnect`: nothing is refused but a body of two readings, for the sake of scopes."""
    strict_json.read(asked.body or b"{}", bodies.NetworkDisconnect)


def image_create(policy: Policy, asked: Asked) -> None:
    """`ImageCreate`: a pull, or an import."""
    source = asked.query.get("fromSrc", "")
    if source not in ("", "-") and not policy.images.fetch_urls:
        policy.deny("ImageCreate fromSrc", source, "[images] fetch_urls = true")
    if asked.query.get("fromImage"):
        checks.every_tag(policy, "fromImage", asked.query["fromImage"], asked.query.get("tag", ""))
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
    checks.network_mode(policy, "ImageBuild networkmode", asked.query.get("networkmode", ""))
    for name in ("extrahosts", "securityopt", "cgroupparent", "ulimits", "outputs"):
        if asked.query.get(name) not in (None, "", "null", "[]") and not images.build_options:
            policy.deny(f"ImageBuild {name}", asked.query[name], "[images] build_options = true")
    for tag in asked.query.get("t", "").split("\n"):
        if tag:
            checks.image(policy, "ImageBuild t", tag)


def image_tag(policy: Policy, asked: Asked) -> None:
    """`ImageTag`: the name that is given, and the image that gets it: what may not be run gets no name that may."""
    checks.image(policy, "the image", asked.name)
    _target(policy, asked)


def image_commit(policy: Policy, asked: Asked) -> None:
    """`ImageCommit`: the name that is given."""
    _target(policy, asked)


def image_push(policy: Policy, asked: Asked) -> None:
    """`ImagePush`."""
    checks.every_tag(policy, "the image", asked.name, asked.query.get("tag", ""))


def image_named(policy: Policy, asked: Asked) -> None:
    """`ImageGet`, and `DistributionInspect`, for which the engine asks the registry that the name begins with."""
    checks.image(policy, "the image", asked.name)


def image_get_all(policy: Policy, asked: Asked) -> None:
    """`ImageGetAll`."""
    for name in asked.query.get("names", "").split("\n"):
        checks.image(policy, "names", name)


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


def _target(policy: Policy, asked: Asked) -> None:
    repository = asked.query.get("repo", "")
    if repository:
        checks.image(policy, "repo", checks.reference(repository, asked.query.get("tag", "")))
