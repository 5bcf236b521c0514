"""Stage convergence: how solvers approach the equilibrium (Sec. 4.5, Figure 5).

Each solver runs on the same random batches for the same number of evaluations of f, never stopping
early. The iterates are the arguments of f, so recording them needs nothing of the solver.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from pipeline import figures, files, weights
from pipeline.data import cityscapes
from pipeline.data.loading import BatchDataset, Keys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import ConvergenceParams, Forward, plain
from pipeline.progress import track
from pipeline.stages import recorded, write_measures
from pipeline.weights import Trained

LEVELS = (1e-1, 1e-2, 1e-3)  # of the residual: metrics say when its mean first fell to them
LOOKS = (2, 4, 8, 16)  # evaluations of f at which the overview looks at z


def run(dataset: str, params: ConvergenceParams, machine: Machine) -> None:
    """Traces the solvers on `params.model` and writes results/convergence/<dataset>/.

    Raises UserError if model or data are missing, the model has no equilibrium, or this stage is
    already running.
    """
    machine.use_threads()
    trained = weights.load(dataset, params.model, machine)
    if not isinstance(trained.network, Network):
        key = f"convergence.{dataset}.model"
        raise UserError(f"{key}: {params.model} is an explicit model and has no equilibrium")
    with recorded("convergence", dataset, plain(params), machine) as (out, record):
        trained.record(record)
        began = time.perf_counter()
        table, radii = measure(trained.network.backbone, trained.split, params, machine.device)
        values = summarise(table, radii)
        values["time/seconds"] = time.perf_counter() - began
        write_measures(out, record, values, trained.facts)
        files.write_text(out / "trace.csv", table.to_csv(index=False, float_format="%.6g"))
        curves: Any = table.groupby(["solver", "evaluation"])[["change", "residual"]].mean()
        for (solver, evaluation), row in curves.iterrows():
            record.metrics(row.add_prefix(f"solver/{solver}_").to_dict(), evaluation)
        figure = figures.figure5({trained.title: table})
        drawn = {"figure5.png": figure, "figure5.svg": figure}
        drawn["overview.svg"] = overview(trained, params, machine.device)
        for name, figure in drawn.items():
            figures.save(figure, out / name)
            record.artifact(out / name)


@torch.no_grad()
def trace(
    f: Map, z0: Tensor, solver: Forward, steps: int, lengths: list[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Runs a solver from `z0` (B, D) for `steps` updates, so steps + 1 calls of `f`, to the end.

    Calls are fewer only if every sample comes to an exact fixed point or leaves the finite numbers.
    `lengths` are those of the scales, which add up to D. Returns what was measured at each call,
    (evaluations, B), and each sample's iterate of smallest residual, (B, D): `residual` is
    |f(z) - z| / |f(z)|, `residual_1`, ... that of each scale by itself, and `change` is
    |z[k+1] - z[k]| / |z[k]|, noted at the evaluation of z[k+1], NaN where z[k] is 0.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    last = torch.zeros_like(z0)

    def watched(z: Tensor) -> Tensor:
        nonlocal last
        value = f(z)
        rows["change"].append(torch.where(last.any(1), _relative(z - last, last), torch.nan))
        rows["residual"].append(_relative(value - z, value))
        scales = zip(value.split(lengths, 1), z.split(lengths, 1), strict=True)
        for number, (after, before) in enumerate(scales, 1):
            rows[f"residual_{number}"].append(_relative(after - before, after))
        last = z.clone()
        return value

    solution = replace(solver, steps=steps, tolerance=0.0)(watched, z0)
    return {name: torch.stack(parts) for name, parts in rows.items()}, solution.value


def _relative(difference: Tensor, base: Tensor) -> Tensor:
    return torch.linalg.vector_norm(difference, dim=1) / torch.linalg.vector_norm(base, dim=1)


def measure(
    backbone: MDEQ, split: BatchDataset, params: ConvergenceParams, device: str
) -> tuple[pd.DataFrame, Tensor]:
    """The table of trace.csv, and the spectral radius of df/dz at z* of each sample, (samples,).

    Columns: solver, batch, evaluation, and those of `trace`, means over the finite samples. z* is
    the best iterate of the first solver.
    """
    tables, radii = [], []
    drawn = random_batches(split, params.batches, params.batch, params.seed)
    for number, images in enumerate(track(drawn, "convergence: batches", params.batches)):
        with torch.no_grad():
            f, z0, scales = backbone.fixed_point_problem(images.to(device))
        for place, solver in enumerate(params.solvers):
            columns, best = trace(f, z0, solver, params.steps, scales.lengths)
            tables.append(tabulate(columns, solver.kind, number))
            if place == 0:
                torch.manual_seed(params.seed)
                radii.append(spectral_radius(f, best))
    return pd.concat(tables, ignore_index=True), torch.cat(radii)


def random_batches(split: BatchDataset, count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Images of `count` random batches without a sample twice; UserError if there are too few."""
    if count * batch > len(split):
        raise UserError(
            f"convergence: {count} batches of {batch} are more than the {len(split)} samples"
        )
    order = np.random.default_rng(seed).permutation(len(split))
    for indices in order[: count * batch].reshape(count, batch):
        yield split[Keys(0, indices.tolist())][0]


