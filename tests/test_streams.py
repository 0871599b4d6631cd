"""Byte transforms: however a stream is cut on its way, what comes out is the same."""

import codecs
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execs import _Output
from streams import (
    MIN_UNCOPIED,
    STDERR,
    STDOUT,
    FrameCutter,
    FrameReader,
    FramingError,
    Gathered,
    LineFramer,
    Tail,
    progress_error,
)

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


cuts = st.lists(st.integers(0, 10_000), max_size=30)
# Stream numbers as the engine sends them: 0 (stdin) never, 3 for errors of its own. Empty frames are allowed.
frames = st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=40)), max_size=20)


def framed(said: list[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data for stream, data in said)


def joined(said: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The same with neighbours of one stream together: in how many pieces a payload comes is chance."""
    return [
        (stream, b"".join(data for _, data in group))
        for stream, group in itertools.groupby([piece for piece in said if piece[1]], key=lambda piece: piece[0])
    ]


@given(frames, cuts)
def test_payloads_come_out_the_same_however_the_stream_is_cut(said: list[tuple[int, bytes]], at: list[int]) -> None:
    reader = FrameReader()
    out = [piece for chunk in cut(framed(said), at) for piece in reader.feed(chunk)]
    assert all(data for _, data in out)
    expected = [(STDOUT if stream == STDOUT else STDERR, data) for stream, data in said if data]
    assert joined(out) == joined(expected)
    assert reader.between_frames


@given(frames.filter(bool), st.integers(1, 10_000))
def test_a_stream_that_ends_within_a_frame_is_known_by_it(said: list[tuple[int, bytes]], missing: int) -> None:
    data = framed(said)
    last = 8 + len(said[-1][1])
    reader = FrameReader()
    for _ in reader.feed(data[: len(data) - 1 - missing % (last - 1)]):
        pass
    assert not reader.between_frames


@given(frames, st.binary(min_size=8, max_size=40).filter(lambda data: data[0] > 3 or any(data[1:4])), cuts)
def test_what_is_no_frame_raises_after_all_that_were(said: list[tuple[int, bytes]], junk: bytes, at: list[int]) -> None:
    reader, out = FrameReader(), list[tuple[int, bytes]]()

    def feed_all() -> None:
        for chunk in cut(framed(said) + junk, at):
            out.extend(reader.feed(chunk))

    with pytest.raises(FramingError):
        feed_all()
    assert joined(out) == joined([(STDOUT if stream == STDOUT else STDERR, data) for stream, data in said])


@given(frames, cuts, st.integers(0, 47))
def test_whole_frames_leave_once_and_in_order_however_they_are_cut(
    said: list[tuple[int, bytes]], at: list[int], missing: int
) -> None:
    data = framed(said)
    data = data[: max(0, len(data) - missing)]
    borders = [0, *itertools.accumulate(8 + len(text) for _, text in said)]
    cutter, sent = FrameCutter(), b""
    for chunk in cut(data, at):
        sent += cutter.feed(chunk)
        assert len(sent) in borders
    assert len(sent) == max(border for border in borders if border <= len(data)), "nothing whole is held back"
    assert sent + cutter.tail() == data


@given(frames, cuts, st.integers(1, 30))
def test_a_frame_past_the_limit_passes_as_it_comes(said: list[tuple[int, bytes]], at: list[int], limit: int) -> None:
    cutter, sent = FrameCutter(max_frame=limit), b""
    for chunk in cut(framed(said), at):
        sent += cutter.feed(chunk)
        # Behind a border the rest of the chunk is held, whatever its size; without one the limit holds.
        assert len(cutter.tail()) <= max(limit, len(chunk))
    assert sent + cutter.tail() == framed(said)


@given(st.one_of(st.text(), st.just("\ufeff€😀\u2028")).map(str.encode) | st.binary(max_size=60), cuts)
def test_text_is_the_same_however_its_bytes_are_cut(data: bytes, at: list[int]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = "".join(decoder.decode(chunk) for chunk in cut(data, at)) + decoder.decode(b"", final=True)
    assert out == data.decode("utf-8", "replace")


@given(st.lists(st.tuples(st.sampled_from((STDOUT, STDERR)), st.binary(max_size=12)), max_size=30))
def test_the_output_of_a_command_is_each_streams_text(said: list[tuple[int, bytes]]) -> None:
    output = _Output(limit=10_000)
    for stream, data in said:
        output.add(stream, data)
    both = {stream: b"".join(data for other, data in said if other == stream) for stream in (STDOUT, STDERR)}
    decoded = {stream: data.decode("utf-8", "replace") for stream, data in both.items()}
    assert output.texts() == {"stdout": decoded[STDOUT], "stderr": decoded[STDERR]}


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 60))
def test_a_tail_is_the_end_of_what_was_added(pieces: list[bytes], size: int) -> None:
    tail, added = Tail(size), b""
    for piece in pieces:
        tail.add(piece)
        added += piece
        assert tail.get() == added[-size:]
        assert len(tail._kept) <= 2 * size


@given(st.lists(st.sampled_from((0, 1, 100, MIN_UNCOPIED - 1, MIN_UNCOPIED, 40_000)), max_size=12))
def test_what_is_gathered_is_what_came(sizes: list[int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    gathered = Gathered()
    for piece in pieces:
        gathered.add(piece)
    assert (gathered.size, gathered.whole()) == (sum(sizes), b"".join(pieces))
    assert b"".join(gathered.take()) == b"".join(pieces)
    assert (gathered.size, gathered.take()) == (0, [])


def test_what_comes_byte_by_byte_takes_no_more_room_and_what_is_large_is_not_copied() -> None:
    gathered = Gathered()
    large = bytes(MIN_UNCOPIED)
    for piece in (*[b"x"] * 50_000, large, *[b"y"] * 50_000):
        gathered.add(piece)
    first, second, third = gathered.take()
    assert (first, third) == (b"x" * 50_000, b"y" * 50_000)
    assert second is large
