"""HTML for the report: one self-contained page, no scripts, no network, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

LARGE = 250_000
"""Bytes above which a picture is stored in the page as WebP."""

_STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --page: #f6f7f9; --ink: #1b1f23; --soft: #59626e; --line: #dfe3e8; --tint: #f1f5fa;
  --blue: #1f66b3; --amber: #8a5a00; --amber-tint: #fdf3dc; --green: #1d7a58; --green-tint: #e4f5ee; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #171b21; --page: #0f1216; --ink: #e6e9ed; --soft: #9aa4b1; --line: #2c333d; --tint: #1d242d;
  --blue: #7ab5f2; --amber: #f0c66b; --amber-tint: #33290f; --green: #6fd3ae; --green-tint: #12302a; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 16px; margin: 24px 0 8px; }
p { margin: 6px 0 12px; max-width: 76ch; }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: 2px; }
.soft { color: var(--soft); } .small { font-size: 13.5px; font-weight: 400; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 14px 0 24px; font-size: 14.5px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin: 0 0 20px; }
.notice { background: var(--amber-tint); color: var(--ink); border-left: 4px solid var(--amber);
  border-radius: 6px;
  padding: 12px 16px; margin: 0 0 20px; }
.notice p { margin: 0; } .notice ul { margin: 6px 0 0; padding-left: 20px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px 20px;
  margin: 0; }
dl.facts dt { color: var(--soft); font-size: 13px; } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; } th.number { text-align: right; white-space: normal; }
tr.group td { font-weight: 600; padding-top: 16px; font-size: 13.5px; }
tr.ours td { background: var(--tint); } tr.ours td:first-child { padding-left: 10px; font-weight: 650; }
tr.quoted td, tr.missing td { color: var(--soft); } tr.missing td:first-child { color: var(--ink); }
td.where { font-size: 13px; line-height: 1.45; min-width: 250px; }
.tag { display: inline-block; border-radius: 999px; padding: 1px 9px; font-size: 12px; font-weight: 600;
  white-space: nowrap; }
.tag.amber { background: var(--amber-tint); color: var(--amber); }
.tag.green { background: var(--green-tint); color: var(--green); }
.tag.grey { background: var(--tint); color: var(--soft); }
figure { margin: 14px 0 18px; } figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px;
  max-width: 80ch; }
figure svg { display: block; width: 100%; height: auto; max-width: var(--wide, 100%); color: var(--ink);
  min-width: min(var(--wide, 0px), 560px); }
figure img { display: block; max-width: 100%; height: auto; border-radius: 8px;
  border: 1px solid var(--line);
  background: #fff; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 0 24px; }
details { border-top: 1px solid var(--line); padding: 10px 0 0; margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; padding: 4px 0; }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint);
  padding: 1px 5px;
  border-radius: 4px; overflow-wrap: anywhere; }
@media (max-width: 680px) {
  main { padding: 22px 12px 50px; } section { padding: 16px 14px; border-radius: 10px; }
    h1 { font-size: 24px; }
  table.stack thead { display: none; } table.stack, table.stack tbody { display: block; }
  table.stack tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px 12px; padding: 10px 8px;
    border-bottom: 1px solid var(--line); }
  table.stack td { display: block; border: 0; padding: 0; text-align: left; min-width: 0;
    white-space: normal; }
  table.stack td:empty { display: none; }
  table.stack td:first-child, table.stack td.where, table.stack tr.group td { grid-column: 1 / -1; }
  table.stack td:first-child { font-weight: 600; padding: 0 !important; }
  table.stack tr.ours { background: var(--tint); border-radius: 8px; }
    table.stack tr.ours td { background: none; }
  table.stack td.where::before { display: none !important; }
  table.stack td[data-label]::before { content: attr(data-label); display: block; color: var(--soft);
    font-size: 12px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; padding: 0; }
  nav { display: none; } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """``text`` safe in HTML; `code` between backticks is set as code."""
    parts = html.escape(str(text)).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def section(anchor: str, title: str, *content: str, lead: str = "") -> str:
    """A card with a heading; ``lead`` is the sentence below it."""
    intro = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{intro}\n' + "\n".join(content) + "\n</section>"


def navigation(entries: Iterable[tuple[str, str]]) -> str:
    """Links to the sections (anchor, title)."""
    return "<nav>" + "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in entries) + "</nav>"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A grid of names and values."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{cells}</dl>'


def notice(text: str, points: Sequence[str] = ()) -> str:
    """A box that is read first."""
    listed = "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>" if points else ""
    return f'<div class="notice"><p>{escape(text)}</p>{listed}</div>'


def tag(text: str, colour: str) -> str:
    """A small label: amber, green or grey."""
    return f'<span class="tag {colour}">{escape(text)}</span>'


def table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numbers: Sequence[int]) -> str:
    """A table that becomes a list of cards on a phone.

    Args:
        headings: One a column.
        rows: (class, cells of HTML); a row of a single cell spans the table.
        numbers: Columns set to the right.
    """
    head = "".join(
        f"<th{' class=number' if column in numbers else ''}>{escape(name)}</th>" for column, name in enumerate(headings)
    )
    body = []
    for kind, cells in rows:
        if len(cells) == 1:
            body.append(f'<tr class="{kind}"><td colspan="{len(headings)}">{cells[0]}</td></tr>')
            continue
        drawn = "".join(_cell(cell, headings, column, numbers) for column, cell in enumerate(cells))
        body.append(f'<tr class="{kind}">{drawn}</tr>')
    return (
        f'<div class="scroll"><table class="stack"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def figure(content: str, caption: str, width: int | None = None) -> str:
    """An SVG or an image with its caption, at most ``width`` pixels wide."""
    style = f' style="--wide: {width}px"' if width else ""
    return f"<figure{style}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def image(path: Path, alternative: str) -> str:
    """A picture as a data URI; a large one as WebP."""
    content, kind = path.read_bytes(), "png"
    if len(content) > LARGE:
        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "WEBP", quality=88, method=4)
        content, kind = buffer.getvalue(), "webp"
    data = base64.b64encode(content).decode()
    words = html.escape(alternative, quote=True)
    return f'<img loading="lazy" alt="{words}" src="data:image/{kind};base64,{data}">'


def folded(title: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _cell(cell: str, headings: Sequence[str], column: int, numbers: Sequence[int]) -> str:
    label = f' data-label="{html.escape(headings[column], quote=True)}"' if column and cell else ""
    kind = "number" if column in numbers else "where" if column == len(headings) - 1 and column else ""
    return f"<td{f' class={kind}' if kind else ''}{label}>{cell}</td>"
