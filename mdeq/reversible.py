"""The coupled reversible iteration (McCallum, Arora, Foster 2025, Reversible Deep Equilibrium Models).

Two states advance by turns; each step can be undone, so the backward pass walks the very steps that were taken and
keeps none of them: the exact gradient of a long unrolling at the memory of one evaluation of f. The states are in
float64, as undoing a step divides by 1 - damping and so magnifies what rounding left out; f stays in its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from mdeq.solvers import Map, Solution


def reversible(
    f: Map, z0: Tensor, steps: int, damping: float, on_backward: Callable[[Solution], None] | None = None
) -> tuple[Tensor, Solution]:
    """`steps` coupled steps y <- (1 - b) y + b f(z), z <- (1 - b) z + b f(y) from y = z = `z0`, b the damping.

    Args:
        f: Acts on each sample alone, the same each time it is called; not compiled.
        z0: (B, D); no gradient flows to it.
        steps: Each evaluates f twice.
        damping: Strictly between 0 and 1.
        on_backward: Called after each backward pass with a solution whose `value` is the start that the way back
            arrived at, and whose residuals are its distance from `z0`, relative to |z|: the reconstruction error.

    Returns:
        z (B, D), differentiable once in what f depends on; and the iteration as a solution, its residuals those of the
        last f(y). Nothing stops a sample, so none counts as converged.

    Raises:
        RuntimeError: in the backward pass, if f depends on tensors that its first call did not show.
    """
    with torch.no_grad(), _Dependencies() as seen:
        first = f(z0)
    return _Reversible.apply(f, z0, first, steps, damping, on_backward, *seen.tensors)  # type: ignore[return-value]


class _Dependencies(TorchFunctionMode):
    """Sees the tensors with a gradient that take part in what is called under no_grad, views made there left out."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._found.values())

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in self._made:
                    self._found[id(tensor)] = tensor
        result = function(*args, **(kwargs or {}))
        self._made.add(id(result))
        return result


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: Map,
        z0: Tensor,
        first: Tensor,
        steps: int,
        damping: float,
        on_backward: Callable[[Solution], None] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Solution]:
        ctx.f, ctx.steps, ctx.damping, ctx.on_backward = f, steps, damping, on_backward
        y = z = z0.double()
        relative, absolute = [], []
        for step in range(steps):
            fz = (f(z.to(z0.dtype)) if step else first).double()
            y, g = torch.lerp(y, fz, damping), fz - z
            _record(g, fz, relative, absolute)
            fy = f(y.to(z0.dtype)).double()
            z, g = torch.lerp(z, fy, damping), fy - y
            _record(g, fy, relative, absolute)
        ctx.save_for_backward(z0, y, z, *tensors)
        count = torch.full((len(z0),), 2 * steps, device=z0.device)
        converged = torch.zeros(len(z0), dtype=torch.bool, device=z0.device)
        last = relative[-1].to(z0.dtype), absolute[-1].to(z0.dtype)
        value = z.to(z0.dtype)
        trace = torch.stack(relative).to(z0.dtype)
        return value, Solution(value.detach(), *last, count, converged, trace, 2 * steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z0, y, z, *tensors = ctx.saved_tensors
        b = ctx.damping
        dz, dy = gradients[0].double(), torch.zeros_like(z)
        size = torch.linalg.vector_norm(z, dim=1)
        sums: list[Tensor | None] = [None] * len(tensors)
        for step in range(ctx.steps):
            fy, dy_more = _back(ctx.f, y.to(z0.dtype), b * dz, tensors, sums, check=step == 0)
            z, dz, dy = (z - b * fy) / (1 - b), (1 - b) * dz, dy + dy_more
            fz, dz_more = _back(ctx.f, z.to(z0.dtype), b * dy, tensors, sums)
            y, dy, dz = (y - b * fz) / (1 - b), (1 - b) * dy, dz + dz_more
        if ctx.on_backward is not None:
            ctx.on_backward(_reconstruction(z, z0, size, ctx.steps))
        return (None, None, None, None, None, None, *sums)


def _record(g: Tensor, fz: Tensor, relative: list[Tensor], absolute: list[Tensor]) -> None:
    absolute.append(torch.linalg.vector_norm(g, dim=1))
    relative.append(absolute[-1] / torch.linalg.vector_norm(fz, dim=1).clamp(min=torch.finfo(fz.dtype).tiny))


def _back(
    f: Map, point: Tensor, gradient: Tensor, tensors: list[Tensor], sums: list[Tensor | None], check: bool = False
) -> tuple[Tensor, Tensor]:
    """f at a point, and J^T gradient; what flows to f's tensors is added to `sums`."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        value = f(point)
    if check:
        _refuse_unseen(value, [point, *tensors])
    first, *others = torch.autograd.grad(value, [point, *tensors], gradient.to(value.dtype), allow_unused=True)
    for i, other in enumerate(others):
        if other is not None:  # pyright: ignore[reportUnnecessaryComparison]  allow_unused
            known = sums[i]
            sums[i] = other if known is None else known + other
    return value.detach().double(), first.double()


def _refuse_unseen(value: Tensor, known: list[Tensor]) -> None:
    seen: set[Node] = {get_gradient_edge(tensor).node for tensor in known}
    todo = [get_gradient_edge(value).node]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if not node.next_functions:
                raise RuntimeError("reversible: f depends on tensors that its first call did not show; is it compiled?")
            todo += [after for after, _ in node.next_functions if after is not None]


def _reconstruction(z: Tensor, z0: Tensor, size: Tensor, steps: int) -> Solution:
    absolute = torch.linalg.vector_norm(z - z0, dim=1).to(z0.dtype)
    relative = absolute / size.to(z0.dtype)
    count = torch.full((len(z0),), 2 * steps, device=z0.device)
    return Solution(z.to(z0.dtype), relative, absolute, count, relative < 1, relative[None], 2 * steps)
