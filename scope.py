"""Ownership: a caller with a scope sees and touches only what carries its label. Asks the engine who owns what.

A request is narrowed before it goes to the engine: what it makes gets the label, lists and prunes get a filter, and a
name becomes the full id of an object that has the label. What has not (or is not there) becomes an id that nothing has,
so that the engine answers as it does for what is missing, in its own words, and no race can put another object there;
the name goes back into its answer. Volumes have no ids, so what makes, uses and removes them takes turns.

Images are shared. So are names: that one is taken can be seen.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import msgspec

import operations
from dockerapi import Engine
from errors import RunnerError
from operations import Operation
from rules import deny
from strict_json import folded

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an engine's answer that is looked into."""
LOOK_UP_S = 30.0
"""Seconds for the engine to say who owns something."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ID = re.compile(r"[0-9a-f]{64}")
_IN_USE_BY = re.compile(rb'(?<=container )(?:\\")?([0-9a-f]{64}|[0-9a-f]{12})\b')
_SHARED_NETWORKS = ("", "default", "bridge", "none", "host")
"""`host` is a matter of rules."""
_NO_START_BODY = 7
"""Bytes: nothing that means something to the engine is as short; dockerode sends such."""
_NO_WAIT = nullcontext()
_USES_VOLUMES = frozenset(("VolumeCreate", "VolumeDelete", "VolumePrune", "ContainerCreate"))


class Narrowed(msgspec.Struct):
    """A request as it goes to the engine.

    `body` is None where it goes as it came. `hidden` is what stands in for a name of nothing in the target, and that
    name.
    """

    target: bytes
    body: bytes | None = None
    hidden: tuple[str, str] | None = None

    def revealed(self, body: bytes) -> bytes:
        """An answer of the engine, with the caller's name in place of what stood in for it."""
        if self.hidden is None:
            return body
        stand_in, name = self.hidden
        return body.replace(stand_in.encode(), json.dumps(name)[1:-1].encode())


class Scopes:
    """The scopes of one engine.

    Args:
        engine: is asked who owns what.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scopes: dict[str, Scope] = {}
        self._volumes = asyncio.Lock()

    def of(self, label: str) -> "Scope":
        """The scope of a label, `NAME=VALUE`."""
        if label not in self._scopes:
            self._scopes[label] = Scope(self._engine, label)
        return self._scopes[label]

    def turn(self, operation: Operation, label: str) -> AbstractAsyncContextManager[None]:
        """From the look at a volume's owner until the engine has done what was asked, no other volume changes hands."""
        if label:
            self.of(label)
        return self._volumes if self.must_wait(operation) else _NO_WAIT

    def must_wait(self, operation: Operation) -> bool:
        """Whether an operation has a turn. Where nobody has a scope nothing is looked up, and nobody need wait."""
        return bool(self._scopes) and operation.id in _USES_VOLUMES


class _Labelled(msgspec.Struct, rename="pascal"):
    labels: dict[str, str] | None = None


class _Container(msgspec.Struct, rename="pascal"):
    id: str
    config: _Labelled


class _Listed(msgspec.Struct, rename="pascal"):
    id: str
    names: list[str] | None = None


class Network(msgspec.Struct, rename="pascal"):
    """A network, as far as its owner matters."""

    id: str
    name: str
    labels: dict[str, str] | None = None


class Volume(msgspec.Struct, rename="pascal"):
    """A volume, as far as its owner matters."""

    name: str
    labels: dict[str, str] | None = None
    created_at: str = ""

    def created_s(self) -> float:
        """Since when it is there, as far as is known; whole seconds since the epoch."""
        try:
            return datetime.fromisoformat(self.created_at).timestamp()
        except ValueError:
            return 0


class _Volumes(msgspec.Struct, rename="pascal"):
    volumes: list[Volume] | None = None


class _Exec(msgspec.Struct):
    container: str = msgspec.field(name="ContainerID")


