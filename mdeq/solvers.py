"""Solvers of z = f(z) on a flat state (B, D), and GMRES for the linear adjoint.

`Broyden`, `Anderson` and `FixedPoint` find z = f(z); `Gmres` solves u = A u + b. All treat the
samples of a batch as separate problems: residual, stopping and best iterate are per sample, so what
a sample gets never depends on its neighbours. They compute in float32 or better, whatever the
precision of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from mdeq.checks import above, at_least, given, one_of, whole

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D), acting on each sample alone
Stop = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Solution:
    """Where a solver arrived, per sample. A solver never raises because f diverges: that is data.

    The relative residual is |f(z) - z| / |f(z)|, where an f(z) whose root mean square is below the
    precision of its numbers (1e-7 in float32) counts as that large: so a solution of 0 converges.

    Attributes:
        value: (B, D) each sample's iterate of smallest residual; z0 only where nothing else was
            finite or z0 solves.
        relative: (B,) the relative residual there.
        absolute: (B,) |f(z) - z| there.
        steps: (B,) updates made until that iterate.
        converged: (B,) whether the residual that stops fell to the tolerance.
        trace: (nfe, B) the residual that stops, one row per evaluation of f; a stopped sample
            repeats its last value.
        nfe: Calls of f; for a batch that was solved in parts, those of the longest.
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
        """The solution of a batch from those of its parts; shorter traces repeat their last row."""
        nfe = max(part.nfe for part in parts)
        return Solution(
            value=torch.cat([part.value for part in parts]),
            relative=torch.cat([part.relative for part in parts]),
            absolute=torch.cat([part.absolute for part in parts]),
            steps=torch.cat([part.steps for part in parts]),
            converged=torch.cat([part.converged for part in parts]),
            trace=torch.cat([part._trace_of(nfe) for part in parts], dim=1),
            nfe=nfe,
        )

    def _trace_of(self, rows: int) -> Tensor:
        last = self.trace[-1] if self.nfe else self.relative
        return torch.cat([self.trace, last.expand(rows - self.nfe, -1)])


class Solver(Protocol):
    """Finds z = f(z) from `z0` (B, D); `scale` (B,) replaces |f(z)| in the relative residual."""

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution: ...


@dataclass(frozen=True)
class Limits:
    """What all solvers share.

    Args:
        steps: The limit on updates; f is evaluated at most `steps + 1` times.
        tolerance: A sample whose residual is at most this stops.
        stop: Whether the tolerance is of the relative or of the absolute residual.
        check_every: Evaluations between two looks at whether every sample has stopped (a GPU waits
            at each).

    Raises:
        ValueError: A value is out of its range.
    """

    steps: int = 18
    tolerance: float = 1e-3
    stop: Stop = "relative"
    check_every: int = 1

    def __post_init__(self) -> None:
        given(**vars(self))
        whole(0, steps=self.steps)
        at_least(0, tolerance=self.tolerance)
        one_of(get_args(Stop), stop=self.stop)
        whole(1, check_every=self.check_every)


class _FixedPointSolver(Limits):
    """Calls `_solve` in the precision that solvers compute in."""

    def __call__(self, f: Map, z0: Tensor, scale: Tensor | None = None) -> Solution:
        """Find z = f(z) from `z0` (B, D); `scale` (B,) replaces |f(z)| in the relative residual."""
        return _in_wide_precision(lambda f, z: self._solve(f, z, scale), f, z0)

    def _solve(self, f: Map, z0: Tensor, scale: Tensor | None) -> Solution:
        raise NotImplementedError


def _in_wide_precision(solve: Callable[[Map, Tensor], Solution], f: Map, z: Tensor) -> Solution:
    narrow, wide = z.dtype, torch.promote_types(z.dtype, torch.float32)
    if narrow == wide:
        return solve(f, z)
    solution = solve(lambda z: f(z.to(narrow)).to(wide), z.to(wide))
    return replace(solution, value=solution.value.to(narrow))


