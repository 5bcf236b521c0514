"""Derivatives of an equilibrium against dense algebra and long unrolling, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, hvp, jacobian
from torch.nn.utils import parametrize

from mdeq import Anderson, Broyden, FixedPoint, Gmres, Implicit, Phantom, Reversible
from mdeq.equilibrium import equilibrium, trajectory, unroll

TIGHT = Broyden(steps=80, tolerance=1e-14)
RULES = [
    Implicit(Broyden(steps=80, tolerance=1e-13)),
    Implicit(Anderson(steps=80, tolerance=1e-13, ridge=1e-14)),
    Implicit(Gmres(steps=20, tolerance=1e-13)),
]
EXACT = RULES[2]


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Contraction(nn.Module):
    """z -> tanh(W z + U x) with |W| = 0.6 in the spectral norm, so that |J| <= 0.6 everywhere."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        weight = torch.randn(dim, dim)
        self.w = nn.Parameter(0.6 * weight / torch.linalg.matrix_norm(weight, 2))
        self.u = nn.Parameter(torch.randn(dim, dim))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + x @ self.u.T)


@pytest.fixture
def problem():
    return Contraction(), torch.randn(3, 8), torch.zeros(3, 8), torch.randn(3, 8)


def closed(f, x):
    """f as a function that hides what it depends on."""
    return lambda z: f(z, x)


def gradients(f, x, z0, direction, rule, forward=TIGHT, hidden=False):
    x = x.clone().requires_grad_()
    if hidden:
        z, _ = equilibrium(closed(f, x), z0, forward, rule)
    else:
        z, _ = equilibrium(f, z0, forward, rule, inputs=(x,))
    return grad((z * direction).sum(), [x, f.w, f.u])


def dense(f, x, z0, direction):
    """dl/d. = u^T df/d. with (I - J)^T u = dl/dz, J formed sample by sample."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        z = TIGHT(closed(f, x), z0).value
    adjoint = []
    for z_i, x_i, b in zip(z, x, direction, strict=True):
        matrix = jacobian(closed(f, x_i), z_i)
        assert torch.linalg.matrix_norm(matrix, 2) < 0.61
        adjoint.append(torch.linalg.solve(torch.eye(len(matrix)) - matrix.T, b))
    return grad(f(z, x), [x, f.w, f.u], torch.stack(adjoint))


@pytest.mark.parametrize("hidden", [False, True], ids=["named", "hidden"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.solver.kind)
def test_implicit_gradient_is_the_dense_one(problem, rule, hidden):
    ours = gradients(*problem, rule, hidden=hidden)
    torch.testing.assert_close(ours, dense(*problem), rtol=1e-9, atol=1e-11)


def test_long_unrolling_and_many_phantom_steps_agree(problem):
    f, x, z0, direction = problem
    expected = dense(*problem)
    ours = gradients(*problem, Phantom(steps=120, damping=0.5))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    z = unroll(f, z0, 80, inputs=(x,))
    torch.testing.assert_close(grad((z * direction).sum(), f.w)[0], expected[1])


def test_one_phantom_step_is_jacobian_free(problem):
    f, x, z0, direction = problem
    with torch.no_grad():
        z = TIGHT(closed(f, x), z0).value
    expected = grad(f(z, x), f.w, direction)[0]
    torch.testing.assert_close(gradients(*problem, Phantom(1, 1.0))[1], expected)


def test_two_forwards_one_backward_and_a_second_backward(problem):
    f, x, z0, direction = problem
    first = gradients(*problem, EXACT)[1]
    other = gradients(f, 2 * x, z0, direction, EXACT)[1]
    a, _ = equilibrium(f, z0, TIGHT, EXACT, inputs=(x,))
    b, _ = equilibrium(f, z0, TIGHT, EXACT, inputs=(2 * x,))
    ((a + b) * direction).sum().backward(retain_graph=True)
    torch.testing.assert_close(f.w.grad, first + other)
    ((a + b) * direction).sum().backward()
    torch.testing.assert_close(f.w.grad, 2 * (first + other))


def test_statistics_of_the_adjoint_and_no_tape_without_grad(problem):
    f, x, z0, direction = problem
    seen, rule = [], Implicit(Broyden(steps=6, tolerance=0))
    z, _ = equilibrium(f, z0, TIGHT, rule, inputs=(x,), on_backward=seen.append)
    (z * direction).sum().backward()
    assert len(seen) == 1 and seen[0].nfe == len(seen[0].trace) == 6
    size = direction.norm(dim=1)
    torch.testing.assert_close(seen[0].relative, seen[0].absolute / size)
    torch.testing.assert_close(seen[0].trace.min(0).values, seen[0].relative)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z, solution = equilibrium(f, z0, TIGHT, rule, inputs=(x,))
        assert not z.requires_grad and torch.equal(z, solution.value)


def test_a_first_order_step_evaluates_f_once_on_the_tape(problem):
    """Once, at the equilibrium; the adjoint's products and the gradient of f all use that tape."""
    f, x, z0, direction = problem
    calls = []
    f.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    z, solution = equilibrium(f, z0, TIGHT, EXACT, inputs=(x,))
    (z * direction).sum().backward()
    assert sum(calls) == 1 and len(calls) == solution.nfe + 1


