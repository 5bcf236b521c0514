"""Generated data: a function of the seed, drawn again when missing or changed, never over other data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import generated, objects, scenes, shapes
from pipeline.data.cifar10 import CLASSES
from pipeline.data.generated import (
    GeneratedCifar10,
    GeneratedCityscapes,
    GeneratedImageNet,
    ensure,
)
from pipeline.data.manifest import DataError
from pipeline.data.objects import photo
from pipeline.data.scenes import IDS, Scene
from pipeline.data.shapes import DRAWINGS

SMALL = [
    GeneratedCifar10(train=10, test=10),
    GeneratedImageNet(classes=2, train_per_class=1, val_per_class=1),
    GeneratedCityscapes(train=2, val=1, height=32, width=64),
]


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != generated.MARKER
    }


@pytest.mark.parametrize("params", SMALL, ids=lambda params: type(params).__name__)
def test_the_seed_decides_every_byte(tmp_path: Path, params: generated.Generated) -> None:
    for name, changed in (("a", params), ("b", params), ("c", replace(params, seed=1))):
        ensure(tmp_path / name, changed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = contents(tmp_path / "c")
    assert other.keys() == contents(tmp_path / "a").keys()
    assert other != contents(tmp_path / "a")


def test_what_is_whole_is_left_alone_and_what_is_not_is_drawn_again(tmp_path: Path) -> None:
    params = SMALL[1]
    ensure(tmp_path, params)
    before, image = contents(tmp_path), next((tmp_path / "train").rglob("*.JPEG"))
    time = image.stat().st_mtime_ns
    ensure(tmp_path, params)
    assert image.stat().st_mtime_ns == time
    image.touch()
    time = image.stat().st_mtime_ns
    ensure(tmp_path, params)
    assert image.stat().st_mtime_ns == time  # touched, but the same
    image.write_bytes(b"spoilt")
    ensure(tmp_path, params)
    assert contents(tmp_path) == before
    image.unlink()
    ensure(tmp_path, params)
    assert contents(tmp_path) == before
    ensure(tmp_path, replace(params, val_per_class=2))
    assert len(contents(tmp_path)) == len(before) + 2
    ensure(tmp_path, params)
    assert contents(tmp_path) == before


def test_other_code_draws_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(tmp_path, SMALL[1])
    image = next((tmp_path / "train").rglob("*.JPEG"))
    before = image.stat().st_mtime_ns
    read: list[str] = []
    monkeypatch.setattr(generated, "code_digest", lambda files: read.extend(files) or "other")
    ensure(tmp_path, SMALL[1])
    assert image.stat().st_mtime_ns > before
    imported = [module.__file__ for module in (generated, objects, scenes, shapes)]
    assert set(read) == {*imported, str(Path(shapes.__file__).with_name("drawings.txt"))}


def test_drawing_that_was_cut_short_begins_again(tmp_path: Path) -> None:
    (tmp_path / generated.DRAWING / "train").mkdir(parents=True)
    (tmp_path / "train").mkdir()
    ensure(tmp_path, SMALL[1])
    assert not (tmp_path / generated.DRAWING).exists()
    assert len(contents(tmp_path)) == 4


def test_other_peoples_data_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.JPEG").write_bytes(b"precious")
    with pytest.raises(DataError, match="not drawn here"):
        ensure(tmp_path, SMALL[1])
    assert contents(tmp_path) == {"train/mine.JPEG": b"precious"}
    drawn = tmp_path / "drawn"
    ensure(drawn, SMALL[1])
    (drawn / "val" / "mine.JPEG").write_bytes(b"precious")
    for params in (SMALL[1], replace(SMALL[1], seed=9)):
        with pytest.raises(DataError, match=r"val/mine\.JPEG: not one of the generated files"):
            ensure(drawn, params)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_has_no_colour_of_its_own(kind: str) -> None:
    pictures = np.stack([photo(np.random.default_rng(i), kind, 32, 32) for i in range(60)])
    mean = pictures[:, 8:24, 8:24].mean((0, 1, 2))
    assert pictures.shape[1:] == (32, 32, 3)
    assert np.ptp(mean) < 40
    assert pictures.mean((1, 2, 3)).std() > 15


def test_large_pictures_of_odd_sizes() -> None:
    for height, width in ((181, 399), (400, 180)):
        picture = photo(np.random.default_rng(0), "ship", height, width)
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8


def test_every_figure_of_the_street_leaves_its_labels() -> None:
    figures = {name: {part.label for part in parts} for name, parts in DRAWINGS.items() if parts and parts[0].label}
    assert len(figures) > 15
    for name, labels in figures.items():
        scene = Scene(np.random.default_rng(0), 256, 512)
        scene.figure(name, 0, 20)
        assert set(np.unique(scene.ids)) - {0} == {IDS[label] for label in labels}
