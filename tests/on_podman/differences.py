"""What Podman answers otherwise than Docker Engine: the rows of the table in docs/engines.md, and the tests of each.

A test that stands in the place of one of Docker Engine's, by `instead_of`, asserts what Podman does; when Podman comes
to do as Docker Engine does, it fails. All other tests run on both as they are.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

_Test = TypeVar("_Test", bound=Callable[..., None])


class Difference(NamedTuple):
    """What is asked, and what each engine answers, in Markdown."""

    what: str
    docker: str
    podman: str


DIFFERENCES = {
    # Everywhere.
    "versions": Difference(
        "A version in the path that the engine does not know",
        "400",
        "Served, as version 1.41 (`/v1.999/…`, `/v1.0/…`)",
    ),
    "headers": Difference(
        "Headers of its answers",
        "`Ostype`",
        "No `Ostype`; `Libpod-Api-Version`, and each time another `X-Reference-Id`",
    ),
    "conflicts": Difference(
        "What is in conflict: a name in use, remove, kill, exec or attach in a state that forbids it",
        "409",
        "500, with the reason in `cause`. On the runner face: 500 too, and the code is that of the conflict",
    ),
    "malformed": Difference(
        "A malformed name; a program to start that is not there",
        "400",
        "500, with the reason in `cause`. On the runner face: 500 too, and the code is `bad_parameter`",
    ),
    "words": Difference(
        "The words of an error",
        "`No such container`, `is not running`",
        "`no such container`, `container state improper`",
    ),
    "absent": Difference("`ContainerUpdate`, `BuildPrune`, `DistributionInspect`", "There", "404, in plain text"),
    # System.
    "info": Difference("`ID` of `SystemInfo`", "The engine's", "Another each time"),
    "slashes": Difference("Names of containers in `SystemDataUsage`, `ContainerStats`", "`/name`", "`name`"),
    "auth": Difference(
        "`SystemAuth` with a registry that speaks plain HTTP on loopback",
        "`Login Succeeded`",
        "500: it insists on HTTPS",
    ),
    "event-filters": Difference(
        "Events of volumes", "With an id; filtered by `volume`", "Without one, with a name; that filter finds none"
    ),
    "event-bounds": Difference(
        "Events `since` what is no time; `until` a time that has passed",
        "400; the events up to it",
        "200 and nothing; any number of them. The runner face asks in a way that gives all, and begins anew where the"
        " engine's stream ends",
    ),
    # Networks.
    "networks": Difference(
        "The network `none`; making one named `bridge`, removing `host`",
        "Listed, and what a container without one is in; 403 or 409",
        "Not listed, and such a container is in none; 500 and 404",
    ),
    # Containers.
    "environment": Difference("`Env` of a container", "As given, with `PATH`", "`TERM`, `container`, `HOME` … beside"),
    "changes": Difference("`ContainerChanges` of a missing container", "404", "500"),
    "top": Difference(
        "`ContainerTop` where nothing runs, or with arguments that `ps` refuses", "409, 500", "200 with an empty body"
    ),
    "stop": Difference("`ContainerStop` of a container never started", "304", "204"),
    "stopping": Difference(
        "`State.Running` between the signal to stop and the end", "`true`", "`false`, and `Status` is `stopping`"
    ),
    "upload": Difference(
        "An upload without a `path`; to a missing folder; into a read-only container",
        "400, 404, 403: refused",
        "200: it goes to `/`; the folder is made; it is written",
    ),
    "compression": Difference("A download with `Accept-Encoding: gzip`", "Compressed", "Not"),
    # Logs, attach, exec.
    "logs-head": Difference(
        "A followed log of a container that is silent",
        "The head at once",
        "Nothing before the first line. On the runner face, the head within 0.3 s",
    ),
    "logs-of-terminals": Difference(
        "A terminal's log with `timestamps` and `tail`",
        "The last lines",
        "They run into each other",
    ),
    "attach-logs": Difference(
        "`attach` with `logs` and without `stream`",
        "The log, and its end",
        "It does not end; the sizes in its frames leave out the newlines",
    ),
    "attach-stdin": Difference(
        "The end of an attach with `stdin` to a container with `OpenStdin`", "Its input stays open", "Its input ends"
    ),
    "exec": Difference("A second start of an exec", "409, `already running`", "500, `exec session state improper`"),
    "exec-state": Difference("`ExitCode` of an exec before its end", "`null`", "`0`"),
    "exec-missing": Difference(
        "An exec of a program that is not there", "One message in the stream", "One, and at times a second with it"
    ),
    # Images.
    "import": Difference("`tag` of an import", "The image's", "Ignored: `latest`. `ImageCreate` of nothing is 405"),
    "full-names": Difference(
        "Names of images without a registry", "As given", "Kept and told with one: `localhost/name` if made there"
    ),
    "tag": Difference("Body of the 201 of `ImageTag`", "Empty", "A newline"),
    "commit": Difference("`Labels` in the body of `ImageCommit`", "The image's", "Ignored"),
    "pull-errors": Difference(
        "A pull of what is missing, or from a registry that is down",
        "404, 500",
        "200, and the error in the progress. On the runner face: 502 `image_ensure_failed`, retryable",
    ),
    "progress": Difference("The words of pulls, pushes and builds", "Docker's", "Podman's own, in the same form"),
    "push": Difference("A push without `X-Registry-Auth`", "400", "200, and it is tried"),
    "temporary": Difference(
        "The error of an archive or a build context that cannot be read",
        "In general words",
        "Names a temporary file, each time another",
    ),
}

REPLACED: set[Callable[..., None]] = set()
"""Tests that Podman fails; others stand in their place."""
SHOWN: set[str] = set()
"""The keys of `DIFFERENCES` that have a test."""


def instead_of(test: Callable[..., None], *keys: str) -> Callable[[_Test], _Test]:
    """Declares a test that stands in the place of another, and the differences that it shows."""
    assert set(keys) <= set(DIFFERENCES)

    def declare(own: _Test) -> _Test:
        REPLACED.add(test)
        SHOWN.update(keys)
        return own

    return declare


def shows(*keys: str) -> Callable[[_Test], _Test]:
    """Declares the differences that a test shows, which stands in the place of none."""
    assert set(keys) <= set(DIFFERENCES)
    SHOWN.update(keys)
    return lambda own: own
