"""classify: trains a model on CIFAR-10 (Sec. 4.1, Table 1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mdeq.losses import classification_loss
from pipeline import experiment
from pipeline.data.cifar10 import open_cifar10
from pipeline.data.manifest import located
from pipeline.metrics import TopK
from pipeline.training import Task

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.train_params import ClassifyParams


def run(model: str, params: ClassifyParams, machine: Machine) -> None:
    """Trains `classify.<model>` and writes results/classify/<model>/."""
    root, manifest = located("cifar10", machine)

    def task(seed: int) -> Task:
        train = open_cifar10(root, manifest, "train", augment=params.augment, seed=seed, device=machine.device)
        test = open_cifar10(root, manifest, "test", device=machine.device)
        return Task(train, test, partial(classification_loss, label_smoothing=params.label_smoothing), lambda: TopK(train.classes), names=train.names)

    machine = replace(machine, workers=0)  # a worker could only copy what already lies on the device
    experiment.run("classify", model, params, machine, dataset="cifar10", task=task)
