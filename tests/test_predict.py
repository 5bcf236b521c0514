"""Photos, folders and videos through tiny models: what is answered, drawn, counted and refused."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mdeq import Broyden, ClassificationHeadConfig, FixedPoint, MDEQConfig, SegmentationHeadConfig
from mdeq.baselines import ResNetConfig
from pipeline import figures, predict
from pipeline.checkpoints import Architecture, save_model
from pipeline.cli import app
from pipeline.data import cityscapes
from pipeline.data.manifest import DataError
from pipeline.inference import Predictor
from pipeline.machine import Machine

NAMES = ["cat", "dog", "horse", "ship", "frog", "truck"]
SOLVER = Broyden(steps=30, tolerance=1e-3)


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    """A model that segments, of random weights under a strong injection, so that its equilibria are easily found."""
    config = MDEQConfig((8,), expansion=1, groups=2, downsamplings=2)
    architecture = Architecture(config, SegmentationHeadConfig(), 19, FixedPoint(steps=100, tolerance=1e-3))
    return saved(tmp_path, "finetune", architecture, list(cityscapes.class_names()), {"test_size": None})


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A model that classifies pictures of 16 x 16 pixels, of random weights."""
    head = ClassificationHeadConfig(channels=(2, 2), final_channels=8)
    architecture = Architecture(MDEQConfig((8, 8), expansion=1, groups=2), head, len(NAMES), SOLVER)
    return saved(tmp_path, "pretrain", architecture, NAMES, {"image": 16})


def saved(folder: Path, stage: str, architecture: Architecture, names: list[str], params: dict) -> Path:
    torch.manual_seed(0)
    path, network = folder / f"{stage}.pt", architecture.build()
    for name, weight in network.named_parameters():
        if name == "backbone.stem.4.weight":
            weight.data.mul_(1e6)
    save_model(path, architecture, network, {"stage": stage, "names": names, "params": params})
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_standing_video_is_solved_once_and_answered_as_from_zero(workspace: Path, streets: Path) -> None:
    for number in range(3):
        (workspace / "frames").mkdir(exist_ok=True)
        cv2.imwrite(f"frames/a_{number:06}_leftImg8bit.png", noise(24, 32)[..., ::-1])
    own = Predictor(streets, Machine(workspace))(noise(24, 32)).value
    (workspace / "labels" / "a").mkdir(parents=True)
    for number in range(2):
        cv2.imwrite(f"labels/a/a_{number:06}_gtFine_labelIds.png", cityscapes.label_ids()[own])
    code, said, _ = invoke(streets, "frames", "--video", "--compare", "--labels", "labels", "--out", "out")
    figures = json.loads(Path("out/predictions.json").read_text())["clips"]["frames"]
    assert code == 0 and figures["frames"] == 3 and figures["before"]["evaluations"] == 1
    assert figures["first"]["evaluations"] == figures["zero"]["evaluations"] > 2 and figures["differing"] == 0
    assert all(figures[start]["miou"] == pytest.approx(100) for start in ("first", "zero", "before"))
    assert "1.0 evaluations of f from the frame before (100 % reach the tolerance), mIoU 100.00 %" in said
    drawn = cv2.imread("out/frames/a_000002_leftImg8bit_labels.png")[..., ::-1]
    assert np.array_equal(drawn, cityscapes.colours()[own])
    film = cv2.VideoCapture("out/frames/video.mp4")
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and film.read()[1].shape == (24, 32, 3)


