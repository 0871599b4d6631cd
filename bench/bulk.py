"""Execs and bulk: the engine directly, the runner (signed), the bridge before the runner, side by side.

    .venv/bin/python -m bench.bulk [--rounds 5] [--megabytes 64] [--socket /var/run/docker.sock]

An exec of `true` is created, started as an upgraded stream, read to its end and inspected. Bulk goes through an exec's
output, an archive's download and its upload (from the runner's callers: with the body's hash, and as signed chunks).
Rounds are interleaved; the ratios are what counts.
"""

import argparse
import base64
import functools
import http.client
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from websockets.sync.client import connect as connect_websocket
from websockets.typing import Subprotocol

from bench.peers import SECRET, bridge, connect, runner
from client import STREAMING, body_hash, sign, signed_chunk
from dev import busybox
from dev.engine import Engine

IMAGE = "docker-runner-bench:latest"
JSON = {"Content-Type": "application/json"}
START = b'{"Detach":false,"Tty":false}'


class Plain:
    """A peer that speaks the Engine API on a Unix socket: the engine, the bridge."""

    uploads: tuple[str, ...] = ("",)

    def __init__(self, address: Any) -> None:
        self._address = address

    def request(self, method: str, target: str, body: bytes = b"", form: str = "") -> tuple[int, int, bytes]:
        """One request: status, length of the answer's body, its beginning."""
        connection = http.client.HTTPConnection("bench")
        connection.sock = connect(self._address)
        headers, sent = self._prepared(method, target, body, form)
        connection.request(method, target, sent, {**JSON, **headers}, encode_chunked=form == STREAMING)
        response = connection.getresponse()
        start, size = response.read(65536), 0
        while piece := response.read(1 << 20):
            size += len(piece)
        connection.close()
        return response.status, size + len(start), start

    def _prepared(self, method: str, target: str, body: bytes, form: str) -> tuple[dict[str, str], Any]:
        return {}, body

    def start(self, execution: str) -> int:
        """Start an exec as an upgraded stream and read it to its end; bytes read."""
        with connect(self._address) as sock:
            sock.sendall(
                f"POST /exec/{execution}/start HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(START)}\r\n\r\n".encode()
                + START
            )
            size = 0
            while piece := sock.recv(1 << 20):
                size += len(piece)
            return size


class Signed(Plain):
    """The runner."""

    uploads = ("hash", STREAMING)

    def _prepared(self, method: str, target: str, body: bytes, form: str) -> tuple[dict[str, str], Any]:
        if form != STREAMING:
            return sign(SECRET, method, target, content_hash=body_hash(body)), body
        headers = sign(SECRET, method, target, content_hash=STREAMING)
        previous = base64.b64decode(headers["X-DR-Signature"])

        def records(previous: bytes) -> Iterator[bytes]:
            for at in range(0, len(body) + (1 << 18), 1 << 18):
                record = signed_chunk(SECRET.encode(), previous, body[at : at + (1 << 18)])
                previous = record[4:36]
                yield record

        return {**headers, "Transfer-Encoding": "chunked"}, records(previous)

    def start(self, execution: str) -> int:
        target = f"/exec/{execution}/start"
        headers = {**JSON, **sign(SECRET, "GET", target, content_hash=body_hash(START))}
        host, port = self._address
        with connect_websocket(
            f"ws://{host}:{port}{target}",
            additional_headers=headers,
            subprotocols=[Subprotocol("docker-runner.stream.v1")],
            compression=None,
            ping_interval=None,
            max_size=None,
            proxy=None,
        ) as stream:
            stream.send(START.decode())
            return sum(len(frame) for frame in stream if isinstance(frame, bytes))


def measure(peer: Plain, container: str, archive: bytes, megabytes: int) -> Iterator[tuple[str, float]]:
    """One round with one peer: (load, seconds)."""

    def timed(what: Callable[[], object]) -> float:
        started = time.perf_counter()
        what()
        return time.perf_counter() - started

    def execution(*command: str) -> int:
        body = json.dumps({"AttachStdout": True, "Cmd": command}).encode()
        status, _, answer = peer.request("POST", f"/containers/{container}/exec", body)
        assert status == 201, answer
        identity = json.loads(answer)["Id"]
        size = peer.start(identity)
        assert json.loads(peer.request("GET", f"/exec/{identity}/json")[2])["ExitCode"] == 0
        return size

    yield "exec true", timed(lambda: execution("true"))
    yield "exec output", timed(lambda: execution("head", "-c", str(megabytes << 20), "/tmp/bulk"))
    yield "download", timed(lambda: peer.request("GET", f"/containers/{container}/archive?path=/tmp/bulk"))
    for form in peer.uploads:
        upload = functools.partial(peer.request, "PUT", f"/containers/{container}/archive?path=/tmp", archive, form)
        yield "upload, signed chunks" if form == STREAMING else "upload", timed(upload)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--socket", default="/var/run/docker.sock", help="the engine's")
    options = parser.parse_args()
    content = os.urandom(options.megabytes << 20)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("bulk")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    archive = packed.getvalue()
    engine = Plain(options.socket)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        busybox.import_image(Engine(options.socket), IMAGE)
        stack.callback(engine.request, "DELETE", f"/images/{IMAGE}")
        config = {"Image": IMAGE, "Cmd": ["sleep", "100000"], "HostConfig": {"NetworkMode": "none"}}
        container = json.loads(engine.request("POST", "/containers/create", json.dumps(config).encode())[2])["Id"]
        stack.callback(engine.request, "DELETE", f"/containers/{container}?force=1")
        engine.request("POST", f"/containers/{container}/start")
        assert engine.request("PUT", f"/containers/{container}/archive?path=/tmp", archive)[0] == 200
        port = stack.enter_context(runner(options.socket))
        bridged = stack.enter_context(bridge(port, f"{folder}/bridge.sock"))
        peers = {"engine": engine, "runner": Signed(("127.0.0.1", port)), "bridge+runner": Plain(bridged)}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for name, peer in peers.items():
                for load, taken in measure(peer, container, archive, options.megabytes):
                    times.setdefault((load, name), []).append(taken)
    print(f"{'load':<24}{'peer':<15}{'median ms':>10}{'MB/s':>8}{'x engine':>10}")
    for (load, name), each in sorted(times.items()):
        median = statistics.median(each)
        base = statistics.median(times[load.partition(",")[0], "engine"])
        speed = "" if load == "exec true" else f"{options.megabytes / median:.0f}"
        print(f"{load:<24}{name:<15}{median * 1000:>10.1f}{speed:>8}{median / base:>10.2f}")


if __name__ == "__main__":
    main()
