"""Positions in a stream of events, and what was missed after one, whatever order the engine has events in."""

import base64
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import RunnerError
from event_journal import MAX_ENTRIES, WINDOW, Journal, Position, Room, Sieve, read_position
from streams import LineReader

MS = 1_000_000


def journal(*, each: int = 1 << 20, total: int = 1 << 20) -> Journal:
    return Journal(Room(each=each, total=total), reach_ns=0, time_ns=0)


def line(number: int, time_ns: int) -> bytes:
    return b'{"Action":"%d","timeNano":%d}' % (number, time_ns)


def lines_of(frames: list[bytes] | None) -> list[bytes]:
    assert frames is not None
    return [frame.split(b"\n")[0].removeprefix(b'data: {"type":"event","event":')[:-1] for frame in frames]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[bytes], list[bytes], int]:
    """Events in the engine's order and in that they are sent in, up to 20 places apart; how many of them were sent.

    Some share a time, and some are equal.
    """
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, MS, 20 * MS, 300 * MS]), min_size=1, max_size=200))
    kept, time_ns = [], 10**18
    for number, gap in enumerate(gaps):
        time_ns += gap
        kept.append(line(0 if gap == 0 else number, time_ns))
    keys = [number + draw(st.integers(0, 10)) for number in range(len(kept))]
    # Only what is close in time overtakes.
    times = [10**18 + sum(gaps[: number + 1]) for number in range(len(kept))]
    order = sorted(range(len(kept)), key=lambda at: (times[at] // (100 * MS), keys[at]))
    sent = [kept[at] for at in order]
    return kept, sent, draw(st.integers(1, len(kept)))


@given(histories())
def test_what_was_missed_is_what_was_not_told_once_and_in_the_engines_order(
    found: tuple[list[bytes], list[bytes], int],
) -> None:
    kept, sent, count = found
    told = journal()
    for each in sent[:count]:
        told.tell(each)
    missed, is_all = told.missed(kept[-MAX_ENTRIES:])
    assert is_all
    assert Counter(missed) + Counter(sent[:count]) == Counter(kept)
    assert [each for each in kept if each in missed] == missed or Counter(kept).most_common(1)[0][1] > 1


@given(histories())
def test_another_journal_gives_what_came_after_a_position(found: tuple[list[bytes], list[bytes], int]) -> None:
    kept, sent, count = found
    told = journal()
    for each in sent[:count]:
        told.tell(each)
    another = journal()
    for each in kept:
        another.tell(each)
    position = read_position(str(told.position()))
    frames = another.after(position)
    assert Counter(lines_of(frames)) + Counter(sent[:count]) == Counter(kept)


@given(histories())
def test_the_same_journal_gives_what_it_told_after_each_position(found: tuple[list[bytes], list[bytes], int]) -> None:
    _, sent, _ = found
    told = journal()
    positions, frames = [told.position()], []
    for each in sent:
        frames.append(told.tell(each))
        positions.append(told.position())
    for number, position in enumerate(positions):
        assert told.after(read_position(str(position))) == frames[number:]


def test_a_position_is_bounded_and_reads_back() -> None:
    told = journal()
    for number in range(1000):
        frame = told.tell(line(number, 10**18 + number))
    text = frame.rpartition(b"id: ")[2].strip().decode()
    assert text == str(told.position())
    assert len(text) == 355
    assert len(read_position(text).digests) == WINDOW


@given(st.text(max_size=400) | st.binary(max_size=200).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_what_is_no_position_is_refused_or_found_nowhere(text: str) -> None:
    told = journal()
    told.tell(line(1, 10**18))
    if re.fullmatch("[A-Za-z0-9_-]{1,400}", text):
        assert told.after(read_position(text)) is None
    else:
        with pytest.raises(RunnerError, match="Last-Event-ID"):
            read_position(text)


def test_a_position_that_is_not_there_is_none() -> None:
    told = journal()
    told.tell(line(1, 10**18))
    assert told.after(Position(10**18, 1, [b"nope"])) is None
    assert told.after(journal().position()) is None


def test_a_gap_is_not_looked_behind() -> None:
    told = journal()
    before = [told.tell(line(number, 10**18 + number)) for number in range(3)]
    gap = told.tell_gap(b'{"type":"gap"}', 10**18 + 10)
    assert told.missed([line(1, 10**18 + 1), line(2, 10**18 + 2)])[1] is False
    after = told.tell(line(9, 10**18 + 20))
    assert told.after(told.position()) == []
    id_ = before[0].rpartition(b"id: ")[2].strip().decode()
    assert told.after(read_position(id_)) == [*before[1:], gap, after]
    assert told.missed([line(2, 10**18 + 2), line(9, 10**18 + 20), line(10, 10**18 + 21)]) == (
        [line(10, 10**18 + 21)],
        True,
    )


def test_what_finds_no_room_is_forgotten_and_known_to_be() -> None:
    room = Room(each=10_000, total=15_000)
    first, second = Journal(room, reach_ns=5, time_ns=0), Journal(room, reach_ns=5, time_ns=0)
    for each in (first, second):
        for number in range(100):
            each.tell(line(number, 1000 * number + 1000))
    assert room.used <= 15_000
    assert first.since(5) is None
    kept = lines_of(first.since(first.reach_ns))
    assert kept == [line(number, 1000 * number + 1000) for number in range(100)][-len(kept) :]
    assert len(kept) > len(lines_of(second.since(second.reach_ns))) > 10
    # What was told is known nevertheless.
    assert first.missed([line(number, 1000 * number + 1000) for number in range(100)]) == ([], True)
    for each in (first, second):
        each.close()
    assert room.used == 0


class TestSieve:
    def test_what_the_look_showed_is_not_new_however_often_it_comes(self) -> None:
        kept = [line(number, number) for number in range(1, 4)]
        sieve = Sieve(kept)
        assert [sieve.is_new(each) for each in (*kept, kept[-1])] == [False] * 4
        assert sieve.is_new(line(9, 9))

    def test_what_the_engine_has_forgotten_in_between_is_not_new(self) -> None:
        kept = [line(number, 10**18 + number) for number in range(10, 266)]
        sieve = Sieve(kept)
        assert not sieve.is_new(line(9, 10**18 + 9))
        assert sieve.is_new(line(300, 10**18 + 300)), "it has overtaken the others"
        assert not sieve.is_new(kept[0])
        assert sieve.is_new(line(8, 10**18 + 8)), "the clock was set back"


@given(
    st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b"")), max_size=20),
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
)
def test_lines_are_read_whatever_the_chunks_and_those_too_long_are_left_out(
    lines: list[bytes], cuts: list[int]
) -> None:
    data, reader, found, at = b"".join(each + b"\n" for each in lines), LineReader(10), [], 0
    for size in cuts * (len(data) // len(cuts) + 1):
        found += reader.feed(data[at : at + size])
        at += size
    whole = [each for each in lines if each.strip()]
    assert [each for each in found if len(each) <= 10] == [each for each in whole if len(each) <= 10]
    assert len(found) + reader.left_out == len(whole) or any(len(each) > 10 and not each.strip() for each in lines)


@pytest.mark.parametrize("cut", [3, 12, 25])
def test_a_line_that_is_too_long_leaves_its_neighbours_whole(cut: int) -> None:
    data = b"one\n" + b"x" * 20 + b"\ntwo\nthree\n"
    reader = LineReader(10)
    found = reader.feed(data[:cut]) + reader.feed(data[cut : cut + 1]) + reader.feed(data[cut + 1 :])
    assert [each for each in found if not each.startswith(b"x")] == [b"one", b"two", b"three"]
