"""The training loop on small problems: exact resume, determinism, and failures with a way out."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import Killed, Stripes, Watcher, network, same, untimed

from mdeq import Prediction, Scales
from mdeq.losses import classification_loss
from pipeline.data.loading import Keys, order
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Adam, JacobianTerm, Muon, Recipe, Sgd, WarmStart, WarmUp
from pipeline.train.checkpoints import RunState
from pipeline.train.loop import Row, Run, Task, evaluate_split
from pipeline.train.metrics import TopK
from pipeline.train.optimizers import FINAL, make_optimizer, orthogonalised, schedule

RECIPE = Recipe(
    optimizer=Adam(lr=1e-2),
    epochs=2,
    batch=8,
    warm_up=WarmUp(layers=2, steps=2),
    jacobian=JacobianTerm(weight=0.5, probability=0.5),
    log_every=1,
)
AIDED = Recipe(
    optimizer=Muon(lr=0.01, weight_decay=0.01, rest=Sgd(lr=0.05, nesterov=True)),
    epochs=3,
    batch=8,
    jacobian=JacobianTerm(weight=0.5, probability=0.5),
    warm_start=WarmStart(steps=(1, 0)),
    average=0.9,
    lr_warm_up=0.2,
    log_every=1,
)
PLAIN = Recipe(optimizer=Sgd(lr=0.05, nesterov=True), epochs=1, batch=8)
OFTEN = 1e-9  # minutes between saves: one after every update
TASK = Task(Stripes(40), Stripes(20), classification_loss, lambda: TopK(2))


def state(folder: Path) -> RunState:
    return RunState(folder, {}, "seed-3")


def run(
    store: RunState,
    watcher: Watcher | None = None,
    recipe: Recipe = RECIPE,
    task: Task = TASK,
    model: nn.Module | None = None,
    workers: int = 0,
) -> tuple[dict[str, torch.Tensor], list[Row]]:
    """The weights and the history of a training."""
    model, watcher = model or network(), watcher or Watcher()
    history = Run(model, task, recipe, 3, "cpu", workers, store, watcher).train()
    return model.state_dict(), history


def resumed_after_a_kill(
    folder: Path, stop: int, recipe: Recipe, task: Task = TASK, then: Recipe | None = None
) -> tuple[dict[str, torch.Tensor], list[Row], Watcher]:
    """The end of a training that was killed after step `stop`, and what a watcher then saw."""
    with pytest.raises(Killed):
        run(state(folder), Watcher(stop), recipe, task)
    return *run(state(folder), watcher := Watcher(), then or recipe, task), watcher


# resume


@pytest.mark.parametrize(
    ("recipe", "minutes", "stop"),
    [(RECIPE, OFTEN, 3), (RECIPE, OFTEN, 5), (RECIPE, 99, 8), (AIDED, OFTEN, 7), (AIDED, 99, 13)],
    ids=["in an epoch", "at its end", "rarely saved", "aided", "aided, rarely saved"],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, recipe: Recipe, minutes: float, stop: int
) -> None:
    """Epochs have five updates; saved after each update or each epoch, then killed."""
    recipe = replace(recipe, checkpoint_minutes=minutes)
    whole, history = run(state(tmp_path / "a"), straight := Watcher(), recipe)
    resumed, again, watcher = resumed_after_a_kill(tmp_path / "b", stop, recipe)
    assert same(whole, resumed)
    assert [untimed(row) for row in history] == [untimed(row) for row in again]
    rows = [(step, untimed(row)) for step, row in straight.rows]
    assert [(step, untimed(row)) for step, row in watcher.rows] == rows[-len(watcher.rows) :]
    assert watcher.steps[0] == 1 + (stop - 1 if minutes == OFTEN else 5 * ((stop - 1) // 5))
    assert not list(tmp_path.rglob("*.bin"))


def test_equilibria_that_are_lost_are_found_again_from_zero(tmp_path: Path) -> None:
    """Lost inside the second epoch: that one and the third start at zero, later ones warm."""
    recipe = replace(AIDED, epochs=5, checkpoint_minutes=OFTEN, warm_start=WarmStart((2,)))
    with pytest.raises(Killed):
        run(state(tmp_path), Watcher(stop=8), recipe)
    for path in tmp_path.rglob("*.bin"):
        path.unlink()
    *_, watcher = resumed_after_a_kill(tmp_path, 9, recipe)  # and once more, one update later
    nfe = [row["solver/nfe"] for _, row in watcher.rows if "solver/backward_nfe" in row]
    assert nfe == [5] * 7 + [3] * 10  # a solver of T steps makes T + 1 evaluations


def test_a_warm_start_is_the_samples_own_equilibrium_of_the_epoch_before(tmp_path: Path) -> None:
    model, calls = network(), []

    def note(module, inputs, arguments, output):  # noqa: ANN001, ANN202
        calls.append((arguments.get("z0"), output.equilibrium.scales))

    model.register_forward_hook(note, with_kwargs=True)
    recipe = replace(PLAIN, epochs=2, warm_start=WarmStart((2,)))
    few = replace(TASK, train=Stripes(24), validation=Stripes(4))
    run(state(tmp_path), recipe=recipe, task=few, model=model)
    scales = Scales.of((8, 8), 8, 8)
    trained = [call for call in calls if len(call[1][0]) == 8]  # a validation has 4 images
    found = torch.cat([scales.flatten(z).detach() for _, z in trained[:3]])
    starts = torch.cat([z0 for z0, _ in trained[3:]])
    assert all(z0 is None for z0, _ in trained[:3]) and len(trained) == 6
    expected = torch.empty_like(found)
    expected[order(24, 3, 0)] = found
    torch.testing.assert_close(starts, expected[order(24, 3, 1)], rtol=2**-8, atol=0)  # bfloat16


class Dying(Stripes):
    """Its loader process is killed, as by a machine without memory."""

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        if 13 in keys.indices and keys.epoch == 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(keys)


def test_loader_processes_change_nothing_even_if_one_is_killed(tmp_path: Path) -> None:
    whole, _ = run(state(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run(state(tmp_path / "b"), workers=1, task=replace(TASK, train=Dying(40)))
    resumed, _ = run(state(tmp_path / "b"), watcher := Watcher(), workers=2)
    assert watcher.steps[0] == 6 and same(whole, resumed)


class Signalled(Watcher):
    """Gets a signal at step 3, or amid the first validation."""

    def __init__(self, number: int, validating: bool) -> None:
        super().__init__()
        self.number, self.amid_validation = number, validating

    def step(self, step: int, total: int, values: Row) -> None:
        super().step(step, total, values)
        if step == 3 and not self.amid_validation:
            os.kill(os.getpid(), self.number)

    def validating(self, batches):  # noqa: ANN001, ANN201
        for batch in batches:
            os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize(
    ("number", "code", "validating", "kept"),
    [
        (signal.SIGINT, 130, False, 4),
        (signal.SIGTERM, 143, False, 4),
        (signal.SIGTERM, 143, True, 5),
    ],
)
def test_a_signal_saves_and_says_how_much_is_kept(
    tmp_path: Path, number: int, code: int, validating: bool, kept: int
) -> None:
    whole, _ = run(state(tmp_path / "a"))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(state(tmp_path / "b"), Signalled(number, validating))
    assert stopped.value.code == code and signal.getsignal(number) is before
    assert f"{kept} of 10 updates are saved" in stopped.value.message
    resumed, _ = run(state(tmp_path / "b"), watcher := Watcher())
    assert watcher.steps[0] == kept + 1 and same(whole, resumed)


# what is learnt


def test_it_learns_and_the_warm_up_is_validated_both_ways(tmp_path: Path) -> None:
    recipe = replace(PLAIN, epochs=4, warm_up=WarmUp(2, 5, softplus=10.0))
    _, history = run(state(tmp_path), recipe=recipe)
    assert history[-1]["eval/top1"] > 90 and history[-1]["solver/nfe"] == 5
    assert "eval/top1_unrolled" in history[0] and "eval/top1_unrolled" not in history[1]


def test_all_aids_together_learn_and_what_remains_was_validated(tmp_path: Path) -> None:
    model = network()
    recipe = replace(AIDED, epochs=6, average=0.8)
    _, history = run(state(tmp_path), recipe=recipe, model=model)
    assert history[-1]["eval/top1"] > 90
    row = evaluate_split(model, TASK.validation, TopK(2), batch=8, device="cpu")
    assert row["solver/relative_residual"] == history[-1]["solver/relative_residual"]


def test_an_exponential_average_of_the_weights_is_what_remains(tmp_path: Path) -> None:
    """a_1 = w_1 and a_n = d a_(n-1) + (1 - d) w_n, by a recurrence of our own."""
    weights = []
    key = next(name for name, _ in network().named_parameters() if name.startswith("head."))

    class Collecting(RunState):
        def save(self, state: dict) -> None:
            super().save(state)
            weights.append(state["model"][key].clone())

    recipe = replace(PLAIN, average=0.75, checkpoint_minutes=OFTEN)
    ended, _ = run(Collecting(tmp_path, {}, "seed-3"), recipe=recipe)
    expected = weights[0]
    for weight in weights[1:5]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(ended[key], expected)


def test_explicit_models_train_in_the_same_loop(tmp_path: Path) -> None:
    class Linear(nn.Linear):
        def forward(self, image: torch.Tensor) -> Prediction:
            return Prediction(super().forward(image.flatten(1)), None)

    model = Linear(192, 2)
    run(state(tmp_path), recipe=Recipe(optimizer=Adam(lr=1e-2), epochs=3, batch=8), model=model)
    row = evaluate_split(model, Stripes(20), TopK(2), batch=7, device="cpu")
    assert row["eval/top1"] > 90 and not any(name.startswith("solver/") for name in row)
    with pytest.raises(UserError, match="muon trains the f of an mdeq"):
        make_optimizer(model, Muon())


def test_no_epochs_only_validate(tmp_path: Path) -> None:
    weights, [row] = run(state(tmp_path), recipe=Recipe(optimizer=Adam(), epochs=0, batch=8))
    assert row["step"] == row["epoch"] == 0 and "eval/top1" in row
    assert same(weights, network().state_dict())


def test_a_validation_sees_every_sample_and_its_solve() -> None:
    model, seen = network().eval(), []
    note: Any = lambda *batch: seen.append(batch)  # noqa: E731
    row = evaluate_split(model, Stripes(20), TopK(2), batch=7, device="cpu", on_batch=note)
    images, targets = Stripes(20)[Keys(0, list(range(20)))]
    with torch.no_grad():
        prediction = model(images)
    relative = prediction.equilibrium.solution.relative
    found = row["solver/relative_residual"], row["solver/relative_residual_max"]
    assert found == pytest.approx((float(relative.mean()), float(relative.max())), rel=1e-4)
    assert torch.equal(torch.cat([targets for _, targets, _ in seen]), targets)
    torch.testing.assert_close(torch.cat([logits for logits, _, _ in seen]), prediction.logits)


# schedules and optimizers


def test_the_jacobian_terms_weight_follows_the_published_schedule() -> None:
    """ImageNet: 0.03 in the 510,000 updates of the warm-up, then 2.5 and 0.1 more every 50,000."""
    term = JacobianTerm(2.5, warm_up_weight=0.03, increase=0.1, increase_every=50_000)
    steps = (509_999, 510_000, 559_999, 560_000, 1_000_899)
    weights = [term.weight_at(step, 0, 510_000) for step in steps]
    assert weights == pytest.approx([0.03, 2.5, 2.5, 2.6, 3.4])
    term = JacobianTerm(0.4, stop_epoch=90)  # CIFAR-10 stops
    assert [term.weight_at(10**6, epoch, 16_000) for epoch in (0, 89, 90)] == [0.4, 0.4, 0]


@pytest.mark.parametrize(
    ("term", "later"),
    [
        (JacobianTerm(0.5, increase=1.0), JacobianTerm(1.5)),
        (JacobianTerm(0.5, stop_epoch=1), None),
        (JacobianTerm(0.5, warm_up_weight=2.0), JacobianTerm(0.5)),
    ],
)
def test_the_jacobian_terms_schedule_is_trained_with(
    tmp_path: Path, term: JacobianTerm, later: JacobianTerm | None
) -> None:
    """The same weights as if the second of two updates, each an epoch, had the other term."""
    warm_up = WarmUp(2, 1) if term.warm_up_weight else None
    recipe = replace(PLAIN, epochs=2, batch=40, warm_up=warm_up, jacobian=term, log_every=1)
    whole, _ = run(state(tmp_path / "a"), watcher := Watcher(), recipe)
    logged = [step for step, values in watcher.rows if "solver/jacobian" in values]
    assert logged == ([1] if term.stop_epoch else [1, 2])
    other = replace(recipe, jacobian=later)
    assert same(whole, resumed_after_a_kill(tmp_path / "b", 2, recipe, then=other)[0])


def test_the_learning_rate_rises_and_falls() -> None:
    assert schedule(0, 10, 0.0) == 1 and schedule(10, 10, 0.0) == pytest.approx(FINAL)
    assert schedule(5, 10, 0.0) == schedule(6, 10, 0.2) == pytest.approx((1 + FINAL) / 2)
    assert [schedule(step, 10, 0.2) for step in (0, 1, 2)] == pytest.approx([0.5, 1, 1])


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    one, other = order(18, 1, 5).tolist(), order(18, 1, 6).tolist()
    assert sorted(one) == sorted(other) == list(range(18)) and one != other


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8)])
def test_muon_orthogonalises(shape: tuple[int, int]) -> None:
    """The singular vectors stay, the singular values come near 1 (Jordan et al., 2024)."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalised(matrix) @ v.T
    values = core.diagonal()
    assert 0.3 < values.min() and values.max() < 1.3
    torch.testing.assert_close(core, torch.diag(values), atol=1e-6, rtol=0)


