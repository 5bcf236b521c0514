"""The residual block (Fig. 2, Eq. 5), and Sec. 3.3: weight normalisation, variational dropout, softplus.

What stays fixed during a solve is computed once: `bind` gives a function of z alone that holds the effective weights,
the dropout mask and the injection. Bound under no_grad, it holds them as constants: its tape is z's alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, C', H', W')
Block = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # of z, the injection and a mask (B, C, 1, 1)


def held(tensor: Tensor) -> Tensor:
    """The tensor, cut off from what it came from unless gradients are enabled."""
    return tensor if torch.is_grad_enabled() else tensor.detach()


class Convolution(nn.Module):
    """The weights of a bias-free convolution inside f, optionally weight-normalised over each output channel."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, weight_norm: bool = False) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        v = torch.empty(outputs, inputs, kernel, kernel)
        self.v = nn.Parameter(v)
        self.g: nn.Parameter | None
        if weight_norm:
            nn.init.kaiming_uniform_(self.v, a=5**0.5)
            self.g = nn.Parameter(torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True).detach().clone())
        else:
            nn.init.normal_(self.v, std=0.01)
            self.g = None

    def weight(self) -> Tensor:
        """The effective weight: g v / |v|, or v without weight normalisation; (C_out, C_in, k, k)."""
        weight = self.v
        if self.g is not None:
            weight = weight * (self.g / torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True))
        return weight.contiguous(memory_format=torch.channels_last)

    def bind(self) -> Features:
        """The convolution with its effective weight computed."""
        weight = held(self.weight())
        return lambda x: F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class GroupNorm(nn.GroupNorm):
    """Group normalisation inside f."""

    def bind(self) -> Features:
        """The norm with its scale and shift at hand."""
        if not self.affine:
            return lambda x: F.group_norm(x, self.num_groups, eps=self.eps)
        weight, bias = held(self.weight), held(self.bias)
        return lambda x: F.group_norm(x, self.num_groups, weight, bias, self.eps)


def dropout_mask(like: Tensor, channels: int, p: float) -> Tensor:
    """One Bernoulli draw a sample and channel, (B, channels, 1, 1), scaled by 1 / (1 - p) (Sec. 3.3)."""
    return like.new_empty(like.shape[0], channels, 1, 1).bernoulli_(1 - p).div_(1 - p)


def rectifier(softplus: float | None) -> Features:
    """ReLU, or softplus of curvature beta = `softplus` in the initial phase of training (Sec. 3.3)."""
    if softplus is None:
        return lambda x: x.relu_()
    return lambda x: F.softplus(x, beta=softplus)


class ResidualBlock(nn.Module):
    """3x3 convolution C -> kC, GN, ReLU, 3x3 convolution kC -> C, dropout, + x, GN, + z, ReLU, GN (Eq. 5).

    Args:
        channels: C.
        expansion: k.
        groups: Of the three group norms.
        dropout: Probability of dropping a channel.
        variational: Whether the dropout mask is drawn once a solve, else at every call (Sec. 3.3).
        weight_norm: Whether both convolutions are weight-normalised.
    """

    def __init__(
        self, channels: int, *, expansion: int, groups: int, dropout: float, variational: bool, weight_norm: bool
    ) -> None:
        super().__init__()
        self.channels, self.dropout, self.variational = channels, dropout, variational
        self.conv1 = Convolution(channels, expansion * channels, 3, weight_norm=weight_norm)
        self.norm1 = GroupNorm(groups, expansion * channels)
        self.conv2 = Convolution(expansion * channels, channels, 3, weight_norm=weight_norm)
        self.norm2 = GroupNorm(groups, channels)
        self.norm3 = GroupNorm(groups, channels)

    def draw(self, like: Tensor) -> Tensor | None:
        """The mask of a whole solve for the batch `like`; None without dropout, or if each evaluation draws its own."""
        drawn = self.training and self.dropout > 0 and self.variational
        return dropout_mask(like, self.channels, self.dropout) if drawn else None

    def bind(self, softplus: float | None) -> Block:
        """The block with its weights at hand."""
        conv1, conv2, last = self.conv1.bind(), self.conv2.bind(), rectifier(softplus)
        norm1, norm2, norm3 = self.norm1.bind(), self.norm2.bind(), self.norm3.bind()
        anew = self.training and self.dropout > 0 and not self.variational

        def block(z: Tensor, injection: Tensor | None, mask: Tensor | None) -> Tensor:
            hidden = conv2(norm1(conv1(z)).relu_())
            if anew:
                mask = dropout_mask(z, self.channels, self.dropout)
            if mask is not None:
                hidden = hidden * mask
            if injection is not None:
                hidden = hidden + injection
            return norm3(last(norm2(hidden) + z))

        return block
