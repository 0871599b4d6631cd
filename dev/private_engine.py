"""A dockerd of our own, apart from any other on the machine: start, stop, kill, nothing left behind.

Everything it has lies in one folder, its home: socket, pid file, log, configuration, data. A process is ours if it is
a part of Docker and names that folder in its arguments; a mount is ours if it lies below it. So it can be stopped by
another process than the one that started it, and what a killed dockerd left can still be found.

Command line: `python3 -m dev.private_engine start|stop|remove`, for the engine of this checkout.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dev import CHECKOUT, SEARCH_PATH, SetupError, find_program, wait_until
from dev.engine import DEFAULT_SOCKET, Engine

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30

# The kernel's limit on a Unix socket's path is 108 bytes, the final NUL included; this is the deepest one in a home.
SOCKET_PATH_LIMIT = 107
DEEPEST_SOCKET = "exec/containerd/containerd-debug.sock"

DEFAULT_HOSTS = ("fd://", f"unix://{DEFAULT_SOCKET}", "unix:///run/docker.sock")


def private_home(checkout: Path) -> Path:
    """The folder of the checkout's private engine: `.dev/engine`, or a short one where that path is too long."""
    home = checkout / ".dev" / "engine"
    if _fits(home):
        return home
    return Path("/var/tmp") / f"docker-runner-{hashlib.sha256(os.fsencode(checkout)).hexdigest()[:12]}"


def _fits(home: Path) -> bool:
    return len(os.fsencode(home / DEEPEST_SOCKET)) <= SOCKET_PATH_LIMIT


