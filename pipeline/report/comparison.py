"""The paper's tables, figures and claims with ours beside them, as one record that JSON holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd
from ruamel.yaml import YAML

from pipeline.figures import by_solver, display, relative_times
from pipeline.report.results import Facts, Result, Results
from pipeline.sets import SETS

PAPER: dict[str, Any] = YAML(typ="safe").load(Path(__file__).with_name("paper.yaml"))
VARIED: dict[str, str] = PAPER["ablations"]["models"]
UNKNOWN = "not measured here"
LEVEL = 1e-2  # the residual to which evaluations are counted, set against the resolution
SOLVER = {
    "solver/relative_residual": "{:.2g}",
    "solver/relative_residual_max": "{:.2g}",
    "solver/converged": "{:.0%}",
    "solver/nfe": "{:.1f}",
    "solver/failed": "{:.0f}",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A system of a table: what the paper prints (to `differs`), and ours (empty: not run).

    `model` is the instance that reproduces it, `differs` says what of ours is not the system's,
    `pictures` what ours is about; `comparable`: they are the paper's. `value` is ours, unrounded.
    """

    system: str
    paper: list[str] = field(default_factory=list)
    size: str = ""
    group: str = ""
    backbone: str = ""
    cited: str = ""
    model: str = ""
    differs: str = ""
    here: list[str] = field(default_factory=list)
    value: float | None = None
    pictures: str = ""
    comparable: bool = False
    parameters: str = ""
    trained: str = ""
    device: str = ""
    commit: str = ""
    seeds: str = ""


def build(results: Results) -> Record:
    """All that the report says in words and numbers."""
    return {
        "tables": [_table(results, table) for table in PAPER["tables"]],
        "ablations": _ablations(results),
        "figure4b": _figure4b(results),
        "figure5": _figure5(results),
        "solver": _solver(results),
        "data": [
            {"name": name, "title": known.title, "says": about_data(results, name)[1]}
            for name, known in SETS.items()
            if name in results.data
        ],
        "made": [_made(folder, result) for folder, result in results.found.items()],
        "problems": results.problems,
    }


def about_data(results: Results, dataset: str, *made: Result) -> tuple[str, str]:
    """What pictures results are about: a label, a sentence. The paper's alone have its name."""
    title, summary = SETS[dataset].title, results.data.get(dataset)
    images = summary.images if summary else {}
    size = " + ".join(f"{count:,} {split}" for split, count in images.items()) or "number unknown"
    sources = {result.facts.source for result in made} - {""}
    if "generated" in (sources or {summary.source if summary else ""}):
        return "generated pictures", f"generated pictures, NOT {title} ({size})"
    official = next(table["images"] for table in PAPER["tables"] if table["dataset"] == dataset)
    if images != official:
        return "other pictures", f"pictures in its layout, NOT the paper's {title} ({size})"
    total = images[SETS[dataset].validation]
    samples = min((r.facts.samples for r in made if r.facts.samples), default=total)
    if samples < total:
        return f"part of {title}", f"{title}, but only {samples:,} of {total:,} images"
    return title, f"{title}, complete"


# Tables 1 to 3


def _table(results: Results, table: Record) -> Record:
    stage, dataset = SETS[table["dataset"]].stage, table["dataset"]
    run = set(results.under(f"{stage}/")) | set(results.under(f"evaluate/{dataset}-"))
    rows = [Row(**row) for row in table["rows"]]
    own = sorted(run - {row.model for row in rows} - set(VARIED))
    rows += [Row(display(name), model=name) for name in own]
    rows = [_measured(results, table, row) for row in rows]
    values = {row.model: row.value for row in rows if row.value is not None}
    return {
        **{key: table[key] for key in ("number", "title", "place")},
        "stage": stage,
        "measures": list(table["measures"]),
        "rows": [asdict(row) for row in rows],
        "claims": [_above(claim, values) for claim in table["claims"]],
    }


