"""A runner on a clock of the test's own, and containers that it minds: what the tests of expiry stand on.

Nothing waits for a time to pass. That something stays is seen at a `witness`: another container, idle, whose time is
over; when that is gone, the runner has decided on both.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from clocked import Ahead

from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from leases import INSTANCE, TTL
from service import Answer, Runner
from wire import Wire

TAR = b"\0" * 1024
TTL_S = 1000
LIMIT_S = 20
JSON = {"Content-Type": "application/json"}


class Minded:
    """A runner on a clock of the test's own, and containers that it minds.

    Args:
        engine_socket: of the engine.
        folder: for its files.
        image: of the containers.
        names: theirs.
        environ: further settings.
    """

    def __init__(
        self, engine_socket: str, folder: Path, image: str, names: Names, environ: Mapping[str, str] | None = None
    ) -> None:
        self.engine = EngineDirect(engine_socket)
        self.names = names
        self.image = image
        self.clock = Ahead(folder / f"clock-{secrets.token_hex(4)}")
        self.audit = folder / f"audit-{secrets.token_hex(4)}"
        self.settings = {
            "DOCKER_RUNNER_INSTANCE": f"test-{secrets.token_hex(6)}",
            "DOCKER_RUNNER_EXPIRY_INTERVAL_MS": "100",
            "DOCKER_RUNNER_LOG_LEVEL": "debug",
            **self.clock.environ,
            **(environ or {}),
        }
        self._socket = engine_socket
        self.start()

    def start(self) -> None:
        with self.audit.open("ab") as out:
            self.runner = Runner(self._socket, self.settings, program="tests/clocked.py", output=out.fileno())
        self.wire = Wire(self.runner.url, self.runner.secret)

    @property
    def instance(self) -> str:
        return self.settings["DOCKER_RUNNER_INSTANCE"]

    def make(self, ttl_s: int | None = TTL_S, **fields: Any) -> str:
        """Starts a container by the runner face, waits until its time runs, and returns its id."""
        labels = {**self.names.labels, **fields.pop("labels", {})}
        usual = {"image": self.image, "cmd": ["sleep", "1d"], "networkMode": "none", "autoRemove": False}
        extras = {"StopSignal": "SIGKILL", **fields.pop("createExtras", {})}
        if ttl_s is not None:
            usual["ttlSeconds"] = ttl_s
        reply = self.wire.post("/v1/containers/start", **{**usual, **fields, "createExtras": extras, "labels": labels})
        assert reply.status == 200, reply.body
        id_: str = reply.json["containerId"]
        if ttl_s is not None:
            self.wait_minded(id_)
        return id_

    def create(self, *, start: bool = True, **body: Any) -> str:
        """Makes a container by the engine itself; returns its id."""
        labels = {**self.names.labels, **body.pop("Labels", {})}
        usual = {"Image": self.image, "Cmd": ["sleep", "1d"], "StopSignal": "SIGKILL", "Labels": labels}
        host = {"NetworkMode": "none"}
        made = self.engine.request("POST", "/containers/create", json={**usual, "HostConfig": host, **body})
        assert made.status_code == 201, made.text
        id_: str = made.json()["Id"]
        if start:
            assert self.engine.request("POST", f"/containers/{id_}/start").status_code == 204
        return id_

    def own(self, ttl_s: int = TTL_S) -> dict[str, str]:
        """Labels as somebody sets them by hand."""
        return {INSTANCE: self.instance, TTL: str(ttl_s)}

    def wait_minded(self, id_: str) -> None:
        self.runner.wait_for_log(f"container {id_[:12]} has a time to live")

    def forward(self, seconds: float) -> None:
        self.clock.forward(seconds)

    def is_there(self, id_: str) -> bool:
        return self.engine.request("GET", f"/containers/{id_}/json").status_code == 200

    def is_running(self, id_: str) -> bool:
        state = self.engine.request("GET", f"/containers/{id_}/json").json()["State"]
        return bool(state["Running"])

    def wait_gone(self, *ids: str) -> None:
        for id_ in ids:
            assert wait_until(lambda id_=id_: not self.is_there(id_), LIMIT_S), "".join(self.runner.log)  # type: ignore[misc]

    def age(self, id_: str) -> None:
        """Let time pass until it is gone; the end of a use is noted a little later than it is answered."""

        def gone() -> bool:
            self.forward(TTL_S + 1)
            return not self.is_there(id_)

        assert wait_until(gone, LIMIT_S), "".join(self.runner.log)

    def line(self, id_: str) -> dict[str, Any]:
        """The one line of the audit log on the removal of a container."""

        def lines() -> list[dict[str, Any]]:
            found = [json.loads(line) for line in self.audit.read_text().splitlines()]
            return [line for line in found if line.get("operation") == "Expiry" and line["object"] == id_]

        assert wait_until(lambda: bool(lines()), 10)
        (line,) = lines()
        return line

    def ask(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] = JSON) -> Answer:
        return self.runner.request(method, target, body, headers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expiry")


@pytest.fixture(scope="module")
def minded(engine: Engine, folder: Path, image: str, names: Names) -> Iterator[Minded]:
    minded = Minded(engine.socket, folder, image, names)
    yield minded
    assert minded.runner.stop() == 0
    assert "Traceback" not in "".join(minded.runner.log)


def exec_of(minded: Minded, box: str, **more: Any) -> str:
    """An exec, made by the engine itself."""
    config = {"Cmd": ["cat"], "AttachStdin": True, "AttachStdout": True, **more}
    made = minded.engine.request("POST", f"/containers/{box}/exec", json=config)
    assert made.status_code == 201, made.text
    id_: str = made.json()["Id"]
    return id_
