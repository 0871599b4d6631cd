"""The parts of the documents that are made from the code. To write them anew: `.venv/bin/python -m dev.tables`.

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->` in some document. What the code knows of it comes from
here; the cells to the right of that are people's, and stay with their row. `tests/test_docs.py` sees to it that all is
written, and nothing is empty.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import yaml

import errors
import operations
import settings
import workloads
from exposition import FAMILIES, OF_THE_PROCESS
from openapi import operation_id
from policy import PRESETS, Bind

from . import CHECKOUT

Row = tuple[str, ...]
Rows = list[Row]
"""The head first. A row may be shorter than it: what is missing is written by people."""

DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")])
RULE_SECTIONS = ("container", "exec", "images", "volume", "network")


def _code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _operations() -> Rows:
    rows = [(_code(each.id), _code(f"{each.method} {each.template}")) for each in operations.OPERATIONS]
    half = (len(rows) + 1) // 2
    padded = [*rows, ("", "")] if len(rows) % 2 else rows
    pairs = [(*padded[number], *padded[number + half]) for number in range(half)]
    return [("operation", "request", "operation", "request"), *pairs]


def _routes() -> Rows:
    rows: Rows = [("request", "what it does")]
    for method, path, _, handler, _ in workloads.ROUTES:
        request = f"{method} {path}"
        rows.append((f"[{_code(request)}](#{anchor(request)})", handler.__doc__ or ""))
    return rows


def _errors() -> Rows:
    rows = [
        (f"[{_code(name)}](troubleshooting.md#{name})", str(code.status or "engine's"), _yes(code.retryable))
        for name, code in errors.CODES.items()
    ]
    return [
        ("code", "status", "retryable", "meaning"),
        *((*r, c.meaning) for r, c in zip(rows, errors.CODES.values(), strict=True)),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _settings() -> Rows:
    keys = [(_code(name), "", meaning) for name, meaning in settings.KEY_VARIABLES.items()]
    rows = [(_code(n), _code(v.default) if v.default else "", v.meaning) for n, v in settings.VARIABLES.items()]
    return [("variable", "default", "meaning"), *keys, *rows]


def _presets() -> Rows:
    rows: Rows = [("preset", "operations")]
    for name, policy in PRESETS.items():
        others = [each.id for each in operations.OPERATIONS if each.id not in policy.allowed]
        if not others:
            text = "all"
        elif len(others) < 10:
            text = f"all but {_code(*others)}"
        else:
            text = _code(*(each.id for each in operations.OPERATIONS if each.id in policy.allowed))
        rows.append((_code(name), text))
    return rows


def _rules() -> Rows:
    names = [("", "strict"), ("", "min_api_version")]
    names += [
        (part, field) for part in RULE_SECTIONS for field in getattr(PRESETS["workloads"], part).__struct_fields__
    ]
    rows: Rows = [("rule", "`read-only`, `workloads`", "`everything`", "of what")]
    for part, field in names:
        values = [getattr(getattr(policy, part) if part else policy, field) for policy in PRESETS.values()]
        assert values[0] == values[1], "read-only has the rules of workloads"
        rows.append((_code(f"{part}.{field}" if part else field), _rule_value(values[1]), _rule_value(values[2])))
    return rows


def _rule_value(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case () | 0:
            return "none"
        case ("*",) | (Bind(path="/", below=True),):
            return "any"
        case tuple():
            return _code(*value)
        case _:
            return _code(value)


def _metrics() -> Rows:
    own = [(_code(each.exported), each.kind, _code(*each.labels), each.meaning) for each in FAMILIES]
    process = [(_code(name), kind, "", meaning) for name, kind, meaning in OF_THE_PROCESS]
    return [("metric", "kind", "labels", "meaning"), *own, *process]


def _alerts() -> Rows:
    groups = yaml.safe_load((CHECKOUT / "deploy/monitoring/alerts.yml").read_text())["groups"]
    rows = [(_code(rule["alert"]), rule["labels"]["severity"]) for group in groups for rule in group["rules"]]
    return [("alert", "severity", "meaning", "what to do"), *rows]


def _sdks() -> Rows:
    """What the tests of real tools say that they show; importing them makes the rows."""
    sys.path.insert(0, str(CHECKOUT / "tests"))
    importlib.import_module("test_bridge_sdk")
    works = importlib.import_module("works")
    titled = [(title, text) for tool, title in works.TOOLS.items() for text in works.rows_of(tool)]
    return [("tool", "what works"), *titled]


def _engines() -> Rows:
    """What the tests of the second engine show."""
    sys.path.insert(0, str(CHECKOUT / "tests"))
    differences = importlib.import_module("on_podman.differences").DIFFERENCES
    return [("what", "Docker Engine", "Podman"), *differences.values()]


def _fields(struct: type[msgspec.Struct]) -> Rows:
    """The parameters of a route of the runner face, from the struct that decodes them."""
    _, schemas = msgspec.json.schema_components([struct])

    def rows(name: str, before: str) -> Rows:
        schema = schemas[name]
        found: Rows = []
        for field, kind in schema["properties"].items():
            required = field in schema.get("required", ())
            default = _code(str(kind["default"]).lower()) if "default" in kind and "$ref" not in kind else ""
            found.append((_code(before + field), _kind(kind), "required" if required else default))
            if "$ref" in kind:
                found += rows(kind["$ref"].rpartition("/")[2], f"{before}{field}.")
        return found

    return [("field", "type", "default", "meaning"), *rows(struct.__name__, "")]


def _kind(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    kind = schema.get("type", "object")
    if kind == "integer":
        bounds = {"minimum": "≥", "exclusiveMinimum": ">"}
        return " ".join(["integer", *(f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema)])
    if kind == "array":
        return f"list of {_kind(schema['items'])}s"
    if kind == "object" and schema.get("additionalProperties", {}).get("type") == "string":
        return "object of strings"
    return "base64" if schema.get("contentEncoding") == "base64" else str(kind)


TABLES: Mapping[str, Callable[[], Rows]] = {
    "operations": _operations,
    "routes": _routes,
    "errors": _errors,
    "settings": _settings,
    "presets": _presets,
    "rules": _rules,
    "metrics": _metrics,
    "alerts": _alerts,
    "sdks": _sdks,
    "engines": _engines,
    **{
        operation_id(path): functools.partial(
            _fields, workloads.Interactive if path == workloads.INTERACTIVE else struct
        )
        for _, path, struct, _, _ in workloads.ROUTES
    },
}


def anchor(heading: str) -> str:
    """What GitHub makes of a heading, to link to."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def cells(line: str) -> Row:
    """The cells of a line of a table."""
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def written(rows: Sequence[Row], present: str) -> str:
    """A table as Markdown; cells that the rows lack are those of the present one."""
    head, *body = rows
    kept = {cells(line)[0]: cells(line) for line in present.splitlines()[2:]}
    whole = [row + kept.get(row[0], ("",) * len(head))[len(row) : len(head)] for row in body]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *whole])


def rewritten(text: str) -> str:
    """A document with its tables, and its lines on error codes, as the code has them."""

    def table(found: re.Match[str]) -> str:
        begin, name, present, end = found.groups()
        return f"{begin}{written(TABLES[name](), present)}\n{end}" if name in TABLES else found[0]

    def line(found: re.Match[str]) -> str:
        code = errors.CODES.get(found[2])
        if code is None:
            return found[0]
        retryable = "retryable" if code.retryable else "not retryable"
        return f"{found[1]}*{code.status or 'The status of the engine'}, {retryable}.* {code.meaning}"

    text = re.sub(r"(<!-- (\w+):[^>]*-->\n)(.*?)(<!-- /\2 -->)", table, text, flags=re.DOTALL)
    return re.sub(r"(^### `(\w+)`\n\n)[^\n]*", line, text, flags=re.MULTILINE)


def main() -> None:
    """Write the documents."""
    for path in DOCUMENTS:
        before = path.read_text()
        after = rewritten(before)
        if after != before:
            path.write_text(after)
            print(f"written: {path.relative_to(CHECKOUT)}")


if __name__ == "__main__":
    main()
