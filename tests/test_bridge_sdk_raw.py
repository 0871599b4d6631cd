"""What SDKs send when they attach without an upgrade, as bytes: the engine reads on after the head as it stands.

dockerode's older form announces a chunked body, or none, and keeps the connection: what follows the head goes to the
container's stdin, framing and all; the answer is 200 with neither length nor chunking, ended by close.
"""

import socket
from typing import Any

import pytest

from bridged import Bridge
from comparison import Containers
from conftest import EngineDirect, Names
from dev.engine import Engine
from works import Side, Sides

UPGRADE = "Connection: Upgrade\r\nUpgrade: tcp\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def sides(engine: Engine, bridge: Bridge, names: Names) -> Sides[None]:
    return Sides(f"unix://{engine.socket}", bridge.host, names, lambda _: None)


def read_until(sock: socket.socket, text: bytes) -> bytes:
    seen = b""
    while not seen.endswith(text):
        piece = sock.recv(65536)
        assert piece, seen
        seen += piece
    return seen


@pytest.mark.parametrize("headers", ["", "Content-Length: 0\r\n", CHUNKED, UPGRADE, CHUNKED + UPGRADE])
@pytest.mark.parametrize("sent", [b"hello\n", b"6\r\nhello\n\r\n0\r\n\r\n"], ids=["plain", "framed"])
def test_attach_hands_over_what_follows_the_head_as_it_stands(
    sides: Sides[None], direct: EngineDirect, names: Names, image: str, headers: str, sent: bytes
) -> None:
    containers = Containers(direct, names, image)

    def scenario(side: Side[None]) -> list[Any]:
        name = containers("sh", "-c", "cat; echo end >&2", start=False, OpenStdin=True, StdinOnce=True)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(side.host.removeprefix("unix://"))
            target = f"/containers/{name}/attach?stdin=1&stdout=1&stderr=1&stream=1"
            sock.sendall(f"POST {target} HTTP/1.1\r\nHost: docker\r\n{headers}\r\n".encode())
            head = read_until(sock, b"\r\n\r\n")
            containers.do("POST", f"/containers/{name}/start", 204)
            sock.sendall(sent)
            echoed = read_until(sock, sent)
            sock.shutdown(socket.SHUT_WR)
            return [sorted(head.lower().splitlines()), echoed, read_until(sock, b"end\n"), sock.recv(1)]

    head, echoed, rest, end = sides.same(scenario)
    assert (b"upgrade: tcp" in head) == (UPGRADE in headers)
    assert not any(line.startswith((b"transfer-encoding", b"content-length")) for line in head)
    assert echoed == b"\x01\0\0\0" + len(sent).to_bytes(4, "big") + sent
    assert (rest, end) == (b"\x02\0\0\0\0\0\0\x04end\n", b"")
