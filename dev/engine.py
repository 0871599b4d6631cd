"""An engine: where one answers, and the few requests that the set-up itself makes.

Kept apart from the runner's own engine client on purpose: this one needs nothing installed, and blocks.
"""

import contextlib
import http.client
import socket
from collections.abc import Iterator, Mapping

DEFAULT_SOCKET = "/var/run/docker.sock"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)


class Engine:
    """An engine at a Unix socket. `private` says that it is ours to stop."""

    private = False

    def __init__(self, socket: str) -> None:
        self.socket = socket

    def request(self, method: str, target: str, body: bytes | None = None, timeout_s: float = 60) -> tuple[int, bytes]:
        """One request; returns status and body. Raises OSError or http.client.HTTPException where nothing answers."""
        connection = _UnixConnection(self.socket, timeout_s)
        try:
            # An engine that refuses a body may not read it to the end; its answer, which says why, is there still.
            with contextlib.suppress(BrokenPipeError):
                connection.request(method, target, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether an engine answers `GET /_ping` (within 5 s)."""
        try:
            status, _ = self.request("GET", "/_ping", timeout_s=5)
        except (OSError, http.client.HTTPException):
            return False
        return status == 200


def configured_socket(settings: Mapping[str, str]) -> str | None:
    """The socket that a setting names outright, in the runner's own order."""
    return settings.get("DOCKER_SOCKET") or settings.get("DOCKER_RUNNER_SOCKET") or None


def _candidates(settings: Mapping[str, str]) -> Iterator[str]:
    configured = configured_socket(settings)
    if configured:
        yield configured  # and no other: an engine that nobody asked for would be a surprise
        return
    scheme, _, path = settings.get("DOCKER_HOST", "").partition("://")
    if scheme == "unix" and path:
        yield path
    yield DEFAULT_SOCKET


def find_engine(settings: Mapping[str, str]) -> Engine | None:
    """The engine that the settings lead to, if one answers there.

    `DOCKER_SOCKET` or `DOCKER_RUNNER_SOCKET` if set, else the first that answers of `DOCKER_HOST` (`unix://` only)
    and `/var/run/docker.sock`.
    """
    return next((engine for engine in map(Engine, _candidates(settings)) if engine.answers()), None)
