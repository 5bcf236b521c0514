"""The report's parts, and how they are set: one self-contained HTML page (no scripts, no network), and Markdown.

Words may hold `code`, **strong**, [links](#anchor) and, after a line's end, what is said more softly.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.figures import Drawn, inline_svg

LARGE = 250_000
"""Bytes above which a picture is stored in the page as WebP."""
COLOURS = {"other data": "amber", "the paper's data": "green"}
"""Of the tags that are not grey."""


@dataclass(frozen=True)
class Row:
    """Cells of a table, of which a single one spans it; ``tag`` stands before the last, ``anchor`` is linked to."""

    cells: Sequence[str]
    tag: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table; ``numbers`` are the columns set to the right."""

    headings: Sequence[str]
    rows: Sequence[Row]
    numbers: Sequence[int]


@dataclass(frozen=True)
class Picture:
    """A picture's file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Folded:
    """A part behind a line that opens it."""

    title: str
    part: Part


Part = str | Sheet | Drawn | Picture | Folded


@dataclass(frozen=True)
class Section:
    """A card of the page; ``short`` names it among the links, ``lead`` is the sentence below its title."""

    anchor: str
    short: str
    title: str
    parts: Sequence[Part]
    lead: str = ""


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f6f7f9; --ink: #1b1f23; --soft: #59626e; --line: #dfe3e8;
  --tint: #f1f5fa; --blue: #1f66b3; --amber: #8a5a00; --amber-tint: #fdf3dc; --green: #1d7a58; --green-tint: #e4f5ee; }
@media (prefers-color-scheme: dark) { :root { --paper: #171b21; --page: #0f1216; --ink: #e6e9ed; --soft: #9aa4b1;
  --line: #2c333d; --tint: #1d242d; --blue: #7ab5f2; --amber: #f0c66b; --amber-tint: #33290f; --green: #6fd3ae;
  --green-tint: #12302a; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.015em; text-wrap: balance; }
h2 { font-size: 21px; margin: 0 0 4px; letter-spacing: -0.005em; }
p { margin: 6px 0 12px; max-width: 76ch; }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: 2px; }
td a { color: inherit; text-decoration-color: var(--line); } td a:hover, tr:target { color: var(--blue); }
tr:target { background: var(--tint); }
.soft, figcaption, th, .not-run td, .paper-only td { color: var(--soft); }
.small, figcaption, th, .where { font-size: 13.5px; line-height: 1.45; } .small { font-weight: 400; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 14px 0 24px; font-size: 14.5px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: 24px; margin: 0 0 20px; }
.notice { background: var(--amber-tint); border-left: 4px solid var(--amber); border-radius: 6px; padding: 12px 16px;
  margin: 0 0 20px; }
.notice p { margin: 0; max-width: none; } .notice p + p { margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; overflow-wrap: break-word; } tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; } th.number { white-space: normal; }
.group td { font-weight: 600; padding-top: 16px; font-size: 13.5px; }
.ours td { background: var(--tint); } .ours td:first-child { padding-left: 10px; font-weight: 650; }
.not-run td:first-child { color: var(--ink); } .where { min-width: 250px; }
.tag { border-radius: 999px; padding: 1px 9px; font-size: 12px; font-weight: 600; white-space: nowrap;
  background: var(--tint); color: var(--soft); }
.amber { background: var(--amber-tint); color: var(--amber); }
.green { background: var(--green-tint); color: var(--green); }
figure { margin: 14px 0 18px; } figcaption { margin-top: 6px; max-width: 80ch; }
figure svg { display: block; width: 100%; height: auto; max-width: var(--wide); min-width: min(var(--wide), 560px); }
figure img { display: block; max-width: 100%; border-radius: 8px; border: 1px solid var(--line); background: #fff; }
details { border-top: 1px solid var(--line); padding: 10px 0 0; margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; padding: 4px 0; }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint); padding: 1px 5px;
  border-radius: 4px; overflow-wrap: anywhere; }
@media (max-width: 680px) {
  main { padding: 22px 12px 50px; } section { padding: 16px 14px; border-radius: 10px; } h1 { font-size: 25px; }
  figure img { max-width: none; width: max(100%, 560px); }
  thead { display: none; } table, tbody { display: block; }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px 12px; padding: 10px 8px;
    border-bottom: 1px solid var(--line); }
  td, td.number { border: 0; padding: 0; text-align: left; min-width: 0; white-space: normal; }
  td:empty { display: none; }
  td:first-child, .where, .group td { grid-column: 1 / -1; } td:first-child { font-weight: 600; padding: 0 !important; }
  .ours { background: var(--tint); border-radius: 8px; } .ours td { background: none; }
  td.number[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12px; }
}
@media print { body { background: #fff; }
  section { break-inside: avoid; border: 0; padding: 0; } nav { display: none; } }
"""


