"""The report as Markdown, from one template, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from pipeline.errors import UserError, escaped
from pipeline.report.comparison import Record

TEMPLATE, STYLE = "report.md.j2", "style.css"
TITLE = "Multiscale Deep Equilibrium Models: the paper's numbers and ours"
KINDS = {".png": "png", ".svg": "svg+xml"}


def markdown(record: Record, machine: dict[str, Any], folder: Path) -> str:
    """The report's text.

    Args:
        record: From `build`.
        machine: The machine and versions that make the report.
        folder: Where the report goes; pictures are looked for in it and in the folders beside it.
    """

    def picture(alt: str, path: str) -> str:
        return Markup(f"![{plain(alt)}]({quote(path)})") if (folder / path).is_file() else ""

    def pictures(pattern: str) -> str:
        paths = [path.relative_to(folder.parent) for path in sorted(folder.parent.glob(pattern))]
        return Markup("\n\n").join(picture(path.parent.as_posix(), f"../{path}") for path in paths)

    known = {
        "title": TITLE,
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "picture": picture,
        "pictures": pictures,
    }
    text = _environment().get_template(TEMPLATE).render(record | known)
    return re.sub(r"\n{3,}", "\n\n", text)


def readme_table(record: Record) -> str:
    """The report's first table and where it was measured, from the record in results.json.

    Raises:
        UserError: The record is damaged, or another version's.
    """
    template = _environment().get_template(TEMPLATE)
    try:
        text = "".join(template.blocks["measured"](template.new_context(record)))
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        cure = "run `python -m pipeline report`"
        raise UserError(f"results.json: not this version's record ({error}); {cure}") from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page(text: str, folder: Path) -> str:
    """Markdown as one HTML page; the pictures that it names relative to `folder` are inside."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    renderer: Any = parser.renderer

    def image(tokens: list[Any], index: int, *_: Any) -> str:
        path = folder / unquote(str(tokens[index].attrs["src"]))
        data = base64.b64encode(path.read_bytes()).decode()
        alt = html.escape(renderer.renderInlineAsText(tokens[index].children, {}, {}))
        return f'<img alt="{alt}" src="data:image/{KINDS[path.suffix]};base64,{data}">'

    renderer.rules["image"] = image
    renderer.rules["table_open"] = lambda *_: '<div class="scroll" tabindex="0"><table>\n'
    renderer.rules["table_close"] = lambda *_: "</table></div>\n"
    tokens = parser.parse(text)
    links = []
    for opening, words in zip(tokens, tokens[1:], strict=False):
        if opening.tag == "h2" and opening.nesting == 1:
            short = words.content.partition(":")[0]
            opening.attrSet("id", f"section-{len(links)}")
            links.append(f'<a href="#section-{len(links)}">{html.escape(short)}</a>')
    body = renderer.render(tokens, parser.options, {})
    style = Path(__file__).with_name(STYLE).read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(TITLE)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<nav>{' '.join(links)}</nav>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def plain(value: object) -> str:
    """Text that Markdown and HTML read as nothing else; one line of characters that print."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", escaped(" ".join(str(value).split())))


def _environment() -> jinja2.Environment:
    """Whatever a template prints is plain text, unless it is marked as safe."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(plain(value)),
    )
    environment.filters["code"] = lambda text: Markup(f"<code>{plain(text)}</code>")
    return environment
