"""The splits that a model is trained and evaluated on, as its params say."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.loading import BatchDataset, Chosen
from pipeline.data.manifest import data_root, read_summary
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
    settings = asdict(params)
    train = _open(dataset, "train", settings, machine, params.limit, params.augment, seed)
    return train, _open(dataset, SETS[dataset].validation, settings, machine)


def evaluation_data(
    dataset: str, facts: dict[str, Any], machine: Machine, limit: int | None = None
) -> BatchDataset:
    """The validation split (`limit` samples, spread evenly), sized as the model was trained.

    Args:
        dataset: cifar10, imagenet or cityscapes.
        facts: Of the model, with its `params`.
        machine: Where the data lie.
        limit: None for all.

    Raises:
        UserError: The set is not prepared, or its files are not those of the manifest.
    """
    return _open(dataset, SETS[dataset].validation, facts["params"], machine, limit)


def _open(
    dataset: str,
    split: str,
    params: dict[str, Any],
    machine: Machine,
    limit: int | None = None,
    augment: bool = False,
    seed: int = 0,
) -> BatchDataset:
    root = data_root(dataset, read_summary(dataset)["source"], machine)
    manifest = Path("results/data", dataset, "manifest.csv")
    # Imported by name, so that a training depends on the code of its own set alone
    reader = importlib.import_module(f"pipeline.data.{dataset}")
    samples = reader.Split(root, manifest, split, params, augment)
    return Chosen(samples, SETS[dataset], limit, seed)
