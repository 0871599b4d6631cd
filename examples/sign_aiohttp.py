"""Python aiohttp (3.12 or later): `RunnerAuth` is a client middleware. Copy it, with client.py beside it.

    async with aiohttp.ClientSession(url, middlewares=[RunnerAuth(url, secret)]) as session:
        await session.get("/containers/json?all=1")

aiohttp calls it for each attempt: what it repeats or redirects is signed anew. WebSockets are signed, too. It signs
the target as aiohttp sends it; to have it sent as it stands, give aiohttp a yarl.URL(..., encoded=True).
"""

import asyncio
import os
import sys
from pathlib import Path

import aiohttp
from yarl import URL

from client import body_hash, sign


class RunnerAuth:
    def __init__(self, url: str, secret: str, key: str | None = None) -> None:
        self.origin, self.secret, self.key = URL(url).origin(), secret, key

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if request.url.origin() == self.origin:  # a redirect may lead elsewhere, and a signature names no host
            hashed = body_hash(await request.body.as_bytes() if request.body else b"")
            target = request.url.raw_path_qs  # as it is sent: quoted, the query with it
            request.headers.update(sign(self.secret, request.method, target, content_hash=hashed, key=self.key))
        return await handler(request)


async def main(method: str, target: str, file: str | None = None) -> None:
    url = os.environ["DOCKER_RUNNER_URL"].rstrip("/")
    auth = RunnerAuth(url, os.environ["DOCKER_RUNNER_SHARED_SECRET"], os.environ.get("DOCKER_RUNNER_KEY"))
    body = await asyncio.to_thread(Path(file).read_bytes) if file else None
    headers = {"Content-Type": "application/json" if file.endswith(".json") else "application/x-tar"} if file else {}
    async with (
        aiohttp.ClientSession(middlewares=[auth]) as session,
        session.request(method, url + target, data=body, headers=headers) as answer,
    ):
        sys.stdout.buffer.write(await answer.read())
    sys.exit(0 if answer.ok else f"\nHTTP {answer.status}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
