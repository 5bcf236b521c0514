"""Cityscapes in its official tree or zips: pairs found from the tree, label ids made train ids."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import Label, labels

from pipeline.data.archives import unpack, zipped
from pipeline.data.manifest import Row, fault, files, folders, read_columns, read_file
from pipeline.data.pictures import opened, picture_size, read_picture
from pipeline.files import digest, write
from pipeline.progress import track

SPLITS = ("train", "val")
IMAGES, LABELS = "leftImg8bit", "gtFine"
IMAGE_END, LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
PREDICTION_END = "_pred_labelIds.png"
ARCHIVES = {IMAGES: "leftImg8bit_trainvaltest.zip", LABELS: "gtFine_trainvaltest.zip"}
IGNORE = 255
UNKNOWN = 254
SOURCE = (
    f"Cityscapes' folders {IMAGES} and {LABELS}, or its zips (with an account at "
    f"https://www.cityscapes-dataset.com, `csDownload {' '.join(ARCHIVES.values())}` fetches them),"
)


# ---- classes


# The official labels that have a train id, in its order
CLASSES: list[Label] = sorted(
    (label for label in labels if 0 <= label.trainId < IGNORE), key=lambda label: label.trainId
)


def class_names() -> tuple[str, ...]:
    """The names of the 19 train ids, in their order."""
    return tuple(label.name for label in CLASSES)


def colours() -> np.ndarray:
    """The official RGB colour of each train id, (256, 3) uint8; black for what is ignored."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(CLASSES)] = [label.color for label in CLASSES]
    return table


def label_ids() -> np.ndarray:
    """The label id of each train id, (19,) uint8: what the official evaluation reads."""
    return np.array([label.id for label in CLASSES], np.uint8)


@cache
def train_ids() -> np.ndarray:
    """The table (256,) from label id to train id: 0 to 18, 255 ignored, 254 for no such id."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[[label.id for label in labels if label.id >= 0]] = IGNORE
    table[label_ids()] = np.arange(len(CLASSES))
    return table


def overlay(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) under the colours of its train ids (H, W)."""
    return (image * 0.4 + colours()[label] * 0.6).astype(np.uint8)


def read_label(root: Path, path: str, content: bytes) -> np.ndarray:
    """A labelIds picture as train ids (H, W) uint8.

    Raises:
        UserError: It is not a picture of the official ids.
    """
    with opened(content, root / path) as image:
        if image.mode != "L":
            raise fault(root / path, "not a one-channel 8-bit picture of label ids")
        ids = np.array(image)
    target = np.take(train_ids(), ids)
    if (target == UNKNOWN).any():
        unknown = ids[target == UNKNOWN][0]
        raise fault(root / path, f"label id {unknown} is none of Cityscapes' label ids")
    return target


# ---- what the prepare stage asks of every set


def find(root: Path) -> list[tuple[str, ...]]:
    """Every pair (image, label) of the tree."""
    found: list[tuple[str, ...]] = []
    for split in SPLITS:
        pictures = _stems(root, IMAGES, split, IMAGE_END)
        truths = _stems(root, LABELS, split, LABEL_END)
        for stem in sorted(pictures | truths):
            pair = f"{IMAGES}/{split}/{stem}{IMAGE_END}", f"{LABELS}/{split}/{stem}{LABEL_END}"
            for path, there in zip(pair, (pictures, truths), strict=True):
                if stem not in there:
                    raise fault(root / path, "no such file, but its partner is there")
            found.append(pair)
        if not pictures:
            reason = f"no city folder with *{IMAGE_END} in it; put {SOURCE} into {root}"
            raise fault(root / IMAGES / split, reason)
    return found


def _stems(root: Path, kind: str, split: str, end: str) -> set[str]:
    """`<city>/<city>_<sequence>_<frame>` of each file of a kind; others may lie beside them."""
    folder = root / kind / split
    if not folder.is_dir():
        raise fault(folder, f"no such folder; put {SOURCE} into {root}")
    paths = (f"{city}/{name}" for city in folders(folder) for name in files(folder / city))
    return {path.removesuffix(end) for path in paths if path.endswith(end)}


def inspect(root: Path, paths: tuple[str, ...]) -> Row:
    """The row of a pair, which is decoded, with the pixels of each class and of those ignored."""
    path, label_path = paths
    content, label_content = read_file(root / path), read_file(root / label_path)
    width, height = picture_size(content, root / path)
    label = read_label(root, label_path, label_content)
    if label.shape != (height, width):
        own = f"{label.shape[1]} x {label.shape[0]} pixels"
        raise fault(root / label_path, f"{own}, but its image has {width} x {height}")
    pixels = np.bincount(label.ravel(), minlength=256)
    row: Row = {"path": path, "label_path": label_path, "split": path.split("/")[1]}
    row |= {"width": width, "height": height}
    row |= {"bytes": len(content), "label_bytes": len(label_content)}
    row |= {name: int(pixels[i]) for i, name in enumerate(class_names())}
    row |= {"ignored": int(pixels[IGNORE])}
    return row | {"digest": digest(content), "label_digest": digest(label_content)}


def tally(row: Row) -> dict[str, int]:
    """The number of pixels of each class in a row, and of those ignored."""
    return {name: int(row[name]) for name in (*class_names(), "ignored")}


def check(root: Path, counts: dict[str, Counter[str]]) -> None:
    """No split is void throughout."""
    for split, pixels in counts.items():
        if pixels.total() == pixels["ignored"]:
            reason = "no pixel of any of the 19 classes in the whole split"
            raise fault(root / LABELS / split, reason)


