"""pretrain: trains a model on ImageNet (Sec. 4.2, Table 2); `finetune` starts from its backbone."""

from __future__ import annotations

from functools import partial

from pipeline.train import experiment

run = partial(experiment.run, "pretrain")
