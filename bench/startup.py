"""Start-up and idle memory: the checkout, the one file unpacking itself, and the one file unpacked before.

    .venv/bin/python -m bench.startup [--rounds 10] [--socket /var/run/docker.sock]

Start-up is from the process's start to the first answer of `/v1/health`, and the processor time that it took; memory
is what is resident then, and of that what is the process's alone. Rounds are interleaved, so that whatever else the
machine does hits all alike. `check --health` is what a container's health check runs.
"""

import argparse
import http.client
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.peers import ROOT, SECRET, free_port
from dev import dist, wait_until

PYTHON = str(Path(sys.executable).resolve())


def asked(port: int) -> bool:
    """Whether the service answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def memory(pid: int) -> tuple[float, float]:
    """Resident memory, and of that what is the process's alone, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) / 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def processor(pid: int) -> float:
    """Milliseconds that a process has computed for."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * 1000 / os.sysconf("SC_CLK_TCK")


def measure(command: list[str], environ: dict[str, str]) -> tuple[float, float, float, float, float]:
    """Milliseconds to the first answer, of these computing; MiB resident, private; milliseconds of a health check."""
    port = free_port()
    settings = {**os.environ, **environ, "DOCKER_RUNNER_PORT": str(port)}
    started = time.perf_counter()
    process = subprocess.Popen([*command, "serve"], env=settings, stderr=subprocess.DEVNULL)
    try:
        if not wait_until(lambda: asked(port), 30):
            raise RuntimeError(f"{command} does not answer")
        ready = time.perf_counter() - started
        computed = processor(process.pid)
        resident, private = memory(process.pid)
        started = time.perf_counter()
        subprocess.run([*command, "check", "--health"], env=settings, check=True, stdout=subprocess.DEVNULL)
        checked = time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()
    return ready * 1000, computed, resident, private, checked * 1000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--socket", default="/var/run/docker.sock", help="the engine's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = str(dist.build(folder))
        usual = {"DOCKER_RUNNER_SHARED_SECRET": SECRET, "DOCKER_RUNNER_ENV": "production"}
        usual |= {"DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_SOCKET": options.socket}
        peers = {
            "checkout": ([sys.executable, str(ROOT / "runner.py")], usual),
            "one file, first start": ([PYTHON, "-I", file], {**usual, "SHIV_ROOT": f"{folder}/first"}),
            "one file": ([PYTHON, "-I", file], {**usual, "SHIV_ROOT": f"{folder}/kept"}),
        }
        figures: dict[str, list[tuple[float, float, float, float, float]]] = {peer: [] for peer in peers}
        measure(*peers["one file"])  # unpacks
        for _ in range(options.rounds):
            shutil.rmtree(folder / "first", ignore_errors=True)
            for peer, (command, environ) in peers.items():
                figures[peer].append(measure(command, environ))
        size = os.path.getsize(file) / 1e6
    print(f"one file: {size:.1f} MB; medians of {options.rounds} (start-up also: least)")
    print(f"{'':24}{'first answer':>20}{'computing':>12}{'resident':>12}{'private':>12}{'health check':>16}")
    for peer, rows in figures.items():
        ready, computed, resident, private, checked = (statistics.median(column) for column in zip(*rows, strict=True))
        least = min(row[0] for row in rows)
        first = f"{ready:.0f} ms ({least:.0f})"
        print(f"{peer:24}{first:>20}{computed:>9.0f} ms{resident:>8.1f} MiB{private:>8.1f} MiB{checked:>13.0f} ms")


if __name__ == "__main__":
    main()
