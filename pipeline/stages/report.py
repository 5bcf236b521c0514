"""Stage report: the paper's tables and figures with ours beside them, from the stages' files alone.

Writes ``results/report/``: ``index.html`` (one self-contained page), ``results.md``, ``results.json`` and the
figures that the Markdown shows. A stage without results is a line that says so and why. In MLflow the report belongs to
the run of the whole pipeline, beside the headline numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from pipeline import figures, page, tracking
from pipeline.data.manifest import checksum
from pipeline.machine import Machine
from pipeline.paper import TABLES
from pipeline.results import Line, Results, data_statement, lines, read
from pipeline.sections import sections

ROOT = Path("results")
OUT = ROOT / "report"
TITLE = "Multiscale Deep Equilibrium Models: the paper's numbers and ours"
LEAD = (
    "Bai, Koltun and Kolter, NeurIPS 2020, rebuilt end to end. Every number of ours is read from a file that a stage "
    "of the pipeline wrote."
)


def run(machine: Machine) -> None:
    """Write the report of what lies below ``results``."""
    results = read(ROOT)
    tables = {table.number: lines(results, table) for table in TABLES}
    notice = _notice(results, [line for found in tables.values() for line in found])
    parts = sections(results, tables, machine.describe())
    for section in parts:
        for part in section.parts:
            if isinstance(part, figures.Drawn):
                figures.save(part.figure, OUT / "figures" / f"{part.name}.svg")
    record = _record(results, tables)
    written = {
        "index.html": page.document(TITLE, LEAD, notice, parts),
        "results.md": "\n".join(page.markdown(TITLE, notice, parts)).rstrip() + "\n",
        "results.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    OUT.mkdir(parents=True, exist_ok=True)
    with tracking.start("report", None, None, machine) as tracker:
        tracker.tag("mark", checksum(written["results.json"].encode()))  # as sync reckons it
        for name, content in written.items():
            (OUT / name).write_text(content, encoding="utf-8")
            tracker.artifact(OUT / name)
        for drawn in sorted((OUT / "figures").glob("*.svg")):
            tracker.artifact(drawn, "figures")
        tracker.metrics(record["headline"], step=0)


def _notice(results: Results, every: list[Line]) -> list[str]:
    measured = [line for line in every if line.status == "measured"]
    comparable = sum(line.comparable for line in measured)
    notice = [
        f"{len(measured)} systems were measured here, {comparable} of them on the paper's data; "
        f"{sum(line.status == 'not run' for line in every)} more were not run."
    ]
    if comparable < len(measured):
        notice.append(
            "Numbers on generated data, or on a part of the data, show that the pipeline works. They cannot be "
            "compared with the paper's, even where they stand beside them."
        )
    return notice + results.problems


def show() -> None:
    """Print the results tables of the last report, and where to look further."""
    console = Console()
    record = json.loads((OUT / "results.json").read_text(encoding="utf-8"))
    for table in record["tables"]:
        console.print(_grid(table))
    benchmark = record["figures"]["4b"]
    for name, entry in benchmark.get("models", {}).items():
        relative = entry["relative"]
        words = f"time {relative['time']:.2f}, memory {relative['memory']:.2f}"
        console.print(f"{name}: {words} of {benchmark['reference']}", highlight=False)
    console.print(f"\nReport: {(OUT / 'index.html').resolve()}", soft_wrap=True, highlight=False)
    console.print(f"Tables: {(OUT / 'results.md').resolve()}", soft_wrap=True, highlight=False)
    console.print("Runs:   make ui", highlight=False)


def _grid(table: dict[str, Any]) -> Grid:
    """A table of results.json for the terminal, without the systems that are not rebuilt here."""
    grid = Grid(title=f"Table {table['number']}: {table['title']}", title_justify="left", title_style="bold")
    grid.add_column("system")
    grid.add_column("paper", justify="right", no_wrap=True)
    grid.add_column("ours", justify="right", no_wrap=True)
    grid.add_column("where it ran")
    for row in table["rows"]:
        if row["status"] == "paper only":
            continue
        measured = row["status"] == "measured"
        where = f"{row['data']}; {row['device']}; seed {row['seeds']}" if measured else "not run here"
        cells = row["system"], " / ".join(row["paper"]), " / ".join(row["ours"]), where
        grid.add_row(*cells, style="" if measured else "dim")
    return grid


def _record(results: Results, tables: dict[int, list[Line]]) -> dict[str, Any]:
    found = {f"{dataset}/{model}": facts for (dataset, model), facts in results.evaluation.items()}
    headline = {name: facts.get("eval/top1", facts.get("eval/miou")) for name, facts in found.items()}
    return {
        "headline": {name: round(value, 2) for name, value in tracking.finite(headline).items()},
        "tables": [
            {
                "number": table.number,
                "title": table.title,
                "section": table.section,
                "measures": [heading for heading, _ in table.measures],
                "rows": [_row(line) for line in tables[table.number]],
            }
            for table in TABLES
        ],
        "figures": {"4b": results.runtime or {}, "5": results.convergence},
        "solver": {
            name: {key: value for key, value in facts.items() if key.startswith("solver/")}
            for name, facts in found.items()
        },
        "data": {dataset: data_statement(results, dataset, {})[0] for dataset in results.data},
        "problems": results.problems,
    }


def _row(line: Line) -> dict[str, Any]:
    kept = ("status", "comparable", "device", "seeds", "scale", "commit", "run")
    return {
        "system": line.row.system,
        "size": line.row.size,
        "size_ours": line.size,
        "group": line.row.group,
        "paper": [value for value in line.paper if value],
        "ours": [value for value in line.ours if value],
        "data": line.note if line.status == "measured" else "",
        "reason": "" if line.status == "measured" else line.note,
        **{name: getattr(line, name) for name in kept},
    }
