"""Every figure of the results: pure functions of arrays and tables. `save` writes PNG and SVG.

Names of models, classes and data may hold any characters; none is read as mathematics or markup.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from pipeline.errors import escaped
from pipeline.files import write
from pipeline.sets import SETS

Array = np.ndarray
Tables = Mapping[str, pd.DataFrame]

# fmt: off
NAMES = {name: known.title for name, known in SETS.items()} | {
    "alexnet": "AlexNet", "anode": "ANODE", "deeplabv3": "DeepLabv3", "densenet264": "DenseNet-264",
    "dilated-resnet": "Dilated ResNet", "hrnet-w18": "HRNet-W18", "hrnet-w48": "HRNet-W48",
    "mdeq": "MDEQ", "mdeq-small": "MDEQ-small", "mdeq-large": "MDEQ-large", "mdeq-xl": "MDEQ-XL",
    "mdeq-large-unrolled": "Unrolled MDEQ-large", "mobilenetv2": "MobileNetV2", "pspnet": "PSPNet",
    "node": "Neural ODE", "resnet18": "ResNet-18", "resnet18-small": "ResNet-18 small",
    "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "single-stream": "Single-stream DEQ", "unetplusplus": "U-Net++", "wide-resnet50": "W-ResNet-50",
    "anderson": "Anderson", "broyden": "Broyden", "fixed_point": "iterating f",
}
"""What people call a data set, model or solver, by its key."""

# At least 3 : 1 against white and against the dark page, as WCAG asks of graphics.
BLUE, YELLOW = "#2f7fd1", "#b98900"
CYCLE = (BLUE, YELLOW, "#2f9e77", "#d1495b", "#8b6cc9", "#7d848e", "#0f9191", "#cc5f9b", "#6675d6")
INK, DARK = "#1b1f23", "#1c2024"  # INK is light on a dark page, DARK stays dark
SIZE, SMALL, TINY = 9.5, 8.5, 7.0  # points
RESIDUAL, CHANGE = "|f(z) - z| / |f(z)|", "|z[k+1] - z[k]| / |z[k]|"
EVALUATIONS = "evaluations of f"

_SCRIPTS = {"Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari"}
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_SETTINGS: Any = dict.fromkeys(_INKED, INK) | {
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
    "axes.titlesize": SIZE, "axes.titleweight": "bold", "figure.titlesize": SIZE,
    "figure.titleweight": "bold", "font.size": SIZE,
    "font.sans-serif": ["DejaVu Sans", *sorted(_SCRIPTS & set(get_font_names()))],
    "legend.fontsize": SMALL, "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 3.5, "svg.fonttype": "none", "svg.hashsalt": "mdeq",
    "text.parse_math": False, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
}
# fmt: on
_SCHEMES = (
    f"<style>:root {{ color: {INK}; background: #ffffff }} @media (prefers-color-scheme: dark) "
    "{ :root { color: #e6e9ed; background: #171b21 } }</style>"
)


def display(name: object, length: int = 60) -> str:
    """What people call a model, solver or data set: at most `length` printable characters."""
    shown = escaped(NAMES.get(str(name), str(name)))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as .png, on white, or as .svg, light or dark as its viewer prefers.

    The same figure always gives the same bytes. Raises UserError if it cannot be written.
    """
    kind = path.suffix[1:]
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=kind, dpi=150, transparent=kind == "svg")
    content = buffer.getvalue()
    if kind == "svg":
        text = content.decode().replace(INK, "currentColor")
        content = re.sub(r"<metadata>.*?</metadata>", _SCHEMES, text, flags=re.DOTALL).encode()
    write(path, content)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that no font here has
        yield


@dataclass(frozen=True)
class Panel:
    """One plot: by label a frame with x as its index and one column per sample (seed, batch)."""

    title: str
    curves: Tables
    ylabel: str = ""
    log: bool = False


