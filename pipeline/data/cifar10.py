"""CIFAR-10 in its python batches, read without general unpickling. NumPy alone."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.archives import tarred, unpack
from pipeline.data.manifest import Row, fault, read_columns, read_file
from pipeline.files import digest

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}
META = f"{FOLDER}/batches.meta"
MARGIN = 4  # around a picture, before the random crop
ALLOWED = {  # all that a batch names
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the four globals of a CIFAR-10 batch, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        own = module.replace("numpy._core", "numpy.core")  # as NumPy 2 writes it
        if (own, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch needs")
        return super().find_class(own.replace("numpy.core", "numpy._core"), name)


def read_batch(content: bytes, file: Path) -> dict[bytes, Any]:
    """The dictionary of a batch file (keys are byte strings); `file` is for the errors.

    Raises:
        UserError: It is something else.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises almost anything
        raise fault(file, f"not a CIFAR-10 batch ({error})") from None
    if not isinstance(batch, dict):
        raise fault(file, f"not a CIFAR-10 batch (a {type(batch).__name__}, not a dictionary)")
    return batch


def images_and_labels(content: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 3, 32, 32) uint8 and labels (N,) int64 of a batch file.

    Raises:
        UserError: It is something else.
    """
    batch = read_batch(content, file)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise fault(file, "data must be an array of unsigned bytes")
    if data.ndim != 2 or data.shape[1] != 3072 or not len(data):
        raise fault(file, f"data must have the shape (N, 3072), not {data.shape}")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise fault(file, f"labels must be a list of {len(data)} numbers, one per image")
    if any(type(label) is not int or not 0 <= label < len(CLASSES) for label in labels):
        raise fault(file, f"a label is not a number from 0 to {len(CLASSES) - 1}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def read_split(root: Path, manifest: Path | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 3, 32, 32) uint8 and labels (N,) int64 of a split (train or test).

    Args:
        root: The folder that holds cifar-10-batches-py.
        manifest: Its files are verified; None reads what is there.
        split: train or test.

    Raises:
        UserError: A batch is missing or damaged, or is not that of the manifest.
    """
    if manifest is None:
        batches = [(f"{FOLDER}/{name}", None) for name, own in BATCHES.items() if own == split]
    else:
        batches = list(zip(*read_columns(manifest, split, "path", "digest"), strict=True))
    parts = [images_and_labels(read_file(root / path, own), root / path) for path, own in batches]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


class Split:
    """The samples of a split, held in memory: images (32, 32, 3) uint8 and their labels."""

    names = CLASSES

    def __init__(
        self, root: Path, manifest: Path, split: str, _: dict[str, Any], augment: bool = False
    ) -> None:
        """Opens a split (train or test); `augment` cuts samples out of a black margin and flips."""
        images, self.labels = read_split(root, manifest, split)
        margin = 2 * (MARGIN if augment else 0,)
        self.images = np.pad(images.transpose(0, 2, 3, 1), ((0, 0), margin, margin, (0, 0)))
        self.paths = [f"image {i}" for i in range(len(images))]
        self.augment = augment

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image and its label; the crop and the flip of an augmented one come from `rng`."""
        image, label = self.images[index], self.labels[index]
        if not self.augment:
            return image, label
        top, left, flip = rng.integers(0, (2 * MARGIN + 1, 2 * MARGIN + 1, 2))
        image = image[top : top + 32, left : left + 32]
        return (image[:, ::-1] if flip else image), label


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[tuple[str, ...]]:
    """The six batch files, each with the file of the class names."""
    if not (root / FOLDER).is_dir():
        cure = "or set prepare.cifar10.source to download or generated"
        raise fault(root / FOLDER, f"no such folder; put it or {ARCHIVE} into {root}, {cure}")
    for name in (*BATCHES, "batches.meta"):
        if not (root / FOLDER / name).exists():
            reason = f"no such file; put the whole {FOLDER} or {ARCHIVE} in its place"
            raise fault(root / FOLDER / name, reason)
    return [(f"{FOLDER}/{name}", META) for name in BATCHES]


def inspect(root: Path, files: tuple[str, ...]) -> Row:
    """The row of a batch file: its images, and how many of each class."""
    path = files[0]
    content = read_file(root / path)
    images, labels = images_and_labels(content, root / path)
    row: Row = {"path": path, "split": BATCHES[Path(path).name], "images": len(images)}
    row |= {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)}
    return row | {"bytes": len(content), "digest": digest(content)}


def tally(row: Row) -> dict[str, int]:
    """The number of images of each class in a row."""
    return {name: int(row[name]) for name in CLASSES}


def check(root: Path, counts: dict[str, Counter[str]]) -> None:
    """The classes have their names, and each split has every class."""
    names = read_batch(read_file(root / META), root / META).get(b"label_names")
    if names != [name.encode() for name in CLASSES]:
        raise fault(root / META, "label_names are not CIFAR-10's ten classes")
    for split, classes in counts.items():
        for name, count in classes.items():
            if not count:
                raise fault(root / FOLDER, f"the {split} batches hold no image of the class {name}")


def unpack_archives(root: Path) -> None:
    """Unpacks the official archive, if it lies in `root`."""
    unpack(root / ARCHIVE, root / FOLDER, _unpack)


def _unpack(archive: Path, folder: Path) -> None:
    names = r"data_batch_[1-5]|test_batch|batches\.meta|readme\.html"
    for name, file in tarred(archive, f"{FOLDER}/({names})"):
        (folder / Path(name).name).write_bytes(file.read())


def download(root: Path) -> None:
    """Fetches the official archive with torchvision, unless it is there."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    if (root / FOLDER).exists() or (root / ARCHIVE).exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    partial = f"{ARCHIVE}.partial"
    try:
        download_url(CIFAR10.url, str(root), partial, CIFAR10.tgz_md5)
        (root / partial).rename(root / ARCHIVE)
    except (OSError, RuntimeError) as error:
        (root / partial).unlink(missing_ok=True)
        cure = f"fetch {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html by hand"
        reason = f"CIFAR-10 could not be downloaded ({error}); {cure} and put it there"
        raise fault(root, reason) from None


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """(class, its first `each` training pictures as (32, 32, 3) RGB) for the contact sheet."""
    path = root / str(rows[0]["path"])
    images, labels = images_and_labels(read_file(path), path)
    pictures = images.transpose(0, 2, 3, 1)
    return [(name, list(pictures[labels == i][:each])) for i, name in enumerate(CLASSES)]
