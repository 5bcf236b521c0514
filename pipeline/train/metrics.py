"""What an evaluation measures: accuracies and IoU (Sec. 4), and how well equilibria were found.

Metrics have two methods, `update(logits, targets)` for each batch and `compute()`, and one state,
`counts`: whole numbers on the device of the logits, which several processes add up.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mdeq.heads import resize
from mdeq.losses import IGNORE
from mdeq.solvers import Solution

MARKS = (2, 4, 8, 16, 32)  # evaluations of f after which the residual is reported


class TopK:
    """Top-1 and top-5 accuracy and the mean of the accuracies per class.

    A sample is correct at k if fewer than k classes score above its own. Classes that tie with it
    count against it, so a network with the same answer for everything is never correct.
    """

    def __init__(self, classes: int) -> None:
        """Counts for `classes` classes; top-5 is reported only if there are more than five."""
        self.classes = classes
        self.counts = torch.zeros(3, classes, dtype=torch.int64)  # samples, correct at 1, at 5

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes), targets (B,)."""
        _check_shapes(logits, targets, self.classes)
        own = logits.gather(1, targets[:, None])
        # NaN compares false: counting what is *not* below makes a diverged network wrong
        rank = (~(logits < own)).sum(1) - 1
        rows = [
            torch.bincount(targets[rank < k], minlength=self.classes) for k in (self.classes, 1, 5)
        ]
        self.counts = self.counts.to(logits.device) + torch.stack(rows)

    def compute(self) -> dict[str, float]:
        """`eval/top1`, `eval/top5` (above five classes), `eval/macro` in per cent; NaN if empty."""
        samples, first, fifth = self.counts.cpu().numpy().astype(np.float64)
        present = samples > 0
        values = {"eval/top1": _percent(first.sum(), samples.sum())}
        if self.classes > 5:
            values["eval/top5"] = _percent(fifth.sum(), samples.sum())
        values["eval/macro"] = _mean_percent(first[present] / samples[present])
        return values


class ConfusionMatrix:
    """Counts of (truth, prediction), for labels of images and of pixels alike.

    The measures of segmentation are the official ones of Cityscapes: the IoU of a class is
    TP / (TP + FP + FN) over all pixels of the data set whose label is not `IGNORE`; the mean leaves
    out classes that the labels never show and reports how many it kept.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, prediction]

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes, ...), targets (B, ...).

        Logits of another height and width than their labels are resized to them first.
        """
        if logits.ndim == 4 and targets.ndim == 3:
            logits = resize(logits, targets.shape[-2:])
        _check_shapes(logits, targets, self.classes)
        self.add(logits.argmax(1), targets)

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Adds predicted class ids and true ones, of the same shape."""
        kept = targets != IGNORE
        pairs = targets[kept].long() * self.classes + predictions[kept].long()
        counted = torch.bincount(pairs, minlength=self.classes**2)
        self.counts = self.counts.to(targets.device) + counted.view(self.classes, self.classes)

    def iou(self) -> np.ndarray:
        """Intersection over union (classes,); NaN where the labels never show the class."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        hits, truth = counts.diagonal(), counts.sum(1)
        union = truth + counts.sum(0) - hits
        return np.where(truth > 0, hits / np.maximum(union, 1), np.nan)

    def compute(self) -> dict[str, float]:
        """`eval/miou`, `eval/pixel_accuracy`, `eval/mean_accuracy`, `eval/classes_present`."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        truth = counts.sum(1)
        present = truth > 0
        return {
            "eval/miou": _mean_percent(self.iou()[present]),
            "eval/pixel_accuracy": _percent(counts.trace(), counts.sum()),
            "eval/mean_accuracy": _mean_percent(counts.diagonal()[present] / truth[present]),
            "eval/classes_present": float(present.sum()),
        }


class SolverStatistics:
    """How well the equilibria of a data set were found; one row per sample."""

    def __init__(self) -> None:
        self.samples = torch.zeros(0, 4 + len(MARKS), dtype=torch.float64)

    def update(self, solution: Solution) -> None:
        """Adds the solution of a batch."""
        nfe = torch.full_like(solution.relative, solution.nfe)
        after = [solution.trace[min(mark, solution.nfe) - 1] for mark in MARKS]
        columns = [solution.relative, solution.converged, solution.steps, nfe, *after]
        rows = torch.stack([column.detach().cpu().double() for column in columns], dim=1)
        self.samples = torch.cat([self.samples, rows])

    def compute(self) -> dict[str, float]:
        """The figures of the data set; empty if nothing was solved.

        - `solver/relative_residual`, `..._max`: |f(z) - z| / |f(z)| of the answers, of samples
          with a finite iterate; the others are counted in `solver/failed`.
        - `solver/converged`: the share of samples whose residual reached the tolerance.
        - `solver/nfe`, `solver/steps_to_best`: evaluations of f, updates until the best iterate.
        - `solver/residual_after_<k>`: the mean residual at the k-th evaluation of f.
        """
        if not len(self.samples):
            return {}
        relative, converged, steps, nfe, *after = self.samples.T
        finite = relative[relative.isfinite()]
        values = {
            "solver/relative_residual": float(finite.mean()),
            "solver/relative_residual_max": float(finite.max()) if len(finite) else math.nan,
            "solver/converged": float(converged.mean()),
            "solver/failed": float(len(relative) - len(finite)),
            "solver/nfe": float(nfe.mean()),
            "solver/steps_to_best": float(steps.mean()),
        }
        for mark, residual in zip(MARKS, after, strict=True):
            if mark <= values["solver/nfe"]:
                values[f"solver/residual_after_{mark}"] = float(
                    residual[residual.isfinite()].mean()
                )
        return values


def _check_shapes(logits: Tensor, targets: Tensor, classes: int) -> None:
    if logits.shape != (len(targets), classes, *targets.shape[1:]):
        raise ValueError(
            f"expected logits (B, {classes}, ...) and targets (B, ...), "
            f"not {tuple(logits.shape)} and {tuple(targets.shape)}"
        )


def _percent(part: float, whole: float) -> float:
    return 100 * float(part / whole) if whole else math.nan


def _mean_percent(shares: np.ndarray) -> float:
    return 100 * float(shares.mean()) if len(shares) else math.nan
