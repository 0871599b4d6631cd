"""A client of signed chunks for tests: whole and honest bodies, and such as were meddled with on their way."""

import base64
import http.client
from collections.abc import Iterable, Iterator, Mapping

from client import MAX_CHUNK, STREAMING, sign, signed_chunk
from service import SECRET, Answer, Runner


def chunk_headers(method: str, target: str, *, secret: str = SECRET, key: str | None = None) -> dict[str, str]:
    """The signature of a request whose body comes as signed chunks."""
    return sign(secret, method, target, content_hash=STREAMING, key=key)


def records(headers: Mapping[str, str], pieces: Iterable[bytes], *, secret: str = SECRET) -> Iterator[bytes]:
    """The records of a body, the one that ends it included; `headers` are those of its request."""
    previous = base64.b64decode(headers["X-DR-Signature"])
    for piece in (*pieces, b""):
        record = signed_chunk(secret.encode(), previous, piece)
        previous = record[4:36]
        yield record


def cut_up(data: bytes, size: int = MAX_CHUNK) -> list[bytes]:
    """Data in pieces."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def send_chunks(
    runner: Runner,
    method: str,
    target: str,
    pieces: Iterable[bytes],
    fields: Mapping[str, str] | None = None,
    *,
    timeout: float = 120,
) -> Answer:
    """One request with its body as signed chunks, each an HTTP chunk of its own; its whole answer read."""
    headers = chunk_headers(method, target)
    return send_records(runner, method, target, headers, records(headers, pieces), fields, timeout=timeout)


def send_records(
    runner: Runner,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: Iterable[bytes],
    fields: Mapping[str, str] | None = None,
    *,
    timeout: float = 120,
) -> Answer:
    """As `send_chunks`, with signature and records of the test's own. A refusal in the midst is read."""
    connection = http.client.HTTPConnection("127.0.0.1", runner.port, timeout=timeout)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in {**headers, "Transfer-Encoding": "chunked", **(fields or {})}.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            for record in body:
                connection.send(b"%x\r\n%b\r\n" % (len(record), record))
            connection.send(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # The answer has come before the body's end.
        return Answer(connection.getresponse())
    finally:
        connection.close()
