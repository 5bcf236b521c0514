"""The multiscale deep equilibrium model: stem, input injection, equilibrium z*, head (Fig. 1, Fig. 3a)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch._functorch.config
from torch import Tensor, nn

from mdeq import jacobian
from mdeq.equilibrium import Implicit, Phantom, Reversible, equilibrium, unroll
from mdeq.heads import (
    ClassificationHead,
    ClassificationHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
    initialise,
)
from mdeq.multiscale import Scales
from mdeq.solvers import Anderson, Broyden, FixedPoint, Map, Solution
from mdeq.transformation import BoundTransformation, Transformation, Upsampling

ForwardSolver = Broyden | Anderson | FixedPoint
CACHE_BYTES = 10 * 2**20  # of f's features, to share a CPU's last cache with the solver's history


@dataclass(frozen=True)
class MDEQConfig:
    """The architecture of an MDEQ.

    Args:
        channels: C_i of each scale, highest resolution first.
        expansion: k of the residual blocks.
        groups: Of the group norms; must divide every C_i and be even.
        downsamplings: How many of the stem's two convolutions have stride 2.
        dropout: Of the residual blocks.
        variational: Whether one dropout mask serves a whole solve, else each evaluation of f draws its own (Sec. 3.3).
        weight_norm: Whether the convolutions of blocks and post-fusion are weight-normalised.
        post_fusion_affine: Whether the group norms after the fusion learn scale and shift.
        upsampling: `nearest` (published weights) or `bilinear` (the paper's text).
        batch_norm_momentum: Of stem and head.
        train_output: What the head reads in training: `f(z*)` as published, or `z*`. In evaluation always z*.
        unrolled: Apply f that many times from 0 instead of solving, always: an explicit, weight-tied network (Table 2).

    Raises:
        ValueError: The channels are none or not divisible, or a number is out of its range.
    """

    channels: tuple[int, ...] = (24, 24)
    expansion: int = 5
    groups: int = 8
    downsamplings: int = 0
    dropout: float = 0.0
    variational: bool = True
    weight_norm: bool = True
    post_fusion_affine: bool = False
    upsampling: Upsampling = "nearest"
    batch_norm_momentum: float = 0.1
    train_output: Literal["f(z*)", "z*"] = "f(z*)"
    unrolled: int | None = None
    kind: Literal["mdeq"] = "mdeq"

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels: an MDEQ has at least one scale")
        if self.groups % 2:
            raise ValueError(f"groups: must be even (half of them norm the fused features), not {self.groups}")
        for c in self.channels:
            if c % self.groups:
                raise ValueError(f"channels: {c} is not divisible by the {self.groups} groups of the group norms")
        if not 0 <= self.downsamplings <= 2:
            raise ValueError(f"downsamplings: 0, 1 or 2, not {self.downsamplings}")


@dataclass(frozen=True)
class Equilibrium:
    """z* at each scale, (B, C_i, H_i, W_i), and how it was found.

    `solution` is None where f was unrolled; `jacobian` is the regulariser where probes were asked for.
    """

    scales: list[Tensor]
    solution: Solution | None
    jacobian: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """Logits (B, classes) or (B, classes, H_1, W_1), and the equilibrium they came from (explicit models: None)."""

    logits: Tensor
    equilibrium: Equilibrium | None


class MDEQ(nn.Module):
    """The backbone: an image to the equilibrium of its features at n scales.

    Args:
        config: The architecture.
        forward_solver: Finds z*.
        backward: Differentiates it.

    Attributes:
        on_backward: Called with the adjoint's solution in each backward pass; see `equilibrium`.
        f: The transformation f_theta (Fig. 1).
    """

    def __init__(
        self,
        config: MDEQConfig,
        forward_solver: ForwardSolver = Anderson(),
        backward: Implicit | Phantom | Reversible = Implicit(),
    ) -> None:
        super().__init__()
        self.config, self.forward_solver, self.backward = config, forward_solver, backward
        self.on_backward: Callable[[Solution], None] | None = None
        first = config.channels[0]
        strides = [2 if i < config.downsamplings else 1 for i in range(2)]
        momentum = config.batch_norm_momentum
        self.stem = nn.Sequential(
            *_stem_layer(3, first, 3, strides[0], momentum), *_stem_layer(first, first, 3, strides[1], momentum)
        )
        plain = config.downsamplings == 0 and len(config.channels) <= 2
        self.stage0: nn.Module = nn.Identity() if plain else nn.Sequential(*_stem_layer(first, first, 1, 1, momentum))
        initialise(self)
        self.f = Transformation(
            config.channels,
            expansion=config.expansion,
            groups=config.groups,
            dropout=config.dropout,
            variational=config.variational,
            weight_norm=config.weight_norm,
            post_fusion_affine=config.post_fusion_affine,
            upsampling=config.upsampling,
        )

    def forward(
        self,
        image: Tensor,
        *,
        z0: Tensor | None = None,
        unroll_steps: int | None = None,
        softplus: float | None = None,
        jacobian_probes: int = 0,
    ) -> Equilibrium:
        """z* of a batch.

        Args:
            image: (B, 3, H, W).
            z0: The state (B, D) to start from, such as `solution.value` of a video's last frame (StreamDEQ: Ertenli,
                Akbas, Cinbis, ECCV 2022); None for 0.
            unroll_steps: Apply f that many times from z0 instead of solving (the warm-up).
            softplus: Curvature of the softplus that replaces the last ReLUs of f in the initial phase; None for ReLU.
            jacobian_probes: Estimate the Jacobian regulariser with that many probes.

        Raises:
            ValueError: `z0` is not a state of such images.
        """
        f, zero, scales = self.fixed_point_problem(image, softplus=softplus)
        if z0 is None:
            z0 = zero
        elif z0.shape != zero.shape:
            raise ValueError(f"z0: a state of these images has the shape {tuple(zero.shape)}, not {tuple(z0.shape)}")
        unroll_steps = unroll_steps or self.config.unrolled
        if unroll_steps is not None:
            z, solution = unroll(f, z0, unroll_steps), None
        else:
            z, solution = equilibrium(
                f, z0, self.forward_solver, self.backward, self.on_backward, self.at_once(z0), f.fast
            )
            if not self.training or self.config.train_output == "z*":
                z = solution.value + (z - z.detach())
        estimate = _jacobian(f, z, jacobian_probes) if jacobian_probes else None
        return Equilibrium(scales.split(z), solution, estimate)

    def compile_f(self) -> None:
        """Have f compiled where the solvers evaluate it; the first steps take a minute longer. Measure whether it pays.

        f on the tape stays as it is, and so do `state_dict` and results, but for rounding. Needs what `torch.compile`
        needs: a C++ compiler on a CPU, Triton on a GPU. An adjoint solve back-propagates many times through one
        evaluation, so that from here on compiled functions of this process do not give their buffers away.
        """
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
        self.f.compiled = True

    def at_once(self, z0: Tensor) -> int | None:
        """How many samples of a state (B, D) are solved together.

        On a CPU as many as leave f's features in the cache, or as outweigh f's parameters, which each part reads anew.
        """
        if z0.device.type != "cpu":
            return None
        weights = sum(p.numel() for p in self.f.parameters()) * z0.element_size()
        return max(1, max(CACHE_BYTES, weights) // (self.config.expansion * z0.shape[1] * z0.element_size()))

    def fixed_point_problem(
        self, image: Tensor, *, softplus: float | None = None
    ) -> tuple[BoundTransformation, Tensor, Scales]:
        """f on the flat state for this batch, the starting point z = 0 (B, D), and the shapes that split a state."""
        x = self.inject(image)
        scales = Scales.of(self.config.channels, *x.shape[-2:])
        # like the weights, not like x: autocast may have x in half precision, a state never is
        z0 = scales.zeros(len(x), like=next(self.parameters()).detach())
        return self.f.bind(x, scales, softplus), z0, scales

    def inject(self, image: Tensor) -> Tensor:
        """The input representation x at scale 1, (B, C_1, H_1, W_1)."""
        return self.stage0(self.stem(image.contiguous(memory_format=torch.channels_last)))


class Network(nn.Module):
    """An MDEQ and a head: images (B, 3, H, W) to logits, (B, classes) or (B, classes, H_1, W_1) by the head's kind.

    Args:
        config: The architecture of the backbone.
        head: Its kind decides the task, classification or segmentation.
        classes: Of the logits.
        forward_solver: Finds z*.
        backward: Differentiates it.
    """

    def __init__(
        self,
        config: MDEQConfig,
        head: ClassificationHeadConfig | SegmentationHeadConfig,
        classes: int,
        forward_solver: ForwardSolver = Anderson(),
        backward: Implicit | Phantom | Reversible = Implicit(),
    ) -> None:
        super().__init__()
        self.backbone = MDEQ(config, forward_solver, backward)
        momentum = config.batch_norm_momentum
        self.head: ClassificationHead | SegmentationHead
        if isinstance(head, ClassificationHeadConfig):
            self.head = ClassificationHead(head, config.channels, classes, momentum)
        else:
            self.head = SegmentationHead(head, config.channels, classes, momentum)

    def forward(
        self,
        image: Tensor,
        *,
        z0: Tensor | None = None,
        unroll_steps: int | None = None,
        softplus: float | None = None,
        jacobian_probes: int = 0,
    ) -> Prediction:
        """Logits for a batch (B, 3, H, W); the arguments are those of `MDEQ.forward`."""
        z = self.backbone(image, z0=z0, unroll_steps=unroll_steps, softplus=softplus, jacobian_probes=jacobian_probes)
        return Prediction(self.head(z.scales), z)


def _stem_layer(inputs: int, outputs: int, kernel: int, stride: int, momentum: float) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs, momentum=momentum), nn.ReLU()]


def _jacobian(f: Map, z: Tensor, probes: int) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return jacobian.frobenius(f(z), z, probes)
