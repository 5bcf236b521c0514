"""The models that the paper compares with: ResNets, neural ODEs, and those of other libraries.

A library is imported when a model of it is built, by the name that `ExplicitConfig` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import checks
from mdeq.heads import SegmentationHead, SegmentationHeadConfig
from mdeq.model import Prediction

CLASSIFIERS = {
    "alexnet": "torchvision",
    "resnet18": "torchvision",
    "resnet34": "torchvision",
    "resnet50": "torchvision",
    "resnet101": "torchvision",
    "wide_resnet50_2": "torchvision",
    "densenet121": "torchvision",
    "densenet264d": "timm",
    "hrnet_w18": "timm",
}
"""The library of each classifier that `ExplicitConfig` may name (Table 2, Figure 4b)."""

SEGMENTERS = {
    "fcn_resnet50": "torchvision",
    "fcn_resnet101": "torchvision",
    "deeplabv3_resnet50": "torchvision",
    "deeplabv3_resnet101": "torchvision",
    "hrnet_w18_small_v2": "timm",
    "hrnet_w48": "timm",
    "DeepLabV3Plus_mobilenet_v2": "smp",
    "PSPNet_resnet101": "smp",
    "UnetPlusPlus_resnet101": "smp",
}
"""Likewise the segmentation models (Table 3): torchvision's read dilated ResNets, HRNetV2 is timm's
backbone under a head over all of its scales, smp is segmentation-models-pytorch."""

LIBRARIES = CLASSIFIERS | SEGMENTERS


@dataclass(frozen=True)
class ResNetConfig:
    """The width of a ResNet-18.

    Args:
        width: Channels of the first stage, doubled at each of the other three: 8 makes the 170K
            parameters of Table 1, 64 the original's 11M.
    """

    width: int = 8
    kind: Literal["resnet18"] = "resnet18"

    def __post_init__(self) -> None:
        checks.whole(1, width=self.width)


@dataclass(frozen=True)
class NeuralODEConfig:
    """A neural ODE on images, augmented or not (Dupont et al., NeurIPS 2019, as in Table 1).

    Args:
        filters: Width of the inner convolution of the dynamics; 125 makes 172K parameters, as do
            64 with ten more channels.
        augmented: Channels of zeros appended to the image: 0 for a plain neural ODE, 10 for the
            augmented one.
        tolerance: Relative and absolute, of the adaptive Dormand-Prince solver and its adjoint.
        image: Height and width: the classifier reads every pixel of the final state.
    """

    filters: int = 125
    augmented: int = 0
    tolerance: float = 1e-3
    image: int = 32
    kind: Literal["neural_ode"] = "neural_ode"

    def __post_init__(self) -> None:
        checks.whole(1, filters=self.filters, image=self.image)
        checks.whole(0, augmented=self.augmented)
        checks.above(0, tolerance=self.tolerance)


@dataclass(frozen=True)
class ExplicitConfig:
    """An explicit model that another library keeps.

    Args:
        name: One of `CLASSIFIERS` or `SEGMENTERS`.
        weights: `default` begins with ImageNet weights, a segmentation model in its backbone:
            torchvision's IMAGENET1K_V1, trained by the recipe of the paper's rows; its newer ones
            are several points better.
        small_input: For 32 x 32 images: the first convolution 3x3 without stride, and no pooling
            after it.
    """

    name: str
    weights: Literal["default"] | None = None
    small_input: bool = False
    kind: Literal["explicit"] = "explicit"

    def __post_init__(self) -> None:
        checks.one_of(LIBRARIES, name=self.name)
        checks.one_of(("default",), weights=self.weights)
        if self.small_input and not self.name.startswith(("resnet", "densenet1")):
            raise ValueError(
                f"small_input: is for torchvision's ResNets and DenseNets, not for {self.name}"
            )

    @property
    def segments(self) -> bool:
        """Whether it labels pixels."""
        return self.name in SEGMENTERS


BaselineConfig = ResNetConfig | NeuralODEConfig | ExplicitConfig


def build(config: BaselineConfig, classes: int, *, fetch: bool = False) -> nn.Module:
    """The model of a configuration, which gives a `Prediction` for images (B, 3, H, W).

    Args:
        config: Which.
        classes: Of the logits.
        fetch: Whether weights that the configuration names are fetched; else the weights are drawn.

    Raises:
        ImportError: The library that keeps it is not installed.
        OSError: The weights cannot be fetched.
        ValueError: The library has no weights for it, or only for another number of classes.
    """
    if isinstance(config, ResNetConfig):
        return NarrowResNet18(config, classes)
    if isinstance(config, NeuralODEConfig):
        return NeuralODE(config, classes)
    return Explicit(config, classes, fetch=fetch)


def published_accuracy(config: BaselineConfig) -> dict[str, float] | None:
    """Top-1 and top-5 accuracy in percent on ImageNet that the library states for its weights.

    None unless it is a torchvision classifier with `weights: default`.
    """
    if not isinstance(config, ExplicitConfig) or config.weights is None:
        return None
    if CLASSIFIERS.get(config.name) != "torchvision":
        return None
    stated = _weights(config.name).meta["_metrics"]["ImageNet-1K"]
    return {"top1": stated["acc@1"], "top5": stated["acc@5"]}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, and a shortcut (He et al., CVPR 2016, Fig. 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + shortcut(x)): (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        inner = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class NarrowResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no pooling before the end, for 32 x 32 images (Table 1)."""

    def __init__(self, config: ResNetConfig, classes: int) -> None:
        super().__init__()
        widths = [config.width * 2**stage for stage in range(4)]
        conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            blocks += [
                BasicBlock(inputs, width, 1 if stage == 0 else 2),
                BasicBlock(width, width, 1),
            ]
            inputs = width
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Prediction:
        """Logits (B, classes) of images (B, 3, H, W)."""
        features = self.pool(self.stages(self.stem(image))).flatten(1)
        return Prediction(self.linear(features), None)


