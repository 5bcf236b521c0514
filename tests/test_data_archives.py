"""The official archives: unpacked whole or not at all, without trust, never over a folder."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import DRAWN
from PIL import Image
from scipy.io import savemat

from pipeline.data import cifar10, cityscapes, generated, imagenet
from pipeline.errors import UserError

TRAIN, VAL = imagenet.ARCHIVES["train"], imagenet.ARCHIVES["val"]
GTFINE = cityscapes.ARCHIVES["gtFine"]
FORMATS = {cifar10.ARCHIVE: cifar10, TRAIN: imagenet, GTFINE: cityscapes}
WNIDS = ("n01440764", "n01443537")


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.effect_noise((40, 30), 60).save(content, "JPEG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
    tar.addfile(member, io.BytesIO(content))


def nested(images: int, wnids: tuple[str, ...] = WNIDS) -> bytes:
    """ImageNet's training archive: a tar of tars."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as outer:
        for wnid in wnids:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(images):
                    add(tar, f"{wnid}_{i}.JPEG", jpeg())
            add(outer, f"{wnid}.tar", inner.getvalue())
    return whole.getvalue()


def validation(root: Path) -> dict[str, bytes]:
    """Writes ImageNet's validation archive and devkit; returns the images by name."""
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg() for i in (1, 2, 3)}
    with tarfile.open(root / VAL, "w") as tar:
        for name, content in images.items():
            add(tar, name, content)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(1, WNIDS[0], "tench", 0), (2, WNIDS[1], "goldfish", 0), (1001, "n00001740", "", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    with tarfile.open(root / imagenet.DEVKIT, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, f"ILSVRC2012_devkit_t12/data/{imagenet.TRUTH}", b"2\n1\n2\n")
    return images


def left(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_imagenets_archives_become_the_tree(tmp_path: Path) -> None:
    (tmp_path / TRAIN).write_bytes(nested(2))
    images = validation(tmp_path)
    imagenet.unpack_archives(tmp_path)
    paths = [path.split("/") for (path,) in imagenet.find(tmp_path)]
    assert Counter((split, wnid) for split, wnid, _ in paths) == {
        ("train", WNIDS[0]): 2,
        ("train", WNIDS[1]): 2,
        ("val", WNIDS[0]): 1,
        ("val", WNIDS[1]): 2,
    }
    second = "ILSVRC2012_val_00000002.JPEG"
    assert (tmp_path / "val" / WNIDS[0] / second).read_bytes() == images[second]


def test_cifars_archive_becomes_the_folder(tmp_path: Path) -> None:
    generated.ensure(tmp_path / "drawn", "cifar10", DRAWN["cifar10"])
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as tar:
        tar.add(tmp_path / "drawn" / cifar10.FOLDER, cifar10.FOLDER)
    cifar10.unpack_archives(tmp_path)
    for path, _ in cifar10.find(tmp_path):
        assert (tmp_path / path).read_bytes() == (tmp_path / "drawn" / path).read_bytes()


def test_cityscapes_zips_become_the_tree(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    generated.ensure(drawn, "cityscapes", DRAWN["cityscapes"])
    for kind, name in cityscapes.ARCHIVES.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("README", "")
            archive.writestr("license.txt", "")
            for file in (drawn / kind).rglob("*.png"):
                archive.write(file, file.relative_to(drawn))
    cityscapes.unpack_archives(tmp_path)
    assert cityscapes.find(tmp_path) == cityscapes.find(drawn)


def test_a_folder_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / TRAIN).write_bytes(nested(1))
    imagenet.unpack_archives(tmp_path)
    assert not any((tmp_path / "train").iterdir())
    (tmp_path / "train").rmdir()
    imagenet.unpack_archives(tmp_path)
    imagenet.unpack_archives(tmp_path)
    (tmp_path / TRAIN).write_bytes(nested(40))
    with pytest.raises(UserError, match="train: was unpacked from another .* delete .*train"):
        imagenet.unpack_archives(tmp_path)
    (tmp_path / TRAIN).unlink()
    imagenet.unpack_archives(tmp_path)  # without an archive the folder is the user's
    assert len(list((tmp_path / "train").rglob("*.JPEG"))) == 2 and left(tmp_path) == ["train"]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "FIFOTYPE", "GNUTYPE_SPARSE"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / TRAIN, "w") as tar:
        add(tar, "n01440764.tar", b"", getattr(tarfile, kind))
    with pytest.raises(UserError, match=r"holds 'n01440764\.tar'|cannot be unpacked"):
        imagenet.unpack_archives(tmp_path)
    link = zipfile.ZipInfo("gtFine/train/x/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / GTFINE, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"link\.png"):
        cityscapes.unpack_archives(tmp_path)
    assert left(tmp_path) == sorted([TRAIN, GTFINE])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "member",
    ["../evil", "/evil", "x/../../evil", f"{cifar10.FOLDER}/../../evil", "gtFine/val/x/evil.sh"],
)
def test_names_that_do_not_belong_are_refused(tmp_path: Path, name: str, member: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if name.endswith(".zip"):
        a_zip(root / name, {member: b"x"})
    else:
        with tarfile.open(root / name, "w:gz" if name.endswith("gz") else "w") as tar:
            add(tar, member, b"x")
    with pytest.raises(UserError, match="evil"):
        FORMATS[name].unpack_archives(root)
    assert left(root) == [name] and left(tmp_path) == ["root"]


def a_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def a_header(path: Path, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> None:
    """A tar whose first header promises a size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
    if path.suffix != ".gz":
        os.truncate(path, size + 2**30)  # sparse


def an_inner_bomb(path: Path) -> None:
    inner = tarfile.TarInfo("n01440764_1.JPEG")
    inner.size = 2**40
    with tarfile.open(path, "w") as tar:
        add(tar, "n01440764.tar", inner.tobuf(tarfile.GNU_FORMAT) + bytes(512))


MANY = {f"gtFine/train/x/{i}.png": bytes(2**22) for i in range(20)}
BATCH = f"{cifar10.FOLDER}/test_batch"
BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one member": (GTFINE, lambda path: a_zip(path, {"gtFine/train/x/b.png": bytes(2**26 + 1)})),
    "all members": (GTFINE, lambda path: a_zip(path, MANY)),
    "a batch": (cifar10.ARCHIVE, lambda path: a_header(path, BATCH, 2**40)),
    "an inner image": (TRAIN, an_inner_bomb),
    "a header": (TRAIN, lambda path: a_header(path, "pax", 14 * 2**30, tarfile.XHDTYPE)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_unopened_and_leave_nothing(tmp_path: Path, name: str) -> None:
    archive, make = BOMBS[name]
    make(tmp_path / archive)
    with pytest.raises(UserError, match="far more than the official|a header of"):
        FORMATS[archive].unpack_archives(tmp_path)
    assert left(tmp_path) == [archive]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", [b"", b"junk" * 300, jpeg()], ids=["empty", "junk", "jpeg"])
def test_what_is_no_archive_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot be unpacked") as caught:
        FORMATS[name].unpack_archives(tmp_path)
    assert str(caught.value).isprintable() and left(tmp_path) == [name]


def test_no_cut_or_damage_of_an_archive_passes_for_the_whole(tmp_path: Path) -> None:
    """Not a cut between two members either, where tarfile itself sees nothing wrong."""
    whole = nested(1)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        second = tar.getmembers()[1].offset
    for end in (0, 100, 512, len(whole) // 2, second, second + 100):
        (tmp_path / TRAIN).write_bytes(whole[:end])
        with pytest.raises(UserError, match=TRAIN):
            imagenet.unpack_archives(tmp_path)
    a_zip(tmp_path / GTFINE, {"gtFine/train/x/a.png": os.urandom(4000)})
    flipped = bytearray((tmp_path / GTFINE).read_bytes())
    flipped[2000] ^= 1
    (tmp_path / GTFINE).write_bytes(flipped)
    with pytest.raises(UserError, match="cannot be unpacked"):
        cityscapes.unpack_archives(tmp_path)
    assert left(tmp_path) == sorted([TRAIN, GTFINE])


def test_validation_images_need_the_devkit(tmp_path: Path) -> None:
    validation(tmp_path)
    (tmp_path / imagenet.DEVKIT).unlink()
    with pytest.raises(UserError, match=f"{imagenet.DEVKIT}: cannot be read"):
        imagenet.unpack_archives(tmp_path)
    assert left(tmp_path) == [VAL]
