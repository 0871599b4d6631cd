"""The signing recipe: test vectors that any language can check itself against, and its use in verification."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auth import Keyring, Signer, Verifier, read_credentials
from client import body_hash, sign, signature
from errors import RunnerError

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data/signature-vectors.json").read_text())
NOW_MS = 1_700_000_000_000
SECRET = "0123456789abcdef0123456789abcdef"

methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "get"])
targets = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=200).map("/".__add__)
nonces = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=128)
secrets = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100)


def verify(secret: str, method: str, target: str, body: bytes, headers: dict[str, str]) -> None:
    verifier = Verifier(Keyring(((None, secret),)), ttl_ms=60_000, max_nonces=10, clock_ms=lambda: NOW_MS)
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    verifier.verify(read_credentials(raw), method.encode(), target.encode(), body_hash(body).encode())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["what"])
def test_vector_holds_for_the_client(vector: dict[str, Any]) -> None:
    body = base64.b64decode(vector["bodyBase64"])
    headers = sign(
        vector["secret"],
        vector["method"],
        vector["target"],
        body,
        timestamp_ms=int(vector["timestamp"]),
        nonce=vector["nonce"],
    )
    assert body_hash(body) == vector["bodyHash"]
    assert headers == {
        "X-DR-Timestamp": vector["timestamp"],
        "X-DR-Nonce": vector["nonce"],
        "X-DR-Signature": vector["signature"],
    }


@given(st.binary(max_size=200), st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_a_prepared_secret_signs_as_the_client_does(secret: bytes, messages: list[bytes]) -> None:
    signer = Signer(secret)
    for message in messages:
        assert signer.signature(message) == signature(secret, message)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["what"])
def test_vector_holds_for_openssl(vector: dict[str, Any]) -> None:
    digest = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", vector["secret"], "-binary"],
        input=vector["stringToSign"].encode(),
        capture_output=True,
        check=True,
    ).stdout
    assert base64.b64encode(digest).decode() == vector["signature"]


@given(secrets, methods, targets, nonces, st.binary(max_size=1000))
def test_what_the_client_signs_is_verified(secret: str, method: str, target: str, nonce: str, body: bytes) -> None:
    headers = sign(secret, method, target, body, timestamp_ms=NOW_MS, nonce=nonce)
    verify(secret, method.upper(), target, body, headers)


@given(targets, st.binary(max_size=100), st.integers(0, 5), st.data())
def test_any_change_of_what_is_signed_is_refused(target: str, body: bytes, part: int, data: st.DataObject) -> None:
    headers = sign(SECRET, "POST", target, body, timestamp_ms=NOW_MS, nonce="n-1")
    secret, method = SECRET, "POST"
    match part:
        case 0:
            method = "PUT"
        case 1:
            target = data.draw(targets.filter(lambda other: other != target))
        case 2:
            body = data.draw(st.binary(max_size=100).filter(lambda other: other != body))
        case 3:
            headers["X-DR-Timestamp"] = str(NOW_MS + data.draw(st.integers(1, 1000)))
        case 4:
            headers["X-DR-Nonce"] = data.draw(nonces.filter(lambda other: other != "n-1"))
        case _:
            secret = data.draw(secrets.filter(lambda other: other != SECRET))
    with pytest.raises(RunnerError) as refused:
        verify(secret, method, target, body, headers)
    assert refused.value.code == "invalid_signature"
