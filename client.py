"""docker-runner client: the signing recipe, and the whole wire protocol for Python programs.
To vendor it, copy this one file (Python 3.11+, Linux or macOS, standard library only); `__version__` says which it is.
Every request is signed: X-DR-Timestamp (milliseconds since the epoch), X-DR-Nonce (1 to 128 visible ASCII characters,
never used twice), X-DR-Signature = base64(HMAC-SHA256(secret, METHOD \\n TARGET \\n TIMESTAMP \\n NONCE \\n BODYHASH));
METHOD in upper case, TARGET the path with its query as sent, BODYHASH base64(SHA-256(body)). The runner verifies by the
same recipe. `http.client` and `ssl` load slowly: imported when needed. Kept under 500 lines, hence its rows.
"""

# fmt: off
import base64
import contextlib
import hashlib
import hmac
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    from ssl import SSLContext
__all__ = ["EMPTY_BODY_HASH", "STREAMING", "body_hash", "chunk_signature", "sign", "signature", "signed_chunk"]
__all__ += ["ExecResult", "ExecSession", "LogRecord", "Response", "RunnerClient", "RunnerClientError", "string_to_sign"]
__version__ = "0.1.0"

def body_hash(body: bytes) -> str:
    """BODYHASH of a body's raw bytes: base64 of their SHA-256."""
    return base64.b64encode(hashlib.sha256(body).digest()).decode("ascii")
EMPTY_BODY_HASH = body_hash(b"")
STREAMING = "STREAMING-HMAC-SHA256"  # BODYHASH of a body that comes as signed chunks
MAX_CHUNK = 1024 * 1024  # bytes of data in one signed chunk, at most
MAX_MESSAGE = 128 * 1024 * 1024  # security limit: bytes of one message of a feed or a session
Body = bytes | BinaryIO | Iterable[bytes]
Env = Mapping[str, str] | Sequence[str]
Auth = Mapping[str, str] | None
Message = dict[str, Any]
Item = tuple[Any, int, str, bool]  # of a feed: what is given out, its time in ns, its stream, whether it ends a line
def string_to_sign(method: bytes, target: bytes, timestamp: bytes, nonce: bytes, content_hash: bytes) -> bytes:
    """The canonical string: the five parts, a newline between them (none of them can hold one)."""
    return b"\n".join((method, target, timestamp, nonce, content_hash))
def signature(secret: bytes, message: bytes) -> bytes:
    """base64 of the HMAC-SHA256 of `message` (a `string_to_sign`) under `secret`."""
    return base64.b64encode(hmac.digest(secret, message, "sha256"))
def chunk_signature(secret: bytes, previous: bytes, digest: bytes) -> bytes:
    """Of a chunk with this SHA-256: 32 bytes; `previous` is that of the chunk before, or of the request, raw."""
    return hmac.digest(secret, b"docker-runner chunk\n" + previous + digest, "sha256")
def signed_chunk(secret: bytes, previous: bytes, data: bytes) -> bytes:
    """One record: length (4 bytes, big-endian), signature (32: the next one's `previous`), data (none ends a body)."""
    return len(data).to_bytes(4, "big") + chunk_signature(secret, previous, hashlib.sha256(data).digest()) + data
def sign(
    secret: str, method: str, target: str, body: bytes = b"", *, key: str | None = None,
    content_hash: str | None = None, timestamp_ms: int | None = None, nonce: str | None = None,
) -> dict[str, str]:
    """The headers that sign one request, `target` and `body` exactly as they will be sent; `key`: a named key's name.
    `content_hash`: BODYHASH of a body that is sent separately (`body` is ignored then), for the runner to verify first.
    """
    timestamp = str(time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms)
    nonce = os.urandom(16).hex() if nonce is None else nonce
    parts = (method.upper(), target, timestamp, nonce, body_hash(body) if content_hash is None else content_hash)
    signed = signature(secret.encode(), string_to_sign(*map(str.encode, parts))).decode("ascii")
    headers = {"X-DR-Timestamp": timestamp, "X-DR-Nonce": nonce, "X-DR-Signature": signed, "X-DR-Key": key}
    return {n: v for n, v in {**headers, "X-DR-Content-SHA256": content_hash}.items() if v is not None}

