"""Cityscapes: pairs from the tree, the official label ids, crops, the official evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels as official

from pipeline.data import cityscapes, generated
from pipeline.data.cityscapes import IGNORE, Split, official_evaluation
from pipeline.data.loading import Chosen, Keys
from pipeline.errors import UserError
from pipeline.sets import SETS
from pipeline.settings import GeneratedCityscapes
from pipeline.train.metrics import ConfusionMatrix

FACTS = SETS["cityscapes"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    params = GeneratedCityscapes(train=3, val=2, height=32, width=64)
    generated.ensure(tmp_path / "cs", "cityscapes", params)
    return tmp_path / "cs"


def pair(stem: str) -> tuple[str, str]:
    return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"


def write_pair(root: Path, stem: str, *pictures: np.ndarray) -> None:
    for path, picture in zip(pair(stem), pictures, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / path), picture)


def test_classes_and_train_ids_are_the_official_ones() -> None:
    table = cityscapes.train_ids()
    known = {label.id for label in official if label.id >= 0}
    for label in official:
        if label.id >= 0:
            expected = label.trainId if 0 <= label.trainId < 19 else IGNORE
            assert table[label.id] == expected, label.name
    assert {int(table[i]) for i in range(256) if i not in known} == {cityscapes.UNKNOWN}
    names = cityscapes.class_names()
    assert (len(names), names[0], names[18]) == (19, "road", "bicycle")
    assert cityscapes.colours()[13].tolist() == [0, 0, 142]
    assert cityscapes.colours()[IGNORE].tolist() == [0, 0, 0]


def test_pairs_are_found_from_the_tree_among_other_files(root: Path) -> None:
    found = cityscapes.find(root)
    assert [path.split("/")[1] for path, _ in found] == ["train"] * 3 + ["val"] * 2
    folder = root / "gtFine" / "train" / "aachen"
    for other in ("x_gtFine_color.png", "x_gtFine_polygons.json", ".DS_Store"):
        (folder / other).write_bytes(b"")
    (root / "leftImg8bit" / "test").mkdir()
    assert cityscapes.find(root) == found


@pytest.mark.parametrize("end", [cityscapes.IMAGE_END, cityscapes.LABEL_END])
def test_a_file_without_partner_is_named(root: Path, end: str) -> None:
    lost = next(path for path in root.rglob(f"*{end}") if "val" in path.parts)
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: no such file, but its partner is there"):
        cityscapes.find(root)


IDS = np.full((8, 16), 7, np.uint8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:, 1:], "15 x 8 pixels, but its image has 16 x 8"),
        (np.full_like(IDS, 34), "label id 34 is none"),
        (np.stack([IDS] * 3, -1), "one-channel"),
        (IDS.astype(np.uint16), "8-bit"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    write_pair(tmp_path, "train/x/x_0", np.zeros((8, 16, 3), np.uint8), ids)
    with pytest.raises(UserError, match=f"x_0_gtFine_labelIds.png: .*{message}"):
        cityscapes.inspect(tmp_path, pair("train/x/x_0"))


def test_rows_count_the_pixels(root: Path) -> None:
    rows = [cityscapes.inspect(root, found) for found in cityscapes.find(root)]
    for row in rows:
        columns = (*cityscapes.class_names(), "ignored")
        assert sum(int(row[name]) for name in columns) == 32 * 64
    ids = cv2.imread(str(root / str(rows[0]["label_path"])), cv2.IMREAD_UNCHANGED)
    assert rows[0]["road"] == (ids == 7).sum()


def test_scales_are_the_published_ones_and_labels_follow_the_image() -> None:
    label = np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(8, 0).repeat(8, 1) % 19
    image = np.stack([label * 10] * 3, -1)
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        own, target = cityscapes.augmented(image, label, (48, 80), rng)
        assert own.shape == (48, 80, 3) and target.shape == (48, 80)
        inside = target != IGNORE
        agree = np.abs(own[inside][:, 0].astype(int) - 10 * target[inside].astype(int)) < 6
        assert agree.mean() > 0.5  # all but the blurred edges of the squares
        assert not own[~inside].any()
        seen.add(int(inside.any(0).sum()))
    assert min(seen) == 32 and max(seen) == 80


def validation(root: Path, manifest: Path, size: list[int] | None = None) -> Chosen:
    samples = Split(root, manifest, "val", {"test_size": size, "crop": [8, 8]})
    return Chosen(samples, FACTS)


def test_evaluation_is_the_whole_picture_optionally_resized(
    root: Path, manifest_of: Callable
) -> None:
    manifest = manifest_of(cityscapes, root)
    whole, half = validation(root, manifest), validation(root, manifest, [16, 32])
    images, targets = whole[Keys(0, [1, 0])]
    assert images.shape == (2, 3, 32, 64)
    assert targets.shape == (2, 32, 64) and targets.dtype == torch.int64
    assert set(targets.unique().tolist()) <= {*range(19), IGNORE}
    assert half[Keys(0, [0])][1].shape == (1, 16, 32)
    assert set(half[Keys(0, [0])][1].unique().tolist()) <= set(targets.unique().tolist())
    ids = cv2.imread(str(root / whole.samples.files[0][2]), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(targets[1], cityscapes.train_ids()[ids])
    path, width, height = whole.frames[0]
    assert (root / path).is_file() and (width, height) == (64, 32)


def test_pictures_of_several_sizes_need_a_test_size(root: Path, manifest_of: Callable) -> None:
    ids = np.full((20, 30), 7, np.uint8)
    write_pair(root, "val/ulm/ulm_1", np.zeros((20, 30, 3), np.uint8), ids)
    manifest = manifest_of(cityscapes, root)
    with pytest.raises(UserError, match="several sizes .*set test_size"):
        validation(root, manifest)[Keys(0, [0, 1, 2])]
    assert validation(root, manifest, [16, 24])[Keys(0, [0, 1, 2])][0].shape == (3, 3, 16, 24)


def test_the_official_tool_scores_predictions_as_we_do(root: Path, manifest_of: Callable) -> None:
    """Class by class: it finds our files by name, reads our ids, and generated instances."""
    samples = Split(root, manifest_of(cityscapes, root), "val", {})
    matrix = ConfusionMatrix(19)
    rng = np.random.default_rng(0)
    folder = root / "predictions"
    for index, frame in enumerate(samples.frames):
        _, truth = samples.sample(index, rng)
        guess = rng.integers(0, 19, truth.shape)
        guess = np.where((truth != IGNORE) & (rng.random(truth.shape) < 0.6), truth, guess)
        cityscapes.write_prediction(folder, frame, guess)
        matrix.add(torch.from_numpy(guess), torch.from_numpy(truth.astype(np.int64)))
    scores = official_evaluation(folder, root / "gtFine/val")
    by_class = [scores["classScores"][name] for name in cityscapes.class_names()]
    ours = matrix.iou()
    present = ~np.isnan(ours)
    assert ours[present] == pytest.approx(np.array(by_class)[present], abs=1e-9)
    assert 0 < scores["averageScoreInstClasses"] <= 1
    assert not hasattr(np, "in1d") or np.in1d is not np.isin
    next(folder.iterdir()).unlink()
    with pytest.raises(UserError, match="no such prediction"):
        official_evaluation(folder, root / "gtFine/val")