def tabulate(columns: Mapping[str, Tensor], solver: str, batch: int) -> pd.DataFrame:
    """Rows of trace.csv of one solve: means over the samples that are finite."""
    table = pd.DataFrame()
    for name, values in columns.items():
        finite = torch.where(values.isfinite(), values.double(), torch.nan)
        table[name] = finite.nanmean(1).cpu().numpy()
    keys = {"solver": solver, "batch": batch, "evaluation": np.arange(1, len(table) + 1)}
    return pd.concat([pd.DataFrame(keys), table], axis=1)


def summarise(table: pd.DataFrame, radii: Tensor) -> dict[str, float]:
    """The numbers of metrics.json.

    Of each solver: change and residuals at the last evaluation, mean and deviation over the
    batches; after how many evaluations the mean residual first fell to each of `LEVELS`, left out
    where it never did. Mean and largest spectral radius of df/dz at z*: below 1, iterating f
    converges nearby.
    """
    values: dict[str, float] = {}
    for solver, own in table.groupby("solver", sort=False):
        batches: Any = own.drop(columns=["solver", "batch"]).groupby("evaluation")
        means, deviations = batches.mean(), batches.std(ddof=0)
        for measure in means:
            values[f"{solver}/{measure}"] = means[measure].iloc[-1]
            values[f"{solver}/{measure}_std"] = deviations[measure].iloc[-1]
        values[f"{solver}/evaluations"] = means.index[-1]
        for level in LEVELS:
            reached = means.index[means["residual"] <= level]
            if len(reached):
                values[f"{solver}/evaluations_to_{level:g}"] = reached[0]
    finite = radii[radii.isfinite()]
    if len(finite):
        values["jacobian/spectral_radius"] = finite.mean().item()
        values["jacobian/spectral_radius_max"] = finite.max().item()
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


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
        columns, _ = trace(watched, z0, solver, params.steps, scales.lengths)
        residuals[solver.kind] = columns["residual"][:, 0].tolist()
    last = len(residuals[params.solvers[0].kind])
    looks = {}
    for evaluation in sorted({min(look, last) for look in LOOKS}):
        parts = scales.split(states[evaluation - 1])
        logits = network.head(parts)
        if trained.segments:
            logits = resize(logits, targets.shape[1:])
        pictures = [part[0].permute(1, 2, 0).cpu().numpy() for part in parts]
        looks[evaluation] = pictures, logits.softmax(1)[0].cpu().numpy()
    photo, truth = trained.picture(images[0]), targets[0].cpu().numpy()
    colours = cityscapes.colours()[: len(cityscapes.class_names())]
    return figures.overview(photo, truth, looks, residuals, trained.split.names, colours)
