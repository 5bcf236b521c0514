"""A module that solves z = f(z, *inputs) for an f of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mdeq.checks import above, given, instance, whole
from mdeq.equilibrium import Gradient, Implicit, equilibrium, trajectory
from mdeq.maps import State
from mdeq.solvers import Anderson, Broyden, FixedPoint, Solution


@dataclass(frozen=True)
class Zeros:
    """Starts every solve at 0."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


@dataclass(frozen=True)
class Normal:
    """Starts every solve at independent normal numbers of standard deviation `scale`."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        given(scale=self.scale)
        above(0, scale=self.scale)

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.scale * torch.randn_like(tensor)


class DEQ(nn.Module):
    """The equilibrium z* = f(z*, *inputs) of a module or function f.

    Args:
        f: See `mdeq.equilibrium`. Its parameters are this module's if it is a module.
        solver: Finds z*.
        backward: Differentiates it.
        evaluation: Finds z* in evaluation mode; None for `solver`.
        start: `Zeros()`, `Normal(scale)`, or a module that proposes z0 from the inputs. No gradient
            flows from z* to the proposal: to train it, call `deq.start(*inputs)` and compare.
        jitter: In training the solver's limit on steps is drawn for each batch, evenly from
            `solver.steps - jitter` to `solver.steps + jitter`.

    Attributes:
        solution: Of the last solve; None before.
        adjoint: Of the last backward pass through `Implicit` or `Reversible`; None before.

    Raises:
        ValueError: A setting is of the wrong kind, or `jitter` could leave no step.
    """

    def __init__(
        self,
        f: Callable[..., State],
        solver: Broyden | Anderson | FixedPoint = Anderson(),
        backward: Gradient = Implicit(),
        *,
        evaluation: Broyden | Anderson | FixedPoint | None = None,
        start: Zeros | Normal | nn.Module = Zeros(),
        jitter: int = 0,
    ) -> None:
        super().__init__()
        given(solver=solver, backward=backward, start=start)
        instance((Broyden, Anderson, FixedPoint), solver=solver, evaluation=evaluation)
        instance(Gradient.__args__, backward=backward)
        instance((Zeros, Normal, nn.Module), start=start)
        whole(0, jitter=jitter)
        if jitter >= max(1, solver.steps):
            raise ValueError(f"jitter: must be less than the {solver.steps} steps of the solver")
        self.f, self.start = f, start
        self.solver, self.backward, self.evaluation = solver, backward, evaluation or solver
        self.jitter = jitter
        self.solution: Solution | None = None
        self.adjoint: Solution | None = None

    def forward(self, *inputs: Tensor, like: State | None = None, z0: State | None = None) -> State:
        """z*; f(z*) where gradients are enabled.

        Args:
            inputs: What f takes after z.
            like: A state whose shapes and precision z has; None for those of the first input.
            z0: Start here instead.
        """
        z0 = self._start(inputs, like) if z0 is None else z0
        z, self.solution = equilibrium(
            self.f, z0, self._solver(), self.backward, inputs=inputs, on_backward=self._keep
        )
        return z

    def states(
        self,
        *inputs: Tensor,
        keep: Sequence[int],
        like: State | None = None,
        z0: State | None = None,
    ) -> list[State]:
        """The iterates `keep` on the way and then z*, all differentiable; see `trajectory`."""
        z0 = self._start(inputs, like) if z0 is None else z0
        states, self.solution = trajectory(
            self.f, z0, self._solver(), self.backward, keep, inputs=inputs, on_backward=self._keep
        )
        return states

    def _start(self, inputs: Sequence[Tensor], like: State | None) -> State:
        if isinstance(self.start, nn.Module):
            return self.start(*inputs)
        if like is None and not inputs:
            raise ValueError("like: without inputs, give a state of the right shape, or z0")
        like = inputs[0] if like is None else like
        if isinstance(like, dict):
            return {key: self.start(tensor) for key, tensor in like.items()}
        if isinstance(like, tuple | list):
            return type(like)(self.start(tensor) for tensor in like)
        return self.start(like)

    def _solver(self) -> Broyden | Anderson | FixedPoint:
        if not self.training:
            return self.evaluation
        if not self.jitter:
            return self.solver
        change = int(torch.randint(-self.jitter, self.jitter + 1, ()))
        return replace(self.solver, steps=self.solver.steps + change)

    def _keep(self, adjoint: Solution) -> None:
        self.adjoint = adjoint
