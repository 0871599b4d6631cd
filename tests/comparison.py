"""The engine's answer and the runner's answer to the same question, side by side.

`Both.same` asks both the same, for what changes nothing. `Both.twins` asks the engine about one of two equal objects
and the runner about the other, for what does. What may differ between twins is said in one place, `_alike`.
"""

import http.client
import json
import re
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import pytest
import requests

import operations
from conftest import EngineDirect, Names
from service import Runner, signed_head

HOP_BY_HOP = frozenset(("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"))
RUNNERS_OWN = "x-request-id"
"""The one header that the runner adds to what the engine answers."""
OF_EACH_ANSWER = {"date": "a date", "x-reference-id": "an id"}
"""Headers of the engine that differ from answer to answer, and what stands for their values; the second is Podman's."""
TWIN = "TWIN"
"""Stands in a target or body for the name of the twin that is asked about."""
JSON = {"Content-Type": "application/json"}

_ATTEMPTS = 30
_Test = TypeVar("_Test", bound=Callable[..., None])


class Seen(NamedTuple):
    """What of an answer must be the engine's: status, headers (sorted, names lower-cased), body."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """The value of a header, by its lower-case name."""
        return dict(self.headers).get(name)


SHOWN: dict[str, set[str]] = {}
"""Operation ids by the test that compares them; filled when the test files are imported."""


def compares(*ids: str) -> Callable[[_Test], _Test]:
    """Declares the operations that a test compares. The fixture `both` (see `asking`) holds the test to it."""

    def declare(test: _Test) -> _Test:
        SHOWN[f"{test.__module__}.{test.__qualname__}"] = set(ids)
        return test

    return declare


def asking(request: pytest.FixtureRequest, runner: Runner, direct: EngineDirect) -> Iterator["Both"]:
    """The body of a fixture `both`: after the test, what it declared with `compares` must really have been compared."""
    both = Both(runner, direct)
    yield both
    declared = SHOWN.get(f"{request.function.__module__}.{request.function.__qualname__}", set())
    assert declared <= both.compared, f"declared, but not compared: {declared - both.compared}"


class Both:
    """Asks the engine and the runner."""

    def __init__(self, runner: Runner, direct: EngineDirect) -> None:
        self.runner = runner
        self.direct = direct
        self.compared: set[str] = set()

    def engine(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Seen:
        """Ask the engine. The body is read as it travels, compressed or not."""
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        with self.direct.request(method, target, data=body, headers=headers, stream=True) as response:
            return _seen(response.status_code, _fields(response), response.raw.read(decode_content=False))

    def through(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Seen:
        """Ask the runner."""
        self.compared.add(operations.decide(method.encode(), target.encode()).id)
        if body is None and method in ("POST", "PUT"):
            body = b""  # As requests does it for the engine: a stated length of 0.
        answer = self.runner.request(method, target, body, {"Accept-Encoding": "identity", **(headers or {})})
        return _seen(answer.status, answer.headers, answer.body)

    def same(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        view: Callable[[Seen], object] = lambda seen: seen,
    ) -> Seen:
        """Both give the same answer; returns the runner's.

        The engine may be shared and is a moving thing (uptimes, other containers, the order of what was made in one
        second), so a difference counts only if the engine itself does not give that answer either, asked many times.
        """
        return self._same(
            lambda: self.engine(method, target, body, headers),
            lambda: self.through(method, target, body, headers),
            view,
        )

    def same_raw(self, method: str, target: str, *fields: str) -> Seen:
        """As `same`, with a target that no HTTP client would send as it stands."""
        lines = [f"{method} {target} HTTP/1.1", "Host: docker", "Connection: close", *fields]
        plain = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

        def engine() -> Seen:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(20)
            sock.connect(self.runner.engine_socket)
            return exchange(sock, plain, method)

        def through() -> Seen:
            self.compared.add(operations.decide(method.encode(), target.encode()).id)
            return exchange(
                self.runner.connect(), signed_head(method, target, b"", "Connection: close", *fields), method
            )

        return self._same(engine, through, lambda seen: seen)

    def twins(
        self,
        method: str,
        target: str,
        pair: tuple[str, str],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        view: Callable[[Seen], object] = lambda seen: seen,
    ) -> Seen:
        """The engine does it to the one, the runner to the other, and the answers are alike; returns the runner's.

        `TWIN` in target and body stands for the one that is asked about.
        """
        first, second = pair
        engine = self.engine(method, target.replace(TWIN, first), _of(body, first), headers)
        through = self.through(method, target.replace(TWIN, second), _of(body, second), headers)
        _equal(view(_alike(through, second)), view(_alike(engine, first)))
        return through

    def _same(self, engine: Callable[[], Seen], through: Callable[[], Seen], view: Callable[[Seen], object]) -> Seen:
        before = view(engine())
        seen = through()
        for _ in range(_ATTEMPTS):
            if view(seen) == before:
                return seen
            seen, before = through(), view(engine())
        _equal(view(seen), before)
        return seen


def exchange(sock: socket.socket, request: bytes, method: str = "GET") -> Seen:
    """Send a raw request, read one answer, close."""
    with sock:
        sock.sendall(request)
        response = http.client.HTTPResponse(sock, method=method)
        response.begin()
        return _seen(response.status, response.getheaders(), response.read())


def http_chunks(runner: Runner, method: str, target: str, body: bytes = b"") -> Generator[bytes, None, None]:
    """The chunks of the runner's chunked 200, as they are cut on the wire."""
    with runner.connect() as sock, sock.makefile("rb") as stream:
        sock.sendall(signed_head(method, target, body) + body)
        status, *fields = iter(stream.readline, b"\r\n")
        assert status.split()[1] == b"200"
        assert b"transfer-encoding: chunked\r\n" in [field.lower() for field in fields]
        while size := int(stream.readline(), 16):
            yield stream.read(size)
            stream.readline()


