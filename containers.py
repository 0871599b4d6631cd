"""Containers and volumes of the runner face: start, stop, remove, look up, upload."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

import images
from calls import MAX_ANSWER, Calls, Thing, decoded, segment
from errors import RunnerError

PLATFORM_LABEL = "hautech.ai/platform"
Name = Annotated[str, Meta(min_length=1)]


class Start(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The request of `/v1/containers/start`. Fields left out are the engine's defaults, but for `autoRemove`."""

    image: Name | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    cmd: list[str] | UnsetType = UNSET
    entrypoint: str | UnsetType = UNSET
    env: dict[str, str] | list[str] | UnsetType = UNSET
    working_dir: str | UnsetType = UNSET
    auto_remove: bool = True
    binds: list[str] | UnsetType = UNSET
    network_mode: str | UnsetType = UNSET
    tty: bool | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    platform: str | UnsetType = UNSET
    privileged: bool | UnsetType = UNSET
    anonymous_volumes: list[str] | UnsetType = UNSET
    create_extras: dict[str, Any] | UnsetType = UNSET
    ttl_seconds: Annotated[int, Meta(gt=0, description="idle so long it is removed")] | UnsetType = UNSET


class Started(msgspec.Struct, rename="camel"):
    """The answer of `/v1/containers/start`. `name` as it was given."""

    container_id: str
    name: str | UnsetType = UNSET
    status: Literal["running"] = "running"


def environment(env: dict[str, str] | list[str]) -> list[str]:
    """An environment as the engine takes it: `NAME=VALUE` each."""
    return [f"{name}={value}" for name, value in env.items()] if isinstance(env, dict) else env


class _Extras(msgspec.Struct, rename="pascal"):
    """What is read of `createExtras`; the rest is the engine's business."""

    host_config: dict[str, Any] = {}
    image: Name | UnsetType = UNSET
    name: Name | UnsetType = msgspec.field(default=UNSET, name="name")


def create_body(start: Start, default_image: str, ttl_labels: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """The body of the engine's `ContainerCreate`, and the container's name.

    Args:
        start: the request.
        default_image: where it names none.
        ttl_labels: say that it has a time to live; nothing in the request takes them away.

    Raises:
        RunnerError: `validation_error`.
    """
    extras = dict(start.create_extras) if start.create_extras is not UNSET else {}
    try:
        read = msgspec.convert(extras, _Extras)
    except msgspec.ValidationError as error:
        raise RunnerError("validation_error", f"createExtras: {error}") from error
    labels = dict(start.labels) if start.labels is not UNSET else {}
    if start.platform is not UNSET:
        labels[PLATFORM_LABEL] = start.platform
    host: dict[str, Any] = {
        "AutoRemove": start.auto_remove,
        "Binds": start.binds,
        "NetworkMode": start.network_mode,
        "Privileged": start.privileged,
    }
    body: dict[str, Any] = {
        "Image": default_image if start.image is UNSET else start.image,
        "Cmd": start.cmd,
        "Entrypoint": UNSET if start.entrypoint is UNSET else [start.entrypoint],
        "Env": UNSET if start.env is UNSET else environment(start.env),
        "WorkingDir": start.working_dir,
        "Tty": start.tty,
        "Labels": labels,
        "Volumes": UNSET if start.anonymous_volumes is UNSET else {path: {} for path in start.anonymous_volumes},
    }
    name = start.name if read.name is UNSET else read.name
    extras.pop("name", None)
    extras["HostConfig"] = _given(host | read.host_config)
    merged = _given(body | extras)
    if ttl_labels and isinstance(merged["Labels"] or {}, dict):
        merged["Labels"] = {**(merged["Labels"] or {}), **ttl_labels}
    return merged, None if name is UNSET else name


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not UNSET}


class _Identified(msgspec.Struct, rename="pascal"):
    id: str


async def start(calls: Calls, request: Start, default_image: str) -> Started:
    """Ensure the image, create, start. A container that cannot be started, or whose caller leaves, is removed again.

    Raises:
        RunnerError: the engine or the registry refused or failed; nothing is left behind.
    """
    ttl_labels = {} if request.ttl_seconds is UNSET else calls.expiry.labels(request.ttl_seconds)
    body, name = create_body(request, default_image, ttl_labels)
    platform = request.platform or None
    # Before anything is pulled.
    calls.check("POST", b"/containers/create", msgspec.json.encode(body))
    await images.ensure(calls, body["Image"], platform)
    creating = calls.background(_create(calls, body, name, platform))
    try:
        # Shielded: the engine may create a container for a caller who has left, and only its answer tells which.
        container = await asyncio.shield(creating)
        await calls.call("POST", f"/containers/{container}/start", resolved=True)
    except BaseException as error:
        left = await asyncio.shield(calls.background(_remove_created(calls, creating)))
        if left is not None and isinstance(error, RunnerError):
            message = f"{error.message} (and what was created is left behind: {left.message})"
            raise RunnerError(error.code, message, status=error.status, retryable=False) from error
        raise
    return Started(container, UNSET if name is None else name)


