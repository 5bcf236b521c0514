"""The equilibrium of each training sample, kept from one epoch to the next."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mdeq import Prediction
from pipeline import files
from pipeline.errors import UserError
from pipeline.train import distributed


class LastEquilibria:
    """Two memory-mapped files in bfloat16: an epoch reads one and writes the other.

    So an epoch that is resumed reads what the interrupted one did, and ends with the same weights.
    Beside each file a mark says of which epoch it is whole; an epoch that lacks the marked file of
    the one before starts its solves at zero. Processes on one file system share the files; on
    several, all start at zero.

    Args:
        folder: Of the files; made when the first state is written.
        samples: Of the training set.

    Attributes:
        known: Whether this epoch has the equilibria of the last one.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.known = False
        self._epoch = 0
        self._whole = True
        self._read: Tensor | None = None
        self._written: Tensor | None = None

    def begin(self, epoch: int, batch: int) -> None:
        """Begins an epoch, or resumes it at a batch."""
        self._epoch = epoch
        self._read = self._written = None
        self._whole = batch == 0 or self._file(epoch).is_file()
        marked = epoch > 0 and _text(self._mark(epoch - 1)) == str(epoch - 1)
        self.known = all(distributed.from_all(marked and self._file(epoch - 1).is_file()))

    def end(self) -> None:
        """Marks the epoch's file, if it has the state of every sample."""
        self.flush()
        if distributed.rank() == 0 and self._whole:
            files.write_text(self._mark(self._epoch), str(self._epoch))

    def read(self, indices: np.ndarray) -> Tensor:
        """The last epoch's states (len(indices), D), bfloat16."""
        if self._read is None:
            self._read = self._map(self._epoch - 1, width=None)
        return self._read[torch.from_numpy(indices)]

    def write(self, indices: np.ndarray, prediction: Prediction) -> None:
        """Stores the states of a batch."""
        assert prediction.equilibrium is not None
        scales = [z.detach().permute(0, 2, 3, 1).flatten(1) for z in prediction.equilibrium.scales]
        state = torch.cat(scales, dim=1).to("cpu", torch.bfloat16)
        if self._written is None:
            self._written = self._map(self._epoch, width=state.shape[1])
        self._written[torch.from_numpy(indices)] = state

    def flush(self) -> None:
        """Makes what was written durable."""
        if self._written is not None:
            self._memory.flush()

    def remove(self) -> None:
        """Deletes the files."""
        self._read = self._written = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{epoch % 2}.bin"

    def _mark(self, epoch: int) -> Path:
        return self.folder / f"{epoch % 2}.epoch"

    def _map(self, epoch: int, width: int | None) -> Tensor:
        """The file of an epoch as a tensor (samples, width), made and given its room if need be."""
        path = self._file(epoch)
        size = 2 * self.samples * width if width else path.stat().st_size
        if width:
            _allocate(path, size)
        memory = np.memmap(path, np.int16, "r+", shape=(self.samples, size // (2 * self.samples)))
        if width:
            self._memory = memory
        return torch.from_numpy(memory).view(torch.bfloat16)


def _allocate(path: Path, size: int) -> None:
    """Gives a file its room on the disk: a mapped page without room would kill the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(number, size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(number, 0, size)
        finally:
            os.close(number)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); warm_start needs "
            f"{2 * size / 1e9:.1f} GB: free that much, or set warm_start to null"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
