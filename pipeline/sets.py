"""Facts of the paper's three data sets: their stage, classes, images, colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SetName = Literal["cifar10", "imagenet", "cityscapes"]
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without reading it."""

    name: str  # in params.yaml, on the command line and in paths
    title: str  # as people call it
    stage: str  # that trains on it
    classes: int  # of the official set
    train_images: int  # of the official training split
    validation: str  # the split that models are evaluated on
    measure: str  # the metric that the paper reports, a key of metrics.json
    mean: RGB = (0.485, 0.456, 0.406)  # ImageNet's, of channels in 0..1; subtracted from pixels
    std: RGB = (0.229, 0.224, 0.225)  # divides them


_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_ALL = (
    DataSet("cifar10", "CIFAR-10", "classify", 10, 50_000, "test", "eval/top1", _MEAN, _STD),
    DataSet("imagenet", "ImageNet", "pretrain", 1000, 1_281_167, "val", "eval/top1"),
    DataSet("cityscapes", "Cityscapes", "finetune", 19, 2_975, "val", "eval/miou"),
)
SETS = {dataset.name: dataset for dataset in _ALL}
BY_STAGE = {dataset.stage: dataset for dataset in SETS.values()}
