"""The sections of the report's page: tables, figures and pictures, each from what the stages wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from pipeline import figures, page
from pipeline.figures import Drawn
from pipeline.paper import ABLATED, FIGURE_4B, FIGURE_4B_RELATIVE, TABLES, Table
from pipeline.results import NAMES, Facts, Line, Results, ablations, data_statement, iou_by_class, short_commit

TITLE = "Multiscale Deep Equilibrium Models: the paper's numbers and ours"
KINDS = {"measured": "ours", "paper only": "quoted", "not run": "missing"}
SOLVER_COLUMNS = (
    ("solver/relative_residual", "residual, mean", "{:.2g}"),
    ("solver/relative_residual_max", "residual, worst", "{:.2g}"),
    ("solver/converged", "converged", "{:.0%}"),
    ("solver/nfe", "evaluations of f", "{:.1f}"),
    ("solver/steps_to_best", "updates to best", "{:.1f}"),
)


def document(
    results: Results, drawn: dict[int, list[Line]], pictures: dict[str, Drawn], facts: dict[str, str | int]
) -> str:
    """The whole page; ``drawn`` are the lines of each table, ``facts`` describe the machine that makes it."""
    sections = [
        *((f"table{t.number}", f"Table {t.number}", _table(t, drawn[t.number])) for t in TABLES),
        ("training", "Training", _training(pictures)),
        ("figure4b", "Time and memory", _benchmark(results, pictures)),
        ("figure5", "Convergence", _convergence(results, pictures)),
        ("solver", "Solver at test time", _solver(results, pictures)),
        ("ablations", "Ablations", _ablations(results, pictures)),
        ("predictions", "Predictions", _predictions(results)),
        ("data", "Data", _data(results)),
        ("made", "How it was made", _made(results, facts)),
    ]
    body = [
        f"<h1>{page.escape(TITLE)}</h1>",
        '<p class="soft">Bai, Koltun and Kolter, NeurIPS 2020, rebuilt end to end. Every number of ours is '
        "read from a file that a stage of the pipeline wrote.</p>",
        page.navigation((anchor, title) for anchor, title, _ in sections),
        _notice(results, [line for rows in drawn.values() for line in rows]),
    ]
    return page.document(TITLE, body + [content for _, _, content in sections])


def _notice(results: Results, every: Sequence[Line]) -> str:
    measured = [line for line in every if line.status == "measured"]
    comparable = sum(line.comparable for line in measured)
    missing = sum(line.status == "not run" for line in every)
    text = (
        f"{len(measured)} systems were measured here, {comparable} of them on the paper's data; "
        f"{missing} more were not run."
    )
    points = []
    if comparable < len(measured):
        points.append(
            "Numbers on generated data, or on a part of the data, show that the pipeline works. They cannot "
            "be compared with the paper's, even where they stand beside them."
        )
    return page.notice(text, points + results.problems)


# ---- tables


def _table(table: Table, rows: Sequence[Line]) -> str:
    backbone = any(line.row.backbone for line in rows)
    headings = ["system", *(["backbone"] if backbone else []), "size"]
    for heading, _ in table.measures:
        unit = heading.replace(", %", ",\u00a0%")
        headings += [f"paper: {unit}", f"ours: {unit}"]
    headings.append("where ours ran")
    cells: list[tuple[str, list[str]]] = []
    group = ""
    for line in rows:
        heading = line.row.group if line.row.values else "ours, not in the paper's table"
        if heading != group:
            cells.append(("group", [page.escape(heading)]))
        group = heading
        cells.append((KINDS[line.status], _cells(line, backbone)))
    drawn = page.table(headings, cells, range(2 + backbone, len(headings) - 1))
    title, lead = f"Table {table.number}: {table.title}", f"{table.section}; {table.note}."
    return page.section(f"table{table.number}", title, drawn, lead=lead)


def _cells(line: Line, backbone: bool) -> list[str]:
    system = page.escape(line.row.system)
    if line.row.implicit:
        system += ' <span class="soft small">implicit</span>'
    size = page.escape(line.row.size or line.size or "–")
    if line.size and line.row.size and line.size != line.row.size:
        size += f'<br><span class="soft small">ours {line.size}</span>'
    cells = [system, *([page.escape(line.row.backbone)] if backbone else []), size]
    for paper, ours in zip(line.paper, line.ours, strict=True):
        cells += [page.escape(paper or "–"), f"<strong>{page.escape(ours)}</strong>" if ours else ""]
    return [*cells, _where(line)]


def _where(line: Line) -> str:
    if line.status != "measured":
        return f"{page.tag(line.status, 'grey')} {page.escape(line.note)}"
    label = page.tag("the paper's data", "green") if line.comparable else page.tag("other data", "amber")
    run = f" · run {line.run[:8]}" if line.run else ""
    made = " · ".join(
        [line.device, f"seed {line.seeds}", *([line.scale] if line.scale else []), f"commit {line.commit}"]
    )
    return f'{label} {page.escape(line.note)}<br><span class="soft">{page.escape(made + run)}</span>'


# ---- figures


def _training(pictures: dict[str, Drawn]) -> str:
    content = [_figure(pictures["figure4a"], 700)] if "figure4a" in pictures else []
    content += [_figure(picture, 900) for name, picture in pictures.items() if name.startswith("curves-")]
    if not content:
        content = [_not_run("no training stage has results", "python -m pipeline classify mdeq-small")]
    lead = "Validation is at the equilibrium; dashed lines are the unrolled network of the warm-up."
    return page.section("training", "Training (Figure 4a)", *content, lead=lead)


def _benchmark(results: Results, pictures: dict[str, Drawn]) -> str:
    title = "Time and memory of a training step (Figure 4b)"
    stated = page.facts((s.what, f"{s.value:g}") for s in FIGURE_4B)
    stated = page.folded("What Sec. 4.4 states of its figure", stated)
    runtime = results.runtime
    if runtime is None:
        missing = _not_run("no results/benchmark/runtime.json", "python -m pipeline benchmark")
        return page.section("figure4b", title, missing, stated)
    rows = [("", _benchmark_cells(name, entry)) for name, entry in runtime["models"].items()]
    headings = ["model", "parameters", "a step", "memory"]
    headings += [f"{whose}: {what}" for what in ("time", "memory") for whose in ("paper", "ours")]
    drawn = page.table(headings, rows, range(1, 8))
    lead = f"On {runtime['device']}, {runtime['threads']} threads; the paper: one RTX 2080 Ti, batch 32."
    return page.section("figure4b", title, _figure(pictures["figure4b"], 680), drawn, stated, lead=lead)


def _benchmark_cells(name: str, entry: Facts) -> list[str]:
    paper = FIGURE_4B_RELATIVE.get(name, {})
    parameters = entry.get("parameters")
    return [
        page.escape(name),
        f"{parameters:,}" if isinstance(parameters, int) else "–",
        f"{entry['seconds']:.3g} s",
        _bytes(entry["memory_bytes"]),
        paper.get("time", "–"),
        f"<strong>{entry['relative']['time']:.2f}</strong>",
        page.escape(paper.get("memory", "–")),
        f"<strong>{entry['relative']['memory']:.2f}</strong>",
    ]


def _convergence(results: Results, pictures: dict[str, Drawn]) -> str:
    drawings = ("figure5", "figure5-scales", "figure5-training")
    content = [_figure(pictures[name], 1000) for name in drawings if name in pictures]
    rows: list[tuple[str, list[str]]] = []
    for dataset, name in NAMES.items():
        found = results.convergence.get(dataset)
        if found is None:
            reason = page.escape(f"no results of `python -m pipeline convergence {dataset}`")
            rows.append(("missing", [name, "", "", "", "", f"{page.tag('not run', 'grey')} {reason}"]))
            continue
        rows += [("", _solver_cells(results, dataset, found, solver)) for solver in solvers_of(found)]
    headings = ["data set", "solver", "evaluations", "change, last", "residual, last", "where it ran"]
    drawn = page.table(headings, rows, [2, 3, 4])
    lead = "Mean and standard deviation over random batches of the evaluation split."
    title = "Convergence to the equilibrium (Figure 5)"
    return page.section("figure5", title, *content, drawn, lead=lead)


def solvers_of(found: Facts) -> list[str]:
    """The solvers that a convergence stage's metrics speak of."""
    return sorted({name.split("/")[0] for name in found if name.endswith("/residual")})


