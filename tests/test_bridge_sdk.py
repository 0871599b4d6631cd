"""The table in docs/bridge.md of what works with each SDK: that a test shows each of its rows."""

import test_bridge_compose
import test_bridge_sdk_aiodocker
import test_bridge_sdk_docker_py
import test_bridge_sdk_dockerode
import test_bridge_sdk_testcontainers

from works import ROWS, SHOWN, TOOLS

MODULES = (  # their rows are there once they are imported
    test_bridge_sdk_docker_py,
    test_bridge_sdk_aiodocker,
    test_bridge_sdk_dockerode,
    test_bridge_sdk_testcontainers,
    test_bridge_compose,
)


def test_every_row_is_shown_by_a_test() -> None:
    shown = {key for keys in SHOWN.values() for key in keys}
    assert shown == set(ROWS)


def test_every_tool_has_rows_and_every_module_shows_some() -> None:
    assert {key.partition(": ")[0] for key in ROWS} == set(TOOLS)
    assert {test.partition(".")[0] for test in SHOWN} == {module.__name__ for module in MODULES}