class Scope:
    """What carries one label.

    Args:
        engine: is asked.
        label: `NAME=VALUE`.
    """

    def __init__(self, engine: Engine, label: str) -> None:
        self._engine = engine
        self._label = label
        self._name, _, self._value = label.partition("=")
        self._filter = quote(msgspec.json.encode({"label": [label]}))

    async def narrow(self, operation: Operation, target: bytes, body: bytes) -> Narrowed:
        """A request as it may go to the engine.

        Args:
            operation: that of the target.
            target: as it came.
            body: whole, where `rules.needs_body`.

        Raises:
            RunnerError: `policy_denied`; and those of the engine.
        """
        path, _, query = target.partition(b"?")
        rewritten = Narrowed(target)
        if operation.template.startswith(("/containers/{", "/exec/{", "/networks/{", "/volumes/{")):
            await self._resolve_path(operation, rewritten)
        if operation.id in ("ContainerCreate", "ContainerRename"):
            for parameter, name in _pairs(query):
                if parameter == "name":
                    _check_no_id(name.removeprefix("/"))
        match operation.id:
            case "ContainerList" | "NetworkList" | "VolumeList" | "ContainerPrune" | "NetworkPrune" | "VolumePrune":
                rewritten.target = path + b"?" + await self._filtered(query)
            case "ContainerCreate":
                rewritten.body = await self._container(body)
            case "NetworkCreate" | "VolumeCreate":
                found = _object(body)
                self._own(found)
                if operation.id == "VolumeCreate":
                    await self._check_free(found.get(_key(found, "Name")) or "")
                else:
                    _check_network(found)
                rewritten.body = _encoded(found)
            case "NetworkConnect" | "NetworkDisconnect":
                found = _object(body)
                await self._replace(found, "Container", self._own_container)
                if operation.id == "NetworkConnect":
                    key = _key(found, "EndpointConfig")
                    found[key] = _endpoint(found.get(key), operations.parameter(operation, rewritten.target))
                rewritten.body = _encoded(found)
            case "ContainerStart" if len(body) > _NO_START_BODY:
                # Up to API 1.23 it holds another HostConfig, which names volumes and containers.
                raise RunnerError("policy_denied", "within a scope, ContainerStart takes no body")
            case "ImageCommit":
                rewritten.target = path + b"?" + await self._with_own(query, "container", self._own_container)
            case "ImageBuild":
                rewritten.target = path + b"?" + await self._with_own(query, "networkmode", self._mode)
            case "SystemDataUsage":
                raise RunnerError("policy_denied", "within a scope, SystemDataUsage would tell what others use")
        return rewritten

    # Names.

    async def container(self, name: str) -> str | None:
        """The id of the caller's container by name, id or its beginning."""
        name = name.removeprefix("/")
        if not _NAME.fullmatch(name):
            return None
        found = await self._get(f"/containers/{quote(name, safe='')}/json", _Container)
        if found is not None and self.owns(found.config.labels):
            return str(found.id)
        # Among all it may be another's, or the beginning of several; among the caller's own it may be one.
        own = await self._get(f"/containers/json?all=1&filters={self._filter}", list[_Listed]) or []
        named = [each.id for each in own if f"/{name}" in (each.names or [])]
        found_ids = named or [each.id for each in own if each.id.startswith(name)]
        return str(found_ids[0]) if len(found_ids) == 1 else None

    async def network(self, name: str) -> str | None:
        """The id of the caller's network by id, name, or its id's beginning."""
        own = await self.networks()
        for match in (
            [each.id for each in own if name in (each.id, each.name)],
            [each.id for each in own if name and each.id.startswith(name)],
        ):
            if len(match) == 1:
                return str(match[0])
            if match:
                return None
        return None

    async def volume(self, name: str) -> str | None:
        """The name, if it is that of the caller's volume."""
        found = await self.find_volume(name)
        return None if found is None else found.name

    async def find_volume(self, name: str) -> Volume | None:
        """The caller's volume of this name."""
        if not _NAME.fullmatch(name):
            return None
        found: Volume | None = await self._get(f"/volumes/{quote(name, safe='')}", Volume)
        return found if found is not None and self.owns(found.labels) else None

    async def networks(self) -> "list[Network]":
        """All of the caller's."""
        found: list[Network] | None = await self._get(f"/networks?filters={self._filter}", list[Network])
        return found or []

    async def volumes(self) -> "list[Volume]":
        """All of the caller's."""
        found: _Volumes | None = await self._get(f"/volumes?filters={self._filter}", _Volumes)
        return (found and found.volumes) or []

    async def exec(self, name: str) -> str | None:
        """The id, if it is that of an exec in the caller's container."""
        if not _ID.fullmatch(name):
            return None
        found = await self._get(f"/exec/{name}/json", _Exec)
        # By its whole id: another's container may be gone, and its id be the name of one of the caller's.
        return name if found is not None and await self.container(found.container) == found.container else None

    async def _own_container(self, name: str) -> str:
        found = await self.container(name)
        if found is None:
            raise RunnerError("no_such_container", f"No such container: {name}", status=404)
        return found

    async def _mode(self, mode: str) -> str:
        """A network mode that names what is the caller's. A colon may stand in a network's name, too."""
        if mode in _SHARED_NETWORKS or mode.startswith("container:"):
            return await self._namespace(mode)
        found = await self.network(mode)
        if found is None:
            raise RunnerError("no_such_network", f"network {mode} not found", status=404)
        return found

    async def _namespace(self, mode: str) -> str:
        kind, colon, name = mode.partition(":")
        return f"container:{await self._own_container(name)}" if colon and kind == "container" else mode

    async def _resolve_path(self, operation: Operation, rewritten: Narrowed) -> None:
        name = operations.parameter(operation, rewritten.target)
        find = {"containers": self.container, "exec": self.exec, "networks": self.network, "volumes": self.volume}
        kind = operation.template.split("/")[1]
        found = await find[kind](name)
        if found is None:
            found = secrets.token_hex(32)
            rewritten.hidden = (found, name)
        rewritten.target = operations.with_parameter(operation, rewritten.target, found)

    # What is made.

    def _own(self, found: dict[str, Any], place: str = "Labels") -> None:
        """Put the label on what a body makes."""
        key = _key(found, place)
        labels = found.get(key) or {}
        if labels.get(self._name, self._value) != self._value:
            deny(f"the label {self._name}", labels[self._name], f'[scope] label = "{self._name}={labels[self._name]}"')
        found[key] = {**labels, self._name: self._value}

    async def _container(self, body: bytes) -> bytes:
        found = _object(body)
        self._own(found)
        host = found.setdefault(_key(found, "HostConfig"), {}) or {}
        found[_key(found, "HostConfig")] = host
        for kind in ("NetworkMode", "PidMode", "IpcMode", "Cgroup"):
            await self._replace(host, kind, self._mode if kind == "NetworkMode" else self._namespace)
        for kind in ("VolumesFrom", "Links"):
            key = _key(host, kind)
            if host.get(key):
                host[key] = [await self._leading(each) for each in host[key]]
        await self._own_networks(found, host.get(_key(host, "NetworkMode")) or "")
        await self._own_volumes(host)
        return _encoded(found)

    async def _own_networks(self, found: dict[str, Any], mode: str) -> None:
        """Endpoints of a create, each bound to its network's id: see `_endpoint`."""
        networking = found.get(_key(found, "NetworkingConfig")) or {}
        key = _key(networking, "EndpointsConfig")
        endpoints = networking.get(key) or {}
        if not endpoints and _ID.fullmatch(mode):
            endpoints = {mode: {}}
        if endpoints:
            resolved = [(await self._mode(name), settings) for name, settings in endpoints.items()]
            networking[key] = {id_: _endpoint(settings, id_) for id_, settings in resolved}
            found[_key(found, "NetworkingConfig")] = networking

    async def _leading(self, reference: str) -> str:
        name, colon, rest = reference.partition(":")
        return f"{await self._own_container(name)}{colon}{rest}"

    async def _check_free(self, name: str) -> None:
        """A create gives the volume of this name, if there is one: not another's."""
        if _NAME.fullmatch(name):
            found = await self._get(f"/volumes/{quote(name, safe='')}", Volume)
            if found is not None and not self.owns(found.labels):
                raise RunnerError("conflict", f"the volume name {name} is in use", status=409)

    async def _own_volumes(self, host: dict[str, Any]) -> None:
        """Named volumes of a create: the caller's, or made here; those without a name get the label."""
        for bind in host.get(_key(host, "Binds")) or []:
            name, colon, _ = bind.partition(":")
            if colon and _NAME.fullmatch(name):
                await self._own_volume(name, host.get(_key(host, "VolumeDriver")) or "local", {})
        for mount in host.get(_key(host, "Mounts")) or []:
            if (mount.get(_key(mount, "Type")) or "").lower() != "volume":
                continue
            options = mount.get(_key(mount, "VolumeOptions")) or {}
            driver = options.get(_key(options, "DriverConfig")) or {}
            if name := mount.get(_key(mount, "Source")):
                given = driver.get(_key(driver, "Options")) or {}
                await self._own_volume(name, driver.get(_key(driver, "Name")) or "local", given)
            else:
                self._own(options)
                mount[_key(mount, "VolumeOptions")] = options

    async def _own_volume(self, name: str, driver: str, options: Mapping[str, str]) -> None:
        wanted = {"Name": name, "Driver": driver, "DriverOpts": options, "Labels": {self._name: self._value}}
        headers = ((b"Content-Type", b"application/json"),)
        with await self._engine.request(b"POST", b"/volumes/create", headers, msgspec.json.encode(wanted)) as response:
            answer = await response.read(MAX_ANSWER)
        if response.status != 201:
            raise RunnerError("bad_parameter", answer.decode("utf-8", "replace"), status=response.status)
        # It gives the one of this name, if there is one: perhaps another's.
        if not self.owns(msgspec.json.decode(answer, type=Volume).labels):
            raise RunnerError("no_such_volume", f"get {name}: no such volume", status=404)

    # Lists.

    async def _filtered(self, query: bytes) -> bytes:
        """A query whose filters let through only what carries the label."""
        pairs = _pairs(query)
        filters = _filters(dict(pairs).get("filters", ""))
        filters["label"] = [*filters.get("label", []), self._label]
        for name in ("before", "since"):
            if name in filters:
                filters[name] = [await self._own_container(each) for each in filters[name]]
        kept = [(name, value) for name, value in pairs if name not in ("filters", "before", "since")]
        return _query([*kept, ("filters", msgspec.json.encode(filters).decode())])

    async def _with_own(self, query: bytes, parameter: str, find: Callable[[str], Awaitable[str]]) -> bytes:
        pairs = [(name, await find(value) if name == parameter else value) for name, value in _pairs(query)]
        return _query(pairs)

    # Refusals.

    async def redacted(self, operation: Operation, status: int, body: bytes) -> bytes:
        """A refusal of the engine, without the ids of others' containers: the name or the image is in use by one."""
        if status == 409 and operation.id in ("ContainerCreate", "ContainerRename", "ImageDelete"):
            for id_ in set(_IN_USE_BY.findall(body)):
                if await self.container(id_.decode()) is None:
                    body = body.replace(id_, b"of others")
        return body

    # The engine.

    def owns(self, labels: Mapping[str, str] | None) -> bool:
        """Whether these labels have the scope's."""
        return (labels or {}).get(self._name) == self._value

    async def _replace(self, found: dict[str, Any], field: str, find: Callable[[str], Awaitable[str]]) -> None:
        key = _key(found, field)
        if found.get(key):
            found[key] = await find(found[key])

    async def _get(self, target: str, form: Any) -> Any:
        """What the engine says; None if it has no such thing."""
        with await self._engine.request(b"GET", target.encode(), head_s=LOOK_UP_S) as response:
            answer = await response.read(MAX_ANSWER)
        if response.status != 200:
            return None
        try:
            return msgspec.json.decode(answer, type=form)
        except msgspec.MsgspecError as error:
            raise RunnerError("engine_garbage", f"the engine's answer is not what was asked for: {error}") from error