class NeuralODE(nn.Module):
    """dz/dt = c(z) from the (augmented) image at t = 0; a linear map of z(1) classifies.

    Gradients come from the adjoint equation, in constant memory. Steps are chosen for a batch as a
    whole, so that a prediction depends a little, within the tolerance, on its neighbours.
    """

    def __init__(self, config: NeuralODEConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        channels = 3 + config.augmented
        self.dynamics = Dynamics(channels, config.filters)
        self.linear = nn.Linear(channels * config.image**2, classes)

    def forward(self, image: Tensor) -> Prediction:
        """Logits (B, classes) of images (B, 3, image, image)."""
        from torchdiffeq import odeint_adjoint

        z = F.pad(image, (0, 0, 0, 0, 0, self.config.augmented))
        times = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        tolerance = self.config.tolerance
        states: Any = odeint_adjoint(
            self.dynamics, z, times, rtol=tolerance, atol=tolerance, method="dopri5"
        )
        return Prediction(self.linear(states[-1].flatten(1)), None)


class Dynamics(nn.Module):
    """c(z): 1x1, 3x3 and 1x1 convolutions, ReLU between them."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        first, middle = nn.Conv2d(channels, filters, 1), nn.Conv2d(filters, filters, 3, padding=1)
        last = nn.Conv2d(filters, channels, 1)
        self.layers = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt (B, C, H, W), whatever the time."""
        return self.layers(z)


class Explicit(nn.Module):
    """A model of torchvision, timm or segmentation-models-pytorch."""

    def __init__(self, config: ExplicitConfig, classes: int, *, fetch: bool = False) -> None:
        super().__init__()
        make = {"torchvision": _torchvision, "timm": _timm, "smp": _smp}[LIBRARIES[config.name]]
        self.network = make(config, classes, fetch and config.weights is not None)
        if config.small_input:
            _keep_resolution(self.network)

    def forward(self, image: Tensor) -> Prediction:
        """Logits (B, classes), or (B, classes, h, w) if it segments, for images (B, 3, H, W)."""
        logits = self.network(image)
        return Prediction(logits["out"] if isinstance(logits, dict) else logits, None)


def _weights(name: str) -> Any:
    """torchvision's weights of the paper's time."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).IMAGENET1K_V1  # type: ignore[attr-defined]


def _torchvision(config: ExplicitConfig, classes: int, fetch: bool) -> nn.Module:
    from torchvision.models import get_model

    if config.segments:
        backbone = _weights(config.name.partition("_")[2]) if fetch else None
        return get_model(config.name, weights=None, weights_backbone=backbone, num_classes=classes)
    if fetch and classes != 1000:
        reason = f"{config.name}'s are for ImageNet's 1000 classes, the data have {classes}"
        raise ValueError(f"weights: {reason}")
    weights = _weights(config.name) if fetch else None
    return get_model(config.name, weights=weights, num_classes=classes)


def _timm(config: ExplicitConfig, classes: int, fetch: bool) -> nn.Module:
    import timm  # pyright: ignore[reportMissingImports]

    try:
        if not config.segments:
            return timm.create_model(config.name, pretrained=fetch, num_classes=classes)
        features = timm.create_model(
            config.name,
            pretrained=fetch,
            features_only=True,
            feature_location="",
            out_indices=(1, 2, 3, 4),
        )
    except RuntimeError as error:
        raise ValueError(f"weights: {error}") from error
    widths = features.feature_info.channels()
    head = SegmentationHead(SegmentationHeadConfig(), widths, classes, momentum=0.1)
    return nn.Sequential(features, head)


def _smp(config: ExplicitConfig, classes: int, fetch: bool) -> nn.Module:
    import segmentation_models_pytorch as smp  # pyright: ignore[reportMissingImports]

    architecture, _, encoder = config.name.partition("_")
    maker = getattr(smp, architecture)
    weights = "imagenet" if fetch else None
    return maker(encoder_name=encoder, encoder_weights=weights, classes=classes)


def _keep_resolution(network: Any) -> None:
    """Make a ResNet or DenseNet begin with a 3x3 convolution at the image's own resolution."""
    stem, convolution, pool = network, "conv1", "maxpool"
    if hasattr(network, "features"):
        stem, convolution, pool = network.features, "conv0", "pool0"
    width = getattr(stem, convolution).out_channels
    setattr(stem, convolution, nn.Conv2d(3, width, 3, padding=1, bias=False))
    setattr(stem, pool, nn.Identity())