def _ablations(results: Results) -> list[Record]:
    """The models that differ from the base in one setting, where any ran; the base comes first."""
    models = {name: title for name, title in VARIED.items() if f"classify/{name}" in results.found}
    base = PAPER["ablations"]["base"]
    every = {base: "the model that they vary"} | models if models else {}
    rows = [Row(display(name), model=name, differs=title) for name, title in every.items()]
    return [asdict(_measured(results, PAPER["tables"][0], row)) for row in rows]


def _measured(results: Results, table: Record, row: Row) -> Row:
    """The row with our numbers, if it was run."""
    dataset = SETS[table["dataset"]]
    training = results.found.get(f"{dataset.stage}/{row.model}")
    evaluation = results.found.get(f"evaluate/{dataset.name}-{row.model}")
    made = [result for result in (evaluation, training) if result]
    if not (made and row.model):
        return row
    trained = made[-1].metrics
    seeds = made[-1].facts.seeds
    values, here = [], []
    for key in table["measures"].values():
        several = len(seeds) > 1 and f"{key}_std" in trained
        source = trained if several else {**trained, **made[0].metrics}
        values.append(source.get(key))
        spread = f" ± {_print(trained[f'{key}_std'])}" if several else ""
        here.append(_print(values[-1]) + spread)
    pictures = about_data(results, dataset.name, *made)[0]
    return replace(
        row,
        here=here,
        value=values[0] if _finite(values[0]) else None,
        pictures=pictures,
        comparable=pictures == dataset.title,
        parameters=_size(trained.get("parameters")),
        trained=f"{trained['epochs']:.0f} epochs" if trained.get("epochs") else "",
        device=made[0].facts.device,
        commit=_commit(made[0]),
        seeds=", ".join(map(str, seeds)),
    )


# claims


def _claim(claim: Record, holds: bool | None, numbers: str = "") -> Record:
    verdict = {True: "holds here", False: "does not hold here", None: UNKNOWN}[holds]
    words = claim["says"] if "says" in claim else f"“{claim['quote']}”"
    return {"says": words, "place": claim["place"], "verdict": verdict, "numbers": numbers}


def _above(claim: Record, values: Mapping[str, float]) -> Record:
    """One model is so many points above others; of those, the ones that were measured count."""
    ours = values.get(claim["better"])
    others = {model: values[model] for model in claim["than"] if model in values}
    if ours is None or not others:
        return _claim(claim, None)
    beside = ", ".join(f"{display(model)} {other:.1f}" for model, other in others.items())
    holds = all(ours > other + claim["by"] for other in others.values())
    return _claim(claim, holds, f"{display(claim['better'])} {ours:.1f}, {beside}")


def _at_most(claim: Record, values: Mapping[str, float]) -> Record:
    """The quotient of two models' measure is at most so large."""
    ours, theirs = values.get(claim["model"]), values.get(claim["to"])
    if not (_finite(ours) and _finite(theirs) and theirs):
        return _claim(claim, None)
    words = f"The {claim['measure']} of {display(claim['model'])} over {display(claim['to'])}"
    return _claim(claim, ours / theirs <= claim["most"], f"{words}: {ours / theirs:.2f}")