@dataclass(frozen=True)
class Broyden(_FixedPointSolver):
    """Broyden's good method with an inverse Jacobian of f(z) - z that starts at -I.

    The solver of Sec. 3.2 and Appendix B.1. The inverse is a product of rank-one factors made of
    the steps alone (Kelley, Iterative Methods for Linear and Nonlinear Equations, 1995, Sec. 7.3),
    so the history is one (B, steps, D) tensor, read twice per update. Arguments: see `Limits`.
    """

    kind: Literal["broyden"] = "broyden"

    def _solve(self, f: Map, z0: Tensor, scale: Tensor | None) -> Solution:
        history = _StepHistory(z0, self.steps)
        track = _Track(z0, self, scale)
        z = z0
        for k in range(self.steps + 1):
            fz = f(z)
            g = fz - z
            track.record(g, fz)
            if k == self.steps or track.all_stopped():
                break
            step, usable = history.next_step(g, track.active)
            track.active &= usable
            z = z + step
        return track.solution(history.iterate(z0, track.best_step))


class _StepHistory:
    """The steps s_0, s_1, ... of Broyden's method, their Gram matrix, and the next step."""

    def __init__(self, z0: Tensor, limit: int) -> None:
        batch, dim = z0.shape
        self.steps = z0.new_empty(batch, limit, dim)
        self.gram = z0.new_zeros(batch, limit, limit)
        self.count = 0

    def next_step(self, g: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The step at a point of residual `g`, and which steps are finite; 0 where not active.

        With H_k = prod_j (I + s_{j+1} s_j^T / |s_j|^2) (-I), the vector u = -H_{k-1} g is
        g + sum_j a_j s_{j+1} where |s_j|^2 a_j = s_j^T g + sum_{i<j} a_i s_j^T s_{i+1}: a
        triangular system in known dots. The Sherman-Morrison formula then gives
        s_k = u / (1 - a_{k-1}).
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


class _Iteration(_FixedPointSolver):
    """The loop of the solvers that need no history to recover the best iterate: they copy it."""

    def _solve(self, f: Map, z0: Tensor, scale: Tensor | None) -> Solution:
        track = _Track(z0, self, scale)
        advance = self._advance(z0)
        z, best = z0, z0.clone()
        for k in range(self.steps + 1):
            fz = f(z)
            g = fz - z
            best = torch.where(track.record(g, fz)[:, None], z, best)
            if k == self.steps or track.all_stopped():
                break
            z = torch.where(track.active[:, None], advance(z, fz, g), z)
        return track.solution(best)

    def _advance(self, z0: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function from z, f(z) and f(z) - z to the next z."""
        raise NotImplementedError


@dataclass(frozen=True)
class Anderson(_Iteration):
    """Anderson acceleration: the affine combination of the last iterates of smallest residual.

    In the form of Walker and Ni (SIAM J. Numer. Anal. 49, 2011). Keeps two (B, memory, D) tensors.

    Args:
        memory: Iterates kept.
        ridge: Penalty on the weights, each scaled by the squared residual of its iterate, so that
            it has no unit.
        mixing: Weight of f in the new iterate, 1 - mixing that of the old iterates.
    """

    memory: int = 6
    ridge: float = 1e-4
    mixing: float = 1.0
    kind: Literal["anderson"] = "anderson"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(1, memory=self.memory)
        at_least(0, ridge=self.ridge)
        above(0, mixing=self.mixing)

    def _advance(self, z0: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return _AndersonHistory(z0, self)


class _AndersonHistory:
    """The last values f(z) and residuals f(z) - z, and the Gram matrix of the residuals."""

    def __init__(self, z0: Tensor, solver: Anderson) -> None:
        batch, dim = z0.shape
        memory = min(solver.memory, max(1, solver.steps))
        self.solver, self.memory, self.count = solver, memory, 0
        self.values = z0.new_empty(batch, memory, dim)
        self.residuals = z0.new_empty(batch, memory, dim)
        self.gram = z0.new_zeros(batch, memory, memory)

    def __call__(self, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        slot, kept = self.count % self.memory, min(self.count + 1, self.memory)
        self.count += 1
        self.values[:, slot], self.residuals[:, slot] = fz, g
        row = torch.bmm(g[:, None], self.residuals[:, :kept].transpose(1, 2))[:, 0]
        self.gram[:, slot, :kept], self.gram[:, :kept, slot] = row, row
        weights = self._weights(self.gram[:, :kept, :kept], slot)[:, None]
        mixed = torch.bmm(weights, self.values[:, :kept])[:, 0]
        if self.solver.mixing != 1:
            residual = torch.bmm(weights, self.residuals[:, :kept])[:, 0]
            mixed -= (1 - self.solver.mixing) * residual
        return mixed

    def _weights(self, gram: Tensor, newest: int) -> Tensor:
        """(B, m) weights of sum 1; the newest iterate alone where there is no finite solution."""
        square = gram.diagonal(dim1=1, dim2=2)
        system = gram + torch.diag_embed(self.solver.ridge * square)
        ones = torch.ones_like(square)
        weights, _ = torch.linalg.solve_ex(system, ones)
        weights = weights / weights.sum(1, keepdim=True)
        newest_alone = torch.zeros_like(square)
        newest_alone[:, newest] = 1
        return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, newest_alone)


@dataclass(frozen=True)
class FixedPoint(_Iteration):
    """Plain iteration z <- (1 - damping) z + damping f(z); with damping 1, Eq. 1 and Figure 5.

    Args:
        damping: Weight of f in the new iterate, above 0.
    """

    damping: float = 1.0
    kind: Literal["fixed_point"] = "fixed_point"

    def __post_init__(self) -> None:
        super().__post_init__()
        above(0, damping=self.damping)

    def _advance(self, z0: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda z, fz, g: torch.add(z, g, alpha=self.damping)


@dataclass(frozen=True)
class Gmres(Limits):
    """GMRES (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986) for u = A u + b: the adjoint.

    Minimises |b - (I - A) u| over the Krylov space, from u = 0: its residual never grows, and a
    sample whose space is exhausted without a solution keeps its best u. Keeps a (B, steps + 1, D)
    basis. `relative` and the trace are measured against |b|; `nfe` counts the products with A, of
    which there are at most `steps`.
    """

    steps: int = 20
    kind: Literal["gmres"] = "gmres"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(1, steps=self.steps)

    def __call__(self, product: Map, b: Tensor) -> Solution:
        """Solve u = A u + b for `b` (B, D), given the product v -> A v."""
        return _in_wide_precision(self._solve, product, b)

    def _solve(self, product: Map, b: Tensor) -> Solution:
        batch, dim = b.shape
        norm = torch.linalg.vector_norm(b, dim=1)
        track = _Track(b, self, scale=norm)
        track.start_at_zero(norm)
        basis = b.new_zeros(batch, self.steps + 1, dim)
        basis[:, 0] = _unit(b, norm, track.active)
        hessenberg = b.new_zeros(batch, self.steps + 1, self.steps)
        y = b.new_zeros(batch, self.steps)
        for k in range(self.steps):
            w = basis[:, k] - product(basis[:, k])
            known = basis[:, : k + 1]
            for _ in range(2):  # the second pass restores the orthogonality lost to rounding
                dots = torch.bmm(w[:, None], known.transpose(1, 2))
                w = torch.baddbmm(w[:, None], dots, known, alpha=-1)[:, 0]
                hessenberg[:, : k + 1, k] += dots[:, 0]
            length = torch.linalg.vector_norm(w, dim=1)
            hessenberg[:, k + 1, k] = length
            found, residual = _least_squares(hessenberg[:, : k + 2, : k + 1], norm)
            better = track.record_norm(residual, norm)
            y[:, : k + 1] = torch.where(better[:, None], found, y[:, : k + 1])
            track.active &= length > 0
            if track.all_stopped():
                break
            basis[:, k + 1] = _unit(w, length, track.active)
        count = len(track.rows)
        return track.solution(torch.bmm(y[:, None, :count], basis[:, :count])[:, 0])


def _unit(vector: Tensor, length: Tensor, active: Tensor) -> Tensor:
    """(B, D) of length 1, and 0 for the samples that are not active."""
    scale = torch.where(active, 1 / length, 0)
    return vector.masked_fill(~active[:, None], 0) * scale[:, None]


def _least_squares(hessenberg: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_y |norm e_1 - H y| for each (k + 1, k) H, and that minimum, (B,).

    The minimum is NaN where H is numerically singular: rounding spoils the huge y it would give.
    """
    q, r = torch.linalg.qr(hessenberg)
    y = torch.linalg.solve_triangular(r, (norm[:, None] * q[:, 0])[:, :, None], upper=True)[:, :, 0]
    residual = -torch.bmm(hessenberg, y[:, :, None])[:, :, 0]
    residual[:, 0] += norm
    smallest, largest = r.diagonal(dim1=1, dim2=2).abs().aminmax(dim=1)
    singular = smallest <= 10 * torch.finfo(r.dtype).eps * largest
    return y, torch.linalg.vector_norm(residual, dim=1).masked_fill(singular, torch.nan)


class _Track:
    """Residual, stopping and best iterate of each sample.

    The start is the best iterate only until another is finite.
    """

    def __init__(self, z0: Tensor, limits: Limits, scale: Tensor | None) -> None:
        batch, dim = z0.shape
        precision = torch.finfo(z0.dtype)
        self.limits, self.scale = limits, scale
        self.floor = precision.eps * dim**0.5 if scale is None else precision.tiny
        self.active = torch.ones(batch, dtype=torch.bool, device=z0.device)
        self.converged = torch.zeros_like(self.active)
        self.best = z0.new_full((batch,), torch.inf)
        self.best_absolute, self.best_relative = self.best.clone(), self.best.clone()
        self.best_step = torch.zeros(batch, dtype=torch.int64, device=z0.device)
        self.first_step = 0
        self.rows: list[Tensor] = []

    def start_at_zero(self, norm: Tensor) -> None:
        """Of a linear system u = A u + b: its start u = 0 has the residual |b| = `norm`."""
        self.first_step = 1
        self.converged = norm == 0
        self.active = (norm > 0) & torch.isfinite(norm)
        self.best_absolute = norm.clone()
        self.best_relative = torch.where(self.converged, 0, norm / norm)

    def record(self, g: Tensor, fz: Tensor) -> Tensor:
        """Takes in the residual `g` and value `fz` of the next iterate; where it is best, (B,)."""
        scale = torch.linalg.vector_norm(fz, dim=1) if self.scale is None else self.scale
        better = self.record_norm(torch.linalg.vector_norm(g, dim=1), scale)
        if len(self.rows) == 1:
            self.best.fill_(torch.inf)
        return better

    def record_norm(self, absolute: Tensor, scale: Tensor) -> Tensor:
        """As `record`, from the norms of residual and scale."""
        relative = absolute / scale.clamp(min=self.floor)
        measure = relative if self.limits.stop == "relative" else absolute
        self.active &= torch.isfinite(measure)
        better = self.active & (measure < self.best)
        self.best = torch.where(better, measure, self.best)
        self.best_absolute = torch.where(better, absolute, self.best_absolute)
        self.best_relative = torch.where(better, relative, self.best_relative)
        self.best_step = torch.where(better, self.first_step + len(self.rows), self.best_step)
        last = self.rows[-1] if self.rows else torch.full_like(measure, torch.inf)
        self.rows.append(torch.where(self.active, measure, last))
        reached = self.active & (measure <= self.limits.tolerance)
        self.converged |= reached
        self.active &= ~reached
        return better

    def all_stopped(self) -> bool:
        return len(self.rows) % self.limits.check_every == 0 and not bool(self.active.any())

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
