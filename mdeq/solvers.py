"""Solvers of z = f(z) on a flat state (B, D): `Broyden`, `Anderson`, `FixedPoint`; `Gmres` for the linear adjoint.

All four treat the samples of a batch as separate problems: residual, stopping and best iterate are per sample, so what
a sample gets never depends on its neighbours. A solver of `steps` updates evaluates f at most `steps + 1` times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D), acting on each sample alone
Stop = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Solution:
    """Where a solver arrived, per sample. Failure is data: a solver never raises because f misbehaves.

    Attributes:
        value: (B, D) each sample's iterate of smallest residual; z0 only where nothing else was finite or z0 solves.
        relative: (B,) |f(z) - z| / |f(z)| there.
        absolute: (B,) |f(z) - z| there.
        steps: (B,) updates made until that iterate.
        converged: (B,) whether the residual that stops fell to the tolerance.
        trace: (nfe, B) the residual that stops, a row an evaluation of f; a stopped sample repeats its last value.
        nfe: calls of f; for a batch that was solved in parts those of the longest.
    """

    value: Tensor
    relative: Tensor
    absolute: Tensor
    steps: Tensor
    converged: Tensor
    trace: Tensor
    nfe: int

    @staticmethod
    def joined(parts: Sequence[Solution]) -> Solution:
        """The solution of a batch from those of its parts; the traces of those that stopped early go on level."""
        nfe = max(part.nfe for part in parts)
        last = [p.trace[-1] if p.nfe else p.relative for p in parts]
        traces = [torch.cat([p.trace, row.expand(nfe - p.nfe, -1)]) for p, row in zip(parts, last, strict=True)]
        return Solution(
            value=torch.cat([p.value for p in parts]),
            relative=torch.cat([p.relative for p in parts]),
            absolute=torch.cat([p.absolute for p in parts]),
            steps=torch.cat([p.steps for p in parts]),
            converged=torch.cat([p.converged for p in parts]),
            trace=torch.cat(traces, dim=1),
            nfe=nfe,
        )


class Solver(Protocol):
    """Finds z = f(z) from `z0` (B, D); `scale` (B,) replaces |f(z)| as the measure of the relative residual."""

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution: ...


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method with the inverse Jacobian of g(z) = f(z) - z starting at -I (Sec. 3.2, Appendix B.1).

    That inverse is a product of rank-one factors made of the steps alone (Kelley, Iterative Methods for Linear and
    Nonlinear Equations, 1995, Sec. 7.3), so the history is one (B, steps, D) tensor, read twice an update.

    Args:
        steps: The limit T on updates.
        tolerance: A sample whose residual is at most this stops.
        stop: Whether the tolerance speaks of the relative or the absolute residual.
        check_every: Evaluations between two looks at whether every sample has stopped (a GPU waits at each).
    """

    steps: int = 18
    tolerance: float = 1e-3
    stop: Stop = "relative"
    check_every: int = 1
    kind: Literal["broyden"] = "broyden"

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution:
        history = _StepHistory(z0, self.steps)
        track = _Track(z0, self.tolerance, self.stop, scale)
        z = z0
        for k in range(self.steps + 1):
            fz = f(z)
            g = fz - z
            track.record(g, fz)
            if k == self.steps or track.all_stopped(k, self.check_every):
                break
            step, usable = history.next_step(g, track.active)
            track.active &= usable
            z = z + step
        return track.solution(history.iterate(z0, track.best_step))


