"""The Jacobian's estimates against dense matrices, in float64."""

from __future__ import annotations

import pytest
import torch

from mdeq import ClassificationHeadConfig, MDEQConfig, Network
from mdeq.jacobian import frobenius, spectral_radius


def test_hutchinson_is_unbiased_and_has_a_gradient():
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    fz = z @ weight.T  # J is W for both samples
    estimate = frobenius(fz, z, probes=4000)
    torch.testing.assert_close(estimate, weight.square().sum() / 6, rtol=0.05, atol=0)
    (gradient,) = torch.autograd.grad(estimate, weight)
    torch.testing.assert_close(gradient, weight / 3, rtol=0.2, atol=0.05)


def test_the_model_returns_a_regulariser_with_gradients():
    torch.manual_seed(0)
    config = MDEQConfig(channels=(8, 8), expansion=2, groups=4)
    network = Network(config, ClassificationHeadConfig((4, 4), 16), 5)
    term = network(torch.randn(2, 3, 8, 8), jacobian_probes=1).equilibrium.jacobian
    term.backward()
    assert network.backbone.f.blocks[0].conv1.v.grad.norm() > 0


def test_spectral_radius_of_complex_pairs():
    """Rotations scaled by 1.02 and 0.7: a Rayleigh quotient would see their real parts."""
    torch.manual_seed(0)

    def block(radius: float, angle: float) -> torch.Tensor:
        angle = torch.tensor(angle, dtype=torch.float64)
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        return radius * rotation

    matrix = torch.block_diag(block(1.02, 0.9), block(0.7, 2.0))
    change = torch.randn(4, 4, dtype=torch.float64)
    matrix = torch.linalg.solve(change, matrix @ change)
    z = torch.zeros(3, 4, dtype=torch.float64)
    radius = spectral_radius(lambda z: torch.sin(z @ matrix.T), z, products=400, skip=100)
    torch.testing.assert_close(
        radius, torch.full((3,), 1.02, dtype=torch.float64), rtol=0.01, atol=0
    )
    torch.testing.assert_close(
        torch.linalg.eigvals(matrix).abs().max().item(), 1.02, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_radius_of_zero_and_nilpotent_jacobians_is_zero(dtype):
    nilpotent = torch.diag(torch.ones(3, dtype=dtype), 1)
    z = torch.randn(2, 4, dtype=dtype)
    for f in (lambda z: 0 * z, lambda z: torch.ones(2, 4, dtype=dtype), lambda z: z @ nilpotent):
        assert spectral_radius(f, z).tolist() == [0, 0]
    constant = torch.ones(2, 4, dtype=dtype)
    assert frobenius(constant, z.requires_grad_()) == 0


def test_inference_mode_is_refused_and_no_grad_is_not():
    z = torch.randn(2, 4)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="inference mode"):
            spectral_radius(torch.sin, z)
        with pytest.raises(RuntimeError, match="inference mode"):
            frobenius(torch.sin(z), z)
    with torch.no_grad():
        assert (spectral_radius(torch.sin, z) > 0).all()
    with pytest.raises(ValueError, match="^products"):
        spectral_radius(torch.sin, z, products=10, skip=10)
    with pytest.raises(ValueError, match="^probes"):
        frobenius(z, z, probes=0)
