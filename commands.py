"""What the commands of the command line do. Their arguments are parsed in `runner.py`, curl's in `curl.py`."""

import asyncio
import http.client
import json
import logging
import os
import re
import resource
import shlex
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import logs
from client import __version__
from client import sign as signed_headers
from curl import UsageError, signed_arguments
from settings import (
    VARIABLES,
    SettingsError,
    read_engine_socket,
    read_keyring,
    read_settings,
    read_variable,
)

__all__ = ["SHORTEST_SECRET", "UsageError", "allow_many_files", "bridge", "check", "curl", "openapi", "probe", "sign"]

SHORTEST_SECRET = 16
"""Characters below which `check` calls a secret too short and `serve` warns."""
CHECK_LIMIT_S = 5.0
"""Seconds that `check` waits for the engine, or for a running service."""
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a service that listens on all addresses is asked."""

log = logging.getLogger("docker_runner")


def bridge(url: str, address: str, tls_files: Mapping[str, str | None], environ: Mapping[str, str]) -> int:
    """Run the bridge until SIGTERM.

    Args:
        url: of the runner.
        address: to listen at.
        tls_files: paths by option: `ca`, `cert`, `key`.
        environ: holds the secret.

    Raises:
        UsageError: an option is wrong.
        SettingsError: there is no secret.
    """
    import uvloop  # Late: the other commands start without these.

    from bridge import Bridge, listen
    from uplink import Uplink

    keyring = read_keyring(environ)
    level, form = (read_variable(name, environ) for name in ("DOCKER_RUNNER_LOG_LEVEL", "DOCKER_RUNNER_LOG_FORMAT"))
    logs.set_up(level, form)
    if any(tls_files.values()) and not url.startswith("https:"):
        raise UsageError("--ca, --cert, --key: are for https")
    try:
        uplink = Uplink(url, lambda: keyring.secrets[0], _tls(tls_files))
    except ValueError as error:
        raise UsageError(f"--url: {error}") from error
    try:
        sock = listen(address)
    except (ValueError, OSError) as error:
        reason = isinstance(error, OSError) and error.strerror
        raise UsageError(f"--listen {address}: {reason or error}") from error

    def reload() -> None:
        nonlocal keyring
        try:
            keyring = read_keyring(environ)
        except SettingsError as error:
            log.error("kept the old secret: %s; mend that, and send SIGHUP again", error)
        else:
            log.info("read the secret again")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reload)
        loop.set_exception_handler(logs.on_loop_error)
        name = sock.getsockname()
        host = name if isinstance(name, str) else name[0]
        where = f"unix://{host}" if isinstance(name, str) else f"tcp://{f'[{host}]' if ':' in host else host}:{name[1]}"
        key, _ = keyring.secrets[0]
        fields = {"version": __version__, "python": sys.version.split()[0], "key": key or "(unnamed)"}
        told = {"fields": fields}
        await Bridge(uplink, sock).serve(
            lambda: log.info("bridge listens on %s, for the runner at %s", where, uplink.url, extra=told)
        )

    allow_many_files()
    uvloop.run(run())
    return 0


def allow_many_files() -> None:
    """Every caller and every stream costs two descriptors; the usual soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tls(files: Mapping[str, str | None]) -> ssl.SSLContext | None:
    if not any(files.values()):
        return None
    try:
        context = ssl.create_default_context(cafile=files["ca"])
        if files["cert"]:
            context.load_cert_chain(files["cert"], files["key"], lambda: "")  # Or OpenSSL asks for a password.
        elif files["key"]:
            raise UsageError("--key goes with --cert")
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"--ca, --cert, --key: {error}") from error
    return context


def openapi() -> int:
    """Print the API document; returns the exit status."""
    from openapi import document

    sys.stdout.buffer.write(document())
    return 0


