"""Solvers against problems whose solution is known, in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mdeq import Anderson, Broyden, FixedPoint, Gmres

SOLVERS = [
    Broyden(steps=60, tolerance=1e-12),
    Anderson(steps=60, tolerance=1e-12, ridge=1e-14),
    FixedPoint(steps=400, tolerance=1e-12),
    FixedPoint(steps=800, tolerance=1e-12, damping=0.5),
]


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Affine:
    """f(z) = A z + b per sample, with |A| = 0.7 (spectral); its root comes from a dense solve."""

    def __init__(self, batch: int, dim: int) -> None:
        a = torch.randn(batch, dim, dim)
        self.a = 0.7 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
        self.b = torch.randn(batch, dim)
        self.root = torch.linalg.solve(torch.eye(dim) - self.a, self.b)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.bmm(self.a, z[:, :, None])[:, :, 0] + self.b


def tanh_map(batch: int, dim: int):
    weight = torch.randn(dim, dim)
    weight = 0.8 * weight / torch.linalg.matrix_norm(weight, 2)
    bias = torch.randn(batch, dim)
    return lambda z: torch.tanh(z @ weight.T + bias[: len(z)])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.kind)
def test_finds_the_root_of_a_dense_solve(solver):
    f = Affine(3, 12)
    solution = solver(f, torch.zeros(3, 12))
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, f.root, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.kind)
def test_reports_what_it_did(solver):
    f, calls = tanh_map(4, 10), []
    z0 = torch.zeros(4, 10)
    solution = solver(lambda z: calls.append(z) or f(z), z0)
    assert solution.nfe == len(calls) == len(solution.trace)
    gap = (f(solution.value) - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.absolute, gap, rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(
        solution.relative, gap / f(solution.value).norm(dim=1), rtol=1e-3, atol=1e-13
    )
    for i, step in enumerate(solution.steps.tolist()):
        torch.testing.assert_close(solution.value[i], calls[step][i], rtol=0, atol=1e-12)


def test_never_more_than_steps_plus_one_evaluations_and_absolute_stopping():
    f = tanh_map(2, 6)
    for kind in (Broyden, Anderson, FixedPoint):
        assert kind(steps=5, tolerance=0)(f, torch.zeros(2, 6)).nfe == 6
    solution = Broyden(steps=50, tolerance=1e-3, stop="absolute")(f, torch.zeros(2, 6))
    assert (solution.absolute <= 1e-3).all() and (solution.trace[:-1] > 1e-3).any(dim=1).all()


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), FixedPoint()], ids=lambda s: s.kind)
def test_a_sample_never_feels_its_batch(solver):
    """Alone, together, and beside a sample that diverges and one that turns to NaN."""
    f = tanh_map(1, 8)
    starts = torch.randn(3, 8)

    def wild(z: Tensor) -> Tensor:
        value = f(z)
        value[3] = z[3].square() + z[3] + 1  # no fixed point: runs away to inf
        # no fixed point, non-finite after a step
        value[4] = torch.where(z[4].abs().max() > 1.5, torch.nan, z[4] + 1)
        return value

    alone = [solver(f, z[None]) for z in starts]
    together = solver(f, starts)
    beside = solver(wild, torch.cat([starts, torch.ones(1, 8), torch.zeros(1, 8)]))
    for i in range(3):
        for batch in (together, beside):
            torch.testing.assert_close(batch.value[i], alone[i].value[0], rtol=0, atol=1e-11)
            assert (
                batch.steps[i] == alone[i].steps[0] and batch.converged[i] == alone[i].converged[0]
            )
            last = batch.trace[-1, i]
            torch.testing.assert_close(last, alone[i].trace[-1, 0], rtol=0, atol=1e-11)
    assert torch.isfinite(beside.value).all() and not beside.converged[3:].any()


def test_the_start_is_returned_only_if_it_solves_or_nothing_else_is_finite():
    """Of z -> 2z + 1 every iterate is worse than the last; the published solvers skip the first."""
    solver = FixedPoint(steps=3, tolerance=1e-9, stop="absolute")
    solution = solver(lambda z: 2 * z + 1, torch.tensor([[0.0], [-1.0]]))
    assert solution.steps.tolist() == [1, 0] and solution.value.tolist() == [[1.0], [-1.0]]
    assert solution.converged.tolist() == [False, True]


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), FixedPoint()], ids=lambda s: s.kind)
def test_nothing_finite_returns_the_start(solver):
    z0 = torch.randn(2, 5)
    solution = solver(lambda z: z * torch.nan, z0)
    torch.testing.assert_close(solution.value, z0)
    assert not solution.converged.any() and not torch.isfinite(solution.trace).any()


STEPS = 6
SHORT = [kind(steps=STEPS, tolerance=0) for kind in (Broyden, Anderson, FixedPoint)]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", range(STEPS + 1))
@pytest.mark.parametrize("solver", SHORT, ids=lambda s: s.kind)
def test_non_finite_at_any_step_ends_that_sample_at_its_best(solver, at, poison):
    """One sample's f is poisoned in evaluation `at` alone: it must not come back either."""
    f = tanh_map(3, 8)
    visited: list[Tensor] = []

    def poisoned(z: Tensor) -> Tensor:
        value = f(z)
        if len(visited) == at:
            value[1, 3] = poison
        visited.append(z.clone())
        return value

    z0 = torch.randn(3, 8)
    clean, solution = solver(f, z0), solver(poisoned, z0)
    assert solution.nfe == len(visited) == STEPS + 1
    candidates = (
        range(1, at) if at > 1 else [0]
    )  # the start counts only where nothing else is finite
    best = min(candidates, key=lambda k: float(clean.trace[k, 1]))
    assert solution.steps[1] == best and not solution.converged[1]
    torch.testing.assert_close(solution.value[1], visited[best][1], rtol=0, atol=1e-12)
    assert bool(torch.isfinite(solution.trace[at:, 1]).any()) == (at > 0)
    for i in (0, 2):
        torch.testing.assert_close(solution.value[i], clean.value[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(solution.trace[:, i], clean.trace[:, i], rtol=0, atol=1e-12)
        assert solution.steps[i] == clean.steps[i]


@pytest.mark.parametrize("at", range(STEPS))
def test_gmres_survives_a_non_finite_product(at):
    """The poisoned sample keeps what its products so far give; its neighbours do not notice."""
    f, calls = Affine(3, 9), Counter()

    def product(v: Tensor) -> Tensor:
        value = torch.bmm(f.a, v[:, :, None])[:, :, 0]
        if calls["now"] == at and calls["poison"]:
            value[1] = torch.nan
        calls["now"] += 1
        return value

    clean = Gmres(steps=STEPS, tolerance=0)(product, f.b)
    short = Gmres(steps=at, tolerance=0)(product, f.b).value if at else torch.zeros(3, 9)
    calls.update(now=-calls["now"], poison=1)
    solution = Gmres(steps=STEPS, tolerance=0)(product, f.b)
    assert solution.nfe == calls["now"] and not solution.converged[1]
    torch.testing.assert_close(solution.value[1], short[1], rtol=0, atol=1e-12)
    for i in (0, 2):
        torch.testing.assert_close(solution.value[i], clean.value[i], rtol=0, atol=1e-12)


class Synchronisations(TorchDispatchMode):
    """Counts what the host waits for: values that it reads, shapes that depend on values."""

    names = "_local_scalar_dense is_nonzero equal nonzero masked_select unique _linalg_check_errors"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.names.split()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("kind", [Broyden, Anderson, FixedPoint, Gmres])
def test_the_host_waits_at_most_once_every_so_many_evaluations(kind, every):
    f = Affine(2, 9)
    solver = kind(steps=8, tolerance=0, check_every=every)
    with Synchronisations() as seen:
        if isinstance(solver, Gmres):
            solution = solver(lambda v: torch.bmm(f.a, v[:, :, None])[:, :, 0], f.b)
        else:
            solution = solver(f, torch.zeros(2, 9))
    assert seen.count == 8 // every and solution.nfe == (8 if kind is Gmres else 9)


def test_broyden_is_the_published_algorithm():
    """The (U, V) form with Sherman-Morrison updates, for one sample: the same iterates."""
    f = tanh_map(1, 20)
    visited: list[Tensor] = []
    Broyden(steps=15, tolerance=0)(lambda z: visited.append(z[0]) or f(z), torch.zeros(1, 20))

    z = torch.zeros(20)
    inverse = -torch.eye(20)
    g = f(z[None])[0] - z
    for seen in visited[1:]:
        step = -inverse @ g
        z = z + step
        torch.testing.assert_close(seen, z, rtol=0, atol=1e-10)
        new = f(z[None])[0] - z
        change = inverse @ (new - g)
        inverse = inverse + torch.outer(step - change, step @ inverse) / (step @ change)
        g = new


def test_anderson_survives_a_singular_system():
    """A map onto one point: from the second evaluation on every residual kept is zero or a copy."""
    point = torch.randn(1, 7)
    solution = Anderson(steps=10, tolerance=0, ridge=0)(
        lambda z: point.expand_as(z), torch.zeros(2, 7)
    )
    torch.testing.assert_close(solution.value, point.expand(2, 7))


def test_gmres_solves_the_adjoint_and_never_gets_worse():
    f = Affine(4, 9)
    product = lambda v: torch.bmm(f.a, v[:, :, None])[:, :, 0]  # noqa: E731
    f.b[2] = 0
    solution = Gmres(steps=9, tolerance=0)(product, f.b)
    expected = torch.linalg.solve(torch.eye(9) - f.a, f.b)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-10)
    assert (solution.trace[1:] <= solution.trace[:-1] * (1 + 1e-6) + 1e-12).all()
    assert solution.relative[2] == 0 and solution.converged[2]
    short = Gmres(steps=4, tolerance=0)(product, f.b)
    gap = (product(short.value) + f.b - short.value).norm(dim=1)
    torch.testing.assert_close(short.absolute, gap, rtol=1e-8, atol=1e-12)
    assert short.steps.tolist() == [4, 4, 0, 4]


def test_gmres_reports_the_true_residual_where_its_space_is_exhausted():
    """I - A is singular: no part, half and a nilpotent part of b can be reached."""
    matrices = torch.stack(
        [
            torch.eye(4),  # I - A = 0
            torch.diag(torch.tensor([0.0, 1, 1, 1])),
            torch.eye(4) - torch.diag(torch.ones(3), 1),
        ]
    )
    b = torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 1], [1, 1, 1, 1]])
    product = lambda v: torch.bmm(matrices, v[:, :, None])[:, :, 0]  # noqa: E731
    solution = Gmres(steps=4, tolerance=1e-12)(product, b)
    gap = (product(solution.value) + b - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.absolute, gap, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solution.relative, gap / b.norm(dim=1), rtol=1e-9, atol=1e-12)
    least = torch.tensor([30**0.5, 3**0.5, 1.0])  # what of b lies outside the range of I - A
    torch.testing.assert_close(solution.absolute, least)
    assert not solution.converged.any() and solution.steps[0] == 0


