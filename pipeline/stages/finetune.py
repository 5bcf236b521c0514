"""finetune: trains the same MDEQ for segmentation on Cityscapes (Sec. 4.3, Table 3)."""

from __future__ import annotations

from functools import partial

from pipeline.train import experiment

run = partial(experiment.run, "finetune")
