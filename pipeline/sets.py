"""The three data sets of the paper, as facts: which stage trains on them, how many classes and images they have."""

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


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SETS = {
    "cifar10": DataSet(
        "cifar10", "CIFAR-10", "classify", 10, 50_000, "test", "eval/top1",
        (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
    ),
    "imagenet": DataSet("imagenet", "ImageNet", "pretrain", 1000, 1_281_167, "val", "eval/top1", *_IMAGENET),
    "cityscapes": DataSet("cityscapes", "Cityscapes", "finetune", 19, 2_975, "val", "eval/miou", *_IMAGENET),
}  # fmt: skip

BY_STAGE = {dataset.stage: dataset for dataset in SETS.values()}