def check(environ: Mapping[str, str]) -> int:
    """Look at settings, secret, socket and engine; print what is fine and what is not; return the exit status."""
    well = True

    def fine(what: str) -> None:
        print(f"ok    {what}")

    def wrong(what: str, remedy: str) -> None:
        nonlocal well
        well = False
        print(f"FAIL  {what}\n      -> {remedy}")

    try:
        settings = read_settings(environ)
    except SettingsError as error:
        wrong(f"settings: {error}", "set it in the environment or, in development, in .env")
    else:
        fine(f"settings: listens on {settings.host}:{settings.port}")
        short = [owner for owner, secret in settings.keyring.secrets if len(secret) < SHORTEST_SECRET]
        if short:
            wrong(f"secret: shorter than {SHORTEST_SECRET} characters", "make one with: openssl rand -hex 32")
        else:
            fine(f"secret: {len(settings.keyring.secrets)} accepted")
        own = ", ".join(f"{key}: {policy.name}" for key, policy in settings.policies.keys.items())
        given = environ.get("DOCKER_RUNNER_POLICY")
        fine(f"policy: {settings.policies.default.name}, " + (f"from {given}" if given else "the default"))
        if own:
            fine(f"policy: of named keys: {own}")
        for key in settings.policies.keys.keys() - {owner for owner, _ in settings.keyring.secrets}:
            wrong(f"policy: no secret has the name of [keys.{key}]", f"name a line {key}:SECRET in the file of secrets")
        file = environ.get("DOCKER_RUNNER_SHARED_SECRET_FILE")
        if file and Path(file).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            wrong(f"secret: {file} can be read by others", f"chmod 600 {shlex.quote(file)}")
    try:
        socket_path = read_engine_socket(environ)
    except SettingsError as error:
        wrong(f"engine: {error}", "name the engine's socket in DOCKER_SOCKET")
    else:
        _check_engine(socket_path, fine, wrong)
    return 0 if well else 1


def _check_engine(path: str, fine: Callable[[str], None], wrong: Callable[[str, str], None]) -> None:
    import requests_unixsocket  # Late: the service itself has no use for it.
    from requests import RequestException

    start = "start it (systemctl start docker, or dockerd); if it runs elsewhere, name its socket in DOCKER_SOCKET"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        wrong(f"engine: there is no socket at {path}", f"the engine does not run here: {start}")
        return
    except OSError as error:
        wrong(f"engine: {path}: {error.strerror}", "run as a user who may reach that folder")
        return
    if not stat.S_ISSOCK(mode):
        wrong(f"engine: {path} is not a socket", "name the engine's socket in DOCKER_SOCKET")
        return
    if not os.access(path, os.R_OK | os.W_OK):
        wrong(
            f"engine: no permission for {path}",
            "run as root or in the socket's group (often docker): usermod -aG docker USER",
        )
        return
    fine(f"engine: socket {path}")
    try:
        with requests_unixsocket.Session() as session:
            answer = session.get(f"http+unix://{quote(path, safe='')}/version", timeout=CHECK_LIMIT_S)
        version = answer.json()
        said = f"{version['Version']}, API {version['ApiVersion']} (least {version.get('MinAPIVersion', '?')})"
    except RequestException as error:
        if "Connection refused" in str(error):
            wrong("engine: nothing listens on its socket", f"the engine is down: {start}")
        elif "timed out" in str(error):
            wrong(f"engine: no answer within {CHECK_LIMIT_S:g} s", "it hangs: look at its log, restart it")
        else:
            wrong(f"engine: {error}", "look at the engine's log")
    except (KeyError, TypeError, ValueError):
        wrong("engine: what answers on its socket is no Docker Engine", "name the engine's socket in DOCKER_SOCKET")
    else:
        fine(f"engine: version {said}")


def probe(path: str, environ: Mapping[str, str]) -> int:
    """Ask the service that runs here, with the same settings, for `/v1/health` or `/v1/ready`; return the exit status.

    Raises:
        SettingsError: the variable of its port is wrong.
    """
    host, port = (environ.get(name) or VARIABLES[name].default for name in ("DOCKER_RUNNER_HOST", "DOCKER_RUNNER_PORT"))
    host = EVERY_ADDRESS.get(host, host)
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
    number = read_variable("DOCKER_RUNNER_PORT", environ)
    connection = http.client.HTTPConnection(host, number, timeout=CHECK_LIMIT_S)
    if local := environ.get("DOCKER_RUNNER_LOCAL_SOCKET"):  # The one way in where callers must show a certificate.
        where = f"{local}: {path}"
    elif environ.get("DOCKER_RUNNER_TLS_CERT"):
        # Our own service, on this machine: whose name its certificate bears does not matter.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, number, timeout=CHECK_LIMIT_S, context=context)
        where = where.replace("http:", "https:", 1)
    try:
        if local:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(CHECK_LIMIT_S)
            connection.sock.connect(local)
        connection.request("GET", path)
        answer = connection.getresponse()
        said = answer.read(65536).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"FAIL  {where}: {error or type(error).__name__}")
        return 1
    finally:
        connection.close()
    well = answer.status == http.HTTPStatus.OK
    print(f"{'ok  ' if well else 'FAIL'}  {where}: {answer.status} {said}")
    return 0 if well else 1


