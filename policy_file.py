"""How a policy file (TOML) is read: it begins from a preset and says what differs. Pure functions.

`[keys.NAME]` gives a named key a policy of its own, which begins from the file's. Every error names the line.
"""

import ipaddress
import posixpath
import re
import tomllib
from typing import Any, NoReturn

import msgspec

from policy import PRESETS, STANDING, Patterns, Policies, Policy, Section, ids, plain, port_range, toml_key


class _Operations(Section, frozen=True):
    allow: Patterns = (STANDING,)
    deny: Patterns = ()


class PolicyError(Exception):
    """A policy file is wrong; the message names the line, if it is known, and the reason."""


class _WrongError(Exception):
    """What is wrong, and where: the names of tables and of a key, from the outside in."""

    def __init__(self, place: tuple[str, ...], reason: str) -> None:
        super().__init__(reason)
        self.place = place


def parse(text: str) -> Policies:
    """A policy file.

    Raises:
        PolicyError: it is not TOML, or says what no policy can say.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \((?:at line (\d+), column \d+|at end of document)\)", str(error), re.DOTALL)
        line = (found and found[2]) or text.count("\n") + 1
        reason = f"line {line}: not TOML: {found[1] if found else error}"
        raise PolicyError(plain(reason)) from error
    except (ValueError, RecursionError) as error:  # A number of too many digits, brackets in brackets without end.
        raise PolicyError(f"not TOML: {error}") from error
    try:
        keys = _table(document.pop("keys", {}), ("keys",))
        default = _policy(document, PRESETS["workloads"], ())
        return Policies(
            default,
            {
                name: _policy(_table(table, ("keys", name)), msgspec.structs.replace(default, key=name), ("keys", name))
                for name, table in keys.items()
            },
        )
    except _WrongError as error:
        where = ".".join(toml_key(part) for part in error.place)
        raise PolicyError(plain(f"line {_line_of(text, error.place)}: {where}: {error}")) from error


def _table(value: Any, place: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongError(place, f"must be a table, [{'.'.join(place)}]")
    return dict(value)


def _policy(table: dict[str, Any], base: Policy, place: tuple[str, ...]) -> Policy:
    preset = table.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise _WrongError((*place, "preset"), f"must be one of {', '.join(PRESETS)}")
        # The scope stays: a preset says what may be done, not whose things they are.
        base = msgspec.structs.replace(PRESETS[preset], key=base.key, scope=base.scope)
    operations = _section(table.pop("operations", {}), _Operations(), (*place, "operations"))
    fields: dict[str, Any] = {"unrestricted": base.unrestricted and not table and not base.scope.label}
    for name in ("allow", "deny"):
        try:
            named = ids([pattern for pattern in getattr(operations, name) if pattern != STANDING])
        except ValueError as error:
            raise _WrongError((*place, "operations", name), str(error)) from error
        if name == "allow":
            fields["allowed"] = named | (base.allowed if STANDING in operations.allow else frozenset())
        else:
            fields["allowed"] -= named
            fields["denied"] = named
    for name, value in table.items():
        standing = getattr(base, name, None)
        if isinstance(standing, Section):
            fields[name] = _section(value, standing, (*place, name))
        elif name in ("strict", "min_api_version"):
            fields[name] = _converted(value, type(standing), (*place, name))
        else:
            raise _WrongError((*place, name), "a policy has no such part")
    policy = msgspec.structs.replace(base, **fields)
    _check(policy, place)
    return policy


def _section(value: Any, standing: Any, place: tuple[str, ...]) -> Any:
    """A section with what the file says of it in place of what stands."""
    said = _table(value, place)
    types = {field.name: field.type for field in msgspec.structs.fields(standing)}
    for name, item in said.items():
        if name not in types:
            raise _WrongError((*place, name), "there is no such rule")
        said[name] = _converted(item, types[name], (*place, name))
        if types[name] == Patterns:
            held = getattr(standing, name)
            said[name] = tuple(each for pattern in said[name] for each in (held if pattern == STANDING else (pattern,)))
    return msgspec.structs.replace(standing, **said)


def _converted(value: Any, kind: Any, place: tuple[str, ...]) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _WrongError(place, str(error)) from error


def _check(policy: Policy, place: tuple[str, ...]) -> None:
    """What types do not say.

    Raises:
        _WrongError: the first that is wrong.
    """

    def wrong(*name_and_reason: str) -> NoReturn:
        *name, reason = name_and_reason
        raise _WrongError((*place, *name), reason)

    if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", policy.min_api_version):
        wrong("min_api_version", 'must be a version, such as "1.24"')
    if policy.scope.label and not re.fullmatch(r"[^=\s,]+=[^\s,]+", policy.scope.label):
        wrong("scope", "label", "must be NAME=VALUE, without blanks and commas")
    rules = policy.container
    for bind in rules.binds:
        if bind.path != posixpath.normpath(bind.path) or not bind.path.startswith("/") or bind.path.startswith("//"):
            wrong("container", "binds", f"{bind.path!r} is no plain absolute path")
    for ports in rules.ports:
        if ports != "*" and not (
            re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", ports)
            and sorted((*port_range(ports), 65535)) == [*port_range(ports), 65535]
        ):
            wrong("container", "ports", f"{ports!r} is no port and no range")
    for limit in ("max_memory", "max_cpus", "max_pids"):
        value = getattr(rules, limit)
        if value < 0 or value != value or value > _MOST:
            wrong("container", limit, "must be 0 (none) or more")
    for pattern in rules.namespaces:
        if not re.fullmatch(r"\*|(network|pid|ipc|uts|user|cgroup):.+", pattern):
            wrong("container", "namespaces", f'{pattern!r} is no KIND:MODE, such as "network:host"')
    for subnet in policy.network.subnets:
        try:
            if subnet != "*":
                ipaddress.ip_network(subnet)
        except ValueError:
            wrong("network", "subnets", f'{subnet!r} is no subnet, such as "10.0.0.0/8"')


_MOST = 1 << 62
"""More than any engine takes."""


def _line_of(text: str, place: tuple[str, ...]) -> str:
    """The line of a policy file that says something, or that its table begins at; `?` where neither is written so."""
    tables: tuple[str, ...] = ()
    found = "?"
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[+([^\]#]*)\]", line):
            tables = said = _keys(header[1])
        elif assigned := re.match(r"\s*([^=#]*?)\s*=", line):
            said = (*tables, *_keys(assigned[1]))
        else:
            continue
        if said[: len(place)] == place:
            return str(number)
        if found == "?" and said and said == place[: len(said)]:
            found = str(number)
    return found


def _keys(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in re.findall(r"\s*(\"[^\"]*\"|'[^']*'|[^.]+)\s*\.?", dotted))
