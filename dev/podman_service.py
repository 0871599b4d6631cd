"""Podman's API service of our own, apart from the machine's: the second engine that the tests run on.

It runs in namespaces of its own, for mounts, processes and network. What Podman keeps at fixed places (`/run`,
`/var/lib`, `/dev/shm`) is empty and private there, as are bridges and iptables; all else it has lies in one folder, its
home. So nothing of the machine or its Podman is touched, and the kernel ends all of it with the first process of the
namespace. Registries on this machine's loopback are reached there by relays (socat) over Unix sockets.
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
from dev.private_engine import SOCKET_PATH_LIMIT

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
PRIVATE_PLACES = ("/run", "/var/lib", "/dev/shm")

# Podman keeps the cgroups of all its containers here (in cgroups of version 1, in each hierarchy): theirs and their
# monitors'. No namespace hides them.
CGROUP_PARENTS = ("/sys/fs/cgroup/libpod_parent", "/sys/fs/cgroup/*/libpod_parent")
CGROUPS = ("libpod-{}", "libpod-conmon-{}")

# Short names of images stay what they are: Podman would else look for all of them at Docker's own registry.
CONFIGURATION = """
[containers]
default_ulimits = [{limits}]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
compat_api_enforce_docker_hub = false
events_logger = "file"
runtime = "runc"
[network]
network_config_dir = "{home}/networks"
"""
STORAGE = """
[storage]
driver = "{driver}"
graphroot = "{home}/data"
runroot = "/run/containers/storage"
"""

_IN_THE_NAMESPACE = """
set -e
for place in {places}; do mount -t tmpfs -o mode=755 docker-runner "$place"; done
ip link set lo up
for port in {ports}; do
    socat "TCP-LISTEN:$port,bind=127.0.0.1,reuseaddr,fork" "UNIX-CONNECT:{home}/registry-$port" &
done
exec "$@"
"""


class PodmanService(Engine):
    """`podman system service` whose home is the given folder; it ends with the thread that starts it.

    Args:
        home: absolute, outside the places that are private to the service, and short enough for a Unix socket in it.
        registry_ports: on 127.0.0.1, of registries that speak plain HTTP.
    """

    private = True

    def __init__(self, home: Path, *, registry_ports: Iterable[int] = ()) -> None:
        if not home.is_absolute() or any(home.is_relative_to(place) for place in PRIVATE_PLACES):
            raise ValueError(f"Podman's home must be absolute and not below {', '.join(PRIVATE_PLACES)}: {home}")
        super().__init__(str(home / "podman.sock"))
        if len(os.fsencode(self.socket)) > SOCKET_PATH_LIMIT:
            raise ValueError(f"the path of Podman's home is too long for a Unix socket in it: {home}")
        self.home = home
        self.log = home / "podman.log"
        self._ports = tuple(registry_ports)
        self._child: subprocess.Popen[bytes] | None = None
        self._relays: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the service, unless it runs, and returns when it answers. Raises SetupError, saying why it did not."""
        if self._child is not None and self._child.poll() is None:
            return
        if os.geteuid() != 0:
            raise SetupError("only root can start Podman's service in namespaces of its own")
        podman, init = find_program("podman"), find_program("tini")
        if podman is None or init is None or find_program("socat") is None:
            raise SetupError("missing: apt-get install --no-install-recommends podman runc tini socat iproute2")
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        failure = None
        for driver in ("overlay", "vfs"):  # The second works on every file system, and copies whole images.
            failure = self._try([init, "--", podman], driver)
            if failure is None:
                return
        raise SetupError(f"Podman's service did not start: {failure}")

    def stop(self) -> None:
        """Ends the service and whatever it started, containers included. Images stay."""
        if self._child is None:
            return
        containers = self._containers()
        # With the namespace's first process the kernel ends the others; unshare waits for it, and so for all of them.
        for first in _children(self._child.pid) or [self._child.pid]:
            os.kill(first, signal.SIGKILL)
        for cgroup in _cgroups(containers):
            _thaw(cgroup)
        self._child.wait(STOP_TIMEOUT_S)
        self._child = None
        for relay in self._relays:
            os.killpg(relay.pid, signal.SIGKILL)  # with those that it forked, one for each connection
            relay.wait()
        self._relays.clear()
        wait_until(lambda: all(_remove_folder(cgroup) for cgroup in _cgroups(containers)), STOP_TIMEOUT_S)
        if not _another_runs():
            for parent in _cgroup_parents():
                _remove_folder(parent / "conmon")
                _remove_folder(parent)

    def remove(self) -> None:
        """Stops the service and deletes its home."""
        self.stop()
        if self.home.is_symlink() or not self.home.exists():
            return
        shutil.rmtree(self.home)

    def _try(self, podman: list[str], driver: str) -> str | None:
        """Starts the service; returns None when it answers, else the reason, with nothing left running."""
        self._configure(driver)
        for port in self._ports:
            relay = ["socat", f"UNIX-LISTEN:{self.home}/registry-{port},fork", f"TCP:127.0.0.1:{port}"]
            self._relays.append(self._spawn(relay))
        service = [*podman, "system", "service", "--time=0", f"unix://{self.socket}"]
        child = self._child = self._spawn([*self._isolation(), *service])
        if wait_until(lambda: child.poll() is not None or self.answers(), START_TIMEOUT_S) and child.poll() is None:
            return None
        self.stop()
        said = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return f"{said[-1]} (log: {self.log})"

    def _containers(self) -> list[str]:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            _, answer = self.request("GET", "/containers/json?all=1", timeout_s=10)
            return [container["Id"] for container in json.loads(answer)]
        return []

    def _spawn(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """A process that ends with this thread."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": SEARCH_PATH, **self._environ()},
                start_new_session=True,
            )

    def _isolation(self) -> list[str]:
        """The command that runs another in namespaces of its own; what runs there ends when this ends."""
        ports = " ".join(map(str, self._ports))
        script = _IN_THE_NAMESPACE.format(places=" ".join(PRIVATE_PLACES), ports=ports, home=self.home)
        namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["unshare", *namespaces, "sh", "-c", script, "sh"]

    def _configure(self, driver: str) -> None:
        (self.home / "tmp").mkdir(exist_ok=True)
        insecure = (f'[[registry]]\nlocation = "127.0.0.1:{port}"\ninsecure = true\n' for port in self._ports)
        for name, text in (
            ("containers", CONFIGURATION.format(home=self.home, limits=", ".join(_limits()))),
            ("storage", STORAGE.format(home=self.home, driver=driver)),
            ("registries", "".join(insecure)),
        ):
            (self.home / f"{name}.conf").write_text(text)

    def _environ(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "TMPDIR": f"{self.home}/tmp",
            "CONTAINERS_CONF": f"{self.home}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.home}/storage.conf",
            "CONTAINERS_REGISTRIES_CONF": f"{self.home}/registries.conf",
        }


def _limits() -> list[str]:
    """Podman's own default for these is more than a process without CAP_SYS_RESOURCE may give to its containers."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    hard = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
    return [f'"{name}={limit}:{limit}"' for name, limit in hard.items() if limit != resource.RLIM_INFINITY]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _another_runs() -> bool:
    """Whether there is any Podman on the machine: it may be about to use the cgroups that all have in common."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().strip() in ("podman", "conmon"):
                return True
    return False


def _cgroup_parents() -> list[Path]:
    return [found for pattern in CGROUP_PARENTS for found in Path("/").glob(pattern[1:])]


def _cgroups(containers: list[str]) -> list[Path]:
    return [parent / name.format(each) for parent in _cgroup_parents() for each in containers for name in CGROUPS]


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
