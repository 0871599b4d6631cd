"""Podman's API service of our own, apart from the machine's: the second engine that the tests run on.

It runs in mount and PID namespaces of its own, in which what Podman keeps at fixed places (`/run`, `/var/lib`,
`/dev/shm`) is empty and private, and all else it has lies in one folder, its home. So nothing of the machine's Podman
is read or touched, and the kernel ends every process and mount of it with the first process of the namespace.
"""

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from dev import SEARCH_PATH, SetupError, find_program, wait_until
from dev.engine import Engine

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
PRIVATE_PLACES = ("/run", "/var/lib", "/dev/shm")

# Podman keeps the cgroups of all its containers here (in cgroups of version 1, in each hierarchy): theirs and their
# monitors'. No namespace hides them.
CGROUP_PARENTS = ("/sys/fs/cgroup/libpod_parent", "/sys/fs/cgroup/*/libpod_parent")
CGROUPS = ("libpod-{}", "libpod-conmon-{}")

_IN_THE_NAMESPACE = """
set -e
for place in {places}; do mount -t tmpfs -o mode=755 docker-runner "$place"; done
exec "$@"
"""


class PodmanService(Engine):
    """`podman system service` whose home is the given folder; it ends with the thread that starts it.

    Args:
        home: absolute, outside the places that are private to the service, and short enough for a Unix socket in it.
        insecure_registries: addresses (`host:port`) of registries that speak plain HTTP.
    """

    private = True

    def __init__(self, home: Path, *, insecure_registries: Iterable[str] = ()) -> None:
        if not home.is_absolute() or any(home.is_relative_to(place) for place in PRIVATE_PLACES):
            raise ValueError(f"Podman's home must be absolute and not below {', '.join(PRIVATE_PLACES)}: {home}")
        super().__init__(str(home / "podman.sock"))
        self.home = home
        self.log = home / "podman.log"
        self._insecure_registries = tuple(insecure_registries)
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the service, unless it runs, and returns when it answers. Raises SetupError, saying why it did not."""
        if self._child is not None and self._child.poll() is None:
            return
        if os.geteuid() != 0:
            raise SetupError("only root can start Podman's service in namespaces of its own")
        podman, init = find_program("podman"), find_program("tini")
        if podman is None or init is None:
            raise SetupError("missing: apt-get install --no-install-recommends podman tini")
        self._configure()
        with self.log.open("wb") as log:
            child = self._child = subprocess.Popen(
                [*_isolation(), init, "--", podman, *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": SEARCH_PATH, **self._environ()},
                start_new_session=True,
            )
        answered = wait_until(lambda: child.poll() is not None or self.answers(), START_TIMEOUT_S)
        if not answered or child.poll() is not None:
            self.stop()
            said = self.log.read_text(errors="replace").strip()
            raise SetupError(f"Podman's service did not start: {said or 'without a word'} (log: {self.log})")

    def stop(self) -> None:
        """Ends the service and whatever it started, containers included. Images stay."""
        if self._child is None:
            return
        containers = self._containers()
        self._child.send_signal(signal.SIGKILL)  # unshare's --kill-child passes it on, and the kernel ends the rest
        self._child.wait(STOP_TIMEOUT_S)
        self._child = None
        wait_until(lambda: _remove_cgroups(containers), STOP_TIMEOUT_S)

    def remove(self) -> None:
        """Stops the service and deletes its home."""
        self.stop()
        if self.home.is_symlink() or not self.home.exists():
            return
        shutil.rmtree(self.home)

    def _containers(self) -> list[str]:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            _, answer = self.request("GET", "/containers/json?all=1", timeout_s=10)
            return [container["Id"] for container in json.loads(answer)]
        return []

    def _configure(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.home / "tmp").mkdir(exist_ok=True)
        # Podman's own default for these is more than a process without CAP_SYS_RESOURCE may give to its containers.
        limits = [
            f'"{name}={hard}:{hard}"'
            for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
            if (hard := resource.getrlimit(kind)[1]) != resource.RLIM_INFINITY
        ]
        (self.home / "containers.conf").write_text(
            f'[containers]\nlog_driver = "k8s-file"\ndefault_ulimits = [{", ".join(limits)}]\n'
            '[engine]\ncompat_api_enforce_docker_hub = false\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
            f'[network]\nnetwork_config_dir = "{self.home}/networks"\n'
        )
        (self.home / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "/run/containers/storage"\ngraphroot = "{self.home}/data"\n'
        )
        (self.home / "registries.conf").write_text(
            "".join(f'[[registry]]\nlocation = "{each}"\ninsecure = true\n' for each in self._insecure_registries)
        )

    def _environ(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "TMPDIR": f"{self.home}/tmp",
            "CONTAINERS_CONF": f"{self.home}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.home}/storage.conf",
            "CONTAINERS_REGISTRIES_CONF": f"{self.home}/registries.conf",
        }

    def _options(self) -> list[str]:
        return ["system", "service", "--time=0", f"unix://{self.socket}"]


def _isolation() -> list[str]:
    """The command that runs another in namespaces of its own; what runs there ends when this ends."""
    script = _IN_THE_NAMESPACE.format(places=" ".join(PRIVATE_PLACES))
    namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sh", "-c", script, "sh"]


def _remove_cgroups(containers: list[str]) -> bool:
    """Removes what is left of the containers' cgroups; returns whether all of it is gone."""
    gone = True
    for parent in (found for pattern in CGROUP_PARENTS for found in Path("/").glob(pattern[1:])):
        for folder in (parent / name.format(each) for each in containers for name in CGROUPS):
            _thaw(folder)
            gone = _remove_folder(folder) and gone
        # These two go with the last Podman that uses them.
        _remove_folder(parent / "conmon")
        _remove_folder(parent)
    return gone


def _thaw(cgroup: Path) -> None:
    """Lets the processes of a paused container run: in cgroups of version 1, not even SIGKILL ends them before that."""
    for name, running in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        with contextlib.suppress(OSError):
            if (cgroup / name).exists():
                (cgroup / name).write_text(running)


def _remove_folder(folder: Path) -> bool:
    """Removes an empty folder; returns whether it is gone."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
