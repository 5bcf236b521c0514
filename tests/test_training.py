"""The training loop on small problems: exact resume, determinism, and failures with a way out."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import Killed, Stripes, Watcher, network, same, untimed

from mdeq import Prediction, Scales
from mdeq.losses import classification_loss
from pipeline.data.loading import Keys, batches, order
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Adam, JacobianTerm, Muon, Recipe, Sgd, WarmStart, WarmUp
from pipeline.train.checkpoints import RunState
from pipeline.train.loop import Row, Task, evaluate_split, train
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
OFTEN = 1e-9  # minutes between saves: one after every update


def task() -> Task:
    return Task(Stripes(40), Stripes(20), classification_loss, lambda: TopK(2))


def state(folder: Path) -> RunState:
    return RunState(folder, {}, "seed-3")


def run(
    store: RunState, watcher: Watcher | None = None, recipe: Recipe = RECIPE, **changes: object
) -> tuple[dict[str, torch.Tensor], list[Row]]:
    """The weights and the history of a training."""
    model = network()
    arguments = {"seed": 3, "device": "cpu", "workers": 0, "store": store} | changes
    toy = arguments.pop("task", None) or task()
    history = train(model, toy, recipe, observer=watcher or Watcher(), **arguments)  # type: ignore[arg-type]
    return model.state_dict(), history


# resume


@pytest.mark.parametrize(
    ("recipe", "minutes", "stop"),
    [
        (RECIPE, OFTEN, 3),
        (RECIPE, OFTEN, 5),
        (RECIPE, 99.0, 8),
        (AIDED, OFTEN, 7),
        (AIDED, 99.0, 13),
    ],
    ids=["in an epoch", "at its end", "rarely saved", "aided", "aided, rarely saved"],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, recipe: Recipe, minutes: float, stop: int
) -> None:
    """Epochs have five updates; saved after each update or each epoch, then killed."""
    recipe = replace(recipe, checkpoint_minutes=minutes)
    whole, history = run(state(tmp_path / "a"), straight := Watcher(), recipe)
    with pytest.raises(Killed):
        run(state(tmp_path / "b"), Watcher(stop), recipe)
    resumed, again = run(state(tmp_path / "b"), watcher := Watcher(), recipe)
    assert same(whole, resumed)
    assert [untimed(row) for row in history] == [untimed(row) for row in again]
    rows = [(step, untimed(row)) for step, row in straight.rows]
    assert [(step, untimed(row)) for step, row in watcher.rows] == rows[-len(watcher.rows) :]
    kept = stop - 1 if minutes == OFTEN else 5 * ((stop - 1) // 5)
    assert watcher.steps[0] == kept + 1
    assert not list(tmp_path.rglob("*.bin"))


def test_equilibria_that_are_lost_are_found_again_from_zero(tmp_path: Path) -> None:
    """Lost inside the second epoch: that one and the third start at zero, later ones warm."""
    recipe = replace(AIDED, epochs=5, checkpoint_minutes=OFTEN, warm_start=WarmStart((2,)))
    with pytest.raises(Killed):
        run(state(tmp_path), Watcher(stop=8), recipe)
    for path in tmp_path.rglob("*.bin"):
        path.unlink()
    run(state(tmp_path), watcher := Watcher(), recipe)
    nfe = {
        step: row["solver/nfe"]
        for step, row in watcher.rows
        if "lr" in row and "eval/top1" not in row
    }
    cold, warm = 5, 3  # a solver of T steps makes T + 1 evaluations
    assert [nfe[step] for step in range(8, 16)] == [cold] * 8
    assert [nfe[step] for step in range(16, 26)] == [warm] * 10


def test_a_warm_start_is_the_samples_own_equilibrium_of_the_epoch_before(tmp_path: Path) -> None:
    model, calls = network(), []

    def note(module, inputs, arguments, output):  # noqa: ANN001, ANN202
        calls.append((arguments.get("z0"), output.equilibrium.scales))

    model.register_forward_hook(note, with_kwargs=True)
    recipe = Recipe(optimizer=Sgd(lr=0.05), epochs=2, batch=8, warm_start=WarmStart((2,)))
    train(
        model, Task(Stripes(24), Stripes(4), classification_loss, lambda: TopK(2)), recipe,
        seed=3, device="cpu", workers=0, store=state(tmp_path), observer=Watcher(),
    )  # fmt: skip
    scales = Scales.of((8, 8), 8, 8)
    trained = [call for call in calls if len(call[1][0]) == 8]  # a validation has 4 images
    found = torch.cat([scales.flatten(z).detach() for _, z in trained[:3]])
    starts = torch.cat([z0 for z0, _ in trained[3:]])
    assert all(z0 is None for z0, _ in trained[:3]) and len(trained) == 6
    expected = torch.empty_like(found)
    expected[order(24, 3, 0)] = found
    torch.testing.assert_close(starts, expected[order(24, 3, 1)], rtol=2**-8, atol=0)  # bfloat16


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone, _ = run(state(tmp_path / "a"))
    helped, _ = run(state(tmp_path / "b"), workers=2)
    assert same(alone, helped)


class Dying(Stripes):
    """Its loader process is killed, as by a machine without memory."""

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        if 13 in keys.indices and keys.epoch == 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(keys)


def test_a_killed_loader_process_changes_nothing(tmp_path: Path) -> None:
    whole, _ = run(state(tmp_path / "a"))
    dying = replace(task(), train=Dying(40))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run(state(tmp_path / "b"), workers=1, task=dying)
    resumed, _ = run(state(tmp_path / "b"), watcher := Watcher())
    assert watcher.steps[0] == 6 and same(whole, resumed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_tells_how_much_is_kept(tmp_path: Path, number: int, code: int) -> None:
    class Signals(Watcher):
        def step(self, step: int, total: int, values: Row) -> None:
            super().step(step, total, values)
            if step == 3:
                os.kill(os.getpid(), number)

    whole, _ = run(state(tmp_path / "a"))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(state(tmp_path / "b"), Signals())
    assert stopped.value.code == code and signal.getsignal(number) is before
    assert "4 of 10 updates are saved" in stopped.value.message
    resumed, _ = run(state(tmp_path / "b"), watcher := Watcher())
    assert watcher.steps[0] == 5 and same(whole, resumed)


def test_a_signal_amid_a_validation_stops_there(tmp_path: Path) -> None:
    class Signals(Watcher):
        def validating(self, batches):  # noqa: ANN001, ANN202
            for batch in batches:
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    with pytest.raises(Stopped, match="143"):
        run(state(tmp_path), Signals())
    saved = state(tmp_path).load()
    assert saved is not None and saved["state"]["step"] == 5 and saved["state"]["epoch"] == 0


# what is learnt


def test_it_learns_and_the_warm_up_is_validated_both_ways(tmp_path: Path) -> None:
    recipe = Recipe(
        optimizer=Sgd(lr=0.05, nesterov=True),
        epochs=4,
        batch=8,
        warm_up=WarmUp(2, 5, softplus=10.0),
    )
    _, history = run(state(tmp_path), recipe=recipe)
    assert history[-1]["eval/top1"] > 90
    assert "eval/top1_unrolled" in history[0] and "eval/top1_unrolled" not in history[1]
    assert history[-1]["solver/nfe"] == 5


def test_all_aids_together_learn_and_the_average_is_what_remains(tmp_path: Path) -> None:
    recipe = replace(AIDED, epochs=6, average=0.8)
    weights, history = run(state(tmp_path), recipe=recipe)
    assert history[-1]["eval/top1"] > 90
    saved = state(tmp_path).load()
    assert saved is not None
    averaged = {
        name.removeprefix("module."): value
        for name, value in saved["averaged"].items()
        if name != "n_averaged"
    }
    assert same(weights, averaged) and not same(weights, saved["model"])
    model = network()
    model.load_state_dict(weights)
    row = evaluate_split(model, Stripes(20), TopK(2), batch=8, device="cpu")
    assert row["solver/relative_residual"] == history[-1]["solver/relative_residual"]


def test_the_average_is_an_exponential_one(tmp_path: Path) -> None:
    """a_1 = w_1 and a_n = d a_(n-1) + (1 - d) w_n, by a recurrence of our own."""
    recipe = Recipe(
        optimizer=Sgd(lr=0.05), epochs=1, batch=8, average=0.75, checkpoint_minutes=OFTEN
    )
    weights = []
    key = next(name for name, _ in network().named_parameters() if name.startswith("head."))

    class Collecting(RunState):
        def save(self, state: dict) -> None:
            super().save(state)
            weights.append(state["model"][key].clone())

    store = Collecting(tmp_path, {}, "seed-3")
    ended, _ = run(store, recipe=recipe)
    expected = weights[0]
    for weight in weights[1:5]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(ended[key], expected)


def test_explicit_models_train_in_the_same_loop(tmp_path: Path) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 2)

        def forward(self, image: torch.Tensor) -> Prediction:
            return Prediction(self.layer(image.flatten(1)), None)

    model = Linear()
    recipe = Recipe(optimizer=Adam(lr=1e-2), epochs=3, batch=8)
    train(
        model, task(), recipe,
        seed=0, device="cpu", workers=0, store=state(tmp_path), observer=Watcher(),
    )  # fmt: skip
    row = evaluate_split(model, Stripes(20), TopK(2), batch=7, device="cpu")
    assert row["eval/top1"] > 90 and not any(name.startswith("solver/") for name in row)
    with pytest.raises(UserError, match="muon trains the f of an mdeq"):
        make_optimizer(model, Muon())


def test_no_epochs_only_validate(tmp_path: Path) -> None:
    before = network().state_dict()
    weights, [row] = run(state(tmp_path), recipe=Recipe(optimizer=Adam(), epochs=0, batch=8))
    assert row["step"] == row["epoch"] == 0 and "eval/top1" in row and same(before, weights)


def test_a_validation_reads_the_solver_per_sample() -> None:
    model, seen = network().eval(), []
    row = evaluate_split(
        model,
        Stripes(20),
        TopK(2),
        batch=7,
        device="cpu",
        on_batch=lambda *batch: seen.append(batch),
    )
    images, targets = Stripes(20)[Keys(0, list(range(20)))]
    with torch.no_grad():
        prediction = model(images)
    solution = prediction.equilibrium.solution
    assert row["solver/relative_residual"] == pytest.approx(
        float(solution.relative.mean()), rel=1e-4
    )
    assert row["solver/relative_residual_max"] == pytest.approx(
        float(solution.relative.max()), rel=1e-4
    )
    for k in (2, 4):
        expected = float(solution.trace[k - 1].mean())
        assert row[f"solver/residual_after_{k}"] == pytest.approx(expected, rel=1e-4)
    assert "solver/residual_after_8" not in row
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
    ("term", "in_the_second_epoch"),
    [
        (JacobianTerm(0.5, increase=1.0), JacobianTerm(1.5)),
        (JacobianTerm(0.5, stop_epoch=1), None),
        (JacobianTerm(0.5, warm_up_weight=2.0), JacobianTerm(0.5)),
    ],
)
def test_the_jacobian_terms_schedule_is_trained_with(
    tmp_path: Path, term: JacobianTerm, in_the_second_epoch: JacobianTerm | None
) -> None:
    """The same weights as if the second of two updates, each an epoch, had the other term."""

    def recipe(jacobian: JacobianTerm | None) -> Recipe:
        warm_up = WarmUp(2, 1) if term.warm_up_weight else None
        optimizer = Sgd(lr=0.1)
        return Recipe(
            optimizer=optimizer, epochs=2, batch=40, warm_up=warm_up, jacobian=jacobian, log_every=1
        )

    whole, _ = run(state(tmp_path / "a"), watcher := Watcher(), recipe(term))
    logged = [step for step, values in watcher.rows if "solver/jacobian" in values]
    assert logged == ([1] if term.stop_epoch else [1, 2])
    with pytest.raises(Killed):
        run(state(tmp_path / "b"), Watcher(stop=2), recipe(term))
    resumed, _ = run(state(tmp_path / "b"), recipe=recipe(in_the_second_epoch))
    assert same(whole, resumed)


def test_order_and_learning_rate() -> None:
    keys = [
        k
        for start in (0, 2)
        for k in batches(_Echo(), 4, seed=1, epoch=5, shuffle=True, start=start)
    ]
    assert keys[2:5] == keys[5:] and sorted(i for k in keys[:5] for i in k.indices) == list(
        range(18)
    )
    other = list(batches(_Echo(), 4, seed=1, epoch=6, shuffle=True))
    assert other[0].indices != keys[0].indices
    assert schedule(0, 10, 0.0) == 1 and schedule(10, 10, 0.0) == pytest.approx(FINAL)
    assert schedule(5, 10, 0.0) == pytest.approx((1 + FINAL) / 2)
    assert [schedule(step, 10, 0.2) for step in (0, 1, 2)] == pytest.approx([0.5, 1, 1])
    assert schedule(6, 10, 0.2) == pytest.approx((1 + FINAL) / 2)


class _Echo:
    classes = 1

    def __len__(self) -> int:
        return 18

    def __getitem__(self, keys: Keys) -> Keys:
        return keys


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8)])
def test_muon_orthogonalises(shape: tuple[int, int]) -> None:
    """The singular vectors stay, the singular values come near 1 (Jordan et al., 2024)."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonalised(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ found @ v.T
    values = core.diagonal()
    assert 0.3 < values.min() and values.max() < 1.3
    torch.testing.assert_close(core, torch.diag(values), atol=1e-6, rtol=0)