async def _create(calls: Calls, body: dict[str, Any], name: str | None, platform: str | None) -> str:
    query = {"name": name, "platform": platform}
    answer = await calls.call("POST", "/containers/create", query, json=body, thing=Thing.IMAGE)
    return decoded(answer, _Identified).id


async def _remove_created(calls: Calls, creating: asyncio.Task[str]) -> RunnerError | None:
    """Remove what was created, if anything; returns why it is still there."""
    try:
        container = await creating
    except RunnerError:
        return None
    try:
        # 404 and 409: the engine removes it by itself.
        await calls.call(
            "DELETE", f"/containers/{container}", {"force": True, "v": True}, accept=(404, 409), own=True, resolved=True
        )
    except RunnerError as error:
        return error
    return None


async def stop(calls: Calls, container: str, timeout_s: int) -> int:
    """Stop a container; returns 204, or 304 if it did not run."""
    path = f"/containers/{segment(Thing.CONTAINER, container)}/stop"
    with await calls.open("POST", path, {"t": timeout_s}, accept=(304,)) as response:
        await response.read(MAX_ANSWER)
        return 304 if response.status == 304 else 204


async def remove(calls: Calls, container: str, *, force: bool, volumes: bool) -> None:
    """Remove a container."""
    path = f"/containers/{segment(Thing.CONTAINER, container)}"
    await calls.call("DELETE", path, {"force": force, "v": volumes})


async def inspect(calls: Calls, container: str, *, own: bool = False) -> bytes:
    """The engine's JSON of a container, unchanged. `own`: see `Calls.open`."""
    return await calls.call("GET", f"/containers/{segment(Thing.CONTAINER, container)}/json", own=own)


async def touch(calls: Calls, container: str) -> None:
    """Mark a container as used: one with a time to live begins it anew."""
    calls.expiry.touch(decoded(await inspect(calls, container), _Identified).id)


class _Config(msgspec.Struct, rename="pascal"):
    labels: dict[str, str] | None = None
    tty: bool = False


class _Network(msgspec.Struct, rename="pascal"):
    networks: dict[str, Any] | None = None


class Inspected(msgspec.Struct, rename="pascal"):
    """What the runner face reads of an inspect."""

    config: _Config
    network_settings: _Network


async def inspected(calls: Calls, container: str, *, own: bool = False) -> Inspected:
    """A container's labels, terminal and networks."""
    return decoded(await inspect(calls, container, own=own), Inspected)


class _Mount(msgspec.Struct, rename="pascal"):
    type: str = ""
    name: str = ""


class _Listed(msgspec.Struct, rename="pascal"):
    id: str
    created: int
    labels: dict[str, str] | None = None
    mounts: list[_Mount] = []


async def _list(calls: Calls, filters: dict[str, list[str]], *, all_: bool) -> list[_Listed]:
    query: dict[str, str | int | bool | None] = {"all": all_, "filters": msgspec.json.encode(filters).decode()}
    found = decoded(await calls.call("GET", "/containers/json", query), list[_Listed])
    return sorted(found, key=lambda listed: (listed.created, listed.id))


async def find_by_labels(calls: Calls, labels: dict[str, str], *, all_: bool) -> list[str]:
    """Ids of the containers with all of these labels, oldest first.

    The engine's filter ends a label's name at the first `=`; names that hold one are compared here.
    """
    wanted = [f"{name}={value}" for name, value in labels.items() if "=" not in name]
    found = await _list(calls, {"label": wanted} if wanted else {}, all_=all_)
    return [each.id for each in found if labels.items() <= (each.labels or {}).items()]


async def list_by_volume(calls: Calls, volume: str) -> list[str]:
    """Ids of the containers that mount a volume, stopped ones too, oldest first.

    The engine's filter also matches the folder that something is mounted at; that is no volume's name.
    """
    found = await _list(calls, {"volume": [volume]}, all_=True)
    return [each.id for each in found if any(mount.type == "volume" and mount.name == volume for mount in each.mounts)]


async def remove_volume(calls: Calls, volume: str, *, force: bool) -> None:
    """Remove a volume."""
    await calls.call("DELETE", f"/volumes/{segment(Thing.VOLUME, volume)}", {"force": force})


async def put_archive(calls: Calls, container: str, path: str, tar: bytes) -> None:
    """Unpack a tar in a folder of a container, which need not run."""
    target = f"/containers/{segment(Thing.CONTAINER, container)}/archive"
    await calls.call("PUT", target, {"path": path}, body=tar, headers=((b"Content-Type", b"application/x-tar"),))
