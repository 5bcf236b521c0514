"""What the stages wrote, read back for the report; and each row of the paper's tables with ours beside it.

Only files below ``results/`` are read. What is missing or unreadable is not an error but a line that says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.paper import ABLATED, ABLATIONS, TABLE_1, TABLES, Number, Row, Table

NAMES = {"cifar10": "CIFAR-10", "imagenet": "ImageNet", "cityscapes": "Cityscapes"}
TRAINED_BY = {table.dataset: table.stage for table in TABLES}
OFFICIAL = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "imagenet": {"train": 1_281_167, "val": 50_000},
    "cityscapes": {"train": 2_975, "val": 500},
}
"""Images of the sets that the paper's numbers are about."""

Measured = dict[str, Any]
_counts = partial(pd.read_csv, index_col=0)


@dataclass
class Results:
    """Every result file that exists, by the folders' names; ``problems`` names the unreadable ones."""

    root: Path
    data: dict[str, Measured] = field(default_factory=dict)
    training: dict[tuple[str, str], Measured] = field(default_factory=dict)
    history: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    evaluation: dict[tuple[str, str], Measured] = field(default_factory=dict)
    confusion: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    convergence: dict[str, Measured] = field(default_factory=dict)
    traces: dict[str, pd.DataFrame] = field(default_factory=dict)
    runtime: Measured | None = None
    problems: list[str] = field(default_factory=list)

    def measured(self) -> dict[str, Measured]:
        """What each stage measured, by the words that run it."""
        found = {f"{stage} {model}": facts for (stage, model), facts in self.training.items()}
        found |= {f"evaluate {dataset} {model}": facts for (dataset, model), facts in self.evaluation.items()}
        found |= {f"convergence {dataset}": facts for dataset, facts in self.convergence.items()}
        return found | ({"benchmark": self.runtime} if self.runtime else {})


@dataclass(frozen=True)
class Line:
    """A row of a results table.

    ``status`` is measured, not run, or paper only (a system that is not rebuilt here).
    ``note`` is the reason where nothing was measured, and the data where something was. ``comparable`` says
    whether ours ran on the very data of the paper.
    """

    row: Row
    status: str
    paper: tuple[str, ...]
    ours: tuple[str, ...]
    note: str
    comparable: bool = False
    size: str = ""
    scale: str = ""
    device: str = ""
    seeds: str = ""
    commit: str = ""
    run: str = ""


def read(root: Path) -> Results:
    """Read the tree ``root`` (usually ``results``)."""
    found = Results(root)
    for name in NAMES:
        found.data |= _entry(found, name, root / "data" / name / "summary.json", _json)
        found.convergence |= _entry(found, name, root / "convergence" / name / "metrics.json", _json)
        found.traces |= _entry(found, name, root / "convergence" / name / "trace.csv", _trace)
    for table in TABLES:
        for folder in _folders(root / table.stage):
            key = (table.stage, folder.name)
            found.training |= _entry(found, key, folder / "metrics.json", _json)
            found.history |= _entry(found, key, folder / "history.csv", pd.read_csv)
        for folder in _folders(root / "evaluate"):
            dataset, _, model = folder.name.partition("-")
            if dataset == table.dataset:
                found.evaluation |= _entry(found, (dataset, model), folder / "metrics.json", _json)
                found.confusion |= _entry(found, (dataset, model), folder / "confusion.csv", _counts)
    found.runtime = _entry(found, "runtime", root / "benchmark" / "runtime.json", _runtime).get("runtime")
    return found


def lines(results: Results, table: Table) -> list[Line]:
    """Every row of the paper's table with ours beside it; models of ours that the paper lacks come last."""
    known = [row.model for row in table.rows if row.model]
    known += [model for _, models in ABLATIONS for model in models]
    paper = [_line(results, table, row) for row in table.rows]
    trained = sorted({model for stage, model in results.training if stage == table.stage})
    trained += sorted({model for dataset, model in results.evaluation if dataset == table.dataset} - set(trained))
    extra = [Row(model, "", (), model=model) for model in trained if model not in known]
    return paper + [_line(results, table, row) for row in extra]


def ablations(results: Results) -> dict[str, list[Line]]:
    """Of each ablation that was run its title, and the lines of the model it starts from and of its variants."""
    found = {}
    for title, models in ABLATIONS:
        run = [model for model in (ABLATED, *models) if ("classify", model) in results.training]
        if run not in ([], [ABLATED]):
            found[title] = [_line(results, TABLE_1, Row(model, "", (), model=model)) for model in run]
    return found


