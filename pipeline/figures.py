"""Every picture of the results, as matplotlib figures: pure functions of arrays and tables, no files read.

``save`` writes PNG or SVG by the name's ending; ``inline_svg`` gives markup for a page, whose ink follows the
page's text colour so that the same figure reads on light and on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

BLUE, YELLOW, GREEN, RED, PURPLE, GREY = "#2f7fd1", "#e0a100", "#2f9e77", "#d1495b", "#8b6cc9", "#8a9099"
CYCLE = (BLUE, RED, GREEN, PURPLE, YELLOW, GREY, "#1aa3a3", "#7a4b2a", "#e07bb5", "#4a5bd0")
SOLVER_COLOURS = {"broyden": BLUE, "fixed_point": YELLOW, "anderson": GREEN}
SOLVER_NAMES = {"broyden": "Broyden", "fixed_point": "iterating f", "anderson": "Anderson"}
INK, DARK = "#1b1f23", "#1c2024"  # the page's ink; what stays dark on a dark page
LOSS = "loss/train_epoch"
_MEASURES = {"top1": BLUE, "top5": GREEN, "miou": BLUE, "pixel_accuracy": GREEN}
_BLUES = LinearSegmentedColormap.from_list("blues", ["#f6f9fd", "#a9cbed", "#2f7fd1", "#123b66"])

_SCHEMES = (
    f"<style>:root {{ color: {INK}; background: #ffffff }} "
    "@media (prefers-color-scheme: dark) { :root { color: #e6e9ed; background: #171b21 } }</style>"
)
_SETTINGS: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def _style(changes: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    """The look of all figures, with ``changes``, while it is entered."""
    settings: Any = _SETTINGS | (changes or {})
    return matplotlib.rc_context(settings)


@dataclass(frozen=True)
class Drawn:
    """A figure with its name (of a file, and unique on a page) and its caption."""

    name: str
    figure: Figure
    caption: str


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``: .png on white, .svg as its viewer's scheme is; one figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        head, rest = _svg(figure, path.stem).split(">", 1)
        path.write_text(f"{head}>\n{_SCHEMES}{rest}", encoding="utf-8")
        return
    with _style():
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def inline_svg(figure: Figure, name: str) -> str:
    """``figure`` for a page, in the page's text colour, scaled to its box; ``name`` is unique there."""
    return re.sub(r' (width|height)="[^"]*pt"', "", _svg(figure, name), count=2)


def _svg(figure: Figure, name: str) -> str:
    """Markup without a background, whose ink is the colour of the text around; ids begin with ``name``."""
    buffer = io.StringIO()
    with _style({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace(INK, "currentColor")
    markup = markup.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.S)
    # matplotlib names its own fonts; a reader's own look better
    markup = re.sub(r"font: ([^;\"]*?)'[^\"]*?sans-serif", r"font: \1system-ui, sans-serif", markup)
    return re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found[0]}{name}-", markup)


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Loss and validation measures by epoch (as Figure 4a): the mean over seeds, each seed drawn thin.

    ``history`` is history.csv: a row a seed and epoch, with epoch, loss/train_epoch, any eval/ columns; those
    whose name ends in ``_unrolled`` are dashed.
    """
    measures = _measures(history)
    with _style():
        figure = Figure(figsize=(10.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _curve(left, history, LOSS, BLUE, "training loss")
        left.set(title=title, xlabel="epoch", ylabel="training loss")
        for name in measures:
            _curve(
                right,
                history,
                name,
                _MEASURES[name.removeprefix("eval/").removesuffix("_unrolled")],
                _label(name),
            )
        right.set(title="validation", xlabel="epoch", ylabel="%")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if measures:
            right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def accuracy_by_epoch(histories: Mapping[str, pd.DataFrame], measure: str, ylabel: str) -> Figure:
    """Figure 4a's axes: one validation measure against the epoch, a line a model, a band of one deviation of seeds."""
    with _style():
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, (name, history) in enumerate(histories.items()):
            if measure in history and bool(history[measure].notna().any()):
                _curve(axes, history, measure, CYCLE[index % len(CYCLE)], name)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def figure5_scales(traces: Mapping[str, pd.DataFrame]) -> Figure:
    """The residual of each scale in Broyden's method, means over the batches: a column a data set, a line a scale."""
    with _style():
        figure = Figure(figsize=(3.4 * len(traces) + 0.6, 3.2), layout="constrained")
        cells = figure.subplots(1, len(traces), squeeze=False, sharey="row")[0]
        for axes, (name, trace) in zip(cells, traces.items(), strict=True):
            means: Any = trace[trace["solver"] == "broyden"].groupby("evaluation").mean(numeric_only=True)
            for index, column in enumerate(c for c in means if c.startswith("residual_")):
                axes.plot(means.index, means[column], color=CYCLE[index], label=f"scale {index + 1}")
            _log(axes)
            axes.set(title=name, xlabel="evaluations of f")
            axes.legend(loc="best")
        cells[0].set_ylabel(r"$\Vert f(z)_i - z_i\Vert \, / \, \Vert f(z)_i\Vert$")
    return figure


