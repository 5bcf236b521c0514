"""The training loop on small problems: resume is bit-exact, randomness is a function of its keys, failure is told."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mdeq import Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network, Prediction
from mdeq.losses import IGNORE, HardExamples, classification_loss, segmentation_loss
from pipeline.checkpoints import RunState
from pipeline.data.loading import Keys, batches, draw
from pipeline.metrics import TopK
from pipeline.progress import PATIENCE, Progress
from pipeline.recipe import FINAL_LR, Adam, JacobianTerm, Recipe, Sgd, WarmUp, cosine
from pipeline.tracking import NullTracker
from pipeline.training import Task, TrainingError, evaluate, train

RECIPE = Recipe(
    optimizer=Adam(lr=1e-2),
    epochs=2,
    batch=8,
    warm_up=WarmUp(layers=2, steps=2),
    jacobian=JacobianTerm(weight=0.5, probability=0.5),
    log_every=1,
)


class Stripes:
    """8x8 images whose class is the direction of their stripes; noise is drawn anew each epoch, as augmentation is."""

    classes = 2

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"stripes {index}"

    def __getitem__(self, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros(len(keys.indices), 3, 8, 8)
        targets = torch.tensor(keys.indices) % 2
        for image, target, index in zip(images, targets, keys.indices, strict=True):
            image += torch.from_numpy(draw(0, keys.epoch, index).normal(0, 0.3, (3, 8, 8))).float()
            (image if target else image.transpose(1, 2))[:, ::2] += 1
        return images, targets


class Store:
    """Keeps every state saved, and can pull the plug at a chosen save."""

    def __init__(self, state: RunState, stop_at: int | None = None) -> None:
        self.state, self.stop_at, self.saves = state, stop_at, 0

    def load(self):
        return self.state.load()

    def save(self, content):
        if self.saves == self.stop_at:
            raise KeyboardInterrupt
        self.state.save(content)
        self.saves += 1


class Watcher:
    """Counts the steps made and keeps the log that a checkpoint covers."""

    def __init__(self) -> None:
        self.steps, self.log = [], []

    def step(self, step, total, values):
        self.steps.append(step)

    def validating(self, done, total): ...

    def saved(self, log):
        self.log = list(log)


def network() -> Network:
    torch.manual_seed(0)
    config = MDEQConfig(channels=(8, 8), expansion=2, groups=4, dropout=0.3)
    return Network(config, ClassificationHeadConfig((4, 4), 16), 2, Broyden(steps=4), Implicit(Gmres(steps=3)))


def task() -> Task:
    return Task(Stripes(40), Stripes(20), classification_loss, lambda: TopK(2))


def run(store, watcher, recipe=RECIPE, workers=0):
    model = network()
    history = train(model, task(), recipe, seed=3, device="cpu", workers=workers, store=store, observer=watcher)
    return model.state_dict(), history


def untimed(row):
    return {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}


@pytest.mark.parametrize("stop_at", [0, 3, 4, 7])
def test_a_resumed_run_ends_with_the_very_weights(tmp_path, stop_at):
    """Stopped at saves inside the first epoch, before and after its validation, and in the second epoch."""
    often = Recipe(**{**vars(RECIPE), "checkpoint_minutes": 1e-9})
    whole, watched = run(Store(RunState(tmp_path / "a", {}, "seed-3")), straight := Watcher(), often)
    state = RunState(tmp_path / "b", {}, "seed-3")
    with pytest.raises(KeyboardInterrupt):
        run(Store(state, stop_at), Watcher(), often)
    resumed, history = run(Store(state), watcher := Watcher(), often)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [untimed(row) for row in history] == [untimed(row) for row in watched]
    assert [(s, untimed(r)) for s, r in watcher.log] == [(s, untimed(r)) for s, r in straight.log]
    if stop_at > 0:
        assert len(watcher.steps) < 10  # of 2 x 5


def test_half_precision_learns_and_goes_on_exactly_with_its_loss_scale(tmp_path):
    """1e7 times the loss overflows float16 at the first loss scale, which must then have come down, and be kept."""
    steep = replace(task(), loss=lambda logits, targets: 1e7 * classification_loss(logits, targets))
    recipe = replace(RECIPE, precision="float16", optimizer=Adam(lr=1e-3))
    states = [RunState(tmp_path / name, {}, "s") for name in "ab"]

    def run_steep(store):
        model = network()
        train(model, steep, recipe, seed=3, device="cpu", workers=0, store=store, observer=Watcher())
        return model.state_dict()

    whole = run_steep(Store(states[0]))
    with pytest.raises(KeyboardInterrupt):
        run_steep(Store(states[1], stop_at=2))
    half = states[1].load()["scaler"]["scale"]
    resumed = run_steep(Store(states[1]))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert states[1].load()["scaler"]["scale"] < half < 2**16
    for precision in ("float16", "bfloat16"):
        gentle = replace(recipe, precision=precision, epochs=4, optimizer=Sgd(lr=0.05, nesterov=True))
        _, history = run(Store(RunState(tmp_path / precision, {}, "s")), Watcher(), gentle)
        assert history[-1]["eval/top1"] > 90, precision


def test_a_gradient_that_no_scale_of_the_loss_makes_finite_is_told(tmp_path):
    model, before = network(), network().state_dict()
    broken = replace(task(), loss=lambda logits, targets: _Poison.apply(classification_loss(logits, targets)))
    recipe = replace(RECIPE, precision="float16", epochs=20, jacobian=None)
    store = Store(RunState(tmp_path, {}, "s"))
    with pytest.raises(TrainingError, match=r"not finite at any scale of the loss at step 40 \(epoch 9, in a batch"):
        train(model, broken, recipe, seed=3, device="cpu", workers=0, store=store, observer=Watcher())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_workers_change_nothing(tmp_path):
    alone, _ = run(Store(RunState(tmp_path / "a", {}, "s")), Watcher())
    helped, _ = run(Store(RunState(tmp_path / "b", {}, "s")), Watcher(), workers=2)
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_it_learns_and_the_warm_up_is_validated_both_ways(tmp_path):
    recipe = Recipe(Sgd(lr=0.05, nesterov=True), epochs=4, batch=8, warm_up=WarmUp(2, 5, softplus=10.0))
    _, history = run(Store(RunState(tmp_path, {}, "s")), Watcher(), recipe)
    assert history[-1]["eval/top1"] > 90
    assert "eval/top1_unrolled" in history[0] and "eval/top1_unrolled" not in history[1]
    assert history[-1]["solver/nfe"] == 5


def test_validation_knows_the_residual_after_some_evaluations():
    model = network().eval()
    values = evaluate(model, Stripes(20), TopK(2), batch=7, device="cpu", workers=0)
    with torch.no_grad():
        trace = model(Stripes(20)[Keys(0, list(range(20)))][0]).equilibrium.solution.trace
    for k in (2, 4):
        assert values[f"solver/residual_after_{k}"] == pytest.approx(float(trace[k - 1].mean()), rel=1e-4)
    assert "solver/residual_after_8" not in values


def test_no_epochs_only_validate(tmp_path):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    store = Store(RunState(tmp_path, {}, "s"))
    recipe = Recipe(Adam(), epochs=0, batch=8)
    (row,) = train(model, task(), recipe, seed=0, device="cpu", workers=0, store=store, observer=Watcher())
    assert row["step"] == row["epoch"] == 0 and "eval/top1" in row
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_jacobian_terms_weight_follows_the_published_schedule():
    """ImageNet: 0.03 in the 510,000 updates of the warm-up, then 2.5 and 0.1 more every 50,000. CIFAR-10 stops."""
    term = JacobianTerm(2.5, warm_up_weight=0.03, increase=0.1, increase_every=50_000)
    weights = [term.weight_at(step, 0, 510_000) for step in (509_999, 510_000, 559_999, 560_000, 1_000_899)]
    assert weights == pytest.approx([0.03, 2.5, 2.5, 2.6, 3.4])
    term = JacobianTerm(0.4, stop_epoch=90)
    assert [term.weight_at(10**6, epoch, 16_000) for epoch in (0, 89, 90)] == [0.4, 0.4, 0]


@pytest.mark.parametrize(
    ("term", "in_the_second_epoch"),
    [
        (JacobianTerm(0.5, increase=1.0), JacobianTerm(1.5)),
        (JacobianTerm(0.5, stop_epoch=1), None),
        (JacobianTerm(0.5, warm_up_weight=2.0), JacobianTerm(0.5)),
    ],
)
def test_the_jacobian_terms_schedule_is_trained_with(tmp_path, term, in_the_second_epoch):
    """The same weights as when a run of two updates is stopped after the first and goes on with another term."""

    def recipe(jacobian):
        warm_up = WarmUp(2, 1) if term.warm_up_weight else None
        return Recipe(Sgd(lr=0.1), epochs=2, batch=40, warm_up=warm_up, jacobian=jacobian, log_every=1)

    whole, _ = run(Store(RunState(tmp_path / "a", {}, "s")), watcher := Watcher(), recipe(term))
    logged = [step for step, values in watcher.log if "solver/jacobian" in values]
    assert logged == ([1] if term.stop_epoch else [1, 2])
    state = RunState(tmp_path / "b", {}, "s")
    with pytest.raises(KeyboardInterrupt):
        run(Store(state, stop_at=2), Watcher(), recipe(term))
    resumed, _ = run(Store(state), Watcher(), recipe(in_the_second_epoch))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class _Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * math.inf


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA: tried to allocate 20.00 GiB")


class Spoiled(Stripes):
    """One sample is not finite."""

    def __getitem__(self, keys):
        images, targets = super().__getitem__(keys)
        images[[index == 13 for index in keys.indices]] = math.inf
        return images, targets


@pytest.mark.parametrize(
    ("data", "spoil", "message"),
    [
        (
            Stripes(40),
            lambda loss: loss * math.nan,
            r"the loss is nan at step 7 \(epoch 2, in a batch with stripes \d+, ",
        ),
        (Stripes(40), _Poison.apply, r"the gradient's norm is (nan|inf) at step 7 \(epoch 2, in a batch with stripes "),
        (
            Stripes(40),
            lambda loss: loss + torch.empty(2**50).sum(),
            "the memory does not suffice at step 7 .*; lower batch",
        ),
        (Stripes(40), lambda loss: out_of_gpu_memory(), "the memory does not suffice at step 7 .*; lower batch"),
        (Spoiled(40), lambda loss: loss, r"the loss is nan at step \d \(epoch 1, of stripes 13\); no weight"),
    ],
    ids=["loss", "gradient", "memory", "gpu memory", "sample"],
)
def test_what_cannot_go_on_is_explained_and_spoils_no_weight(tmp_path, data, spoil, message):
    """The run then goes on from its last checkpoint to the very weights, once the cause is gone."""
    steps = []

    def loss(logits, targets):
        steps.append(0)
        value = classification_loss(logits, targets)
        return spoil(value) if len(steps) == 8 else value

    whole, _ = run(Store(RunState(tmp_path / "a", {}, "s")), Watcher())
    state, model = RunState(tmp_path / "b", {}, "s"), network()
    broken = Task(data, Stripes(20), loss, lambda: TopK(2))
    with pytest.raises(TrainingError, match=message):
        train(model, broken, RECIPE, seed=3, device="cpu", workers=0, store=Store(state), observer=Watcher())
    assert all(p.isfinite().all() for p in model.parameters())
    resumed, _ = run(Store(state), Watcher())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_solver_that_finds_nothing_for_long_is_told_once(capsys):
    with Progress("classify x", NullTracker(), "") as progress:
        for step in range(1, 3 * PATIENCE):
            progress.step(step, 1000, {"solver/forward_residual": 0.9 if step == 50 else 1.0})
    assert capsys.readouterr().err.count(f"step {50 + PATIENCE}: for {PATIENCE} updates the solver found nothing") == 1


def test_explicit_models_train_in_the_same_loop(tmp_path):
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 2)

        def forward(self, image):
            return Prediction(self.layer(image.flatten(1)), None)

    model = Linear()
    recipe = Recipe(Adam(lr=1e-2), epochs=3, batch=8)
    store = Store(RunState(tmp_path, {}, "s"))
    train(model, task(), recipe, seed=0, device="cpu", workers=0, store=store, observer=Watcher())
    values = evaluate(model, Stripes(20), TopK(2), batch=7, device="cpu", workers=0)
    assert values["eval/top1"] > 90 and not any(name.startswith("solver/") for name in values)


def test_order_and_schedule():
    keys = [k for start in (0, 2) for k in batches(_Echo(), 4, seed=1, epoch=5, shuffle=True, start=start)]
    assert keys[2:5] == keys[5:] and sorted(i for k in keys[:5] for i in k.indices) == list(range(18))
    other = list(batches(_Echo(), 4, seed=1, epoch=6, shuffle=True))
    assert other[0].indices != keys[0].indices
    assert cosine(0.1, 0, 10) == 0.1 and cosine(0.1, 10, 10) == pytest.approx(FINAL_LR)
    assert cosine(0.1, 5, 10) == pytest.approx((0.1 + FINAL_LR) / 2)


class _Echo:
    classes = 1

    def __len__(self) -> int:
        return 18

    def __getitem__(self, keys: Keys) -> Keys:
        return keys


def test_segmentation_loss_counts_what_it_should():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[:, 0] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0])
    kept = labels != IGNORE
    log_p = logits.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, labels[kept][:, None])[:, 0]
    w = weights[labels[kept]]
    torch.testing.assert_close(segmentation_loss(logits, labels), -log_p.mean())
    torch.testing.assert_close(segmentation_loss(logits, labels, weights), -(w * log_p).sum() / w.sum())
    hard = log_p[log_p.exp() <= 0.5]
    mined = segmentation_loss(logits, labels, hard=HardExamples(threshold=0.5, keep=1))
    torch.testing.assert_close(mined, -hard.mean())
    hardest = segmentation_loss(logits, labels, hard=HardExamples(threshold=0.0, keep=5))
    torch.testing.assert_close(hardest, -log_p.sort().values[:5].mean())
    assert segmentation_loss(logits, torch.full_like(labels, IGNORE), hard=HardExamples()) == 0


def test_the_loop_and_the_cifar_loader_need_torch_and_numpy_alone():
    import subprocess
    import sys

    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pandas", "pydantic", "mlflow", "dvc", "typer", "cv2", "torchvision", "rich"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import mdeq.baselines, pipeline.training, pipeline.checkpoints, pipeline.data.cifar10, pipeline.data.loading
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
