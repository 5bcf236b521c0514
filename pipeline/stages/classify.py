"""classify: trains a model on CIFAR-10 (Sec. 4.1, Table 1)."""

from __future__ import annotations

from pipeline.machine import Machine
from pipeline.params import ClassifyParams
from pipeline.recipe import Debug
from pipeline.train import experiment


def run(model: str, params: ClassifyParams, machine: Machine, debug: Debug | None = None) -> None:
    """Trains `classify.<model>` and writes results/classify/<model>/; see `experiment.run`."""
    experiment.run("classify", model, params, machine, debug)
