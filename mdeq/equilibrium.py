"""Solve z = f(z) without a tape, and differentiate the solution (Sec. 3.1, Eq. 3 and 4).

The forward pass costs the memory of one evaluation of f however many the solver makes: only the
last one, at the equilibrium, is on the tape. Its vector-Jacobian products then serve the adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from mdeq.checks import above, between, given, instance, whole
from mdeq.maps import FlatMap, State, depends_beyond, flat_problem, refused, vjp
from mdeq.reversible import reversible
from mdeq.solvers import Anderson, Broyden, FixedPoint, Gmres, Map, Solution, Solver

OnBackward = Callable[[Solution], None]


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, whose import of the compiler takes as long as that of torch."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Implicit:
    """The implicit gradient: solves the adjoint u = J^T u + dl/dz* (Eq. 4), to every order.

    Whatever the solver, its relative residual is measured against |dl/dz*|.

    Args:
        solver: Of the adjoint; the paper's is Broyden's method, `Gmres` is made for linear systems.
    """

    solver: Broyden | Anderson | FixedPoint | Gmres = Gmres(steps=20)
    kind: Literal["implicit"] = "implicit"

    def __post_init__(self) -> None:
        given(solver=self.solver)
        instance((Broyden, Anderson, FixedPoint, Gmres), solver=self.solver)
        whole(1, steps=self.solver.steps)


@dataclass(frozen=True)
class Phantom:
    """The phantom gradient (Geng et al., NeurIPS 2021): through damped applications of f at z*.

    One step with damping 1 is the Jacobian-free gradient (Fung et al., AAAI 2022).

    Args:
        steps: Applications, all on the tape.
        damping: Weight of f in each, above 0.
    """

    steps: int = 5
    damping: float = 0.5
    kind: Literal["phantom"] = "phantom"

    def __post_init__(self) -> None:
        given(steps=self.steps, damping=self.damping)
        whole(1, steps=self.steps)
        above(0, damping=self.damping)


@dataclass(frozen=True)
class Reversible:
    """The exact gradient of the steps really taken, by `reversible`; once differentiable.

    Where gradients are enabled these steps replace the forward solver.

    Args:
        steps: Each evaluates f twice.
        damping: Strictly between 0 and 1: the way back divides by both.
    """

    steps: int = 8
    damping: float = 0.5
    kind: Literal["reversible"] = "reversible"

    def __post_init__(self) -> None:
        given(steps=self.steps, damping=self.damping)
        whole(1, steps=self.steps)
        between(0, 1, open_low=True, open_high=True, damping=self.damping)


Gradient = Implicit | Phantom | Reversible


@never_compiled
def equilibrium(
    f: Callable[..., State],
    z0: State,
    forward: Solver,
    backward: Gradient,
    *,
    inputs: Sequence[Tensor] = (),
    on_backward: OnBackward | None = None,
) -> tuple[State, Solution]:
    """The equilibrium z* = f(z*, *inputs) from `z0`, differentiable in all that f depends on.

    First derivatives through `Implicit` and `Phantom` reach whatever f depends on. Derivatives of
    higher order through `Implicit`, and all through `Reversible`, need f to name what it depends
    on: its `inputs`, and the parameters if it is a module. Asking for one that f hides is an error.

    Args:
        f: A function or module of z and `inputs` that returns the like of z. It acts on each sample
            alone. The solver calls it under no_grad and `parametrize.cached()`, so that what a
            parametrization computes is computed once; then once (or `Phantom.steps` times) on tape.
        z0: The start: a tensor (B, ...), or a tuple, list or dict of some, floating and of one
            dtype. No gradient flows to it.
        forward: Solves z = f(z).
        backward: How the solution is differentiated.
        inputs: What f takes after z.
        on_backward: Called with the adjoint's solution in each backward pass through `Implicit`,
            with the reconstruction of the start in each through `Reversible`.

    Returns:
        Where gradients are enabled f(z*) (damped and repeated for `Phantom`), else z*, of the kind
        of `z0`; and the forward solution, flat (B, D).

    Raises:
        TypeError: `z0` is no state, an input no tensor, or f returns another kind or dtype.
        RuntimeError: Called within `parametrize.cached()` while gradients are enabled.
        ValueError: The tensors of `z0` do not fit each other, or f returns another shape.
    """
    flat, start = flat_problem(f, z0, inputs)
    if isinstance(backward, Reversible) and torch.is_grad_enabled():
        value, solution = reversible(flat, start, backward.steps, backward.damping, on_backward)
    else:
        solution = _solve(flat, start, forward)
        value = _differentiable(flat, solution.value, backward, on_backward)
    return flat.layout.restore(value), solution


@never_compiled
def trajectory(
    f: Callable[..., State],
    z0: State,
    forward: Solver,
    backward: Implicit | Phantom,
    keep: Sequence[int],
    *,
    inputs: Sequence[Tensor] = (),
    on_backward: OnBackward | None = None,
) -> tuple[list[State], Solution]:
    """`equilibrium`, and before it the iterates `keep`, each differentiable: for correction losses.

    Iterate k is where the solver evaluates f after k updates; a sample that stopped earlier repeats
    its last iterate. Each state returned costs what `backward` costs at an equilibrium: one
    evaluation of f on the tape (`Phantom.steps`), beside the `nfe` of the solver.

    Returns:
        One state per number in `keep`, then the equilibrium; and the forward solution.

    Raises:
        ValueError: A number in `keep` is negative, or `backward` is `Reversible`.
    """
    for step in keep:
        whole(0, keep=step)
    instance((Implicit, Phantom), backward=backward)
    flat, start = flat_problem(f, z0, inputs)
    recorder = _Recorder(flat, keep)
    solution = _solve(recorder, start, forward)
    states = [recorder.states.get(step, solution.value) for step in keep]
    values = [_differentiable(flat, z, backward, on_backward) for z in (*states, solution.value)]
    return [flat.layout.restore(value) for value in values], solution


def unroll(
    f: Callable[..., State], z0: State, steps: int, *, inputs: Sequence[Tensor] = ()
) -> State:
    """f applied `steps` times to `z0`, all on the tape: the weight-tied network of Eq. 1."""
    whole(1, steps=steps)
    flat, start = flat_problem(f, z0, inputs)
    return flat.layout.restore(_damped(flat, start, steps, damping=1))


class _Recorder:
    """f that keeps the points of some of its evaluations."""

    def __init__(self, f: Map, keep: Sequence[int]) -> None:
        self.f, self.keep, self.count = f, keep, 0
        self.states: dict[int, Tensor] = {}

    def __call__(self, z: Tensor) -> Tensor:
        if self.count in self.keep:
            self.states[self.count] = z.clone()
        self.count += 1
        return self.f(z)


def _solve(f: Map, z0: Tensor, solver: Solver) -> Solution:
    if torch.is_grad_enabled() and parametrize._cache_enabled:
        raise RuntimeError(
            "equilibrium within parametrize.cached(): weights computed without a tape would be "
            "used on the tape. A solve caches by itself: leave the context out"
        )
    autocast = torch.autocast(z0.device.type, enabled=False)
    with torch.no_grad(), autocast, parametrize.cached():
        return solver(f, z0.detach())


def _damped(f: Map, z: Tensor, steps: int, damping: float) -> Tensor:
    for _ in range(steps):
        z = f(z) if damping == 1 else torch.lerp(z, f(z), damping)
    return z


def _differentiable(
    f: FlatMap, z: Tensor, rule: Gradient, on_backward: OnBackward | None
) -> Tensor:
    """The value at z that carries the rule's gradient; no adjoint is solved if none needs one."""
    if not torch.is_grad_enabled():
        return z
    if isinstance(rule, Phantom):
        return _damped(f, z, rule.steps, rule.damping)
    assert isinstance(rule, Implicit)  # `reversible` has its own way
    leaf = z.detach().requires_grad_()
    fz = f(leaf)
    if not depends_beyond(fz, [leaf]):
        return fz.detach()
    return _apply(f.at, fz, leaf, rule.solver, on_backward, f.inputs)


