"""f_theta (Fig. 1 and 2, Sec. 3.2, 3.3): a residual block at each scale, then their fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import checks
from mdeq.multiscale import Scales

MOST_SCALES = 16  # halved that often, every image is a single pixel


@dataclass(frozen=True)
class MDEQConfig:
    """The architecture of an MDEQ.

    Args:
        channels: C_i of each scale, highest resolution first.
        expansion: k, the width of the residual blocks in multiples of C_i.
        groups: Groups of the group norms; even, and divides every C_i. The norms after the fusion
            have half as many.
        downsamplings: How many of the stem's two convolutions have stride 2.
        dropout: Probability of dropping a channel in the residual blocks.
        variational: Whether one dropout mask serves a whole solve; otherwise each evaluation of f
            draws its own (Sec. 3.3).
        weight_norm: Whether the convolutions of blocks and post-fusion are weight-normalised.
        post_fusion_affine: Whether the group norms after the fusion learn scale and shift.
        upsampling: `nearest` (published weights) or `bilinear` (the paper's text).
        batch_norm_momentum: Momentum of the batch norms of stem and head.
        train_output: What the head reads in training: `f(z*)` as published, or `z*`. In evaluation
            it always reads z*.
        unrolled: Apply f that many times from 0 instead of solving, always: an explicit,
            weight-tied network (Table 2).

    Raises:
        ValueError: A value is out of its range, or the groups do not divide the channels.
    """

    channels: tuple[int, ...] = (24, 24)
    expansion: int = 5
    groups: int = 8
    downsamplings: int = 0
    dropout: float = 0.0
    variational: bool = True
    weight_norm: bool = True
    post_fusion_affine: bool = False
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    batch_norm_momentum: float = 0.1
    train_output: Literal["f(z*)", "z*"] = "f(z*)"
    unrolled: int | None = None
    kind: Literal["mdeq"] = "mdeq"

    def __post_init__(self) -> None:
        checks.whole(1, expansion=self.expansion, unrolled=self.unrolled)
        checks.whole(2, groups=self.groups)
        checks.one_of((0, 1, 2), downsamplings=self.downsamplings)
        checks.between(0, 1, open_high=True, dropout=self.dropout)
        checks.between(0, 1, batch_norm_momentum=self.batch_norm_momentum)
        checks.one_of(("nearest", "bilinear"), upsampling=self.upsampling)
        checks.one_of(("f(z*)", "z*"), train_output=self.train_output)
        checks.instance(
            (bool,),
            variational=self.variational,
            weight_norm=self.weight_norm,
            post_fusion_affine=self.post_fusion_affine,
        )
        if self.groups % 2:
            raise ValueError(
                f"groups: must be even (half of them norm the fused features), not {self.groups}"
            )
        if not 1 <= len(self.channels) <= MOST_SCALES:
            raise ValueError(f"channels: an MDEQ has 1 to {MOST_SCALES} scales")
        for c in self.channels:
            checks.whole(1, channels=c)
            if c % self.groups:
                raise ValueError(
                    f"channels: {c} is not divisible by the {self.groups} groups of the group norms"
                )


class Convolution(nn.Module):
    """A convolution without bias; its weight is v, or g v / |v| with weight normalisation.

    The norm is taken per output channel (Salimans and Kingma, NeurIPS 2016). `held` replaces the
    weight during a solve, for which it is computed once; see `StateMap`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.v = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.g: nn.Parameter | None = None
        if weight_norm:
            nn.init.kaiming_uniform_(self.v, a=5**0.5)
            self.g = nn.Parameter(_norm(self.v).detach().clone())
        else:
            nn.init.normal_(self.v, std=0.01)
        self.held: Tensor | None
        self.register_buffer("held", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The effective weight (outputs, inputs, kernel, kernel), in channels-last memory."""
        if self.held is not None:
            return self.held
        weight = self.v if self.g is None else self.v * (self.g / _norm(self.v))
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        outputs, inputs, kernel, _ = self.v.shape
        return (
            f"{inputs}, {outputs}, {kernel}, stride={self.stride}, weight_norm={self.g is not None}"
        )


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)


class ChannelDropout(nn.Module):
    """Drops whole channels per sample in training mode, and scales the others by 1 / (1 - p).

    Each call draws a mask. If `variational`, `held` is the one mask of a solve; see `StateMap`.
    """

    def __init__(self, channels: int, p: float, *, variational: bool) -> None:
        super().__init__()
        self.channels, self.p, self.variational = channels, p, variational
        self.held: Tensor | None
        self.register_buffer("held", None, persistent=False)

    @property
    def draws_once(self) -> bool:
        """Whether one mask serves a whole solve."""
        return self.variational and self.training and self.p > 0

    def draw(self, like: Tensor) -> Tensor:
        """A mask (B, channels, 1, 1) with the batch size, dtype and device of `like`."""
        mask = like.new_empty(len(like), self.channels, 1, 1)
        return mask.bernoulli_(1 - self.p).div_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        if not self.training or self.p == 0:
            return x
        return x * (self.draw(x) if self.held is None else self.held)


def rectify(x: Tensor, softplus: float | None) -> Tensor:
    """ReLU in place, or softplus of curvature `softplus` in the initial phase (Sec. 3.3)."""
    return x.relu_() if softplus is None else F.softplus(x, beta=softplus)


class ResidualBlock(nn.Module):
    """3x3 conv C -> kC, GN, ReLU, 3x3 conv kC -> C, dropout, + x, GN, + z, ReLU, GN (Eq. 5)."""

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        wide, groups = config.expansion * channels, config.groups
        self.conv1 = Convolution(channels, wide, 3, weight_norm=config.weight_norm)
        self.norm1 = nn.GroupNorm(groups, wide)
        self.conv2 = Convolution(wide, channels, 3, weight_norm=config.weight_norm)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)
        self.dropout = ChannelDropout(channels, config.dropout, variational=config.variational)

    def forward(self, z: Tensor, injection: Tensor | None, softplus: float | None) -> Tensor:
        """(B, C, H, W) to the same shape."""
        hidden = self.norm1(self.conv1(z)).relu_()
        hidden = self.dropout(self.conv2(hidden))
        if injection is not None:
            hidden = hidden + injection
        return self.norm3(rectify(self.norm2(hidden) + z, softplus))


class NormalisedConvolution(nn.Module):
    """A convolution and its group norm; 1x1, it sends a scale to a higher resolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel, stride=stride)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return self.norm(self.conv(x))


class Downsampling(nn.Module):
    """From scale i to j > i: j - i strided 3x3 convolutions with GN, ReLU between them.

    The channels change at the last.
    """

    def __init__(self, inputs: int, outputs: int, octaves: int, groups: int) -> None:
        super().__init__()
        widths = [inputs] * octaves
        layers = [NormalisedConvolution(inputs, w, 3, 2, groups) for w in [*widths[1:], outputs]]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / 2^octaves, W / 2^octaves)."""
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(x.relu_())
        return x


class PostFusion(nn.Module):
    """What ends f at a scale: ReLU, 1x1 convolution, group norm."""

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 1, weight_norm=config.weight_norm)
        self.norm = nn.GroupNorm(config.groups // 2, channels, affine=config.post_fusion_affine)

    def forward(self, x: Tensor, softplus: float | None) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return self.norm(self.conv(rectify(x, softplus)))


class Transformation(nn.Module):
    """f_theta(z; x) for the scales of `config`."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        channels, scales = config.channels, range(len(config.channels))
        self.upsampling = config.upsampling
        self.blocks = nn.ModuleList(ResidualBlock(c, config) for c in channels)
        self.fusion = nn.ModuleList()
        for j in scales:
            incoming = [_fusion(channels, i, j, config.groups) for i in scales]
            self.fusion.append(nn.ModuleList(incoming))
        self.post = nn.ModuleList(PostFusion(c, config) for c in channels)

    def forward(self, z: list[Tensor], x: Tensor, softplus: float | None = None) -> list[Tensor]:
        """f_theta of a batch.

        Args:
            z: (B, C_i, H_i, W_i) per scale.
            x: The injection (B, C_1, H_1, W_1), added at scale 1.
            softplus: Curvature of the softplus that replaces the last ReLUs; None for ReLU.

        Returns:
            The shapes of `z`.
        """
        injections = [x, *[None] * (len(z) - 1)]
        features = []
        for block, z_i, injection in zip(self.blocks, z, injections, strict=True):
            features.append(block(z_i, injection, softplus))
        return [post(self._fuse(features, j), softplus) for j, post in enumerate(self.post)]

    def on_states(self, x: Tensor, scales: Scales, softplus: float | None = None) -> StateMap:
        """f on flat states (B, D), for the injection `x`: what a solve keeps is computed here.

        That is the effective weights and, in training mode, the masks of variational dropout.
        """
        weights: list[tuple[Slot, Tensor]] = []
        masks: list[tuple[Slot, Tensor]] = []
        for module in self.modules():
            if isinstance(module, Convolution):
                weights.append(((module._buffers, "held"), module.weight))
                continue
            if isinstance(module, ChannelDropout) and module.draws_once:
                masks.append(((module._buffers, "held"), module.draw(x)))
            for name, value in module.named_parameters(recurse=False):
                weights.append(((module._parameters, name), value))
        slots = [slot for slot, _ in masks + weights]
        samples = (x, *(mask for _, mask in masks))
        return StateMap(self, scales, softplus, slots, samples, tuple(w for _, w in weights))

    def _fuse(self, features: list[Tensor], j: int) -> Tensor:
        """The sum at scale j of what all scales send there, (B, C_j, H_j, W_j)."""
        total = features[j]
        for i, layer in enumerate(self.fusion[j]):  # type: ignore[arg-type]
            if i < j:
                total = total + layer(features[i])
            elif i > j:
                total = total + self._upsample(layer(features[i]), total)
        return total

    def _upsample(self, x: Tensor, like: Tensor) -> Tensor:
        size = like.shape[-2:]
        if self.upsampling == "nearest":
            return F.interpolate(x, size, mode="nearest")
        return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _fusion(channels: tuple[int, ...], i: int, j: int, groups: int) -> nn.Module:
    """The layer from scale i to scale j; upsampling itself has no parameters."""
    if i == j:
        return nn.Identity()
    if i < j:
        return Downsampling(channels[i], channels[j], j - i, groups)
    return NormalisedConvolution(channels[i], channels[j], 1, 1, groups)


