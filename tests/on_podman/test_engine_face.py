"""The engine face on Podman: see the file of this name above."""

import json

import pytest
import test_engine_face as docker
from test_engine_face import *

from comparison import JSON, Both, Seen, compares
from on_podman.differences import instead_of


@instead_of(docker.TestSystem.test_ping, "headers")
@compares("SystemPing")
def test_ping(both: Both) -> None:
    for target in ("/_ping", "/v1.41/_ping", "/v1.24/_ping?a=b"):
        seen = both.same("GET", target)
        assert seen.body == b"OK"
        assert {"api-version", "docker-experimental", "libpod-api-version", "server"} <= dict(seen.headers).keys()
        assert seen.header("ostype") is None


@instead_of(docker.TestSystem.test_info, "info")
@compares("SystemInfo")
def test_info(both: Both) -> None:
    def steady(seen: Seen) -> object:
        return docker.steady_info(seen._replace(body=seen.body.replace(seen.json["ID"].encode(), b"ID")))

    assert both.same("GET", "/info", view=steady).json["ID"] != both.same("GET", "/v1.41/info", view=steady).json["ID"]


@instead_of(docker.TestSystem.test_data_usage, "slashes")
@compares("SystemDataUsage")
def test_data_usage(both: Both, named: str) -> None:
    seen = both.same("GET", "/v1.41/system/df", view=docker.steady_usage)
    assert named in [name for found in seen.json["Containers"] for name in found["Names"]]


@instead_of(docker.TestSystem.test_a_version_that_is_too_new_or_too_old_relays_400, "versions")
def test_no_version_is_too_new_or_too_old(both: Both) -> None:
    for version in ("v1.999", "v1.0"):
        seen = both.same("GET", f"/{version}/containers/json")
        assert (seen.status, seen.header("api-version")) == (200, "1.41")


@instead_of(docker.TestNetworks.test_what_the_engine_refuses_relays_its_error, "networks")
@compares("NetworkCreate", "NetworkInspect", "NetworkConnect", "NetworkDisconnect", "NetworkDelete")
def test_what_the_engine_refuses_relays_its_error(both: Both) -> None:
    assert both.same("POST", "/networks/create", b"{", JSON).status == 500
    assert both.same("POST", "/networks/create", b'{"Name":"bridge","CheckDuplicate":true}', JSON).status == 500
    assert both.same("GET", "/networks/no-such-network").status == 404
    for name in ("no-such-network", "host"):
        assert both.same("DELETE", f"/networks/{name}").status == 404
        for rest in ("connect", "disconnect"):
            assert both.same("POST", f"/networks/{name}/{rest}", b'{"Container":"no-such"}', JSON).status == 404
            assert both.same("POST", f"/networks/{name}/{rest}", b"{", JSON).status == 500


@instead_of(docker.TestNetworks.test_list, "networks")
@compares("NetworkList")
def test_networks(both: Both) -> None:
    seen = both.same("GET", "/v1.41/networks?filters=%7B%22name%22%3A%5B%22none%22%5D%7D")
    assert (seen.status, seen.json) == (200, [])
    assert both.same("GET", "/networks?filters=nonsense").status == 500


@pytest.mark.parametrize("target", ["/v4.0.0/libpod/info", "/v4.0.0/libpod/containers/json", "/v4.0.0/libpod/_ping"])
def test_what_only_podman_has_is_not_reached(both: Both, target: str) -> None:
    assert both.engine("GET", target).status == 200
    answer = both.runner.request("GET", target)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "not_found")
