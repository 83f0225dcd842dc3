"""The tables of docs/report.md, made from the JSON Schema: what the document must hold to be true."""

from __future__ import annotations

from typing import Any

__all__ = ["tables"]

_SIMPLE = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def tables(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Name of each kind of object → the rows of its table, in the schema's order."""
    kinds = {"the document": schema, **{name: held for name, held in schema["$defs"].items() if "properties" in held}}
    found = {}
    for name, held in kinds.items():
        rows = list(_rows(held, "", schema["$defs"]))
        found[name] = ["| field | | meaning |", "|---|---|---|", *rows]
    return found


def _rows(held: dict[str, Any], prefix: str, defs: dict[str, Any]) -> list[str]:
    rows = []
    for field, part in held["properties"].items():
        rows.append(f"| `{prefix}{field}` | {_kind(part, defs)} | {part['description']} |")
        if "properties" in part:
            rows += _rows(part, f"{prefix}{field}.", defs)
    return rows


def _kind(part: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        held = defs[name]
        return f"[{name}](#{name})" if "properties" in held else _kind(held, defs)
    if "oneOf" in part:
        return " or ".join(_kind(each, defs) for each in part["oneOf"])
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return " or ".join(f"`{each}`" for each in part["enum"])
    if part.get("type") == "array":
        return f"list of {_kind(part['items'], defs)}"
    if part.get("type") == "object":
        inner = part.get("additionalProperties")
        return f"name → {_kind(inner, defs)}" if isinstance(inner, dict) else "object"
    kinds = [part["type"]] if isinstance(part["type"], str) else part["type"]
    return " or ".join("list" if kind == "array" else _SIMPLE[kind] for kind in kinds)
