"""Whatever body or query passes, the engine reads it as the policy did: held against an oracle of Go's reading."""

import json
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import engine_bodies as bodies
import operations
import rules
import strict_json
from errors import RunnerError
from policy_file import parse

LOOKED_INTO: list[type[msgspec.Struct]] = [
    *(bodies.ContainerCreate, bodies.ContainerUpdate, bodies.ContainerExec),
    *(bodies.HostConfig, bodies.VolumeCreate, bodies.NetworkCreate, bodies.NetworkConnect),
]


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """The code of the refusal, if there is one, and what was given."""
    try:
        return "", call()
    except RunnerError as error:
        refused = error
    assert refused.body()  # It can be told.
    return refused.code, None


def code_of(call: Callable[[], Any]) -> str:
    return attempt(call)[0]


def read(text: str | bytes, form: type[msgspec.Struct] = bodies.ContainerCreate) -> tuple[Any, list[str]]:
    return strict_json.read(text if isinstance(text, bytes) else text.encode(), form)


# What passes, and what does not.


def test_fields_match_in_any_ascii_case() -> None:
    found, unknown = read('{"IMAGE": "x", "hostConfig": {"privileged": true, "bInDs": ["/:/h"]}}')
    assert (found.image, found.host_config.privileged, found.host_config.binds, unknown) == ("x", True, ["/:/h"], [])


def test_null_is_absent() -> None:
    found, unknown = read('{"Image": null, "HostConfig": {"Binds": null, "Beside": null}, "Runtime": null}')
    assert (found.image, found.host_config.binds, unknown) == (None, None, [])


def test_what_no_struct_knows_is_named_by_its_path() -> None:
    _, unknown = read(
        '{"A": 1, "HostConfig": {"b": {"c": 1}, "Mounts": [{"D": 1}], "LogConfig": {"Config": {"e": "f"}}}}'
    )
    assert unknown == ["A", "HostConfig.b", "HostConfig.Mounts.D"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"Image": "a", "Image": "a"}', "ambiguous_body"),
        ('{"Image": "a", "image": "a"}', "ambiguous_body"),
        ('{"HostConfig": {}, "HO\u017fTCONFIG": {}}', "ambiguous_body"),
        ('{"Ho\u017ftConfig": {}}', "ambiguous_body"),
        ('{"Ho\\u017ftConfig": {}}', "ambiguous_body"),
        ('{"HostConfig": {"Networ\u212aMode": "none"}}', "ambiguous_body"),
        ('{"HostConfig": {"Sysctls": {"a": "1", "a": "2"}}}', "ambiguous_body"),
        ('{"HostConfig": {"Mounts": [{"Type": "volume", "TYPE": "bind"}]}}', "ambiguous_body"),
        ('{"Beside": {"a": 1, "A": 2}}', "ambiguous_body"),
        ('{"Beside": [[{"a": {"b": 1, "b": 2}}]]}', "ambiguous_body"),
        ('{} {}', "ambiguous_body"),
        ('{}x', "ambiguous_body"),
        ('{}\0', "ambiguous_body"),
        ('{"Image": "\\ud800"}', "ambiguous_body"),
        ('{"Labels": {"\\udc00": "a"}}', "ambiguous_body"),
        ('{"\\ud800": 1, "\\ud800": 1}', "ambiguous_body"),
        ("", "invalid_json"),
        ("null", "invalid_json"),
        ("[]", "invalid_json"),
        ("{", "invalid_json"),
        ("{'Image': 'a'}", "invalid_json"),
        ('{"Image": "a",}', "invalid_json"),
        ('{"StopTimeout": NaN}', "invalid_json"),
        ('{"StopTimeout": -Infinity}', "invalid_json"),
        ('{"StopTimeout": 01}', "invalid_json"),
        ('{"Image": "\n"}', "invalid_json"),
        ("\ufeff{}", "invalid_json"),
        (b"\xff\xfe{\x00}\x00", "invalid_json"),
        (b'{"Image": "\xff"}', "invalid_json"),
        (b'{"Image": "\xed\xa0\x80"}', "invalid_json"),
        ('{"StopTimeout": ' + "9" * 5000 + "}", "invalid_json"),
        ('{"Cmd": ' + "[" * 40 + "]" * 40 + "}", "invalid_json"),
        ('{"Cmd": ' + "[" * 100_000, "body_too_large"),
        ('{"Image": 1}', "validation_error"),
        ('{"HostConfig": {"Privileged": "true"}}', "validation_error"),
        ('{"HostConfig": {"Privileged": 1}}', "validation_error"),
        ('{"HostConfig": {"Binds": "/:/h"}}', "validation_error"),
        ('{"HostConfig": [{"Privileged": true}]}', "validation_error"),
        (b" " * (strict_json.MAX_INSPECTED + 1), "body_too_large"),
        ('{"Cmd": [' + "0," * 20_000 + "0]}", "body_too_large"),
    ],
)  # fmt: skip
def test_what_has_two_readings_or_none_does_not_pass(text: str | bytes, code: str) -> None:
    assert code_of(lambda: read(text)) == code