def data_statement(results: Results, dataset: str, facts: Measured) -> tuple[str, bool]:
    """What data a result is about, in plain words, and whether they are the paper's."""
    name = NAMES[dataset]
    summary = results.data.get(dataset, {})
    source = facts.get("data/source") or summary.get("source")
    images = summary.get("images", {})
    if source is None:
        return f"data unknown: results/data/{dataset}/summary.json is missing", False
    size = " + ".join(f"{count:,} {split}" for split, count in images.items())
    if source == "generated":
        return f"generated pictures, NOT {name}" + (f" ({size})" if size else ""), False
    whole = images == OFFICIAL[dataset]
    samples, split = facts.get("samples"), list(OFFICIAL[dataset])[1]
    if whole and samples and samples < images[split]:
        return f"{name}, but only {samples:,} of its {images[split]:,} {split} images", False
    if whole:
        return f"{name}, complete", True
    return f"{size} images of {summary.get('classes', '?')} classes in its layout: NOT the paper's {name}", False


def short_commit(facts: Measured) -> str:
    """The commit's first seven digits, with the mark of a changed checkout; "none" without git."""
    commit = str(facts.get("commit") or "none")
    return commit[:7] + "+" * commit.endswith("+")


def number(value: Number) -> str:
    """A number as the paper prints it."""
    return f"{value.value:.1f}" + (f" ± {value.std:.1f}" if value.std is not None else "")


def iou_by_class(confusion: pd.DataFrame) -> pd.Series:
    """IoU of each class in per cent, from confusion.csv; NaN where the labels never show it."""
    counts = confusion.to_numpy(dtype=float)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = pd.Series(100 * counts.diagonal() / union.clip(min=1), index=confusion.index)
    return iou.where(counts.sum(1) > 0)


def _line(results: Results, table: Table, row: Row) -> Line:
    paper = tuple(number(value) for value in row.values) or ("",) * len(table.measures)
    nothing = ("",) * len(table.measures)
    if row.model is None:
        return Line(row, "paper only", paper, nothing, f"its number for {row.cited}; {row.missing}")
    training = results.training.get((table.stage, row.model), {})
    evaluation = results.evaluation.get((table.dataset, row.model), {})
    if not training and not evaluation:
        command = f"`python -m pipeline {table.stage} {row.model}`"
        need = f"{command} with params/paper.yaml and {NAMES[table.dataset]}"
        return Line(row, "not run", paper, nothing, need)
    seeds = [int(seed) for seed in training.get("seeds", [])]
    ours = tuple(_ours(key, training, evaluation, len(seeds)) for _, key in table.measures)
    note, comparable = data_statement(results, table.dataset, evaluation or training)
    best = evaluation or training
    return Line(
        row=row,
        status="measured",
        paper=paper,
        ours=ours,
        note="; ".join(filter(None, (note, row.differs))),
        comparable=comparable,
        size=_size(training.get("parameters")),
        scale=_scale(training),
        device=str(best.get("device", "unknown device")),
        seeds=", ".join(map(str, seeds)) or "unknown",
        commit=short_commit(best),
        run=str(best.get("run") or ""),
    )


def _ours(key: str, training: Measured, evaluation: Measured, seeds: int) -> str:
    """Mean and deviation over several seeds; of one seed the evaluation's number, else training's."""
    if seeds > 1 and f"{key}_std" in training:
        return number(Number(float(training[key]), float(training[f"{key}_std"])))
    value = evaluation.get(key, training.get(key))
    return "–" if value is None or value != value else number(Number(float(value)))


def _scale(training: Measured) -> str:
    """How much training it was and what a prediction costs, where the metrics say."""
    epochs, flops = training.get("epochs"), training.get("flops")
    trained = "" if epochs is None else f"{epochs} epochs" if epochs else "its library's weights"
    return "; ".join(filter(None, (trained, f"{flops / 1e9:.3g} GFLOPs an image" if flops else "")))


def _size(parameters: Any) -> str:
    if not parameters:
        return ""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}K"


def _folders(parent: Path) -> list[Path]:
    return sorted(folder for folder in parent.iterdir() if folder.is_dir()) if parent.is_dir() else []


def _entry(found: Results, key: Any, path: Path, reader: Any) -> dict[Any, Any]:
    """{key: content}, or {} where the file is missing or unreadable; the latter is noted."""
    if not path.is_file():
        return {}
    try:
        return {key: reader(path)}
    except (OSError, ValueError, KeyError, pd.errors.ParserError) as error:
        found.problems.append(f"{path}: unreadable ({str(error).splitlines()[0] if str(error) else 'empty'})")
        return {}


def _json(path: Path) -> Measured:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def _runtime(path: Path) -> Measured:
    content = _json(path)
    for entry in content["models"].values():
        _ = float(entry["seconds"]), float(entry["relative"]["time"]), float(entry["relative"]["memory"])
    return content


def _trace(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if missing := {"solver", "batch", "evaluation", "change", "residual"} - set(table):
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    return table
