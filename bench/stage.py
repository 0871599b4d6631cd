"""What a run makes on the engine, under a label of its own, and takes away again."""

import http.client
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.exchange import BenchError, connect
from bench.subjects import BEFORE, ENGINE, HAPROXY_DELAYING, Subject, bridge, haproxy, runner
from dev import busybox
from dev.engine import Engine

LABEL = "docker-runner.bench"


class Stage:
    """An engine, the subjects in front of it, and the containers that they are asked about."""

    def __init__(self, engine: str, folder: Path, subjects: Sequence[Subject], before: Path | None = None) -> None:
        self.engine = engine
        self.folder = folder
        self.subjects = subjects
        self.before = before
        self.mark = secrets.token_hex(4)
        self.image = f"docker-runner-bench-{self.mark}:latest"
        self.box = cache(self.sleeper)
        self.listed = cache(self._listed)

    def subject(self, name: str) -> Subject:
        """One of the subjects, by its name."""
        return next(subject for subject in self.subjects if subject.name == name)

    def ask(self, method: str, target: str, body: Any = None) -> Any:
        """One request to the engine itself; its JSON, if that is what it answers. Raises BenchError."""
        connection = http.client.HTTPConnection("bench")
        connection.sock = connect(self.engine)
        with closing(connection):
            sent = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, target, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status >= 300:
                raise BenchError(f"{method} {target}: {answer.status} {content!r}")
            return json.loads(content) if content.startswith((b"{", b"[")) else content

    def create(self, *command: str, group: str = "", **fields: Any) -> str:
        """A container of our own, not started; its id. `group` is the value of its label."""
        config = {
            "Image": self.image,
            "Cmd": command,
            "Labels": {LABEL: group or self.mark},
            "HostConfig": {"NetworkMode": "none"},
        }
        identity: str = self.ask("POST", "/containers/create", {**config, **fields})["Id"]
        return identity

    def sleeper(self) -> str:
        """A running container that only sleeps. `box` is one for all that leaves no traces in it, as execs do."""
        container = self.create("sleep", "1000000")
        self.ask("POST", f"/containers/{container}/start")
        return container

    def _listed(self, count: int) -> str:
        """The target of a list of so many containers, all of them stopped."""
        group = f"{self.mark}-{count}"
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: self.create("true", group=group), range(count)))
        return f"/containers/json?all=1&filters={_filters(group)}"

    def clear(self) -> None:
        """Remove what was made, whatever else is on the engine."""
        containers = self.ask("GET", f"/containers/json?all=1&filters={_filters(None)}")
        ours = [each["Id"] for each in containers if each["Labels"][LABEL].startswith(self.mark)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda identity: self.ask("DELETE", f"/containers/{identity}?force=1&v=1"), ours))
        self.ask("DELETE", f"/images/{self.image}?force=1")


def _filters(group: str | None) -> str:
    return quote(json.dumps({"label": [LABEL if group is None else f"{LABEL}={group}"]}))


@contextmanager
def stage(engine: str, before: Path | None = None) -> Iterator[Stage]:
    """All subjects in front of an engine, and an image to make containers of.

    Args:
        engine: path of the engine's socket.
        before: another checkout, whose runner takes part too.
    """
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="dr-bench-", dir=os.getenv("TMPDIR", "/var/tmp")))
        )
        ours = stack.enter_context(runner(engine, folder))
        subjects = [
            Subject(ENGINE, engine),
            stack.enter_context(haproxy(engine, folder)),
            stack.enter_context(haproxy(engine, folder, HAPROXY_DELAYING)),
            ours,
            stack.enter_context(bridge(ours, folder)),
        ]
        if before is not None:
            subjects.append(stack.enter_context(runner(engine, folder, BEFORE, before)))
        made = Stage(engine, folder, subjects, before)
        busybox.import_image(Engine(engine), made.image)
        stack.callback(made.clear)
        yield made
