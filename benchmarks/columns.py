"""The contestants, on one f: solvers and gradients of this library, of torchdeq, and of the authors' (U, V) form.

Every column's residuals are recomputed alike, from what it really did: `probe` keeps the state at which the column put
f on tape and the adjoint that it sent into that tape, and makes one more evaluation and one more product of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published_broyden import PublishedBroyden
from mdeq import Anderson, Broyden, Gmres, Implicit, Network, Phantom, Reversible
from mdeq.equilibrium import BatchMap, equilibrium
from mdeq.solvers import Map, Solution, Solver

Layer = Callable[[BatchMap, Tensor], Tensor]  # f, z0 -> an equilibrium with its gradient


@dataclass(frozen=True)
class Column:
    """One contestant; `implicit` where it solves an adjoint, whose residual then means something."""

    name: str
    layer: Layer
    implicit: bool = True


@dataclass(frozen=True)
class Probe:
    """What a column did in one step.

    Attributes:
        evaluations: Calls of f, those on tape included.
        passes: Backward passes through f: the products of the adjoint solve and the one that reaches the weights.
        forward_residual: Mean over the samples of |f(z) - z| / |f(z)| where f went on tape.
        backward_residual: Mean of |J^T u + b - u| / |b|, b the gradient that arrived, u what was sent on, J where the
            column took it (torchdeq: one evaluation further than its first tape); None where no adjoint is solved.
    """

    evaluations: int
    passes: int
    forward_residual: float
    backward_residual: float | None


def ours(name: str, forward: Solver, rule: Implicit | Phantom | Reversible, at_once: int | None = None) -> Column:
    """A column of this library, which solves `at_once` samples together."""
    return Column(name, lambda f, z0: equilibrium(f, z0, forward, rule, at_once=at_once)[0], isinstance(rule, Implicit))


def anderson_gmres(forward: int, backward: int, at_once: int | None = None) -> Column:
    """Anderson and GMRES, run to their limits."""
    name = f"ours, Anderson {forward} / GMRES {backward}"
    return ours(name, Anderson(forward, tolerance=0.0), Implicit(Gmres(backward, tolerance=0.0)), at_once)


def contestants(forward: int, backward: int, at_once: int | None, only: list[str] | None = None) -> list[Column]:
    """Every column with `forward` and `backward` solver updates; those whose name holds one of the texts in `only`.

    Ours solve `at_once` samples together, one of them the whole batch, as the peers do.
    """
    broyden, implicit = Broyden(forward, tolerance=0.0), Implicit(Broyden(backward, tolerance=0.0))
    published = PublishedBroyden(forward), Implicit(PublishedBroyden(backward))  # type: ignore[arg-type]
    found = [
        ours("ours, Broyden / Broyden", broyden, implicit, at_once),
        ours("ours, Broyden / Broyden, whole batch", broyden, implicit),
        ours("ours, Broyden / GMRES", broyden, Implicit(Gmres(backward, tolerance=0.0)), at_once),
        anderson_gmres(forward, backward, at_once),
        ours("ours, Broyden / one step", broyden, Phantom(1, 1.0), at_once),
        ours("authors' form, (U, V) Broyden", *published),
        *_torchdeq(forward, backward),
    ]
    return [column for column in found if not only or any(text in column.name for text in only)]


def _torchdeq(forward: int, backward: int) -> list[Column]:
    """Its columns; each solver chooses iterates as it does by default: backward by the absolute residual."""
    if importlib.util.find_spec("torchdeq") is None:
        print("torchdeq is not installed (pip install '.[bench]'): its columns are left out", file=sys.stderr)
        return []
    get_deq = importlib.import_module("torchdeq").get_deq

    def column(name: str, solver: str, **gradient: object) -> Column:
        deq = get_deq(
            f_solver=solver, b_solver=solver, f_max_iter=forward, b_max_iter=backward, f_tol=0.0, b_tol=0.0,
            f_stop_mode="rel", b_stop_mode="abs", **gradient,
        )  # fmt: skip
        return Column(f"torchdeq, {name}", lambda f, z0: deq(f, z0)[0][-1], "ift" in gradient)

    return [
        column("Broyden implicit", "broyden", ift=True),
        column("Anderson implicit", "anderson", ift=True),
        column("Broyden phantom 5", "broyden", grad=5, tau=0.5),
    ]


# ---- one training step, and what was done in it


class Step:
    """Forward and backward of one training step on a batch; the same dropout masks every time."""

    def __init__(self, network: Network, images: Tensor, targets: Tensor) -> None:
        self.network, self.images, self.targets = network, images, targets

    @property
    def at_once(self) -> int | None:
        """How many samples the library itself would solve together."""
        return self.network.backbone.at_once(self.problem()[1])

    def problem(self) -> tuple[BatchMap, Tensor, Callable[[Tensor], Tensor]]:
        """f, z0 (B, D), and the loss of an equilibrium (B, D)."""
        torch.manual_seed(0)
        f, z0, scales = self.network.backbone.fixed_point_problem(self.images)
        return f, z0, lambda z: F.cross_entropy(self.network.head(scales.split(z)), self.targets)

    def run(self, layer: Layer) -> None:
        """The step with `layer`."""
        self.network.zero_grad(set_to_none=True)
        f, z0, loss = self.problem()
        loss(layer(f, z0)).backward()

    def probe(self, column: Column) -> Probe:
        """The step once more, measuring what `column` did."""
        self.network.zero_grad(set_to_none=True)
        return probe(column, *self.problem())


class _Tap:
    """f, counting its calls and the gradients that come back; rows of it are tapped apart.

    Attributes:
        first: The state of the first tape, which carries the gradient on to the weights.
        u: The last gradient that came to that tape.
        last: The state of the last tape, on whose Jacobian an adjoint is solved.
    """

    def __init__(self, f: BatchMap) -> None:
        self.f, self.parts = f, list[_Tap]()
        self.evaluations, self.passes = 0, 0
        self.first: Tensor | None = None
        self.u: Tensor | None = None
        self.last: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        fz = self.f(z)
        if torch.is_grad_enabled():
            first = self.first is None
            self.last = z.detach()
            if first:
                self.first = self.last
            fz.register_hook(lambda gradient: self._note(gradient, first))
        return fz

    def rows(self, rows: slice) -> Map:
        self.parts.append(_Tap(self.f.rows(rows)))  # type: ignore[arg-type]
        return self.parts[-1]

    def joined(self, name: Literal["first", "u", "last"]) -> Tensor:
        """That attribute of the whole batch."""
        return torch.cat([getattr(part, name) for part in self.parts or [self]])

    def most(self, name: Literal["evaluations", "passes"]) -> int:
        """That count, of the part that has most."""
        return max(getattr(part, name) for part in self.parts or [self])

    def _note(self, gradient: Tensor, first: bool) -> None:
        self.passes += 1
        if first:
            self.u = gradient.detach()


def probe(column: Column, f: BatchMap, z0: Tensor, loss: Callable[[Tensor], Tensor]) -> Probe:
    """Runs `column` forward and backward on z = f(z) and `loss`, and recomputes its residuals."""
    tap = _Tap(f)
    output = column.layer(tap, z0)
    arrived: list[Tensor] = []
    output.register_hook(lambda gradient: arrived.append(gradient.detach()))
    loss(output).backward()
    forward = forward_residual(f, tap.joined("first"))
    backward = backward_residual(f, tap.joined("last"), tap.joined("u"), arrived[0]) if column.implicit else None
    return Probe(tap.most("evaluations"), tap.most("passes"), forward, backward)


def forward_residual(f: Map, z: Tensor) -> float:
    """Mean over the samples of |f(z) - z| / |f(z)|, by one evaluation."""
    with torch.no_grad():
        fz = f(z)
        return float(((fz - z).norm(dim=1) / fz.norm(dim=1)).mean())


def backward_residual(f: Map, z: Tensor, u: Tensor, b: Tensor) -> float:
    """Mean over the samples of |J^T u + b - u| / |b|, by one product."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        product = torch.autograd.grad(f(z), z, u)[0]
    return float(((product + b - u).norm(dim=1) / b.norm(dim=1)).mean())


