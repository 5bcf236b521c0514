"""Every figure of the results: pure functions of arrays and tables. `save` writes PNG and SVG.

Names of models, classes and data may hold any characters; none is read as mathematics or markup.
"""

from __future__ import annotations

import contextlib
import io
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
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from pipeline.errors import escaped
from pipeline.files import write

Array = np.ndarray
Tables = Mapping[str, pd.DataFrame]

# fmt: off
NAMES = {
    "alexnet": "AlexNet", "anode": "ANODE", "deeplabv3": "DeepLabv3", "densenet264": "DenseNet-264",
    "dilated-resnet": "Dilated ResNet", "hrnet-w18": "HRNet-W18", "hrnet-w48": "HRNet-W48",
    "mdeq": "MDEQ", "mdeq-small": "MDEQ-small", "mdeq-large": "MDEQ-large", "mdeq-xl": "MDEQ-XL",
    "mdeq-large-unrolled": "Unrolled MDEQ-large", "mobilenetv2": "MobileNetV2",
    "node": "Neural ODE",
    "pspnet": "PSPNet", "resnet18": "ResNet-18", "resnet18-small": "ResNet-18 small",
    "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "single-stream": "Single-stream DEQ", "unetplusplus": "U-Net++", "wide-resnet50": "W-ResNet-50",
    "anderson": "Anderson", "broyden": "Broyden", "fixed_point": "iterating f",
}
"""What people call a model or solver, by its key."""

# At least 3 : 1 against white and against the dark page, as WCAG asks of graphics.
BLUE, YELLOW, GREEN, RED = "#2f7fd1", "#b98900", "#2f9e77", "#d1495b"
PURPLE, GREY = "#8b6cc9", "#7d848e"
CYCLE = (BLUE, RED, GREEN, PURPLE, YELLOW, GREY, "#0f9191", "#a0672f", "#cc5f9b", "#6675d6")
SOLVER_COLOURS = {"Broyden": BLUE, "iterating f": YELLOW, "Anderson": GREEN}
INK, DARK = "#1b1f23", "#1c2024"  # INK is light on a dark page, DARK stays dark
SIZE, SMALL, TINY = 9.5, 8.5, 7.0  # points
UNROLLED = ", unrolled"
RESIDUAL, CHANGE = "|f(z) - z| / |f(z)|", "|z[k+1] - z[k]| / |z[k]|"
EVALUATIONS = "evaluations of f"

_BLUES = LinearSegmentedColormap.from_list("blues", ["#f6f9fd", "#a9cbed", "#2f7fd1", "#123b66"])
_SCRIPTS = {"Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari"}
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_SETTINGS: dict[str, Any] = dict.fromkeys(_INKED, INK) | {
    "axes.axisbelow": True, "axes.grid": True, "axes.linewidth": 0.8,
    "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": SIZE, "axes.titleweight": "bold",
    "figure.titlesize": SIZE, "figure.titleweight": "bold", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", *sorted(_SCRIPTS & set(get_font_names()))],
    "font.size": SIZE, "grid.alpha": 0.25, "grid.color": GREY, "grid.linewidth": 0.6,
    "legend.fontsize": SMALL, "legend.frameon": False, "lines.linewidth": 1.8,
    "svg.fonttype": "none", "text.parse_math": False,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
}
# fmt: on
_SCHEMES = (
    f"<style>:root {{ color: {INK}; background: #ffffff }} @media (prefers-color-scheme: dark) "
    "{ :root { color: #e6e9ed; background: #171b21 } }</style>"
)


