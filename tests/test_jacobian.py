"""The Jacobian's estimates against dense matrices, in float64."""

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
    network = Network(MDEQConfig(channels=(8, 8), expansion=2, groups=4), ClassificationHeadConfig((4, 4), 16), 5)
    term = network(torch.randn(2, 3, 8, 8), jacobian_probes=1).equilibrium.jacobian
    term.backward()
    assert network.backbone.f.blocks[0].conv1.v.grad.norm() > 0


def test_spectral_radius_of_complex_pairs():
    """Rotations scaled by 1.02 and 0.7: all eigenvalues are complex; a Rayleigh quotient would see cos(angle) less."""
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
    torch.testing.assert_close(radius, torch.full((3,), 1.02, dtype=torch.float64), rtol=0.01, atol=0)
    torch.testing.assert_close(torch.linalg.eigvals(matrix).abs().max().item(), 1.02, rtol=1e-9, atol=0)
