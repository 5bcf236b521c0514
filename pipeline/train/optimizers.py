"""The optimizers that a recipe names, and their learning rate by update. Needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.recipe import Adam, Muon, Sgd

FINAL = 1e-6  # of the peak learning rate, where the cosine ends
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, tuned for fast growth of small singular values


def make_optimizer(model: nn.Module, settings: Adam | Sgd | Muon) -> torch.optim.Optimizer:
    """The optimizer that the settings describe, over all parameters of the model."""
    if isinstance(settings, Muon):
        optimizer: torch.optim.Optimizer = MuonAndSgd(model, settings)
    elif isinstance(settings, Adam):
        parameters = model.parameters()
        optimizer = torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
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

    Raises:
        UserError: The model has no transformation f.
    """

    def __init__(self, model: nn.Module, settings: Muon) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim == 4 and len(parameter) > 1 and parameter[0].numel() > 1
            (matrices if matrix and ".f." in f".{name}" else others).append(parameter)
        if not matrices:
            raise UserError("optimizer.kind: muon trains the f of an mdeq; use sgd for this model")
        rest = settings.rest
        groups = [
            {
                "params": matrices,
                "lr": settings.lr,
                "weight_decay": settings.weight_decay,
                "orthogonal": settings.momentum,
            },
            {
                "params": others,
                "lr": rest.lr,
                "weight_decay": rest.weight_decay,
                "momentum": rest.momentum,
                "nesterov": rest.nesterov,
            },
        ]
        super().__init__(groups)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update."""
        for group in self.param_groups:
            if "orthogonal" in group:
                for parameter in group["params"]:
                    self._replace_gradient(parameter, group["orthogonal"])
        super().step(closure)

    def _replace_gradient(self, parameter: nn.Parameter, momentum: float) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        average = self.state[parameter].setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - momentum)
        direction = orthogonalised(gradient.lerp(average, momentum).flatten(1))
        outputs, inputs = direction.shape
        scale = max(1.0, outputs / inputs) ** 0.5
        parameter.grad = (scale * direction).view_as(parameter)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix.

    Singular values end between about 0.7 and 1.2, which serves Muon as well as 1 would.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    tall = len(x) > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
