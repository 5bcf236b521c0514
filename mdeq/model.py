"""The multiscale deep equilibrium model: stem, injection, equilibrium, head (Fig. 1, Fig. 3a)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
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
from mdeq.solvers import Anderson, Broyden, FixedPoint, Solution
from mdeq.transformation import MDEQConfig, StateMap, Transformation

CACHE_BYTES = (
    10 * 2**20
)  # what f's features may take of a CPU's last cache, beside the solver's history


@dataclass(frozen=True)
class Equilibrium:
    """z* at each scale, (B, C_i, H_i, W_i), and how it was found.

    `solution` is None where f was unrolled; `jacobian` is the regulariser if probes were asked for.
    """

    scales: list[Tensor]
    solution: Solution | None
    jacobian: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """Logits (B, classes) or (B, classes, H_1, W_1), and the equilibrium or, if explicit, None."""

    logits: Tensor
    equilibrium: Equilibrium | None


class MDEQ(nn.Module):
    """The backbone: an image to the equilibrium of its features at n scales.

    Args:
        config: The architecture.
        forward_solver: Finds z*.
        backward: Differentiates it.

    Attributes:
        f: The transformation f_theta (Fig. 1), an ordinary module: f(z, x).
        on_backward: Called with the adjoint's solution in each backward pass; see `equilibrium`.

    Raises:
        ValueError: `backward` is `Reversible`, which evaluates f again on its way back, and f
            draws a dropout mask per evaluation.
    """

    def __init__(
        self,
        config: MDEQConfig,
        forward_solver: Broyden | Anderson | FixedPoint = Anderson(),
        backward: Implicit | Phantom | Reversible = Implicit(),
    ) -> None:
        super().__init__()
        if isinstance(backward, Reversible) and config.dropout > 0 and not config.variational:
            raise ValueError("backward: Reversible needs variational dropout: one mask per solve")
        self.config, self.forward_solver, self.backward = config, forward_solver, backward
        self.on_backward: Callable[[Solution], None] | None = None
        width, momentum = config.channels[0], config.batch_norm_momentum
        strides = [2 if i < config.downsamplings else 1 for i in range(2)]
        self.stem = nn.Sequential(
            *_stem_layer(3, width, 3, strides[0], momentum),
            *_stem_layer(width, width, 3, strides[1], momentum),
        )
        self.stage0: nn.Module = nn.Identity()
        if config.downsamplings > 0 or len(config.channels) > 2:
            self.stage0 = nn.Sequential(*_stem_layer(width, width, 1, 1, momentum))
        initialise(self)
        self.f = Transformation(config)

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
            z0: The state (B, D) to start from, such as `solution.value` of a video's last frame
                (StreamDEQ: Ertenli, Akbas, Cinbis, ECCV 2022); None for 0.
            unroll_steps: Apply f that many times from z0 instead of solving (the warm-up).
            softplus: Curvature of the softplus that replaces the last ReLUs of f in the initial
                phase; None for ReLU.
            jacobian_probes: Estimate the Jacobian regulariser with that many probes.

        Raises:
            ValueError: `z0` is not a state of such images.
        """
        f, zero, scales = self.fixed_point_problem(image, softplus=softplus)
        if z0 is None:
            z0 = zero
        elif z0.shape != zero.shape:
            shapes = f"{tuple(zero.shape)}, not {tuple(z0.shape)}"
            raise ValueError(f"z0: a state of these images has the shape {shapes}")
        solution = None
        steps = self.config.unrolled if unroll_steps is None else unroll_steps
        if steps is not None:
            z = cast(Tensor, unroll(f, z0, steps, inputs=f.inputs))
        else:
            z, solution = self._solve(f, z0)
            if not self.training or self.config.train_output == "z*":
                z = solution.value + (z - z.detach())
        estimate = None
        if jacobian_probes:
            estimate = _jacobian(f, z, jacobian_probes)
        return Equilibrium(scales.split(z), solution, estimate)

    def fixed_point_problem(
        self, image: Tensor, *, softplus: float | None = None
    ) -> tuple[StateMap, Tensor, Scales]:
        """f on flat states for this batch, the start z = 0 (B, D), and the shapes of a state."""
        x = self.inject(image)
        scales = Scales.of(self.config.channels, *x.shape[-2:])
        # like the weights, not like x: autocast may have x in half precision, a state never is
        zero = scales.zeros(len(x), like=next(self.parameters()).detach())
        return self.f.on_states(x, scales, softplus), zero, scales

    def inject(self, image: Tensor) -> Tensor:
        """The input representation x at scale 1, (B, C_1, H_1, W_1)."""
        return self.stage0(self.stem(image.contiguous(memory_format=torch.channels_last)))

    def _solve(self, f: StateMap, z0: Tensor) -> tuple[Tensor, Solution]:
        """The equilibrium of the batch, solved in parts: samples never feel each other."""
        size = self._part_size(z0)
        if size >= len(z0):
            return self._solve_part(f, z0, self.on_backward)
        count = math.ceil(len(z0) / size)
        adjoints = _Adjoints(count, self.on_backward)
        values, solutions = [], []
        for i in range(count):
            rows = slice(i * size, (i + 1) * size)
            value, solution = self._solve_part(f.part(rows), z0[rows], partial(adjoints.add, i))
            values.append(value)
            solutions.append(solution)
        return torch.cat(values), Solution.joined(solutions)

    def _solve_part(
        self, f: StateMap, z0: Tensor, on_backward: Callable[[Solution], None] | None
    ) -> tuple[Tensor, Solution]:
        forward, backward = self.forward_solver, self.backward
        z, solution = equilibrium(
            f, z0, forward, backward, inputs=f.inputs, on_backward=on_backward
        )
        return cast(Tensor, z), solution

    def _part_size(self, z0: Tensor) -> int:
        """How many samples of a batch are solved together.

        On a CPU, as many as leave f's features in the cache, or as outweigh f's parameters, which
        each part reads anew.
        """
        if z0.device.type != "cpu":
            return len(z0)
        weights = sum(p.numel() for p in self.f.parameters()) * z0.element_size()
        sample = self.config.expansion * z0.shape[1] * z0.element_size()
        fitting = max(1, max(CACHE_BYTES, weights) // sample)
        return math.ceil(len(z0) / math.ceil(len(z0) / fitting))  # parts of one size


class Network(nn.Module):
    """An MDEQ and a head: images (B, 3, H, W) to logits, by the head's kind.

    `torch.compile(network)` works with each gradient rule. `torch.export` works in evaluation mode,
    once no solver asks whether every sample has stopped (`check_every` above `steps`), for a module
    that returns tensors, such as the logits.

    Args:
        config: The architecture of the backbone.
        head: Its kind decides the task, classification or segmentation.
        classes: Number of classes of the logits.
        forward_solver: Finds z*.
        backward: Differentiates it.
    """

    def __init__(
        self,
        config: MDEQConfig,
        head: ClassificationHeadConfig | SegmentationHeadConfig,
        classes: int,
        forward_solver: Broyden | Anderson | FixedPoint = Anderson(),
        backward: Implicit | Phantom | Reversible = Implicit(),
    ) -> None:
        super().__init__()
        self.backbone = MDEQ(config, forward_solver, backward)
        kind = (
            ClassificationHead if isinstance(head, ClassificationHeadConfig) else SegmentationHead
        )
        momentum = config.batch_norm_momentum
        self.head = kind(head, config.channels, classes, momentum)  # type: ignore[arg-type]

    def forward(
        self,
        image: Tensor,
        *,
        z0: Tensor | None = None,
        unroll_steps: int | None = None,
        softplus: float | None = None,
        jacobian_probes: int = 0,
    ) -> Prediction:
        """Logits of a batch (B, 3, H, W); the arguments are those of `MDEQ.forward`."""
        z = self.backbone(
            image,
            z0=z0,
            unroll_steps=unroll_steps,
            softplus=softplus,
            jacobian_probes=jacobian_probes,
        )
        return Prediction(self.head(z.scales), z)


@dataclass
class _Adjoints:
    """Collects the adjoint solutions of the parts of a batch; `on_backward` gets them as one."""

    count: int
    on_backward: Callable[[Solution], None] | None
    found: dict[int, Solution] = field(default_factory=dict)

    def add(self, part: int, solution: Solution) -> None:
        self.found[part] = solution
        if len(self.found) == self.count and self.on_backward is not None:
            self.on_backward(Solution.joined([self.found.pop(i) for i in range(self.count)]))


def _stem_layer(
    inputs: int, outputs: int, kernel: int, stride: int, momentum: float
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs, momentum=momentum), nn.ReLU()]


def _jacobian(f: StateMap, z: Tensor, probes: int) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return jacobian.frobenius(f(z), z, probes)
