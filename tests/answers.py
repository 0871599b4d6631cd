"""What an error of the runner says, its shape checked."""

import json
from typing import NamedTuple

from service import Answer
from wire import Reply


class Told(NamedTuple):
    """The part of an error that clients act on."""

    status: int
    code: str
    retryable: bool


def told(reply: Reply) -> Told:
    """The error of an answer (WIRE.md, section 3): its message stands twice, and nothing else stands beside it."""
    body = reply.json
    error = body["error"]
    assert set(body) == {"message", "error"}
    assert set(error) - {"details"} == {"code", "message", "retryable"}
    assert body["message"] == error["message"] != ""
    assert reply.header("retry-after") == ("1" if reply.status in (429, 503) else None)
    return Told(reply.status, error["code"], error["retryable"])


def refused(answer: Answer) -> Told:
    """As `told`, of an answer that the runner's own client of the tests has read, on either face."""
    error = json.loads(answer.body)["error"]
    assert answer.header("retry-after") == ("1" if answer.status in (429, 503) else None)
    return Told(answer.status, error["code"], error["retryable"])
