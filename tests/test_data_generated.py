"""Generated data: a function of the seed, never over other data, too hard for a linear model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DRAWN
from PIL import Image
from torch.nn.functional import one_hot

from pipeline.data import cityscapes, generated
from pipeline.data.cifar10 import CLASSES
from pipeline.data.drawing import photo, street
from pipeline.data.generated import ensure
from pipeline.errors import UserError


def contents(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != generated.NOTE)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", DRAWN)
def test_the_seed_decides_every_byte(tmp_path: Path, name: str) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        ensure(tmp_path / folder, name, replace(DRAWN[name], seed=seed))
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b != c and a.keys() == c.keys()


def test_what_is_whole_is_left_alone_and_what_is_not_is_drawn_again(tmp_path: Path) -> None:
    root, params = tmp_path / "set", DRAWN["imagenet"]
    ensure(root, "imagenet", params)
    before, image = contents(root), next((root / "train").rglob("*.JPEG"))
    written = image.stat().st_mtime_ns
    ensure(root, "imagenet", params)
    assert image.stat().st_mtime_ns == written
    with pytest.MonkeyPatch.context() as patch:  # other code draws again
        patch.setattr(generated, "file_digest", lambda path: f"other {path.name}")
        ensure(root, "imagenet", params)
    assert image.stat().st_mtime_ns > written
    for spoil in (
        lambda: image.write_bytes(b"spoilt"),
        image.unlink,
        lambda: ensure(root, "imagenet", replace(params, val_per_class=2)),
    ):
        spoil()
        ensure(root, "imagenet", params)
        assert contents(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_peoples_data_are_never_touched(tmp_path: Path) -> None:
    mine = tmp_path / "set" / "val" / "mine.JPEG"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"mine\.JPEG: not drawn here; .*source to folder"):
        ensure(tmp_path / "set", "imagenet", DRAWN["imagenet"])
    drawn = tmp_path / "drawn"
    ensure(drawn, "imagenet", DRAWN["imagenet"])
    mine.rename(drawn / "val" / "mine.JPEG")
    for params in (DRAWN["imagenet"], replace(DRAWN["imagenet"], seed=9)):
        with pytest.raises(UserError, match=r"val/mine\.JPEG: not drawn here"):
            ensure(drawn, "imagenet", params)
    (drawn / "val" / "mine.JPEG").unlink()
    (drawn / generated.NOTE).write_bytes(b"")
    with pytest.raises(UserError, match="damaged.*delete .*drawn"):
        ensure(drawn, "imagenet", DRAWN["imagenet"])


def test_photos_have_many_sizes_and_some_are_grey(tmp_path: Path) -> None:
    ensure(tmp_path / "set", "imagenet", replace(DRAWN["imagenet"], train_per_class=60))
    images = [Image.open(path) for path in (tmp_path / "set").rglob("*.JPEG")]
    assert len({image.size for image in images}) > 20
    assert {image.mode for image in images} == {"RGB", "L"}


# ---- how hard they are: not for a model that looks at pixels, colours or places alone


def photos(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = np.arange(count) % 10
    rngs = (np.random.default_rng((seed, i)) for i in range(count))
    pictures = [photo(rng, CLASSES[label], 32, 32) for rng, label in zip(rngs, labels, strict=True)]
    images = torch.from_numpy(np.stack(pictures)).flatten(1).float() / 128 - 1
    return images, torch.from_numpy(labels)


def test_a_linear_model_does_not_tell_the_objects_apart() -> None:
    """Ridge regression on the pixels, and the nearest mean picture."""
    images, labels = photos(1500, 0)
    test, truth = photos(300, 1)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert 100 * (nearest == truth).double().mean() < 40
    gram = images.T @ images + 1000 * torch.eye(3072)
    weights = torch.linalg.solve(gram, images.T @ one_hot(labels, 10).float())
    guessed = (test @ weights).argmax(1)
    assert 20 < 100 * (guessed == truth).double().mean() < 50


def scenes(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    pairs = [street(np.random.default_rng(seed), 64, 128) for seed in seeds]
    ids = np.stack([np.where(own < 1000, own, own // 1000) for _, own in pairs])
    return np.stack([picture for picture, _ in pairs]), cityscapes.train_ids()[ids]


def miou(predicted: np.ndarray, truth: np.ndarray) -> float:
    known = truth != cityscapes.IGNORE
    counts = np.zeros((19, 19))
    np.add.at(counts, (truth[known], np.broadcast_to(predicted, truth.shape)[known]), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return 100 * float(np.mean(counts.diagonal() / np.maximum(union, 1)))


def test_streets_show_every_class_and_neither_place_nor_colour_tells_them() -> None:
    images, labels = scenes(range(40))
    test, truth = scenes(range(100, 120))
    for split in (labels, truth):
        shown = [np.unique(label) for label in split]
        assert all(sum(i in own for own in shown) >= 3 for i in range(19))
        assert (split == cityscapes.IGNORE).any()
    votes = np.stack([(labels == i).sum(0) for i in range(19)])
    assert miou(votes.argmax(0), truth) < 20
    bins = [(pictures >> 4).astype(int) @ (256, 16, 1) for pictures in (images, test)]
    known = labels != cityscapes.IGNORE
    votes = np.zeros((4096, 19))
    np.add.at(votes, (bins[0][known], labels[known]), 1)
    assert miou(votes.argmax(1)[bins[1]], truth) < 35


def test_instances_are_numbered_as_cityscapes_numbers_them() -> None:
    _, ids = street(np.random.default_rng(0), 64, 128)
    instances = np.unique(ids[ids >= 1000])
    assert len(instances) > 3
    assert set(instances // 1000) <= {24, 25, 26, 27, 28, 31, 32, 33}
    assert not set(np.unique(ids[ids < 1000])) & {24, 25, 26, 27, 28, 31, 32, 33}
