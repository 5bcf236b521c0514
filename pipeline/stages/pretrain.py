"""pretrain: trains a model on ImageNet (Sec. 4.2, Table 2); `finetune` starts from its backbone."""

from __future__ import annotations

from pipeline.machine import Machine
from pipeline.params import PretrainParams
from pipeline.recipe import Debug
from pipeline.train import experiment


def run(model: str, params: PretrainParams, machine: Machine, debug: Debug | None = None) -> None:
    """Trains `pretrain.<model>` and writes results/pretrain/<model>/; see `experiment.run`."""
    experiment.run("pretrain", model, params, machine, debug)
