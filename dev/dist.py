"""One file with everything inside: `make dist` makes `dist/docker-runner-cp3XX-linux_MACHINE.pyz`.

shiv packs the modules that pyproject.toml names and the packages that they need, as `.venv` has them installed: nothing
is fetched. The file is for the Python and the kind of machine it was made with, since three of the packages are
compiled; a few lines that run before shiv's say so on any other. Two builds of a commit give the same bytes: what goes
in is sorted, stamped with the commit's time (or SOURCE_DATE_EPOCH), and holds nothing of the machine or the folder.

Runs with `.venv`'s Python: `.venv/bin/python -m dev.dist [FOLDER]` prints the file's path.
"""

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dev import CHECKOUT, SetupError

EARLIEST = 315532800
"""1980, where a zip's calendar begins: the time of a build that knows no better."""
OLDEST_GLIBC = (2, 17)
"""Of the manylinux tags without a number."""
SOURCES = {".c", ".h", ".pxd", ".pxi", ".pyc", ".pyi", ".pyx"}
"""What packages carry that no run needs."""
OF_THE_INSTALLER = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}
"""Files of a package's metadata that tell of this installation."""

# Runs first, on whatever Python was taken: so in words that old ones understand, too.
MAIN = """\
# -*- coding: utf-8 -*-
import os
import sys

PYTHON = {python!r}
MACHINE = {machine!r}
GLIBC = {glibc!r}


def other():
    # What about this Python or machine is not what the file was made for.
    version = sys.version_info[:2]
    implementation = getattr(getattr(sys, "implementation", None), "name", "cpython")
    if implementation != "cpython" or version != PYTHON:
        return "%s %d.%d" % ((implementation.replace("cpython", "CPython"),) + version)
    if not sys.platform.startswith("linux") or os.uname()[4] != MACHINE:
        return "%s %s" % (sys.platform, getattr(os, "uname", lambda: [""] * 5)()[4])
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        libc = ""
    if not libc.startswith("glibc ") or tuple(map(int, libc.split()[1].split(".")[:2])) < GLIBC:
        return libc or "a C library other than glibc"
    return None


found = other()
if found:
    sys.exit(
        "docker-runner: this file is for CPython %d.%d on Linux %s with glibc %d.%d or newer, and %s is %s.\\n"
        "Run it with python%d.%d, or make one for this Python in a checkout: make dist"
        % (PYTHON + (MACHINE,) + GLIBC + (sys.executable, found) + PYTHON)
    )

import _bootstrap

unpack = _bootstrap.extract_site_packages


def unpack_or_say_why(archive, target, *options):
    advice = "SHIV_ROOT names the folder to unpack in: one of its own, writable, not mounted noexec"
    try:
        os.makedirs(str(target.parent), exist_ok=True)
        if os.statvfs(str(target.parent)).f_flag & os.ST_NOEXEC:
            sys.exit("docker-runner: %s is mounted noexec. %s." % (target.parent, advice))
        unpack(archive, target, *options)
    except OSError as error:
        sys.exit("docker-runner: cannot unpack in %s: %s. %s." % (target.parent, error.strerror, advice))


_bootstrap.extract_site_packages = unpack_or_say_why
_bootstrap.bootstrap()
"""


def build(folder: Path) -> Path:
    """Make the file in a folder; returns its path.

    Raises:
        SetupError: something that goes in is not installed, or shiv failed.
    """
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    packages = _needed(project["project"]["dependencies"])
    stamp = epoch()
    target = folder / file_name()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        content, packed = Path(name, "content"), Path(name, "packed.pyz")
        content.mkdir()
        for module in project["tool"]["setuptools"]["py-modules"]:
            shutil.copyfile(CHECKOUT / f"{module}.py", content / f"{module}.py")
        (content / "docker_runner").mkdir()
        shutil.copyfile(CHECKOUT / "LICENSE", content / "docker_runner/LICENSE")
        for package in packages:
            for path in _files(package):
                (content / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(package.locate_file(path)), content / path)
        command = [sys.executable, "-m", "shiv", "--site-packages", str(content), "--entry-point", "runner:main"]
        done = subprocess.run(
            [*command, "--output-file", str(packed), "--reproducible", "--uncompressed"],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(stamp)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SetupError(f"shiv: {(done.stderr or done.stdout).strip()}")
        draft = target.with_suffix(".new")
        _repack(packed, draft, _main(packages), stamp)
        draft.replace(target)  # whoever runs the old one keeps it
    return target


def file_name() -> str:
    """The file's name, for this Python and this machine."""
    return f"docker-runner-cp{sys.version_info.major}{sys.version_info.minor}-{_platform()}.pyz"


def _platform() -> str:
    return re.sub(r"[^a-z0-9]+", "_", sysconfig.get_platform())


def epoch() -> int:
    """The time that stands in the file, in seconds: SOURCE_DATE_EPOCH, else the commit's."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not given:
        command = ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"]
        try:
            given = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            given = ""
    return max(int(given), EARLIEST) if given.isdigit() else EARLIEST


def _needed(requirements: list[str]) -> list[Distribution]:
    """The installed packages that satisfy the requirements, and what these need, by name."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(each) for each in requirements]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found and not wanted.extras:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            raise SetupError(f"{wanted} is not installed in {sys.prefix}") from None
        if not wanted.specifier.contains(found[name].version, prereleases=True):
            raise SetupError(f"{wanted} is needed, {found[name].version} is installed in {sys.prefix}")
        for each in map(Requirement, found[name].requires or []):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *wanted.extras}):
                todo.append(each)
    return [found[name] for name in sorted(found)]


def _files(package: Distribution) -> Iterator[Path]:
    """What a run needs of a package, below `site-packages`."""
    for each in package.files or []:
        path = Path(each)
        own = path.parent.name.endswith(".dist-info") and path.name in OF_THE_INSTALLER
        if ".." not in path.parts and path.suffix not in SOURCES and not own:
            yield path


def _main(packages: list[Distribution]) -> bytes:
    tags = [package.read_text("WHEEL") or "" for package in packages]
    return MAIN.format(
        python=tuple(sys.version_info[:2]), machine=platform.machine(), glibc=max(map(_glibc, tags))
    ).encode()


def _glibc(wheel: str) -> tuple[int, int]:
    """The glibc that a wheel needs: the oldest that its tags name."""
    found = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_", wheel)]
    return min(found, default=OLDEST_GLIBC)


def _repack(packed: Path, target: Path, main: bytes, stamp: int) -> None:
    """Write shiv's archive again: sorted, with our `__main__.py`, one time, and no mode bits of this machine."""
    when = time.gmtime(stamp)[:6]
    with zipfile.ZipFile(packed) as old, target.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
            for name in sorted(old.namelist()):
                entry = zipfile.ZipInfo(name, (when[0], when[1], when[2], when[3], when[4], when[5]))
                entry.create_system = 3  # Unix, whose modes follow
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                new.writestr(entry, main if name == "__main__.py" else old.read(name))
    target.chmod(0o755)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "dist"
    try:
        print(build(folder))
    except SetupError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
