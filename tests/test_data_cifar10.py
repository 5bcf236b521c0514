"""CIFAR-10: the real format, read without trust; batches that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import cifar10, generated
from pipeline.data.cifar10 import CLASSES, FOLDER, Cifar10, images_and_labels, open_cifar10
from pipeline.data.loading import Keys, draw
from pipeline.data.manifest import DataError, checksum


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generated.ensure(tmp_path / "cifar10", generated.GeneratedCifar10(train=50, test=20))
    return tmp_path / "cifar10"


@pytest.fixture
def manifest(root: Path, manifest_of: Callable) -> Path:
    return manifest_of(cifar10, root)


@pytest.mark.parametrize(("encoding", "kind"), [("latin1", str), ("bytes", bytes)])
def test_batches_are_what_common_readers_of_the_real_ones_expect(root: Path, encoding: str, kind: type) -> None:
    def key(name: str) -> str | bytes:
        return name if kind is str else name.encode()

    for name in ("data_batch_1", "test_batch"):
        with (root / FOLDER / name).open("rb") as file:
            batch = pickle.load(file, encoding=encoding)
        assert set(batch) == {key(name) for name in ("batch_label", "labels", "data", "filenames")}
        assert batch[key("data")].dtype == np.uint8
        assert batch[key("data")].shape == (len(batch[key("labels")]), 3072)
        assert all(isinstance(name, kind) for name in batch[key("filenames")])
    with (root / FOLDER / "batches.meta").open("rb") as file:
        assert pickle.load(file, encoding=encoding)[key("label_names")] == [key(name) for name in CLASSES]


def test_our_reader_agrees_with_pickle(root: Path) -> None:
    path = root / FOLDER / "data_batch_3"
    images, labels = images_and_labels(path.read_bytes(), path)
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    assert np.array_equal(images.reshape(-1, 3072), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]


def test_batches_written_by_python_3_are_read_too(tmp_path: Path) -> None:
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for order, protocol in (("C", 2), ("F", 2), ("C", 4)):
        content = pickle.dumps({b"data": np.asarray(data, order=order), b"labels": [1, 9]}, protocol=protocol)
        images, labels = images_and_labels(content, tmp_path)
        assert np.array_equal(images.reshape(2, 3072), data)
        assert labels.tolist() == [1, 9]


class _Runs:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("where", ["value", "key of numpy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, where: str) -> None:
    trap, file = tmp_path / "ran", tmp_path / "data_batch_1"
    content = pickle.dumps({b"data": _Runs(trap)})
    if where == "key of numpy":
        content = b"cnumpy\nload\n(S'x'\ntR."
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_1.*no CIFAR-10 batch needs"):
        images_and_labels(content, file)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "shape"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "labels must be a list of 2"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "from 0 to 9"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "unsigned bytes"),
        ({b"data": np.array([["x"]], object), b"labels": [0]}, "unsigned bytes"),
        ([1, 2], "a list instead of a dictionary"),
        ({}, "data must be"),
    ],
)
def test_a_malformed_batch_is_named(tmp_path: Path, batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        images_and_labels(pickle.dumps(batch), tmp_path / "data_batch_2")
    assert "data_batch_2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_cut_of_a_batch_is_an_error_that_names_it(root: Path) -> None:
    path = root / FOLDER / "data_batch_1"
    content = path.read_bytes()
    for end in (0, 1, 2, 10, 200, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match="data_batch_1"):
            images_and_labels(content[:end], path)


def test_a_missing_batch_and_foreign_classes_are_named(root: Path) -> None:
    rows = [cifar10.inspect(root, found) for found in cifar10.find(root)]
    cifar10.check(root, rows)
    meta = root / FOLDER / "batches.meta"
    meta.write_bytes(generated.python2_pickle({b"label_names": [b"apple"] * 10}))
    with pytest.raises(DataError, match=r"batches\.meta"):
        cifar10.check(root, rows)
    (root / FOLDER / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4: no such file"):
        cifar10.find(root)


def test_the_archive_is_unpacked_and_only_what_belongs_to_it(root: Path, tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.mkdir()
    with tarfile.open(user / cifar10.ARCHIVE, "w:gz") as tar:
        tar.add(root / FOLDER, FOLDER)
    cifar10.unpack(user)
    assert (user / FOLDER / "test_batch").read_bytes() == (root / FOLDER / "test_batch").read_bytes()
    for name in ("../evil", "/evil", f"{FOLDER}/evil", f"{FOLDER}/../../evil"):
        bad = tmp_path / f"bad-{checksum(name.encode())}"
        bad.mkdir()
        with tarfile.open(bad / cifar10.ARCHIVE, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        with pytest.raises(DataError, match="evil"):
            cifar10.unpack(bad)
    assert not list(tmp_path.rglob("evil"))


def test_a_batch_is_normalised_and_in_the_asked_order(root: Path, manifest: Path) -> None:
    dataset = open_cifar10(root, manifest, "test")
    assert (len(dataset), dataset.classes) == (20, 10)
    images, labels = dataset[Keys(0, [7, 3])]
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    mean, std = torch.tensor(cifar10.MEAN).view(3, 1, 1), torch.tensor(cifar10.STD).view(3, 1, 1)
    back = (images * std + mean) * 255
    torch.testing.assert_close(back, dataset.images[[7, 3]].float())
    assert labels.tolist() == dataset.labels[[7, 3]].tolist()
    assert len(open_cifar10(root, manifest, "train", limit=13)) == 13


def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (6, 3, 32, 32)).astype(np.uint8)
    dataset = Cifar10(images, np.zeros(6, np.int64), augment=True, seed=5)
    mean, std = np.array(cifar10.MEAN)[:, None, None], np.array(cifar10.STD)[:, None, None]
    for epoch in range(3):
        got, _ = dataset[Keys(epoch, list(range(6)))]
        for i in range(6):
            top, left, flip = draw(5, epoch, i).integers(0, (9, 9, 2))
            expected = np.pad(images[i], ((0, 0), (4, 4), (4, 4)))[:, top : top + 32, left : left + 32]
            expected = expected[:, :, ::-1] if flip else expected
            np.testing.assert_allclose(got[i], (expected / 255 - mean) / std, atol=1e-5)


def test_a_set_held_on_a_device_makes_its_batches_there() -> None:
    """`meta` stands for the device: a part of the work left on the CPU would have values."""
    dataset = Cifar10(np.zeros((6, 3, 32, 32), np.uint8), np.zeros(6, np.int64), augment=True, seed=5, device="meta")
    images, labels = dataset[Keys(0, [4, 1])]
    assert images.is_meta and labels.is_meta and images.shape == (2, 3, 32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_samples_of_the_cpu() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32)).astype(np.uint8)
    here, there = (Cifar10(images, np.arange(50) % 10, augment=True, seed=5, device=d) for d in ("cpu", "cuda"))
    for ours, theirs in zip(here[Keys(2, list(range(50)))], there[Keys(2, list(range(50)))], strict=True):
        assert torch.equal(ours, theirs.cpu())
