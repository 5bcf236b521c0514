"""One training step of an equilibrium model: this library beside its peers, on the same f, weights and images.

    python -m benchmarks.peers --weights results/classify/mdeq-small/model.pt --data FOLDER --out peers.json
    python -m benchmarks.peers --preset imagenet-mdeq-small --train-steps 20 --noise --only Broyden --out peers.json

A step is forward and backward, without an optimiser. The columns take turns, so that a slower minute of the machine
hits them all; a sample is clean when others used less than 12 % of the machine meanwhile, and medians are over the
clean ones. f, head and dropout masks are the same everywhere: solver and gradient are what is compared. Residuals are
recomputed alike for all columns (benchmarks/columns.py). "At the residuals of X" are the fewest evaluations of Anderson
and GMRES with which neither residual is above X's. "Own ms" is the forward solver's time an evaluation with the values
of f given.

FOLDER holds cifar-10-batches-py/. torch and numpy suffice; torchdeq's columns need `pip install '.[bench]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import setting, timing
from benchmarks.columns import (
    Column,
    Probe,
    Step,
    anderson_gmres,
    at_equal_residual,
    contestants,
    own_milliseconds,
)

LIMIT = 2  # times the peers' updates, for the search at equal residual


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON."""
    parser = setting.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="TEXT", help="columns whose name holds TEXT; repeatable")
    arguments = parser.parse_args(argv)
    there = setting.load(arguments)
    step = Step(there.network, *there.batch())
    columns = contestants(there.preset.forward, there.preset.backward, step.at_once, arguments.only)
    probes = {column.name: step.probe(column) for column in columns}  # which also warms up
    columns += _at_equal_residual(step, columns, probes, LIMIT * there.preset.backward)
    samples: dict[str, list[timing.Sample]] = {column.name: [] for column in columns}
    own: dict[str, float] = {}
    for column in columns:
        own[column.name] = own_milliseconds(column.layer, *step.problem()[:2])
    for _ in range(arguments.rounds):
        for column in columns:
            samples[column.name].append(timing.measure(lambda: step.run(column.layer)))  # noqa: B023
    rows = [
        {"name": name, **timing.summary(taken), **vars(probes[name]), "own_ms": own[name]}
        for name, taken in samples.items()
    ]
    report = {"rounds": arguments.rounds, "columns": rows}
    _print(there.facts, rows, arguments.rounds)
    there.write(report)


def _at_equal_residual(step: Step, columns: list[Column], probes: dict[str, Probe], limit: int) -> list[Column]:
    """Our columns at each peer's residuals, whose probes are added; one column where the numbers coincide."""
    peers: dict[tuple[int, int], list[str]] = {}
    for column in columns:
        if column.implicit and not column.name.startswith("ours"):
            numbers = at_equal_residual(step, probes[column.name], limit)
            if numbers is None:
                print(f"{column.name}: {limit} updates of Anderson or GMRES do not reach its residuals")
            else:
                peers.setdefault(numbers, []).append(column.name)
    found = []
    for numbers, names in peers.items():
        column = anderson_gmres(*numbers, step.at_once)
        column = Column(f"{column.name}, at the residuals of {' and '.join(names)}", column.layer)
        probes[column.name] = step.probe(column)
        found.append(column)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| column | s | least | CPU s | f / passes | residual, forward / backward | solver's own ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        backward = "n/a" if row["backward_residual"] is None else f"{row['backward_residual']:.2g}"
        lines.append(
            f"| {row['name']} | {row['wall']:.2f} | {row['wall_min']:.2f} | {row['cpu']:.2f} | {row['evaluations']} / "
            f"{row['passes']} | {row['forward_residual']:.2g} / {backward} | {row['own_ms']:.1f} |"
        )
    return "\n".join(lines)


def _print(facts: dict[str, Any], rows: list[dict[str, Any]], rounds: int) -> None:
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print("clean samples: " + ", ".join(f"{row['clean']}/{rounds}" for row in rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