class _StepHistory:
    """The steps s_0, s_1, ... of Broyden's method, their Gram matrix, and the next step from a residual."""

    def __init__(self, z0: Tensor, limit: int) -> None:
        batch, dim = z0.shape
        self.steps = z0.new_empty(batch, limit, dim)
        self.gram = z0.new_zeros(batch, limit, limit)
        self.count = 0

    def next_step(self, g: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The step at a point of residual `g`, zero for samples that are not active; and which steps are finite.

        With H_k = prod_j (I + s_{j+1} s_j^T / |s_j|^2) (-I), the vector u = -H_{k-1} g is g + sum_j a_j s_{j+1} where
        |s_j|^2 a_j = s_j^T g + sum_{i<j} a_i s_j^T s_{i+1}: a triangular system in known dots. The Sherman-Morrison
        formula then gives s_k = u / (1 - a_{k-1}).
        """
        k = self.count
        step, row = self.steps[:, k], None
        if k == 0:
            step.copy_(g)
        else:
            past, gram = self.steps[:, :k], self.gram[:, :k, :k]
            dots = torch.bmm(g[:, None], past.transpose(1, 2))[:, 0]  # (B, k), s_j^T g
            lower = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
            lower[:, :, : k - 1] -= gram[:, :, 1:].tril(-1)
            a = torch.linalg.solve_triangular(lower, dots[:, :, None], upper=False)[:, :, 0]
            inner, denominator = a[:, None, : k - 1], 1 - a[:, k - 1 :]
            torch.div(torch.baddbmm(g[:, None], inner, past[:, 1:])[:, 0], denominator, out=step)
            row = (dots + torch.bmm(inner, gram[:, 1:])[:, 0]) / denominator  # (B, k), s_j^T s_k
        square = torch.linalg.vector_norm(step, dim=1).square()
        usable = torch.isfinite(square)
        keep = usable & active
        step.masked_fill_(~keep[:, None], 0)
        self.gram[:, k, k] = torch.where(keep & (square > 0), square, 1)
        if row is not None:
            row = row.masked_fill(~keep[:, None], 0)
            self.gram[:, k, :k] = row
            self.gram[:, :k, k] = row
        self.count += 1
        return step, usable

    def iterate(self, z0: Tensor, step: Tensor) -> Tensor:
        """z0 plus each sample's first `step` (B,) steps."""
        if self.count == 0:
            return z0.clone()
        index = torch.arange(self.count, device=z0.device)
        chosen = (index < step[:, None]).to(z0.dtype)
        return torch.baddbmm(z0[:, None], chosen[:, None], self.steps[:, : self.count])[:, 0]


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: the affine combination of the last `memory` iterates of smallest predicted residual.

    In the form of Walker and Ni (SIAM J. Numer. Anal. 49, 2011). Keeps two (B, memory, D) tensors.

    Args:
        steps: The limit on updates.
        tolerance: A sample whose residual is at most this stops.
        stop: Whether the tolerance speaks of the relative or the absolute residual.
        memory: Iterates kept.
        ridge: Penalty on the weights, each scaled by the squared residual of its iterate, so that it has no unit.
        mixing: Weight of f in the new iterate, 1 - mixing that of the old iterates.
        check_every: Evaluations between two looks at whether every sample has stopped.
    """

    steps: int = 18
    tolerance: float = 1e-3
    stop: Stop = "relative"
    memory: int = 6
    ridge: float = 1e-4
    mixing: float = 1.0
    check_every: int = 1
    kind: Literal["anderson"] = "anderson"

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution:
        batch, dim = z0.shape
        values = z0.new_empty(batch, self.memory, dim)
        residuals = z0.new_empty(batch, self.memory, dim)
        gram = z0.new_zeros(batch, self.memory, self.memory)

        def advance(k: int, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
            slot, kept = k % self.memory, min(k + 1, self.memory)
            values[:, slot], residuals[:, slot] = fz, g
            row = torch.bmm(g[:, None], residuals[:, :kept].transpose(1, 2))[:, 0]
            gram[:, slot, :kept], gram[:, :kept, slot] = row, row
            weights = self._weights(gram[:, :kept, :kept], slot)[:, None]
            mixed = torch.bmm(weights, values[:, :kept])[:, 0]
            if self.mixing != 1:
                mixed -= (1 - self.mixing) * torch.bmm(weights, residuals[:, :kept])[:, 0]
            return mixed

        return _iterate(self, f, z0, scale, advance)

    def _weights(self, gram: Tensor, newest: int) -> Tensor:
        """(B, m) weights of sum 1; the newest iterate alone where the system has no finite solution."""
        square = gram.diagonal(dim1=1, dim2=2)
        system = gram + torch.diag_embed(self.ridge * square)
        ones = torch.ones_like(square)
        weights, _ = torch.linalg.solve_ex(system, ones)
        weights = weights / weights.sum(1, keepdim=True)
        newest_alone = torch.zeros_like(square)
        newest_alone[:, newest] = 1
        return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, newest_alone)


@dataclass(frozen=True)
class FixedPoint:
    """Plain iteration z <- (1 - damping) z + damping f(z), with damping 1 Eq. 1: the paper's comparison in Figure 5.

    Args:
        steps: The limit on updates.
        tolerance: A sample whose residual is at most this stops.
        stop: Whether the tolerance speaks of the relative or the absolute residual.
        damping: Weight of f in the new iterate.
        check_every: Evaluations between two looks at whether every sample has stopped.
    """

    steps: int = 18
    tolerance: float = 1e-3
    stop: Stop = "relative"
    damping: float = 1.0
    check_every: int = 1
    kind: Literal["fixed_point"] = "fixed_point"

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution:
        return _iterate(self, f, z0, scale, lambda k, z, fz, g: torch.add(z, g, alpha=self.damping))


def _iterate(
    solver: Anderson | FixedPoint,
    f: Map,
    z0: Tensor,
    scale: Tensor | None,
    advance: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Solution:
    """The loop of the solvers that go from (k, z, f(z), f(z) - z) to the next z, keeping a copy of the best."""
    track = _Track(z0, solver.tolerance, solver.stop, scale)
    z, best = z0, z0.clone()
    for k in range(solver.steps + 1):
        fz = f(z)
        g = fz - z
        best = torch.where(track.record(g, fz)[:, None], z, best)
        if k == solver.steps or track.all_stopped(k, solver.check_every):
            break
        z = torch.where(track.active[:, None], advance(k, z, fz, g), z)
    return track.solution(best)


@dataclass(frozen=True)
class Gmres:
    """GMRES (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986) for the adjoint u = A u + b (Eq. 4 transposed).

    Minimises |b - (I - A) u| over the Krylov space, from u = 0: its residual never grows. Called with the product
    v -> A v, (B, D) -> (B, D), and b (B, D); keeps a (B, steps + 1, D) basis. `relative` and the trace are measured
    against |b|; `nfe` counts the products.

    Args:
        steps: The limit on products with A.
        tolerance: A sample whose residual is at most this stops.
        stop: Whether the tolerance speaks of the residual relative to |b| or of the absolute one.
        check_every: Products between two looks at whether every sample has stopped.
    """

    steps: int = 20
    tolerance: float = 1e-3
    stop: Stop = "relative"
    check_every: int = 1
    kind: Literal["gmres"] = "gmres"

    def __call__(self, product: Map, b: Tensor) -> Solution:
        batch, dim = b.shape
        norm = torch.linalg.vector_norm(b, dim=1)
        track = _Track(b, self.tolerance, self.stop, scale=norm)
        track.active = (norm > 0) & torch.isfinite(norm)
        track.converged |= norm == 0
        track.best_absolute.masked_fill_(norm == 0, 0)
        track.best_relative.masked_fill_(norm == 0, 0)
        basis = b.new_zeros(batch, self.steps + 1, dim)
        basis[:, 0] = torch.where(track.active, 1 / norm, 0)[:, None] * torch.where(track.active[:, None], b, 0)
        hessenberg = b.new_zeros(batch, self.steps + 1, self.steps)
        y = b.new_zeros(batch, self.steps)
        for k in range(self.steps):
            newest = basis[:, k]
            w = newest - product(newest)
            known = basis[:, : k + 1]
            for _ in range(2):  # the second pass restores the orthogonality that the first loses to rounding
                dots = torch.bmm(w[:, None], known.transpose(1, 2))
                w = torch.baddbmm(w[:, None], dots, known, alpha=-1)[:, 0]
                hessenberg[:, : k + 1, k] += dots[:, 0]
            length = torch.linalg.vector_norm(w, dim=1)
            hessenberg[:, k + 1, k] = length
            found, residual = _least_squares(hessenberg[:, : k + 2, : k + 1], norm)
            better = track.record_norm(residual, norm)
            y[:, : k + 1] = torch.where(better[:, None], found, y[:, : k + 1])
            track.active &= length > 0
            if track.all_stopped(k, self.check_every):
                break
            scale = torch.where(track.active, 1 / length, 0)
            basis[:, k + 1] = torch.where(track.active[:, None], w, 0) * scale[:, None]
        count = len(track.rows)
        return track.solution(torch.bmm(y[:, None, :count], basis[:, :count])[:, 0])


def _least_squares(hessenberg: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_y |norm e_1 - H y| for each (k + 1, k) H, and that minimum, (B,)."""
    q, r = torch.linalg.qr(hessenberg)
    y = torch.linalg.solve_triangular(r, (norm[:, None] * q[:, 0])[:, :, None], upper=True)[:, :, 0]
    residual = -torch.bmm(hessenberg, y[:, :, None])[:, :, 0]
    residual[:, 0] += norm
    return y, torch.linalg.vector_norm(residual, dim=1)


class _Track:
    """Residual, stopping and best iterate of each sample. The start is the best only until another is finite."""

    def __init__(self, z0: Tensor, tolerance: float, stop: Stop, scale: Tensor | None) -> None:
        batch = z0.shape[0]
        self.tolerance, self.stop, self.scale = tolerance, stop, scale
        self.tiny = torch.finfo(z0.dtype).tiny
        self.active = torch.ones(batch, dtype=torch.bool, device=z0.device)
        self.converged = torch.zeros_like(self.active)
        self.best = z0.new_full((batch,), torch.inf)
        self.best_absolute, self.best_relative = self.best.clone(), self.best.clone()
        self.best_step = torch.zeros(batch, dtype=torch.int64, device=z0.device)
        self.rows: list[Tensor] = []

    def record(self, g: Tensor, fz: Tensor) -> Tensor:
        """Takes in the residual `g` and value `fz` of the next iterate; returns where it is the best so far, (B,)."""
        scale = torch.linalg.vector_norm(fz, dim=1) if self.scale is None else self.scale
        step = len(self.rows)
        better = self.record_norm(torch.linalg.vector_norm(g, dim=1), scale)
        self.best_step = torch.where(better, step, self.best_step)
        if step == 0:
            self.best.fill_(torch.inf)
        return better

    def record_norm(self, absolute: Tensor, scale: Tensor) -> Tensor:
        """As `record`, from the norms of residual and scale."""
        relative = absolute / scale.clamp(min=self.tiny)
        measure = relative if self.stop == "relative" else absolute
        self.active &= torch.isfinite(measure)
        better = self.active & (measure < self.best)
        self.best = torch.where(better, measure, self.best)
        self.best_absolute = torch.where(better, absolute, self.best_absolute)
        self.best_relative = torch.where(better, relative, self.best_relative)
        last = self.rows[-1] if self.rows else torch.full_like(measure, torch.inf)
        self.rows.append(torch.where(self.active, measure, last))
        reached = self.active & (measure <= self.tolerance)
        self.converged |= reached
        self.active &= ~reached
        return better

    def all_stopped(self, k: int, check_every: int) -> bool:
        return (k + 1) % check_every == 0 and not bool(self.active.any())

    def solution(self, value: Tensor) -> Solution:
        return Solution(
            value=value,
            relative=self.best_relative,
            absolute=self.best_absolute,
            steps=self.best_step,
            converged=self.converged,
            trace=torch.stack(self.rows),
            nfe=len(self.rows),
        )
