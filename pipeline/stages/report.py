"""Stage report: the paper's tables, figures and claims with ours beside them.

Writes results/report/: report.md, index.html (the same as one page), results.json, figures/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from pipeline import figures, files, tracking
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.report import comparison, pages, results
from pipeline.report.results import Results
from pipeline.sets import SETS

ROOT = Path("results")
OUT = ROOT / "report"
BEGIN, END = "<!-- results, written by `make readme` -->", "<!-- /results -->"


def run(machine: Machine) -> None:
    """Writes the report of what lies below results/; raises UserError if that is impossible."""
    found = results.read(ROOT)
    draw(found, OUT / "figures")
    record = comparison.build(found)
    text = pages.markdown(record, machine.describe(), OUT)
    with tracking.start("report", None, None, machine, OUT / tracking.NAME) as run:
        files.write_text(OUT / "report.md", text)
        files.write_text(OUT / "index.html", pages.page(text, OUT))
        files.write_json(OUT / "results.json", record)
        for name in ("report.md", "index.html", "results.json"):
            run.artifact(OUT / name)
        for table in record["tables"]:
            values = {f"{table['stage']}/{row['model']}": row["value"] for row in table["rows"]}
            run.metrics(values, 0)


def draw(found: Results, folder: Path) -> None:
    """Makes the folder of the report's own figures anew, without those of nothing measured."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    histories = found.tables("classify/", "history.csv")
    histories = {k: table for k, table in histories.items() if not k.startswith("ablation-")}
    traces = found.tables("convergence/", "trace.csv")
    traces = {name: traces[name] for name in SETS if name in traces}
    if histories:
        figures.save(figures.figure4a(histories), folder / "figure4a.svg")
        figures.save(figures.accuracy_by_core_hours(histories), folder / "hours.svg")
    if traces:
        figures.save(figures.figure5(traces), folder / "figure5.svg")
    steps = found.tables("evaluate/", "by_steps.csv")
    if steps:
        figures.save(figures.accuracy_by_evaluations(steps), folder / "evaluations.svg")


def show(into: Path | None = None) -> None:
    """Prints what the last report measured and where it lies.

    With `into`, a Markdown file, the table goes between its marks BEGIN and END instead. Raises
    UserError if there is no report, or the file lacks the marks.
    """
    cure = "run `make repro` or `python -m pipeline report`"
    table = pages.readme_table(files.read_json(OUT / "results.json", cure))
    if into is None:
        Console().print(Markdown(table))
        print(*((OUT / name).resolve() for name in ("index.html", "report.md")), sep="\n")
        return
    head, begin, rest = into.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{into}: no place for the table; write the lines {BEGIN} and {END}")
    files.write_text(into, f"{head}{BEGIN}\n{table}{END}{tail}")