@pytest.mark.parametrize("form", LOOKED_INTO)
def test_no_two_fields_of_a_struct_are_one_to_the_engine(form: type[msgspec.Struct]) -> None:
    assert len(strict_json.field_names(form)) == len(msgspec.structs.fields(form))


# The oracle: encoding/json of Go, as far as these structs go.

KELVIN_AND_LONG_S = {"\u212a": "k", "\u017f": "s"}


def go_equal(name: str, field: str) -> bool:
    """bytes.EqualFold, for fields in ASCII."""

    def rune(letter: str) -> str:
        letter = KELVIN_AND_LONG_S.get(letter, letter)
        return letter.lower() if letter in string.ascii_uppercase else letter

    return [rune(letter) for letter in name] == [rune(letter) for letter in field]


class GoError(Exception):
    """Unmarshal gives an error, so the engine refuses."""


class Pairs(list[tuple[str, Any]]):
    pass


ZERO: dict[type, Any] = {bool: False, str: "", int: 0}


def go_read(value: Any, kind: Any, held: Any) -> Any:
    """Unmarshal a value of a type into what is held already."""
    if kind == list[str] | str | None:  # moby's strslice: a string is a list of one.
        kind, value = list[str], [value] if isinstance(value, str) else value
    kind = strict_json._without_none(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if value is None:
            return None
        if not isinstance(value, Pairs):
            raise GoError
        fields = msgspec.structs.fields(kind)
        held = dict(held or {})
        for name, item in value:
            exact = [field for field in fields if field.encode_name == name]
            field = next(iter(exact or [field for field in fields if go_equal(name, field.encode_name)]), None)
            if field is not None:
                held[field.encode_name] = go_read(item, field.type, held.get(field.encode_name))
        return held
    if kind is Any:
        return None  # Nothing that a rule looks at.
    origin = getattr(kind, "__origin__", None)
    if origin is dict:
        if value is None:
            return None
        if not isinstance(value, Pairs):
            raise GoError
        held = dict(held or {})
        for name, item in value:
            held[name] = go_read(item, kind.__args__[1], None)
        return held
    if origin is list:
        if value is None:
            return None
        if isinstance(value, Pairs) or not isinstance(value, list):
            raise GoError
        old = held or []
        return [go_read(item, kind.__args__[0], old[at] if at < len(old) else None) for at, item in enumerate(value)]
    if value is None:
        return held
    if type(value) is not kind:
        raise GoError
    return value


def plain(value: Any) -> Any:
    """A view in which what is zero to Go is None."""
    if isinstance(value, dict):
        kept = {name: plain(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item is not None} or None
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if value in (0, "", False) else value


def ours(value: Any) -> Any:
    """The same view of what `read` gave."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        looked_at = [field for field in fields if field.type is not Any]
        view = {field.encode_name: ours(getattr(value, field.name)) for field in looked_at}
        if isinstance(view.get("CapAdd"), str):
            view["CapAdd"] = [view["CapAdd"]]
        return plain(view)
    if isinstance(value, list):
        return [ours(item) for item in value]
    if isinstance(value, dict):
        return {name: ours(item) for name, item in value.items()}
    return value


def go_host_config(create: Pairs) -> Any:
    """The HostConfig that counts: moby's ContainerConfigWrapper has its fields at the top level, too."""
    inner = (go_read(create, bodies.ContainerCreate, None) or {}).get("HostConfig")
    outer = go_read(create, bodies.HostConfig, None)
    if inner is None:
        return outer
    for name in ("Memory", "MemorySwap", "VolumeDriver"):
        inner.setdefault(name, outer.get(name))
    return inner


def first_value(text: str) -> Any:
    return json.JSONDecoder(object_pairs_hook=Pairs).raw_decode(text.lstrip(" \t\r\n"))[0]


FIELD_NAMES = sorted({f.encode_name for form in LOOKED_INTO for f in msgspec.structs.fields(form)})
INNER_NAMES = ["Type", "Source", "Name", "Options", "DriverConfig", "VolumeOptions", "PathOnHost", "HostPort", "Config"]


@st.composite
def names(draw: Callable[[Any], Any]) -> str:
    name: str = draw(st.sampled_from([*FIELD_NAMES, *INNER_NAMES, "Image", "HostConfig", "HostConfig", "Binds"]))
    for change in draw(st.lists(st.sampled_from(["lower", "upper", "s", "k", "swap", "none"]), max_size=2)):
        match change:
            case "lower":
                name = name.lower()
            case "upper":
                name = name.upper()
            case "swap":
                name = name.swapcase()
            case "s":
                name = name.replace("s", "\u017f", 1)
            case "k":
                name = name.replace("k", "\u212a", 1)
    return name


def written(value: Any, escape: bool) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(n, ensure_ascii=escape)}:{written(v, escape)}" for n, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(item, escape) for item in value) + "]"
    return json.dumps(value, ensure_ascii=escape)


