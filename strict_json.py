"""Reads a JSON body that policy must look into, and refuses what the engine could read otherwise. Pure functions.

The engine reads JSON as Go does: names of fields match whatever their case, by Unicode's folding (a long s, U+017F,
is an s); where one stands twice, objects merge and the last value counts; what follows the first value is ignored.
A check of the one reading would be no check of the other. So a body passes only where no two readings exist.

A field that is null is absent to the engine, known or not.

Reading happens in the event loop, so what it costs is bounded beforehand: in bytes, in values, in depth.
"""

import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from errors import RunnerError

S = TypeVar("S", bound=msgspec.Struct)

MAX_INSPECTED = 1024 * 1024
"""Security limit: bytes of a body that is looked into."""
MAX_VALUES = 16 * 1024
"""Security limit: values in it. Counted by what stands before each, in strings too; more would stop the event loop."""
MAX_DEPTH = 32
"""Security limit: objects and arrays within one another. The deepest documented field is the sixth."""
_SHOWN = 200
"""Characters of a field's path that are kept: a name may be as long as the body, and every value has one."""


class _Object(list[tuple[str, Any]]):
    """A JSON object as it stands: its pairs, in order, those that stand twice too."""


def read(body: bytes, form: type[S]) -> tuple[S, list[str]]:
    """A body as a struct, whose fields match in any ASCII case; and the paths of the fields that the struct has not.

    Raises:
        RunnerError: `invalid_json`; `ambiguous_body`; `validation_error`: a field is of another type;
            `body_too_large`.
    """
    if len(body) > MAX_INSPECTED:
        raise RunnerError("body_too_large", f"a body that policy must read is longer than {MAX_INSPECTED} bytes")
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise RunnerError("body_too_large", f"a body that policy must read holds more than {MAX_VALUES} values")
    try:
        found = _DECODER.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            raise _ambiguous("more follows the first value") from error
        raise RunnerError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(found, _Object):
        raise RunnerError("invalid_json", "the body is not a JSON object")
    unknown: list[str] = []
    try:
        return msgspec.convert(_struct(found, form, "", unknown, 1), form), unknown
    except msgspec.ValidationError as error:
        raise RunnerError("validation_error", str(error)) from error


def folded(name: str) -> str:
    """A name as the engine compares it with the names of fields."""
    # Outside of ASCII, Unicode's simple folding makes these two equal to letters within it, and no others.
    return name.replace("\u017f", "s").replace("\u212a", "k").lower()


def field_names(form: type[msgspec.Struct]) -> frozenset[str]:
    """The names of a struct's fields as they stand in JSON, in lower case."""
    return frozenset(folded(field.encode_name) for field in msgspec.structs.fields(form))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_constant=_refuse_constant)


@functools.lru_cache
def _fields(form: type[msgspec.Struct]) -> Mapping[str, tuple[str, Any]]:
    """The fields of a struct by their names in lower case: the documented name, and the type without null."""
    return {
        folded(field.encode_name): (field.encode_name, _without_none(field.type))
        for field in msgspec.structs.fields(form)
    }


def _struct(pairs: _Object, form: type[msgspec.Struct], path: str, unknown: list[str], depth: int) -> dict[str, Any]:
    fields = _fields(form)
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for name, value in pairs:
        fold = folded(name)
        if fold in seen:
            raise _ambiguous(f"{path}{name[:_SHOWN]} stands more than once")
        seen.add(fold)
        field = fields.get(fold)
        if field is None:
            place = _place(path, name)
            _value(value, Any, place, [], depth)
            if value is not None:
                unknown.append(place)
        elif not name.isascii():
            raise _ambiguous(f"{path}{name} is {field[0]} to the engine")
        elif value is not None:
            found[field[0]] = _value(value, field[1], _place(path, field[0]), unknown, depth)
    return found


def _value(value: Any, kind: Any, path: str, unknown: list[str], depth: int) -> Any:
    """A value as msgspec takes it, and looked through for what has two readings.

    Args:
        value: decoded.
        kind: the type that it should have, without null.
        path: of it.
        unknown: takes the paths of what no struct knows.
        depth: of what it stands in.
    """
    if isinstance(value, str):
        if not value.isascii() and _holds_surrogates(value):
            raise _ambiguous(f"{path} holds half a surrogate pair")
        return value
    if not isinstance(value, list):
        return value
    if depth >= MAX_DEPTH:
        raise RunnerError("invalid_json", f"{path} stands deeper than {MAX_DEPTH} objects and arrays")
    if not isinstance(value, _Object):
        inner = _without_none(typing.get_args(kind)[0]) if typing.get_origin(kind) is list else Any
        return [_value(item, inner, path, unknown, depth + 1) for item in value]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _struct(value, kind, path + ".", unknown, depth + 1)
    is_map = typing.get_origin(kind) is dict
    inner = _without_none(typing.get_args(kind)[1]) if is_map else Any
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for name, item in value:
        key = name if is_map else folded(name)  # What is no map of ours may be a struct of the engine's.
        if key in seen:
            raise _ambiguous(f"{path}.{name[:_SHOWN]} stands more than once")
        if not name.isascii() and _holds_surrogates(name):
            raise _ambiguous(f"a name in {path} holds half a surrogate pair")
        seen.add(key)
        found[name] = _value(item, inner, _place(path + ".", name), unknown, depth + 1)
    return found


def _place(path: str, name: str) -> str:
    return (path + name[:_SHOWN])[:_SHOWN]


def _holds_surrogates(text: str) -> bool:
    """The engine replaces them, so that two names may be one to it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        rest = [each for each in typing.get_args(kind) if each is not type(None)]
        return rest[0] if len(rest) == 1 else Any
    return kind


def _ambiguous(reason: str) -> RunnerError:
    reason = reason.encode("utf-8", "backslashreplace").decode()
    return RunnerError("ambiguous_body", f"the engine could read the body otherwise than the policy: {reason}")
