"""The documents, and which test runs each of their examples.

`block` hands out a fenced block, and notes that somebody has it; `test_docs.py` sees to it that every block is had.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dev.tables import DOCUMENTS
from service import ROOT

TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
"""By path, from the top."""
HAD: set["Block"] = set()


class Block(msgspec.Struct, frozen=True):
    """A fenced block of a document."""

    page: str
    language: str
    text: str


BLOCKS = [
    Block(page, *found)
    for page, text in TEXTS.items()
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]


def block(page: str, mark: str) -> str:
    """The block of a page that is the mark, else the one that holds it. To be called when a test file is imported."""
    blocks = [each for each in BLOCKS if each.page == page]
    (found,) = [each for each in blocks if each.text == mark] or [each for each in blocks if mark in each.text]
    HAD.add(found)
    return found.text


def example(page: str, *marks: str) -> pytest.MarkDecorator:
    """Hands a test the blocks with these marks, one after the other, as `script`."""
    cases: list[Any] = [pytest.param(block(page, mark), id=mark) for mark in marks]
    return pytest.mark.parametrize("script", cases)


def section(page: str, heading: str) -> str:
    """A section of a page, without those below the next heading of its level or above."""
    level = heading.split(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", TEXTS[page], re.DOTALL | re.MULTILINE
    )
    assert found is not None, f"{page} has no {heading!r}"
    return found[1]


def run_in(folder: Path, script: str, environ: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """A documented script, as a person in `folder` runs it who has `docker-runner` in the path."""
    path = f"{Path(sys.executable).parent}:{environ.get('PATH', os.environ['PATH'])}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(
        command, cwd=folder, env={**environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
