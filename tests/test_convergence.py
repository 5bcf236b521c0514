"""Figure 5's trace on linear contractions, whose iterates are known in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mdeq import Broyden, FixedPoint
from pipeline import weights
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import ConvergenceParams
from pipeline.sets import SETS
from pipeline.stages import convergence
from pipeline.weights import Trained
from tests.toys import Stripes, network

EVALUATIONS = 12
PARAMS = ConvergenceParams(
    model="tiny", batch=1, batches=2, steps=6, solvers=(Broyden(), FixedPoint())
)


def contraction(z: torch.Tensor) -> torch.Tensor:
    """z -> z / 2 + 1 in every coordinate: z[k] = 2 (1 - 2^-k) from 0, so all norms are known."""
    return z / 2 + 1


def iterated(f=contraction, samples: int = 3, lengths: tuple[int, ...] = (7,)):  # noqa: ANN001, ANN201
    z0 = torch.zeros(samples, sum(lengths), dtype=torch.float64)
    return convergence.trace(f, z0, FixedPoint(tolerance=1.0), EVALUATIONS - 1, list(lengths))


def test_plain_iteration_of_a_contraction_shows_the_norms_of_theory() -> None:
    """A tolerance that holds at once does not cut it short."""
    columns, best = iterated()
    k = torch.arange(EVALUATIONS, dtype=torch.float64)
    iterate = 2 * (1 - 0.5**k)
    residual = 0.5**k / (iterate / 2 + 1)
    change = 0.5 ** k[1:-1] / iterate[1:-1]  # noted at the evaluation of z[k + 1]
    assert torch.allclose(columns["residual"], residual[:, None].expand(EVALUATIONS, 3))
    assert torch.allclose(columns["change"][2:], change[:, None].expand(EVALUATIONS - 2, 3))
    assert columns["change"][:2].isnan().all()  # no z before the first; the second follows z = 0
    assert torch.allclose(best, iterate[-1].expand(3, 7))


def test_each_scale_has_its_own_residual() -> None:
    """Two scales that contract by 1/2 and by 1/4: each shows the closed form of its own factor."""
    factors = torch.tensor([0.5] * 3 + [0.25] * 2, dtype=torch.float64)
    columns, _ = iterated(lambda z: factors * z + 1, 2, (3, 2))
    k = torch.arange(EVALUATIONS, dtype=torch.float64)
    for name, factor in (("residual_1", 0.5), ("residual_2", 0.25)):
        expected = factor**k / ((1 - factor ** (k + 1)) / (1 - factor))
        assert torch.allclose(columns[name], expected[:, None].expand(EVALUATIONS, 2))


def test_broyden_solves_it_in_three_evaluations_and_stops_only_there() -> None:
    z0 = torch.zeros(2, 5, dtype=torch.float64)
    columns, _ = convergence.trace(contraction, z0, Broyden(tolerance=0.5), EVALUATIONS, [5])
    assert columns["residual"][0] == pytest.approx(1.0)
    assert columns["residual"][1] == pytest.approx(0.5 / 1.5)
    assert float(columns["residual"][2].max()) < 1e-12


def test_rows_are_tidy_and_the_summary_knows_when_a_level_was_reached() -> None:
    tables = [convergence.tabulate(iterated()[0], "fixed_point", batch) for batch in (0, 1)]
    table = pd.concat(tables)
    columns = ["solver", "batch", "evaluation", "change", "residual", "residual_1"]
    assert list(table.columns) == columns and len(table) == 2 * EVALUATIONS
    values = convergence.summarise(table, torch.tensor([0.5, 0.75, torch.nan]))
    known = table[table["batch"] == 0].set_index("evaluation")["residual"]
    for name in ("residual", "residual_1"):
        assert values[f"fixed_point/{name}"] == pytest.approx(known.iloc[-1])
        assert values[f"fixed_point/{name}_std"] == 0
    assert values["fixed_point/evaluations_to_0.1"] == known.index[known <= 0.1][0]
    assert "fixed_point/evaluations_to_0.001" in values and known.iloc[-1] > 1e-4
    assert values["jacobian/spectral_radius"] == 0.625
    assert all(np.isfinite(value) for value in values.values())


def test_a_sample_that_diverges_is_left_out_of_the_mean() -> None:
    columns, _ = iterated(lambda z: torch.stack([contraction(z[0]), z[1] * 1e200 + 1]), 2)
    rows = convergence.tabulate(columns, "fixed_point", 0)
    alone = iterated(samples=1)[0]["residual"]
    assert rows["residual"].iloc[-1] == pytest.approx(float(alone[-1]))


class Numbered(Stripes):
    """Numbered images."""

    def __getitem__(self, keys):  # noqa: ANN001, ANN204
        return torch.tensor(keys.indices), torch.tensor(keys.indices)


def test_random_batches_repeat_with_the_seed_and_never_share_a_sample() -> None:
    def drawn(seed: int) -> list[int]:
        return torch.cat(list(convergence.random_batches(Numbered(20), 5, 4, seed))).tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0)) == list(range(20))
    with pytest.raises(UserError, match="5 batches of 5"):
        list(convergence.random_batches(Numbered(20), 5, 5, 0))


class Doubled(Stripes):
    """In float64."""

    def __getitem__(self, keys):  # noqa: ANN001, ANN204
        images, targets = super().__getitem__(keys)
        return images.double(), targets


def trained(model: torch.nn.Module) -> Trained:
    facts = {"model": "tiny", "source": "generated", "digest": "0", "builds_on": "made-by"}
    return Trained("tiny", model.eval(), Doubled(20), SETS["cifar10"], facts)


def test_the_stage_writes_its_files_and_the_spectral_radius(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The radius is that of the exact Jacobian's eigenvalues, at the equilibria of the batches."""
    monkeypatch.chdir(tmp_path)
    model = network().double()
    monkeypatch.setattr(weights, "load", lambda *_: trained(model))
    convergence.run("cifar10", PARAMS, Machine(tmp_path))
    out = Path("results/convergence/cifar10")
    names = "facts.json figure5.png figure5.svg metrics.json overview.svg run.jsonl trace.csv"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    values = json.loads((out / "metrics.json").read_text())
    assert all(isinstance(value, float) for value in values.values())
    assert values["broyden/evaluations"] == 7
    assert json.loads((out / "facts.json").read_text())["source"] == "generated"
    radii = []
    for images in convergence.random_batches(Doubled(20), 2, 1, 0):
        with torch.no_grad():
            f, z0, _ = model.backbone.fixed_point_problem(images)
            z = Broyden(steps=6, tolerance=0.0)(f, z0).value
        jacobian = torch.autograd.functional.jacobian(f, z)[0, :, 0]
        radii.append(float(torch.linalg.eigvals(jacobian).abs().max()))
    assert values["jacobian/spectral_radius"] == pytest.approx(np.mean(radii), rel=0.05)
    assert values["jacobian/spectral_radius_max"] == pytest.approx(max(radii), rel=0.1)
    runs = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert {"tag": "builds_on", "value": "made-by"} in runs
    assert any("solver/broyden_residual" in run.get("metrics", {}) for run in runs)


def test_an_explicit_model_has_no_equilibrium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", lambda *_: trained(torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match=r"convergence\.cifar10\.model: tiny is an explicit model"):
        convergence.run("cifar10", PARAMS, Machine(tmp_path))
    assert not Path("results").exists()