def test_muon_is_torchs_own_on_matrices() -> None:
    """Against `torch.optim.Muon`, which takes matrices alone and orthogonalises in bfloat16."""
    reference = getattr(torch.optim, "Muon", None)
    if reference is None:
        pytest.skip("this torch has no Muon")
    model = network()
    settings = Muon(lr=0.02, momentum=0.9, weight_decay=0.1, rest=Sgd(lr=0.1, momentum=0.0))
    ours = make_optimizer(model, settings)
    matrices = ours.param_groups[0]["params"]
    assert len(matrices) > 4 and all(p.ndim == 4 for p in matrices)
    assert sum(len(g["params"]) for g in ours.param_groups) == len(list(model.parameters()))
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
    theirs = reference(flat, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original")
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
    steep = replace(task(), loss=lambda logits, targets: 1e7 * classification_loss(logits, targets))
    recipe = replace(RECIPE, precision="float16", optimizer=Adam(lr=1e-3))
    whole, _ = run(state(tmp_path / "a"), recipe=recipe, task=steep)
    with pytest.raises(Killed):
        run(state(tmp_path / "b"), Watcher(stop=7), recipe, task=steep)
    half = state(tmp_path / "b").load()
    resumed, _ = run(state(tmp_path / "b"), recipe=recipe, task=steep)
    end = state(tmp_path / "b").load()
    assert half is not None and end is not None and same(whole, resumed)
    assert end["scaler"]["scale"] < half["scaler"]["scale"] < 2**16
    for precision in ("float16", "bfloat16"):
        optimizer = Sgd(lr=0.05, nesterov=True)
        gentle = replace(recipe, precision=precision, epochs=3, optimizer=optimizer)
        _, history = run(state(tmp_path / precision), recipe=gentle)
        assert history[-1]["eval/top1"] > 90, precision


def test_a_gradient_that_no_scale_of_the_loss_makes_finite_is_reported(tmp_path: Path) -> None:
    model, before = network(), network().state_dict()
    broken = replace(task(), loss=lambda *batch: _Poison.apply(classification_loss(*batch)))
    recipe = replace(RECIPE, precision="float16", epochs=20, jacobian=None)
    message = r"not finite at any scale of the loss at step 40 \(epoch 9, in a batch"
    with pytest.raises(UserError, match=message):
        train(
            model, broken, recipe,
            seed=3, device="cpu", workers=0, store=state(tmp_path), observer=Watcher(),
        )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


# failures


class _Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001, ANN205
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):  # noqa: ANN001, ANN002, ANN205
        return gradients[0] * math.inf