def lines(panels: Sequence[Panel], xlabel: str, rows: int = 1, share: bool = False) -> Figure:
    """Panels in rows of equal length, the labels right of them in the order of the lines' ends.

    A line is the mean over its samples, its band one standard deviation; its last value stands
    behind its label. With `share` the panels of a row have the same y axis and labels.
    """
    columns = len(panels) // rows
    labels = dict.fromkeys(label for panel in panels for label in panel.curves)
    colours = dict(zip(labels, itertools.cycle(CYCLE), strict=False))
    wide = 3.4 * columns + 2 if share else 5.4 * columns
    with _style():
        figure = Figure(figsize=(wide, 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if share else False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            axes.set(title=display(panel.title), xlabel=xlabel, ylabel=panel.ylabel)
            axes.grid(alpha=0.25)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=3))
            if panel.log:
                _logarithmic(axes)
            for label, samples in panel.curves.items():
                _curve(axes, samples, label, colours[label], "" if share else "  {:.3g}")
            if axes in grid[:, -1] or not share:
                ends = sorted(axes.lines, key=lambda line: -np.asarray(line.get_ydata())[-1])
                words = [str(line.get_label()) for line in ends]  # some begin with _
                axes.legend(ends, words, loc="upper left", bbox_to_anchor=(1, 1.03))
    return figure


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(axes: Axes, samples: pd.DataFrame, label: str, colour: str, value: str) -> None:
    samples = samples.dropna(how="all").sort_index()
    if samples.empty:
        return
    mean, spread = samples.mean(axis=1), samples.std(axis=1, ddof=0)
    words = display(label, 30) + value.format(mean.iloc[-1])
    axes.plot(mean.index, mean, "o-" if len(mean) <= 12 else "-", color=colour, label=words)
    if samples.shape[1] > 1:
        low = np.maximum(mean - spread, samples.min(axis=1))  # a log axis has no 0
        axes.fill_between(mean.index, low, mean + spread, color=colour, alpha=0.22, linewidth=0)


