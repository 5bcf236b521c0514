"""Malformed data of every kind, each with a message of its own, before training begins."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.data import cifar10, cityscapes, generated, imagenet
from pipeline.data.cityscapes import Cityscapes
from pipeline.data.imagenet import ImageNet
from pipeline.data.loading import Keys, batches
from pipeline.data.manifest import DataError, located, read_summary
from pipeline.machine import Machine
from pipeline.params import PrepareParams
from pipeline.stages import prepare

TRAIN = {
    "cifar10": partial(cifar10.open_cifar10, augment=True, seed=3),
    "imagenet": partial(ImageNet, size=24, augment=True, seed=3),
    "cityscapes": partial(Cityscapes, crop=(16, 24), augment=True, seed=3),
}
PHOTO = Image.effect_noise((40, 30), 60)
NOT_PRINTABLE = "has a character that cannot be printed; rename it"


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    for wnid in ("n01440764", "n01443537"):
        for split, count in (("train", 2), ("val", 1)):
            (root / "imagenet" / split / wnid).mkdir(parents=True)
            for i in range(count):
                (root / "imagenet" / split / wnid / f"{i}.JPEG").write_bytes(encoded(PHOTO))
    generated.ensure(root / "cityscapes", generated.GeneratedCityscapes(train=2, val=1, height=32, width=64))
    generated.ensure(root / "cifar10", generated.GeneratedCifar10(train=10, test=10))
    return root


@pytest.fixture
def machine(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn, tmp_path / "data")
    return Machine(root=tmp_path)


def prepared(name: str, machine: Machine) -> None:
    prepare.run(name, PrepareParams(source="folder"), machine)


def write(content: bytes, name: str = "1.JPEG") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def nested(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "2.JPEG").write_bytes(encoded(PHOTO))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write(encoded(PHOTO)[:500]), "1.JPEG: not a readable image"),
        (write(b""), "1.JPEG: an empty file"),
        (write(b"GIF89a"), "1.JPEG: not a readable image"),
        (write(encoded(PHOTO), "2.txt"), "2.txt: not a .JPEG file; move it out"),
        (write(encoded(Image.new("L", (1, 1)))), "1.JPEG: 1 x 1 pixels: too small for a picture"),
        (write(encoded(Image.new("I;16", (9, 9)), "PNG")), "1.JPEG: more than 8 bits a pixel"),
        (
            write(encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)])),
            "1.JPEG: an animation; keep one frame",
        ),
        (write(encoded(Image.new("1", (9_000, 9_000)), "PNG")), "1.JPEG: 9000 x 9000 pixels: gigantic; scale it down"),
        (write(encoded(Image.new("1", (20_000, 9_000)), "PNG")), "1.JPEG: not a readable image (Image size (180000000"),
        (nested, "more: a folder among the pictures"),
        (lambda folder: (folder / "2.JPEG").symlink_to("nowhere"), "2.JPEG: a link to nothing, or a device"),
        (lambda folder: (folder / "2.JPEG").symlink_to("2.JPEG"), "2.JPEG: a link to nothing, or a device"),
        (lambda folder: os.mkfifo(folder / "2.JPEG"), "2.JPEG: a link to nothing, or a device"),
        (write(encoded(PHOTO), "a\nb.JPEG"), rf"'a\nb.JPEG' {NOT_PRINTABLE}"),
        (write(encoded(PHOTO), os.fsdecode(b"\xe9.JPEG")), rf"'\udce9.JPEG' {NOT_PRINTABLE}"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "n01440764: a class folder without images"),
        (shutil.rmtree, "train/n01440764: no such folder, but the classes of train and val must be the same"),
    ],
)
def test_a_malformed_photo_is_one_line(machine: Machine, spoil: Callable[[Path], object], message: str) -> None:
    spoil(machine.root / "data/imagenet/train/n01440764")
    with pytest.raises(DataError) as caught:
        prepared("imagenet", machine)
    said = str(caught.value)
    assert message in said and "\n" not in said and len(said) < 400
    assert not Path("results").exists()


def test_what_only_looks_odd_is_taken(machine: Machine) -> None:
    """CMYK, PNG inside, EXIF's rotation (ignored), spaces, Unicode and links: ImageNet has some of these."""
    folder = machine.root / "data/imagenet/train/n01440764"
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "cmyk.JPEG").write_bytes(encoded(PHOTO.convert("CMYK")))
    (folder / "png.JPEG").write_bytes(encoded(PHOTO, "PNG"))
    (folder / "a b, ü \u6f22.JPEG").write_bytes(encoded(PHOTO, exif=turned))
    (folder / "link.JPEG").symlink_to("cmyk.JPEG")
    prepared("imagenet", machine)
    manifest = Path("results/data/imagenet/manifest.csv")
    root = machine.root / "data/imagenet"
    dataset = ImageNet(root, manifest, "train", size=24)
    assert len(dataset) == 4 + 4 and dataset[Keys(0, list(range(8)))][0].isfinite().all()
    rotated = next(i for i in range(8) if "ü" in dataset.name(i))
    assert imagenet.decode(root, dataset.name(rotated)).size == (40, 30)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(machine: Machine) -> None:
    folder = machine.root / "data/imagenet/train/n01440764"
    for path, message in ((folder / "0.JPEG", "cannot be read"), (folder, "cannot be read")):
        path.chmod(0)
        with pytest.raises(DataError, match=f"{path.name}: {message}"):
            prepared("imagenet", machine)
        path.chmod(0o755)


