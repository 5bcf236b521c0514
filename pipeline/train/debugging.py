"""Debugging runs: a few batches, the same batches over and over, or a profile of some updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.profiler import profile, schedule

from pipeline.data.loading import BatchDataset, Keys
from pipeline.progress import Training, say
from pipeline.recipe import Debug


class Subset:
    """Some samples of a data set; `epoch` fixes their augmentation, None leaves it to the epoch."""

    def __init__(self, whole: BatchDataset, count: int, epoch: int | None = None) -> None:
        self.whole, self.epoch = whole, epoch
        self.classes, self.names = whole.classes, whole.names
        self.indices = np.sort(np.random.default_rng(0).permutation(len(whole))[:count])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        epoch = keys.epoch if self.epoch is None else self.epoch
        return self.whole[Keys(epoch, self.indices[keys.indices].tolist())]

    def name(self, index: int) -> str:
        """Which file or image a sample is."""
        return self.whole.name(int(self.indices[index]))


def fewer(
    train: BatchDataset, validation: BatchDataset, batch: int, debug: Debug
) -> tuple[BatchDataset, BatchDataset]:
    """So many batches of both splits; to overfit them, always augmented alike and validated on."""
    if debug.overfit:
        same = Subset(train, debug.overfit * batch, epoch=0)
        return same, same
    if debug.limit_batches:
        count = debug.limit_batches * batch
        return Subset(train, count), Subset(validation, count)
    return train, validation


class ProfiledTraining(Training):
    """An observer that also profiles updates 3 to 5 and writes a Chrome trace of them."""

    def __init__(self, *arguments: Any, trace: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._trace = trace
        updates = schedule(wait=1, warmup=1, active=3, repeat=1)
        self._profiler = profile(schedule=updates, on_trace_ready=self._write)
        self._profiler.start()

    def __exit__(self, *error: object) -> None:
        self._profiler.stop()
        super().__exit__(*error)

    def step(self, step: int, total: int, values: dict[str, float]) -> None:
        """Shows an update and its figures."""
        super().step(step, total, values)
        self._profiler.step()

    def _write(self, profiler: profile) -> None:
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._trace))
        say(f"{self._trace}: open it at https://ui.perfetto.dev")
