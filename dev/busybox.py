"""The tiny image that examples and tests run: Debian's static busybox, imported, so that no registry is needed."""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import quote, urlencode

from dev import CHECKOUT, SetupError, find_program
from dev.engine import Engine


def has_image(engine: Engine, name: str) -> bool:
    status, _ = engine.request("GET", f"/images/{quote(name)}/json")
    return status == 200


def import_image(engine: Engine, name: str) -> None:
    """Makes the image `name` (`repository:tag`) on the engine, as `docker import` does. Raises SetupError."""
    repository, _, tag = name.rpartition(":")
    query = urlencode({"fromSrc": "-", "repo": repository, "tag": tag, "changes": 'CMD ["sh"]'})
    status, answer = engine.request("POST", f"/images/create?{query}", _root_filesystem(_static_busybox()))
    # Once the answer's progress stream has begun, a failure can only be told inside it.
    if status != 200 or b'"error"' in answer:
        raise SetupError(f"the engine did not import the image {name}: {answer.decode(errors='replace').strip()}")


def _static_busybox() -> Path:
    installed = find_program("busybox")
    if installed and _is_static(Path(installed)):
        return Path(installed)
    kept = CHECKOUT / ".dev" / "busybox"
    if not kept.exists():
        _download(kept)
    return kept


def _is_static(program: Path) -> bool:
    return subprocess.run(["ldd", program], capture_output=True, check=False).returncode != 0


def _download(target: Path) -> None:
    # Unpacked, not installed: that needs no root, and would take away a dynamic busybox that is there.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetched = subprocess.run(
            ["apt-get", "download", "busybox-static"], cwd=folder, capture_output=True, text=True, check=False
        )
        packages = list(folder.glob("*.deb"))
        if not packages:
            raise SetupError(
                "no static busybox for the image: apt-get update && apt-get install busybox-static"
                f" ({fetched.stderr.strip()})"
            )
        subprocess.run(["dpkg-deb", "-x", packages[0], folder / "root"], check=True)
        target.parent.mkdir(exist_ok=True)
        (folder / "root" / "bin" / "busybox").replace(target)


def _root_filesystem(busybox: Path) -> bytes:
    """A tar with `bin/busybox` and a link for each of its applets."""
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder, mode in (("bin", 0o755), ("tmp", 0o1777)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        program = tarfile.TarInfo("bin/busybox")
        program.mode, program.size = 0o755, busybox.stat().st_size
        with busybox.open("rb") as content:
            tar.addfile(program, content)
        for applet in applets:
            if applet == "busybox":  # a link to itself would take the program's place
                continue
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()
