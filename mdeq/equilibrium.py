"""Solve z = f(z) without a graph, and differentiate the solution (Sec. 3.1, Eq. 3 and 4).

The forward pass costs the memory of one evaluation of f however many the solver makes: only the last one, at the
equilibrium, is on the tape. Its vector-Jacobian products then serve the adjoint.

As samples never feel each other, a batch may be solved a few samples at a time: the solver's history is then that of
those few, and on a CPU their features stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdeq.reversible import reversible
from mdeq.solvers import Anderson, Broyden, FixedPoint, Gmres, Map, Solution, Solver


@dataclass(frozen=True)
class Implicit:
    """The implicit gradient: solves the adjoint u = J^T u + dl/dz* (Eq. 4), once differentiable.

    Whatever the solver, its relative residual is measured against |dl/dz*|.

    Args:
        solver: Of the adjoint; the paper's is Broyden's method, `Gmres` is made for linear systems.
    """

    solver: Broyden | Anderson | FixedPoint | Gmres = Gmres(steps=20)
    kind: Literal["implicit"] = "implicit"


@dataclass(frozen=True)
class Phantom:
    """The phantom gradient (Geng et al., NeurIPS 2021): back-propagation through damped applications of f at z*.

    One step with damping 1 is the Jacobian-free gradient (Fung et al., AAAI 2022).

    Args:
        steps: Applications, all on the tape.
        damping: Weight of f in each.
    """

    steps: int = 5
    damping: float = 0.5
    kind: Literal["phantom"] = "phantom"


@dataclass(frozen=True)
class Reversible:
    """The exact gradient of the steps really taken, by `reversible`; `steps` of them, each two evaluations of f.

    Where gradients are wanted these steps replace the forward solver.
    """

    steps: int = 8
    damping: float = 0.5
    kind: Literal["reversible"] = "reversible"

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise ValueError(f"damping: between 0 and 1, which the way back divides by, not {self.damping}")


@runtime_checkable
class BatchMap(Protocol):
    """f of a batch that also gives f of some of its samples."""

    def __call__(self, z: Tensor, /) -> Tensor: ...

    def rows(self, rows: slice, /) -> Map:
        """f of these samples alone."""
        ...


def equilibrium(
    f: Map | BatchMap,
    z0: Tensor,
    forward: Solver,
    backward: Implicit | Phantom | Reversible,
    on_backward: Callable[[Solution], None] | None = None,
    at_once: int | None = None,
    fast: Map | BatchMap | None = None,
) -> tuple[Tensor, Solution]:
    """The equilibrium of f from `z0` (B, D), differentiable in all that f depends on.

    Args:
        f: Acts on each sample alone; called under no_grad by the solver, then once (or `Phantom.steps` times) on tape.
        z0: The starting point; no gradient flows to it.
        forward: Solves z = f(z).
        backward: How the solution is differentiated.
        on_backward: Called with the adjoint's solution in each backward pass through `Implicit` or `Reversible`.
        at_once: Solve at most that many samples at a time, for which f must be a `BatchMap`; None for the whole batch.

        fast: f once more for the solvers alone, forward and adjoint: compiled perhaps, or with its parameters detached.
            f itself is then evaluated only for the tape.

    Returns:
        Where gradients are enabled f(z*) (damped and repeated for `Phantom`), else z*, (B, D); the forward solution.

    Raises:
        TypeError: `at_once` is given, and f is no `BatchMap`.
    """
    if at_once is None or at_once >= len(z0):
        return _equilibrium(f, z0, forward, backward, on_backward, fast)
    if not isinstance(f, BatchMap) or not isinstance(fast, BatchMap | None):
        raise TypeError("at_once: f has no `rows`, so it cannot be solved a few samples at a time")
    even = math.ceil(len(z0) / math.ceil(len(z0) / at_once))  # parts of one size
    rows = [slice(start, start + even) for start in range(0, len(z0), even)]
    adjoints: dict[int, Solution] = {}

    def collect(i: int, part: Solution) -> None:
        adjoints[i] = part
        if on_backward is not None and len(adjoints) == len(rows):
            on_backward(Solution.joined([adjoints.pop(i) for i in range(len(rows))]))

    parts = [
        _equilibrium(f.rows(part), z0[part].clone(), forward, backward, partial(collect, i), fast and fast.rows(part))
        for i, part in enumerate(rows)
    ]
    values, solutions = zip(*parts, strict=True)
    return torch.cat(values), Solution.joined(solutions)


def _equilibrium(
    f: Map,
    z0: Tensor,
    forward: Solver,
    backward: Implicit | Phantom | Reversible,
    on_backward: Callable[[Solution], None] | None,
    fast: Map | None,
) -> tuple[Tensor, Solution]:
    f, fast = _in_state_precision(f, z0), fast and _in_state_precision(fast, z0)
    if isinstance(backward, Reversible) and torch.is_grad_enabled():
        return reversible(f, z0, backward.steps, backward.damping, on_backward)
    with torch.no_grad(), torch.autocast(z0.device.type, enabled=False):
        solution = forward(fast or f, z0.detach())
    if not torch.is_grad_enabled():
        return solution.value, solution
    if isinstance(backward, Phantom):
        return _damped(f, solution.value, backward.steps, backward.damping), solution
    assert isinstance(backward, Implicit)
    z = solution.value.detach().requires_grad_(fast is None)
    return _Adjoint.apply(f(z), z, backward.solver, on_backward, fast), solution  # type: ignore[return-value]


def unroll(f: Map, z0: Tensor, steps: int) -> Tensor:
    """f applied `steps` times to `z0`, all on the tape: the weight-tied network of the warm-up (Eq. 1)."""
    return _damped(_in_state_precision(f, z0), z0, steps, damping=1)


def _in_state_precision(f: Map, z0: Tensor) -> Map:
    """f under the caller's autocast, its value in the precision of the state, in which the solver works."""
    device = z0.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def precise(z: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=enabled):
            return f(z).to(z.dtype)

    return precise


