"""The index of a data set: one row per image (CIFAR-10: per batch file), never a copy of the data.

A manifest is a CSV file whose paths are relative to the data root: the same bytes on every machine.
Names of files may hold any bytes. Standard library alone.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, escaped
from pipeline.files import digest, read_json

if TYPE_CHECKING:
    from pipeline.machine import Machine

Row = dict[str, str | int]
BYTES = 256 * 2**20  # of a file at most; the largest real one, a batch of CIFAR-10, has 31 million


def fault(path: Path | str, reason: object) -> UserError:
    """The error that a file of the data is not as it must be, on one line whatever its name."""
    return UserError(f"{escaped(str(path))}: {escaped(' '.join(str(reason).split()))}")


@dataclass(frozen=True)
class Found:
    """The files of a row that are not read yet: paths relative to the data root, image first."""

    split: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The columns of a manifest.csv, of equal length; every value is the text in the file."""

    path: Path
    columns: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads `path`, as the prepare stage wrote it.

        Raises:
            UserError: It is missing, or not a manifest.
        """
        again = "run `python -m pipeline prepare`"
        try:
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                names, *rows = csv.reader(file)
        except (OSError, ValueError, csv.Error) as error:
            raise fault(path, f"cannot be read ({error}); {again}") from None
        if not rows or any(len(row) != len(names) for row in rows):
            raise fault(path, f"not a manifest, or an empty one; {again}")
        return cls(path, {name: [row[i] for row in rows] for i, name in enumerate(names)})

    def __getitem__(self, column: str) -> list[str]:
        """A column.

        Raises:
            UserError: The manifest has no such column: it is that of another data set.
        """
        if column not in self.columns:
            raise fault(self.path, f"has no column {column!r}; run `python -m pipeline prepare`")
        return self.columns[column]

    def split(self, name: str, limit: int | None = None) -> Manifest:
        """The rows of one split (train, val or test), or `limit` of them, spread evenly."""
        rows = [i for i, split in enumerate(self["split"]) if split == name]
        if not rows:
            raise fault(self.path, f"has no rows of the split {name!r}")
        rows = [rows[i] for i in spread(len(rows), limit)]
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Manifest(self.path, columns)


def spread(length: int, limit: int | None) -> list[int]:
    """`limit` positions among `length`, spread evenly over all classes of a sorted set."""
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def to_csv(rows: Sequence[Row]) -> bytes:
    """The content of a manifest.csv."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def totals(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """The sum of each of `columns` over the rows of each split."""
    sums: dict[str, dict[str, int]] = {}
    for row in rows:
        own = sums.setdefault(str(row["split"]), dict.fromkeys(columns, 0))
        for column in columns:
            own[column] += int(row[column])
    return sums


def read_summary(name: str) -> dict[str, Any]:
    """The summary that prepare wrote of a set, if the manifest beside it is still the same.

    Returns:
        `set`, `source`, `classes`, `images` (by split), `bytes`, `manifest` (its digest) and
        `counts` (by split and class; of Cityscapes in pixels).

    Raises:
        UserError: Either file is missing or not as prepare wrote it.
    """
    folder = Path("results/data", name)
    again = f"run `python -m pipeline prepare {name}`"
    summary = read_json(folder / "summary.json", again)
    try:
        own = digest((folder / "manifest.csv").read_bytes())
    except OSError as error:
        raise fault(
            folder / "manifest.csv", f"cannot be read ({error.strerror}); {again}"
        ) from None
    if own != summary.get("manifest"):
        raise fault(folder / "manifest.csv", f"not as prepare wrote it; {again}")
    if not isinstance(summary.get("source"), str) or not isinstance(summary.get("images"), dict):
        raise fault(folder / "summary.json", f"not as prepare wrote it; {again}")
    return summary


def data_root(name: str, source: str, machine: Machine) -> Path:
    """The folder of a set: what the environment says, or data/<set>.

    Generated pictures lie in data/generated/<set> of the working directory: experiments that DVC
    queues draw each their own, and no user's folder is drawn into.
    """
    if source == "generated":
        return Path.cwd() / "data/generated" / name
    return machine.data_roots.get(name, machine.root / "data" / name)


def located(name: str, machine: Machine) -> tuple[Path, Path]:
    """The folder of a prepared set, and its manifest."""
    source = read_summary(name)["source"]
    return data_root(name, source, machine), Path("results/data", name, "manifest.csv")


def read_file(path: Path, expected: str | None = None) -> bytes:
    """The content of a regular file of at most `BYTES`; no pipe is waited for.

    Args:
        path: Of the file.
        expected: Its digest in the manifest; None to accept any content.

    Raises:
        UserError: It cannot be read, is too large, or has changed.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise fault(path, "not a regular file")
            if status.st_size > BYTES:
                raise fault(path, f"{status.st_size:,} bytes; at most {BYTES:,} are read")
            content = file.read(BYTES)
    except (OSError, ValueError) as error:
        raise fault(path, f"cannot be read ({getattr(error, 'strerror', error)})") from None
    if expected is not None and digest(content) != expected:
        advice = "it has changed since; restore it or run `python -m pipeline prepare`"
        raise fault(path, f"not the file of the manifest: {advice}")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """The visible entries of a folder, by name; .DS_Store and ._a.jpg belong to no data set.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise fault(folder, f"cannot be read ({error.strerror})") from None
    return sorted(visible, key=lambda entry: entry.name)


def folders(root: Path) -> list[str]:
    """The names of the visible folders in `root`."""
    return [entry.name for entry in listed(root) if entry.is_dir()]


def files(root: Path) -> list[str]:
    """The names of the visible files in `root`, which must hold nothing else.

    Raises:
        UserError: There is a folder, a dangling link or a device among them.
    """
    found = listed(root)
    for entry in found:
        if not _is_file(entry):
            raise fault(entry.path, "not a file; move it out of the data set")
    return [entry.name for entry in found]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False) or entry.is_file()
    except OSError:  # a link to itself
        return False
