"""The development set-up: what `make` runs before there is anything installed to run.

Standard library only, but for dist.py, because it runs with the system's Python, before `.venv` exists.

    engine.py          an engine: where one answers, and the few requests the set-up itself makes
    private_engine.py  a dockerd of our own: start, stop, kill, nothing left behind
    podman_service.py  the same with Podman's API service, the second engine of the tests
    busybox.py         the tiny image that examples and tests run, imported from Debian's busybox
    packages.py        Debian packages: what is missing, and how to install it
    prepare.py         puts it together for `make run`, `make test`, `make bench`, ..
    dist.py            the one file of `make dist`
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

# dockerd and iptables live in sbin, which is not on everybody's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class SetupError(Exception):
    """Something a person has to do first; the message says what, and with which command."""


def find_program(name: str) -> str | None:
    """The absolute path of an installed program, those of the administrator included."""
    return shutil.which(name, path=SEARCH_PATH)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits for a condition; returns whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
