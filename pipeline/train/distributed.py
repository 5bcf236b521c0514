"""One training over several processes, as torchrun starts them: one model, parts of every batch.

Gradients are added up once per update, in one message: those of an equilibrium model all come out
of the last vector-Jacobian product, when the adjoint is solved, so there is nothing to overlap.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError

Value = TypeVar("Value")


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; without it nothing happens.

    Raises:
        UserError: The environment variables of torchrun are incomplete or contradict each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    on_gpu = device.startswith("cuda")
    try:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: the processes cannot join ({reason}); "
            "start them with torchrun, or unset these variables"
        ) from error
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
    """Replaces each tensor by its sum over the processes, in one message; they share a dtype."""
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    dist.all_reduce(flat)
    totals = flat.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals, strict=True):
        tensor.copy_(total.view_as(tensor))


def from_first(value: Value) -> Value:
    """The value of the first process, in every process."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def from_all(value: Value) -> list[Value]:
    """The values of all processes in their order, in every process."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values
