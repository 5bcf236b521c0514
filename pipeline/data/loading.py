"""Order and randomness of training data as functions of (seed, epoch, index) alone.

Nothing here keeps a random state: a run resumed inside an epoch, with other workers or more processes, sees the very
same samples with the very same augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Share:
    """Which part of each batch is read here: `pieces` micro-batches of process `rank` among `processes`."""

    rank: int = 0
    processes: int = 1
    pieces: int = 1

    def bounds(self, samples: int) -> list[tuple[int, int]]:
        """First and last + 1 of each piece, of a batch of `samples`; a piece may be empty."""
        parts, first = self.processes * self.pieces, self.rank * self.pieces
        return [(samples * p // parts, samples * (p + 1) // parts) for p in range(first, first + self.pieces)]


@dataclass(frozen=True)
class Keys:
    """The samples of one batch: positions in the data set, and the epoch that seeds their augmentation."""

    epoch: int
    indices: list[int]


class BatchDataset(Protocol):
    """A data set read by whole batches."""

    classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), normalised float32, and their targets (B,) or (B, H, W), int64."""
        ...

    def name(self, index: int) -> str:
        """Which file or image a sample is, for messages."""
        ...


def draw(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one sample in one epoch."""
    return np.random.default_rng((seed, epoch, index))


def order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of a training epoch in their order."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (B, 3, H, W), uint8, of which each channel in 0..1 has `mean` and `std`, as a network wants them."""
    shift, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return ((pixels.float() / 255 - shift) / scale).contiguous()


def batches(
    dataset: BatchDataset,
    batch: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    start: int = 0,
    share: Share = Share(),
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """An iterator over one epoch of `dataset`, beginning at batch number `start`.

    An empty piece holds one sample of its batch, so that no process runs short of batches; training gives it no weight.

    Args:
        seed: Of order and augmentation.
        shuffle: Whether the order is drawn anew each epoch (training) or that of the manifest (evaluation).
        share: Which pieces of each batch are read here.
        workers: Processes that prepare batches; changes nothing but the speed.
    """
    samples = order(len(dataset), seed, epoch) if shuffle else np.arange(len(dataset))
    whole = [samples[i : i + batch] for i in range(start * batch, len(samples), batch)]
    pieces = [
        Keys(epoch, (part[a:b] if a < b else part[:1]).tolist()) for part in whole for a, b in share.bounds(len(part))
    ]
    pin = workers > 0 and torch.cuda.is_available()
    return DataLoader(dataset, batch_size=None, sampler=pieces, num_workers=workers, pin_memory=pin)  # type: ignore[arg-type]
