"""Evaluation of tiny networks on tensors: official numbers, no neighbours, files, all limits."""

from __future__ import annotations

import csv
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mdeq import Broyden, ClassificationHeadConfig, MDEQConfig, Network, SegmentationHeadConfig
from mdeq.baselines import NarrowResNet18, ResNetConfig
from mdeq.saved import Architecture
from pipeline import files, weights
from pipeline.data import cityscapes
from pipeline.data.loading import Keys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import EvaluateParams
from pipeline.sets import SETS
from pipeline.stages import evaluate, recorded
from pipeline.train.checkpoints import save_model
from pipeline.train.metrics import ConfusionMatrix
from pipeline.weights import Trained

CONFIG = MDEQConfig(channels=(8, 8), expansion=1, groups=2)
HEAD = ClassificationHeadConfig(channels=(2, 2), final_channels=8)
STEPS = 6
PARAMS = EvaluateParams(batch=4, examples=5)


class Split:
    """Tensors as a data set of batches."""

    def __init__(self, images: Tensor, targets: Tensor, classes: int) -> None:
        self.images, self.targets, self.classes = images, targets, classes
        self.names = tuple("abcdefghijklmnopqrstuvwxyz"[:classes])
        self.frames = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        return self.images[keys.indices], self.targets[keys.indices]


def make(network: torch.nn.Module, split: Split, dataset: str = "cifar10") -> Trained:
    facts = {"model": "tiny", "source": "generated", "digest": "0123", "builds_on": "made-by"}
    return Trained("tiny", network.double().eval(), split, SETS[dataset], facts)


@pytest.fixture
def classifier() -> Trained:
    torch.manual_seed(0)
    images = torch.randn(11, 3, 8, 8, dtype=torch.float64)
    split = Split(images, torch.arange(11) % 7, 7)
    return make(Network(CONFIG, HEAD, 7, Broyden(steps=STEPS, tolerance=0.0)), split)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    return Machine(tmp_path)


def measured(
    trained: Trained, machine: Machine, params: EvaluateParams = PARAMS
) -> tuple[dict[str, float], ConfusionMatrix]:
    return evaluate.evaluate(trained, params, machine, Path("predictions"))


def test_the_numbers_are_those_of_each_sample_alone(classifier: Trained, machine: Machine) -> None:
    values, matrix = measured(classifier, machine)
    logits, residuals = [], []
    for index in range(11):
        with torch.no_grad():
            alone = classifier.network(classifier.split[Keys(0, [index])][0])
        logits.append(alone.logits[0])
        residuals.append(alone.equilibrium.solution.relative[0])
    order = torch.stack(logits).argsort(1, descending=True)
    right = order == classifier.split.targets[:, None]
    residual = torch.stack(residuals)
    assert values["eval/top1"] == pytest.approx(100 * right[:, 0].double().mean().item())
    assert values["eval/top5"] == pytest.approx(100 * right[:, :5].any(1).double().mean().item())
    assert values["solver/relative_residual"] == pytest.approx(residual.mean().item())
    assert values["solver/relative_residual_max"] == pytest.approx(residual.max().item())
    assert values["solver/nfe"] == STEPS + 1 and matrix.counts.sum() == 11
    assert values["solver/converged"] == 0 == values["solver/failed"]


