"""The equilibrium of each training sample, kept from one epoch to the next."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdeq import Scales
from pipeline.errors import UserError
from pipeline.train import distributed


class LastEquilibria:
    """Two memory-mapped files in bfloat16: an epoch reads one and writes the other.

    So an epoch that is resumed reads what the interrupted one did, and ends with the same weights.
    Processes on one file system share the files; on several, all solves start at zero. `known` says
    whether this epoch has the last one's equilibrium of every sample, `whole` whether the file that
    it writes has all of those before the next batch.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.known = self.whole = False
        self._shared = False
        self._epoch = 0
        self._last: Any = None  # memory maps
        self._next: Any = None

    def begin(self, epoch: int, batch: int) -> None:
        """Begins an epoch, or resumes it at a batch."""
        self._epoch, self._last, self._next = epoch, None, None
        if batch == 0:
            self.known, self.whole = self.whole, True
        else:
            self.whole &= _everywhere(self._file(epoch))
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.from_first(None)  # waits for the folder
        self._shared = _everywhere(self.folder)
        self.known &= _everywhere(self._file(epoch - 1))

    def read(self, indices: np.ndarray) -> Tensor:
        """The last epoch's states (len(indices), D), bfloat16."""
        if self._last is None:
            self._last = self._mapped(self._epoch - 1)
        return torch.from_numpy(self._last[indices]).view(torch.bfloat16)

    def write(self, indices: np.ndarray, scales: list[Tensor]) -> None:
        """Stores the equilibria of a batch, [(B, C_i, H_i, W_i)]."""
        if not self._shared:
            return
        layout = Scales(tuple((z.shape[1], z.shape[2], z.shape[3]) for z in scales))
        state = layout.flatten(scales).detach().to("cpu", torch.bfloat16)
        if self._next is None:
            _allocate(self._file(self._epoch), self.samples * state[0].nbytes)
            self._next = self._mapped(self._epoch)
        self._next[indices] = state.view(torch.int16).numpy()

    def flush(self) -> None:
        """Makes what was written durable."""
        if self._next is not None:
            self._next.flush()

    def remove(self) -> None:
        """Deletes the files."""
        self._last = self._next = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def state_dict(self) -> dict[str, bool]:
        """What a checkpoint remembers; `begin` checks that the files are still there."""
        return {"known": self.known, "whole": self.whole}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Restores it."""
        self.known, self.whole = state["known"], state["whole"]

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{epoch % 2}.bin"

    def _mapped(self, epoch: int) -> Any:
        return np.memmap(self._file(epoch), np.int16, "r+").reshape(self.samples, -1)


def _everywhere(path: Path) -> bool:
    """Whether every process sees the file."""
    return all(distributed.from_all(path.exists()))


def _allocate(path: Path, size: int) -> None:
    """Gives a file its room on the disk: a mapped page without room would kill the process."""
    try:
        with path.open("ab") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); warm_start needs "
            f"{2 * size / 1e9:.1f} GB: free that much, or set warm_start to null"
        ) from error
