"""The multiscale state z = [z_1, ..., z_n] (Sec. 3.2) and its flat form (B, D) for the solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """The (channels, height, width) of each scale, highest resolution first."""

    shapes: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, channels: Sequence[int], height: int, width: int) -> Scales:
        """Scale 1 is height x width; each further one has half of both, rounded up."""
        shapes = []
        for c in channels:
            shapes.append((c, height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        return cls(tuple(shapes))

    @property
    def lengths(self) -> list[int]:
        """The number of values per sample in each scale; they add up to D."""
        return [c * h * w for c, h, w in self.shapes]

    def flatten(self, scales: Sequence[Tensor]) -> Tensor:
        """[(B, C_i, H_i, W_i)] to (B, D), channels last, the layout that convolutions prefer."""
        return torch.cat([z.permute(0, 2, 3, 1).flatten(1) for z in scales], dim=1)

    def split(self, state: Tensor) -> list[Tensor]:
        """(B, D) to [(B, C_i, H_i, W_i)], views of the state."""
        parts = zip(state.split(self.lengths, dim=1), self.shapes, strict=True)
        return [part.unflatten(1, (h, w, c)).permute(0, 3, 1, 2) for part, (c, h, w) in parts]

    def zeros(self, batch: int, like: Tensor) -> Tensor:
        """The starting point z = 0 (B, D), with the dtype and device of `like`."""
        return like.new_zeros(batch, sum(self.lengths))
