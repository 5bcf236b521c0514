"""How a model is trained: the settings of params.yaml that all data sets share, and what follows from them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16", "float16"]
FINAL_LR = 1e-6  # where the cosine ends, as published


@dataclass(frozen=True)
class Adam:
    """Adam with L2 weight decay."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    kind: Literal["adam"] = "adam"


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and L2 weight decay."""

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    kind: Literal["sgd"] = "sgd"


@dataclass(frozen=True)
class Muon:
    """Muon for the convolutions of f, each flattened to (outputs, rest); nesterov SGD of `rest_lr` for all else."""

    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0
    rest_lr: float = 0.1
    rest_weight_decay: float = 5e-4
    kind: Literal["muon"] = "muon"


@dataclass(frozen=True)
class Starts:
    """Each sample's solve starts at its equilibrium of the epoch before; without augmentation the picture is the same.

    The epochs after the first are divided evenly: in each part the solver makes so many `steps`. With 0 f is applied once,
    on the tape alone. The first epoch starts at zero with the solver's own limit, as does one that finds no states.
    """

    steps: tuple[int, ...] = (1, 0)


@dataclass(frozen=True)
class WarmUp:
    """For the first `steps` updates f is applied `layers` times and back-propagated through.

    `softplus` replaces the last ReLUs of f by a softplus of that curvature meanwhile (Sec. 3.3); None keeps the ReLUs.
    """

    layers: int
    steps: int
    softplus: float | None = None


@dataclass(frozen=True)
class JacobianTerm:
    """Adds weight x |J|_F^2 / numel(z) to the loss of a step, with the given probability.

    The weight is `warm_up_weight` in the warm-up, then `weight`, and `increase` more every `increase_every` updates;
    nothing after `stop_epoch` epochs (Bai, Koltun and Kolter, ICML 2021, as their code has it).
    """

    weight: float
    probability: float = 1.0
    probes: int = 1
    warm_up_weight: float = 0.0
    increase: float = 0.0
    increase_every: int = 1
    stop_epoch: int | None = None

    def weight_at(self, step: int, epoch: int, warm_up: int) -> float:
        """The weight in update `step`, of epoch `epoch` (both from 0), when `warm_up` updates are unrolled."""
        if step < warm_up:
            return self.warm_up_weight
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return 0.0
        return self.weight + self.increase * ((step - warm_up) // self.increase_every)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every data set and model.

    An update takes `batch` samples over all processes, each of which takes its part in `accumulate` micro-batches.
    """

    optimizer: Adam | Sgd | Muon
    epochs: int
    batch: int
    accumulate: int = 1
    warm_up: WarmUp | None = None
    jacobian: JacobianTerm | None = None
    precision: Precision = "float32"
    checkpoint_minutes: float = 10.0
    log_every: int = 10
    starts: Starts | None = None
    average: float = 0.0  # decay per update of the exponential average of the weights; 0 for none
    rise: float = 0.0  # part of the updates in which the learning rate rises to its peak

    def start_steps(self, epoch: int) -> int:
        """Solver steps from the last epoch's equilibria, in an epoch from 1 on."""
        assert self.starts is not None
        parts = len(self.starts.steps)
        return self.starts.steps[min(parts - 1, (epoch - 1) * parts // max(1, self.epochs - 1))]


def cosine(lr: float, step: int, total: int, rise: float = 0.0) -> float:
    """The learning rate of update `step` of `total`: linear for the first `rise` of them, then a half cosine to `FINAL_LR`."""
    if step < rise * total:
        return lr * (step + 1) / (rise * total)
    done = (step - rise * total) / (total - rise * total)
    return FINAL_LR * lr + (lr - FINAL_LR * lr) * (1 + math.cos(math.pi * done)) / 2


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of all groups to a factor of their own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def make_optimizer(model: nn.Module, settings: Adam | Sgd | Muon) -> torch.optim.Optimizer:
    """The optimiser that the settings describe, over all of the model's parameters."""
    decay = settings.weight_decay
    if isinstance(settings, Adam):
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), settings.lr, weight_decay=decay)
    elif isinstance(settings, Sgd):
        momentum, nesterov = settings.momentum, settings.nesterov
        optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum, weight_decay=decay, nesterov=nesterov)
    else:
        optimizer = MuonAndSgd(model, settings)
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
    return optimizer


class MuonAndSgd(torch.optim.Optimizer):
    """Muon for the convolutions of f, nesterov SGD for all else (Jordan et al. 2024; Newton-Schulz in float32)."""

    def __init__(self, model: nn.Module, settings: Muon) -> None:
        inner = {n: p for n, p in model.named_parameters() if ".f." in f".{n}" and p.ndim == 4 and p.shape[0] > 1 and p[0].numel() > 1}
        rest = [p for n, p in model.named_parameters() if n not in inner]
        groups = [
            {"params": list(inner.values()), "lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay, "muon": True},
            {"params": rest, "lr": settings.rest_lr, "momentum": 0.9, "weight_decay": settings.rest_weight_decay, "muon": False},
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ANN001, ANN201
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] and not group["muon"]:
                grads = [p.grad.add(p, alpha=group["weight_decay"]) for p in params]
            else:
                grads = [p.grad for p in params]
            for p, g in zip(params, grads):
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(g))
                if not group["muon"]:
                    buffer.mul_(group["momentum"]).add_(g)
                    p.add_(g.add(buffer, alpha=group["momentum"]), alpha=-group["lr"])
                    continue
                buffer.lerp_(g, 1 - group["momentum"])
                direction = orthogonalised(g.lerp(buffer, group["momentum"]).flatten(1))
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                # weight-normalised v: step relative to its own size, so that the rate is that of an angle
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.view_as(p), alpha=-group["lr"] * scale)


def orthogonalised(g: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix."""
    x = g / (g.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x
