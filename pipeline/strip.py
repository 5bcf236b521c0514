"""A strip of a video's frames with their predicted classes below (Appendix C)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline import figures
from pipeline.data import cityscapes
from pipeline.data.manifest import DataError
from pipeline.inference import Predictor, read_photo
from pipeline.machine import Machine
from pipeline.predict import pictures


def draw(weights: Path, folder: Path, count: int, out: Path, machine: Machine) -> None:
    """Segment `count` frames of `folder`, spread evenly over its pictures in the order of their names.

    Raises:
        CheckpointError: if `weights` is no model.
        DataError: if the folder holds no pictures, pictures of several sizes, or the model does not segment streets.
    """
    predictor = Predictor(weights, machine)
    if not predictor.segments:
        raise DataError(f"{weights}: does not segment street scenes; name a model of `finetune`")
    paths = pictures(folder)
    frames: list[np.ndarray] = []
    for index in np.unique(np.linspace(0, len(paths) - 1, count).round().astype(int)):
        frames.append(read_photo(paths[index]))
        if frames[-1].shape != frames[0].shape:
            raise DataError(f"{paths[index]}: of another size than the first")
    predictions = [predictor(frame).value for frame in frames]
    figures.save(figures.strip(frames, predictions, cityscapes.class_names(), cityscapes.colours()), out)
