"""What `deploy/` holds for monitoring: read by promtool and compose, and run by a real Prometheus at a real runner.

Grafana cannot be had here: its dashboard is held against what the runner exports, and Prometheus answers its queries.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from conftest import EngineDirect, Names, free_port, tied
from dev import find_program, packages, wait_until
from dev.engine import Engine
from documents import example, run_in
from exposition import FAMILIES, OF_THE_PROCESS
from imaged import Docker, image, secret_file
from packed import Program, environment, run
from scraped import PORT, Scrape, metrics_port, scrape
from service import ROOT, Runner

DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"
GRAFANA = MONITORING / "grafana"
TESTED = ROOT / "tests/data/alerts.yml"
PAGE = "docs/operations.md"

RULES: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
(DASHBOARD,) = (json.loads(path.read_text()) for path in (GRAFANA / "dashboards").iterdir())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}
"""What Grafana puts in their place, about."""
WRITTEN = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
WRITTEN += [each["expr"] for each in DASHBOARD["annotations"]["list"]]
EXPORTED = {
    *(family.exported for family in FAMILIES if family.kind != "histogram"),
    *(f"{f.name}_{part}" for f in FAMILIES if f.kind == "histogram" for part in ("bucket", "sum", "count")),
    *(name for name, _, _ in OF_THE_PROCESS),
}
OF_PROMETHEUS = {"up"}


def query(written: str) -> str:
    """A query of the dashboard, as Prometheus gets it."""
    for name, value in VARIABLES.items():
        written = written.replace(name, value)
    assert "$" not in written, written
    return written


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for: all words but functions, keywords, labels and strings."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", bare)
    return {word for word in re.findall(r"[a-z_]\w*(?!\w)(?!\s*\()", bare) if not word.isdigit()}


def program(name: str) -> str:
    """A program of the package `prometheus`, installed or unpacked."""
    found = find_program(name) or str(packages.UNPACKED / "prometheus/usr/bin" / name)
    assert os.access(found, os.X_OK), f"{name} is missing: python3 -m dev.prepare test"
    return found


def promtool(*arguments: str | Path) -> tuple[int, str]:
    return run([program("promtool"), *map(str, arguments)], {})


class TestPrometheus:
    def test_promtool_takes_the_configuration(self) -> None:
        status, said = promtool("check", "config", MONITORING / "prometheus.yml")
        assert status == 0, said
        assert f"{len(RULES)} rules found" in said

    def test_promtool_would_notice_a_wrong_one(self, tmp_path: Path) -> None:
        (tmp_path / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text().replace("rate(", "rating(", 1))
        assert promtool("check", "rules", tmp_path / "alerts.yml")[0] != 0

    def test_each_alert_fires_when_it_should_and_not_before(self) -> None:
        status, said = promtool("test", "rules", TESTED)
        assert status == 0, said

    def test_each_alert_is_tested_both_ways(self) -> None:
        cases = [case for test in yaml.safe_load(TESTED.read_text())["tests"] for case in test["alert_rule_test"]]
        names = {rule["alert"] for rule in RULES}
        assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
        assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names

    def test_alerts_are_about_what_is_exported(self) -> None:
        for rule in RULES:
            assert names_in(rule["expr"]) <= EXPORTED | OF_PROMETHEUS, rule["alert"]
            assert rule["labels"]["severity"] in ("warning", "critical")


def lost(written: Any, understood: Any, where: str = "") -> Iterator[str]:
    """Where `understood` does not say what was written. It may say more: the defaults."""
    if isinstance(written, dict) and isinstance(understood, dict):
        for name, value in written.items():
            yield from lost(value, understood.get(name), f"{where}/{name}")
    elif isinstance(written, list) and isinstance(understood, list) and len(written) == len(understood):
        for number, (one, other) in enumerate(zip(written, understood, strict=True)):
            yield from lost(one, other, f"{where}/{number}")
    elif written != understood:
        yield where


class TestDashboard:
    def test_grafanas_own_schema_knows_all_of_it(self) -> None:
        plugins.register_default_plugins()  # The kinds of panels and queries.
        understood = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
        assert list(lost(DASHBOARD, understood)) == []

    def test_every_query_parses(self, tmp_path: Path) -> None:
        rules = [{"record": f"q:{number}", "expr": query(each)} for number, each in enumerate(WRITTEN)]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        status, said = promtool("check", "rules", tmp_path / "rules.yml")
        assert status == 0, said

    def test_it_asks_for_what_is_exported(self) -> None:
        for each in WRITTEN:
            assert names_in(query(each)) <= EXPORTED, each

    def test_it_shows_every_family(self) -> None:
        asked = set().union(*(names_in(query(each)) for each in WRITTEN))
        shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
        families = {family.exported for family in FAMILIES} | {name for name, _, _ in OF_THE_PROCESS}
        assert families <= shown, families - shown

    def test_its_panels_have_ids_of_their_own_and_do_not_overlap(self) -> None:
        assert len({panel["id"] for panel in PANELS}) == len(PANELS)
        taken: set[tuple[int, int]] = set()
        for panel in PANELS:
            at = panel["gridPos"]
            assert at["x"] + at["w"] <= 24
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells

    def test_it_uses_the_provisioned_source(self) -> None:
        (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
        uids = set(
            re.findall(r'"uid": "(\w+)"', json.dumps([PANELS, DASHBOARD["templating"], DASHBOARD["annotations"]]))
        )
        assert uids == {source["uid"]}


def compose(settings: dict[str, str], *command: str) -> str:
    """A command of compose on the file and its overlay; what it said on stdout."""
    files = [f"--file={DEPLOY}/compose.yaml", f"--file={DEPLOY}/compose.monitoring.yaml"]
    done = subprocess.run(
        [find_program("docker-compose") or "docker-compose", *files, *command],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    """The two compose files as one, as compose reads them."""
    whole: dict[str, Any] = yaml.safe_load(compose({"DOCKER_GID": "999"}, "config"))
    return whole


class TestCompose:
    def test_the_runner_is_as_without_the_overlay_but_for_metrics(self, stack: dict[str, Any]) -> None:
        alone = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["docker-runner"]
        runner = stack["services"]["docker-runner"]
        for name in ("read_only", "cap_drop", "security_opt", "pids_limit", "tmpfs"):
            assert runner[name] == alone[name]
        assert set(runner["environment"]) - set(alone["environment"]) == {
            "DOCKER_RUNNER_METRICS_HOST",
            "DOCKER_RUNNER_METRICS_PORT",
        }
        assert "ports" not in runner

    def test_metrics_are_where_prometheus_looks_and_no_caller_is(self, stack: dict[str, Any]) -> None:
        runner, prometheus = stack["services"]["docker-runner"], stack["services"]["prometheus"]
        (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
        host, port = (runner["environment"][f"DOCKER_RUNNER_METRICS_{name}"] for name in ("HOST", "PORT"))
        assert job["static_configs"] == [{"targets": [f"{host}:{port}"]}]
        assert runner["networks"] == {"runner": {}, "metrics": {"aliases": [host]}}
        assert set(prometheus["networks"]) == {"metrics"}
        assert stack["networks"]["metrics"]["internal"] is True

    def test_what_is_mounted_is_there_and_what_is_named_is_mounted(self, stack: dict[str, Any]) -> None:
        mounted = {}
        for name in ("prometheus", "grafana"):
            for volume in stack["services"][name]["volumes"]:
                source, target, *mode = volume.split(":")
                if source.startswith("/"):
                    assert Path(source).exists(), source
                    assert mode == ["ro"]
                mounted[target] = Path(source)
        (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/docker-runner.yaml").read_text())["providers"]
        assert list(mounted[provider["options"]["path"]].glob("*.json"))
        command = stack["services"]["prometheus"]["command"]
        named = {argument.partition("=")[2] for argument in command if "file" in argument or "path" in argument}
        assert named <= set(mounted)
        (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
        assert source["url"] == "http://prometheus:9090"

    def test_only_grafana_has_a_port_on_loopback_and_a_password_of_a_file(self, stack: dict[str, Any]) -> None:
        ports = {name: service["ports"] for name, service in stack["services"].items() if "ports" in service}
        assert list(ports) == ["grafana"]
        assert all(str(port).startswith("127.0.0.1:") for port in ports["grafana"])
        grafana = stack["services"]["grafana"]
        secret = grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
        assert secret in [f"/run/secrets/{each['source']}" for each in grafana["secrets"]]
        assert not any("PASSWORD" in name and "FILE" not in name for name in grafana["environment"])

    def test_the_runner_gives_its_metrics_on_that_network_only(
        self, engine: Engine, direct: EngineDirect, names: Names, tmp_path: Path
    ) -> None:
        docker, project, network = Docker(engine.socket), names("monitored"), names("net")
        settings = {
            "DOCKER_HOST": f"unix://{engine.socket}",
            "DOCKER_SOCKET": engine.socket,
            "DOCKER_GID": str(os.stat(engine.socket).st_gid),
            "DOCKER_RUNNER_IMAGE": image(docker, direct, names),
            "DOCKER_RUNNER_NETWORK": network,
            "DOCKER_RUNNER_SECRET": str(secret_file(tmp_path)),
        }
        try:
            compose(settings, f"--project-name={project}", "up", "--detach", "docker-runner")
            container = docker("ps", "--quiet", f"--filter=label=com.docker.compose.project={project}")
            joined = direct.request("GET", f"/containers/{container}/json").json()["NetworkSettings"]["Networks"]
            addresses = {name: joined[name]["IPAddress"] for name in (network, f"{project}_metrics")}
            assert wait_until(lambda: reached(addresses[f"{project}_metrics"], 7072), 30), docker("logs", container)
            text = requests.get(f"http://{addresses[f'{project}_metrics']}:7072/metrics", timeout=10).text
            assert Scrape(text).value("docker_runner_engine_up") == 1
            assert reached(addresses[network], 7071)
            assert not reached(addresses[network], 7072)
        finally:
            compose(settings, f"--project-name={project}", "down", "--volumes")

    def test_images_have_versions(self, stack: dict[str, Any]) -> None:
        for name in ("prometheus", "grafana"):
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", stack["services"][name]["image"])


def reached(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


class Prometheus:
    """A running Prometheus; `ask` is its API."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> list[str]:
        return [each["value"][1] for each in self.ask("query", query=expression)["result"]]