def figure5_training(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """The validation's mean residual after 2, 4, 8, ... evaluations by epoch: a column a model, a line a number."""
    start = "solver/residual_after_"
    with _style():
        figure = Figure(figsize=(3.4 * len(histories) + 0.6, 3.2), layout="constrained")
        cells = figure.subplots(1, len(histories), squeeze=False)[0]
        for axes, (name, history) in zip(cells, histories.items(), strict=True):
            for index, column in enumerate(c for c in history if c.startswith(start)):
                _curve(axes, history, column, CYCLE[index], column.removeprefix(start))
            _log(axes)
            axes.set(title=name, xlabel="epoch")
            axes.legend(loc="best", title="evaluations")
        cells[0].set_ylabel("residual, the one that stops")
    return figure


def accuracy_by_steps(curves: Mapping[str, Mapping[str, float]]) -> Figure:
    """Test accuracy against the solver's limit on steps, a line a model: {model: {"1": accuracy, ...}}."""
    with _style():
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for index, (name, curve) in enumerate(curves.items()):
            steps = [int(step) for step in curve]
            axes.plot(steps, list(curve.values()), "o-", color=CYCLE[index % len(CYCLE)], label=name, markersize=3.5)
        axes.set(xlabel="limit on the solver's steps", ylabel="test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right")
    return figure


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def figure5(traces: Mapping[str, pd.DataFrame]) -> Figure:
    """Figure 5, a column a data set: above the paper's change |z[k+1] - z[k]| / |z[k]|, below the residual.

    Each trace is tidy: solver, batch, evaluation, change, residual. Lines are means over the batches, bands
    one standard deviation. A single data set has its two plots side by side.
    """
    measures = {
        "change": r"$\Vert z^{[k+1]} - z^{[k]}\Vert \, / \, \Vert z^{[k]}\Vert$",
        "residual": r"$\Vert f(z) - z\Vert \, / \, \Vert f(z)\Vert$",
    }
    shape = (1, 2) if len(traces) == 1 else (2, len(traces))
    with _style():
        width = 8.4 if len(traces) == 1 else 3.4 * len(traces) + 0.6
        figure = Figure(figsize=(width, 3.3 * shape[0]), layout="constrained")
        grid = np.asarray(
            figure.subplots(*shape, squeeze=False, sharex=True, sharey="row" if len(traces) > 1 else "none")
        )
        cells = grid[0][:, None] if len(traces) == 1 else grid
        for column, (name, trace) in enumerate(traces.items()):
            for row, (measure, label) in enumerate(measures.items()):
                axes = cells[row][column]
                _bands(axes, trace, measure)
                axes.set_xlim(left=0)
                if len(traces) == 1 or row == 0:
                    axes.set_title(name if len(traces) > 1 else measure)
                if len(traces) == 1 or row == 1:
                    axes.set_xlabel("evaluations of f")
                if len(traces) == 1 or column == 0:
                    axes.set_ylabel(label)
        if len(traces) == 1:
            figure.suptitle(next(iter(traces)), fontsize=10.5, fontweight="bold", x=0.01, ha="left")
        cells[0][0].legend(loc="best")
    return figure


def overview(
    image: np.ndarray,
    truth: np.ndarray,
    looks: Mapping[int, tuple[Sequence[np.ndarray], np.ndarray]],
    residuals: Mapping[str, Sequence[float]],
    names: Sequence[str],
    colours: np.ndarray,
) -> Figure:
    """What an equilibrium model does: z on the way to z*, what is answered there, and below it the residuals.

    Args:
        image: (H, W, 3) in 0..1.
        truth: The class, () or (H, W).
        looks: At some evaluations of f z of each scale (H_i, W_i, C_i), probabilities (classes,) or (classes, H, W).
        residuals: Of each solver, by evaluation; the looks are the first one's.
        names: Of the classes.
        colours: (classes, 3) uint8, of pixels' classes.
    """
    wide, gap, left, below = 2.0, 0.12, 0.7, 2.0
    tall = wide * image.shape[0] / image.shape[1]
    top, answer = 0.32, tall if truth.ndim else 0.7
    lower = top + 1.5 * tall + gap + 0.32  # where the answers begin
    size = left + (1 + len(looks)) * (wide + gap), lower + answer + below
    bases = [principal(z) for z in looks[max(looks)][0]]
    with _style({"axes.titlesize": 9.5}):
        figure = Figure(figsize=size)

        def place(column: float, y: float, w: float, h: float) -> Axes:
            x = left + column * (wide + gap)
            return figure.add_axes((x / size[0], 1 - (y + h) / size[1], w / size[0], h / size[1]))

        def show(picture: np.ndarray, *box: float, title: str = "") -> None:
            axes = place(*box)
            axes.imshow(picture, interpolation="none", aspect="auto")
            axes.set_title(title)
            axes.set_axis_off()

        show(image, 0, top, wide, tall, title="image x")
        middle = (left + wide / 2) / size[0], 1 - (top + 1.25 * tall + gap / 2) / size[1]
        figure.text(*middle, "z* = f(z*, x)", ha="center", va="center", fontsize=14, style="italic")
        for column, (evaluation, (scales, share)) in enumerate(looks.items(), 1):
            show(coloured(scales[0], bases[0]), column, top, wide, tall, title=f"z after {evaluation} evaluations")
            x = float(column)
            for i in range(1, len(scales)):
                show(coloured(scales[i], bases[i]), x, top + tall + gap / 2, wide / 2**i, tall / 2**i)
                x += (wide / 2**i + gap / 2) / (wide + gap)
            if truth.ndim:
                show(colours[share.argmax(0)], column, lower, wide, answer, title="what it answers")
            else:
                _answers(place(column, lower, wide, answer), share, int(truth), names)
        if truth.ndim:
            show(_palette(colours)[truth], 0, lower, wide, answer, title="the truth")
        # an octave is as wide as a column, so that each look stands above its evaluation
        axes, half = place(0, lower + answer + 0.22, size[0] - left - gap, below - 0.67), wide / (wide + gap) / 2
        for solver, curve in residuals.items():
            colour, label = SOLVER_COLOURS.get(solver, GREY), SOLVER_NAMES.get(solver, solver)
            axes.plot(range(1, len(curve) + 1), curve, color=colour, label=label)
        first = next(iter(residuals))
        seen = [residuals[first][evaluation - 1] for evaluation in looks]
        axes.plot(list(looks), seen, "o", color=SOLVER_COLOURS.get(first, GREY), markersize=5)
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set(xlim=(2**-half, max(looks) * 2**half), xlabel="evaluations of f", ylabel="|f(z) - z| / |f(z)|")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(loc="lower left")
    return figure


def principal(z: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of a feature map (H, W, C): its mean, three principal directions (C, 3), lowest and spread without outliers."""
    flat = z.reshape(-1, z.shape[-1])
    found = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3].T
    directions = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))  # few pixels or channels span fewer
    low, high = np.percentile((flat - flat.mean(0)) @ directions, (2, 98), axis=0)
    return flat.mean(0), directions, low, np.maximum(high - low, 1e-3 * (high - low).max() + 1e-12)


def coloured(z: np.ndarray, base: tuple[np.ndarray, ...]) -> np.ndarray:
    """``z`` (H, W, C) as RGB (H, W, 3): the first direction is brightness, the next two are hue (YCbCr)."""
    mean, directions, low, spread = base
    light, blue, red = np.moveaxis(((z - mean) @ directions - low) / spread, -1, 0)
    light, blue, red = 0.15 + 0.7 * light, 0.45 * (blue - 0.5), 0.45 * (red - 0.5)
    return np.clip(np.stack([light + 1.402 * red, light - 0.344 * blue - 0.714 * red, light + 1.772 * blue], -1), 0, 1)


def figure4b(relative: Mapping[str, Mapping[str, float]], reference: str, memory: str) -> Figure:
    """Figure 4b: bars of time and memory of a training step, relative to ``reference``; ``memory`` says of
    what.
    """
    names = list(relative)
    place = np.arange(len(names))
    with _style():
        figure = Figure(figsize=(max(5.2, 1.3 * len(names) + 1.6), 3.4), layout="constrained")
        axes = figure.subplots()
        for offset, measure, colour in ((-0.2, "time", BLUE), (0.2, "memory", YELLOW)):
            heights = [relative[name].get(measure, float("nan")) for name in names]
            bars = axes.bar(place + offset, heights, width=0.36, color=colour)
            axes.bar_label(bars, [f"{h:.2f}" if np.isfinite(h) else "" for h in heights], padding=2, fontsize=8.5)
        axes.axhline(1, color=INK, linewidth=0.7, linestyle=(0, (2, 4)), alpha=0.6, zorder=0)
        axes.set_xticks(place, [_wrap(name) for name in names])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(f"relative to {reference}")
        axes.margins(y=0.18)
        handles = [Patch(color=c) for c in (BLUE, YELLOW)]
        figure.legend(handles, ["time of a step", memory], loc="outside upper left", ncols=2)
    return figure


def confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """The confusion matrix as shares of each true class; shares are printed where there are at most 20
    classes.
    """
    truth = counts.sum(1, keepdims=True)
    share = np.where(truth > 0, counts / np.maximum(truth, 1), np.nan)
    few = len(names) <= 20
    side = 0.36 * len(names) + 2.4 if few else 8.0
    with _style({"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        colours = _BLUES.with_extremes(bad="#e9eaec")
        image = axes.imshow(share, cmap=colours, vmin=0, vmax=1)
        if few:
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
            for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
                value = share[row, column]
                ink = "white" if value > 0.45 else DARK
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1.0))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.set_label("share of the true class")
        if np.isnan(share).any():
            figure.text(0.99, 0.005, "grey rows: not among the labels", ha="right", va="bottom", fontsize=7.5)
    return figure


def classified(
    images: np.ndarray, truths: Sequence[int], probabilities: np.ndarray, names: Sequence[str], title: str
) -> Figure:
    """Images (N, H, W, 3) in 0..1 with their class, and the three most probable answers as bars below."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    with _style({"axes.grid": False, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(1.75 * columns, 2.55 * rows + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.75, 0.8] * rows)
        for axes in grid.flat:
            axes.set_axis_off()
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            picture, bars = grid[2 * row][column], grid[2 * row + 1][column]
            picture.imshow(image, interpolation="nearest" if image.shape[0] <= 64 else "antialiased")
            picture.set_title(_short(names[truths[index]], 18), loc="center", pad=3)
            _answers(bars, probabilities[index], truths[index], names)
    return figure


def segmented(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    names: Sequence[str],
    colours: np.ndarray,
    title: str,
) -> Figure:
    """A row a scene: image | truth | prediction | errors, with the legend of the classes that occur.

    ``colours`` (classes, 3) uint8; label 255 is drawn black in the truth and left out of the errors.
    """
    height, width = truths[0].shape
    scene = 2.6
    rows = len(images)
    present = [int(label) for label in np.unique(np.stack([*truths, *predictions])) if label != 255]
    legend_rows = -(-len(present) // 8)
    with _style({"axes.grid": False}):
        size = (4 * scene, rows * (scene * height / width + 0.06) + 0.6 + 0.22 * legend_rows)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
        grid = figure.subplots(rows, 4, squeeze=False)
        for row, (image, truth, guess) in enumerate(zip(images, truths, predictions, strict=True)):
            void = truth == 255
            palette = _palette(colours)
            grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.55 + 0.35
            errors = grey.copy()
            errors[(truth != guess) & ~void] = np.array([0.86, 0.20, 0.24])
            errors[void] = 0.08
            for axes, picture in zip(grid[row], (image, palette[truth], palette[guess], errors), strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set_axis_off()
            right = 100 * (truth == guess)[~void].mean() if (~void).any() else float("nan")
            grid[row][3].text(
                0.98, 0.04, f"{right:.0f} % right", transform=grid[row][3].transAxes, ha="right", fontsize=8,
                color="white", bbox={"facecolor": "#1b1f23", "alpha": 0.75, "edgecolor": "none", "pad": 2},
            )  # fmt: skip
        for axes, name in zip(grid[0], ("image", "truth", "prediction", "errors (red)"), strict=True):
            axes.set_title(name, fontsize=9)
        _legend(figure, present, names, colours)
    return figure


def _palette(colours: np.ndarray) -> np.ndarray:
    """Of all bytes the colour, black beyond the classes."""
    return np.vstack([colours, np.zeros((256 - len(colours), 3), dtype=np.uint8)])


def strip(
    frames: Sequence[np.ndarray], predictions: Sequence[np.ndarray], names: Sequence[str], colours: np.ndarray
) -> Figure:
    """Frames of a video (H, W, 3) from left to right, below them their predicted classes (H, W), as in Appendix C."""
    height, width = predictions[0].shape
    present = [int(label) for label in np.unique(np.stack(predictions))]
    with _style({"axes.grid": False}):
        side = 3.2
        size = (side * len(frames), 2 * side * height / width + 0.1 + 0.22 * -(-len(present) // 8))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(2, len(frames), squeeze=False)
        for axes, picture in zip(grid.flat, [*frames, *(colours[labels] for labels in predictions)], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        _legend(figure, present, names, colours)
    return figure


def _legend(figure: Figure, present: Sequence[int], names: Sequence[str], colours: np.ndarray) -> None:
    handles = [Patch(color=tuple(colours[label] / 255)) for label in present]
    labels = [names[label] for label in present]
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=7.5, handlelength=1.1)


def _measures(history: pd.DataFrame) -> list[str]:
    """The validation columns to draw, at the equilibrium and unrolled."""
    return [f"eval/{name}{end}" for name in _MEASURES for end in ("", "_unrolled") if f"eval/{name}{end}" in history]


def _label(column: str) -> str:
    name = column.removeprefix("eval/").removesuffix("_unrolled")
    kind = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "pixel_accuracy": "pixel accuracy"}[name]
    return f"{kind}, unrolled" if column.endswith("_unrolled") else kind


def _curve(axes: Axes, history: pd.DataFrame, column: str, colour: str, label: str) -> None:
    style = (0, (3, 2)) if "unrolled" in column else "-"
    drawn = history[history[column].notna()]
    seeds: Any = drawn.groupby("seed") if "seed" in drawn else [(0, drawn)]
    mean: Any = drawn.groupby("epoch")[column].mean()
    if len(seeds) > 1:
        spread: Any = drawn.groupby("epoch")[column].std()
        axes.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.22, linewidth=0)
        for _, one in seeds:
            axes.plot(one["epoch"], one[column], color=colour, linewidth=0.5, alpha=0.3, linestyle=style)
    marker = "o" if len(mean) <= 12 else None
    axes.plot(mean.index, mean, color=colour, linestyle=style, label=label, marker=marker, markersize=3.5)


def _bands(axes: Axes, trace: pd.DataFrame, measure: str) -> None:
    for solver, own in trace.groupby("solver", sort=False):
        groups: Any = own.dropna(subset=[measure]).groupby("evaluation")[measure]
        mean, std = groups.mean(), groups.std(ddof=0)
        colour = SOLVER_COLOURS.get(str(solver), GREY)
        axes.plot(mean.index, mean, color=colour, label=SOLVER_NAMES.get(str(solver), str(solver)))
        # a mean less its deviation may be negative, which a log axis cannot show: no lower than what was seen
        low = np.maximum(mean - std, groups.min())
        axes.fill_between(mean.index, low, mean + std, color=colour, alpha=0.22, linewidth=0)
    _log(axes)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _answers(axes: Axes, probabilities: np.ndarray, truth: int, names: Sequence[str]) -> None:
    best = [int(label) for label in np.argsort(-probabilities)[:3]]
    place = [-row for row in range(len(best))]
    axes.set_axis_on()
    axes.barh(place, [1] * len(best), color="#eef0f3", height=0.86)
    axes.barh(place, probabilities[best], color=["#86cdae" if k == truth else "#eeb0b8" for k in best], height=0.86)
    for where, label in zip(place, best, strict=True):
        axes.text(0.03, where, _short(names[label], 14), va="center", fontsize=7, color=DARK)
        axes.text(0.97, where, f"{100 * probabilities[label]:.0f}", va="center", ha="right", fontsize=7, color=DARK)
    axes.set(xlim=(0, 1), ylim=(-len(best) + 0.5, 0.5), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _wrap(name: str) -> str:
    return name.replace("-", "-\n", 1) if len(name) > 12 else name
