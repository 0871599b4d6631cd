"""`docker-runner curl`: reads curl's arguments as curl does, to find the request that they mean, and signs it.

Which options take a value is asked of the installed curl itself (`curl --help all`), so that none is misread.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from client import sign

_HASH_UP_FRONT = 1024 * 1024
"""Bytes of body from which its hash is sent in the head, so that the runner need not hold it before it verifies."""
_UNSIGNABLE = {
    "--config": "its options cannot be seen here",
    "--next": "one request at a time",
    "--get": "write the query into the path",
    "--form": "multipart bodies cannot be foreseen; use --data-binary",
    "--form-string": "multipart bodies cannot be foreseen; use --data-binary",
    "--data-urlencode": "use --data-raw",
    "--url-query": "write the query into the path",
    "--request-target": "write the target as the path",
    "--location": "a signature holds for one target",
    "--location-trusted": "a signature holds for one target",
}
_BODY_OPTIONS = ("--data", "--data-ascii", "--data-raw", "--data-binary", "--json")


class UsageError(Exception):
    """The command's arguments are off."""


def signed_arguments(arguments: list[str], base_url: str, secret: str, key: str | None) -> list[str]:
    """Arguments for curl that send the same request to the runner, signed.

    Args:
        arguments: curl's own; the URL may be just a path.
        base_url: of the runner.
        secret, key: see `client.sign`.

    Raises:
        UsageError: they mean no request that can be signed.
    """
    method: str | None = None
    upload: str | None = None
    body = bytearray()
    has_body = has_type = head = False
    url: str | None = None
    passed: list[str] = []
    for option, value in _options(arguments):
        if option in _UNSIGNABLE:
            raise UsageError(f"curl's {option} cannot be used here: {_UNSIGNABLE[option]}")
        if option in ("", "--url"):
            if url is not None:
                raise UsageError("one URL at a time: each request needs a signature of its own")
            url = value
            continue
        if option in _BODY_OPTIONS:
            # As curl joins them; what is read from a file or standard input is read once, here.
            body += (b"&" if has_body and option != "--json" else b"") + _data(option, value or "")
            has_body = True
            has_type |= option == "--json"
            if option == "--json":
                passed += ["-H", "Content-Type: application/json", "-H", "Accept: application/json"]
            continue
        if option == "--upload-file":
            upload = value
            continue
        if option == "--request":
            method = value = (value or "").upper()
        elif option == "--head":
            head = True
        elif option == "--header":
            has_type |= (value or "").lower().startswith(("content-type:", "@"))
        passed += [option] if value is None else [option, value]
    if url is None:
        raise UsageError("no URL: give a path such as /version")
    url, target = _located(url, base_url)
    passed += ["--path-as-is", "--globoff"]
    content_hash = None
    if upload is not None and (has_body or target.partition("?")[0].endswith("/")):
        raise UsageError("curl's --upload-file goes without another body, and to a path that does not end in a slash")
    if upload is not None:
        content_hash, source = _hash_file(upload)
        passed += ["--upload-file", source]
    elif has_body:
        passed += _sent(bytes(body))
        if not has_type:
            passed += ["-H", "Content-Type: application/json"]
        if len(body) > _HASH_UP_FRONT:
            content_hash = b64encode(hashlib.sha256(body).digest()).decode()
    default = "HEAD" if head else "PUT" if upload is not None else "POST" if has_body else "GET"
    headers = sign(secret, method or default, target, bytes(body), key=key, content_hash=content_hash)
    for name, value in headers.items():
        passed += ["-H", f"{name}: {value}"]
    # -q: options in a .curlrc could not be seen here.
    return ["-q", *passed, url]


def _located(url: str, base_url: str) -> tuple[str, str]:
    """The URL as curl gets it, and its target; one that leads elsewhere must not get a signature to take along."""
    if url.startswith("/"):
        url = base_url + url
    elif "://" not in url:
        url = f"{urlsplit(base_url).scheme}://{url}"
    url = url.partition("#")[0]
    parts, base = urlsplit(url), urlsplit(base_url)
    if (parts.scheme, parts.netloc) != (base.scheme, base.netloc):
        raise UsageError(f"{url} is not at {base_url}; name the runner in DOCKER_RUNNER_URL")
    target = url.split("://", 1)[1][len(parts.netloc) :] or "/"
    return url, "/" + target if target.startswith("?") else target


def _options(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """curl's arguments as (long option, value or None); a URL has the option ""."""
    long_names, with_value = _known_options()
    words = iter(arguments)
    only_urls = False

    def value_of(option: str) -> str:
        try:
            return next(words)
        except StopIteration:
            raise UsageError(f"curl's {option} needs a value") from None

    for word in words:
        if only_urls or not word.startswith("-") or word == "-":
            yield "", word
        elif word == "--":
            only_urls = True
        elif word.startswith("--"):
            name = word if word in with_value or word in long_names.values() else _completed(word, long_names)
            yield name, value_of(name) if name in with_value else None
        else:
            letters = word[1:]
            while letters:
                short, letters = "-" + letters[0], letters[1:]
                name = long_names.get(short, short)
                if name in with_value:
                    yield name, letters or value_of(short)
                    break
                yield name, None


def _completed(word: str, long_names: dict[str, str]) -> str:
    """curl takes any beginning of a long option's name that fits one option only."""
    if word.startswith("--no-") and "--" + word.removeprefix("--no-") in long_names.values():
        return word
    fits = {name for name in long_names.values() if name.startswith(word)}
    if len(fits) != 1:
        raise UsageError(f"curl does not know {word}" if not fits else f"{word} fits several of curl's options")
    return fits.pop()


def _known_options() -> tuple[dict[str, str], set[str]]:
    """Of the installed curl: short (or long) option → long option; and the long options that take a value."""
    try:
        text = subprocess.run(["curl", "--help", "all"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"curl cannot be run: {error}") from error
    long_names: dict[str, str] = {}
    with_value: set[str] = set()
    for line in text.splitlines():
        found = re.match(r"\s*(?:(-\S), )?\s*(--[A-Za-z0-9.-]+)( <)?", line)
        if found:
            long_names[found[1] or found[2]] = found[2]
            if found[3]:
                with_value.add(found[2])
    return long_names, with_value


def _data(option: str, value: str) -> bytes:
    if not value.startswith("@") or option == "--data-raw":
        return value.encode("utf-8", "surrogateescape")
    content = _read(value[1:])
    if option in ("--data", "--data-ascii"):
        return content.translate(None, b"\r\n\0")
    return content


def _read(name: str) -> bytes:
    try:
        return Path("/dev/stdin" if name == "-" else name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error


def _sent(body: bytes) -> list[str]:
    """Arguments that make curl send exactly `body`: through a file that is gone as soon as curl has it open."""
    return ["--data-binary", f"@{_inherited(body)}"]


def _inherited(content: bytes) -> str:
    file = tempfile.TemporaryFile()
    file.write(content)
    file.flush()
    file.seek(0)
    descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return f"/dev/fd/{descriptor}"


def _hash_file(name: str) -> tuple[str, str]:
    """BODYHASH of a file, and what curl can read it from (standard input is kept in an unlinked file)."""
    if name in ("-", "."):
        name = _inherited(_read("-"))
    try:
        with open(name, "rb") as file:
            return b64encode(hashlib.file_digest(file, "sha256").digest()).decode(), name
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