SCALARS = st.sampled_from([None, True, False, 0, 1, -1, 2**63, 1.0, 1.5, "", "host", "/:/h", "\u017f", "a\ud800"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.lists(st.tuples(names(), inner), max_size=3).map(Pairs),
    max_leaves=8,
)
TYPED = st.sampled_from(
    [
        ("Binds", ["/:/h"]), ("Privileged", True), ("Privileged", False), ("NetworkMode", "host"), ("Memory", 5),
        ("CapAdd", ["A"]), ("Sysctls", Pairs([("a", "1")])), ("MaskedPaths", []), ("VolumeDriver", "x"),
        ("Mounts", [Pairs([("Type", "bind"), ("Source", "/")])]), ("LogConfig", Pairs([("Type", "x")])),
        ("Devices", [Pairs([("PathOnHost", "/dev")])]), ("PidMode", "host"), ("Binds", None), ("Mounts", [Pairs()]),
    ]
)  # fmt: skip


@st.composite
def host_configs(draw: Callable[[Any], Any]) -> Pairs:
    pairs = Pairs()
    for name, value in draw(st.lists(TYPED, max_size=4)):
        pairs.append((draw(st.sampled_from([name, name, name.lower(), name.replace("s", "\u017f")])), value))
    return pairs


@st.composite
def creates(draw: Callable[[Any], Any]) -> str:
    pairs = Pairs([("Image", "x")])
    for name in draw(st.lists(st.sampled_from(["HostConfig", "hostconfig", "Ho\u017ftConfig", "Labels"]), max_size=2)):
        pairs.append((name, draw(host_configs())))
    pairs += draw(st.lists(TYPED, max_size=1))
    pairs += draw(st.lists(st.tuples(names(), VALUES), max_size=1))
    return str(written(pairs, draw(st.booleans())) + draw(st.sampled_from(["", "", "", " ", "\n", " {}", "\0", "]"])))


ANYTHING_GOES = parse('preset = "everything"\n[container]\nprivileged = false\n').default
CREATE = next(each for each in operations.OPERATIONS if each.id == "ContainerCreate")


@given(creates())
@example('{"Image":"x","Privileged":true}')
@example('{"Image":"x","HostConfig":{"Binds":["/:/h"]},"HostConfig":{}}')
@example('{"Image":"x","HostConfig":{"MaskedPaths":[]}}')
def test_the_engines_view_of_a_create_that_passes_is_ours(text: str) -> None:
    body = text.encode("utf-8", "surrogatepass")
    code = code_of(lambda: rules.check(ANYTHING_GOES, CREATE, b"/containers/create", body=body))
    assert code in ("", "ambiguous_body", "invalid_json", "validation_error", "policy_denied")
    if code:
        return
    found, _ = strict_json.read(body, bodies.ContainerCreate)
    create = first_value(text)
    try:
        theirs = go_host_config(create)
    except GoError:
        return
    assert plain(theirs) == ours(found.host_config)
    assert not (theirs or {}).get("Privileged")


@given(st.sampled_from(LOOKED_INTO), st.lists(st.tuples(names(), VALUES), max_size=4).map(Pairs), st.booleans())
def test_the_engines_view_of_any_body_that_passes_is_ours(
    form: type[msgspec.Struct], pairs: Pairs, escape: bool
) -> None:
    body = written(pairs, escape).encode("utf-8", "surrogatepass")
    code, passed = attempt(lambda: strict_json.read(body, form)[0])
    if code:
        return
    try:
        theirs = go_read(first_value(body.decode()), form, None)
    except GoError:
        return
    assert plain(theirs) == ours(passed)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    assert code_of(lambda: strict_json.read(body, bodies.ContainerCreate)) in (
        *("", "invalid_json", "ambiguous_body", "validation_error"),
    )


@given(st.text(max_size=12), st.sampled_from(FIELD_NAMES))
def test_names_are_compared_as_the_engine_does(name: str, field: str) -> None:
    assert (strict_json.folded(name) == field.lower()) is go_equal(name, field)


@given(names(), st.sampled_from(FIELD_NAMES))
def test_near_names_are_compared_as_the_engine_does(name: str, field: str) -> None:
    assert (strict_json.folded(name) == field.lower()) is go_equal(name, field)


def test_no_other_letter_folds_into_ascii() -> None:
    for point in range(0x80, 0x110000):
        letter = chr(point)
        if letter not in KELVIN_AND_LONG_S:
            assert not strict_json.folded(letter).isascii(), hex(point)


# The query: net/url of Go.


def go_unescape(text: bytes) -> bytes:
    found = bytearray()
    at = 0
    while at < len(text):
        if text[at : at + 1] == b"%":
            digits = text[at + 1 : at + 3]
            if len(digits) < 2 or any(digit not in string.hexdigits.encode() for digit in digits):
                raise GoError
            found.append(int(digits, 16))
            at += 3
        else:
            found += b" " if text[at : at + 1] == b"+" else text[at : at + 1]
            at += 1
    return bytes(found)


def go_query(query: bytes, *, old: bool) -> dict[bytes, list[bytes]]:
    """url.ParseQuery, of Go before 1.17 and since. What it cannot read it leaves out, and some handlers go on."""
    found: dict[bytes, list[bytes]] = {}
    for part in query.replace(b";", b"&").split(b"&") if old else query.split(b"&"):
        if not part or b";" in part:
            continue
        name, _, value = part.partition(b"=")
        try:
            found.setdefault(go_unescape(name), []).append(go_unescape(value))
        except GoError:
            continue
    return found


QUERY_NAMES = [*sorted(rules._SINGLE), "t", "securityopt", "extrahosts", "checkpoint", "names", "x"]
PARTS = st.one_of(
    st.sampled_from([quote_plus(name) for name in QUERY_NAMES]),
    st.sampled_from(QUERY_NAMES).map(lambda name: f"%{ord(name[0]):02x}{name[1:]}"),
    st.sampled_from(["=", "&", "==", "&&", ";", "+", "%", "%2", "%zz", "%26", "%3d", "%00", "%ff", "%c3%a9", "?", "-"]),
    st.text(st.sampled_from("ab=&;%+?/:.0"), max_size=4),
)  # fmt: skip


@given(st.lists(PARTS, max_size=10).map("".join) | st.lists(st.tuples(PARTS, PARTS), max_size=4).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
))  # fmt: skip
def test_the_engines_view_of_a_query_that_passes_is_ours(query: str) -> None:
    code, found = attempt(lambda: rules.parameters(f"/x?{query}".encode()))
    if code:
        assert code == "ambiguous_query"
        return
    for old in (False, True):
        theirs = go_query(query.encode(), old=old)
        assert {name.encode() for name in found} == set(theirs)
        for name, values in theirs.items():
            assert found[name.decode()].encode() == b"\n".join(values)
            assert len(values) == 1 or name.decode() not in rules._SINGLE