def test_the_stage_writes_its_files_with_the_steps_that_were_asked_for(
    classifier: Trained, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load", lambda *_: classifier)
    out = Path("results/evaluate/cifar10-tiny")
    evaluate.run("cifar10", "tiny", replace(PARAMS, steps=3, accuracy_up_to=2), machine)
    names = {"confusion.png", "confusion.csv", "by_steps.csv", "examples.png"}
    names |= {"facts.json", "metrics.json", "run.jsonl"}
    assert {path.name for path in out.iterdir()} == names
    values = json.loads((out / "metrics.json").read_text())
    assert values["solver/nfe"] == 4 and all(type(value) is float for value in values.values())
    facts = json.loads((out / "facts.json").read_text())
    assert facts["source"] == "generated" and facts["run"]
    with (out / "confusion.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["true", *"abcdefg"] and [row[0] for row in rows] == list("abcdefg")
    assert sum(int(cell) for row in rows for cell in row[1:]) == 11
    assert len(pd.read_csv(out / "by_steps.csv")) == 2
    record = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert {"tag": "builds_on", "value": "made-by"} in record
    curve = {row["step"] for row in record if "by_steps/accuracy" in row.get("metrics", {})}
    assert curve == {1, 2}


def test_another_process_that_writes_the_same_results_is_refused(
    classifier: Trained, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load", lambda *_: classifier)
    out = Path("results/evaluate/cifar10-tiny")
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold() -> None:
        with recorded("evaluate", "cifar10-tiny", {}, machine):
            ready.set()
            done.wait(60)

    other = context.Process(target=hold)
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="cifar10-tiny: another process is writing it"):
        evaluate.run("cifar10", "tiny", PARAMS, machine)
    done.set()
    other.join()
    assert [path.name for path in out.iterdir()] == ["run.jsonl"]  # the other's


def segmenter(classes: int) -> Network:
    torch.manual_seed(0)
    config = MDEQConfig(channels=(8, 8), expansion=1, groups=2, downsamplings=2)
    solver = Broyden(steps=STEPS, tolerance=0.0)
    return Network(config, SegmentationHeadConfig(), classes, solver)


def test_scenes_are_measured_at_the_size_of_their_labels_and_written_at_that_of_their_photos(
    machine: Machine,
) -> None:
    network = segmenter(19)
    targets = torch.randint(0, 19, (3, 16, 24))
    targets[:, :4] = 255
    split = Split(torch.randn(3, 3, 16, 24, dtype=torch.float64), targets, 19)
    split.frames = tuple((f"leftImg8bit/val/ulm/ulm_{i}_leftImg8bit.png", 48, 32) for i in range(3))
    whole = make(network, split, "cityscapes")
    values, matrix = measured(whole, machine, replace(PARAMS, batch=2))
    direct = ConfusionMatrix(19)
    with torch.no_grad():
        small = network(split.images).logits
    assert small.shape[2:] == (4, 6)
    large = interpolate(small, size=(16, 24), mode="bilinear", align_corners=True)
    direct.add(large.argmax(1), targets)
    assert torch.equal(matrix.counts, direct.counts) and direct.counts.sum() == 3 * 12 * 24
    for name, value in direct.compute().items():
        assert values[name] == pytest.approx(value)
    assert "eval/top1" not in values
    for number, answer in enumerate(large.argmax(1).numpy()):
        ids = cv2.imread(f"predictions/ulm_{number}_pred_labelIds.png", cv2.IMREAD_UNCHANGED)
        assert ids.shape == (32, 48)
        assert np.array_equal(ids[::2, ::2], cityscapes.label_ids()[answer])
    Path("predictions/stale.png").touch()
    measured(whole, machine, replace(PARAMS, batch=1))
    assert len(list(Path("predictions").iterdir())) == 3
    assert len(evaluate.examples(whole, 2, "cpu").axes) == 2 * 4


@pytest.mark.parametrize("segments", [False, True])
def test_accuracy_and_residual_by_evaluations_are_those_of_a_solver_with_that_limit(
    classifier: Trained, machine: Machine, segments: bool
) -> None:
    """Beyond the limit of the model, too; one evaluation after another of one solve per batch."""
    trained, up_to = classifier, STEPS + 2
    if segments:
        labels = torch.randint(0, 3, (5, 16, 24))
        images = torch.randn(5, 3, 16, 24, dtype=torch.float64)
        trained = make(segmenter(3), Split(images, labels, 3), "cityscapes")
    curve = evaluate.by_steps(trained, replace(PARAMS, accuracy_up_to=up_to), machine)
    assert curve["evaluations"].tolist() == list(range(1, up_to + 1))
    backbone = trained.network.backbone
    for row in curve.itertuples():
        backbone.forward_solver = replace(backbone.forward_solver, steps=row.evaluations)
        with torch.no_grad():
            found = trained.network(trained.split.images)
        metric = trained.metric()
        metric.update(found.logits.float(), trained.split.targets)
        assert row.accuracy == pytest.approx(metric.compute()[trained.dataset.measure])
        residual = found.equilibrium.solution.relative.mean().item()
        assert row.residual == pytest.approx(residual, rel=1e-6)
    assert curve["residual"].iloc[-1] < curve["residual"].iloc[0]


def test_without_a_solver_there_is_no_curve(classifier: Trained, machine: Machine) -> None:
    asked = replace(PARAMS, accuracy_up_to=3)
    unrolled = make(Network(replace(CONFIG, unrolled=2), HEAD, 7), classifier.split)
    explicit = make(NarrowResNet18(ResNetConfig(width=2), 7), classifier.split)
    for trained, params in ((classifier, PARAMS), (unrolled, asked), (explicit, asked)):
        curve = evaluate.by_steps(trained, params, machine)
        assert list(curve.columns) == ["evaluations", "accuracy", "residual"] and not len(curve)
    values, _ = measured(explicit, machine)
    assert not any(name.startswith("solver/") for name in values)


def test_loading_says_what_is_missing_and_what_does_not_fit(
    classifier: Trained, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("results/classify/tiny/model.safetensors")
    with pytest.raises(UserError, match=f"{path}: .*classify tiny"):
        weights.load("cifar10", "tiny", machine)
    architecture = Architecture(CONFIG, HEAD, 7, Broyden(steps=STEPS))
    facts = {"dataset": "cifar10", "run": "r", "params": {}}
    save_model(path, architecture.build(), architecture, facts)
    with pytest.raises(UserError, match=r"results/data/cifar10/.*: .*pipeline prepare cifar10"):
        weights.load("cifar10", "tiny", machine)
    with pytest.raises(UserError, match="trained on cifar10, not on imagenet"):
        weights.load("imagenet", str(path), machine)
    summary = {"source": "folder", "manifest": files.digest(b""), "images": {}}
    files.write_json(Path("results/data/cifar10/summary.json"), summary)
    files.write(Path("results/data/cifar10/manifest.csv"), b"")
    monkeypatch.setattr(weights, "evaluation_data", lambda *_: classifier.split)
    found = weights.load("cifar10", "tiny", machine)
    assert found.name == "tiny" and found.facts["builds_on"] == "r"
    assert found.facts["samples"] == 11 and found.facts["source"] == "folder"
    photo = np.random.default_rng(0).random((8, 8, 3))
    image = (photo - np.array(found.dataset.mean)) / np.array(found.dataset.std)
    assert np.allclose(found.picture(torch.from_numpy(image).permute(2, 0, 1)), photo)
    digest = files.file_digest(path)[:8]
    for by_path in (str(path), "../classify/tiny"):
        assert weights.load("cifar10", by_path, machine).name == f"model-{digest}"
    other = Split(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), 10)
    monkeypatch.setattr(weights, "evaluation_data", lambda *_: other)
    with pytest.raises(UserError, match="trained for 7 classes, the data have 10"):
        weights.load("cifar10", "tiny", machine)
