"""An exec of /bin/true: created, its output read to the end, its exit code asked for.

The engine face is asked for each of the three; `/v1/exec/run` is one request for all. A stream is a connection of its
own, the other requests share one.
"""

import json
import os
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from socket import socket

from bench.exchange import SECRET, BenchError, ask, body_of, connect, drain, request
from bench.figures import Figures, Sizes
from bench.stage import Stage
from bench.subjects import BEFORE, RUNNER, Subject
from client import body_hash, frame, frames, sign

RUN = ", /v1/exec/run"
START = b'{"Detach":false,"Tty":false}'
COMMAND = ["/bin/true"]
PAUSE_S = 0.06
"""Before each exec. The engine clears one away after its answer, for some 30 ms; who came at once would share the
processor with that, and its figure would depend on whom it came after: 30 ms or 38, the engine's own 28 or 36."""


def execs(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """`ms` for each exec: the subjects take turns after every single one, since an exec takes as long as it likes."""
    container = stage.sleeper()
    with ExitStack() as stack:
        ways: dict[str, Callable[[], None]] = {}
        for subject in stage.subjects:
            sock = stack.enter_context(closing(connect(subject.address)))
            ways[subject.name] = partial(_by_engine_calls, subject, sock, container)
            if subject.name in (RUNNER, BEFORE):
                ways[subject.name + RUN] = partial(_by_one_request, sock, container)
        for _ in range(sizes.execs):
            for name, way in ways.items():
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                way()
                figures.add("exec of true", name, ms=(time.perf_counter() - started) * 1000)


def _by_one_request(sock: socket, container: str) -> None:
    body = json.dumps({"containerId": container, "command": COMMAND}).encode()
    answer = ask(sock, request("POST", "/v1/exec/run", body, signed=True))
    if json.loads(body_of(answer))["exitCode"] != 0:
        raise BenchError(f"the exec failed: {answer!r}")


def _by_engine_calls(subject: Subject, sock: socket, container: str) -> None:
    body = json.dumps({"AttachStdout": True, "AttachStderr": True, "Cmd": COMMAND}).encode()
    create = request("POST", f"/containers/{container}/exec", body, signed=subject.signed)
    identity = json.loads(body_of(ask(sock, create, b"201")))["Id"]
    start = _start_signed if subject.signed else _start
    start(subject, f"/exec/{identity}/start")
    answer = ask(sock, request("GET", f"/exec/{identity}/json", signed=subject.signed))
    if json.loads(body_of(answer))["ExitCode"] != 0:
        raise BenchError(f"the exec failed: {answer!r}")


def _start(subject: Subject, target: str) -> None:
    """Start it as tools do, and read to the end."""
    upgrade = ("Connection: Upgrade", "Upgrade: tcp")
    prepared = request("POST", target, START, signed=False, headers=upgrade)
    with closing(connect(subject.address)) as sock:
        drain(sock, [prepared], b"101", b"200")  # HAProxy upgrades no request that has a body


def _start_signed(subject: Subject, target: str) -> None:
    """The same at the runner, which has WebSockets for it."""
    signed = sign(SECRET, "GET", target, content_hash=body_hash(START))
    upgrade = {
        "Content-Type": "application/json",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Protocol": "docker-runner.stream.v1",
    }
    headers = tuple(f"{name}: {value}" for name, value in {**upgrade, **signed}.items())
    with closing(connect(subject.address)) as sock:
        sock.sendall(request("GET", target, signed=False, headers=headers))
        with sock.makefile("rb") as stream:
            if not (status := stream.readline()).startswith(b"HTTP/1.1 101"):
                raise BenchError(f"not upgraded: {status!r}")
            while stream.readline() not in (b"\r\n", b""):
                pass
            sock.sendall(frame(1, START))
            messages = [payload for opcode, payload in frames(stream.read) if opcode == 1]
        if not messages or json.loads(messages[0])["status"] != 101:
            raise BenchError(f"not started: {messages!r}")