class RunnerClientError(Exception):
    """A refusal or failure: `status` (HTTP's; 0: no answer), `code`, `message`, `retryable`, `details` (for machines).
    Codes: the runner's, `unreachable` (nothing was sent), `timeout` and `connection_lost` (it may have happened),
    `protocol_error`, `body_failed`, `gap`, `http_error` (the engine's own, a proxy's). Retryable: nothing is left."""
    def __init__(self, told: Mapping[str, Any], status: int = 0) -> None:
        self.status, self.code = int(told.get("status", status)), str(told.get("code", "http_error"))
        self.message, self.retryable = str(told.get("message")), told.get("retryable") is True
        self.details, self.retry_after_s = dict[str, Any](told.get("details") or {}), int(told.get("after", 0))
        super().__init__(f"{self.message} ({self.code}, status {self.status})")
    def wait(self, tried: int, tries: int, *, safe: bool) -> int:  # Before the next try, if there is to be one.
        if tried >= tries or not safe:
            raise self
        time.sleep(max(min(self.retry_after_s, 60), min(0.1 * 2**tried, 5) * (0.5 + os.urandom(1)[0] / 510)))
        return tried + 1

ExecResult = NamedTuple("ExecResult", [("stdout", str), ("stderr", str), ("exit_code", int)])  # noqa: UP014
LogRecord = NamedTuple("LogRecord", [("stream", str), ("data", bytes), ("timestamp", str)])  # noqa: UP014
"""A line of a log with its end, or 16 KiB of a longer one; `stream` is `stdout` (all of a TTY's) or `stderr`."""
@contextlib.contextmanager
def _translated() -> Iterator[None]:
    from http.client import HTTPException
    try:
        yield
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        lost = "timeout" if isinstance(error, TimeoutError) else "connection_lost"
        code = lost if isinstance(error, (OSError, HTTPException)) else "protocol_error"
        raise RunnerClientError({"code": code, "message": f"the exchange failed: {error!r}"}) from error
