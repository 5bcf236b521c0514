"""Stage evaluate: a trained model on its evaluation split, at the equilibrium (Tables 1-3).

Top-1 and top-5, or mIoU of whole images at a single scale without flips; how well the equilibrium was found;
the confusion matrix; pictures of predictions beside the truth.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mdeq.model import Network
from mdeq.solvers import Solution
from pipeline import figures, tracking
from pipeline.data import cityscapes
from pipeline.data.loading import Keys, batches
from pipeline.machine import Machine
from pipeline.metrics import ConfusionMatrix, TopK
from pipeline.params import EvaluateParams
from pipeline.trained import Trained, load


class SolverStatistics:
    """How well the equilibria of a data set were found, a sample at a time, gathered over batches."""

    def __init__(self) -> None:
        """Begin without a sample."""
        self._relative: list[Tensor] = []
        self._converged: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._nfe: list[int] = []

    def update(self, solution: Solution) -> None:
        """Add the solution of one batch."""
        self._relative.append(solution.relative.cpu())
        self._converged.append(solution.converged.cpu())
        self._steps.append(solution.steps.cpu())
        self._nfe += [solution.nfe] * len(solution.relative)

    def compute(self) -> dict[str, float]:
        """Residuals |f(z) - z| / |f(z)|, evaluations of f and updates until the best iterate; empty without
        solves.

        A sample without a finite iterate is left out of the residuals and counted in ``solver/failed``.
        """
        if not self._nfe:
            return {}
        relative = torch.cat(self._relative).double()
        finite = relative[relative.isfinite()]
        return {
            "solver/relative_residual": float(finite.mean()) if len(finite) else float("nan"),
            "solver/relative_residual_max": float(finite.max()) if len(finite) else float("nan"),
            "solver/converged": float(torch.cat(self._converged).double().mean()),
            "solver/failed": float(len(relative) - len(finite)),
            "solver/nfe": float(np.mean(self._nfe)),
            "solver/steps_to_best": float(torch.cat(self._steps).double().mean()),
        }


def run(dataset: str, model: str, params: EvaluateParams, machine: Machine) -> None:
    """Evaluate ``model`` on ``dataset`` and write ``results/evaluate/<dataset>-<model>/``."""
    instance = f"{dataset}-{model}"
    trained = load(dataset, model, machine, params.limit)
    if params.steps is not None and isinstance(trained.network, Network):
        backbone = trained.network.backbone
        backbone.forward_solver = replace(backbone.forward_solver, steps=params.steps)
    out = Path("results/evaluate") / instance
    out.mkdir(parents=True, exist_ok=True)
    with tracking.start("evaluate", instance, params, machine) as tracker:
        trained.announce(dataset, tracker)
        began = time.perf_counter()
        values, matrix = evaluate(trained, params.batch, machine, f"evaluate {instance}")
        values["time/seconds"] = time.perf_counter() - began
        counts = matrix.counts.cpu().numpy()
        _write_confusion(out / "confusion.csv", counts, trained.names)
        title = f"{model} on {dataset} ({trained.facts['data/source']} data)"
        figures.save(figures.confusion(counts, trained.names, title), out / "confusion.png")
        figures.save(examples(trained, params.examples, machine, title), out / "examples.png")
        (out / "metrics.json").write_text(
            json.dumps(values | trained.facts | {"run": tracker.run_id or ""}, indent=2) + "\n"
        )
        tracker.metrics(values, step=0)
        for name in ("confusion.png", "examples.png", "metrics.json"):
            tracker.artifact(out / name)


def evaluate(trained: Trained, batch: int, machine: Machine, label: str) -> tuple[dict[str, float], ConfusionMatrix]:
    """Measures of the split and of its solves, and its confusion matrix; ``label`` names the progress bar."""
    split = trained.split
    topk, matrix, solves = TopK(split.classes), ConfusionMatrix(split.classes), SolverStatistics()
    segmentation = False
    loader = batches(split, batch, seed=0, epoch=0, shuffle=False, workers=machine.workers)
    with progress_bar() as progress:
        for images, targets in progress.track(loader, total=-(-len(split) // batch), description=label):
            targets = targets.to(machine.device)
            segmentation = targets.ndim == 3
            logits, solution = predict(trained.network, images.to(machine.device), targets.shape[1:])
            matrix.update(logits, targets)
            if not segmentation:
                topk.update(logits, targets)
            if solution is not None:
                solves.update(solution)
    measures = matrix.compute() if segmentation else topk.compute()
    return measures | solves.compute(), matrix


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Solution | None]:
    """Logits of a batch at the equilibrium, resized to the label's ``size`` (H, W); and the solve, if there
    was one.

    ``size`` is empty for classification.
    """
    prediction = network(images)
    logits = prediction.logits.float()
    if logits.shape[2:] != size:
        logits = interpolate(logits, size=size, mode="bilinear", align_corners=True)
    return logits, prediction.equilibrium.solution if prediction.equilibrium else None


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


def progress_bar() -> Progress:
    """A bar with the number of batches and the time that is left."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def _write_confusion(path: Path, counts: np.ndarray, names: tuple[str, ...]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true", *names])
        writer.writerows([name, *map(int, row)] for name, row in zip(names, counts, strict=True))