# The Content-Type: mime of Go.

GO_SPACES = "\t\n\v\f\r \u0085\u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
GO_LOWER = {"\u0130": "i", "\u212a": "k"}


def go_takes_for_a_form(value: str) -> bool:
    media_type = value.partition(";")[0].strip(GO_SPACES)
    media_type = "".join(GO_LOWER.get(letter, letter.lower()) for letter in media_type)
    return media_type in ("application/x-www-form-urlencoded", "multipart/form-data")


@st.composite
def content_types(draw: Callable[[Any], Any]) -> str:
    text: str = draw(st.sampled_from(["application/x-www-form-urlencoded", "multipart/form-data", "application/json"]))
    text = draw(st.sampled_from([text, text.upper(), text.title(), text.replace("i", "\u0130", 1)]))
    space = st.text(st.sampled_from(GO_SPACES), max_size=2)
    return str(draw(space) + text + draw(space) + draw(st.sampled_from(["", ";", "; a=b", ";;", "; boundary=x"])))


@given(content_types() | st.text(max_size=20))
def test_what_the_engine_takes_for_a_form_does_not_pass(value: str) -> None:
    encoded = value.encode("utf-8", "surrogatepass")
    code = code_of(
        lambda: rules.check(
            parse("").default,
            next(each for each in operations.OPERATIONS if each.id == "ImageCreate"),
            b"/images/create?fromSrc=-",
            [(b"content-type", encoded)],
            has_body=True,
        )
    )
    assert code == "ambiguous_query" or not go_takes_for_a_form(value)
    assert code == "" or value != "application/json"
