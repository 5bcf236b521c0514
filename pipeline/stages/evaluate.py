"""Stage evaluate: a trained model on its evaluation split, at the equilibrium (Tables 1-3).

Top-1 and top-5, or mIoU of whole images, by default at a single scale without flips; how well the equilibrium was
found; the confusion matrix; pictures of predictions beside the truth; street scenes in the benchmark's format.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mdeq.heads import resize
from mdeq.model import Network
from mdeq.solvers import Solution
from pipeline import figures, tracking
from pipeline.data import cityscapes
from pipeline.data.loading import Keys, batches
from pipeline.data.manifest import progress
from pipeline.machine import Machine
from pipeline.metrics import ConfusionMatrix, TopK
from pipeline.params import EvaluateCityscapes, EvaluateParams
from pipeline.trained import Trained, load

View = tuple[float, bool]
"""How a scene is looked at: its scale, and whether it is mirrored."""
PLAIN: View = (1.0, False)


class SolverStatistics:
    """How well the equilibria of a data set were found, a sample at a time, gathered over batches."""

    def __init__(self) -> None:
        """Begin without a sample."""
        self._batches: list[Tensor] = []

    def update(self, solution: Solution) -> None:
        """Add the solution of one batch."""
        nfe = torch.full_like(solution.relative, solution.nfe)
        columns = (solution.relative, solution.converged, solution.steps, nfe)
        self._batches.append(torch.stack([column.detach().cpu().double() for column in columns]))

    def compute(self) -> dict[str, float]:
        """Residuals |f(z) - z| / |f(z)|, evaluations of f and updates until the best iterate; empty without
        solves.

        A sample without a finite iterate is left out of the residuals and counted in ``solver/failed``.
        """
        if not self._batches:
            return {}
        relative, converged, steps, nfe = torch.cat(self._batches, 1)
        finite = relative[relative.isfinite()]
        return {
            "solver/relative_residual": float(finite.mean()),
            "solver/relative_residual_max": float(finite.max()) if len(finite) else float("nan"),
            "solver/converged": float(converged.mean()),
            "solver/failed": float(len(relative) - len(finite)),
            "solver/nfe": float(nfe.mean()),
            "solver/steps_to_best": float(steps.mean()),
        }


def run(dataset: str, model: str, params: EvaluateParams, machine: Machine) -> None:
    """Evaluate ``model`` on ``dataset`` and write ``results/evaluate/<dataset>-<model>/``."""
    instance = f"{dataset}-{model}"
    trained = load(dataset, model, machine, params.limit)
    if params.steps is not None:
        _limit_solver(trained.network, params.steps)
    views, predictions = [PLAIN], None
    out = Path("results/evaluate") / instance
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(params, EvaluateCityscapes):
        views = list(itertools.product(params.scales, (False, True) if params.flip else (False,)))
        predictions = out / "predictions"
        shutil.rmtree(predictions, ignore_errors=True)
        predictions.mkdir()
    with tracking.start("evaluate", instance, params, machine) as tracker:
        trained.announce(dataset, tracker)
        began = time.perf_counter()
        values, matrix = evaluate(trained, params.batch, machine, f"evaluate {instance}", views, predictions)
        values["time/seconds"] = time.perf_counter() - began
        counts, names = matrix.counts.cpu().numpy(), list(trained.names)
        pd.DataFrame(counts, names, names).to_csv(out / "confusion.csv", index_label="true")
        title = f"{model} on {dataset} ({trained.facts['data/source']} data)"
        figures.save(figures.confusion(counts, trained.names, title), out / "confusion.png")
        figures.save(examples(trained, params.examples, machine, title), out / "examples.png")
        by_steps = accuracy_by_steps(trained, params, machine, instance)
        record = values | by_steps | trained.facts | {"run": tracker.run_id or ""}
        (out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        tracker.metrics(values, step=0)
        for name in ("confusion.png", "examples.png", "metrics.json"):
            tracker.artifact(out / name)


def accuracy_by_steps(
    trained: Trained, params: EvaluateParams, machine: Machine, instance: str
) -> dict[str, dict[str, float]]:
    """{"by_steps": {"1": accuracy in per cent with one step of the solver, ...}}; empty if it is not asked for.

    A limit of T steps costs T evaluations of f to the answer and one more for its residual.
    """
    network, split, up_to = trained.network, trained.split, params.accuracy_up_to
    if not up_to or not isinstance(network, Network) or network.backbone.config.unrolled:
        return {}
    measures: list[TopK | ConfusionMatrix] = []
    loader = batches(split, params.batch, seed=0, epoch=0, shuffle=False, workers=machine.workers)
    for images, targets in progress(loader, f"evaluate {instance}, by steps", len(loader)):
        measure = ConfusionMatrix if targets.ndim == 3 else TopK
        measures = measures or [measure(split.classes) for _ in range(up_to)]
        limited = answers_by_steps(network, images.to(machine.device), targets.shape[1:], up_to)
        for own, logits in zip(measures, limited, strict=True):
            own.update(logits, targets.to(machine.device))
    name = "eval/top1" if isinstance(measures[0], TopK) else "eval/miou"
    return {"by_steps": {str(steps): own.compute()[name] for steps, own in enumerate(measures, 1)}}


@torch.no_grad()
def answers_by_steps(network: Network, images: Tensor, size: Sequence[int], up_to: int) -> Iterator[Tensor]:
    """Logits of a batch with a limit of 1, 2, ... ``up_to`` steps: all from one solve, which a limit only cuts short.

    ``size`` as in `predict`.
    """
    f, z0, scales = network.backbone.fixed_point_problem(images)
    iterates: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        iterates.append(z.clone())
        return f(z)

    solver = replace(network.backbone.forward_solver, steps=up_to)
    residuals = solver(watched, z0).trace.nan_to_num(torch.inf, torch.inf)
    residuals[0, residuals[0] > solver.tolerance] = torch.inf  # the start is an answer only where it solves
    states, samples = torch.stack(iterates, 1), torch.arange(len(images), device=images.device)
    for limit in range(1, up_to + 1):
        logits = network.head(scales.split(states[samples, residuals[: limit + 1].argmin(0)]))
        yield resize(logits, size) if size else logits


def _limit_solver(network: nn.Module, steps: int) -> None:
    if isinstance(network, Network):
        network.backbone.forward_solver = replace(network.backbone.forward_solver, steps=steps)


def evaluate(
    trained: Trained,
    batch: int,
    machine: Machine,
    label: str,
    views: Sequence[View] = (PLAIN,),
    predictions: Path | None = None,
) -> tuple[dict[str, float], ConfusionMatrix]:
    """Measures of the split and of its solves, and its confusion matrix.

    Args:
        trained: The model and its split.
        batch: Samples at once.
        machine: Where.
        label: Names the progress bar.
        views: Of each scene, whose probabilities are averaged.
        predictions: The folder that scenes are written to, for the official evaluation; None: they are not.
    """
    split = trained.split
    topk, matrix, solves = TopK(split.classes), ConfusionMatrix(split.classes), SolverStatistics()
    segmentation, frames = False, iter(trained.frames)
    loader = batches(split, batch, seed=0, epoch=0, shuffle=False, workers=machine.workers)
    for images, targets in progress(loader, label, len(loader)):
        targets = targets.to(machine.device)
        segmentation = targets.ndim == 3
        logits, solution = predict(trained.network, images.to(machine.device), targets.shape[1:], views)
        answers = logits.argmax(1)
        matrix.add(answers, targets)
        if not segmentation:
            topk.update(logits, targets)
        elif predictions is not None:
            for answer, frame in zip(answers.cpu().numpy(), frames, strict=False):
                cityscapes.write_prediction(predictions, frame, answer)
        if solution is not None:
            solves.update(solution)
    measures = matrix.compute() if segmentation else topk.compute()
    return measures | solves.compute(), matrix


@torch.no_grad()
def predict(
    network: nn.Module, images: Tensor, size: Sequence[int], views: Sequence[View] = (PLAIN,)
) -> tuple[Tensor, Solution | None]:
    """Logits of a batch at the equilibrium, resized to the label's ``size`` (H, W); and the last solve, if any.

    ``size`` is empty for classification. Of several ``views`` the logits are the mean of their probabilities.
    """
    total: Any = 0
    for scale, mirrored in views:
        view = images if scale == 1 else resize(images, [round(scale * side) for side in images.shape[2:]])
        prediction = network(view.flip(-1) if mirrored else view)
        logits = prediction.logits.float().flip(-1) if mirrored else prediction.logits.float()
        if logits.shape[2:] != tuple(size):
            logits = resize(logits, size)
        total = total + (logits.softmax(1) / len(views) if len(views) > 1 else logits)
    return total, prediction.equilibrium.solution if prediction.equilibrium else None


def examples(trained: Trained, count: int, machine: Machine, title: str) -> Figure:
    """The picture of ``count`` samples, spread evenly over the split, each predicted alone."""
    indices = np.unique(np.linspace(0, len(trained.split) - 1, count).round().astype(int))
    photos, truths, logits = [], [], []
    for index in indices:
        images, targets = trained.split[Keys(0, [int(index)])]
        answer, _ = predict(trained.network, images.to(machine.device), targets.shape[1:])
        photos.append(trained.picture(images[0]))
        truths.append(targets[0].numpy())
        logits.append(answer[0].cpu())
    if truths[0].ndim == 0:
        probabilities = torch.stack(logits).softmax(1).numpy()
        labels = [int(truth) for truth in truths]
        return figures.classified(np.stack(photos), labels, probabilities, trained.names, title)
    predictions = [scores.argmax(0).numpy() for scores in logits]
    return figures.segmented(photos, truths, predictions, trained.names, cityscapes.colours(), title)
