"""The files that the stages wrote, read back. A missing or damaged one never stops the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pipeline.sets import BY_STAGE, SETS

COLUMNS = {  # that a table must have
    "history.csv": ["seed", "epoch"],
    "by_steps.csv": ["evaluations", "accuracy", "residual"],
    "trace.csv": ["solver", "batch", "evaluation", "change", "residual"],
}


@dataclass(frozen=True)
class Facts:
    """What the report uses of a stage's facts.json, and of a data set's summary.json."""

    device: str = ""
    commit: str = ""
    run: str | None = ""
    source: str = ""
    seeds: list[int] = field(default_factory=list)
    samples: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    reference: str = ""
    batch: int | None = None


@dataclass(frozen=True)
class Result:
    """The finite numbers of metrics.json, facts.json and the tables of one instance of a stage."""

    metrics: dict[str, float] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass
class Results:
    """All results by folder, as "classify/mdeq-small"; the data sets; a line per file left out."""

    found: dict[str, Result] = field(default_factory=dict)
    data: dict[str, Facts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def under(self, prefix: str) -> dict[str, Result]:
        """The results whose folder begins so, by the rest of its name."""
        return {k.removeprefix(prefix): v for k, v in self.found.items() if k.startswith(prefix)}

    def tables(self, prefix: str, file: str) -> dict[str, pd.DataFrame]:
        """One file of all results whose folder begins so."""
        results = self.under(prefix).items()
        return {name: own.tables[file] for name, own in results if file in own.tables}


def read(root: Path) -> Results:
    """Reads what lies below `root`, usually results/."""
    results = Results()
    for name in SETS:
        summary = _read(results, root / "data" / name / "summary.json", _facts)
        if summary:
            results.data[name] = summary
    folders = [root / "benchmark"]
    for stage in (*BY_STAGE, "evaluate", "convergence"):
        folders += sorted((root / stage).glob("*"))
    for folder in folders:
        metrics = _read(results, folder / "metrics.json", _metrics) or {}
        facts = _read(results, folder / "facts.json", _facts) or Facts()
        tables = {name: _read(results, folder / name, _table) for name in COLUMNS}
        tables = {name: table for name, table in tables.items() if table is not None and len(table)}
        if metrics or tables:
            results.found[folder.relative_to(root).as_posix()] = Result(metrics, facts, tables)
    return results


def _read(results: Results, path: Path, parse: Callable[[Path], Any]) -> Any:
    """What `parse` makes of a file; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        return parse(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        results.problems.append(f"{path}: damaged ({reason})")
        return None


def _facts(path: Path) -> Facts:
    facts = TypeAdapter(Facts).validate_json(path.read_bytes())
    short = facts.commit[:7] + "+" * facts.commit.endswith("+")  # the mark of a changed checkout
    return replace(facts, commit=short)


def _metrics(path: Path) -> dict[str, float]:
    metrics = TypeAdapter(dict[str, float]).validate_json(path.read_bytes())
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    table[COLUMNS[path.name]]  # a KeyError names those that are missing
    numbers = table.columns.difference(["solver"])
    table[numbers] = table[numbers].apply(pd.to_numeric).replace([np.inf, -np.inf], np.nan)
    return table
