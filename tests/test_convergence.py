"""Figure 5's trace on a linear contraction, whose iterates are known in closed form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mdeq.solvers import Broyden, FixedPoint
from pipeline import figures
from pipeline.data.manifest import DataError
from pipeline.stages import convergence

EVALUATIONS = 12
FACTOR = 0.5


def contraction(z: torch.Tensor) -> torch.Tensor:
    """z -> z / 2 + 1 in every coordinate: z[k] = 2 (1 - 2^-k) from 0, so all norms are known."""
    return FACTOR * z + 1


def test_plain_iteration_of_a_contraction_shows_the_norms_of_theory() -> None:
    z0 = torch.zeros(3, 7, dtype=torch.float64)
    traced = convergence.trace(contraction, z0, FixedPoint(), EVALUATIONS - 1, [7])
    k = torch.arange(EVALUATIONS, dtype=torch.float64)
    iterate = (1 - FACTOR**k) / (1 - FACTOR)
    residual = FACTOR**k / (FACTOR * iterate + 1)
    change = FACTOR ** (k[1:] - 1) / iterate[:-1]  # |z[k] - z[k-1]| / |z[k-1]|, noted at the evaluation of z[k]
    assert traced.residual.shape == (EVALUATIONS, 3)
    for sample in range(3):
        assert torch.allclose(traced.residual[:, sample], residual)
        assert torch.allclose(traced.change[2:, sample], change[1:])
    assert traced.change[:2].isnan().all()  # there is no z before the first, and the second follows z = 0


def test_broyden_solves_it_in_three_evaluations_and_stops_only_there() -> None:
    traced = convergence.trace(
        contraction, torch.zeros(2, 5, dtype=torch.float64), Broyden(tolerance=0.5), EVALUATIONS, [5]
    )
    assert traced.residual[0] == pytest.approx(1.0)
    assert traced.residual[1] == pytest.approx(0.5 / 1.5)
    assert float(traced.residual[2].max()) < 1e-12


def test_a_tolerance_never_cuts_a_trace_short() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.5 * torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    traced = convergence.trace(
        lambda z: z @ weight.T + 1,
        torch.zeros(2, 6, dtype=torch.float64),
        FixedPoint(tolerance=1.0),
        EVALUATIONS - 1,
        [6],
    )
    assert traced.residual.shape[0] == EVALUATIONS


def test_rows_are_tidy_and_the_summary_knows_when_a_level_was_reached() -> None:
    traced = convergence.trace(contraction, torch.zeros(3, 7, dtype=torch.float64), FixedPoint(), EVALUATIONS - 1, [7])
    table = pd.concat([convergence._rows(traced, "fixed_point", batch) for batch in range(2)])
    assert list(table.columns) == ["solver", "batch", "evaluation", "change", "residual", "residual_1"]
    assert np.allclose(table["residual"], table["residual_1"])
    assert len(table) == 2 * EVALUATIONS
    values = convergence.summarise(table)
    known = table[table["batch"] == 0].set_index("evaluation")["residual"]
    assert values["fixed_point/residual"] == pytest.approx(known.iloc[-1])
    assert values["fixed_point/residual_std"] == 0
    assert values["fixed_point/evaluations_to_0.1"] == known.index[known <= 0.1][0]
    assert "fixed_point/evaluations_to_0.001" in values
    assert all(np.isfinite(value) for value in values.values())


def test_each_scale_has_its_own_residual() -> None:
    """Two scales that contract by 1/2 and by 1/4: each shows the closed form of its own factor."""
    factors = torch.tensor([0.5] * 3 + [0.25] * 2, dtype=torch.float64)
    traced = convergence.trace(lambda z: factors * z + 1, torch.zeros(2, 5).double(), FixedPoint(), 8, [3, 2])
    k = torch.arange(9, dtype=torch.float64)
    for factor, residual in zip((0.5, 0.25), traced.scales, strict=True):
        expected = factor**k / ((1 - factor ** (k + 1)) / (1 - factor))
        assert torch.allclose(residual, expected[:, None].expand(9, 2))


def test_a_sample_that_diverges_is_left_out_of_the_mean() -> None:
    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([contraction(z[0]), z[1] * 1e200 + 1])

    traced = convergence.trace(f, torch.zeros(2, 4, dtype=torch.float64), FixedPoint(), EVALUATIONS - 1, [4])
    rows = convergence._rows(traced, "fixed_point", 0)
    alone = convergence.trace(contraction, torch.zeros(1, 4, dtype=torch.float64), FixedPoint(), EVALUATIONS - 1, [4])
    assert rows["residual"].iloc[-1] == pytest.approx(float(alone.residual[-1]))


class Split:
    """Twenty numbered images."""

    classes = 10

    def __len__(self) -> int:
        return 20

    def __getitem__(self, keys: object) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.tensor(keys.indices)  # type: ignore[attr-defined]
        return indices, indices


def test_random_batches_repeat_with_the_seed_and_never_share_a_sample() -> None:
    first, again, other = (
        torch.cat(list(convergence._random_batches(Split(), 5, 4, seed))).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == list(range(20))
    with pytest.raises(DataError, match="5 batches of 5"):
        list(convergence._random_batches(Split(), 5, 5, 0))


def test_each_look_of_the_overview_stands_above_its_evaluation() -> None:
    rng = np.random.default_rng(0)
    looks = {k: ([rng.random((8, 16, 4)), rng.random((1, 1, 6))], rng.random((3, 16, 32))) for k in (2, 4, 8)}
    photo, truth, curve = rng.random((16, 32, 3)), np.zeros((16, 32), np.uint8), [0.5**k for k in range(9)]
    drawn = figures.overview(photo, truth, looks, {"broyden": curve}, "abc", np.eye(3, dtype=np.uint8))
    columns = {axes.get_title("left"): axes.get_window_extent().get_points()[:, 0].mean() for axes in drawn.axes}
    for evaluation in looks:
        dot = drawn.axes[-1].transData.transform((evaluation, curve[evaluation - 1]))
        assert dot[0] == pytest.approx(columns[f"z after {evaluation} evaluations"], abs=0.5)


def test_z_is_coloured_alike_wherever_it_is_alike() -> None:
    """Two maps with one value each side: the principal direction tells them apart, whatever the scale of z."""
    z = np.zeros((4, 6, 5))
    z[:, 3:] = [1, 2, 0, -1, 3]
    for factor in (1e-3, 1e3):
        colour = figures.coloured(factor * z, figures.principal(factor * z))
        assert np.allclose(colour[:, :3], colour[0, 0]) and np.allclose(colour[:, 3:], colour[0, 3])
        assert abs(colour[0, 0] - colour[0, 3]).max() > 0.5
