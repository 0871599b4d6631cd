"""Containers with a time to live, and since when nobody has used each. No I/O: what the engine tells comes in.

A container carries its time to live in labels, which the engine never changes, together with the name of the runner
that minds it (`labels`). Three things follow from where labels come from:

* Who may create a container may set these labels, and so have it removed. It is their own; nobody can put labels on a
  container that is there.
* An image's labels are inherited by every container of it, whoever creates that, and a commit puts a container's labels
  on an image. So a label that the image has, too, says nothing about the container (`inherited`). What this runner
  starts gets a fresh `LEASE` each, so that it is never taken for inherited.
* A label cannot be renewed. When a container was used is known to the runner alone, and forgotten with it: whatever is
  found for the first time counts as used just then. So nothing expires early, whatever clocks say; only `clock` counts.

A caller names a container as it likes: by id, its beginning, or name; an exec by its own id. A use whose name is not
known yet (made or renamed since the engine was asked last) is kept until the engine is asked again.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping

import msgspec

INSTANCE = "docker-runner.instance"
TTL = "docker-runner.ttl-seconds"
LEASE = "docker-runner.lease"

MAX_UNKNOWN = 4096
"""Names of containers not known here that were used since the engine was asked last; the oldest are forgotten first."""
_LONGEST_NAME = 255
_TTL = re.compile(r"[1-9][0-9]{0,11}")
_BEGINNING = re.compile(r"[0-9a-f]{1,63}")


def labels(instance: str, ttl_s: int) -> dict[str, str]:
    """What a container is labelled with that this runner starts with a time to live."""
    return {INSTANCE: instance, TTL: str(ttl_s), LEASE: secrets.token_hex(8)}


def inherited(own: Mapping[str, str], image: Mapping[str, str]) -> bool:
    """Whether a container has its time to live from its image: nobody has said so of this container."""
    return own.get(TTL) == image.get(TTL) and own.get(LEASE) == image.get(LEASE)


class Found(msgspec.Struct, rename="pascal"):
    """A container, as the engine lists it."""

    id: str
    names: list[str] | None = None
    image_id: str = msgspec.field(default="", name="ImageID")
    labels: dict[str, str] | None = None

    def ttl_s(self) -> int | None:
        """Its time to live, if its label says one."""
        text = (self.labels or {}).get(TTL, "")
        return int(text) if _TTL.fullmatch(text) else None


class Lease:
    """A container with a time to live. `uses` are those that go on."""

    def __init__(self, id_: str, ttl_s: int, used_at: float) -> None:
        self.id = id_
        self.ttl_s = ttl_s
        self.used_at = used_at
        self.names: set[str] = set()
        self.uses = 0
        self.ending = False
        """It is being stopped and removed."""
        self.failures = 0
        self.not_before = 0.0
        """When it may be tried again."""

    def due_at(self) -> float:
        """When it is to be removed, if nobody uses it until then."""
        return float("inf") if self.uses or self.ending else max(self.used_at + self.ttl_s, self.not_before)

    def called(self) -> str:
        """Id and name, for the log."""
        name = min(self.names, default="")
        return f"{self.id[:12]} ({name})" if name else self.id[:12]


class Use:
    """Something that is being done with a container, from `Leases.begin` to `Leases.end`."""

    __slots__ = ("lease", "name", "of_exec")

    def __init__(self, name: str, *, of_exec: bool) -> None:
        self.name = name
        self.of_exec = of_exec
        """It names an exec; which container that is in is for `Leases.resolve`."""
        self.lease: Lease | None = None


class Leases:
    """All of them.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._by_name: dict[str, Lease] = {}
        self._unknown: set[Use] = set()
        self._used_unknown: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._leases

    # Use.

    def find(self, name: str) -> Lease | None:
        """By id, name, or an id's beginning, as the engine does."""
        found = self._leases.get(name) or self._by_name.get(name.removeprefix("/"))
        if found is None and self._leases and _BEGINNING.fullmatch(name):
            begins = [lease for id_, lease in self._leases.items() if id_.startswith(name)]
            found = begins[0] if len(begins) == 1 else None
        return found

    def begin(self, name: str, *, of_exec: bool = False) -> Use:
        """Something begins to be done with a container. Until its `end` the container does not expire."""
        use = Use(name, of_exec=of_exec)
        self._attach(use, None if of_exec else self.find(name))
        return use

    def resolve(self, use: Use, container: str) -> None:
        """The exec of a use is in this container. A use that has ended meanwhile is none."""
        if use not in self._unknown:
            return
        self._unknown.discard(use)
        use.name, use.of_exec = container, False
        self._attach(use, self.find(container))

    def end(self, use: Use) -> None:
        """It has ended; from now on the container is idle."""
        if use.lease is not None:
            use.lease.uses -= 1
            use.lease.used_at = self._clock()
            return
        self._unknown.discard(use)
        if not use.of_exec and len(use.name) <= _LONGEST_NAME:
            self._used_unknown.pop(use.name, None)
            self._used_unknown[use.name] = self._clock()
            if len(self._used_unknown) > MAX_UNKNOWN:
                del self._used_unknown[next(iter(self._used_unknown))]

    def unresolved(self) -> list[Use]:
        """Uses of execs that go on, and of which it is not known in which container."""
        return [use for use in self._unknown if use.of_exec]

    def _attach(self, use: Use, lease: Lease | None) -> None:
        if lease is None:
            self._unknown.add(use)
        else:
            use.lease = lease
            lease.uses += 1
            lease.used_at = self._clock()

    # What the engine tells.

    def update(self, found: Iterable[tuple[Found, int]]) -> None:
        """Take over what there is now: containers and their times to live. All others are forgotten."""
        before, self._leases, self._by_name = self._leases, {}, {}
        now = self._clock()
        for container, ttl_s in found:
            lease = before.get(container.id) or Lease(container.id, ttl_s, now)
            self._leases[lease.id] = lease
            names = {name.removeprefix("/") for name in container.names or []}
            # A use under its former name may be on its way.
            for name in lease.names - names:
                self._by_name.setdefault(name, lease)
            self._by_name.update(dict.fromkeys(names, lease))
            lease.names = names
        for name, used_at in self._used_unknown.items():
            if (known := self.find(name)) is not None:
                known.used_at = max(known.used_at, used_at)
        self._used_unknown.clear()
        for use in [use for use in self._unknown if not use.of_exec]:
            if (known := self.find(use.name)) is not None:
                self._unknown.discard(use)
                self._attach(use, known)

    def forget(self, lease: Lease) -> None:
        """It is gone."""
        self._leases.pop(lease.id, None)
        for name in [name for name, other in self._by_name.items() if other is lease]:
            del self._by_name[name]

    def postpone(self, seconds: float) -> None:
        """For so long nobody could have used anything: it is not idle time."""
        now = self._clock()
        for lease in self._leases.values():
            lease.used_at = min(now, lease.used_at + seconds)

    # What is to be done.

    def due(self) -> list[Lease]:
        """Those whose time is over, the longest first."""
        now = self._clock()
        return sorted((lease for lease in self._leases.values() if lease.due_at() <= now), key=Lease.due_at)

    def next_due(self) -> float:
        """When the next one's is; infinite if there is none."""
        return min((lease.due_at() for lease in self._leases.values()), default=float("inf"))
