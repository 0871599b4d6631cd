"""Verification: who asks, and that nobody asks twice. Free of I/O: headers, method, target and body hash in, a refusal
raised or not.

The order of the checks is the security argument. The signature comes before the nonce, so that strangers learn nothing
of nonces and cannot fill the store. Looking a nonce up and recording it is one step without an `await`, so that of two
racing copies one passes.
"""

import logging
import re
import time
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256
from hmac import compare_digest

import msgspec

import client
from client import string_to_sign
from errors import RunnerError

log = logging.getLogger("docker_runner.auth")

Headers = Sequence[tuple[bytes, bytes]]

MAX_SHOWN = 4096
"""Bytes of a string to sign up to which a refusal repeats it."""
STREAMING = client.STREAMING.encode()
_SINGLE = (
    b"x-dr-timestamp",
    b"x-dr-nonce",
    b"x-dr-signature",
    b"x-dr-key",
    b"x-dr-content-sha256",
    b"content-length",
    b"host",
)
_TIMESTAMP = re.compile(rb"[0-9]{1,16}")
_NONCE = re.compile(rb"[\x21-\x7e]{1,128}")
_BODY_HASH = re.compile(rb"[A-Za-z0-9+/]{43}=")
_BLOCK = 64
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))
_NAMED_SECRET = re.compile(r"([A-Za-z0-9_.-]{1,64}):(.+)")


def wall_clock_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class Keyring(msgspec.Struct, frozen=True):
    """The accepted secrets, in the order of the file: (name or None, secret). The first one signs."""

    secrets: tuple[tuple[str | None, str], ...]

    def __repr__(self) -> str:
        """How many, and whose: who prints settings prints no secret."""
        return f"Keyring({len(self.secrets)} of {self.names()})"

    def names(self) -> list[str | None]:
        """Each key's name once, in order; None for the unnamed ones."""
        return list(dict.fromkeys(name for name, _ in self.secrets))

    @classmethod
    def parse(cls, text: str) -> "Keyring":
        """Read a secret file: one secret a line, `name:secret` for a named key; empty lines are passed over.

        Raises:
            ValueError: there is no secret, or one stands under two names (then a signature would not say who asks),
                or holds a control character (HMAC takes zeros at its end for none).
        """
        secrets: list[tuple[str | None, str]] = []
        for line in text.split("\n"):
            line = line.strip()
            if not line:
                continue
            named = _NAMED_SECRET.fullmatch(line)
            if not line.isprintable():
                raise ValueError("holds a secret with a control character")
            secrets.append((named[1], named[2]) if named else (None, line))
        if not secrets:
            raise ValueError("holds no secret")
        if len({secret for _, secret in secrets}) < len(set(secrets)):
            raise ValueError("holds one secret under two names")
        return cls(tuple(secrets))

    def of(self, name: str | None) -> list[bytes]:
        """The secrets of a key name as bytes (several during a rotation); of the unnamed ones for None."""
        return [secret.encode() for owner, secret in self.secrets if owner == name]


class Signer:
    """Signs under one secret, for which what HMAC-SHA256 does to a key is done once (RFC 2104, section 4).

    `hmac.digest` does it anew for each message, and looks its algorithm up: three times the cost of the message itself.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, secret: bytes) -> None:
        block = (secret if len(secret) <= _BLOCK else sha256(secret).digest()).ljust(_BLOCK, b"\0")
        self._inner = sha256(block.translate(_INNER))
        self._outer = sha256(block.translate(_OUTER))

    def signature(self, message: bytes) -> bytes:
        """As `client.signature`."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return b2a_base64(outer.digest(), newline=False)


