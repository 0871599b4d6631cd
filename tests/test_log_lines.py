"""Lines of the logs: what nobody can forge, what Python and asyncio say in them, and what is documented."""

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import logs
from audit import Asked, Audit
from both_logs import NAMED, ask, keys_and_scopes, port_of, serving
from client import sign
from dev.engine import Engine
from documents import block
from errors import RunnerError
from service import ROOT

PAGE = "docs/operations.md"
FORGED = '\n{"level":"fatal"}\r\x1b[2K\x9b31m\x07\u2028\u202e" x=1'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return keys_and_scopes(tmp_path_factory.mktemp("files"))


# What nobody can forge.


class Written:
    """The lines of a handler of a form."""

    def __init__(self, form: str) -> None:
        self.lines: list[bytes] = []
        self.logger = logging.Logger("docker_runner.test")
        self.logger.addHandler(logs._Handler(form, self.lines.append))


@given(
    texts=st.lists(st.text() | st.text(st.characters(categories=["Cc", "Cs", "Cf", "Zl"])), min_size=4, max_size=4),
    forged=st.booleans(),
)
def test_any_text_in_any_place_is_one_line(texts: list[str], forged: bool) -> None:
    message, field, item, trace = [text + FORGED for text in texts] if forged else texts
    for form in ("json", "text"):
        written = Written(form)
        extra = {"fields": {"field": field, "items": (item,)}, "request_id": "me"}
        try:
            raise ValueError(trace)
        except ValueError:
            written.logger.exception("%s", message, extra=extra)
        (line,) = written.lines
        first, *rest = line.decode().removesuffix("\n").split("\n")
        assert all(part.isprintable() for part in (first, *rest))
        if form == "json":
            assert not rest
            told = json.loads(line)
            assert (told["level"], told["request_id"]) == ("error", "me")
            assert all(part.isprintable() for part in told["exception"].split("\n"))
        else:
            assert all(part.startswith("    ") for part in rest)


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_have_bounds(form: str) -> None:
    written = Written(form)
    try:
        raise ValueError("x" * 1_000_000 + "the end")
    except ValueError:
        extra = {"fields": {"field": "x" * 1_000_000}}
        written.logger.exception("x" * 1_000_000, extra=extra)
    (line,) = written.lines
    assert len(line) < 64 * 1024
    assert b"the end" in line


def test_a_slip_in_a_call_costs_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    written = Written("json")
    written.logger.error("%d and %d", "one")
    assert json.loads(written.lines[0])["message"] == "%d and %d (its arguments do not fit)"
    assert capsys.readouterr().err == ""


def test_times_are_those_of_the_clock() -> None:
    assert logs.timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert logs.timestamp(1_795_575_054.9996) == "2026-11-25T02:50:54.999Z"


# What Python and asyncio say.


def run(source: str, form: str = "json", *arguments: str) -> tuple[int, str]:
    """A program that logs as the service does: its status and its stderr."""
    program = f"import asyncio, logging, sys, threading, warnings, logs\nlogs.set_up('info', {form!r})\n{source}"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


IN_LOOP = (
    "import uvloop\nasync def main():\n  loop = asyncio.get_running_loop()\n"
    "  loop.set_exception_handler(logs.on_loop_error)\n"
)
RAISES = "def fail(): raise ValueError('a\\nb')\n"


@pytest.mark.parametrize(
    ("source", "status", "level", "logger", "message"),
    [
        (RAISES + "fail()", 1, "fatal", "docker_runner", "ended by a defect: please report it with this trace"),
        (
            RAISES + "t = threading.Thread(target=fail); t.start(); t.join()",
            0,
            "error",
            "docker_runner",
            "a thread ended by a defect: please report it with this trace",
        ),
        (
            "class A:\n  def __del__(self): raise ValueError('a\\nb')\nA()\n",
            0,
            "error",
            "docker_runner",
            "a defect where nothing can be raised: please report it with this trace",
        ),
        (
            RAISES
            + IN_LOOP
            + "  loop.call_soon(lambda secret: fail(), 'hidden'); await asyncio.sleep(0)\nasyncio.run(main())",
            0,
            "error",
            "asyncio",
            None,
        ),
        (
            RAISES
            + IN_LOOP
            + "  loop.call_soon(lambda secret: fail(), 'hidden'); await asyncio.sleep(0)\nuvloop.run(main())",
            0,
            "error",
            "asyncio",
            None,
        ),
        (
            RAISES
            + "async def work(): fail()\n"
            + IN_LOOP
            + "  asyncio.ensure_future(work()); await asyncio.sleep(0)\nuvloop.run(main())",
            0,
            "error",
            "asyncio",
            "Task exception was never retrieved",
        ),
    ],
)
def test_exceptions_that_nobody_caught(source: str, status: int, level: str, logger: str, message: str | None) -> None:
    done, said = run(source)
    (line,) = [json.loads(line) for line in said.splitlines()]
    assert (done, line["level"], line["logger"]) == (status, level, logger)
    assert message is None or line["message"] == message
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("\nValueError: a\nb")
    assert "hidden" not in said
    done, said = run(source, "text")
    first, *rest = said.rstrip("\n").split("\n")
    assert re.match(rf"\S+Z {level} +{logger}: ", first)
    assert all(part.startswith("    ") for part in rest)


def test_warnings() -> None:
    _, said = run("warnings.warn('of something\\nforged', UserWarning)")
    (line,) = [json.loads(line) for line in said.splitlines()]
    assert (line["level"], line["logger"]) == ("warn", "py.warnings")
    assert line["message"].startswith("UserWarning: of something\\nforged (<string>:")


