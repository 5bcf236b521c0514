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
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
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
from pipeline.train.metrics import ConfusionMatrix

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
FPS = 17.0  # of a folder's frames: that of Cityscapes' sequences
BEST = 5  # classes that scripts get per picture
SHOWN = 3  # of them for people

Form = Literal["lines", "json", "csv"]
Frames = Iterator[tuple[str, np.ndarray]]  # name and pixels (H, W, 3) RGB uint8 of each


@dataclass(frozen=True)
class Answer:
    """What a model sees in a picture.

    Attributes:
        shares: (classes,) the probability of each class, or its share of the pixels.
        labels: (H, W) uint8, the class of each pixel; None from a classifier.
        solution: How the equilibrium was found; None from a model without one.
    """

    shares: np.ndarray
    labels: np.ndarray | None
    solution: Solution | None


class Predictor:
    """A model that takes pictures.

    Args:
        model: Its file.
        machine: Where it runs.
        steps: Limit on the solver's updates; None for that of the file.
        tolerance: Relative residual at which the solver stops; None for that of the file.
        height: At which street scenes are segmented; None for that of the model's evaluation.

    Raises:
        UserError: The file is not a model, or does not say what it was trained on.
    """

    def __init__(
        self,
        model: Path,
        machine: Machine,
        *,
        steps: int | None = None,
        tolerance: float | None = None,
        height: int | None = None,
    ) -> None:
        machine.use_threads()
        self.device, self.height = machine.device, height
        self.network, architecture, self.facts = load_model(model, machine.device)
        names, params = self.facts.get("names"), self.facts.get("params")
        known = self.facts.get("dataset") in list(SETS) and isinstance(params, dict)
        if not known or not isinstance(names, list) or len(names) != architecture.classes:
            raise UserError(f"{model}: does not name its data set and classes; import it again")
        self.dataset = SETS[self.facts["dataset"]]
        self.params: dict[str, Any] = self.facts["params"]
        self.names = words([str(name) for name in names])
        self.segments = self.dataset.name == "cityscapes"
        if isinstance(self.network, Network):
            limits: dict[str, Any] = {"steps": steps, "tolerance": tolerance}
            limits = {name: value for name, value in limits.items() if value is not None}
            backbone = self.network.backbone
            backbone.forward_solver = replace(backbone.forward_solver, check_every=1, **limits)

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
        pixels = torch.from_numpy(np.array(self._sized(picture))).permute(2, 0, 1)
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
        return cityscapes.resized(picture, picture[..., 0], height, width)[0]


def words(names: list[str]) -> list[str]:
    """ImageNet's WordNet ids in words, other names as they are.

    torchvision has the words of the full 1,000 classes, in the order of their ids. Those of a
    subset come from timm, if it is installed; else the ids stay.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    if len(names) == SETS["imagenet"].classes:
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.DEFAULT.meta["categories"])
    if find_spec("timm") is None:
        return names
    from timm.data import ImageNetInfo  # pyright: ignore[reportMissingImports]

    known = ImageNetInfo().label_descriptions(as_dict=True)
    return [known.get(name, name) for name in names]


# ---- what is predicted


@dataclass(frozen=True)
class Clip:
    """A picture, or the frames of a video, which has an `fps`."""

    name: str
    frames: Callable[[], Frames]
    count: int = 1
    fps: float | None = None


def clips(sources: Sequence[Path], video: bool) -> list[Clip]:
    """What the sources hold.

    Args:
        sources: Pictures, folders of pictures, videos.
        video: A folder's pictures are the frames of a video, in the order of their names.

    Raises:
        UserError: A source is none of them, or a folder has no picture.
    """
    return [clip for source in sources for clip in _clips(source, video)]


def _clips(source: Path, video: bool) -> list[Clip]:
    if os.path.isdir(source):  # unlike Path.is_dir, for names of any length
        paths = pictures(source)
        if video:
            return [Clip(str(source), partial(_read, paths), len(paths), FPS)]
        return [_picture(path) for path in paths]
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder")
    return [_video(source) if source.suffix.lower() in VIDEOS else _picture(source)]


def _picture(path: Path) -> Clip:
    return Clip(str(path), partial(_read, [path]))


def pictures(folder: Path) -> list[Path]:
    """The pictures right in a folder, in the order of their names; hidden files are left out.

    Raises:
        UserError: There are none, or the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    found = [name for name in names if name.lower().endswith(PICTURES) and name[0] != "."]
    if not found:
        raise UserError(f"{folder}: no picture in it ({' '.join(PICTURES)})")
    return [folder / name for name in found]


