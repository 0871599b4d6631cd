"""Reads a JSON body that policy must look into, and refuses what the engine could read otherwise. Pure functions.

The engine reads JSON as Go does: names of fields match whatever their case, by Unicode's folding (a long s, U+017F,
is an s); where one stands twice, objects merge and the last value counts; what follows the first value is ignored.
A check of the one reading would be no check of the other. So a body passes only where no two readings exist.
"""

import json
import types
import typing
from typing import Any, TypeVar

import msgspec

from errors import RunnerError

S = TypeVar("S", bound=msgspec.Struct)

MAX_INSPECTED = 1024 * 1024
"""Security limit: bytes of a body that is looked into."""

# The characters outside of ASCII that Unicode's simple folding makes equal to one within: U+017F and U+212A.
_FOLDS_TO_ASCII = str.maketrans({"\u017f": "s", "\u212a": "k"})


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
        return msgspec.convert(_struct(found, form, "", unknown), form), unknown
    except msgspec.ValidationError as error:
        raise RunnerError("validation_error", str(error)) from error


def folded(name: str) -> str:
    """A name as the engine compares it with the names of fields."""
    return _lower(name.translate(_FOLDS_TO_ASCII))


def field_names(form: type[msgspec.Struct]) -> frozenset[str]:
    """The names of a struct's fields as they stand in JSON, in lower case."""
    return frozenset(_lower(field.encode_name) for field in msgspec.structs.fields(form))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_constant=_refuse_constant)


def _lower(name: str) -> str:
    return "".join(chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter for letter in name)


def _struct(pairs: _Object, form: type[msgspec.Struct], path: str, unknown: list[str]) -> dict[str, Any]:
    fields = {_lower(field.encode_name): field for field in msgspec.structs.fields(form)}
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for name, value in pairs:
        fold = folded(name)
        if fold in seen:
            raise _ambiguous(f"{path}{name} stands more than once")
        seen.add(fold)
        field = fields.get(fold)
        if field is None:
            unknown.append(f"{path}{name}")
            _value(value, Any, f"{path}{name}.", [])
        elif _lower(name) != fold:
            raise _ambiguous(f"{path}{name} is {field.encode_name} to the engine")
        else:
            found[field.encode_name] = _value(value, field.type, f"{path}{field.encode_name}.", unknown)
    return found


def _value(value: Any, kind: Any, path: str, unknown: list[str]) -> Any:
    kind = _without_none(kind)
    if isinstance(value, _Object):
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return _struct(value, kind, path, unknown)
        is_map = typing.get_origin(kind) is dict
        inner = typing.get_args(kind)[1] if is_map else Any
        found: dict[str, Any] = {}
        seen: set[str] = set()
        for name, item in value:
            key = name if is_map else folded(name)  # What is no map of ours may be a struct of the engine's.
            if key in seen:
                raise _ambiguous(f"{path}{name} stands more than once")
            seen.add(key)
            found[name] = _value(item, inner, f"{path}{name}.", unknown)
        return found
    if isinstance(value, list):
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else Any
        return [_value(item, inner, path, unknown) for item in value]
    return value


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        rest = [each for each in typing.get_args(kind) if each is not type(None)]
        return rest[0] if len(rest) == 1 else Any
    return kind


def _ambiguous(reason: str) -> RunnerError:
    return RunnerError("ambiguous_body", f"the engine could read the body otherwise than the policy: {reason}")
