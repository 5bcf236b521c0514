"""The Jacobian J = df/dz at a state: an estimate of its Frobenius norm, its spectral radius."""

from __future__ import annotations

import torch
from torch import Tensor

from mdeq.checks import whole
from mdeq.maps import vjp
from mdeq.solvers import Map


def frobenius(fz: Tensor, z: Tensor, probes: int = 2) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / numel(z), differentiable.

    The regulariser of Bai, Koltun and Kolter (ICML 2021).

    Args:
        fz: f(z) (B, D), computed on tape from `z`.
        z: (B, D), requires grad.
        probes: Gaussian vectors to average over.

    Returns:
        Scalar: the mean over probes v of |v^T J|^2 / numel(z), in expectation |J|_F^2 / numel(z).

    Raises:
        RuntimeError: In inference mode.
    """
    whole(1, probes=probes)
    _require_tape("the Jacobian term")
    total = fz.new_zeros(())
    for _ in range(probes):
        v = torch.randn_like(fz)
        total = total + vjp(fz, z, v, create_graph=True).square().sum()
    return total / (probes * z.numel())


def spectral_radius(f: Map, z: Tensor, products: int = 40, skip: int = 10) -> Tensor:
    """The largest |eigenvalue| of J at `z` (B, D) for each sample, (B,).

    It is the growth rate of |(J^T)^k v|, which holds for complex pairs; a Rayleigh quotient does
    not. It is 0 where (J^T)^k v becomes 0, as for a nilpotent J.

    Args:
        f: Acts on each sample alone.
        z: Where the Jacobian is taken.
        products: Products with J^T made.
        skip: First products left out of the mean growth, while v still turns towards the dominant
            subspace; fewer than `products`.

    Raises:
        RuntimeError: In inference mode.
    """
    whole(0, skip=skip)
    whole(skip + 1, products=products)
    _require_tape("the spectral radius")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        fz = f(z)
    v = torch.randn_like(z)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    growth = torch.zeros_like(z[:, 0])
    for k in range(products):
        v = vjp(fz, z, v, retain_graph=k + 1 < products)
        length = torch.linalg.vector_norm(v, dim=1)
        if k >= skip:
            growth = growth + length.log()
        v = v / length.clamp(min=torch.finfo(length.dtype).tiny)[:, None]
    return (growth / (products - skip)).exp()


def _require_tape(what: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} differentiates f, which inference mode forbids: use torch.no_grad() instead"
        )
