"""The curated operations as one table, and the choice among them by a request's raw target. Pure functions.

The engine routes on the *decoded* path, so a decision that looks at anything else can be led astray
(`/containers/x%2Fjson`). The choice here is made on the raw path, split at its slashes before anything is decoded, and
is kept equal to the engine's by what is refused: literal parts of a path match only as they stand, and a decoded name
must not hold a slash, a dot segment, or a control character. So no second reading of an accepted path exists.

The one exception passes on purpose: a path with doubled slashes (clients send `/images//json`) is relayed if the path
without them names an operation. The engine answers it with a redirect to the clean path.

To add an operation: a line in `OPERATIONS`.
"""

import enum
import functools
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

import msgspec

from errors import RunnerError


class Kind(enum.Enum):
    """How an operation's answer travels."""

    PLAIN = enum.auto()
    """As it comes."""
    LINES = enum.auto()
    """Newline-delimited JSON: leaves in whole lines."""
    PROGRESS = enum.auto()
    """As LINES, and the format has a line for errors (`errorDetail`), so a break can be told in-band."""
    EVENTS = enum.auto()
    """As LINES, but always read at once: the engine drops events of a slow reader and is itself slowed by it."""
    HIJACK = enum.auto()
    """The engine hands the connection over: raw bytes until the end."""


class Operation(msgspec.Struct, frozen=True):
    """A row of the table. `template` is the official path; `{name}` spans several segments, `{id}` one."""

    id: str
    method: str
    template: str
    kind: Kind = Kind.PLAIN
    quick: bool = False
    """The engine begins its answer at once, so that a time limit on its head is safe."""
    lasting: bool | tuple[str, str] = False
    """It may last for as long as nothing happens: always, or where this parameter (and its default) says so."""
    named_by: str = ""
    """The parameter of the query that names the object, where the path does not."""
    upgrade: str = "tcp"
    """HIJACK: the protocol that the engine is asked to upgrade to."""
    max_segments: int = 1
    """How many segments the parameter may span (names of images hold slashes; a link is `container/alias`)."""


def _quick(name: str, method: str, template: str) -> Operation:
    return Operation(name, method, template, quick=True)


_ANY = 64

