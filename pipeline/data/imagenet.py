"""ImageNet in its tree `{train,val}/<wnid>/*.JPEG`, unpacked from the official archives."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling
from scipy.io import loadmat

from pipeline.data.archives import DAMAGED, tarred, unpack
from pipeline.data.manifest import Found, Manifest, Row, fault, files, folders, listed, read_file
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


# ---- what the prepare stage asks of every set, see `pipeline.stages.prepare.Format`


def find(root: Path) -> list[Found]:
    """Every image of the tree, by split and class."""
    for split in SPLITS:
        _check_split(root, split)
    found = []
    for split in SPLITS:
        for name in folders(root / split):
            images = files(root / split / name)
            if not images:
                raise fault(root / split / name, "a class folder without images")
            for image in images:
                if not image.lower().endswith((".jpeg", ".jpg")):
                    raise fault(
                        root / split / name / image, "not a .JPEG file; move it out of the data set"
                    )
                found.append(Found(split, (f"{split}/{name}/{image}",)))
    return found


def _check_split(root: Path, split: str) -> None:
    folder = root / split
    if not folder.is_dir():
        raise fault(
            folder,
            "no such folder; ImageNet is read from {train,val}/<wnid>/*.JPEG, "
            f"or from {SOURCE}, put into {root}",
        )
    entries = listed(folder)
    if not entries:
        raise fault(folder, f"an empty folder; delete it and put {SOURCE} into {root}")
    stray = next((entry for entry in entries if not entry.is_dir()), None)
    if stray is not None and split == "val":
        raise fault(
            folder,
            f"holds pictures ({stray.name}) where class folders belong; delete it and put "
            f"{ARCHIVES['val']} and {DEVKIT} into {root}: prepare sorts them by the official truth",
        )
    if stray is not None:
        raise fault(folder / stray.name, "not a class folder; move it out of the data set")


def inspect(root: Path, found: Found) -> Row:
    """The row of an image, which is decoded to its end."""
    path = found.files[0]
    content = read_file(root / path)
    width, height = picture_size(content, root / path)
    row: Row = {"path": path, "split": found.split, "class": path.split("/")[1]}
    return row | {
        "width": width,
        "height": height,
        "bytes": len(content),
        "digest": digest(content),
    }


def check(root: Path, rows: list[Row]) -> None:
    """Train and val have the same classes."""
    train, val = (set(names) for names in counts(rows).values())
    for name in sorted(train ^ val):
        lacking = root / ("val" if name in train else "train") / name
        raise fault(lacking, "no such folder, but the classes of train and val must be the same")


def counts(rows: list[Row]) -> dict[str, dict[str, int]]:
    """The number of images of each split and class."""
    found = Counter((row["split"], str(row["class"])) for row in rows)
    by_split: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for (split, name), count in sorted(found.items()):
        by_split[str(split)][name] = count
    return by_split


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
        names = {
            int(one["ILSVRC2012_ID"]): str(one["WNID"])
            for one in synsets
            if not one["num_children"]
        }
        wnids = [names[int(line)] for line in wanted[TRUTH].split()]
    except UserError:
        raise
    except DAMAGED as error:
        raise fault(
            devkit, f"cannot be read ({error}); the validation images need it for their labels"
        ) from None
    except Exception as error:  # scipy raises whatever it meets
        raise fault(devkit, f"not the devkit of ILSVRC 2012, task 1 and 2 ({error!r})") from None
    for name in wnids:
        if not re.fullmatch(r"n\d{8}", name):
            raise fault(devkit, f"{name!r} is not a wnid")
    return wnids


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """(class, its first `each` training pictures as (H, W, 3) RGB) of at most ten classes."""
    paths: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "train":
            paths.setdefault(str(row["class"]), []).append(str(row["path"]))
    return [
        (name, [read_picture(root / path) for path in paths[name][:each]])
        for name in sorted(paths)[:10]
    ]


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
    return image.resize((width, height), Resampling.BILINEAR).crop(
        (left, top, left + size, top + size)
    )


class ImageNet:
    """The samples of a split: images (size, size, 3) uint8, and the numbers of their classes."""

    def __init__(
        self,
        root: Path,
        manifest: Path,
        split: str,
        *,
        size: int,
        augment: bool = False,
        limit: int | None = None,
    ) -> None:
        """Opens a split (train or val), or `limit` of its images."""
        table = Manifest.read(manifest)
        rows = table.split(split, limit)
        self.root, self.size, self.augment = root, size, augment
        self.names = tuple(sorted(set(table["class"])))
        numbers = {name: number for number, name in enumerate(self.names)}
        # Arrays: the reference counts of a list's items would copy its memory into every worker
        self.paths = np.array([path.encode("utf-8", "surrogateescape") for path in rows["path"]])
        self.digests = np.array([own.encode() for own in rows["digest"]])
        self.labels = np.array([numbers[name] for name in rows["class"]], np.int64)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def name(self, index: int) -> str:
        """An image's path in the data root."""
        return self.paths[index].decode("utf-8", "surrogateescape")

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image and its label; the crop and the flip of an augmented one come from `rng`."""
        picture = read_picture(self.root / self.name(index), self.digests[index].decode())
        image = Image.fromarray(picture)
        if not self.augment:
            return np.asarray(centre_crop(image, self.size)), self.labels[index]
        image = random_resized_crop(image, self.size, rng)
        return np.asarray(ImageOps.mirror(image) if rng.integers(2) else image), self.labels[index]
