"""Bulk: archives down and up, and logs. `mb_per_s` (10^6 bytes), and `cpu_ms_per_mb` of the subject.

What is sent is signed, hashed and cut into chunks before the clock starts; what comes is counted and thrown away.
"""

import base64
import io
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing

from bench.exchange import SECRET, BenchError, connect, drain, request
from bench.figures import Figures, Sizes
from bench.stage import Stage
from bench.subjects import BEFORE, RUNNER, Subject
from client import STREAMING, body_hash, sign, signed_chunk

HASHED, CHUNKED = ", hash", ", signed chunks"
CHUNK = 256 * 1024
CLOSE = ("Connection: close",)

Prepared = list[bytes]


def archives(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """A file of each size, packed as a tar, up and down again."""
    for size in sizes.archives:
        name = f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"
        archive = _packed(size)
        target = f"/containers/{stage.box()}/archive?path=/tmp"
        for _ in range(sizes.transfers):
            for subject in stage.subjects:
                for form, prepared in _uploads(subject, target, archive):
                    _transfer(figures, f"upload of {name}", subject, prepared, size, form)
            for subject in stage.subjects:
                down = request("GET", f"{target}/bulk", signed=subject.signed, headers=CLOSE)
                _transfer(figures, f"download of {name}", subject, [down], size, least=size)


def logs(stage: Stage, sizes: Sizes, figures: Figures) -> None:
    """The log of a container that has ended, in short lines and in long ones. Its bytes count as they were written."""
    for name, line, size in (("short lines", 64, sizes.log), ("long lines", 256 * 1024, 4 * sizes.log)):
        count = max(1, size // line)
        container = _written(stage, line, count)
        target = f"/containers/{container}/logs?stdout=1"
        sse = f"/v1/containers/logs/sse?containerId={container}&follow=false"
        for _ in range(sizes.transfers):
            for subject in stage.subjects:
                asked = request("GET", target, signed=subject.signed, headers=CLOSE)
                _transfer(figures, f"log of {name}", subject, [asked], line * count, least=line * count)
                if subject.name in (RUNNER, BEFORE):
                    asked = request("GET", sse, signed=True, headers=CLOSE)
                    _transfer(figures, f"log of {name}", subject, [asked], line * count, ", /v1 SSE", line * count)


def _transfer(
    figures: Figures, load: str, subject: Subject, prepared: Prepared, size: int, form: str = "", least: int = 0
) -> None:
    with closing(connect(subject.address)) as sock:
        cpu, started = subject.cpu_s(), time.perf_counter()
        received = drain(sock, prepared)
        took, cpu = time.perf_counter() - started, subject.cpu_s() - cpu
    if received < least:
        raise BenchError(f"{load}, {subject.name}: {received} bytes of {least}")
    cost = {"cpu_ms_per_mb": cpu * 1e9 / size} if subject.pids else {}
    figures.add(load, subject.name + form, mb_per_s=size / 1e6 / took, **cost)


def _packed(size: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("bulk")
        entry.size = size
        tar.addfile(entry, io.BytesIO(os.urandom(size)))
    return packed.getvalue()


def _written(stage: Stage, line: int, count: int) -> str:
    """A container that has written so many lines of so many bytes each, and ended."""
    one = f"head -c {line - 1} /dev/zero | tr '\\0' x > /tmp/line; echo >> /tmp/line"
    # A file is made by doubling: a shell that writes line by line would take long.
    grow = f"n=1; cp /tmp/line /tmp/all; while [ $n -lt {count} ]; do cat /tmp/all /tmp/all > /tmp/more; "
    grow += "mv /tmp/more /tmp/all; n=$((n * 2)); done"
    container = stage.create("sh", "-c", f"{one}; {grow}; head -c {line * count} /tmp/all")
    stage.ask("POST", f"/containers/{container}/start")
    if (code := stage.ask("POST", f"/containers/{container}/wait")["StatusCode"]) != 0:
        raise BenchError(f"the writer of the log ended with {code}")
    return container


def _uploads(subject: Subject, target: str, archive: bytes) -> Iterator[tuple[str, Prepared]]:
    """The ways in which a subject takes an upload, each signed just now."""
    usual = ("Content-Type: application/x-tar", *CLOSE)
    if not subject.signed:
        yield "", [request("PUT", target, signed=False, headers=(*usual, f"Content-Length: {len(archive)}")), archive]
        return
    signed = sign(SECRET, "PUT", target, content_hash=body_hash(archive))
    headers = (*usual, f"Content-Length: {len(archive)}", *_lines(signed))
    yield HASHED, [request("PUT", target, signed=False, headers=headers), archive]
    signed = sign(SECRET, "PUT", target, content_hash=STREAMING)
    headers = (*usual, "Transfer-Encoding: chunked", *_lines(signed))
    first = base64.b64decode(signed["X-DR-Signature"])
    yield CHUNKED, [request("PUT", target, signed=False, headers=headers), *_chunks(first, archive), b"0\r\n\r\n"]


def _chunks(previous: bytes, data: bytes) -> Iterator[bytes]:
    """Signed chunks, each in one of HTTP's; the last is empty."""
    for at in [*range(0, len(data), CHUNK), len(data)]:
        record = signed_chunk(SECRET.encode(), previous, data[at : at + CHUNK])
        previous = record[4:36]
        yield b"%x\r\n%b\r\n" % (len(record), record)


def _lines(headers: dict[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in headers.items()]
