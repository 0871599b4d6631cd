"""The runner face, `/v1/...`: task-level operations in JSON for platforms that run workspaces and agents in containers.

The routes are one table (`ROUTES`): method, path, the request's struct, a handler of a few lines. What the operations
do is in `images.py`, `containers.py`, `execs.py` and `feeds.py`; how requests come in, in `runner_face.py`.

To add a route: a struct, a handler, a line in `ROUTES`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response

import containers
import execs
import feeds
import images
from calls import Calls, Operation, Thing
from containers import Name
from errors import RunnerError
from event_hub import EventHub
from exec_connection import resize
from metrics import Metrics
from process_tree import Tree

JSON = "application/json"


class Options(msgspec.Struct, frozen=True):
    """What the runner face is told by the settings (times in seconds, sizes in bytes), and what it tells."""

    default_image: str
    max_output: int
    head_s: float
    keep_alive_s: float
    event_buffer: int
    metrics: Metrics
    event_hub: EventHub


# Requests. A field that may be absent may not be null; unknown fields are ignored, but for `start`.


class EnsureImage(msgspec.Struct, rename="camel"):
    image: Name
    platform: str | UnsetType = UNSET
    auth: Annotated[dict[str, str], Meta(description="`X-Registry-Auth`, not yet encoded")] | UnsetType = UNSET


class StopContainer(msgspec.Struct, rename="camel"):
    container_id: Name
    timeout_sec: Annotated[int, Meta(ge=0, description="seconds until it is killed")] = 10


class RemoveContainer(msgspec.Struct, rename="camel"):
    container_id: Name
    force: bool = False
    remove_volumes: bool = False


class OneContainer(msgspec.Struct, rename="camel"):
    container_id: Name


class FindByLabels(msgspec.Struct, rename="camel"):
    labels: Annotated[dict[str, str], Meta(min_length=1)]
    all: bool = False


class ListByVolume(msgspec.Struct, rename="camel"):
    volume_name: Name


class RemoveVolume(msgspec.Struct, rename="camel"):
    volume_name: Name
    force: bool = False


BASE64 = {"pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"}


class PutArchive(msgspec.Struct, rename="camel"):
    container_id: Name
    path: Name
    payload_base64: Annotated[bytes, Meta(description="a tar", extra_json_schema=BASE64)] = msgspec.field(
        name="payloadBase64"
    )


Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]


class ExecOptions(msgspec.Struct, rename="camel", frozen=True):
    workdir: str | UnsetType = UNSET
    env: dict[str, str] | list[str] | UnsetType = UNSET
    timeout_ms: Milliseconds = 0
    idle_timeout_ms: Milliseconds = 0
    tty: bool = False
    kill_on_timeout: Annotated[bool, Meta(description="at a time limit the container is stopped")] = False
    kill_on_disconnect: Annotated[bool, Meta(description="if the caller leaves, its processes are ended")] = False
    log_to_pid1: bool = msgspec.field(default=False, name="logToPid1")


class RunExec(msgspec.Struct, rename="camel"):
    container_id: Name
    command: (
        Annotated[str, Meta(min_length=1, description="for `/bin/sh -lc`")]
        | Annotated[list[str], Meta(min_length=1, description="taken as it is")]
    )
    options: ExecOptions = ExecOptions()


class Size(msgspec.Struct):
    cols: Annotated[int, Meta(gt=0)]
    rows: Annotated[int, Meta(gt=0)]


class ResizeExec(msgspec.Struct, rename="camel"):
    exec_id: Name
    size: Size


class Logs(msgspec.Struct, rename="camel"):
    container_id: Name
    follow: bool = True
    since: Annotated[str, Meta(description="Unix time, in seconds")] | UnsetType = UNSET
    tail: Annotated[str, Meta(description="how many lines from the end, or `all`")] | UnsetType = UNSET
    stdout: bool = True
    stderr: bool = True
    timestamps: bool = False


class Events(msgspec.Struct, rename="camel"):
    since: Annotated[str, Meta(description="Unix time, in seconds")] | UnsetType = UNSET
    filters: (
        Annotated[str, Meta(description='base64 of JSON; absent or malformed: `{"type":["container"]}`')] | UnsetType
    ) = UNSET


class Interactive(msgspec.Struct, rename="camel"):
    container_id: Name
    command: Annotated[Name, Meta(description="a JSON array of strings, or a command line for `/bin/sh -lc`")]
    workdir: str | UnsetType = UNSET
    tty: bool = False
    demux: bool = True
    env: Annotated[str, Meta(description="JSON: an object, or an array of `NAME=VALUE`")] | UnsetType = UNSET
    kill_on_disconnect: bool = False


class Nothing(msgspec.Struct):
    """A request without parameters."""


# Answers.


class Labels(msgspec.Struct):
    labels: dict[str, str]


class Networks(msgspec.Struct):
    networks: list[str]


class ContainerIds(msgspec.Struct, rename="camel"):
    container_ids: list[str]


# Handlers: (calls, the decoded request, the HTTP request, options) -> response.

Handler = Callable[[Calls, Any, Request, Options], Awaitable[Response]]


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


NO_CONTENT = 204


async def _ensure(calls: Calls, asked: EnsureImage, request: Request, options: Options) -> Response:
    """Have the image on the engine, pulled if need be: 204. With `Accept: text/event-stream` the progress as SSE."""
    platform = asked.platform or None
    auth = None if asked.auth is UNSET else asked.auth
    if "text/event-stream" in request.headers.get("accept", ""):
        return await feeds.pull_feed(images.ensuring(calls, asked.image, platform, auth), options.keep_alive_s)
    await images.ensure(calls, asked.image, platform, auth)
    return Response(status_code=NO_CONTENT)


async def _start(calls: Calls, asked: containers.Start, request: Request, options: Options) -> Response:
    """Ensure the image, create and start a container: 200 with its id. A failed start leaves nothing behind."""
    return _json(await containers.start(calls, asked, options.default_image))


async def _stop(calls: Calls, asked: StopContainer, request: Request, options: Options) -> Response:
    """Stop a container: 204, or the engine's 304, 404, 409."""
    return Response(status_code=await containers.stop(calls, asked.container_id, asked.timeout_sec))


