"""Runners under a policy of the test's own: a file that is written, and read again."""

import json
import re
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dev import wait_until
from service import Answer, Runner


class Policed(Runner):
    """A runner whose policy is a file; `set` writes it and waits until it is read.

    Args:
        engine_socket: path of the engine's socket.
        file: of the policy; made here.
        environ: further settings.
    """

    def __init__(self, engine_socket: str, file: Path, environ: Mapping[str, str] | None = None) -> None:
        self._file = file
        file.write_text("")
        super().__init__(engine_socket, {"DOCKER_RUNNER_POLICY": str(file), **(environ or {})})

    def set(self, policy: str) -> str:
        """Have this policy read; returns the line of the log that tells how it went."""
        said = len(self.log)
        self._file.write_text(policy)
        self.process.send_signal(signal.SIGHUP)

        def told() -> list[str]:
            return [line for line in self.log[said:] if re.search("read the policy again|kept the old policy", line)]

        assert wait_until(lambda: bool(told()), 10)
        return told()[0]


def error_of(answer: Answer) -> dict[str, Any]:
    """The runner's own error; empty where the answer is the engine's."""
    try:
        found = json.loads(answer.body)
    except ValueError:
        return {}
    error = found.get("error", {}) if isinstance(found, dict) else {}
    return error if isinstance(error, dict) else {}


def with_line(policy: str, line: str) -> str:
    """A policy file after somebody put the line of a refusal into it: in its table, in place of what it says there."""
    header, _, assignment = line.rpartition("]] ") if line.startswith("[[") else line.partition("] ")
    if not line.startswith("["):
        return line + "\n" + re.sub(rf"(?m)^{line.split(' ')[0]} =.*\n", "", policy)
    if assignment.startswith("binds ="):
        policy = re.sub(r"\[\[container.binds\]\]\n(\w+ = .*\n)*", "", policy)
    header += "]]" if line.startswith("[[") else "]"
    if header not in policy or header.startswith("[["):
        text = f"{policy}\n{header}\n{assignment}\n"
    else:
        name = assignment.split(" ")[0]
        before, after = policy.split(header + "\n", 1)
        table, bracket, rest = after.partition("\n[")
        table = re.sub(rf"(?m)^{name} =.*\n?", "", table)
        text = f"{before}{header}\n{assignment}\n{table}{bracket}{rest}"
    tomllib.loads(text)
    return text
