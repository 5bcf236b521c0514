"""At given weights: residual and accuracy against evaluations, and how near each gradient rule comes to the truth.

    python -m benchmarks.sweep --weights MODEL --data FOLDER --pictures docs --out sweep.json

Solvers: the mean over `--images` test images, in evaluation mode, of the residual of each sample's best iterate so far,
and the accuracy of a head that reads it, after 1, 2, ... evaluations of f; the adjoint's residual after 1, 2, ...
products, on a training step of one batch.

Gradients: the gradient of the weights of f on `--gradient-batch` images, in float64, as a cosine and a ratio of norms
to the exact one: GMRES to 1e-6 at an equilibrium that `--exact` updates of Broyden found. Each rule is judged at that
equilibrium and at the one that 18 evaluations find; a phantom or unrolled step counts as one product. `--pictures`
draws solvers and gradients, .svg and .png, with matplotlib; all else needs torch and numpy alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import setting
from benchmarks.columns import Layer, Step, best_so_far, forward_residual
from mdeq import Anderson, Broyden, FixedPoint, Gmres, Implicit, Network, Phantom, unroll
from mdeq.equilibrium import equilibrium
from mdeq.solvers import Map, Solution, Solver

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRODUCTS = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30)
BUDGET = 18  # evaluations, as the paper's
COLOURS = {
    "Broyden": "#2f7fd1",
    "Anderson": "#2f9e77",
    "GMRES": "#8b6cc9",
    "iterating f": "#b07d00",
    "phantom, damping 1": "#d1495b",
    "phantom, damping 0.5": "#e08a3c",
    "unrolled from 0": "#6b7280",
}
Curve = dict[str, list[float]]
Curves = dict[str, Curve]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes JSON and pictures."""
    parser = setting.parser(__doc__)
    parser.add_argument("--evaluations", type=int, default=30, help="of f, and products of the adjoint, at most")
    parser.add_argument("--images", type=int, default=1000, help="test images for residual and accuracy")
    parser.add_argument("--gradient-batch", type=int, default=8)
    parser.add_argument("--exact", type=int, default=150, help="updates, and products, behind the exact gradient")
    parser.add_argument("--pictures", type=Path, help="folder for solvers and gradients, .svg and .png")
    arguments = parser.parse_args(argv)
    there = setting.load(arguments)
    products = [n for n in PRODUCTS if n <= arguments.evaluations]
    report = {
        "forward": forward_sweep(there, arguments.images, arguments.evaluations),
        "adjoint": adjoint_sweep(Step(there.network, *there.batch()), arguments.evaluations),
        "gradients": gradient_sweep(there.network, *there.images(arguments.gradient_batch), products, arguments.exact),
    }
    there.write(report)
    for name, curve in report["forward"].items():
        print(f"{name:12} accuracy {curve['accuracy'][-1]:.3f}, residual {curve['residual'][-1]:.2e} at the end")
    print(", ".join(f"{name} {value:.2e}" for name, value in report["gradients"]["exact"].items()))
    if arguments.pictures:
        _save(arguments.pictures, report)


# ---- residual and accuracy against evaluations


def forward_sweep(there: setting.Setting, images: int, evaluations: int) -> Curves:
    """Of each solver: `residual` and `accuracy` after 1, 2, ... evaluations of f."""
    network, solvers = there.network.eval(), _solvers(evaluations - 1)
    pictures, labels = there.images(images)
    sums = {name: torch.zeros(2, evaluations) for name in solvers}
    with torch.no_grad():
        for batch, targets in zip(pictures.split(there.preset.batch), labels.split(there.preset.batch), strict=True):
            f, z0, scales = network.backbone.fixed_point_problem(batch)
            for name, solver in solvers.items():
                states, trace = trajectory(solver, f, z0)
                sums[name][0] += best_so_far(trace).sum(1)
                for n in range(evaluations):
                    logits = network.head(scales.split(_best_state(states, trace, n)))
                    sums[name][1, n] += (logits.argmax(1) == targets).sum()
    network.train()
    return {
        name: {"evaluations": list(range(1, evaluations + 1)), "residual": r.tolist(), "accuracy": a.tolist()}
        for name, (r, a) in ((name, total / images) for name, total in sums.items())
    }


