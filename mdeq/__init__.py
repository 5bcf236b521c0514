"""Multiscale deep equilibrium models (Bai, Koltun, Kolter, NeurIPS 2020): model, solvers, implicit gradients."""

from mdeq.equilibrium import Implicit, Phantom, Reversible, equilibrium, unroll
from mdeq.heads import ClassificationHeadConfig, SegmentationHeadConfig
from mdeq.model import MDEQ, Equilibrium, MDEQConfig, Network, Prediction
from mdeq.multiscale import Scales
from mdeq.solvers import Anderson, Broyden, FixedPoint, Gmres, Solution

__all__ = [
    "MDEQ",
    "Anderson",
    "Broyden",
    "ClassificationHeadConfig",
    "Equilibrium",
    "FixedPoint",
    "Gmres",
    "Implicit",
    "MDEQConfig",
    "Network",
    "Phantom",
    "Prediction",
    "Reversible",
    "Scales",
    "SegmentationHeadConfig",
    "Solution",
    "equilibrium",
    "unroll",
]
