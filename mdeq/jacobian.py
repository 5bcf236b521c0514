"""The Jacobian J = df/dz at a state: Hutchinson's estimate of its Frobenius norm, and its spectral radius."""

from __future__ import annotations

import torch
from torch import Tensor

from mdeq.solvers import Map


def frobenius(fz: Tensor, z: Tensor, probes: int = 2) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / numel(z), differentiable: the regulariser of Bai et al., ICML 2021.

    Args:
        fz: f(z) (B, D), computed on tape from `z`.
        z: (B, D), requires grad.
        probes: Gaussian vectors to average over.

    Returns:
        Scalar: the mean over probes v of |v^T J|^2 / numel(z), in expectation |J|_F^2 / numel(z).
    """
    total = fz.new_zeros(())
    for _ in range(probes):
        v = torch.randn_like(fz)
        total = total + torch.autograd.grad(fz, z, v, create_graph=True)[0].square().sum()
    return total / (probes * z.numel())


def spectral_radius(f: Map, z: Tensor, products: int = 40, skip: int = 10) -> Tensor:
    """The largest |eigenvalue| of J at `z` (B, D) for each sample, (B,).

    It is the growth rate of |(J^T)^k v|, which holds for complex pairs; a Rayleigh quotient does not.

    Args:
        f: Acts on each sample alone.
        z: Where the Jacobian is taken.
        products: Products with J^T made.
        skip: First products left out of the mean growth, while v still turns towards the dominant subspace.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        fz = f(z)
    v = torch.randn_like(z)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    growth = z.new_zeros(z.shape[0])
    for k in range(products):
        v = torch.autograd.grad(fz, z, v, retain_graph=k + 1 < products)[0]
        length = torch.linalg.vector_norm(v, dim=1)
        if k >= skip:
            growth = growth + length.log()
        v = v / length[:, None]
    return (growth / (products - skip)).exp()
