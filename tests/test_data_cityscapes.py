"""Cityscapes: pairs from the tree, the official label ids, crops that keep image and label together."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels as official

from pipeline.data import cityscapes, generated
from pipeline.data.cityscapes import IGNORE, Cityscapes
from pipeline.data.loading import Keys
from pipeline.data.manifest import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generated.ensure(tmp_path / "cs", generated.GeneratedCityscapes(train=3, val=2, height=32, width=64))
    return tmp_path / "cs"


def write_pair(root: Path, stem: str, image: np.ndarray, ids: np.ndarray) -> None:
    for kind, end, picture in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", ids)):
        path = root / kind / f"{stem}_{end}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)


def test_classes_and_train_ids_are_the_official_ones() -> None:
    table = cityscapes.train_ids()
    for label in official:
        if label.id >= 0:
            assert table[label.id] == (label.trainId if 0 <= label.trainId < 19 else IGNORE), label.name
    assert set(table[[i for i in range(256) if i not in {label.id for label in official}]]) == {cityscapes.UNKNOWN}
    assert len(cityscapes.class_names()) == 19
    assert (cityscapes.class_names()[0], cityscapes.class_names()[18]) == ("road", "bicycle")
    assert cityscapes.colours()[13].tolist() == [0, 0, 142]
    assert cityscapes.colours()[IGNORE].tolist() == [0, 0, 0]


def test_pairs_are_found_from_the_tree_among_other_files(root: Path) -> None:
    found = cityscapes.find(root)
    assert [one.split for one in found] == ["train"] * 3 + ["val"] * 2
    folder = root / "gtFine" / "train" / "aachen"
    for other in ("x_gtFine_color.png", "x_gtFine_instanceIds.png", "x_gtFine_polygons.json", ".DS_Store"):
        (folder / other).write_bytes(b"")
    (root / "leftImg8bit" / "test").mkdir()
    assert cityscapes.find(root) == found


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_a_file_without_partner_is_named(root: Path, kind: str) -> None:
    lost = next((root / kind / "val").rglob("*.png"))
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost.name}: no such file, but its partner is there"):
        cityscapes.find(root)


def test_wrong_sizes_ids_and_files_are_named(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    cases = {
        "size": (image, np.full((8, 15), 7, np.uint8), "15 x 8 pixels, but its image has 16 x 8"),
        "id": (image, np.full((8, 16), 34, np.uint8), "label id 34 is none"),
        "colour": (image, np.full((8, 16, 3), 7, np.uint8), "one-channel"),
        "deep": (image, np.full((8, 16), 7, np.uint16), "8-bit"),
    }
    for name, (picture, ids, message) in cases.items():
        write_pair(tmp_path, f"train/{name}/{name}_0", picture, ids)
        files = (
            f"leftImg8bit/train/{name}/{name}_0_leftImg8bit.png",
            f"gtFine/train/{name}/{name}_0_gtFine_labelIds.png",
        )
        with pytest.raises(DataError, match=message) as caught:
            cityscapes.inspect(tmp_path, cityscapes.Found("train", files))
        assert f"{name}_0_gtFine_labelIds.png" in str(caught.value)
    broken = tmp_path / files[0]
    broken.write_bytes(broken.read_bytes()[:-35])
    with pytest.raises(DataError, match="deep_0_leftImg8bit"):
        cityscapes.inspect(tmp_path, cityscapes.Found("train", files))


def test_rows_count_the_pixels(root: Path) -> None:
    rows = [cityscapes.inspect(root, found) for found in cityscapes.find(root)]
    for row in rows:
        assert sum(int(row[name]) for name in (*cityscapes.class_names(), "ignored")) == 32 * 64
    ids = cv2.imread(str(root / str(rows[0]["label_path"])), cv2.IMREAD_UNCHANGED)
    assert rows[0]["road"] == (ids == 7).sum()


def test_generated_streets_show_every_class(tmp_path: Path) -> None:
    from pipeline.data.scenes import street

    shares = [np.bincount(street(np.random.default_rng(i), 64, 128)[1].ravel(), minlength=34) for i in range(40)]
    ids = np.array([label.id for label in official if 0 <= label.trainId < 19])
    assert (np.stack(shares)[:, ids] > 0).sum(0).min() >= 5
    assert all(share[cityscapes.train_ids()[:34] == IGNORE].sum() > 0 for share in shares[:3])


def test_scales_are_the_published_ones_and_labels_follow_the_image() -> None:
    label = np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(8, 0).repeat(8, 1) % 19  # (64, 64)
    image = np.stack([label * 10] * 3, -1)
    seen = set()
    for seed in range(60):
        cut_image, cut_label = cityscapes.augmented(image, label, (48, 80), np.random.default_rng(seed))
        assert cut_image.shape == (48, 80, 3)
        assert cut_label.shape == (48, 80)
        inside = cut_label != IGNORE
        agree = np.abs(cut_image[inside][:, 0].astype(int) - 10 * cut_label[inside].astype(int)) < 6
        assert agree.mean() > 0.5  # all but the blurred edges of the squares
        assert not cut_image[~inside].any()
        seen.add(int(inside.any(0).sum()))
    assert min(seen) == 32 and max(seen) == 80


def test_evaluation_is_the_whole_picture_optionally_resized(root: Path, manifest_of: Callable) -> None:
    manifest = manifest_of(cityscapes, root)
    whole = Cityscapes(root, manifest, "val")
    images, targets = whole[Keys(0, [1, 0])]
    assert images.shape == (2, 3, 32, 64)
    assert targets.shape == (2, 32, 64)
    assert targets.dtype == torch.int64
    assert set(targets.unique().tolist()) <= {*range(19), IGNORE}
    half = Cityscapes(root, manifest, "val", test_size=(16, 32))
    assert half[Keys(0, [0])][1].shape == (1, 16, 32)
    assert set(half[Keys(0, [0])][1].unique().tolist()) <= set(targets.unique().tolist())
    ids = cv2.imread(str(root / whole.files[0][1]), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(targets[1], cityscapes.train_ids()[ids])


def test_pictures_of_several_sizes_need_a_test_size(root: Path, manifest_of: Callable) -> None:
    write_pair(root, "val/ulm/ulm_1", np.zeros((20, 30, 3), np.uint8), np.full((20, 30), 7, np.uint8))
    manifest = manifest_of(cityscapes, root)
    with pytest.raises(DataError, match="several sizes"):
        Cityscapes(root, manifest, "val")[Keys(0, [0, 1, 2])]
    resized = Cityscapes(root, manifest, "val", test_size=(16, 24))
    assert resized[Keys(0, [0, 1, 2])][0].shape == (3, 3, 16, 24)


def test_the_official_zips_become_the_tree(root: Path, tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.mkdir()
    for kind, name in cityscapes.ARCHIVES.items():
        with zipfile.ZipFile(user / name, "w") as zipped:
            zipped.writestr("README", "")
            zipped.writestr("license.txt", "")
            for file in (root / kind).rglob("*.png"):
                zipped.write(file, file.relative_to(root))
    cityscapes.unpack(user)
    assert cityscapes.find(user) == cityscapes.find(root)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "gtFine/train/../../evil.png", "gtFine/train/x/evil.sh", "link"]
)
def test_zips_that_reach_outside_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / cityscapes.ARCHIVES["gtFine"], "w") as zipped:
        member = zipfile.ZipInfo("gtFine/train/x/evil.png" if name == "link" else name)
        if name == "link":
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(member, "/etc/passwd")
    with pytest.raises(DataError, match="evil"):
        cityscapes.unpack(root)
    assert not [path for path in tmp_path.rglob("evil*")]
    assert not (root / "gtFine").exists()


def test_download_wants_an_account_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CITYSCAPES_USERNAME", raising=False)
    with pytest.raises(DataError, match="CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD"):
        cityscapes.download(tmp_path)


def test_download_answers_the_official_tool_and_goes_on_where_it_was_cut(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cityscapesscripts.download import downloader

    asked, user = [], tmp_path / "user"

    def login() -> str:
        asked.append(
            (
                downloader.input("name: "),
                downloader.getpass.getpass("password: "),
                downloader.input("store? "),
            )
        )
        return "session"

    def download_packages(*, session: str, package_names: list[str], destination_path: str, resume: bool) -> None:
        assert (session, resume) == ("session", True)
        target = Path(destination_path, package_names[0])
        if not target.exists():
            target.write_bytes(b"half")
            raise ConnectionError("cut")
        kind = package_names[0].split("_")[0]
        with zipfile.ZipFile(target, "w") as zipped:
            for file in (root / kind).rglob("*.png"):
                zipped.write(file, file.relative_to(root))

    monkeypatch.setattr(downloader, "login", login)
    monkeypatch.setattr(downloader, "download_packages", download_packages)
    monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "secret")
    for _ in range(2):
        with pytest.raises(DataError, match=r"csDownload failed \(cut\)") as caught:
            cityscapes.download(user)
        assert "secret" not in str(caught.value)
    cityscapes.download(user)
    assert asked == [("me", "secret", "n")] * 3
    assert cityscapes.find(user) == cityscapes.find(root)
