"""Photos, folders and videos through a finished model: all it needs to know travels in its file.

A photo is seen as the model's evaluation split was. The frames of a video start from the last
frame's equilibrium (StreamDEQ: Ertenli, Akbas, Cinbis, ECCV 2022). Pictures are written only into a
folder that the run itself makes, under numbered names, so that no file is ever written over.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mdeq.heads import resize
from mdeq.model import Network
from mdeq.solvers import Solution
from pipeline import files
from pipeline.data import cityscapes, imagenet
from pipeline.data.loading import normalised
from pipeline.data.pictures import read_picture
from pipeline.errors import UserError, escaped
from pipeline.machine import Machine
from pipeline.progress import say, track
from pipeline.sets import SETS
from pipeline.train.checkpoints import load_model

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
FPS = 17.0  # of a folder's frames: that of Cityscapes' sequences
BEST = 5  # classes that scripts get per picture
SHOWN = 3  # of them for people

Frames = Iterator[tuple[str, np.ndarray]]  # name and pixels (H, W, 3) RGB uint8 of each


@dataclass(frozen=True)
class Answer:
    """What a model sees in a picture."""

    shares: np.ndarray  # (classes,) the probability of each class, or its share of the pixels
    labels: np.ndarray | None  # (H, W) uint8, the class of each pixel; None from a classifier
    solution: Solution | None  # how the equilibrium was found; None without one


class Predictor:
    """A model file that takes pictures.

    `limits` are the solver's steps and tolerance, `height` is that at which street scenes are
    segmented; where None, they are as in the model's evaluation. Raises UserError if the file is
    not a model, or does not say what it was trained on.
    """

    def __init__(
        self, model: Path, machine: Machine, height: int | None = None, **limits: float | None
    ) -> None:
        machine.use_threads()
        self.device, self.height = machine.device, height
        self.network, architecture, self.facts = load_model(model, machine.device)
        try:
            self.dataset = SETS[self.facts["dataset"]]
            self.params = dict(self.facts["params"])
            self.names = words([str(name) for name in self.facts["names"]])
        except (KeyError, TypeError, ValueError):
            self.names = []
        if len(self.names) != architecture.classes:
            raise UserError(f"{model}: does not name its data set and classes; import it again")
        self.segments = self.dataset.name == "cityscapes"
        if isinstance(self.network, Network):
            given: Any = {name: value for name, value in limits.items() if value is not None}
            backbone = self.network.backbone
            backbone.forward_solver = replace(backbone.forward_solver, check_every=1, **given)

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, z0: Tensor | None = None) -> Answer:
        """The answer to a picture (H, W, 3) RGB uint8; the solve starts from `z0` (1, D) or 0."""
        images = self.image(picture).to(self.device)
        prediction = self.network(images) if z0 is None else self.network(images, z0=z0)
        logits = prediction.logits.float()
        solution = prediction.equilibrium.solution if prediction.equilibrium else None
        if not self.segments:
            return Answer(logits[0].softmax(0).cpu().numpy(), None, solution)
        labels = resize(logits, picture.shape[:2])[0].argmax(0).byte().cpu().numpy()
        counts = np.bincount(labels.ravel(), minlength=len(self.names))
        return Answer(counts / labels.size, labels, solution)

    def image(self, picture: np.ndarray) -> Tensor:
        """What the network sees of a picture (H, W, 3) RGB uint8: (1, 3, h, w), normalised."""
        pixels = torch.from_numpy(self._sized(picture).copy()).permute(2, 0, 1)
        return normalised(pixels[None], self.dataset.mean, self.dataset.std)

    def best(self, shares: np.ndarray, count: int = BEST) -> dict[str, float]:
        """The `count` largest shares that are not zero, by class."""
        order = np.argsort(-shares, kind="stable")[:count]
        return {self.names[i]: float(shares[i]) for i in order if shares[i] > 0}

    def _sized(self, picture: np.ndarray) -> np.ndarray:
        """A picture at the size of the model's evaluation."""
        if self.dataset.name == "cifar10":
            return np.asarray(ImageOps.fit(Image.fromarray(picture), (32, 32)))
        if self.dataset.name == "imagenet":
            return np.asarray(imagenet.centre_crop(Image.fromarray(picture), self.params["image"]))
        height, width = self.params.get("test_size") or picture.shape[:2]
        if self.height is not None:
            height = self.height
            width = max(1, round(picture.shape[1] * height / picture.shape[0]))
        return cv2.resize(picture, (width, height))


