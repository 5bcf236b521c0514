"""How a model is trained, for all data sets and models. Plain dataclasses, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mdeq.checks import above, at_least, between, one_of, whole

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Adam:
    """Adam with L2 weight decay (as published, not decoupled)."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    kind: Literal["adam"] = "adam"

    def __post_init__(self) -> None:
        above(0, lr=self.lr)
        at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and L2 weight decay."""

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    kind: Literal["sgd"] = "sgd"

    def __post_init__(self) -> None:
        above(0, lr=self.lr)
        between(0, 1, open_high=True, momentum=self.momentum)
        at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., 2024) for the convolutions of f, as matrices; SGD for the rest."""

    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0  # decoupled
    rest: Sgd = field(default_factory=Sgd)  # the optimizer of all other parameters
    kind: Literal["muon"] = "muon"

    def __post_init__(self) -> None:
        above(0, lr=self.lr)
        between(0, 1, open_high=True, momentum=self.momentum)
        at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class WarmUp:
    """For the first `steps` updates f is applied `layers` times and back-propagated (Sec. 3.3)."""

    layers: int
    steps: int
    softplus: float | None = None  # curvature of what replaces the last ReLUs of f meanwhile

    def __post_init__(self) -> None:
        whole(1, layers=self.layers)
        whole(0, steps=self.steps)
        above(0, softplus=self.softplus)


@dataclass(frozen=True)
class JacobianTerm:
    """Adds weight x |J|_F^2 / numel(z) to the loss of an update, with the given probability.

    Bai, Koltun and Kolter (ICML 2021), as in their code.
    """

    weight: float
    probability: float = 1.0
    probes: int = 1  # random vectors that estimate the norm
    warm_up_weight: float = 0.0  # during the warm-up
    increase: float = 0.0  # added to the weight ...
    increase_every: int = 1  # ... per this many updates after the warm-up
    stop_epoch: int | None = None  # the weight is 0 after this many epochs

    def __post_init__(self) -> None:
        at_least(0, weight=self.weight, warm_up_weight=self.warm_up_weight, increase=self.increase)
        between(0, 1, probability=self.probability)
        whole(1, probes=self.probes, increase_every=self.increase_every, stop_epoch=self.stop_epoch)

    def weight_at(self, step: int, epoch: int, warm_up: int) -> float:
        """The weight in an update of an epoch, both from 0, after `warm_up` unrolled updates."""
        if step < warm_up:
            return self.warm_up_weight
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return 0.0
        return self.weight + self.increase * ((step - warm_up) // self.increase_every)


@dataclass(frozen=True)
class WarmStart:
    """Each training sample's solve starts at its own equilibrium of the epoch before.

    For training without augmentation. The first epoch, and one whose stored equilibria are lost,
    starts at z = 0 with the solver's own limit.
    """

    steps: tuple[int, ...] = (1, 0)  # the solver's limits, one per equal part of the other epochs;
    # 0 applies f once, on the tape alone

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("steps: must have at least one number")
        for limit in self.steps:
            whole(0, steps=limit)

    def limit(self, epoch: int, epochs: int) -> int:
        """The solver's limit in epoch `epoch` (from 1 on) of `epochs`."""
        part = (epoch - 1) * len(self.steps) // max(1, epochs - 1)
        return self.steps[min(part, len(self.steps) - 1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; the same for every data set and model."""

    optimizer: Adam | Sgd | Muon  # with its peak learning rate
    epochs: int  # 0 only validates
    batch: int  # samples per update, over all processes
    accumulate: int = 1  # micro-batches that make an update, one after the other
    warm_up: WarmUp | None = None  # unrolled updates at the start
    jacobian: JacobianTerm | None = None
    warm_start: WarmStart | None = None  # None starts each solve at z = 0
    lr_warm_up: float = 0.0  # part of the updates with a rising learning rate; then half a cosine
    label_smoothing: float = 0.0
    average: float = 0.0  # decay of an exponential moving average of the weights, then the model
    precision: Precision = "float32"  # of convolutions and matrix products
    checkpoint_minutes: float = 5.0  # between two saves of the resumable state
    log_every: int = 10  # updates between two recorded rows

    def __post_init__(self) -> None:
        whole(0, epochs=self.epochs)
        whole(1, batch=self.batch, accumulate=self.accumulate, log_every=self.log_every)
        between(0, 1, open_high=True, lr_warm_up=self.lr_warm_up, average=self.average)
        between(0, 1, open_high=True, label_smoothing=self.label_smoothing)
        one_of(("float32", "bfloat16", "float16"), precision=self.precision)
        above(0, checkpoint_minutes=self.checkpoint_minutes)


@dataclass(frozen=True)
class Debug:
    """A run for debugging, which leaves no results."""

    limit_batches: int | None = None  # of training and validation in each epoch
    overfit: int | None = None  # train and validate on this many batches, always augmented alike
    profile: bool = False  # write a Chrome trace of a few updates
