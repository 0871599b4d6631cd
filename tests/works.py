"""Real tools used twice, at the engine's own socket and at the bridge's, and what docs/bridge.md says of them.

A test hands `Sides.same` a scenario: what a program of that tool's users does, as the tool's own documentation shows
it. The scenario runs at the engine, then at the bridge, each time with names of its own; what it returns must be the
same but for what `alike` takes out. `shows` ties a test to a row of that page's table of what works.
"""

import contextlib
import itertools
import re
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

from conftest import Names

TIME_LIMIT_S = 60
"""For one run of a scenario: what hangs fails, and says where it hung."""

TOOLS = {
    "docker-py": "docker (Python)",
    "aiodocker": "aiodocker",
    "dockerode": "dockerode (Node.js)",
    "testcontainers": "testcontainers (Python)",
    "compose": "docker-compose 1.29",
}
ROWS: dict[str, str] = {}
"""What works, in Markdown, by `tool: key`; each tool's module of tests adds its own. See `row`."""
SHOWN: dict[str, set[str]] = {}
"""The keys of `ROWS` by the test that shows them; filled when the test files are imported."""

_Test = TypeVar("_Test", bound=Callable[..., None])
_Client = TypeVar("_Client")
_Result = TypeVar("_Result")


def row(key: str, text: str) -> str:
    """A row of the page's table: `key` is `tool: topic`, the text says what of it works. Returns the key."""
    assert key.partition(": ")[0] in TOOLS
    ROWS[key] = text
    return key


def shows(*keys: str) -> Callable[[_Test], _Test]:
    """Declares the rows that a test shows."""
    assert set(keys) <= set(ROWS)

    def declare(test: _Test) -> _Test:
        SHOWN[f"{test.__module__}.{test.__qualname__}"] = set(keys)
        return test

    return declare


def rows_of(tool: str) -> list[str]:
    """The rows of a tool, of the modules that were imported."""
    return [text for key, text in ROWS.items() if key.startswith(f"{tool}: ")]


class Side(Generic[_Client]):
    """The engine or the bridge, as a scenario sees it.

    `host` is what `DOCKER_HOST` takes, `client` the tool's client of it, if it has one that lives longer than a
    scenario.
    """

    def __init__(self, host: str, client: _Client, names: Names, mark: str) -> None:
        self.host = host
        self.client = client
        self.labels = names.labels
        self._names = names
        self._mark = mark
        self._numbers = itertools.count(1)
        self._base = ""

    def begin(self, base: str) -> None:
        """A scenario begins: `base` is what its names begin with."""
        self._base = f"{base}{self._mark}"
        self._numbers = itertools.count(1)

    def name(self) -> str:
        """A fresh name for something on the engine; the other side's is as long."""
        return f"{self._base}{next(self._numbers)}"

    @property
    def names_begin_with(self) -> str:
        """What the names of the running scenario begin with."""
        return self._base


class Sides(Generic[_Client]):
    """The engine and the bridge. `make` makes the tool's client of a host."""

    def __init__(self, engine: str, bridge: str, names: Names, make: Callable[[str], _Client]) -> None:
        self._names = names
        self.engine = Side(engine, make(engine), names, "e")
        self.bridge = Side(bridge, make(bridge), names, "b")

    def same(
        self,
        scenario: Callable[[Side[_Client]], _Result],
        view: Callable[[_Result], object] = lambda result: result,
    ) -> _Result:
        """Runs the scenario at both; what it returns, seen through `view`, is alike. Returns the bridge's."""
        base = self._names("t")
        seen = []
        for side in (self.engine, self.bridge):
            side.begin(base)
            with time_limit(TIME_LIMIT_S):
                result = scenario(side)
            seen.append(alike(view(result), side.names_begin_with))
        difference = first_difference(*seen)
        assert not difference, difference
        return result


def alike(value: Any, names_begin_with: str) -> Any:
    """A result without what must differ between two runs: names, ids, digests, times."""
    if isinstance(value, dict):
        return {alike(key, names_begin_with): alike(item, names_begin_with) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [alike(item, names_begin_with) for item in value]
    if isinstance(value, bytes):
        return alike(value.decode("latin-1"), names_begin_with)
    if isinstance(value, str):
        return _TIME.sub("TIME", _ID.sub("ID", value.replace(names_begin_with, "NAME")))
    return value


def first_difference(engine: Any, bridge: Any, where: str = "the result") -> str:
    """Where two results begin to differ, in words; empty if they are equal."""
    if engine == bridge:
        return ""
    if isinstance(engine, list) and isinstance(bridge, list) and len(engine) == len(bridge):
        items = enumerate(zip(engine, bridge, strict=True))
        return next(filter(None, (first_difference(*pair, f"{where}[{index}]") for index, pair in items)))
    if isinstance(engine, dict) and isinstance(bridge, dict) and engine.keys() == bridge.keys():
        return next(filter(None, (first_difference(engine[key], bridge[key], f"{where}[{key!r}]") for key in engine)))
    return f"{where} differs:\n  bridge: {repr(bridge)[:2000]}\n  engine: {repr(engine)[:2000]}"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread where the body takes longer, whatever it waits for."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_ID = re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b")
_TIME = re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?(Z|[+-]\d\d:?\d\d))?")