@pytest.fixture(scope="module")
def watched(engine: Engine) -> Iterator[Runner]:
    """A runner that Prometheus looks at."""
    with Runner(engine.socket, PORT) as runner:
        yield runner


@pytest.fixture(scope="module")
def prometheus(watched: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with our files, every second, at that runner."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = (MONITORING / "prometheus.yml").read_text()
    for old, new in (
        ("docker-runner-metrics:7072", f"127.0.0.1:{metrics_port(watched)}"),
        ("_interval: 15s", "_interval: 1s"),
        ("scrape_timeout: 10s", "scrape_timeout: 1s"),
    ):
        assert old in config
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    (folder / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text())
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(tied(command), env=environment({}), stdout=log, stderr=log, cwd=folder)
    try:
        running = Prometheus(port, process)
        assert wait_until(lambda: process.poll() is not None or running.ready(), 30), (folder / "log").read_text()
        assert process.poll() is None, (folder / "log").read_text()
        yield running
    finally:
        process.terminate()
        process.wait(30)


class TestForReal:
    def test_prometheus_scrapes_the_runner(self, prometheus: Prometheus, watched: Runner) -> None:
        assert wait_until(lambda: prometheus.value('up{job="docker-runner"}') == ["1"], 20), prometheus.ask("targets")
        assert watched.request("GET", "/version").status == 200
        counted = (
            'docker_runner_requests_total{face="engine", operation="SystemVersion", outcome="relayed", status="200"}'
        )
        assert wait_until(lambda: prometheus.value(counted) == ["1"], 20)
        assert prometheus.value("docker_runner_engine_up") == ["1"]

    def test_it_finds_nothing_odd_in_the_text(self, prometheus: Prometheus, watched: Runner) -> None:
        text = scrape(watched).text
        done = subprocess.run(
            [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")

    def test_every_query_of_the_dashboard_has_an_answer(self, prometheus: Prometheus, watched: Runner) -> None:
        unanswered = {query(each) for each in WRITTEN}
        unanswered.discard(query(DASHBOARD["annotations"]["list"][0]["expr"]))  # There was no second start.

        def ask() -> bool:
            watched.request("GET", "/containers/json")
            watched.request("GET", "/nothing")
            for each in list(unanswered):
                if prometheus.value(each):
                    unanswered.discard(each)
            return not unanswered

        assert wait_until(ask, 30), unanswered

    def test_its_alerts_are_loaded_and_quiet(self, prometheus: Prometheus) -> None:
        def evaluated() -> bool:
            return all(rule["health"] == "ok" for rule in rules())

        def rules() -> list[dict[str, Any]]:
            (group,) = prometheus.ask("rules")["groups"]
            found: list[dict[str, Any]] = group["rules"]
            return found

        assert wait_until(evaluated, 20), rules()
        assert [rule["name"] for rule in rules()] == [rule["alert"] for rule in RULES]
        assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []


class TestDocs:
    @example(PAGE, "DOCKER_RUNNER_METRICS_PORT=7072 docker-runner serve")
    def test_the_example_works_as_it_stands(self, script: str, engine: Engine) -> None:
        port = str(free_port())
        serve, ask = script.replace("7072", port).splitlines()
        settings = {"DOCKER_SOCKET": engine.socket, "DOCKER_RUNNER_HOST": "127.0.0.1", "DOCKER_RUNNER_PORT": "0"}
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", "-c", serve.replace("docker-runner", "exec docker-runner")]
        with Program(command, "metrics are at", {**settings, **path}):
            assert "docker_runner_engine_up 1.0" in run(["bash", "-c", ask], path)[1]

    @example(PAGE, "compose.monitoring.yaml up")
    def test_the_stack_is_one_that_compose_takes(self, script: str, engine: Engine, tmp_path: Path) -> None:
        """Not started: its images cannot be had here."""
        for old, new in (
            ("-o 472", f"-o {os.geteuid()}"),
            ("/var/run/docker.sock", engine.socket),
            ("up --detach", "config --quiet"),
        ):
            assert old in script
            script = script.replace(old, new)
        (tmp_path / "deploy").symlink_to(shutil.copytree(DEPLOY, tmp_path / "copy"))
        assert run_in(tmp_path, script, environment({})).returncode == 0
        assert (tmp_path / "deploy/grafana-password").stat().st_mode & 0o777 == 0o400
