"""Cityscapes in its official tree (or zips): pairs found from the tree, label ids made train ids."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.archives import unpacking, zipped
from pipeline.data.manifest import (
    DataError,
    Found,
    Manifest,
    Row,
    checksum,
    files,
    folders,
    image_size,
    read_bytes,
    totals,
)

if TYPE_CHECKING:
    from cityscapesscripts.helpers.labels import Label
    from torch import Tensor

    from pipeline.data.loading import Keys

SPLITS = ("train", "val")
IMAGES, LABELS = "leftImg8bit", "gtFine"
IMAGE_END, LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
ARCHIVES = {IMAGES: "leftImg8bit_trainvaltest.zip", LABELS: "gtFine_trainvaltest.zip"}
IGNORE = 255
UNKNOWN = 254
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


# ---- classes


@cache
def _classes() -> list[Label]:
    """The official labels that have a train id, in its order."""
    from cityscapesscripts.helpers.labels import labels

    return sorted((label for label in labels if 0 <= label.trainId < IGNORE), key=lambda label: label.trainId)


@cache
def class_names() -> tuple[str, ...]:
    """Return the names of the 19 train ids, in their order."""
    return tuple(label.name for label in _classes())


@cache
def colours() -> np.ndarray:
    """Return the official RGB colour of each train id, (256, 3) uint8; black for what is ignored."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(_classes())] = [label.color for label in _classes()]
    return table


def overlay(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) under the colours of its train ids (H, W)."""
    return (image * 0.4 + colours()[label] * 0.6).astype(np.uint8)


@cache
def label_ids() -> np.ndarray:
    """Return the label id of each train id, (19,) uint8: what the official evaluation reads."""
    return np.array([label.id for label in _classes()], np.uint8)


@cache
def train_ids() -> np.ndarray:
    """Return the table (256,) from label id to train id: 0 to 18, 255 ignored, 254 if there is no such id."""
    from cityscapesscripts.helpers.labels import labels

    table = np.full(256, UNKNOWN, np.uint8)
    table[[label.id for label in labels if label.id >= 0]] = IGNORE
    table[label_ids()] = np.arange(len(_classes()))
    return table


def read_label(root: Path, path: str, content: bytes) -> np.ndarray:
    """Return a labelIds picture as train ids (H, W) uint8; ids outside the official table are an error."""
    import cv2

    ids: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if ids is None or ids.ndim != 2 or ids.dtype != np.uint8:
        raise DataError(f"{root / path}: not a readable one-channel 8-bit picture of label ids")
    target = np.take(train_ids(), ids)
    if (target == UNKNOWN).any():
        raise DataError(f"{root / path}: label id {int(ids[target == UNKNOWN][0])} is none of Cityscapes' label ids")
    return target


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[Found]:
    """Return every pair (image, label) of the tree, or name the file that has no partner."""
    found = []
    for split in SPLITS:
        images = _stems(root, IMAGES, split, IMAGE_END)
        labels = _stems(root, LABELS, split, LABEL_END)
        for stem in sorted(images ^ labels):
            lacking = f"{LABELS}/{split}/{stem}{LABEL_END}" if stem in images else f"{IMAGES}/{split}/{stem}{IMAGE_END}"
            raise DataError(f"{root / lacking}: no such file, but its partner is there")
        pairs = [(f"{IMAGES}/{split}/{s}{IMAGE_END}", f"{LABELS}/{split}/{s}{LABEL_END}") for s in sorted(images)]
        if not pairs:
            raise DataError(f"{root / IMAGES / split}: no city folder with *{IMAGE_END} in it")
        found += [Found(split, pair) for pair in pairs]
    return found


def _stems(root: Path, kind: str, split: str, end: str) -> set[str]:
    """Return `<city>/<city>_<sequence>_<frame>` of each file of a kind; others may lie beside them."""
    folder = root / kind / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; put Cityscapes' folders {IMAGES} and {LABELS} (or "
            f"{' and '.join(ARCHIVES.values())}) into {root}"
        )
    return {
        f"{city}/{name.removesuffix(end)}"
        for city in folders(folder)
        for name in files(folder / city)
        if name.endswith(end)
    }


def inspect(root: Path, found: Found) -> Row:
    """Decode a pair; return its row, with the number of pixels of each class and of those ignored."""
    path, label_path = found.files
    content, label_content = (read_bytes(root, file) for file in found.files)
    width, height = image_size(root, path, content)
    own = image_size(root, label_path, label_content)
    if own != (width, height):
        raise DataError(f"{root / label_path}: {own[0]} x {own[1]} pixels, but its image has {width} x {height}")
    pixels = np.bincount(read_label(root, label_path, label_content).ravel(), minlength=256)
    row: Row = {"path": path, "label_path": label_path, "split": found.split, "city": path.split("/")[2]}
    row |= {"width": width, "height": height, "bytes": len(content), "label_bytes": len(label_content)}
    row |= {name: int(pixels[i]) for i, name in enumerate(class_names())} | {"ignored": int(pixels[IGNORE])}
    return row | {"checksum": checksum(content), "label_checksum": checksum(label_content)}


def check(root: Path, rows: list[Row]) -> None:
    """Check what no single pair shows: no split may be void throughout."""
    for split, pixels in counts(rows).items():
        if not any(pixels[name] for name in class_names()):
            raise DataError(f"{root / LABELS / split}: no pixel of any of the 19 classes in the whole split")


def counts(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Return the number of pixels of each split and class, and of those ignored."""
    return totals(rows, (*class_names(), "ignored"))


