"""The files that the stages wrote, read back. A missing or damaged one never stops the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pipeline.sets import BY_STAGE, SETS

COLUMNS = {  # that a table must have
    "history.csv": {"epoch"},
    "by_steps.csv": {"evaluations", "accuracy", "residual"},
    "trace.csv": {"solver", "batch", "evaluation", "change", "residual"},
    "times.csv": {"model", "round", "seconds"},
}
TEXTS = ("solver", "model")  # columns that hold no numbers


@dataclass(frozen=True)
class Facts:
    """What the report uses of facts.json."""

    device: str = ""
    commit: str = ""
    run: str | None = ""
    source: str = ""
    seeds: list[int] = field(default_factory=list)
    samples: int | None = None
    reference: str = ""
    memory: str = ""
    batch: int | None = None


@dataclass(frozen=True)
class Summary:
    """What the report uses of a data set's summary.json."""

    source: str
    images: dict[str, int]
    manifest: str = ""


@dataclass(frozen=True)
class Result:
    """The metrics.json, facts.json and tables (by file name) of one instance of a stage."""

    metrics: dict[str, float]
    facts: Facts
    tables: dict[str, pd.DataFrame]


@dataclass
class Results:
    """All results by folder, as "classify/mdeq-small"; the data sets; a line per file left out."""

    found: dict[str, Result] = field(default_factory=dict)
    data: dict[str, Summary] = field(default_factory=dict)
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
        summary = _json(results, root / "data" / name / "summary.json", Summary)
        results.data |= {name: summary} if summary else {}
    folders = [root / "benchmark"]
    for stage in (*BY_STAGE, "evaluate", "convergence"):
        folders += sorted(path for path in (root / stage).glob("*") if path.is_dir())
    for folder in folders:
        metrics = _json(results, folder / "metrics.json", dict[str, float]) or {}
        facts = _json(results, folder / "facts.json", Facts) or Facts()
        tables = {name: _table(results, folder / name) for name in COLUMNS}
        kept = {name: table for name, table in tables.items() if table is not None}
        if metrics or kept:
            results.found[folder.relative_to(root).as_posix()] = Result(metrics, facts, kept)
    return results


def _json(results: Results, path: Path, kind: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        return _left_out(results, path, error)


def _table(results: Results, path: Path) -> pd.DataFrame | None:
    """A table with at least one row; an empty file is how a stage says that there is none."""
    if not path.is_file() or not path.read_bytes().strip():
        return None
    try:
        table = pd.read_csv(path)
        missing = COLUMNS[path.name] - set(table)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        numbers = table.columns.difference(TEXTS)
        table[numbers] = table[numbers].apply(pd.to_numeric).replace([np.inf, -np.inf], np.nan)
    except (OSError, ValueError, TypeError) as error:
        return _left_out(results, path, error)
    return table if len(table) else None


def _left_out(results: Results, path: Path, error: Exception) -> None:
    reason = "; ".join(str(error).splitlines()[:3])
    results.problems.append(f"{path}: damaged ({reason[:120]})")