# ---- as few evaluations as a peer's residuals ask for


def at_equal_residual(step: Step, peer: Probe, limit: int) -> tuple[int, int] | None:
    """The fewest updates of Anderson, then of GMRES, whose recomputed residuals are at most the peer's.

    None where `limit` updates of either do not suffice.
    """
    assert peer.backward_residual is not None
    f, z0, _ = step.problem()
    with torch.no_grad():
        trace = Anderson(limit, tolerance=0.0)(f, z0).trace
        for forward in _candidates(best_so_far(trace), peer.forward_residual):
            if forward_residual(f, Anderson(forward, tolerance=0.0)(f, z0).value) <= peer.forward_residual:
                break
        else:
            return None
    solutions: list[Solution] = []
    solver, rule = Anderson(forward, tolerance=0.0), Implicit(Gmres(limit, tolerance=0.0))
    step.run(lambda f, z0: equilibrium(f, z0, solver, rule, on_backward=solutions.append)[0])
    trace = torch.cat([torch.ones_like(solutions[0].trace[:1]), solutions[0].trace])
    for backward in _candidates(trace, peer.backward_residual):
        found = step.probe(anderson_gmres(forward, backward, step.at_once))
        assert found.backward_residual is not None
        if found.forward_residual <= peer.forward_residual and found.backward_residual <= peer.backward_residual:
            return forward, backward
    return None


def best_so_far(trace: Tensor) -> Tensor:
    """(nfe, B) residuals to those of the best iterate after 0, 1, ... updates; the start counts only alone."""
    return torch.cat([trace[:1], trace[1:].cummin(0).values])


def _candidates(rows: Tensor, target: float) -> range:
    """Numbers of updates from the first whose own account, (updates + 1, B), nearly meets the target."""
    near = [n for n, residual in enumerate(rows.mean(1).tolist()) if n and residual <= 1.02 * target]
    return range(near[0], len(rows)) if near else range(0)


# ---- the solver's own time


class _Replay:
    """f whose values are recorded in a first solve and given again in the next ones, for rows apart."""

    def __init__(self, f: BatchMap) -> None:
        self.f, self.values, self.parts = f, list[Tensor](), dict[int, _Replay]()
        self.given: Iterator[Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.given is not None:
            return next(self.given)
        self.values.append(self.f(z))
        return self.values[-1]

    def rows(self, rows: slice) -> Map:
        return self.parts.setdefault(rows.start, _Replay(self.f.rows(rows)))  # type: ignore[arg-type]

    def again(self) -> None:
        """From the first value on."""
        for part in (self, *self.parts.values()):
            part.given = iter(part.values)


def own_milliseconds(layer: Layer, f: BatchMap, z0: Tensor, repeats: int = 7) -> float:
    """Milliseconds that the forward solver itself takes for an evaluation of f on the batch, the least of `repeats`."""
    replay, seconds = _Replay(f), []
    with torch.no_grad():
        layer(replay, z0)
        for _ in range(repeats):
            replay.again()
            began = time.perf_counter()
            layer(replay, z0)
            seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds) / max(len(part.values) for part in (replay, *replay.parts.values()))
