"""classify: trains a model on CIFAR-10 (Sec. 4.1, Table 1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mdeq.losses import classification_loss
from pipeline import experiment
from pipeline.data.cifar10 import CLASSES, open_cifar10
from pipeline.data.manifest import data_root, read_summary
from pipeline.metrics import TopK
from pipeline.training import Task

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import ClassifyParams


def run(model: str, params: ClassifyParams, machine: Machine) -> None:
    """Trains `classify.<model>` and writes results/classify/<model>/."""
    folder = Path("results/data/cifar10")
    root = data_root("cifar10", read_summary("cifar10")["source"], machine)

    def task(seed: int) -> Task:
        manifest, device = folder / "manifest.csv", machine.device
        train = open_cifar10(root, manifest, "train", augment=params.augment, seed=seed, device=device)
        test = open_cifar10(root, manifest, "test", augment=False, seed=seed, device=device)
        return Task(train, test, classification_loss, lambda: TopK(train.classes), names=CLASSES)

    machine = replace(machine, workers=0)  # a worker could only copy what already lies on the device
    experiment.run("classify", model, params, machine, dataset="cifar10", task=task)