def test_muon_is_torchs_own_on_matrices() -> None:
    """Against `torch.optim.Muon`, which takes matrices alone and orthogonalises in bfloat16."""
    model = network()
    settings = Muon(lr=0.02, momentum=0.9, weight_decay=0.1, rest=Sgd(lr=0.1, momentum=0.0))
    ours = make_optimizer(model, settings)
    matrices = ours.param_groups[0]["params"]
    assert len(matrices) > 4 and all(p.ndim == 4 for p in matrices)
    assert sum(len(g["params"]) for g in ours.param_groups) == len(list(model.parameters()))
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
    theirs = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, momentum=0.9)
    torch.manual_seed(0)
    for _ in range(3):
        for mine, other in zip(matrices, flat, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    for mine, other in zip(matrices, flat, strict=True):
        torch.testing.assert_close(mine.flatten(1), other, atol=2e-3, rtol=0.02)


# half precision


def test_half_precision_learns_and_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    """1e7 times the loss overflows float16 at the first loss scale, which must come down."""
    steep = replace(TASK, loss=lambda *batch: 1e7 * classification_loss(*batch))
    recipe = replace(RECIPE, precision="float16", optimizer=Adam(lr=1e-3))
    whole, _ = run(state(tmp_path / "a"), straight := Watcher(), recipe, steep)
    assert same(whole, resumed_after_a_kill(tmp_path / "b", 7, recipe, steep)[0])
    scales = [row["loss/scale"] for _, row in straight.rows if "loss/scale" in row]
    assert scales[-1] < scales[5] < 2**16
    for precision in ("float16", "bfloat16"):
        gentle = replace(recipe, precision=precision, epochs=3, optimizer=PLAIN.optimizer)
        _, history = run(state(tmp_path / precision), recipe=gentle)
        assert history[-1]["eval/top1"] > 90, precision


# failures


class Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001, ANN205
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):  # noqa: ANN001, ANN002, ANN205
        return gradients[0] * math.inf


