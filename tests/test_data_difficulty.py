"""The measures of difficulty, on data whose difficulty is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from pipeline.data import difficulty, generated
from pipeline.data.cityscapes import IGNORE
from pipeline.data.difficulty import Pictures, Plain
from pipeline.recipe import Adam, Recipe


def scenes(of: str, seed: int) -> Pictures:
    """Twelve pictures whose classes are told by colour, by place, or by neither."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (12, 16, 16)).astype(np.uint8)
    if of == "place":
        labels[:] = np.arange(16, dtype=np.uint8)[:, None] // 4
    shades = labels if of == "colour" else rng.integers(0, 4, labels.shape)
    images = np.stack([shades * 60, shades * 20, 200 - shades * 50], -1).astype(np.uint8)
    labels[:, :2] = IGNORE
    return Pictures(images, labels, 19)


@pytest.mark.parametrize(("of", "place", "colour"), [("place", 100, 25), ("colour", 25, 100), ("none", 25, 25)])
def test_place_and_colour_are_told_apart(of: str, place: float, colour: float) -> None:
    train, val = scenes(of, 0), scenes(of, 1)
    assert difficulty.by_place(train, val) == pytest.approx(place, abs=12)
    assert difficulty.by_colour(train, val) == pytest.approx(colour, abs=12)


def test_a_linear_classifier_finds_what_is_linear_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 10
    noise = rng.integers(0, 256, (400, 32, 32, 3)).astype(np.uint8)
    gift = noise // 16
    gift[np.arange(400), 0, labels] = gift[np.arange(400), 0, 31 - labels] = 255  # mirrored, the same
    for images, low, high in ((gift, 95, 100), (noise, 0, 30)):
        train, test = (Pictures(images[part], labels[part], 10, True) for part in (slice(300), slice(300, 400)))
        network = Plain(nn.Flatten(), nn.Linear(3072, 10))
        assert low <= difficulty.trained(network, train, test, Recipe(Adam(1e-3), 40, 64), "cpu") <= high


def test_both_measurements_run_on_generated_data(tmp_path: Path) -> None:
    generated.ensure(tmp_path / "cifar10", generated.GeneratedCifar10(train=50, test=20))
    generated.ensure(tmp_path / "cityscapes", generated.GeneratedCityscapes(train=3, val=2, height=32, width=64))
    for lines in (
        difficulty.of_cifar10(tmp_path / "cifar10", epochs=1),
        difficulty.of_cityscapes(tmp_path / "cityscapes", epochs=1),
    ):
        assert len(lines) >= 2
        assert all(0 <= line.accuracy <= 100 for line in lines)
