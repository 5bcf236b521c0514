"""Losses on logits: cross entropy for images and for pixels, with ignored labels and OHEM.

Several heads may read one equilibrium, each its own scales; `joint_loss` adds up their losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdeq import checks
from mdeq.heads import resize

IGNORE = 255


@dataclass(frozen=True)
class HardExamples:
    """Online hard example mining (Shrivastava, Gupta and Girshick, CVPR 2016), for pixels.

    Only those count whose true class has a probability of at most `threshold`; at least `keep` of
    them: the threshold rises to the `keep`-th smallest probability where it must.
    """

    threshold: float = 0.9
    keep: int = 131072

    def __post_init__(self) -> None:
        checks.between(0, 1, threshold=self.threshold)
        checks.whole(1, keep=self.keep)


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (B, classes) and labels (B,).

    `label_smoothing` is the share of the target that all classes get evenly (Szegedy et al., 2016).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    hard: HardExamples | None = None,
) -> Tensor:
    """Mean cross entropy over the pixels that count, or 0 if none does.

    The logits are resized to the labels, as published.

    Args:
        logits: (B, classes, h, w).
        labels: (B, H, W), `IGNORE` where a pixel does not count.
        class_weights: (classes,), or None for equal weights.
        hard: Mines hard examples; None lets every pixel count.
    """
    logits = resize(logits, labels.shape[-2:]).float()
    if hard is None:
        total = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="sum")
        return total / pixel_weight(labels, class_weights).clamp(min=torch.finfo(total.dtype).tiny)
    losses = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="none")
    valid = labels != IGNORE
    if not valid.any():
        return losses.sum()
    with torch.no_grad():
        chosen = labels.masked_fill(~valid, 0)[:, None]
        probability = logits.softmax(1).gather(1, chosen)[:, 0][valid]
        kth = probability.kthvalue(min(hard.keep, probability.numel())).values
        counted = probability <= torch.clamp(kth, min=hard.threshold)
    return losses[valid][counted].mean()


def joint_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of the losses of several heads or tasks on one equilibrium.

    They share its adjoint solve, whose right side dl/dz* is the sum of theirs.

    Args:
        losses: Scalars.
        weights: One per loss; 1 for the main one by custom.

    Raises:
        ValueError: There are not as many weights as losses.
    """
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def pixel_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The total weight of the pixels that count: what `segmentation_loss` divides by."""
    counts = labels != IGNORE
    if class_weights is None:
        return counts.sum().float()
    return (class_weights[labels.masked_fill(~counts, 0)] * counts).sum()