def sign(
    method: str, target: str, data: str | None, data_file: str | None, form: str, environ: Mapping[str, str]
) -> int:
    """Print the signature of one request in one of three forms.

    Raises:
        UsageError: the target is no path, or the file cannot be read.
        SettingsError: there is no secret.
    """
    method = method.upper()
    if not method.isalpha() or not method.isascii():
        raise UsageError(f"not a method: {method!r}")
    if not target.startswith("/"):
        raise UsageError(f"the path must begin with a slash: {target!r}")
    if form == "openssl":
        print(_openssl_recipe(method, target, data, data_file, environ))
        return 0
    try:
        body = Path(data_file).read_bytes() if data_file else (data or "").encode()
    except OSError as error:
        raise UsageError(f"{data_file}: {error.strerror}") from error
    name, secret = read_keyring(environ).secrets[0]
    headers = signed_headers(secret, method, target, body, key=name)
    if form == "json":
        print(json.dumps(headers))
    else:
        # No blank after the colon, so that $(docker-runner sign ...) needs no quotes.
        print(" ".join(f"-H {field}:{value}" for field, value in headers.items()))
    return 0


def _openssl_recipe(
    method: str, target: str, data: str | None, data_file: str | None, environ: Mapping[str, str]
) -> str:
    name, _ = read_keyring(environ).secrets[0]
    file = environ.get("DOCKER_RUNNER_SHARED_SECRET_FILE")
    # The first line that holds something, without the blanks around it and without the key's name.
    first = (
        r"/[^[:space:]]/{s/^[[:space:]]*//;s/[[:space:]]*$//;" + (f"s/^{re.escape(name)}://;" if name else "") + "p;q}"
    )
    secret = f"$(sed -n {shlex.quote(first)} {shlex.quote(file)})" if file else "$DOCKER_RUNNER_SHARED_SECRET"
    named = f" -H 'X-DR-Key: {name}'" if name else ""
    if data_file:
        hashed, sent = (
            f"openssl dgst -sha256 -binary {shlex.quote(data_file)}",
            f" --data-binary @{shlex.quote(data_file)}",
        )
    else:
        hashed = f"printf %s {shlex.quote(data or '')} | openssl dgst -sha256 -binary"
        sent = f" --data-raw {shlex.quote(data)}" if data else ""
    typed = " -H 'Content-Type: application/json'" if data else ""
    url = _url(environ)
    return f"""\
# The secret shows in the process list while openssl runs.
secret={secret}
timestamp=$(date +%s%3N)
nonce=$(openssl rand -hex 16)
body_hash=$({hashed} | openssl base64 -A)
signature=$(printf '%s\\n%s\\n%s\\n%s\\n%s' {method} {shlex.quote(target)} "$timestamp" "$nonce" "$body_hash" |
  openssl dgst -sha256 -hmac "$secret" -binary | openssl base64 -A)
curl -g --path-as-is -X {method}{typed}{sent}{named} -H "X-DR-Timestamp: $timestamp" -H "X-DR-Nonce: $nonce" \\
  -H "X-DR-Signature: $signature" {shlex.quote(url + target)}"""


def _url(environ: Mapping[str, str]) -> str:
    port = environ.get("DOCKER_RUNNER_PORT") or "7071"
    return (environ.get("DOCKER_RUNNER_URL") or f"http://127.0.0.1:{port}").rstrip("/")


def curl(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run curl with its usual arguments against the runner, signed; becomes curl, so returns only on failure.

    Raises:
        UsageError: the arguments cannot be signed.
        SettingsError: there is no secret.
    """
    name, secret = read_keyring(environ).secrets[0]
    signed = signed_arguments(arguments, _url(environ), secret, name)
    try:
        os.execvp("curl", ["curl", *signed])
    except OSError as error:
        raise UsageError(f"curl cannot be run: {error.strerror}") from error
