"""prepare: verifies a data set, and writes its manifest, summary and contact sheet.

DVC runs this stage always (a changed source must be noticed), and deletes its outputs first. They
are kept in work/prepare-<set>/ with digests of them and of what they were made from: with nothing
changed, a run lists the files, compares, and puts the very same outputs back. A cache that does not
prove itself is made anew.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline import tracking
from pipeline.data import cifar10, cityscapes, generated, imagenet, manifest, pictures
from pipeline.data.manifest import Row, data_root
from pipeline.errors import UserError, escaped
from pipeline.files import digest, file_digest, locked, read_json, remove_partial, write, write_json
from pipeline.progress import track
from pipeline.sets import SETS

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.settings import PrepareParams

OUTPUTS = ("manifest.csv", "contact_sheet.png", "run.jsonl", "summary.json")
ROWS, PROOF = "rows.json", "proof.json"
FORMATS: dict[str, Any] = {"cifar10": cifar10, "imagenet": imagenet, "cityscapes": cityscapes}
"""Each offers unpack_archives, find (the files of each row), inspect (makes a row of them), tally
(what the row adds to the counts of its split), check (what no single row shows) and samples. All
raise a UserError that names the file if the data are missing or not as they must be.
"""
SHEETS = {  # pictures per group, groups side by side, width and height of a picture
    "cifar10": (8, 2, (64, 64)),
    "imagenet": (6, 1, (132, 120)),
    "cityscapes": (6, 2, (400, 200)),
}
PAPER, INK, FAINT, FRAME = (250, 250, 248), (30, 34, 40), (120, 126, 134), (226, 226, 222)
GAP, LABEL, TITLE = 8, 22, 66


def run(name: str, params: PrepareParams, machine: Machine) -> None:
    """Prepares the set `name` (cifar10, imagenet or cityscapes) and writes results/data/<name>/.

    Raises:
        UserError: The data are missing or not as they must be.
    """
    own = Path.cwd() if params.source == "generated" else machine.root
    kept = own / "work" / f"prepare-{name}"
    lock = machine.root / "work" / f"prepare-{name}.lock"  # experiments that DVC queues share it
    with locked(lock, "", wait=True):
        _run(name, params, machine, kept)


def _run(name: str, params: PrepareParams, machine: Machine, kept: Path) -> None:
    form, target = FORMATS[name], Path("results/data", name)
    root = data_root(name, params.source, machine)
    remove_partial(kept)
    remove_partial(target)
    if params.source == "download" and name == "cifar10":
        cifar10.download(root)
    if params.generated is not None:
        generated.ensure(root, name, params.generated)
    else:
        form.unpack_archives(root)
    files = {json.dumps([_stamp(root, path) for path in paths]): paths for paths in form.find(root)}
    code = [file_digest(Path(str(m.__file__))) for m in (manifest, pictures, form)]
    code.append(file_digest(Path(__file__)))
    inputs = digest(json.dumps([code, asdict(params), str(root.resolve()), *files]).encode())
    if _proven(kept, inputs):
        for output in OUTPUTS:
            write(target / output, (kept / output).read_bytes())
        return
    (kept / PROOF).unlink(missing_ok=True)
    rows = _rows(form, root, files, code, kept / ROWS, machine.threads)
    summary = _summary(name, params.source, root, rows)
    with tracking.start("prepare", name, asdict(params), machine, target / "run.jsonl") as run:
        write(target / "manifest.csv", manifest.to_csv(rows))
        write(target / "contact_sheet.png", _sheet(name, root, rows, summary))
        text = json.dumps(summary, indent=2) + "\n"  # ASCII: names may hold any bytes
        write(target / "summary.json", text.encode())
        run.dataset(name, summary["manifest"], params.source)
        for output in ("manifest.csv", "contact_sheet.png", "summary.json"):
            run.artifact(target / output)
    for output in OUTPUTS:
        write(kept / output, (target / output).read_bytes())
    write_json(kept / PROOF, {"inputs": inputs, "outputs": _digests(kept)})
    print(f"{name}: {_sizes(summary)}, {summary['bytes'] / 1e6:,.1f} MB, verified; see {target}")


def _stamp(root: Path, path: str) -> tuple[str, int, int, int]:
    """A file's path, and what changes when its content does; no program can set ctime back."""
    status = os.stat(f"{root}/{path}")
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _proven(kept: Path, inputs: str) -> bool:
    """Whether an earlier run's outputs are whole and made from the same inputs."""
    try:
        proof = read_json(kept / PROOF, "")
        return proof == {"inputs": inputs, "outputs": _digests(kept)}
    except (OSError, UserError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {output: file_digest(folder / output) for output in OUTPUTS}


def _rows(
    form: Any,
    root: Path,
    files: dict[str, tuple[str, ...]],
    code: list[str],
    cache: Path,
    threads: int | None,
) -> list[Row]:
    """The rows of `files`; those whose stamp is new are read, in threads.

    What was read is kept also when a file is found broken: the rest is not read again.
    """
    known = _known(cache, code)
    rows = {stamp: known[stamp] for stamp in files if stamp in known}
    new = [stamp for stamp in files if stamp not in known]
    try:
        with ThreadPool(threads) as pool:
            read = pool.imap(partial(form.inspect, root), [files[stamp] for stamp in new])
            for stamp, row in zip(new, track(read, "Reading the data", len(new)), strict=True):
                rows[stamp] = row
    finally:
        content = json.dumps([code, rows]).encode()
        write(cache, digest(content).encode() + content)
    return [rows[stamp] for stamp in files]


def _known(cache: Path, code: list[str]) -> dict[str, Row]:
    """The rows of an earlier run of the same code, by stamp; none if the file is not whole."""
    try:
        content = cache.read_bytes()
    except OSError:
        return {}
    if content[:32] != digest(content[32:]).encode():
        return {}
    made_by, rows = json.loads(content[32:])
    return rows if made_by == code else {}


def counts(form: Any, rows: list[Row]) -> dict[str, Counter[str]]:
    """What the rows of each split add up to, by class."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(str(row["split"]), Counter()).update(form.tally(row))
    return found


def _summary(name: str, source: str, root: Path, rows: list[Row]) -> dict[str, Any]:
    found = counts(FORMATS[name], rows)
    FORMATS[name].check(root, found)
    images: Counter[str] = Counter()
    for row in rows:
        images[str(row["split"])] += int(row.get("images", 1))
    return {
        "set": name,
        "source": source,
        "classes": len(found["train"].keys() - {"ignored"}),
        "images": images,
        "bytes": sum(int(row["bytes"]) + int(row.get("label_bytes", 0)) for row in rows),
        "manifest": digest(manifest.to_csv(rows)),
        "counts": found,
    }


def _sizes(summary: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in summary["images"].items()) + " images"


def _sheet(name: str, root: Path, rows: list[Row], summary: dict[str, Any]) -> bytes:
    """The contact sheet of a set as a PNG file."""
    each, columns, cell = SHEETS[name]
    classes = f"{summary['classes']} classes"
    note = [summary["source"], _sizes(summary), classes, summary["manifest"][:12]]
    groups = FORMATS[name].samples(root, rows, each)
    sheet = contact_sheet(SETS[name].title, " · ".join(note), groups, cell, columns)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def contact_sheet(
    title: str,
    note: str,
    groups: Sequence[tuple[str, Sequence[np.ndarray]]],
    cell: tuple[int, int],
    columns: int,
) -> Image.Image:
    """Lays out named groups of RGB pictures, each fitted into a cell (width, height)."""
    each = max(len(shown) for _, shown in groups)
    width, height = each * (cell[0] + GAP) + 2 * GAP, cell[1] + LABEL + 2 * GAP
    lines = -(-len(groups) // columns)
    sheet = Image.new("RGB", (columns * width + 2 * GAP, TITLE + lines * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, 10), title, INK, ImageFont.load_default(22))
    pen.text((2 * GAP, 38), note, FAINT, ImageFont.load_default(13))
    for number, (name, shown) in enumerate(groups):
        line, column = divmod(number, columns)
        left, top = 2 * GAP + column * width, TITLE + line * height
        pen.text((left, top), escaped(name), INK, ImageFont.load_default(14))
        for i, pixels in enumerate(shown):
            picture = ImageOps.pad(Image.fromarray(pixels), cell, color=FRAME)
            sheet.paste(picture, (left + i * (cell[0] + GAP), top + LABEL))
    return sheet
