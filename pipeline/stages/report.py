"""Stage report: the paper's tables and figures with ours beside them, from the stages' files alone.

Writes ``results/report/``: ``index.html`` (one self-contained page), ``results.md``, ``results.json`` and the figures
that the Markdown shows. A stage without results is a line that says so and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline import figures, page
from pipeline.paper import FIGURE_4A, FIGURE_4B, FIGURE_4B_RELATIVE, FIGURE_5, TABLES, Table
from pipeline.results import (
    NAMES,
    Facts,
    Line,
    Results,
    data_statement,
    iou_by_class,
    lines,
    read,
    short_commit,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.machine import Machine

ROOT = Path("results")
OUT = ROOT / "report"
TITLE = "Multiscale Deep Equilibrium Models: the paper's numbers and ours"
SOLVER_COLUMNS = (
    ("solver/relative_residual", "residual, mean", "{:.2g}"),
    ("solver/relative_residual_max", "residual, worst", "{:.2g}"),
    ("solver/converged", "converged", "{:.0%}"),
    ("solver/nfe", "evaluations of f", "{:.1f}"),
    ("solver/steps_to_best", "updates to best", "{:.1f}"),
)


def run(machine: Machine) -> None:
    """Write the report of what lies below ``results``."""
    results = read(ROOT)
    drawn = {table.number: lines(results, table) for table in TABLES}
    pictures = _figures(results)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in pictures.items():
        figures.save(figure, OUT / "figures" / f"{name}.png")
    (OUT / "index.html").write_text(_html(results, drawn, pictures, machine), encoding="utf-8")
    (OUT / "results.md").write_text(_markdown(results, drawn, pictures), encoding="utf-8")
    record = json.dumps(_record(results, drawn), indent=2, ensure_ascii=False) + "\n"
    (OUT / "results.json").write_text(record, encoding="utf-8")


def show() -> None:
    """Print the results tables of the last report, and where to look further."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    path = OUT / "results.json"
    if not path.is_file():
        console.print(f"{path}: no report yet; `python -m pipeline report` makes it", soft_wrap=True)
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    for table in record["tables"]:
        grid = Grid(
            title=f"Table {table['number']}: {table['title']}", title_justify="left", title_style="bold"
        )
        for heading in ("system", "paper", "ours"):
            grid.add_column(
                heading, justify="left" if heading == "system" else "right", no_wrap=heading != "system"
            )
        grid.add_column("where it ran")
        for row in table["rows"]:
            if row["status"] == "quoted":
                continue
            style = "" if row["status"] == "measured" else "dim"
            where = row["data"] if row["status"] == "measured" else "not run here"
            if row["status"] == "measured":
                where += f"; {row['device']}; seed {row['seeds']}; commit {row['commit']}"
            grid.add_row(row["system"], " / ".join(row["paper"]), " / ".join(row["ours"]), where, style=style)
        console.print(grid)
    runtime = record["figures"]["4b"].get("models", {})
    for name, entry in runtime.items():
        relative, reference = entry["relative"], record["figures"]["4b"]["reference"]
        console.print(f"{name}: time {relative['time']:.2f}, memory {relative['memory']:.2f} of {reference}")
    console.print(f"\nReport: {(OUT / 'index.html').resolve()}", soft_wrap=True, highlight=False)
    console.print(f"Tables: {(OUT / 'results.md').resolve()}", soft_wrap=True, highlight=False)
    console.print("Runs:   make ui", highlight=False)


# ---- figures, drawn from the stages' tables


def _figures(results: Results) -> dict[str, tuple[Figure, str]]:
    """Figures by file name, each with its caption."""
    drawn: dict[str, tuple[Figure, str]] = {}
    curves = {model: table for (stage, model), table in results.history.items() if stage == "classify"}
    if curves:
        caption = f"{FIGURE_4A}. Ours, on {_plain_data(results, 'cifar10')}; lines are means over the seeds."
        drawn["figure4a"] = figures.accuracy_by_epoch(curves, "eval/top1", "test accuracy, %"), caption
    if results.runtime:
        relative = {name: entry["relative"] for name, entry in results.runtime["models"].items()}
        reference = results.runtime["reference"]
        caption = (
            f"Figure 4b: time and memory of a training step relative to {reference} (Sec. 4.4), batch "
            f"{results.runtime['batch']}, {results.runtime['device']}, medians of {results.runtime['rounds']} "
            f"interleaved rounds; memory is {results.runtime['memory']}. Lower is better."
        )
        drawn["figure4b"] = figures.figure4b(relative, reference, "memory"), caption
    if results.traces:
        named = {NAMES[name]: trace for name, trace in results.traces.items()}
        data = "; ".join(f"{NAMES[name]}: {_plain_data(results, name)}" for name in results.traces)
        drawn["figure5"] = figures.figure5(named), f"{FIGURE_5}. Below it the residual. Ours, on {data}."
    for (stage, model), table in results.history.items():
        caption = f"{stage}/{model}: training loss and validation by epoch."
        drawn[f"curves-{stage}-{model}"] = figures.training_curves(table, f"{stage}/{model}"), caption
    return drawn


