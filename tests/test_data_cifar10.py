"""CIFAR-10: the real format, read without trust; batches held in memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DRAWN

from pipeline.data import cifar10, generated
from pipeline.data.cifar10 import CLASSES, FOLDER, Split, images_and_labels
from pipeline.data.loading import Chosen, Keys, draw
from pipeline.errors import UserError
from pipeline.sets import SETS
from pipeline.stages import prepare

FACTS = SETS["cifar10"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cifar10"
    generated.ensure(folder, "cifar10", DRAWN["cifar10"])
    return folder


@pytest.mark.parametrize(("encoding", "kind"), [("latin1", str), ("bytes", bytes)])
def test_batches_are_what_common_readers_expect(root: Path, encoding: str, kind: type) -> None:
    def key(name: str) -> str | bytes:
        return name if kind is str else name.encode()

    def load(name: str) -> dict[str | bytes, Any]:
        with (root / FOLDER / name).open("rb") as file:
            return pickle.load(file, encoding=encoding)

    for name in ("data_batch_1", "test_batch"):
        batch, path = load(name), root / FOLDER / name
        assert set(batch) == {key(k) for k in ("batch_label", "labels", "data", "filenames")}
        assert all(isinstance(name, kind) for name in batch[key("filenames")])
        images, labels = images_and_labels(path.read_bytes(), path)  # our reader agrees
        assert np.array_equal(images.reshape(-1, 3072), batch[key("data")])
        assert images.dtype == np.uint8 and labels.tolist() == batch[key("labels")]
    assert load("batches.meta")[key("label_names")] == [key(name) for name in CLASSES]


@pytest.mark.parametrize(("order", "protocol"), [("C", 2), ("F", 2), ("C", 4)])
def test_batches_written_by_python_3_are_read_too(order: str, protocol: int) -> None:
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    batch = {b"data": np.asarray(data, order=order), b"labels": [1, 9]}
    images, labels = images_and_labels(pickle.dumps(batch, protocol=protocol), Path("batch"))
    assert np.array_equal(images.reshape(2, 3072), data)
    assert labels.tolist() == [1, 9]


class Runs:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "content", [None, b"cnumpy\nload\n(S'x'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."]
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, content: bytes | None) -> None:
    trap = tmp_path / "ran"
    with pytest.raises(UserError, match=r"data_batch_1: .*no CIFAR-10 batch needs"):
        images_and_labels(content or pickle.dumps({b"data": Runs(trap)}), Path("data_batch_1"))
    assert not trap.exists()


GOOD = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": GOOD[:, 1:], b"labels": [0, 1]}, "shape"),
        ({b"data": GOOD[:0], b"labels": []}, "shape"),
        ({b"data": GOOD, b"labels": [0]}, "labels must be a list of 2"),
        ({b"data": GOOD, b"labels": [0, 10]}, "from 0 to 9"),
        ({b"data": GOOD, b"labels": [0, True]}, "from 0 to 9"),
        ({b"data": GOOD.astype(np.float32), b"labels": [0, 1]}, "unsigned bytes"),
        ({b"data": np.array([["x"]], object), b"labels": [0]}, "unsigned bytes"),
        ([1, 2], "a list, not a dictionary"),
        ({}, "data must be"),
    ],
)
def test_a_malformed_batch_is_named(batch: object, message: str) -> None:
    with pytest.raises(UserError, match=f"data_batch_2: .*{message}"):
        images_and_labels(pickle.dumps(batch), Path("data_batch_2"))


def test_any_cut_of_a_batch_is_an_error_that_names_it(root: Path) -> None:
    path = root / FOLDER / "data_batch_1"
    content = path.read_bytes()
    for end in (0, 1, 2, 10, 200, len(content) // 2, len(content) - 1):
        with pytest.raises(UserError, match="data_batch_1"):
            images_and_labels(content[:end], path)


def test_missing_batches_and_foreign_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{FOLDER}: no such folder"):
        cifar10.find(tmp_path)
    generated.ensure(tmp_path, "cifar10", DRAWN["cifar10"])
    counts = prepare.counts(
        cifar10, [cifar10.inspect(tmp_path, found) for found in cifar10.find(tmp_path)]
    )
    cifar10.check(tmp_path, counts)
    counts["test"]["frog"] = 0
    with pytest.raises(UserError, match="test batches hold no image of the class frog"):
        cifar10.check(tmp_path, counts)
    meta = tmp_path / FOLDER / "batches.meta"
    meta.write_bytes(generated.python2_pickle({b"label_names": [b"apple"] * 10}))
    with pytest.raises(UserError, match=r"batches\.meta"):
        cifar10.check(tmp_path, counts)
    (tmp_path / FOLDER / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4: no such file"):
        cifar10.find(tmp_path)


def test_a_batch_is_normalised_and_in_the_asked_order(root: Path, manifest_of: Callable) -> None:
    dataset = Chosen(Split(root, manifest_of(cifar10, root), "test", {}), FACTS)
    assert (len(dataset), dataset.classes, dataset.names) == (10, 10, CLASSES)
    images, labels = dataset[Keys(0, [7, 3])]
    assert images.shape == (2, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (FACTS.mean, FACTS.std))
    pixels, truth = cifar10.read_split(root, None, "test")
    torch.testing.assert_close((images * std + mean) * 255, torch.tensor(pixels[[7, 3]]).float())
    assert labels.tolist() == truth[[7, 3]].tolist()


def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip(
    root: Path, manifest_of: Callable
) -> None:
    images, _ = cifar10.read_split(root, None, "train")
    samples = Split(root, manifest_of(cifar10, root), "train", {}, augment=True)
    mean, std = (np.array(values)[:, None, None] for values in (FACTS.mean, FACTS.std))
    for epoch in range(3):
        got, _ = Chosen(samples, FACTS, seed=5)[Keys(epoch, list(range(6)))]
        for i in range(6):
            top, left, flip = draw(5, epoch, i).integers(0, (9, 9, 2))
            padded = np.pad(images[i], ((0, 0), (4, 4), (4, 4)))
            expected = padded[:, top : top + 32, left : left + 32]
            expected = expected[:, :, ::-1] if flip else expected
            np.testing.assert_allclose(got[i], (expected / 255 - mean) / std, atol=1e-5)
