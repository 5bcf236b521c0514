"""prepare: bring a data set into place, verify it, and write its manifest, summary and contact sheet.

DVC runs this stage always (a changed source must be noticed) and deletes its outputs before. So what is
expensive is kept in `work/prepare-<set>/` under the time and size of every file it was made from: with
nothing changed, a run lists the files, compares, and puts the very same outputs back.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.data import cifar10, cityscapes, generated, imagenet, manifest, sheet
from pipeline.data.manifest import DataError, Found, Row, checksum, code_digest, data_root, progress

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.machine import Machine
    from pipeline.params import PrepareParams

Samples = list[tuple[str, list[np.ndarray]]]
CHUNK = 4096  # files given to the threads at a time
OUTPUTS = ("manifest.csv", "summary.json", "contact_sheet.png")


class Format(Protocol):
    """What a data set's module offers to this stage."""

    def unpack(self, root: Path) -> None:
        """Unpack official archives that lie in `root`, where their part of the tree is missing."""

    def download(self, root: Path) -> None:
        """Fetch what is missing with the official tool, or say how it is fetched."""

    def find(self, root: Path) -> list[Found]:
        """Return the rows to be, by names alone."""
        ...

    def inspect(self, root: Path, found: Found) -> Row:
        """Read the files of one row."""
        ...

    def check(self, root: Path, rows: list[Row]) -> None:
        """Check what no single row shows."""

    def counts(self, rows: list[Row]) -> dict[str, dict[str, int]]:
        """Return the number of images (Cityscapes: pixels) of each split and class."""
        ...

    def samples(self, root: Path, rows: list[Row], each: int) -> Samples:
        """Return the pictures of the contact sheet, in named groups of `each`."""
        ...


def run(name: str, params: PrepareParams, machine: Machine) -> None:
    """Prepare the set `name` (cifar10, imagenet or cityscapes) as `params` say.

    Raises:
        DataError: The data are missing or not as they must be; one line that names the file.
    """
    form = format_of(name)
    root = data_root(name, params.source, machine)
    match params.source:
        case "generated" if params.generated is not None:
            generated.ensure(root, params.generated)
        case "folder":
            form.unpack(root)
        case "download":
            root.mkdir(parents=True, exist_ok=True)
            form.download(root)
    found = form.find(root)
    stamps = [[[path, *_stamp(f"{root}/{path}")] for path in one.files] for one in found]
    kept = machine.root / "work" / f"prepare-{name}" / _fingerprint(name, params, root)
    seen = checksum(json.dumps(stamps).encode())
    target = Path("results") / "data" / name
    if _is_current(kept, seen):
        _put_back(kept, target)
        return
    from pipeline import tracking

    with tracking.start("prepare", name, params, machine) as tracker:
        rows = _rows(form, root, found, stamps, kept, machine)
        form.check(root, rows)
        summary = _keep(kept, seen, rows, name, params.source, root)
        _put_back(kept, target)
        tracker.dataset(name, summary["manifest"], params.source)
        for output in OUTPUTS:
            tracker.artifact(target / output)
    print(f"{name}: {_sizes(summary)}, {summary['bytes'] / 1e6:,.1f} MB, verified; see {target}")


def format_of(name: str) -> Format:
    """Return the module that reads the set `name`."""
    match name:
        case "cifar10":
            return cifar10
        case "imagenet":
            return imagenet
        case "cityscapes":
            return cityscapes
    raise DataError(f"{name}: no such data set; there are cifar10, imagenet and cityscapes")


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _fingerprint(name: str, params: PrepareParams, root: Path) -> str:
    """Return what else the outputs depend on: the source, its place, and the code that reads it."""
    code = code_digest([__file__, manifest.__file__, sheet.__file__, getattr(format_of(name), "__file__", None)])
    return checksum(json.dumps([params.model_dump_json(), str(root.resolve()), code]).encode())


def _is_current(kept: Path, seen: str) -> bool:
    try:
        return json.loads((kept / "seen.json").read_text()) == seen
    except (OSError, ValueError):
        return False


def _rows(form: Format, root: Path, found: list[Found], stamps: list, kept: Path, machine: Machine) -> list[Row]:
    """Read what is new or has another size or time than when it was last read, in threads.

    What was read is kept also when a file is found broken: once it is mended, the rest is not read again.
    """
    try:
        known = {json.dumps(stamp): row for stamp, row in json.loads((kept / "rows.json").read_text())}
    except (OSError, ValueError):
        known = {}
    rows: list[Row | None] = [known.get(json.dumps(stamp)) for stamp in stamps]
    new = [i for i, row in enumerate(rows) if row is None]
    try:
        with ThreadPoolExecutor(machine.threads or os.cpu_count()) as pool:
            chunks = (new[i : i + CHUNK] for i in range(0, len(new), CHUNK))
            look = partial(_inspect, form, root, found)
            read = (pair for part in chunks for pair in zip(part, pool.map(look, part), strict=True))
            for i, row in progress(read, "Reading the data", len(new)):
                rows[i] = row
    finally:
        kept.mkdir(parents=True, exist_ok=True)
        done = [(stamp, row) for stamp, row in zip(stamps, rows, strict=True) if row is not None]
        (kept / "rows.json").write_text(json.dumps(done))
    return [row for row in rows if row is not None]


def _inspect(form: Format, root: Path, found: list[Found], i: int) -> Row:
    return form.inspect(root, found[i])


def _keep(kept: Path, seen: str, rows: list[Row], name: str, source: str, root: Path) -> dict:
    """Make the outputs, keep them and return the summary; the mark that they are complete is written last."""
    import pandas as pd

    form = format_of(name)
    for old in kept.parent.iterdir():
        if old != kept:
            shutil.rmtree(old)
    pd.DataFrame(rows).to_csv(kept / "manifest.csv", index=False, lineterminator="\n")
    counts = form.counts(rows)
    summary = {
        "set": name,
        "source": source,
        "classes": len(next(iter(counts.values()))) - (name == "cityscapes"),  # which counts what is ignored too
        "images": {split: _images(rows, split) for split in counts},
        "bytes": sum(int(row[key]) for row in rows for key in ("bytes", "label_bytes") if key in row),
        "manifest": checksum((kept / "manifest.csv").read_bytes()),
        "pixels" if name == "cityscapes" else "counts": counts,
    }
    (kept / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _sheet(name, summary, form.samples(root, rows, 8 if name == "cifar10" else 6)).save(kept / "contact_sheet.png")
    (kept / "seen.json").write_text(json.dumps(seen))
    return summary


def _sizes(summary: dict) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in summary["images"].items()) + " images"


def _images(rows: list[Row], split: str) -> int:
    """Return the number of images of a split: a row is one image, or says how many it has."""
    return sum(int(row.get("images", 1)) for row in rows if row["split"] == split)


def _sheet(name: str, summary: dict, samples: Samples) -> Image.Image:
    note = f"{summary['source']} · {_sizes(summary)} · {summary['classes']} classes · {summary['manifest'][:12]}"
    match name:
        case "cifar10":
            return sheet.contact_sheet("CIFAR-10", note, samples, cell=(64, 64), across=16)
        case "imagenet":
            return sheet.contact_sheet("ImageNet", note, samples, cell=(132, 120), across=6)
        case _:
            height, width = samples[0][1][0].shape[:2]
            cell = (round(200 * width / height), 200)
            return sheet.contact_sheet("Cityscapes", note, samples, cell=cell, across=4)


def _put_back(kept: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for output in OUTPUTS:
        shutil.copyfile(kept / output, target / output)
