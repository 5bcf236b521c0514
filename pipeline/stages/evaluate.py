"""Stage evaluate: a trained model on its evaluation split, at the equilibrium (Tables 1 to 3).

Top-1 and top-5, or the mIoU of whole images; how well the equilibria were found; the confusion
matrix; pictures of predictions beside the truth; street scenes in the format of the official
evaluation; and, if asked for, accuracy and residual by evaluations of f.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdeq.heads import resize
from mdeq.model import Network
from mdeq.solvers import Solution
from pipeline import figures, files, weights
from pipeline.data import cityscapes
from pipeline.data.loading import Keys, batches
from pipeline.machine import Machine
from pipeline.params import EvaluateParams, plain
from pipeline.progress import track
from pipeline.stages import recorded, write_measures
from pipeline.train.loop import evaluate_split
from pipeline.train.metrics import ConfusionMatrix
from pipeline.weights import Trained


def run(dataset: str, model: str, params: EvaluateParams, machine: Machine) -> None:
    """Evaluates `model` on `dataset` and writes results/evaluate/<dataset>-<model>/.

    `model` is one of params.yaml or of the zoo, or a file. Raises UserError if model or data are
    missing or do not fit, or this evaluation is already running.
    """
    machine.use_threads()
    if dataset == "cifar10":  # is in memory, which loaders could only copy
        machine = replace(machine, workers=0)
    trained = weights.load(dataset, model, machine, params.limit)
    instance = f"{dataset}-{trained.name}"
    with recorded("evaluate", instance, plain(params), machine) as (out, record):
        trained.record(record)
        began = time.perf_counter()
        values, matrix = evaluate(trained, params, machine, out / "predictions")
        values["time/seconds"] = time.perf_counter() - began
        write_measures(out, record, values, trained.facts)
        curve = by_steps(trained, params, machine)
        files.write_text(out / "by_steps.csv", curve.to_csv(index=False))
        for row in curve.add_prefix("by_steps/").to_dict("records"):
            record.metrics(row, row["by_steps/evaluations"])
        counts, names = matrix.counts.cpu().numpy(), list(trained.split.names)
        table = pd.DataFrame(counts, names, names)
        files.write_text(out / "confusion.csv", table.to_csv(index_label="true"))
        figures.save(figures.confusion(counts, names, trained.title), out / "confusion.png")
        figures.save(examples(trained, params.examples, machine.device), out / "examples.png")
        record.artifact(out / "confusion.png")
        record.artifact(out / "examples.png")


def evaluate(
    trained: Trained, params: EvaluateParams, machine: Machine, predictions: Path
) -> tuple[dict[str, float], ConfusionMatrix]:
    """The measures of the split and of its solves, and its confusion matrix.

    Street scenes are also written to the folder `predictions`, which is made anew.
    """
    network, split = trained.network, trained.split
    if params.steps is not None and isinstance(network, Network):
        backbone = network.backbone
        backbone.forward_solver = replace(backbone.forward_solver, steps=params.steps)
    matrix = ConfusionMatrix(split.classes)
    if trained.segments:
        shutil.rmtree(predictions, ignore_errors=True)
        predictions.mkdir(parents=True)
    frames = iter(getattr(split, "frames", ()))

    def note(logits: Tensor, targets: Tensor, _: Solution | None) -> None:
        if not trained.segments:
            matrix.update(logits, targets)
            return
        for answer in resize(logits, targets.shape[1:]).argmax(1).cpu().numpy():
            cityscapes.write_prediction(predictions, next(frames), answer)

    values = evaluate_split(
        network,
        split,
        matrix if trained.segments else trained.metric(),
        batch=params.batch,
        device=machine.device,
        workers=machine.workers,
        on_batch=note,
        watch=partial(track, title=f"evaluate {trained.title}"),
    )
    return values, matrix


def by_steps(trained: Trained, params: EvaluateParams, machine: Machine) -> pd.DataFrame:
    """The table of by_steps.csv: evaluations, accuracy or mIoU (per cent), mean relative residual.

    With a limit of T steps a solver's answer is T evaluations of f away from its start z = 0; one
    more evaluation measures its residual. The limits may exceed the one trained with, and no
    tolerance stops a solve, so that every row is at that number of evaluations. No rows if params
    ask for none, or the model has no solver.
    """
    network, up_to = trained.network, params.accuracy_up_to
    if not up_to or not isinstance(network, Network) or network.backbone.config.unrolled:
        return pd.DataFrame(columns=["evaluations", "accuracy", "residual"])
    metrics = [trained.metric() for _ in range(up_to)]
    residuals: list[list[Tensor]] = [[] for _ in range(up_to)]
    workers = machine.workers
    loader = batches(trained.split, params.batch, seed=0, epoch=0, shuffle=False, workers=workers)
    with torch.inference_mode():
        for images, targets in track(loader, f"by evaluations of f: {trained.title}"):
            answers = every_limit(network, images.to(machine.device), up_to)
            for row, (logits, residual) in enumerate(answers):
                metrics[row].update(logits.float(), targets.to(machine.device))
                residuals[row].append(residual[residual.isfinite()].double().cpu())
    table = pd.DataFrame({"evaluations": range(1, up_to + 1)})
    table["accuracy"] = [metric.compute()[trained.dataset.measure] for metric in metrics]
    table["residual"] = [float(torch.cat(parts).mean()) for parts in residuals]
    return table


def every_limit(network: Network, images: Tensor, up_to: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and relative residuals (B,) with a limit of 1, 2, ..., `up_to` steps, by one solve."""
    f, z0, scales = network.backbone.fixed_point_problem(images)
    iterates: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        iterates.append(z.clone())
        return f(z)

    usual = network.backbone.forward_solver
    solver = replace(usual, steps=up_to, tolerance=0.0, stop="relative")
    trace = solver(watched, z0).trace.nan_to_num(torch.inf, torch.inf)
    trace[0, trace[0] > 0] = torch.inf  # z0 is an answer only where it solves
    states, samples = torch.stack(iterates), torch.arange(len(images), device=images.device)
    for limit in range(1, up_to + 1):
        # a solver returns the iterate of smallest residual
        residual, best = trace[: limit + 1].min(0)
        yield network.head(scales.split(states[best, samples])), residual


def examples(trained: Trained, count: int, device: str) -> Figure:
    """The picture of `count` samples, spread evenly over the split, each predicted alone."""
    photos, truths, answers = [], [], []
    for index in np.unique(np.linspace(0, len(trained.split) - 1, count).round().astype(int)):
        images, targets = trained.split[Keys(0, [int(index)])]
        with torch.no_grad():
            logits = trained.network(images.to(device)).logits.float()
        if trained.segments:
            logits = resize(logits, targets.shape[1:])
        photos.append(trained.picture(images[0]))
        truths.append(targets[0].cpu().numpy())
        answers.append(logits[0].softmax(0).cpu().numpy())
    names, title = trained.split.names, trained.title
    if not trained.segments:
        return figures.classified(np.stack(photos), truths, np.stack(answers), names, title)
    labels = [answer.argmax(0) for answer in answers]
    colours = cityscapes.colours()[: len(names)]
    return figures.segmented(photos, truths, labels, names, colours, title)
