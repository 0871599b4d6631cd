"""Settings: the environment and its files, decoded once into one frozen struct. Every default is in the table below.

A wrong value is an error that names its variable; nothing falls back silently.
"""

import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import audit
import logs
from auth import Keyring
from policy import PRESETS, Policies
from policy_file import PolicyError
from policy_file import parse as parse_policy

MIB = 1024 * 1024
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's address."""


class SettingsError(Exception):
    """A variable is missing or wrong; the message is one line that names it."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the service can be told. Units are in the names: `_s` seconds, `_ms` milliseconds, else bytes."""

    keyring: Keyring
    engine_socket: str
    host: str
    port: int
    signature_ttl_ms: int
    log_level: str
    log_format: str
    max_body: int
    max_upload: int
    max_unverified: int
    max_nonces: int
    body_timeout_s: float
    head_timeout_s: float
    keep_alive_s: float
    max_connections: int
    max_requests: int
    max_streams: int
    grace_s: float
    engine_connections: int
    engine_queue_s: float
    engine_connect_s: float
    engine_head_s: float
    event_buffer: int
    default_image: str
    max_output: int
    sse_keep_alive_s: float
    instance: str
    expiry_interval_s: float
    policies: Policies
    audit: str
    engine_watch_s: float
    tls: ssl.SSLContext | None
    local_socket: str
    local_key: str
    trusted_proxies: tuple[str, ...]
    path_prefix: str
    metrics_port: int | None
    metrics_host: str


class Variable(msgspec.Struct, frozen=True):
    """A row of the table of variables: its default as text ("" for none), how it is read, what it means."""

    default: str
    read: Callable[[str], Any]
    field: str
    meaning: str


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def _seconds(low_ms: int, high_ms: int) -> Callable[[str], float]:
    return lambda text: _integer(low_ms, high_ms)(text) / 1000


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {' '.join(words)}")
        return text

    return read


def _prefix(text: str) -> str:
    if text and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("must be a path such as /runner, without a slash at its end")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", text):
        raise ValueError("must be 1 to 63 letters, digits, `_`, `.` or `-`, and begin with one of the first two")
    return text


def _socket_path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must be an absolute path")
    if len(os.fsencode(text)) > MAX_SOCKET_PATH:
        raise ValueError(f"must be no longer than the {MAX_SOCKET_PATH} bytes of a Unix socket's address")
    return text


