"""ImageNet: the tree, and crops as torchvision makes them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.data import generated, imagenet
from pipeline.data.imagenet import Split
from pipeline.data.loading import Chosen, Keys
from pipeline.errors import UserError
from pipeline.sets import SETS
from pipeline.settings import GeneratedImageNet
from pipeline.stages import prepare

FACTS = SETS["imagenet"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    params = GeneratedImageNet(classes=2, train_per_class=3, val_per_class=2)
    generated.ensure(tmp_path / "imagenet", "imagenet", params)
    return tmp_path / "imagenet"


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 60).convert("RGB")


def jpeg() -> bytes:
    content = io.BytesIO()
    noise((40, 30)).save(content, "JPEG")
    return content.getvalue()


def test_rows_say_what_is_there(root: Path) -> None:
    rows = [imagenet.inspect(root, found) for found in imagenet.find(root)]
    assert prepare.counts(imagenet, rows) == {
        "train": {"n01558993": 3, "n01644373": 3},
        "val": {"n01558993": 2, "n01644373": 2},
    }
    for row in rows:
        path = root / str(row["path"])
        assert Image.open(path).size == (row["width"], row["height"])
        assert path.stat().st_size == row["bytes"]


def test_what_does_not_belong_is_named(root: Path, manifest_of: Callable) -> None:
    (root / "val/n09999999").mkdir()
    with pytest.raises(UserError, match="n09999999: a class folder without images"):
        imagenet.find(root)
    (root / "val/n09999999/a.JPEG").write_bytes(jpeg())
    with pytest.raises(UserError, match="train/n09999999: no such folder"):
        manifest_of(imagenet, root)
    (root / "val/n09999999/notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt: not a \.JPEG file"):
        imagenet.find(root)
    (root / "train/readme.txt").write_text("")
    with pytest.raises(UserError, match=r"train/readme\.txt: not a class folder"):
        imagenet.find(root)


@pytest.mark.parametrize("lacking", ["train", "val"])
def test_a_split_without_class_folders_says_what_to_put_there(root: Path, lacking: str) -> None:
    (root / lacking).rename(root / "moved")
    message = f"{lacking}: (no such|an empty) folder.*img_train.tar.*https://image-net"
    for make in (lambda: None, (root / lacking).mkdir):
        make()
        with pytest.raises(UserError, match=message):
            imagenet.find(root)
    (root / lacking / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
    message = "not a class folder" if lacking == "train" else "val: holds .*img_val.tar.*sorts them"
    with pytest.raises(UserError, match=message):
        imagenet.find(root)


def test_evaluation_crops_as_torchvision_does(root: Path, manifest_of: Callable) -> None:
    samples = Split(root, manifest_of(imagenet, root), "val", {"image": 64})
    reference = v2.Compose(
        [
            v2.Resize(round(64 * 256 / 224)),
            v2.CenterCrop(64),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(FACTS.mean, FACTS.std),
        ]
    )
    images, labels = Chosen(samples, FACTS)[Keys(0, [0, 1, 2, 3])]
    assert labels.tolist() == [0, 0, 1, 1]
    for i in range(4):
        expected = reference(Image.open(root / os.fsdecode(samples.paths[i])).convert("RGB"))
        torch.testing.assert_close(images[i], expected)


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (33, 33)])
def test_crops_of_any_shape_fill_the_square(size: tuple[int, int]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert imagenet.random_resized_crop(noise(size), 24, rng).size == (24, 24)
    assert imagenet.centre_crop(noise(size), 24).size == (24, 24)
