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
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.data import cifar10, cityscapes, generated, imagenet, manifest, sheet
from pipeline.data.manifest import DataError, Found, Row, checksum, code_digest, data_root

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.params import PrepareParams

Samples = list[tuple[str, list[np.ndarray]]]
OUTPUTS = ("manifest.csv", "summary.json", "contact_sheet.png")


class Format(Protocol):
    """What a data set's module offers to this stage."""

    def unpack(self, root: Path) -> None: ...  # noqa: D102

    def download(self, root: Path) -> None: ...  # noqa: D102

    def find(self, root: Path) -> list[Found]: ...  # noqa: D102

    def inspect(self, root: Path, found: Found) -> Row: ...  # noqa: D102

    def check(self, root: Path, rows: list[Row]) -> None: ...  # noqa: D102

    def counts(self, rows: list[Row]) -> dict[str, dict[str, int]]: ...  # noqa: D102

    def samples(self, root: Path, rows: list[Row], each: int) -> Samples: ...  # noqa: D102


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
    stamps = [[[path, *_stamp(root / path)] for path in one.files] for one in found]
    kept = machine.root / "work" / f"prepare-{name}" / _fingerprint(name, params, root)
    seen = checksum(json.dumps(stamps).encode())
    if not _is_current(kept, seen):
        rows = _rows(form, root, found, stamps, kept, machine)
        form.check(root, rows)
        _keep(kept, seen, stamps, rows, name, params.source, root)
    _put_back(kept, Path("results") / "data" / name)


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


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _fingerprint(name: str, params: PrepareParams, root: Path) -> str:
    """Return what else the outputs depend on: the source, its place, and the code that reads it."""
    code = code_digest(
        [__file__, manifest.__file__, sheet.__file__, getattr(format_of(name), "__file__", None)]
    )
    return checksum(json.dumps([params.model_dump_json(), str(root.resolve()), code]).encode())


def _is_current(kept: Path, seen: str) -> bool:
    try:
        return json.loads((kept / "seen.json").read_text()) == seen
    except (OSError, ValueError):
        return False


def _rows(
    form: Format, root: Path, found: list[Found], stamps: list, kept: Path, machine: Machine
) -> list[Row]:
    """Read what is new or has another size or time than when it was last read, in threads, in order."""
    from rich.progress import track

    try:
        known = {json.dumps(stamp): row for stamp, row in json.loads((kept / "rows.json").read_text())}
    except (OSError, ValueError):
        known = {}
    rows = [known.get(json.dumps(stamp)) for stamp in stamps]
    new = [i for i, row in enumerate(rows) if row is None]
    with ThreadPoolExecutor(machine.threads or os.cpu_count()) as pool:
        try:
            results = pool.map(lambda i: form.inspect(root, found[i]), new)
            for i, row in zip(new, track(results, "Reading the data", len(new), transient=True), strict=True):
                rows[i] = row
        finally:
            pool.shutdown(cancel_futures=True)
    return [row for row in rows if row is not None]


def _keep(kept: Path, seen: str, stamps: list, rows: list[Row], name: str, source: str, root: Path) -> None:
    """Make the outputs and keep them; the mark that they are complete is written last."""
    import pandas as pd

    form = format_of(name)
    for old in kept.parent.glob("*"):
        shutil.rmtree(old)
    kept.mkdir(parents=True)
    table = pd.DataFrame(rows)
    table.to_csv(kept / "manifest.csv", index=False, lineterminator="\n")
    counts = form.counts(rows)
    summary = {
        "set": name,
        "source": source,
        "classes": len(next(iter(counts.values()))) - (name == "cityscapes"),
        "images": {split: _images(rows, split) for split in counts},
        "bytes": sum(
            int(value) for row in rows for key, value in row.items() if key in ("bytes", "label_bytes")
        ),
        "manifest": checksum((kept / "manifest.csv").read_bytes()),
        "pixels" if name == "cityscapes" else "counts": counts,
    }
    (kept / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _sheet(name, summary, form.samples(root, rows, 8 if name == "cifar10" else 6)).save(
        kept / "contact_sheet.png"
    )
    (kept / "rows.json").write_text(json.dumps(list(zip(stamps, rows, strict=True))))
    (kept / "seen.json").write_text(json.dumps(seen))


def _images(rows: list[Row], split: str) -> int:
    """Return the number of images of a split: a row is one image, or says how many it has."""
    return sum(int(row.get("images", 1)) for row in rows if row["split"] == split)


def _sheet(name: str, summary: dict, samples: Samples):  # noqa: ANN202
    sizes = ", ".join(f"{count:,} {split}" for split, count in summary["images"].items())
    note = f"{summary['source']} · {sizes} · {summary['classes']} classes · {summary['manifest'][:12]}"
    match name:
        case "cifar10":
            return sheet.contact_sheet("CIFAR-10", note, samples, cell=(64, 64), across=16)
        case "imagenet":
            return sheet.contact_sheet("ImageNet", note, samples, cell=(150, 120), across=6)
        case _:
            return sheet.contact_sheet("Cityscapes", note, samples, cell=(320, 160), across=4)


def _put_back(kept: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for output in OUTPUTS:
        shutil.copyfile(kept / output, target / output)
