"""prepare: bring a data set into place, verify it, and write its manifest, summary and contact sheet.

DVC runs this stage always (a changed source must be noticed) and deletes its outputs before. So what is
expensive is kept in `work/prepare-<set>/` under the time and size of every file it was made from: with
nothing changed, a run lists the files, compares, and puts the very same outputs back.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.data import cifar10, cityscapes, generated, imagenet, manifest, sheet
from pipeline.data.manifest import Found, Row, checksum, code_digest, data_root, progress

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.params import PrepareParams

Samples = list[tuple[str, list[np.ndarray]]]
CHUNK = 4096  # files given to the threads at a time
OUTPUTS = ("manifest.csv", "summary.json", "contact_sheet.png")


class Format(Protocol):
    """What a data set's module offers to this stage; the modules say more."""

    def unpack(self, root: Path) -> None: ...

    def download(self, root: Path) -> None: ...

    def find(self, root: Path) -> list[Found]: ...

    def inspect(self, root: Path, found: Found) -> Row: ...

    def check(self, root: Path, rows: list[Row]) -> None: ...

    def counts(self, rows: list[Row]) -> dict[str, dict[str, int]]: ...

    def samples(self, root: Path, rows: list[Row], each: int) -> Samples: ...


FORMATS: dict[str, Format] = {"cifar10": cifar10, "imagenet": imagenet, "cityscapes": cityscapes}
SHEETS: dict[str, tuple[str, int, int, tuple[int, int]]] = {
    "cifar10": ("CIFAR-10", 8, 16, (64, 64)),
    "imagenet": ("ImageNet", 6, 6, (132, 120)),
    "cityscapes": ("Cityscapes", 6, 4, (400, 200)),
}
"""Of the contact sheets: title, pictures of a group, pictures side by side, width and height each is fitted into."""


def run(name: str, params: PrepareParams, machine: Machine) -> None:
    """Prepare the set `name` (cifar10, imagenet or cityscapes) as `params` say.

    Raises:
        DataError: The data are missing or not as they must be; one line that names the file.
    """
    lock = machine.root / "work" / f"prepare-{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # the workers of DVC's queue share one root
        _run(name, params, machine)


def _run(name: str, params: PrepareParams, machine: Machine) -> None:
    form = FORMATS[name]
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
    work = (Path.cwd() if params.source == "generated" else machine.root) / "work"
    kept = work / f"prepare-{name}" / _fingerprint(name, params, root)
    seen = checksum(json.dumps(stamps).encode())
    target = Path("results") / "data" / name
    if _kept(kept / "seen.json") == seen:
        _put_back(kept, target)
        return
    from pipeline import tracking

    with tracking.start("prepare", name, params, machine) as tracker:
        rows = _rows(form, root, found, stamps, kept, machine)
        form.check(root, rows)
        summary = _keep(kept, seen, rows, name, params.source, root)
        _put_back(kept, target)
        tracker.tag("mark", checksum((target / "summary.json").read_bytes()))  # as sync reckons it
        tracker.dataset(name, summary["manifest"], params.source)
        for output in OUTPUTS:
            tracker.artifact(target / output)
    print(f"{name}: {_sizes(summary)}, {summary['bytes'] / 1e6:,.1f} MB, verified; see {target}")


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _fingerprint(name: str, params: PrepareParams, root: Path) -> str:
    """Return what else the outputs depend on: the source, its place, and the code that reads it."""
    code = code_digest([__file__, manifest.__file__, sheet.__file__, getattr(FORMATS[name], "__file__", None)])
    return checksum(json.dumps([params.model_dump_json(), str(root.resolve()), code]).encode())


def _kept(path: Path) -> Any:
    """Return what an earlier run noted, None if nothing can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _rows(form: Format, root: Path, found: list[Found], stamps: list[Any], kept: Path, machine: Machine) -> list[Row]:
    """Read what is new or has another size or time than when it was last read, in threads.

    What was read is kept also when a file is found broken: once it is mended, the rest is not read again.
    """
    known = {json.dumps(stamp): row for stamp, row in _kept(kept / "rows.json") or ()}
    rows: list[Row | None] = [known.get(json.dumps(stamp)) for stamp in stamps]
    new = [i for i, row in enumerate(rows) if row is None]
    try:
        with ThreadPoolExecutor(machine.threads or os.cpu_count()) as pool:
            chunks = (new[i : i + CHUNK] for i in range(0, len(new), CHUNK))
            read = chain.from_iterable(pool.map(lambda i: form.inspect(root, found[i]), part) for part in chunks)
            for i, row in zip(new, progress(read, "Reading the data", len(new)), strict=True):
                rows[i] = row
    finally:
        kept.mkdir(parents=True, exist_ok=True)
        done = [(stamp, row) for stamp, row in zip(stamps, rows, strict=True) if row is not None]
        (kept / "rows.json").write_text(json.dumps(done))
    return [row for row in rows if row is not None]


def _keep(kept: Path, seen: str, rows: list[Row], name: str, source: str, root: Path) -> dict[str, Any]:
    """Make the outputs, keep them and return the summary; the mark that they are complete is written last."""
    import pandas as pd

    for old in kept.parent.iterdir():
        if old != kept:
            shutil.rmtree(old)
    table = pd.DataFrame(rows)
    table.to_csv(kept / "manifest.csv", index=False, lineterminator="\n")
    counted: Any = table if "images" in table else table.assign(images=1)  # else a row is an image
    counts = FORMATS[name].counts(rows)
    summary: dict[str, Any] = {
        "set": name,
        "source": source,
        "classes": len(next(iter(counts.values()))) - (name == "cityscapes"),  # which counts what is ignored too
        "images": counted.groupby("split", sort=False)["images"].sum().to_dict(),
        "bytes": int(table.filter(regex="bytes$").to_numpy().sum()),
        "manifest": checksum((kept / "manifest.csv").read_bytes()),
        "pixels" if name == "cityscapes" else "counts": counts,
    }
    (kept / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title, each, across, cell = SHEETS[name]
    note = f"{source} · {_sizes(summary)} · {summary['classes']} classes · {summary['manifest'][:12]}"
    pictures = FORMATS[name].samples(root, rows, each)
    sheet.contact_sheet(title, note, pictures, cell=cell, across=across).save(kept / "contact_sheet.png")
    (kept / "seen.json").write_text(json.dumps(seen))
    return summary


def _sizes(summary: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in summary["images"].items()) + " images"


def _put_back(kept: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for output in OUTPUTS:
        shutil.copyfile(kept / output, target / output)
