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
from pipeline.data.cifar10 import Cifar10
from pipeline.data.cityscapes import Cityscapes
from pipeline.data.imagenet import ImageNet
from pipeline.data.loading import BatchDataset
from pipeline.data.manifest import DataError, located, read_summary
from pipeline.machine import Machine
from pipeline.params import TRAINED_BY
from pipeline.tracking import Tracker

FORMATS = {"cifar10": cifar10, "imagenet": imagenet, "cityscapes": cityscapes}


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, and its evaluation split.

    ``facts`` are strings and numbers to record beside every result: data, device, versions, and as ``builds_on`` the
    tracked run that made the model, empty if it was not tracked. ``frames`` are the path, width and height of each
    scene of Cityscapes' split.
    """

    network: nn.Module
    split: BatchDataset
    names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    facts: dict[str, str | int]
    frames: tuple[tuple[str, int, int], ...] = ()

    def announce(self, dataset: str, tracker: Tracker) -> None:
        """Tell a run what it builds on."""
        tracker.dataset(dataset, str(self.facts["data/digest"]), str(self.facts["data/source"]), "evaluation")
        if made_by := self.facts.get("builds_on"):
            tracker.tag("builds_on", str(made_by))

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
    split = _open(dataset, machine, meta["params"], limit)
    if split.classes != architecture.classes:
        raise DataError(
            f"{weights}: trained for {architecture.classes} classes, but the data have {split.classes}; "
            f"train it again: `python -m pipeline {TRAINED_BY[dataset]} {model}`"
        )
    facts = {"data/source": summary["source"], "data/digest": summary["manifest"], "samples": len(split)}
    facts["builds_on"] = str(meta.get("run_id") or "")
    form, frames = FORMATS[dataset], split.frames if isinstance(split, Cityscapes) else ()
    return Trained(network, split, split.names, form.MEAN, form.STD, facts | machine.describe(), frames)


def _open(dataset: str, machine: Machine, params: dict[str, Any], limit: int | None) -> Cifar10 | ImageNet | Cityscapes:
    root, manifest = located(dataset, machine)
    match dataset:
        case "cifar10":
            return cifar10.open_cifar10(root, manifest, "test", limit=limit)
        case "imagenet":
            return ImageNet(root, manifest, "val", size=params["image"], limit=limit)
    size = params["test_size"] and tuple(params["test_size"])
    return Cityscapes(root, manifest, "val", test_size=size, limit=limit)
