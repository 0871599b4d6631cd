"""Who has used which container when, by whatever name: without an engine, on a clock of the test's own."""

import pytest

import leases
from leases import INSTANCE, LEASE, MAX_UNKNOWN, TTL, Found, Leases, inherited

A, B = "a" * 64, "ab" + "c" * 62


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def held(clock: Clock, **named: str) -> Leases:
    """Leases of 60 s: names and ids."""
    held = Leases(clock)
    tell(held, **named)
    return held


def tell(held: Leases, **named: str) -> None:
    held.update([(Found(id=id_, names=[f"/{name}"]), 60) for name, id_ in named.items()])


def use(held: Leases, name: str) -> None:
    held.end(held.begin(name))


def due(held: Leases) -> list[str]:
    return [lease.id for lease in held.due()]


def test_what_is_found_counts_as_used_just_then(clock: Clock) -> None:
    box = held(clock, box=A)
    clock.now += 59.9
    assert due(box) == []
    clock.now += 0.1
    assert due(box) == [A]
    assert box.next_due() == clock.now


@pytest.mark.parametrize("name", ["box", "/box", A, A[:12], "a" * 3])
def test_a_use_by_any_name_counts_from_its_end(clock: Clock, name: str) -> None:
    box = held(clock, box=A, other=B)
    clock.now += 50
    going = box.begin(name)
    clock.now += 500
    assert due(box) == [B]
    assert box.next_due() == 1060
    box.end(going)
    clock.now += 59
    assert due(box) == [B]
    clock.now += 1
    assert due(box) == [B, A]


@pytest.mark.parametrize("name", ["a", "bo", "x", "", "b" * 64, A + "a"])
def test_what_names_nothing_or_several_is_no_use(clock: Clock, name: str) -> None:
    box = held(clock, box=A, other=B)
    clock.now += 60
    use(box, name)
    assert due(box) == [A, B]


def test_two_uses_at_once(clock: Clock) -> None:
    box = held(clock, box=A)
    first, second = box.begin("box"), box.begin(A)
    box.end(first)
    clock.now += 100
    assert due(box) == []
    box.end(second)
    clock.now += 60
    assert due(box) == [A]


def test_a_use_under_a_name_that_is_told_later(clock: Clock) -> None:
    box = held(clock, box=A)
    clock.now += 30
    use(box, "renamed")
    open_, of_other = box.begin("renamed"), box.begin("new")
    clock.now += 30
    tell(box, renamed=A, new=B)
    clock.now += 1000
    assert due(box) == []
    box.end(open_)
    box.end(of_other)
    clock.now += 59
    assert due(box) == []


def test_a_use_that_ended_before_its_name_was_told_counts_from_its_end(clock: Clock) -> None:
    box = held(clock, box=A)
    clock.now += 30
    use(box, "renamed")
    clock.now += 30
    tell(box, renamed=A)
    clock.now += 29
    assert due(box) == []
    clock.now += 1
    assert due(box) == [A]


def test_a_former_name_counts_until_the_engine_is_asked_again(clock: Clock) -> None:
    box = held(clock, box=A)
    tell(box, renamed=A)
    clock.now += 30
    use(box, "box")
    clock.now += 30
    assert due(box) == []
    tell(box, renamed=A)
    clock.now += 30
    use(box, "box")
    assert due(box) == [A]


def test_a_name_is_its_present_owners(clock: Clock) -> None:
    box = held(clock, box=A)
    tell(box, renamed=A, box=B)
    clock.now += 60
    use(box, "box")
    assert due(box) == [A]


def test_an_exec_counts_once_it_is_known_where_it_is(clock: Clock) -> None:
    box = held(clock, box=A)
    going = box.begin("e" * 64, of_exec=True)
    assert box.unresolved() == [going]
    box.resolve(going, A)
    assert box.unresolved() == []
    clock.now += 60
    assert due(box) == []
    box.end(going)
    clock.now += 60
    assert due(box) == [A]
    nowhere = box.begin("f" * 64, of_exec=True)
    box.end(nowhere)
    assert box.unresolved() == []
    box.resolve(nowhere, A)
    assert due(box) == [A]


def test_what_the_engine_does_not_tell_of_any_more_is_forgotten(clock: Clock) -> None:
    box = held(clock, box=A, other=B)
    going = box.begin("box")
    tell(box, other=B)
    assert (len(box), A in box, box.find("box"), box.find(A)) == (1, False, None, None)
    box.end(going)
    clock.now += 60
    assert due(box) == [B]
    (lease,) = box.due()
    box.forget(lease)
    assert (len(box), box.find("other"), box.next_due()) == (0, None, float("inf"))


def test_the_names_of_unknown_containers_are_bounded(clock: Clock) -> None:
    box = held(clock, box=A, other=B)
    clock.now += 30
    for number in range(MAX_UNKNOWN + 10):
        use(box, f"name{number}")
    tell(box, name9=A, name10=B)
    clock.now += 30
    assert due(box) == [A]
    long = "x" * 256
    use(box, long)
    tell(box, **{long: A, "name10": B})
    assert due(box) == [A]


def test_time_in_which_nobody_could_use_it_is_not_idle_time(clock: Clock) -> None:
    box = held(clock, box=A)
    clock.now += 500
    box.postpone(490)
    assert box.next_due() == clock.now + 50
    box.postpone(490)
    assert box.next_due() == clock.now + 60


def test_what_failed_is_due_later(clock: Clock) -> None:
    box = held(clock, box=A)
    clock.now += 60
    (lease,) = box.due()
    lease.not_before = clock.now + 5
    assert (due(box), box.next_due()) == ([], clock.now + 5)
    lease.not_before = 0
    lease.ending = True
    assert (due(box), box.next_due()) == ([], float("inf"))


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e3", " 1", "1 ", "01", "0x1", "1" * 13, "²", "x"])
def test_a_label_that_says_no_time_says_nothing(text: str) -> None:
    assert Found(id=A, labels={TTL: text}).ttl_s() is None
    assert Found(id=A).ttl_s() is None
    assert Found(id=A, labels={TTL: "60"}).ttl_s() == 60


def test_labels_of_an_image_say_nothing_of_a_container() -> None:
    first, second = leases.labels("i", 60), leases.labels("i", 60)
    assert first[LEASE] != second[LEASE]
    assert {**first, LEASE: ""} == {INSTANCE: "i", TTL: "60", LEASE: ""}
    assert inherited(first, first)
    assert inherited({**first, "more": "x"}, {**first, "other": "x"})
    assert not inherited(second, first)
    assert not inherited({TTL: "60"}, {})
    assert not inherited({TTL: "60"}, {TTL: "61"})
    assert inherited({TTL: "60", INSTANCE: "i"}, {TTL: "60"})
