"""Facts of the paper's three data sets: their stage, classes, images, colours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without reading it.

    Attributes:
        name: In params.yaml, on the command line and in paths.
        title: As people call it.
        stage: The stage that trains on it.
        classes: Of the official set.
        train_images: Of the official training split.
        validation: The split that models are evaluated on.
        measure: The metric that the paper reports, a key of metrics.json.
        mean: Of each channel in 0..1 (RGB), subtracted from the pixels.
        std: Of each channel in 0..1, which divides them.
    """

    name: str
    title: str
    stage: str
    classes: int
    train_images: int
    validation: str
    measure: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_ALL = (
    DataSet(
        "cifar10",
        "CIFAR-10",
        "classify",
        classes=10,
        train_images=50_000,
        validation="test",
        measure="eval/top1",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    DataSet(
        "imagenet",
        "ImageNet",
        "pretrain",
        classes=1000,
        train_images=1_281_167,
        validation="val",
        measure="eval/top1",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    ),
    DataSet(
        "cityscapes",
        "Cityscapes",
        "finetune",
        classes=19,
        train_images=2_975,
        validation="val",
        measure="eval/miou",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    ),
)
SETS = {dataset.name: dataset for dataset in _ALL}
BY_STAGE = {dataset.stage: dataset for dataset in SETS.values()}
