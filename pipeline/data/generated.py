"""Data sets drawn with OpenCV, written in the real formats, a function of a seed.

They stand in for data that a user may not have: neither noise nor a gift, as `python -m pipeline difficulty`
measures.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.cifar10 import BATCHES, CLASSES, FOLDER
from pipeline.data.manifest import DataError, checksum, code_digest, progress

MARKER = "generated.json"
DRAWING = ".drawing"
CODE = ("generated.py", "shapes.py", "drawings.txt", "objects.py", "scenes.py")  # other code, other pictures
WNIDS = {  # the ImageNet classes nearest to the ten objects
    "n01558993": "bird",
    "n01644373": "frog",
    "n02099601": "dog",
    "n02123045": "cat",
    "n02389026": "horse",
    "n02422106": "deer",
    "n02690373": "airplane",
    "n03095699": "ship",
    "n04285008": "automobile",
    "n04467665": "truck",
}
CITIES = {"train": ("aachen", "bremen", "jena", "ulm", "zurich"), "val": ("frankfurt", "lindau")}


@dataclass(frozen=True)
class GeneratedCifar10:
    """CIFAR-10's batches: `train` and `test` images of 32 x 32."""

    seed: int = 0
    train: int = 5000
    test: int = 1000


@dataclass(frozen=True)
class GeneratedImageNet:
    """ImageNet's tree: JPEGs of 180 to 400 pixels a side, some grayscale."""

    seed: int = 0
    classes: int = 10
    train_per_class: int = 60
    val_per_class: int = 20

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(WNIDS):
            raise ValueError(f"classes: between 2 and {len(WNIDS)} kinds of objects can be drawn, not {self.classes}")


@dataclass(frozen=True)
class GeneratedCityscapes:
    """Cityscapes' tree: street scenes of `height` x `width` with all 19 classes and void regions."""

    seed: int = 0
    train: int = 150
    val: int = 40
    height: int = 128
    width: int = 256


Generated = GeneratedCifar10 | GeneratedImageNet | GeneratedCityscapes
Job = Callable[[], dict[str, bytes]]  # makes files, by their paths


# ---- on disk


def ensure(root: Path, params: Generated) -> None:
    """Draw the set into `root` unless it lies there whole and unchanged; never touch other data.

    Raises:
        DataError: `root` holds other data, or a file that was not drawn.
    """
    code = code_digest(str(Path(__file__).with_name(name)) for name in CODE)
    recipe = {"set": type(params).__name__, "params": asdict(params), "code": code}
    marker = root / MARKER
    if marker.is_file():
        if _is_whole(root, marker, recipe):
            return
    elif not (root / DRAWING).exists() and root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: holds data that were not drawn here; set the source to folder to use them")
    _draw(root, params, recipe)


def _is_whole(root: Path, marker: Path, recipe: dict[str, Any]) -> bool:
    """Return whether the files are those of `recipe`; contents are read only where size or time differ."""
    try:
        drawn = json.loads(marker.read_text())
    except ValueError:
        return False
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {MARKER}
    for path in sorted(present - set(drawn["files"])):
        raise DataError(f"{root / path}: not one of the generated files; move it away, or set the source to folder")
    return (drawn["recipe"], set(drawn["files"])) == (recipe, present) and all(
        _stamp(root / path) == entry["stamp"] or checksum((root / path).read_bytes()) == entry["checksum"]
        for path, entry in drawn["files"].items()
    )


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _draw(root: Path, params: Generated, recipe: dict[str, Any]) -> None:
    """Draw beside the old files, then put the new ones in their place; the marker comes last."""
    drawing = root / DRAWING
    shutil.rmtree(drawing, ignore_errors=True)
    drawing.mkdir(parents=True)
    (root / MARKER).unlink(missing_ok=True)
    match params:
        case GeneratedCifar10():
            jobs = _cifar10(params)
        case GeneratedImageNet():
            jobs = _imagenet(params)
        case GeneratedCityscapes():
            jobs = _cityscapes(params)
    entries = {}
    for job in progress(jobs, f"Drawing {root.name}"):
        for path, content in job().items():
            (drawing / path).parent.mkdir(parents=True, exist_ok=True)
            (drawing / path).write_bytes(content)
            entries[path] = {"checksum": checksum(content), "stamp": _stamp(drawing / path)}
    for folder in sorted(drawing.iterdir()):
        shutil.rmtree(root / folder.name, ignore_errors=True)
        folder.rename(root / folder.name)
    (root / MARKER).write_text(json.dumps({"recipe": recipe, "files": entries}))
    drawing.rmdir()


