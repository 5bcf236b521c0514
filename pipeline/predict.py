"""Photos, folders and videos through a finished model: pictures of its answers, and what its solver took.

The frames of a video start from the last frame's equilibrium (StreamDEQ: Ertenli, Akbas, Cinbis, ECCV 2022).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipeline import figures
from pipeline.data import cityscapes
from pipeline.data.manifest import DataError, progress
from pipeline.data.sheet import FAINT, INK, PAPER
from pipeline.inference import Answer, Predictor, read_photo
from pipeline.metrics import ConfusionMatrix

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
CODE = cv2.VideoWriter.fourcc(*"mp4v")
FPS = 17.0
"""Of a folder's frames; that of Cityscapes' sequences."""

Frames = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Clip:
    """Pictures that are answered one after the other: photos, or the frames of a video (which has an `fps`)."""

    name: str
    count: int
    frames: Callable[[], Frames]
    fps: float | None = None


def run(
    predictor: Predictor, sources: Sequence[Path], out: Path, *, video: bool, compare: bool, labels: Path | None
) -> dict[str, dict[str, Any]]:
    """Answers `sources`, writes pictures and predictions.json into `out`, and returns the figures of each clip.

    Args:
        predictor: The model.
        sources: Photos, folders of photos, videos.
        out: A folder; made if need be.
        video: A folder's pictures are the frames of a video.
        compare: Also start every frame of a video from 0, and measure what the other start saves and changes.
        labels: Below this folder lie label ids of frames, named as Cityscapes names them.

    Raises:
        DataError: if a source is missing or cannot be read, or a file cannot be written.
    """
    if labels is not None and not predictor.segments:
        raise DataError("--labels: this model classifies; labels of pixels are for a model of `finetune`")
    end = cityscapes.LABEL_END
    truths = {path.name.removesuffix(end): path for path in labels.rglob(f"*{end}")} if labels else {}
    measured, answers = {}, {}
    for clip in clips(sources, video):
        tally = Tally(len(predictor.names))
        folder = out / clip.name
        folder.mkdir(parents=True, exist_ok=True)
        with _film(folder / "video.mp4", clip.fps or FPS) as film:
            for name, photo, found in _answered(predictor, clip, compare):
                value = next(iter(found.values())).value
                truth = truths.get(name.removesuffix(Path(cityscapes.IMAGE_END).stem))
                tally.add(found, None if truth is None else _labels(truth, value.shape))
                if predictor.segments:
                    _write(folder / f"{name}_labels.png", cityscapes.colours()[value])
                    picture = cityscapes.overlay(photo, value)
                else:
                    answers[f"{clip.name}/{name}"] = dict(predictor.best(value))
                    picture = bars(photo, predictor.best(value))
                if clip.fps:
                    film(picture)
                else:
                    _write(folder / f"{name}.png", picture)
        measured[clip.name] = tally.compute()
    record = json.dumps({"clips": measured, "answers": answers}, indent=2) + "\n"
    (out / "predictions.json").write_text(record, encoding="utf-8")
    return measured


def strip(predictor: Predictor, folder: Path, count: int, out: Path) -> None:
    """Draw `count` frames of `folder`, spread evenly in the order of their names, above their classes (Appendix C).

    Raises:
        DataError: if the folder holds no pictures, or of several sizes, or the model does not segment streets.
    """
    if not predictor.segments:
        raise DataError("strip: this model does not segment street scenes; name a model of `finetune`")
    paths = pictures(folder)
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).round().astype(int))]
    frames = [read_photo(path) for path in chosen]
    for path, frame in zip(chosen, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise DataError(f"{path}: of another size than the first")
    predictions = [predictor(frame).value for frame in frames]
    figures.save(figures.strip(frames, predictions, predictor.names, cityscapes.colours()), out)


def clips(sources: Sequence[Path], video: bool) -> list[Clip]:
    """What `sources` hold; single photos together are the clip `photos`.

    Raises:
        DataError: if there is nothing, or two things of one name.
    """
    photos = [path for path in sources if path.suffix.lower() in PICTURES and path.is_file()]
    found = [_photos("photos", photos)] if photos else []
    for source in sources:
        if source in photos:
            continue
        if source.is_dir():
            found.append(_photos(source.resolve().name, pictures(source), FPS if video else None))
        elif source.suffix.lower() in VIDEOS and source.is_file():
            found.append(_video(source))
        else:
            kinds = " ".join(sorted(PICTURES | VIDEOS))
            raise DataError(f"{source}: {f'not one of {kinds}' if source.exists() else 'no such file or folder'}")
    names = [clip.name for clip in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{twice.pop()}: two sources of this name; predict them with different --out")
    return found


def pictures(folder: Path) -> list[Path]:
    """The pictures right in a folder, in the order of their names.

    Raises:
        DataError: if there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"{folder}: no picture in it ({' '.join(sorted(PICTURES))})")
    return found


def _photos(name: str, paths: list[Path], fps: float | None = None) -> Clip:
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise DataError(f"{path}: two pictures of this name; predict them with different --out")
    return Clip(name, len(paths), lambda: ((path.stem, read_photo(path)) for path in paths), fps)


def _video(path: Path) -> Clip:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # an unreadable video is told of once, below
    film = cv2.VideoCapture(str(path))
    count, fps = int(film.get(cv2.CAP_PROP_FRAME_COUNT)), film.get(cv2.CAP_PROP_FPS)

    def frames() -> Frames:
        number = 0
        while (read := film.read())[0]:
            yield f"{path.stem}_{number:06}", read[1][..., ::-1]
            number += 1
        if number == 0:
            raise DataError(f"{path}: not a readable video")

    return Clip(path.stem, count, frames, fps or FPS)


