"""The official archives, unpacked without trust: a folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.data.manifest import fault
from pipeline.files import read_json, write_json

MEMBER = 64 * 2**20  # bytes of an archive's file at most; a batch of CIFAR-10 has 31 million
RATIO = 20  # the official archives hold pictures, which do not shrink
NOTE = ".unpacked.json"
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)


def unpack(archive: Path, target: Path, fill: Callable[[Path, Path], None]) -> None:
    """Makes the folder `target` from `archive`, unless it was made from this very archive.

    Args:
        archive: Nothing is done where there is none.
        target: Appears when it is whole.
        fill: Called with the archive and an empty folder to unpack into.

    Raises:
        UserError: The archive is damaged, or `target` was made from another one and changed since.
    """
    partial = fresh(target)
    if not archive.is_file() or not _is_due(archive, target):
        return
    try:
        partial.mkdir()
        fill(archive, partial)
        write_json(partial / NOTE, {"archive": _stamp(archive), "files": _count(partial)})
        replace(target)
    except DAMAGED as error:
        raise fault(archive, f"cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fresh(folder: Path) -> Path:
    """Where the next content of `folder` is made; what a killed process left is removed."""
    partial, old = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    return partial


def replace(folder: Path) -> None:
    """Puts what was made at `fresh(folder)` in its place; a kill leaves it missing, never mixed."""
    partial, old = _beside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Names that nobody else uses, for what is made and what is replaced."""
    partial, old = (f".{folder.name}.mdeq-{kind}" for kind in ("partial", "old"))
    return folder.with_name(partial), folder.with_name(old)


def tarred(
    archive: Path, pattern: str, content: IO[bytes] | None = None
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields (name, open file) of the files in a tar.

    Args:
        archive: The tar, which may be compressed by gzip.
        pattern: Matches every name.
        content: An open tar inside of `archive`, to read instead.

    Raises:
        UserError: It holds what the official archive does not.
        tarfile.TarError, OSError, EOFError: It is damaged.
    """
    check = _Check(archive, pattern)
    with contextlib.ExitStack() as stack:
        if content is None:
            opener: Callable[..., Any] = gzip.open if archive.suffix == ".gz" else open
            content = stack.enter_context(opener(archive, "rb"))
        tar = stack.enter_context(tarfile.TarFile(fileobj=_Pieces(content)))  # type: ignore[arg-type]
        for member in tar:
            if member.isdir():
                continue
            check(member.name, member.size, plain=member.isreg() and not member.issparse())
            file = tar.extractfile(member)
            assert file is not None, "a regular file"
            yield member.name, file
        content.seek(tar.offset)
        if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends too early")


def zipped(archive: Path, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """`tarred`, of a zip."""
    check = _Check(archive, pattern)
    with zipfile.ZipFile(archive) as whole:
        for member in whole.infolist():
            if member.is_dir():
                continue
            kind = member.external_attr >> 28  # of a Unix file: 8 is regular, 0 is not said
            check(member.filename, member.file_size, plain=kind in (0, 8))
            with whole.open(member) as file:
                yield member.filename, file


class _Check:
    """Refuses links, devices, other names and bombs."""

    def __init__(self, archive: Path, pattern: str) -> None:
        self.archive = archive
        self.pattern = re.compile(pattern)
        self.left = RATIO * archive.stat().st_size + MEMBER

    def __call__(self, name: str, size: int, *, plain: bool) -> None:
        self.left -= size
        if not plain or not self.pattern.fullmatch(name):
            raise fault(self.archive, f"holds {name!r}, which the official archive does not")
        if self.left < 0 or (size > MEMBER and not name.endswith(".tar")):
            reason = f"holds {name!r} of {size:,} bytes, far more than the official archive"
            raise fault(self.archive, reason)


class _Pieces:
    """An open file read in pieces of at most a member's size: no header can ask for more."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self.seek, self.seekable = file.tell, file.seek, file.seekable
        self._read = file.read

    def read(self, size: int) -> bytes:
        if size > MEMBER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _is_due(archive: Path, target: Path) -> bool:
    if not target.exists():
        return True
    note = target / NOTE
    if not note.is_file():
        return False  # the user's own folder
    cure = f"delete {target} to unpack {archive.name} again"
    made = read_json(note, cure)
    if made.get("archive") == _stamp(archive):
        return False
    if made.get("files") != _count(target):
        raise fault(target, f"was unpacked from another {archive.name} and has changed; {cure}")
    return True


def _stamp(archive: Path) -> list[int]:
    status = archive.stat()
    return [status.st_size, status.st_mtime_ns]


def _count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*") if path.name != NOTE)