def _plain_data(results: Results, dataset: str) -> str:
    return data_statement(results, dataset, {})[0]


# ---- the page


def _html(
    results: Results, drawn: dict[int, list[Line]], pictures: dict[str, tuple[Figure, str]], machine: Machine
) -> str:
    sections = [
        *(
            (f"table{table.number}", f"Table {table.number}", _table_section(table, drawn[table.number]))
            for table in TABLES
        ),
        ("training", "Training", _training_section(pictures)),
        ("figure4b", "Time and memory", _benchmark_section(results, pictures)),
        ("figure5", "Convergence", _convergence_section(results, pictures)),
        ("solver", "Solver at test time", _solver_section(results)),
        ("predictions", "Predictions", _prediction_section(results)),
        ("data", "Data", _data_section(results)),
        ("made", "How it was made", _made_section(results, machine)),
    ]
    body = [
        f"<h1>{page.escape(TITLE)}</h1>",
        '<p class="soft">Bai, Koltun and Kolter, NeurIPS 2020, rebuilt end to end. Every number of ours is read from a '
        "file that a stage of the pipeline wrote.</p>",
        page.navigation((anchor, title) for anchor, title, _ in sections),
        _notice(results, drawn),
    ]
    return page.document(TITLE, body + [content for _, _, content in sections])


def _notice(results: Results, drawn: dict[int, list[Line]]) -> str:
    every = [line for rows in drawn.values() for line in rows]
    measured = [line for line in every if line.status == "measured"]
    comparable = sum(line.comparable for line in measured)
    missing = sum(line.status == "not run" for line in every)
    text = (
        f"{len(measured)} systems were measured here, {comparable} of them on the paper's own data; "
        f"{missing} more of the paper's could be, and were not run."
    )
    points = []
    if comparable < len(measured):
        points.append(
            "Numbers on generated data, or on a part of the data, show that the pipeline works. They cannot be compared "
            "with the paper's, even where they stand beside them."
        )
    return page.notice(text, points + [f"{problem}" for problem in results.problems])


def _table_section(table: Table, rows: Sequence[Line]) -> str:
    backbone = any(line.row.backbone for line in rows)
    headings = ["system", *(["backbone"] if backbone else []), "size"]
    for heading, _ in table.measures:
        headings += [f"paper: {heading}", f"ours: {heading}"]
    headings.append("where ours ran")
    numbers = range(2 + backbone, len(headings) - 1)
    cells: list[tuple[str, list[str]]] = []
    group = ""
    for line in rows:
        if line.row.group != group or not line.row.values:
            heading = line.row.group if line.row.values else "ours, not in the paper's table"
            if heading != group:
                cells.append(("group", [page.escape(heading)]))
            group = heading
        cells.append((_kind(line), _cells(line, backbone)))
    lead = f"{table.section}; {table.note}."
    return page.section(f"table{table.number}", f"Table {table.number}: {table.title}", lead=lead,
                        *[page.table(headings, cells, list(numbers))])  # fmt: skip


def _kind(line: Line) -> str:
    return {"measured": "ours", "quoted": "quoted", "not run": "missing"}[line.status]


def _cells(line: Line, backbone: bool) -> list[str]:
    size = page.escape(line.row.size or "–")
    if line.size and line.size != line.row.size:
        size += f'<br><span class="soft small">ours {line.size}</span>'
    cells = [page.escape(line.row.system), *([page.escape(line.row.backbone)] if backbone else []), size]
    for paper, ours in zip(line.paper, line.ours, strict=True):
        cells += [page.escape(paper or "–"), f"<strong>{page.escape(ours)}</strong>" if ours else ""]
    return [*cells, _where(line)]


