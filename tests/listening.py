"""A client of `/v1/events/sse` that minds the format to the letter; an engine's socket whose connections can be cut."""

import base64
import contextlib
import http.client
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from client import sign
from dev import wait_until
from scripted import Peer, ScriptedEngine
from service import SECRET

PATIENCE_S = 20


def events_of(container: str, *actions: str) -> str:
    """The target of the events of one container; by default of the creation of its execs."""
    filters = {"type": ["container"], "container": [container], "event": list(actions) or ["exec_create"]}
    return "/v1/events/sse?filters=" + base64.urlsafe_b64encode(json.dumps(filters).encode()).decode().rstrip("=")


class Listener:
    """One stream of events, read by a thread of its own. A context manager: leaving it hangs up.

    Args:
        port: of the runner on loopback.
        target: the request target.
        last_event_id: what the client has seen last.
        headers: further ones.
        secret, key: that sign.
    """

    def __init__(
        self,
        port: int,
        target: str,
        last_event_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        secret: str = SECRET,
        key: str | None = None,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        """In the order they came."""
        self.comments = 0
        self.last_id = last_event_id
        self.ended = False
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        given = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        signed = sign(secret, "GET", target, key=key)
        self._connection.request("GET", target, headers={**signed, **given, **(headers or {})})
        self._sock = self._connection.sock
        self._response = self._connection.getresponse()
        assert self._response.status == 200, self._response.read()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        """As the HTML standard says, section "Server-sent events": the id counts once its block is complete."""
        data, id_ = b"", None
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while line := self._response.readline():
                name, _, value = line.rstrip(b"\n").partition(b": ")
                if line == b"\n":
                    self.last_id = id_ or self.last_id
                    if data:
                        self.messages.append(json.loads(data))
                    data, id_ = b"", None
                elif name == b"data":
                    data += value
                elif name == b"id":
                    id_ = value.decode()
                else:
                    assert not name, line  # A comment.
                    self.comments += 1
        self.ended = True

    def until(self, condition: Callable[[Self], bool], what: str = "a message") -> Self:
        """Wait for something to have come."""
        assert wait_until(lambda: condition(self), PATIENCE_S), f"waited for {what}; came: {self.messages[-5:]}"
        return self

    def execs(self) -> list[str]:
        """The ids of the execs that were told of, in order."""
        return [
            message["event"]["Actor"]["Attributes"]["execID"]
            for message in self.messages
            if message["type"] == "event" and message["event"]["Action"].startswith("exec_create")
        ]

    def types(self) -> list[str]:
        """Of all messages but events."""
        return [message["type"] for message in self.messages if message["type"] != "event"]

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def cuttable(engine_socket: str) -> Iterator[ScriptedEngine]:
    """A way to a real engine. `stop` cuts every connection, and none can be made until `listen`."""

    def relay(peer: Peer) -> None:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(engine_socket)
            ends = {peer.sock: engine, engine: peer.sock}
            while True:
                for sock in select.select(list(ends), [], [], PATIENCE_S)[0]:
                    if not (data := sock.recv(1 << 16)):
                        return
                    ends[sock].sendall(data)

    with ScriptedEngine(relay) as way:
        yield way
