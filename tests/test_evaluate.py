"""Evaluation of tiny networks on tensors: official numbers, no neighbours, solver statistics, the files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from mdeq import Broyden, ClassificationHeadConfig, MDEQConfig, Network, Prediction, SegmentationHeadConfig
from mdeq.baselines import NarrowResNet18, ResNetConfig
from pipeline import trained as trained_module
from pipeline.checkpoints import Architecture, save_model
from pipeline.data import cityscapes
from pipeline.data.loading import Keys
from pipeline.data.manifest import DataError, checksum
from pipeline.machine import Machine
from pipeline.metrics import ConfusionMatrix
from pipeline.params import EvaluateParams
from pipeline.stages import evaluate
from pipeline.trained import Trained, load

CONFIG = MDEQConfig(channels=(8, 8), expansion=1, groups=2)
HEAD = ClassificationHeadConfig(channels=(2, 2), final_channels=8)
STEPS = 6


class Split:
    """Tensors as a data set of batches."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, classes: int) -> None:
        self.images, self.targets, self.classes, self.names = images, targets, classes, tuple("abcdefghij"[:classes])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[keys.indices], self.targets[keys.indices]


def make(network: torch.nn.Module, split: Split, names: tuple[str, ...]) -> Trained:
    facts: dict[str, str | int] = {"data/source": "generated", "data/digest": "0123", "samples": len(split)}
    return Trained(network.double().eval(), split, names, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), facts)