class NonceStore:
    """Used nonces, each until the moment its timestamp can no longer be accepted. O(1) a request, bounded, no timer.

    A nonce is kept as a 16-byte digest in one dictionary, and its digest also in a list of those that end in the same
    second. Lists of past seconds are dropped on the way in. A released nonce stays as a mark (its end negated) that is
    taken up again without a second entry in a list, so that repeated releases cannot grow anything.

    Args:
        limit: entries held at most; about 160 bytes each.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ends: dict[bytes, int] = {}
        self._by_end: dict[int, list[bytes]] = {}
        self._next_end = 0

    def __len__(self) -> int:
        return len(self._ends)

    def take(self, digest: bytes, until_ms: int, now_ms: int) -> None:
        """Record a nonce that counts as used up to and including `until_ms`.

        Raises:
            RunnerError: `replayed_nonce` if it is held, `nonce_store_full` if there is no room.
        """
        if now_ms // 1000 >= self._next_end:
            self._drop_past(now_ms // 1000)
        end = until_ms // 1000 + 1
        held = self._ends.get(digest, 0)
        if held > 0:
            raise RunnerError("replayed_nonce", "this nonce was used before")
        if held:
            # It is in a list already, and goes to a later one, if need be, when that list is dropped.
            self._ends[digest] = max(end, -held)
            return
        if len(self._ends) >= self.limit:
            raise RunnerError("nonce_store_full", "no room to remember another nonce; try again soon")
        self._ends[digest] = end
        ending = self._by_end.get(end)
        if ending is None:
            self._by_end[end] = [digest]
        else:
            ending.append(digest)

    def release(self, digest: bytes) -> None:
        """Make a taken nonce usable again, by a repetition of the very same request."""
        held = self._ends.get(digest)
        if held is not None and held > 0:
            self._ends[digest] = -held

    def _drop_past(self, now_s: int) -> None:
        # Normally the one list of the second that has passed; the clock may also have leapt.
        past = range(self._next_end, now_s + 1) if now_s - self._next_end < len(self._by_end) else sorted(self._by_end)
        for end in past:
            if end <= now_s:
                for digest in self._by_end.pop(end, ()):
                    later = abs(self._ends[digest])
                    if later > now_s:
                        self._by_end.setdefault(later, []).append(digest)
                    else:
                        del self._ends[digest]
        self._next_end = now_s + 1


class Credentials(msgspec.Struct, frozen=True):
    """The signature headers of one request, each checked for its form. `key` is None for the unnamed secrets."""

    timestamp: bytes
    timestamp_ms: int
    nonce: bytes
    signature: bytes
    content_hash: bytes | None
    key: str | None


class Verified(msgspec.Struct, frozen=True):
    """What a passed verification leaves: the digest under which the nonce is held, and the secret that signed."""

    nonce: bytes
    secret: bytes


def read_credentials(headers: Headers, found: dict[bytes, bytes] | None = None) -> Credentials:
    """Find and check the form of the `X-DR-*` headers (names in lower case); `found` is `dict(headers)`, if at hand.

    Raises:
        RunnerError: `duplicate_headers`, `missing_headers`, `invalid_timestamp`, `invalid_nonce`,
            `body_hash_mismatch` (not the base64 of a SHA-256, so no body can match it).
    """
    if found is None:
        found = dict(headers)
    if len(found) < len(headers):
        names = [name for name, _ in headers]
        for name in _SINGLE:
            if names.count(name) > 1:
                raise RunnerError("duplicate_headers", f"the header {name.decode()} stands more than once")
    timestamp = found.get(b"x-dr-timestamp")
    nonce = found.get(b"x-dr-nonce")
    signed = found.get(b"x-dr-signature")
    if not timestamp or not nonce or not signed:
        raise RunnerError("missing_headers", "X-DR-Timestamp, X-DR-Nonce and X-DR-Signature are required")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise RunnerError("invalid_timestamp", "X-DR-Timestamp must be milliseconds since the epoch, decimal digits")
    if not _NONCE.fullmatch(nonce):
        raise RunnerError("invalid_nonce", "X-DR-Nonce must be 1 to 128 visible ASCII characters")
    content_hash = found.get(b"x-dr-content-sha256") or None
    if content_hash is not None and content_hash != STREAMING and not _BODY_HASH.fullmatch(content_hash):
        raise RunnerError("body_hash_mismatch", "X-DR-Content-SHA256 must be the base64 of a SHA-256")
    key = found.get(b"x-dr-key")
    return Credentials(timestamp, int(timestamp), nonce, signed, content_hash, key.decode("latin-1") if key else None)


class _Secret:
    """An accepted secret. By its digest its nonces are kept apart: by the secret that signed them, not a mere name."""

    __slots__ = ("digest", "secret", "signer")

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.signer = Signer(secret)
        self.digest = sha256(secret).digest()


class Verifier:
    """Decides whether a request is who it says, in time, and asked for the first time.

    Args:
        keyring: the accepted secrets; may be replaced at any time (`keyring` is an attribute).
        ttl_ms: the accepted difference between a request's timestamp and this clock, either way.
        max_nonces: the bound of the nonce store.
        clock_ms: milliseconds since the epoch. Its going back does not open a window: the latest time seen counts.
    """

    def __init__(
        self, keyring: Keyring, *, ttl_ms: int, max_nonces: int, clock_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        self.keyring = keyring
        self.nonces = NonceStore(max_nonces)
        self._ttl_ms = ttl_ms
        self._clock_ms = clock_ms
        self._now_ms = self._started_ms = clock_ms()
        self._behind = False

    @property
    def keyring(self) -> Keyring:
        """The accepted secrets."""
        return self._keyring

    @keyring.setter
    def keyring(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._secrets = {name: [_Secret(secret) for secret in keyring.of(name)] for name, _ in keyring.secrets}

    def check_time(self, credentials: Credentials) -> None:
        """Refuse a request whose timestamp is out of range.

        Raises:
            RunnerError: `timestamp_out_of_range`; retryable if the request is merely older than this process, whose
                predecessor may have served it already.
        """
        now = self._clock_ms()
        if now < self._now_ms:
            self._look_back(now)
            now = self._now_ms
        else:
            self._now_ms = now
            self._behind = False
        if not -self._ttl_ms <= now - credentials.timestamp_ms <= self._ttl_ms:
            raise RunnerError(
                "timestamp_out_of_range",
                f"the timestamp is {abs(now - credentials.timestamp_ms)} ms from the runner's clock; "
                f"{self._ttl_ms} ms are accepted",
            )
        if credentials.timestamp_ms < self._started_ms:
            raise RunnerError(
                "timestamp_out_of_range",
                "the request was stamped before the runner started; sign it again",
                retryable=True,
            )

    def _look_back(self, now: int) -> None:
        """The clock says less than it has said."""
        was_behind, self._behind = self._behind, now < self._now_ms - self._ttl_ms
        if self._behind and not was_behind:
            log.error(
                "the system's clock went back by %d ms: requests are refused until it has caught up, or the runner is "
                "started again",
                self._now_ms - now,
            )

    def seconds_left(self, credentials: Credentials) -> float:
        """How long the request can still be accepted, as far as its timestamp goes."""
        return max(0, credentials.timestamp_ms + self._ttl_ms - self._now_ms) / 1000

    def verify(self, credentials: Credentials, method: bytes, target: bytes, content_hash: bytes) -> Verified:
        """Check time and signature, then take the nonce (`nonces.release` gives it back), in one step.

        Raises:
            RunnerError: as `check_time`; `invalid_signature`, `replayed_nonce`, `nonce_store_full`.
        """
        self.check_time(credentials)
        message = string_to_sign(method, target, credentials.timestamp, credentials.nonce, content_hash)
        owner = None
        for candidate in self._secrets.get(credentials.key, ()):
            if compare_digest(candidate.signer.signature(message), credentials.signature):
                owner = candidate
        if owner is None:
            raise RunnerError("invalid_signature", "the signature does not match this request", details=_shown(message))
        digest = blake2b(credentials.nonce, key=owner.digest, digest_size=16).digest()
        self.nonces.take(digest, credentials.timestamp_ms + self._ttl_ms, self._now_ms)
        return Verified(digest, owner.secret)


def _shown(message: bytes) -> dict[str, str] | None:
    """What should have been signed, its newlines escaped; nothing of a message so long that it would amplify."""
    if len(message) > MAX_SHOWN:
        return None
    return {"string_to_sign": message.decode("latin-1").replace("\\", "\\\\").replace("\n", "\\n")}
