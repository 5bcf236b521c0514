"""One training step of an equilibrium model: this library beside its peers, on the same f, weights and images.

    python -m benchmarks.peers --weights results/classify/mdeq-small/model.pt --batch 32 --rounds 5 --out peers.json

The columns take turns, so a slower minute of the machine hits them all; the medians and the spread are printed. `f` and
the heads are ours in every column: what is compared is the solver and the gradient. The residuals are recomputed alike
for all: forward by one more evaluation of f, the mean over the samples of |f(z) - z| / |f(z)|; backward of the adjoint
u = J^T u + b against |b|. The peers' library is optional: pip install torchdeq==0.1.0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_broyden import PublishedBroyden
from mdeq import Anderson, Broyden, Gmres, Implicit, Network, Phantom
from mdeq.equilibrium import equilibrium
from mdeq.solvers import Map
from pipeline.checkpoints import load_model

Layer = Callable[[Map, Tensor], Tensor]  # f, z0 -> an equilibrium with its gradient


@dataclass
class Column:
    """One contestant and what was measured of it."""

    name: str
    layer: Layer
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    forward_residual: float = float("nan")
    backward_residual: float = float("nan")
    forward_evaluations: int = 0


def columns(forward: int, backward: int) -> list[Column]:
    """The contestants, with `forward` and `backward` solver iterations."""
    exact = {"tolerance": 0.0}

    def ours(forward_solver, rule) -> Layer:  # noqa: ANN001
        return lambda f, z0: equilibrium(f, z0, forward_solver, rule)[0]

    broyden, implicit = Broyden(forward, **exact), Implicit(Broyden(backward, **exact))
    found = [
        Column("ours, Broyden / Broyden", ours(broyden, implicit)),
        Column("ours, Broyden / GMRES", ours(broyden, Implicit(Gmres(backward, **exact)))),
        Column("ours, Anderson / GMRES", ours(Anderson(forward, **exact), Implicit(Gmres(backward, **exact)))),
        Column("ours, Broyden / one step", ours(broyden, Phantom(1, 1.0))),
        Column("published form, (U, V) Broyden", ours(PublishedBroyden(forward), Implicit(PublishedBroyden(backward)))),  # type: ignore[arg-type]
    ]
    if importlib.util.find_spec("torchdeq") is None:
        print("torchdeq is not installed: its columns are left out", file=sys.stderr)
        return found
    from torchdeq import get_deq

    def peer(solver: str, **gradient: object) -> Layer:
        deq = get_deq(
            f_solver=solver, b_solver=solver, f_max_iter=forward, b_max_iter=backward, f_tol=0.0, b_tol=0.0,
            f_stop_mode="rel", b_stop_mode="rel", **gradient,
        )  # fmt: skip
        return lambda f, z0: deq(f, z0)[0][-1]

    for solver in ("broyden", "anderson"):
        found.append(Column(f"torchdeq, {solver}, implicit", peer(solver, ift=True)))
    return [*found, Column("torchdeq, broyden, phantom 5", peer("broyden", grad=5, tau=0.5))]


def step(network: Network, layer: Layer, images: Tensor, targets: Tensor, column: Column | None = None) -> None:
    """Forward and backward of one training step; with a column, measures its residuals instead of its time."""
    network.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # the same dropout masks for every column
    f, z0, scales = network.backbone.fixed_point_problem(images)
    counted = _Counted(f)
    z = layer(counted, z0)
    if column is not None:
        column.forward_evaluations = counted.calls
        column.forward_residual = _residual(counted.first_graph_argument, f)
    loss = F.cross_entropy(network.head(scales.split(z)), targets)
    loss.backward()


class _Counted:
    """f, counting its calls, and keeping the state at which it was first put on tape: z*."""

    def __init__(self, f: Map) -> None:
        self.f, self.calls = f, 0
        self.first_graph_argument: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        if torch.is_grad_enabled() and self.first_graph_argument is None:
            self.first_graph_argument = z.detach()
        return self.f(z)


def _residual(z: Tensor | None, f: Map) -> float:
    if z is None:
        return float("nan")
    with torch.no_grad():
        fz = f(z)
        return float(((fz - z).norm(dim=1) / fz.norm(dim=1)).mean())


def measure(network: Network, contestants: list[Column], images: Tensor, targets: Tensor, rounds: int) -> None:
    """Residuals once, which also warms up, then `rounds` steps of each, in turns."""
    for column in contestants:
        step(network, column.layer, images, targets, column)
    for _ in range(rounds):
        for column in contestants:
            wall, cpu = time.perf_counter(), time.process_time()
            step(network, column.layer, images, targets)
            column.seconds.append(time.perf_counter() - wall)
            column.cpu_seconds.append(time.process_time() - cpu)


def main() -> None:
    """Measures, prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a trained MDEQ, model.pt")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--forward", type=int, default=18, help="forward solver iterations")
    parser.add_argument("--backward", type=int, default=20, help="backward solver iterations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network: nn.Module = load_model(arguments.weights)[0].train()
    assert isinstance(network, Network), "--weights: must hold an MDEQ"
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    targets = torch.randint(0, 10, (arguments.batch,))
    contestants = columns(arguments.forward, arguments.backward)
    load = os.getloadavg()[0]
    measure(network, contestants, images, targets, arguments.rounds)
    report = {"torch": torch.__version__, "threads": arguments.threads, "batch": arguments.batch, "load_before": load}
    report["columns"] = [_summary(column) for column in contestants]
    _print(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _summary(column: Column) -> dict[str, object]:
    return {
        "name": column.name,
        "seconds": statistics.median(column.seconds),
        "seconds_min": min(column.seconds),
        "cpu_seconds": statistics.median(column.cpu_seconds),
        "forward_residual": column.forward_residual,
        "evaluations_before_the_head": column.forward_evaluations,
    }


def _print(report: dict) -> None:
    print("torch {torch}, {threads} threads, batch {batch}, load before {load_before:.1f}".format(**report))
    first = report["columns"][0]["cpu_seconds"]
    print(f"{'column':34} {'wall s':>8} {'min':>8} {'cpu s':>8} {'x ours':>7} {'f residual':>11} {'f calls':>8}")
    for c in report["columns"]:
        print(
            f"{c['name']:34} {c['seconds']:8.3f} {c['seconds_min']:8.3f} {c['cpu_seconds']:8.3f} "
            f"{c['cpu_seconds'] / first:7.2f} {c['forward_residual']:11.4f} {c['evaluations_before_the_head']:8d}"
        )


if __name__ == "__main__":
    main()
