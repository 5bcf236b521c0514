"""Broyden's method in the (U, V) form of the authors' code, written for comparison alone.

The inverse Jacobian is -I + U V^T. Each update reads both factors three times: for the step, for
the new column of V, and for that of U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdeq import Broyden, Solution
from mdeq.solvers import Map


@dataclass(frozen=True)
class PublishedBroyden(Broyden):
    """Makes `steps` updates, without line search or stopping rule.

    Returns the iterate of smallest residual norm, relative and over the whole batch; never z0.
    """

    def _solve(self, f: Map, z0: Tensor, scale: Tensor | None) -> Solution:
        batch, dim = z0.shape
        u = z0.new_zeros(batch, dim, self.steps)
        v = z0.new_zeros(batch, self.steps, dim)
        z, fz = z0, f(z0)
        g = step = fz - z
        best, smallest, best_step = z, torch.inf, 0
        absolute, norm = [g.norm(dim=1)], [fz.norm(dim=1)]
        for k in range(self.steps):
            z = z + step
            fz = f(z)
            new = fz - z
            change, g = new - g, new
            absolute.append(g.norm(dim=1))
            norm.append(fz.norm(dim=1))
            residual = float(g.norm() / fz.norm())
            if residual < smallest:
                best, smallest, best_step = z.clone(), residual, k + 1
            row = -step
            if k:
                row = row + torch.einsum("bd,bdk,bkj->bj", step, u[:, :, :k], v[:, :k])
            moved = _times(u, v, change, k) - change
            v[:, k] = torch.nan_to_num(row)
            projection = torch.einsum("bd,bd->b", row, change)[:, None]
            u[:, :, k] = torch.nan_to_num((step - moved) / projection)
            step = g - _times(u, v, g, k + 1)
        trace = torch.stack(absolute) / (torch.stack(norm) if scale is None else scale)
        return Solution(
            value=best,
            relative=trace[best_step],
            absolute=absolute[best_step],
            steps=torch.full((batch,), best_step),
            converged=torch.zeros(batch, dtype=torch.bool),
            trace=trace,
            nfe=len(trace),
        )


def _times(u: Tensor, v: Tensor, x: Tensor, k: int) -> Tensor:
    """U V^T x of the first k columns, with the products laid out as the authors have them."""
    if k == 0:
        return torch.zeros_like(x)
    inner = torch.einsum("bkd,bd->bk", v[:, :k], x)
    return torch.einsum("bdk,bk->bd", u[:, :, :k], inner)
