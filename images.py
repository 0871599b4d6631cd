"""Images of the runner face: present, or pulled; an error within the pull's stream is an error here."""

import base64
import contextlib
import re
from collections.abc import AsyncGenerator, Mapping
from urllib.parse import quote

import msgspec

from calls import MAX_ANSWER, Calls, Thing, decoded
from errors import RunnerError
from flights import Refused, Wanted

ARCHITECTURES = ("amd64", "arm64")
"""Of these the name in a platform is the name in an image; others have several."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def split_reference(image: str) -> tuple[str, str]:
    """A reference as repository and tag (or digest); `latest` where it names neither.

    Raises:
        RunnerError: `bad_parameter`: it would be another path, or mean more than one image.
    """
    repository, at, digest = image.partition("@")
    head, colon, tag = repository.rpartition(":")
    if not colon or "/" in tag:
        head, tag = repository, "latest"
    version = digest if at else tag  # A tag beside a digest says nothing more, and the engine refuses both together.
    escapes = any(part in ("", ".", "..") for part in image.split("/")) or _CONTROL.search(image)
    # Without a tag behind its colon, the engine would pull every tag that there is.
    if escapes or not version or ":" in head.rpartition("/")[2]:
        raise RunnerError("bad_parameter", f"invalid reference format: {image}", status=400)
    return head, version


def _inspect_path(image: str) -> str:
    repository, tag = split_reference(image)
    name = f"{repository}{'@' if '@' in image else ':'}{tag}"
    return f"/images/{quote(name, safe='/:@')}/json"


async def is_present(calls: Calls, image: str) -> bool:
    """Whether the engine has the image."""
    with await calls.open("GET", _inspect_path(image), thing=Thing.IMAGE, accept=(404,), own=True) as response:
        await response.read(MAX_ANSWER)
        return response.status == 200


class _Inspected(msgspec.Struct, rename="pascal"):
    os: str
    architecture: str


async def _check_platform(calls: Calls, image: str, platform: str) -> None:
    """The engine pulls an image of one platform whatever platform was asked for, and says nothing."""
    wanted = platform.split("/")[:2]
    if wanted[-1] in ARCHITECTURES:
        found = decoded(await calls.call("GET", _inspect_path(image), thing=Thing.IMAGE, own=True), _Inspected)
        if wanted != [found.os, found.architecture]:
            message = f"image {image} is for {found.os}/{found.architecture}, not for the wanted platform {platform}"
            raise RunnerError("no_such_image", message, status=404)


async def ensuring(
    calls: Calls, image: str, platform: str | None, auth: Mapping[str, str] | None = None
) -> AsyncGenerator[bytes, None]:
    """Have the image on the engine: nothing is pulled if it is there, unless a platform is asked for.

    Yields the engine's progress, a JSON document each; callers that want the same share a pull (`flights.py`).

    Raises:
        RunnerError: the engine or the registry refused or failed, before or within the progress; or what it pulled is
            for another platform.
    """
    repository, version = split_reference(image)
    encoded = None if auth is None else base64.urlsafe_b64encode(msgspec.json.encode(auth, order="sorted"))
    wanted = Wanted(None if platform else _inspect_path(image), repository, version, platform, encoded)
    try:
        calls.check("POST", wanted.target().encode(), b"")
    except RunnerError:
        # What this caller may not pull it may still find.
        if platform is None and await is_present(calls, image):
            return
        raise
    try:
        async with contextlib.aclosing(calls.flights.ensure(wanted)) as progress:
            async for line in progress:
                yield line
    except Refused as refused:
        raise calls.failure(refused.status, refused.body, Thing.IMAGE) from None
    if platform is not None:
        await _check_platform(calls, image, platform)


async def ensure(calls: Calls, image: str, platform: str | None, auth: Mapping[str, str] | None = None) -> None:
    """As `ensuring`, the progress left aside."""
    async with contextlib.aclosing(ensuring(calls, image, platform, auth)) as progress:
        async for _ in progress:
            pass