def unpack(root: Path) -> None:
    """Unpack the two official zips, each where its part of the tree is missing."""
    for kind, name in ARCHIVES.items():
        if (root / kind).exists() or not (root / name).is_file():
            continue
        with unpacking(root / name, root / kind) as folder:
            pattern = rf"{kind}/(train|val|test)/\w+/[\w-]+\.(png|json)|README|license\.txt"
            for member, file in zipped(root / name, pattern):
                if "/" in member:
                    path = folder / Path(member).relative_to(kind)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(file.read())


def download(root: Path) -> None:
    """Fetch the zips that lack with the official downloader and the account the environment names."""
    wanted = [name for kind, name in ARCHIVES.items() if not ((root / kind).exists() or (root / name).exists())]
    if wanted:
        account = [os.environ.get(key, "") for key in ("CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD")]
        if not all(account):
            raise DataError(
                f"{root}: set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD to your account at "
                f"https://www.cityscapes-dataset.com, or put {' and '.join(wanted)} there by hand"
            )
        _cs_download(root, wanted, *account)
    unpack(root)


def _cs_download(root: Path, wanted: list[str], username: str, password: str) -> None:
    """Run csDownload, which goes on with what was cut short and checks the md5 sums itself.

    It asks for the account and whether to store it, the password from a terminal alone: it is answered here.
    """
    from unittest.mock import patch

    from cityscapesscripts.download import downloader

    partial = root / ".download"
    partial.mkdir(parents=True, exist_ok=True)
    answers = patch.object(downloader, "input", side_effect=[username, "n"])
    try:
        with answers, patch.object(downloader.getpass, "getpass", return_value=password):
            session = downloader.login()
        for name in wanted:
            downloader.download_packages(
                session=session, package_names=[name], destination_path=str(partial), resume=True
            )
            (partial / name).rename(root / name)
    except Exception as error:  # the tool raises plain exceptions
        raise DataError(f"{root}: csDownload failed ({error}); run again to go on") from None


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """Return (city, [image, image with labels]) of `2 * each` training scenes, spread over the split."""
    train = [row for row in rows if row["split"] == "train"]
    chosen = [train[i] for i in np.unique(np.linspace(0, len(train) - 1, 2 * each).astype(int))]
    pictures = []
    for row in chosen:
        image, label = read_pair(root, str(row["path"]), str(row["label_path"]))
        pictures.append((str(row["city"]), [image, overlay(image, label)]))
    return pictures


# ---- what training reads


def read_pair(
    root: Path, path: str, label_path: str, expected: str | None = None, label_expected: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) RGB and its train ids (H, W), both uint8; checksums are the manifest's."""
    import cv2

    content = np.frombuffer(read_bytes(root, path, expected), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)  # the label is not turned either
    if image is None:
        raise DataError(f"{root / path}: not a readable image")
    return image[..., ::-1], read_label(root, label_path, read_bytes(root, label_path, label_expected))