def trajectory(solver: Solver, f: Map, z0: Tensor) -> tuple[list[Tensor], Tensor]:
    """The states at which `solver` evaluated f, and their residuals (nfe, B)."""
    states: list[Tensor] = []

    def record(z: Tensor) -> Tensor:
        states.append(z)
        return f(z)

    return states, solver(record, z0).trace


def _best_state(states: list[Tensor], trace: Tensor, n: int) -> Tensor:
    """(B, D) what the solver returns after `n` updates."""
    if n == 0:
        return states[0]
    best = trace[1 : n + 1].argmin(0) + 1
    return torch.stack([states[i][b] for b, i in enumerate(best.tolist())])


def adjoint_sweep(step: Step, products: int) -> Curves:
    """Of each solver of the adjoint: the `residual` against |dl/dz*| after 1, 2, ... products, at one equilibrium."""
    f, z0, loss = step.problem()
    with torch.no_grad():
        z = Broyden(BUDGET - 1, tolerance=0.0)(f, z0).value
    curves = {}
    for name, solver in _adjoint_solvers(products).items():
        solutions: list[Solution] = []
        output, _ = equilibrium(f, z, FixedPoint(0), Implicit(solver), on_backward=solutions.append)
        loss(output).backward(retain_graph=True)
        residual = solutions[0].trace.cummin(0).values.mean(1).tolist()
        curves[name] = {"products": list(range(1, len(residual) + 1)), "residual": residual}
    return curves


def _solvers(limit: int) -> dict[str, Broyden | Anderson | FixedPoint]:
    """The solvers of both ways, run to their limit."""
    kinds = {"Broyden": Broyden, "Anderson": Anderson, "iterating f": FixedPoint}
    return {name: kind(limit, tolerance=0.0) for name, kind in kinds.items()}


def _adjoint_solvers(limit: int) -> dict[str, Broyden | Anderson | FixedPoint | Gmres]:
    return {**_solvers(limit), "GMRES": Gmres(limit, tolerance=0.0)}


# ---- gradient rules against the exact gradient


def gradient_sweep(
    network: Network, images: Tensor, targets: Tensor, products: list[int], exact: int
) -> dict[str, Any]:
    """`exact`: how well it was found; `converged` and `budget`: each rule's cosine and norm ratio there."""
    step = Step(copy.deepcopy(network).double(), images.double(), targets)
    f, z0, _ = step.problem()
    with torch.no_grad():
        z = Broyden(exact, tolerance=1e-10)(f, z0).value
        rough = Broyden(BUDGET - 1, tolerance=0.0)(f, z0).value
    solutions: list[Solution] = []
    rule = Implicit(Gmres(exact, tolerance=1e-6))
    truth = _gradient(step, lambda f, _: equilibrium(f, z, FixedPoint(0), rule, on_backward=solutions.append)[0])
    facts = {
        "residual": forward_residual(f, z),
        "adjoint_residual": float(solutions[0].relative.mean()),
        "products": float(solutions[0].nfe),
        "residual_of_budget": forward_residual(f, rough),
    }
    unrolled = _compare(step, truth, products, lambda n: {"unrolled from 0": lambda f, z0: unroll(f, z0, n)})
    found: dict[str, Any] = {"exact": facts}
    for name, start in (("converged", z), ("budget", rough)):
        found[name] = _compare(step, truth, products, partial(_rules, start)) | unrolled
    return found


