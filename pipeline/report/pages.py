"""The report as Markdown, from one template, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from pipeline.errors import UserError, escaped
from pipeline.report.comparison import Record

KINDS = {".png": "png", ".svg": "svg+xml"}


def markdown(record: Record, machine: dict[str, Any], folder: Path) -> str:
    """The report's text: the record from `build`, and the machine and versions that make it.

    It goes into `folder`; pictures are looked for there and in the folders beside it.
    """

    def picture(alt: str, path: str) -> str:
        return Markup(f"![{plain(alt)}]({quote(path)})") if (folder / path).is_file() else ""

    def pictures(pattern: str) -> str:
        paths = [path.relative_to(folder.parent) for path in sorted(folder.parent.glob(pattern))]
        return Markup("\n\n").join(picture(path.parent.as_posix(), f"../{path}") for path in paths)

    template = _environment().get_template("report.md.j2")
    text = template.render(record, machine=machine, picture=picture, pictures=pictures)
    return re.sub(r"\n{3,}", "\n\n", text)


def readme_table(record: Record) -> str:
    """The report's first table and where it was measured, from the record in results.json.

    Raises UserError if the record is damaged, or another version's.
    """
    template = _environment().get_template("report.md.j2")
    try:
        text = "".join(template.blocks["measured"](template.new_context(record)))
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        cure = "run `python -m pipeline report`"
        raise UserError(f"results.json: not this version's record ({error}); {cure}") from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page(text: str, folder: Path) -> str:
    """Markdown as one HTML page; the pictures that it names relative to `folder` are inside."""

    def inside(source: re.Match[str]) -> str:
        path = folder / unquote(source[0])
        data = base64.b64encode(path.read_bytes()).decode()
        return f"data:image/{KINDS[path.suffix]};base64,{data}"

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    body = re.sub(r'(?<=<img src=")[^"]+', inside, body)
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    links = []
    for number, heading in enumerate(re.findall("<h2>(.*?)</h2>", body)):
        section = f"section-{number}"
        body = body.replace(f"<h2>{heading}", f'<h2 id="{section}">{heading}', 1)
        links.append(f'<a href="#{section}">{heading.partition(":")[0]}</a>')
    template = _environment().get_template("page.html.j2")
    return template.render(links=Markup(" ".join(links)), body=Markup(body))


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
