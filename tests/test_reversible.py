"""The reversible iteration: the gradient of its steps, kept without them."""

from __future__ import annotations

import pytest
import torch

from mdeq import FixedPoint, Reversible
from mdeq.equilibrium import equilibrium


def f(z, w, x, b):
    return torch.tanh(torch.cat([z @ w, z[:, :1]], 1)[:, :-1] + x + b)


def tensors(dtype, dim=6):
    torch.manual_seed(0)
    w = (torch.randn(dim, dim, dtype=dtype) / 4).requires_grad_()
    x = torch.randn(3, dim, dtype=dtype, requires_grad=True)
    b = torch.randn(dim, dtype=dtype, requires_grad=True)
    return w, x, b


def solve(f, z0, steps, damping, inputs=(), on_backward=None):
    rule = Reversible(steps, damping)
    return equilibrium(f, z0, FixedPoint(), rule, inputs=inputs, on_backward=on_backward)


def test_the_gradient_is_that_of_the_steps_taken():
    inputs = tensors(torch.float64)
    z0, steps, damping = torch.zeros(3, 6, dtype=torch.float64), 7, 0.5
    y = z = z0
    for _ in range(steps):
        y = (1 - damping) * y + damping * f(z, *inputs)
        z = (1 - damping) * z + damping * f(y, *inputs)
    direction = torch.randn_like(z)
    expected = torch.autograd.grad((z * direction).sum(), inputs)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return f(*arguments)

    ours, solution = solve(counted, z0, steps, damping, inputs)
    torch.testing.assert_close(ours, z)
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert solution.nfe == 2 * steps == len(solution.trace)
    assert len(calls) == 4 * steps  # there and back
    fy = f(y, *inputs)
    torch.testing.assert_close(solution.relative, (fy - y).norm(dim=1) / fy.norm(dim=1))


def test_an_input_that_comes_from_another_counts_once():
    w, x, b = tensors(torch.float64)
    z0 = torch.zeros(3, 6, dtype=torch.float64)
    injection = x @ w
    z, _ = solve(f, z0, 5, 0.5, (w, injection, b))
    y = expected = z0
    for _ in range(5):
        y = torch.lerp(y, f(expected, w, injection, b), 0.5)
        expected = torch.lerp(expected, f(y, w, injection, b), 0.5)
    ours = torch.autograd.grad(z.sum(), [w, x], retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), [w, x]))


def test_the_way_back_ends_at_the_start_with_f_in_single_precision():
    errors, inputs = [], tensors(torch.float32)
    z, _ = solve(f, torch.zeros(3, 6), 9, 0.5, inputs, errors.append)
    torch.autograd.grad(z.sum(), inputs)
    assert (
        errors[0].relative.max() < 1e-8
    )  # 18 halvings of float64 rounding, 2^18 x 1e-16, and room


def test_a_dependency_that_is_not_named_is_refused():
    w, hidden = torch.ones(6, requires_grad=True), torch.ones(6, requires_grad=True)
    z0, calls = torch.zeros(3, 6), []
    with pytest.raises(RuntimeError, match="does not name"):
        solve(lambda z, w: torch.tanh(z * w + hidden), z0, 2, 0.5, (w,))

    def later(z, w):
        calls.append(1)
        return torch.tanh(z * w + hidden) if len(calls) > 1 else torch.tanh(z * w)

    z, _ = solve(later, z0, 2, 0.5, (w,))
    with pytest.raises(RuntimeError, match="does not name"):
        z.sum().backward()
    z, _ = solve(torch.tanh, z0, 2, 0.5)
    assert not z.requires_grad