@pytest.mark.parametrize("upstream", [None, "x", "w"])
def test_no_adjoint_is_solved_if_nothing_upstream_needs_a_gradient(problem, upstream):
    f, x, z0, _ = problem
    f.requires_grad_(False)
    {"x": x, "w": f.w, None: torch.empty(0)}[upstream].requires_grad_()
    seen, head = [], nn.Linear(8, 1)
    z, _ = equilibrium(f, z0, TIGHT, EXACT, inputs=(x,), on_backward=seen.append)
    head(z).sum().backward()
    assert len(seen) == (upstream is not None) and head.weight.grad is not None


# --- Derivatives of higher order


def cosine(z, a):
    return a * z.cos()


@pytest.mark.parametrize("rule", [EXACT, Implicit(Broyden(40, 1e-15)), Phantom(200, 0.6)])
def test_four_derivatives_of_a_cosine(rule):
    """Of z = a cos z at a = 1/2; the figures come from implicit differentiation, 40 digits."""
    a = torch.tensor(0.5, requires_grad=True)
    z, _ = equilibrium(cosine, torch.zeros(1, 1), TIGHT, rule, inputs=(a,))
    derivative = z.sum()
    for expected in (0.7394815923, -0.7307350928, 0.2419687204, 3.8524593799):
        (derivative,) = grad(derivative, a, create_graph=True)
        torch.testing.assert_close(derivative.item(), expected, rtol=0, atol=5e-10)


def solve(x, w, u, rule=EXACT):
    f = lambda z, x, w, u: torch.tanh(z @ w.T + x @ u.T)  # noqa: E731
    return equilibrium(f, torch.zeros_like(x), TIGHT, rule, inputs=(x, w, u))[0]


def unrolled(x, w, u):
    z = torch.zeros_like(x)
    for _ in range(80):
        z = torch.tanh(z @ w.T + x @ u.T)
    return z


@pytest.fixture
def inputs():
    f = Contraction(3)
    x = torch.randn(2, 3, requires_grad=True)
    return x, f.w.detach().requires_grad_(), f.u.detach().requires_grad_()


def test_gradcheck_and_gradgradcheck(inputs):
    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs)


