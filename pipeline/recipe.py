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

    optimizer: Adam | Sgd
    epochs: int
    batch: int
    accumulate: int = 1
    warm_up: WarmUp | None = None
    jacobian: JacobianTerm | None = None
    precision: Precision = "float32"
    checkpoint_minutes: float = 10.0
    log_every: int = 10


def cosine(lr: float, step: int, total: int) -> float:
    """The learning rate of update `step` of `total`: a half cosine from `lr` to `FINAL_LR`."""
    return FINAL_LR + (lr - FINAL_LR) * (1 + math.cos(math.pi * step / total)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(model: nn.Module, settings: Adam | Sgd) -> torch.optim.Optimizer:
    """The optimiser that the settings describe, over all of the model's parameters."""
    decay = settings.weight_decay
    if isinstance(settings, Adam):
        return torch.optim.Adam(model.parameters(), settings.lr, weight_decay=decay)
    momentum, nesterov = settings.momentum, settings.nesterov
    return torch.optim.SGD(model.parameters(), settings.lr, momentum, weight_decay=decay, nesterov=nesterov)
