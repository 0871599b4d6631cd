"""The service as one ASGI application, built from its settings. Nothing is global: two can live in one process."""

import sys
import time
from collections.abc import Callable
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from admission import Authentication, Limits
from audit import Audit
from auth import Verifier, wall_clock_ms
from calls import Endings
from dockerapi import Engine
from engine_watch import EngineWatch
from event_hub import EventHub
from expiry import Expiry
from logs import form_for
from metrics import Metrics
from process_tree import LIMIT_S
from proxy import EngineFace
from runner_face import create_runner_face
from scope import Scopes
from settings import Settings
from shortcut import Shortcut
from workloads import Options


class App:
    """The whole service as one ASGI application.

    `verifier` may be given new secrets while it runs, and `policies` may be replaced. `watch` is to be begun.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock_ms: Callable[[], int] = wall_clock_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.engine = Engine(
            settings.engine_socket,
            max_connections=settings.engine_connections,
            queue_s=settings.engine_queue_s,
            connect_s=settings.engine_connect_s,
            on_answered=self.metrics.engine_answered,
        )
        self.watch = EngineWatch(self.engine, connect_s=settings.engine_connect_s, every_s=settings.engine_watch_s)
        self.verifier = Verifier(
            settings.keyring, ttl_ms=settings.signature_ttl_ms, max_nonces=settings.max_nonces, clock_ms=clock_ms
        )
        self.policies = settings.policies
        self._expires = settings.expiry_interval_s > 0
        scopes = Scopes(self.engine)
        self.audit = Audit(settings.audit or form_for(settings.log_format, sys.stdout))
        self.expiry = Expiry(
            self.engine,
            self.audit,
            lambda: self.policies,
            instance=settings.instance,
            interval_s=settings.expiry_interval_s,
            clock=clock,
            on_reaped=self.metrics.reaped,
        )
        self.metrics.expiring = lambda: len(self.expiry)
        self._engine_face = EngineFace(
            self.engine,
            head_s=settings.engine_head_s,
            event_buffer=settings.event_buffer,
            first_frame_s=settings.body_timeout_s,
            policies=lambda: self.policies,
            scopes=scopes,
            metrics=self.metrics,
            expiry=self.expiry,
        )
        options = _options(settings, self.metrics)
        self._endings = Endings()
        self._runner_face = create_runner_face(
            self.engine, options, lambda: self.policies, scopes, self.expiry, self._endings, clock
        )
        self.protected = Authentication(
            self._route,
            self.verifier,
            _limits(settings),
            self.audit,
            self.metrics,
            settings.path_prefix.encode(),
            settings.local_key or None,
        )
        self.at_once = Shortcut(self.protected, self._engine_face, reads_only=bool(settings.trusted_proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await self.protected(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        target: bytes = scope["docker_runner.request"].target
        if target.startswith(b"/v1/"):
            # Without the prefix of a proxy in front, which is no business of the routes.
            scope["path"] = unquote(target.partition(b"?")[0].decode("latin-1"))
            await self._runner_face(scope, receive, send)
        else:
            await self._engine_face(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        if self._expires:
            self.expiry.begin()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._endings.settle(LIMIT_S)
        await self.watch.end()
        await self.expiry.end()
        self.engine.close()
        await send({"type": "lifespan.shutdown.complete"})


def _options(settings: Settings, metrics: Metrics) -> Options:
    return Options(
        default_image=settings.default_image,
        max_output=settings.max_output,
        head_s=settings.engine_head_s,
        keep_alive_s=settings.sse_keep_alive_s,
        event_buffer=settings.event_buffer,
        metrics=metrics,
        event_hub=EventHub(settings.sse_keep_alive_s, metrics.events_passed),
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_body=settings.max_body,
        max_upload=settings.max_upload,
        max_unverified=settings.max_unverified,
        body_timeout_s=settings.body_timeout_s,
        max_requests=settings.max_requests,
        max_streams=settings.max_streams,
    )


def create_app(settings: Settings) -> App:
    """The service. Nothing is global: two of them can live in one process."""
    return App(settings)
