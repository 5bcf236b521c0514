"""The official archives, unpacked without trust: a folder appears whole or not at all, with what belongs there."""

from __future__ import annotations

import contextlib
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.data.manifest import DataError, progress

MEMBER = 64 * 2**20  # bytes of an archive's file at most; the largest real one, a batch of CIFAR-10, has 31 million
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)


@contextlib.contextmanager
def unpacking(archive: Path, target: Path) -> Iterator[Path]:
    """A folder to unpack `archive` into, which becomes `target` at the end; a damaged archive is an error."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        partial.rename(target)
    except DAMAGED as error:
        raise DataError(f"{archive}: cannot be unpacked ({error})") from None


def tarred(archive: Path, pattern: str, content: IO[bytes] | None = None) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of a tar's files, of `content` where one tar lies in another; see `_check`."""
    with tarfile.open(archive if content is None else None, fileobj=content) as tar:
        for member in tar:
            if not member.isdir():
                file = tar.extractfile(member) if member.isreg() else None
                _check(archive, member.name, member.size, pattern, plain=file is not None)
                yield member.name, file  # type: ignore[misc]


def zipped(archive: Path, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of a zip's files; see `_check`."""
    with zipfile.ZipFile(archive) as whole:
        for member in progress(whole.infolist(), f"Unpacking {archive.name}"):
            if not member.is_dir():
                plain = member.external_attr >> 28 in (0, 8)
                _check(archive, member.filename, member.file_size, pattern, plain=plain)
                with whole.open(member) as file:
                    yield member.filename, file


def _check(archive: Path, name: str, size: int, pattern: str, *, plain: bool) -> None:
    """Refuse links and devices, and names that `pattern` does not match whole: nothing can land outside its folder."""
    if not plain or not re.fullmatch(pattern, name):
        raise DataError(f"{archive}: holds {name!r}, which the official archive does not")
    if size > MEMBER and not name.endswith(".tar"):
        raise DataError(f"{archive}: holds {name!r} of {size:,} bytes, far more than the official archive's have")
