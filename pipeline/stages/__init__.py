"""The stages of dvc.yaml, one module each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import files, tracking
from pipeline.machine import Machine


@contextlib.contextmanager
def recorded(
    stage: str, instance: str | None, params: dict[str, Any], machine: Machine
) -> Iterator[tuple[Path, tracking.Run]]:
    """The folder of a stage's results, made if need be, and its run.

    Raises UserError if another process is writing them.
    """
    out = Path("results", stage, instance or "")
    lock = machine.root / "work" / "locks" / files.digest(str(out.resolve()).encode())
    with files.locked(lock, f"{out}: another process is writing it; let it finish"):
        out.mkdir(parents=True, exist_ok=True)
        files.remove_partial(out)
        with tracking.start(stage, instance, params, machine, out / tracking.NAME) as run:
            yield out, run


def write_measures(
    out: Path, run: tracking.Run, values: dict[str, float], facts: dict[str, Any]
) -> None:
    """Writes metrics.json and facts.json, and records the metrics."""
    files.write_json(out / "metrics.json", values)
    files.write_json(out / "facts.json", facts | {"run": run.id})
    run.metrics(values, 0)
