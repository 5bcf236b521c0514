"""ImageNet: the tree, the official archives, crops, random access."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.data import generated, imagenet
from pipeline.data.imagenet import ImageNet
from pipeline.data.loading import Keys
from pipeline.data.manifest import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    params = generated.GeneratedImageNet(classes=2, train_per_class=3, val_per_class=2)
    generated.ensure(tmp_path / "imagenet", params)
    return tmp_path / "imagenet"


def jpeg(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(content, "JPEG")
    return content.getvalue()


def test_pictures_have_many_sizes_and_some_are_grayscale(tmp_path: Path) -> None:
    params = generated.GeneratedImageNet(classes=2, train_per_class=60)
    files = [job() for job in generated._imagenet(params)[:30]]
    images = [Image.open(io.BytesIO(content)) for part in files for content in part.values()]
    assert len({image.size for image in images}) > 20
    assert {image.mode for image in images} == {"RGB", "L"}
    assert all(180 <= side <= 400 for image in images for side in image.size)


def test_rows_say_what_is_there(root: Path) -> None:
    rows = [imagenet.inspect(root, found) for found in imagenet.find(root)]
    assert imagenet.counts(rows) == {
        "train": {"n01558993": 3, "n01644373": 3},
        "val": {"n01558993": 2, "n01644373": 2},
    }
    for row in rows:
        assert Image.open(root / str(row["path"])).size == (row["width"], row["height"])
        assert (root / str(row["path"])).stat().st_size == row["bytes"]


def test_what_does_not_belong_or_cannot_be_decoded_is_named(root: Path, manifest_of: Callable) -> None:
    image = next((root / "train/n01558993").iterdir())
    found = imagenet.Found("train", (f"train/n01558993/{image.name}",))
    content = image.read_bytes()
    image.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=image.name):
        imagenet.inspect(root, found)
    image.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=image.name):
        imagenet.inspect(root, found)
    image.write_bytes(content)
    (root / "val/n09999999").mkdir()
    with pytest.raises(DataError, match="n09999999: a class folder without images"):
        imagenet.find(root)
    (root / "val/n09999999/a.JPEG").write_bytes(jpeg())
    with pytest.raises(DataError, match="train/n09999999: no such folder"):
        manifest_of(imagenet, root)
    (root / "val/n09999999/notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt"):
        imagenet.find(root)


def test_evaluation_crops_as_torchvision_does(root: Path, manifest_of: Callable) -> None:
    dataset = ImageNet(root, manifest_of(imagenet, root), "val", size=64)
    short = round(64 * 256 / 224)
    reference = v2.Compose(
        [
            v2.Resize(short),
            v2.CenterCrop(64),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(imagenet.MEAN, imagenet.STD),
        ]
    )
    images, labels = dataset[Keys(0, [0, 1, 2, 3])]
    assert labels.tolist() == [0, 0, 1, 1]
    for i, path in enumerate(dataset.paths):
        expected = reference(Image.open(root / path.decode()).convert("RGB"))
        torch.testing.assert_close(images[i], expected)


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (33, 33)])
def test_random_crops_of_any_shape_fill_the_square(size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(jpeg(size)))
    for seed in range(20):
        assert imagenet.random_resized_crop(image, 24, np.random.default_rng(seed)).size == (24, 24)
    assert imagenet.centre_crop(image, 24).size == (24, 24)


def test_any_colour_space_becomes_rgb(root: Path) -> None:
    for mode in ("L", "CMYK", "RGB"):
        (root / f"{mode}.JPEG").write_bytes(jpeg((50, 40), mode))
        assert imagenet.decode(root, f"{mode}.JPEG").mode == "RGB"


def official_archives(root: Path) -> dict[str, bytes]:
    """Write tiny archives laid out as the official ones; return the validation images by name."""
    from scipy.io import savemat

    with tarfile.open(root / imagenet.TRAIN_ARCHIVE, "w") as outer:
        for wnid in ("n01440764", "n01443537"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in (3, 18):
                    _add(tar, f"{wnid}_{i}.JPEG", jpeg())
            _add(outer, f"{wnid}.tar", inner.getvalue())
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg() for i in (1, 2, 3)}
    with tarfile.open(root / imagenet.VAL_ARCHIVE, "w") as tar:
        for name, content in val.items():
            _add(tar, name, content)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array(
        [(1, "n01440764", "tench", 0), (2, "n01443537", "goldfish", 0), (1001, "n00001740", "entity", 3)],
        dtype=kind,
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    with tarfile.open(root / imagenet.DEVKIT, "w:gz") as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n2\n")
    return val


def _add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
    tar.addfile(member, io.BytesIO(content))


def test_the_official_archives_become_the_tree(tmp_path: Path) -> None:
    val = official_archives(tmp_path)
    imagenet.unpack(tmp_path)
    rows = [imagenet.inspect(tmp_path, found) for found in imagenet.find(tmp_path)]
    imagenet.check(tmp_path, rows)
    assert imagenet.counts(rows) == {
        "train": {"n01440764": 2, "n01443537": 2},
        "val": {"n01440764": 1, "n01443537": 2},
    }
    assert (tmp_path / "val/n01440764/ILSVRC2012_val_00000002.JPEG").read_bytes() == val["ILSVRC2012_val_00000002.JPEG"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../n01440764.tar", tarfile.REGTYPE),
        ("/tmp/n01440764.tar", tarfile.REGTYPE),
        ("n01440764.tar", tarfile.SYMTYPE),
        ("n01440764.tar", tarfile.LNKTYPE),
        ("n01440764.tar", tarfile.CHRTYPE),
    ],
)
def test_archives_that_reach_outside_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / imagenet.TRAIN_ARCHIVE, "w") as tar:
        _add(tar, name, b"" if kind != tarfile.REGTYPE else b"x", kind)
    with pytest.raises(DataError, match="n01440764"):
        imagenet.unpack(root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert not (root / "train").exists()


def test_a_cut_archive_leaves_no_tree_behind(tmp_path: Path) -> None:
    official_archives(tmp_path)
    archive = tmp_path / imagenet.TRAIN_ARCHIVE
    archive.write_bytes(archive.read_bytes()[:6000])
    with pytest.raises(DataError, match=archive.name):
        imagenet.unpack(tmp_path)
    assert not (tmp_path / "train").exists()


def test_download_says_where_to_fetch_it_by_hand(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"https://image-net\.org.*source to folder"):
        imagenet.download(tmp_path)
