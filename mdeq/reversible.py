"""The coupled reversible iteration (McCallum, Arora, Foster 2025, arXiv 2509.12917).

Two states advance by turns; each step can be undone, so the backward pass walks the very steps that
were taken and keeps none of them: the exact gradient of a long unrolling at the memory of one
evaluation of f. The states are in float64, as undoing a step divides by 1 - damping and so
magnifies what rounding left out; f stays in its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdeq.maps import FlatMap, depends_beyond, refused
from mdeq.solvers import Solution

HIDDEN = (
    "reversible: f depends on tensors that it does not name. Make f a module, or pass them: "
    "equilibrium(f, z0, ..., inputs=(a, b)) with f(z, a, b)"
)
NO_SECOND = "reversible: there is no second derivative; Implicit has derivatives of every order"


def reversible(
    f: FlatMap,
    z0: Tensor,
    steps: int,
    damping: float,
    on_backward: Callable[[Solution], None] | None = None,
) -> tuple[Tensor, Solution]:
    """`steps` coupled steps y <- (1 - b) y + b f(z), z <- (1 - b) z + b f(y) from y = z = `z0`.

    Args:
        f: Acts on each sample alone, the same each time it is called.
        z0: (B, D); no gradient flows to it.
        steps: Each evaluates f twice.
        damping: b, strictly between 0 and 1.
        on_backward: Called after each backward pass with a solution whose `value` is the start that
            the way back arrived at, and whose residuals are its distance from `z0`, relative to
            |z|: the reconstruction error.

    Returns:
        z (B, D), differentiable once in the inputs of f; and the iteration as a solution, whose
        residuals are those of the last f(y). Nothing stops a sample, so none counts as converged.

    Raises:
        RuntimeError: f depends on tensors that it does not name; or, in differentiating the
            gradient, that there is no second derivative.
    """
    z0 = z0.detach()
    first = _Pullback(f).value(z0)[0].detach()
    return _Reversible.apply(f, z0, first, steps, damping, on_backward, *f.inputs)  # type: ignore[return-value]


class _Pullback:
    """Evaluates f on a tape at points of the iteration, and sums what flows to its inputs.

    The arguments are cut off from what they come from, which may be another input.
    """

    def __init__(self, f: FlatMap) -> None:
        self.f = f
        self.arguments = [a.detach().requires_grad_(a.requires_grad) for a in f.arguments]
        self.inputs = [*self.arguments, *f.inputs[len(self.arguments) :]]
        self.sums: list[Tensor | None] = [None] * len(self.inputs)

    def value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) and the leaf z on its tape."""
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            value = self.f(point, *self.arguments)
        if depends_beyond(value, [point, *self.inputs]):
            raise RuntimeError(HIDDEN)
        return value, point

    def __call__(self, z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) and J^T gradient, in double precision."""
        value, point = self.value(z)
        places = [i for i, tensor in enumerate(self.inputs) if tensor.requires_grad]
        wanted = [point, *(self.inputs[i] for i in places)]
        flow = gradient.to(value.dtype)
        first, *others = torch.autograd.grad(value, wanted, flow, materialize_grads=True)
        for i, other in zip(places, others, strict=True):
            known = self.sums[i]
            self.sums[i] = other if known is None else known + other
        return value.detach().double(), first.double()


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: FlatMap,
        z0: Tensor,
        first: Tensor,
        steps: int,
        damping: float,
        on_backward: Callable[[Solution], None] | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Solution]:
        ctx.f, ctx.steps, ctx.damping, ctx.on_backward = f, steps, damping, on_backward
        y = z = z0.double()
        residuals = []
        for step in range(steps):
            fz = (f(z.to(z0.dtype)) if step else first).double()
            residuals.append(_residual(fz, z))
            y = torch.lerp(y, fz, damping)
            fy = f(y.to(z0.dtype)).double()
            residuals.append(_residual(fy, y))
            z = torch.lerp(z, fy, damping)
        ctx.save_for_backward(z0, y, z, *inputs)
        value = z.to(z0.dtype)
        converged = torch.zeros(len(z0), dtype=torch.bool, device=z0.device)
        return value, _solution(value.detach(), residuals, converged)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z0, y, z, *inputs = ctx.saved_tensors
        with torch.no_grad():
            start, sums = _way_back(ctx, gradients[0], y, z, z0.dtype)
        if ctx.on_backward is not None:
            absolute = torch.linalg.vector_norm(start - z0, dim=1)
            relative = absolute / torch.linalg.vector_norm(z, dim=1)
            error = [(relative, absolute)] * 2 * ctx.steps
            ctx.on_backward(_solution(start.to(z0.dtype), error, relative < 1))
        if torch.is_grad_enabled():
            upstream = (gradients[0], *inputs)
            sums = [None if s is None else refused(NO_SECOND, s, *upstream) for s in sums]
        return None, None, None, None, None, None, *sums


def _way_back(
    ctx: Any, gradient: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """The start that undoing every step arrives at, and the gradients of f's inputs."""
    pullback, b = _Pullback(ctx.f), ctx.damping
    dz, dy = gradient.double(), torch.zeros_like(z)
    for _ in range(ctx.steps):
        fy, more = pullback(y.to(dtype), b * dz)
        z, dz, dy = (z - b * fy) / (1 - b), (1 - b) * dz, dy + more
        fz, more = pullback(z.to(dtype), b * dy)
        y, dy, dz = (y - b * fz) / (1 - b), (1 - b) * dy, dz + more
    return z, pullback.sums


def _residual(fz: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """|f(z) - z|, relative to |f(z)| and absolute, (B,)."""
    absolute = torch.linalg.vector_norm(fz - z, dim=1)
    size = torch.linalg.vector_norm(fz, dim=1)
    return absolute / size.clamp(min=torch.finfo(fz.dtype).tiny), absolute


def _solution(value: Tensor, residuals: list[tuple[Tensor, Tensor]], converged: Tensor) -> Solution:
    precision = torch.promote_types(value.dtype, torch.float32)
    relative = torch.stack([relative for relative, _ in residuals]).to(precision)
    absolute = residuals[-1][1].to(precision)
    steps = torch.full_like(converged, len(residuals), dtype=torch.int64)
    return Solution(value, relative[-1], absolute, steps, converged, relative, len(residuals))
