"""Files that outlive a process: the resumable state of a training, and finished models.

Both are whole or absent and carry a digest of their content, which is verified when they are read.
Nothing in them is executed: a model is a safetensors file, a state is read by `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdeq import saved
from mdeq.saved import Architecture
from pipeline import files
from pipeline.errors import UserError

MAGIC = b"mdeq training state 1\n"
MODEL = "model.safetensors"
LOCK = "lock"
RESTORE = "restore it with `dvc repro`, or import it again"


def save_model(
    path: Path, model: nn.Module, architecture: Architecture, facts: dict[str, Any]
) -> None:
    """Writes a finished model.

    Args:
        path: Of the file; its folder is made.
        model: Its weights are stored.
        architecture: What `load_model` rebuilds.
        facts: JSON-like: stage, model, data set, names of the classes, params, versions, ...

    Raises:
        UserError: The disk refuses.
    """
    files.write(path, saved.save(model, architecture, facts))


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """The model in evaluation mode on `device`, its architecture, and its facts.

    Raises:
        UserError: The file is missing, damaged, or not a model of this project.
    """
    content = _model_bytes(path)
    try:
        model = saved.read(content)
        return model.build(device), model.architecture, model.facts
    except ImportError as error:
        raise UserError(f"{path}: {error}; run `pip install '.[explicit]'`") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {RESTORE}") from None


def model_digest(path: Path) -> str:
    """The digest of a model's file.

    Raises:
        UserError: It cannot be read.
    """
    return files.digest(_model_bytes(path))


def _model_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {RESTORE}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from None


class RunState:
    """The resumable state of one training, a store as `train` wants one.

    It lies outside DVC's outputs, which DVC deletes before a stage: in `work`/<fingerprint>/.

    Args:
        work: The folder of the stage's instance: work/<stage>-<model>.
        identity: What the state belongs to: params, data, code, versions. Each has its own state.
        name: Of this training among those of the instance: its seed.
        position: Of the run file, called at each save and stored with the state.
    """

    def __init__(
        self,
        work: Path,
        identity: dict[str, Any],
        name: str,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.work = work / fingerprint(identity)
        self.path = self.work / f"{name}.pt"
        self.folder = self.work / f"{name}-equilibria"
        self.position = position
        self._identity = identity

    def load(self) -> dict[str, Any] | None:
        """The last saved state; None if there is none.

        Raises:
            UserError: The file is damaged.
        """
        saved = self._read()
        return saved and saved["state"]

    def recorded(self) -> int | None:
        """The position of the run file at the last save; None if there is no state."""
        saved = self._read()
        return saved and saved["position"]

    def save(self, state: dict[str, Any]) -> None:
        """Stores the state; the one saved before stays until this one is whole.

        From the second save on, the states of other identities are deleted.
        """
        first = not self.path.exists()
        if first:
            files.write_json(self.work / "identity.json", self._identity)
        buffer = io.BytesIO(MAGIC)
        buffer.seek(len(MAGIC) + 33)
        torch.save({"state": state, "position": self.position()}, buffer)
        view = buffer.getbuffer()
        digest = files.digest(bytes(view[len(MAGIC) + 33 :]))
        view[len(MAGIC) : len(MAGIC) + 33] = f"{digest}\n".encode()
        files.write(self.path, view)
        if not first:
            delete_others(self.work)

    def damaged(self, reason: str) -> UserError:
        """The error that tells what is wrong with the file, and the way out."""
        return UserError(
            f"{self.path}: {reason}; delete {self.path} and rerun: training starts again"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.damaged(f"cannot be read ({error.strerror})") from None
        head, payload = content[: len(MAGIC) + 33], content[len(MAGIC) + 33 :]
        if head != MAGIC + f"{files.digest(payload)}\n".encode():
            raise self.damaged("damaged")
        try:
            found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if isinstance(found["state"], dict) and isinstance(found["position"], int):
                return found
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
            pass
        raise self.damaged("not a state of a training")


@contextlib.contextmanager
def claimed(work: Path, results: Path, locks: Path) -> Iterator[None]:
    """Inside, no other process trains from the state in `work` or writes into `results`.

    Two commands with different params for one model, in one checkout, would mix their results.

    Args:
        work: The folder of the state.
        results: The folder of the results.
        locks: The folder of the locks of results.

    Raises:
        UserError: Another process has one of them, or the file system has no locks.
    """
    name = files.digest(str(results.resolve()).encode())
    busy = f"{results}: another process is training a model of this name; let it finish"
    training = f"{work}: another process is training this very model; let it finish"
    with files.locked(locks / name, busy), files.locked(work / LOCK, training):
        files.remove_partial(work)
        files.remove_partial(results)
        yield


def delete(states: list[RunState], record: str) -> None:
    """Deletes the states of a finished instance, the last training first.

    Killed in between, the same command finishes the same run once more: its file goes last.

    Args:
        states: Of the trainings in their order.
        record: The name of the run file beside them.
    """
    work = states[0].work
    for state in reversed(states):
        shutil.rmtree(state.folder, ignore_errors=True)
        state.path.unlink(missing_ok=True)
    delete_others(work)
    for path in work.iterdir():
        if path.name not in (LOCK, record):
            path.unlink()
    (work / record).unlink(missing_ok=True)
    shutil.rmtree(work)
    with contextlib.suppress(OSError):  # another experiment's state is there
        work.parent.rmdir()


def delete_others(work: Path) -> None:
    """Deletes the states of other identities that no process is training from."""
    for other in _others(work):
        with contextlib.suppress(UserError), files.locked(other / LOCK, "busy"):
            shutil.rmtree(other)


def differences(work: Path, identity: dict[str, Any]) -> list[str]:
    """The keys in which an older state of this instance, if any, differs from `identity`."""
    for other in _others(work):
        with contextlib.suppress(UserError):
            old = _flat(files.read_json(other / "identity.json", ""))
            new = _flat(json.loads(json.dumps(identity)))
            return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return []


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits of a JSON-like value."""
    return files.digest(json.dumps(identity, sort_keys=True).encode())[:16]


def _others(work: Path) -> list[Path]:
    if not work.parent.is_dir():
        return []
    return sorted(path for path in work.parent.iterdir() if path.is_dir() and path != work)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat
