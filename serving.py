"""What `serve` does: the service run until SIGTERM, its secrets, policy and certificates read again on SIGHUP."""

import logging
import socket
import sys
from collections.abc import Mapping

import admission
import audit
import local_socket
from app import create_app
from auth import Keyring
from client import __version__
from commands import SHORTEST_SECRET, allow_many_files
from policy import Policies
from protocols import Refusal
from server import BACKLOG, create_server, listen
from settings import Settings, SettingsError, read_keyring, read_policies, read_settings, read_tls

_LEVELS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40, "fatal": 50}

log = logging.getLogger("docker_runner")


def serve(environ: Mapping[str, str]) -> int:
    """Run the service until SIGTERM; returns the exit status.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    settings = read_settings(environ)
    _log_to_stderr(_LEVELS[settings.log_level])
    sockets = _listen(settings)
    local = _listen_locally(settings)
    _warn_of_short_secrets(settings.keyring)
    _tell_of_nobodys(settings.policies, settings.keyring)
    allow_many_files()
    service = _Service(settings, environ, sockets, local)
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
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        sockets: list[socket.socket],
        local: socket.socket | None,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._sockets = sockets
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
        settings = self._settings
        scheme = "http" if settings.tls is None else "https"
        for sock in self._sockets:
            host, port = sock.getsockname()[:2]
            address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            log.info("docker-runner %s listens on %s, engine at %s", __version__, address, settings.engine_socket)
        if settings.local_socket:
            log.info("unsigned requests are taken at %s", settings.local_socket)

    def _reload(self) -> None:
        """Read secrets, policy and certificate again, each by itself: one that is wrong stays as it was."""
        try:
            self._app.verifier.keyring = read_keyring(self._environ)
        except SettingsError as error:
            log.error("kept the old secrets: %s", error)
        else:
            log.info("read the secrets again: %d accepted", len(self._app.verifier.keyring.secrets))
            _warn_of_short_secrets(self._app.verifier.keyring)
        try:
            self._app.policies = read_policies(self._environ)
        except SettingsError as error:
            log.error("kept the old policy: %s", error)
        else:
            log.info("read the policy again: %s", self._app.policies.default.name)
        _tell_of_nobodys(self._app.policies, self._app.verifier.keyring)
        if self.server.tls is not None:
            try:
                self.server.tls = read_tls(self._environ)
            except SettingsError as error:
                log.error("kept the old certificate: %s", error)
            else:
                log.info("read the certificate again")

    def _refused(self, refusal: Refusal) -> None:
        """What the server refused by itself, before the application."""
        client = refusal.local or admission.address(refusal.client)
        error = refusal.error
        log.info("%s refused: %s: %s", client, error.code, error.message, extra={"request": f"[{refusal.id}] "})
        self._app.audit.record(
            request_id=refusal.id,
            client=client,
            method=refusal.method,
            target=refusal.target,
            admitted=False,
            error=error,
            status=error.status,
        )


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s", stream=sys.stderr
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_name_request)
    for chatty in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


def _name_request(record: logging.LogRecord) -> bool:
    """Every line about a request bears its id."""
    if not hasattr(record, "request"):
        current = audit.current_request.get()
        record.request = f"[{current}] " if current else ""
    return True


def _listen(settings: Settings) -> list[socket.socket]:
    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        reason = error.strerror or str(error)
        raise SettingsError(f"DOCKER_RUNNER_HOST, DOCKER_RUNNER_PORT: cannot listen on {where}: {reason}") from error


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
        log.error("the policy [keys.%s] is nobody's: no secret has that name", name)


def _warn_of_short_secrets(keyring: Keyring) -> None:
    if any(len(secret) < SHORTEST_SECRET for _, secret in keyring.secrets):
        log.warning(
            "a shared secret is shorter than %d characters: make one with `openssl rand -hex 32`", SHORTEST_SECRET
        )
