"""The audit log: one line for each request that was refused, and for each that was to change something.

A line says who asked for what, when, and what came of it; never a secret, a signature, a header, a query, or a body.
What callers choose (names, paths, ids) is shown so that it can neither end a line nor begin a field of its own.

Lines go out one write each, when the request has ended. None is dropped: whoever reads them sets the pace.
"""

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

from errors import RunnerError

log = logging.getLogger("docker_runner.audit")

FORMS = ("json", "text", "off")
MAX_SHOWN = 256
"""Characters that are shown of a value which a caller chose."""
_BARE = re.compile(r"[!#-<>-~]+")
_FAILURE = re.compile(r"engine_\w+|no_such_\w+|\w+_failed|exec_\w*timeout|conflict|container_stopped_paused")
_FAILURES = frozenset(("bad_parameter", "server_error", "output_too_large", "docker_unavailable", "internal_error"))

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The id of the request that is being served, for every line of the log."""


class Asked(msgspec.Struct, frozen=True):
    """What a request asks for, as soon as that is known.

    `operation` is the official id, or for the runner face the route; `stands_for` then holds the ids of the operations
    that it is made of. `named` gives the id or name of the object, and is called if there is a line to write.
    """

    operation: str
    changes: bool
    named: Callable[[], str]
    stands_for: tuple[str, ...] = ()


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line; fields that say nothing are left out. `ms` is the whole time, `bytes` the length of the answer's body."""

    time: str
    decision: str
    operation: str = ""
    operations: tuple[str, ...] = ()
    request: str = ""
    object: str = ""
    status: int = 0
    code: str = ""
    rule: str = ""
    ms: float
    bytes: int = 0
    key: str = ""
    client: str
    id: str


class Audit:
    """Writes the lines.

    Args:
        form: `json`, `text` or `off`.
        write: takes a whole line.
        clock_s: seconds since the epoch.
    """

    def __init__(
        self,
        form: str,
        write: Callable[[bytes], None] | None = None,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._form = form
        self._write = write or _Stdout()
        self._clock_s = clock_s

    def record(
        self,
        *,
        request_id: str,
        client: str,
        method: str,
        target: bytes,
        asked: Asked | None = None,
        admitted: bool = True,
        error: RunnerError | None = None,
        status: int = 0,
        sent: int = 0,
        took_s: float = 0.0,
        key: str | None = None,
    ) -> None:
        """Tell of a request that has ended, if it was refused or was to change something.

        Args:
            request_id, client: of the request, and the address that it came from.
            method, target: as sent; shown (without the query) where it is not known what was asked for.
            asked: what was.
            admitted: it was verified whole.
            error: what the runner answered instead of the engine, or what broke the answer off.
            status: that was answered; 0 for none.
            sent: bytes of the answer's body.
            took_s: from the request's head to its end.
            key: the name of the key that signed.
        """
        refused = error is not None and (not admitted or not is_failure(error.code))
        if self._form == "off" or not (refused or (asked is not None and asked.changes)):
            return
        now = datetime.fromtimestamp(self._clock_s(), UTC).isoformat(timespec="milliseconds")
        line = Line(
            time=now.replace("+00:00", "Z"),
            decision="refused" if refused else "allowed",
            operation=asked.operation if asked else "",
            operations=asked.stands_for if asked else (),
            request="" if asked else shown(f"{method} {target.partition(b'?')[0].decode('latin-1')}"),
            object=shown(asked.named()) if asked else "",
            status=status,
            code=error.code if error else "",
            rule=shown((error.details or {}).get("rule", "")) if error else "",
            ms=round(took_s * 1000, 3),
            bytes=sent,
            key=shown(key or ""),
            client=shown(client),
            id=request_id,
        )
        self._write((msgspec.json.encode(line) if self._form == "json" else _text(line).encode()) + b"\n")


def is_failure(code: str) -> bool:
    """Whether a code says that an allowed operation failed (the engine's doing), not that the runner refused it."""
    return code in _FAILURES or _FAILURE.fullmatch(code) is not None


def shown(text: str) -> str:
    """A caller's text with nothing in it that a terminal or a reader of lines takes for more than text."""
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "..."
    return text if text.isprintable() and "\\" not in text else repr(text)[1:-1]


def _text(line: Line) -> str:
    fields = msgspec.structs.asdict(line)
    parts = [fields.pop("time"), fields.pop("decision"), fields.pop("operation") or "-"]
    for name, value in fields.items():
        if value:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"{name}={text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)}")
    return " ".join(parts)


class _Stdout:
    """Standard output, one write a line; where it fails, the log says so, once until it works again."""

    def __init__(self) -> None:
        self._works = True

    def __call__(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                try:
                    left = left[os.write(sys.stdout.fileno(), left) :]
                except BlockingIOError:  # Somebody who shares the pipe made it so.
                    poll = select.poll()
                    poll.register(sys.stdout.fileno(), select.POLLOUT)
                    poll.poll()
        except (OSError, ValueError) as error:
            if self._works:
                log.error("the audit log cannot be written: %s", error)
            self._works = False
        else:
            self._works = True
