"""Episodes as a page: turns as a conversation with their rewards, rejected drafts, and the search tree of a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from steer.files import write_text

__all__ = ["draw_episodes", "episodes_html"]

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1b2733;background:#f6f7f9}
body{max-width:860px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1rem;margin:2rem 0 .5rem}
.facts{color:#5b6875}.turn{display:flex;flex-direction:column;gap:.35rem;margin:.35rem 0}
.said{white-space:pre-wrap;overflow-wrap:anywhere;border-radius:8px;padding:.5rem .75rem;max-width:85%}
.user{background:#fff;border:1px solid #d9dee4}.assistant{background:#dcebfa;align-self:flex-end}
.reward{font-size:.85rem;color:#5b6875}.good{color:#176b3a}.bad{color:#a52828}
.rejected{align-self:flex-end;font-size:.85rem;color:#a52828;text-decoration:line-through}
details{border:1px solid #d9dee4;border-radius:8px;background:#fff;padding:.4rem .7rem;margin:.4rem 0}
table{border-collapse:collapse;font-size:.85rem}
td,th{text-align:right;padding:.15rem .6rem;border-bottom:1px solid #e6e9ed}
td:first-child,th:first-child{text-align:left}.chosen{font-weight:600}
.bar{display:inline-block;height:.6rem;background:#5a9bd5;border-radius:2px;vertical-align:middle}
ul{margin:.2rem 0;padding-left:1.2rem}
"""


def episodes_html(
    records: Sequence[Mapping[str, Any]],
    trees: Sequence[Mapping[str, Any]] = (),
    title: str = "Episodes",
    facts: str = "",
) -> str:
    """A page without scripts or outside files, of episodes as `Played` has them."""
    by_row: dict[tuple[int, int], Mapping[str, Any]] = {(t["row"], t["turn"]): t for t in trees}
    parts = [_episode(i, record, by_row) for i, record in enumerate(records)]
    head = f"<h1>{escape(title)}</h1><pre class=facts>{escape(facts)}</pre>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{head}{''.join(parts)}</body></html>\n"
    )


def draw_episodes(path: Path | str, records: Any, trees: Any = (), title: str = "Episodes", facts: str = "") -> None:
    """Write the page."""
    write_text(Path(path), episodes_html(records, trees, title, facts))


def _episode(number: int, record: Mapping[str, Any], trees: Mapping[tuple[int, int], Mapping[str, Any]]) -> str:
    end = record["failure"] or ("ended" if record["done"] else "cut off")
    turns = len(record["actions"])
    count = f"{turns} turn{'s' * (turns != 1)}"
    opening = record["messages"][: len(record["messages"]) - 2 * turns]
    parts = [f"<h2>Episode {number + 1}: return {record['return']:g}, {count}, {escape(str(end))}</h2>"]
    parts += [_said(message) for message in opening]
    for t in range(turns):
        action, seen = record["messages"][len(opening) + 2 * t : len(opening) + 2 * t + 2]
        tree = trees.get((number, t))
        reward, info = record["rewards"][t], record["infos"][t]
        drafts = "".join(f"<div class=rejected>{escape(str(d))}</div>" for d in info.get("rejected", ()))
        tone = "good" if reward > 0 else "bad" if reward < 0 else ""
        note = f"<div class='reward {tone}'>reward {reward:g}{' · not read' if info.get('unparsed') else ''}</div>"
        parts.append(
            f"<div class=turn>{'' if tree is None else _tree(tree)}{drafts}{_said(action)}{note}{_said(seen)}</div>"
        )
    return "".join(parts)


def _said(message: Mapping[str, Any]) -> str:
    role = message["role"] if message["role"] == "assistant" else "user"
    return f"<div class='said {role}'>{escape(str(message['content']))}</div>"


def _tree(tree: Mapping[str, Any]) -> str:
    edges = tree["edges"]
    if not edges:
        return ""
    most = max(edge["visits"] for edge in edges)
    rows = "".join(_edge(edge, most, tree["chosen"]) for edge in edges)
    below = "".join(_below(edge) for edge in edges if edge["outcomes"])
    return (
        f"<details><summary>Search: {sum(e['visits'] for e in edges)} simulations</summary><table>"
        f"<tr><th>action<th>value<th>visits<th></tr>{rows}</table><ul>{below}</ul></details>"
    )


def _edge(edge: Mapping[str, Any], most: int, chosen: str | None) -> str:
    width = round(120 * edge["visits"] / most)
    mark = " class=chosen" if edge["action"] == chosen else ""
    bar = f"<span class=bar style='width:{width}px'></span>"
    return f"<tr{mark}><td>{escape(edge['action'])}<td>{edge['value']:.3f}<td>{edge['visits']}<td>{bar}</tr>"


def _below(edge: Mapping[str, Any]) -> str:
    """What an action led to, and the actions after it."""
    lines = []
    for outcome in edge["outcomes"]:
        after = ", ".join(f"{e['action']} {e['value']:.2f} ({e['visits']})" for e in outcome["edges"])
        seen = escape(str(outcome["observation"]))
        lines.append(f"<li>{outcome['count']}x, reward {outcome['reward']:g}: {seen}<br>{escape(after)}</li>")
    return f"<li>{escape(edge['action'])}<ul>{''.join(lines)}</ul></li>"
