"""Byte transforms: however a stream is cut on its way, what comes out is the same."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from streams import LineFramer, progress_error

# Line breaks are frequent, so that most examples hold several lines, empty ones among them.
streams = st.lists(st.one_of(st.just(b"\n"), st.binary(max_size=40)), max_size=40).map(b"".join)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    borders = [0, *sorted(position % (len(data) + 1) for position in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@given(streams, st.lists(st.integers(0, 10_000), max_size=30))
def test_lines_come_out_once_in_order_and_whole_however_they_are_cut(data: bytes, at: list[int]) -> None:
    framer = LineFramer()
    out = [framer.feed(chunk) for chunk in cut(data, at)]
    assert all(piece == b"" or piece.endswith(b"\n") for piece in out)
    unfinished = data.rpartition(b"\n")[2]
    assert b"".join(out) == data[: len(data) - len(unfinished)]
    assert framer.tail() == unfinished


@given(streams, st.lists(st.integers(0, 10_000), max_size=30), st.integers(1, 30))
def test_a_line_past_the_limit_passes_as_it_comes_and_nothing_is_lost(data: bytes, at: list[int], limit: int) -> None:
    framer = LineFramer(max_line=limit)
    out = b""
    for chunk in cut(data, at):
        out += framer.feed(chunk)
        held = framer.tail()
        assert len(held) <= limit
        assert framer.within_line == (bool(out) and not out.endswith(b"\n"))
    assert out + framer.tail() == data


def test_a_progress_error_is_one_line_of_the_engines_form() -> None:
    line = progress_error('it "broke"\n')
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"errorDetail": {"message": 'it "broke"\n'}, "error": 'it "broke"\n'}
