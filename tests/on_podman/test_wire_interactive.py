"""The wire protocol on Podman: see the file of this name above."""

import pytest
import test_wire_interactive as docker
from test_wire_interactive import *

from on_podman.differences import instead_of
from wire import Wire


@instead_of(docker.test_a_missing_or_stopped_container_is_told_in_the_engines_words, "words", "conflicts")
@pytest.mark.parametrize(
    ("name", "status", "code", "words"),
    [
        ("missing", 404, "no_such_container", "no such container"),
        ("", 500, "container_stopped_paused", "container state improper"),
        ("../../info", 404, "no_such_container", "No such container"),  # The runner's own: the engine is not asked.
    ],
    ids=["missing", "stopped", "escaping"],
)
def test_a_missing_or_stopped_container_is_told_in_the_engines_words_as_podman_does(
    wire: Wire, stopped_box: str, name: str, status: int, code: str, words: str
) -> None:
    with wire.interactive(containerId=name or stopped_box, command="true") as socket:
        ended = docker.Ended(socket, ready=False)
    error = ended.error()
    assert (error["status"], error["code"], error["retryable"]) == (status, code, False)
    assert words in error["error"]
    assert words in error["message"]
    assert ended.closed == (1011, "exec_failed")
