"""Whether the engine is there, for the log: which one it is when that is known, and when it goes and comes.

It is asked now and then, over a connection of its own, so that callers neither wait for this nor share their places
with it. Only changes are told, so there are never more lines than looks. A look also sees that another socket stands at
the path, which no connection would tell of as long as the engine lives that listened at the old one.
"""

import asyncio
import logging
from collections.abc import Mapping

import msgspec

from dockerapi import Engine
from errors import RunnerError

log = logging.getLogger("docker_runner.engine")

LIMIT_S = 5.0
"""Seconds for one answer."""
MAX_VERSION = 256 * 1024
"""Bytes of what the engine says of its version."""
REMEDIES: Mapping[str, str] = {
    "engine_socket_missing": "start it, or name its socket in DOCKER_SOCKET",
    "engine_refused": "start it (systemctl start docker)",
    "engine_permission_denied": "run as a user in the group of the socket",
}
"""What to do, by code."""
REMEDY = "look at the engine's log, or restart it"
"""For every other code."""


class _Component(msgspec.Struct, frozen=True):
    name: str = msgspec.field(name="Name", default="")


class Version(msgspec.Struct, frozen=True):
    """What an engine says at `/version` (SystemVersion): the part that is told."""

    version: str = msgspec.field(name="Version")
    api_version: str = msgspec.field(name="ApiVersion")
    min_api_version: str = msgspec.field(name="MinAPIVersion", default="")
    os: str = msgspec.field(name="Os", default="")
    arch: str = msgspec.field(name="Arch", default="")
    components: tuple[_Component, ...] = msgspec.field(name="Components", default=())


class EngineWatch:
    """Looks at the engine from `begin` to `end`.

    Args:
        engine: as it is asked for callers; its connections are cut where they lead to a socket that was replaced.
        connect_s: as of `Engine`.
        every_s: between looks; 0: there is none.
    """

    def __init__(self, engine: Engine, *, connect_s: float, every_s: float) -> None:
        # Two: where one has just died, its place is not yet free.
        self._engine = Engine(engine.path, max_connections=2, queue_s=1, connect_s=connect_s)
        self._served = engine
        self._path = engine.path
        self._every_s = every_s
        self._gone_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self.there: bool | None = None
        """Whether it was at the last look; None before the first."""

    def begin(self) -> None:
        """Look now, and from then on; waits for nothing."""
        if self._every_s:
            self._looking = asyncio.get_running_loop().create_task(self._run())

    async def end(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self._engine.close()

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                log.exception("a defect while looking at the engine: please report it with this trace")
            await asyncio.sleep(self._every_s)

    async def _look(self) -> None:
        if any([self._engine.cut_replaced(), self._served.cut_replaced()]):
            log.warning("another socket stands at the engine's path; connections to the old one were closed")
            self.there = None
        try:
            if self.there:
                await self._engine.ping(LIMIT_S)
                return
            version = await self._ask()
        except RunnerError as error:
            if error.code != "engine_busy":  # That is a lack of file descriptors here.
                self._gone(error)
        else:
            self._came(version)

    async def _ask(self) -> Version:
        """Which engine it is.

        Raises:
            RunnerError: it does not say.
        """
        try:
            async with asyncio.timeout(LIMIT_S):
                with await self._engine.request(b"GET", b"/version") as response:
                    body = await response.read(MAX_VERSION)
        except TimeoutError:
            raise RunnerError("engine_timeout", "the engine did not say its version in time") from None
        if response.status != 200:
            raise RunnerError("docker_unavailable", f"asked for its version, the engine answers {response.status}")
        try:
            return msgspec.json.decode(body, type=Version)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise RunnerError("engine_garbage", "what answers at the engine's socket is no Docker Engine") from None

    def _gone(self, error: RunnerError) -> None:
        if self.there is False:
            return
        had = self.there
        self.there = False
        self._gone_at = asyncio.get_running_loop().time()
        log.error(
            "the engine %s: %s; requests for it fail until it is back: %s",
            "has gone" if had else "is not there",
            error.message,
            REMEDIES.get(error.code, REMEDY),
            extra={"fields": {"code": error.code, "engine": self._path}},
        )

    def _came(self, version: Version) -> None:
        was_gone = self.there is False
        self.there = True
        fields = {
            "engine": self._path,
            "engine_version": version.version,
            "api_version": version.api_version,
            "min_api_version": version.min_api_version,
            "platform": f"{version.os}/{version.arch}",
        }
        if was_gone:
            fields["away_s"] = f"{asyncio.get_running_loop().time() - self._gone_at:.0f}"
        name = version.components[0].name if version.components else ""
        log.info(
            "the engine is %s: %s %s, API %s",
            "back" if was_gone else "there",
            name or "Engine",
            version.version,
            version.api_version,
            extra={"fields": fields},
        )