def unpack_archives(root: Path) -> None:
    """Unpacks the two official zips that lie in `root`."""
    for kind, name in ARCHIVES.items():
        unpack(root / name, root / kind, _unpack)


def _unpack(archive: Path, folder: Path) -> None:
    pattern = rf"({IMAGES}|{LABELS})/(train|val|test)/\w+/[\w-]+\.(png|json)|README|license\.txt"
    for name, file in track(zipped(archive, pattern), f"Unpacking {archive.name}"):
        if "/" in name:
            path = folder / Path(*Path(name).parts[1:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())


def samples(root: Path, rows: list[Row], each: int) -> list[tuple[str, list[np.ndarray]]]:
    """(city, [image, image with labels]) of `2 * each` training scenes, spread over the split."""
    train = [row for row in rows if row["split"] == "train"]
    pictures = []
    for i in np.unique(np.linspace(0, len(train) - 1, 2 * each).astype(int)):
        path, label_path = str(train[i]["path"]), str(train[i]["label_path"])
        image = read_picture(root / path)
        label = read_label(root, label_path, read_file(root / label_path))
        pictures.append((path.split("/")[2], [image, overlay(image, label)]))
    return pictures


# ---- what training reads


def resized(
    image: np.ndarray, label: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image (linearly at any scale, as the authors' code) and its labels (nearest)."""
    if image.shape[:2] == (height, width):
        return image, label
    size = (width, height)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return image, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)


def augmented(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scales by 0.5, 0.6, ... 2.1, cuts `crop` (h, w) at random, flips or not."""
    scale = 0.5 + 0.1 * int(rng.integers(0, 17))
    height, width = (round(side * scale) for side in label.shape)
    image, label = cut(*resized(image, label, height, width), crop, rng)
    return (image[:, ::-1], label[:, ::-1]) if rng.integers(2) else (image, label)


def cut(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts `crop` (h, w) at random; a smaller picture is padded with black and 255."""
    height, width = crop
    top = int(rng.integers(0, max(0, label.shape[0] - height) + 1))
    left = int(rng.integers(0, max(0, label.shape[1] - width) + 1))
    image = image[top : top + height, left : left + width]
    label = label[top : top + height, left : left + width]
    below, beside = (0, height - label.shape[0]), (0, width - label.shape[1])
    label = np.pad(label, (below, beside), constant_values=IGNORE)
    return np.pad(image, (below, beside, (0, 0))), label


class Split:
    """The samples of a split: images (H, W, 3) uint8 and train ids (H, W) uint8.

    A training sample is a random crop of `params["crop"]` (h, w), scaled and flipped if `augment`;
    one for evaluation is the whole picture, resized to `params["test_size"]` (h, w) if given.

    Attributes:
        frames: The path, width and height of each photo, for `write_prediction`.
    """

    names = class_names()

    def __init__(
        self, root: Path, manifest: Path, split: str, params: dict[str, Any], augment: bool = False
    ) -> None:
        """Opens a split (train or val)."""
        self.root, self.augment = root, augment
        self.crop = params["crop"] if split == "train" else None
        self.test_size = params.get("test_size")
        columns = ("path", "digest", "label_path", "label_digest", "width", "height")
        *pairs, widths, heights = read_columns(manifest, split, *columns)
        self.paths, self.files = pairs[0], list(zip(*pairs, strict=True))
        self.frames = list(zip(self.paths, map(int, widths), map(int, heights), strict=True))

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image and its train ids; scale, crop and flip come from `rng`."""
        path, own, label_path, label_own = self.files[index]
        image = read_picture(self.root / path, own)
        label = read_label(self.root, label_path, read_file(self.root / label_path, label_own))
        if self.crop is None:
            return resized(image, label, *(self.test_size or label.shape))
        return (augmented if self.augment else cut)(image, label, self.crop, rng)


# ---- the official evaluation


def write_prediction(folder: Path, frame: tuple[str, int, int], prediction: np.ndarray) -> None:
    """Writes train ids (H, W) as the benchmark wants them: as label ids, of the photo's size."""
    path, width, height = frame
    ids = cv2.resize(label_ids()[prediction], (width, height), interpolation=cv2.INTER_NEAREST)
    name = Path(path).name.removesuffix(IMAGE_END) + PREDICTION_END
    write(folder / name, cv2.imencode(".png", ids)[1].tobytes())


def official_evaluation(predictions: Path, truths: Path) -> dict[str, Any]:
    """The scores of csEvalPixelLevelSemanticLabeling, which needs a NumPy older than 2.4 by itself.

    Args:
        predictions: The folder that `write_prediction` wrote to.
        truths: The ground truth of a split, as gtFine/val, with labelIds and instanceIds.

    Returns:
        Fractions, among them `averageScoreClasses` (mIoU) and `classScores` (each class's IoU).

    Raises:
        UserError: A picture is missing, or the tool stops for another reason.
    """
    wanted = sorted(truths.glob(f"*/*{LABEL_END}"))
    names = [path.name.removesuffix(LABEL_END) + PREDICTION_END for path in wanted]
    found = [predictions / name for name in names]
    for path in found:
        if not path.is_file():
            raise fault(path, "no such prediction; evaluate the whole split (limit: null)")
    if not wanted:
        raise fault(truths, f"no city folder with *{LABEL_END} in it")
    pairs = [str(path) for path in found], [str(path) for path in wanted]
    quiet = patch.multiple(official.args, JSONOutput=False, quiet=True, evalInstLevelScore=True)
    with patch.object(np, "in1d", np.isin, create=True), quiet:
        try:
            return official.evaluateImgLists(*pairs, official.args)
        except SystemExit:  # it has said why
            raise fault(truths, "the official tool stopped; its reason stands above") from None