def _where(line: Line) -> str:
    if line.status == "quoted":
        return page.tag("quoted", "grey") + " " + page.escape(line.note)
    if line.status == "not run":
        return page.tag("not run", "grey") + " " + page.escape(line.note.removeprefix("not run here: "))
    label = page.tag("the paper's data", "green") if line.comparable else page.tag("other data", "amber")
    run = f" · run {line.run[:8]}" if line.run else ""
    made = f"{line.device} · seed {line.seeds} · commit {line.commit}{run}"
    return f'{label} {page.escape(line.note)}<br><span class="soft">{page.escape(made)}</span>'


def _training_section(pictures: dict[str, tuple[Figure, str]]) -> str:
    content = [_drawn(pictures, name, 700) for name in ("figure4a",) if name in pictures]
    curves = [name for name in pictures if name.startswith("curves-")]
    content += [_drawn(pictures, name, 900) for name in curves]
    if not content:
        content = [_not_run("no training stage has results", "python -m pipeline classify mdeq-small")]
    lead = "Validation is at the equilibrium; dashed lines are the unrolled network of the warm-up."
    return page.section("training", "Training (Figure 4a)", *content, lead=lead)


def _benchmark_section(results: Results, pictures: dict[str, tuple[Figure, str]]) -> str:
    title = "Time and memory of a training step (Figure 4b)"
    stated = page.folded(
        "What Sec. 4.4 states of its figure", page.facts((s.what, f"{s.value:g}") for s in FIGURE_4B)
    )
    if results.runtime is None:
        return page.section("figure4b", title, _not_run("no results/benchmark/runtime.json", "python -m pipeline benchmark"), stated)  # fmt: skip
    rows = []
    for name, entry in results.runtime["models"].items():
        paper = FIGURE_4B_RELATIVE.get(name, {})
        limit = "< " if name == "mdeq" else ""
        cells = [
            page.escape(name),
            _count(entry.get("parameters")),
            f"{entry['seconds']:.3g} s",
            _bytes(entry["memory_bytes"]),
            f"{paper['time']:.1f}" if paper else "–",
            f"<strong>{entry['relative']['time']:.2f}</strong>",
            f"{limit}{paper['memory']:.1f}" if paper else "–",
            f"<strong>{entry['relative']['memory']:.2f}</strong>",
        ]
        rows.append(("", cells))
    headings = [
        "model",
        "parameters",
        "a step",
        "memory",
        "paper: time",
        "ours: time",
        "paper: memory",
        "ours: memory",
    ]
    lead = f"On {results.runtime['device']}, {results.runtime['threads']} threads; the paper: one RTX 2080 Ti, batch 32."
    return page.section(
        "figure4b",
        title,
        _drawn(pictures, "figure4b", 680),
        page.table(headings, rows, range(1, 8)),
        stated,
        lead=lead,
    )


def _convergence_section(results: Results, pictures: dict[str, tuple[Figure, str]]) -> str:
    content = [_drawn(pictures, "figure5", 1000)] if "figure5" in pictures else []
    rows = []
    for dataset in NAMES:
        found = results.convergence.get(dataset)
        if found is None:
            reason = (
                f"`results/convergence/{dataset}` has no results (`python -m pipeline convergence {dataset}`)"
            )
            rows.append(("missing", [page.escape(NAMES[dataset]), "", "", "", "", page.tag("not run", "grey") + " " + page.escape(reason)]))  # fmt: skip
            continue
        for solver in sorted({name.split("/")[0] for name in found if name.endswith("/residual")}):
            rows.append(("", _solver_row(results, dataset, found, solver)))
    headings = ["data set", "solver", "evaluations", "change, last", "residual, last", "where it ran"]
    return page.section(
        "figure5", "Convergence to the equilibrium (Figure 5)", *content, page.table(headings, rows, [2, 3, 4]),
        lead="Mean and standard deviation over random batches of the evaluation split.",
    )  # fmt: skip


