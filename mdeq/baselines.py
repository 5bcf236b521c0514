"""Explicit models that the paper compares with: ResNet-18 for small images, of any width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mdeq.model import Prediction


@dataclass(frozen=True)
class ResNetConfig:
    """The width of a ResNet-18.

    Args:
        width: Channels of the first stage, doubled at each of the other three: 8 makes the 170K parameters of
            Table 1, 64 the original's 11M.
    """

    width: int = 8
    kind: Literal["resnet18"] = "resnet18"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError("width: must be at least 1")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut (He et al., CVPR 2016, Fig. 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        inner = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class NarrowResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no pooling before the end, as is usual for 32 x 32 images (Table 1)."""

    def __init__(self, config: ResNetConfig, classes: int) -> None:
        """Build four stages of two blocks; the last three halve the resolution."""
        super().__init__()
        widths = [config.width * 2**stage for stage in range(4)]
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            blocks += [BasicBlock(inputs, width, 1 if stage == 0 else 2), BasicBlock(width, width, 1)]
            inputs = width
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Prediction:
        """Return the logits (B, classes) of images (B, 3, H, W)."""
        features = self.pool(self.stages(self.stem(image))).flatten(1)
        return Prediction(self.linear(features), None)
