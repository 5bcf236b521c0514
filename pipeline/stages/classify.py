"""classify: trains a model on CIFAR-10 (Sec. 4.1, Table 1)."""

from __future__ import annotations

from functools import partial

from pipeline.train import experiment

run = partial(experiment.run, "classify")
