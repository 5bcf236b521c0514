"""pretrain: trains a model on ImageNet (Sec. 4.2, Table 2); its backbone is what finetune starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdeq.losses import classification_loss
from pipeline import experiment
from pipeline.data.imagenet import ImageNet
from pipeline.data.manifest import located
from pipeline.metrics import TopK
from pipeline.training import Task

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import PretrainParams


def run(model: str, params: PretrainParams, machine: Machine) -> None:
    """Trains `pretrain.<model>` and writes results/pretrain/<model>/."""
    root, manifest = located("imagenet", machine)

    def task(seed: int) -> Task:
        train = ImageNet(root, manifest, "train", size=params.image, augment=params.augment, seed=seed)
        val = ImageNet(root, manifest, "val", size=params.image)
        return Task(train, val, classification_loss, lambda: TopK(train.classes), names=train.names)

    experiment.run("pretrain", model, params, machine, dataset="imagenet", task=task)
