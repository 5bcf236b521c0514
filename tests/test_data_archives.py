"""The official archives: unpacked whole or not at all, without trust, again when replaced."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.data import cifar10, cityscapes, generated, imagenet
from pipeline.errors import UserError
from pipeline.settings import GeneratedCifar10, GeneratedCityscapes

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
    rows = [imagenet.inspect(tmp_path, found) for found in imagenet.find(tmp_path)]
    imagenet.check(tmp_path, rows)
    assert imagenet.counts(rows) == {
        "train": {WNIDS[0]: 2, WNIDS[1]: 2},
        "val": {WNIDS[0]: 1, WNIDS[1]: 2},
    }
    second = "ILSVRC2012_val_00000002.JPEG"
    assert (tmp_path / "val" / WNIDS[0] / second).read_bytes() == images[second]


def test_cifars_archive_becomes_the_folder(tmp_path: Path) -> None:
    generated.ensure(tmp_path / "drawn", "cifar10", GeneratedCifar10(train=20, test=10))
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as tar:
        tar.add(tmp_path / "drawn" / cifar10.FOLDER, cifar10.FOLDER)
    cifar10.unpack_archives(tmp_path)
    ours, theirs = (
        cifar10.read_split(root, None, "test") for root in (tmp_path, tmp_path / "drawn")
    )
    assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_cityscapes_zips_become_the_tree(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    generated.ensure(drawn, "cityscapes", GeneratedCityscapes(train=2, val=1, height=32, width=64))
    for kind, name in cityscapes.ARCHIVES.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("README", "")
            archive.writestr("license.txt", "")
            for file in (drawn / kind).rglob("*.png"):
                archive.write(file, file.relative_to(drawn))
    cityscapes.unpack_archives(tmp_path)
    assert cityscapes.find(tmp_path) == cityscapes.find(drawn)


def test_a_whole_archive_in_the_place_of_an_incomplete_one_is_unpacked(tmp_path: Path) -> None:
    def unpacked() -> int:
        imagenet.unpack_archives(tmp_path)
        return len(list(tmp_path.rglob("*.JPEG")))

    (tmp_path / TRAIN).write_bytes(nested(1))
    assert unpacked() == 2
    (tmp_path / TRAIN).write_bytes(nested(3))
    assert unpacked() == 6
    extra = tmp_path / "train" / WNIDS[0] / "mine.JPEG"
    extra.write_bytes(jpeg())
    (tmp_path / TRAIN).write_bytes(nested(2))
    with pytest.raises(UserError, match="train: was unpacked from another .* delete .*train"):
        unpacked()
    assert extra.is_file()
    (tmp_path / TRAIN).unlink()
    assert unpacked() == 7  # without an archive the folder is the user's
    assert left(tmp_path) == ["train"]


def test_a_users_own_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / TRAIN).write_bytes(nested(1))
    imagenet.unpack_archives(tmp_path)
    assert not any((tmp_path / "train").iterdir())


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "FIFOTYPE", "GNUTYPE_SPARSE"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / TRAIN, "w") as tar:
        add(tar, "n01440764.tar", b"", getattr(tarfile, kind))
    with pytest.raises(UserError, match=r"holds 'n01440764\.tar'|cannot be unpacked"):
        imagenet.unpack_archives(tmp_path)
    assert left(tmp_path) == [TRAIN]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "member",
    ["../evil", "/evil", "x/../../evil", f"{cifar10.FOLDER}/../../evil", "gtFine/val/x/evil.sh"],
)
def test_names_that_do_not_belong_are_refused(tmp_path: Path, name: str, member: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if name.endswith(".zip"):
        with zipfile.ZipFile(root / name, "w") as archive:
            archive.writestr(member, "x")
    else:
        with tarfile.open(root / name, "w:gz" if name.endswith("gz") else "w") as tar:
            add(tar, member, b"x")
    with pytest.raises(UserError, match="evil"):
        FORMATS[name].unpack_archives(root)
    assert left(root) == [name] and left(tmp_path) == ["root"]


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / GTFINE, "w") as archive:
        member = zipfile.ZipInfo("gtFine/train/x/link.png")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(UserError, match=r"link\.png"):
        cityscapes.unpack_archives(tmp_path)
    assert left(tmp_path) == [GTFINE]


def a_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def a_tar_of_one(path: Path, name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))


def an_inner_bomb(path: Path) -> None:
    inner = tarfile.TarInfo("n01440764_1.JPEG")
    inner.size = 2**40
    with tarfile.open(path, "w") as tar:
        add(tar, "n01440764.tar", inner.tobuf(tarfile.GNU_FORMAT) + bytes(512))


def a_huge_header(path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 14 * 2**30
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(15 * 2**30)  # sparse


MANY = {f"gtFine/train/x/{i}.png": bytes(2**22) for i in range(20)}
BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one member": (GTFINE, lambda path: a_zip(path, {"gtFine/train/x/b.png": bytes(2**26 + 1)})),
    "all members": (GTFINE, lambda path: a_zip(path, MANY)),
    "a batch": (
        cifar10.ARCHIVE,
        lambda path: a_tar_of_one(path, f"{cifar10.FOLDER}/test_batch", 2**40),
    ),
    "an inner image": (TRAIN, an_inner_bomb),
    "a header": (TRAIN, a_huge_header),
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


def test_no_cut_of_an_archive_passes_for_the_whole(tmp_path: Path) -> None:
    """Not one between two members either, where tarfile itself sees nothing wrong."""
    whole = nested(1)
    ends = {0, 100, 512, len(whole) // 2}
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends |= {tar.getmembers()[1].offset, tar.getmembers()[1].offset + 100}
    for end in ends:
        (tmp_path / TRAIN).write_bytes(whole[:end])
        with pytest.raises(UserError, match=TRAIN):
            imagenet.unpack_archives(tmp_path)
        assert left(tmp_path) == [TRAIN]


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path: Path) -> None:
    a_zip(tmp_path / GTFINE, {"gtFine/train/x/a.png": os.urandom(4000)})
    content = bytearray((tmp_path / GTFINE).read_bytes())
    content[2000] ^= 1
    (tmp_path / GTFINE).write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        cityscapes.unpack_archives(tmp_path)
    assert left(tmp_path) == [GTFINE]


def test_validation_images_need_the_devkit(tmp_path: Path) -> None:
    validation(tmp_path)
    (tmp_path / imagenet.DEVKIT).unlink()
    with pytest.raises(UserError, match=f"{imagenet.DEVKIT}: cannot be read"):
        imagenet.unpack_archives(tmp_path)
    assert left(tmp_path) == [VAL]
