"""classify: trains a model on CIFAR-10 (Sec. 4.1, Table 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.machine import Machine
from pipeline.params import ClassifyParams
from pipeline.train import experiment

if TYPE_CHECKING:
    from pipeline.recipe import Debug


def run(model: str, params: ClassifyParams, machine: Machine, debug: Debug | None = None) -> None:
    """Trains `classify.<model>` and writes results/classify/<model>/; see `experiment.run`."""
    experiment.run("classify", model, params, machine, debug)
