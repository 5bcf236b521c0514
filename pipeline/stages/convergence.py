"""Stage convergence: how solvers approach the equilibrium (Sec. 4.5, Figure 5).

Each solver runs on the same random batches for the same number of evaluations of f, never stopping
early. The iterates are the arguments of f, so recording them needs nothing of the solver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdeq.heads import resize
from mdeq.jacobian import spectral_radius
from mdeq.model import MDEQ, Network
from mdeq.solvers import Map
from pipeline import figures, files, tracking, weights
from pipeline.data import cityscapes
from pipeline.data.loading import BatchDataset, Keys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import ConvergenceParams, Forward, plain
from pipeline.progress import track
from pipeline.stages import writing
from pipeline.weights import Trained

OUT = Path("results/convergence")
LEVELS = (1e-1, 1e-2, 1e-3)
"""Residuals for which the metrics say after how many evaluations their mean was first below."""
LOOKS = (2, 4, 8, 16)
"""Evaluations of f at which the overview looks at z."""
RADIUS = "jacobian/spectral_radius"


@dataclass(frozen=True)
class Trace:
    """What happened at each evaluation of f, (evaluations, B), one column per sample.

    Attributes:
        change: |z[k+1] - z[k]| / |z[k]|, noted at the evaluation of z[k+1]; NaN where z[k] is 0.
        residual: |f(z) - z| / |f(z)|.
        scales: The residual of each scale by itself.
        best: (B, D) each sample's iterate of smallest residual.
    """

    change: Tensor
    residual: Tensor
    scales: list[Tensor]
    best: Tensor


def run(dataset: str, params: ConvergenceParams, machine: Machine) -> None:
    """Traces the solvers on `params.model` and writes results/convergence/<dataset>/.

    Raises:
        UserError: Model or data are missing, or the model has no equilibrium, or this stage is
            already running.
    """
    machine.use_threads()
    trained = weights.load(dataset, params.model, machine)
    if not isinstance(trained.network, Network):
        key = f"convergence.{dataset}.model"
        raise UserError(f"{key}: {params.model} is an explicit model and has no equilibrium")
    out = OUT / dataset
    with writing(out, machine):
        file = out / "run.jsonl"
        with tracking.start("convergence", dataset, plain(params), machine, file) as run:
            trained.record(run)
            began = time.perf_counter()
            table, radii = measure(trained.network.backbone, trained.split, params, machine.device)
            values = summarise(table) | radius(radii)
            values["time/seconds"] = time.perf_counter() - began
            files.write_text(out / "trace.csv", table.to_csv(index=False, float_format="%.6g"))
            files.write_json(out / "metrics.json", values)
            files.write_json(out / "facts.json", trained.facts | {"run": run.id})
            run.metrics(values, 0)
            for evaluation, row in _curves(table):
                run.metrics(row, evaluation)
            figure = figures.figure5({trained.title: table})
            for name in ("figure5.png", "figure5.svg"):
                figures.save(figure, out / name)
                run.artifact(out / name)
            figures.save(overview(trained, params, machine.device), out / "overview.svg")
            run.artifact(out / "overview.svg")


@torch.no_grad()
def trace(f: Map, z0: Tensor, solver: Forward, steps: int, lengths: list[int]) -> Trace:
    """Runs a solver from `z0` (B, D) for `steps` updates, so steps + 1 calls of `f`, to the end.

    `lengths` are those of the scales, which add up to D. The calls are fewer only if every sample
    comes to an exact fixed point or leaves the finite numbers.
    """
    rows: list[Tensor] = []
    last = torch.zeros_like(z0)

    def watched(z: Tensor) -> Tensor:
        nonlocal last
        value = f(z)
        residuals = [_relative(value - z, value)]
        for after, before in zip(value.split(lengths, 1), z.split(lengths, 1), strict=True):
            residuals.append(_relative(after - before, after))
        change = torch.where(last.any(1), _relative(z - last, last), torch.nan)
        rows.append(torch.stack([change, *residuals]))
        last = z.clone()
        return value

    solution = replace(solver, steps=steps, tolerance=0.0)(watched, z0)
    change, residual, *scales = torch.stack(rows, 1)
    return Trace(change, residual, scales, solution.value)


def _relative(difference: Tensor, base: Tensor) -> Tensor:
    return torch.linalg.vector_norm(difference, dim=1) / torch.linalg.vector_norm(base, dim=1)


def measure(
    backbone: MDEQ, split: BatchDataset, params: ConvergenceParams, device: str
) -> tuple[pd.DataFrame, Tensor]:
    """The table of trace.csv, and the spectral radius of df/dz at z* of each sample, (samples,).

    Columns: solver, batch, evaluation, change, residual, and residual_1, ... of each scale; means
        over
    the finite samples. z* is the best iterate of the first solver.
    """
    drawn = random_batches(split, params.batches, params.batch, params.seed)
    parts, radii = [], []
    for number, images in enumerate(track(drawn, "convergence: batches", params.batches)):
        with torch.no_grad():
            f, z0, scales = backbone.fixed_point_problem(images.to(device))
        traces = [trace(f, z0, solver, params.steps, scales.lengths) for solver in params.solvers]
        for solver, traced in zip(params.solvers, traces, strict=True):
            parts.append(rows(traced, solver.kind, number))
        torch.manual_seed(params.seed)
        radii.append(spectral_radius(f, traces[0].best))
    return pd.concat(parts, ignore_index=True), torch.cat(radii).cpu()


def random_batches(split: BatchDataset, count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Images of `count` random batches without a sample twice; a function of the seed.

    Raises:
        UserError: The split has too few samples.
    """
    if count * batch > len(split):
        raise UserError(
            f"convergence: {count} batches of {batch} are more than the {len(split)} samples"
        )
    order = np.random.default_rng(seed).permutation(len(split))
    for number in range(count):
        yield split[Keys(0, order[number * batch : (number + 1) * batch].tolist())][0]


