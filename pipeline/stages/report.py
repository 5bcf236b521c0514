"""Stage report: the paper's tables and figures with ours beside them, from the stages' files alone.

Writes ``results/report/``: ``index.html`` (one self-contained page), ``results.md``, ``results.json`` and the
figures that the Markdown shows. A stage without results is a line that says so and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from pipeline import figures, sections
from pipeline.figures import Drawn
from pipeline.machine import Machine
from pipeline.paper import (
    ABLATED,
    FIGURE_4A,
    FIGURE_4B_RELATIVE,
    FIGURE_5,
    FIGURE_5_SCALES,
    FIGURE_5_TRAINING,
    TABLES,
    Table,
)
from pipeline.results import NAMES, TRAINED_BY, Line, Results, ablations, data_statement, lines, read

ROOT = Path("results")
OUT = ROOT / "report"


def run(machine: Machine) -> None:
    """Write the report of what lies below ``results``."""
    results = read(ROOT)
    drawn = {table.number: lines(results, table) for table in TABLES}
    pictures = {picture.name: picture for picture in _pictures(results)}
    OUT.mkdir(parents=True, exist_ok=True)
    for picture in pictures.values():
        figures.save(picture.figure, OUT / "figures" / f"{picture.name}.png")
    written = {
        "index.html": sections.document(results, drawn, pictures, machine.describe()),
        "results.md": "\n".join(_markdown(results, drawn, pictures)).rstrip() + "\n",
        "results.json": json.dumps(_record(results, drawn), indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in written.items():
        (OUT / name).write_text(content, encoding="utf-8")


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


# ---- figures, drawn from the stages' tables


def _pictures(results: Results) -> Iterator[Drawn]:
    curves = {model: table for (stage, model), table in results.history.items() if stage == "classify"}
    for number, (title, varied) in enumerate(ablations(results).items(), 1):
        own = {line.row.system: curves[line.row.system] for line in varied if line.row.system in curves}
        for name in own.keys() - {ABLATED}:
            del curves[name]
        yield Drawn(f"ablation-{number}", figures.accuracy_by_epoch(own, "eval/top1", "test accuracy, %"), f"{title}.")
    if curves:
        data = data_statement(results, "cifar10", {})[0]
        caption = f"{FIGURE_4A}. Ours, on {data}; lines are means over the seeds, bands one standard deviation."
        yield Drawn("figure4a", figures.accuracy_by_epoch(curves, "eval/top1", "test accuracy, %"), caption)
    runtime = results.runtime
    if runtime:
        relative = {name: entry["relative"] for name, entry in runtime["models"].items()}
        caption = (
            f"Figure 4b: time and memory of a training step relative to {runtime['reference']} (Sec. 4.4). "
            f"Batch {runtime['batch']}, {runtime['device']}, medians of {runtime['rounds']} rounds in turn; "
            f"memory: {runtime['memory']}. Lower is better."
        )
        yield Drawn("figure4b", figures.figure4b(relative, runtime["reference"], "memory"), caption)
    if results.traces:
        traces = {NAMES[name]: trace for name, trace in results.traces.items()}
        data = "; ".join(f"{NAMES[name]}: {data_statement(results, name, {})[0]}" for name in results.traces)
        yield Drawn("figure5", figures.figure5(traces), f"{FIGURE_5}. With it the residual. Ours: {data}.")
        by_scale = {name: trace for name, trace in traces.items() if "residual_1" in trace}
        if by_scale:
            yield Drawn("figure5-scales", figures.figure5_scales(by_scale), f"{FIGURE_5_SCALES}. Ours: {data}.")
    trained = {
        f"{found['model']}, {NAMES[name]}": results.history[TRAINED_BY[name], found["model"]]
        for name, found in results.convergence.items()
        if (TRAINED_BY[name], found.get("model")) in results.history
    }
    trained = {name: table for name, table in trained.items() if "solver/residual_after_2" in table}
    if trained:
        yield Drawn("figure5-training", figures.figure5_training(trained), f"{FIGURE_5_TRAINING}, by epoch.")
    limited = {f"{m}, {NAMES[d]}": e["by_steps"] for (d, m), e in results.evaluation.items() if "by_steps" in e}
    if limited:
        caption = "Test accuracy with the solver stopped after so many steps, each one evaluation of f."
        yield Drawn("accuracy-by-steps", figures.accuracy_by_steps(limited), caption)
    for (stage, model), table in results.history.items():
        figure = figures.training_curves(table, f"{stage}/{model}")
        yield Drawn(f"curves-{stage}-{model}", figure, f"{stage}/{model}: training loss and validation by epoch.")


# ---- Markdown


def _markdown(results: Results, drawn: dict[int, list[Line]], pictures: dict[str, Drawn]) -> Iterator[str]:
    yield from (f"# {sections.TITLE}", "")
    for table in TABLES:
        yield from (f"## Table {table.number}: {table.title} ({table.section})", "")
        yield from _markdown_table(table, drawn[table.number])
    yield from ("## Figure 4b: a training step relative to the reference (Sec. 4.4)", "")
    yield from _markdown_runtime(results)
    yield from ("## Figure 5: convergence to the equilibrium (Sec. 4.5)", "")
    yield from _markdown_convergence(results)
    for title, varied in ablations(results).items():
        yield from (f"## {title}", "", "| model | accuracy, % | where it ran |", "|---|---:|---|")
        yield from (f"| {line.row.system} | {line.ours[0]} | {line.note}; {line.device} |" for line in varied)
        yield ""
    for name, picture in pictures.items():
        if not name.startswith("curves-"):
            yield from (f"![{name}](figures/{name}.png)", "", picture.caption, "")
    yield from (f"- {problem}" for problem in results.problems)


def _markdown_table(table: Table, rows: Sequence[Line]) -> Iterator[str]:
    measures = " / ".join(heading for heading, _ in table.measures)
    yield f"| system | size | paper: {measures} | ours | where it ran |"
    yield "|---|---|---:|---:|---|"
    for line in rows:
        system = line.row.system + (f" ({line.row.group})" if line.row.group else "")
        where = line.note if line.status == "measured" else f"{line.status}: {line.note}"
        if line.status == "measured":
            where += f"; {line.device}; seed {line.seeds}; {line.scale}; commit {line.commit}".replace("; ;", ";")
        paper, ours = (" / ".join(filter(None, values)) or "–" for values in (line.paper, line.ours))
        size = line.row.size or line.size or "–"
        if line.size and line.size != size:
            size += f" (ours {line.size})"
        yield f"| {system} | {size} | {paper} | {ours} | {where} |".replace("*", r"\*")
    yield ""


def _markdown_runtime(results: Results) -> Iterator[str]:
    runtime = results.runtime
    if runtime is None:
        yield from ("not run here: no results/benchmark/runtime.json (`python -m pipeline benchmark`)", "")
        return
    where = f"{runtime['device']}, batch {runtime['batch']}"
    yield "| model | paper: time | ours: time | paper: memory | ours: memory | where it ran |"
    yield "|---|---:|---:|---:|---:|---|"
    for name, entry in runtime["models"].items():
        paper = FIGURE_4B_RELATIVE.get(name, {})
        pairs = (f"{paper.get(m, '–')} | {entry['relative'][m]:.2f}" for m in ("time", "memory"))
        yield f"| {name} | {' | '.join(pairs)} | {where} |"
    yield ""


def _markdown_convergence(results: Results) -> Iterator[str]:
    yield "| data set | solver | evaluations | residual at the last | where it ran |"
    yield "|---|---|---:|---:|---|"
    for dataset, name in NAMES.items():
        found = results.convergence.get(dataset)
        if found is None:
            yield f"| {name} | – | – | – | not run here (`python -m pipeline convergence {dataset}`) |"
            continue
        where = f"{data_statement(results, dataset, found)[0]}; {found.get('device', 'unknown device')}"
        for solver in sections.solvers_of(found):
            cells = figures.SOLVER_NAMES.get(solver, solver), found.get(f"{solver}/evaluations", "–")
            yield f"| {name} | {cells[0]} | {cells[1]:g} | {found[f'{solver}/residual']:.2g} | {where} |"
    yield ""


# ---- JSON


def _record(results: Results, drawn: dict[int, list[Line]]) -> dict[str, Any]:
    return {
        "tables": [
            {
                "number": table.number,
                "title": table.title,
                "section": table.section,
                "measures": [heading for heading, _ in table.measures],
                "rows": [_row(line) for line in drawn[table.number]],
            }
            for table in TABLES
        ],
        "figures": {"4b": results.runtime or {}, "5": results.convergence},
        "solver": {
            f"{dataset}/{model}": {key: value for key, value in found.items() if key.startswith("solver/")}
            for (dataset, model), found in results.evaluation.items()
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
