"""Broyden's method in the (U, V) form that the authors' code uses, written for comparison alone.

The inverse Jacobian is -I + U V^T; every update reads both factors for the step, for V^T, and for the new U. One
residual over the whole batch, relative to |f(z)|, decides which iterate is returned. No line search, no stopping rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdeq.solvers import Map, Solution


@dataclass(frozen=True)
class PublishedBroyden:
    """`steps` updates from z0; returns the iterate of smallest residual norm over the batch, never z0."""

    steps: int

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution:
        batch, dim = z0.shape
        u = z0.new_zeros(batch, dim, self.steps)
        v = z0.new_zeros(batch, self.steps, dim)
        z = z0
        fz = f(z)
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
            row = -step + torch.einsum("bd,bdk,bkj->bj", step, u[:, :, :k], v[:, :k]) if k else -step
            moved = -change + self._times(u, v, change, k)
            v[:, k] = torch.nan_to_num(row)
            u[:, :, k] = torch.nan_to_num((step - moved) / torch.einsum("bd,bd->b", row, change)[:, None])
            step = g - self._times(u, v, g, k + 1)
        rows = torch.stack(absolute) / (torch.stack(norm) if scale is None else scale)
        count = torch.full((batch,), best_step, device=z0.device)
        return Solution(
            best,
            rows[best_step],
            absolute[best_step],
            count,
            torch.zeros_like(count, dtype=torch.bool),
            rows,
            len(rows),
        )

    @staticmethod
    def _times(u: Tensor, v: Tensor, x: Tensor, k: int) -> Tensor:
        """U V^T x, with the products laid out as the authors have them."""
        if k == 0:
            return torch.zeros_like(x)
        inner = torch.einsum("bkd,bd->bk", v[:, :k], x)
        return torch.einsum("bdk,bk->bd", u[:, :, :k], inner)
