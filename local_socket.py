"""A Unix socket to listen on: for its owner alone; takes the place of one left behind, never of one in use."""

import contextlib
import errno
import os
import socket
import stat


def listen(path: str, backlog: int) -> socket.socket:
    """A socket that listens at `path`, made with mode 0600.

    Raises:
        OSError: somebody listens there, there is something else, or the folder forbids it.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else", path)
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.setblocking(False)  # One whose backlog is full is in use.
            with contextlib.suppress(BlockingIOError):
                probe.connect(path)
            raise OSError(errno.EADDRINUSE, "somebody listens there", path)
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def remove(path: str, identity: tuple[int, int]) -> None:
    """Remove the socket's file, if it is still the one of this `identity`."""
    with contextlib.suppress(OSError):
        if identify(path) == identity:
            os.unlink(path)


def identify(path: str) -> tuple[int, int]:
    """What tells a file from another that takes its place."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino
