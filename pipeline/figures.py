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
SOLVERS = {"broyden": "Broyden", "fixed_point": "iterating f", "anderson": "Anderson"}
COLOURS = {"Broyden": BLUE, "iterating f": YELLOW, "Anderson": GREEN}
INK, DARK = "#1b1f23", "#1c2024"  # the page's ink; what stays dark on a dark page
LOSS = "loss/train_epoch"
MEASURES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
ENDS, UNROLLED = ("", "_unrolled"), ", unrolled"
_BLUES = LinearSegmentedColormap.from_list("blues", ["#f6f9fd", "#a9cbed", "#2f7fd1", "#123b66"])

_SCHEMES = (
    f"<style>:root {{ color: {INK}; background: #ffffff }} "
    "@media (prefers-color-scheme: dark) { :root { color: #e6e9ed; background: #171b21 } }</style>"
)
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_SETTINGS: dict[str, Any] = dict.fromkeys(_INKED, INK) | {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def _style(changes: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    """The look of all figures, with ``changes``, while it is entered."""
    settings: Any = _SETTINGS | (changes or {})
    return matplotlib.rc_context(settings)


@dataclass(frozen=True)
class Panel:
    """A plot of ``lines``: by label a frame whose index is x, with a column a sample; ``legend`` is its title."""

    title: str
    ylabel: str
    lines: Mapping[str, pd.DataFrame]
    legend: str | None = ""


@dataclass(frozen=True)
class Drawn:
    """A figure with its name (of a file, and unique on a page), its caption and its width on a page in pixels."""

    name: str
    figure: Figure
    caption: str
    width: int = 700


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


def lines(panels: Sequence[Panel], xlabel: str, *, columns: int | None = None, log: bool = False) -> Figure:
    """Curves side by side, ``columns`` a row; a line is the mean over its frame's columns, its band one deviation.

    A label keeps its colour over all panels; one that ends in "unrolled" is dashed, in the colour of its base.
    """
    across = columns or len(panels)
    down = -(-len(panels) // across)
    bases = list(dict.fromkeys(label.removesuffix(UNROLLED) for panel in panels for label in panel.lines))
    with _style():
        figure = Figure(figsize=(3.5 * across + (3.9 if across == 1 else 0.6), 3.1 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey="row" if log else "none")
        for axes, panel in zip(grid.flat, panels, strict=True):
            for label, samples in panel.lines.items():
                base = label.removesuffix(UNROLLED)
                style = "-" if base == label else (0, (3, 2))
                _curve(axes, samples, label, COLOURS.get(base, CYCLE[bases.index(base) % len(CYCLE)]), style)
            axes.set(title=panel.title, ylabel=panel.ylabel, xlabel=xlabel)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter(NullFormatter())
            if panel.legend is not None and panel.lines:
                axes.legend(title=panel.legend, loc="best")
    return figure


def _curve(axes: Axes, samples: pd.DataFrame, label: str, colour: str, style: Any) -> None:
    samples = samples.dropna(how="all")
    mean, spread = samples.mean(axis=1), samples.std(axis=1, ddof=0)
    marker = "o" if len(mean) <= 12 else None
    axes.plot(mean.index, mean, color=colour, linestyle=style, label=label, marker=marker, markersize=3.5)
    if samples.shape[1] > 1:
        # a mean less its deviation may be negative, which a log axis cannot show: no lower than what was seen
        low = np.maximum(mean - spread, samples.min(axis=1))
        axes.fill_between(mean.index, low, mean + spread, color=colour, alpha=0.22, linewidth=0)


def by_seed(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """A measure of history.csv, one row an epoch and one column a seed."""
    return history.assign(seed=history.get("seed", 0)).pivot_table(column, "epoch", "seed")


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Training loss and validation measures by epoch; ``history`` is history.csv: a row a seed and epoch."""
    shown = {f"eval/{name}{end}": f"{label}{end and UNROLLED}" for name, label in MEASURES.items() for end in ENDS}
    validation = {label: by_seed(history, name) for name, label in shown.items() if name in history}
    loss = Panel(title, "training loss", {"loss": by_seed(history, LOSS)}, legend=None)
    return lines([loss, Panel("validation", "%", validation)], "epoch")


def figure5(traces: Mapping[str, pd.DataFrame]) -> Figure:
    """Figure 5, a column a data set: above the paper's change |z[k+1] - z[k]| / |z[k]|, below the residual.

    Each trace is tidy: solver, batch, evaluation, change, residual. Bands are one deviation over the batches.
    """
    names = {"change": "|z[k+1] - z[k]| / |z[k]|", "residual": "|f(z) - z| / |f(z)|"}
    panels = [
        Panel(
            f"{name}, {measure}" if len(traces) == 1 else name if measure == "change" else "",
            label if len(traces) == 1 or name == next(iter(traces)) else "",
            by_solver(trace, measure),
            "" if name == next(iter(traces)) else None,
        )
        for measure, label in names.items()
        for name, trace in traces.items()
    ]
    return lines(panels, "evaluations of f", columns=max(2, len(traces)), log=True)


def by_solver(trace: pd.DataFrame, measure: str) -> dict[str, pd.DataFrame]:
    """A measure of trace.csv by solver, one row an evaluation and one column a batch."""
    return {
        SOLVERS.get(str(solver), str(solver)): own.pivot_table(measure, "evaluation", "batch")
        for solver, own in trace.groupby("solver", sort=False)
    }


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
            label = SOLVERS.get(solver, solver)
            axes.plot(range(1, len(curve) + 1), curve, color=COLOURS.get(label, GREY), label=label)
        first = next(iter(residuals))
        seen = [residuals[first][evaluation - 1] for evaluation in looks]
        axes.plot(list(looks), seen, "o", color=COLOURS.get(SOLVERS.get(first, first), GREY), markersize=5)
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
    """Figure 4b: bars of time and memory of a training step, relative to ``reference``; ``memory`` says of what."""
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
    """The confusion matrix as shares of each true class, printed where there are at most 20 classes."""
    truth = counts.sum(1, keepdims=True)
    share = np.where(truth > 0, counts / np.maximum(truth, 1), np.nan)
    few = len(names) <= 20
    side = 0.36 * len(names) + 2.4 if few else 8.0
    with _style({"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, cmap=_BLUES.with_extremes(bad="#e9eaec"), vmin=0, vmax=1, interpolation="none")
        if few:
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
            for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
                ink, words = "white" if share[row, column] > 0.45 else DARK, f"{100 * share[row, column]:.0f}"
                axes.text(column, row, words, ha="center", va="center", fontsize=7, color=ink)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1.0))
        bar.outline.set_visible(False)
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
        figure.suptitle(title, x=0.01, ha="left")
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
    rows, palette, right = [], _palette(colours), []
    for image, truth, guess in zip(images, truths, predictions, strict=True):
        void = truth == 255
        errors = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.55 + 0.35
        errors[(truth != guess) & ~void] = np.array([0.86, 0.20, 0.24])
        errors[void] = 0.08
        rows.append([image, palette[truth], palette[guess], errors])
        right.append(100 * (truth == guess)[~void].mean() if (~void).any() else float("nan"))
    figure, grid = _scenes(rows, [*truths, *predictions], names, colours, 2.6)
    figure.suptitle(title, x=0.01, ha="left")
    for axes, name in zip(grid[0], ("image", "truth", "prediction", "errors (red)"), strict=True):
        axes.set_title(name, fontsize=9, fontweight="bold", loc="left")
    box = {"facecolor": DARK, "alpha": 0.75, "edgecolor": "none", "pad": 2}
    for (*_, axes), share in zip(grid, right, strict=True):
        place = {"transform": axes.transAxes, "ha": "right", "fontsize": 8, "color": "white", "bbox": box}
        axes.text(0.98, 0.04, f"{share:.0f} % right", **place)
    return figure


def strip(
    frames: Sequence[np.ndarray], predictions: Sequence[np.ndarray], names: Sequence[str], colours: np.ndarray
) -> Figure:
    """Frames of a video (H, W, 3) from left to right, below them their predicted classes (H, W), as in Appendix C."""
    return _scenes([frames, [colours[labels] for labels in predictions]], predictions, names, colours, 3.2)[0]


def _scenes(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[np.ndarray], names: Sequence[str], colours: np.ndarray,
    side: float,
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """Pictures in rows, ``side`` inches wide, and the legend of the classes that occur in ``labels``; its axes."""
    present = [int(label) for label in np.unique(np.stack(labels)) if label != 255]
    height, width = labels[0].shape
    size = side * len(rows[0]), len(rows) * (side * height / width + 0.1) + 0.4 + 0.22 * -(-len(present) // 8)
    with _style({"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for axes, picture in zip(grid.flat, [picture for row in rows for picture in row], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        handles = [Patch(color=tuple(colours[label] / 255), label=names[label]) for label in present]
        figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=7.5, handlelength=1.1)
    return figure, grid


def _palette(colours: np.ndarray) -> np.ndarray:
    """Of all bytes the colour, black beyond the classes."""
    return np.vstack([colours, np.zeros((256 - len(colours), 3), dtype=np.uint8)])


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
