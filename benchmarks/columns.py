"""The contestants on one f: this library, torchdeq, and the authors' (U, V) form.

The residuals of all are recomputed alike, from what each really did: `probe` keeps the state at
which a column put f on tape and the adjoint that it sent into that tape, and then makes one
evaluation and one product of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published_broyden import PublishedBroyden
from mdeq import Anderson, Broyden, Gmres, Implicit, Network, Phantom, equilibrium
from mdeq.maps import vjp
from mdeq.solvers import Map

Ours = tuple[Broyden | Anderson, Implicit | Phantom]
Loss = Callable[[Tensor], Tensor]  # of an equilibrium (B, D)


@dataclass(frozen=True)
class Column:
    """One contestant.

    Attributes:
        name: In tables.
        layer: f and z0 (B, D) to an equilibrium with its gradient.
        implicit: Whether it solves an adjoint.
        ours: The solver and gradient rule, if they are this library's; a network then runs them.
        counterpart: Of a peer: our column with the same solver, gradient rule and limits.
    """

    name: str
    layer: Callable[[Map, Tensor], Tensor]
    implicit: bool = True
    ours: Ours | None = None
    counterpart: str | None = None


@dataclass(frozen=True)
class Probe:
    """What a column did in one step.

    Attributes:
        evaluations: Calls of f, those on tape included.
        passes: Backward passes through f: products of the adjoint, and that to the weights.
        forward_residual: Mean over the samples of |f(z) - z| / |f(z)| where f went on tape.
        backward_residual: Mean of |J^T u + b - u| / |b|, b the gradient that arrived, u what was
            sent on, J where the column took it; None if no adjoint is solved.
    """

    evaluations: int
    passes: int
    forward_residual: float
    backward_residual: float | None


def ours(name: str, solver: Broyden | Anderson, rule: Implicit | Phantom) -> Column:
    """A column of this library."""
    layer = partial(_equilibrium, solver, rule)
    return Column(f"ours, {name}", layer, isinstance(rule, Implicit), ours=(solver, rule))


def contestants(forward: int, backward: int, only: list[str] | None = None) -> list[Column]:
    """The columns with these numbers of updates, forward and backward, that none stops before.

    Those whose name holds one of the texts in `only`, if given.
    """
    broyden, anderson = Broyden(forward, tolerance=0.0), Anderson(forward, tolerance=0.0)
    gmres = Implicit(Gmres(backward, tolerance=0.0))
    columns = [
        ours("Broyden implicit", broyden, Implicit(Broyden(backward, tolerance=0.0))),
        ours("Anderson implicit", anderson, Implicit(Anderson(backward, tolerance=0.0))),
        ours("Broyden phantom 5", broyden, Phantom(5, 0.5)),
        ours("Anderson, GMRES (the default)", anderson, gmres),
        ours("Broyden, one step", broyden, Phantom(1, 1.0)),
        Column(
            "authors' form, Broyden implicit",
            partial(_equilibrium, PublishedBroyden(forward), Implicit(PublishedBroyden(backward))),
            counterpart="ours, Broyden implicit",
        ),
        *_torchdeq(forward, backward),
    ]
    return [column for column in columns if not only or any(text in column.name for text in only)]


def _equilibrium(
    solver: Broyden | Anderson, rule: Implicit | Phantom, f: Map, z0: Tensor
) -> Tensor:
    value, _ = equilibrium(f, z0, solver, rule)
    assert isinstance(value, Tensor)
    return value


def _torchdeq(forward: int, backward: int) -> list[Column]:
    """Its columns; iterates are chosen as it does by default, backward by the absolute residual."""
    if importlib.util.find_spec("torchdeq") is None:
        print("torchdeq is not installed (pip install '.[bench]'): left out", file=sys.stderr)
        return []
    get_deq = importlib.import_module("torchdeq").get_deq
    limits = {"f_max_iter": forward, "b_max_iter": backward, "f_tol": 0.0, "b_tol": 0.0}
    modes = {"f_stop_mode": "rel", "b_stop_mode": "abs"}

    def column(name: str, solver: str, **gradient: object) -> Column:
        deq = get_deq(f_solver=solver, b_solver=solver, **limits, **modes, **gradient)
        layer = lambda f, z0: deq(f, z0)[0][-1]  # noqa: E731
        return Column(f"torchdeq, {name}", layer, "ift" in gradient, counterpart=f"ours, {name}")

    return [
        column("Broyden implicit", "broyden", ift=True),
        column("Anderson implicit", "anderson", ift=True),
        column("Broyden phantom 5", "broyden", grad=5, tau=0.5),
    ]


class Step:
    """Forward and backward pass of a training step on one batch, with the same masks every time."""

    def __init__(self, network: Network, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels

    def problem(self) -> tuple[Map, Tensor, Loss]:
        """f, z0 (B, D), and the loss of an equilibrium."""
        torch.manual_seed(0)
        f, z0, scales = self.network.backbone.fixed_point_problem(self.images)
        return f, z0, lambda z: self._loss(self.network.head(scales.split(z)))

    def run(self, column: Column) -> None:
        """The step by `column`, after which the parameters have their gradients."""
        self.network.zero_grad(set_to_none=True)
        if column.ours is None:
            f, z0, loss = self.problem()
            loss(column.layer(f, z0)).backward()
            return
        backbone = self.network.backbone
        backbone.forward_solver, backbone.backward = column.ours
        torch.manual_seed(0)
        self._loss(self.network(self.images).logits).backward()

    def probe(self, column: Column) -> Probe:
        """What `column` does in the step, on the whole batch at once."""
        self.network.zero_grad(set_to_none=True)
        return probe(column, *self.problem())

    def _loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels)


class _Tap:
    """f that counts its calls and the gradients that come back.

    Attributes:
        first: The state of the first tape, which carries the gradient on to the weights.
        u: The last gradient that came to that tape.
        last: The state of the last tape, on whose Jacobian an adjoint is solved.
    """

    first: Tensor
    u: Tensor
    last: Tensor

    def __init__(self, f: Map) -> None:
        self.f, self.evaluations, self.tapes, self.passes = f, 0, 0, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        fz = self.f(z)
        if torch.is_grad_enabled():
            self.last = z.detach()
            if self.tapes == 0:
                self.first = self.last
            fz.register_hook(partial(self._note, self.tapes))
            self.tapes += 1
        return fz

    def _note(self, tape: int, gradient: Tensor) -> None:
        self.passes += 1
        if tape == 0:
            self.u = gradient.detach()


def probe(column: Column, f: Map, z0: Tensor, loss: Loss) -> Probe:
    """Runs `column` forward and backward on z = f(z) and `loss`, and recomputes its residuals."""
    tap = _Tap(f)
    output = column.layer(tap, z0)
    arrived: list[Tensor] = []
    output.register_hook(lambda gradient: arrived.append(gradient.detach()))
    loss(output).backward()
    backward = backward_residual(f, tap.last, tap.u, arrived[0]) if column.implicit else None
    return Probe(tap.evaluations, tap.passes, forward_residual(f, tap.first), backward)


def forward_residual(f: Map, z: Tensor) -> float:
    """Mean over the samples of |f(z) - z| / |f(z)|, by one evaluation."""
    with torch.no_grad():
        fz = f(z)
        return float(((fz - z).norm(dim=1) / fz.norm(dim=1)).mean())


def backward_residual(f: Map, z: Tensor, u: Tensor, b: Tensor) -> float:
    """Mean over the samples of |J^T u + b - u| / |b|, by one product."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        product = vjp(f(z), z, u)
    return float(((product + b - u).norm(dim=1) / b.norm(dim=1)).mean())
