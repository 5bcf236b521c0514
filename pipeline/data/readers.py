"""The splits that a model is trained and evaluated on, as its params say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import cifar10
from pipeline.data.cityscapes import Cityscapes
from pipeline.data.imagenet import ImageNet
from pipeline.data.loading import BatchDataset, FileDataset, InMemory
from pipeline.data.manifest import located, spread
from pipeline.sets import SETS

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.params import TrainParams


def training_data(
    dataset: str, params: TrainParams, machine: Machine, seed: int
) -> tuple[BatchDataset, BatchDataset]:
    """The training split (`params.limit` images of it, spread evenly) and the validation split.

    Raises:
        UserError: The set is not prepared, or its files are not those of the manifest.
    """
    root, manifest = located(dataset, machine)
    own: Any = params  # of the stage that trains on the set
    chosen: dict[str, Any] = {"augment": own.augment, "limit": own.limit}
    if dataset == "cifar10":
        train = open_cifar10(root, manifest, "train", seed=seed, device=machine.device, **chosen)
        return train, _validation(dataset, {}, machine)
    if dataset == "imagenet":
        size = {"image": own.image}
        samples = ImageNet(root, manifest, "train", size=own.image, **chosen)
    else:
        size = {"test_size": own.test_size}
        samples = Cityscapes(root, manifest, "train", crop=own.crop, **chosen)
    return FileDataset(samples, SETS[dataset], seed), _validation(dataset, size, machine)


def evaluation_data(
    dataset: str, facts: dict[str, Any], machine: Machine, limit: int | None = None
) -> BatchDataset:
    """The validation split (`limit` samples, spread evenly), sized as the model was trained.

    Args:
        dataset: cifar10, imagenet or cityscapes.
        facts: Of the model, with its `params`.
        machine: Where the data lie and, of CIFAR-10, are held.
        limit: None for all.

    Raises:
        UserError: The set is not prepared, or its files are not those of the manifest.
    """
    return _validation(dataset, facts["params"], machine, limit)


def open_cifar10(
    root: Path,
    manifest: Path | None,
    split: str,
    *,
    augment: bool = False,
    seed: int = 0,
    limit: int | None = None,
    device: str = "cpu",
) -> InMemory:
    """CIFAR-10's train or test split on a device, its files verified if there is a manifest."""
    images, labels = cifar10.read_split(root, manifest, split)
    chosen = spread(len(labels), limit)
    return InMemory(
        images[chosen],
        labels[chosen],
        cifar10.CLASSES,
        SETS["cifar10"],
        augment=augment,
        seed=seed,
        device=device,
    )


def _validation(
    dataset: str, params: dict[str, Any], machine: Machine, limit: int | None = None
) -> BatchDataset:
    root, manifest = located(dataset, machine)
    facts = SETS[dataset]
    if dataset == "cifar10":
        return open_cifar10(root, manifest, facts.validation, limit=limit, device=machine.device)
    if dataset == "imagenet":
        samples = ImageNet(root, manifest, facts.validation, size=params["image"], limit=limit)
        return FileDataset(samples, facts)
    size = params.get("test_size")
    samples = Cityscapes(
        root, manifest, facts.validation, test_size=size and tuple(size), limit=limit
    )
    return FileDataset(samples, facts)