def _solver_cells(results: Results, dataset: str, found: Facts, solver: str) -> list[str]:
    def with_spread(measure: str) -> str:
        value, spread = found.get(f"{solver}/{measure}"), found.get(f"{solver}/{measure}_std")
        return "–" if value is None else f"{value:.2g} ± {spread or 0:.1g}"

    where = (
        f"{found.get('model', '')}; {data_statement(results, dataset, found)[0]}; "
        f"{found.get('batches', '?')} batches of {found.get('batch', '?')}; {found.get('device', '')}"
    )
    name = figures.SOLVER_NAMES.get(solver, solver).replace(" ", "\u00a0")
    evaluations = f"{found.get(f'{solver}/evaluations', float('nan')):.0f}"
    return [
        NAMES[dataset],
        name,
        evaluations,
        with_spread("change"),
        with_spread("residual"),
        page.escape(where),
    ]


def _solver(results: Results, pictures: dict[str, Drawn]) -> str:
    title = "The solver at test time"
    rows = []
    for (dataset, model), found in results.evaluation.items():
        if "solver/nfe" not in found:
            continue
        values = [
            form.format(found[key]) if isinstance(found.get(key), int | float) else "–"
            for key, _, form in SOLVER_COLUMNS
        ]
        failed = found.get("solver/failed", 0)
        where = data_statement(results, dataset, found)[0]
        where += f"; {failed:.0f} samples without a finite iterate" * bool(failed)
        rows.append(("", [page.escape(f"{model} on {NAMES[dataset]}"), *values, page.escape(where)]))
    if not rows:
        missing = _not_run("no equilibrium model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")
        return page.section("solver", title, missing)
    headings = ["model", *(heading for _, heading, _ in SOLVER_COLUMNS), "data"]
    lead = "How well the equilibria were found on the evaluation split: |f(z) - z| / |f(z)| of each sample."
    curve = [_figure(pictures["accuracy-by-steps"], 700)] if "accuracy-by-steps" in pictures else []
    return page.section("solver", title, *curve, page.table(headings, rows, range(1, 6)), lead=lead)


