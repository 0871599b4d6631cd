#!/bin/sh
# Runs a container through the runner and shows what it printed: four signed requests of the plain Docker Engine API.
# Needs a running `make run`. `docker-runner curl` is curl, with a signature; it finds runner and secret in .env.
set -eu
cd "$(dirname "$0")/.."

name="hello-$$"

signed() {
    .venv/bin/docker-runner curl --silent --show-error --fail-with-body "$@"
}

# A terminal (Tty) makes the log plain text; without one the engine sends it in frames of stdout and stderr.
signed -X POST "/containers/create?name=$name" -H 'Content-Type: application/json' --data '{
    "Image": "docker-runner/busybox:latest",
    "Cmd": ["sh", "-c", "echo Hello from container $(hostname); uname -sm; ls /bin | wc -l"],
    "Tty": true,
    "HostConfig": {"NetworkMode": "none"}
}'
trap 'signed -X DELETE "/containers/$name?force=1"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

signed -X POST "/containers/$name/start"
signed "/containers/$name/logs?follow=1&stdout=1"
