"""Figure 5's trace on a linear contraction, whose iterates are known in closed form."""

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
FACTOR = 0.5


def contraction(z: torch.Tensor) -> torch.Tensor:
    """z -> z / 2 + 1 in every coordinate: z[k] = 2 (1 - 2^-k) from 0, so all norms are known."""
    return FACTOR * z + 1


def iterated(samples: int, size: int) -> convergence.Trace:
    z0 = torch.zeros(samples, size, dtype=torch.float64)
    return convergence.trace(contraction, z0, FixedPoint(), EVALUATIONS - 1, [size])


def test_plain_iteration_of_a_contraction_shows_the_norms_of_theory() -> None:
    traced = iterated(3, 7)
    k = torch.arange(EVALUATIONS, dtype=torch.float64)
    iterate = (1 - FACTOR**k) / (1 - FACTOR)
    residual = FACTOR**k / (FACTOR * iterate + 1)
    change = FACTOR ** (k[1:] - 1) / iterate[:-1]  # noted at the evaluation of z[k]
    assert traced.residual.shape == (EVALUATIONS, 3)
    for sample in range(3):
        assert torch.allclose(traced.residual[:, sample], residual)
        assert torch.allclose(traced.change[2:, sample], change[1:])
    assert traced.change[:2].isnan().all()  # no z before the first, and the second follows z = 0
    assert torch.allclose(traced.best, iterate[-1].expand(3, 7))


def test_broyden_solves_it_in_three_evaluations_and_stops_only_there() -> None:
    z0 = torch.zeros(2, 5, dtype=torch.float64)
    traced = convergence.trace(contraction, z0, Broyden(tolerance=0.5), EVALUATIONS, [5])
    assert traced.residual[0] == pytest.approx(1.0)
    assert traced.residual[1] == pytest.approx(0.5 / 1.5)
    assert float(traced.residual[2].max()) < 1e-12


def test_a_tolerance_never_cuts_a_trace_short() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.linalg.qr(random)[0]
    z0 = torch.zeros(2, 6, dtype=torch.float64)
    solver = FixedPoint(tolerance=1.0)
    traced = convergence.trace(lambda z: z @ weight.T + 1, z0, solver, EVALUATIONS - 1, [6])
    assert traced.residual.shape[0] == EVALUATIONS


def test_rows_are_tidy_and_the_summary_knows_when_a_level_was_reached() -> None:
    table = pd.concat([convergence.rows(iterated(3, 7), "fixed_point", batch) for batch in (0, 1)])
    columns = ["solver", "batch", "evaluation", "change", "residual", "residual_1"]
    assert list(table.columns) == columns and len(table) == 2 * EVALUATIONS
    assert np.allclose(table["residual"], table["residual_1"])
    values = convergence.summarise(table)
    known = table[table["batch"] == 0].set_index("evaluation")["residual"]
    assert values["fixed_point/residual"] == pytest.approx(known.iloc[-1])
    assert values["fixed_point/residual_std"] == 0
    assert values["fixed_point/evaluations_to_0.1"] == known.index[known <= 0.1][0]
    assert "fixed_point/evaluations_to_0.0001" not in values
    assert all(np.isfinite(value) for value in values.values())


def test_each_scale_has_its_own_residual_and_contraction() -> None:
    """Two scales that contract by 1/2 and by 1/4: each shows the closed form of its own factor."""
    factors = torch.tensor([0.5] * 3 + [0.25] * 2, dtype=torch.float64)
    z0 = torch.zeros(2, 5, dtype=torch.float64)
    traced = convergence.trace(lambda z: factors * z + 1, z0, FixedPoint(), 8, [3, 2])
    values = convergence.summarise(convergence.rows(traced, "fixed_point", 0))
    k = torch.arange(9, dtype=torch.float64)
    for number, (factor, residual) in enumerate(zip((0.5, 0.25), traced.scales, strict=True), 1):
        expected = factor**k / ((1 - factor ** (k + 1)) / (1 - factor))
        assert torch.allclose(residual, expected[:, None].expand(9, 2))
        mean = float(expected[-1]) ** (1 / 8)  # the first residual is 1
        assert values[f"fixed_point/contraction_{number}"] == pytest.approx(mean)


def test_a_sample_that_diverges_is_left_out_of_the_mean() -> None:
    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([contraction(z[0]), z[1] * 1e200 + 1])

    z0 = torch.zeros(2, 4, dtype=torch.float64)
    traced = convergence.trace(f, z0, FixedPoint(), EVALUATIONS - 1, [4])
    rows = convergence.rows(traced, "fixed_point", 0)
    assert rows["residual"].iloc[-1] == pytest.approx(float(iterated(1, 4).residual[-1]))


class Numbered:
    """Twenty numbered images."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, keys: object) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.tensor(keys.indices)  # type: ignore[attr-defined]
        return indices, indices


def test_random_batches_repeat_with_the_seed_and_never_share_a_sample() -> None:
    def drawn(seed: int) -> list[int]:
        return torch.cat(list(convergence.random_batches(Numbered(), 5, 4, seed))).tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0)) == list(range(20))
    with pytest.raises(UserError, match="5 batches of 5"):
        list(convergence.random_batches(Numbered(), 5, 5, 0))


def trained(model: torch.nn.Module) -> Trained:
    facts = {"model": "tiny", "source": "generated", "digest": "0", "samples": 20}
    return Trained("tiny", model.eval(), Stripes(20), SETS["cifar10"], facts, "made-by")


PARAMS = ConvergenceParams(
    model="tiny", batch=1, batches=2, steps=6, solvers=(Broyden(), FixedPoint())
)


def test_the_stage_writes_its_files_and_the_spectral_radius(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The radius is that of the exact Jacobian's eigenvalues, at the equilibria of the batches."""
    monkeypatch.chdir(tmp_path)
    model = network().double()
    monkeypatch.setattr(weights, "load", lambda *_: trained(model))
    monkeypatch.setattr(Stripes, "__getitem__", doubled(Stripes.__getitem__))
    convergence.run("cifar10", PARAMS, Machine(tmp_path))
    out = Path("results/convergence/cifar10")
    names = "facts.json figure5.png figure5.svg metrics.json overview.svg run.jsonl trace.csv"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    values = json.loads((out / "metrics.json").read_text())
    assert all(isinstance(value, float) for value in values.values())
    assert values["broyden/evaluations"] == 7
    assert json.loads((out / "facts.json").read_text())["source"] == "generated"
    radii = []
    for images in convergence.random_batches(Stripes(20), 2, 1, 0):
        with torch.no_grad():
            f, z0, _ = model.backbone.fixed_point_problem(images)
            z = Broyden(steps=6, tolerance=0.0)(f, z0).value
        jacobian = torch.autograd.functional.jacobian(f, z)[0, :, 0]
        radii.append(float(torch.linalg.eigvals(jacobian).abs().max()))
    assert values["jacobian/spectral_radius"] == pytest.approx(np.mean(radii), rel=0.05)
    assert values["jacobian/spectral_radius_max"] == pytest.approx(max(radii), rel=0.1)
    runs = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert {"tag": "builds_on", "value": "made-by"} in runs


def doubled(read):  # noqa: ANN001, ANN201
    def both(split: Stripes, keys: object) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = read(split, keys)
        return images.double(), targets

    return both


def test_an_explicit_model_has_no_equilibrium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", lambda *_: trained(torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match=r"convergence\.cifar10\.model: tiny is an explicit model"):
        convergence.run("cifar10", PARAMS, Machine(tmp_path))
    assert not Path("results").exists()