def document(title: str, lead: str, notice: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page; ``notice`` is read first."""
    links = "".join(f'<a href="#{section.anchor}">{inline(section.short)}</a>' for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{inline(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{inline(title)}</h1>\n<p class="soft">{inline(lead)}</p>\n<nav>{links}</nav>\n'
        f'<div class="notice">{"".join(f"<p>{inline(line)}</p>" for line in notice)}</div>\n'
        + "\n".join(_section(section) for section in sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def inline(text: str) -> str:
    """Words as HTML."""
    words, *more = html.escape(text).split("\n")
    words += "".join(f'<br><span class="soft small">{line}</span>' for line in more)
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", words)
    words = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", words)
    return re.sub(r"\[([^]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', words)


def _section(section: Section) -> str:
    lead = f'<p class="soft">{inline(section.lead)}</p>\n' if section.lead else ""
    parts = "\n".join(_part(part) for part in section.parts)
    return f'<section id="{section.anchor}">\n<h2>{inline(section.title)}</h2>\n{lead}{parts}\n</section>'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{inline(part)}</p>"
    if isinstance(part, Sheet):
        return _table(part)
    if isinstance(part, Drawn):
        return _figure(inline_svg(part.figure, part.name), part.caption, part.width)
    if isinstance(part, Picture):
        return _figure(_image(part.path, part.caption), part.caption, 1080)
    return f"<details><summary>{inline(part.title)}</summary>{_part(part.part)}</details>"


def _table(sheet: Sheet) -> str:
    """A table that becomes a list of cards on a phone."""
    last = len(sheet.headings) - 1

    def cell(text: str, column: int) -> str:
        kind = "number" if column in sheet.numbers else "where" if column == last else ""
        label = f' data-label="{html.escape(sheet.headings[column])}"' if text and kind == "number" else ""
        return f"<td{kind and f' class={kind}'}{label}>{text}</td>"

    rows = []
    for row in sheet.rows:
        kind = "ours" if row.tag in COLOURS else row.tag.replace(" ", "-")
        attributes = (kind and f' class="{kind}"') + (row.anchor and f' id="{row.anchor}"')
        cells = [inline(text) for text in row.cells]
        if len(cells) == 1:
            rows.append(f'<tr class="group"><td colspan="{last + 1}">{cells[0]}</td></tr>')
            continue
        if row.tag:
            cells[-1] = f'<span class="tag {COLOURS.get(row.tag, "")}">{inline(row.tag)}</span> {cells[-1]}'
        rows.append(f"<tr{attributes}>{''.join(cell(text, i) for i, text in enumerate(cells))}</tr>")
    head = (f"<th{' class=number' * (i in sheet.numbers)}>{inline(h)}</th>" for i, h in enumerate(sheet.headings))
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _figure(content: str, caption: str, width: int) -> str:
    words = f"<figcaption>{inline(caption)}</figcaption>"
    return f'<figure style="--wide: {width}px"><div class="scroll" tabindex="0">{content}</div>{words}</figure>'


def _image(path: Path, words: str) -> str:
    """A picture as a data URI; a large one as WebP."""
    content, kind = path.read_bytes(), "svg+xml" if path.suffix == ".svg" else "png"
    if kind == "png" and len(content) > LARGE:
        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "WEBP", quality=88, method=4)
        content, kind = buffer.getvalue(), "webp"
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/{kind};base64,{data}">'


def markdown(title: str, notice: Sequence[str], sections: Sequence[Section]) -> Iterator[str]:
    """The lines of the tables and figures in Markdown; figures lie in ``figures/``."""
    yield from (f"# {title}", "", *(f"- {line}" for line in notice), "")
    for section in sections:
        yield from (f"## {section.title}", "", *([_plain(section.lead), ""] if section.lead else []))
        for part in section.parts:
            if isinstance(part, str):
                yield from (_plain(part), "")
            elif isinstance(part, Drawn):
                yield from (f"![{part.name}](figures/{part.name}.svg)", "", _plain(part.caption), "")
            elif isinstance(part, Sheet):
                yield "| " + " | ".join(part.headings) + " |"
                yield "|" + "".join("---:|" if i in part.numbers else "---|" for i in range(len(part.headings)))
                for row in part.rows:
                    *cells, last = map(_plain, row.cells)
                    yield "| " + " | ".join([*cells, f"{row.tag}: {last}" if row.tag else last]) + " |"
                yield ""


def _plain(words: str) -> str:
    words = re.sub(r"\[([^]]+)\]\(#[\w-]+\)", r"\1", words).replace("\n", "; ").replace("|", r"\|")
    return re.sub(r"(?<!\*)\*(?!\*)", r"\*", words)
