"""The README's table of what works with each SDK: its rows, and that a test shows each."""

import test_bridge_compose
import test_bridge_sdk_aiodocker
import test_bridge_sdk_docker_py
import test_bridge_sdk_dockerode
import test_bridge_sdk_testcontainers

from service import ROOT
from works import ROWS, SHOWN, TOOLS, table

MODULES = (  # their rows are there once they are imported
    test_bridge_sdk_docker_py,
    test_bridge_sdk_aiodocker,
    test_bridge_sdk_dockerode,
    test_bridge_sdk_testcontainers,
    test_bridge_compose,
)


def test_the_readmes_table_is_that_of_the_tests() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- sdks: checked by tests/test_bridge_sdk.py -->\n{table()}\n<!-- /sdks -->" in readme


def test_every_row_is_shown_by_a_test() -> None:
    shown = {key for keys in SHOWN.values() for key in keys}
    assert shown == set(ROWS)


def test_every_tool_has_rows_and_every_module_shows_some() -> None:
    assert {key.partition(": ")[0] for key in ROWS} == set(TOOLS)
    assert {test.partition(".")[0] for test in SHOWN} == {module.__name__ for module in MODULES}