def test_anderson_with_one_iterate_is_damped_iteration():
    f, z0 = tanh_map(2, 6), torch.randn(2, 6)
    mixed = Anderson(steps=5, tolerance=0, memory=1, mixing=0.3)(f, z0)
    damped = FixedPoint(steps=5, tolerance=0, damping=0.3)(f, z0)
    torch.testing.assert_close(mixed.value, damped.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_andersons_second_step_by_hand(unit):
    """Of f(z) = z / 2 + unit on a line: with residuals g and h the weights are, up to their sum,
    h^2 (1 + ridge) - g h and g^2 (1 + ridge) - g h, whatever the unit."""
    ridge, mixing, f = 0.1, 0.25, lambda z: z / 2 + unit
    z0, g = 0.0, unit
    z1 = z0 + mixing * g
    h = f(z1) - z1
    w0, w1 = h * h * (1 + ridge) - g * h, g * g * (1 + ridge) - g * h
    w0, w1 = w0 / (w0 + w1), w1 / (w0 + w1)
    z2 = mixing * (w0 * f(z0) + w1 * f(z1)) + (1 - mixing) * (w0 * z0 + w1 * z1)
    solver = Anderson(steps=2, tolerance=0, ridge=ridge, mixing=mixing)
    visited = []
    solver(lambda z: visited.append(z.item()) or f(z), torch.zeros(1, 1))
    torch.testing.assert_close(
        torch.tensor(visited), torch.tensor([z0, z1, z2]), rtol=1e-10, atol=0
    )


def test_anderson_takes_the_newest_iterate_where_no_weights_exist():
    """A translation: equal residuals, a singular system; each step must be one translation more."""
    visited: list[float] = []
    solver = Anderson(steps=5, tolerance=0, memory=3, ridge=0)
    solver(lambda z: visited.append(z.item()) or z + 2, torch.zeros(1, 1))
    assert visited == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "solver", [Broyden(60), Anderson(60), FixedPoint(60)], ids=lambda s: s.kind
)
def test_an_equilibrium_at_zero_converges(solver):
    """Of f(z) = z / 2 each residual is as large as f(z): relative to it, it never falls."""
    solution = solver(lambda z: z / 2, torch.ones(1, 4, dtype=torch.float32))
    assert solution.converged.all() and solution.value.abs().max() < 1e-9
    solution = solver(lambda z: 0 * z, torch.ones(1, 4))
    assert solution.converged.all() and not solution.value.any() and not solution.relative.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [*SHORT, Gmres(steps=STEPS)], ids=lambda s: s.kind)