def _apply(
    f: Callable[..., Tensor],
    fz: Tensor,
    z: Tensor,
    solver: Solver | Gmres,
    on_backward: OnBackward | None,
    inputs: Sequence[Tensor],
) -> Tensor:
    return _Equilibrium.apply(f, fz, z, solver, on_backward, *inputs)  # type: ignore[return-value]


class _Equilibrium(torch.autograd.Function):
    """Identity on f(z) at an equilibrium z of f(., *inputs), with the derivatives of z(inputs).

    The backward pass solves the adjoint u through the tape of f(z). Without `create_graph` it then
    sends u down that tape. With it, the tape is of no use, as z there is a constant: instead f is
    evaluated again at the differentiable equilibrium, the adjoint becomes the equilibrium of an
    affine map of its own, and the inputs get their gradients directly. These are taken at aliases
    of the inputs, since the inputs themselves are upstream of the equilibrium, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        f: Callable[..., Tensor],
        fz: Tensor,
        z: Tensor,
        solver: Solver | Gmres,
        on_backward: OnBackward | None,
        *inputs: Tensor,
    ) -> Tensor:
        value = fz.view_as(fz)
        ctx.save_for_backward(fz, z, value, *inputs)
        ctx.f, ctx.solver, ctx.on_backward = f, solver, on_backward
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        fz, z, value, *inputs = ctx.saved_tensors
        product = partial(vjp, fz, z, retain_graph=True)  # u -> J^T u
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            solution = solve_adjoint(product, gradients[0], ctx.solver)
        if ctx.on_backward is not None:
            ctx.on_backward(solution)
        u = solution.value
        direct: Sequence[Tensor | None] = [None] * len(inputs)
        if torch.is_grad_enabled():
            u, direct = _connected(ctx, u, gradients[0], fz, z, value, inputs)
        return None, u, None, None, None, *direct


def _connected(
    ctx: Any, u: Tensor, g: Tensor, fz: Tensor, z: Tensor, value: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """What the backward pass sends to f(z) and to the inputs, itself differentiable."""
    z_star = value + (z - value).detach()
    aliases = [tensor.view_as(tensor) for tensor in inputs]
    again = ctx.f(z_star, *aliases)
    _require_same(again, fz)
    if depends_beyond(again, [z_star, *aliases]):
        return refused(HIDDEN, u, fz, g), [None] * len(inputs)
    affine = partial(_affine, ctx.f)
    leaf = u.detach().requires_grad_()
    u = _apply(
        affine, affine(leaf, z_star, g, *inputs), leaf, ctx.solver, None, (z_star, g, *inputs)
    )
    wanted = [alias for alias in aliases if alias.requires_grad]
    found = iter(torch.autograd.grad(again, wanted, u, create_graph=True, allow_unused=True))
    return None, [next(found) if alias.requires_grad else None for alias in aliases]


def _affine(f: Callable[..., Tensor], u: Tensor, z: Tensor, g: Tensor, *inputs: Tensor) -> Tensor:
    """J(z, inputs)^T u + g, on the tape."""
    with torch.enable_grad():
        point = z.view_as(z)
        return vjp(f(point, *inputs), point, u, create_graph=True) + g


HIDDEN = (
    "second derivative of an equilibrium: f depends on tensors that it does not name. Make f a "
    "module, or pass them: equilibrium(f, z0, ..., inputs=(a, b)) with f(z, a, b)"
)


def _require_same(again: Tensor, fz: Tensor) -> None:
    rounding = torch.finfo(fz.dtype).eps ** 0.5
    room = rounding * float(fz.detach().abs().max())
    if not torch.allclose(again, fz, rtol=rounding, atol=room, equal_nan=True):
        raise RuntimeError(
            "second derivative of an equilibrium: f no longer gives the value of the forward pass; "
            "it is random, or what it depends on was changed"
        )


def solve_adjoint(product: Map, b: Tensor, solver: Solver | Gmres) -> Solution:
    """u = J^T u + b (Eq. 4), from the product u -> J^T u.

    `nfe` counts the products; the first residual, at u = 0, is b.
    """
    if isinstance(solver, Gmres):
        return solver(product, b)
    precision = torch.promote_types(b.dtype, torch.float32)
    scale = torch.linalg.vector_norm(b, dim=1, dtype=precision)
    solution = solver(_AdjointMap(product, b), torch.zeros_like(b), scale)
    return replace(solution, nfe=solution.nfe - 1, trace=solution.trace[1:])


class _AdjointMap:
    """u -> J^T u + b, whose first call, at u = 0, needs no product."""

    def __init__(self, product: Map, b: Tensor) -> None:
        self.product, self.b, self.started = product, b, False

    def __call__(self, u: Tensor) -> Tensor:
        if not self.started:
            self.started = True
            return self.b
        return self.product(u) + self.b