def words(names: list[str]) -> list[str]:
    """The WordNet ids of all ImageNet's classes in words; other names as they are."""
    ids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet_names() if ids and len(names) == SETS["imagenet"].classes else names


def imagenet_names() -> list[str]:
    """The classes in words, in the order of their WordNet ids."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.DEFAULT.meta["categories"])


@dataclass(frozen=True)
class Clip:
    """A picture, or a video, which has an `fps`."""

    name: str
    frames: Frames
    count: int = 1
    fps: float | None = None


def clips(sources: Sequence[Path], video: bool) -> list[Clip]:
    """What the sources hold; with `video`, a folder's pictures are the frames of one, by name.

    Raises UserError if a source is no picture, folder of pictures, or video.
    """
    found = []
    for source in sources:
        try:
            found += _clips(source, video)
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    return found


def _clips(source: Path, video: bool) -> list[Clip]:
    if source.is_dir():
        names = [name for name in sorted(os.listdir(source)) if name[0] != "."]
        paths = [source / name for name in names if name.lower().endswith(PICTURES)]
        if not paths:
            raise UserError(f"{source}: no picture in it ({' '.join(PICTURES)})")
        if video:
            return [Clip(str(source), _pictures(paths), len(paths), FPS)]
        return [Clip(str(path), _pictures([path])) for path in paths]
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() in VIDEOS:
        return [_video(source)]
    return [Clip(str(source), _pictures([source]))]


def _pictures(paths: list[Path]) -> Frames:
    for path in paths:
        yield str(path), read_picture(path, upright=True)


def _video(path: Path) -> Clip:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # `_frames` says what cannot be read
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    with path.open("rb") as file:  # by number, for OpenCV crashes on names that are not UTF-8
        film = cv2.VideoCapture(f"/dev/fd/{file.fileno()}", cv2.CAP_FFMPEG)
    count, fps = film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)
    fps = fps if 1 <= fps <= 1000 else FPS
    return Clip(str(path), _frames(path, film), max(1, int(count)), fps)


def _frames(path: Path, film: cv2.VideoCapture) -> Frames:
    number = 0
    while (read := film.read())[0]:
        number += 1
        yield f"{path}#{number}", read[1][..., ::-1]
    if number == 0:
        raise UserError(f"{path}: not a readable video")


def run(
    predictor: Predictor,
    sources: Sequence[Path],
    out: Path | None = None,
    *,
    video: bool = False,
    form: Literal["lines", "json", "csv"] = "lines",
) -> None:
    """Predicts `sources` and prints what is seen; street scenes are also drawn.

    `out` is made for street scenes, by default the next free predictions/<number>. Lines are per
    picture or video; JSON and CSV, for scripts, have every frame. With `video` a folder's pictures
    are frames. Raises UserError if a source cannot be read, or `out` exists or does not fit.
    """
    if out and not predictor.segments:
        raise UserError("--out: is for segmentation; this model classifies")
    found = clips(sources, video)
    if predictor.facts.get("source") == "generated":
        say("note: this model was trained on generated pictures, not on photos")
    scenes = Scenes(new_folder(out)) if predictor.segments else None
    width = max(len(escaped(clip.name)) for clip in found)
    frames = []
    for clip in found:
        rows, shares = see(predictor, clip, scenes)
        frames += rows
        if form == "lines":
            best = predictor.best(shares, SHOWN).items()
            seen = "  ".join(f"{escaped(name)} {100 * share:.0f} %" for name, share in best)
            print(f"{escaped(clip.name):<{width}}  {seen}", flush=True)
    if form == "json":
        print(json.dumps(frames, indent=2))
    if form == "csv":
        rows = [(escaped(f["path"]), *pair) for f in frames for pair in f["classes"].items()]
        print(pd.DataFrame(rows, columns=["path", "class", "share"]).to_csv(index=False), end="")
    if scenes:
        say(f"{scenes.folder}: pictures of {scenes.number} scenes")


def see(
    predictor: Predictor, clip: Clip, scenes: Scenes | None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """What JSON has of each frame, and the mean shares; a solve starts from the last equilibrium.

    Raises UserError if a frame cannot be read, or has another size than the first.
    """
    rows, shares, state, shape = [], [], None, None
    for name, picture in track(clip.frames, clip.name, clip.count) if clip.fps else clip.frames:
        if shape not in (None, picture.shape):
            raise UserError(f"{name}: not of the size of the frames before it; omit --video")
        answer = predictor(picture, state)
        row: dict[str, Any] = {"path": name, "classes": predictor.best(answer.shares)}
        if answer.solution:
            row["evaluations"] = answer.solution.nfe
            row["residual"] = float(answer.solution.relative)
        if scenes and answer.labels is not None:
            row["files"] = scenes.write(name, picture, answer.labels, clip.fps)
        rows.append(row)
        shares.append(answer.shares)
        state, shape = answer.solution.value if answer.solution else None, picture.shape
    if scenes:
        scenes.film.release()
    return rows, np.mean(shares, axis=0)


def new_folder(out: Path | None) -> Path:
    """Makes `out`, or the next free predictions/<number>; UserError if it exists, or cannot be."""
    numbered = (Path("predictions", str(number)) for number in itertools.count(1))
    folder = out or next(path for path in numbered if not os.path.lexists(path))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
        raise UserError(f"{folder}: {reason}; name a new folder with --out") from None
    return folder


class Scenes:
    """Writes segmented street scenes into a folder.

    Each scene has a number, so that no two files have one name: 0001-a.png shows the classes over
    a.png, 0001-a.labels.png has them in Cityscapes' colours. Of a video the former are one film,
    0001-a.mp4; the caller releases it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.film = cv2.VideoWriter()

    def write(
        self, name: str, picture: np.ndarray, labels: np.ndarray, fps: float | None
    ) -> list[str]:
        """Writes a picture, or a frame of a video; returns the names of its own files."""
        self.number += 1
        safe = re.sub(r"[^\w-]+", "_", Path(name).stem)[:40]  # no longer than a file system allows
        stem = f"{self.folder}/{self.number:04}-{safe}"
        overlay = cityscapes.overlay(picture, labels)
        drawn = {f"{stem}.labels.png": cityscapes.colours()[labels]}
        if fps:
            self._add(f"{stem}.mp4", fps, overlay)
        else:
            drawn[f"{stem}.png"] = overlay
        for path, pixels in drawn.items():
            files.write(Path(path), cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
        return list(drawn)

    def _add(self, path: str, fps: float, overlay: np.ndarray) -> None:
        height, width = (side - side % 2 for side in overlay.shape[:2])  # what the codec takes
        if not self.film.isOpened():
            self.film.open(path, cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
        if not self.film.isOpened():
            raise UserError(f"{path}: this OpenCV cannot write mp4; omit --video")
        self.film.write(np.ascontiguousarray(overlay[:height, :width, ::-1]))


class _Served:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, pictures: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The best `classes` and their `shares` of each picture: the bytes of a file, or a path."""
        rows = []
        for picture in pictures.iloc[:, 0]:
            content = picture if isinstance(picture, bytes) else Path(picture)
            best = self._predictor.best(self._predictor(read_picture(content, upright=True)).shares)
            rows.append((list(best), list(best.values())))
        return pd.DataFrame(rows, columns=["classes", "shares"])


def _load_pyfunc(path: str) -> _Served:  # pyright: ignore[reportUnusedFunction]
    """MLflow's loader, on the device that the environment names."""
    return _Served(Predictor(Path(path), Machine.from_environment()))
