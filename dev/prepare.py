"""Prepares the checkout for what was asked for: `make run`, `make test`, `make bench`, `make lint`, `make dist`.

Each step looks first and does only what is missing, so that a second run is quick:
packages, `.venv`, an engine, the secret, `.env`, the image for the try-out.
What it makes lies in `.venv`, `.dev` and `.env` (and in /var/tmp where the checkout's path is too long for sockets).
"""

import argparse
import hashlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from dev import CHECKOUT, SetupError, busybox, packages, wait_until
from dev.engine import DEFAULT_SOCKET, Engine, configured_socket, find_engine
from dev.private_engine import PrivateEngine, private_home, serves_default_socket

IMAGE = "docker-runner/busybox:latest"
VENV_PACKAGES = ["python3-venv", "ca-certificates"]
ENGINE_PACKAGES = ["docker.io", "iptables", "iproute2"]
PODMAN_PACKAGES = ["podman", "runc", "socat", "tini"]
TRY_OUT_PACKAGES = ["curl", "busybox-static"]
DEPLOY_PACKAGES = ["nginx-light", "caddy", "systemd"]
BENCH_PACKAGES = [*VENV_PACKAGES, "busybox-static", "haproxy"]
TEST_PACKAGES = [
    *(*VENV_PACKAGES, *TRY_OUT_PACKAGES, *DEPLOY_PACKAGES),
    *("haproxy", "openssl", "docker-registry", "docker-compose", "nodejs", "npm"),
]
UNPACKED_PACKAGES = ["prometheus"]
SYSTEM_ENGINE_TIMEOUT_S = 30


def say(topic: str, text: str) -> None:
    print(f"{topic:<10} {text}", flush=True)


class Venv:
    """`.venv` of a checkout, with the project installed in place.

    A stamp inside says what it was made from: another Python or another folder means making it anew, another
    pyproject.toml installing again.
    """

    def __init__(self, checkout: Path) -> None:
        self.folder = checkout / ".venv"
        self._checkout = checkout
        self._stamp = self.folder / "docker-runner.stamp"

    def ensure(self, *, dev: bool) -> bool:
        """Makes it ready, with the development tools if `dev`; returns whether there was anything to do."""
        made, installed, extra = self._read_stamp()
        base = f"{self._checkout} {sys.version.split()[0]}"
        project = hashlib.sha256((self._checkout / "pyproject.toml").read_bytes()).hexdigest()
        if made != base or not (self.folder / "bin" / "docker-runner").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            extra = ""
        elif installed == project and (extra == "[dev]" or not dev):
            return False
        if dev:
            extra = "[dev]"  # and they stay when `make run` comes next
        say(".venv", f"installing docker-runner{extra}")
        python = self.folder / "bin" / "python"
        pip: list[str | Path] = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        try:
            if not python.exists():
                subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
            subprocess.run([*pip, "install", "--editable", f"{self._checkout}{extra}"], check=True)
        except subprocess.CalledProcessError:
            raise SetupError(f"{self.folder} could not be made; see above") from None
        self._stamp.write_text(f"{base}\n{project}\n{extra}\n")
        return True

    def _read_stamp(self) -> tuple[str, str, str]:
        try:
            made, installed, extra = self._stamp.read_text().splitlines()
        except (OSError, ValueError):
            return "", "", ""
        return made, installed, extra


class NodeModules:
    """`node_modules` of a folder with a package-lock.json: exactly what that names, nothing's own scripts run.

    A copy of the lock file inside says what it was made from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp = folder / "node_modules" / "docker-runner.stamp"

    def ensure(self) -> bool:
        """Makes it ready; returns whether there was anything to do."""
        wanted = (self._folder / "package-lock.json").read_text()
        if self._stamp.exists() and self._stamp.read_text() == wanted:
            return False
        say("npm", f"installing {self._folder / 'node_modules'}")
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--loglevel=error"]
        if subprocess.run(["npm", "ci", *options], cwd=self._folder, check=False).returncode:
            raise SetupError(f"{self._folder / 'node_modules'} could not be made; see above")
        self._stamp.write_text(wanted)
        return True


def ensure_secret(path: Path) -> bool:
    """A fresh secret of 64 hexadecimal digits, unless there is one; returns whether it was made.

    It appears complete and with mode 0600 at once, so that neither another user nor a second run sees half of it.
    """
    return _create_private_file(path, f"{secrets.token_hex(32)}\n")


def ensure_env(path: Path, settings: Mapping[str, str]) -> bool:
    """Writes the settings as a `.env`, mode 0600, unless there is one: that is the user's. Returns whether it did."""
    lines = [f"{name}={_quoted(value)}\n" for name, value in settings.items()]
    return _create_private_file(
        path, "# Made by `make run`. Yours to change: it is never written again.\n" + "".join(lines)
    )


def read_env(path: Path) -> dict[str, str]:
    """The settings in a `.env`: one NAME=VALUE a line, quotes around a value taken off, no interpolation."""
    if not path.exists():
        return {}
    settings = {}
    for line in path.read_text().splitlines():
        match = re.match(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)\s*$", line)
        if match:
            settings[match[1]] = _unquoted(match[2])
    return settings


