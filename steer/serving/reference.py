"""The page `/docs`: the server's OpenAPI description as one HTML page, without a script and without anything loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["reference_page"]


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""What the page is sent with: it needs its own style and nothing else."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #6e7781; --accent: #0f62a8 }
@media (prefers-color-scheme: dark) { :root { --faint: #9aa4ae; --accent: #79b8f2 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } a { color: var(--accent) }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; overflow-x: auto }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .5rem 1rem }
summary { cursor: pointer } summary b { display: inline-block; min-width: 4.2rem; color: var(--accent) }
summary span { color: var(--faint) }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 }
th { text-align: left; font-weight: 600 }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:first-child { white-space: nowrap } .faint { color: var(--faint) }
"""
_EXAMPLES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "How was your day?"}]},
    "/v1/completions": {"prompt": "My day at the lake"},
}


def reference_page(schema: Mapping[str, Any], base: str, model: str) -> str:
    """HTML of an OpenAPI 3 description: its routes by tag, each with the fields that it takes and its answers.

    `base` is the server's address as the caller sees it, `model` what requests call the model.
    """
    info = schema["info"]
    parts = [
        f"<h1>{escape(info['title'])}</h1>",
        f"<p>{escape(info.get('summary', ''))} Model <code>{escape(model)}</code>; description for programs: "
        '<a href="/openapi.json">openapi.json</a>.</p>',
        f"<pre>{escape(_example(base, model))}</pre>",
    ]
    tagged: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            tagged.setdefault((operation.get("tags") or ["other"])[0], []).append((path, method, operation))
    for tag, operations in tagged.items():
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_operation(schema, *one) for one in operations]
    parts.append("<h2>Objects</h2>")
    parts += [_object(name, found) for name, found in sorted(schema["components"]["schemas"].items())]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(info["title"])}'
    return (
        f'<!doctype html><html lang="en"><head>{head}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )


def _example(base: str, model: str, path: str = "/v1/chat/completions") -> str:
    body = {"model": model, **_EXAMPLES[path], "max_tokens": 40}
    return f"curl {base}{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _operation(schema: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    said = operation.get("description") or operation.get("summary", "")
    bodies = operation.get("requestBody", {}).get("content", {})
    rows = [
        (p["name"], _typed(p.get("schema", {})), f"in the {p['in']}. {p.get('description', '')}")
        for p in operation.get("parameters", [])
    ]
    shown = _table("parameter", rows)
    for kind, body in bodies.items():
        told = body.get("schema", {})
        fields = _table("field", _fields(_resolved(schema, told)))
        shown += f"<p>Body, <code>{escape(kind)}</code>: {_typed(told)}</p>{fields}"
    answers = [
        (status, _typed(next(iter(answer.get("content", {}).values()), {}).get("schema", {})), answer["description"])
        for status, answer in sorted(operation["responses"].items())
    ]
    shown += _table("answer", answers)
    head = f"<b>{escape(method.upper())}</b> <code>{escape(path)}</code> <span>{escape(said)}</span>"
    return f"<details><summary>{head}</summary>{shown}</details>"


def _object(name: str, found: Mapping[str, Any]) -> str:
    said = found.get("description", "").split("\n")[0].replace("`", "")
    head = f"<code>{escape(name)}</code> <span>{escape(said)}</span>"
    return f'<details id="{escape(name)}"><summary>{head}</summary>{_table("field", _fields(found))}</details>'


def _resolved(schema: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference names."""
    name = found.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else found


def _fields(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of every property."""
    needed = found.get("required", [])
    for name, told in found.get("properties", {}).items():
        told = told if isinstance(told, Mapping) else {}
        default = told.get("default")
        notes = ["needed." if name in needed else "", told.get("description", "").replace("`", "")]
        notes.append("" if default is None else f"default: {json.dumps(default)}.")
        yield name, _typed(told), " ".join(filter(None, notes))


_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} characters or more",
    "maxLength": "{} characters at most",
    "minItems": "{} or more",
    "maxItems": "{} at most",
}


def _typed(told: Mapping[str, Any]) -> str:
    """A type with its limits, as HTML; a reference is a link."""
    if "$ref" in told:
        name = escape(told["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    many = told.get("anyOf") or told.get("oneOf")
    if many:
        return " or ".join(dict.fromkeys(_typed(one) for one in many))
    if "const" in told or "enum" in told:
        return ", ".join(f"<code>{escape(json.dumps(v))}</code>" for v in told.get("enum", [told.get("const")]))
    kind = told.get("type", "anything")
    shown = "list of " + _typed(told["items"]) if kind == "array" and "items" in told else escape(str(kind))
    limits = [text.format(told[name]) for name, text in _LIMITS.items() if name in told]
    return shown + (f' <span class="faint">{escape(", ".join(limits))}</span>' if limits else "")


def _table(head: str, rows: Any) -> str:
    body = "".join(
        f"<tr><td><code>{escape(str(name))}</code></td><td>{kind}</td><td>{escape(said)}</td></tr>"
        for name, kind, said in rows
    )
    return f"<table><tr><th>{head}</th><th>type</th><th></th></tr>{body}</table>" if body else ""
