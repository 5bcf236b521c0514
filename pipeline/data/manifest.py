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


def to_csv(rows: Sequence[Row]) -> bytes:
    """The content of a manifest.csv."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_columns(path: Path, split: str, *columns: str) -> list[list[str]]:
    """Some columns of a manifest.csv, of the rows of one split (train, val or test).

    Raises:
        UserError: The file is missing, or not the manifest of a set with these columns.
    """
    again = "run `python -m pipeline prepare`"
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = (row for row in csv.DictReader(file) if row["split"] == split)
            found = [[row[name] for name in columns] for row in rows]
    except KeyError as error:
        raise fault(
            path, f"not a manifest of this set, it has no column {error}; {again}"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise fault(path, f"cannot be read ({error}); {again}") from None
    if not found:
        raise fault(path, f"has no rows of the split {split!r}; {again}")
    return [list(column) for column in zip(*found, strict=True)]


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
        reason = f"cannot be read ({error.strerror}); {again}"
        raise fault(folder / "manifest.csv", reason) from None
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
    return [entry.name for entry in listed(root) if os.path.isdir(entry)]


def files(root: Path) -> list[str]:
    """The names of the visible files in `root`, which must hold nothing else.

    Raises:
        UserError: There is a folder, a dangling link or a device among them.
    """
    found = listed(root)
    for entry in found:
        if not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry)):
            raise fault(entry.path, "not a file; move it out of the data set")
    return [entry.name for entry in found]