def rows(traced: Trace, solver: str, batch: int) -> pd.DataFrame:
    """Tidy rows of one solve: means over the samples that are finite."""
    columns = {"change": traced.change, "residual": traced.residual}
    columns |= {f"residual_{i}": values for i, values in enumerate(traced.scales, 1)}
    evaluations = np.arange(1, len(traced.residual) + 1)
    table = pd.DataFrame({"solver": solver, "batch": batch, "evaluation": evaluations})
    for name, values in columns.items():
        finite = torch.where(values.isfinite(), values.double(), torch.nan)
        table[name] = finite.nanmean(1).cpu().numpy()
    return table


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """The figures of each solver.

    Change and residual at the last evaluation, mean and deviation over the batches; the smallest
    residual of the mean curve; after how many evaluations that curve first fell to each of
    `LEVELS`, left out where it never did; and contraction_<i>, the factor by which an evaluation
    shrinks the residual of scale i, as a geometric mean from the first evaluation to the best one.
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
        for name in own.filter(regex=r"^residual_\d+$"):
            values[f"{solver}/contraction_{name.removeprefix('residual_')}"] = contraction(
                own, str(name)
            )
    return {name: value for name, value in values.items() if np.isfinite(value)}


def contraction(table: pd.DataFrame, column: str) -> float:
    """The mean factor per evaluation on a residual's mean curve, from its start to its minimum."""
    curve: Any = table.groupby("evaluation")[column].mean()
    curve = curve.dropna()
    best = int(curve.to_numpy().argmin()) if len(curve) else 0
    return float((curve.iloc[best] / curve.iloc[0]) ** (1 / best)) if best else math.nan


def radius(radii: Tensor) -> dict[str, float]:
    """Mean and largest spectral radius of df/dz at z*; below 1 iterating f converges nearby."""
    finite = radii[radii.isfinite()]
    if not len(finite):
        return {}
    return {RADIUS: float(finite.mean()), f"{RADIUS}_max": float(finite.max())}


@torch.no_grad()
def overview(trained: Trained, params: ConvergenceParams, device: str) -> Figure:
    """The split's last sample: z and its answer on the first solver's way, and all residuals."""
    network: Any = trained.network
    images, targets = trained.split[Keys(0, [len(trained.split) - 1])]
    f, z0, scales = network.backbone.fixed_point_problem(images.to(device))
    states: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        states.append(z.clone())
        return f(z)

    residuals = {}
    for solver in params.solvers:
        traced = trace(watched, z0, solver, params.steps, scales.lengths)
        residuals[solver.kind] = traced.residual[:, 0].tolist()
    last = len(next(iter(residuals.values())))
    looks = {}
    for evaluation in sorted({min(look, last) for look in LOOKS}):
        parts = scales.split(states[evaluation - 1])
        logits = network.head(parts)
        if targets.ndim == 3:
            logits = resize(logits, targets.shape[1:])
        pictures = [part[0].permute(1, 2, 0).cpu().numpy() for part in parts]
        looks[evaluation] = pictures, logits.softmax(1)[0].cpu().numpy()
    photo, truth = trained.picture(images[0]), targets[0].cpu().numpy()
    colours = cityscapes.colours()[: len(cityscapes.class_names())]
    return figures.overview(photo, truth, looks, residuals, trained.names, colours)


def _curves(table: pd.DataFrame) -> Iterator[tuple[int, dict[str, float]]]:
    """The mean curve of each solver: evaluation, and its metrics."""
    means: Any = table.groupby(["solver", "evaluation"], sort=False)[["change", "residual"]].mean()
    for (solver, evaluation), row in means.iterrows():
        yield evaluation, {f"solver/{solver}_{name}": value for name, value in row.dropna().items()}