def test_hessian_and_its_products_are_those_of_a_long_unrolling(inputs):
    energy = lambda solve: lambda *inputs: solve(*inputs).pow(3).sum()  # noqa: E731
    ours, expected = (hessian(energy(s), inputs) for s in (solve, unrolled))
    for row, expected_row in zip(ours, expected, strict=True):
        torch.testing.assert_close(row, expected_row, rtol=1e-8, atol=1e-10)
    directions = tuple(torch.randn_like(t) for t in inputs)
    ours, expected = (hvp(energy(s), inputs, directions)[1] for s in (solve, unrolled))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_an_input_upstream_of_another_counts_once_per_way(inputs):
    """x appears in f and, through x^2, in another input of f."""
    x, w, _ = inputs
    f = lambda z, x, y: torch.tanh(z @ w.detach().T + x + y)  # noqa: E731

    def energy(x):
        return equilibrium(f, torch.zeros_like(x), TIGHT, EXACT, inputs=(x, x.square()))[0].sum()

    def reference(x):
        z = torch.zeros_like(x)
        for _ in range(80):
            z = f(z, x, x.square())
        return z.sum()

    torch.testing.assert_close(hessian(energy, x), hessian(reference, x), rtol=1e-8, atol=1e-10)


class WeightNorm(nn.Module):
    """g v / |v| of each row."""

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, torch.linalg.vector_norm(weight, dim=1, keepdim=True)


