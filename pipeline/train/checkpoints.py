"""Files that outlive a process: the resumable state of a training, and finished models.

Both are whole or absent and carry a digest of their content, which is verified when they are read.
Nothing in them is executed: a model is a safetensors file, a state is read by `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import io
import json
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
from pipeline.train import distributed

MODEL = "model.safetensors"
LOCK = "lock"
DIGITS = 32  # of a digest
RESTORE = "restore it with `dvc repro`, or import it again"


def save_model(
    path: Path, model: nn.Module, architecture: Architecture, facts: dict[str, Any]
) -> None:
    """Writes a finished model; `facts` are JSON-like. Raises a UserError if the disk refuses."""
    files.write(path, saved.save(model, architecture, facts))


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """The model in evaluation mode on `device`, its architecture, and its facts.

    Raises:
        UserError: The file is missing, damaged, or not a model of this project.
    """
    try:
        model = saved.read(path.read_bytes())
        return model.build(device), model.architecture, model.facts
    except ImportError as error:
        raise UserError(f"{path}: {error}; run `pip install '.[explicit]'`") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: {reason}; {RESTORE}") from None


class RunState:
    """The resumable state of one training.

    It lies outside DVC's outputs, which DVC deletes before a stage: in `work`/<fingerprint>/, by
    `identity`: params, data, code, versions. The file is what torch saves, and its digest.
    `position`, of the run file, is called at each save and stored with the state; `folder` is for
    what goes with the state.
    """

    def __init__(
        self, work: Path, identity: dict[str, Any], name: str, position: Callable[[], int] = int
    ) -> None:
        self.work = work / fingerprint(identity)
        self.path = self.work / f"{name}.pt"
        self.folder = self.work / f"{name}-equilibria"
        self._identity, self._position = identity, position

    def load(self) -> dict[str, Any] | None:
        """The last saved state, with the `position` of its save; None if there is none.

        Raises:
            UserError: The file is damaged.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.damaged(f"cannot be read ({error.strerror})") from None
        payload, digest = content[:-DIGITS], content[-DIGITS:]
        if digest != files.digest(payload).encode():
            raise self.damaged("damaged")
        try:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            return {**state, "position": int(state["position"])}
        except Exception as error:  # whatever torch makes of a file with other content
            raise self.damaged("not a state of a training") from error

    def save(self, state: dict[str, Any]) -> None:
        """Stores the state; the one saved before stays until this one is whole.

        From the second save on, the states of other identities are deleted.
        """
        first = not self.path.exists()
        if first:
            files.write_json(self.work / "identity.json", self._identity)
        buffer = io.BytesIO()
        torch.save(state | {"position": self._position()}, buffer)
        buffer.write(files.digest(buffer.getvalue()).encode())
        files.write(self.path, buffer.getvalue())
        if not first:
            delete_others(self.work)

    def damaged(self, reason: str) -> UserError:
        """The error that says what is wrong with the file, and the way out."""
        cure = f"delete {self.path} and rerun: training starts again"
        return UserError(f"{self.path}: {reason}; {cure}")


@contextlib.contextmanager
def claimed(work: Path, results: Path, locks: Path) -> Iterator[None]:
    """Inside, no other process trains from the state in `work` or writes into `results`.

    Two commands with different params for one model, in one checkout, would mix their results. Of
    several processes that train together the first one asks.

    Raises:
        UserError: Another process has one of them, or the file system has no locks.
    """
    if distributed.rank() != 0:
        yield
        return
    lock = locks / files.digest(str(results.resolve()).encode())
    busy = "another process is training {}; let it finish"
    same_name = files.locked(lock, f"{results}: {busy.format('a model of this name')}")
    same_model = files.locked(work / LOCK, f"{work}: {busy.format('this very model')}")
    with same_name, same_model:
        files.remove_partial(work)
        files.remove_partial(results)
        yield


def delete(work: Path) -> None:
    """Deletes the state of a finished instance in one step: until then it can be finished again."""
    delete_others(work)
    done = work.with_name(f"{work.name}-done")
    work.rename(done)
    shutil.rmtree(done)
    with contextlib.suppress(OSError):  # another experiment's state is there
        work.parent.rmdir()


def delete_others(work: Path) -> None:
    """Deletes the states of other identities that no process is training from."""
    for other in _others(work):
        with contextlib.suppress(UserError), files.locked(other / LOCK, "busy"):
            shutil.rmtree(other)


def differences(work: Path, identity: dict[str, Any]) -> list[str]:
    """The keys in which an older state of this instance, if any, differs from `identity`."""
    new = json.loads(json.dumps(identity))
    for other in _others(work):
        with contextlib.suppress(UserError):
            old = files.read_json(other / "identity.json", "")
            return sorted(key for key in old | new if old.get(key) != new.get(key))
    return []


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits of a JSON-like value."""
    return files.digest(json.dumps(identity, sort_keys=True).encode())[:16]


def _others(work: Path) -> list[Path]:
    return [path for path in sorted(work.parent.glob("*/")) if path != work]
