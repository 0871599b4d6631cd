"""The documents against the code: what is made from it, links, and that every example is run by some test."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import errors
import settings
import workloads
from client import __version__
from dev.tables import TABLES, anchor, cells, rewritten
from documents import BLOCKS, HAD, TEXTS, block, example
from errors import RunnerError
from service import ROOT

every_page = pytest.mark.parametrize("page", TEXTS)

NOT_RUN = {
    ("README.md", "make run    #"): "the second runs this; what the first is made of is tested by test_setup.py",
    ("docs/design.md", "caller ──"): "a drawing",
}
"""Blocks that no test has, with the reason."""


# What the code knows.


@every_page
def test_what_a_document_takes_from_the_code_is_the_codes(page: str) -> None:
    assert TEXTS[page] == rewritten(TEXTS[page]), "write it anew: .venv/bin/python -m dev.tables"


@example("docs/design.md", "dev.tables")
def test_the_documented_command_writes_it_anew(script: str, tmp_path: Path) -> None:
    """In a copy of the documents, where something is missing."""
    for path in ROOT.iterdir():
        if path.name in ("dev", "docs"):
            shutil.copytree(path, tmp_path / path.name)
        elif not path.name.startswith(".") or path.name == ".venv":
            (tmp_path / path.name).symlink_to(path)
    page = tmp_path / "docs/bridge.md"
    page.write_text(re.sub(r"^\| aiodocker \|.*\n", "", page.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("written: docs/bridge.md\n", "")
    assert page.read_text() == TEXTS["docs/bridge.md"]


def test_every_table_stands_in_one_document() -> None:
    found = Counter(re.findall(r"<!-- (\w+):", "".join(TEXTS.values())))
    assert {name: found[name] for name in TABLES} == dict.fromkeys(TABLES, 1)


@pytest.mark.parametrize("name", TABLES)
def test_what_people_write_in_a_table_is_written(name: str) -> None:
    head, *rows = TABLES[name]()
    text = next(text for text in TEXTS.values() if f"<!-- {name}:" in text)
    written = text.partition(f"<!-- {name}:")[2].partition(f"<!-- /{name} -->")[0].splitlines()[3:]
    for row, line in zip(rows, written, strict=True):
        assert len(cells(line)) == len(head)
        assert all(cells(line)[len(row) :]), line


FAULTS = {
    "engine is killed",
    "engine is stopped",
    "socket is replaced",
    "disk for long bodies (`TMPDIR`) is full",
    "file descriptor",
    "little memory",
    "never reads",
    "one byte a second",
    "2,000 connections",
    "SIGTERM in the midst of everything",
}


def test_every_fault_has_its_row_with_tests_that_there_are() -> None:
    table = TEXTS["docs/operations.md"].partition("<!-- faults:")[2].partition("<!-- /faults -->")[0]
    head, _, *rows = [cells(line) for line in table.splitlines()[1:]]
    assert all(len(row) == len(head) and all(row) for row in rows)
    assert [sum(fault in row[0] for fault in FAULTS) for row in rows] == [1] * len(FAULTS)
    for row in rows:
        for test in row[-1].split(", "):
            file, *names = test.strip("`").split("::")
            assert names
            found: ast.AST = ast.parse((ROOT / "tests" / file).read_text())
            for name in names:
                (found,) = (each for each in ast.iter_child_nodes(found) if getattr(each, "name", "") == name)


def test_every_error_code_has_its_section_in_order() -> None:
    sections = re.findall(
        r"^### `(\w+)`\n\n(.*?)(?=^##|\Z)", TEXTS["docs/troubleshooting.md"], re.DOTALL | re.MULTILINE
    )
    assert [code for code, _ in sections] == list(errors.CODES)
    for code, text in sections:
        assert re.search(r"\*\*Cause\*\*.*\*\*[Dd]o\*\*", text, re.DOTALL), code


def test_every_variable_that_the_code_reads_is_in_a_table() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    read = set(re.findall(r"\"(DOCKER_[A-Z_]+)\"", sources))
    assert read == set(settings.VARIABLES) | set(settings.KEY_VARIABLES)


def test_every_variable_that_a_document_names_is_one() -> None:
    named = set(re.findall(r"\bDOCKER_RUNNER_\w*[A-Z]\b", "".join(TEXTS.values())))
    others = {"DOCKER_RUNNER_KEY"}  # Of the examples in other languages.
    assert named <= set(settings.VARIABLES) | set(settings.KEY_VARIABLES) | others


def test_every_error_code_is_used_and_every_used_one_is_in_the_table() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("*.py") if path.name != "errors.py")
    timed_out = set(re.findall(r"_timed_out\(\s*\"([a-z_]+)\"", sources))
    used = set(re.findall(r"(?:RunnerError|_violates|Places)\(\s*\"([a-z_]+)\"", sources))
    by_cause = set(re.findall(r"\"([a-z_]+)\"", (ROOT / "calls.py").read_text())) & set(errors.CODES)
    fallbacks = {operation.fallback for *_, operation in workloads.ROUTES}
    kinds = {operation.conflict for *_, operation in workloads.ROUTES}
    assert used | by_cause | fallbacks | kinds | timed_out == set(errors.CODES)


SHAPE = block("docs/wire.md", '"retryable": false}}')


def test_the_shape_of_errors_is_the_documented_one() -> None:
    shape, told = (json.loads(text) for text in (SHAPE, RunnerError("not_found", "no").body()))
    assert (list(shape), list(shape["error"])) == (list(told), list(told["error"]))
    assert SHAPE.strip() in TEXTS["README.md"]


def test_the_map_names_every_file_in_an_order_that_the_imports_keep() -> None:
    house = re.findall(r"^\| \[(\w+)\.py\]\(\.\./\1\.py\)", TEXTS["docs/design.md"], re.MULTILINE)
    assert sorted(house) == sorted(path.stem for path in ROOT.glob("*.py"))
    for place, name in enumerate(house):
        source = (ROOT / f"{name}.py").read_text()
        imported = re.findall(
            r"^ *(?:from|import) (\w+)", source.replace("if TYPE_CHECKING:\n    from", "#"), re.MULTILINE
        )
        below = set(house[place + 1 :]) & set(imported)
        assert not below, f"{name}.py imports {below}"


def test_the_version_stands_in_one_place() -> None:
    """`client.py` is copied alone, so it is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "client.__version__"}
    versions = re.findall(r"^## \[([^]]+)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == __version__


# The documents themselves.


def test_the_readme_is_two_screens() -> None:
    assert TEXTS["README.md"].count("\n") <= 120


@every_page
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert [anchor(each) for each in headings].count(heading) == 1, link


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "README.md"])
def test_every_document_is_reached_from_the_readme(page: str) -> None:
    assert f"({page})" in TEXTS["README.md"]


def test_every_block_is_had_by_a_test() -> None:
    for path in (ROOT / "tests").glob("test_*.py"):
        if "from documents import" in path.read_text():
            importlib.import_module(path.stem)
    left = {(each.page, each.text) for each in BLOCKS} - {(each.page, each.text) for each in HAD}
    for page, mark in NOT_RUN:
        (found,) = (each for each in left if each[0] == page and mark in each[1])
        left.remove(found)
    assert not left


def test_a_path_in_a_document_is_one_of_the_checkout() -> None:
    for page, text in TEXTS.items():
        for path in re.findall(r"`((?:tests|docs|deploy|examples|bench|dev)/[\w./-]+\.\w+)`", text):
            assert (ROOT / path).exists() or Path(path).name.endswith(".pyz"), (page, path)