def _quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:@%+,-]*", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return re.sub(r"\\(['\"\\])", r"\1", value[1:-1])
    return re.sub(r"\s+#.*$", "", value)


def _create_private_file(path: Path, text: str) -> bool:
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.link(draft, path)  # unlike a rename, it never replaces what somebody else made meanwhile
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def ensure_engine(settings: Mapping[str, str], also_needed: list[str]) -> Engine:
    """An engine that answers, our own if need be, and the packages for it and those also needed, in one go.

    Raises SetupError, with what to do, where there is none and none can be started.
    """
    engine = find_engine(settings)
    private = PrivateEngine(private_home(CHECKOUT))
    if engine is None:
        configured = configured_socket(settings)
        if configured not in (None, private.socket):
            raise SetupError(
                f"DOCKER_SOCKET (set in the environment or in .env) names {configured}, but no engine answers there"
            )
        if os.geteuid() != 0:
            raise SetupError(_without_engine())
        installed = packages.install([*also_needed, *ENGINE_PACKAGES])
        if "docker.io" in installed and configured is None:
            engine = _engine_of_the_package()
    else:
        packages.install(also_needed)
    if engine is not None:
        return private if engine.socket == private.socket else engine
    if not private.answers():
        say("engine", "starting a private one")
        # In a process of its own, which ends: so the engine does not become a child of the runner.
        if subprocess.run([sys.executable, "-m", "dev.private_engine", "start"], cwd=CHECKOUT, check=False).returncode:
            raise SetupError("no private engine could be started")
    return private


def _engine_of_the_package() -> Engine | None:
    """Where the machine starts services, Debian's package has just started its own engine: then that one is used."""
    system = Engine(DEFAULT_SOCKET)
    wait_until(lambda: system.answers() or not serves_default_socket(), SYSTEM_ENGINE_TIMEOUT_S)
    return system if system.answers() else None


def _without_engine() -> str:
    if Path(DEFAULT_SOCKET).exists() and not os.access(DEFAULT_SOCKET, os.W_OK):
        user = os.getenv("USER", "YOU")
        return f"no permission for {DEFAULT_SOCKET}. As root: usermod -aG docker {user}, then log in again"
    return (
        "no Docker Engine answers, and only root can start a private one. Start Docker (as root: systemctl start"
        " docker), or name its socket: DOCKER_SOCKET=/path/to/docker.sock make run"
    )


def run() -> NoReturn:
    """All set-up, then the runner, in this process's place."""
    env_file, secret = CHECKOUT / ".env", CHECKOUT / ".dev" / "secret"
    settings = {**read_env(env_file), **os.environ}
    if os.geteuid() == 0:
        engine = ensure_engine(settings, [*VENV_PACKAGES, *TRY_OUT_PACKAGES])
    else:
        engine = ensure_engine(settings, VENV_PACKAGES)
        if packages.missing(["curl"]):
            say("curl", "missing, and the try-out below needs it. As root: apt-get install curl")
    Venv(CHECKOUT).ensure(dev=False)
    ensure_secret(secret)
    ensure_env(
        env_file,
        {
            "DOCKER_RUNNER_SHARED_SECRET_FILE": str(secret),
            "DOCKER_RUNNER_HOST": "127.0.0.1",
            "DOCKER_RUNNER_PORT": "7071",
            **({"DOCKER_SOCKET": engine.socket} if engine.private else {}),
        },
    )
    if not busybox.has_image(engine, IMAGE):
        try:
            busybox.import_image(engine, IMAGE)
        except SetupError as error:
            say("image", f"{error}; the try-out below needs it")
    _introduce(engine, {**read_env(env_file), **os.environ})
    runner = CHECKOUT / ".venv" / "bin" / "docker-runner"
    os.chdir(CHECKOUT)
    os.execve(runner, [str(runner), "serve"], {**os.environ, "DOCKER_SOCKET": engine.socket})


def _introduce(engine: Engine, settings: Mapping[str, str]) -> None:
    say("engine", engine.socket + (" (private; `make engine-stop` stops it)" if engine.private else ""))
    if settings.get("DOCKER_RUNNER_SHARED_SECRET"):
        say("secret", "in DOCKER_RUNNER_SHARED_SECRET")
    else:
        say("secret", settings.get("DOCKER_RUNNER_SHARED_SECRET_FILE", "none set in .env"))
    script = shlex.quote(str(CHECKOUT / "examples" / "run-a-container.sh"))
    say("try it", f"in another terminal, once it listens:\n\n    sh {script}\n")


def prepare_tests() -> None:
    """All that the tests need. The engine is theirs to find or start; only root can have ones of its own."""
    needed = [*ENGINE_PACKAGES, *PODMAN_PACKAGES] if os.geteuid() == 0 else []
    if "docker.io" in packages.install([*TEST_PACKAGES, *needed]):
        _engine_of_the_package()
    for package in UNPACKED_PACKAGES:
        packages.unpack(package)
    Venv(CHECKOUT).ensure(dev=True)
    NodeModules(CHECKOUT / "tests" / "sdk").ensure()


def prepare_bench() -> None:
    """What `make bench` needs, but for the engine, which it finds or starts."""
    packages.install(BENCH_PACKAGES)
    Venv(CHECKOUT).ensure(dev=True)


def prepare_tools() -> None:
    """What `make lint` and `make dist` need."""
    packages.install(VENV_PACKAGES)
    Venv(CHECKOUT).ensure(dev=True)


PURPOSES: Mapping[str, Callable[[], None]] = {
    "run": run,
    "test": prepare_tests,
    "bench": prepare_bench,
    "lint": prepare_tools,
    "dist": prepare_tools,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m dev.prepare", description="Prepares the checkout.")
    parser.add_argument("purpose", choices=list(PURPOSES), help="run: also starts the runner")
    purpose = parser.parse_args().purpose
    try:
        PURPOSES[purpose]()
    except (SetupError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
