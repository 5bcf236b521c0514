"""One training over several processes, as torchrun starts them: each reads a part of every batch, all hold one model.

Gradients are added up once an update, in one message: those of an equilibrium model all come out of the last
vector-Jacobian product, when the adjoint has been solved, so there is no backward pass left to send them beside.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


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


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; without torchrun this does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; the first, 0, writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes, all in one message."""
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def from_first(value: Value) -> Value:
    """What the first process passes, in every process."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, as Python, CUDA, torch's CPU or cuBLAS say it."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