def test_libraries_are_heard_from_warnings_on() -> None:
    _, said = run("logs.set_up('trace', 'json'); l = logging.getLogger('some.library'); l.info('x'); l.warning('y')")
    assert [json.loads(line)["message"] for line in said.splitlines()] == ["y"]


def test_half_a_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    """A disk that is full in the midst of a line, and later is not: here a limit on the length of files."""
    source = (
        "import resource, signal\n"
        "most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "limit = lambda length: resource.setrlimit(resource.RLIMIT_FSIZE, (length, most))\n"
        "told = []\n"
        "output = logs.Output(open(sys.argv[1], 'w'), told.append, told.append)\n"
        "limit(5); output(b'first line\\n'); output(b'second\\n')\n"
        "limit(most); output(b'third\\n'); output(b'fourth\\n')\n"
        "logging.getLogger('docker_runner').info('%s, then %s', *told)\n"
    )
    status, said = run(source, "json", str(tmp_path / "out"))
    assert status == 0, said
    assert (tmp_path / "out").read_bytes() == b"first\nthird\nfourth\n"
    assert json.loads(said)["message"] == "[Errno 27] File too large, then 2"


# What the documents and the code say.


JSON = block(PAGE, 'docker-runner 0.1.0 listens on http://127.0.0.1:7071",').splitlines()
TEXT = block(PAGE, "version=0.1.0").splitlines()
AUDIT = block(PAGE, '"message":"refused ContainerCreate"').splitlines()


def shape(value: Any) -> Any:
    """Names in their order, and kinds."""
    if isinstance(value, dict):
        return [(name, shape(item)) for name, item in value.items()]
    return type(value).__name__


def masked(text: str) -> str:
    """A text line without what differs from one run to another."""
    text = re.sub(r"^\S+Z", "TIME", text)
    text = re.sub(r'=(?:"[^"]*"|\S+)', "=VALUE", text)
    text = re.sub(r"\[[0-9a-f]{16}\]", "[ID]", text)
    text = re.sub(r"http://\S+:\d+", "URL", re.sub(r"from \S+: ", "from ADDRESS: ", text))
    return re.sub(r"Engine \S+, API \S+", "Engine VERSION", text)


@pytest.fixture(scope="module", params=["json", "text"])
def real(request: pytest.FixtureRequest, engine: Engine, files: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """What is really written in the documented situation, in a form."""
    form: str = request.param
    with serving(engine.socket, {**files, "DOCKER_RUNNER_LOG_FORMAT": form}) as watched:
        port = port_of(watched)
        watched.err.wait_for("the engine is there")
        ask(port, "GET", "/nowhere")
        for target, body in (
            ("/containers/no-such/start", b""),
            ("/containers/create?name=no-such", b'{"Image":"no-such-image"}'),
            ("/containers/create?name=no-such", b'{"Image":"x","HostConfig":{"Privileged":true}}'),
        ):
            signed = sign(NAMED, "POST", target, body, key="ci")
            ask(port, "POST", target, {**signed, "Content-Type": "application/json"}, body)
        watched.stop()
        yield form, [*watched.err.text.split("\n"), *watched.out.text.split("\n")]


def test_the_documented_lines_are_such_as_are_written(real: tuple[str, list[str]]) -> None:
    form, lines = real
    if form == "json":
        for line in map(json.loads, JSON):
            written = [json.loads(other) for other in lines if json.loads(other)["logger"] == line["logger"]]
            assert shape(line) in [shape(other) for other in written], (line, written)
    else:
        for text in TEXT[:-1]:
            assert masked(text) in [masked(other) for other in lines], (
                masked(text),
                [masked(other) for other in lines],
            )


def test_the_documented_lines_of_the_audit_log_are_its_own() -> None:
    for text in AUDIT + TEXT[-1:]:
        line = json.loads(text) if text.startswith("{") else None
        written: list[bytes] = []
        refused = line is not None and line["decision"] == "refused"
        Audit("json" if line else "text", written.append).record(
            request_id="2387eb3f7f806360",
            client="10.0.0.7:40112",
            method="POST",
            target=b"/",
            asked=Asked("ContainerCreate" if line else "ContainerStart", True, lambda: "web"),
            error=RunnerError("policy_denied", "x", details={"rule": "x"}) if refused else None,
            status=1,
            sent=1,
            key="ci",
            took_s=1.0,
        )
        if line:
            assert shape(line) == shape(json.loads(written[0]))
        else:
            assert masked(text) == masked(written[0].decode().rstrip("\n"))


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.name, node


def test_messages_begin_in_lower_case_and_are_put_together_only_if_told() -> None:
    seen = 0
    for name, node in calls():
        function = node.func
        if not (isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "log"):
            continue
        if function.attr not in ("debug", "info", "warning", "error", "exception", "critical"):
            continue
        first = node.args[0]
        assert isinstance(first, ast.Constant), f"{name}:{node.lineno}"
        assert re.match(r"[a-z%]", str(first.value)), f"{name}:{node.lineno}"
        seen += 1
    assert seen > 20


def test_only_commands_print_and_nothing_else_sets_logging_up() -> None:
    prints = {name for name, node in calls() if getattr(node.func, "id", "") == "print"}
    assert prints <= {"commands.py", "runner.py"}
    assert not [name for name, node in calls() if getattr(node.func, "attr", "") == "basicConfig"]
