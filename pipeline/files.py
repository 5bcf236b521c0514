"""Files that are whole or absent, one digest for all of them, and locks between processes.

Standard library alone: training on CIFAR-10 needs this module and must run on torch and numpy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PARTIAL = ".partial"  # part of the name of a file that is being written


def digest(content: bytes) -> str:
    """The BLAKE2b digest of some bytes, 32 hexadecimal digits: the one digest of this project."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content, read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write(path: Path, content: bytes) -> None:
    """Stores `content` at `path` as a new file: after a crash at any moment the old file or the new one is whole.

    The content goes to a temporary file in the same folder, is flushed to the disk, and takes the name in one step. A
    link (DVC's cache may be linked) is replaced, never written through.

    Raises:
        UserError: The disk refuses; the message names the path and how much room is needed and free.
    """
    partial = path.with_name(f"{path.name[:100]}{PARTIAL}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}){_room(path, content)}; the old file is kept") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write`, of UTF-8 text."""
    write(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write`, of JSON that people can read."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: Of the file.
        cure: What to do where the file is missing or damaged, as "run `dvc repro`".

    Raises:
        UserError: The file is missing, unreadable, or holds anything but an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {cure}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {cure}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {cure}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object; {cure}")
    return value


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left half written in a folder; the caller holds its lock."""
    for path in folder.glob(f"*{PARTIAL}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """Inside, this process is the only one that holds the lock file `path`; the kernel frees it however it ends.

    Args:
        path: The lock file; its folder is made. It stays when the lock is freed.
        busy: What to tell the user if another process holds it.
        wait: Wait for the other process instead.

    Raises:
        UserError: Another process holds the lock, or the file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give this user write access to it") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(busy) from None
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}); work in a checkout on a local disk"
            ) from None
        yield


def _room(path: Path, content: bytes) -> str:
    folder = next((parent for parent in path.parents if parent.exists()), None)
    if folder is None:
        return ""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free / 1e6
        return f": {len(content) / 1e6:.1f} MB are needed, {free:.1f} MB are free in {folder}"
    return ""
