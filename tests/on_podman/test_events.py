"""The runner face's events on Podman: they resume as on Docker Engine, though Podman cannot say what has passed."""

from collections.abc import Callable

import pytest
from listening import Listener, events_of

from comparison import Containers
from conftest import EngineDirect, Names
from dev.engine import Engine
from service import Runner

PAIR = ("pause", "unpause")


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture
def box(containers: Containers) -> str:
    return containers()


def happen(containers: Containers, box: str, times: int) -> list[str]:
    """Two events, so many times; returns the actions of all."""
    for action in PAIR * times:
        containers.do("POST", f"/containers/{box}/{action}", 204)
    return [*PAIR * times]


def told(listener: Listener) -> list[str]:
    return [message["event"]["Action"] for message in listener.messages if message["type"] == "event"]


def number(expected: list[str]) -> Callable[[Listener], bool]:
    return lambda listener: len(told(listener)) >= len(expected)


@pytest.mark.parametrize("missed", [0, 1, 20])
def test_a_client_that_comes_back_gets_what_it_missed(
    runner: Runner, containers: Containers, box: str, missed: int
) -> None:
    with Listener(runner.port, events_of(box, *PAIR)) as first:
        first.until(number(happen(containers, box, 2)))
    away = happen(containers, box, missed)
    with Listener(runner.port, events_of(box, *PAIR), first.last_id) as again:
        expected = [*away, *happen(containers, box, 1)]
        again.until(number(expected))
    assert (told(again), again.types()) == (expected, [])


def test_it_does_so_at_a_runner_that_knows_nothing_of_it(
    engine: Engine, runner: Runner, containers: Containers, box: str
) -> None:
    with Listener(runner.port, events_of(box, *PAIR)) as first:
        first.until(number(happen(containers, box, 2)))
    away = happen(containers, box, 3)
    with Runner(engine.socket) as fresh, Listener(fresh.port, events_of(box, *PAIR), first.last_id) as again:
        expected = [*away, *happen(containers, box, 1)]
        again.until(number(expected))
    assert (told(again), again.types()) == (expected, [])


def test_events_since_a_time_are_all_of_them(runner: Runner, containers: Containers, box: str) -> None:
    past = happen(containers, box, 5)
    others = [Listener(runner.port, events_of(box, *PAIR)) for _ in range(2)]
    with Listener(runner.port, events_of(box, *PAIR) + "&since=0") as listener:
        expected = [*past, *happen(containers, box, 1)]
        listener.until(number(expected))
    assert (told(listener), listener.types()) == (expected, [])
    for other in others:
        assert told(other.until(number([*PAIR]))) == [*PAIR]
        other.close()
