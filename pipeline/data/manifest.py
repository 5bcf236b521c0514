"""The index of a data set: one row an image (CIFAR-10: one row a batch file), never a copy of the data.

A manifest is a CSV file whose paths are relative to the data root, so that it is the same on every machine.
Reading one needs nothing outside the standard library: training works from it.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pipeline.machine import Machine

Row = dict[str, str | int]
Item = TypeVar("Item")


class DataError(Exception):
    """The data are not as they must be; the message is one line and names the file and the cure."""


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

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.columns["path"])

    def split(self, name: str) -> Manifest:
        """Return the rows of one split (train, val or test)."""
        keep = [i for i, split in enumerate(self.columns["split"]) if split == name]
        if not keep:
            raise DataError(f"{self.path}: has no rows of the split {name!r}")
        return Manifest(self.path, {column: [values[i] for i in keep] for column, values in self.columns.items()})


def data_root(name: str, source: str, machine: Machine) -> Path:
    """Return where the set lies: what the environment says, else data/generated/<set> or data/<set>."""
    if name in machine.data_roots:
        return machine.data_roots[name]
    return machine.root / "data" / "generated" / name if source == "generated" else machine.root / "data" / name


def checksum(content: bytes) -> str:
    """Return the BLAKE2b checksum that the manifests carry (32 hexadecimal digits)."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def code_digest(files: Iterable[str | None]) -> str:
    """Return a digest of source files (modules' `__file__`): what was made by other code is made again."""
    return checksum(b"".join(Path(file).read_bytes() for file in files if file))


def read_bytes(root: Path, path: str, size: int | None = None) -> bytes:
    """Return a file's content; if it is unreadable or not of the manifest's `size`, an error names it."""
    try:
        content = (root / path).read_bytes()
    except OSError as error:
        raise DataError(f"{root / path}: cannot be read ({error.strerror})") from None
    if size is not None and len(content) != size:
        raise DataError(
            f"{root / path}: {len(content)} bytes, but {size} in the manifest: the data has changed since; "
            "run `python -m pipeline prepare` again"
        )
    return content


def image_size(root: Path, path: str, content: bytes) -> tuple[int, int]:
    """Decode an image to its end and return its (width, height); if it is broken, an error names it."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            image.draft("L", (1, 1))  # a JPEG is read to its end all the same, only its pixels are not all made
            image.load()
    except Exception as error:  # PIL raises whatever its decoders meet: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{root / path}: not a readable image ({error})") from None
    return size


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, on a terminal under a progress bar."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = console.is_terminal
    yield from track(items, title, total, console=console, transient=True, disable=not shown)


def folders(root: Path) -> list[str]:
    """Return the names of the visible folders in `root`, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def files(root: Path) -> list[str]:
    """Return the names of the visible files in `root`, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
