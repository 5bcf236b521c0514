"""Gradients through an equilibrium against the dense (I - J)^-1, long unrolling, and each other, in float64."""

import copy

import pytest
import torch
from torch import nn

from mdeq import (
    Anderson,
    Broyden,
    ClassificationHeadConfig,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
    Phantom,
    Reversible,
)
from mdeq.equilibrium import equilibrium, unroll

TIGHT = Broyden(steps=80, tolerance=1e-13)
RULES = [
    Implicit(Broyden(steps=80, tolerance=1e-13)),
    Implicit(Anderson(steps=80, tolerance=1e-13, ridge=1e-14)),
    Implicit(Gmres(steps=20, tolerance=1e-13)),
]


class Contraction(nn.Module):
    """z -> tanh(W z + U x) with |W| = 0.6 in the spectral norm, so that |J| <= 0.6 everywhere."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=torch.float64)
        self.w = nn.Parameter(0.6 * weight / torch.linalg.matrix_norm(weight, 2))
        self.u = nn.Parameter(torch.randn(dim, dim, dtype=torch.float64))

    def bind(self, x):
        return lambda z: torch.tanh(z @ self.w.T + x @ self.u.T)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model, x = Contraction(), torch.randn(3, 8, dtype=torch.float64)
    return model, x, torch.zeros_like(x), torch.randn(3, 8, dtype=torch.float64)


def gradients(model, x, z0, direction, rule, forward=TIGHT):
    model.zero_grad()
    x = x.clone().requires_grad_()
    z, _ = equilibrium(model.bind(x), z0, forward, rule)
    (z * direction).sum().backward()
    return [x.grad, model.w.grad.clone(), model.u.grad.clone()]


def dense(model, x, z0, direction):
    """dl/d. = u^T df/d. with (I - J)^T u = dl/dz, J formed sample by sample."""
    x = x.clone().requires_grad_()
    f = model.bind(x)
    with torch.no_grad():
        z = TIGHT(f, z0).value
    adjoint = []
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda zi, i=i: model.bind(x[i : i + 1])(zi), z[i : i + 1])
        matrix = jacobian[0, :, 0]
        assert torch.linalg.matrix_norm(matrix, 2) < 0.61
        adjoint.append(torch.linalg.solve(torch.eye(len(matrix), dtype=torch.float64) - matrix.T, direction[i]))
    return torch.autograd.grad(f(z), [x, model.w, model.u], torch.stack(adjoint))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.solver.kind)
def test_implicit_gradient_is_the_dense_one(problem, rule):
    for ours, expected in zip(gradients(*problem, rule), dense(*problem), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_long_unrolling_and_many_phantom_steps_agree(problem):
    model, x, z0, direction = problem
    expected = dense(*problem)
    for ours, e in zip(gradients(*problem, Phantom(steps=120, damping=0.5)), expected, strict=True):
        torch.testing.assert_close(ours, e, rtol=1e-8, atol=1e-10)
    model.zero_grad()
    (unroll(model.bind(x), z0, 80) * direction).sum().backward()
    torch.testing.assert_close(model.w.grad, expected[1], rtol=1e-9, atol=1e-11)


def test_one_phantom_step_is_jacobian_free(problem):
    model, x, z0, direction = problem
    with torch.no_grad():
        z = TIGHT(model.bind(x), z0).value
    expected = torch.autograd.grad(model.bind(x)(z), model.w, direction)[0]
    torch.testing.assert_close(gradients(*problem, Phantom(1, 1.0))[1], expected, rtol=1e-10, atol=1e-12)


def test_gradcheck(problem):
    model, x, z0, _ = problem

    def solve(x, w):
        return equilibrium(lambda z: torch.tanh(z @ w.T + x), z0, TIGHT, RULES[2])[0]

    assert torch.autograd.gradcheck(solve, (x.requires_grad_(), model.w))


def test_two_forwards_one_backward_and_a_second_backward(problem):
    model, x, z0, direction = problem
    rule = RULES[0]
    first = gradients(*problem, rule)[1]
    other = gradients(model, 2 * x, z0, direction, rule)[1]
    model.zero_grad()
    a, _ = equilibrium(model.bind(x), z0, TIGHT, rule)
    b, _ = equilibrium(model.bind(2 * x), z0, TIGHT, rule)
    ((a + b) * direction).sum().backward(retain_graph=True)
    torch.testing.assert_close(model.w.grad, first + other)
    ((a + b) * direction).sum().backward()
    torch.testing.assert_close(model.w.grad, 2 * (first + other))


def test_statistics_of_the_adjoint_and_no_graph_without_grad(problem):
    model, x, z0, direction = problem
    seen = []
    z, _ = equilibrium(model.bind(x), z0, TIGHT, Implicit(Broyden(steps=6, tolerance=0)), seen.append)
    (z * direction).sum().backward()
    assert len(seen) == 1 and seen[0].nfe == len(seen[0].trace) == 6
    with torch.no_grad():
        z, solution = equilibrium(model.bind(x), z0, TIGHT, RULES[0])
    assert not z.requires_grad and z is solution.value


def small_network(forward=None, backward=None, **settings):
    torch.manual_seed(0)
    config = MDEQConfig(channels=settings.pop("channels", (8, 8)), expansion=2, groups=4, **settings)
    head = ClassificationHeadConfig(tuple(4 for _ in config.channels), 16)
    return Network(config, head, 5, forward or Broyden(steps=6), backward or Implicit(Gmres(steps=5)))


@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 8, 16)])
@pytest.mark.parametrize("size", [(33, 33), (24, 40)])
def test_any_size_any_number_of_scales(channels, size):
    network = small_network(channels=channels)
    prediction = network(torch.randn(2, 3, *size))
    prediction.logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.backbone.parameters())
    assert prediction.equilibrium.scales[0].shape == (2, 8, *size)


def test_evaluation_mode_with_gradients_autocast_and_deep_copies():
    network = small_network().eval()
    image = torch.randn(2, 3, 16, 16)
    logits = network(image).logits
    logits.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(network(image).logits, logits)  # the head reads z* either way
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(network))
    torch.testing.assert_close(averaged(image).logits, logits)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image)
    half.logits.float().sum().backward()
    assert half.equilibrium.solution.value.dtype == torch.float32


def test_dropout_mask_is_fixed_during_a_solve_and_drawn_anew_each_time():
    network = small_network(dropout=0.5).train()
    image = torch.randn(2, 3, 16, 16)
    f, z0, _ = network.backbone.fixed_point_problem(image)
    z = torch.randn_like(z0)
    torch.testing.assert_close(f(z), f(z), rtol=0, atol=0)
    other, _, _ = network.backbone.fixed_point_problem(image)
    assert (other(z) - f(z)).norm() > 1e-3
    network.eval()
    torch.testing.assert_close(network(image).logits, network(image).logits, rtol=0, atol=0)


def test_conventional_dropout_draws_a_mask_at_every_evaluation():
    image = torch.randn(2, 3, 16, 16)
    f, z0, _ = small_network(dropout=0.5, variational=False).train().backbone.fixed_point_problem(image)
    z = torch.randn_like(z0)
    assert (f(z) - f(z)).norm() > 1e-3


def test_an_unrolled_model_is_the_warm_ups_network_always():
    image = torch.randn(2, 3, 16, 16)
    unrolled = small_network(unrolled=3).eval()(image)
    assert unrolled.equilibrium.solution is None
    torch.testing.assert_close(unrolled.logits, small_network().eval()(image, unroll_steps=3).logits)


def test_softplus_of_great_curvature_is_the_relu():
    network = small_network().double().eval()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    relu = network(image, unroll_steps=3).logits
    torch.testing.assert_close(network(image, unroll_steps=3, softplus=1e7).logits, relu, rtol=1e-4, atol=1e-5)
    assert (network(image, unroll_steps=3, softplus=1.0).logits - relu).abs().max() > 1e-5


class Rows:
    """The f of a `Contraction` that can be had for some samples alone."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __call__(self, z):
        return self.model.bind(self.x)(z)

    def rows(self, rows):
        return self.model.bind(self.x[rows])


@pytest.mark.parametrize("rule", [*RULES, Phantom(5, 0.5), Reversible(6, 0.4)])
def test_a_batch_solved_in_parts_is_the_batch(problem, rule):
    model, x, z0, direction = problem
    results, adjoints = [], []
    for at_once in (None, 2):
        model.zero_grad()
        z, solution = equilibrium(Rows(model, x), z0, TIGHT, rule, adjoints.append, at_once)
        (z * direction).sum().backward()
        results.append(
            [z, solution.value, solution.relative, solution.steps, model.w.grad.clone(), model.u.grad.clone()]
        )
        assert solution.trace.shape == (solution.nfe, len(x))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    if adjoints:
        torch.testing.assert_close(adjoints[1].value, adjoints[0].value, rtol=1e-9, atol=1e-9)


def test_parts_need_an_f_that_has_rows(problem):
    model, x, z0, _ = problem
    with pytest.raises(TypeError, match="at_once"):
        equilibrium(model.bind(x), z0, TIGHT, RULES[0], at_once=1)