@pytest.fixture
def classifier() -> Trained:
    torch.manual_seed(0)
    images = torch.randn(11, 3, 8, 8, dtype=torch.float64)
    split = Split(images, torch.arange(11) % 7, 7)
    return make(Network(CONFIG, HEAD, 7, Broyden(steps=STEPS, tolerance=0.0)), split, tuple("abcdefg"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    return Machine(tmp_path)


def test_the_numbers_are_those_of_each_sample_alone(classifier: Trained, machine: Machine) -> None:
    values, matrix = evaluate.evaluate(classifier, 4, machine, "test")
    logits, residuals = [], []
    for index in range(11):
        images, _ = classifier.split[Keys(0, [index])]
        with torch.no_grad():
            alone = classifier.network(images)
        logits.append(alone.logits[0])
        residuals.append(alone.equilibrium.solution.relative[0])
    order = torch.stack(logits).argsort(1, descending=True)
    right = order == classifier.split.targets[:, None]  # type: ignore[attr-defined]
    assert values["eval/top1"] == pytest.approx(100 * right[:, 0].double().mean().item())
    assert values["eval/top5"] == pytest.approx(100 * right[:, :5].any(1).double().mean().item())
    assert values["solver/relative_residual"] == pytest.approx(torch.stack(residuals).mean().item())
    assert values["solver/relative_residual_max"] == pytest.approx(torch.stack(residuals).max().item())
    assert values["solver/nfe"] == STEPS + 1
    assert 0 < values["solver/steps_to_best"] <= STEPS
    assert values["solver/converged"] == 0 == values["solver/failed"]
    assert matrix.counts.sum() == 11


def test_run_writes_its_files_with_the_steps_that_were_asked_for(
    classifier: Trained, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *_: classifier)
    evaluate.run("cifar10", "tiny", EvaluateParams(batch=4, steps=3, examples=5), machine)
    out = Path("results/evaluate/cifar10-tiny")
    assert {file.name for file in out.iterdir()} == {
        "metrics.json",
        "confusion.csv",
        "confusion.png",
        "examples.png",
    }
    record = json.loads((out / "metrics.json").read_text())
    assert record["solver/nfe"] == 4 and record["samples"] == 11 and record["data/source"] == "generated"
    with (out / "confusion.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["true", *"abcdefg"] and [row[0] for row in rows] == list("abcdefg")
    assert sum(int(cell) for row in rows for cell in row[1:]) == 11


def test_segmentation_is_judged_at_the_size_of_the_labels(machine: Machine) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (3, 16, 24))
    targets[:, :4] = 255
    config = MDEQConfig(channels=(8, 8), expansion=1, groups=2, downsamplings=2)
    network = Network(config, SegmentationHeadConfig(), 3, Broyden(steps=STEPS))
    whole = make(network, Split(torch.randn(3, 3, 16, 24, dtype=torch.float64), targets, 3), ("a", "b", "c"))
    values, _ = evaluate.evaluate(whole, 2, machine, "test")
    direct = ConfusionMatrix(3)
    with torch.no_grad():
        small = network(whole.split[Keys(0, [0, 1, 2])][0]).logits
    assert small.shape[2:] == (4, 6)
    large = interpolate(small, size=(16, 24), mode="bilinear", align_corners=True)
    direct.update(large, targets)
    for name, value in direct.compute().items():
        assert values[name] == pytest.approx(value)
    assert direct.counts.sum() == 3 * 12 * 24
    assert "eval/top1" not in values
    assert len(evaluate.examples(whole, 2, machine, "test").axes) == 2 * 4


def test_mirrored_and_resized_views_are_averaged(machine: Machine) -> None:
    """Pixels answered one by one: the mirrored view agrees, a view at half size is a resized answer."""
    torch.manual_seed(0)

    class Pixelwise(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Prediction:
            return Prediction(3 * images, None)

    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    alone, _ = evaluate.predict(Pixelwise(), images, (16, 24))
    mirrored, _ = evaluate.predict(Pixelwise(), images, (16, 24), [(1.0, False), (1.0, True)])
    torch.testing.assert_close(mirrored, alone.softmax(1))
    both, _ = evaluate.predict(Pixelwise(), images, (16, 24), [(1.0, False), (0.5, True)])
    half = interpolate(images, size=(8, 12), mode="bilinear", align_corners=True)
    half = interpolate(half.float(), size=(16, 24), mode="bilinear", align_corners=True)
    expected = (alone.softmax(1) + (3 * half).softmax(1)) / 2
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)


def test_written_scenes_score_officially_what_we_say_class_by_class(machine: Machine) -> None:
    """The official tool reads our files: found by name, of the photo's size, each class's IoU ours to 1e-6."""
    tool = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    rng = np.random.default_rng(0)
    frames = tuple((f"leftImg8bit/val/ulm/ulm_{i:06}_000019_leftImg8bit.png", 24, 16) for i in range(3))
    targets = rng.integers(0, 19, (3, 16, 24))
    targets[:, :3] = 255
    truths = []
    for (path, _, _), train_ids in zip(frames, targets, strict=True):
        ids = np.where(train_ids == 255, 3, cityscapes.label_ids()[train_ids.clip(max=18)])  # 3: out of roi
        truths.append(Path(Path(path).name.replace("_leftImg8bit", "_gtFine_labelIds")))
        assert cv2.imwrite(str(truths[-1]), ids.astype(np.uint8))

    class Answers(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Prediction:
            return Prediction(images, None)

    guesses = np.where(rng.random(targets.shape) < 0.6, targets.clip(max=18), rng.integers(0, 19, targets.shape))
    scores = torch.nn.functional.one_hot(torch.from_numpy(guesses), 19).permute(0, 3, 1, 2).double()
    scenes = replace(make(Answers(), Split(scores, torch.from_numpy(targets), 19), ("",) * 19), frames=frames)
    folder = Path("predictions")
    folder.mkdir()
    values, matrix = evaluate.evaluate(scenes, 2, machine, "test", predictions=folder)
    tool.args.predictionPath, tool.args.predictionWalk = str(folder.resolve()), None
    tool.args.evalInstLevelScore = tool.args.JSONOutput = False
    tool.args.quiet = True
    pairs = [tool.getPrediction(tool.args, str(truth.resolve())) for truth in truths]
    official = tool.evaluateImgLists(pairs, [str(truth) for truth in truths], tool.args)
    by_class = [official["classScores"][name] for name in cityscapes.class_names()]
    assert matrix.iou() == pytest.approx(by_class, abs=1e-6)
    assert values["eval/miou"] == pytest.approx(100 * official["averageScoreClasses"], abs=1e-4)


def test_accuracy_by_steps_is_that_of_a_solver_with_that_limit(classifier: Trained, machine: Machine) -> None:
    params = EvaluateParams(batch=4, accuracy_up_to=4)
    curve = evaluate.accuracy_by_steps(classifier, params, machine, "test")["by_steps"]
    assert list(curve) == ["1", "2", "3", "4"]
    for steps, value in curve.items():
        with torch.no_grad():
            solver = Broyden(steps=int(steps), tolerance=0.0)
            classifier.network.get_submodule("backbone").forward_solver = solver
            answers = classifier.network(classifier.split[Keys(0, list(range(11)))][0]).logits.argmax(1)
        right = answers == classifier.split.targets  # type: ignore[attr-defined]
        assert value == pytest.approx(100 * right.double().mean().item())
    assert evaluate.accuracy_by_steps(classifier, EvaluateParams(batch=4), machine, "test") == {}
    unrolled = make(Network(replace(CONFIG, unrolled=2), HEAD, 7), classifier.split, classifier.names)  # type: ignore[arg-type]
    assert evaluate.accuracy_by_steps(unrolled, params, machine, "test") == {}  # has no solver to limit


def test_an_explicit_model_has_no_solver(machine: Machine) -> None:
    split = Split(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), 10)
    names = tuple("abcdefghij")
    values, _ = evaluate.evaluate(make(NarrowResNet18(ResNetConfig(width=2), 10), split, names), 2, machine, "test")
    assert {name for name in values if name.startswith("solver/")} == set()


def test_a_sample_without_a_finite_iterate_is_counted_not_averaged(classifier: Trained) -> None:
    solution = classifier.network(classifier.split[Keys(0, [0, 1])][0]).equilibrium.solution
    solution.relative[0] = torch.inf
    statistics = evaluate.SolverStatistics()
    statistics.update(solution)
    values = statistics.compute()
    assert values["solver/failed"] == 1
    assert values["solver/relative_residual"] == pytest.approx(float(solution.relative[1].detach()))


def test_a_picture_is_the_photo_again(classifier: Trained) -> None:
    photo = np.random.default_rng(0).random((8, 8, 3))
    image = torch.from_numpy((photo - 0.5) / 0.25).permute(2, 0, 1)
    assert np.allclose(classifier.picture(image), photo)


def test_loading_says_what_is_missing_and_what_does_not_fit(
    classifier: Trained, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="results/classify/tiny/model.pt: .*pipeline classify tiny"):
        load("cifar10", "tiny", machine)
    torch.manual_seed(0)
    architecture = Architecture(CONFIG, HEAD, 7, Broyden(steps=STEPS))
    save_model(Path("results/classify/tiny/model.pt"), architecture, architecture.build(), {"params": {}})
    with pytest.raises(DataError, match="results/data/cifar10/summary.json: .*pipeline prepare cifar10"):
        load("cifar10", "tiny", machine)
    Path("results/data/cifar10").mkdir(parents=True)
    Path("results/data/cifar10/manifest.csv").write_bytes(b"")
    Path("results/data/cifar10/summary.json").write_text(json.dumps({"source": "folder", "manifest": checksum(b"")}))
    monkeypatch.setattr(trained_module, "_open", lambda *_: classifier.split)
    found = load("cifar10", "tiny", machine)
    assert found.facts["samples"] == 11 and found.facts["data/source"] == "folder"
    other = Split(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), 10)
    monkeypatch.setattr(trained_module, "_open", lambda *_: other)
    with pytest.raises(DataError, match="trained for 7 classes, but the data have 10"):
        load("cifar10", "tiny", machine)
