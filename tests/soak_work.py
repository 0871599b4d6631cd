"""What callers do in a soak: each of them some operation at random, for as long as it goes, well or badly behaved.

Whatever an answer is, it must be one of those that the operation may have in a world where the engine comes and goes.
What a caller knows of it, it writes into the `Ledger`: which containers are there, and which must be gone.
"""

import contextlib
import io
import json
import random
import secrets
import socket
import struct
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from client import RunnerClient, RunnerClientError
from service import Runner, signed_head

LABEL = "docker-runner.soak"
AWAY = frozenset(
    (
        "unreachable",
        "timeout",
        "connection_lost",
        "http_error",
        "server_error",
        "too_many_requests",
        "too_many_streams",
        "exec_failed",
        "start_failed",
        "stop_failed",
        "remove_failed",
        "image_ensure_failed",
        "logs_failed",
        "events_failed",
        "docker_unavailable",
        "engine_socket_missing",
        "engine_refused",
        "engine_connect_timeout",
        "engine_busy",
        "engine_timeout",
        "engine_cut_head",
        "engine_cut_body",
    )
)
"""Codes that an engine which comes and goes, or many callers at once, bring about."""
ELSEWHERE = frozenset(
    (
        "put_archive_failed",
        "no_such_container",
        "container_stopped_paused",
        "conflict",
        "no_such_exec",
        "no_such_volume",
    )
)
"""Codes that another caller brings about, who has the same container."""


CUT_SHORT = (126, 137)
"""Exit codes of an exec whose container was removed by another caller: it could not begin, or it was killed."""


