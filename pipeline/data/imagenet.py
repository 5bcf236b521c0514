"""ImageNet in its tree `{train,val}/<wnid>/*.JPEG`, unpacked from the official archives if need be."""

from __future__ import annotations

import io
import math
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from pipeline.data.manifest import (
    MEMBER,
    DataError,
    Found,
    Manifest,
    Row,
    checksum,
    files,
    folders,
    image_size,
    progress,
    read_bytes,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pipeline.data.loading import Keys

SPLITS = ("train", "val")
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESIZE_PER_CROP = 256 / 224


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[Found]:
    """Return every image of the tree, by split and class, or say what is missing or does not belong."""
    found = []
    for split in SPLITS:
        if not (root / split).is_dir():
            raise DataError(
                f"{root / split}: no such folder; ImageNet is read from {{train,val}}/<wnid>/*.JPEG, or from "
                f"{TRAIN_ARCHIVE}, {VAL_ARCHIVE} and {DEVKIT} put into {root}"
            )
        for name in folders(root / split):
            images = files(root / split / name)
            if not images:
                raise DataError(f"{root / split / name}: a class folder without images")
            for image in images:
                if not image.lower().endswith((".jpeg", ".jpg")):
                    raise DataError(f"{root / split / name / image}: not a .JPEG file; move it out of the data set")
                found.append(Found(split, (f"{split}/{name}/{image}",)))
    return found


def inspect(root: Path, found: Found) -> Row:
    """Decode one image; return its row."""
    path = found.files[0]
    content = read_bytes(root, path)
    width, height = image_size(root, path, content)
    row: Row = {
        "path": path,
        "split": found.split,
        "class": path.split("/")[1],
        "width": width,
        "height": height,
    }
    return row | {"bytes": len(content), "checksum": checksum(content)}


def check(root: Path, rows: list[Row]) -> None:
    """Check what no single image shows: train and val have the same classes."""
    train, val = (set(names) for names in counts(rows).values())
    for name in sorted(train ^ val):
        lacking = root / ("val" if name in train else "train") / name
        raise DataError(f"{lacking}: no such folder, but the classes of train and val must be the same")


def counts(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Return the number of images of each split and class."""
    return {
        split: dict(sorted(Counter(str(row["class"]) for row in rows if row["split"] == split).items()))
        for split in SPLITS
    }


def unpack(root: Path) -> None:
    """Unpack the official archives into the tree, each where its part of the tree is missing."""
    if not (root / "train").exists() and (root / TRAIN_ARCHIVE).is_file():
        _unpack(root, "train", TRAIN_ARCHIVE, _unpack_train)
    if not (root / "val").exists() and (root / VAL_ARCHIVE).is_file():
        _unpack(root, "val", VAL_ARCHIVE, _unpack_val)


def _unpack(root: Path, split: str, archive: str, how: Callable[[Path, Path], None]) -> None:
    partial = root / f"{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        how(root, partial)
        partial.rename(root / split)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{root / archive}: cannot be unpacked ({error})") from None


def _members(archive: Path, content: IO[bytes] | None, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of a tar; anything that is not a plain file named as expected is refused.

    Names are matched whole against `pattern`, which knows no slash: nothing can land outside its folder, and
    links and devices are no plain files.
    """
    with tarfile.open(archive if content is None else None, fileobj=content) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() and re.fullmatch(pattern, member.name) else None
            if file is None:
                raise DataError(f"{archive}: holds {member.name!r}, which the official archive does not")
            if member.size > MEMBER and not member.name.endswith(".tar"):
                raise DataError(
                    f"{archive}: holds {member.name!r} of {member.size:,} bytes, far more than a picture has"
                )
            yield member.name, file


def _unpack_train(root: Path, target: Path) -> None:
    archive = root / TRAIN_ARCHIVE
    for name, content in progress(_members(archive, None, r"n\d{8}\.tar"), "Unpacking ImageNet's training images"):
        wnid = name.removesuffix(".tar")
        (target / wnid).mkdir()
        for image, file in _members(archive, content, rf"{wnid}_\d+\.JPEG"):
            with (target / wnid / image).open("wb") as out:
                shutil.copyfileobj(file, out)


def _unpack_val(root: Path, target: Path) -> None:
    wnids = validation_wnids(root / DEVKIT)
    archive = root / VAL_ARCHIVE
    for wnid in set(wnids):
        (target / wnid).mkdir()
    for name, file in progress(
        _members(archive, None, r"ILSVRC2012_val_\d{8}\.JPEG"),
        "Unpacking ImageNet's validation images",
        len(wnids),
    ):
        number = int(name[-13:-5])
        if not 1 <= number <= len(wnids):
            raise DataError(f"{archive}: holds {name}, but {root / DEVKIT} has {len(wnids)} labels")
        with (target / wnids[number - 1] / name).open("wb") as out:
            shutil.copyfileobj(file, out)


def validation_wnids(devkit: Path) -> list[str]:
    """Return the wnid of each validation image, in their order, from the official devkit archive."""
    from scipy.io import loadmat

    wanted = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                file = tar.extractfile(member) if member.isreg() and name in wanted else None
                if file and member.size <= MEMBER:
                    content[name] = file.read()
        synsets = loadmat(io.BytesIO(content[wanted[0]]), squeeze_me=True)["synsets"]
        wnid = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets if not entry["num_children"]}
        wnids = [wnid[int(line)] for line in content[wanted[1]].split()]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{devkit}: cannot be read ({error}); the validation images need it for their labels") from None
    except (KeyError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise DataError(f"{devkit}: not the devkit of ILSVRC 2012, task 1 and 2 ({error!r})") from None
    for name in wnids:
        if not re.fullmatch(r"n\d{8}", name):
            raise DataError(f"{devkit}: {name!r} is not a wnid")
    return wnids


def download(root: Path) -> None:
    """Say how ImageNet is fetched, which only its user may do, unless it is there."""
    if not all((root / split).exists() or (root / f"ILSVRC2012_img_{split}.tar").exists() for split in SPLITS):
        raise DataError(
            f"{root}: ImageNet cannot be downloaded by a program; log in at "
            "https://image-net.org/download-images, accept its terms, "
            f"put {TRAIN_ARCHIVE}, {VAL_ARCHIVE} and {DEVKIT} there, "
            "and set prepare.imagenet.source to folder"
        )
    unpack(root)


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """Return (class, its first `each` training pictures as (H, W, 3) RGB) of at most ten classes."""
    wnids = sorted({str(row["class"]) for row in rows})[:10]
    return [
        (
            wnid,
            [
                np.asarray(decode(root, str(row["path"]), int(row["bytes"])))
                for row in [row for row in rows if row["class"] == wnid and row["split"] == "train"][:each]
            ],
        )
        for wnid in wnids
    ]


# ---- what training reads


def decode(root: Path, path: str, size: int, expected: str | None = None) -> Image:
    """Return an image in RGB, whatever colour space its file has; its bytes must be those of the manifest."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(read_bytes(root, path, size, expected))).convert("RGB")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{root / path}: not a readable image ({error})") from None


def random_resized_crop(image: Image, size: int, rng: np.random.Generator) -> Image:
    """Cut a random part (8 to 100 % of the area, 3:4 to 4:3) and resize it to `size` x `size`."""
    from PIL.Image import Resampling

    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return image.crop((left, top, left + w, top + h)).resize((size, size), Resampling.BILINEAR)


def centre_crop(image: Image, size: int) -> Image:
    """Resize the shorter side to 256/224 of `size`, then cut `size` x `size` from the middle."""
    from PIL.Image import Resampling

    short = round(size * RESIZE_PER_CROP)
    scale = short / min(image.size)
    width, height = (short if side == min(image.size) else int(side * scale) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))


class ImageNet:
    """A split of ImageNet; `dataset[keys]` decodes a whole batch (images (B, 3, size, size), labels (B,))."""

    def __init__(
        self, root: Path, rows: Manifest, class_names: list[str], *, size: int, augment: bool, seed: int
    ) -> None:
        """Hold the manifest's `rows`; images are read when asked for."""
        self.root, self.size, self.augment, self.seed = root, size, augment, seed
        self.class_names, self.classes = class_names, len(class_names)
        # Arrays, not lists: a list's reference counts would copy its memory into every worker.
        self.paths = np.array([path.encode() for path in rows["path"]])
        self.bytes = np.array(rows["bytes"], np.int64)
        self.checksums = np.array([text.encode() for text in rows["checksum"]])
        self.labels = np.searchsorted(np.array(class_names), np.array(rows["class"]))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Return the batch of `keys`, normalised; augmented as (seed, epoch, index) say."""
        import torch

        pixels = np.stack([self._pixels(keys.epoch, index) for index in keys.indices])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return images.contiguous(), torch.from_numpy(self.labels[keys.indices])

    def name(self, index: int) -> str:
        """Return an image's path in the data root."""
        return self.paths[index].decode()

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        from PIL import ImageOps

        from pipeline.data.loading import draw

        image = decode(self.root, self.name(index), int(self.bytes[index]), self.checksums[index].decode())
        if not self.augment:
            return np.asarray(centre_crop(image, self.size))
        rng = draw(self.seed, epoch, index)
        image = random_resized_crop(image, self.size, rng)
        return np.asarray(ImageOps.mirror(image) if rng.integers(2) else image)


def open_imagenet(root: Path, manifest: Path, split: str, *, size: int, augment: bool, seed: int) -> ImageNet:
    """Open a split (train or val) through its manifest; labels number the class folders in sorted order."""
    table = Manifest.read(manifest)
    class_names = sorted(set(table["class"]))
    return ImageNet(root, table.split(split), class_names, size=size, augment=augment, seed=seed)