def _damped(f: Map, z: Tensor, steps: int, damping: float) -> Tensor:
    for _ in range(steps):
        z = f(z) if damping == 1 else torch.lerp(z, f(z), damping)
    return z


class _Adjoint(torch.autograd.Function):
    """Identity on f(z) whose backward pass replaces dl/df by the adjoint u; f(z)'s own tape carries u on."""

    @staticmethod
    def forward(
        ctx: Any,
        fz: Tensor,
        z: Tensor,
        solver: Solver | Gmres,
        on_backward: Callable[[Solution], None] | None,
        fast: Map | None,
    ) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.solver, ctx.on_backward, ctx.fast = solver, on_backward, fast
        return fz.view_as(fz)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        fz, z = ctx.saved_tensors
        if ctx.fast is not None:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                fz = ctx.fast(z)

        def product(u: Tensor) -> Tensor:  # J^T u
            return torch.autograd.grad(fz, z, u, retain_graph=True)[0]

        with torch.autocast(z.device.type, enabled=False):
            solution = solve_adjoint(product, gradients[0], ctx.solver)
        if ctx.on_backward is not None:
            ctx.on_backward(solution)
        return solution.value, None, None, None, None


def solve_adjoint(product: Map, b: Tensor, solver: Solver | Gmres) -> Solution:
    """u = J^T u + b, from the product u -> J^T u. `nfe` counts the products; the first residual, at u = 0, is b."""
    if isinstance(solver, Gmres):
        return solver(product, b)
    first = True

    def affine(u: Tensor) -> Tensor:
        nonlocal first
        if first:
            first = False
            return b
        return product(u) + b

    solution = solver(affine, torch.zeros_like(b), scale=torch.linalg.vector_norm(b, dim=1))
    return replace(solution, nfe=solution.nfe - 1, trace=solution.trace[1:])
