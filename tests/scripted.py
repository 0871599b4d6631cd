"""A scripted engine: a Unix socket that does exactly what a test says, for faults that a real engine does not produce.

A script is a function that is run for every connection, in a thread of its own, with a `Peer`: it reads what it wants,
sends the bytes it wants cut as it wants, waits for an event of the test, closes, or goes away without a word. When it
returns, the connection is closed as the kernel closes it: with a reset if bytes are left unread, else without.

    with ScriptedEngine(lambda peer: peer.answer(OK)) as engine: ...
"""

import contextlib
import fcntl
import re
import select
import socket
import struct
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE_S = 10
"""A script that waits longer than this for its peer has found a defect."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def chunked(*pieces: bytes, last: bool = True) -> bytes:
    """Pieces in the chunked transfer coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if last else b"")


class Peer:
    """The engine's end of one connection; `number` counts them from 1."""

    def __init__(self, engine: "ScriptedEngine", sock: socket.socket, number: int) -> None:
        self.engine = engine
        self.number = number
        self.sock = sock
        sock.settimeout(PATIENCE_S)
        self._unparsed = b""

    def read_head(self) -> bytes:
        """One request's head, and nothing after it; empty if the caller closed instead."""
        return self._read_through(b"\r\n\r\n")

    def _read_through(self, mark: bytes) -> bytes:
        data = b""
        while not data.endswith(mark):
            seen = self.sock.recv(1 << 16, socket.MSG_PEEK)
            if not seen:
                return b""
            end = (data + seen).find(mark)
            data += self.sock.recv(len(seen) if end < 0 else end + len(mark) - len(data))
        return data

    def read_request(self) -> bytes:
        """One whole request, recorded in `engine.requests`; empty if the caller closed instead."""
        head = self.read_head()
        if not head:
            return b""
        body = b""
        if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
            body = self.read_exactly(int(length[1]))
        elif re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
                size = self._read_through(b"\r\n")
                body += size + self.read_exactly(int(size or b"0", 16) + 2)
        with self.engine.changed:
            self.engine.requests.append(head + body)
            self.engine.changed.notify_all()
        return head + body

    def read_exactly(self, size: int) -> bytes:
        """So many bytes."""
        parts = []
        while size:
            part = self.sock.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError("the caller closed within a request")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def send(self, *cuts: bytes) -> None:
        """Send bytes, each argument in a write of its own, the next only when the caller has read the one before."""
        for cut in cuts:
            self.sock.sendall(cut)
            if len(cuts) > 1:
                self.drain()

    def drain(self) -> None:
        """Wait until the caller has read all that was sent (SIOCOUTQ: what it has not taken from its socket)."""
        self.engine.wait(lambda: _unread_by_peer(self.sock) == 0, "the caller to read")

    def answer(self, *cuts: bytes) -> None:
        """Answer every request of this connection with these bytes, until the caller closes it."""
        while self.read_request():
            self.send(*cuts)

    def wait_closed(self) -> None:
        """Wait until the caller has closed its end; a reset counts."""
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 16):
                pass

    def wait_hangup(self) -> None:
        """As `wait_closed`, without reading anything."""
        poll = select.poll()
        poll.register(self.sock, 0)  # A hang-up is always told.
        if not poll.poll(PATIENCE_S * 1000):
            raise TimeoutError("the caller did not close")

    def sees_close(self) -> bool:
        """As `wait_closed`, told to `engine.closed`."""
        self.wait_closed()
        self.engine.closed.set()
        return True


Script = Callable[[Peer], object]


class ScriptedEngine:
    """Listens in a folder of its own and runs a script for every connection. A context manager.

    Args:
        script: what it does; may be replaced between connections (`script` is an attribute).
        backlog: of the listener.
        accepts: whether it takes connections at all.
    """

    def __init__(self, script: Script, *, backlog: int = 128, accepts: bool = True) -> None:
        self.script = script
        self.requests: list[bytes] = []
        """Every whole request that was read, raw, in order."""
        self.connections = 0
        """How many connections were accepted."""
        self.open = 0
        """How many of them are open at this end."""
        self.most_open = 0
        self.failures: list[BaseException] = []
        """What went wrong within scripts; looked at when the engine ends."""
        self.go = threading.Event()
        """For scripts to wait for, and tests to set."""
        self.closed = threading.Event()
        """Set by `Peer.sees_close`."""
        self.changed = threading.Condition()
        self._folder = tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp")
        self.path = str(Path(self._folder.name) / "s")
        self._backlog = backlog
        self._accepts = accepts
        self._peers: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        """Begin to listen (again, after `stop`, at the same path)."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(self._backlog)
        if self._accepts:
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """As an engine that ends: no listener, no socket file, every connection closed."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
            Path(self.path).unlink()
        self.wait(self._shut_down, "the connections to end")

    def restart(self, script: Script) -> None:
        """Begin anew with another script, nothing recorded, every connection closed."""
        self.go.set()
        self.stop()
        self.go = threading.Event()
        self.closed = threading.Event()
        self.script = script
        self.requests = []
        self.connections = 0
        self.listen()

    def wait(self, condition: Callable[[], bool], what: str = "a condition") -> None:
        """Wait until something has come true."""
        deadline = time.monotonic() + PATIENCE_S
        with self.changed:
            while not condition():
                if time.monotonic() > deadline:
                    raise AssertionError(f"waited {PATIENCE_S} s for {what}")
                self.changed.wait(0.002)

    def targets(self) -> list[bytes]:
        """The targets of the requests that were read."""
        return [request.split(b" ", 2)[1] for request in self.requests]

    def _shut_down(self) -> bool:
        for sock in self._peers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        return self.open == 0

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self.changed:
                self.connections += 1
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                self._peers.append(sock)
                peer = Peer(self, sock, self.connections)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        try:
            self.script(peer)
        except ConnectionError:
            pass  # The caller went away.
        except BaseException as failure:
            self.failures.append(failure)
        finally:
            with self.changed:
                self._peers.remove(peer.sock)
                peer.sock.close()
                self.open -= 1
                self.changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go.set()
        try:
            self.stop()
        finally:
            self._folder.cleanup()
        if kind is None and self.failures:
            raise AssertionError("a script failed") from self.failures[0]


def _unread_by_peer(sock: socket.socket) -> int:
    found: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return found


@contextlib.contextmanager
def listener_that_never_accepts() -> Iterator[str]:
    """A socket with a full backlog; yields its path."""
    with ScriptedEngine(lambda peer: None, backlog=0, accepts=False) as engine, contextlib.ExitStack() as fillers:
        while True:
            filler = fillers.enter_context(socket.socket(socket.AF_UNIX))
            filler.setblocking(False)
            try:
                filler.connect(engine.path)
            except BlockingIOError:
                break
        yield engine.path
