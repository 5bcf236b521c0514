"""Stage report: the paper's tables, figures and claims with ours beside them.

Writes results/report/: report.md, index.html (the same as one page), results.json, figures/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from pipeline import figures, files, report, tracking
from pipeline.errors import UserError
from pipeline.figures import display
from pipeline.machine import Machine
from pipeline.report import Results
from pipeline.sets import BY_STAGE, SETS

ROOT = Path("results")
OUT = ROOT / "report"
BEGIN, END = "<!-- results, written by `make readme` -->", "<!-- /results -->"


def run(machine: Machine) -> None:
    """Writes the report of what lies below results/.

    Raises:
        UserError: It cannot be written.
    """
    results = report.read(ROOT)
    shutil.rmtree(OUT / "figures", ignore_errors=True)
    (OUT / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawings(results).items():
        figures.save(figure, OUT / "figures" / f"{name}.svg")
    record = report.build(results)
    text = report.markdown(record, machine.describe(), OUT)
    with tracking.start("report", None, None, machine, OUT / tracking.NAME) as run:
        files.write_text(OUT / "report.md", text)
        files.write_text(OUT / "index.html", report.page(text, OUT))
        files.write_json(OUT / "results.json", record)
        for name in ("report.md", "index.html", "results.json"):
            run.artifact(OUT / name)
        for table in record["tables"]:
            values = {f"{table['stage']}/{row['model']}": row["value"] for row in table["rows"]}
            run.metrics(values, 0)


def drawings(results: Results) -> dict[str, Figure]:
    """The report's own figures by name; none of what was not measured."""
    own = results.tables("classify/", "history.csv")
    histories, steps = {}, {}
    for stage, dataset in BY_STAGE.items():
        for name, table in results.tables(f"{stage}/", "history.csv").items():
            if table.filter(like="residual_after").size:
                histories[f"{display(name)}, {dataset.title}"] = table
        for name, table in results.tables(f"evaluate/{dataset.name}-", "by_steps.csv").items():
            steps[f"{display(name)}, {dataset.title}"] = table
    traces = results.tables("convergence/", "trace.csv")
    traces = {known.title: traces[name] for name, known in SETS.items() if name in traces}
    plain = {name: table for name, table in own.items() if name not in report.VARIED}
    varied = plain | own if len(plain) < len(own) else {}
    plans = {
        "figure4a": (figures.figure4a, plain),
        "hours": (figures.accuracy_by_core_hours, plain),
        "ablations": (figures.figure4a, varied),
        "figure5": (figures.figure5, traces),
        "scales": (figures.figure5_scales, traces),
        "training": (figures.figure5_training, histories),
        "evaluations": (figures.accuracy_by_evaluations, steps),
    }
    drawn = {name: draw(tables) for name, (draw, tables) in plans.items() if tables}
    found = results.found.get("benchmark")
    if found and found.facts.reference in set(
        found.tables.get("times.csv", {"model": ()})["model"]
    ):
        facts, times = found.facts, found.tables["times.csv"]
        names = times["model"].unique()
        memory = {name: found.metrics.get(f"{name}/memory_bytes", float("nan")) for name in names}
        drawn["figure4b"] = figures.figure4b(times, memory, facts.reference, facts.memory)
    return drawn


def show(into: Path | None = None) -> None:
    """Prints what the last report measured and where it lies; or writes that table into a file.

    Args:
        into: A Markdown file; the table goes between the marks BEGIN and END.

    Raises:
        UserError: There is no report, or the file lacks the marks.
    """
    cure = "run `make repro` or `python -m pipeline report`"
    table = report.readme_table(files.read_json(OUT / "results.json", cure))
    if into is None:
        console = Console()
        console.print(Markdown(table))
        for name in ("index.html", "report.md"):
            console.print(str((OUT / name).resolve()), soft_wrap=True, highlight=False)
        return
    head, begin, rest = into.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{into}: no place for the table; write the lines {BEGIN} and {END}")
    files.write_text(into, f"{head}{BEGIN}\n{table}{END}{tail}")
