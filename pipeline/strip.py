"""A strip of a video's frames with their predicted classes below (Appendix C)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from mdeq.heads import resize
from pipeline import checkpoints, figures
from pipeline.data import cityscapes
from pipeline.data.manifest import DataError, files
from pipeline.machine import Machine


@torch.no_grad()
def draw(weights: Path, folder: Path, count: int, out: Path, machine: Machine) -> None:
    """Segment `count` frames of `folder`, spread evenly over its pictures in the order of their names.

    Raises:
        CheckpointError: if `weights` is no model.
        DataError: if the folder holds no pictures, pictures of several sizes, or the model does not segment streets.
    """
    network, architecture, _ = checkpoints.load_model(weights, machine.device)
    names = [name for name in files(folder) if name.lower().endswith((".png", ".jpg", ".jpeg"))]
    if not names:
        raise DataError(f"{folder}: no .png or .jpg in it")
    frames, predictions = [], []
    for index in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int)):
        frame = cv2.imread(str(folder / names[index]), cv2.IMREAD_COLOR)
        if frame is None or (frames and frame.shape != frames[0].shape):
            raise DataError(f"{folder / names[index]}: not a readable image, or of another size than the first")
        frames.append(frame[..., ::-1])
        pixels = torch.from_numpy(frame[..., ::-1] / 255.0).permute(2, 0, 1).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cityscapes.MEAN, cityscapes.STD))
        logits = network(((pixels - mean) / std)[None].to(machine.device)).logits
        if logits.ndim != 4 or architecture.classes != len(cityscapes.class_names()):
            raise DataError(f"{weights}: does not segment street scenes; name a model of `finetune`")
        predictions.append(resize(logits, frame.shape[:2])[0].argmax(0).cpu().numpy())
    figures.save(figures.strip(frames, predictions, cityscapes.class_names(), cityscapes.colours()), out)