def test_a_scene_that_is_turned_or_of_another_depth(machine: Machine) -> None:
    image = next((machine.root / "data/cityscapes/leftImg8bit/train").rglob("*.png"))
    content = image.read_bytes()
    image.write_bytes(encoded(Image.new("I;16", (64, 32)), "PNG"))
    with pytest.raises(DataError, match=f"{image.name}: more than 8 bits"):
        prepared("cityscapes", machine)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.write_bytes(encoded(Image.open(io.BytesIO(content)), "PNG", exif=turned))
    prepared("cityscapes", machine)
    data = Cityscapes(*located("cityscapes", machine), "train")
    assert data[Keys(0, [0, 1])][0].shape == (2, 3, 32, 64)


@pytest.mark.parametrize("name", TRAIN)
def test_a_byte_that_changes_before_training_is_noticed(machine: Machine, name: str) -> None:
    prepared(name, machine)
    root = machine.root / "data" / name
    files = (path for path in sorted(root.rglob("*")) if "train" in path.parts or path.name == "data_batch_1")
    path = next(path for path in files if path.is_file())
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: not the file of the manifest"):
        TRAIN[name](*located(name, machine), "train")[Keys(0, [0, 1])]


@pytest.mark.parametrize("name", TRAIN)
def test_samples_depend_on_epoch_and_index_alone(machine: Machine, name: str) -> None:
    """Not on their batch, and not on the workers."""
    prepared(name, machine)
    dataset = TRAIN[name](*located(name, machine), "train")
    together, alone = (dataset[Keys(4, indices)] for indices in ([1, 0], [0]))
    assert all(torch.equal(whole[1], single[0]) for whole, single in zip(together, alone, strict=True))
    assert not torch.equal(alone[0], dataset[Keys(5, [0])][0])
    loaders = (batches(dataset, 1, seed=1, epoch=2, shuffle=True, workers=workers) for workers in (0, 2))
    assert torch.equal(*(torch.cat([images for images, _ in loader]) for loader in loaders))
    assert len(TRAIN[name](*located(name, machine), "train", limit=1)) == 1 < len(dataset)


def test_a_manifest_edited_by_hand_is_refused(machine: Machine) -> None:
    prepared("imagenet", machine)
    assert read_summary("imagenet")["source"] == "folder"
    manifest = Path("results/data/imagenet/manifest.csv")
    manifest.write_text(manifest.read_text().replace("n01440764,", "n01443537,", 1))
    with pytest.raises(DataError, match=r"manifest\.csv: not as prepare wrote it"):
        read_summary("imagenet")
    shutil.rmtree("results")
    with pytest.raises(DataError, match="prepare imagenet` first"):
        read_summary("imagenet")


def test_bombs_are_refused_unopened(tmp_path: Path) -> None:
    huge = 2**40
    with zipfile.ZipFile(tmp_path / cityscapes.ARCHIVES["gtFine"], "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("gtFine/train/x/bomb.png", bytes(2**26 + 1))
    member = tarfile.TarInfo(f"{cifar10.FOLDER}/data_batch_1")
    member.size = huge
    outer = tarfile.TarInfo("n01440764.tar")
    inner = tarfile.TarInfo("n01440764_1.JPEG")
    inner.size = huge
    outer.size = 1024
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as tar:
        tar.addfile(member)
    with tarfile.open(tmp_path / imagenet.TRAIN_ARCHIVE, "w") as tar:
        tar.addfile(outer, io.BytesIO(inner.tobuf(tarfile.GNU_FORMAT) + bytes(512)))
    for unpack, name in (
        (cityscapes.unpack, "bomb.png"),
        (cifar10.unpack, "data_batch_1"),
        (imagenet.unpack, "_1.JPEG"),
    ):
        with pytest.raises(DataError, match=f"{name}' of .* bytes, far more"):
            unpack(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".png", ".JPEG")]


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("gtFine/train/x/a.png", bytes(range(256)) * 40)
    spoiled = bytearray(content.getvalue())
    spoiled[60:90] = bytes([255] * 30)  # within the compressed stream, which has no checksum of its own
    for name, unpack in (
        (cifar10.ARCHIVE, cifar10.unpack),
        (imagenet.TRAIN_ARCHIVE, imagenet.unpack),
        (cityscapes.ARCHIVES["gtFine"], cityscapes.unpack),
    ):
        for content in (b"", b"junk" * 300, encoded(PHOTO), bytes(spoiled)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=f"{name}: cannot be unpacked") as caught:
                unpack(tmp_path)
            assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()