async def _remove(calls: Calls, asked: RemoveContainer, request: Request, options: Options) -> Response:
    """Remove a container: 204, or the engine's 404, 409."""
    await containers.remove(calls, asked.container_id, force=asked.force, volumes=asked.remove_volumes)
    return Response(status_code=NO_CONTENT)


async def _inspect(calls: Calls, asked: OneContainer, request: Request, options: Options) -> Response:
    """The engine's JSON of a container, unchanged."""
    return Response(await containers.inspect(calls, asked.container_id), media_type=JSON)


async def _labels(calls: Calls, asked: OneContainer, request: Request, options: Options) -> Response:
    """A container's labels."""
    return _json(Labels((await containers.inspected(calls, asked.container_id)).config.labels or {}))


async def _networks(calls: Calls, asked: OneContainer, request: Request, options: Options) -> Response:
    """The names of a container's networks."""
    networks = (await containers.inspected(calls, asked.container_id)).network_settings.networks
    return _json(Networks(list(networks or {})))


async def _find(calls: Calls, asked: FindByLabels, request: Request, options: Options) -> Response:
    """Ids of the containers that have all the labels, oldest first."""
    return _json(ContainerIds(await containers.find_by_labels(calls, asked.labels, all_=asked.all)))


async def _list_by_volume(calls: Calls, asked: ListByVolume, request: Request, options: Options) -> Response:
    """Ids of the containers that mount the volume, stopped ones too."""
    return _json(ContainerIds(await containers.list_by_volume(calls, asked.volume_name)))


async def _remove_volume(calls: Calls, asked: RemoveVolume, request: Request, options: Options) -> Response:
    """Remove a volume: 204, or the engine's 404, 409."""
    await containers.remove_volume(calls, asked.volume_name, force=asked.force)
    return Response(status_code=NO_CONTENT)


async def _touch(calls: Calls, asked: OneContainer, request: Request, options: Options) -> Response:
    """Mark a container as used, so that its time to live (`ttlSeconds`) begins anew: 204."""
    await containers.touch(calls, asked.container_id)
    return Response(status_code=NO_CONTENT)


async def _put_archive(calls: Calls, asked: PutArchive, request: Request, options: Options) -> Response:
    """Unpack a tar (base64) in a folder of a container, running or not: 204."""
    await containers.put_archive(calls, asked.container_id, asked.path, asked.payload_base64)
    return Response(status_code=NO_CONTENT)


async def _run(calls: Calls, asked: RunExec, request: Request, options: Options) -> Response:
    """Run a command to its end: stdout, stderr, exit code. 504 at a time limit."""
    given = asked.options
    config = exec_config(
        execs.argv(asked.command, log_to_pid1=given.log_to_pid1),
        given.workdir,
        given.env,
        tty=given.tty and not given.log_to_pid1,
    )
    limits = execs.Limits(given.timeout_ms, given.idle_timeout_ms, options.max_output)
    with Tree(calls) as tree:
        try:
            ran = await execs.run(calls, asked.container_id, config, limits, tree, stop=given.kill_on_timeout)
        except asyncio.CancelledError:
            # If it is the runner that leaves, nobody keeps the time limits any more.
            left = request.scope["docker_runner"].disconnected
            if given.kill_on_disconnect or (not left and (given.timeout_ms or given.idle_timeout_ms)):
                tree.end()
            raise
    return _json(ran)


