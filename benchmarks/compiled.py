"""What compiling f gains: f, a product of the adjoint solve and a whole step, eager and by `MDEQ.compile_f`, in turns.

    python -m benchmarks.compiled --weights model.pt --data ~/cifar10 --batch 16
    python -m benchmarks.compiled --preset imagenet-mdeq-small --noise --rounds 9

The step is that of `benchmarks.peers`, Broyden / Broyden. Prints a table; medians over the rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import setting, timing
from mdeq import Broyden, Implicit, Network


def work(network: Network, images: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each piece is called once, so that all is compiled."""
    f, z0, _ = network.backbone.fixed_point_problem(images)
    solved = f.fast or f
    with torch.no_grad():
        state = f(f(z0))  # the features of a first application, not zeros
    z = state.clone().requires_grad_()
    fz = solved(z)

    def evaluate() -> None:
        with torch.no_grad():
            solved(state)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(images).logits, targets).backward()

    product = partial(torch.autograd.grad, fz, z, torch.ones_like(z), retain_graph=True)
    pieces: dict[str, Callable[[], object]] = {"f": evaluate, "product": product, "step": step}
    for piece in pieces.values():
        piece()
    return pieces


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints."""
    parser = setting.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    there = setting.load(parser.parse_args(argv))
    eager = there.network
    eager.backbone.forward_solver = Broyden(there.preset.forward, tolerance=0.0)
    eager.backbone.backward = Implicit(Broyden(there.preset.backward, tolerance=0.0))
    compiled = copy.deepcopy(eager)
    compiled.backbone.compile_f()
    columns = {"eager": work(eager, *there.batch()), "compiled": work(compiled, *there.batch())}
    samples: dict[tuple[str, str], list[timing.Sample]] = {}
    for _ in range(there.arguments.rounds):
        for name, pieces in columns.items():
            for piece, run in pieces.items():
                samples.setdefault((name, piece), []).append(timing.measure(run))
    rows = [{"name": name, "piece": piece, **timing.summary(found)} for (name, piece), found in samples.items()]
    print(markdown(rows))
    there.write({"rounds": there.arguments.rounds, "columns": rows})


def markdown(rows: list[dict[str, object]]) -> str:
    """The table: milliseconds of each piece, a line a column."""
    wall = {(row["name"], row["piece"]): float(str(row["wall"])) for row in rows}
    names, pieces = (list(dict.fromkeys(key[i] for key in wall)) for i in (0, 1))
    lines = [f"| ms | {' | '.join(map(str, pieces))} |", "|---" * (1 + len(pieces)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{1000 * wall[name, piece]:.1f}' for piece in pieces)} |" for name in names]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
