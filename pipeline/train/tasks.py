"""What each training stage optimises and measures: classes of images, or classes of pixels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mdeq.losses import HardExamples, classification_loss, pixel_weight, segmentation_loss
from pipeline.data.loading import BatchDataset
from pipeline.params import FinetuneParams, TrainParams
from pipeline.train.loop import Task
from pipeline.train.metrics import ConfusionMatrix, TopK

# published with the authors' configuration, in the order of the train ids
CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip


def make_task(
    params: TrainParams, train: BatchDataset, validation: BatchDataset, device: str
) -> Task:
    """Segmentation if the params are those of `finetune` (Sec. 4.3), else classification."""
    if isinstance(params, FinetuneParams):
        return _segmentation(params, train, validation, device)
    return Task(
        train,
        validation,
        loss=partial(classification_loss, label_smoothing=params.label_smoothing),
        metric=lambda: TopK(train.classes),
    )


def _segmentation(
    params: FinetuneParams, train: BatchDataset, validation: BatchDataset, device: str
) -> Task:
    hard = HardExamples() if params.loss.ohem else None
    weights = torch.tensor(CLASS_WEIGHTS, device=device) if params.loss.class_weights else None

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(logits, labels, weights, hard)

    return Task(
        train,
        validation,
        loss,
        metric=lambda: ConfusionMatrix(train.classes),
        validation_batch=1,
        weight=lambda labels: pixel_weight(labels, weights),
    )
