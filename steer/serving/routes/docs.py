"""The page `/docs`: the server's routes and their fields, made from its own OpenAPI description.

One page of plain HTML, with nothing loaded from elsewhere and no script, so that it works on a machine without a
network and needs no exception from a content policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

__all__ = ["rendered", "router"]

_STYLE = """
:root { color-scheme: light dark; --faint: #59636e; --line: #d1d9e0; --code: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --faint: #9198a1; --line: #3d444d; --code: #212830; --link: #79c0ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
code, pre { font: .9em ui-monospace, monospace; background: var(--code); border-radius: 4px; padding: .1em .3em; }
pre { padding: .8rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
td code { white-space: nowrap; }
.scroll { overflow-x: auto; }
.faint { color: var(--faint); }
a { color: var(--link); }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def router() -> APIRouter:
    """The page, which the description of the routes leaves out."""
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(rendered(request.app.openapi()), headers={"Content-Security-Policy": _POLICY})

    return routes


def rendered(described: Mapping[str, Any]) -> str:
    """An OpenAPI description as a page for people."""
    title = escape(described["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: routes</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{_prose(described['info'].get('summary', ''))} For programs: "
        '<a href="/openapi.json">openapi.json</a>. With a key, send <code>Authorization: Bearer KEY</code>.</p>'
        f"{''.join(_routes(described))}<h2>What they carry</h2>{''.join(_schemas(described))}</body></html>\n"
    )


def _routes(described: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Routes</h2>"
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            yield f"<h3><code>{escape(method.upper())} {escape(path)}</code></h3>"
            yield f"<p>{_prose(route.get('description', ''))}</p>"
            body = route.get("requestBody", {}).get("content", {})
            taken = [f"{escape(kind)}: {_kind(content.get('schema', {}))}" for kind, content in body.items()]
            taken += [f"<code>{escape(p['name'])}</code> in the {escape(p['in'])}" for p in route.get("parameters", [])]
            yield "".join(f"<div>takes {text}</div>" for text in taken)
            yield from _answers(route["responses"])


def _answers(responses: Mapping[str, Any]) -> Iterator[str]:
    """What comes back, then what goes wrong in a line."""
    wrong = []
    for code, answer in sorted(responses.items()):
        if code >= "300":
            wrong.append(f"{code} {_prose(answer['description']).rstrip('.')}")
            continue
        for content in _json(answer):
            yield f"<div>answers {code}: {_kind(content['schema'])}</div>"
    if wrong:
        yield f'<div class="faint">errors: {"; ".join(wrong)}</div>'


def _prose(text: str) -> str:
    """A line of text, escaped, with what stands between backticks as code."""
    parts = escape(" ".join(text.split())).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 and i < len(parts) - 1 else part for i, part in enumerate(parts))


def _json(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = answer.get("content", {}).get("application/json")
    return [found] if found and found.get("schema") else []


def _schemas(described: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in described.get("components", {}).get("schemas", {}).items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_prose(schema.get("description", ""))}</p>'
        fields = schema.get("properties")
        if not fields:
            yield f"<p>{_kind(schema)}</p>"
            continue
        needed = schema.get("required", [])
        rows = "".join(
            f"<tr><td><code>{escape(field)}</code></td><td>{_kind(what)}</td><td>{_default(what, field in needed)}</td>"
            f"<td>{_prose(what.get('description', ''))}</td></tr>"
            for field, what in fields.items()
        )
        head = "".join(f'<th scope="col">{text}</th>' for text in ("field", "type", "default", ""))
        yield f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{rows}</table></div>'


def _default(what: Mapping[str, Any], needed: bool) -> str:
    if needed:
        return "needed"
    return f"<code>{escape(str(what['default']))}</code>" if what.get("default") not in (None, "", [], {}) else ""


def _kind(what: Mapping[str, Any]) -> str:
    """A type in words, with a link where it has a table of its own."""
    if "$ref" in what:
        name = escape(what["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf", "allOf"):
        if key in what:
            return " or ".join(dict.fromkeys(_kind(one) for one in what[key] if one.get("type") != "null"))
    if "enum" in what or "const" in what:
        values = what.get("enum", [what.get("const")])
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if what.get("type") == "array":
        return f"list of {_kind(what.get('items', {}))}"
    if what.get("type") == "object" and isinstance(what.get("additionalProperties"), dict):
        return f"names to {_kind(what['additionalProperties'])}"
    return escape(what.get("type", "anything")) + _bounds(what)


def _bounds(what: Mapping[str, Any]) -> str:
    words = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "to",
        "maxLength": "of at most",
    }
    told = [f"{word} {what[key]:g}" for key, word in words.items() if isinstance(what.get(key), int | float)]
    return f" {', '.join(told)}" + (" characters" if "maxLength" in what else "") if told else ""
