"""Files that outlive a process: the resumable state of a run, and a finished model with its architecture.

Both are written to a temporary file, flushed to the disk and renamed, so that a reader finds the old file or the new
one, never a part. Both are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import nn

from mdeq import (
    Anderson,
    Broyden,
    ClassificationHeadConfig,
    FixedPoint,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
    Phantom,
    Reversible,
    SegmentationHeadConfig,
    baselines,
)
from mdeq.baselines import BaselineConfig, ExplicitConfig, NeuralODEConfig, ResNetConfig

if TYPE_CHECKING:
    from pipeline.train_params import BenchmarkModel, TrainParams

FORMAT = 1

_SETTINGS = (
    MDEQConfig, ResNetConfig, NeuralODEConfig, ExplicitConfig, ClassificationHeadConfig, SegmentationHeadConfig,
    Broyden, Anderson, FixedPoint, Gmres, Implicit, Phantom, Reversible,
)  # fmt: skip
_BY_KIND: dict[str, type] = {cls.__dataclass_fields__["kind"].default: cls for cls in _SETTINGS}  # type: ignore[attr-defined]


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the way out."""


@dataclass(frozen=True)
class Architecture:
    """All that rebuilds a network: it travels in the checkpoint, so what builds on a model never asks params.yaml."""

    model: MDEQConfig | BaselineConfig
    head: ClassificationHeadConfig | SegmentationHeadConfig | None
    classes: int
    forward: Broyden | Anderson | FixedPoint | None = None
    backward: Implicit | Phantom | Reversible | None = None

    @classmethod
    def of(cls, params: TrainParams | BenchmarkModel, classes: int) -> Architecture:
        """That of a section of params.yaml."""
        return cls(params.model, params.head, classes, params.forward, params.backward)

    def build(self, *, fetch: bool = False) -> nn.Module:
        """A freshly initialised network; `fetch`, and what is raised, as of `mdeq.baselines.build`."""
        if not isinstance(self.model, MDEQConfig):
            return baselines.build(self.model, self.classes, fetch=fetch)
        if self.head is None:
            raise ValueError("head: an MDEQ needs one")
        return Network(self.model, self.head, self.classes, self.forward or Anderson(), self.backward or Implicit())


def save_model(path: Path, architecture: Architecture, model: nn.Module, meta: dict[str, Any]) -> None:
    """Writes a finished model.

    Args:
        path: Of the file; its folder is made.
        architecture: What `load_model` rebuilds.
        model: Whose state is stored.
        meta: JSON-like facts (stage, params, versions, metrics).
    """
    content = {
        "format": FORMAT,
        "architecture": _encode(architecture),
        "meta": meta,
        "state": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    write_atomically(path, content)


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """The model in evaluation mode on `device`, its architecture, and its meta facts.

    Raises:
        CheckpointError: if the file is missing, damaged, of another format, or does not fit its own architecture.
    """
    content = read(path)
    if content.get("format") != FORMAT or "architecture" not in content:
        raise CheckpointError(f"{path}: not a model of this project (format {FORMAT}); make it with a training stage")
    fields = {name: _decode(value) for name, value in content["architecture"].items()}
    architecture = Architecture(**fields)
    model = architecture.build()
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the architecture: {error}") from error
    return model.to(device).eval(), architecture, content["meta"]


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Stores `content` at `path`; after a crash at any moment the previous file is whole.

    Raises:
        CheckpointError: if the disk refuses; names the path and the room there is.
    """
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if "DataLoader worker" in str(error):  # one was killed, of which torch tells whatever goes on
            raise
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); {_room(path, content)}the previous file is kept"
        ) from error


def _room(path: Path, content: dict[str, Any]) -> str:
    folder = next((p for p in path.parents if p.exists()), None)
    free = "" if folder is None else f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}, "
    return f"{_bytes(content) / 1e6:.1f} MB are needed, {free}"


def _bytes(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(_bytes(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, torch.Tensor) else 16


def read(path: Path) -> dict[str, Any]:
    """The dictionary stored at `path`; never unpickles anything but tensors and plain values.

    Raises:
        CheckpointError: if there is no such file or it holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; run the stage that makes it") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on to advise an unsafe way
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint")
    return content


class RunState:
    """The resumable state of one run, in `folder`, outside DVC's outputs, which DVC deletes before a stage.

    Args:
        folder: work/<stage>-<instance>.
        identity: What the state belongs to (params, data, versions). Other identity, other state.
        name: Of this run among those of the stage (its seed).
    """

    def __init__(self, folder: Path, identity: dict[str, Any], name: str) -> None:
        self.folder, self.identity = folder, identity
        self.fingerprint = fingerprint(identity)
        self.path = folder / self.fingerprint / f"{name}.pt"

    def claim(self) -> None:
        """Makes this process the only one that trains under this identity, until it ends.

        Raises:
            CheckpointError: if another one does already.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path.parent)
        if self._lock is None:
            raise CheckpointError(f"{self.path.parent}: another process is training this very model; let it finish")

    def load(self) -> dict[str, Any] | None:
        """The last state saved under this identity; None if there is none."""
        return read(self.path) if self.path.exists() else None

    def save(self, content: dict[str, Any]) -> None:
        """Stores the state; the first one replaces those of other identities that no process is working on."""
        write_atomically(self.path, content)
        identity = self.path.parent / "identity.json"
        if not identity.exists():
            identity.write_text(json.dumps(self.identity, indent=1, sort_keys=True), encoding="utf-8")
            self._clear()

    def differences(self) -> list[str]:
        """The keys in which an older state of this stage differs from this run; empty if there is none."""
        for other in self._others():
            file = other / "identity.json"
            if file.exists():
                old = _flatten(json.loads(file.read_text(encoding="utf-8")))
                new = _flatten(json.loads(json.dumps(self.identity)))
                return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return []

    def delete(self) -> None:
        """Removes all state that no other process is working on: the stage has finished."""
        self._clear()
        shutil.rmtree(self.path.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # another experiment's is there
            self.folder.rmdir()

    def _clear(self) -> None:
        for other in self._others():
            if lock := _locked(other):
                shutil.rmtree(other)
                lock.close()

    def _others(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return [p for p in self.folder.iterdir() if p.is_dir() and p.name != self.fingerprint]


def _locked(folder: Path) -> IO[str] | None:
    """The folder's lock, held until it is closed or the process ends, however it ends; None if another one holds it."""
    file = (folder / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would inherit
    except OSError:
        file.close()
        return None
    return file


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits of a JSON-like value."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _encode(settings: Any) -> Any:
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _encode(value)
    return list(value) if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    settings = _BY_KIND.get(value.get("kind", ""))
    if settings is None:
        raise CheckpointError(f"unknown kind {value.get('kind')!r} in a checkpoint's architecture")
    return settings(**{name: _decode(inner) for name, inner in value.items()})


def checksum(path: Path) -> str:
    """Of a file's bytes.

    Raises:
        CheckpointError: if there is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; run the stage that makes it") from error