class Block(nn.Module):
    """A weight-normalised layer, one shared with the loss, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        parametrize.register_parametrization(self.layer, "weight", WeightNorm())
        with torch.no_grad():
            self.layer.parametrizations.weight.original1.mul_(0.4)
        self.shared = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(z) + self.shared(x) + self.shift)


def penalised_step(block: Block, z: Tensor, x: Tensor) -> Tensor:
    """A loss with |dz/dx|^2 in it; its gradient needs second derivatives."""
    (force,) = grad(z.sum(), x, create_graph=True)
    loss = block.shared(z).square().mean() + force.square().sum()
    block.zero_grad()
    loss.backward()
    torch.optim.SGD(block.parameters(), 0.05).step()
    return loss.detach()


def test_a_gradient_penalty_trains_as_unrolled():
    ours, reference = Block(), Block()
    reference.load_state_dict(ours.state_dict())
    z0 = torch.zeros(3, 4)
    for _ in range(5):
        x = torch.randn(3, 4, requires_grad=True)
        z, _ = equilibrium(ours, z0, TIGHT, EXACT, inputs=(x,))
        loss = penalised_step(ours, z, x)
        expected = penalised_step(reference, unroll(reference, z0, 80, inputs=(x,)), x)
        torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_second_derivative_that_cannot_be_had_is_an_error(problem):
    """The first derivatives are right, even on a tape; what would be wrong is to go on."""
    f, x, z0, direction = problem
    expected = dense(*problem)
    named = dict(inputs=(x.requires_grad_(),))
    cases = [
        ("does not name", closed(f, x), EXACT, {}),
        ("does not name", lambda z, x: f(z, x), EXACT, named),
        ("no second derivative", f, Reversible(60, 0.5), named),
    ]
    for message, map_, rule, options in cases:
        z, _ = equilibrium(map_, z0, TIGHT, rule, **options)
        ours = grad((z * direction).sum(), [x, f.w, f.u], create_graph=True)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
        for derivative in ours:
            for upstream in (x, f.w, f.u):
                with pytest.raises(RuntimeError, match=message):
                    grad(derivative.sum(), upstream, retain_graph=True)
        with pytest.raises(RuntimeError, match=message):
            ((z * direction).sum() + ours[0].square().sum()).backward()


def test_a_second_derivative_of_an_f_that_has_changed_is_an_error(problem):
    f, x, z0, _ = problem
    shift = torch.zeros(8)
    x.requires_grad_()
    z, _ = equilibrium(lambda z, x: z / 2 + x + shift, z0, TIGHT, EXACT, inputs=(x,))
    shift += 1
    with pytest.raises(RuntimeError, match="no longer gives the value"):
        grad(z.sum(), x, create_graph=True)


# --- States and what f may do


def pair(z, a):
    """Half of (p, q) turned by 1 radian, and an offset: on complex numbers, a product."""
    p, q = z["p"], z["q"]
    c, s = 0.5 * torch.tensor(1.0).cos(), 0.5 * torch.tensor(1.0).sin()
    return {"q": s * p + c * q, "p": c * p - s * q + a}


@pytest.mark.parametrize("rule", [EXACT, Phantom(150, 0.7), Reversible(80, 0.5)])
def test_a_dict_state_comes_back_in_kind(rule):
    a = torch.randn(2, 3, 2, requires_grad=True)
    z0 = {"p": torch.zeros(2, 3, 2), "q": torch.zeros(2, 3, 2)}
    z, solution = equilibrium(pair, z0, TIGHT, rule, inputs=(a,))
    turn = 0.5 * torch.exp(torch.tensor(1j))
    expected = a / (1 - turn)
    torch.testing.assert_close(z["p"] + 1j * z["q"], expected, rtol=1e-9, atol=1e-10)
    assert list(z) == ["p", "q"] and solution.value.shape == (2, 12)
    (ours,) = grad(z["q"].sum(), a)
    torch.testing.assert_close(ours, (1 / (1 - turn)).imag.expand_as(a), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [tuple, list])
def test_sequences_of_tensors_of_different_shapes(kind):
    z0 = kind([torch.zeros(2), torch.zeros(2, 3, 4)])
    f = lambda z: (z[0] / 2 + 1, z[1] / 4 + z[0][:, None, None])  # noqa: E731
    z, _ = equilibrium(f, z0, TIGHT, EXACT)
    assert type(z) is kind
    torch.testing.assert_close(z[0], torch.full((2,), 2.0))
    torch.testing.assert_close(z[1], torch.full((2, 3, 4), 8 / 3))


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:, :2], ValueError, "shape of z"),
        (lambda z: z[:1], ValueError, "shape of z"),
        (lambda z: z.float(), TypeError, "dtype of z"),
        (lambda z: (z,), TypeError, "Tensor like z"),
        (lambda z: None, TypeError, "Tensor like z"),
    ],
)
def test_an_f_that_returns_something_else_is_an_error(f, error, message):
    with pytest.raises(error, match=message):
        equilibrium(f, torch.zeros(2, 3), TIGHT, EXACT)


@pytest.mark.parametrize(
    ("z0", "error"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError),
        (torch.tensor(0.0), TypeError),
        ((), TypeError),
        (3.0, TypeError),
        ((torch.zeros(2), torch.zeros(3)), ValueError),
        ((torch.zeros(2), torch.zeros(2).half()), ValueError),
    ],
)
def test_what_is_no_state_is_an_error(z0, error):
    with pytest.raises(error, match="^z0: "):
        equilibrium(lambda z: z, z0, TIGHT, EXACT)


@pytest.mark.parametrize("rule", [EXACT, Phantom(60, 0.9), Reversible(99, 0.5)])
@pytest.mark.parametrize("forward", [TIGHT, Anderson(40, 1e-12), FixedPoint(80, 1e-12)])
def test_an_f_that_writes_into_its_input_is_harmless(forward, rule):
    a = torch.randn(2, 3, requires_grad=True)
    z0 = torch.ones(2, 3)
    z, _ = equilibrium(lambda z, a: z.mul_(0.5).add_(a), z0, forward, rule, inputs=(a,))
    torch.testing.assert_close(z, 2 * a, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grad(z.sum(), a)[0], torch.full_like(a, 2), rtol=1e-9, atol=1e-10)
    assert (z0 == 1).all()
    with torch.inference_mode():
        z, _ = equilibrium(lambda z, a: z.mul_(0.5).add_(a), z0, forward, rule, inputs=(a,))
        torch.testing.assert_close(z, 2 * a, rtol=1e-9, atol=1e-10)


def test_what_a_parametrization_computes_is_computed_once_per_solve_and_once_on_the_tape():
    block, calls = Block(), []
    normal = block.layer.parametrizations.weight[0]
    normal.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    z, _ = equilibrium(block, torch.zeros(3, 4), TIGHT, EXACT, inputs=(torch.randn(3, 4),))
    z.sum().backward()
    assert calls == [False, True]
    assert block.layer.parametrizations.weight.original1.grad.norm() > 0
    with parametrize.cached(), pytest.raises(RuntimeError, match="leave the context out"):
        equilibrium(block, torch.zeros(3, 4), TIGHT, EXACT, inputs=(torch.randn(3, 4),))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Phantom(0), "steps"),
        (lambda: Phantom(damping=0), "damping"),
        (lambda: Reversible(damping=1), "damping"),
        (lambda: Reversible(steps=0), "steps"),
        (lambda: Implicit(FixedPoint(0)), "steps"),
        (lambda: Implicit(Phantom()), "solver"),
        (lambda: unroll(torch.tanh, torch.zeros(1, 1), 0), "steps"),
        (lambda: trajectory(torch.tanh, torch.zeros(1, 1), TIGHT, EXACT, [-1]), "keep"),
        (lambda: trajectory(torch.tanh, torch.zeros(1, 1), TIGHT, Reversible(), [1]), "backward"),
    ],
)
def test_a_wrong_setting_is_an_error(make, key):
    with pytest.raises(ValueError, match=f"^{key}: must be"):
        make()


# --- Precision, compilation, iterates on the way


@pytest.mark.parametrize("forward", [Broyden(), Anderson(), FixedPoint()], ids=lambda s: s.kind)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_any_precision_trains(problem, dtype, forward):
    f, x, z0, direction = problem
    expected = dense(*problem)[1]
    f, x, z0, direction = f.to(dtype), x.to(dtype), z0.to(dtype), direction.to(dtype)
    for rule in (Implicit(forward), Implicit(Gmres(8)), Phantom(20, 0.8), Reversible(20, 0.5)):
        ours = gradients(f, x, z0, direction, rule, forward)[1]
        assert ours.dtype == dtype
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < 8 * max(torch.finfo(dtype).eps, 1e-3) / (1 - 0.6)


def test_autocast_costs_the_gradient_no_more_than_its_digits(problem):
    f, x, z0, direction = (v.float() for v in problem)
    rule = Implicit(Gmres(steps=8, tolerance=1e-6))
    full = gradients(f, x, z0, direction, rule, Broyden(steps=30, tolerance=1e-6))[1]
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        z, solution = equilibrium(
            f, z0, Broyden(30, 1e-2), rule, inputs=(x,), on_backward=seen.append
        )
    (ours,) = grad((z * direction).sum(), f.w)
    assert solution.converged.all()
    assert solution.value.dtype == seen[0].value.dtype == torch.float32
    error = (ours - full).norm() / full.norm()
    assert 1e-5 < error < 8 * 2**-8 / (1 - 0.6)  # a few roundings to 8 bits, times |(I - J)^-1|


@pytest.mark.parametrize("rule", [EXACT, Phantom(3, 0.5), Reversible(6, 0.5)])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(problem, rule):
    f, x, z0, direction = problem

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.f = nn.Linear(8, 8), f

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            z, solution = equilibrium(self.f, torch.zeros_like(x), TIGHT, rule, inputs=(x,))
            return (z * direction).sum() + unroll(self.f, z0, 2, inputs=(x,)).sum()

    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (x, 2 * x):
        expected = grad(model(batch), list(model.parameters()))
        ours = grad(compiled(batch), list(model.parameters()))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("forward", [Broyden(9, 0), Anderson(9, 0), FixedPoint(9, 0)])
def test_iterates_on_the_way_carry_the_rule_s_gradient(problem, forward):
    """One step of the Jacobian-free gradient at an iterate is f's own gradient there."""
    f, x, z0, direction = problem
    visited = []
    hook = f.register_forward_hook(lambda module, given, out: visited.append(given[0].clone()))
    rule = Phantom(1, 1.0)
    states, solution = trajectory(f, z0, forward, rule, (2, 5, 40), inputs=(x,))
    hook.remove()
    assert len(states) == 4 and solution.nfe == 10 and len(visited) == solution.nfe + len(states)
    points = [visited[2], visited[5], solution.value, solution.value]
    for state, point in zip(states, points, strict=True):
        value = f(point, x)
        torch.testing.assert_close(state, value, rtol=0, atol=0)
        expected = grad(value, f.w, direction)
        torch.testing.assert_close(grad(state, f.w, direction), expected, rtol=0, atol=0)