def _solver_row(results: Results, dataset: str, found: Facts, solver: str) -> list[str]:
    def with_spread(measure: str) -> str:
        value, spread = found.get(f"{solver}/{measure}"), found.get(f"{solver}/{measure}_std")
        return "–" if value is None else f"{value:.2g} ± {spread or 0:.1g}"

    statement, _ = data_statement(results, dataset, found)
    where = f"{found.get('model', '')}; {statement}; {found.get('batches', '?')} batches of {found.get('batch', '?')}; "
    return [
        page.escape(NAMES[dataset]),
        page.escape(figures.SOLVER_NAMES.get(solver, solver)),
        f"{found.get(f'{solver}/evaluations', float('nan')):.0f}",
        with_spread("change"),
        with_spread("residual"),
        page.escape(where + str(found.get("device", ""))),
    ]


def _solver_section(results: Results) -> str:
    rows = []
    for (dataset, model), found in results.evaluation.items():
        if "solver/nfe" not in found:
            continue
        values = [
            form.format(found[key]) if isinstance(found.get(key), int | float) else "–"
            for key, _, form in SOLVER_COLUMNS
        ]
        failed = found.get("solver/failed", 0)
        where = data_statement(results, dataset, found)[0] + (
            f"; {failed:.0f} samples without a finite iterate" * bool(failed)
        )
        rows.append(("", [page.escape(f"{model} on {NAMES[dataset]}"), *values, page.escape(where)]))
    headings = ["model", *(heading for _, heading, _ in SOLVER_COLUMNS), "data"]
    content = page.table(headings, rows, range(1, 6)) if rows else _not_run("no equilibrium model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")  # fmt: skip
    lead = "How well the equilibria were found on the evaluation split: |f(z) - z| / |f(z)| of each sample."
    return page.section("solver", "The solver at test time", content, lead=lead)


def _prediction_section(results: Results) -> str:
    content = []
    for (dataset, model), found in results.evaluation.items():
        folder = results.root / "evaluate" / f"{dataset}-{model}"
        title = f"{model} on {NAMES[dataset]}"
        content.append(f"<h3>{page.escape(title)}</h3>")
        caption = data_statement(results, dataset, found)[0]
        for name, what in (
            ("examples.png", "predictions beside the truth"),
            ("confusion.png", "confusion matrix"),
        ):
            if not (folder / name).is_file():
                content.append(
                    _not_run(f"{folder / name} is missing", f"python -m pipeline evaluate {dataset} {model}")
                )
                continue
            drawn = page.figure(page.image(folder / name, f"{title}: {what}"), f"{what}; {caption}")
            content.append(page.folded("Confusion matrix", drawn) if name == "confusion.png" else drawn)
        if dataset == "cityscapes" and (dataset, model) in results.confusion:
            content.append(page.folded("IoU of each class", _iou(results.confusion[dataset, model])))
    if not content:
        content = [_not_run("no model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")]
    return page.section("predictions", "Predictions", *content)


def _iou(confusion: pd.DataFrame) -> str:
    scores = iou_by_class(confusion)
    return page.facts(
        (name, "not among the labels" if pd.isna(score) else f"{score:.1f} %")
        for name, score in scores.items()
    )


def _data_section(results: Results) -> str:
    content = []
    for dataset, name in NAMES.items():
        content.append(f"<h3>{page.escape(name)}</h3>")
        sheet = results.root / "data" / dataset / "contact_sheet.png"
        if dataset not in results.data:
            content.append(_not_run("no manifest", f"python -m pipeline prepare {dataset}"))
        else:
            statement = data_statement(results, dataset, {})[0]
            content.append(f"<p>{page.escape(statement)}. Manifest {page.escape(str(results.data[dataset].get('manifest', '?'))[:12])}.</p>")  # fmt: skip
        if sheet.is_file():
            content.append(
                page.figure(page.image(sheet, f"{name}: contact sheet"), "samples of the training split")
            )
    return page.section("data", "Data", *content)


def _made_section(results: Results, machine: Machine) -> str:
    stages = []
    for title, found in _measured(results):
        run = str(found.get("run") or "–")
        stages.append(("", [page.escape(title), page.escape(found.get("device", "?")), page.escape(short_commit(found)), page.escape(run[:8]), _seconds(found.get("time/seconds"))]))  # fmt: skip
    content = [page.facts((name, value) for name, value in machine.describe().items())]
    if stages:
        headings = ["stage", "device", "commit", "run", "time"]
        content += ["<h3>The stages that measured something</h3>", page.table(headings, stages, [4])]
    return page.section(
        "made", "How it was made", *content, lead="The machine and versions that made this page."
    )


