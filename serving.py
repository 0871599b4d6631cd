"""What `serve` does: the service run until SIGTERM, its secrets, policy and certificates read again on SIGHUP."""

import asyncio
import logging
import socket
import ssl
import sys
import time
from collections.abc import Mapping

import admission
import local_socket
import logs
from app import create_app
from auth import Keyring
from client import __version__
from commands import SHORTEST_SECRET, allow_many_files
from policy import PRESETS, Policies
from protocols import Refusal
from server import BACKLOG, create_server, listen
from settings import Settings, SettingsError, read_keyring, read_policies, read_settings, read_tls

MAX_NAMES = 32
"""Of keys, in the line that tells of the start."""

log = logging.getLogger("docker_runner")


def serve(environ: Mapping[str, str]) -> int:
    """Run the service until SIGTERM; returns the exit status.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    settings = read_settings(environ)
    logs.set_up(settings.log_level, settings.log_format)
    sockets = _listen(settings)
    local = _listen_locally(settings)
    metrics = _listen_for_metrics(settings)
    _warn_of_short_secrets(settings.keyring)
    _tell_of_nobodys(settings.policies, settings.keyring)
    allow_many_files()
    service = _Service(settings, environ, sockets, local, metrics)
    identity = local_socket.identify(settings.local_socket) if local else (0, 0)
    try:
        service.server.run(sockets)
    finally:
        if local:
            local_socket.remove(settings.local_socket, identity)
    return 0


class _Service:
    """The application and its server, and what the server tells.

    Args:
        settings: of both.
        environ: what they were read from; parts are read again.
        sockets: that it listens on.
        local: another, that takes unsigned requests.
        metrics: those for metrics, if there are any.
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        sockets: list[socket.socket],
        local: socket.socket | None,
        metrics: list[socket.socket],
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._sockets = sockets
        self._metrics = metrics
        self._serving_metrics: asyncio.Task[None] | None = None
        self._app = create_app(settings)
        self.server = create_server(
            self._app,
            at_once=self._app.at_once,
            head_timeout_s=settings.head_timeout_s,
            keep_alive_s=settings.keep_alive_s,
            grace_s=settings.grace_s,
            max_connections=settings.max_connections,
            tls=settings.tls,
            local=local,
            on_refused=self._refused,
            trusted_proxies=settings.trusted_proxies,
            on_reload=self._reload,
            on_started=self._started,
        )

    def _started(self) -> None:
        asyncio.get_running_loop().set_exception_handler(logs.on_loop_error)
        settings = self._settings
        addresses = [_address(sock, secure=settings.tls is not None) for sock in self._sockets]
        if settings.local_socket:
            addresses.append(f"unix://{settings.local_socket} (unsigned)")
        log.info(
            "docker-runner %s listens on %s",
            __version__,
            ", ".join(addresses),
            extra={
                "fields": {
                    "version": __version__,
                    "python": sys.version.split()[0],
                    "engine": settings.engine_socket,
                    "tls": _tls(settings.tls),
                    **_policies(self._environ, settings.policies),
                    **_keys(settings.keyring),
                    "audit": settings.audit or logs.form_for(settings.log_format, sys.stdout),
                }
            },
        )
        self._app.watch.begin()
        if self._metrics:
            self._serve_metrics()

    def _serve_metrics(self) -> None:
        import metrics_server  # Late: only where they are wanted.

        connections = self.server.server_state.connections
        app = metrics_server.MetricsApp(
            self._app, lambda: len(connections), self._settings.max_connections, time.monotonic
        )
        self._serving_metrics = asyncio.get_running_loop().create_task(metrics_server.serve(app, self._metrics))
        self._serving_metrics.add_done_callback(_tell_of_failure)
        for sock in self._metrics:
            log.info("metrics are at %s%s", _address(sock, secure=False), metrics_server.PATH)

    def _reload(self) -> None:
        """Read secrets, policy and certificate again, each by itself: one that is wrong stays as it was."""
        try:
            self._app.verifier.keyring = read_keyring(self._environ)
        except SettingsError as error:
            log.error("kept the old secrets: %s; mend that, and send SIGHUP again", error)
        else:
            keyring = self._app.verifier.keyring
            log.info("read the secrets again: %d accepted", len(keyring.secrets), extra={"fields": _keys(keyring)})
            _warn_of_short_secrets(self._app.verifier.keyring)
        try:
            self._app.policies = read_policies(self._environ)
        except SettingsError as error:
            log.error("kept the old policy: %s; mend that, and send SIGHUP again", error)
        else:
            fields = _policies(self._environ, self._app.policies)
            log.info("read the policy again: %s", fields["policy"], extra={"fields": fields})
        _tell_of_nobodys(self._app.policies, self._app.verifier.keyring)
        if self.server.tls is not None:
            try:
                self.server.tls = read_tls(self._environ)
            except SettingsError as error:
                log.error("kept the old certificate: %s; mend that, and send SIGHUP again", error)
            else:
                log.info("read the certificate again")

    def _refused(self, refusal: Refusal) -> None:
        """What the server refused by itself, before the application."""
        client = refusal.local or admission.address(refusal.client)
        error = refusal.error
        log.info("%s refused: %s: %s", client, error.code, error.message, extra={"request_id": refusal.id})
        self._app.metrics.refused(refusal.target, error)
        self._app.audit.record(
            request_id=refusal.id,
            client=client,
            method=refusal.method,
            target=refusal.target,
            admitted=False,
            error=error,
            status=error.status,
        )


