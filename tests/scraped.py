"""Metrics read as Prometheus reads them: by HTTP, with the library's own parser."""

import http.client
import re
from collections.abc import Callable

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dev import wait_until
from service import Answer, Runner

PORT = {"DOCKER_RUNNER_METRICS_PORT": "0"}
"""The setting of a runner with metrics."""
PATIENCE_S = 15


class Scrape:
    """One text: `families` by name, as the library names them (a counter's has no `_total`)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}

    def samples(self, name: str, **labels: str) -> list[float]:
        """Values of the samples of this name that bear these labels (and perhaps others)."""
        return [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float:
        """Their sum: 0 if there is none."""
        return sum(self.samples(name, **labels))


def metrics_port(runner: Runner) -> int:
    """Where a runner says that its metrics are."""
    runner.wait_for_log("metrics are at")
    found = re.search(r"metrics are at http://127\.0\.0\.1:(\d+)/metrics", "".join(runner.log))
    assert found is not None
    return int(found[1])


def ask(runner: Runner, method: str = "GET", target: str = "/metrics") -> Answer:
    """One request to the listener of the metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", metrics_port(runner), timeout=PATIENCE_S)
    try:
        connection.request(method, target)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def scrape(runner: Runner) -> Scrape:
    """The metrics, up to a second old."""
    answer = ask(runner)
    assert answer.status == 200
    return Scrape(answer.body.decode())


def scraped(runner: Runner, seen: Callable[[Scrape], bool]) -> Scrape:
    """The metrics, as soon as they show what is looked for."""
    last = scrape(runner)

    def look() -> bool:
        nonlocal last
        last = scrape(runner)
        return seen(last)

    assert seen(last) or wait_until(look, PATIENCE_S), last.text
    return last