def stable(traces: Mapping[str, dict[str, pd.Series]]) -> Record:
    """Broyden's residual ends below that of iterating f, and keeps falling, on every data set.

    `traces`: of each data set the residual by evaluations of f, by solver.
    """
    claim = PAPER["figure5"]["stable"]
    verdicts, words = [], []
    for title, solvers in traces.items():
        curves = pd.DataFrame(solvers).reindex(columns=["Broyden", "iterating f"]).dropna()
        if len(curves) < 2:
            continue
        broyden, iterating = curves.iloc[-1]
        middle = curves["Broyden"].iloc[len(curves) // 2 - 1]
        below, falls = bool(broyden < iterating), bool(broyden < middle)
        verdicts.append(below and falls)
        words.append(
            f"{title}: after {curves.index[-1]} evaluations of f Broyden's residual is "
            f"{broyden:.2g}, {'' if below else 'not '}below the {iterating:.2g} of iterating f, "
            f"and {'keeps falling' if falls else 'no longer falls'} ({middle:.2g} half-way)"
        )
    return _claim(claim, all(verdicts) if verdicts else None, ". ".join(words))


def slower(traces: Mapping[str, dict[str, pd.Series]]) -> Record:
    """Broyden's method needs more evaluations of f from one resolution to the next."""
    claim = PAPER["figure5"]["resolution"]
    counts = {}
    for title, solvers in traces.items():
        curve: Any = solvers.get("Broyden", pd.Series(dtype=float)).items()
        counts[title] = min((k for k, residual in curve if residual <= LEVEL), default=math.inf)
    if len(counts) < len(SETS):
        return _claim(claim, None)
    words = ", ".join(f"{title} {_print(n, '{:.0f}', 'never')}" for title, n in counts.items())
    first, second, third = counts.values()
    numbers = f"Evaluations of f to a residual of {LEVEL:g}: {words}"
    return _claim(claim, first < second < third, numbers)


# Figures 4b and 5, solver


def _figure4b(results: Results) -> Record:
    found = results.found.get("benchmark", Result({}, Facts(), {}))
    table, reference = found.tables.get("times.csv"), found.facts.reference
    rows, ratios = [], {"time": {}, "memory": {}}
    if table is not None and reference in set(table["model"]):
        rounds = relative_times(table, reference)
        whole = found.metrics.get(f"{reference}/memory_bytes") or math.nan
        for model in rounds:
            memory = found.metrics.get(f"{model}/memory_bytes", math.nan)
            ratios["time"][model] = rounds[model].median()
            ratios["memory"][model] = memory / whole
            printed = PAPER["figure4b"]["relative"].get(model, {})
            own = {
                "model": display(model),
                "parameters": _size(found.metrics.get(f"{model}/parameters")),
                "seconds": _print(found.metrics.get(f"{model}/seconds"), "{:.3g}"),
                "memory": _print(memory / 2**20, "{:.0f} MiB"),
                "paper": [printed.get(measure, "–") for measure in ratios],
                "here": [_print(ratios[measure][model], "{:.2f}") for measure in ratios],
                "range": " to ".join(
                    _print(end, "{:.2f}") for end in rounds[model].agg(["min", "max"])
                ),
            }
            rows.append(own)
    claims = [_at_most(claim, ratios[claim["measure"]]) for claim in PAPER["figure4b"]["claims"]]
    facts = {"reference": display(reference), "device": found.facts.device}
    return facts | {"batch": found.facts.batch, "rows": rows, "claims": claims}


def _figure5(results: Results) -> Record:
    tables = results.tables("convergence/", "trace.csv")
    traces = {}
    for name, known in SETS.items():
        solvers = by_solver(tables[name], "residual") if name in tables else {}
        if solvers:
            traces[known.title] = {solver: own.mean(axis=1) for solver, own in solvers.items()}
    return {"claims": [stable(traces), slower(traces)]}


def _solver(results: Results) -> list[Record]:
    """How well the equilibria of each evaluated model were found."""
    rows = []
    for dataset, known in SETS.items():
        for model, own in results.under(f"evaluate/{dataset}-").items():
            cells = [_print(own.metrics.get(key), form) for key, form in SOLVER.items()]
            if "solver/nfe" in own.metrics:
                rows.append({"model": f"{display(model)}, {known.title}", "cells": cells})
    return rows


def _made(folder: str, result: Result) -> Record:
    seconds = result.metrics.get("time/seconds", math.nan)
    return {
        "what": folder.replace("/", " "),
        "device": result.facts.device or "–",
        "commit": _commit(result) or "–",
        "minutes": _print(seconds / 60),
        "run": result.facts.run or "–",
    }


# how numbers are printed


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _print(value: float | None, form: str = "{:.1f}", otherwise: str = "–") -> str:
    return form.format(value) if _finite(value) else otherwise


def _size(parameters: float | None) -> str:
    if not _finite(parameters):
        return ""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}K"


def _commit(result: Result) -> str:
    """The first seven digits, with the mark of a changed checkout."""
    commit = result.facts.commit
    return commit[:7] + "+" * commit.endswith("+")
