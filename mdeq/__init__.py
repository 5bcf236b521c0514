"""Multiscale deep equilibrium models (Bai, Koltun, Kolter, NeurIPS 2020), and any z = f(z)."""

from mdeq.deq import DEQ, Normal, Zeros
from mdeq.equilibrium import Implicit, Phantom, Reversible, equilibrium, trajectory, unroll
from mdeq.heads import ClassificationHeadConfig, SegmentationHeadConfig
from mdeq.maps import State
from mdeq.model import MDEQ, Equilibrium, MDEQConfig, Network, Prediction
from mdeq.multiscale import Scales
from mdeq.saved import Architecture, load
from mdeq.solvers import Anderson, Broyden, FixedPoint, Gmres, Solution

__all__ = [
    "DEQ",
    "MDEQ",
    "Anderson",
    "Architecture",
    "Broyden",
    "ClassificationHeadConfig",
    "Equilibrium",
    "FixedPoint",
    "Gmres",
    "Implicit",
    "MDEQConfig",
    "Network",
    "Normal",
    "Phantom",
    "Prediction",
    "Reversible",
    "Scales",
    "SegmentationHeadConfig",
    "Solution",
    "State",
    "Zeros",
    "equilibrium",
    "load",
    "trajectory",
    "unroll",
]
