"""The form of every line that this process writes: the log on stderr, and the audit log, which goes to stdout.

Both name their fields alike: `time` (RFC 3339, UTC, milliseconds), `level`, `logger`, `message`, `request_id`, then
what the line is about, then `exception`. As JSON a line is one object; as text it is

    TIME LEVEL LOGGER: [REQUEST_ID] MESSAGE NAME=VALUE...

with the trace of an exception indented below it. Whoever chose a text, nothing in it ends a line, begins another, or
means more than text to a terminal. Lines have bounds, and leave in one write each.
"""

import asyncio
import json
import logging
import os
import re
import select
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from types import TracebackType
from typing import Any, TextIO

import msgspec

LEVELS: Mapping[str, int] = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40, "fatal": 50}
FORMATS = ("auto", "json", "text")
MAX_SHOWN = 256
"""Characters that are shown of a value which a caller chose."""
MAX_MESSAGE = 4096
"""Characters of a message, and of the value of a field."""
MAX_EXCEPTION = 16 * 1024
"""Characters of an exception and its trace; the last ones are kept."""
_BARE = re.compile(r"[!#-<>-~]+")

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The id of the request that is being served, for every line of the log."""

log = logging.getLogger("docker_runner")


def set_up(level: str, form: str) -> None:
    """Send all that this process logs to stderr: its own, uvicorn's, asyncio's, warnings, and exceptions that nobody
    caught. An event loop has to be given `on_loop_error` besides.

    Args:
        level: of `LEVELS`: the least that is told.
        form: of `FORMATS`; `auto` is text on a terminal, else JSON.
    """
    _claim_numbers()
    least = LEVELS[level]
    handler = _Handler(form_for(form, sys.stderr), Output(sys.stderr))
    handler.setLevel(least)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # What libraries say below a warning may hold what passes through them: queries, headers, frames. It is let through
    # by name only. Below "debug" uvicorn, too, tells of each request, with its query.
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("uvicorn").setLevel(max(least, logging.DEBUG))
    for name in ("docker_runner", "asyncio"):
        logging.getLogger(name).setLevel(least)
    logging.captureWarnings(True)
    warnings.formatwarning = _warning
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def _claim_numbers() -> None:
    """Where the process was started with one of its standard streams closed, let no socket take that number: what is
    written to stderr would go to a caller, and libuv ends a process that closes such a one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest that is free.


def form_for(form: str, stream: TextIO | None) -> str:
    """`json` or `text`: what is said, or for `auto` what suits the stream (None: it is closed)."""
    if form != "auto":
        return form
    return "text" if stream is not None and stream.isatty() else "json"


def timestamp(epoch_s: float) -> str:
    """A time as RFC 3339 has it, in UTC, with milliseconds."""
    whole = int(epoch_s)
    return f"{_second(whole)}.{int((epoch_s - whole) * 1000):03d}Z"


@lru_cache(maxsize=2)  # Most lines share their second with the one before; this is most of a line's time.
def _second(epoch_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))


def shown(text: str) -> str:
    """A caller's text with nothing in it that a terminal or a reader of lines takes for more than text."""
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "..."
    return text if text.isprintable() and "\\" not in text else repr(text)[1:-1]


def printable(text: str) -> str:
    """As `shown`, for messages: what is printable stays as it is, backslashes too."""
    return _escaped(text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "...")


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_line(head: tuple[str, str, str], request_id: str, message: str, fields: Mapping[str, object]) -> str:
    """A line as text, without its end. Fields that say nothing are left out.

    Args:
        head: time, level, logger.
        request_id: may be empty.
        message, fields: printable.
    """
    moment, level, logger = head
    parts = [f"{moment} {level:<5} {logger}:", *([f"[{request_id}]"] if request_id else ()), message]
    for name, value in fields.items():
        if value:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"{name}={text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)}")
    return " ".join(parts)