# ---- the three sets


def _cifar10(params: GeneratedCifar10) -> list[Job]:
    train, test = (
        np.random.default_rng((params.seed, 1, i)).permutation(np.arange(n) % 10)
        for i, n in enumerate((params.train, params.test))
    )
    parts = [*np.array_split(train, 5), test]
    meta = {b"num_cases_per_batch": len(parts[0]), b"label_names": [c.encode() for c in CLASSES], b"num_vis": 3072}
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    return [
        *(partial(_batch, params.seed, name, *part) for name, *part in zip(BATCHES, firsts[:6], parts, strict=True)),
        lambda: {f"{FOLDER}/batches.meta": python2_pickle(meta)},
    ]


def _batch(seed: int, name: str, first: int, labels: np.ndarray) -> dict[str, bytes]:
    """Draw a batch, whose pictures are numbered from `first` on."""
    from pipeline.data.objects import photo

    kinds = list(enumerate((CLASSES[label] for label in labels), first))
    pictures = [photo(np.random.default_rng((seed, 0, i)), kind, 32, 32).transpose(2, 0, 1) for i, kind in kinds]
    title = "testing batch 1 of 1" if name == "test_batch" else f"training batch {name[-1]} of 5"
    batch = {
        b"batch_label": title.encode(),
        b"labels": labels.tolist(),
        b"data": np.stack(pictures).reshape(len(labels), -1),
        b"filenames": [f"{kind}_s_{i:06d}.png".encode() for i, kind in kinds],
    }
    return {f"{FOLDER}/{name}": python2_pickle(batch)}


def _imagenet(params: GeneratedImageNet) -> list[Job]:
    train, val = params.train_per_class, params.val_per_class
    return [
        partial(_jpeg, params.seed, label, i, path)
        for label, wnid in enumerate(list(WNIDS)[: params.classes])
        for i, path in enumerate(
            [f"train/{wnid}/{wnid}_{i}.JPEG" for i in range(train)]
            + [f"val/{wnid}/ILSVRC2012_val_{label * val + i + 1:08d}.JPEG" for i in range(val)]
        )
    ]


def _jpeg(seed: int, label: int, index: int, path: str) -> dict[str, bytes]:
    import cv2

    from pipeline.data.objects import photo

    rng = np.random.default_rng((seed, label, index))
    height, width = (int(side) for side in rng.integers(180, 401, 2))
    picture = photo(rng, list(WNIDS.values())[label], height, width)
    code = cv2.COLOR_RGB2GRAY if rng.random() < 0.1 else cv2.COLOR_RGB2BGR
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
    return {path: cv2.imencode(".jpg", cv2.cvtColor(picture, code), quality)[1].tobytes()}


def _cityscapes(params: GeneratedCityscapes) -> list[Job]:
    numbers = {"train": params.train, "val": params.val}
    stems = [
        f"{split}/{city}/{city}_{i:06d}_000019"
        for split, number in numbers.items()
        for i, city in ((i, CITIES[split][i * len(CITIES[split]) // number]) for i in range(number))
    ]
    return [partial(_scene, params, index, stem) for index, stem in enumerate(stems)]


def _scene(params: GeneratedCityscapes, index: int, stem: str) -> dict[str, bytes]:
    import cv2

    from pipeline.data.scenes import street

    image, ids = street(np.random.default_rng((params.seed, index)), params.height, params.width)
    return {
        f"leftImg8bit/{stem}_leftImg8bit.png": cv2.imencode(".png", image[..., ::-1])[1].tobytes(),
        f"gtFine/{stem}_gtFine_labelIds.png": cv2.imencode(".png", ids)[1].tobytes(),
    }


# ---- CIFAR-10's pickles


def python2_pickle(value: object) -> bytes:
    """Return `value` pickled with its byte strings as Python 2's str: CIFAR-10's files are such."""
    file = io.BytesIO()
    _Python2(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.", 1)  # a module of NumPy 2


class _Python2(pickle._Pickler):
    def _save_str(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]

    dispatch = {**pickle._Pickler.dispatch, bytes: _save_str}  # type: ignore[assignment]
