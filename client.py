"""docker-runner client: the signing recipe.

One file, standard library only, made to be copied into another program. Everything that signs or verifies a request
goes through the functions here; the runner's own verification imports them too, so there is one recipe.

A request is signed with three headers::

    X-DR-Timestamp: milliseconds since the epoch
    X-DR-Nonce:     1 to 128 visible ASCII characters, never used twice
    X-DR-Signature: base64(HMAC-SHA256(secret, METHOD \\n TARGET \\n TIMESTAMP \\n NONCE \\n BODYHASH))

METHOD in upper case; TARGET the path with its query, byte for byte as sent; BODYHASH base64(SHA-256(body)).
"""

import base64
import hashlib
import hmac
import time
import uuid

__all__ = [
    "EMPTY_BODY_HASH",
    "STREAMING",
    "body_hash",
    "chunk_signature",
    "sign",
    "signature",
    "signed_chunk",
    "string_to_sign",
]

__version__ = "0.1.0"


def body_hash(body: bytes) -> str:
    """BODYHASH of a body's raw bytes: base64 of their SHA-256."""
    return base64.b64encode(hashlib.sha256(body).digest()).decode("ascii")


EMPTY_BODY_HASH = body_hash(b"")
STREAMING = "STREAMING-HMAC-SHA256"
"""BODYHASH of a body that comes as signed chunks."""
MAX_CHUNK = 1024 * 1024
"""Bytes of data in one signed chunk, at most."""


def string_to_sign(method: bytes, target: bytes, timestamp: bytes, nonce: bytes, content_hash: bytes) -> bytes:
    """The canonical string: the five parts, a newline between them (none of them can hold one)."""
    return b"\n".join((method, target, timestamp, nonce, content_hash))


def signature(secret: bytes, message: bytes) -> bytes:
    """base64 of the HMAC-SHA256 of `message` (a `string_to_sign`) under `secret`."""
    return base64.b64encode(hmac.digest(secret, message, "sha256"))


def chunk_signature(secret: bytes, previous: bytes, digest: bytes) -> bytes:
    """The signature (32 bytes) of one signed chunk.

    Args:
        secret: the shared secret.
        previous: the signature of the chunk before; for the first, the 32 raw bytes of the request's signature.
        digest: SHA-256 of the chunk's data.
    """
    return hmac.digest(secret, b"docker-runner chunk\n" + previous + digest, "sha256")


def signed_chunk(secret: bytes, previous: bytes, data: bytes) -> bytes:
    """One record of a body sent as signed chunks: length (4 bytes, big-endian), signature (32 bytes), data.

    At most `MAX_CHUNK` bytes of data; none of them ends the body. Bytes 4 to 36 are the next one's `previous`.
    """
    signed = chunk_signature(secret, previous, hashlib.sha256(data).digest())
    return len(data).to_bytes(4, "big") + signed + data


def sign(
    secret: str,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    key: str | None = None,
    content_hash: str | None = None,
    timestamp_ms: int | None = None,
    nonce: str | None = None,
) -> dict[str, str]:
    """The headers that sign one request.

    Args:
        secret: the shared secret, used as its UTF-8 bytes.
        method: the HTTP method.
        target: path and query exactly as they will stand in the request line.
        body: the exact bytes of the body.
        key: the name of a named key; adds `X-DR-Key`.
        content_hash: BODYHASH of a body that is sent separately; adds `X-DR-Content-SHA256`, with which the runner
            verifies the request before it reads the body. `body` is ignored then.
        timestamp_ms: milliseconds since the epoch; now, if absent.
        nonce: a fresh UUID, if absent.
    """
    timestamp = str(time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms)
    nonce = str(uuid.uuid4()) if nonce is None else nonce
    hashed = body_hash(body) if content_hash is None else content_hash
    message = string_to_sign(
        method.upper().encode("ascii"),
        target.encode("utf-8"),
        timestamp.encode("ascii"),
        nonce.encode("ascii"),
        hashed.encode("ascii"),
    )
    headers = {
        "X-DR-Timestamp": timestamp,
        "X-DR-Nonce": nonce,
        "X-DR-Signature": signature(secret.encode("utf-8"), message).decode("ascii"),
    }
    if key is not None:
        headers["X-DR-Key"] = key
    if content_hash is not None:
        headers["X-DR-Content-SHA256"] = content_hash
    return headers
