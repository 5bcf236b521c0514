"""Stage evaluate: a trained model on its evaluation split, at the equilibrium (Tables 1 to 3).

Top-1 and top-5, or the mIoU of whole images; how well the equilibria were found; the confusion
matrix; pictures of predictions beside the truth; street scenes in the format of the official
evaluation; and, if asked for, accuracy and residual by evaluations of f.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mdeq.heads import resize
from mdeq.model import Network, Prediction
from mdeq.solvers import Solution
from pipeline import figures, files, tracking, weights
from pipeline.data import cityscapes
from pipeline.data.loading import Keys
from pipeline.machine import Machine
from pipeline.params import EvaluateParams, plain
from pipeline.progress import track
from pipeline.stages import writing
from pipeline.train.loop import evaluate_split
from pipeline.train.metrics import ConfusionMatrix, TopK
from pipeline.weights import Trained

OUT = Path("results/evaluate")


def run(dataset: str, model: str, params: EvaluateParams, machine: Machine) -> None:
    """Evaluates `model` on `dataset` and writes results/evaluate/<dataset>-<model>/.

    Args:
        dataset: Its name.
        model: A model of params.yaml, a name of the zoo, or a model file.
        params: The section of the data set.
        machine: Where it runs.

    Raises:
        UserError: Model or data are missing or do not fit, or this evaluation is already running.
    """
    machine.use_threads()
    trained = weights.load(dataset, model, machine, params.limit)
    instance = f"{dataset}-{trained.name}"
    out = OUT / instance
    with writing(out, machine):
        with tracking.start("evaluate", instance, plain(params), machine, out / "run.jsonl") as run:
            trained.record(run)
            began = time.perf_counter()
            values, matrix = evaluate(trained, params, machine, out / "predictions")
            values["time/seconds"] = time.perf_counter() - began
            files.write_json(out / "metrics.json", values)
            files.write_json(out / "facts.json", trained.facts | {"run": run.id})
            run.metrics(values, 0)
            curve = by_steps(trained, params, machine)
            files.write_text(out / "by_steps.csv", curve.to_csv(index=False))
            for row in curve.to_dict("records"):
                run.metrics({f"by_steps/{name}": row[name] for name in row}, row["evaluations"])
            counts, names = matrix.counts.cpu().numpy(), list(trained.names)
            table = pd.DataFrame(counts, names, names)
            files.write_text(out / "confusion.csv", table.to_csv(index_label="true"))
            figures.save(figures.confusion(counts, names, trained.title), out / "confusion.png")
            figures.save(examples(trained, params.examples, machine.device), out / "examples.png")
            for name in ("confusion.png", "examples.png"):
                run.artifact(out / name)


def evaluate(
    trained: Trained, params: EvaluateParams, machine: Machine, predictions: Path
) -> tuple[dict[str, float], ConfusionMatrix]:
    """The measures of the split and of its solves, and its confusion matrix.

    Street scenes are also written to the folder `predictions`, which is made anew.
    """
    network, classes = trained.network, trained.split.classes
    if params.steps is not None and isinstance(network, Network):
        backbone = network.backbone
        backbone.forward_solver = replace(backbone.forward_solver, steps=params.steps)
    matrix = ConfusionMatrix(classes)
    if not trained.segments:
        values = _evaluated(trained, params, machine, TopK(classes), on_batch=partial(_add, matrix))
        return values, matrix
    shutil.rmtree(predictions, ignore_errors=True)
    predictions.mkdir(parents=True)
    views = list(itertools.product(params.scales, (False, True) if params.flip else (False,)))
    write = partial(_write, predictions, iter(trained.frames))
    average = partial(averaged, views=views)
    return _evaluated(trained, params, machine, matrix, predict=average, on_batch=write), matrix


def _add(matrix: ConfusionMatrix, logits: Tensor, targets: Tensor, _: Solution | None) -> None:
    matrix.add(logits.argmax(1), targets)


def _write(
    folder: Path, frames: Iterator[Any], logits: Tensor, targets: Tensor, _: Solution | None
) -> None:
    for answer in logits.argmax(1).cpu().numpy():
        cityscapes.write_prediction(folder, next(frames), answer)


def averaged(
    network: nn.Module, images: Tensor, views: Sequence[tuple[float, bool]] = ((1.0, False),)
) -> Prediction:
    """A segmenter's answer at the size of the images (B, 3, H, W), from one or several views.

    A view is a scale of the images, and whether they are mirrored. The answer of one view is its
    logits (B, classes, H, W); of several, the logarithm of the mean of their probabilities.
    """
    size, total = images.shape[2:], torch.zeros(())
    for scale, mirrored in views:
        view = images if scale == 1 else resize(images, [round(scale * side) for side in size])
        prediction = network(view.flip(-1) if mirrored else view)
        logits = prediction.logits.flip(-1) if mirrored else prediction.logits
        logits = resize(logits.float(), size)
        if len(views) == 1:
            return Prediction(logits, prediction.equilibrium)
        total = total.to(logits) + logits.softmax(1)
    return Prediction((total / len(views)).log(), prediction.equilibrium)


def by_steps(trained: Trained, params: EvaluateParams, machine: Machine) -> pd.DataFrame:
    """The table of by_steps.csv: evaluations, accuracy or mIoU (per cent), mean relative residual.

    With a limit of T steps a solver's answer is T evaluations of f away from its start z = 0; one
    more evaluation measures its residual. The limits may exceed the one trained with, and no
    tolerance stops a solve, so that every row is at that number of evaluations. No rows if params
    ask for none, or the model has no solver.
    """
    network, up_to = trained.network, params.accuracy_up_to or 0
    if not isinstance(network, Network) or network.backbone.config.unrolled:
        up_to = 0
    measures = [trained.measure() for _ in range(up_to)]
    residuals: list[list[Tensor]] = [[] for _ in range(up_to)]
    answers: list[tuple[Tensor, Tensor]] = []

    def predict(network: Network, images: Tensor) -> Prediction:
        answers[:] = every_limit(network, images, up_to)
        return Prediction(answers[-1][0], None)

    def note(_: Tensor, targets: Tensor, solution: Solution | None) -> None:
        for (logits, residual), measure, noted in zip(answers, measures, residuals, strict=True):
            measure.update(logits.float(), targets)
            noted.append(residual.cpu().double())

    if up_to:
        _evaluated(trained, params, machine, trained.measure(), predict=predict, on_batch=note)
    rows = []
    for measure, parts in zip(measures, residuals, strict=True):
        residual = torch.cat(parts)
        mean = float(residual[residual.isfinite()].mean())
        rows.append((len(rows) + 1, measure.compute()[trained.dataset.measure], mean))
    return pd.DataFrame(rows, columns=["evaluations", "accuracy", "residual"])


def every_limit(network: Network, images: Tensor, up_to: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and relative residuals (B,) with a limit of 1, 2, ..., `up_to` steps, by one solve."""
    f, z0, scales = network.backbone.fixed_point_problem(images)
    iterates: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        iterates.append(z.clone())
        return f(z)

    usual = network.backbone.forward_solver
    solver = replace(usual, steps=up_to, tolerance=0.0, stop="relative")
    residuals = solver(watched, z0).trace.nan_to_num(torch.inf, torch.inf)
    residuals[0, residuals[0] > 0] = torch.inf  # z0 is an answer only where it solves
    states, samples = torch.stack(iterates), torch.arange(len(images), device=images.device)
    for limit in range(1, up_to + 1):
        # a solver returns the iterate of smallest residual
        residual, best = residuals[: limit + 1].min(0)
        yield network.head(scales.split(states[best, samples])), residual


