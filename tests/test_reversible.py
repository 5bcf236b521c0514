"""The reversible iteration: the gradient of its steps, kept without them."""

import pytest
import torch

from mdeq.reversible import reversible


def bound(dtype, dim=6):
    torch.manual_seed(0)
    w = (torch.randn(dim, dim, dtype=dtype) / 4).requires_grad_()
    x = torch.randn(3, dim, dtype=dtype, requires_grad=True)
    b = torch.randn(dim, dtype=dtype, requires_grad=True)
    return (lambda z: torch.tanh(torch.cat([z @ w, z[:, :1]], 1)[:, :-1] + x + b)), (w, x, b)


def test_the_gradient_is_that_of_the_steps_taken():
    f, tensors = bound(torch.float64)
    z0, steps, damping = torch.zeros(3, 6, dtype=torch.float64), 7, 0.5
    y = z = z0
    for _ in range(steps):
        y = (1 - damping) * y + damping * f(z)
        z = (1 - damping) * z + damping * f(y)
    direction = torch.randn_like(z)
    expected = torch.autograd.grad((z * direction).sum(), tensors)
    calls = []
    ours, solution = reversible(lambda z: calls.append(1) or f(z), z0, steps, damping)
    torch.testing.assert_close(ours, z)
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), tensors), expected, rtol=1e-10, atol=1e-12)
    assert solution.nfe == 2 * steps == len(solution.trace)
    assert len(calls) == 4 * steps  # there and back
    torch.testing.assert_close(solution.relative, (f(y) - y).norm(dim=1) / f(y).norm(dim=1))


def test_the_way_back_ends_at_the_start_with_f_in_single_precision():
    f, tensors = bound(torch.float32)
    errors = []
    z, _ = reversible(f, torch.zeros(3, 6), 9, 0.5, errors.append)
    torch.autograd.grad(z.sum(), tensors)
    assert errors[0].relative.max() < 1e-8  # 18 halvings of a float64 rounding, 2^18 x 1e-16, and room


def test_a_dependency_it_cannot_see_is_refused():
    hidden, calls = torch.ones(6, requires_grad=True), []

    def f(z):
        calls.append(1)
        return torch.tanh(z * hidden) if len(calls) > 1 else torch.tanh(z)

    z, _ = reversible(f, torch.zeros(3, 6), 2, 0.5)
    assert not z.requires_grad  # nothing was seen, so nothing is promised
    w = torch.ones(6, requires_grad=True)
    calls.clear()
    z, _ = reversible(lambda z: f(z) * w, torch.zeros(3, 6), 2, 0.5)
    with pytest.raises(RuntimeError, match="first call did not show"):
        z.sum().backward()
