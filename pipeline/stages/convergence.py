"""Stage convergence: how solvers approach the equilibrium, by evaluations of f (Sec. 4.5, Figure 5).

Each solver runs on the same random batches for the same number of evaluations, never stopping early. The
iterates are the arguments of f, so recording them needs nothing of the solver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdeq.heads import resize
from mdeq.model import MDEQ, ForwardSolver, Network
from mdeq.solvers import Map
from pipeline import figures, tracking
from pipeline.data import cityscapes
from pipeline.data.loading import BatchDataset, Keys
from pipeline.data.manifest import DataError, progress
from pipeline.machine import Machine
from pipeline.train_params import ConvergenceParams
from pipeline.trained import Trained, load

LEVELS = (1e-1, 1e-2, 1e-3)
"""Residuals for which the metrics say after how many evaluations their mean was first below."""
LOOKS = (2, 4, 8, 16)
"""Evaluations of f at which the overview looks at z."""


@dataclass(frozen=True)
class Trace:
    """What happened at each evaluation of f, (evaluations, B), one column a sample.

    ``change`` is |z[k+1] - z[k]| / |z[k]|, noted at the evaluation of z[k+1] and NaN where there is no z[k]
    other than 0; ``residual`` is |f(z) - z| / |f(z)|; ``scales`` has the residual of each scale by itself.
    """

    change: Tensor
    residual: Tensor
    scales: list[Tensor]


@torch.no_grad()
def trace(f: Map, z0: Tensor, solver: ForwardSolver, steps: int, lengths: list[int]) -> Trace:
    """Run ``solver`` from ``z0`` (B, D) for ``steps`` updates, so steps + 1 calls of ``f``, without a stop.

    ``lengths`` are those of the scales, which add up to D. The calls are fewer only if every sample
    comes to an exact fixed point or leaves the finite numbers.
    """
    noted: list[Tensor] = []
    last, norm = torch.zeros_like(z0), partial(torch.linalg.vector_norm, dim=1)

    def noting(z: Tensor) -> Tensor:
        nonlocal last
        fz, size = f(z), norm(last)
        change = torch.where(size > 0, norm(z - last) / size, torch.nan)
        parts = zip((fz, *fz.split(lengths, 1)), (z, *z.split(lengths, 1)), strict=True)
        noted.append(torch.stack([change, *(norm(after - before) / norm(after) for after, before in parts)]))
        last = z.clone()
        return fz

    replace(solver, steps=steps, tolerance=0.0)(noting, z0)
    change, residual, *scales = torch.stack(noted, 1)  # (evaluations, B) each
    return Trace(change, residual, scales)


def run(dataset: str, params: ConvergenceParams, machine: Machine) -> None:
    """Trace the solvers on ``params.model`` and write ``results/convergence/<dataset>/``."""
    trained = load(dataset, params.model, machine)
    if not isinstance(trained.network, Network):
        raise DataError(f"convergence.{dataset}.model: {params.model} is an explicit model, it has no equilibrium")
    out = Path("results/convergence") / dataset
    out.mkdir(parents=True, exist_ok=True)
    with tracking.start("convergence", dataset, params, machine) as tracker:
        trained.announce(dataset, tracker)
        began = time.perf_counter()
        table = measure(trained.network.backbone, trained.split, params, machine.device, f"convergence {dataset}")
        values = summarise(table) | {"time/seconds": time.perf_counter() - began}
        table.to_csv(out / "trace.csv", index=False, float_format="%.6g")
        title = f"{params.model}, {dataset} ({trained.facts['data/source']} data)"
        figure = figures.figure5({title: table})
        for name in ("figure5.png", "figure5.svg"):
            figures.save(figure, out / name)
            tracker.artifact(out / name)
        figures.save(overview(trained, params, machine.device), out / "overview.svg")
        tracker.artifact(out / "overview.svg")
        facts = {"model": params.model, "batches": params.batches, "batch": params.batch, "seed": params.seed}
        record = values | facts | trained.facts | {"run": tracker.run_id or ""}
        (out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        tracker.metrics(values, step=0)
        for evaluation, row in tracking.curves(table):
            tracker.metrics(row, step=evaluation)


def measure(backbone: MDEQ, split: BatchDataset, params: ConvergenceParams, device: str, label: str) -> pd.DataFrame:
    """The tidy table of trace.csv: solver, batch, evaluation, change, residual, residual_1 ... of each scale."""
    drawn = _random_batches(split, params.batches, params.batch, params.seed)
    parts = []
    for number, images in enumerate(progress(drawn, label, params.batches)):
        with torch.no_grad():
            f, z0, scales = backbone.fixed_point_problem(images.to(device))
        for solver in params.solvers:
            traced = trace(f, z0, solver, params.steps, scales.lengths)
            parts.append(_rows(traced, solver.kind, number))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def overview(trained: Trained, params: ConvergenceParams, device: str) -> Figure:
    """The split's last sample: z and the answer it gives on the first solver's way, the residuals of all."""
    network: Any = trained.network
    images, targets = trained.split[Keys(0, [len(trained.split) - 1])]
    f, z0, scales = network.backbone.fixed_point_problem(images.to(device))
    states: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        states.append(z.clone())
        return f(z)

    traces = {s.kind: trace(watched, z0, s, params.steps, scales.lengths) for s in params.solvers}
    residuals = {kind: traced.residual[:, 0].tolist() for kind, traced in traces.items()}
    looks = {}
    for evaluation in sorted({min(look, len(next(iter(residuals.values())))) for look in LOOKS}):
        parts = scales.split(states[evaluation - 1])
        logits = network.head(parts)
        share = (resize(logits, targets.shape[1:]) if targets.ndim == 3 else logits).softmax(1)
        looks[evaluation] = [part[0].permute(1, 2, 0).cpu().numpy() for part in parts], share[0].cpu().numpy()
    photo, truth = trained.picture(images[0]), targets[0].numpy()
    return figures.overview(photo, truth, looks, residuals, trained.names, cityscapes.colours())


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """Of each solver: change and residual at the last evaluation, mean and deviation over the batches.

    With them the smallest residual of the mean curve, and after how many evaluations that curve first fell to
    each of ``LEVELS``; a level it never reached is left out.
    """
    values: dict[str, float] = {}
    for solver, own in table.groupby("solver", sort=False):
        last: Any = own[own["evaluation"] == own["evaluation"].max()]
        for measure in ("change", "residual"):
            values[f"{solver}/{measure}"] = float(last[measure].mean())
            values[f"{solver}/{measure}_std"] = float(last[measure].std(ddof=0))
        curve: Any = own.groupby("evaluation")["residual"].mean()
        values[f"{solver}/residual_smallest"] = float(curve.min())
        values[f"{solver}/evaluations"] = float(curve.index[-1])
        for level in LEVELS:
            reached = curve.index[curve <= level]
            if len(reached):
                values[f"{solver}/evaluations_to_{level:g}"] = float(reached[0])
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _random_batches(split: BatchDataset, count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Images of ``count`` random batches without a sample twice; a function of the seed."""
    if count * batch > len(split):
        raise DataError(f"convergence: {count} batches of {batch} need more samples than the split's {len(split)}")
    order = np.random.default_rng(seed).permutation(len(split))
    for number in range(count):
        yield split[Keys(0, order[number * batch : (number + 1) * batch].tolist())][0]


def _rows(traced: Trace, solver: str, batch: int) -> pd.DataFrame:
    """Tidy rows of one solve: means over the samples that are finite."""
    change, residual, *scales = (
        pd.DataFrame(values.double().cpu().numpy()).replace([np.inf, -np.inf], np.nan).mean(axis=1)
        for values in (traced.change, traced.residual, *traced.scales)
    )
    return pd.DataFrame(
        {
            "solver": solver,
            "batch": batch,
            "evaluation": np.arange(1, len(change) + 1),
            "change": change,
            "residual": residual,
            **{f"residual_{i}": values for i, values in enumerate(scales, 1)},
        }
    )
