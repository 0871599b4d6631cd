"""Images of the runner face: present, or pulled; an error within the pull's stream is an error here."""

import base64
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

import msgspec

from calls import Calls, Thing
from errors import RunnerError
from streams import LineFramer


def split_reference(image: str) -> tuple[str, str]:
    """A reference as repository and tag (or digest); `latest` where it names neither."""
    repository, at, digest = image.partition("@")
    if at:
        # A tag beside a digest says nothing more, and the engine refuses both together.
        head, colon, tag = repository.rpartition(":")
        return (head if colon and "/" not in tag else repository), digest
    head, colon, tag = image.rpartition(":")
    if colon and "/" not in tag:
        return head, tag
    return image, "latest"


def _image_path(image: str) -> str:
    """The path of an image's inspect; slashes are part of its name."""
    parts = image.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise RunnerError("bad_parameter", f"invalid reference format: {image}", status=400)
    return f"/images/{quote(image, safe='/:@')}/json"


async def is_present(calls: Calls, image: str) -> bool:
    """Whether the engine has the image."""
    repository, tag = split_reference(image)
    separator = "@" if "@" in image else ":"
    path = _image_path(f"{repository}{separator}{tag}")
    with await calls.open("GET", path, thing=Thing.IMAGE, accept=(404,)) as response:
        await response.read(1 << 26)
        return response.status == 200


async def pull(calls: Calls, image: str, platform: str | None, auth: Mapping[str, str] | None) -> AsyncIterator[bytes]:
    """Pull an image; yields the engine's progress, a JSON document each, as it comes.

    Raises:
        RunnerError: the engine or the registry refused or failed, before or within the progress.
    """
    _image_path(image)
    repository, tag = split_reference(image)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if auth is not None:
        headers = ((b"X-Registry-Auth", base64.urlsafe_b64encode(msgspec.json.encode(auth))),)
    query = {"fromImage": repository, "tag": tag, "platform": platform}
    with await calls.open("POST", "/images/create", query, headers=headers, thing=Thing.IMAGE) as response:
        framer = LineFramer()
        async for chunk in response.chunks():
            for line in framer.feed(chunk).splitlines():
                if line.strip():
                    _raise_for(line)
                    yield line
        if framer.tail().strip():
            raise RunnerError("image_ensure_failed", "the pull's progress broke off")


class _Progress(msgspec.Struct):
    error: str | None = None


def _raise_for(line: bytes) -> None:
    try:
        progress = msgspec.json.decode(line, type=_Progress)
    except msgspec.DecodeError as error:
        raise RunnerError("image_ensure_failed", f"the pull's progress is not JSON: {error}") from error
    if progress.error is not None:
        raise RunnerError("image_ensure_failed", progress.error)


async def ensure(calls: Calls, image: str, platform: str | None, auth: Mapping[str, str] | None = None) -> None:
    """Have the image on the engine: nothing is pulled if it is there, unless a platform is asked for.

    Raises:
        RunnerError: as `pull`.
    """
    if platform is None and await is_present(calls, image):
        return
    async for _ in pull(calls, image, platform, auth):
        pass
