"""CIFAR-10 in its python batches: read without general unpickling, held in memory as one uint8 tensor."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.archives import tarred, unpacking
from pipeline.data.manifest import DataError, Found, Manifest, Row, checksum, read_bytes, totals

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.loading import Keys

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
PADDING = 4


# ---- reading the batches


class _Dtype:
    """Stands for numpy.dtype while unpickling; only unsigned bytes are let through."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        if name not in ("u1", b"u1", "uint8"):
            raise pickle.UnpicklingError(f"an array of {name!r} instead of unsigned bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment mean nothing for single bytes


class _Array:
    """Stands for numpy's arrays while unpickling: takes the shape and the bytes, runs nothing."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty((0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("not a plain array of bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("not a plain byte string")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows the few globals of a CIFAR-10 batch by harmless stand-ins, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch needs")
        return _ALLOWED[module, name]


def read_batch(content: bytes, file: Path) -> dict[bytes, Any]:
    """Return the dictionary of a batch file (keys are byte strings); `file` is for the errors."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises almost anything
        raise DataError(f"{file}: not a CIFAR-10 batch ({error})") from None
    if not isinstance(batch, dict):
        raise DataError(f"{file}: not a CIFAR-10 batch (a {type(batch).__name__} instead of a dictionary)")
    return {key: value.value if isinstance(value, _Array) else value for key, value in batch.items()}


def images_and_labels(content: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 3, 32, 32) uint8 and labels (N,) int64 of a batch file, both checked."""
    batch = read_batch(content, file)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or not len(data):
        raise DataError(f"{file}: data must be an array of bytes of shape (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{file}: labels must be a list of {len(data)} numbers, one an image")
    if any(type(label) is not int or not 0 <= label < len(CLASSES) for label in labels):
        raise DataError(f"{file}: a label is not a number from 0 to {len(CLASSES) - 1}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[Found]:
    """Return the six batch files, each with the file of the class names, or say which is missing."""
    for name in (*BATCHES, "batches.meta"):
        if not (root / FOLDER / name).is_file():
            raise DataError(
                f"{root / FOLDER / name}: no such file; put CIFAR-10's folder {FOLDER} (or {ARCHIVE}) "
                f"into {root}, or set prepare.cifar10.source to download or generated"
            )
    return [Found(split, (f"{FOLDER}/{name}", f"{FOLDER}/batches.meta")) for name, split in BATCHES.items()]


def inspect(root: Path, found: Found) -> Row:
    """Read and check one batch file; return its row: images and how many of each class."""
    path = found.files[0]
    content = read_bytes(root, path)
    images, labels = images_and_labels(content, root / path)
    row: Row = {"path": path, "split": found.split, "images": len(images), "width": 32, "height": 32}
    row |= {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)}
    return row | {"bytes": len(content), "checksum": checksum(content)}


def check(root: Path, rows: list[Row]) -> None:
    """Check what no single batch shows: the class names, and that each split has every class."""
    meta = root / FOLDER / "batches.meta"
    names = read_batch(read_bytes(root, f"{FOLDER}/batches.meta"), meta).get(b"label_names")
    if names != [name.encode() for name in CLASSES]:
        raise DataError(f"{meta}: label_names are not CIFAR-10's ten classes")
    for split, classes in counts(rows).items():
        for name, count in classes.items():
            if not count:
                raise DataError(f"{root / FOLDER}: the {split} batches hold no image of the class {name}")


def counts(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Return the number of images of each split and class."""
    return totals(rows, CLASSES)


def unpack(root: Path) -> None:
    """Unpack the official archive, where it lies in `root` and its folder does not."""
    archive, names = root / ARCHIVE, r"data_batch_[1-5]|test_batch|batches\.meta|readme\.html"
    if (root / FOLDER).exists() or not archive.is_file():
        return
    with unpacking(archive, root / FOLDER) as folder:
        for name, file in tarred(archive, rf"{FOLDER}/({names})"):
            (folder / Path(name).name).write_bytes(file.read())


def download(root: Path) -> None:
    """Fetch CIFAR-10 with torchvision, unless it is there."""
    if (root / FOLDER).exists():
        return
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{root}: CIFAR-10 could not be downloaded ({error}); fetch {ARCHIVE} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html by hand, put it there, and set the source to folder"
        ) from None


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """Return (class, its first `each` training pictures as (32, 32, 3) RGB) for the contact sheet."""
    path = str(next(row["path"] for row in rows if row["split"] == "train"))
    images, labels = images_and_labels(read_bytes(root, path), root / path)
    return [
        (name, [images[i].transpose(1, 2, 0) for i in np.flatnonzero(labels == label)[:each]])
        for label, name in enumerate(CLASSES)
    ]


# ---- what training reads


class Cifar10:
    """A split of CIFAR-10 on a device; `dataset[keys]` is a batch there: images (B, 3, 32, 32), labels (B,).

    What is drawn at random is drawn on the CPU, so that every device makes the same samples.
    """

    names, classes = CLASSES, len(CLASSES)

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, augment: bool = False, seed: int = 0, device: str = "cpu"
    ) -> None:
        """Hold `images` (N, 3, 32, 32) uint8 and `labels` (N,) on `device`."""
        import torch

        self.images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Return the batch of `keys`, normalised; augmented as (seed, epoch, index) say."""
        import torch

        from pipeline.data.loading import normalised

        indices = torch.as_tensor(keys.indices, device=self.images.device)
        images = self.images[indices]
        if self.augment:
            images = self._crop_and_flip(images, keys)
        return normalised(images, MEAN, STD), self.labels[indices]

    def name(self, index: int) -> str:
        """Return which image of the split it is."""
        return f"image {index}"

    def _crop_and_flip(self, images: Tensor, keys: Keys) -> Tensor:
        import torch
        from torch.nn.functional import pad

        from pipeline.data.loading import draw

        draws = [draw(self.seed, keys.epoch, index).integers(0, (9, 9, 2)) for index in keys.indices]
        top, left, flip = torch.from_numpy(np.stack(draws)).to(images.device).unbind(1)
        ramp = torch.arange(32, device=images.device)
        rows = top[:, None] + ramp  # (B, 32)
        columns = left[:, None] + torch.where(flip[:, None] > 0, ramp.flip(0), ramp)
        padded = pad(images, [PADDING] * 4)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def open_cifar10(
    root: Path,
    manifest: Path | None,
    split: str,
    *,
    augment: bool = False,
    seed: int = 0,
    limit: int | None = None,
    device: str = "cpu",
) -> Cifar10:
    """Load a split (train or test; its first `limit` images) onto `device`, its files checked against the manifest.

    Without a manifest they are those of `find`, unchecked.
    """
    if manifest is None:
        files = [(found.files[0], None) for found in find(root) if found.split == split]
    else:
        rows = Manifest.read(manifest).split(split)
        files = list(zip(rows["path"], rows["checksum"], strict=True))
    parts = [images_and_labels(read_bytes(root, path, expected), root / path) for path, expected in files]
    images, labels = (np.concatenate(part)[:limit] for part in zip(*parts, strict=True))
    return Cifar10(images, labels, augment=augment, seed=seed, device=device)