def test_a_strip_shows_frames_evenly_in_their_order(
    workspace: Path, streets: Path, things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("frames").mkdir()
    predictor, drawn = Predictor(streets, Machine(workspace)), []
    with pytest.raises(DataError, match="no picture in it"):
        predict.strip(predictor, Path("frames"), 2, Path("strip.png"))
    for number in range(3):
        cv2.imwrite(f"frames/{number:03}.png", noise(24, 32, number)[..., ::-1])
    original = figures.strip
    monkeypatch.setattr(figures, "strip", lambda *arguments: drawn.append(arguments) or original(*arguments))
    predict.strip(predictor, Path("frames"), 2, Path("strip.png"))
    ((shown, predictions, _, _),) = drawn
    assert Path("strip.png").stat().st_size > 1000
    for seed, frame, prediction in zip((0, 2), shown, predictions, strict=True):
        assert np.array_equal(frame, noise(24, 32, seed))
        pixels = (frame / 255 - np.array(cityscapes.MEAN)) / np.array(cityscapes.STD)
        with torch.no_grad():
            logits = predictor.network(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).logits
        large = torch.nn.functional.interpolate(logits, (24, 32), mode="bilinear", align_corners=True)
        assert np.mean(large[0].argmax(0).numpy() == prediction) > 0.99
    cv2.imwrite("frames/999.png", noise(8, 32))
    with pytest.raises(DataError, match="999.png: of another size"):
        predict.strip(predictor, Path("frames"), 2, Path("strip.png"))
    with pytest.raises(DataError, match="does not segment"):
        predict.strip(Predictor(things, Machine(workspace)), Path("frames"), 2, Path("strip.png"))


def test_photos_know_nothing_of_each_other(workspace: Path, streets: Path) -> None:
    for seed in range(2):
        cv2.imwrite(f"{seed}.png", noise(24, 32, seed)[..., ::-1])
    assert invoke(streets, "1.png", "0.png", "--height", 12, "--out", "out")[0] == 0
    for seed in range(2):
        alone = Predictor(streets, Machine(workspace), height=12)(noise(24, 32, seed)).value
        assert alone.shape == (24, 32)
        drawn = cv2.imread(f"out/photos/{seed}_labels.png")[..., ::-1]
        assert np.array_equal(drawn, cityscapes.colours()[alone])


def test_a_video_file_is_classified_frame_by_frame(workspace: Path, things: Path) -> None:
    writer = cv2.VideoWriter("film.mp4", predict.CODE, 10.0, (64, 48))
    for seed in range(4):
        writer.write(np.full((48, 64, 3), 60 * seed, np.uint8))
    writer.release()
    assert invoke(things, "film.mp4", "--out", "out")[0] == 0
    record = json.loads(Path("out/predictions.json").read_text())
    assert record["clips"]["film"]["frames"] == 4 and "zero" not in record["clips"]["film"]
    assert list(record["answers"]) == [f"film/film_{number:06}" for number in range(4)]
    for best in record["answers"].values():
        assert len(best) == 5 and set(best) < set(NAMES) and sorted(best.values(), reverse=True) == [*best.values()]
    shown = cv2.VideoCapture("out/film/video.mp4")
    assert shown.get(cv2.CAP_PROP_FPS) == 10 and shown.get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_bars_are_as_long_as_their_probabilities() -> None:
    sheet = predict.bars(noise(30, 40), [("cat", 0.75), ("dog", 0.25)])
    assert sheet.shape == (360 + 2 * 30 + 10, 480, 3)
    green = (sheet[360:] == (134, 205, 174)).all(2)
    for row, share in ((10, 0.75), (40, 0.25)):
        assert green[row].sum() == pytest.approx(share * 464, abs=2)


def test_an_explicit_model_answers_without_a_solve(workspace: Path) -> None:
    explicit = saved(workspace, "classify", Architecture(ResNetConfig(width=8), None, 6), NAMES, {})
    cv2.imwrite("a.png", noise(50, 40)[..., ::-1])
    code, said, _ = invoke(explicit, "a.png", "--out", "out")
    assert code == 0 and said.splitlines()[0] == "photos: 1 picture"
    (film,) = predict.clips([Path("a.png").parent], video=True)
    answered = predict._answered(Predictor(explicit, Machine(workspace)), film, compare=True)
    assert [list(answers) for _, _, answers in answered] == [["zero"]]


def test_a_state_of_another_size_is_refused(workspace: Path, streets: Path) -> None:
    predictor = Predictor(streets, Machine(workspace))
    solved = predictor(noise(24, 32)).solution
    assert solved is not None
    with pytest.raises(ValueError, match=r"z0: a state of these images has the shape \(1, 256\), not \(1, 384\)"):
        predictor(noise(16, 32), solved.value)


def test_what_cannot_be_predicted_is_one_line(workspace: Path, streets: Path, things: Path) -> None:
    Path("text.png").write_text("no picture")
    Path("text.mp4").write_text("no video")
    Path("empty").mkdir()
    Path("mixed").mkdir()
    cv2.imwrite("mixed/a.png", noise(16, 16))
    cv2.imwrite("mixed/b.png", noise(24, 16))
    save_model(Path("nameless.pt"), Architecture(ResNetConfig(width=8), None, 6), torch.nn.Linear(1, 1), {})
    for arguments, message in (
        ((streets, "text.png"), "text.png: not a readable picture"),
        ((streets, "text.mp4"), "text.mp4: not a readable video"),
        ((streets, "none.png"), "none.png: no such file or folder"),
        ((streets, "empty"), "empty: no picture in it"),
        ((streets, "mixed", "--video"), "mixed: b has another size than the frames before it; leave out --video"),
        ((streets, "mixed/a.png", "mixed/a.png"), "mixed/a.png: two pictures of this name"),
        ((things, "mixed", "--labels", "empty"), "--labels: this model classifies"),
        ((workspace / "none.pt", "mixed"), "none.pt: no such file"),
    ):
        code, _, said = invoke(*arguments, "--out", "out")
        assert code == 2 and len(said.splitlines()) == 1 and message in said, said