def resized(image: np.ndarray, label: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image (linearly) and its labels (to the nearest)."""
    import cv2

    if image.shape[:2] == (height, width):
        return image, label
    linear = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    return (
        cv2.resize(image, (width, height), interpolation=linear),
        cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST),
    )


def augmented(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scale by 0.5, 0.6, ... 2.1, cut `crop` (h, w) at random (padded with black and 255), flip or not."""
    scale = 0.5 + 0.1 * int(rng.integers(0, 17))
    image, label = resized(image, label, round(image.shape[0] * scale), round(image.shape[1] * scale))
    image, label = cut(image, label, crop, rng)
    return (image[:, ::-1], label[:, ::-1]) if rng.integers(2) else (image, label)


def cut(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut `crop` (h, w) at random; a smaller picture is padded below and on the right."""
    top, left = (int(rng.integers(0, max(0, have - want) + 1)) for want, have in zip(crop, label.shape, strict=True))
    part = slice(top, top + crop[0]), slice(left, left + crop[1])
    image, label = image[part], label[part]
    below, beside = ((0, want - have) for want, have in zip(crop, label.shape, strict=True))
    return np.pad(image, (below, beside, (0, 0))), np.pad(label, (below, beside), constant_values=IGNORE)


def write_prediction(folder: Path, frame: tuple[str, int, int], prediction: np.ndarray) -> None:
    """Write train ids (H, W) as the benchmark wants them: label ids, the photo's size, its name's stem."""
    import cv2

    path, width, height = frame
    ids = cv2.resize(label_ids()[prediction], (width, height), interpolation=cv2.INTER_NEAREST)
    name = f"{Path(path).name.removesuffix(IMAGE_END)}_pred_labelIds.png"
    if not cv2.imwrite(str(folder / name), ids):
        raise DataError(f"{folder / name}: cannot be written")


class Cityscapes:
    """A split of Cityscapes; `dataset[keys]` reads a batch: images (B, 3, H, W), train ids (B, H, W).

    With `crop` (h, w) a sample is a random crop of that size, scaled and flipped if `augment`; without, the whole
    picture, resized to `test_size` (h, w) where given.
    """

    def __init__(
        self,
        root: Path,
        manifest: Path,
        split: str,
        *,
        crop: tuple[int, int] | None = None,
        test_size: tuple[int, int] | None = None,
        augment: bool = False,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        """Open a split (train or val; its first `limit` pairs); `frames` are its photos' paths, widths and heights."""
        self.root, self.crop, self.test_size, self.augment, self.seed = root, crop, test_size, augment, seed
        self.names = class_names()
        self.classes = len(self.names)
        rows = Manifest.read(manifest).split(split, limit)
        columns = ("path", "label_path", "checksum", "label_checksum")
        self.files = list(zip(*(rows[name] for name in columns), strict=True))
        sizes = (map(int, rows[name]) for name in ("width", "height"))
        self.frames = tuple(zip(rows["path"], *sizes, strict=True))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.files)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Return the batch of `keys`, normalised; augmented as (seed, epoch, index) say."""
        import torch

        from pipeline.data.loading import normalised

        pairs = [self._pair(keys.epoch, index) for index in keys.indices]
        sizes = {label.shape for _, label in pairs}
        if len(sizes) > 1:
            raise DataError(
                f"{self.root}: pictures of several sizes in a batch: {', '.join(map(str, sorted(sizes)))}; "
                "set test_size or a batch of 1"
            )
        images, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*pairs, strict=True))
        return normalised(images.permute(0, 3, 1, 2), MEAN, STD), labels.long()

    def name(self, index: int) -> str:
        """Return an image's path in the data root."""
        return self.files[index][0]

    def _pair(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        from pipeline.data.loading import draw

        image, label = read_pair(self.root, *self.files[index])
        if self.crop is None:
            return resized(image, label, *(self.test_size or label.shape))
        return (augmented if self.augment else cut)(image, label, self.crop, draw(self.seed, epoch, index))
