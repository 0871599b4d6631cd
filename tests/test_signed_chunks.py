"""Signed chunks (WIRE, section 2): whatever is done to a body on its way, only what was signed is given out, in order,
and nothing that was cut short or meddled with ends as if it were complete."""

import base64
import contextlib
import io
import itertools
import json
import socket
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunked import chunk_headers, cut_up, records, send_chunks, send_records
from client import MAX_CHUNK, STREAMING, sign, signed_chunk
from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from scripted import OK, Peer, ScriptedEngine
from service import SECRET, Answer, Runner, read_to_end
from streams import SignedChunkError, SignedChunkReader

MIB = 1024 * 1024
TAR = {"Content-Type": "application/x-tar"}
CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
KEY = b"a-secret"
SEED = bytes(range(32))
"""The raw signature of a request."""


# The format.

pieces_of = st.lists(st.binary(min_size=1, max_size=60), max_size=8)
positions = st.lists(st.integers(0, 10_000), max_size=20)


def signed(pieces: list[bytes], secret: bytes = KEY, seed: bytes = SEED) -> list[bytes]:
    """The records of a body, the one that ends it included."""
    out, previous = [], seed
    for piece in (*pieces, b""):
        out.append(signed_chunk(secret, previous, piece))
        previous = out[-1][4:36]
    return out


