"""The wire protocol on Podman: see the file of this name above."""

import test_wire_contract as docker
from test_wire_contract import *

from conftest import free_port
from on_podman.differences import instead_of
from wire import Wire, compact, refused


@instead_of(docker.test_a_retryable_error_releases_the_nonce, "pull-errors")
def test_a_retryable_error_releases_the_nonce_as_podman_does(wire: Wire) -> None:
    body = compact({"image": f"127.0.0.1:{free_port()}/nothing"})
    headers = wire.sign("POST", "/v1/images/ensure", body)
    for _ in range(2):
        reply = wire.request("POST", "/v1/images/ensure", body, headers)
        refused(reply, 502, "image_ensure_failed", retryable=True)
