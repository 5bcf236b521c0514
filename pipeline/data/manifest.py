"""The index of a data set: one row an image (CIFAR-10: one row a batch file), never a copy of the data.

A manifest is a CSV file whose paths are relative to the data root, so that it is the same on every machine.
Reading one needs nothing outside the standard library: training works from it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.machine import Machine

Row = dict[str, str | int]
Item = TypeVar("Item")
SECONDS_A_LINE = 30.0
SIDE, PIXELS = 4, 80_000_000  # of a picture: the shorter side at least, all at most


class DataError(Exception):
    """The data are not as they must be; the message is one line and names the file and the cure."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # a library's reason may have several lines


@dataclass(frozen=True)
class Found:
    """A row to be, its files not read yet: paths relative to the data root (image first, then label)."""

    split: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The columns of a manifest.csv, all of equal length; every value is the text that stands in the file."""

    path: Path
    columns: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read `path`, as the prepare stage wrote it."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                names, *rows = csv.reader(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no manifest to read ({error}); run `python -m pipeline prepare` first") from None
        if not rows or any(len(row) != len(names) for row in rows):
            raise DataError(f"{path}: not a manifest, or an empty one; run `python -m pipeline prepare` again")
        return cls(path, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))

    def __getitem__(self, column: str) -> list[str]:
        """Return one column."""
        return self.columns[column]

    def split(self, name: str, limit: int | None = None) -> Manifest:
        """Return the rows of one split (train, val or test), or the first `limit` of them."""
        keep = [i for i, split in enumerate(self.columns["split"]) if split == name][:limit]
        if not keep:
            raise DataError(f"{self.path}: has no rows of the split {name!r}")
        return Manifest(self.path, {column: [values[i] for i in keep] for column, values in self.columns.items()})


def read_summary(name: str) -> dict[str, Any]:
    """Return the summary that prepare wrote of a set, whose manifest must still be the one beside it."""
    folder = Path("results/data", name)
    again = f"run `python -m pipeline prepare {name}`"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        digest = checksum((folder / "manifest.csv").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'summary.json'}: cannot be read ({error}); {again} first") from None
    if digest != summary["manifest"]:
        raise DataError(f"{folder / 'manifest.csv'}: not as prepare wrote it; it is not to be edited: {again} again")
    return summary


def data_root(name: str, source: str, machine: Machine) -> Path:
    """Return where the set lies: what the environment says, else data/<set>; data/generated/<set> of the working
    directory if it is drawn, so that experiments that DVC queues draw other data each for itself.
    """
    own = Path.cwd() / "data/generated" if source == "generated" else machine.root / "data"
    return machine.data_roots.get(name, own / name)


def located(name: str, machine: Machine) -> tuple[Path, Path]:
    """Return where a prepared set lies, and its manifest."""
    return data_root(name, read_summary(name)["source"], machine), Path("results/data", name, "manifest.csv")


def totals(rows: list[Row], columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the sum of each of `columns` over the rows of each split."""
    splits = dict.fromkeys(str(row["split"]) for row in rows)
    return {
        split: {column: sum(int(row[column]) for row in rows if row["split"] == split) for column in columns}
        for split in splits
    }


def checksum(content: bytes) -> str:
    """Return the BLAKE2b checksum that the manifests carry (32 hexadecimal digits)."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def code_digest(files: Iterable[str | None]) -> str:
    """Return a digest of source files (modules' `__file__`): what was made by other code is made again."""
    return checksum(b"".join(Path(file).read_bytes() for file in files if file))


def read_bytes(root: Path, path: str, expected: str | None = None) -> bytes:
    """Return a file's content; if it is unreadable or not of the manifest's checksum, an error names it."""
    try:
        content = (root / path).read_bytes()
    except OSError as error:
        raise DataError(f"{root / path}: cannot be read ({error.strerror})") from None
    if expected is not None and checksum(content) != expected:
        raise DataError(
            f"{root / path}: not the file of the manifest, the data has changed since; "
            "run `python -m pipeline prepare` again"
        )
    return content


def image_size(root: Path, path: str, content: bytes) -> tuple[int, int]:
    """Decode an image to its end and return its (width, height); if it is broken or no photo, an error names it.

    An orientation in the file's EXIF data is ignored, as published results on these sets ignore it.
    """
    import io

    from PIL import Image

    if not content:
        raise DataError(f"{root / path}: an empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, unfit = image.size, _unfit(image)
            if not unfit:
                image.draft("L", (1, 1))  # a JPEG is read to its end all the same, only its pixels are not all made
                image.load()
    except Exception as error:  # PIL raises whatever its decoders meet: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{root / path}: not a readable image ({error})") from None
    if unfit:
        raise DataError(f"{root / path}: {unfit}")
    return size


def _unfit(image: Image.Image) -> str:
    width, height = image.size
    if min(width, height) < SIDE:
        return f"{width} x {height} pixels: too small for a picture"
    if width * height > PIXELS:
        return f"{width} x {height} pixels: gigantic; scale it down"
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a preview
        return "an animation; keep one frame"
    return "more than 8 bits a pixel; it must be an 8-bit picture" if image.mode[0] in "IF" else ""


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`: on a terminal under a progress bar, in a log with a line every half minute."""
    from rich.console import Console
    from rich.progress import track

    console, said = Console(stderr=True), time.monotonic()
    if console.is_terminal:
        yield from track(items, title, total, console=console, transient=True)
        return
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > SECONDS_A_LINE:
            said = time.monotonic()
            print(f"{title}: {number:,}" + (f" of {total:,}" if total else ""), file=sys.stderr, flush=True)


def folders(root: Path) -> list[str]:
    """Return the names of the visible folders in `root`, sorted."""
    return [entry.name for entry in _visible(root) if os.path.isdir(entry.path)]


def files(root: Path) -> list[str]:
    """Return the names of the visible files in `root`, sorted; there may be nothing but files."""
    entries = _visible(root)
    for entry in entries:
        if not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
            what = "a folder" if os.path.isdir(entry.path) else "a link to nothing, or a device"
            raise DataError(f"{entry.path}: {what} among the pictures; move it out of the data set")
    return [entry.name for entry in entries]


def _visible(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from None
    for entry in found:
        if not entry.name.isprintable():
            raise DataError(f"{root}: {ascii(entry.name)} has a character that cannot be printed; rename it")
    return found
