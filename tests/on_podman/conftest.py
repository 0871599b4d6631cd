"""The same tests, on Podman's API service: what asks for the engine gets that one here.

A file here imports all of the file of its name and puts tests of its own in the place of those that Podman answers
otherwise; see `differences.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

# Registered here once more: so they are made, once, for this folder's engine.
from conftest import (
    IMAGE,
    EngineDirect,
    Registry,
    box,
    bridge,
    direct,
    names,
    runner,
    start,
    stopped_box,
)
from dev import SetupError, busybox
from dev.engine import Engine
from dev.podman_service import PodmanService
from on_podman.differences import REPLACED
from service import Runner
from wire import Wire

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def engine(short_folder: Path, registry: Registry) -> Iterator[Engine]:
    """Podman's API service, started for this session."""
    podman = PodmanService(short_folder / "podman", registry_ports=[int(registry.address.partition(":")[2])])
    try:
        podman.start()
        yield podman
    except SetupError as error:
        pytest.fail(f"the tests need Podman's API service, and it could not be started: {error}", False)
    finally:
        podman.remove()


@pytest.fixture(scope="session")
def image(engine: Engine, direct: EngineDirect) -> Iterator[str]:
    """The name of a busybox image on the engine, in the full form that Podman gives it."""
    name = f"localhost/{IMAGE}"
    busybox.import_image(engine, name)
    yield name
    direct.request("DELETE", f"/images/{name}?force=1")


@pytest.fixture(scope="session")
def wire(runner: Runner) -> Wire:
    """The runner in front of Podman."""
    return Wire(runner.url, runner.secret)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, in this folder, what another test stands in the place of."""
    replaced = [item for item in items if _is_replaced(item)]
    if replaced:
        config.hook.pytest_deselected(items=replaced)
        items[:] = [item for item in items if not _is_replaced(item)]


def _is_replaced(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.path.parent == HERE and item.function in REPLACED
