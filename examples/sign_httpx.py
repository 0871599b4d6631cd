"""Python httpx: `RunnerAuth` signs what a `Client` or an `AsyncClient` sends. Copy it, with client.py beside it.

    with httpx.Client(base_url=url, auth=RunnerAuth(secret)) as client:
        client.get("/containers/json?all=1")

It is called once for each request; leave `follow_redirects` off (as it is by default), for a redirected request would
bear the same headers.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import httpx

from client import body_hash, sign


class RunnerAuth(httpx.Auth):
    requires_request_body = True  # httpx reads it before auth_flow, in its sync and in its async way

    def __init__(self, secret: str, key: str | None = None) -> None:
        self.secret, self.key = secret, key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        target = request.url.raw_path.decode("ascii")  # as it is sent: quoted, the query with it
        hashed = body_hash(request.content)
        request.headers.update(sign(self.secret, request.method, target, content_hash=hashed, key=self.key))
        yield request


def main(method: str, target: str, file: str | None = None) -> None:
    auth = RunnerAuth(os.environ["DOCKER_RUNNER_SHARED_SECRET"], os.environ.get("DOCKER_RUNNER_KEY"))
    body = Path(file).read_bytes() if file else None
    headers = {"Content-Type": "application/json" if file.endswith(".json") else "application/x-tar"} if file else {}
    url = os.environ["DOCKER_RUNNER_URL"].rstrip("/") + target
    answer = httpx.request(method, url, content=body, headers=headers, auth=auth, timeout=60)
    sys.stdout.buffer.write(answer.content)
    sys.exit(0 if answer.is_success else f"\nHTTP {answer.status_code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