def cut(data: bytes, at: list[int]) -> list[bytes]:
    borders = [0, *sorted(position % (len(data) + 1) for position in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


class Taken(NamedTuple):
    """What a reader gave out, and how it ended."""

    data: list[bytes]
    whole: bool


def take(body: bytes, at: list[int] | None = None, secret: bytes = KEY, seed: bytes = SEED) -> Taken:
    """Read a body that arrives cut at these places, as the runner does: an end without the last record is none."""
    reader = SignedChunkReader(secret, seed)
    given_out: list[bytes] = []
    try:
        for piece in cut(body, at or []):
            given_out += map(bytes, reader.feed(piece))
    except SignedChunkError:
        return Taken(given_out, False)
    return Taken(given_out, reader.ended)


@given(pieces_of, positions)
def test_the_data_comes_out_exactly_however_the_transport_cuts_it(pieces: list[bytes], at: list[int]) -> None:
    assert take(b"".join(signed(pieces)), at) == (pieces, True)


def test_a_piece_that_comes_byte_by_byte_is_given_out_at_its_last_byte() -> None:
    reader = SignedChunkReader(KEY, SEED)
    body = b"".join(signed([b"data"]))
    out = [list(reader.feed(bytes((byte,)))) for byte in body]
    assert [at for at, given_out in enumerate(out) if given_out] == [4 + 32 + 3]
    assert reader.ended


def refused_after(body: bytes, at: list[int], before: list[bytes], **signer: bytes) -> None:
    """The body is refused; what was given out is what stood before the place that was meddled with, or less."""
    taken = take(body, at, **signer)
    assert not taken.whole
    assert taken.data == before[: len(taken.data)]


@given(pieces_of, positions, st.integers(0, 1 << 20))
def test_a_flipped_bit_is_refused_and_nothing_after_it_is_given_out(
    pieces: list[bytes], at: list[int], bit: int
) -> None:
    whole = signed(pieces)
    body = bytearray(b"".join(whole))
    bit %= len(body) * 8
    body[bit // 8] ^= 1 << bit % 8
    sizes = itertools.accumulate(len(record) for record in whole)
    intact = sum(end <= bit // 8 for end in sizes)
    taken = take(bytes(body), at)
    # A length that was made longer may wait for data that does not come: that is not whole either.
    assert (taken.whole, taken.data) == (False, pieces[:intact])


@given(pieces_of, positions, st.integers(0, 1 << 20))
def test_a_body_cut_short_anywhere_is_not_whole(pieces: list[bytes], at: list[int], end: int) -> None:
    body = b"".join(signed(pieces))
    refused_after(body[: end % len(body)], at, pieces)


@given(pieces_of, positions, st.binary(min_size=1, max_size=80))
def test_anything_after_the_end_is_refused(pieces: list[bytes], at: list[int], more: bytes) -> None:
    assert take(b"".join(signed(pieces)) + more, at) == (pieces, False)


@given(pieces_of, positions, st.data())
def test_records_in_another_order_are_refused(pieces: list[bytes], at: list[int], data: st.DataObject) -> None:
    whole = signed(pieces)
    shuffled = data.draw(st.permutations(whole))
    assume(shuffled != whole)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, shuffled, strict=True)))
    refused_after(b"".join(shuffled), at, pieces[:same])


@given(pieces_of, positions, st.integers(0, 8), st.integers(0, 8))
def test_a_record_that_comes_again_is_refused(pieces: list[bytes], at: list[int], which: int, where: int) -> None:
    whole = signed(pieces)
    which %= len(whole)
    where = max(which + 1, where % (len(whole) + 1))  # After it came for the first time.
    refused_after(b"".join([*whole[:where], whole[which], *whole[where:]]), at, pieces[:where])


@given(pieces_of, positions, st.integers(0, 8))
def test_a_record_left_out_is_refused(pieces: list[bytes], at: list[int], which: int) -> None:
    whole = signed(pieces)
    which %= len(whole)
    refused_after(b"".join([*whole[:which], *whole[which + 1 :]]), at, pieces[:which])


@given(pieces_of, pieces_of, positions, st.integers(0, 8), st.integers(0, 8))
def test_a_record_of_another_request_is_refused(
    pieces: list[bytes], others: list[bytes], at: list[int], which: int, where: int
) -> None:
    """Put in the place of one, or between two, wherever it stood in its own; also one of the same data."""
    whole = signed(pieces)
    where %= len(whole)
    for foreign in (signed(others, seed=bytes(32)), signed(pieces, seed=bytes(32))):
        record = foreign[which % len(foreign)]
        refused_after(b"".join([*whole[:where], record, *whole[where:]]), at, pieces[:where])
        refused_after(b"".join([*whole[:where], record, *whole[where + 1 :]]), at, pieces[:where])


@given(pieces_of, positions, st.integers(0, 8), st.binary(max_size=40))
def test_a_record_added_without_the_secret_is_refused(
    pieces: list[bytes], at: list[int], where: int, data: bytes
) -> None:
    whole = signed(pieces)
    where %= len(whole)
    previous = whole[where - 1][4:36] if where else SEED
    forged = signed_chunk(b"another-secret", previous, data)
    refused_after(b"".join([*whole[:where], forged, *whole[where:]]), at, pieces[:where])


@given(pieces_of, positions)
def test_a_body_signed_for_another_request_or_with_another_secret_is_refused_whole(
    pieces: list[bytes], at: list[int]
) -> None:
    body = b"".join(signed(pieces))
    assert take(body, at, secret=b"another-secret") == ([], False)
    assert take(body, at, seed=bytes(32)) == ([], False)


def test_a_record_of_1_mib_passes_and_one_byte_more_is_refused_before_it_is_held() -> None:
    assert take(b"".join(signed([bytes(MAX_CHUNK)]))) == ([bytes(MAX_CHUNK)], True)
    reader = SignedChunkReader(KEY, SEED)
    with pytest.raises(SignedChunkError, match="longer"):
        list(reader.feed((MAX_CHUNK + 1).to_bytes(4, "big") + bytes(32)))


# The service, on a real engine.


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture(scope="module")
def box(containers: Containers) -> str:
    """A running container."""
    return containers()


@pytest.fixture
def alone(engine: Engine) -> Iterator[Runner]:
    """A runner of the test's own, whose memory and connections nobody else uses."""
    with Runner(engine.socket) as running:
        running.request("GET", "/_ping")
        yield running
    check_log(running)


def check_log(runner: Runner) -> None:
    log = "".join(runner.log)
    for sign_of_a_defect in ("defect", "Traceback", "never retrieved", "was destroyed"):
        assert sign_of_a_defect not in log, log


def tar_of(**files: bytes) -> bytes:
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return out.getvalue()


def noise(size: int) -> bytes:
    """Bytes no two pieces of which are alike."""
    return b"".join(number.to_bytes(8, "big") for number in range(size // 8))


def file_in(direct: EngineDirect, container: str, name: str) -> bytes | None:
    """The content of a file in a container, as the engine has it."""
    answer = direct.request("GET", f"/containers/{container}/archive?path=/{name}")
    if answer.status_code == 404:
        return None
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        found = tar.extractfile(name)
        assert found is not None
        return found.read()


def error(answer: Answer) -> tuple[int, str, bool]:
    told = json.loads(answer.body)["error"]
    return answer.status, told["code"], told["retryable"]


INVALID = (401, "invalid_chunk", False)


@pytest.mark.parametrize("size", [1000, 65_536, MAX_CHUNK])
def test_an_archive_arrives_whole(runner: Runner, direct: EngineDirect, box: str, names: Names, size: int) -> None:
    name, data = names(), noise(3 * MIB + 8)
    target = f"/containers/{box}/archive?path=/"
    answer = send_chunks(runner, "PUT", target, cut_up(tar_of(**{name: data}), size), TAR)
    assert (answer.status, answer.body) == (200, b"")
    assert file_in(direct, box, name) == data


def test_an_import_arrives_whole(runner: Runner, direct: EngineDirect, names: Names) -> None:
    repo, archive = names("import"), tar_of(file=noise(2 * MIB))
    answer = send_chunks(runner, "POST", f"/images/create?fromSrc=-&repo={repo}&tag=x", cut_up(archive), TAR)
    assert answer.status == 200
    assert b"errorDetail" not in answer.body
    again = names("import")
    direct.request("POST", f"/images/create?fromSrc=-&repo={again}&tag=x", data=archive)
    assert layers(direct, f"{repo}:x") == layers(direct, f"{again}:x") != []


def layers(direct: EngineDirect, image: str) -> list[str]:
    found: list[str] = direct.request("GET", f"/images/{image}/json").json()["RootFS"]["Layers"]
    return found


def test_a_load_arrives_whole(runner: Runner, direct: EngineDirect, image: str, names: Names) -> None:
    repo = names("load")
    assert direct.request("POST", f"/images/{image}/tag?repo={repo}&tag=x").status_code == 201
    saved = direct.request("GET", f"/images/{repo}:x/get").content
    assert direct.request("DELETE", f"/images/{repo}:x").status_code == 200
    answer = send_chunks(runner, "POST", "/images/load", cut_up(saved), TAR)
    assert (answer.status, b"Loaded image" in answer.body) == (200, True)
    assert layers(direct, f"{repo}:x") == layers(direct, image)


def build_context(image: str, mark: str) -> bytes:
    return tar_of(Dockerfile=f"FROM {image}\nCOPY data /data\nLABEL mark={mark}\n".encode(), data=noise(2 * MIB))


def test_a_build_arrives_whole(runner: Runner, direct: EngineDirect, image: str, names: Names) -> None:
    repo = names("build")
    answer = send_chunks(runner, "POST", f"/build?t={repo}:x", cut_up(build_context(image, repo)), TAR)
    assert (answer.status, b"Successfully tagged" in answer.body) == (200, True)
    found = direct.request("GET", f"/images/{repo}:x/json").json()
    assert found["Config"]["Labels"] == {"mark": repo}


def test_200_mb_arrive_whole_at_flat_memory_and_the_others_feel_little(
    alone: Runner, direct: EngineDirect, containers: Containers
) -> None:
    name = containers()
    target = f"/containers/{name}/archive?path=/"
    archive = tar_of(upload=bytes(200 * MIB))
    before, peak, longest = alone.memory(), 0, 0.0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send_chunks, alone, "PUT", target, cut_up(archive), TAR)
        while not answer.done():
            started = time.monotonic()
            assert alone.request("GET", "/_ping").body == b"OK"
            longest = max(longest, time.monotonic() - started)
            peak = max(peak, alone.memory())
    assert (answer.result().status, answer.result().body) == (200, b"")
    assert peak - before < 16 * MIB
    assert longest < 0.5
    stat = direct.request("HEAD", f"/containers/{name}/archive?path=/upload").headers["X-Docker-Container-Path-Stat"]
    assert json.loads(base64.b64decode(stat))["size"] == 200 * MIB
    direct.request("DELETE", f"/containers/{name}?force=1")


def test_a_request_of_the_runner_face_may_come_in_chunks(runner: Runner, box: str) -> None:
    body = json.dumps({"containerId": box, "command": ["echo", "x" * 5000]}).encode()
    answer = send_chunks(runner, "POST", "/v1/exec/run", cut_up(body, 100), {"Content-Type": "application/json"})
    assert answer.status == 200
    assert json.loads(answer.body)["stdout"] == "x" * 5000 + "\n"


def test_a_request_without_a_body_may_come_as_the_end_alone(runner: Runner) -> None:
    answer = send_chunks(runner, "POST", "/containers/no-such/pause", [])
    assert answer.status == 404
    assert json.loads(answer.body)["message"].startswith("No such container")


def test_a_connection_serves_the_next_request_after_an_upload(runner: Runner, box: str, names: Names) -> None:
    with runner.connect() as sock, sock.makefile("rb") as stream:
        for _ in range(3):
            sock.sendall(raw("PUT", f"/containers/{box}/archive?path=/", cut_up(tar_of(**{names(): b"x"}), 999)))
            assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
            while stream.readline() != b"\r\n":
                pass


# Meddled with.

Meddle = Callable[[list[bytes]], list[bytes]]


def flip(whole: list[bytes]) -> list[bytes]:
    changed = bytearray(whole[2])
    changed[-1] ^= 1
    return [*whole[:2], bytes(changed), *whole[3:]]


MEDDLINGS: dict[str, Meddle] = {
    "a bit flipped": flip,
    "cut short at a border": lambda whole: whole[:2],
    "cut short within": lambda whole: [*whole[:2], whole[2][:-1]],
    "its end taken off": lambda whole: whole[:-1],
    "two changed about": lambda whole: [whole[0], whole[2], whole[1], *whole[3:]],
    "one left out": lambda whole: [*whole[:1], *whole[2:]],
    "one twice": lambda whole: [*whole[:2], whole[1], *whole[2:]],
    "one added": lambda whole: [*whole[:2], signed_chunk(b"guess", whole[1][4:36], b"x"), *whole[2:]],
    "ended early": lambda whole: [*whole[:2], whole[-1]],
    "more after its end": lambda whole: [*whole, b"x"],
    "a record too long": lambda whole: [*whole[:2], (MAX_CHUNK + 1).to_bytes(4, "big") + bytes(32 + MAX_CHUNK + 1)],
}
by_meddling = pytest.mark.parametrize("meddle", MEDDLINGS.values(), ids=MEDDLINGS)


def meddled(runner: Runner, method: str, target: str, data: bytes, meddle: Meddle) -> Answer:
    headers = chunk_headers(method, target)
    whole = list(records(headers, cut_up(data, 100_000)))
    return send_records(runner, method, target, headers, meddle(whole), TAR)


@by_meddling
def test_of_an_import_that_was_meddled_with_no_image_comes(
    runner: Runner, direct: EngineDirect, names: Names, meddle: Meddle
) -> None:
    repo = names("meddled")
    target = f"/images/create?fromSrc=-&repo={repo}&tag=x"
    assert error(meddled(runner, "POST", target, tar_of(file=noise(MIB)), meddle)) == INVALID
    assert direct.request("GET", f"/images/{repo}:x/json").status_code == 404


@by_meddling
def test_of_a_build_that_was_meddled_with_no_image_comes(
    runner: Runner, direct: EngineDirect, image: str, names: Names, meddle: Meddle
) -> None:
    repo = names("meddled")
    assert error(meddled(runner, "POST", f"/build?t={repo}:x", build_context(image, repo), meddle)) == INVALID
    assert direct.request("GET", f"/images/{repo}:x/json").status_code == 404


@by_meddling
def test_of_a_load_that_was_meddled_with_no_image_comes(
    runner: Runner, direct: EngineDirect, image: str, names: Names, meddle: Meddle
) -> None:
    repo = names("meddled")
    assert direct.request("POST", f"/images/{image}/tag?repo={repo}&tag=x").status_code == 201
    saved = direct.request("GET", f"/images/{repo}:x/get").content
    assert direct.request("DELETE", f"/images/{repo}:x").status_code == 200
    assert error(meddled(runner, "POST", "/images/load", saved, meddle)) == INVALID
    assert direct.request("GET", f"/images/{repo}:x/json").status_code == 404


@by_meddling
def test_of_an_archive_that_was_meddled_with_nothing_is_unpacked_from_there_on(
    runner: Runner, direct: EngineDirect, box: str, names: Names, meddle: Meddle
) -> None:
    """The engine unpacks as it goes: what it had whole before, it has. The file that was cut stays none, or short."""
    first, second = names("a"), names("b")
    data = noise(MIB)
    archive = tar_of(**{first: b"small", second: data})
    assert error(meddled(runner, "PUT", f"/containers/{box}/archive?path=/", archive, meddle)) == INVALID
    unpacked = file_in(direct, box, second) or b""
    assert data.startswith(unpacked)


@by_meddling
def test_the_engines_connection_is_cut_before_the_end_of_the_body(meddle: Meddle) -> None:
    """As a client that went away would: after whole chunks of verified data, without the last chunk."""
    seen = bytearray()

    def script(peer: Peer) -> None:
        peer.read_head()
        with contextlib.suppress(ConnectionError):
            while part := peer.sock.recv(1 << 16):
                seen.extend(part)
        peer.engine.closed.set()

    data = noise(MIB)
    with ScriptedEngine(script) as engine, Runner(engine.path) as runner:
        assert error(meddled(runner, "POST", "/images/load", data, meddle)) == INVALID
        assert engine.closed.wait(5)
        assert runner.request("GET", "/v1/health").status == 200
    check_log(runner)
    assert not seen.endswith(b"0\r\n\r\n")
    assert data.startswith(unchunked(bytes(seen)))


def unchunked(body: bytes) -> bytes:
    """The data of a chunked body, whole or not."""
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        out += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return out


def test_nothing_reaches_the_engine_before_the_first_chunk_was_verified() -> None:
    with ScriptedEngine(lambda peer: peer.answer(OK)) as engine, Runner(engine.path) as runner:
        headers = chunk_headers("POST", "/images/load")
        for body in ([], [b"x" * 36], [signed_chunk(b"guess", bytes(32), b"data")]):
            again = {**headers, **chunk_headers("POST", "/images/load")}
            assert error(send_records(runner, "POST", "/images/load", again, body)) == INVALID
        assert engine.connections == 0


# What travels.


def raw(method: str, target: str, pieces: list[bytes], *fields: str, framing: str | None = None) -> bytes:
    """A whole request as it stands on the wire."""
    headers = chunk_headers(method, target)
    body = b"".join(records(headers, pieces))
    framing = framing or f"Content-Length: {len(body)}"
    lines = [f"{method} {target} HTTP/1.1", "Host: runner", framing, *fields]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(lambda peer: None) as engine:
        yield engine


@pytest.fixture(scope="module")
def fronted(scripted: ScriptedEngine) -> Iterator[Runner]:
    """A runner in front of the scripted engine, with small limits."""
    limits = {
        "DOCKER_RUNNER_BODY_TIMEOUT_MS": "400",
        "DOCKER_RUNNER_MAX_UPLOAD": str(2 * MIB),
        "DOCKER_RUNNER_MAX_BODY": str(MIB),
    }
    with Runner(scripted.path, limits) as running:
        yield running
    check_log(running)


def test_the_engine_gets_the_data_alone_framed_anew(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    with fronted.connect() as sock:
        sock.sendall(raw("POST", "/images/load?q=1", [b"one", b"two"], "Expect: 100-continue", "Trailer: X", "TE: x"))
        seen = b""
        while b"HTTP/1.1 200 OK" not in seen:
            seen += sock.recv(100)
    head, _, body = scripted.requests[0].partition(b"\r\n\r\n")
    line, *fields = head.lower().split(b"\r\n")
    assert line == b"post /images/load?q=1 http/1.1"
    assert sorted(fields) == [b"host: docker", b"transfer-encoding: chunked"]
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


def test_100_continue_is_said_after_the_head_was_verified_only(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    head, _, body = raw("POST", "/images/load", [b"data"], "Expect: 100-continue").partition(b"\r\n\r\n")
    with fronted.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    assert fronted.raw(head.replace(b"X-DR-Nonce: ", b"X-DR-Nonce: x") + b"\r\n\r\n").startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(("length", "status"), [(-1, 401), (-37, 401), (+1, 0)])
def test_a_content_length_that_belies_ends_nothing_as_if_it_were_complete(
    fronted: Runner, scripted: ScriptedEngine, length: int, status: int
) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    plain = raw("POST", "/images/load", [b"one", b"two"])
    size = len(plain.partition(b"\r\n\r\n")[2])
    belied = plain.replace(f"Content-Length: {size}".encode(), f"Content-Length: {size + length}".encode())
    with fronted.connect() as sock:
        sock.sendall(belied)
        if not status:
            sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 40" if status else b"")
    assert scripted.requests == []


@pytest.mark.parametrize("more", [STREAMING, "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="])
def test_two_body_hashes_are_refused(fronted: Runner, scripted: ScriptedEngine, more: str) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    answer = fronted.raw(raw("POST", "/images/load", [b"x"], f"X-DR-Content-SHA256: {more}"))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"duplicate_headers" in answer
    assert scripted.connections == 0


def test_the_word_is_signed_like_any_body_hash(fronted: Runner) -> None:
    """A request signed for another body cannot be turned into an upload."""
    headers = {**sign(SECRET, "POST", "/images/load"), "X-DR-Content-SHA256": STREAMING}
    answer = send_records(fronted, "POST", "/images/load", headers, records(headers, [b"x"]))
    assert error(answer)[:2] == (401, "invalid_signature")


def test_a_replayed_upload_is_refused(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    headers = chunk_headers("POST", "/images/load")
    body = list(records(headers, [b"x"]))
    assert send_records(fronted, "POST", "/images/load", headers, body).status == 200
    assert error(send_records(fronted, "POST", "/images/load", headers, body))[:2] == (401, "replayed_nonce")


def test_named_keys_and_rotated_secrets_sign_their_own_chunks(engine: Engine, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("the-new-secret-0123456789\nthe-old-secret-0123456789\nci:the-secret-of-ci-0123456789\n")
    settings = {"DOCKER_RUNNER_SHARED_SECRET_FILE": str(secrets), "DOCKER_RUNNER_SHARED_SECRET": ""}

    def status(signs: str, chunks: str, key: str | None = None) -> int:
        headers = chunk_headers("POST", "/containers/no-such/pause", secret=signs, key=key)
        body = records(headers, [], secret=chunks)
        return send_records(runner, "POST", "/containers/no-such/pause", headers, body).status

    new, old, ci = "the-new-secret-0123456789", "the-old-secret-0123456789", "the-secret-of-ci-0123456789"
    with Runner(engine.socket, settings) as runner:
        assert [status(new, new), status(old, old), status(ci, ci, "ci")] == [404, 404, 404]
        assert [status(new, old), status(old, new), status(ci, new, "ci"), status(ci, ci)] == [401] * 4


# Limits, and ends.


def test_a_body_over_the_limit_is_413_and_broken_off(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    answer = send_chunks(fronted, "POST", "/images/load", cut_up(bytes(2 * MIB + 1)))
    assert error(answer)[:2] == (413, "body_too_large")
    assert scripted.requests == []
    scripted.restart(lambda peer: peer.answer(OK))
    assert send_chunks(fronted, "POST", "/images/load", cut_up(bytes(2 * MIB))).status == 200


def test_a_stated_length_over_the_limit_is_413_at_once(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    head = raw("POST", "/images/load", [], framing=f"Content-Length: {3 * MIB}").partition(b"\r\n\r\n")[0]
    assert fronted.raw(head + b"\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert scripted.connections == 0


def test_a_body_that_must_fit_memory_has_the_smaller_limit(fronted: Runner) -> None:
    answer = send_chunks(fronted, "POST", "/v1/exec/run", cut_up(bytes(MIB + 1)), {"Content-Type": "application/json"})
    assert error(answer)[:2] == (413, "body_too_large")


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_caller_that_stops_sending_is_a_408_and_broken_off(
    fronted: Runner, scripted: ScriptedEngine, sent: int
) -> None:
    scripted.restart(lambda peer: peer.read_head() and peer.sees_close())
    plain = raw("POST", "/images/load", [b"x" * 1000, b"y" * 1000])
    head, _, body = plain.partition(b"\r\n\r\n")
    with fronted.connect() as sock:
        sock.sendall(head + b"\r\n\r\n" + body[: sent * 1036 - 1 if sent == 2 else sent * 1036])
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer
    assert scripted.connections == (sent > 0)
    assert not sent or scripted.closed.wait(5)


def test_an_engine_that_takes_the_data_slowly_does_not_cost_the_caller_its_time(
    fronted: Runner, scripted: ScriptedEngine
) -> None:
    """The limit of 400 ms is for the caller; here it is the engine that pauses for longer, twice."""

    def script(peer: Peer) -> None:
        peer.read_head()
        for _ in range(2):
            peer.engine.go.wait(0.9)  # Which the test does not set.
            peer.sock.recv(MIB)
        body = b""
        while not body.endswith(b"\r\n0\r\n\r\n"):
            body = body[-10:] + peer.sock.recv(MIB)
        peer.send(OK)

    scripted.restart(script)
    assert send_chunks(fronted, "POST", "/images/load", cut_up(bytes(2 * MIB), 50_000)).status == 200


@pytest.mark.parametrize(
    ("engine_reads", "size", "reset"), [(True, 16 * MIB, False), (False, 600_000, False), (False, 16 * MIB, True)]
)
def test_a_caller_that_leaves_in_the_midst_takes_the_engines_connection_with_it_within_a_second(
    scripted: ScriptedEngine, engine_reads: bool, size: int, reset: bool
) -> None:
    """Also while the runner reads nothing of it; then a quiet leaving is seen only behind what is still on its way."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.wait_closed() if engine_reads else peer.wait_hangup()
        peer.engine.closed.set()

    scripted.restart(script)
    with Runner(scripted.path) as runner:
        plain = raw("POST", "/images/load", cut_up(bytes(size), 50_000))
        with runner.connect() as sock:
            sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                sock.sendall(plain[:-1])
            assert not scripted.closed.is_set()
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert scripted.closed.wait(1)
        assert scripted.requests == []
    check_log(runner)


def test_a_caller_that_leaves_before_its_first_chunk_may_come_again_as_it_was(
    fronted: Runner, scripted: ScriptedEngine
) -> None:
    scripted.restart(lambda peer: peer.answer(OK))
    plain = raw("POST", "/images/load", [b"x" * 1000])
    for _ in range(3):
        with fronted.connect() as sock:
            sock.sendall(plain[:-900])

    def answered() -> bool:
        with fronted.connect() as sock:
            sock.sendall(plain)
            return sock.recv(12) == b"HTTP/1.1 200"

    assert wait_until(answered, 5)
    with fronted.connect() as sock:
        sock.sendall(plain)
        assert sock.recv(12) == b"HTTP/1.1 401"


def test_an_engine_that_refuses_early_has_the_word_while_the_upload_goes_on(
    runner: Runner, direct: EngineDirect
) -> None:
    target = "/containers/no-such/archive?path=/"
    expected = direct.request("PUT", target, data=b"")
    answer = send_chunks(runner, "PUT", target, cut_up(bytes(20 * MIB)), TAR)
    assert (answer.status, answer.body) == (404, expected.content)


def test_an_upload_that_did_not_reach_the_engine_may_come_again_as_it_was(
    fronted: Runner, scripted: ScriptedEngine
) -> None:
    scripted.stop()
    headers = chunk_headers("POST", "/images/load")
    body = list(records(headers, [b"x", b"y"]))
    for _ in range(3):
        told = error(send_records(fronted, "POST", "/images/load", headers, body))
        assert told == (503, "engine_socket_missing", True)
    scripted.restart(lambda peer: peer.answer(OK))
    assert send_records(fronted, "POST", "/images/load", headers, body).status == 200


def test_an_upload_that_the_engine_broke_off_may_not_come_again(fronted: Runner, scripted: ScriptedEngine) -> None:
    scripted.restart(lambda peer: peer.read_head())
    headers = chunk_headers("POST", "/images/load")
    body = list(records(headers, cut_up(bytes(MIB))))
    status, code, retryable = error(send_records(fronted, "POST", "/images/load", headers, body))
    assert (status, code, retryable) == (502, "engine_cut_head", False)
    assert error(send_records(fronted, "POST", "/images/load", headers, body))[:2] == (401, "replayed_nonce")


def test_an_answer_that_comes_while_the_upload_goes_on_is_broken_off_with_it(
    fronted: Runner, scripted: ScriptedEngine
) -> None:
    """A progress stream tells in-band that the upload was meddled with."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sock.recv(100)
        line = b'{"stream":"step 1"}\r\n'
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(line), line))
        peer.sees_close()

    scripted.restart(script)
    headers = chunk_headers("POST", "/build")
    first, second, *_ = records(headers, [b"one", b"two"])
    with fronted.connect() as sock, sock.makefile("rb") as stream:
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        length = len(first) + len(second)
        sock.sendall(f"POST /build HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{fields}\r\n".encode() + first)
        while b"step 1" not in stream.readline():
            pass
        sock.sendall(second[:-1] + b"!")
        rest = stream.read()
    assert b"errorDetail" in rest
    assert b"signature of a chunk" in rest
    assert scripted.closed.wait(5)
