"""Photos, folders and videos through tiny models: what is said, written and refused."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from mdeq import Broyden, ClassificationHeadConfig, FixedPoint, MDEQConfig, SegmentationHeadConfig
from mdeq.baselines import ResNetConfig
from mdeq.saved import Architecture
from pipeline import predict
from pipeline.data import cityscapes
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.predict import Predictor
from pipeline.train.checkpoints import save_model

NAMES = ["cat", "dog", "horse", "ship", "frog", "truck"]
STREETS = Architecture(
    MDEQConfig((8,), expansion=1, groups=2, downsamplings=2),
    SegmentationHeadConfig(),
    19,
    FixedPoint(steps=100, tolerance=1e-3),
)
THINGS = Architecture(
    MDEQConfig((8, 8), expansion=1, groups=2),
    ClassificationHeadConfig((2, 2), 8),
    len(NAMES),
    Broyden(steps=30, tolerance=1e-3),
)

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predictor(architecture: Architecture, facts: dict[str, Any], **options: Any) -> Predictor:
    """A model of random weights under a strong injection: its equilibria are easily found."""
    torch.manual_seed(0)
    network = architecture.build()
    for name, weight in network.named_parameters():
        if name == "backbone.stem.4.weight":
            weight.data.mul_(1e6)
    save_model(Path("model.safetensors"), network, architecture, facts)
    return Predictor(Path("model.safetensors"), Machine(Path.cwd()), **options)


def streets(**options: Any) -> Predictor:
    names = list(cityscapes.class_names())
    facts = {"dataset": "cityscapes", "names": names, "params": {"test_size": None}}
    return predictor(STREETS, facts, **options)


def things(**facts: Any) -> Predictor:
    known = {"dataset": "imagenet", "names": NAMES, "params": {"image": 16}}
    return predictor(THINGS, known | facts)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path | bytes, picture: np.ndarray, kind: str = ".png") -> None:
    with open(path, "wb") as file:
        file.write(cv2.imencode(kind, picture[..., ::-1])[1].tobytes())


def read(path: str | Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def film(path: str, frames: int = 4) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for seed in range(frames):
        writer.write(np.full((48, 64, 3), 60 * seed, np.uint8))
    writer.release()


def test_it_says_what_it_sees(here: Path, capsys: Captured) -> None:
    """As lines, JSON and CSV: the classes with the largest softmax of the model's own logits."""
    model = things(source="generated")
    write(Path("cat.png"), noise(16, 16))
    write(Path("a dog.png"), noise(30, 20, 1))
    with torch.no_grad():
        shares = model.network(model.image(noise(16, 16))).logits[0].softmax(0)
    best = {NAMES[i]: float(shares[i]) for i in shares.argsort(descending=True)}
    predict.run(model, [Path("cat.png"), Path("a dog.png")])
    said = capsys.readouterr()
    (first, second), top = said.out.splitlines(), list(best.items())[:3]
    assert first == "cat.png    " + "  ".join(f"{name} {100 * share:.0f} %" for name, share in top)
    assert second.startswith("a dog.png  ")
    assert said.err == "note: this model was trained on generated pictures, not on photos\n"
    predict.run(model, [Path("cat.png")], form="json")
    [found] = json.loads(capsys.readouterr().out)
    assert found["path"] == "cat.png" and found["evaluations"] > 1 and 0 < found["residual"] < 1
    assert found["classes"] == pytest.approx(dict(list(best.items())[:5]), rel=1e-5)
    predict.run(model, [Path("cat.png")], form="csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == list(best)[:5]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(sum(found["classes"].values()))
    assert {path.name for path in here.iterdir()} == {"a dog.png", "cat.png", "model.safetensors"}


def test_a_photo_is_seen_as_the_evaluation_split_is(here: Path) -> None:
    """CIFAR-10's pictures are 32 x 32; a photo is cut to that form from its middle."""
    facts = {"dataset": "cifar10", "names": NAMES, "params": {}}
    explicit = predictor(Architecture(ResNetConfig(width=8), None, 6), facts)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    image = explicit.image(wide)
    white = (1 - torch.tensor(explicit.dataset.mean)) / torch.tensor(explicit.dataset.std)
    assert torch.allclose(image, white[:, None, None].expand(1, 3, 32, 32), atol=1e-5)
    assert explicit(wide).solution is None


def test_street_scenes_are_drawn_under_names_of_their_own(here: Path, capsys: Captured) -> None:
    """Same stems, two folders, a picture with the name of a label map: all are kept."""
    model = streets()
    Path("other").mkdir()
    names = "a.png a_labels.png a.labels.png a.jpg other/a.png"
    sources = [Path(name) for name in names.split()]
    for seed, path in enumerate(sources):
        write(path, noise(24, 32, seed), path.suffix)
    before = {path: path.read_bytes() for path in sources}
    predict.run(model, sources, form="json")
    found = json.loads(capsys.readouterr().out)
    files = [name for frame in found for name in frame["files"]]
    assert len(set(files)) == 2 * len(sources) == len(list(Path("predictions/1").iterdir()))
    assert {path: path.read_bytes() for path in sources} == before
    for source, frame in zip(sources, found, strict=True):
        labels = model(read(source)).labels
        assert np.array_equal(read(frame["files"][0]), cityscapes.colours()[labels])
        assert np.array_equal(read(frame["files"][1]), cityscapes.overlay(read(source), labels))
        counts = np.bincount(labels.ravel(), minlength=19) / labels.size
        best = cityscapes.class_names()[int(counts.argmax())]
        assert frame["classes"][best] == pytest.approx(counts.max())
    predict.run(model, [Path("a.png")])
    assert Path("predictions/2").is_dir()


def test_nothing_is_written_where_something_is(here: Path) -> None:
    model = streets()
    Path("photos").mkdir()
    write(Path("photos/a.png"), noise(24, 32))
    Path("empty").mkdir()
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    before = sorted(here.rglob("*"))
    content = Path("photos/a.png").read_bytes()
    for out in (".", "photos", "photos/a.png", "empty", "file", "loop", "dangling", "file/x"):
        with pytest.raises(UserError) as error:
            predict.run(model, [Path("photos/a.png")], Path(out))
        assert out in str(error.value) and "\n" not in str(error.value)
    assert sorted(here.rglob("*")) == before and Path("photos/a.png").read_bytes() == content
    with pytest.raises(UserError, match="this model classifies"):
        predict.run(things(), [Path("photos/a.png")], Path("new"))


def test_a_standing_video_is_solved_once_and_answered_as_from_zero(
    here: Path, capsys: Captured
) -> None:
    model = streets()
    Path("frames").mkdir()
    for number in range(3):
        write(Path(f"frames/a_{number:06}.png"), noise(24, 32))
    own = model(noise(24, 32)).labels
    predict.run(model, [Path("frames")], Path("out"), video=True, form="json")
    said = capsys.readouterr()
    first, *later = json.loads(said.out)
    assert first["evaluations"] > 2 and [frame["evaluations"] for frame in later] == [1, 1]
    assert "out: pictures of 3 scenes" in said.err
    for frame in (first, *later):
        assert np.array_equal(read(frame["files"][0]), cityscapes.colours()[own])
    shown = cv2.VideoCapture("out/0001-a_000000.mp4")
    assert shown.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and shown.read()[1].shape == (24, 32, 3)
    assert len(list(Path("out").iterdir())) == 4


def test_photos_know_nothing_of_each_other(here: Path, capsys: Captured) -> None:
    model = streets(height=12)
    Path("folder").mkdir()
    for seed in range(2):
        write(Path(f"folder/{seed}.png"), noise(24, 32, seed))
    write(Path("folder/._0.png"), noise(8, 8))  # hidden
    predict.run(model, [Path("folder")], form="json")
    found = json.loads(capsys.readouterr().out)
    assert [frame["path"] for frame in found] == ["folder/0.png", "folder/1.png"]
    for seed, frame in enumerate(found):
        alone = model(noise(24, 32, seed)).labels
        assert np.array_equal(read(frame["files"][0]), cityscapes.colours()[alone])
    assert model.image(noise(24, 32)).shape == (1, 3, 12, 16)


def test_a_video_is_one_line_and_scripts_get_its_frames(here: Path, capsys: Captured) -> None:
    film("drive.mp4")
    model = things()
    predict.run(model, [Path("drive.mp4")], form="json")
    found = json.loads(capsys.readouterr().out)
    assert [frame["path"] for frame in found] == [f"drive.mp4#{number}" for number in range(1, 5)]
    predict.run(model, [Path("drive.mp4")])
    (line,) = capsys.readouterr().out.splitlines()
    means = pd.DataFrame([frame["classes"] for frame in found]).mean()
    assert line.startswith(f"drive.mp4  {means.idxmax()} {100 * means.max():.0f} %")
    predict.run(streets(), [Path("drive.mp4")] * 2, Path("out"))
    for name in ("0001-drive.mp4", "0005-drive.mp4"):
        shown = cv2.VideoCapture(f"out/{name}")
        assert shown.get(cv2.CAP_PROP_FPS) == 10 and shown.get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_names_of_any_characters(here: Path, capsys: Captured) -> None:
    """Raw bytes reach OpenCV nowhere and the terminal nowhere; JSON has the very name."""
    model = streets()
    names = [b"caf\xe9.png", b"a\nb.png", b"\x1b[31mred.png", b"-", b"x" * 251 + b".png"]
    for name in names:
        write(os.fsencode(here) + b"/" + name, noise(24, 32))
    names.append(b"f\xff.mp4")
    film("film.mp4")
    os.rename(b"film.mp4", names[-1])
    sources = [Path(os.fsdecode(name)) for name in names]
    predict.run(model, sources, Path("out"), form="json")
    found = json.loads(capsys.readouterr().out)
    assert [os.fsencode(frame["path"]) for frame in found][:5] == names[:5]
    assert all(Path(name).is_file() for frame in found for name in frame["files"])
    for form in ("lines", "csv"):
        predict.run(model, sources, form=form)
        said = capsys.readouterr().out
        assert "\x1b" not in said and r"a\nb.png" in said
        said.encode()


def png_header(side: int) -> bytes:
    """A PNG that says it has side x side pixels, and has none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body
    return head + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IEND\xaeB`\x82"


def test_what_cannot_be_predicted_is_one_line(here: Path) -> None:
    model = things()
    Path("text.png").write_text("no picture")
    Path("text.mp4").write_text("no video")
    Path("nothing.png").touch()
    Path("huge.png").write_bytes(png_header(60_000))
    os.mkfifo("pipe.png")
    os.mkfifo("pipe.mp4")
    Path("loop.png").symlink_to("loop.png")
    Path("dangling.mp4").symlink_to("nowhere")
    Path("empty").mkdir()
    Path("mixed").mkdir()
    write(Path("mixed/a.png"), noise(16, 16))
    write(Path("mixed/b.png"), noise(24, 16))
    write(Path("whole.jpg"), noise(64, 64), ".jpg")
    Path("cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:-2000])
    wrong = "text.png text.mp4 nothing.png huge.png pipe.png pipe.mp4 loop.png dangling.mp4 empty"
    for name in [*wrong.split(), "cut.jpg", "none.png", "mixed/b.png/x", "n" * 300]:
        with pytest.raises(UserError) as error:
            predict.run(model, [Path(name)])
        message = str(error.value)
        assert message.startswith(f"{name}: ") and "\n" not in message
    with pytest.raises(UserError, match=r"mixed/b\.png: not of the size .* omit --video"):
        predict.run(model, [Path("mixed")], video=True)


@pytest.mark.parametrize(
    "change",
    [{"dataset": "mnist"}, {"dataset": ["imagenet"]}, {"names": NAMES[:5]}, {"params": None}],
)
def test_a_model_must_say_what_it_knows(here: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: does not name"):
        things(**change)


def test_wordnet_ids_become_words() -> None:
    """Those of torchvision, in the order of the ids; names are left alone."""
    full = predict.words([f"n{number:08}" for number in range(1000)])
    assert full[0] == "tench" and full[281] == "tabby" and full[999] == "toilet tissue"
    assert predict.words(NAMES) == NAMES


def test_mlflow_is_served_bytes_and_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = things()
    write(Path("a.png"), noise(20, 20))
    monkeypatch.setenv("MDEQ_DEVICE", "cpu")
    served = predict._load_pyfunc("model.safetensors")
    content = Path("a.png").read_bytes()
    answers = served.predict(pd.DataFrame({"picture": [content, "a.png"]}))
    best = model.best(model(noise(20, 20)).shares)
    assert answers["classes"].tolist() == [list(best)] * 2
    assert answers["shares"][0] == pytest.approx(list(best.values()))