def _read(paths: list[Path]) -> Frames:
    for path in paths:
        yield str(path), read_picture(path, upright=True)


def _video(path: Path) -> Clip:
    """A video, opened by number: OpenCV crashes on names that are not UTF-8 and waits for FIFOs."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # `_film` reports what cannot be read
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise UserError(f"{path}: not a file")
        film = cv2.VideoCapture(f"/dev/fd/{number}", cv2.CAP_FFMPEG)
    finally:
        os.close(number)
    count, fps = film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)
    fps = fps if 1 <= fps <= 1000 else FPS
    return Clip(str(path), partial(_film, path, film), max(2, int(count)), fps)


def _film(path: Path, film: cv2.VideoCapture) -> Frames:
    number = 0
    while (read := film.read())[0]:
        number += 1
        yield f"{path}#{number}", read[1][..., ::-1]
    if number == 0:
        raise UserError(f"{path}: not a readable video")


def answers(predictor: Predictor, clip: Clip) -> Iterator[tuple[str, np.ndarray, Answer]]:
    """Name, pixels and answer of each frame; a solve starts from the last frame's equilibrium.

    Raises:
        UserError: A frame cannot be read, or has another size than the first.
    """
    state, shape = None, None
    frames = clip.frames() if clip.fps is None else track(clip.frames(), clip.name, clip.count)
    for name, picture in frames:
        if shape not in (None, picture.shape):
            raise UserError(f"{name}: not of the size of the frames before it; omit --video")
        answer = predictor(picture, state)
        yield name, picture, answer
        state, shape = answer.solution.value if answer.solution else None, picture.shape


# ---- what is printed and written


def run(
    predictor: Predictor,
    sources: Sequence[Path],
    out: Path | None = None,
    *,
    video: bool = False,
    labels: Path | None = None,
    form: Form = "lines",
) -> None:
    """Predicts `sources` and prints what is seen; street scenes are also drawn.

    Args:
        predictor: The model.
        sources: Pictures, folders of pictures, videos.
        out: The folder to make for pictures; None for the next free predictions/<number>.
        video: A folder's pictures are the frames of a video.
        labels: Below this folder lie label ids, named as Cityscapes names them: adds the mIoU.
        form: A line per picture or video; or JSON or CSV for scripts, with every frame.

    Raises:
        UserError: A source cannot be read, or `out` exists, or an argument does not fit the model.
    """
    if (out or labels) and not predictor.segments:
        raise UserError("--out and --labels: for segmentation; this model classifies")
    found = clips(sources, video)
    if predictor.facts.get("source") == "generated":
        say("note: this model was trained on generated pictures, not on photos")
    scenes = Scenes(new_folder(out), labels) if predictor.segments else None
    width = max(len(escaped(clip.name)) for clip in found)
    frames: list[dict[str, Any]] = []
    for clip in found:
        shares = []
        for name, picture, answer in answers(predictor, clip):
            shares.append(answer.shares)
            frame: dict[str, Any] = {"path": name, "classes": predictor.best(answer.shares)}
            if answer.solution:
                frame["evaluations"] = answer.solution.nfe
                frame["residual"] = float(answer.solution.relative)
            if scenes and answer.labels is not None:
                frame["files"] = scenes.write(clip, name, picture, answer.labels)
            frames.append(frame)
        if form == "lines":
            best = predictor.best(np.mean(shares, axis=0), SHOWN).items()
            seen = "  ".join(f"{escaped(name)} {100 * share:.0f} %" for name, share in best)
            print(f"{escaped(clip.name):<{width}}  {seen}", flush=True)
    if form == "json":
        print(json.dumps(frames, indent=2))
    if form == "csv":
        rows = [(escaped(f["path"]), *pair) for f in frames for pair in f["classes"].items()]
        print(pd.DataFrame(rows, columns=["path", "class", "share"]).to_csv(index=False), end="")
    if scenes:
        say(scenes.close())


def new_folder(out: Path | None) -> Path:
    """A folder that did not exist: `out`, or the next free predictions/<number>.

    Raises:
        UserError: `out` exists, or cannot be made.
    """
    numbered = (Path("predictions", str(number)) for number in itertools.count(1))
    for folder in [out] if out else numbered:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); use --out") from None
    raise UserError(f"--out {out}: exists; name a new folder, so that nothing is written over")


class Scenes:
    """Pictures of segmented street scenes in a new folder, and the mIoU where labels are known.

    Each scene has a number, so that no two files have one name: 0001-a.png shows the classes over
    a.png, 0001-a.labels.png has them in Cityscapes' colours. Of a video the former are one film,
    0001-a.mp4.
    """

    def __init__(self, folder: Path, labels: Path | None) -> None:
        self._folder, self._number = folder, 0
        self._matrix = ConfusionMatrix(len(cityscapes.class_names()))
        self._clip: Clip | None = None
        self._film = cv2.VideoWriter()
        end = cityscapes.LABEL_END
        found = labels.rglob(f"*{end}") if labels else ()
        self._truths = {path.name.removesuffix(end): path for path in found}

    def write(self, clip: Clip, name: str, picture: np.ndarray, labels: np.ndarray) -> list[str]:
        """Writes a frame and returns the names of its files.

        Raises:
            UserError: A file cannot be written, or its true labels have another size.
        """
        self._number += 1
        safe = re.sub(r"[^\w-]+", "_", Path(name).stem)[:40]  # no longer than a file system allows
        stem = f"{self._folder}/{self._number:04}-{safe}"
        overlay = cityscapes.overlay(picture, labels)
        written = [f"{stem}.labels.png"]
        _save(written[0], cityscapes.colours()[labels])
        if clip.fps:
            self._add(clip, f"{stem}.mp4", clip.fps, overlay)
        else:
            written.append(f"{stem}.png")
            _save(written[1], overlay)
        self._compare(name, labels)
        return written

    def close(self) -> str:
        """Completes the last film; what was written, and the mIoU."""
        self._film.release()
        text = f"{self._folder}: pictures of {self._number} scenes"
        if self._truths:
            text += f"; mIoU {self._matrix.compute()['eval/miou']:.2f} % of those with labels"
        return text

    def _add(self, clip: Clip, path: str, fps: float, overlay: np.ndarray) -> None:
        height, width = (side - side % 2 for side in overlay.shape[:2])  # what the codec takes
        if self._clip is not clip:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._film.release()
            if not self._film.open(path, code, fps, (width, height)):
                raise UserError(f"{path}: this OpenCV cannot write mp4; omit --video")
            self._clip = clip
        self._film.write(np.ascontiguousarray(overlay[:height, :width, ::-1]))

    def _compare(self, name: str, labels: np.ndarray) -> None:
        path = self._truths.get(Path(name).name.removesuffix(cityscapes.IMAGE_END))
        if path is None:
            return
        truth = cityscapes.read_label(path.parent, path.name, path.read_bytes())
        if truth.shape != labels.shape:
            raise UserError(f"{path}: not of the size of its picture")
        self._matrix.add(torch.from_numpy(labels), torch.from_numpy(truth))


def _save(path: str, picture: np.ndarray) -> None:
    files.write(Path(path), cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


class _Served:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, pictures: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The best `classes` and their `shares` for each picture.

        Args:
            pictures: Its first column has the bytes of a picture's file, or its path.
            params: MLflow's; not used.
        """
        rows = []
        for picture in pictures.iloc[:, 0]:
            content = picture if isinstance(picture, bytes) else Path(picture)
            best = self._predictor.best(self._predictor(read_picture(content, upright=True)).shares)
            rows.append((list(best), list(best.values())))
        return pd.DataFrame(rows, columns=["classes", "shares"])


def _load_pyfunc(path: str) -> _Served:  # pyright: ignore[reportUnusedFunction]
    """MLflow's loader, on the device that the environment names."""
    return _Served(Predictor(Path(path), Machine.from_environment()))
