"""pretrain: trains a model on ImageNet (Sec. 4.2, Table 2); `finetune` starts from its backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.machine import Machine
from pipeline.params import PretrainParams
from pipeline.train import experiment

if TYPE_CHECKING:
    from pipeline.recipe import Debug


def run(model: str, params: PretrainParams, machine: Machine, debug: Debug | None = None) -> None:
    """Trains `pretrain.<model>` and writes results/pretrain/<model>/; see `experiment.run`."""
    experiment.run("pretrain", model, params, machine, debug)
