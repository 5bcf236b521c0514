"""Hands the store the runs that it lacks, from the files that the stages wrote.

A run is lacking where the store was away while its stage ran, and where DVC restored the stage from its cache. One that
is there but was never closed gets the steps that it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import params, tracking
from pipeline.data.manifest import checksum
from pipeline.machine import Machine

PREPARED = "results/data/*/summary.json"
FILES = ("results/*/*/metrics.json", PREPARED, "results/benchmark/runtime.json", "results/report/results.json")


def run(machine: Machine) -> Iterator[tuple[Path, bool]]:
    """Each stage's folder whose run was lacking, and whether all of it has arrived."""
    for file in sorted(file for pattern in FILES for file in Path().glob(pattern)):
        facts = json.loads(file.read_text(encoding="utf-8"))
        mark = facts.get("run") or checksum(file.read_bytes())
        if tracking.lacking(machine, mark):
            yield file.parent, _hand_over(machine, file, facts, mark)


def _hand_over(machine: Machine, file: Path, facts: dict[str, Any], mark: str) -> bool:
    stage = "prepare" if file.match(PREPARED) else file.parts[1]
    instance = file.parts[2] if len(file.parts) > 3 else None
    tracker = tracking.MlflowTracker(machine, mark)
    tracker.begin(stage, instance, params.locked(file), watch=False)
    with tracker:
        for name in machine.describe().keys() & facts:
            tracker.tag(f"machine.{name}", str(facts[name]))
        if facts.get("builds_on"):
            tracker.tag("builds_on", facts["builds_on"])
        if digest := facts.get("data/digest") or facts.get("manifest"):
            name = params.TRAINED_ON.get(stage) or str(instance).partition("-")[0]
            context = "evaluation" if stage in ("evaluate", "convergence") else "training"
            tracker.dataset(name, digest, facts.get("data/source") or facts["source"], context)
        step = 0
        for step, row in _log(file.with_name("log.csv"), several=len(facts.get("seeds", ())) > 1):
            tracker.metrics(row, step)
        tracker.metrics(_numbers(facts), step)
        if (trace := file.with_name("trace.csv")).exists():
            for step, row in tracking.curves(pd.read_csv(trace)):
                tracker.metrics(row, step)
        for output in sorted(path for path in file.parent.iterdir() if path.is_file() or path.name == "figures"):
            if output.name == "model.pt":
                tracker.model(output, segments=stage == "finetune")
            else:
                tracker.artifact(output)
    return tracker.complete


def _log(path: Path, several: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a training, their names as `experiment` tells them; nothing of a stage that keeps no log."""
    if not path.exists():
        return
    for row in pd.read_csv(path).to_dict("records"):
        seed, step = int(row.pop("seed")), int(row.pop("step"))
        prefix = f"seed-{seed}/" if several else ""
        yield step, {prefix + name: value for name, value in tracking.finite(row).items()}


def _numbers(facts: dict[str, Any]) -> dict[str, float]:
    """What a stage measured, among the facts beside it; of the benchmark what is relative."""
    relative = {
        f"{measure}/{name}": value
        for name, entry in facts.get("models", {}).items()
        for measure, value in entry["relative"].items()
    }
    numbers = tracking.finite(facts | relative | facts.get("headline", {}))
    return {name: v for name, v in numbers.items() if "/" in name or name in ("parameters", "flops")}