OPERATIONS: tuple[Operation, ...] = (
    _quick("SystemPing", "GET", "/_ping"),
    _quick("SystemPingHead", "HEAD", "/_ping"),
    _quick("SystemVersion", "GET", "/version"),
    _quick("SystemInfo", "GET", "/info"),
    Operation("SystemEvents", "GET", "/events", Kind.EVENTS, lasting=True),
    Operation("SystemDataUsage", "GET", "/system/df"),
    Operation("SystemAuth", "POST", "/auth"),
    _quick("ContainerList", "GET", "/containers/json"),
    Operation("ContainerCreate", "POST", "/containers/create", named_by="name"),
    _quick("ContainerInspect", "GET", "/containers/{id}/json"),
    _quick("ContainerTop", "GET", "/containers/{id}/top"),
    Operation("ContainerLogs", "GET", "/containers/{id}/logs", lasting=("follow", "")),
    Operation("ContainerChanges", "GET", "/containers/{id}/changes"),
    Operation("ContainerExport", "GET", "/containers/{id}/export"),
    Operation("ContainerStats", "GET", "/containers/{id}/stats", Kind.LINES, lasting=("stream", "1")),
    _quick("ContainerResize", "POST", "/containers/{id}/resize"),
    Operation("ContainerStart", "POST", "/containers/{id}/start"),
    Operation("ContainerStop", "POST", "/containers/{id}/stop"),
    Operation("ContainerRestart", "POST", "/containers/{id}/restart"),
    Operation("ContainerKill", "POST", "/containers/{id}/kill"),
    Operation("ContainerUpdate", "POST", "/containers/{id}/update"),
    _quick("ContainerRename", "POST", "/containers/{id}/rename"),
    Operation("ContainerPause", "POST", "/containers/{id}/pause"),
    Operation("ContainerUnpause", "POST", "/containers/{id}/unpause"),
    Operation("ContainerAttach", "POST", "/containers/{id}/attach", Kind.HIJACK, lasting=True),
    Operation("ContainerWait", "POST", "/containers/{id}/wait", lasting=True),
    Operation("ContainerDelete", "DELETE", "/containers/{id}", max_segments=2),
    Operation("ContainerArchiveInfo", "HEAD", "/containers/{id}/archive"),
    Operation("ContainerArchive", "GET", "/containers/{id}/archive"),
    Operation("PutContainerArchive", "PUT", "/containers/{id}/archive"),
    Operation("ContainerPrune", "POST", "/containers/prune"),
    _quick("ContainerExec", "POST", "/containers/{id}/exec"),
    Operation("ExecStart", "POST", "/exec/{id}/start", Kind.HIJACK, lasting=True),
    _quick("ExecResize", "POST", "/exec/{id}/resize"),
    _quick("ExecInspect", "GET", "/exec/{id}/json"),
    _quick("ImageList", "GET", "/images/json"),
    Operation("ImageBuild", "POST", "/build", Kind.PROGRESS, named_by="t"),
    Operation("Session", "POST", "/session", Kind.HIJACK, lasting=True, upgrade="h2c"),
    Operation("Grpc", "POST", "/grpc", Kind.HIJACK, lasting=True, upgrade="h2c"),
    Operation("BuildPrune", "POST", "/build/prune"),
    Operation("ImageCreate", "POST", "/images/create", Kind.PROGRESS, named_by="fromImage"),
    Operation("ImageInspect", "GET", "/images/{name}/json", quick=True, max_segments=_ANY),
    Operation("ImageHistory", "GET", "/images/{name}/history", quick=True, max_segments=_ANY),
    Operation("ImagePush", "POST", "/images/{name}/push", Kind.PROGRESS, max_segments=_ANY),
    Operation("ImageTag", "POST", "/images/{name}/tag", quick=True, max_segments=_ANY),
    Operation("ImageDelete", "DELETE", "/images/{name}", max_segments=_ANY),
    Operation("ImageSearch", "GET", "/images/search"),
    Operation("ImagePrune", "POST", "/images/prune"),
    Operation("ImageCommit", "POST", "/commit"),
    Operation("ImageGet", "GET", "/images/{name}/get", max_segments=_ANY),
    Operation("ImageGetAll", "GET", "/images/get"),
    Operation("ImageLoad", "POST", "/images/load", Kind.PROGRESS),
    _quick("VolumeList", "GET", "/volumes"),
    Operation("VolumeCreate", "POST", "/volumes/create"),
    _quick("VolumeInspect", "GET", "/volumes/{name}"),
    Operation("VolumeDelete", "DELETE", "/volumes/{name}"),
    Operation("VolumePrune", "POST", "/volumes/prune"),
    _quick("NetworkList", "GET", "/networks"),
    _quick("NetworkInspect", "GET", "/networks/{id}"),
    Operation("NetworkDelete", "DELETE", "/networks/{id}"),
    Operation("NetworkCreate", "POST", "/networks/create"),
    Operation("NetworkConnect", "POST", "/networks/{id}/connect"),
    Operation("NetworkDisconnect", "POST", "/networks/{id}/disconnect"),
    Operation("NetworkPrune", "POST", "/networks/prune"),
    Operation("DistributionInspect", "GET", "/distribution/{name}/json", max_segments=_ANY),
)

_METHODS = sorted({operation.method for operation in OPERATIONS})

# Every template is a literal path, or has one parameter as its second segment and at most one literal after it.
_Route = tuple[str, str, str]
_LITERAL: dict[tuple[str, str], Operation] = {}
_WITH_PARAMETER: dict[_Route, Operation] = {}
for _operation in OPERATIONS:
    _head, _, _rest = _operation.template[1:].partition("/")
    if "{" in _rest:
        _WITH_PARAMETER[_operation.method, _head, _rest.partition("/")[2]] = _operation
    else:
        _LITERAL[_operation.method, _operation.template] = _operation

_VERSION = re.compile(r"/v[0-9]{1,3}\.[0-9]{1,3}(?=/)")
_VISIBLE = re.compile(rb"[\x21-\x7e]+")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SLASHES = re.compile(r"//+")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_KEPT_PATH = 256
"""Bytes of a path up to which a choice is kept for the next time; it bounds what is kept."""