def _addresses(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in parts:
        ipaddress.ip_network(part, strict=False)
    return parts


VARIABLES: Mapping[str, Variable] = {
    "DOCKER_RUNNER_HOST": Variable("0.0.0.0", str, "host", "Address to listen on."),
    "DOCKER_RUNNER_PORT": Variable("7071", _integer(0, 65535), "port", "Port to listen on; 0 takes a free one."),
    "DOCKER_RUNNER_SIGNATURE_TTL_MS": Variable(
        "60000", _integer(1000, 3_600_000), "signature_ttl_ms", "Accepted clock difference, either way, in ms."
    ),
    "DOCKER_RUNNER_LOG_LEVEL": Variable(
        "info", _one_of(logs.LEVELS), "log_level", "One of trace debug info warn error fatal."
    ),
    "DOCKER_RUNNER_LOG_FORMAT": Variable(
        "auto", _one_of(logs.FORMATS), "log_format", "`json`, `text`, or `auto`: text on a terminal, else JSON."
    ),
    "DOCKER_RUNNER_MAX_BODY": Variable(
        str(64 * MIB), _integer(1024, 1 << 40), "max_body", "Longest body without `X-DR-Content-SHA256`, in bytes."
    ),
    "DOCKER_RUNNER_MAX_UPLOAD": Variable(
        str(16 * 1024 * MIB), _integer(1024, 1 << 50), "max_upload", "Longest body with that header, in bytes."
    ),
    "DOCKER_RUNNER_MAX_UNVERIFIED": Variable(
        str(256 * MIB), _integer(1024, 1 << 40), "max_unverified", "Bytes of unverified bodies held, all together."
    ),
    "DOCKER_RUNNER_MAX_NONCES": Variable(
        "1000000", _integer(1, 100_000_000), "max_nonces", "Nonces remembered; when full, requests get 503."
    ),
    "DOCKER_RUNNER_BODY_TIMEOUT_MS": Variable(
        "30000", _seconds(100, 3_600_000), "body_timeout_s", "Longest pause within a request's body, in ms."
    ),
    "DOCKER_RUNNER_HEAD_TIMEOUT_MS": Variable(
        "10000", _seconds(100, 600_000), "head_timeout_s", "Time for a request's head to arrive, in ms."
    ),
    "DOCKER_RUNNER_KEEP_ALIVE_MS": Variable(
        "75000", _seconds(100, 3_600_000), "keep_alive_s", "How long an idle connection is kept, in ms."
    ),
    "DOCKER_RUNNER_MAX_CONNECTIONS": Variable(
        "4096", _integer(1, 1_000_000), "max_connections", "Connections of callers at once; one more gets 503."
    ),
    "DOCKER_RUNNER_MAX_REQUESTS": Variable(
        "1024", _integer(1, 1_000_000), "max_requests", "Verified requests at once, streams apart; one more gets 429."
    ),
    "DOCKER_RUNNER_MAX_STREAMS": Variable(
        "1000",
        _integer(1, 1_000_000),
        "max_streams",
        "What may last, at once (events, followed logs, stats, wait, attach, exec, WebSockets); one more gets 429.",
    ),
    "DOCKER_RUNNER_GRACE_MS": Variable(
        "10000", _seconds(0, 3_600_000), "grace_s", "Time for running requests after SIGTERM, in ms."
    ),
    "DOCKER_RUNNER_ENGINE_CONNECTIONS": Variable(
        "1024", _integer(1, 100_000), "engine_connections", "Connections to the engine at once, streams included."
    ),
    "DOCKER_RUNNER_ENGINE_QUEUE_MS": Variable(
        "5000", _seconds(0, 600_000), "engine_queue_s", "Longest wait for a free one of these, in ms."
    ),
    "DOCKER_RUNNER_ENGINE_CONNECT_MS": Variable(
        "2000", _seconds(10, 600_000), "engine_connect_s", "Time for the engine to accept a connection, in ms."
    ),
    "DOCKER_RUNNER_ENGINE_HEAD_MS": Variable(
        "60000",
        _seconds(100, 86_400_000),
        "engine_head_s",
        "Time for the engine to begin its answer to a quick operation (lists, inspects), in ms.",
    ),
    "DOCKER_RUNNER_EVENT_BUFFER": Variable(
        str(4 * MIB), _integer(1024, 1 << 32), "event_buffer", "Bytes of events held for one slow reader."
    ),
    "DOCKER_RUNNER_DEFAULT_IMAGE": Variable(
        "mcr.microsoft.com/vscode/devcontainers/base",
        str,
        "default_image",
        "Image of a `/v1/containers/start` that names none.",
    ),
    "DOCKER_RUNNER_MAX_OUTPUT": Variable(
        str(64 * MIB), _integer(1024, 1 << 32), "max_output", "Longest output of a `/v1/exec/run`, in bytes."
    ),
    "DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": Variable(
        "15000", _seconds(100, 3_600_000), "sse_keep_alive_s", "A quiet SSE stream carries a comment this often, in ms."
    ),
    "DOCKER_RUNNER_INSTANCE": Variable(
        "default",
        _name,
        "instance",
        "Name of this runner among those on the engine; it ends only containers that bear it. Two need two names.",
    ),
    "DOCKER_RUNNER_EXPIRY_INTERVAL_MS": Variable(
        "30000",
        lambda text: 0.0 if text == "0" else _seconds(100, 3_600_000)(text),
        "expiry_interval_s",
        "How often the engine is asked for containers with a time to live, in ms; 0: they are not minded.",
    ),
    "DOCKER_RUNNER_AUDIT": Variable(
        "",
        lambda text: text and _one_of(audit.FORMS)(text),
        "audit",
        "Audit log on stdout: `json`, `text` or `off`; if absent, as `DOCKER_RUNNER_LOG_FORMAT` says.",
    ),
    "DOCKER_RUNNER_ENGINE_WATCH_MS": Variable(
        "5000",
        lambda text: 0.0 if text == "0" else _seconds(100, 3_600_000)(text),
        "engine_watch_s",
        "How often it is looked whether the engine is there, and at the same socket, in ms; 0: never.",
    ),
    "DOCKER_RUNNER_LOCAL_SOCKET": Variable(
        "",
        lambda text: text and _socket_path(text),
        "local_socket",
        "Path of a Unix socket (made with mode 0600) that takes unsigned requests too.",
    ),
    "DOCKER_RUNNER_LOCAL_KEY": Variable(
        "", str, "local_key", "Key of the policy file whose policy holds for these; if absent, the unnamed one."
    ),
    "DOCKER_RUNNER_TRUSTED_PROXIES": Variable(
        "", _addresses, "trusted_proxies", "Addresses whose `X-Forwarded-For` is believed, comma-separated."
    ),
    "DOCKER_RUNNER_PATH_PREFIX": Variable("", _prefix, "path_prefix", "Path prefix that a proxy in front adds."),
    "DOCKER_RUNNER_METRICS_PORT": Variable(
        "",
        lambda text: _integer(0, 65535)(text) if text else None,
        "metrics_port",
        "Port for `/metrics`, unsigned; 0 takes a free one. If absent there is none.",
    ),
    "DOCKER_RUNNER_METRICS_HOST": Variable("127.0.0.1", str, "metrics_host", "Address for `/metrics`."),
}

KEY_VARIABLES: Mapping[str, str] = {
    "DOCKER_RUNNER_SHARED_SECRET": "The HMAC secret. This or the next is required.",
    "DOCKER_RUNNER_SHARED_SECRET_FILE": (
        "File of secrets, one a line (`name:secret` for a named key): the first signs, all are accepted; "
        "read again on SIGHUP."
    ),
    "DOCKER_RUNNER_POLICY": (
        "`workloads` (if absent), `read-only`, `everything`, or the path of a policy file; read again on SIGHUP."
    ),
    "DOCKER_RUNNER_TLS_CERT": "Certificate (PEM), with its chain: HTTPS is served. TLS files are read again on SIGHUP.",
    "DOCKER_RUNNER_TLS_KEY": "Its key, if it is not in the same file.",
    "DOCKER_RUNNER_TLS_CLIENT_CA": "Authorities (PEM): callers must show a certificate by one of them.",
    "DOCKER_SOCKET": "The engine's; else `DOCKER_RUNNER_SOCKET`, `DOCKER_HOST` if `unix://`, `/var/run/docker.sock`.",
    "DOCKER_RUNNER_SOCKET": "See `DOCKER_SOCKET`.",
    "DOCKER_HOST": "See `DOCKER_SOCKET`; anything but `unix://` is passed over.",
    "DOCKER_RUNNER_ENV": "`production`: no `.env` file is read.",
    "DOCKER_RUNNER_URL": "For `curl`: where the runner is (default `http://127.0.0.1:PORT`).",
}

DEFAULT_SOCKET = "/var/run/docker.sock"


def read_keyring(environ: Mapping[str, str]) -> Keyring:
    """The accepted secrets, from the file if one is named, else from the variable.

    Raises:
        SettingsError: neither is set, both are, or the file cannot be read or is empty.
    """
    secret = environ.get("DOCKER_RUNNER_SHARED_SECRET", "")
    file = environ.get("DOCKER_RUNNER_SHARED_SECRET_FILE", "")
    if secret and file:
        raise SettingsError("DOCKER_RUNNER_SHARED_SECRET: set this or DOCKER_RUNNER_SHARED_SECRET_FILE, not both")
    if secret:
        return Keyring(((None, secret),))
    if not file:
        raise SettingsError("DOCKER_RUNNER_SHARED_SECRET: required (or DOCKER_RUNNER_SHARED_SECRET_FILE)")
    try:
        return Keyring.parse(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"DOCKER_RUNNER_SHARED_SECRET_FILE: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"DOCKER_RUNNER_SHARED_SECRET_FILE: {file} {error}") from error


def read_tls(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """What HTTPS is served with; None for plain HTTP.

    Raises:
        SettingsError: a file cannot be read, or is not what it should be.
    """
    certificate, key, authorities = (
        environ.get(f"DOCKER_RUNNER_TLS_{name}") or None for name in ("CERT", "KEY", "CLIENT_CA")
    )
    if certificate is None:
        for name, value in (("DOCKER_RUNNER_TLS_KEY", key), ("DOCKER_RUNNER_TLS_CLIENT_CA", authorities)):
            if value is not None:
                raise SettingsError(f"{name}: goes with DOCKER_RUNNER_TLS_CERT")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for name, path in (
        ("DOCKER_RUNNER_TLS_CERT", certificate),
        ("DOCKER_RUNNER_TLS_KEY", key),
        ("DOCKER_RUNNER_TLS_CLIENT_CA", authorities),
    ):
        try:
            if path is not None:
                Path(path).read_bytes()
        except OSError as error:
            raise SettingsError(f"{name}: cannot read {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(certificate, key, password="")  # Never ask for one.
    except ssl.SSLError as error:
        name = "DOCKER_RUNNER_TLS_CERT" if key is None else "DOCKER_RUNNER_TLS_CERT, DOCKER_RUNNER_TLS_KEY"
        reason = error.reason or "not a certificate and its unencrypted key, in PEM"
        raise SettingsError(f"{name}: {reason.lower().replace('_', ' ')}") from error
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            raise SettingsError(f"DOCKER_RUNNER_TLS_CLIENT_CA: {authorities} holds no certificates in PEM") from error
    return context


def read_policies(environ: Mapping[str, str]) -> Policies:
    """The policy of each key: a preset, or a file.

    Raises:
        SettingsError: there is no such preset, the file cannot be read or is wrong, or has no policy for the local key.
    """
    policies = _read_policies(environ)
    local = environ.get("DOCKER_RUNNER_LOCAL_KEY")
    if local and local not in policies.keys:
        raise SettingsError(f"DOCKER_RUNNER_LOCAL_KEY: the policy has no [keys.{local}]")
    return policies


def _read_policies(environ: Mapping[str, str]) -> Policies:
    named = environ.get("DOCKER_RUNNER_POLICY") or "workloads"
    if named in PRESETS:
        return Policies(PRESETS[named])
    if "/" not in named and not named.endswith(".toml"):
        raise SettingsError(f"DOCKER_RUNNER_POLICY: must be one of {', '.join(PRESETS)}, or a path, not {named!r}")
    try:
        return parse_policy(Path(named).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"DOCKER_RUNNER_POLICY: cannot read {named}: {error.strerror}") from error
    except (UnicodeDecodeError, PolicyError) as error:
        raise SettingsError(f"DOCKER_RUNNER_POLICY: {named}: {error}") from error


def read_engine_socket(environ: Mapping[str, str]) -> str:
    """The path of the engine's socket.

    Raises:
        SettingsError: the path is relative, or longer than a Unix socket's address can be.
    """
    variable = next((name for name in ("DOCKER_SOCKET", "DOCKER_RUNNER_SOCKET") if environ.get(name)), None)
    if variable is None:
        host = environ.get("DOCKER_HOST", "")
        if not host.startswith("unix://"):
            return DEFAULT_SOCKET
        variable = "DOCKER_HOST"
    path = environ[variable].removeprefix("unix://")
    try:
        return _socket_path(path)
    except ValueError as error:
        raise SettingsError(f"{variable}: {error}") from error


def read_variable(name: str, environ: Mapping[str, str]) -> Any:
    """One of `VARIABLES`.

    Raises:
        SettingsError: it is wrong.
    """
    variable = VARIABLES[name]
    text = environ.get(name, "") or variable.default
    try:
        return variable.read(text)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}, not {text!r}") from error


def read_settings(environ: Mapping[str, str]) -> Settings:
    """All settings from an environment.

    Raises:
        SettingsError: the first variable that is missing or wrong.
    """
    values = {variable.field: read_variable(name, environ) for name, variable in VARIABLES.items()}
    return Settings(
        keyring=read_keyring(environ),
        engine_socket=read_engine_socket(environ),
        policies=read_policies(environ),
        tls=read_tls(environ),
        **values,
    )