def _rules(z: Tensor, n: int) -> dict[str, Layer]:
    """The gradient rules that make `n` products at the equilibrium `z`."""
    rules: dict[str, Implicit | Phantom] = {name: Implicit(solver) for name, solver in _adjoint_solvers(n).items()}
    del rules["iterating f"]  # a phantom of damping 1
    rules |= {f"phantom, damping {damping:g}": Phantom(n, damping) for damping in (1.0, 0.5)}
    return {name: lambda f, _, rule=rule: equilibrium(f, z, FixedPoint(0), rule)[0] for name, rule in rules.items()}


def _gradient(step: Step, layer: Layer) -> Tensor:
    """The gradient of the weights of f, flat."""
    step.run(layer)
    return torch.cat([p.grad.flatten() for p in step.network.backbone.f.parameters() if p.grad is not None])


def _compare(step: Step, truth: Tensor, products: list[int], rules: Callable[[int], dict[str, Layer]]) -> Curves:
    curves: Curves = {name: {"products": [], "cosine": [], "norm_ratio": []} for name in rules(1)}
    for n in products:
        for name, layer in rules(n).items():
            gradient = _gradient(step, layer)
            curves[name]["products"].append(n)
            curves[name]["cosine"].append(float(torch.cosine_similarity(gradient, truth, dim=0)))
            curves[name]["norm_ratio"].append(float(gradient.norm() / truth.norm()))
    return curves


# ---- pictures


def draw_solvers(report: dict[str, Any]) -> Figure:
    """Residual forward and backward, and accuracy, against evaluations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    forward = report["forward"]
    _lines(axes[0], forward, "evaluations", "residual", "residual |f(z) - z| / |f(z)|", "evaluations of f", log=True)
    _lines(axes[1], report["adjoint"], "products", "residual", "residual of the adjoint", "products with Jᵀ", log=True)
    _lines(axes[2], forward, "evaluations", "accuracy", "test accuracy", "evaluations of f")
    return figure


def draw_gradients(report: dict[str, Any]) -> Figure:
    """Cosine and norm ratio of each rule, at a converged equilibrium and at that of 18 evaluations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 6.8), layout="constrained", sharey="row")
    where = {"converged": "at a converged z*", "budget": f"at the z* of {BUDGET} evaluations"}
    axes[0, 0].set_ylim(1e-9, 2)  # before anything is drawn: the labels' places depend on it
    axes[1, 0].set_ylim(0, 2)
    for (top, bottom), (key, title) in zip(axes.T, where.items(), strict=True):
        curves = {
            name: curve | {"distance": [max(1 - cosine, 1e-9) for cosine in curve["cosine"]]}
            for name, curve in report["gradients"][key].items()
        }
        _lines(top, curves, "products", "distance", f"1 - cosine to the exact gradient, {title}", "", log=True)
        _lines(bottom, curves, "products", "norm_ratio", "norm relative to the exact one's", "products with Jᵀ")
        bottom.axhline(1, color="#8a9099", linewidth=0.8)
    return figure


def _lines(axes: Axes, curves: Curves, x: str, y: str, title: str, label: str, *, log: bool = False) -> None:
    """A line for each curve, its name at its end, pushed apart where the ends are close."""
    for name, curve in curves.items():
        axes.plot(curve[x], curve[y], color=COLOURS[name], linewidth=1.8, marker="o", markersize=2.5)
    if log:
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    place = axes.transData + axes.transAxes.inverted()
    ends = {name: place.transform((0, curve[y][-1]))[1] for name, curve in curves.items()}
    names = sorted(ends, key=ends.__getitem__)
    for below, name in pairwise(names):
        ends[name] = max(ends[name], ends[below] + 0.065)
    excess = max(0.0, ends[names[-1]] - 1)  # labels of curves that end at the top go down
    style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 8.5, "va": "center"}
    for name in names:
        axes.text(1.02, ends[name] - excess, name, color=COLOURS[name], **style)


def _save(folder: Path, report: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mdeq", "font.size": 9.5})
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("solvers", draw_solvers), ("gradients", draw_gradients)):
        figure = draw(report)
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=140, facecolor="white")


if __name__ == "__main__":
    main()
