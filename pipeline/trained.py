"""A trained model together with the evaluation split it is judged on: what `evaluate` and `convergence` begin
with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import checkpoints
from pipeline.data import cifar10, cityscapes, imagenet
from pipeline.data.loading import BatchDataset, Keys
from pipeline.data.manifest import DataError, data_root, read_summary
from pipeline.machine import Machine
from pipeline.params import TRAINED_BY
from pipeline.tracking import Tracker


class First:
    """The first ``count`` samples of a split."""

    def __init__(self, whole: BatchDataset, count: int) -> None:
        self.whole, self.classes = whole, whole.classes
        self.count = min(count, len(whole))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        return self.whole[keys]

    def name(self, index: int) -> str:
        return self.whole.name(index)


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, and its evaluation split.

    ``facts`` are strings and numbers to record beside every result: data, device, versions. ``training_run``
    is the tracked run that made the model, empty if it was not tracked. ``frames`` are the path, width and height of
    each scene of Cityscapes' split.
    """

    network: nn.Module
    split: BatchDataset
    names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    facts: dict[str, str | int]
    training_run: str = ""
    frames: tuple[tuple[str, int, int], ...] = ()

    def announce(self, dataset: str, tracker: Tracker) -> None:
        """Tell a run what it builds on."""
        tracker.dataset(dataset, str(self.facts["data/digest"]), str(self.facts["data/source"]), "evaluation")
        if self.training_run:
            tracker.tag("builds_on", self.training_run)

    def picture(self, image: Tensor) -> np.ndarray:
        """The photo (H, W, 3) in 0..1 that the normalised ``image`` (3, H, W) was made from."""
        pixels = image.permute(1, 2, 0).numpy() * np.array(self.std) + np.array(self.mean)
        return np.clip(pixels, 0, 1)


def load(dataset: str, model: str, machine: Machine, limit: int | None = None) -> Trained:
    """Load ``results/<stage>/<model>/model.pt`` and the set's evaluation split, at the size it was trained
    for.

    Args:
        limit: Keep only the first samples of the split.

    Raises:
        DataError: The manifest or the model is missing, or the model knows another number of classes.
    """
    weights = Path("results") / TRAINED_BY[dataset] / model / "model.pt"
    if not weights.is_file():
        raise DataError(f"{weights}: no such file; run `python -m pipeline {TRAINED_BY[dataset]} {model}` first")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    network, architecture, meta = checkpoints.load_model(weights, machine.device)
    summary = read_summary(dataset)
    split, names, (mean, std) = _open(dataset, data_root(dataset, summary["source"], machine), meta["params"])
    if split.classes != architecture.classes:
        raise DataError(
            f"{weights}: trained for {architecture.classes} classes, but the data have {split.classes}; "
            f"train it again: `python -m pipeline {TRAINED_BY[dataset]} {model}`"
        )
    if limit is not None:
        split = First(split, limit)
    facts: dict[str, str | int] = {
        "data/source": summary["source"],
        "data/digest": summary["manifest"],
        "samples": len(split),
    }
    run = str(meta.get("run_id") or "")
    manifest = Path("results/data/cityscapes/manifest.csv")
    frames = cityscapes.frames(manifest, "val") if dataset == "cityscapes" else ()
    return Trained(network, split, names, mean, std, facts | machine.describe(), run, frames)


def _open(dataset: str, root: Path, params: dict[str, Any]) -> tuple[BatchDataset, tuple[str, ...], Any]:
    manifest = Path("results/data") / dataset / "manifest.csv"
    if dataset == "cifar10":
        split = cifar10.open_cifar10(root, manifest, "test", augment=False, seed=0)
        return split, cifar10.CLASSES, (cifar10.MEAN, cifar10.STD)
    if dataset == "imagenet":
        photos = imagenet.open_imagenet(root, manifest, "val", size=params["image"], augment=False, seed=0)
        return photos, tuple(photos.class_names), (imagenet.MEAN, imagenet.STD)
    size = params["test_size"]
    scenes = cityscapes.open_cityscapes(
        root, manifest, "val", test_size=tuple(size) if size else None, augment=False, seed=0
    )
    return scenes, cityscapes.class_names(), (cityscapes.MEAN, cityscapes.STD)