def _tell_of_failure(serving: asyncio.Task[None]) -> None:
    if not serving.cancelled() and (error := serving.exception()) is not None:
        log.error("metrics are not served any more: %s", error)


def _address(sock: socket.socket, *, secure: bool) -> str:
    host, port = sock.getsockname()[:2]
    return f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def _tls(context: ssl.SSLContext | None) -> str:
    if context is None:
        return "off"
    return "mutual" if context.verify_mode == ssl.CERT_REQUIRED else "on"


def _policies(environ: Mapping[str, str], policies: Policies) -> dict[str, object]:
    """Which policy holds, whose own is another, and whose scope is which label."""
    named = environ.get("DOCKER_RUNNER_POLICY", "")
    every = {"default": policies.default, **policies.keys}
    scopes = [f"{owner}:{policy.scope.label}" for owner, policy in every.items() if policy.scope.label]
    return {
        "policy": policies.default.name,
        "policy_file": "" if named in PRESETS else named,
        "key_policies": _first([f"{key}:{policy.name}" for key, policy in policies.keys.items()]),
        "scopes": _first(scopes) or ("none",),
    }


def _keys(keyring: Keyring) -> dict[str, object]:
    """Whose secrets there are, and how many; never a part of one."""
    names = _first([name or "(unnamed)" for name in keyring.names()])
    return {"keys": names, "secrets": len(keyring.secrets)}


def _first(names: list[str]) -> tuple[str, ...]:
    more = len(names) - MAX_NAMES
    return (*names[:MAX_NAMES], f"({more} more)") if more > 0 else tuple(names)


def _listen(settings: Settings) -> list[socket.socket]:
    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        reason = error.strerror or str(error)
        raise SettingsError(f"DOCKER_RUNNER_HOST, DOCKER_RUNNER_PORT: cannot listen on {where}: {reason}") from error


def _listen_for_metrics(settings: Settings) -> list[socket.socket]:
    if settings.metrics_port is None:
        return []
    try:
        return listen(settings.metrics_host, settings.metrics_port)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        reason = error.strerror or str(error)
        names = "DOCKER_RUNNER_METRICS_HOST, DOCKER_RUNNER_METRICS_PORT"
        raise SettingsError(f"{names}: cannot listen on {where}: {reason}") from error


def _listen_locally(settings: Settings) -> socket.socket | None:
    if not settings.local_socket:
        return None
    try:
        return local_socket.listen(settings.local_socket, BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"DOCKER_RUNNER_LOCAL_SOCKET: {settings.local_socket}: {reason}") from error


def _tell_of_nobodys(policies: Policies, keyring: Keyring) -> None:
    """A policy of a key that is not there: misspelt, perhaps, and then the key has the default policy."""
    for name in policies.keys.keys() - {owner for owner, _ in keyring.secrets}:
        log.error("the policy [keys.%s] is nobody's: no secret has that name; see `docker-runner check`", name)


def _warn_of_short_secrets(keyring: Keyring) -> None:
    if any(len(secret) < SHORTEST_SECRET for _, secret in keyring.secrets):
        log.warning(
            "a shared secret is shorter than %d characters: make one with `openssl rand -hex 32`", SHORTEST_SECRET
        )
