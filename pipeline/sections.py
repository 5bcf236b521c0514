"""The sections of the report: tables, figures and pictures, each from what the stages wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from pipeline import figures, paper
from pipeline.figures import Drawn, Panel, by_seed
from pipeline.page import Folded, Part, Picture, Row, Section, Sheet
from pipeline.results import (
    NAMES,
    TRAINED_BY,
    Line,
    Measured,
    Results,
    ablations,
    data_statement,
    iou_by_class,
    short_commit,
)

SOLVER_COLUMNS = {
    "residual, mean": ("solver/relative_residual", "{:.2g}"),
    "residual, worst": ("solver/relative_residual_max", "{:.2g}"),
    "converged": ("solver/converged", "{:.0%}"),
    "evaluations of f": ("solver/nfe", "{:.1f}"),
    "updates to best": ("solver/steps_to_best", "{:.1f}"),
}
OVERVIEW = (
    "An image x of the evaluation split, and the state z at each of its scales as the solver comes to z* = f(z*, x); "
    "colours are z's principal components. Below: the answer from that z, and how far z is from f(z)."
)
AFTER = "solver/residual_after_"


def sections(results: Results, tables: dict[int, list[Line]], facts: dict[str, str | int]) -> list[Section]:
    """All of them; ``tables`` has the lines of each table by its number, ``facts`` describe the machine."""
    overviews = [results.root / "convergence" / dataset / "overview.svg" for dataset in reversed(NAMES)]
    pictures = [Picture(path, OVERVIEW) for path in overviews if path.is_file()]
    return [
        *([Section("model", "The model", "From an image to its equilibrium", pictures[:1])] if pictures else []),
        *(_table(table, tables[table.number]) for table in paper.TABLES),
        _training(results),
        _benchmark(results),
        _convergence(results, pictures[1:]),
        _solver(results),
        _ablations(results),
        Section("predictions", "Predictions", "Predictions", list(_predictions(results))),
        Section("data", "Data", "Data", list(_data(results))),
        _made(results, facts),
    ]


def linked(words: str, facts: Measured) -> str:
    """A number, linked to the run that measured it if that was tracked."""
    run = str(facts.get("run") or "")
    return f"[{words}](#run-{run[:8]})" if run else words


def _not_run(what: str, command: str) -> str:
    return f"not run: {what} (`{command}`)"


def _facts(title: str, values: dict[str, str]) -> Folded:
    return Folded(title, Sheet(["", ""], [Row(pair) for pair in values.items()], []))


def _table(table: paper.Table, lines: Sequence[Line]) -> Section:
    backbone = any(line.row.backbone for line in lines)
    headings = ["system", *(["backbone"] if backbone else []), "size"]
    for heading, _ in table.measures:
        unit = heading.replace(", %", ",\u00a0%")
        headings += [f"paper: {unit}", f"ours: {unit}"]
    rows, group = [], ""
    for line in lines:
        heading = line.row.group if line.row.values else "ours, not in the paper's table"
        if heading != group:
            rows.append(Row([heading]))
        group = heading
        size = line.row.size or line.size or "–"
        size += f"\nours {line.size}" if line.size not in ("", size) else ""
        cells = [line.row.system + "\nimplicit" * line.row.implicit, *([line.row.backbone] if backbone else []), size]
        for theirs, ours in zip(line.paper, line.ours, strict=True):
            cells += [theirs or "–", _ours(line, ours)]
        rows.append(Row([*cells, _where(line)], _tag(line)))
    sheet = Sheet([*headings, "where ours ran"], rows, range(2 + backbone, len(headings)))
    title, lead = f"Table {table.number}: {table.title}", f"{table.section}; {table.note}."
    return Section(f"table{table.number}", f"Table {table.number}", title, [sheet], lead)


def _tag(line: Line) -> str:
    return line.status if line.status != "measured" else "the paper's data" if line.comparable else "other data"


def _ours(line: Line, number: str) -> str:
    return f"**{linked(number, {'run': line.run})}**" if number else ""


def _where(line: Line) -> str:
    if line.status != "measured":
        return line.note
    run = linked(f"run {line.run[:8]}", {"run": line.run}) if line.run else ""
    made = (line.device, f"seed {line.seeds}", line.scale, f"commit {line.commit}", run)
    return f"{line.note}\n{' · '.join(filter(None, made))}"


def _training(results: Results) -> Section:
    curves = {model: table for (stage, model), table in results.history.items() if stage == "classify"}
    varied = {line.row.system for found in ablations(results).values() for line in found} - {paper.ABLATED}
    parts: list[Part] = []
    if own := {model: table for model, table in curves.items() if model not in varied}:
        data = data_statement(results, "cifar10", {})[0]
        caption = f"{paper.FIGURE_4A}. Ours, on {data}; lines are means over the seeds, bands one standard deviation."
        parts.append(Drawn("figure4a", _accuracy(own), caption))
    for (stage, model), table in results.history.items():
        caption = f"{stage}/{model}: training loss and validation by epoch."
        parts.append(Drawn(f"curves-{stage}-{model}", figures.training_curves(table, f"{stage}/{model}"), caption, 760))
    lead = "Validation is at the equilibrium; dashed lines are the unrolled network of the warm-up."
    missing = _not_run("no training stage has results", "python -m pipeline classify mdeq-small")
    return Section("training", "Training", "Training (Figure 4a)", parts or [missing], lead)


def _accuracy(histories: dict[str, pd.DataFrame]) -> figures.Figure:
    lines = {name: by_seed(table, "eval/top1") for name, table in histories.items() if "eval/top1" in table}
    return figures.lines([Panel("", "test accuracy, %", lines)], "epoch")


def _benchmark(results: Results) -> Section:
    title = "Time and memory of a training step (Figure 4b)"
    stated = _facts("What Sec. 4.4 states of its figure", {s.what: f"{s.value:g}" for s in paper.FIGURE_4B})
    runtime = results.runtime
    if runtime is None:
        missing = _not_run("no results/benchmark/runtime.json", "python -m pipeline benchmark")
        return Section("figure4b", "Time and memory", title, [missing, stated])
    rows = []
    for name, entry in runtime["models"].items():
        theirs, parameters = paper.FIGURE_4B_RELATIVE.get(name, {}), entry.get("parameters")
        size = f"{parameters:,}" if parameters else "–"
        cells = [name, size, f"{entry['seconds']:.3g} s", _bytes(entry["memory_bytes"])]
        for measure in ("time", "memory"):
            ours = linked(f"{entry['relative'][measure]:.2f}", runtime)
            cells += [theirs.get(measure, "–"), f"**{ours}**"]
        rows.append(Row(cells))
    headings = ["model", "parameters", "a step", "memory", "paper: time", "ours: time", "paper: memory", "ours: memory"]
    relative = {name: entry["relative"] for name, entry in runtime["models"].items()}
    caption = (
        f"Figure 4b: time and memory of a training step relative to {runtime['reference']} (Sec. 4.4). "
        f"Batch {runtime['batch']}, {runtime['device']}, medians of {runtime['rounds']} rounds in turn; "
        f"memory: {runtime['memory']}. Lower is better."
    )
    drawn = Drawn("figure4b", figures.figure4b(relative, runtime["reference"], "memory"), caption)
    lead = f"On {runtime['device']}, {runtime['threads']} threads; the paper: one RTX 2080 Ti, batch 32."
    return Section("figure4b", "Time and memory", title, [drawn, Sheet(headings, rows, range(1, 8)), stated], lead)


def _convergence(results: Results, pictures: Sequence[Picture]) -> Section:
    rows = []
    for dataset, name in NAMES.items():
        found = results.convergence.get(dataset)
        if found is None:
            missing = f"no results of `python -m pipeline convergence {dataset}`"
            rows.append(Row([name, "", "", "", "", missing], "not run"))
            continue
        where = (
            f"{found.get('model', '')}; {data_statement(results, dataset, found)[0]}; "
            f"{found.get('batches', '?')} batches of {found.get('batch', '?')}; {found.get('device', '')}"
        )
        for solver in sorted({key.split("/")[0] for key in found if key.endswith("/residual")}):
            spread = [
                linked(f"{found[key]:.2g} ± {found.get(f'{key}_std', 0):.1g}", found) if key in found else "–"
                for key in (f"{solver}/change", f"{solver}/residual")
            ]
            count = f"{found.get(f'{solver}/evaluations', np.nan):.0f}"
            rows.append(Row([name, figures.SOLVERS.get(solver, solver).replace(" ", "\u00a0"), count, *spread, where]))
    headings = ["data set", "solver", "evaluations", "change, last", "residual, last", "where it ran"]
    parts = [*_figure5(results), Sheet(headings, rows, [2, 3, 4])]
    parts += [Folded(f"z* of {NAMES[picture.path.parent.name]}", picture) for picture in pictures]
    title, lead = "Convergence to the equilibrium (Figure 5)", "Mean and standard deviation over random batches."
    return Section("figure5", "Convergence", title, parts, lead)


def _figure5(results: Results) -> Iterator[Drawn]:
    data = "; ".join(f"{NAMES[name]}: {data_statement(results, name, {})[0]}" for name in results.traces)
    if traces := {NAMES[name]: trace for name, trace in results.traces.items()}:
        yield Drawn("figure5", figures.figure5(traces), f"{paper.FIGURE_5}. With it the residual. Ours: {data}.", 1000)
    panels = []
    for name, trace in traces.items():
        columns = [column for column in trace if str(column).startswith("residual_")]
        broyden = {i: figures.by_solver(trace, str(c)).get("Broyden") for i, c in enumerate(columns, 1)}
        scales = {f"scale {i}": frame for i, frame in broyden.items() if frame is not None}
        panels += [Panel(name, "" if panels else "|f(z)_i - z_i| / |f(z)_i|", scales)] if scales else []
    if panels:
        figure = figures.lines(panels, "evaluations of f", log=True)
        yield Drawn("figure5-scales", figure, f"{paper.FIGURE_5_SCALES}. Ours: {data}.", 1000)
    panels = []
    for dataset, found in results.convergence.items():
        history = results.history.get((TRAINED_BY[dataset], str(found.get("model"))), pd.DataFrame())
        after = {str(c).removeprefix(AFTER): by_seed(history, str(c)) for c in history if str(c).startswith(AFTER)}
        label = "" if panels else "residual, the one that stops"
        panels += [Panel(f"{found['model']}, {NAMES[dataset]}", label, after, "evaluations")] if after else []
    if panels:
        figure = figures.lines(panels, "epoch", log=True)
        yield Drawn("figure5-training", figure, f"{paper.FIGURE_5_TRAINING}, by epoch.", 1000)


def _solver(results: Results) -> Section:
    rows, limited = [], {}
    for (dataset, model), found in results.evaluation.items():
        name = f"{model} on {NAMES[dataset]}"
        if "by_steps" in found:
            limited[name] = pd.DataFrame({"": found["by_steps"]}).rename(int)
        if "solver/nfe" not in found:
            continue
        values = [
            linked(form.format(found[key]), found) if isinstance(found.get(key), int | float) else "–"
            for key, form in SOLVER_COLUMNS.values()
        ]
        failed = found.get("solver/failed", 0)
        where = data_statement(results, dataset, found)[0]
        rows.append(Row([name, *values, where + f"; {failed:.0f} samples without a finite iterate" * bool(failed)]))
    title = "The solver at test time"
    if not rows:
        missing = _not_run("no equilibrium model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")
        return Section("solver", title, title, [missing])
    parts: list[Part] = [Sheet(["model", *SOLVER_COLUMNS, "data"], rows, range(1, 6))]
    if limited:
        caption = "Test accuracy with the solver stopped after so many steps, each one evaluation of f."
        panel = Panel("", "test accuracy, %", limited)
        parts.insert(0, Drawn("accuracy-by-steps", figures.lines([panel], "limit on the solver's steps"), caption))
    lead = "How well the equilibria were found on the evaluation split: |f(z) - z| / |f(z)| of each sample."
    return Section("solver", title, title, parts, lead)


def _ablations(results: Results) -> Section:
    parts: list[Part] = []
    for number, (title, lines) in enumerate(ablations(results).items(), 1):
        parts.append(f"**{title}**")
        curves = {line.row.system: results.history.get(("classify", line.row.system)) for line in lines}
        if drawn := {name: table for name, table in curves.items() if table is not None}:
            parts.append(Drawn(f"ablation-{number}", _accuracy(drawn), f"{title}."))
        rows = []
        for line in lines:
            found = results.evaluation.get(("cifar10", line.row.system), {})
            residual = found.get("solver/relative_residual")
            cell = "–" if residual is None else linked(f"{residual:.2g}", found)
            rows.append(Row([line.row.system, _ours(line, line.ours[0]), cell, _where(line)], _tag(line)))
        parts.append(Sheet(["model", "accuracy,\u00a0%", "residual, mean", "where it ran"], rows, [1, 2]))
    lead = f"What the paper argues in words: each model differs from {paper.ABLATED} in one setting."
    parts = parts or [_not_run("no ablation was trained", "make repro-all")]
    return Section("ablations", "Ablations", "Ablations", parts, lead)


def _predictions(results: Results) -> Iterator[Part]:
    for (dataset, model), found in results.evaluation.items():
        title = f"{model} on {NAMES[dataset]}"
        yield f"**{title}**; {data_statement(results, dataset, found)[0]}"
        examples = results.root / "evaluate" / f"{dataset}-{model}" / "examples.png"
        if examples.is_file():
            yield Picture(examples, f"{title}: predictions beside the truth")
        else:
            yield _not_run("no examples.png", f"python -m pipeline evaluate {dataset} {model}")
        confusion = results.confusion.get((dataset, model))
        if confusion is None:
            continue
        drawn = figures.confusion(confusion.to_numpy(), [str(name) for name in confusion.index], title)
        picture = Drawn(f"confusion-{dataset}-{model}", drawn, f"{title}: confusion matrix", 760)
        yield Folded("Confusion matrix", picture)
        if dataset == "cityscapes":
            scores = {str(name): score for name, score in iou_by_class(confusion).items()}
            words = {name: "not labelled" if pd.isna(score) else f"{score:.1f} %" for name, score in scores.items()}
            yield _facts("IoU of each class", words)
    if not results.evaluation:
        yield _not_run("no model was evaluated", "python -m pipeline evaluate cifar10 mdeq-small")


def _data(results: Results) -> Iterator[Part]:
    for dataset, name in NAMES.items():
        if dataset not in results.data:
            yield f"**{name}**: {_not_run('no manifest', f'python -m pipeline prepare {dataset}')}"
            continue
        digest = str(results.data[dataset].get("manifest", "unknown"))[:12]
        yield f"**{name}**: {data_statement(results, dataset, {})[0]}. Manifest `{digest}`."
        sheet = results.root / "data" / dataset / "contact_sheet.png"
        if sheet.is_file():
            yield Picture(sheet, f"{name}: some of its pictures")


def _made(results: Results, facts: dict[str, str | int]) -> Section:
    rows = []
    for stage, found in results.measured().items():
        run, seconds = str(found.get("run") or ""), found.get("time/seconds")
        name = f"tags.mark = '{run}'" if run.endswith("-mark") else run  # a search where the store had not answered
        device, shown = str(found.get("device", "unknown")), f"`{name}`" if run else "–"
        cells = [stage, device, short_commit(found), _time(seconds), shown]
        rows.append(Row(cells, anchor=f"run-{run[:8]}" if run else ""))
    headings = ["stage", "device", "commit", "time", "run in MLflow (`make ui`)"]
    parts: list[Part] = [Sheet(headings, rows, [3])] if rows else []
    machine = _facts("The machine and versions that made this page", {name: str(v) for name, v in facts.items()})
    lead = "The stages that measured something; a number of ours above leads to its run here."
    return Section("made", "How it was made", "How it was made", [*parts, machine], lead)


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
