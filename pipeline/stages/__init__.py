"""The stages of dvc.yaml, one module each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline import files
from pipeline.machine import Machine


@contextlib.contextmanager
def writing(out: Path, machine: Machine) -> Iterator[None]:
    """Inside, this process alone writes the results `out`, a folder that is made if need be.

    Raises:
        UserError: Another process is writing them.
    """
    lock = machine.root / "work" / "locks" / files.digest(str(out.resolve()).encode())
    with files.locked(lock, f"{out}: another process is writing it; let it finish"):
        out.mkdir(parents=True, exist_ok=True)
        files.remove_partial(out)
        yield
