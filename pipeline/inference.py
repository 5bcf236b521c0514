"""A finished model on photos that belong to no data set: all it needs to know travels in its checkpoint.

MLflow loads a logged model through `_load_pyfunc`: this code and the checkpoint, nothing pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mdeq.heads import resize
from mdeq.model import Network
from mdeq.solvers import Solution
from pipeline.checkpoints import CheckpointError, load_model
from pipeline.data import cifar10, cityscapes, imagenet
from pipeline.data.loading import normalised
from pipeline.data.manifest import DataError
from pipeline.machine import Machine

if TYPE_CHECKING:
    import pandas as pd

TRAINED_ON = {"classify": cifar10, "pretrain": imagenet, "finetune": cityscapes}


@dataclass(frozen=True)
class Answer:
    """The probability of each class (classes,), or the train id of each pixel (H, W) uint8; and the solve, if any."""

    value: np.ndarray
    solution: Solution | None


class Predictor:
    """A model.pt that takes photos.

    Args:
        weights: Written by a training stage or `import-weights`.
        machine: Where it runs.
        steps: Limit on the solver's updates; None for that of the checkpoint.
        tolerance: Relative residual at which the solver stops; None for that of the checkpoint.
        height: Street scenes are segmented at this height; None for the one the model was tested at.

    Raises:
        CheckpointError: if `weights` is no model, or does not say what its classes are called.
    """

    def __init__(
        self,
        weights: Path,
        machine: Machine,
        *,
        steps: int | None = None,
        tolerance: float | None = None,
        height: int | None = None,
    ) -> None:
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        self.network, _, meta = load_model(weights, machine.device)
        if meta.get("stage") not in TRAINED_ON or not meta.get("names"):
            raise CheckpointError(f"{weights}: does not say what its classes are called; train or import it again")
        self.names: tuple[str, ...] = tuple(meta["names"])
        self.device, self.height = machine.device, height
        self._set, self._params = TRAINED_ON[meta["stage"]], meta["params"]
        self.segments = self._set is cityscapes
        if isinstance(self.network, Network):
            solver = self.network.backbone.forward_solver
            limits: dict[str, Any] = {"steps": steps, "tolerance": tolerance}
            limits = {name: value for name, value in limits.items() if value is not None}
            self.network.backbone.forward_solver = replace(solver, check_every=1, **limits)  # so that nfe is exact

    @torch.no_grad()
    def __call__(self, photo: np.ndarray, z0: Tensor | None = None) -> Answer:
        """The answer to a photo (H, W, 3) RGB uint8, its equilibrium sought from the state `z0` (1, D) or from 0."""
        found = self.network(self.image(photo).to(self.device), **({} if z0 is None else {"z0": z0}))
        logits = found.logits.float()
        solution = found.equilibrium.solution if found.equilibrium else None
        if self.segments:
            return Answer(resize(logits, photo.shape[:2])[0].argmax(0).byte().cpu().numpy(), solution)
        return Answer(logits[0].softmax(0).cpu().numpy(), solution)

    def image(self, photo: np.ndarray) -> Tensor:
        """What the network sees of a photo (H, W, 3) RGB uint8, as its evaluation did: (1, 3, h, w), normalised."""
        pixels = torch.from_numpy(np.array(self._sized(photo))).permute(2, 0, 1)
        return normalised(pixels[None], self._set.MEAN, self._set.STD)

    def best(self, probabilities: np.ndarray, count: int = 5) -> list[tuple[str, float]]:
        """The `count` most probable classes and their probabilities."""
        return [(self.names[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:count]]

    def _sized(self, photo: np.ndarray) -> np.ndarray:
        if self._set is cifar10:
            return np.asarray(ImageOps.fit(Image.fromarray(photo), (32, 32)))
        if self._set is imagenet:
            return np.asarray(imagenet.centre_crop(Image.fromarray(photo), self._params["image"]))
        height, width = self._params["test_size"] or photo.shape[:2]
        if self.height is not None:
            height, width = self.height, round(photo.shape[1] * self.height / photo.shape[0])
        return cityscapes.resized(photo, photo[..., 0], height, width)[0]


def read_photo(path: Path) -> np.ndarray:
    """A picture (H, W, 3) RGB uint8, turned as its file says.

    Raises:
        DataError: if it cannot be read.
    """
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise DataError(f"{path}: {'not a readable picture' if path.exists() else 'no such file'}")
    return picture[..., ::-1]


class _Served:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, photos: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row for each file in the column `path`: its five best `classes` and their `probabilities`, or `labels`."""
        import pandas as pd

        answers = [self._predictor(read_photo(Path(path))).value for path in photos["path"]]
        if self._predictor.segments:
            return pd.DataFrame({"labels": [answer.tolist() for answer in answers]})
        best = [map(list, zip(*self._predictor.best(answer), strict=True)) for answer in answers]
        return pd.DataFrame(best, columns=["classes", "probabilities"])


def _load_pyfunc(path: str) -> _Served:  # pyright: ignore[reportUnusedFunction]
    """MLflow's loader, on the device that the environment names."""
    return _Served(Predictor(Path(path), Machine.from_environment()))
