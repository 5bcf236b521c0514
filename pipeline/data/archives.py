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

MEMBER = 64 * 2**20  # bytes of an archive's file at most; a batch of CIFAR-10 has 31 million
RATIO = 20  # of a zip's content to its size; the official ones hold pictures, which do not shrink
NOTE = ".unpacked"
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)


def unpack(archive: Path, target: Path, fill: Callable[[Path, Path], None]) -> None:
    """Makes the folder `target` from `archive`, if there is such an archive and no such folder.

    Args:
        archive: The file.
        target: Appears when it is whole.
        fill: Called with the archive and an empty folder to unpack into.

    Raises:
        UserError: The archive is damaged, or `target` was made from another one.
    """
    if not archive.is_file():
        return
    made_from = f"{archive.name} of {archive.stat().st_size} bytes"
    note = target / NOTE
    if note.is_file() and note.read_text(errors="replace") != made_from:
        reason = f"was unpacked from another {archive.name}; delete {target} to unpack this one"
        raise fault(target, reason)
    if target.exists():
        return
    try:
        with made_whole(target) as partial:
            fill(archive, partial)
            (partial / NOTE).write_text(made_from)
    except DAMAGED as error:
        raise fault(archive, f"cannot be unpacked ({error})") from None


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Removes `folder`, and yields an empty one that takes its place if the block ends well.

    A kill leaves the folder missing, never half made, and what it leaves is removed next time.
    """
    partial = folder.with_name(f".{folder.name}.mdeq-partial")
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        folder.rename(partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tarred(
    archive: Path, pattern: str, content: IO[bytes] | None = None
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields (name, open file) of the files in a tar, which may be compressed by gzip.

    Args:
        archive: The tar.
        pattern: Matches every name.
        content: An open tar inside of `archive`, to read instead.

    Raises:
        UserError: It holds what the official archive does not.
        tarfile.TarError, OSError, EOFError: It is damaged.
    """
    with contextlib.ExitStack() as stack:
        if content is None:
            opener: Callable[..., Any] = gzip.open if archive.suffix == ".gz" else open
            content = stack.enter_context(opener(archive, "rb"))
        tar = stack.enter_context(tarfile.TarFile(fileobj=_Pieces(content)))  # type: ignore[arg-type]
        for member in tar:
            if member.isdir():
                continue
            is_plain = member.isreg() and not member.issparse()
            _check(archive, pattern, member.name, member.size, is_plain=is_plain)
            file = tar.extractfile(member)
            assert file is not None, "a regular file"
            yield member.name, file
        content.seek(tar.offset)
        if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends too early")


def zipped(archive: Path, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """`tarred`, of a zip."""
    with zipfile.ZipFile(archive) as whole:
        members = [member for member in whole.infolist() if not member.is_dir()]
        if sum(member.file_size for member in members) > RATIO * archive.stat().st_size + MEMBER:
            raise fault(archive, "unpacks to far more than the official archive")
        for member in members:
            kind = member.external_attr >> 28  # of a Unix file: 8 is regular, 0 is not said
            _check(archive, pattern, member.filename, member.file_size, is_plain=kind in (0, 8))
            with whole.open(member) as file:
                yield member.filename, file


def _check(archive: Path, pattern: str, name: str, size: int, *, is_plain: bool) -> None:
    """Refuses links, devices, other names and bombs."""
    if not is_plain or not re.fullmatch(pattern, name):
        raise fault(archive, f"holds {name!r}, which the official archive does not")
    if size > MEMBER and not name.endswith(".tar"):
        reason = f"holds {name!r} of {size:,} bytes, far more than the official archive"
        raise fault(archive, reason)


class _Pieces:
    """An open file read in pieces of at most a member's size: no header can ask for more."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self.seek, self.seekable = file.tell, file.seek, file.seekable
        self._read = file.read

    def read(self, size: int) -> bytes:
        if size > MEMBER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)
