"""The image, built on the real engine from the `Containerfile`, on a base made of this machine's Python."""

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

from conftest import LABEL, EngineDirect, Names
from dev import CHECKOUT, wait_until
from packed import environment, one_file
from service import SECRET

NOT_NEEDED = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}
"""Folders of the standard library that the base goes without; slim images have no compiled files either."""


STUBS = ("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1", "libutil.so.1")
"""Further parts of glibc, beside `libc.so.6`: every slim image has them, and older binaries name them."""


class Docker:
    """The docker CLI on an engine, with its classic builder."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._program = shutil.which("docker") or "/usr/bin/docker"
        self._environ = environment({"DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "0"})

    def __call__(self, *arguments: str) -> str:
        """Run a command; returns what it said on stdout."""
        command = [self._program, *arguments]
        done = subprocess.run(command, env=self._environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def status(self, container: str) -> int:
        """Wait until a container has ended; its exit status."""
        return int(self("wait", container))

    def address(self, container: str) -> str:
        """A container's address on its one network."""
        return self("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)

    def wait_healthy(self, container: str) -> None:
        """Wait for the engine's own verdict."""
        assert wait_until(
            lambda: self("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy", 40
        ), (
            self("inspect", "--format", "{{json .State}}", container),
            self("logs", container),
        )


def _libraries(programs: list[Path]) -> set[Path]:
    """The shared libraries that programs and libraries need, the loader included."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+)", said, re.MULTILINE)}


def _root_filesystem() -> bytes:
    """A tar of this machine's Python, as `/usr/local/bin/python3`, and the libraries that it needs; no shell."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    stdlib = Path(sysconfig.get_path("stdlib"))
    loader = Path(re.findall(r"/lib\S*/ld-linux\S+", subprocess.check_output(["ldd", python], text=True))[0])
    archive = io.BytesIO()

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = entry.name.rpartition("/")[2]
        return None if name in NOT_NEEDED or name.startswith("config-") or name.endswith(".a") else entry

    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for folder, mode in (("tmp", 0o1777), ("lib", 0o755), ("usr/lib", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        tar.add(python, "usr/local/bin/python3")
        tar.add(stdlib, f"usr/local/lib/{stdlib.name}", filter=wanted)
        tar.add(loader, str(loader).lstrip("/"))
        libraries = _libraries([python, *stdlib.glob("lib-dynload/*.so")]) - {loader}
        libc = next(path for path in libraries if path.name == "libc.so.6")
        for library in sorted(libraries | {libc.with_name(name) for name in STUBS}):
            tar.add(library, f"usr/lib/{library.name}")
    return archive.getvalue()


@functools.cache
def base(direct: EngineDirect, names: Names) -> str:
    """The name of an image that has a Python, and nothing else."""
    name = names("base")
    query = urlencode({"fromSrc": "-", "repo": name, "tag": "slim", "changes": "ENV PATH=/usr/local/bin HOME=/"})
    answer = direct.request("POST", f"/images/create?{query}", data=_root_filesystem())
    assert answer.status_code == 200, answer.text
    assert "errorDetail" not in answer.text, answer.text
    return f"{name}:slim"


@functools.cache
def image(docker: Docker, direct: EngineDirect, names: Names) -> str:
    """The name of the image that the `Containerfile` makes; it goes with the other names."""
    name = names("image")
    arguments = {"BASE": base(direct, names), "FILE": f"dist/{one_file().name}", "VERSION": "1.2.3", "REVISION": "abc"}
    given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    # Without a network: nothing is fetched.
    docker(
        "build", "--quiet", "--network=none", f"--file={CHECKOUT}/Containerfile", *given, f"--tag={name}", str(CHECKOUT)
    )
    return name


def secret_file(folder: Path, owner: int = 65532) -> Path:
    """A file with the tests' secret that the image's user can read, and nobody else where we are root."""
    file = folder / "secret"
    file.write_text(f"{SECRET}\n")
    if os.geteuid() == 0:
        os.chown(file, owner, owner)
        file.chmod(0o400)
    else:
        file.chmod(0o444)
    return file


HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
"""What an operator gives: nothing to write to but /tmp (which nothing is executed from), no capability."""


@contextlib.contextmanager
def container(docker: Docker, names: Names, *arguments: str) -> Iterator[str]:
    """A detached container for the length of the context; its name."""
    name = names()
    try:
        docker("run", "--detach", f"--name={name}", f"--label={LABEL}={names.mark}", *arguments)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)
