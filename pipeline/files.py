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
    """The digest of a file's content, read in pieces; OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write(path: Path, content: bytes) -> None:
    """Stores `content` in a new file; after a crash at any moment the old or the new one is whole.

    A link (DVC's cache may be linked) is replaced, never written through.

    Raises:
        UserError: The disk refuses; the message names the path and the room needed.
    """
    partial = path.with_name(f"{path.name[:100]}{PARTIAL}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _make_renames_durable(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}): {len(content) / 1e6:.1f} MB are "
            "needed; the old file is kept"
        ) from error
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

    Raises:
        UserError: The file is missing, damaged, or holds anything but an object; the message ends
            with `cure`, as "run `dvc repro`".
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


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left half written in a folder; the caller holds its lock."""
    for path in folder.glob(f"*{PARTIAL}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """Inside, no other process holds the lock file `path`; the kernel frees it however this ends.

    The file is made, and stays. If another process holds it, `wait` for that one.

    Raises:
        UserError: Another process holds the lock (the message is `busy`), or the file system has
            no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); give this user write access to it"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(busy) from None
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}); "
                "work in a checkout on a local disk"
            ) from None
        yield


def _make_renames_durable(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a file system that cannot
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
