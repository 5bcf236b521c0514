"""Data sets drawn with OpenCV, written in the real formats, a function of a seed.

They stand in for data that a user may not have: neither noise nor a gift, as `python -m pipeline difficulty`
measures.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.data.cifar10 import CLASSES, FOLDER
from pipeline.data.manifest import DataError, checksum, code_digest, progress

MARKER = "generated.json"
DRAWING = ".drawing"
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


# ---- on disk


def ensure(root: Path, params: Generated) -> None:
    """Draw the set into `root` unless it lies there whole and unchanged; never touch other data.

    Raises:
        DataError: `root` holds other data, or a file that was not drawn.
    """
    recipe = {"set": type(params).__name__, "params": asdict(params), "code": _code(params)}
    marker = root / MARKER
    if marker.is_file():
        if _is_whole(root, marker, recipe):
            return
    elif not (root / DRAWING).exists() and root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: holds data that were not drawn here; set the source to folder to use them")
    _draw(root, params, recipe)


def _code(params: Generated) -> str:
    """Return a digest of the code that draws: other code draws other pictures."""
    drawing = "scenes.py" if isinstance(params, GeneratedCityscapes) else "objects.py"
    return code_digest([__file__, str(Path(__file__).with_name(drawing))])


def _is_whole(root: Path, marker: Path, recipe: dict) -> bool:
    """Return whether the files are those of `recipe`; contents are read only where size or time differ."""
    try:
        drawn = json.loads(marker.read_text())
    except ValueError:
        return False
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    present.discard(MARKER)
    for path in sorted(present - set(drawn["files"])):
        raise DataError(f"{root / path}: not one of the generated files; move it away, or set the source to folder")
    if drawn["recipe"] != recipe or present != set(drawn["files"]):
        return False
    touched = False
    for path, entry in drawn["files"].items():
        status = (root / path).stat()
        if [status.st_size, status.st_mtime_ns] != entry["stamp"]:
            if checksum((root / path).read_bytes()) != entry["checksum"]:
                return False
            entry["stamp"], touched = [status.st_size, status.st_mtime_ns], True
    if touched:
        marker.write_text(json.dumps(drawn))
    return True


def _draw(root: Path, params: Generated, recipe: dict) -> None:
    """Draw beside the old files, then put the new ones in their place; the marker comes last."""
    drawing = root / DRAWING
    shutil.rmtree(drawing, ignore_errors=True)
    drawing.mkdir(parents=True)
    (root / MARKER).unlink(missing_ok=True)
    match params:
        case GeneratedCifar10():
            drawn, total = _cifar10(params), params.train + params.test
        case GeneratedImageNet():
            drawn, total = _imagenet(params), params.classes * (params.train_per_class + params.val_per_class)
        case GeneratedCityscapes():
            drawn, total = _cityscapes(params), params.train + params.val
    entries = {}
    for files in progress(drawn, f"Drawing {root.name}", total):
        for path, content in files.items():
            (drawing / path).parent.mkdir(parents=True, exist_ok=True)
            (drawing / path).write_bytes(content)
            entries[path] = {"checksum": checksum(content)}
    for folder in sorted(drawing.iterdir()):
        shutil.rmtree(root / folder.name, ignore_errors=True)
        folder.rename(root / folder.name)
    for path, entry in entries.items():
        status = (root / path).stat()
        entry["stamp"] = [status.st_size, status.st_mtime_ns]
    (root / MARKER).write_text(json.dumps({"recipe": recipe, "files": entries}))
    drawing.rmdir()


# ---- the three sets; each yields, picture by picture, the files that are complete


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _cifar10(params: GeneratedCifar10) -> Iterator[dict[str, bytes]]:
    from pipeline.data.objects import small_picture

    train, test = (
        _rng(params.seed, 1, i).permutation(np.arange(n) % 10) for i, n in enumerate((params.train, params.test))
    )
    batches = [
        (f"data_batch_{i}", f"training batch {i} of 5", part) for i, part in enumerate(np.array_split(train, 5), 1)
    ]
    first = 0
    for name, title, part in [*batches, ("test_batch", "testing batch 1 of 1", test)]:
        labels, size = part.tolist(), len(part)
        pictures, names = [], []
        for i, label in enumerate(labels):
            pictures.append(small_picture(_rng(params.seed, 0, first + i), CLASSES[label]).transpose(2, 0, 1))
            names.append(f"{CLASSES[label]}_s_{first + i:06d}.png".encode())
            if i < size - 1:
                yield {}
        batch = {
            b"batch_label": title.encode(),
            b"labels": labels,
            b"data": np.stack(pictures).reshape(size, -1),
            b"filenames": names,
        }
        first += size
        files = {f"{FOLDER}/{name}": python2_pickle(batch)}
        if name == "test_batch":
            meta = {
                b"num_cases_per_batch": len(batches[0][2]),
                b"label_names": [c.encode() for c in CLASSES],
                b"num_vis": 3072,
            }
            files[f"{FOLDER}/batches.meta"] = python2_pickle(meta)
        yield files


def _imagenet(params: GeneratedImageNet) -> Iterator[dict[str, bytes]]:
    import cv2

    from pipeline.data.objects import large_picture

    for label, (wnid, kind) in enumerate(list(WNIDS.items())[: params.classes]):
        for split, start, number in (
            ("train", 0, params.train_per_class),
            ("val", params.train_per_class, params.val_per_class),
        ):
            for i in range(start, start + number):
                rng = _rng(params.seed, label, i)
                height, width = (int(side) for side in rng.integers(180, 401, 2))
                picture = large_picture(rng, kind, height, width)
                code = cv2.COLOR_RGB2GRAY if rng.random() < 0.1 else cv2.COLOR_RGB2BGR
                quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
                content = cv2.imencode(".jpg", cv2.cvtColor(picture, code), quality)[1].tobytes()
                name = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{label * number + i - start + 1:08d}"
                yield {f"{split}/{wnid}/{name}.JPEG": content}


def _cityscapes(params: GeneratedCityscapes) -> Iterator[dict[str, bytes]]:
    import cv2

    from pipeline.data.scenes import street

    for split, start, number in (("train", 0, params.train), ("val", params.train, params.val)):
        for i in range(number):
            city = CITIES[split][i * len(CITIES[split]) // number]
            image, ids = street(_rng(params.seed, start + i), params.height, params.width)
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            yield {
                f"leftImg8bit/{stem}_leftImg8bit.png": cv2.imencode(".png", image[..., ::-1])[1].tobytes(),
                f"gtFine/{stem}_gtFine_labelIds.png": cv2.imencode(".png", ids)[1].tobytes(),
            }


# ---- CIFAR-10's pickles


def python2_pickle(value: object) -> bytes:
    """Return `value` pickled as Python 2 would: CIFAR-10's files are such, and what reads them expects it.

    Known are dictionaries, lists, whole numbers, byte strings (Python 2's str) and arrays of unsigned bytes.
    """
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    match value:
        case dict():
            return b"}(" + b"".join(_pickled(part) for item in value.items() for part in item) + b"u"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case int() if 0 <= value < 256:
            return b"K" + bytes([value])
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes() if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case np.ndarray() if value.dtype == np.uint8:
            blank = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _pickled(0) + b"\x85U\x01b\x87R"
            dtype = b"cnumpy\ndtype\nU\x02u1" + _pickled(0) + _pickled(1) + b"\x87R"
            dtype += b"(" + _pickled(3) + b"U\x01|NNN" + _pickled(-1) + _pickled(-1) + _pickled(0) + b"tb"
            shape = b"(" + b"".join(map(_pickled, value.shape)) + b"t"
            return blank + b"(" + _pickled(1) + shape + dtype + b"\x89" + _pickled(value.tobytes()) + b"tb"
    raise TypeError(f"{type(value).__name__} is not in CIFAR-10's files")