def examples(trained: Trained, count: int, device: str) -> Figure:
    """The picture of `count` samples, spread evenly over the split, each predicted alone."""
    indices = np.unique(np.linspace(0, len(trained.split) - 1, count).round().astype(int))
    photos, truths, answers = [], [], []
    for index in indices:
        images, targets = trained.split[Keys(0, [int(index)])]
        with torch.no_grad():
            logits = trained.network(images.to(device)).logits.float()
        if trained.segments:
            logits = resize(logits, targets.shape[1:])
        photos.append(trained.picture(images[0]))
        truths.append(targets[0].cpu().numpy())
        answers.append(logits[0].softmax(0).cpu().numpy())
    if trained.segments:
        labels = [answer.argmax(0) for answer in answers]
        colours = cityscapes.colours()[: len(trained.names)]
        return figures.segmented(photos, truths, labels, trained.names, colours, trained.title)
    classes = [int(truth) for truth in truths]
    return figures.classified(
        np.stack(photos), classes, np.stack(answers), trained.names, trained.title
    )


def _evaluated(
    trained: Trained,
    params: EvaluateParams,
    machine: Machine,
    metric: TopK | ConfusionMatrix,
    **callbacks: Any,
) -> dict[str, float]:
    return evaluate_split(
        trained.network,
        trained.split,
        metric,
        batch=params.batch,
        device=machine.device,
        workers=0 if trained.dataset.name == "cifar10" else machine.workers,  # it is in memory
        watch=lambda loader: track(loader, f"evaluate {trained.title}"),
        **callbacks,
    )