def api_version(target: bytes) -> tuple[int, int] | None:
    """The version of the API that a target names."""
    if not target.startswith((b"/v", b"//")):
        return None
    version = _VERSION.match(_path(target))
    if version is None:
        return None
    major, _, minor = version[0][2:].partition(".")
    return int(major), int(minor)


def parameter(operation: Operation, target: bytes) -> str:
    """What the target names, decoded: an image, a container."""
    path = _path(target)
    version = _VERSION.match(path)
    segments = path[version.end() if version else 0 :].split("/")[2:]
    if not operation.template.endswith("}"):
        segments.pop()
    return unquote_to_bytes("/".join(segments)).decode("utf-8", "surrogateescape")


def with_parameter(operation: Operation, target: bytes, name: str) -> bytes:
    """A target with another name (one that needs no escapes) in the place of its own."""
    path = _path(target)
    version = _VERSION.match(path)
    mark = re.sub(r"\{\w+\}", name, operation.template)
    return f"{version[0] if version else ''}{mark}".encode() + b"".join(target.partition(b"?")[1:])


def _path(target: bytes) -> str:
    return _SLASHES.sub("/", target.partition(b"?")[0].decode("latin-1"))


def decide(method: bytes, target: bytes) -> Operation:
    """Choose the operation that a request asks for.

    Args:
        method: in upper case.
        target: the request target as sent; the path, with or without an API version, and the query.

    Raises:
        RunnerError: `not_found`, `method_not_allowed` (with `Allow`), `invalid_path`.
    """
    if not _VISIBLE.fullmatch(target) or b"#" in target:
        raise RunnerError("invalid_path", "the target holds a byte that a URL's path and query cannot hold")
    path = target.partition(b"?")[0]
    return _decide_again(method, path) if len(path) <= _KEPT_PATH else _decide(method, path)


def _decide(method: bytes, raw_path: bytes) -> Operation:
    path = raw_path.decode("ascii")
    if "//" in path:
        path = _SLASHES.sub("/", path)
    version = _VERSION.match(path)
    if version:
        path = path[version.end() :]
    asked = method.decode("ascii")
    operation = _find(asked, path)
    if operation is not None:
        return operation
    allowed = [other for other in _METHODS if _find(other, path) is not None]
    if allowed:
        allow = (b"allow", ", ".join(allowed).encode())
        raise RunnerError("method_not_allowed", f"{asked} is not allowed here", headers=(allow,))
    raise RunnerError("not_found", "no such operation, or not among the curated ones")


_decide_again = functools.lru_cache(maxsize=1024)(_decide)
"""Callers ask the same again and again: one look-up instead of two regular expressions and a walk along the path."""


def _find(method: str, path: str) -> Operation | None:
    operation = _LITERAL.get((method, path))
    if operation is not None:
        return operation
    if not path.startswith("/"):
        return None
    segments = path[1:].split("/")
    if len(segments) < 2:
        return None
    head, last = segments[0], segments[-1]
    if len(segments) > 2 and last:
        operation = _WITH_PARAMETER.get((method, head, last))
        if operation is not None and len(segments) - 2 <= operation.max_segments:
            _check_name(segments[1:-1], operation)
            return operation
    operation = _WITH_PARAMETER.get((method, head, ""))
    if operation is not None and len(segments) - 1 <= operation.max_segments:
        _check_name(segments[1:], operation)
        return operation
    return None


def _check_name(segments: Iterable[str], operation: Operation) -> None:
    """Refuse a parameter that the engine, which decodes it first, could read as another path."""
    for segment in segments:
        if "%" not in segment:
            parts = [segment]
        else:
            if _BAD_ESCAPE.search(segment):
                raise RunnerError("invalid_path", "the path holds a % that is no escape")
            decoded = unquote_to_bytes(segment)
            if _CONTROL.search(decoded):
                raise RunnerError("invalid_path", "the path holds a control character")
            parts = decoded.decode("latin-1").split("/")
            if len(parts) > 1 and operation.max_segments != _ANY:
                raise RunnerError("invalid_path", "the path holds an encoded slash")
        if any(part in ("", ".", "..") for part in parts):
            raise RunnerError("invalid_path", "the path holds an empty or a dot segment")
