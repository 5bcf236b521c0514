"""The paper's measures (Sec. 4), accumulated on the device that the logits live on, read once at the end.

Both accumulators speak one language: ``update(logits, targets)`` for each batch, then ``compute()``. Their
whole state is one integer tensor, ``counts``; processes that share an evaluation add theirs up first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
"""The label of pixels that no measure counts (Cityscapes' void train id)."""


class TopK:
    """Top-1 and top-5 accuracy of a classifier and the mean of its per-class accuracies.

    A sample is right at k when fewer than k classes score above its own; classes that tie with it count
    against it, so a network that answers the same everywhere is not called right.
    """

    def __init__(self, classes: int) -> None:
        """Count for ``classes`` classes; top-5 is reported only when there are more than five."""
        if classes < 1:
            raise ValueError(f"TopK needs at least one class, got {classes}")
        self.classes = classes
        self.counts = torch.zeros(3, classes, dtype=torch.int64)  # rows: samples, right at 1, right at 5

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add one batch: logits (B, classes), targets (B,) int64."""
        if logits.ndim != 2 or logits.shape[1] != self.classes or targets.shape != logits.shape[:1]:
            raise ValueError(
                f"expected logits (B, {self.classes}) with targets (B,), got {tuple(logits.shape)}, "
                f"{tuple(targets.shape)}"
            )
        self.counts = self.counts.to(logits.device)
        own = logits.gather(1, targets[:, None])
        # NaN compares false: counting what is *not* below makes a diverged network wrong instead of perfect.
        rank = (~(logits < own)).sum(1) - 1
        for row, right in enumerate((torch.ones_like(rank, dtype=torch.bool), rank < 1, rank < 5)):
            self.counts[row] += torch.bincount(targets[right], minlength=self.classes)

    def compute(self) -> dict[str, float]:
        """``eval/top1``, ``eval/top5`` (more than five classes), ``eval/macro``: per cent, NaN if empty."""
        samples, first, fifth = self.counts.cpu().numpy().astype(np.float64)
        present = samples > 0
        values = {"eval/top1": _percent(first.sum(), samples.sum())}
        if self.classes > 5:
            values["eval/top5"] = _percent(fifth.sum(), samples.sum())
        values["eval/macro"] = (
            100 * float((first[present] / samples[present]).mean()) if present.any() else float("nan")
        )
        return values


class ConfusionMatrix:
    """Counts of (truth, prediction), for classification (B, C) and segmentation (B, C, H, W) alike.

    The segmentation measures are the official Cityscapes ones: IoU of a class is TP / (TP + FP + FN) over
    all pixels of the data set whose label is not 255; the mean skips classes that the labels never show, and
    says how many it kept.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        """Count for ``classes`` classes, leaving out every target equal to ``ignore``."""
        if classes < 1:
            raise ValueError(f"ConfusionMatrix needs at least one class, got {classes}")
        self.classes = classes
        self.ignore = ignore
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, prediction]

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add one batch: logits (B, classes, ...), targets (B, ...) of class ids or the ignored label."""
        if logits.ndim < 2 or logits.shape[1] != self.classes or targets.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                f"expected logits (B, {self.classes}, ...) with targets (B, ...), got {tuple(logits.shape)}, "
                f"{tuple(targets.shape)}"
            )
        self.add(logits.argmax(1), targets)

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Add class ids predicted beside class ids wanted, of one shape."""
        self.counts = self.counts.to(targets.device)
        kept = targets != self.ignore
        pairs = targets[kept].long() * self.classes + predictions[kept].long()
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def iou(self) -> np.ndarray:
        """Intersection over union of each class (classes,); NaN where the labels never show the class."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        truth = counts.sum(1)
        union = truth + counts.sum(0) - counts.diagonal()
        present = truth > 0
        return np.where(present, counts.diagonal() / np.where(present, union, 1), np.nan)

    def compute(self) -> dict[str, float]:
        """``eval/miou``, ``eval/pixel_accuracy``, ``eval/mean_accuracy``, ``eval/classes_present``."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        truth = counts.sum(1)
        present = truth > 0
        recall = counts.diagonal()[present] / truth[present]
        return {
            "eval/miou": 100 * float(self.iou()[present].mean()) if present.any() else float("nan"),
            "eval/pixel_accuracy": _percent(counts.trace(), counts.sum()),
            "eval/mean_accuracy": 100 * float(recall.mean()) if present.any() else float("nan"),
            "eval/classes_present": float(present.sum()),
        }


def _percent(part: float, whole: float) -> float:
    return 100 * float(part / whole) if whole else float("nan")
