"""Finished models: where they lie, and each with the split of the data that it is evaluated on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pipeline import files
from pipeline.data.loading import BatchDataset
from pipeline.data.manifest import read_summary
from pipeline.data.readers import evaluation_data
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.sets import SETS, DataSet
from pipeline.tracking import Run
from pipeline.train.checkpoints import MODEL, load_model
from pipeline.train.metrics import ConfusionMatrix, TopK

RESULTS = Path("results")
ZOO = Path(__file__).parents[1] / "weights"
DEFAULT = "cifar10-"  # how the name of the zoo's model begins that `predict` uses


def zoo() -> list[str]:
    """The names of the models that come with the project."""
    return sorted(path.stem for path in ZOO.glob("*.safetensors"))


def find(name: str | None, stage: str | None = None) -> Path:
    """The file of the model that a user names: of `stage` in params.yaml, of the zoo, or a path.

    None names the zoo's model of CIFAR-10. Raises UserError if there is no such model.
    """
    if name is None:
        name = next((known for known in zoo() if known.startswith(DEFAULT)), None)
    if name is None:
        raise UserError("no model comes with this copy of the project; name a model file")
    places = [ZOO / f"{name}.safetensors", Path(name)]
    problem = f"{name}: no such model file"
    if stage:
        places.insert(0, RESULTS / stage / name / MODEL)
        problem = f"{places[0]}: no such file; run `python -m pipeline {stage} {name}` first"
    for path in places:
        if os.path.isfile(path):
            return path
    raise UserError(f"{problem}; the project comes with: {', '.join(zoo()) or 'none'}")


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on its device, and its evaluation split."""

    name: str  # of the model; part of a folder's name
    network: nn.Module
    split: BatchDataset
    dataset: DataSet
    facts: dict[str, Any]  # what facts.json of a result begins with

    @property
    def segments(self) -> bool:
        """Whether pixels are classified, not images."""
        return self.dataset.measure == "eval/miou"

    @property
    def title(self) -> str:
        """For figures."""
        return f"{self.name}, {self.dataset.title} ({self.facts['source']} data)"

    def metric(self) -> TopK | ConfusionMatrix:
        """The metric of the paper, with nothing counted."""
        return (ConfusionMatrix if self.segments else TopK)(self.split.classes)

    def picture(self, image: Tensor) -> np.ndarray:
        """The photo (H, W, 3) in 0..1 that the normalised `image` (3, H, W) was made from."""
        mean, std = np.array(self.dataset.mean), np.array(self.dataset.std)
        return np.clip(image.permute(1, 2, 0).cpu().numpy() * std + mean, 0, 1)

    def record(self, run: Run) -> None:
        """Records in a run what it builds on."""
        run.dataset(self.dataset.name, self.facts["digest"], self.facts["source"], "evaluation")
        run.tag("builds_on", self.facts["builds_on"])


def load(dataset: str, model: str, machine: Machine, limit: int | None = None) -> Trained:
    """The model that `find` finds, and the split that it is evaluated on, as it was trained for.

    With a `limit` there are as many samples, spread evenly over the split. A model that is named by
    its path is called by its digest, too. Raises UserError if model or data are missing or damaged,
    or have other classes.
    """
    stage = SETS[dataset].stage
    path = find(model, stage)
    network, architecture, own = load_model(path, machine.device)
    if own.get("dataset") != dataset:
        raise UserError(f"{path}: trained on {own.get('dataset')}, not on {dataset}")
    split = evaluation_data(dataset, own, machine, limit)
    if architecture.classes != split.classes:
        raise UserError(
            f"{path}: trained for {architecture.classes} classes, the data have {split.classes}; "
            f"train it again: `python -m pipeline {stage} {model}`"
        )
    summary, digest = read_summary(dataset), files.file_digest(path)
    by_path = path == Path(model) or os.sep in model
    name = f"{path.stem}-{digest[:8]}" if by_path else model
    facts = {
        "dataset": dataset,
        "model": name,
        "model_digest": digest,
        "builds_on": own.get("run") or "unknown",
        "source": summary["source"],
        "digest": summary["manifest"],
        "samples": len(split),
        **machine.describe(),
    }
    return Trained(name, network, split, SETS[dataset], facts)
