"""Debugging runs: a few batches, the same batches over and over, or a profile of some updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.profiler import profile, schedule

from pipeline.data.loading import BatchDataset, Keys
from pipeline.progress import Training, say
from pipeline.recipe import Debug, Recipe


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set; `epoch` fixes their augmentation, None leaves it to the epoch."""

    whole: BatchDataset
    indices: np.ndarray
    epoch: int | None = None

    @property
    def classes(self) -> int:
        return self.whole.classes

    @property
    def names(self) -> tuple[str, ...]:
        return self.whole.names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        epoch = keys.epoch if self.epoch is None else self.epoch
        return self.whole[Keys(epoch, self.indices[keys.indices].tolist())]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


def fewer(
    train: BatchDataset, validation: BatchDataset, recipe: Recipe, debug: Debug | None
) -> tuple[BatchDataset, BatchDataset]:
    """The splits as a debugging run wants them.

    `limit_batches` keeps that many batches of each; `overfit` keeps that many to train on, always
    augmented alike, and validates on the same samples.
    """
    if debug and debug.overfit:
        same = _some(train, debug.overfit * recipe.batch, epoch=0)
        return same, same
    if debug and debug.limit_batches:
        kept = debug.limit_batches * recipe.batch
        return _some(train, kept), _some(validation, kept)
    return train, validation


def _some(dataset: BatchDataset, count: int, epoch: int | None = None) -> Subset:
    chosen = np.random.default_rng(0).permutation(len(dataset))[:count]
    return Subset(dataset, np.sort(chosen), epoch)


@contextlib.contextmanager
def profiled(observer: Training, debug: Debug | None, folder: Path) -> Iterator[Any]:
    """The observer; in a run with `profile` one that also writes trace.json, of updates 3 to 5."""
    if not (debug and debug.profile):
        yield observer
        return

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        for line in table.splitlines():
            say(line)
        say(f"{folder / 'trace.json'}: open it at https://ui.perfetto.dev")

    updates = schedule(wait=1, warmup=1, active=3, repeat=1)
    with profile(schedule=updates, on_trace_ready=write) as profiler:
        yield _Profiled(observer, profiler)


@dataclass(frozen=True)
class _Profiled:
    observer: Training
    profiler: profile

    def step(self, step: int, total: int, values: dict[str, float]) -> None:
        self.observer.step(step, total, values)
        self.profiler.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.observer, name)
