"""What reads z*: the classification head (Sec. 4.1) and the segmentation head (Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import checks


@dataclass(frozen=True)
class ClassificationHeadConfig:
    """Bottlenecks, one per scale, each merged into the next lower resolution (Sec. 4.1).

    Args:
        channels: Inner width of each bottleneck, highest resolution first.
        final_channels: Width of the features that are pooled and classified.
    """

    channels: tuple[int, ...]
    final_channels: int
    kind: Literal["classification"] = "classification"

    def __post_init__(self) -> None:
        checks.whole(1, final_channels=self.final_channels)
        for c in self.channels:
            checks.whole(1, channels=c)


@dataclass(frozen=True)
class SegmentationHeadConfig:
    """Reads `all` scales, resized to the first (as published), or the `highest` (the text)."""

    scales: Literal["all", "highest"] = "all"
    kind: Literal["segmentation"] = "segmentation"

    def __post_init__(self) -> None:
        checks.one_of(("all", "highest"), scales=self.scales)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions to 4 x `channels`, and a shortcut; inner norms are not affine."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, momentum: float) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels, affine=False, momentum=momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, affine=False, momentum=momentum)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs, affine=False, momentum=momentum)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            norm = nn.BatchNorm2d(outputs, momentum=momentum)
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 channels, H, W)."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return (self.norm3(self.conv3(y)) + self.shortcut(x)).relu()


class ClassificationHead(nn.Module):
    """All scales through bottlenecks, merged, pooled and classified."""

    def __init__(
        self,
        config: ClassificationHeadConfig,
        inputs: Sequence[int],
        classes: int,
        momentum: float,
    ) -> None:
        super().__init__()
        if len(config.channels) != len(inputs):
            raise ValueError(f"head.channels: must have one width per scale, {len(inputs)} in all")
        self.increase = nn.ModuleList()
        for channels, width in zip(inputs, config.channels, strict=True):
            self.increase.append(Bottleneck(channels, width, momentum))
        widths = [Bottleneck.expansion * c for c in config.channels]
        self.merge = nn.ModuleList()
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            norm = nn.BatchNorm2d(after, momentum=momentum)
            self.merge.append(nn.Sequential(conv, norm, nn.ReLU()))
        norm = nn.BatchNorm2d(config.final_channels, momentum=momentum)
        self.final = nn.Sequential(nn.Conv2d(widths[-1], config.final_channels, 1), norm, nn.ReLU())
        self.classifier = nn.Linear(config.final_channels, classes)
        initialise(self)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """[(B, C_i, H_i, W_i)] to logits (B, classes)."""
        merged = self.increase[0](scales[0])
        for merge, increase, z in zip(self.merge, list(self.increase)[1:], scales[1:], strict=True):
            merged = increase(z) + merge(merged)
        return self.classifier(self.final(merged).mean(dim=(2, 3)))


class SegmentationHead(nn.Module):
    """1x1 convolutions over the scales at the resolution of the first."""

    def __init__(
        self, config: SegmentationHeadConfig, inputs: Sequence[int], classes: int, momentum: float
    ) -> None:
        super().__init__()
        self.used = len(inputs) if config.scales == "all" else 1
        width = sum(inputs[: self.used])
        norm = nn.BatchNorm2d(width, momentum=momentum)
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1), norm, nn.ReLU(), nn.Conv2d(width, classes, 1)
        )
        initialise(self)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """[(B, C_i, H_i, W_i)] to logits (B, classes, H_1, W_1)."""
        first = scales[0]
        resized = [resize(z, first.shape[-2:]) for z in scales[1 : self.used]]
        return self.layers(torch.cat([first, *resized], dim=1))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corner pixels on corner pixels, as the published segmentation head and loss do."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def initialise(module: nn.Module) -> None:
    """Convolutions, biases too, normal with deviation 0.01 (published code)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.01)
