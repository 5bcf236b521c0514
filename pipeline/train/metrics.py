"""What an evaluation measures: accuracies and IoU (Sec. 4), and how well equilibria were found.

A metric has one state, `counts`: whole numbers, which several processes add up. What has no samples
is NaN.
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
        self.counts = torch.zeros(3, classes, dtype=torch.int64)  # samples, correct at 1, at 5

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes), targets (B,)."""
        classes = self.counts.shape[1]
        own = logits.gather(1, targets[:, None])
        # NaN compares false: counting what is *not* below makes a diverged network wrong
        rank = (~(logits < own)).sum(1) - 1
        rows = [torch.bincount(targets[rank < k], minlength=classes) for k in (classes, 1, 5)]
        self.counts = self.counts.to(logits.device) + torch.stack(rows)

    def compute(self) -> dict[str, float]:
        """`eval/top1`, `eval/top5` (above five classes), `eval/macro`, in per cent."""
        samples, first, fifth = self.counts.cpu().double()
        values = {"eval/top1": 100 * float(first.sum() / samples.sum())}
        if len(samples) > 5:
            values["eval/top5"] = 100 * float(fifth.sum() / samples.sum())
        values["eval/macro"] = 100 * float((first / samples).nanmean())
        return values


class ConfusionMatrix:
    """Counts of (truth, prediction), for labels of images and of pixels alike.

    The measures of segmentation are the official ones of Cityscapes: the IoU of a class is
    TP / (TP + FP + FN) over all pixels of the data set whose label is not `IGNORE`; the mean leaves
    out classes that the labels never show and reports how many it kept.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, prediction]

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes, ...), resized to the targets (B, ...) if need be."""
        if logits.ndim == 4 and targets.ndim == 3:
            logits = resize(logits, targets.shape[-2:])
        self.add(logits.argmax(1), targets)

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Adds predicted class ids and true ones, of the same shape."""
        classes, kept = len(self.counts), targets != IGNORE
        pairs = targets[kept].long() * classes + predictions[kept].long()
        counted = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self.counts = self.counts.to(targets.device) + counted

    def iou(self) -> np.ndarray:
        """Intersection over union (classes,); NaN where the labels never show the class."""
        counts = self.counts.cpu().double()
        hits, truth = counts.diagonal(), counts.sum(1)
        share = hits / (truth + counts.sum(0) - hits)
        return share.masked_fill(truth == 0, math.nan).numpy()

    def compute(self) -> dict[str, float]:
        """`eval/miou`, `eval/pixel_accuracy`, `eval/mean_accuracy`, `eval/classes_present`."""
        counts = self.counts.cpu().double()
        hits, truth = counts.diagonal(), counts.sum(1)
        return {
            "eval/miou": 100 * float(torch.from_numpy(self.iou()).nanmean()),
            "eval/pixel_accuracy": 100 * float(hits.sum() / counts.sum()),
            "eval/mean_accuracy": 100 * float((hits / truth).nanmean()),
            "eval/classes_present": float((truth > 0).sum()),
        }


Metric = TopK | ConfusionMatrix


class SolverStatistics:
    """How well the equilibria of a data set were found; one row per sample."""

    def __init__(self) -> None:
        self.samples = torch.zeros(0, 3 + len(MARKS), dtype=torch.float64)

    def update(self, solution: Solution) -> None:
        """Adds the solution of a batch."""
        nfe = torch.full_like(solution.relative, solution.nfe)
        after = [solution.trace[min(mark, solution.nfe) - 1] for mark in MARKS]
        columns = [solution.relative, solution.converged, nfe, *after]
        rows = torch.stack([column.detach().cpu().double() for column in columns], dim=1)
        self.samples = torch.cat([self.samples, rows])

    def compute(self) -> dict[str, float]:
        """The figures of the data set; empty if nothing was solved.

        - `solver/relative_residual`, `..._max`: |f(z) - z| / |f(z)| of the answers, of samples
          with a finite iterate; the others are counted in `solver/failed`.
        - `solver/converged`: the share of samples whose residual reached the tolerance.
        - `solver/nfe`: evaluations of f; `solver/residual_after_<k>`: the residual at the k-th.
        """
        if not len(self.samples):
            return {}
        relative, converged, nfe, *after = self.samples.T
        finite = relative[relative.isfinite()]
        values = {
            "solver/relative_residual": float(finite.mean()),
            "solver/relative_residual_max": max(finite.tolist(), default=math.nan),
            "solver/converged": float(converged.mean()),
            "solver/failed": float(len(relative) - len(finite)),
            "solver/nfe": float(nfe.mean()),
        }
        for mark, residual in zip(MARKS, after, strict=True):
            if mark <= values["solver/nfe"]:
                mean = residual[residual.isfinite()].mean()
                values[f"solver/residual_after_{mark}"] = float(mean)
        return values
