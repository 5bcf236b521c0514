"""Generated data: a function of the seed, never over other data, too hard for a linear model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from pipeline.data import cityscapes, generated
from pipeline.data.cifar10 import CLASSES
from pipeline.data.drawing import photo, street
from pipeline.data.generated import ensure
from pipeline.errors import UserError
from pipeline.settings import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet

SMALL: dict[str, Any] = {
    "cifar10": GeneratedCifar10(train=10, test=10),
    "imagenet": GeneratedImageNet(classes=2, train_per_class=1, val_per_class=1),
    "cityscapes": GeneratedCityscapes(train=2, val=1, height=32, width=64),
}


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in files
        if path.name != generated.NOTE
    }


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_every_byte(tmp_path: Path, name: str) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        ensure(tmp_path / folder, name, replace(SMALL[name], seed=seed))
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b != c and a.keys() == c.keys()


def test_what_is_whole_is_left_alone_and_what_is_not_is_drawn_again(tmp_path: Path) -> None:
    root, params = tmp_path / "set", SMALL["imagenet"]
    ensure(root, "imagenet", params)
    before, image = contents(root), next((root / "train").rglob("*.JPEG"))
    inode = image.stat().st_ino
    ensure(root, "imagenet", params)
    assert image.stat().st_ino == inode
    for spoil in (
        lambda: image.write_bytes(b"spoilt"),
        image.unlink,
        lambda: (root / generated.NOTE).write_bytes(b""),
        lambda: ensure(root, "imagenet", replace(params, val_per_class=2)),
    ):
        spoil()
        ensure(root, "imagenet", params)
        assert contents(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_code_draws_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(tmp_path / "set", "imagenet", SMALL["imagenet"])
    inode = (tmp_path / "set").stat().st_ino
    monkeypatch.setattr(generated, "file_digest", lambda path: f"other {path.name}")
    ensure(tmp_path / "set", "imagenet", SMALL["imagenet"])
    assert (tmp_path / "set").stat().st_ino != inode


def test_other_peoples_data_are_never_touched(tmp_path: Path) -> None:
    mine = tmp_path / "set" / "train" / "mine.JPEG"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"mine\.JPEG: not drawn here; .*source to folder"):
        ensure(tmp_path / "set", "imagenet", SMALL["imagenet"])
    drawn = tmp_path / "drawn"
    ensure(drawn, "imagenet", SMALL["imagenet"])
    mine.rename(drawn / "val" / "mine.JPEG")
    for params in (SMALL["imagenet"], replace(SMALL["imagenet"], seed=9)):
        with pytest.raises(UserError, match=r"val/mine\.JPEG: not drawn here"):
            ensure(drawn, "imagenet", params)
    assert (drawn / "val" / "mine.JPEG").read_bytes() == b"precious"


def test_photos_have_many_sizes_and_some_are_grey(tmp_path: Path) -> None:
    ensure(
        tmp_path / "set",
        "imagenet",
        GeneratedImageNet(classes=2, train_per_class=60, val_per_class=1),
    )
    images = [Image.open(path) for path in (tmp_path / "set").rglob("*.JPEG")]
    assert len({image.size for image in images}) > 20
    assert {image.mode for image in images} == {"RGB", "L"}


# ---- how hard they are: not for a model that looks at pixels, colours or places alone


def photos(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = np.arange(count) % 10
    rngs = (np.random.default_rng((seed, i)) for i in range(count))
    pictures = [photo(rng, CLASSES[label], 32, 32) for rng, label in zip(rngs, labels, strict=True)]
    return torch.from_numpy(np.stack(pictures)).flatten(1).float() / 128 - 1, torch.from_numpy(
        labels
    )


def test_a_linear_model_does_not_tell_the_objects_apart() -> None:
    images, labels = photos(1500, 0)
    test, truth = photos(300, 1)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert 100 * (nearest == truth).double().mean() < 40
    torch.manual_seed(0)
    model = torch.nn.Linear(3072, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(10):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    assert 100 * (model(test).argmax(1) == truth).double().mean() < 50


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