Slot = tuple[dict[str, Any], str]  # where a module keeps a tensor


@dataclass(frozen=True)
class StateMap:
    """f_theta of one batch as a map of flat states (B, D), a function of its inputs alone.

    Attributes:
        f: The transformation.
        scales: The shapes that split a state.
        softplus: See `Transformation.forward`.
        slots: Where `f` keeps the masks and weights.
        samples: The injection and the masks, one row per sample.
        weights: The effective weights.
    """

    f: Transformation
    scales: Scales
    softplus: float | None
    slots: list[Slot]
    samples: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors, besides the state, that f depends on."""
        return self.samples + self.weights

    def __call__(self, state: Tensor, *inputs: Tensor) -> Tensor:
        """f at a state (B, D), with other `inputs` in place of its own if any are given."""
        x, *values = inputs or self.inputs
        own = [tensors[name] for tensors, name in self.slots]
        try:
            self._put(values)
            return self.scales.flatten(self.f(self.scales.split(state), x, self.softplus))
        finally:
            self._put(own)

    def part(self, rows: slice) -> StateMap:
        """f of these samples alone."""
        return replace(self, samples=tuple(tensor[rows] for tensor in self.samples))

    def _put(self, values: Sequence[Tensor | None]) -> None:
        for (tensors, name), value in zip(self.slots, values, strict=True):
            tensors[name] = value