def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the wire names them; those that are None are left out."""
    words = ((name.split("_"), value) for name, value in given.items() if value is not None)
    return {first + "".join(map(str.capitalize, rest)): value for (first, *rest), value in words}
def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
def _target(path: str, given: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else _json(value) for name, value in _named(given).items()}
    return f"{path}?{urlencode(texts, quote_via=quote, safe='')}" if texts else path

class Response(contextlib.AbstractContextManager["Response"]):
    """An answer: `status`, `headers` (lower-case names), `body`; of `stream`: iterate. Broken off, it raises."""
    def __init__(self, connection: Any) -> None:
        self.connection, self.http, self.body, self.last_id = connection, connection.getresponse(), b"", ""
        self.status, self.headers = int(self.http.status), {n.lower(): str(v) for n, v in self.http.getheaders()}
    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            while piece := self.body or self.http.read1(65536):
                self.body = b""
                yield piece
            if self.http.length:
                raise ConnectionResetError(f"{self.http.length} bytes of the answer are missing")
    def __exit__(self, *exc: object) -> None:
        self.connection.close()
    def error(self) -> RunnerClientError:
        """What an answer of 400 and above says; its code is `http_error` if it is not the runner's own."""
        told: dict[str, Any] = {"message": self.body[:500].decode("utf-8", "replace")}
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(self.body)
            told |= found["error"] if isinstance(found.get("error"), dict) else {"message": found["message"]}
        after = self.headers.get("retry-after", "")
        return RunnerClientError({**told, "after": after if after.isdecimal() else 0}, self.status)
    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages of server-sent events, up to the one that ends or breaks them; `last_id`: that of the last."""
        if self.status != 200:
            raise self.error()
        with _translated():
            data, id_ = b"{}", b""
            while line := self.http.readline(MAX_MESSAGE):
                id_ = line[3:] if line.startswith(b"id:") else id_
                data = line[5:] if line.startswith(b"data:") else data
                if line.strip():
                    continue
                message, data, self.last_id, id_ = json.loads(data), b"{}", id_.decode().strip() or self.last_id, b""
                if message.get("type") == "error":
                    raise RunnerClientError(message, self.status)
                if message.get("type") == "end":
                    return
                yield message
            raise ConnectionResetError("the feed broke off")

def log_items(messages: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """The records of a log asked with timestamps: frames of stream, three zeros, length (4 bytes, big-endian), time,
    space, text; with a TTY time, space, text up to a newline or 16 KiB. What bears no time belongs to the last one."""
    from datetime import datetime
    held, stamp, time_ns = bytearray(), "", 0
    for data in itertools.chain((str(m["data"]) for m in messages if m.get("type") == "chunk"), ("",)):
        held += base64.b64decode(data)
        while held:
            start, size = 8, 8 + int.from_bytes(held[4:8], "big")
            if held[0] > 3:
                longest = held.find(b" ", 0, 40) + 1 + 16384
                start, size = 0, held.find(b"\n", 0, longest) + 1 or (longest if data else len(held))
            if len(held) < max(start, size):
                break
            stream, line = "stderr" if held[0] in (2, 3) else "stdout", bytes(held[start:size])
            del held[:size]
            first, _, text = line.partition(b" ")
            try:
                whole = datetime.fromisoformat(first.decode()).replace(microsecond=0)
                fraction = first[20:].rstrip(b"Z").partition(b"+")[0] if first[19:20] == b"." else b""
                time_ns = int(whole.timestamp()) * 10**9 + int(fraction.ljust(9, b"0")[:9])
                stamp = first.decode()
            except ValueError:
                text = line
            yield LogRecord(stream, text, stamp), time_ns, stream, text.endswith(b"\n")
def frame(opcode: int, payload: bytes) -> bytes:
    """A client's frame, masked, of at most 65,535 bytes (RFC 6455, section 5)."""
    size, mask = len(payload), os.urandom(4)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    masked = int.from_bytes(payload, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return bytes((0x80 | opcode,)) + length + mask + masked.to_bytes(size, "big")
def frames(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """The server's whole messages and control frames, (opcode, payload), up to the close or the transport's end."""
    opcode, message = 0, bytearray()
    while len(head := read(2)) == 2:
        first, size = head
        expected = ((0x00, 0x80) if opcode else (0x01, 0x02, 0x81, 0x82)) + ((0x88, 0x89, 0x8A) if size < 126 else ())
        size = int.from_bytes(read(2 if size == 126 else 8), "big") if size in (126, 127) else size
        if first not in expected or head[1] > 127 or size + len(message) > MAX_MESSAGE:
            raise ValueError(f"no WebSocket frame begins with {head.hex()}, or it is too long")
        if len(payload := read(size)) < size or first == 0x88:
            return
        if first >= 0x88:
            yield first & 0x0F, payload
            continue
        opcode = opcode or first & 0x0F
        message += payload
        if first & 0x80:
            yield opcode, bytes(message)
            opcode, message = 0, bytearray()

class ExecSession(contextlib.AbstractContextManager["ExecSession"]):
    """An interactive exec: iterate for (`stdout` or `stderr`, bytes), while others may send; `exec_id`, `exit_code`."""
    def __init__(self, answer: Response) -> None:
        self._answer, self._lock, self._frames = answer, threading.Lock(), frames(answer.http.fp.read)
        self.exec_id, self.exit_code = "", cast(int | None, None)
        list(self)  # Stops at the first message, which tells the id.
    def send(self, data: bytes) -> None:
        """Input for the process; waits while it does not read."""
        for at in range(0, len(data), 32768):
            self._send(2, data[at : at + 32768])
    def eof(self) -> None:
        self._send(1, b'{"type":"eof"}')
    def resize(self, cols: int, rows: int) -> None:
        self._send(1, _json({"type": "resize", "cols": cols, "rows": rows}))
    def close(self, *exc: object) -> None:
        """Hang up, from any thread, whether the process has ended or not."""
        with contextlib.suppress(OSError):
            self._answer.connection.sock.shutdown(socket.SHUT_RDWR)  # Wakes whoever reads.
        self._answer.connection.close()
    __exit__ = close
    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        with _translated():
            for opcode, payload in self._frames:
                told: dict[str, Any] = json.loads(payload) if opcode == 1 else {"type": opcode}
                match told.get("type"):
                    case "stdout" | "stderr" as stream:
                        yield stream, base64.b64decode(told["data"])
                    case "ready":
                        self.exec_id = told["execId"]
                        return
                    case "exit":
                        self.exit_code = told["exitCode"]
                    case "error":
                        raise RunnerClientError(told)
                    case 9 if not self._lock.locked():  # A sender at work is a sign of life as well.
                        self._send(10, payload)
            if self.exit_code is None:
                raise ConnectionResetError("the session ended without an exit code")
    def _send(self, opcode: int, payload: bytes) -> None:
        with self._lock, _translated():
            self._answer.connection.sock.sendall(frame(opcode, payload))

class RunnerClient:
    """A runner; any number of threads may ask it, each call has a connection of its own.
    `url`: http, https, or http+unix with a path, percent-encoded or plain. `key`: the secret's name, if it has one.
    Seconds (None: no limit, or 60 of a feed's silence): `connect_s`; `read_s` for an answer to begin and go on;
    `pull_s` where an image may have to be pulled; `stream_s` for silence of feeds, sessions, commands. `retries`: how
    often what is safe to ask again (no connection was made, or a `retryable` refusal and a body of bytes) is."""
    def __init__(
        self, url: str, secret: str, *, key: str | None = None, ssl_context: "SSLContext | None" = None,
        connect_s: float | None = 5, read_s: float | None = 60, pull_s: float | None = 1800,
        stream_s: float | None = None, retries: int = 3,
    ) -> None:
        self._url, self._secret, self._key, self._ssl, self.retries = urlsplit(url), secret, key, ssl_context, retries
        self.connect_s, self.read_s, self.pull_s, self.stream_s = connect_s, read_s, pull_s, stream_s
        if self._url.scheme not in ("http", "https", "http+unix"):
            raise ValueError(f"no URL of a runner: {url}")
    def request(self, method: str, target: str, body: Body = b"", **options: Any) -> Response:
        """A whole answer; arguments and errors as `stream`."""
        with self.stream(method, target, body, **options) as answer:
            answer.body = b"".join(answer)
            return answer
    def stream(
        self, method: str, target: str, body: Body = b"", *, headers: Mapping[str, str] | None = None,
        timeout_s: float | None = 0, retries: int | None = None, accept: Sequence[int] = (),
    ) -> Response:
        """Any request of either face (`target`: path and query), signed; the answer's body is still to come.
        A `body` that is not bytes goes as signed chunks, in constant memory. The engine's answer is returned, whatever
        its status; a refusal of the runner's is raised, but for the statuses of `accept`. `timeout_s` 0: `read_s`."""
        tried, limit_s = 0, self.read_s if timeout_s == 0 else timeout_s
        while True:
            try:
                answer = self._ask(method, target, body, headers or {}, limit_s)
                if answer.status < 400:
                    return answer
                with answer:
                    answer.body = b"".join(answer)
                error = answer.error()
                if error.code == "http_error" or (error.status in accept and error.code != "not_found"):
                    return answer
            except RunnerClientError as failure:
                error = failure
            safe = error.retryable and (isinstance(body, bytes) or error.code == "unreachable")
            tried = error.wait(tried, self.retries if retries is None else retries, safe=safe)
    def _ask(self, method: str, target: str, body: Body, headers: Mapping[str, str], limit_s: float | None) -> Response:
        from http.client import HTTPConnection, HTTPSConnection
        whole, unix = body if isinstance(body, bytes) else b"", self._url.scheme == "http+unix"
        secure: Any = {"context": self._ssl} if self._url.scheme == "https" else {}
        kind: Any = HTTPSConnection if secure else HTTPConnection
        connection = kind(self._url.hostname or "-", None if unix else self._url.port, timeout=self.connect_s, **secure)
        try:
            if unix:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(self.connect_s)
                connection.sock.connect(unquote(self._url.netloc + self._url.path))
            else:
                connection.connect()
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            connection.close()
            again = not isinstance(error, ValueError)  # A wrong certificate, which is a ValueError too, stays wrong.
            told = {"code": "unreachable", "message": f"{self._url.geturl()}: {error}", "retryable": again}
            raise RunnerClientError(told) from error
        hashed = STREAMING if whole is not body else body_hash(whole) if len(whole) > MAX_CHUNK else None
        signed = sign(self._secret, method, target, whole, key=self._key, content_hash=hashed)
        chunked = {} if whole is body else {"Transfer-Encoding": "chunked"}
        sent = self._chunks(body, base64.b64decode(signed["X-DR-Signature"])) if chunked else whole or None
        try:
            connection.sock.settimeout(limit_s)
            with contextlib.suppress(OSError):  # Refused in its midst? Then the answer says why; if there is one.
                target = target if unix else self._url.path.rstrip("/") + target
                connection.request(method, target, sent, {**headers, **signed, **chunked}, encode_chunked=True)
            with _translated():
                return Response(connection)
        except BaseException:
            connection.close()
            raise
    def _chunks(self, body: Any, previous: bytes) -> Iterator[bytes]:
        try:
            for piece in iter(lambda: body.read(MAX_CHUNK), b"") if hasattr(body, "read") else body:
                for at in range(0, len(piece), MAX_CHUNK):
                    yield (record := signed_chunk(self._secret.encode(), previous, piece[at : at + MAX_CHUNK]))
                    previous = record[4:36]
        except OSError as error:  # Of the file: not to be taken for one of the connection.
            raise RunnerClientError({"code": "body_failed", "message": f"the body cannot be read: {error}"}) from error
        yield signed_chunk(self._secret.encode(), previous, b"")
    def _call(
        self, path: str, given: Mapping[str, Any], method: str = "POST", *,
        accept: Sequence[int] = (), timeout_s: float | None = 0,
    ) -> Any:
        """One request of the runner face: its JSON, or its status where there is none."""
        target, body = (path, _json(_named(given))) if method == "POST" else (_target(path, given), b"")
        headers = {"Content-Type": "application/json"}
        answer = self.request(method, target, body, headers=headers, accept=accept, timeout_s=timeout_s)
        if answer.status >= 400 and answer.status not in accept:
            raise answer.error()
        with _translated():
            return json.loads(answer.body) if answer.status == 200 else answer.status
    def health(self) -> None:
        self._call("/v1/health", {}, "GET")
    def ready(self) -> None:
        self._call("/v1/ready", {}, "GET")
    def inspect(self, container_id: str) -> dict[str, Any]:
        return dict(self._call("/v1/containers/inspect", {"container_id": container_id}, "GET"))
    def labels(self, container_id: str) -> dict[str, str]:
        return dict(self._call("/v1/containers/labels", {"container_id": container_id}, "GET")["labels"])
    def networks(self, container_id: str) -> list[str]:
        return list(self._call("/v1/containers/networks", {"container_id": container_id}, "GET")["networks"])
    def find_by_labels(self, labels: Mapping[str, str], *, stopped: bool = False) -> list[str]:
        """Ids of the containers with all of these labels, oldest first; `stopped`: stopped ones too."""
        return list(self._call("/v1/containers/findByLabels", {"labels": labels, "all": stopped})["containerIds"])
    def list_by_volume(self, volume_name: str) -> list[str]:
        """Ids of the containers that mount the volume, stopped ones too."""
        return list(self._call("/v1/containers/listByVolume", {"volume_name": volume_name}, "GET")["containerIds"])
    def remove_volume(self, volume_name: str, *, force: bool = False) -> int:
        """204; 404 or 409 as the engine says."""
        return int(self._call("/v1/volumes/remove", {"volume_name": volume_name, "force": force}, accept=(404, 409)))
    def touch(self, container_id: str) -> None:
        self._call("/v1/containers/touch", {"container_id": container_id})
    def stop(self, container_id: str, *, timeout_sec: int = 10) -> int:
        """204; 304 (it does not run), 404, 409 as the engine says."""
        given, limit_s = {"container_id": container_id, "timeout_sec": timeout_sec}, (self.read_s or 60) + timeout_sec
        return int(self._call("/v1/containers/stop", given, accept=(404, 409), timeout_s=limit_s))
    def remove(self, container_id: str, *, force: bool = False, remove_volumes: bool = False) -> int:
        """204; 404 or 409 as the engine says."""
        given = {"container_id": container_id, "force": force, "remove_volumes": remove_volumes}
        return int(self._call("/v1/containers/remove", given, accept=(404, 409)))
    def exec_resize(self, exec_id: str, *, cols: int, rows: int) -> None:
        self._call("/v1/exec/resize", {"exec_id": exec_id, "size": {"cols": cols, "rows": rows}})
    def ensure_image(self, image: str, *, platform: str | None = None, auth: Auth = None) -> None:
        """Have the image on the engine, pulled if need be."""
        self._call("/v1/images/ensure", {"image": image, "platform": platform, "auth": auth}, timeout_s=self.pull_s)
    def ensure_image_progress(self, image: str, *, platform: str | None = None, auth: Auth = None) -> Iterator[Message]:
        """As `ensure_image`, begun by the first step of iteration, which gives the engine's progress."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        body = _json(_named({"image": image, "platform": platform, "auth": auth}))
        with self.stream("POST", "/v1/images/ensure", body, headers=headers, timeout_s=self.pull_s) as answer:
            yield from (message["event"] for message in answer.messages() if message.get("type") == "progress")
    def start(
        self, image: str | None = None, *, name: str | None = None, cmd: Sequence[str] | None = None,
        entrypoint: str | None = None, env: Env | None = None, working_dir: str | None = None,
        auto_remove: bool | None = None, binds: Sequence[str] | None = None, network_mode: str | None = None,
        tty: bool | None = None, labels: Mapping[str, str] | None = None, platform: str | None = None,
        privileged: bool | None = None, anonymous_volumes: Sequence[str] | None = None,
        create_extras: Mapping[str, Any] | None = None, ttl_seconds: int | None = None,
    ) -> str:
        """Ensure the image, create and start a container; its id. A failed start leaves nothing behind."""
        given = {name: value for name, value in locals().items() if name != "self"}
        return str(self._call("/v1/containers/start", given, timeout_s=self.pull_s)["containerId"])
    def put_archive(self, container_id: str, path: str, archive: Body) -> None:
        """Unpack a tar in a folder of a container; bytes on the runner face, else on the engine face, in any size."""
        if isinstance(archive, bytes):
            tar = base64.b64encode(archive).decode()
            self._call("/v1/containers/putArchive", {"container_id": container_id, "path": path, "payload_base64": tar})
        else:
            target = _target(f"/containers/{quote(container_id, safe='')}/archive", {"path": path})
            answer = self.request("PUT", target, archive, headers={"Content-Type": "application/x-tar"})
            if answer.status >= 400:
                raise answer.error()
    def exec_run(
        self, container_id: str, command: str | Sequence[str], *, workdir: str | None = None, env: Env | None = None,
        timeout_ms: int | None = None, idle_timeout_ms: int | None = None, tty: bool | None = None,
        kill_on_timeout: bool | None = None, log_to_pid1: bool | None = None, kill_on_disconnect: bool | None = None,
    ) -> ExecResult:
        """Run a command (a string: by a shell) to its end; 504 at a time limit, its output so far in `details`."""
        options = {name: value for name, value in locals().items() if name not in ("self", "container_id", "command")}
        limit_s = timeout_ms / 1000 + self.read_s if timeout_ms and self.read_s else self.stream_s
        given = {"container_id": container_id, "command": command, "options": _named(options)}
        told = self._call("/v1/exec/run", given, timeout_s=limit_s)
        return ExecResult(told["stdout"], told["stderr"], told["exitCode"])
    def exec_interactive(
        self, container_id: str, command: str | Sequence[str], *, workdir: str | None = None, tty: bool | None = None,
        demux: bool | None = None, env: Env | None = None, kill_on_disconnect: bool | None = None,
    ) -> ExecSession:
        """A command (a string: by a shell) with its input and output; `tty`: with a terminal."""
        argv = ["/bin/sh", "-lc", command] if isinstance(command, str) else list(command)
        given = {"workdir": workdir, "tty": tty, "demux": demux, "env": env, "kill_on_disconnect": kill_on_disconnect}
        target = _target("/v1/exec/interactive/ws", {"container_id": container_id, "command": argv, **given})
        key = base64.b64encode(os.urandom(16)).decode()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        answer = self.stream("GET", target, headers={**headers, "Sec-WebSocket-Key": key}, timeout_s=self.stream_s)
        try:
            accept = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
            if answer.headers.get("sec-websocket-accept") != base64.b64encode(accept).decode():
                raise answer.error()
            return ExecSession(answer)
        except BaseException:
            answer.__exit__()
            raise
    def logs(
        self, container_id: str, *, follow: bool = True, since_ns: int | None = None, tail: int | None = None,
        stdout: bool = True, stderr: bool = True, tries: int = 10,
    ) -> Generator[LogRecord, None, None]:
        """A container's log, asked for at once, and again when it breaks off, up to `tries` times without getting on.
        Nothing is lost or repeated but what the engine rotated away meanwhile; lines whose streams overtook one another
        by over a second; with `tail`, lines logged before the first came or in its very nanosecond. With a TTY, text
        like the engine's timestamps, at the beginning of a line or after 16 KiB of one, is taken for one."""
        given = {"container_id": container_id, "follow": follow, "stdout": stdout, "stderr": stderr, "timestamps": True}
        begin = since_ns or 0 if tail is None else self._now() if tail == 0 else None
        feed = self._follow("/v1/containers/logs/sse", given, {"tail": tail}, since_ns, begin, log_items, tries)
        next(feed)
        return feed
    def events(
        self, *, since_ns: int | None = None, filters: Mapping[str, Sequence[str]] | None = None, tries: int = 10,
        on_gap: Callable[[Message], object] | None = None,
    ) -> Generator[Message, None, None]:
        """The engine's events (of containers, unless `filters` says otherwise), asked for at once, each once, in order.
        Broken off, they resume. Where some may be missing (it remembers 256, and none when it was restarted), `on_gap`
        is told, or without one an error raised (`gap`): look at what is there anew, then go on, or ask again."""
        given = {"filters": filters and base64.b64encode(_json(filters)).decode()}
        begin = self._now() if since_ns is None else since_ns
        def items(messages: Iterable[Any]) -> Iterator[Item]:
            for told in messages:
                if told.get("type") == "gap" and not on_gap:
                    raise RunnerClientError({**told, "code": "gap"}, 200)
                if told.get("type") == "gap" and on_gap:
                    on_gap(told)
                elif told.get("type") == "event":
                    yield told["event"], told["event"]["timeNano"], "", True
        feed = self._follow("/v1/events/sse", given, {}, since_ns, begin, items, tries)
        next(feed)
        return feed
    def _now(self) -> int | None:
        """The engine's time in ns, to the second before."""
        from email.utils import parsedate_to_datetime
        date = self.request("GET", "/_ping").headers.get("date")
        return None if date is None else int(parsedate_to_datetime(date).timestamp()) * 10**9
    def _follow(
        self, path: str, given: Mapping[str, Any], first: Mapping[str, Any], since: int | None, begin: int | None,
        items: Callable[[Any], Iterator[Item]], tries: int,
    ) -> Generator[Any, None, None]:
        """The items of a feed, after None when it is open. The engine gives them in the same order each time, but not
        strictly in that of their times: streams overtake one another, and all parts of a long line bear the first's.
        So it is asked again from a second or more before the last, and before a line that has not ended; `places`: such
        times, and how many items from there on are known (`guess`: the time is ours). With ids, the last says it."""
        places, newest, within, tried, opened = [] if begin is None else [(begin, 0)], 0, set[str](), 0, False
        answer, seen, guess = cast(Response | None, None), dict[str, str](), since is None and bool(begin)
        while True:
            seen = {"Last-Event-ID": answer.last_id} if answer and answer.last_id else seen
            began, skip = time.monotonic(), places[0][1] if places and not seen else 0
            if opened and places:
                first, since = {}, places[0][0]
            seconds, retries = since if since is None else f"{since // 10**9}.{since % 10**9:09}", 0 if opened else None
            target = _target(path, {**given, **first, "since": seconds})
            try:
                with self.stream("GET", target, headers=seen, timeout_s=self.stream_s or 60, retries=retries) as answer:
                    if not opened:
                        opened = True
                        yield None
                    for item, at, stream, whole in items(answer.messages()):
                        if skip and at <= newest:
                            skip -= at >= places[0][0]
                            continue
                        if guess or not places or (at > max(newest, places[-1][0] + 10**9) and not within):
                            places, guess = [*(() if guess else places[-1:]), (at, 0)], False
                        places = [(time_ns, count + (at >= time_ns)) for time_ns, count in places]
                        (within.discard if whole else within.add)(stream)
                        skip, tried, newest = 0, 0, max(newest, at)
                        yield item
                return
            except RunnerClientError as error:
                safe = opened and (not error.status or error.retryable or error.code == "shutting_down")
                tried = error.wait(0 if time.monotonic() - began > 10 else tried, tries, safe=safe)