def _measured(results: Results) -> Iterator[tuple[str, Facts]]:
    for (stage, model), found in results.training.items():
        yield f"{stage} {model}", found
    for (dataset, model), found in results.evaluation.items():
        yield f"evaluate {dataset} {model}", found
    for dataset, found in results.convergence.items():
        yield f"convergence {dataset}", found
    if results.runtime:
        yield "benchmark", results.runtime


def _drawn(pictures: dict[str, tuple[Figure, str]], name: str, width: int) -> str:
    figure, caption = pictures[name]
    return page.figure(figures.inline_svg(figure, name), caption, width)


def _not_run(reason: str, command: str) -> str:
    return f"<p>{page.tag('not run', 'grey')} {page.escape(f'{reason} (`{command}`)')}</p>"


def _count(parameters: Any) -> str:
    return f"{parameters:,}" if isinstance(parameters, int) else "–"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return (
        f"{value:.1f} s"
        if value < 120
        else f"{value / 60:.0f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
    )


# ---- Markdown and JSON


def _markdown(results: Results, drawn: dict[int, list[Line]], pictures: dict[str, tuple[Figure, str]]) -> str:
    parts = [f"# {TITLE}", ""]
    for table in TABLES:
        parts += [
            f"## Table {table.number}: {table.title} ({table.section})",
            "",
            *_markdown_table(table, drawn[table.number]),
        ]
    parts += [
        "## Figure 4b: a training step relative to the reference (Sec. 4.4)",
        "",
        *_markdown_runtime(results),
    ]
    parts += ["## Figure 5: convergence to the equilibrium (Sec. 4.5)", "", *_markdown_convergence(results)]
    for name in ("figure4a", "figure4b", "figure5"):
        if name in pictures:
            parts += [f"![{name}](figures/{name}.png)", "", pictures[name][1], ""]
    parts += [f"- unreadable: {problem}" for problem in results.problems]
    return "\n".join(parts).rstrip() + "\n"


def _markdown_table(table: Table, rows: Sequence[Line]) -> Iterator[str]:
    measures = " / ".join(heading for heading, _ in table.measures)
    yield f"| system | size | paper: {measures} | ours | where it ran |"
    yield "|---|---|---:|---:|---|"
    for line in rows:
        system = line.row.system + (f" ({line.row.group})" if line.row.group else "")
        where = line.note
        if line.status == "measured":
            where += f"; {line.device}; seed {line.seeds}; commit {line.commit}"
        paper, ours = (" / ".join(filter(None, values)) or "–" for values in (line.paper, line.ours))
        yield f"| {system} | {line.row.size or line.size or '–'} | {paper} | {ours} | {where} |".replace(
            "*", r"\*"
        )
    yield ""


def _markdown_runtime(results: Results) -> Iterator[str]:
    if results.runtime is None:
        yield from ("not run here: no results/benchmark/runtime.json (`python -m pipeline benchmark`)", "")
        return
    where = f"{results.runtime['device']}, batch {results.runtime['batch']}"
    yield "| model | paper: time | ours: time | paper: memory | ours: memory | where it ran |"
    yield "|---|---:|---:|---:|---:|---|"
    for name, entry in results.runtime["models"].items():
        paper = FIGURE_4B_RELATIVE.get(name, {})
        time, memory = paper.get("time", "–"), paper.get("memory", "–")
        limit = "< " if name == "mdeq" else ""
        relative = entry["relative"]
        yield f"| {name} | {time} | {relative['time']:.2f} | {limit}{memory} | {relative['memory']:.2f} | {where} |"
    yield ""


def _markdown_convergence(results: Results) -> Iterator[str]:
    yield "| data set | solver | evaluations | residual at the last | where it ran |"
    yield "|---|---|---:|---:|---|"
    for dataset, name in NAMES.items():
        found = results.convergence.get(dataset)
        if found is None:
            yield f"| {name} | – | – | – | not run here (`python -m pipeline convergence {dataset}`) |"
            continue
        where = f"{data_statement(results, dataset, found)[0]}; {found.get('device', '?')}"
        for solver in sorted({key.split("/")[0] for key in found if key.endswith("/residual")}):
            evaluations, residual = found.get(f"{solver}/evaluations", 0), found[f"{solver}/residual"]
            yield f"| {name} | {figures.SOLVER_NAMES.get(solver, solver)} | {evaluations:.0f} | {residual:.2g} | {where} |"
    yield ""


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
    kept = ("status", "comparable", "device", "seeds", "commit", "run")
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
