"""Debian packages: what is missing, and how to install it.

A package counts as there if what the set-up needs of it is there, wherever that came from.
"""

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from dev import CHECKOUT, SetupError, find_program


def _program(name: str) -> bool:
    return find_program(name) is not None


PRESENT: dict[str, Callable[[], bool]] = {
    "busybox-static": partial(_program, "busybox"),  # a dynamic one is left alone; see busybox.py
    "ca-certificates": Path("/etc/ssl/certs/ca-certificates.crt").exists,
    "caddy": partial(_program, "caddy"),
    "curl": partial(_program, "curl"),
    "docker-compose": partial(_program, "docker-compose"),
    "docker-registry": partial(_program, "docker-registry"),
    "docker.io": partial(_program, "dockerd"),
    "haproxy": partial(_program, "haproxy"),
    "iproute2": partial(_program, "ip"),
    "iptables": partial(_program, "iptables"),
    "nginx-light": partial(_program, "nginx"),
    "nodejs": partial(_program, "node"),
    "npm": partial(_program, "npm"),
    "openssl": partial(_program, "openssl"),
    "podman": partial(_program, "podman"),
    "python3-venv": lambda: importlib.util.find_spec("ensurepip") is not None,
    "runc": partial(_program, "runc"),
    "socat": partial(_program, "socat"),
    "systemd": partial(_program, "systemd-analyze"),
    "tini": partial(_program, "tini"),
}


UNPACKED = CHECKOUT / ".dev" / "packages"
"""Where packages lie whose programs are wanted, and not the service that their installation would start."""


def unpack(package: str) -> Path:
    """The folder with a package's files, fetched if need be; nothing is installed, and nothing of its own is run.

    Raises SetupError, naming the command, where it cannot be fetched.
    """
    target = UNPACKED / package
    if target.exists():
        return target
    print(f"packages   unpacking {package}", flush=True)
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED) as name:
        folder = Path(name)
        for retry in (False, True):
            if retry and os.geteuid() == 0:
                _apt_get("update", "--quiet", "--option", "DPkg::Lock::Timeout=120")
            said = _apt_get("download", package, cwd=folder).stdout
            if found := list(folder.glob("*.deb")):
                break
        else:
            raise SetupError(f"{package} could not be fetched (as root: apt-get update):\n{said}")
        subprocess.run(["dpkg-deb", "--extract", found[0], folder / "files"], check=True)
        (folder / "files").rename(target)
    return target


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are not there."""
    return [name for name in packages if not PRESENT[name]()]


def install(packages: Iterable[str]) -> list[str]:
    """Installs what is missing of the packages, and nothing else; returns what that was.

    apt-get is not even started if all is there. Raises SetupError, naming the command, where only root could go on.
    """
    needed = missing(packages)
    if not needed:
        return []
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *needed]
    if os.geteuid() != 0 or not find_program("apt-get"):
        raise SetupError(f"missing: {', '.join(needed)}. As root: apt-get update && {' '.join(command)}")
    print(f"packages   installing {', '.join(needed)}", flush=True)
    quiet = ["--quiet", "--option", "DPkg::Lock::Timeout=120"]
    _apt_get("update", *quiet)  # a failure shows in what comes next, or does not matter
    done = _apt_get(*command[1:], *quiet)
    # Not its exit status: where a package's own service cannot start, apt-get fails and all that we need is there.
    still = missing(needed)
    if still:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise SetupError(f"apt-get could not install {', '.join(still)}:\n{said}")
    return needed


def _apt_get(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", *arguments],
        cwd=cwd,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
