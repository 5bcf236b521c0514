"""finetune: trains the same MDEQ for segmentation on Cityscapes (Sec. 4.3, Table 3)."""

from __future__ import annotations

from pipeline.machine import Machine
from pipeline.params import FinetuneParams
from pipeline.recipe import Debug
from pipeline.train import experiment


def run(model: str, params: FinetuneParams, machine: Machine, debug: Debug | None = None) -> None:
    """Trains `finetune.<model>`, from its backbone if it has one, and writes its results.

    They go to results/finetune/<model>/; see `experiment.run`.
    """
    experiment.run("finetune", model, params, machine, debug)