def display(name: object, length: int = 60) -> str:
    """The name that people use for a model or solver: at most `length` printable characters."""
    shown = escaped(NAMES.get(str(name), str(name)))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as .png, on white, or as .svg, light or dark as its viewer prefers.

    The same figure always gives the same bytes.

    Raises:
        UserError: The file cannot be written.
    """
    options: dict[str, Any] = {"dpi": 150, "facecolor": "white", "metadata": {"Software": None}}
    if path.suffix == ".svg":
        options = {"transparent": True, "metadata": {"Date": None}}
    buffer = io.BytesIO()
    with _style({"svg.hashsalt": path.stem}):
        figure.savefig(buffer, format=path.suffix[1:], **options)
    content = buffer.getvalue()
    if path.suffix == ".svg":
        text = content.decode().replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", _SCHEMES, text, flags=re.DOTALL)
        fonts = r"font: ([^;\"']*)'[^\"]*?sans-serif"  # the reader's own instead of ours
        content = re.sub(fonts, r"font: \1sans-serif", text).encode()
    write(path, content)


@contextlib.contextmanager
def _style(changes: dict[str, Any] | None = None) -> Iterator[None]:
    settings: Any = _SETTINGS | (changes or {})
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that no font here has
        yield


def _titled(figure: Figure, title: str) -> Figure:
    with _style():
        figure.suptitle(display(title, 100), x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class Panel:
    """One plot: by label a frame with x as its index and one column per sample (seed, batch).

    `value` is the format of the last mean, printed behind the label; None leaves the labels out.
    """

    title: str
    ylabel: str
    curves: Tables
    value: str | None = ""
    log: bool = False


def lines(panels: Sequence[Panel], xlabel: str, columns: int = 0, share: bool = False) -> Figure:
    """Panels side by side, `columns` per row, with the curves' labels at their ends.

    A line is the mean over its samples, its band one standard deviation. A label keeps its colour
    in all panels; one that ends in ", unrolled" is dashed, in the colour of its base.

    Args:
        panels: Row by row.
        xlabel: Of all panels.
        columns: Panels per row; 0: all of them in one row.
        share: The panels of a row have the same y axis.
    """
    across = columns or len(panels)
    down = -(-len(panels) // across)
    bases = dict.fromkeys(label.removesuffix(UNROLLED) for p in panels for label in p.curves)
    colours = dict(zip(bases, CYCLE * len(bases), strict=False)) | SOLVER_COLOURS
    with _style():
        figure = Figure(figsize=(3.4 * across + 1.4, 2.7 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey="row" if share else False)
        ends = []
        for axes, panel in zip(grid.flat, panels, strict=True):
            axes.set(title=panel.title, ylabel=panel.ylabel)
            axes.set_xlabel(xlabel if axes in grid[-1] else "")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            if panel.log:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            for label, samples in panel.curves.items():
                colour = colours[label.removesuffix(UNROLLED)]
                last = _curve(axes, samples, colour, dashed=label.endswith(UNROLLED))
                if panel.value is not None and last is not None:
                    number = f"  {last:{panel.value}}" if panel.value else ""
                    ends.append((axes, last, display(label, 30) + number, colour))
        figure.draw_without_rendering()  # gives the axes their size
        for axes in grid.flat:
            _label_ends(axes, [end[1:] for end in ends if end[0] is axes])
    return figure


def _curve(axes: Axes, samples: pd.DataFrame, colour: str, *, dashed: bool) -> float | None:
    """Draws a mean and its band; returns the last mean."""
    samples = samples.dropna(how="all").sort_index()
    if samples.empty:
        return None
    mean, spread = samples.mean(axis=1), samples.std(axis=1, ddof=0)
    style: Any = (0, (3, 2)) if dashed else "-"
    marker = "o" if len(mean) <= 12 else None
    axes.plot(mean.index, mean, color=colour, linestyle=style, marker=marker, markersize=3.5)
    if samples.shape[1] > 1:
        low = np.maximum(mean - spread, samples.min(axis=1))  # a log axis has no 0
        axes.fill_between(mean.index, low, mean + spread, color=colour, alpha=0.22, linewidth=0)
    return float(mean.iloc[-1])


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes (y, label, colour) right of the axes at height y, moved apart where they overlap."""
    ends = sorted(ends)
    box = axes.get_window_extent()
    point = 72 / axes.figure.dpi
    gap, reach = 1.25 * SIZE / (box.height * point), 12 / (box.width * point)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(np.clip(to_axes.transform((1, y))[1], 0, 1)) for y, _, _ in ends]
    places = list(heights)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1 - gap * (len(places) - 1 - i))
    inside: Any = {"transform": axes.transAxes, "clip_on": False}
    for (_, words, colour), height, place in zip(ends, heights, places, strict=True):
        key = [1, 1 + reach / 2, 1 + reach], [height, place, place]
        axes.plot(*key, color=colour, linewidth=1.4, scalex=False, scaley=False, **inside)
        axes.text(1 + 1.3 * reach, place, words, va="center", fontsize=SMALL, **inside)


