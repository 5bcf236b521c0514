"""ImageNet in its tree `{train,val}/<wnid>/*.JPEG`, unpacked from the official archives."""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling
from scipy.io import loadmat

from pipeline.data.archives import DAMAGED, tarred, unpack
from pipeline.data.manifest import Row, fault, files, folders, listed, read_columns, read_file
from pipeline.data.pictures import picture_size, read_picture
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.progress import track

SPLITS = ("train", "val")
ARCHIVES = {split: f"ILSVRC2012_img_{split}.tar" for split in SPLITS}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
RESIZE_PER_CROP = 256 / 224
SOURCE = (
    f"the official archives ({ARCHIVES['train']}, {ARCHIVES['val']} and {DEVKIT}, "
    "which you fetch at https://image-net.org/download-images)"
)


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[tuple[str, ...]]:
    """Every image of the tree, by split and class."""
    for split in SPLITS:
        _check_split(root, split)
    found: list[tuple[str, ...]] = []
    for split in SPLITS:
        for name in folders(root / split):
            images = files(root / split / name)
            if not images:
                raise fault(root / split / name, "a class folder without images")
            for image in images:
                path = f"{split}/{name}/{image}"
                if not image.lower().endswith((".jpeg", ".jpg")):
                    raise fault(root / path, "not a .JPEG file; move it out of the data set")
                found.append((path,))
    return found


def _check_split(root: Path, split: str) -> None:
    folder = root / split
    if not folder.is_dir():
        form = "ImageNet is read from {train,val}/<wnid>/*.JPEG"
        raise fault(folder, f"no such folder; {form}, or from {SOURCE}, put into {root}")
    entries = listed(folder)
    if not entries:
        raise fault(folder, f"an empty folder; delete it and put {SOURCE} into {root}")
    for entry in entries:
        if entry.is_dir():
            continue
        if split == "train":
            raise fault(folder / entry.name, "not a class folder; move it out of the data set")
        cure = f"delete it and put {ARCHIVES['val']} and {DEVKIT} into {root}"
        what = f"holds pictures ({entry.name}) where class folders belong"
        raise fault(folder, f"{what}; {cure}: prepare sorts them by the official truth")


def inspect(root: Path, paths: tuple[str, ...]) -> Row:
    """The row of an image, which is decoded to its end."""
    path = paths[0]
    split, name, _ = path.split("/")
    content = read_file(root / path)
    width, height = picture_size(content, root / path)
    row: Row = {"path": path, "split": split, "class": name, "width": width, "height": height}
    return row | {"bytes": len(content), "digest": digest(content)}


def tally(row: Row) -> dict[str, int]:
    """The number of images of each class in a row."""
    return {str(row["class"]): 1}


def check(root: Path, counts: dict[str, Counter[str]]) -> None:
    """Train and val have the same classes."""
    for name in sorted(counts["train"].keys() ^ counts["val"].keys()):
        lacking = root / ("val" if name in counts["train"] else "train") / name
        raise fault(lacking, "no such folder, but the classes of train and val must be the same")


def unpack_archives(root: Path) -> None:
    """Unpacks the official archives that lie in `root`."""
    unpack(root / ARCHIVES["train"], root / "train", _unpack_train)
    unpack(root / ARCHIVES["val"], root / "val", _unpack_val)


def _unpack_train(archive: Path, folder: Path) -> None:
    for name, content in track(tarred(archive, r"n\d{8}\.tar"), "Unpacking ImageNet", 1000):
        own = folder / name.removesuffix(".tar")
        own.mkdir()
        for image, file in tarred(archive, rf"{own.name}_\d+\.JPEG", content):
            (own / image).write_bytes(file.read())


def _unpack_val(archive: Path, folder: Path) -> None:
    wnids = validation_wnids(archive.with_name(DEVKIT))
    for wnid in set(wnids):
        (folder / wnid).mkdir()
    images = tarred(archive, r"ILSVRC2012_val_\d{8}\.JPEG")
    for name, file in track(images, "Unpacking ImageNet", len(wnids)):
        number = int(name[-13:-5])
        if not 1 <= number <= len(wnids):
            raise fault(archive, f"holds {name}, but {DEVKIT} has {len(wnids)} labels")
        (folder / wnids[number - 1] / name).write_bytes(file.read())


def validation_wnids(devkit: Path) -> list[str]:
    """The wnid of each validation image, in their order, from the official devkit archive.

    Raises:
        UserError: It is missing, damaged, or another archive.
    """
    wanted = {"meta.mat": b"", TRUTH: b""}
    try:
        for name, file in tarred(devkit, r"ILSVRC2012_devkit_t12/[\w./-]+"):
            if Path(name).name in wanted:
                wanted[Path(name).name] = file.read()
        synsets = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if not synset["num_children"]]
        names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        wnids = [names[int(line)] for line in wanted[TRUTH].split()]
    except UserError:
        raise
    except DAMAGED as error:
        cure = "the validation images need it for their labels"
        raise fault(devkit, f"cannot be read ({error}); {cure}") from None
    except Exception as error:  # scipy raises whatever it meets
        raise fault(devkit, f"not the devkit of ILSVRC 2012, task 1 and 2 ({error!r})") from None
    for name in wnids:
        if not re.fullmatch(r"n\d{8}", name):
            raise fault(devkit, f"{name!r} is not a wnid")
    return wnids


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """(class, its first `each` training pictures as (H, W, 3) RGB) of at most ten classes."""
    groups: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if row["split"] != "train" or (len(groups) == 10 and row["class"] not in groups):
            break
        pictures = groups.setdefault(str(row["class"]), [])
        if len(pictures) < each:
            pictures.append(read_picture(root / str(row["path"])))
    return list(groups.items())


# ---- what training reads


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Cuts a random part (8 to 100 % of the area, 3:4 to 4:3) and resizes it to `size` x `size`."""
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


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to 256/224 of `size`, then cuts `size` x `size` from the middle."""
    short = round(size * RESIZE_PER_CROP)
    scale = short / min(image.size)
    width, height = (short if side == min(image.size) else int(side * scale) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


class Split:
    """The samples of a split: images (size, size, 3) uint8, and the numbers of their classes."""

    def __init__(
        self, root: Path, manifest: Path, split: str, params: dict[str, Any], augment: bool = False
    ) -> None:
        """Opens a split (train or val); `params["image"]` is the size."""
        paths, digests, classes = read_columns(manifest, split, "path", "digest", "class")
        self.root, self.size, self.augment = root, params["image"], augment
        self.names = tuple(sorted(set(classes)))
        # Arrays: the reference counts of a list's items would copy its memory into every worker
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.digests = np.array([own.encode() for own in digests])
        numbers = {name: number for number, name in enumerate(self.names)}
        self.labels = np.array([numbers[name] for name in classes], np.int64)

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image and its label; the crop and the flip of an augmented one come from `rng`."""
        path = self.root / os.fsdecode(self.paths[index])
        image = Image.fromarray(read_picture(path, self.digests[index].decode()))
        if not self.augment:
            return np.asarray(centre_crop(image, self.size)), self.labels[index]
        image = random_resized_crop(image, self.size, rng)
        return np.asarray(ImageOps.mirror(image) if rng.integers(2) else image), self.labels[index]