def raising(error: Exception) -> Any:
    def spoil(loss: torch.Tensor) -> None:
        raise error

    return spoil


class Spoiled(Stripes):
    """One sample is not finite."""

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = super().__getitem__(keys)
        images[[index == 13 for index in keys.indices]] = math.inf
        return images, targets


STEP_7 = r" at step 7 \(epoch 2, in a batch with stripes \d+, .*no weight has changed.*"
MEMORY = f"out of memory{STEP_7}lower batch"
BATCH_NORM = ValueError("Expected more than 1 value per channel when training, got [1, 8, 1, 1]")


@pytest.mark.parametrize(
    ("data", "spoil", "message"),
    [
        (Stripes, lambda loss: loss * math.nan, f"the loss is nan{STEP_7}lower optimizer.lr"),
        (Stripes, Poison.apply, f"the gradient's norm is (nan|inf){STEP_7}"),
        (Stripes, lambda loss: loss + torch.empty(2**50).sum(), MEMORY),
        (Stripes, raising(torch.OutOfMemoryError("CUDA: tried to allocate 20.00 GiB")), MEMORY),
        (Stripes, raising(BATCH_NORM), f"batch norm cannot train on one image{STEP_7}limit"),
        (Spoiled, None, r"the loss is nan at step \d \(epoch 1, of stripes 13\); no weight"),
    ],
    ids=["loss", "gradient", "memory", "gpu memory", "batch norm", "sample"],
)
def test_a_failure_is_explained_and_spoils_no_weight(
    tmp_path: Path, data: type[Stripes], spoil: Any, message: str
) -> None:
    """The run then resumes from its last state to the same weights, once the cause is gone."""
    steps = []

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        value = classification_loss(logits, targets)
        return spoil(value) if spoil and len(steps) == 8 else value

    whole, _ = run(state(tmp_path / "a"))
    model = network()
    broken = replace(TASK, train=data(40), loss=loss)
    with pytest.raises(UserError, match=message):
        run(state(tmp_path / "b"), task=broken, model=model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert same(whole, run(state(tmp_path / "b"))[0])


def test_a_gradient_that_no_scale_of_the_loss_makes_finite_is_reported(tmp_path: Path) -> None:
    """The scale of float16 begins at 2^16 and is halved until it is below 2^-24, by update 40."""
    model, before = network(), network()
    broken = replace(TASK, loss=lambda *batch: Poison.apply(classification_loss(*batch)))
    recipe = replace(PLAIN, precision="float16", epochs=20)
    with pytest.raises(UserError, match=r"at any scale of the loss at step 41 \(epoch 9, in a"):
        run(state(tmp_path), recipe=recipe, task=broken, model=model)
    assert same(dict(before.named_parameters()), dict(model.named_parameters()))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run(state(tmp_path))
    saved = state(tmp_path).load()
    assert saved is not None
    others = [{"model": {}}, {"model": 3}, {"state": {"unknown": 2}}, {"optimizer": {"state": {}}}]
    for spoilt in ({}, *(saved | other for other in others)):
        state(tmp_path).save(spoilt)
        with pytest.raises(UserError, match=r"seed-3.pt: not the state .*delete .*and rerun"):
            run(state(tmp_path))
