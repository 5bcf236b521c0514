"""The strip of a video: each frame's own prediction, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mdeq import Broyden, MDEQConfig, SegmentationHeadConfig
from pipeline import figures, strip
from pipeline.checkpoints import Architecture, save_model
from pipeline.data import cityscapes
from pipeline.data.manifest import DataError
from pipeline.machine import Machine


def test_frames_are_predicted_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MDEQConfig((8, 8), expansion=1, groups=2, downsamplings=2)
    architecture = Architecture(config, SegmentationHeadConfig(), 19, Broyden(steps=3))
    network = architecture.build().eval()
    meta = {"stage": "finetune", "names": list(cityscapes.class_names()), "params": {"test_size": None}}
    save_model(tmp_path / "model.pt", architecture, network, meta)
    frames = tmp_path / "frames"
    frames.mkdir()
    with pytest.raises(DataError, match="no picture in it"):
        strip.draw(tmp_path / "model.pt", frames, 2, tmp_path / "strip.png", Machine(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        cv2.imwrite(str(frames / f"{number:03}.png"), picture[..., ::-1])
    drawn = []
    original = figures.strip
    monkeypatch.setattr(figures, "strip", lambda *arguments: drawn.append(arguments) or original(*arguments))
    strip.draw(tmp_path / "model.pt", frames, 2, tmp_path / "strip.png", Machine(tmp_path))
    ((shown, predictions, _, _),) = drawn
    assert (tmp_path / "strip.png").stat().st_size > 1000
    for picture, frame, prediction in zip(pictures[[0, 2]], shown, predictions, strict=True):
        assert np.array_equal(picture, frame)
        image = (picture / 255 - np.array(cityscapes.MEAN)) / np.array(cityscapes.STD)
        with torch.no_grad():
            logits = network(torch.from_numpy(image).float().permute(2, 0, 1)[None]).logits
        large = torch.nn.functional.interpolate(logits, (16, 24), mode="bilinear", align_corners=True)
        assert np.mean(large[0].argmax(0).numpy() == prediction) > 0.99
    cv2.imwrite(str(frames / "999.png"), pictures[0, :8])
    with pytest.raises(DataError, match="999.png: of another size"):
        strip.draw(tmp_path / "model.pt", frames, 2, tmp_path / "strip.png", Machine(tmp_path))
