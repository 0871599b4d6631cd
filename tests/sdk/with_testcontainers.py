"""What programs do with testcontainers, as its documentation shows it. Run by tests/test_bridge_sdk_testcontainers.py.

`with_testcontainers.py IMAGE NAME LABELS`, with DOCKER_HOST at the engine or at the bridge; NAME is what names shall
begin with, LABELS a JSON object. Prints the results as one JSON object.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from testcontainers.core.container import DockerContainer
from testcontainers.core.image import DockerImage
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import ExecWaitStrategy, HttpWaitStrategy, LogMessageWaitStrategy

IMAGE, NAME, LABELS = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
LOOPBACK = {"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"}


def container(image: str = IMAGE, number: int = 1, **more: Any) -> DockerContainer:
    """A container of ours, without a network if none is given."""
    made = DockerContainer(image).with_name(f"{NAME}{number}")
    return made.with_kwargs(**{"labels": LABELS, "stop_signal": "SIGKILL", "network_mode": "none", **more})


def logs_and_exec() -> list[Any]:
    script = "echo starting; sleep .1; echo ready to serve; echo to stderr >&2; sleep 1d"
    waiting = container().with_command(["sh", "-c", script]).with_env("GREETING", "hello")
    with waiting.waiting_for(LogMessageWaitStrategy("ready to serve").with_poll_interval(0.05)) as running:
        done = running.exec(["sh", "-c", "echo $GREETING; exit 3"])
        out, _ = running.get_logs()
        info = running.get_container_info()
        return [done.exit_code, done.output.decode(), out.decode(), running.status, info is not None]


def waiting_for_a_command() -> list[Any]:
    waiting = container().with_command(["sh", "-c", "sleep .1; touch /ready; sleep 1d"])
    strategy = ExecWaitStrategy(["test", "-e", "/ready"]).with_poll_interval(0.05)
    with waiting.waiting_for(strategy) as running:
        return [running.exec("ls /ready").output.decode()]


def files() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        made = container().with_command(["sleep", "1d"]).with_copy_into_container(b"copied in\n", "/tmp/file")
        with made as running:
            running.copy_from_container("/tmp/file", Path(folder) / "file")
            seen = running.exec("cat /tmp/file").output.decode()
        return [seen, (Path(folder) / "file").read_text()]


def ports() -> list[Any]:
    """A web server's port, mapped to one of this machine: on a network of its own, so that the engine needs none."""
    with Network(docker_network_kw={"labels": LABELS, "options": LOOPBACK}) as network:
        script = "mkdir /www; echo served > /www/index.html; httpd -f -p 8080 -h /www"
        made = container(network_mode=None).with_network(network).with_network_aliases("web")
        made = made.with_command(["sh", "-c", script]).with_exposed_ports(8080)
        with made.waiting_for(HttpWaitStrategy(8080).with_poll_interval(0.05)) as running:
            address = f"http://{running.get_container_host_ip()}:{running.get_exposed_port(8080)}/"
            with urllib.request.urlopen(address, timeout=10) as answer:
                served = answer.read().decode()
            running.reload()
            address = running.get_wrapped_container().attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]
            client = container(number=2, network_mode=None).with_network(network)
            # Asked for only: another engine's firewall may keep containers of this one apart.
            with client.with_command(["nslookup", "web"]) as other:
                other.wait()
                return [served, address in other.get_logs()[0].decode()]


def image() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY Dockerfile /built\n")
        with DockerImage(path=folder, tag=f"{NAME}:v1", labels=LABELS) as built:
            log = "".join(line.get("stream", "") for line in built.get_logs())
            with container(str(built)).with_command(["ls", "/built"]) as running:
                running.wait()
                return ["Successfully tagged" in log, running.get_logs()[0].decode()]


print(json.dumps({topic.__name__: topic() for topic in (logs_and_exec, waiting_for_a_command, files, ports, image)}))
