"""The optimizers that a recipe names, and their learning rate by update. Needs torch alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.recipe import Adam, Muon, Sgd

FINAL = 1e-6  # of the peak learning rate, where the cosine ends
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, tuned for fast growth of small singular values


def make_optimizer(model: nn.Module, settings: Adam | Sgd | Muon) -> torch.optim.Optimizer:
    """The optimizer that the settings describe, over all parameters of the model."""
    if isinstance(settings, Adam):
        optimizer: Any = torch.optim.Adam(model.parameters(), **_options(settings))
    elif isinstance(settings, Sgd):
        optimizer = torch.optim.SGD(model.parameters(), **_options(settings))
    else:
        optimizer = MuonAndSgd(model, settings)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def schedule(step: int, total: int, warm_up: float) -> float:
    """The learning rate of update `step` of `total`, as a part of its peak.

    It rises linearly during the first part `warm_up` of the updates, then falls as a half cosine.
    """
    rising = warm_up * total
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / (total - rising)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2


class MuonAndSgd(torch.optim.SGD):
    """Muon (Jordan et al., 2024) for f's convolutions as matrices (outputs, rest), else SGD.

    Muon is SGD on other gradients: each is replaced by the orthogonalised momentum before the step.
    """

    def __init__(self, model: nn.Module, settings: Muon) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim == 4 and len(parameter) > 1 and parameter[0].numel() > 1
            (matrices if matrix and ".f." in f".{name}" else others).append(parameter)
        if not matrices:
            raise UserError("optimizer.kind: muon trains the f of an mdeq; use sgd for this model")
        own = {"lr": settings.lr, "weight_decay": settings.weight_decay, "muon": settings.momentum}
        rest = _options(settings.rest)
        super().__init__([{"params": matrices, **own}, {"params": others, **rest}])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"] if "muon" in group else ():
                if parameter.grad is not None:
                    parameter.grad = self._direction(parameter, parameter.grad, group["muon"])
        super().step(closure)

    def _direction(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        average = self.state[parameter].setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(average, momentum).flatten(1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        return (scale * orthogonalised(matrix)).view_as(parameter)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix.

    Singular values end between about 0.7 and 1.2, which serves Muon as well as 1 would.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    a, b, c = NEWTON_SCHULZ
    x = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _options(settings: Adam | Sgd) -> dict[str, Any]:
    """The settings under the names that torch has for them."""
    return {name: value for name, value in vars(settings).items() if name != "kind"}