def _ablations(results: Results, pictures: dict[str, Drawn]) -> str:
    found = ablations(results)
    content = [] if found else [_not_run("no ablation was trained", "make repro-all")]
    for number, (title, lines) in enumerate(found.items(), 1):
        content.append(f"<h3>{page.escape(title)}</h3>")
        if f"ablation-{number}" in pictures:
            content.append(_figure(pictures[f"ablation-{number}"], 700))
        rows = [("", _ablation_cells(results, line)) for line in lines]
        headings = ["model", "accuracy,\u00a0%", "residual, mean", "where it ran"]
        content.append(page.table(headings, rows, [1, 2]))
    lead = f"What the paper argues in words: each model differs from {ABLATED} in one setting."
    return page.section("ablations", "Ablations", *content, lead=lead)


def _ablation_cells(results: Results, line: Line) -> list[str]:
    residual = results.evaluation.get(("cifar10", line.row.system), {}).get("solver/relative_residual")
    return [
        page.escape(line.row.system),
        f"<strong>{page.escape(line.ours[0])}</strong>",
        "–" if residual is None else f"{residual:.2g}",
        _where(line),
    ]


# ---- pictures


def _predictions(results: Results) -> str:
    content = [
        part
        for (dataset, model), found in results.evaluation.items()
        for part in _predictions_of(results, dataset, model, found)
    ]
    if not content:
        content = [_not_run("no model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")]
    return page.section("predictions", "Predictions", *content)


def _predictions_of(results: Results, dataset: str, model: str, found: Facts) -> Iterator[str]:
    folder = results.root / "evaluate" / f"{dataset}-{model}"
    title = f"{model} on {NAMES[dataset]}"
    data = data_statement(results, dataset, found)[0]
    yield f"<h3>{page.escape(title)}</h3>"
    for name, what in (
        ("examples.png", "Predictions beside the truth"),
        ("confusion.png", "Confusion matrix"),
    ):
        if not (folder / name).is_file():
            yield _not_run(f"no {name}", f"python -m pipeline evaluate {dataset} {model}")
            continue
        drawn = page.figure(page.image(folder / name, f"{title}: {what}"), f"{what}; {data}")
        yield page.folded(what, drawn) if name == "confusion.png" else drawn
    if dataset == "cityscapes" and (dataset, model) in results.confusion:
        scores = iou_by_class(results.confusion[dataset, model])
        cells = ((str(name), "not labelled" if pd.isna(score) else f"{score:.1f} %") for name, score in scores.items())
        yield page.folded("IoU of each class", page.facts(cells))


def _data(results: Results) -> str:
    content = []
    for dataset, name in NAMES.items():
        content.append(f"<h3>{page.escape(name)}</h3>")
        if dataset not in results.data:
            content.append(_not_run("no manifest", f"python -m pipeline prepare {dataset}"))
            continue
        digest = str(results.data[dataset].get("manifest", "unknown"))[:12]
        content.append(f"<p>{page.escape(f'{data_statement(results, dataset, {})[0]}. Manifest `{digest}`.')}</p>")
        sheet = results.root / "data" / dataset / "contact_sheet.png"
        if sheet.is_file():
            content.append(page.figure(page.image(sheet, f"{name}: contact sheet"), "Contact sheet"))
    return page.section("data", "Data", *content)


# ---- origin


def _made(results: Results, facts: dict[str, str | int]) -> str:
    content = [page.facts(facts.items())]
    rows = [
        ("", [page.escape(cell) for cell in (title, found.get("device", "unknown"), short_commit(found),
              str(found.get("run") or "–")[:8], _seconds(found.get("time/seconds")))])
        for title, found in _measured(results)
    ]  # fmt: skip
    if rows:
        headings = ["stage", "device", "commit", "run", "time"]
        content += ["<h3>The stages that measured something</h3>", page.table(headings, rows, [4])]
    return page.section("made", "How it was made", *content, lead="The machine and versions that made this page.")


def _measured(results: Results) -> Iterator[tuple[str, Facts]]:
    for (stage, model), found in results.training.items():
        yield f"{stage} {model}", found
    for (dataset, model), found in results.evaluation.items():
        yield f"evaluate {dataset} {model}", found
    for dataset, found in results.convergence.items():
        yield f"convergence {dataset}", found
    if results.runtime:
        yield "benchmark", results.runtime


def _figure(picture: Drawn, width: int) -> str:
    svg = figures.inline_svg(picture.figure, picture.name)
    return page.figure(f'<div class="scroll">{svg}</div>', picture.caption, width)


def _not_run(reason: str, command: str) -> str:
    return f"<p>{page.tag('not run', 'grey')} {page.escape(f'{reason} (`{command}`)')}</p>"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
