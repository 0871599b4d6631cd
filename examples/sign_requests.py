"""Python requests: `RunnerAuth` signs what a request sends. Copy it, with client.py beside it.

    session = requests.Session()
    session.auth = RunnerAuth(secret)
    session.get(f"{url}/containers/json?all=1", allow_redirects=False)

It is called once for each request; requests would follow a redirect, and an adapter's `max_retries` would retry, with
the same headers.
"""

import os
import sys
from pathlib import Path

import requests
from requests.auth import AuthBase

from client import body_hash, sign


class RunnerAuth(AuthBase):
    def __init__(self, secret: str, key: str | None = None) -> None:
        self.secret, self.key = secret, key

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        body = r.body or b""
        hashed = body_hash(body.encode() if isinstance(body, str) else body)
        # path_url, not the URL that was asked for: requests has quoted it by now.
        r.headers.update(sign(self.secret, r.method or "", r.path_url, content_hash=hashed, key=self.key))
        return r


def main(method: str, target: str, file: str | None = None) -> None:
    auth = RunnerAuth(os.environ["DOCKER_RUNNER_SHARED_SECRET"], os.environ.get("DOCKER_RUNNER_KEY"))
    body = Path(file).read_bytes() if file else None
    headers = {"Content-Type": "application/json" if file.endswith(".json") else "application/x-tar"} if file else {}
    url = os.environ["DOCKER_RUNNER_URL"].rstrip("/") + target
    answer = requests.request(method, url, data=body, headers=headers, auth=auth, allow_redirects=False, timeout=60)
    sys.stdout.buffer.write(answer.content)
    sys.exit(0 if answer.ok else f"\nHTTP {answer.status_code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