class Ledger:
    """What the callers know. Its methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()
        self.unexpected: list[str] = []
        self.gone: set[str] = set()
        """Names of containers that must not be there at the end."""
        self.there: dict[str, str] = {}
        """Ids by name."""
        self.doubtful: set[str] = set()
        """Names of containers that may be there: what became of the request was not told."""
        self.left: set[str] = set()
        """Ids of containers in which an exec may still run, as the runner said, or could not say."""
        self.abandoned: list[tuple[float, str]] = []
        """When an exec was left alone, and the id of its container; it is ended unless the engine was away."""

    def note(self, operation: str, error: RunnerClientError | None = None, allowed: frozenset[str] = AWAY) -> None:
        with self._lock:
            if error is None:
                self.done[operation] += 1
            else:
                self.failed[operation, error.code] += 1
                if error.code not in allowed:
                    self.unexpected.append(f"{operation}: {error.status} {error.code}: {error.message}")

    def started(self, name: str, container: str) -> None:
        with self._lock:
            self.there[name] = container

    def not_started(self, name: str, error: RunnerClientError) -> None:
        with self._lock:
            (self.gone if error.retryable and error.code != "unreachable" else self.doubtful).add(name)

    def removed(self, name: str, *, surely: bool) -> None:
        with self._lock:
            self.there.pop(name, None)
            (self.gone if surely else self.doubtful).add(name)

    def may_run(self, container: str) -> None:
        with self._lock:
            self.left.add(container)

    def abandon(self, container: str) -> None:
        with self._lock:
            self.abandoned.append((time.time(), container))

    def any(self, chance: random.Random) -> tuple[str, str] | None:
        """Name and id of a container that is there."""
        with self._lock:
            return chance.choice(list(self.there.items())) if self.there else None


class Caller(threading.Thread):
    """One caller.

    Args:
        runner: whom it asks.
        image: that containers are made of.
        ledger: what all know.
        seed: of its choices.
        ended: when to stop.
    """

    def __init__(self, runner: Runner, image: str, ledger: Ledger, seed: int, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self._runner = runner
        self._image = image
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._ended = ended
        self._client = RunnerClient(runner.url, runner.secret, read_s=30, stream_s=30, retries=0)

    def run(self) -> None:
        while not self._ended.is_set():
            operation, weight = self._chance.choice(OPERATIONS)
            if self._chance.random() > weight:
                continue
            name = operation.__name__
            try:
                operation(self)
            except RunnerClientError as error:
                self._ledger.note(name, error, AWAY | ELSEWHERE)
                self._ended.wait(0.05)
            except (OSError, StopIteration) as error:
                self._ledger.note(name, RunnerClientError({"code": "unreachable", "message": repr(error)}))
                self._ended.wait(0.05)
            except Exception as error:  # A defect: of the soak, or of the client.
                self._ledger.unexpected.append(f"{name}: {error!r}"[:500])
            else:
                self._ledger.note(name)

    # Containers come and go.

    def start_container(self) -> None:
        if len(self._ledger.there) >= 12:
            return
        name = f"soak-{secrets.token_hex(6)}"
        try:
            made = self._client.start(
                self._image,
                name=name,
                cmd=["sleep", "1d"],
                network_mode="none",
                labels={LABEL: "1"},
                auto_remove=self._chance.random() < 0.5,
            )
        except RunnerClientError as error:
            self._ledger.not_started(name, error)
            raise
        self._ledger.started(name, made)

    def start_what_expires(self) -> None:
        name = f"soak-{secrets.token_hex(6)}"
        try:
            self._client.start(
                self._image,
                name=name,
                cmd=["sleep", "1d"],
                network_mode="none",
                labels={LABEL: "1"},
                auto_remove=False,
                ttl_seconds=1,
                create_extras={"StopSignal": "SIGKILL"},
            )
        except RunnerClientError as error:
            self._ledger.not_started(name, error)
            raise
        self._ledger.removed(name, surely=True)

    def remove_container(self) -> None:
        if len(self._ledger.there) > 4 and (found := self._ledger.any(self._chance)):
            try:
                self._client.remove(found[1], force=True, remove_volumes=True)
            except RunnerClientError as error:
                self._ledger.removed(found[0], surely=error.code == "no_such_container")
                raise
            self._ledger.removed(found[0], surely=True)

    def start_what_cannot(self) -> None:
        name = f"soak-{secrets.token_hex(6)}"
        try:
            self._client.start(self._image, name=name, cmd=["/no/such"], network_mode="none", labels={LABEL: "1"})
        except RunnerClientError as error:
            self._ledger.not_started(name, error)
            self._ledger.note("start_what_cannot", error, AWAY | {"bad_parameter"})
        else:
            self._ledger.unexpected.append("a container was started without a program")

    # Execs.

    def _container(self) -> str:
        found = self._ledger.any(self._chance)
        return found[1] if found else "no-such-container"

    def exec_run(self) -> None:
        number = self._chance.randrange(20_000)
        done = self._client.exec_run(self._container(), f"head -c {number} /dev/zero; exit 3", timeout_ms=30_000)
        assert done.exit_code in CUT_SHORT or (len(done.stdout), done.exit_code) == (number, 3), done

    def exec_past_its_limit(self) -> None:
        container = self._container()
        command = self._chance.choice(("sleep 9001", "(setsid sleep 9002 &); sleep 9003", "trap '' TERM; sleep 9004"))
        try:
            self._client.exec_run(container, command, timeout_ms=200)
        except RunnerClientError as error:
            if error.code not in ("exec_timeout", *ELSEWHERE) or "mayStillRun" in error.details:
                self._ledger.may_run(container)
            self._ledger.note("exec_past_its_limit", error, AWAY | ELSEWHERE | {"exec_timeout"})

    def exec_left_alone(self) -> None:
        container = self._container()
        given = {"containerId": container, "command": "sleep 9005", "options": {"killOnDisconnect": True}}
        body = json.dumps(given).encode()
        with self._runner.connect() as sock:
            sock.sendall(signed_head("POST", "/v1/exec/run", body, "Content-Type: application/json") + body)
            time.sleep(self._chance.random() * 0.3)  # Leaves at any point of it.
            if self._chance.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._ledger.abandon(container)

    def exec_interactive(self) -> None:
        with self._client.exec_interactive(self._container(), ["cat"], kill_on_disconnect=True) as one:
            one.send(b"said\n")
            if self._chance.random() < 0.3:
                return
            one.eof()
            said = b"".join(data for _, data in one)
            assert one.exit_code in CUT_SHORT or said == b"said\n", (one.exit_code, said)

    # The rest.

    def look_around(self) -> None:
        self._client.find_by_labels({LABEL: "1"}, stopped=True)
        container = self._container()
        self._client.inspect(container)
        self._client.labels(container)
        self._client.touch(container)

    def upload(self) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("soak")
            entry.size = self._chance.randrange(300_000)
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
        whole = archive.getvalue()
        self._client.put_archive(self._container(), "/tmp", whole if self._chance.random() < 0.5 else io.BytesIO(whole))

    def follow_logs(self) -> None:
        with contextlib.closing(self._client.logs(self._container(), follow=False, tries=1)) as records:
            for _ in records:
                pass

    def pull(self) -> None:
        self._client.ensure_image(self._image)

    def engine_face(self) -> None:
        name = f"soak-{secrets.token_hex(6)}"
        body = json.dumps({"Name": name, "Labels": {LABEL: "1"}}).encode()
        headers = {"Content-Type": "application/json"}
        for method, target, given in (
            ("GET", "/_ping", b""),
            ("GET", "/containers/json?all=1", b""),
            ("POST", "/volumes/create", body),
            ("DELETE", f"/volumes/{name}?force=1", b""),
        ):
            self._client.request(method, target, given, headers=headers if given else {})

    # Who is not well behaved.

    def break_off(self) -> None:
        head = signed_head("GET", self._chance.choice(("/events", "/containers/json", "/v1/events/sse")), b"")
        with self._runner.connect() as sock:
            sock.sendall(head[: self._chance.randrange(1, len(head) + 1)])
            time.sleep(self._chance.random() * 0.1)  # Leaves at any point of it.

    def never_read(self) -> None:
        target = self._chance.choice(("/events", "/v1/events/sse", f"/containers/{self._container()}/stats"))
        with self._runner.connect() as sock:
            sock.sendall(signed_head("GET", target))
            self._ended.wait(self._chance.random() * 5)

    def stranger(self) -> None:
        answer = self._runner.raw(b"GET /containers/json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 503 ")), answer[:100]

    def half_a_body(self) -> None:
        with self._runner.connect() as sock:
            body = bytes(200_000)
            sock.sendall(signed_head("POST", "/images/load", body) + body[: self._chance.randrange(len(body))])

    def many_connections(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(self._runner.connect())


OPERATIONS: tuple[tuple[Callable[[Caller], Any], float], ...] = (
    (Caller.start_container, 1),
    (Caller.remove_container, 0.7),
    (Caller.start_what_cannot, 0.2),
    (Caller.start_what_expires, 0.2),
    (Caller.exec_run, 1),
    (Caller.exec_past_its_limit, 0.5),
    (Caller.exec_left_alone, 0.5),
    (Caller.exec_interactive, 1),
    (Caller.look_around, 1),
    (Caller.upload, 0.5),
    (Caller.follow_logs, 0.5),
    (Caller.pull, 0.5),
    (Caller.engine_face, 1),
    (Caller.break_off, 1),
    (Caller.never_read, 0.2),
    (Caller.stranger, 0.5),
    (Caller.half_a_body, 0.5),
    (Caller.many_connections, 0.1),
)
"""What a caller does, and how willingly."""
