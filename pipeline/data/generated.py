"""Drawn pictures in the real formats of the three data sets, as a function of a seed.

They stand in for data that a user may not have; see `pipeline.data.drawing`.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.data import drawing
from pipeline.data.archives import made_whole
from pipeline.data.cifar10 import BATCHES, CLASSES, FOLDER, META
from pipeline.data.drawing import photo, street
from pipeline.data.manifest import fault
from pipeline.files import file_digest, read_json, write_json
from pipeline.progress import track

if TYPE_CHECKING:
    from pipeline.settings import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet

File = tuple[str, bytes]  # its path, its content
NOTE = ".generated.json"
CODE = (Path(__file__), Path(drawing.__file__), drawing.TEXT)  # other code, other pictures
CITIES = {"train": ("aachen", "bremen", "jena", "ulm", "zurich"), "val": ("frankfurt", "lindau")}
WNIDS = {  # the ImageNet classes nearest to the ten objects
    "n01558993": "bird", "n01644373": "frog", "n02099601": "dog", "n02123045": "cat",
    "n02389026": "horse", "n02422106": "deer", "n02690373": "airplane", "n03095699": "ship",
    "n04285008": "automobile", "n04467665": "truck",
}  # fmt: skip


# ---- the three sets


def _cifar10(params: GeneratedCifar10) -> Iterator[File]:
    rng = np.random.default_rng((params.seed, 1))
    train, test = (rng.permutation(np.arange(count) % 10) for count in (params.train, params.test))
    parts = [*np.array_split(train, 5), test]
    first = 0
    for (name, split), labels in zip(BATCHES.items(), parts, strict=True):
        title = f"training batch {name[-1]} of 5" if split == "train" else "testing batch 1 of 1"
        pictures, filenames = [], []
        for i, label in enumerate(labels, first):
            rng = np.random.default_rng((params.seed, 0, i))
            pictures.append(photo(rng, CLASSES[label], 32, 32).transpose(2, 0, 1).ravel())
            filenames.append(f"{CLASSES[label]}_s_{i:06d}.png".encode())
        first += len(labels)
        batch = {b"batch_label": title.encode(), b"labels": labels.tolist()}
        batch |= {b"data": np.stack(pictures), b"filenames": filenames}
        yield f"{FOLDER}/{name}", python2_pickle(batch)
    names = [name.encode() for name in CLASSES]
    meta = {b"num_cases_per_batch": len(parts[0]), b"label_names": names, b"num_vis": 3072}
    yield META, python2_pickle(meta)


def _imagenet(params: GeneratedImageNet) -> Iterator[File]:
    train, val = params.train_per_class, params.val_per_class
    for label, (wnid, kind) in enumerate(list(WNIDS.items())[: params.classes]):
        paths = [f"train/{wnid}/{wnid}_{i}.JPEG" for i in range(train)]
        paths += [f"val/{wnid}/ILSVRC2012_val_{label * val + i + 1:08d}.JPEG" for i in range(val)]
        for i, path in enumerate(paths):
            rng = np.random.default_rng((params.seed, label, i))
            height, width = rng.integers(96, 193, 2).tolist()
            picture = photo(rng, kind, height, width)
            code = cv2.COLOR_RGB2GRAY if rng.random() < 0.05 else cv2.COLOR_RGB2BGR
            yield path, cv2.imencode(".jpg", cv2.cvtColor(picture, code))[1].tobytes()


def _cityscapes(params: GeneratedCityscapes) -> Iterator[File]:
    index = 0
    for split, count in (("train", params.train), ("val", params.val)):
        for i in range(count):
            city = CITIES[split][i * len(CITIES[split]) // count]
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            rng = np.random.default_rng((params.seed, index))
            picture, ids = street(rng, params.height, params.width)
            labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
            yield f"leftImg8bit/{stem}_leftImg8bit.png", _png(picture[..., ::-1])
            yield f"gtFine/{stem}_gtFine_labelIds.png", _png(labels)
            yield f"gtFine/{stem}_gtFine_instanceIds.png", _png(ids)
            index += 1


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


DRAWN: dict[str, Callable[..., Iterator[File]]] = {
    "cifar10": _cifar10,
    "imagenet": _imagenet,
    "cityscapes": _cityscapes,
}


def python2_pickle(value: object) -> bytes:
    """`value` pickled with its byte strings as Python 2's str, as CIFAR-10's files are."""
    file = io.BytesIO()
    _Python2(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.", 1)  # a module of NumPy 2


class _Python2(pickle._Pickler):
    def _save_str(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]

    dispatch = {**pickle._Pickler.dispatch, bytes: _save_str}  # type: ignore[assignment]


# ---- on disk


def ensure(
    root: Path, name: str, params: GeneratedCifar10 | GeneratedImageNet | GeneratedCityscapes
) -> None:
    """Draws the set `name` into the folder `root`, unless it is there, whole and unchanged.

    Raises:
        UserError: `root` holds files that were not drawn.
    """
    recipe = {"set": name, "params": asdict(params), "code": [file_digest(path) for path in CODE]}
    note, there = root / NOTE, _stamps(root)
    drawn = read_json(note, f"delete {root}") if note.exists() else {}
    if drawn == {"recipe": recipe, "files": there}:
        return
    if others := there.keys() - drawn.get("files", {}).keys():
        cure = f"set prepare.{name}.source to folder to use your own data"
        raise fault(root / min(others), f"not drawn here; move it out of {root}, or {cure}")
    with made_whole(root) as partial:
        for path, content in track(DRAWN[name](params), f"Drawing {name}"):
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        write_json(partial / NOTE, {"recipe": recipe, "files": _stamps(partial)})


def _stamps(root: Path) -> dict[str, list[int]]:
    """What changes when a file does, of all files but the note."""
    stamps = {}
    for path in root.rglob("*"):
        if path.name != NOTE and not path.is_dir():
            status = path.lstat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            stamps[path.relative_to(root).as_posix()] = stamp
    return stamps