def _object(body: bytes) -> dict[str, Any]:
    """A body that `rules` has found unambiguous."""
    found = msgspec.json.decode(body or b"{}")
    if not isinstance(found, dict):
        raise RunnerError("invalid_json", "the body is not a JSON object")
    return found


def _encoded(found: dict[str, Any]) -> bytes:
    return msgspec.json.encode(found)


def _key(found: Iterable[str], field: str) -> str:
    """The name of a field as it stands in an object, in whatever case; as it should, if it does not."""
    return next((name for name in found if folded(name) == field.lower()), field)


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="surrogateescape")


def _query(pairs: list[tuple[str, str]]) -> bytes:
    return urlencode(pairs, errors="surrogateescape").encode()


def _endpoint(settings: dict[str, Any] | None, id_: str) -> dict[str, Any]:
    """The settings of a container in a network, bound to the network's id.

    The engine joins the network that they name, before the one that was asked for; where they name none it keeps the
    network's *name*, and looks for that at each start: by then it may be another's name, or be another's id.
    """
    bound = {name: value for name, value in (settings or {}).items() if folded(name) != "networkid"}
    return {**bound, "NetworkID": id_} if _ID.fullmatch(id_) else bound


def _check_network(found: dict[str, Any]) -> None:
    """What a network is made from is named by its name only, which several may have."""
    _check_no_id(found.get(_key(found, "Name")) or "")
    if found.get(_key(found, "ConfigFrom")):
        raise RunnerError("policy_denied", "within a scope, NetworkCreate takes no ConfigFrom")


def _check_no_id(name: str) -> None:
    """What refers to a thing of others by its id would find this one, once that is gone."""
    if _ID.fullmatch(name):
        raise RunnerError("policy_denied", "within a scope, nothing may have a name that reads as an id")


_FILTERS = msgspec.json.Decoder(dict[str, list[str] | dict[str, bool]])


def _filters(text: str) -> dict[str, list[str]]:
    """The engine's filters; in older versions of the API the values are the keys of an object."""
    if not text:
        return {}
    try:
        found = _FILTERS.decode(text)
    except msgspec.MsgspecError as error:
        raise RunnerError("validation_error", f"filters: {error}") from error
    return {
        name: [value for value, is_set in values.items() if is_set] if isinstance(values, dict) else values
        for name, values in found.items()
    }
