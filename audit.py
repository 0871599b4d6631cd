"""The audit log: one line for each request that was refused, and for each that was to change something.

A line says who asked for what, when, and what came of it; never a secret, a signature, a header, a query, or a body.
What callers choose (names, paths, ids) is shown so that it can neither end a line nor begin a field of its own.

Lines go out one write each, when the request has ended. None is dropped: whoever reads them sets the pace.
"""

import logging
import re
import sys
import time
from collections.abc import Callable

import msgspec

from errors import RunnerError
from logs import Output, shown, text_line, timestamp

log = logging.getLogger("docker_runner.audit")

FORMS = ("json", "text", "off")
_LOGGER = log.name
_FAILURE = re.compile(r"engine_\w+|no_such_\w+|\w+_failed|exec_\w*timeout|conflict|container_stopped_paused")
_FAILURES = frozenset(("bad_parameter", "server_error", "output_too_large", "docker_unavailable", "internal_error"))


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
    level: str
    logger: str
    message: str
    request_id: str
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
        self._write = write or Output(sys.stdout, _failed, _recovered)
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
        decision, level = ("refused", "warn") if refused else ("allowed", "info")
        operation = asked.operation if asked else ""
        line = Line(
            time=timestamp(self._clock_s()),
            level=level,
            logger=_LOGGER,
            message=f"{decision} {operation}" if operation else decision,
            request_id=request_id,
            decision=decision,
            operation=operation,
            operations=asked.stands_for if asked else (),
            request="" if asked else shown(f"{method} {target.partition(b'?')[0].decode('latin-1')}".strip()),
            object=shown(asked.named()) if asked else "",
            status=status,
            code=error.code if error else "",
            rule=shown((error.details or {}).get("rule", "")) if error else "",
            ms=round(took_s * 1000, 3),
            bytes=sent,
            key=shown(key or ""),
            client=shown(client),
        )
        self._write((msgspec.json.encode(line) if self._form == "json" else _text(line).encode()) + b"\n")


def is_failure(code: str) -> bool:
    """Whether a code says that an allowed operation failed (the engine's doing), not that the runner refused it."""
    return code in _FAILURES or _FAILURE.fullmatch(code) is not None


def _text(line: Line) -> str:
    fields = msgspec.structs.asdict(line)
    head = fields.pop("time"), fields.pop("level"), fields.pop("logger")
    del fields["decision"], fields["operation"]  # The message says them.
    return text_line(head, fields.pop("request_id"), fields.pop("message"), fields)


def _failed(error: Exception) -> None:
    log.error("the audit log cannot be written: %s; requests go on without: look at what reads stdout", error)


def _recovered(lost: int) -> None:
    log.warning("the audit log is written again; lines lost: %d", lost)
