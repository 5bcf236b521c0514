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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline import tracking
from pipeline.data import cifar10, cityscapes, generated, imagenet, manifest, pictures, sheet
from pipeline.data.manifest import Found, Row, data_root
from pipeline.errors import UserError, escaped
from pipeline.files import digest, file_digest, locked, read_json, remove_partial, write, write_json
from pipeline.progress import track
from pipeline.sets import SETS

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.settings import PrepareParams

CHUNK = 4096  # files given to the threads at a time
OUTPUTS = (
    "manifest.csv",
    "contact_sheet.png",
    "run.jsonl",
    "summary.json",
)  # the last one completes them
ROWS, PROOF = "rows.json", "proof.json"


FORMATS: dict[str, Any] = {"cifar10": cifar10, "imagenet": imagenet, "cityscapes": cityscapes}
"""Each offers unpack_archives, find, inspect, check (what no single row shows), counts and samples.

All raise a UserError that names the file if the data are missing or not as they must be.
"""
SHEETS = {  # pictures per group, groups side by side, width and height of a picture
    "cifar10": (8, 2, (64, 64)),
    "imagenet": (6, 1, (132, 120)),
    "cityscapes": (6, 2, (400, 200)),
}


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
    found = form.find(root)
    stamps = [[_stamp(root, path) for path in one.files] for one in found]
    inputs = digest(json.dumps([_code(form), asdict(params), str(root.resolve()), stamps]).encode())
    if _proven(kept, inputs):
        for output in OUTPUTS:
            write(target / output, (kept / output).read_bytes())
        return
    (kept / PROOF).unlink(missing_ok=True)
    rows = _rows(form, root, found, stamps, kept, machine)
    form.check(root, rows)
    summary = _summary(name, params.source, rows)
    with tracking.start("prepare", name, asdict(params), machine, target / "run.jsonl") as run:
        write(target / "manifest.csv", manifest.to_csv(rows))
        write(target / "contact_sheet.png", _sheet(name, root, rows, summary))
        text = json.dumps(summary, indent=2) + "\n"  # ASCII: names may hold any bytes
        write(target / "summary.json", text.encode())
        run.dataset(name, summary["manifest"], params.source)
        for output in OUTPUTS:
            if output != "run.jsonl":
                run.artifact(target / output)
    for output in OUTPUTS:
        write(kept / output, (target / output).read_bytes())
    write_json(kept / PROOF, {"inputs": inputs, "outputs": _digests(kept)})
    print(f"{name}: {_sizes(summary)}, {summary['bytes'] / 1e6:,.1f} MB, verified; see {target}")


def _stamp(root: Path, path: str) -> tuple[str, int, int, int]:
    """A file's path, and what changes when its content does; no program can set ctime back."""
    status = os.stat(f"{root}/{path}")
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _code(form: ModuleType) -> list[str]:
    """The digests of the code that makes the outputs."""
    modules = (manifest, pictures, sheet, form)
    files = [__file__, *(str(module.__file__) for module in modules)]
    return [file_digest(Path(file)) for file in files]


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
    form: ModuleType,
    root: Path,
    found: list[Found],
    stamps: list[Any],
    kept: Path,
    machine: Machine,
) -> list[Row]:
    """Reads, in threads, the files that are new or have another stamp than when last read.

    What was read is kept also when a file is found broken: the rest is not read again.
    """
    code = _code(form)
    known = {json.dumps(stamp): row for stamp, row in _known(kept / ROWS, code)}
    rows: list[Row | None] = [known.get(json.dumps(stamp)) for stamp in stamps]
    new = [i for i, row in enumerate(rows) if row is None]
    chunks = (new[i : i + CHUNK] for i in range(0, len(new), CHUNK))
    try:
        with ThreadPoolExecutor(machine.threads or os.cpu_count()) as pool:
            read = chain.from_iterable(
                pool.map(lambda i: form.inspect(root, found[i]), part) for part in chunks
            )
            for i, row in zip(new, track(read, "Reading the data", len(new)), strict=True):
                rows[i] = row
    finally:
        done = [(stamp, row) for stamp, row in zip(stamps, rows, strict=True) if row is not None]
        content = json.dumps([code, done]).encode()
        write(kept / ROWS, digest(content).encode() + content)
    return [row for row in rows if row is not None]


def _known(path: Path, code: list[str]) -> list[tuple[Any, Row]]:
    """The stamps and rows of an earlier run of the same code; none if the file is not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    if content[:32] != digest(content[32:]).encode():
        return []
    made_by, done = json.loads(content[32:])
    return done if made_by == code else []


def _summary(name: str, source: str, rows: list[Row]) -> dict[str, Any]:
    counts = FORMATS[name].counts(rows)
    images = dict.fromkeys(counts, 0)
    for row in rows:
        images[str(row["split"])] += int(row.get("images", 1))
    classes = [label for label in counts["train"] if label != "ignored"]
    return {
        "set": name,
        "source": source,
        "classes": len(classes),
        "images": images,
        "bytes": sum(
            int(row[column]) for row in rows for column in ("bytes", "label_bytes") if column in row
        ),
        "manifest": digest(manifest.to_csv(rows)),
        "counts": counts,
    }


def _sheet(name: str, root: Path, rows: list[Row], summary: dict[str, Any]) -> bytes:
    each, columns, cell = SHEETS[name]
    facts = [
        summary["source"],
        _sizes(summary),
        f"{summary['classes']} classes",
        summary["manifest"][:12],
    ]
    groups = [(escaped(label), shown) for label, shown in FORMATS[name].samples(root, rows, each)]
    content = io.BytesIO()
    sheet.contact_sheet(SETS[name].title, " · ".join(facts), groups, cell, columns).save(
        content, "PNG"
    )
    return content.getvalue()


def _sizes(summary: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in summary["images"].items()) + " images"
