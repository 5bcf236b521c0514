"""The measures against sorting, sets of pixels, the official formula per label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mdeq import Broyden
from mdeq.losses import IGNORE
from pipeline.train.metrics import ConfusionMatrix, SolverStatistics, TopK


def test_topk_equals_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 17, generator=generator)
    targets = torch.randint(0, 17, (400,), generator=generator)
    order = logits.argsort(1, descending=True)
    right = order == targets[:, None]
    metric = TopK(17)
    for part in range(0, 400, 64):
        metric.update(logits[part : part + 64], targets[part : part + 64])
    values = metric.compute()
    assert values["eval/top1"] == pytest.approx(100 * right[:, :1].any(1).double().mean().item())
    assert values["eval/top5"] == pytest.approx(100 * right[:, :5].any(1).double().mean().item())
    by_class = [
        right[targets == label, :1].any(1).double().mean().item() for label in targets.unique()
    ]
    assert values["eval/macro"] == pytest.approx(100 * np.mean(by_class))


def test_topk_has_no_top5_of_five_classes() -> None:
    metric = TopK(5)
    metric.update(torch.eye(5), torch.arange(5))
    assert metric.compute() == {"eval/top1": 100.0, "eval/macro": 100.0}


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_network_without_an_answer_is_not_right(value: float) -> None:
    metric = TopK(10)
    assert math.isnan(metric.compute()["eval/top1"])  # no samples are not 0 per cent
    metric.update(torch.full((8, 10), value), torch.zeros(8, dtype=torch.int64))
    assert metric.compute()["eval/top1"] == 0.0


def test_miou_is_that_of_sets_of_pixels() -> None:
    """The official tool's scores are compared in test_data_cityscapes."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 19, (4, 30, 40))
    targets[rng.random(targets.shape) < 0.2] = IGNORE
    logits = rng.standard_normal((4, 19, 30, 40)).astype(np.float32)
    # half of the answers right, so that the scores are far from chance
    np.put_along_axis(logits[:2], np.where(targets == IGNORE, 0, targets)[:2, None], 9.0, axis=1)
    metric = ConfusionMatrix(19)
    for image in range(4):
        part = slice(image, image + 1)
        metric.update(torch.from_numpy(logits[part]), torch.from_numpy(targets[part]))
    counted = targets != IGNORE
    prediction, targets = logits.argmax(1)[counted], targets[counted]
    ious, accuracies = [], []
    for label in range(19):
        truth, guess = (set(np.flatnonzero(ids == label)) for ids in (targets, prediction))
        ious.append(len(truth & guess) / len(truth | guess))
        accuracies.append(len(truth & guess) / len(truth))
    assert metric.iou() == pytest.approx(ious)
    assert metric.compute() == pytest.approx(
        {
            "eval/miou": 100 * np.mean(ious),
            "eval/mean_accuracy": 100 * np.mean(accuracies),
            "eval/pixel_accuracy": 100 * (prediction == targets).mean(),
            "eval/classes_present": 19,
        }
    )


def test_absent_classes_are_skipped_and_counted_but_their_false_alarms_cost() -> None:
    targets = torch.tensor([[[0, 0, 1, IGNORE]]])
    predictions = torch.tensor([[[0, 2, 1, 2]]])  # no label is 2: a false alarm, one ignored
    metric = ConfusionMatrix(4)
    metric.add(predictions, targets)
    values = metric.compute()
    assert values["eval/classes_present"] == 2
    assert values["eval/miou"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert np.isnan(metric.iou()[2:]).all()


def test_logits_of_pixels_are_resized_to_their_labels() -> None:
    """Bilinear between pixel centres: the left half of the labels is nearer the left column."""
    logits = torch.tensor([[[[5.0, -5.0]], [[-5.0, 5.0]]]])  # (1, 2 classes, 1, 2)
    metric = ConfusionMatrix(2)
    metric.update(logits, torch.tensor([[[0, 0, 1, 1]] * 2]))
    assert metric.compute()["eval/miou"] == 100


def test_solver_statistics_are_per_sample_and_failures_are_counted() -> None:
    """z = a z + 1 - a is solved by 1; where a is NaN nothing is found."""
    slopes = torch.tensor([0.0, 0.5, 0.9, math.nan])[:, None]

    def f(z: torch.Tensor) -> torch.Tensor:
        return slopes * z + 1 - slopes

    statistics, solutions = SolverStatistics(), []
    for steps in (1, 3):
        solutions.append(Broyden(steps=steps, tolerance=1e-4)(f, torch.zeros(4, 1)))
        statistics.update(solutions[-1])
    values = statistics.compute()
    relative = torch.cat([solution.relative for solution in solutions])
    finite = relative[relative.isfinite()]
    assert len(finite) == 6
    assert values["solver/relative_residual"] == pytest.approx(float(finite.mean()))
    assert values["solver/relative_residual_max"] == pytest.approx(float(finite.max()))
    assert values["solver/failed"] == 2
    assert values["solver/nfe"] == sum(solution.nfe for solution in solutions) / 2
    converged = torch.cat([solution.converged for solution in solutions]).float().mean()
    assert values["solver/converged"] == pytest.approx(float(converged))
    second = torch.cat([solution.trace[1] for solution in solutions])
    expected = float(second[second.isfinite()].mean())
    assert values["solver/residual_after_2"] == pytest.approx(expected)
    assert "solver/residual_after_4" not in values and SolverStatistics().compute() == {}