class Output:
    """A stream of lines, one write each. What cannot be written is counted, and lost.

    Args:
        stream: standard output or error; None if it is closed.
        on_failure: told when writing begins to fail.
        on_recovery: told when it works again, with how many lines were lost.
    """

    def __init__(
        self,
        stream: TextIO | None,
        on_failure: Callable[[Exception], object] = lambda error: None,
        on_recovery: Callable[[int], object] = lambda lost: None,
    ) -> None:
        self._stream = stream
        self._on_failure = on_failure
        self._on_recovery = on_recovery
        self._lost = 0
        self._torn = False

    def __call__(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line  # Or it would be glued to the half of one that failed.
        left = memoryview(line)
        try:
            if self._stream is None:
                raise ValueError("it is closed")
            number = self._stream.fileno()
            while left:
                try:
                    left = left[os.write(number, left) :]
                except BlockingIOError:  # Somebody who shares the pipe made it so.
                    poll = select.poll()
                    poll.register(number, select.POLLOUT)
                    poll.poll()
        except (OSError, ValueError) as error:
            self._torn = len(left) < len(line) if self._lost == 0 else self._torn
            self._lost += 1
            if self._lost == 1:
                self._on_failure(error)
        else:
            if self._lost:
                lost, self._lost, self._torn = self._lost, 0, False
                self._on_recovery(lost)


class _Handler(logging.Handler):
    """Writes records. `extra` may hold `fields` (a mapping), and a `request_id` in place of the current one's."""

    def __init__(self, form: str, write: Callable[[bytes], None]) -> None:
        super().__init__()
        self._form = form
        self._write = write
        self._traces = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        line = self._json(record) if self._form == "json" else self._text(record)
        self._write(line + b"\n")

    def _json(self, record: logging.LogRecord) -> bytes:
        moment, level, logger = _head(record)
        line: dict[str, object] = {"time": moment, "level": level, "logger": logger, "message": _message(record)}
        if request_id := _request_id(record):
            line["request_id"] = request_id
        line.update(_fields(record))
        if trace := self._trace(record):
            line["exception"] = "\n".join(trace)
        return msgspec.json.encode(line)

    def _text(self, record: logging.LogRecord) -> bytes:
        line = text_line(_head(record), _request_id(record), _message(record), _fields(record))
        return "\n    ".join((line, *self._trace(record))).encode()

    def _trace(self, record: logging.LogRecord) -> list[str]:
        if not record.exc_info or record.exc_info[1] is None:
            return []
        text = self._traces.formatException(record.exc_info)
        if len(text) > MAX_EXCEPTION:
            text = "..." + text[-MAX_EXCEPTION:]
        return [_escaped(line) for line in text.split("\n")]


def _head(record: logging.LogRecord) -> tuple[str, str, str]:
    level = next((name for name, least in reversed(list(LEVELS.items())) if record.levelno >= least), "trace")
    return timestamp(record.created), level, record.name


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # A slip in the call, which must not cost the line, nor the request that it is about.
        text = f"{record.msg} (its arguments do not fit)"
    return printable(text.strip())


def _request_id(record: logging.LogRecord) -> str:
    given: str | None = getattr(record, "request_id", None)
    return current_request.get() if given is None else given


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return {name: _plain(value) for name, value in fields.items() if value not in ("", ())}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(printable(str(item)) for item in value)
    return value if isinstance(value, int | float) else printable(str(value))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For `set_exception_handler`. The usual one shows callbacks with their arguments, and so data of callers."""
    task = context.get("task") or context.get("future")
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else None
    message: str = context.get("message") or "an exception in the event loop"
    logging.getLogger("asyncio").error(
        "%s",
        message.partition("(")[0] if "handle" in context else message,  # There arguments follow.
        exc_info=context.get("exception"),
        # No request's: this may be told while another one is served.
        extra={"request_id": "", "fields": {"task": getattr(coroutine, "__qualname__", "")} if coroutine else {}},
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("ended by a defect: please report it with this trace", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        log.error("a thread ended by a defect: please report it with this trace", exc_info=args.exc_value)


def _unraisable(args: Any) -> None:  # sys.UnraisableHookArgs, which is there for type checkers only.
    where = getattr(args.object, "__qualname__", type(args.object).__name__)
    log.error(
        "a defect where nothing can be raised: please report it with this trace",
        exc_info=args.exc_value,
        extra={"request_id": "", "fields": {"where": where}},
    )
