"""f_theta (Fig. 1, Sec. 3.2): a residual block at each scale, then multi-resolution fusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mdeq.blocks import Convolution, Features, ResidualBlock, rectifier
from mdeq.multiscale import Scales
from mdeq.solvers import Map

Upsampling = Literal["nearest", "bilinear"]


class NormalisedConvolution(nn.Module):
    """A convolution and its group norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel, stride=stride)
        self.norm = nn.GroupNorm(groups, outputs)

    def bind(self) -> Features:
        """The layer with its weight at hand."""
        conv = self.conv.bind()
        return lambda x: self.norm(conv(x))


class Downsampling(nn.Module):
    """From scale i to j > i: j - i strided 3x3 convolutions with GN, ReLU between them; channels change at the last."""

    def __init__(self, inputs: int, outputs: int, octaves: int, *, groups: int) -> None:
        super().__init__()
        widths = [inputs] * octaves + [outputs]
        self.layers = nn.ModuleList(
            NormalisedConvolution(a, b, 3, stride=2, groups=groups) for a, b in zip(widths, widths[1:], strict=False)
        )

    def bind(self) -> Features:
        """The chain with its weights at hand."""
        first, *others = [layer.bind() for layer in self.layers]  # type: ignore[operator]

        def down(x: Tensor) -> Tensor:
            x = first(x)
            for layer in others:
                x = layer(x.relu_())
            return x

        return down


class PostFusion(nn.Module):
    """What ends f at a scale: ReLU, 1x1 convolution, group norm."""

    def __init__(self, channels: int, *, groups: int, affine: bool, weight_norm: bool) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 1, weight_norm=weight_norm)
        self.norm = nn.GroupNorm(groups, channels, affine=affine)

    def bind(self, softplus: float | None) -> Features:
        """The layer with its weight at hand."""
        conv, rectify = self.conv.bind(), rectifier(softplus)
        return lambda x: self.norm(conv(rectify(x)))


@dataclass(frozen=True)
class BoundTransformation:
    """f_theta of one batch on the flat state (B, D): weights, injection and dropout masks are in place."""

    apply: Callable[[Tensor, slice], Tensor]

    def __call__(self, state: Tensor) -> Tensor:
        """f of the whole batch."""
        return self.apply(state, slice(None))

    def rows(self, rows: slice) -> Map:
        """f of these samples alone."""
        return lambda state: self.apply(state, rows)


class Transformation(nn.Module):
    """f_theta(z; x) for n scales.

    Args:
        channels: C_i of each scale, highest resolution first.
        expansion: k, the width of the residual blocks in multiples of C_i.
        groups: Of every group norm but those after the fusion, which have half as many.
        dropout: Of the residual blocks.
        variational: Whether that dropout's mask is drawn once a solve.
        weight_norm: On the blocks' and the post-fusion convolutions.
        post_fusion_affine: Whether the norms after the fusion learn scale and shift.
        upsampling: `nearest` as in the published weights, `bilinear` as in the paper's text.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        expansion: int,
        groups: int,
        dropout: float,
        variational: bool,
        weight_norm: bool,
        post_fusion_affine: bool,
        upsampling: Upsampling,
    ) -> None:
        super().__init__()
        self.channels, self.upsampling = channels, upsampling
        self.blocks = nn.ModuleList(
            ResidualBlock(
                c,
                expansion=expansion,
                groups=groups,
                dropout=dropout,
                variational=variational,
                weight_norm=weight_norm,
            )
            for c in channels
        )
        self.fusion = nn.ModuleList(
            nn.ModuleList(_fusion(channels, i, j, groups) for i in range(len(channels))) for j in range(len(channels))
        )
        self.post = nn.ModuleList(
            PostFusion(c, groups=groups // 2, affine=post_fusion_affine, weight_norm=weight_norm) for c in channels
        )

    def bind(self, x: Tensor, scales: Scales, softplus: float | None = None) -> BoundTransformation:
        """f on the flat state (B, D), for the injection `x` (B, C_1, H, W).

        Weight normalisation and, in training mode, the dropout masks are computed here, once a solve.
        """
        n = len(self.channels)
        blocks = [b.bind(x, inject=i == 0, softplus=softplus) for i, b in enumerate(self.blocks)]  # type: ignore[operator]
        fusion = [[self.fusion[j][i].bind() if i != j else None for i in range(n)] for j in range(n)]  # type: ignore[index]
        post = [layer.bind(softplus) for layer in self.post]  # type: ignore[operator]

        def f(state: Tensor, rows: slice) -> Tensor:
            features = [block(z, rows) for block, z in zip(blocks, scales.split(state), strict=True)]
            return scales.flatten([post[j](self._fuse(features, fusion[j], j)) for j in range(n)])

        return BoundTransformation(f)

    def _fuse(self, features: list[Tensor], incoming: list[Features | None], j: int) -> Tensor:
        """The sum at scale j of what all scales send there, (B, C_j, H_j, W_j)."""
        total = features[j]
        for i, layer in enumerate(incoming):
            if layer is not None:
                sent = layer(features[i])
                total = total + (sent if i < j else self._upsample(sent, features[j]))
        return total.clone() if total is features[j] else total

    def _upsample(self, x: Tensor, like: Tensor) -> Tensor:
        size = like.shape[-2:]
        if self.upsampling == "nearest":
            return F.interpolate(x, size=size, mode="nearest")
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _fusion(channels: tuple[int, ...], i: int, j: int, groups: int) -> nn.Module:
    """The layer from scale i to scale j; upsampling itself has no parameters and follows a 1x1 convolution."""
    if i == j:
        return nn.Identity()
    if i < j:
        return Downsampling(channels[i], channels[j], j - i, groups=groups)
    return NormalisedConvolution(channels[i], channels[j], 1, stride=1, groups=groups)