def _answered(predictor: Predictor, clip: Clip, compare: bool) -> Iterator[tuple[str, np.ndarray, dict[str, Answer]]]:
    """Each frame's name, pixels and answers by what the solver started from, the one to show first.

    A photo starts from `zero`, as all do without a solve. Of a video the `first` frame does too, the others from the
    frame `before`; to compare, they are answered from `zero` as well.
    """
    state, shape = None, None
    for name, photo in progress(clip.frames(), clip.name, clip.count or None):
        if clip.fps and shape not in (None, photo.shape):
            raise DataError(f"{clip.name}: {name} has another size than the frames before it; leave out --video")
        answer = predictor(photo, state)
        start = "zero" if not (clip.fps and answer.solution) else "first" if state is None else "before"
        yield name, photo, {start: answer} | ({"zero": predictor(photo)} if compare and start == "before" else {})
        state, shape = answer.solution.value if clip.fps and answer.solution else None, photo.shape


class Tally:
    """The figures of a clip, by what the solver started from."""

    def __init__(self, classes: int) -> None:
        """Begin without a frame."""
        self._classes, self._frames = classes, 0
        self._solves: dict[str, list[tuple[int, bool]]] = {}
        self._matrices: dict[str, ConfusionMatrix] = {}
        self._differing: list[float] = []

    def add(self, answers: Mapping[str, Answer], truth: np.ndarray | None) -> None:
        """Add a frame's answers; `truth` are its train ids (H, W), if known."""
        self._frames += 1
        for start, answer in answers.items():
            if solution := answer.solution:
                self._solves.setdefault(start, []).append((solution.nfe, bool(solution.converged)))
            if truth is not None:
                matrix = self._matrices.setdefault(start, ConfusionMatrix(self._classes))
                matrix.add(torch.from_numpy(answer.value), torch.from_numpy(truth))
        if len(answers) > 1:
            before, zero = (a.value if a.value.ndim == 2 else a.value.argmax() for a in answers.values())
            self._differing.append(float(np.mean(before != zero)))

    def compute(self) -> dict[str, Any]:
        """Frames; by start the mean evaluations of f, the share of solves that reached the tolerance, the mIoU in per
        cent; and the share of pixels (or of best classes) that `before` and `zero` see otherwise.
        """
        values: dict[str, Any] = {"frames": self._frames}
        for start, solves in self._solves.items():
            values[start] = dict(zip(("evaluations", "reached"), np.mean(solves, axis=0).tolist(), strict=True))
        for start, matrix in self._matrices.items():
            values.setdefault(start, {})["miou"] = matrix.compute()["eval/miou"]
        return values | ({"differing": float(np.mean(self._differing))} if self._differing else {})


def summary(name: str, values: Mapping[str, Any]) -> str:
    """A clip's figures in a line."""
    words = {"zero": "from zero", "first": "of the first frame", "before": "from the frame before"}
    parts = [f"{name}: {values['frames']} picture{'s' * (values['frames'] != 1)}"]
    for start, where in words.items():
        if own := values.get(start):
            part = where
            if "evaluations" in own:
                reached = f"{100 * own['reached']:.0f} % reach the tolerance"
                part = f"{own['evaluations']:.1f} evaluations of f {where} ({reached})"
            parts.append(part + (f", mIoU {own['miou']:.2f} %" if "miou" in own else ""))
    if "differing" in values:
        parts.append(f"{100 * values['differing']:.2f} % answered otherwise than from zero")
    return "; ".join(parts)


def bars(photo: np.ndarray, best: Sequence[tuple[str, float]]) -> np.ndarray:
    """A photo and below it its best classes with their probabilities as bars, (H, W, 3) RGB uint8."""
    width, line = 480, 30
    picture = Image.fromarray(np.ascontiguousarray(photo))
    shown = picture.resize((width, round(width * picture.height / picture.width)), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (width, shown.height + line * len(best) + 10), PAPER)
    sheet.paste(shown)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (name, probability) in enumerate(best):
        top = shown.height + 8 + row * line
        pen.rectangle((8, top, 8 + (width - 16) * probability, top + line - 6), fill=(134, 205, 174))
        pen.text((14, top + 2), name, INK, font)
        pen.text((width - 14, top + 2), f"{100 * probability:.1f} %", FAINT, font, anchor="ra")
    return np.asarray(sheet)


def _labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    label = cityscapes.read_label(path.parent, path.name, path.read_bytes())
    if label.shape != shape:
        size, wanted = (f"{width} x {height}" for height, width in (label.shape, shape))
        raise DataError(f"{path}: {size} pixels, but its picture has {wanted}")
    return label


def _write(path: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(path), picture[..., ::-1]):
        raise DataError(f"{path}: cannot be written")


@contextlib.contextmanager
def _film(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """What takes the pictures of an mp4 file, which the first one begins."""
    writer = cv2.VideoWriter()

    def add(picture: np.ndarray) -> None:
        height, width = (side - side % 2 for side in picture.shape[:2])  # what the codec takes
        if not writer.isOpened() and not writer.open(str(path), CODE, fps, (width, height)):
            raise DataError(f"{path}: this OpenCV cannot write mp4; name a folder of frames without --video")
        writer.write(np.ascontiguousarray(picture[:height, :width, ::-1]))

    try:
        yield add
    finally:
        writer.release()
