"""Whose an event of the engine is, for callers with a scope.

A container's event carries its labels. A network's or a volume's does not, and when it is gone nobody can be asked. So
those that are there are noted before the stream is opened, and again with its first line, and each that comes later is.
What was told of a volume's name before the volume was there was of another.
"""

import asyncio

import msgspec

from scope import Scope

MAX_EVENT = 64 * 1024 * 1024
"""Security limit: bytes of one event that is held to see whose it is, and of all that wait for that. That of an exec
holds its whole command, and those of others must not cut a caller off."""


class _Actor(msgspec.Struct, frozen=True):
    id: str = msgspec.field(default="", name="ID")
    attributes: dict[str, str] = msgspec.field(default={}, name="Attributes")


class _Event(msgspec.Struct):
    type: str = msgspec.field(default="", name="Type")
    action: str = msgspec.field(default="", name="Action")
    actor: _Actor = msgspec.field(default=_Actor(), name="Actor")
    time: int = 0


class OwnEvents:
    """Tells of each line of a stream of events whether it is of something that is the caller's; by `own_events`."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._own: dict[str, dict[str, float]] = {"network": {}, "volume": {}}
        """By id or name: since when it is there, in seconds since the epoch."""
        self._others: dict[str, set[str]] = {"network": set(), "volume": set()}
        """Looked for, and not found: until it is destroyed, or something is created."""
        self._noting: asyncio.Task[None] | None = None

    async def __call__(self, line: bytes) -> bool:
        """Whether the line is the caller's. Lines are to be given whole, and in order."""
        # Waiting is for networks and volumes only: meanwhile events pile up, and those of execs may be long.
        if self._noting is None:
            self._noting = asyncio.ensure_future(self.note())
        try:
            event = msgspec.json.decode(line, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        if event.type == "container":
            return self._scope.owns(event.actor.attributes)
        if event.type not in self._own:
            return event.type == "image"
        await self._noting
        return await self._is_own(event)

    async def note(self) -> None:
        """Note what is there."""
        self._own["network"].update({each.id: 0 for each in await self._scope.networks()})
        self._own["volume"].update({each.name: each.created_s() for each in await self._scope.volumes()})

    async def _is_own(self, event: _Event) -> bool:
        own, others, id_ = self._own[event.type], self._others[event.type], event.actor.id
        if event.action == "create":
            others.discard(id_)
        if id_ not in own and id_ not in others and event.action != "destroy":
            await self._look_up(event.type, id_)
            if id_ not in own:
                others.add(id_)
        is_own = id_ in own and event.time >= own[id_]
        if event.action == "destroy":
            others.discard(id_)
            if is_own:
                del own[id_]
        return is_own

    async def _look_up(self, kind: str, id_: str) -> None:
        if kind == "network":
            if await self._scope.network(id_) == id_:
                self._own[kind][id_] = 0
        elif (found := await self._scope.find_volume(id_)) is not None:
            self._own[kind][id_] = found.created_s()


async def own_events(scope: Scope) -> OwnEvents:
    """To be had before the stream is opened, so that what goes meanwhile is known."""
    events = OwnEvents(scope)
    await events.note()
    return events