def by_seed(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """A measure of history.csv: one row per epoch, one column per seed; empty if missing."""
    if column not in history:
        return pd.DataFrame()
    return history.assign(seed=history.get("seed", 0)).pivot_table(column, "epoch", "seed")


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Training loss and validation measures by epoch, from history.csv."""
    shown = {}
    for key, label in {"top1": "top-1", "top5": "top-5", "miou": "mIoU"}.items():
        shown |= {f"eval/{key}": label, f"eval/{key}_unrolled": label + UNROLLED}
    validation = {label: by_seed(history, key) for key, label in shown.items() if key in history}
    loss = {"training": by_seed(history, "loss/train_epoch")}
    panels = [Panel("loss", "", loss, ".2f"), Panel("validation, %", "", validation, ".1f")]
    return _titled(lines(panels, "epoch"), title)


def figure4a(histories: Tables, measure: str = "eval/top1") -> Figure:
    """Figure 4a: test accuracy by epoch of all models, from each one's history.csv."""
    curves = {display(name): by_seed(table, measure) for name, table in histories.items()}
    return lines([Panel("", "test accuracy, %", curves, ".1f")], "epoch")


def accuracy_by_core_hours(histories: Tables, cores: int | None = None) -> Figure:
    """Test accuracy by core-hours of training, from each model's history.csv.

    `cores`: that each training used; None where that is not known: by its hours.
    """
    curves = {}
    for name, table in histories.items():
        accuracy = by_seed(table, "eval/top1")
        hours = by_seed(table, "time/seconds").mean(axis=1) * (cores or 1) / 3600
        curves[display(name)] = accuracy.set_axis(hours.reindex(accuracy.index))
    xlabel = "core-hours" if cores else "hours of training"
    return lines([Panel("", "test accuracy, %", curves, ".1f")], xlabel)


def accuracy_by_evaluations(by_steps: Tables) -> Figure:
    """Accuracy and residual of solves stopped after so many evaluations of f.

    `by_steps`: of each model by_steps.csv, with columns evaluations, accuracy (in %), residual.
    """
    tables = {display(name): table.set_index("evaluations") for name, table in by_steps.items()}
    accuracy = {name: table.filter(["accuracy"]) for name, table in tables.items()}
    residual = {name: table.filter(["residual"]) for name, table in tables.items()}
    panels = [
        Panel("test accuracy, %", "", accuracy, ".1f"),
        Panel(f"residual {RESIDUAL}", "", residual, ".1g", log=True),
    ]
    return lines(panels, EVALUATIONS)


def figure5(traces: Tables) -> Figure:
    """Figure 5: the paper's change and the residual by evaluations of f, one column per data set.

    Of each data set trace.csv: solver, batch, evaluation, change, residual. Bands are one standard
    deviation over the batches. A single data set has both measures side by side.
    """
    titles = list(traces)
    panels = []
    for measure, ylabel in (("change", CHANGE), ("residual", RESIDUAL)):
        for name, trace in traces.items():
            title = display(name) if measure == "change" and len(titles) > 1 else ""
            value = "" if name == titles[-1] else None  # the labels stand once in a row
            label = ylabel if name == titles[0] else ""
            panels.append(Panel(title, label, by_solver(trace, measure), value, log=True))
    if len(titles) > 1:
        return lines(panels, EVALUATIONS, columns=len(titles), share=True)
    return _titled(lines(panels, EVALUATIONS, share=True), titles[0])


def by_solver(trace: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """A measure of trace.csv by solver: one row per evaluation, one column per batch."""
    found = {}
    for solver, own in trace.groupby("solver", sort=False):
        found[display(solver)] = own.pivot_table(column, "evaluation", "batch")
    return found


def figure5_scales(traces: Tables) -> Figure:
    """The residual of each scale in Broyden's method (Appendix B.2), one panel per data set."""
    panels = []
    for name, trace in traces.items():
        own, curves = trace[trace["solver"] == "broyden"], {}
        for column in own.filter(like="residual_"):
            label = str(column).replace("residual_", "scale ")
            curves[label] = own.pivot_table(column, "evaluation", "batch")
        panels.append(Panel(display(name), "" if panels else RESIDUAL, curves, log=True))
    return lines(panels, EVALUATIONS, share=True)


def figure5_training(histories: Tables) -> Figure:
    """The residual of validation after 2, 4, 8, ... evaluations of f, by epoch (Appendix B.2)."""
    prefix = "solver/residual_after_"
    panels = []
    for name, table in histories.items():
        names = [str(column) for column in table.filter(like=prefix)]
        curves = {name.replace(prefix, "after "): by_seed(table, name) for name in names}
        panels.append(Panel(display(name), "" if panels else RESIDUAL, curves, log=True))
    return lines(panels, "epoch", share=True)


def relative_times(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Seconds over the reference's in the same round: one row per round, one column per model."""
    seconds = times.pivot_table("seconds", "round", "model", sort=False)
    return seconds.div(seconds[reference], axis=0)


def figure4b(
    times: pd.DataFrame, memory: Mapping[str, float], reference: str, note: str = ""
) -> Figure:
    """Figure 4b: time and memory of a training step relative to one model; lower is better.

    Args:
        times: times.csv: model, round, seconds. Bars are medians, whiskers the range of the rounds.
        memory: Bytes by model.
        reference: The model that is 1.
        note: How memory was measured.
    """
    rounds = relative_times(times, reference)
    rounds = rounds[rounds.columns[::-1]]
    places, time, longest = np.arange(rounds.shape[1]), rounds.median(), rounds.max()
    space = pd.Series(memory, dtype=float).reindex(rounds.columns) / memory[reference]
    with _style({"axes.grid": False, "axes.spines.left": False}):
        figure = Figure(figsize=(8, 0.42 * len(places) + 1.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        reach, whiskers = [time - rounds.min(), longest - time], {"ecolor": INK, "capsize": 3}
        left.barh(places, time, 0.62, xerr=reach, color=BLUE, error_kw=whiskers)
        right.barh(places, space.fillna(0), 0.62, color=YELLOW)
        for axes, values, ends in ((left, time, longest), (right, space, space)):
            for place, value, end in zip(places, values, ends, strict=True):
                words = f"{value:.2f}" if np.isfinite(value) else "not measured"
                at = end if np.isfinite(end) else 0, place
                axes.annotate(words, at, (5, 0), textcoords="offset points", va="center")
            axes.axvline(1, color=INK, linewidth=0.7, linestyle=(0, (2, 4)), alpha=0.6, zorder=0)
            axes.set_xlim(0, 1.2 * max(1, ends.max()))
            axes.set_xlabel(f"relative to {display(reference)}")
            axes.tick_params(axis="y", length=0)
        left.set_yticks(places, [display(name, 24) for name in rounds])
        left.set_title(f"time of a step ({len(rounds)} rounds)")
        right.set_title(display(f"memory ({note})" if note else "memory"))
    return figure


def confusion(counts: Array, names: Sequence[str], title: str) -> Figure:
    """The shares of each true class's predictions, printed where there are at most 20 classes."""
    truth = counts.sum(1, keepdims=True)
    share = np.where(truth > 0, counts / np.maximum(truth, 1), np.nan)
    few = len(names) <= 20
    side = max(4.5, 0.36 * len(names) + 2.4) if few else 8.0
    with _style({"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        colours = _BLUES.with_extremes(bad="#e9eaec")
        image = axes.imshow(share, cmap=colours, vmin=0, vmax=1, interpolation="none")
        if few:
            shown = [display(name, 18) for name in names]
            axes.set_xticks(
                range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor"
            )
            axes.set_yticks(range(len(names)), shown)
            for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
                value = share[row, column]
                look: Any = {"ha": "center", "va": "center", "fontsize": TINY}
                axes.text(
                    column, row, f"{100 * value:.0f}", color="w" if value > 0.45 else DARK, **look
                )
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true", title=display(title, 100))
        bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1.0))
        bar.outline.set_visible(False)
        bar.set_label("share of the true class")
        if np.isnan(share).any():
            figure.supxlabel("grey rows: classes without a label", fontsize=TINY)
    return figure


def classified(
    images: Array, truths: Sequence[int], probabilities: Array, names: Sequence[str], title: str
) -> Figure:
    """Images (N, H, W, 3) in 0..1 with their class, and the three most probable answers as bars."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    with _style({"axes.grid": False, "axes.titlesize": SMALL}):
        figure = Figure(figsize=(1.75 * columns, 2.55 * rows + 0.4), layout="constrained")
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.75, 0.8] * rows)
        for axes in grid.flat:
            axes.set_axis_off()
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            _picture(grid[2 * row][column], image, display(names[truths[index]], 18))
            _answers(grid[2 * row + 1][column], probabilities[index], truths[index], names)
    return _titled(figure, title)


def _picture(axes: Axes, picture: Array, title: str = "", aspect: Any = "equal") -> None:
    axes.imshow(picture, interpolation="nearest" if len(picture) <= 128 else None, aspect=aspect)
    axes.set_title(title, pad=4)
    axes.set_axis_off()


def _answers(axes: Axes, probabilities: Array, truth: int, names: Sequence[str]) -> None:
    """The three most probable classes as bars, green where right."""
    best = [int(label) for label in np.argsort(-probabilities)[:3]]
    axes.set_axis_on()
    look: Any = {"va": "center", "fontsize": TINY, "color": DARK}
    for place, label in zip((0, -1, -2), best, strict=False):
        colour = "#86cdae" if label == truth else "#eeb0b8"
        axes.barh(place, 1, color="#eef0f3", height=0.86)
        axes.barh(place, probabilities[label], color=colour, height=0.86)
        axes.text(0.03, place, display(names[label], 14), **look)
        axes.text(0.97, place, f"{100 * probabilities[label]:.0f}", ha="right", **look)
    axes.set(xlim=(0, 1), ylim=(-2.5, 0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


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
    present = np.unique(np.concatenate([label.ravel() for label in (*truths, *predictions)]))
    present = [int(label) for label in present if label < len(colours)]
    height, width = truths[0].shape
    tall = len(images) * (2.5 * height / width + 0.1) + 0.6 + 0.22 * -(-len(present) // 8)
    with _style({"axes.grid": False}):
        figure = Figure(figsize=(10.4, tall), layout="constrained")
        grid = figure.subplots(len(images), 4, squeeze=False)
        for row, image, truth, guess in zip(grid, images, truths, predictions, strict=True):
            void = truth == 255
            errors = np.repeat(image.mean(2, keepdims=True), 3, axis=2) * 0.55 + 0.35
            errors[(truth != guess) & ~void] = (0.86, 0.20, 0.24)
            errors[void] = 0.08
            right = 100 * (truth == guess)[~void].mean() if (~void).any() else np.nan
            pictures = (image, palette[truth], palette[guess], errors)
            for axes, picture in zip(row, pictures, strict=True):
                _picture(axes, picture)
            box = {"facecolor": DARK, "alpha": 0.75, "edgecolor": "none", "pad": 2}
            look = {"ha": "right", "fontsize": SMALL, "color": "white", "bbox": box}
            row[3].text(0.98, 0.05, f"{right:.0f} % right", transform=row[3].transAxes, **look)
        for axes, words in zip(
            grid[0], ("image", "truth", "prediction", "errors (red)"), strict=True
        ):
            axes.set_title(words)
        patches = [Patch(color=tuple(colours[label] / 255)) for label in present]
        blank = [" "] * len(present)  # a legend leaves out labels that begin with _
        legend = figure.legend(
            patches, blank, loc="outside lower center", ncols=8, handlelength=1.1
        )
        for text, label in zip(legend.get_texts(), present, strict=True):
            text.set_text(display(names[label], 18))
    return _titled(figure, title)


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
        image: (H, W, 3) in 0..1.
        truth: The class, () or (H, W).
        looks: After 2, 4, 8, ... evaluations of f: z of each scale (H_i, W_i, C_i), and the
            probabilities (classes,) or (classes, H, W).
        residuals: Of each solver, by evaluation; the looks are the first one's.
        names: Of the classes.
        colours: (classes, 3) uint8, of the pixels' classes.
    """
    tall, space = 2 * image.shape[0] / image.shape[1], 0.06
    heights = [tall, tall / 2, tall if truth.ndim else 0.7, 1.3]
    size = 2.1 * (1 + len(looks)) + 0.8, sum(heights) + 1.6
    edges = {
        "left": 0.75 / size[0],
        "right": 0.99,
        "bottom": 0.5 / size[1],
        "top": 1 - 0.3 / size[1],
    }
    gaps = {"wspace": space, "hspace": 1.2 / sum(heights)}
    bases = [principal(z) for z in looks[max(looks)][0]]
    with _style({"axes.titleweight": "normal"}):
        figure = Figure(figsize=size)
        grid = figure.add_gridspec(4, 1 + len(looks), height_ratios=heights, **edges, **gaps)
        _picture(figure.add_subplot(grid[0, 0]), image, "image x", "auto")
        formula = figure.add_subplot(grid[1, 0], frameon=False, xticks=[], yticks=[])
        formula.text(
            0.5, 0.5, "z* = f(z*, x)", ha="center", va="center", fontsize=13, style="italic"
        )
        if truth.ndim:
            _picture(figure.add_subplot(grid[2, 0]), _palette(colours)[truth], "the truth", "auto")
        for column, (evaluation, (scales, share)) in enumerate(looks.items(), 1):
            words = f"z after {evaluation} evaluations"
            highest = coloured(scales[0], bases[0])
            _picture(figure.add_subplot(grid[0, column]), highest, words, "auto")
            lower = figure.add_subplot(grid[1, column], frameon=False, xticks=[], yticks=[])
            for i, (z, base) in enumerate(zip(scales[1:], bases[1:], strict=True)):
                box = (1.06 - 1.06 * 0.5**i, 1 - 0.5**i, 0.5 ** (i + 1), 0.5**i)
                _picture(lower.inset_axes(box), coloured(z, base), aspect="auto")
            answer = figure.add_subplot(grid[2, column])
            if truth.ndim:
                _picture(answer, colours[share.argmax(0)], "the answer", "auto")
            else:
                _answers(answer, share, int(truth), names)
        reach = 2 ** (0.5 / (1 + space))  # an octave is as wide as a column: looks stand below z
        axes = figure.add_subplot(grid[3, :], xlim=(1 / reach, max(looks) * reach))
        _residuals(axes, residuals, list(looks))
    return figure


def _residuals(axes: Axes, residuals: Mapping[str, Sequence[float]], looks: list[int]) -> None:
    handles = []
    for index, (solver, curve) in enumerate(residuals.items()):
        colour = SOLVER_COLOURS.get(display(solver), GREY)
        evaluations = np.arange(1, len(curve) + 1)
        handles += axes.plot(evaluations, curve, color=colour, markersize=5)
        if index == 0:
            axes.plot(
                looks, np.asarray(curve)[np.array(looks) - 1], "o", color=colour, markersize=5
            )
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=EVALUATIONS, ylabel=RESIDUAL)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(handles, [display(solver) for solver in residuals], loc="lower left")


def principal(z: Array) -> tuple[Array, ...]:
    """Of z (H, W, C): mean, three principal directions (C, 3), lowest values, ranges."""
    flat = z.reshape(-1, z.shape[-1])
    found = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3].T
    directions = np.pad(
        found, ((0, 0), (0, 3 - found.shape[1]))
    )  # few pixels or channels span fewer
    low, high = np.percentile((flat - flat.mean(0)) @ directions, (2, 98), axis=0)
    return flat.mean(0), directions, low, np.maximum(high - low, 1e-3 * (high - low).max() + 1e-12)


def coloured(z: Array, base: tuple[Array, ...]) -> Array:
    """`z` (H, W, C) as RGB (H, W, 3): the first direction is brightness, two are hue (YCbCr)."""
    mean, directions, low, spread = base
    light, blue, red = np.moveaxis(((z - mean) @ directions - low) / spread, -1, 0)
    light, blue, red = 0.15 + 0.7 * light, 0.45 * (blue - 0.5), 0.45 * (red - 0.5)
    rgb = (light + 1.402 * red, light - 0.344 * blue - 0.714 * red, light + 1.772 * blue)
    return np.clip(np.stack(rgb, -1), 0, 1)
