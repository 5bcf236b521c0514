"""ImageNet in its tree `{train,val}/<wnid>/*.JPEG`, unpacked from the official archives if need be."""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.archives import DAMAGED, MEMBER, tarred, unpacking
from pipeline.data.manifest import (
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
    row: Row = {"path": path, "split": found.split, "class": path.split("/")[1], "width": width, "height": height}
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
    for split, name, how in (("train", TRAIN_ARCHIVE, _unpack_train), ("val", VAL_ARCHIVE, _unpack_val)):
        if not (root / split).exists() and (root / name).is_file():
            with unpacking(root / name, root / split) as folder:
                how(root / name, folder)


def _unpack_train(archive: Path, folder: Path) -> None:
    for name, content in progress(tarred(archive, r"n\d{8}\.tar"), "Unpacking ImageNet's training images"):
        own = folder / name.removesuffix(".tar")
        own.mkdir()
        for image, file in tarred(archive, rf"{own.name}_\d+\.JPEG", content):
            (own / image).write_bytes(file.read())


def _unpack_val(archive: Path, folder: Path) -> None:
    wnids = validation_wnids(archive.with_name(DEVKIT))
    for wnid in set(wnids):
        (folder / wnid).mkdir()
    images = tarred(archive, r"ILSVRC2012_val_\d{8}\.JPEG")
    for name, file in progress(images, "Unpacking ImageNet's validation images", len(wnids)):
        number = int(name[-13:-5])
        if not 1 <= number <= len(wnids):
            raise DataError(f"{archive}: holds {name}, but {archive.with_name(DEVKIT)} has {len(wnids)} labels")
        (folder / wnids[number - 1] / name).write_bytes(file.read())


def validation_wnids(devkit: Path) -> list[str]:
    """Return the wnid of each validation image, in their order, from the official devkit archive."""
    from scipy.io import loadmat

    content: dict[str, bytes] = {}
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and member.size <= MEMBER else None
                if file:
                    content[Path(member.name).name] = file.read()
        synsets = loadmat(io.BytesIO(content["meta.mat"]), squeeze_me=True)["synsets"]
        wnid = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets if not entry["num_children"]}
        wnids = [wnid[int(line)] for line in content["ILSVRC2012_validation_ground_truth.txt"].split()]
    except DAMAGED as error:
        raise DataError(f"{devkit}: cannot be read ({error}); the validation images need it for their labels") from None
    except Exception as error:  # scipy raises whatever it meets
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
    paths: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "train":
            paths.setdefault(str(row["class"]), []).append(str(row["path"]))
    return [(wnid, [np.asarray(decode(root, path)) for path in paths[wnid][:each]]) for wnid in sorted(paths)[:10]]


# ---- what training reads


def decode(root: Path, path: str, expected: str | None = None) -> Image:
    """Return an image in RGB, whatever colour space its file has; its checksum must be that of the manifest."""
    from PIL import Image

    content = read_bytes(root, path, expected)
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
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
        self,
        root: Path,
        manifest: Path,
        split: str,
        *,
        size: int,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        """Open a split (train or val; its first `limit` images); labels number the class folders in sorted order."""
        self.root, self.size, self.augment, self.seed = root, size, augment, seed
        table = Manifest.read(manifest)
        rows = table.split(split, limit)
        self.names = tuple(sorted(set(table["class"])))
        self.classes = len(self.names)
        # Arrays, not lists: a list's reference counts would copy its memory into every worker.
        self.paths, self.checksums = (np.array([text.encode() for text in rows[name]]) for name in ("path", "checksum"))
        self.labels = np.searchsorted(self.names, rows["class"])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Return the batch of `keys`, normalised; augmented as (seed, epoch, index) say."""
        import torch

        from pipeline.data.loading import normalised

        pixels = torch.from_numpy(np.stack([self._pixels(keys.epoch, index) for index in keys.indices]))
        return normalised(pixels.permute(0, 3, 1, 2), MEAN, STD), torch.from_numpy(self.labels[keys.indices])

    def name(self, index: int) -> str:
        """Return an image's path in the data root."""
        return self.paths[index].decode()

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        from PIL import ImageOps

        from pipeline.data.loading import draw

        image = decode(self.root, self.name(index), self.checksums[index].decode())
        if not self.augment:
            return np.asarray(centre_crop(image, self.size))
        rng = draw(self.seed, epoch, index)
        image = random_resized_crop(image, self.size, rng)
        return np.asarray(ImageOps.mirror(image) if rng.integers(2) else image)