def out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA: tried to allocate 20.00 GiB")


class Spoiled(Stripes):
    """One sample is not finite."""

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = super().__getitem__(keys)
        images[[index == 13 for index in keys.indices]] = math.inf
        return images, targets


MEMORY = "out of memory at step 7 .*; lower batch"


@pytest.mark.parametrize(
    ("data", "spoil", "message"),
    [
        (
            Stripes(40),
            lambda loss: loss * math.nan,
            r"the loss is nan at step 7 \(epoch 2, in a batch with stripes \d+, ",
        ),
        (
            Stripes(40),
            _Poison.apply,
            r"the gradient's norm is (nan|inf) at step 7 \(epoch 2, in a batch with stripes ",
        ),
        (Stripes(40), lambda loss: loss + torch.empty(2**50).sum(), MEMORY),
        (Stripes(40), lambda loss: out_of_gpu_memory(), MEMORY),
        (
            Spoiled(40),
            lambda loss: loss,
            r"the loss is nan at step \d \(epoch 1, of stripes 13\); no weight",
        ),
    ],
    ids=["loss", "gradient", "memory", "gpu memory", "sample"],
)
def test_a_failure_is_explained_and_spoils_no_weight(tmp_path, data, spoil, message) -> None:  # noqa: ANN001
    """The run then resumes from its last state to the same weights, once the cause is gone."""
    steps = []

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        value = classification_loss(logits, targets)
        return spoil(value) if len(steps) == 8 else value

    whole, _ = run(state(tmp_path / "a"))
    model = network()
    broken = Task(data, Stripes(20), loss, lambda: TopK(2))
    with pytest.raises(UserError, match=message):
        train(
            model, broken, RECIPE,
            seed=3, device="cpu", workers=0, store=state(tmp_path / "b"), observer=Watcher(),
        )  # fmt: skip
    assert all(p.isfinite().all() for p in model.parameters())
    resumed, _ = run(state(tmp_path / "b"))
    assert same(whole, resumed)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run(state(tmp_path))
    saved = state(tmp_path).load()
    assert saved is not None
    for spoilt in (
        {k: v for k, v in saved.items() if k != "model"},
        saved | {"state": {"epoch": 1, "unknown": 2}},
        saved | {"optimizer": {"state": {}, "param_groups": []}},
        saved | {"model": {}},
        saved | {"model": 3},
        {},
    ):
        state(tmp_path).save(spoilt)
        with pytest.raises(
            UserError, match=r"seed-3.pt: not the state .*delete .*seed-3.pt and rerun"
        ):
            run(state(tmp_path))