def exec_config(
    argv: list[str], workdir: str | UnsetType, env: dict[str, str] | list[str] | UnsetType, *, tty: bool
) -> dict[str, Any]:
    config: dict[str, Any] = {"Cmd": argv, "AttachStdout": True, "AttachStderr": True, "Tty": tty}
    if workdir is not UNSET:
        config["WorkingDir"] = workdir
    if env is not UNSET:
        config["Env"] = containers.environment(env)
    return config


async def _resize(calls: Calls, asked: ResizeExec, request: Request, options: Options) -> Response:
    """Set the size of an exec's terminal: 204."""
    await resize(calls, asked.exec_id, asked.size.rows, asked.size.cols)
    return Response(status_code=NO_CONTENT)


async def _logs(calls: Calls, asked: Logs, request: Request, options: Options) -> Response:
    """SSE: a container's log, in whole frames, base64."""
    if asked.follow:
        request.scope["docker_runner.request"].as_stream()
    query = {
        "follow": asked.follow,
        "stdout": asked.stdout,
        "stderr": asked.stderr,
        "timestamps": asked.timestamps,
        "since": None if asked.since is UNSET else asked.since,
        "tail": None if asked.tail is UNSET else asked.tail,
    }
    return await feeds.logs(calls, asked.container_id, query, options.keep_alive_s)


async def _events(calls: Calls, asked: Events, request: Request, options: Options) -> Response:
    """SSE: the engine's events, each once; with `Last-Event-ID` from there on, and every gap told."""
    request.scope["docker_runner.request"].as_stream()
    return await feeds.events(
        calls,
        options.event_hub,
        feeds.event_filters(None if asked.filters is UNSET else asked.filters),
        feeds.event_wish(None if asked.since is UNSET else asked.since, request.headers.getlist("last-event-id")),
        connection=request.scope["docker_runner"],
        buffer_limit=options.event_buffer,
    )


async def _upgrade_required(calls: Calls, asked: Nothing, request: Request, options: Options) -> Response:
    """WebSocket: a command with its input and output, a terminal if asked for."""
    raise RunnerError("upgrade_required", "this route is a WebSocket", headers=((b"upgrade", b"websocket"),))


INTERACTIVE = "/v1/exec/interactive/ws"
EXEC = Operation("exec_failed", conflict="container_stopped_paused", stands_for=("ContainerExec", "ExecStart"))

ROUTES: tuple[tuple[str, str, type[msgspec.Struct], Handler, Operation], ...] = (
    (
        "POST",
        "/v1/images/ensure",
        EnsureImage,
        _ensure,
        Operation("image_ensure_failed", Thing.IMAGE, clean=True, stands_for=("ImageCreate",)),
    ),
    (
        "POST",
        "/v1/containers/start",
        containers.Start,
        _start,
        Operation("start_failed", clean=True, stands_for=("ImageCreate", "ContainerCreate", "ContainerStart")),
    ),
    ("POST", "/v1/containers/stop", StopContainer, _stop, Operation("stop_failed", stands_for=("ContainerStop",))),
    (
        "POST",
        "/v1/containers/remove",
        RemoveContainer,
        _remove,
        Operation("remove_failed", stands_for=("ContainerDelete",)),
    ),
    ("GET", "/v1/containers/inspect", OneContainer, _inspect, Operation("inspect_failed")),
    ("GET", "/v1/containers/labels", OneContainer, _labels, Operation("labels_failed")),
    ("GET", "/v1/containers/networks", OneContainer, _networks, Operation("networks_failed")),
    ("POST", "/v1/containers/findByLabels", FindByLabels, _find, Operation("find_failed")),
    ("GET", "/v1/containers/listByVolume", ListByVolume, _list_by_volume, Operation("list_volume_failed")),
    (
        "POST",
        "/v1/volumes/remove",
        RemoveVolume,
        _remove_volume,
        Operation("volume_remove_failed", Thing.VOLUME, stands_for=("VolumeDelete",)),
    ),
    ("POST", "/v1/containers/touch", OneContainer, _touch, Operation("touch_failed")),
    (
        "POST",
        "/v1/containers/putArchive",
        PutArchive,
        _put_archive,
        Operation("put_archive_failed", stands_for=("PutContainerArchive",)),
    ),
    ("POST", "/v1/exec/run", RunExec, _run, EXEC),
    (
        "POST",
        "/v1/exec/resize",
        ResizeExec,
        _resize,
        Operation("resize_failed", Thing.EXEC, stands_for=("ExecResize",)),
    ),
    ("GET", "/v1/containers/logs/sse", Logs, _logs, Operation("logs_failed")),
    ("GET", "/v1/events/sse", Events, _events, Operation("events_failed")),
    ("GET", INTERACTIVE, Nothing, _upgrade_required, EXEC),
)
