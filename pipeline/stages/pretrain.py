"""pretrain: trains a model on ImageNet (Sec. 4.2, Table 2); its backbone is what finetune starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdeq.losses import classification_loss
from pipeline import experiment
from pipeline.data.imagenet import open_imagenet
from pipeline.data.manifest import data_root, read_summary
from pipeline.metrics import TopK
from pipeline.training import Task

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import PretrainParams


def run(model: str, params: PretrainParams, machine: Machine) -> None:
    """Trains `pretrain.<model>` and writes results/pretrain/<model>/."""
    folder = Path("results/data/imagenet")
    root = data_root("imagenet", read_summary("imagenet")["source"], machine)

    def task(seed: int) -> Task:
        manifest = folder / "manifest.csv"
        train = open_imagenet(root, manifest, "train", size=params.image, augment=params.augment, seed=seed)
        val = open_imagenet(root, manifest, "val", size=params.image, augment=False, seed=seed)
        return Task(train, val, classification_loss, lambda: TopK(train.classes), names=tuple(train.class_names))

    experiment.run("pretrain", model, params, machine, dataset="imagenet", task=task)
