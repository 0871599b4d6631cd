"""The table of docs/engines.md against what is shown. (`tests/test_docs.py` holds the document to the table.)"""

import importlib
import re
from pathlib import Path

from conftest import EngineDirect
from documents import TEXTS
from on_podman.differences import DIFFERENCES, REPLACED, SHOWN

HERE = Path(__file__).parent


def test_every_difference_is_shown_and_what_is_replaced_is_there_for_the_other_engine() -> None:
    for path in HERE.glob("test_*.py"):
        importlib.import_module(f"on_podman.{path.stem}")
    assert set(DIFFERENCES) == SHOWN
    assert {test.__module__ for test in REPLACED} <= {path.stem for path in HERE.parent.glob("test_*.py")}


def test_all_of_both_suites_runs_here() -> None:
    suites = {path.name for pattern in ("test_wire_*.py", "test_engine_face*.py") for path in HERE.parent.glob(pattern)}
    of_documents = {"test_wire_docs.py"}
    assert suites - of_documents == {path.name for path in HERE.glob("test_*.py")} & suites


def test_the_documented_version_is_the_tested_one(direct: EngineDirect) -> None:
    found = direct.request("GET", "/version").json()
    minor = re.match(r"\d+\.\d+", found["Version"])
    assert minor is not None
    assert f"| Podman's API service | {minor[0]}" in TEXTS["docs/engines.md"]
