"""Losses written out; several on one equilibrium share its adjoint."""

import math

import pytest
import torch
from torch import Tensor

from mdeq import (
    MDEQ,
    Broyden,
    ClassificationHeadConfig,
    Gmres,
    Implicit,
    MDEQConfig,
    SegmentationHeadConfig,
)
from mdeq.heads import ClassificationHead, SegmentationHead
from mdeq.losses import (
    IGNORE,
    HardExamples,
    classification_loss,
    joint_loss,
    pixel_weight,
    segmentation_loss,
)

CONFIG = MDEQConfig(channels=(8, 16), expansion=2, groups=4, downsamplings=1)


def backbone() -> MDEQ:
    torch.manual_seed(0)
    return MDEQ(CONFIG, Broyden(steps=8), Implicit(Gmres(steps=8)))


def test_losses_on_several_scales_share_one_adjoint_solve():
    """A main loss on all scales, auxiliary ones on each: as the adjoint is linear, they add up."""
    model = backbone().double()
    model.backward = Implicit(Gmres(steps=60, tolerance=1e-12))
    heads = [
        ClassificationHead(ClassificationHeadConfig((4, 4), 8), (8, 16), 3, 0.1).double(),
        SegmentationHead(SegmentationHeadConfig(), (8,), 4, 0.1).double(),
        ClassificationHead(ClassificationHeadConfig((4,), 8), (16,), 3, 0.1).double(),
    ]
    image, label = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    solves: list[int] = []
    model.on_backward = lambda solution: solves.append(solution.nfe)

    def losses() -> list[Tensor]:
        z = model(image).scales
        pixels = label[:, None, None].expand(2, 8, 8)
        return [
            classification_loss(heads[0](z), label),
            segmentation_loss(heads[1](z[:1]), pixels),
            classification_loss(heads[2](z[1:]), label),
        ]

    weights = (1.0, 0.4, 0.3)
    parameters = list(model.parameters())
    together = torch.autograd.grad(joint_loss(losses(), weights), parameters)
    assert len(solves) == 1
    alone = [torch.autograd.grad(losses()[i], parameters) for i in range(3)]
    for ours, *parts in zip(together, *alone, strict=True):
        expected = sum(w * part for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def squares(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a square of one of three colours: the images, the colours, and who is inside."""
    colours = torch.arange(count) % 3
    images, inside = (
        0.3 * torch.randn(count, 3, 16, 16),
        torch.zeros(count, 16, 16, dtype=torch.long),
    )
    for i, colour in enumerate(colours):
        top, left = torch.randint(0, 8, (2,)).tolist()
        images[i, colour, top : top + 8, left : left + 8] += 2
        inside[i, top : top + 8, left : left + 8] = colour + 1
    inside[:, 0] = IGNORE
    return images, colours, inside


def test_one_backbone_learns_to_classify_and_to_segment():
    model = backbone()
    head = ClassificationHeadConfig((8, 8), 32)
    classify = ClassificationHead(head, CONFIG.channels, 3, 0.1)
    segment = SegmentationHead(SegmentationHeadConfig(), CONFIG.channels, 4, 0.1)
    modules = torch.nn.ModuleList([model, classify, segment])
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    images, colours, inside = squares(24)
    counts = torch.bincount(inside[inside != IGNORE]).double()
    entropy = float(-(counts / counts.sum() * (counts / counts.sum()).log()).sum())
    for _ in range(25):
        optimizer.zero_grad()
        scales = model(images).scales
        first = classification_loss(classify(scales), colours)
        second = segmentation_loss(segment(scales), inside)
        joint_loss([first, second], [1.0, 1.0]).backward()
        optimizer.step()
    assert first < 0.7 * math.log(3)
    assert second < 0.7 * entropy  # the least that is possible without a look at the image


def test_label_smoothing_shares_the_target():
    """(1 - s) of the label's and s of all classes' mean negative log probability."""
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    log_p = logits.log_softmax(1)
    label, mean = -log_p[torch.arange(4), labels], -log_p.mean(1)
    expected = (0.9 * label + 0.1 * mean).mean()
    torch.testing.assert_close(classification_loss(logits, labels, 0.1), expected)


def test_segmentation_counts_weighted_pixels_alone():
    logits, labels = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 4, 6))
    labels[0, :2] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0])
    counted = labels != IGNORE
    chosen = labels[counted]
    negative = -logits.log_softmax(1).permute(0, 2, 3, 1)[counted][range(len(chosen)), chosen]
    expected = (weights[chosen] * negative).sum() / weights[chosen].sum()
    torch.testing.assert_close(segmentation_loss(logits, labels, weights), expected)
    torch.testing.assert_close(pixel_weight(labels, weights), weights[chosen].sum())
    for hard in (None, HardExamples()):
        logits.requires_grad_()
        nothing = segmentation_loss(logits, torch.full_like(labels, IGNORE), weights, hard)
        nothing.backward()
        assert nothing == 0 and not logits.grad.any()


def test_hard_examples_are_those_of_small_probability_and_at_least_so_many():
    logits, labels = torch.randn(1, 3, 5, 5), torch.randint(0, 3, (1, 5, 5))
    p = logits.softmax(1).gather(1, labels[:, None]).flatten().sort().values
    below = p[p <= 0.4]
    found = segmentation_loss(logits, labels, hard=HardExamples(threshold=0.4, keep=1))
    torch.testing.assert_close(found, -below.log().mean())
    found = segmentation_loss(logits, labels, hard=HardExamples(threshold=0.0, keep=7))
    torch.testing.assert_close(found, -p[:7].log().mean())
    for settings in ({"threshold": 1.5}, {"keep": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            HardExamples(**settings)
