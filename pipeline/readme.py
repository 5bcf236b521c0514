"""The results table in README.md: what the last report measured, beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.manifest import DataError
from pipeline.paper import FIGURE_4B_RELATIVE

BEGIN, END = "<!-- results, written by `make readme` -->", "<!-- /results -->"


def write(record: Path, file: Path) -> None:
    """Put the table of the report's results.json, `record`, between the marks of a Markdown file.

    Raises:
        DataError: if the marks are not there.
    """
    head, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{file}: has no place for the results; write the lines {BEGIN} and {END}")
    table = "\n".join(lines(json.loads(record.read_text(encoding="utf-8"))))
    file.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The table, and where it was measured."""
    measured = [(table, row) for table in record["tables"] for row in table["rows"] if row["status"] == "measured"]
    runtime = record["figures"]["4b"]
    yield "| | | paper | here | trained on |"
    yield "|---|---|---:|---:|---|"
    for table, row in measured:
        measures, paper, ours = (" / ".join(values) for values in (table["measures"], row["paper"], row["ours"]))
        where = f"{row['data']}, {row['scale'].partition(';')[0]}"
        yield f"| Table {table['number']} | {row['system']}: {measures} | {paper or '–'} | {ours} | {where} |"
    for name, entry in runtime.get("models", {}).items():
        if name != runtime["reference"]:
            paper = " / ".join(FIGURE_4B_RELATIVE.get(name, {}).values()) or "–"
            ours = f"{entry['relative']['time']:.2f} / {entry['relative']['memory']:.2f}"
            yield f"| Figure 4b | {name}: time / memory of a step | {paper} | {ours} | of {runtime['reference']}'s |"
    device, commit, seeds = ("; ".join(sorted({row[k] for _, row in measured})) for k in ("device", "commit", "seeds"))
    yield ""
    yield f"Device: {device}. Commit: {commit}. Seeds: {seeds}."