def by_seed(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """A measure of history.csv: one row per epoch, one column per seed; empty if missing."""
    return history.pivot_table(column, "epoch", "seed") if column in history else pd.DataFrame()


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Training loss and validation measures by epoch, from history.csv."""
    validation = {}
    for key, label in {"top1": "top-1", "top5": "top-5", "miou": "mIoU"}.items():
        validation[label] = by_seed(history, f"eval/{key}")
        validation[f"{label}, unrolled"] = by_seed(history, f"eval/{key}_unrolled")
    loss = {"training": by_seed(history, "loss/train_epoch")}
    panels = [Panel(f"{title}: loss", loss), Panel("validation, %", validation)]
    return lines(panels, "epoch")


def figure4a(histories: Tables) -> Figure:
    """Figure 4a: test accuracy by epoch, from each model's history.csv."""
    curves = {name: by_seed(table, "eval/top1") for name, table in histories.items()}
    return lines([Panel("test accuracy, %", curves)], "epoch")


def accuracy_by_core_hours(histories: Tables, cores: int | None = None) -> Figure:
    """Test accuracy by hours of training times `cores`, from each model's history.csv."""
    curves = {}
    for name, table in histories.items():
        accuracy = by_seed(table, "eval/top1")
        hours = by_seed(table, "time/seconds").mean(axis=1) * (cores or 1) / 3600
        curves[name] = accuracy.set_axis(hours.reindex(accuracy.index))
    panel = Panel("test accuracy, %", curves)
    return lines([panel], "core-hours" if cores else "hours of training")


def accuracy_by_evaluations(by_steps: Tables) -> Figure:
    """Accuracy and residual of solves stopped after so many evaluations of f, from by_steps.csv."""
    tables = {name: table.set_index("evaluations") for name, table in by_steps.items()}
    accuracy = {name: table.filter(["accuracy"]) for name, table in tables.items()}
    residual = {name: table.filter(["residual"]) for name, table in tables.items()}
    left = Panel("test accuracy, %", accuracy)
    right = Panel(f"residual {RESIDUAL}", residual, log=True)
    return lines([left, right], EVALUATIONS)


def figure5(traces: Tables) -> Figure:
    """Figure 5: change and residual by evaluations of f, from trace.csv of each data set.

    There is a column per data set; a single one has both measures side by side.
    """
    panels = []
    for measure, ylabel in (("change", CHANGE), ("residual", RESIDUAL)):
        for name, trace in traces.items():
            solvers = trace.groupby("solver", sort=False)
            curves = {str(s): own.pivot_table(measure, "evaluation", "batch") for s, own in solvers}
            panels.append(Panel(name, curves, ylabel, log=True))
    return lines(panels, EVALUATIONS, rows=min(2, len(traces)), share=True)


def relative_times(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Seconds over the reference's in the same round: one row per round, one column per model."""
    seconds = times.pivot_table("seconds", "round", "model", sort=False)
    return seconds.div(seconds[reference], axis=0)


def figure4b(
    times: pd.DataFrame, memory: Mapping[str, float], reference: str, note: str = ""
) -> Figure:
    """Figure 4b: time and memory of a training step relative to one model; lower is better.

    `times` is times.csv: model, round, seconds. Bars are medians, whiskers the range of the rounds.
    `memory` is in bytes by model, `note` says how it was measured.
    """
    rounds = relative_times(times, reference).iloc[:, ::-1]  # bars are drawn upwards
    time = rounds.median()
    reach = [time - rounds.min(), rounds.max() - time]
    space = [memory[name] / memory[reference] for name in rounds]
    places = range(len(time))
    with _style():
        figure = Figure(figsize=(8, 0.42 * len(places) + 1.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_title(f"time of a step ({len(rounds)} rounds)")
        right.set_title(display(f"memory ({note})" if note else "memory"))
        left.set_yticks(places, [display(name, 24) for name in rounds])
        left.barh(places, time, 0.62, color=BLUE, xerr=reach, ecolor=INK, capsize=3)
        right.barh(places, space, 0.62, color=YELLOW)
        for axes in (left, right):
            axes.bar_label(axes.containers[-1], fmt="%.2f", padding=5)
            axes.axvline(1, color=INK, linewidth=0.7, linestyle=":", zorder=0)
            axes.set(xlabel=f"relative to {display(reference, 24)}", xmargin=0.2)
    return figure


def confusion(counts: Array, names: Sequence[str], title: str) -> Figure:
    """The shares of each true class's predictions, printed where there are at most 20 classes."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(names) <= 20
    side = max(5, 0.36 * len(names) + 2.8) if few else 8
    with _style():
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        if few:
            places, shown = range(len(names)), [display(name, 18) for name in names]
            axes.set_xticks(places, shown, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(places, shown)
            look: Any = {"ha": "center", "va": "center", "fontsize": TINY}
            for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
                value = share[row, column]
                colour = "white" if value > 0.5 else DARK
                axes.text(column, row, f"{100 * value:.0f}", color=colour, **look)
        axes.set(xlabel="predicted", ylabel="true", title=display(title, 100))
        figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    return figure


def classified(
    images: Array, truths: Sequence[int], probabilities: Array, names: Sequence[str], title: str
) -> Figure:
    """Images (N, H, W, 3) in 0..1 with their class, and the three most probable answers as bars."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    with _style():
        figure = Figure(figsize=(1.75 * columns, 2.55 * rows + 0.4), layout="constrained")
        figure.suptitle(display(title, 100), x=0.01, ha="left")
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1.75, 0.8] * rows)
        for index, (image, truth) in enumerate(zip(images, truths, strict=True)):
            row, column = 2 * (index // columns), index % columns
            _picture(figure.add_subplot(grid[row, column]), image, display(names[truth], 18))
            answer = figure.add_subplot(grid[row + 1, column])
            _answers(answer, probabilities[index], truth, names)
    return figure


def _picture(axes: Axes, picture: Array, title: str = "") -> None:
    axes.imshow(picture, interpolation="nearest" if len(picture) <= 128 else None)
    axes.set_title(title, pad=4)
    axes.set_axis_off()


def _answers(axes: Axes, probabilities: Array, truth: int, names: Sequence[str]) -> None:
    """The three most probable classes as bars, green where right."""
    look: Any = {"va": "center", "fontsize": TINY, "color": DARK}
    for place, label in enumerate(np.argsort(-probabilities)[:3]):
        colour = "#86cdae" if label == truth else "#eeb0b8"
        axes.barh(place, 1, color="#eef0f3")
        axes.barh(place, float(probabilities[label]), color=colour)
        axes.text(0.03, place, display(names[label], 14), **look)
        axes.text(0.97, place, f"{100 * probabilities[label]:.0f}", ha="right", **look)
    axes.set(xlim=(0, 1), ylim=(2.5, -0.5))
    axes.set_axis_off()


def segmented(
    images: Sequence[Array],
    truths: Sequence[Array],
    predictions: Sequence[Array],
    names: Sequence[str],
    colours: Array,
    title: str,
) -> Figure:
    """One row per scene: image, truth, prediction, errors; below them the classes that occur.

    `colours` (classes, 3) uint8; label 255 is black in the truth and left out of the errors.
    """
    palette = _palette(colours)
    found = np.unique(np.concatenate([labels.ravel() for labels in (*truths, *predictions)]))
    present = found[found < len(colours)]
    height, width = truths[0].shape
    tall = len(images) * (2.5 * height / width + 0.1) + 0.6 + 0.22 * -(-len(present) // 8)
    with _style():
        figure = Figure(figsize=(10.4, tall), layout="constrained")
        figure.suptitle(display(title, 100), x=0.01, ha="left")
        grid = figure.subplots(len(images), 4, squeeze=False)
        for row, image, truth, guess in zip(grid, images, truths, predictions, strict=True):
            void = truth == 255
            errors = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.55 + 0.35
            errors[truth != guess] = (0.86, 0.20, 0.24)
            errors[void] = 0.08
            right = 100 * (truth == guess)[~void].mean() if (~void).any() else np.nan
            _picture(row[0], image, "image")
            _picture(row[1], palette[truth], "truth")
            _picture(row[2], palette[guess], "prediction")
            _picture(row[3], errors, f"errors (red): {right:.0f} % right")
        patches = [Patch(color=tuple(colours[label] / 255)) for label in present]
        words = [display(names[label], 18) for label in present]
        figure.legend(patches, words, loc="outside lower center", ncols=8, handlelength=1.1)
    return figure


def _palette(colours: Array) -> Array:
    """The colour of each byte, black beyond the classes."""
    return np.vstack([colours, np.zeros((256 - len(colours), 3), dtype=np.uint8)])


def overview(
    image: Array,
    truth: Array,
    looks: Mapping[int, tuple[Sequence[Array], Array]],
    residuals: Mapping[str, Sequence[float]],
    names: Sequence[str],
    colours: Array,
) -> Figure:
    """What an equilibrium model does: z on its way to z*, its answers, and the residuals.

    Args:
        image, truth: (H, W, 3) in 0..1, and its class () or (H, W).
        looks: After 2, 4, 8, ... evaluations of f: z of each scale (H_i, W_i, C_i), and the
            probabilities (classes,) or (classes, H, W).
        residuals: Of each solver, by evaluation; the looks are the first one's.
        names, colours: Of the classes; the colours (classes, 3) uint8.
    """
    final = looks[max(looks)][0]
    ratio = image.shape[0] / image.shape[1]
    heights = [2 * ratio * 0.5**i for i in range(len(final))]
    heights += [2 * ratio if truth.ndim else 0.7, 1.8]
    with _style():
        size = 2.1 * (1 + len(looks)), sum(heights) + 0.2 * len(heights)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(len(heights), 1 + len(looks), height_ratios=heights)
        _picture(figure.add_subplot(grid[0, 0]), image, "image x")
        if truth.ndim:
            _picture(figure.add_subplot(grid[-2, 0]), _palette(colours)[truth], "the truth")
        for column, (evaluation, (scales, share)) in enumerate(looks.items(), 1):
            for row, (z, last) in enumerate(zip(scales, final, strict=True)):
                title = "" if row else f"z after {evaluation} evaluations"
                _picture(figure.add_subplot(grid[row, column]), coloured(z, last), title)
            answer = figure.add_subplot(grid[-2, column])
            if truth.ndim:
                _picture(answer, colours[share.argmax(0)], "the answer")
            else:
                _answers(answer, share, int(truth), names)
        axes = figure.add_subplot(grid[-1, :], xlabel=EVALUATIONS, ylabel=RESIDUAL)
        for (solver, curve), colour in zip(residuals.items(), CYCLE, strict=False):
            axes.plot(range(1, len(curve) + 1), curve, color=colour, label=display(solver))
        _logarithmic(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(loc="lower left")
    return figure


def coloured(z: Array, final: Array) -> Array:
    """`z` (H, W, C) as RGB (H, W, 3): along the three principal directions of `final`."""
    mean = final.mean((0, 1))
    pixels = (final - mean).reshape(-1, final.shape[-1])
    directions = np.zeros((3, final.shape[-1]))
    found = np.linalg.svd(pixels, full_matrices=False)[2][:3]
    directions[: len(found)] = found  # few pixels or channels span fewer than three
    low, high = np.percentile(pixels @ directions.T, (2, 98), axis=0)
    return np.clip(((z - mean) @ directions.T - low) / np.maximum(high - low, 1e-6), 0, 1)
