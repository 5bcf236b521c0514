"""The paper's tables, figures and claims with ours beside them, as one record that JSON holds."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.figures import display
from pipeline.report.results import Facts, Result, Results
from pipeline.sets import SETS

PAPER: dict[str, Any] = YAML(typ="safe").load(Path(__file__).with_name("paper.yaml"))
LEVEL = 1e-2  # the residual to which evaluations are counted, set against the resolution
ROW = dict.fromkeys(("size", "group", "backbone", "cited", "model", "differs", "pictures"), "")
RELATIONS = {"<": operator.lt, ">": operator.gt, "<=": operator.le}
CHANGES = {"+": operator.add, "-": operator.sub, "*": operator.mul}

Record = dict[str, Any]


def build(results: Results) -> Record:
    """All that the report says in words and numbers."""
    steps = _convergence(results)
    record: Record = {
        "tables": [_table(results, table) for table in PAPER["tables"]],
        "figure4b": _figure4b(results),
        "figure5": [judged(claim, steps) for claim in PAPER["figure5"]],
        "solver": {},
        "data": {},
        "made": [],
        "problems": results.problems,
    }
    for name, own in results.under("evaluate/").items():
        if "solver/nfe" in own.metrics:
            record["solver"][_spoken(name.replace("-", "/", 1))] = own.metrics
    for name, summary in results.data.items():
        sizes = (f"{count:,} {split}" for split, count in summary.images.items())
        record["data"][SETS[name].title] = f"{about_data(results, name)} ({' + '.join(sizes)})"
    for folder, own in results.found.items():
        seconds = own.metrics.get("time/seconds")
        record["made"].append({"folder": folder, "seconds": seconds, **asdict(own.facts)})
    return record


def about_data(results: Results, dataset: str, *made: Result) -> str:
    """What pictures results are about; the paper's alone have its data set's name."""
    title, summary = SETS[dataset].title, results.data.get(dataset, Facts())
    sources = {result.facts.source for result in made} - {""}
    if "generated" in (sources or {summary.source}):
        return "generated pictures"
    official = next(table["images"] for table in PAPER["tables"] if table["dataset"] == dataset)
    if summary.images != official:
        return "other pictures"
    total = official[SETS[dataset].validation]
    complete = all((result.facts.samples or total) >= total for result in made)
    return title if complete else f"part of {title}"


def judged(claim: Record, numbers: Mapping[str, float]) -> Record:
    """A claim with its verdict: it holds if all of its conditions do that were measured."""
    conditions = [condition.split() for condition in claim["holds"]]
    verdicts = [_compare(words, numbers) for words in conditions]
    measured = [verdict for verdict in verdicts if verdict is not None]
    verdict = "holds here" if all(measured) else "does not hold here"
    named = dict.fromkeys(word for words in conditions for word in words if word in numbers)
    shown = [f"{_spoken(name)} {numbers[name]:.3g}" for name in named]
    return {
        "says": claim["says"] if "says" in claim else f"“{claim['quote']}”",
        "place": claim["place"],
        "verdict": verdict if measured else "not measured here",
        "numbers": ", ".join(shown) if measured else "",
    }


def _compare(words: list[str], numbers: Mapping[str, float]) -> bool | None:
    """`a > b`, `a > b + 20` or `a < 0.4` of numbers by name; None if one was not measured."""
    left, relation, right, *change = words
    bound = numbers.get(right) if right[0].isalpha() else float(right)
    if left not in numbers or bound is None:
        return None
    if change:
        bound = CHANGES[change[0]](bound, float(change[1]))
    return bool(RELATIONS[relation](numbers[left], bound))


def _spoken(name: str) -> str:
    return " ".join(display(part).replace("_", " ") for part in name.split("/"))


def _table(results: Results, table: Record) -> Record:
    stage, dataset = SETS[table["dataset"]].stage, table["dataset"]
    run = {**results.under(f"{stage}/"), **results.under(f"evaluate/{dataset}-")}
    known = {row.get("model") for row in table["rows"]}
    own = sorted(run.keys() - known)
    rows = table["rows"] + [{"system": display(name), "model": name, "paper": []} for name in own]
    rows = [ROW | row | _measured(results, table, row.get("model")) for row in rows]
    values = {row["model"]: row["value"] for row in rows if row["value"] is not None}
    return {
        **{key: table[key] for key in ("number", "title", "place")},
        "stage": stage,
        "measures": list(table["measures"]),
        "rows": rows,
        "claims": [judged(claim, values) for claim in table["claims"]],
    }


def _measured(results: Results, table: Record, model: str | None) -> Record:
    """Our numbers of a model, none if it was not run; `value` is the first of them, unrounded."""
    dataset = SETS[table["dataset"]]
    training = results.found.get(f"{dataset.stage}/{model}", Result())
    evaluation = results.found.get(f"evaluate/{dataset.name}-{model}", training)
    if not (training.metrics or evaluation.metrics):
        return {"here": [], "value": None, "parameters": None}
    values, here = [], []
    for key in table["measures"].values():
        spread = training.metrics.get(f"{key}_std")  # of several seeds, of which evaluation has one
        value = (training if spread else evaluation).metrics.get(key)
        values.append(value)
        here.append(_print(value) + (f" ± {_print(spread)}" if spread else ""))
    epochs = training.metrics.get("epochs")
    return {
        "here": here,
        "value": values[0],
        "pictures": about_data(results, dataset.name, training, evaluation),
        "parameters": training.metrics.get("parameters"),
        "trained": f"{epochs:.0f} epochs" if epochs else "",
        "device": evaluation.facts.device,
        "commit": evaluation.facts.commit,
        "seeds": ", ".join(map(str, training.facts.seeds or evaluation.facts.seeds)),
    }


def _print(value: float | None, form: str = "{:.1f}") -> str:
    return "–" if value is None else form.format(value)


def _figure4b(results: Results) -> Record:
    found = results.found.get("benchmark", Result())
    rows = []
    for name, time in found.metrics.items():
        model, _, measure = name.rpartition("/")
        if measure == "relative_time":
            paper = PAPER["figure4b"]["relative"].get(model, [])
            both = (time, found.metrics.get(f"{model}/relative_memory"))
            here = [_print(value, "{:.2f}") for value in both]
            rows.append({"model": display(model), "paper": paper, "here": here})
    return {
        "reference": display(found.facts.reference),
        "device": found.facts.device,
        "batch": found.facts.batch,
        "rows": rows,
        "claims": [judged(claim, found.metrics) for claim in PAPER["figure4b"]["claims"]],
    }


def _convergence(results: Results) -> dict[str, float]:
    """What Figure 5's claims compare, from trace.csv of each data set."""
    numbers = {}
    for name, table in results.tables("convergence/", "trace.csv").items():
        curves = table.pivot_table("residual", "evaluation", "solver")
        curves = curves.reindex(columns=["broyden", "fixed_point"]).dropna()
        if len(curves) < 2:
            continue
        broyden: Any = curves["broyden"]
        reached = [k for k, residual in broyden.items() if residual <= LEVEL]
        numbers[f"{name}/broyden"] = float(broyden.iloc[-1])
        numbers[f"{name}/fixed_point"] = float(curves["fixed_point"].iloc[-1])
        numbers[f"{name}/half-way"] = float(broyden.iloc[len(broyden) // 2 - 1])
        numbers[f"{name}/evaluations"] = min(reached, default=math.inf)
    return numbers
