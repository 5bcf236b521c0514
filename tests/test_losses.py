"""Several losses on one equilibrium: they share its adjoint, and two tasks learn on one backbone."""

import math

import numpy as np
import torch
from torch import Tensor

from mdeq import MDEQ, Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, SegmentationHeadConfig
from mdeq.heads import ClassificationHead, SegmentationHead
from mdeq.losses import IGNORE, classification_loss, joint_loss, segmentation_loss
from pipeline.data.objects import photo
from pipeline.data.scenes import street

KINDS = ("airplane", "frog", "truck")
GROUPS = {"ground": range(6, 11), "built": range(11, 21), "green": range(21, 23), "sky": range(23, 24)}
CONFIG = MDEQConfig(channels=(8, 16), expansion=2, groups=4, downsamplings=1)


def backbone() -> MDEQ:
    torch.manual_seed(0)
    return MDEQ(CONFIG, Broyden(steps=8), Implicit(Gmres(steps=8)))


def test_losses_on_several_scales_share_one_adjoint_solve():
    """A main loss on all scales and auxiliary ones on each: the adjoint is linear, so the gradients add up."""
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


def entropy(labels: Tensor) -> float:
    """The least cross entropy that is possible without a look at the image."""
    p = torch.bincount(labels.flatten()).double() / labels.numel()
    return float(-(p[p > 0] * p[p > 0].log()).sum())


def test_one_backbone_learns_to_classify_and_to_segment():
    rng = np.random.default_rng(0)
    kinds = torch.arange(24) % len(KINDS)
    pictures = np.stack([photo(rng, KINDS[k], 32, 32) for k in kinds])
    scenes, ids = map(np.stack, zip(*(street(rng, 32, 64) for _ in range(8)), strict=True))
    group = torch.full((256,), IGNORE)
    for i, members in enumerate(GROUPS.values()):
        group[list(members)] = i
    labels = group[torch.from_numpy(ids).long()]

    model = backbone()
    classify = ClassificationHead(ClassificationHeadConfig((8, 8), 32), CONFIG.channels, len(KINDS), 0.1)
    segment = SegmentationHead(SegmentationHeadConfig(), CONFIG.channels, len(GROUPS), 0.1)
    modules = torch.nn.ModuleList([model, classify, segment])
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    images = [torch.from_numpy(p).permute(0, 3, 1, 2).float() / 128 - 1 for p in (pictures, scenes)]
    for _ in range(25):
        optimizer.zero_grad()
        first = classification_loss(classify(model(images[0]).scales), kinds)
        second = segmentation_loss(segment(model(images[1]).scales), labels)
        joint_loss([first, second], [1.0, 1.0]).backward()
        optimizer.step()
    assert first < 0.7 * math.log(len(KINDS))
    assert second < 0.7 * entropy(labels[labels != IGNORE])
