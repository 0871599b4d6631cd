"""docker-runner: the one small process that holds the Docker socket.

The command line. What the commands do is in `serving.py` and `commands.py`; the service itself begins in `app.py`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from dotenv import load_dotenv

import commands
import logs
from client import __version__
from settings import SettingsError

_COMMANDS = {
    "serve": (
        "run the service",
        "Serve until SIGTERM. SIGHUP reads secrets, policy and certificates again; SIGTERM drains: running requests\n"
        "get DOCKER_RUNNER_GRACE_MS, streams are ended, then the exit status is 0.",
        "DOCKER_RUNNER_SHARED_SECRET_FILE=/run/secrets/runner docker-runner serve",
    ),
    "check": (
        "look at settings, socket and engine, and say what to do",
        "Looks at the settings, the secret, the engine's socket, its version and API version. Exit status 0 if all is\n"
        "well, 1 if not. With --health or --ready it asks the service that runs here instead.",
        "docker-runner check",
    ),
    "sign": (
        "print the headers that sign one request",
        "Prints the signature of one request: as arguments for curl, as JSON, or as a shell recipe with openssl that\n"
        "needs no Python. A signature is good once, for DOCKER_RUNNER_SIGNATURE_TTL_MS.",
        "curl $(docker-runner sign GET /version) http://127.0.0.1:7071/version",
    ),
    "curl": (
        "run curl against the runner, signed",
        "Runs curl with its usual arguments; the URL may be just a path. Adds the signature, and Content-Type:\n"
        "application/json to a -d body that names no type.",
        "docker-runner curl -s '/containers/json?all=1'",
    ),
    "openapi": (
        "print the API document",
        "Prints the OpenAPI 3.1 document of the runner face, as the service serves it at /v1/openapi.json.",
        "docker-runner openapi > docs/openapi.json",
    ),
    "bridge": (
        "a local plain socket for Docker tools, in front of a runner",
        "Serves the plain Engine API at a local address until SIGTERM, and forwards each request, signed, to a\n"
        "runner. The docker CLI, compose and the SDKs work through it as through the engine's own socket. SIGHUP\n"
        "reads DOCKER_RUNNER_SHARED_SECRET_FILE again.",
        "docker-runner bridge --url http://runner:7071 --listen unix:///run/user/1000/docker-runner.sock\n"
        "  DOCKER_HOST=unix:///run/user/1000/docker-runner.sock docker ps",
    ),
}
"""By name: in one line; in a few; an example."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    environ = os.environ
    if environ.get("DOCKER_RUNNER_ENV") != "production":
        load_dotenv(".env")
    try:
        if given[:1] == ["curl"] and given[1:] not in (["--help"], ["-h"]):
            return commands.curl(given[1:], environ)  # Its arguments are curl's own.
        options = _parser().parse_args(given)
        match options.command:
            case "serve":
                from serving import serve  # Late: it brings the whole service, which the others start without.

                return serve(environ)
            case "check":
                return commands.probe(options.probe, environ) if options.probe else commands.check(environ)
            case "openapi":
                return commands.openapi()
            case "bridge":
                files = {"ca": options.ca, "cert": options.cert, "key": options.key}
                return commands.bridge(options.url, options.listen, files, environ)
            case _:
                return commands.sign(
                    options.method, options.path, options.data, options.data_file, options.format, environ
                )
    except (SettingsError, commands.UsageError) as error:
        _complain(error, given, environ)
        return 2 if isinstance(error, commands.UsageError) else 1


def _complain(error: Exception, given: Sequence[str], environ: Mapping[str, str]) -> None:
    """One line on stderr; JSON where what runs on is told to log so."""
    if given[:1] in (["serve"], ["bridge"]) and environ.get("DOCKER_RUNNER_LOG_FORMAT") == "json":
        logs.set_up("fatal", "json")
        logging.getLogger("docker_runner").critical("%s", error)
    else:
        print(f"docker-runner: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="docker-runner",
        description=(
            "The one small process that holds the Docker socket: verifies signed HTTP requests and relays a curated "
            "subset of the Docker Engine API. Settings come from the environment and, in development, from .env."
        ),
        epilog="Start with: docker-runner check && docker-runner serve",
    )
    parser.add_argument("--version", action="version", version=f"docker-runner {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands_by_name = {
        name: subparsers.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, (summary, description, example) in _COMMANDS.items()
    }
    _add_arguments_of_check(commands_by_name["check"])
    _add_arguments_of_sign(commands_by_name["sign"])
    _add_arguments_of_bridge(commands_by_name["bridge"])
    return parser


def _add_arguments_of_check(check: argparse.ArgumentParser) -> None:
    running = check.add_mutually_exclusive_group()
    for option, path, meaning in (
        ("--health", "/v1/health", "whether the running service answers, as container health checks ask"),
        ("--ready", "/v1/ready", "whether the running service reaches its engine"),
    ):
        running.add_argument(option, dest="probe", action="store_const", const=path, help=meaning)


def _add_arguments_of_sign(sign: argparse.ArgumentParser) -> None:
    sign.add_argument("method", metavar="METHOD", help="GET, POST, ...")
    sign.add_argument(
        "path", metavar="PATH", help="path and query, exactly as they will be sent: /containers/json?all=1"
    )
    body = sign.add_mutually_exclusive_group()
    body.add_argument("--data", help="the body, as text")
    body.add_argument("--data-file", metavar="FILE", help="the body, from a file")
    sign.add_argument(
        "--format", choices=("curl", "json", "openssl"), default="curl", help="what to print (default: curl)"
    )


def _add_arguments_of_bridge(bridge: argparse.ArgumentParser) -> None:
    bridge.add_argument("--url", required=True, help="where the runner is: http://HOST:PORT or https://HOST:PORT")
    bridge.add_argument(
        "--listen", required=True, metavar="ADDRESS", help="unix:///PATH (made with mode 0600) or tcp://127.0.0.1:PORT"
    )
    bridge.add_argument("--ca", metavar="FILE", help="https: trust this authority, and no other")
    bridge.add_argument("--cert", metavar="FILE", help="https: a client certificate (PEM), with its chain")
    bridge.add_argument("--key", metavar="FILE", help="https: its key, if it is not in the same file")


if __name__ == "__main__":
    sys.exit(main())