class PrivateEngine(Engine):
    """A dockerd whose home is the given folder.

    Args:
        home: absolute, and short enough for the sockets below it (ValueError otherwise).
        network: whether containers shall have a network that leads out, through the default bridge and iptables. Where
            that cannot be had, and without it, the engine gets a bridge of its own: its containers reach each other
            and this machine, and any number of such engines live side by side. `no_network_because` says why.
        tied: whether the engine shall end with the thread that starts it, whatever ends that.
    """

    private = True

    def __init__(self, home: Path, *, network: bool = False, tied: bool = False) -> None:
        if not home.is_absolute() or not _fits(home):
            raise ValueError(f"the engine's home must be absolute and short enough for Unix sockets below it: {home}")
        super().__init__(str(home / "docker.sock"))
        self.home = home
        self.log = home / "dockerd.log"
        self.no_network_because: str | None = None
        self._bridge = "dr" + hashlib.sha256(os.fsencode(home)).hexdigest()[:10]
        self._network = network
        self._tied = tied
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the engine, unless it runs, and returns when it answers. Raises SetupError, saying why it did not."""
        if self.pid() is not None:
            if not wait_until(self.answers, START_TIMEOUT_S):
                raise SetupError(f"the engine in {self.home} runs but does not answer; its log: {self.log}")
            return
        if os.geteuid() != 0:
            raise SetupError("only root can start an engine")
        dockerd = find_program("dockerd")
        if dockerd is None:
            raise SetupError("dockerd is missing: apt-get install --no-install-recommends docker.io iptables")
        self._claim_home()
        self.no_network_because = None
        if self._network:
            self.no_network_because = self._bridge_taken() or self._try(dockerd, ())
            if self.no_network_because is None:
                return
        bridge = self._bridge
        try:
            self._make_bridge()
        except SetupError as error:
            # The last resort: with this, dockerd removes the default bridge, whoever uses it.
            bridge, self.no_network_because = "none", str(error)
        failure = self._try(dockerd, (f"--bridge={bridge}", "--iptables=false", "--ip-masq=false"))
        if failure is not None:
            raise SetupError(f"dockerd did not start: {failure}")

    def kill(self) -> None:
        """Ends dockerd as a crash would: containers and files stay as they are. `start` takes them over again."""
        pid = self.pid()
        if pid is not None:
            _signal(pid, signal.SIGKILL)
            wait_until(lambda: self.pid() is None, STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Stops dockerd and whatever it started, containers included, and unmounts what it mounted. Images stay."""
        pid = self.pid()
        if pid is not None:
            _signal(pid, signal.SIGTERM)
            wait_until(lambda: self.pid() is None, STOP_TIMEOUT_S)
        self._end_leftovers()
        if Path(f"/sys/class/net/{self._bridge}").exists():
            self._ip("link", "delete", self._bridge)
        for mount in reversed(mounts_below(self.home)):
            subprocess.run(["umount", "--lazy", mount], check=False, env={"PATH": SEARCH_PATH})

    def remove(self) -> None:
        """Stops the engine and deletes its home."""
        self.stop()
        if self.home.is_symlink() or not self.home.exists():
            return
        shutil.rmtree(self.home)

    def pid(self) -> int | None:
        """The running dockerd, by its pid file, if that process really is the dockerd of this home."""
        if self._child is not None and self._child.poll() is None:
            return self._child.pid
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.home / "pid").read_text())
            argv = _argv(pid)
            if argv and os.path.basename(argv[0]) == "dockerd" and str(self.home / "data") in argv:
                return pid
        return None

    def processes(self) -> list[int]:
        """Every process of this engine: dockerd, containerd, shims, and all that run below them."""
        prefix = f"{self.home}/"
        roots = {
            pid
            for pid, argv in _all_processes()
            if os.path.basename(argv[0]).startswith(("dockerd", "containerd", "docker-proxy"))
            and any(prefix in argument for argument in argv[1:])
        }
        return sorted(roots | _descendants(roots))

    def _make_bridge(self) -> None:
        if not Path(f"/sys/class/net/{self._bridge}").exists():
            self._ip("link", "add", self._bridge, "type", "bridge")
            number = int(self._bridge[2:], 16)
            self._ip("address", "add", f"10.{192 + number % 64}.{number // 64 % 256}.1/24", "dev", self._bridge)
            self._ip("link", "set", self._bridge, "up")

    def _ip(self, *arguments: str) -> None:
        program = find_program("ip")
        if program is None:
            raise SetupError("ip is missing: apt-get install --no-install-recommends iproute2")
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def _claim_home(self) -> None:
        # Its name is no secret and its parent may be open to all: a folder made by somebody else is not used.
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self.home.lstat()
        if self.home.is_symlink() or found.st_uid != os.geteuid():
            raise SetupError(f"{self.home} belongs to somebody else; not used for an engine")
        self.home.chmod(0o700)
        # After a crash or a reboot these may name a process that has nothing to do with Docker; dockerd believes them.
        for stale in ("pid", "exec/containerd/containerd.pid"):
            (self.home / stale).unlink(missing_ok=True)
        (self.home / "daemon.json").write_text("{}\n")

    def _bridge_taken(self) -> str | None:
        if not Path("/sys/class/net/docker0").exists():
            return None
        for _, argv in _all_processes():
            if os.path.basename(argv[0]) == "dockerd" and not any(each.startswith("--bridge=") for each in argv):
                return "another dockerd uses the docker0 bridge"
        return None

    def _try(self, dockerd: str, options: tuple[str, ...]) -> str | None:
        """Starts dockerd; returns None when it answers, else the reason, with nothing left running."""
        command = [
            *(["setpriv", "--pdeathsig", "TERM"] if self._tied else []),
            dockerd,
            f"--config-file={self.home}/daemon.json",  # the machine's own would contradict the options below
            *("--data-root", f"{self.home}/data", "--exec-root", f"{self.home}/exec"),
            *("--pidfile", f"{self.home}/pid", "--host", f"unix://{self.socket}"),
            *options,
        ]
        with self.log.open("wb") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "PATH": SEARCH_PATH},
                start_new_session=True,
            )
        self._child = child
        if wait_until(lambda: child.poll() is not None or self.answers(), START_TIMEOUT_S) and child.poll() is None:
            return None
        ended = child.returncode is not None
        self.stop()
        reason = self._reason() if ended else f"no answer within {START_TIMEOUT_S} s"
        return f"{reason} (log: {self.log})"

    def _reason(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        failures = [line for line in lines if line.startswith("failed to start daemon")]
        return (failures or lines or ["it ended without a word"])[-1]

    def _end_leftovers(self) -> None:
        for _ in range(3):  # a shim may have started something between the look and the kill
            left = self.processes()
            for pid in left:
                _signal(pid, signal.SIGKILL)
            if not left or wait_until(lambda: not self.processes(), 5):
                break


def serves_default_socket() -> bool:
    """Whether some dockerd is (or will soon be) listening at the default socket."""
    for _, argv in _all_processes():
        if os.path.basename(argv[0]) == "dockerd":
            hosts = re.findall(r"(?:^|\0)(?:-H|--host)[=\0]?([^\0]*)", "\0".join(argv))
            if not hosts or any(host in DEFAULT_HOSTS for host in hosts):
                return True
    return False


def mounts_below(folder: Path) -> list[str]:
    """The mount points below a folder, parents first."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # proc(5): the fifth field is the mount point, with blanks and the like as octal escapes
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if point.startswith(f"{folder}/"):
            mounts.append(point)
    return sorted(mounts)


def _all_processes() -> Iterator[tuple[int, list[str]]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (argv := _argv(int(entry))):
            yield int(entry), argv


def _argv(pid: int) -> list[str]:
    """A process's arguments; empty if it is gone, or ended and not yet waited for."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(argument) for argument in raw.rstrip(b"\0").split(b"\0")] if raw else []


def _descendants(roots: set[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # proc(5): pid (comm) state ppid ...; comm may itself hold blanks and brackets
            state, parent = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found: set[int] = set()
    todo = list(roots)
    while todo:
        below = [child for child in children.get(todo.pop(), []) if child not in found]
        found.update(below)
        todo.extend(below)
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m dev.private_engine", description="The engine of this checkout.")
    parser.add_argument("action", choices=["start", "stop", "remove"])
    action = parser.parse_args().action
    engine = PrivateEngine(private_home(CHECKOUT), network=True)
    try:
        if action == "start":
            engine.start()
            if engine.no_network_because:
                print(f"engine     its containers have no way out: {engine.no_network_because}", flush=True)
        elif action == "stop":
            ran = engine.pid() is not None
            engine.stop()
            print(f"stopped {engine.socket}" if ran else "no private engine is running")
        else:
            engine.remove()
    except SetupError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
