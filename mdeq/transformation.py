"""f_theta (Fig. 1, Sec. 3.2): a residual block at each scale, then multi-resolution fusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq.blocks import Convolution, Features, GroupNorm, ResidualBlock, held, rectifier
from mdeq.multiscale import Scales
from mdeq.solvers import Map

Upsampling = Literal["nearest", "bilinear"]


class NormalisedConvolution(nn.Module):
    """A convolution and its group norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel, stride=stride)
        self.norm = GroupNorm(groups, outputs)

    def bind(self) -> Features:
        """The layer with its weight at hand."""
        conv, norm = self.conv.bind(), self.norm.bind()
        return lambda x: norm(conv(x))


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
        self.norm = GroupNorm(groups, channels, affine=affine)

    def bind(self, softplus: float | None) -> Features:
        """The layer with its weight at hand."""
        conv, norm, rectify = self.conv.bind(), self.norm.bind(), rectifier(softplus)
        return lambda x: norm(conv(rectify(x)))


@dataclass(frozen=True)
class BoundTransformation:
    """f_theta of one batch on the flat state (B, D): weights, injection and dropout masks are in place.

    Attributes:
        rows: f of these samples alone.
        fast: The same compiled, for the solvers, with a tape of z's alone; None unless `MDEQ.compile_f` was called.
    """

    rows: Callable[[slice], Map]
    fast: BoundTransformation | None = None

    def __call__(self, state: Tensor) -> Tensor:
        """f of the whole batch."""
        return self.rows(slice(None))(state)


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
        self.channels, self.upsampling, self.compiled = channels, upsampling, False
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
        masks = [block.draw(x) for block in self.blocks]  # type: ignore[operator]
        fast = None
        if self.compiled:
            with torch.no_grad():
                constant = self._bind(x, masks, scales, softplus)
            fast = BoundTransformation(lambda rows: partial(_run(), constant(rows)))
        return BoundTransformation(self._bind(x, masks, scales, softplus), fast)

    def _bind(
        self, x: Tensor, masks: list[Tensor | None], scales: Scales, softplus: float | None
    ) -> Callable[[slice], Map]:
        n, x = len(self.channels), held(x)
        blocks = [block.bind(softplus) for block in self.blocks]  # type: ignore[operator]
        fusion = [[self.fusion[j][i].bind() if i != j else None for i in range(n)] for j in range(n)]  # type: ignore[index]
        post = [layer.bind(softplus) for layer in self.post]  # type: ignore[operator]

        def at(rows: slice) -> Map:
            injections = [_own(x[rows])] + [None] * (n - 1)
            drawn = [mask if mask is None else _own(mask[rows]) for mask in masks]

            def f(state: Tensor) -> Tensor:
                features = [blocks[i](z, injections[i], drawn[i]) for i, z in enumerate(scales.split(state))]
                return scales.flatten([post[j](self._fuse(features, fusion[j], j)) for j in range(n)])

            return f

        return at

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


def _own(part: Tensor) -> Tensor:
    """A tensor of its own: to a compiled f, where a part of a batch begins in its storage is a part of its type."""
    return part.clone() if part.storage_offset() else part


@cache
def _run() -> Callable[[Map, Tensor], Tensor]:
    """One compiled function for every f, so that a new batch finds what an earlier one compiled."""
    return torch.compile(lambda f, state: f(state))


def _fusion(channels: tuple[int, ...], i: int, j: int, groups: int) -> nn.Module:
    """The layer from scale i to scale j; upsampling itself has no parameters and follows a 1x1 convolution."""
    if i == j:
        return nn.Identity()
    if i < j:
        return Downsampling(channels[i], channels[j], j - i, groups=groups)
    return NormalisedConvolution(channels[i], channels[j], 1, stride=1, groups=groups)
