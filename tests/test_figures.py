"""Figures: they show what they were given, take names of any characters, give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline import figures
from tests.test_report import contrast

NAME = "_a$x_1$ <b>&\"'\x1b 猫 " + "long " * 20
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 255, (3, 3)).astype(np.uint8)
LABELS = np.array([[0, 1], [2, 255]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
NAMES = (NAME, "b", "c")
HISTORY = pd.DataFrame(
    {"seed": [0, 0, 1, 1], "epoch": [1, 2, 1, 2], "eval/top1": [10.0, 50.0, 20.0, 60.0],
     "eval/top1_unrolled": [9.0, None, 9.0, None], "loss/train_epoch": [2.0, 1.0, 2.0, 1.0],
     "time/seconds": [1800, 3600, 1800, 3600]}
)  # fmt: skip
TRACE = pd.DataFrame(
    [("broyden", b, k, 0.5**k, 0.4**k) for b in (0, 1) for k in range(1, 9)],
    columns=["solver", "batch", "evaluation", "change", "residual"],
)
TIMES = pd.DataFrame(
    {"model": ["mdeq", NAME] * 3, "round": [0, 0, 1, 1, 2, 2], "seconds": [2.0, 1, 6, 2, 4, 4]}
)
BY_STEPS = pd.DataFrame({"evaluations": [1, 2], "accuracy": [20.0, 61.5], "residual": [0.5, 0.02]})


def overview(truth: np.ndarray) -> Figure:
    shares = RANDOM.dirichlet(np.ones(3), truth.shape)
    z = [RANDOM.random((16, 16, 5)), RANDOM.random((8, 8, 1))]
    looks = {k: (z, np.moveaxis(shares, -1, 0)) for k in (2, 4)}
    curves = {"broyden": [0.5, 0.1, 0.02, 0.01], "fixed_point": [0.5, 0.4, 0.3]}
    return figures.overview(RANDOM.random((16, 16, 3)), truth, looks, curves, NAMES, COLOURS)


MADE: dict[str, Callable[[], Figure]] = {
    "training_curves": lambda: figures.training_curves(HISTORY, NAME),
    "figure4a": lambda: figures.figure4a({NAME: HISTORY}),
    "core_hours": lambda: figures.accuracy_by_core_hours({NAME: HISTORY}, cores=2),
    "by_evaluations": lambda: figures.accuracy_by_evaluations({NAME: BY_STEPS}),
    "figure5": lambda: figures.figure5({NAME: TRACE}),
    "figure5 of two": lambda: figures.figure5({NAME: TRACE, "CIFAR-10": TRACE}),
    "figure4b": lambda: figures.figure4b(TIMES, {"mdeq": 2.0, NAME: 8.0}, NAME, NAME),
    "confusion": lambda: figures.confusion(np.diag([5, 3, 0]), NAMES, NAME),
    "classified": lambda: figures.classified(
        RANDOM.random((2, 8, 8, 3)), [0, 1], RANDOM.dirichlet(np.ones(3), 2), NAMES, NAME
    ),
    "segmented": lambda: figures.segmented(
        [RANDOM.random((16, 16, 3))], [LABELS], [LABELS], NAMES, COLOURS, NAME
    ),
    "overview of a class": lambda: overview(np.array(0)),
    "overview of pixels": lambda: overview(LABELS),
}


def words(figure: Figure, path: Path) -> list[str]:
    """The texts of the figure as SVG."""
    figures.save(figure, path)
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


@pytest.mark.parametrize("name", MADE)
def test_any_name_is_drawn_as_it_is(name: str, tmp_path: Path) -> None:
    shown = words(MADE[name](), tmp_path / "x.svg")
    if not name.startswith("overview of pixels"):  # which names no class
        assert any(text.startswith("_a$x_1$ <b>&") for text in shown)
    assert all("\x1b" not in text for text in shown)
    figures.save(MADE[name](), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 300 and len(image.convert("L").getcolors(1 << 16) or []) > 10


def test_a_figure_gives_the_same_bytes_and_follows_the_viewers_scheme(tmp_path: Path) -> None:
    for kind in ("png", "svg"):
        contents = []
        for folder in ("a", "b"):
            path = tmp_path / folder / f"x.{kind}"
            figures.save(MADE["figure5"](), path)
            contents.append(path.read_bytes())
        assert contents[0] == contents[1]
    text = contents[0].decode()
    assert "prefers-color-scheme: dark" in text and figures.INK not in text.partition("</style>")[2]


def test_labels_name_the_models_and_their_last_values(tmp_path: Path) -> None:
    histories = {"resnet101": HISTORY.assign(**{"eval/top1": 54.9}), "mdeq-small": HISTORY}
    for draw in (figures.figure4a, figures.accuracy_by_core_hours):
        shown = words(draw(histories), tmp_path / "x.svg")
        assert shown[-2:] == ["MDEQ-small  55", "ResNet-101  54.9"]  # means over the seeds
    shown = words(figures.accuracy_by_evaluations({"mdeq": BY_STEPS}), tmp_path / "x.svg")
    assert {"MDEQ  61.5", "MDEQ  0.02"} <= set(shown)


def test_core_hours_are_hours_times_cores() -> None:
    (axes,) = figures.accuracy_by_core_hours({"mdeq": HISTORY}, cores=2).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 15], [2, 55]]


def test_titles_stay_apart_and_compared_panels_have_the_same_axis() -> None:
    other = TRACE.assign(residual=TRACE["residual"] * 100)
    figure = figures.figure5({"A data set of a long name": TRACE, "Another one, as long": other})
    figure.draw_without_rendering()
    grid = np.array(figure.axes).reshape(2, 2)
    boxes = [axes._left_title.get_window_extent() for axes in grid[0]]
    assert boxes[0].x1 <= boxes[1].x0
    for row in grid:
        assert row[0].get_ylim() == row[1].get_ylim()


def test_time_is_relative_within_each_round_with_its_spread() -> None:
    relative = figures.relative_times(TIMES, NAME)
    assert relative["mdeq"].tolist() == [2, 3, 1] and relative[NAME].tolist() == [1, 1, 1]
    left, right = figures.figure4b(TIMES, {"mdeq": 2.0, NAME: 8.0}, NAME).axes
    assert [bar.get_width() for bar in left.patches] == [1, 2]
    assert [bar.get_width() for bar in right.patches] == [1, 0.25]
    ends = np.array([segment[:, 0] for segment in left.collections[0].get_segments()])
    assert ends.tolist() == [[1, 1], [1, 3]]  # from the fastest round to the slowest


def test_the_colours_stand_out_on_light_and_dark_pages() -> None:
    grounds = re.findall(r"background: #(\w{6})", figures._SCHEMES)
    assert len(grounds) == 2
    for colour in figures.CYCLE:
        for ground in grounds:
            assert contrast(colour[1:], ground) >= 3, (colour, ground)


def test_states_are_coloured_by_their_directions() -> None:
    z = np.zeros((4, 4, 6))
    z[:2] = (3, 0, 0, 0, 0, 0)
    rgb = figures.coloured(z, z)
    assert rgb.shape == (4, 4, 3) and (rgb >= 0).all() and (rgb <= 1).all()
    assert (rgb[0] == rgb[1]).all() and abs(rgb[0] - rgb[3])[:, 0].min() == 1