def test_half_precision_costs_no_more_than_its_digits(solver, dtype):
    f, half = Affine(2, 8), Affine(2, 8)
    half.a, half.b = f.a.to(dtype), f.b.to(dtype)

    def solve(f):
        if isinstance(solver, Gmres):
            return solver(lambda v: f(v) - f.b, f.b)
        return solver(f, torch.zeros_like(f.b))

    solution = solve(half)
    assert solution.value.dtype == dtype and solution.relative.dtype == torch.float32
    error = (solution.value.double() - f.root).norm(dim=1)
    allowed = 2 * (solve(f).value - f.root).norm(dim=1)  # as the solver would in float64
    rounding = 8 * torch.finfo(dtype).eps * f.root.norm(dim=1) / (1 - 0.7)
    assert (error < allowed + rounding).all()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Broyden(stop="rel"), "stop"),
        (lambda: Broyden(steps=-1), "steps"),
        (lambda: Broyden(steps=True), "steps"),
        (lambda: Broyden(steps=None), "steps"),
        (lambda: Anderson(memory=0), "memory"),
        (lambda: Anderson(ridge=-1e-4), "ridge"),
        (lambda: Anderson(mixing=0), "mixing"),
        (lambda: FixedPoint(damping=0), "damping"),
        (lambda: FixedPoint(tolerance=float("nan")), "tolerance"),
        (lambda: Gmres(0), "steps"),
        (lambda: Gmres(check_every=0), "check_every"),
    ],
)
def test_a_wrong_setting_is_an_error_when_it_is_made(make, key):
    with pytest.raises(ValueError, match=f"^{key}: must be"):
        make()
