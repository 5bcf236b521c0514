"""finetune: trains the same MDEQ for segmentation on Cityscapes, from its ImageNet backbone (Sec. 4.3, Table 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdeq.heads import resize
from mdeq.losses import HardExamples, pixel_weight, segmentation_loss
from pipeline import experiment
from pipeline.data.cityscapes import Cityscapes
from pipeline.data.manifest import located
from pipeline.metrics import ConfusionMatrix
from pipeline.training import Task

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import FinetuneParams

# published with the authors' configuration, in the order of the train ids
CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip


def run(model: str, params: FinetuneParams, machine: Machine) -> None:
    """Trains `finetune.<model>` and writes results/finetune/<model>/.

    Raises:
        CheckpointError: if the backbone does not fit.
    """
    root, manifest = located("cityscapes", machine)
    hard = HardExamples() if params.loss.ohem else None
    weights = torch.tensor(CLASS_WEIGHTS, device=machine.device) if params.loss.class_weights else None

    def task(seed: int) -> Task:
        train = Cityscapes(root, manifest, "train", crop=params.crop, augment=params.augment, seed=seed)
        return Task(
            train,
            Cityscapes(root, manifest, "val", test_size=params.test_size),
            loss=lambda logits, labels: segmentation_loss(logits, labels, weights, hard),
            metric=lambda: PixelMetric(train.classes),
            validation_batch=1,
            weight=lambda labels: pixel_weight(labels, weights),
            names=train.names,
        )

    backbone = Path("results/pretrain", params.backbone, "model.pt") if params.backbone else None
    experiment.run("finetune", model, params, machine, dataset="cityscapes", task=task, backbone=backbone)


class PixelMetric(ConfusionMatrix):
    """The confusion matrix of logits resized to their labels."""

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes, h, w), labels (B, H, W)."""
        super().update(resize(logits, targets.shape[-2:]), targets)