def in_any_order(seen: Seen) -> tuple[int, list[tuple[str, str]], list[bytes]]:
    """A view of a JSON list that the engine orders by seconds: its bytes, cut between the items, sorted."""
    return seen.status, seen.headers, sorted(seen.body.strip(b"[]\n").split(b"},{"))


def progress(seen: Seen) -> tuple[int, list[tuple[str, str]], list[Any], dict[str, Any]]:
    """A view of a progress stream: the lines that belong to no layer, and of each layer the last.

    How many lines a layer gets in between depends on how fast it comes: the engine leaves some out.
    """
    assert seen.body.endswith(b"\n")
    lines = [json.loads(line) for line in seen.body.splitlines()]
    last = {line["id"]: line for line in lines if "id" in line}
    return seen.status, seen.headers, [line for line in lines if "id" not in line], last


def shape(value: object) -> object:
    """A JSON value with its numbers and times taken out: which keys there are, and what kind of value each has."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


class Containers:
    """Makes containers on the engine itself; they are killed at once when stopped, and removed with the session."""

    def __init__(self, direct: EngineDirect, names: Names, image: str) -> None:
        self._direct = direct
        self._names = names
        self.base = {
            "Image": image,
            "Labels": names.labels,
            "StopSignal": "SIGKILL",
            "HostConfig": {"NetworkMode": "none"},
        }

    def __call__(self, *command: str, start: bool = True, name: str = "", **config: Any) -> str:
        """A container that runs the command (by default one that does not end); returns its name."""
        name = name or self._names("c")
        config = {**self.base, "Cmd": command or ["sleep", "1d"], **config}
        self.do("POST", f"/containers/create?name={name}", 201, json=config)
        if start:
            self.do("POST", f"/containers/{name}/start", 204)
        return name

    def pair(self, *command: str, **config: Any) -> tuple[str, str]:
        """Two alike; their names are of one length."""
        name = self._names("c")
        return self(*command, name=f"{name}a", **config), self(*command, name=f"{name}b", **config)

    def ended(self, *command: str, **config: Any) -> str:
        """A container whose command has ended."""
        name = self(*command, **config)
        self.do("POST", f"/containers/{name}/wait", 200)
        return name

    def exec(self, name: str, *command: str, **config: Any) -> str:
        """An exec in a running container, not started; returns its id."""
        body = {"AttachStdout": True, "AttachStderr": True, "Cmd": command, **config}
        found: str = self.do("POST", f"/containers/{name}/exec", 201, json=body)["Id"]
        return found

    def do(self, method: str, target: str, status: int, **kw: Any) -> Any:
        """A step of a test's set-up, taken on the engine itself."""
        response = self._direct.request(method, target, **kw)
        assert response.status_code == status, response.text
        one_document = response.headers.get("Content-Type") == "application/json" and response.content.count(b"\n") == 1
        return response.json() if one_document else None


def twin_names(names: Names, kind: str) -> tuple[str, str]:
    """Two fresh names of one length."""
    name = names(kind)
    return f"{name}a", f"{name}b"


def _equal(runner: object, engine: object) -> None:
    assert runner == engine, f"\n  runner: {runner!r}\n  engine: {engine!r}"


def _fields(response: requests.Response) -> list[tuple[str, str]]:
    return list(response.raw.headers.items())  # With a name that stands twice as two.


def _seen(status: int, fields: list[tuple[str, str]], body: bytes) -> Seen:
    kept = [(name.lower(), value) for name, value in fields if name.lower() not in HOP_BY_HOP]
    kept = [field for field in kept if field[0] != RUNNERS_OWN]
    return Seen(status, sorted((name, OF_EACH_ANSWER.get(name, value)) for name, value in kept), body)


def _of(body: bytes | None, twin: str) -> bytes | None:
    return None if body is None else body.replace(TWIN.encode(), twin.encode())


_ID = re.compile(rb"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b")
_TIME = re.compile(rb"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)|\d{18,20}\b")


def _alike(seen: Seen, twin: str) -> Seen:
    """An answer without what must differ between twins: the twin's name, ids, times, and (with those) the length.

    That a stated length is that of the body was checked before it goes.
    """
    length = seen.header("content-length")
    if length is not None and seen.body:
        assert int(length) == len(seen.body)
    fields = [(name, "its length" if name == "content-length" else value) for name, value in seen.headers]
    body = seen.body.replace(twin.encode(), TWIN.encode())
    return Seen(seen.status, fields, _TIME.sub(b"TIME", _ID.sub(b"ID", body)))
