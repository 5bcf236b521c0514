"""Two real processes, and micro-batches, against one process with the same global batch: the same losses and measures.

The batch statistics are frozen and nothing is dropped, so that theory asks for equality; all in float64. The last batch
of an epoch has one sample: of its parts all but one are empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network, SegmentationHeadConfig
from mdeq.heads import resize
from mdeq.losses import IGNORE, pixel_weight
from pipeline import processes
from pipeline.checkpoints import RunState
from pipeline.data.loading import Keys, draw
from pipeline.metrics import ConfusionMatrix, TopK
from pipeline.processes import Share
from pipeline.recipe import Adam, Recipe, Sgd, WarmUp
from pipeline.training import Row, Task, train

CLASSES = 3
WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
SETTINGS = {"epochs": 7, "batch": 10, "warm_up": WarmUp(layers=2, steps=5), "log_every": 1}  # 7 x 3 updates
Log = list[tuple[int, Row]]


class Scenes:
    """Noise whose brightness is its class; labels of the image, or of pixels of which an uneven part is void."""

    classes = CLASSES

    def __init__(self, length: int, pixels: bool) -> None:
        self.length, self.pixels = length, pixels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(keys.indices) % CLASSES
        noise = [draw(1, keys.epoch, index).normal(0, 0.5, (3, 8, 8)) for index in keys.indices]
        images = torch.stack([torch.from_numpy(n) for n in noise]) + labels[:, None, None, None]
        if not self.pixels:
            return images, labels
        maps = labels[:, None, None].repeat(1, 8, 8)
        for index, label in zip(keys.indices, maps, strict=True):
            label[: index % 7] = IGNORE
        return images, maps


class Frozen(Network):
    """Its batch norms normalise by their running statistics in training too."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Pixels(ConfusionMatrix):
    def update(self, logits: Tensor, targets: Tensor) -> None:
        super().update(resize(logits, targets.shape[-2:]), targets)


class Watcher:
    """Keeps the log; `stop` pulls the plug after that many updates."""

    def __init__(self, stop: int | None = None) -> None:
        self.log: Log = []
        self.stop = stop

    def step(self, step: int, total: int, values: Row) -> None:
        if step == self.stop:
            raise KeyboardInterrupt

    def validating(self, done: int, total: int) -> None: ...

    def saved(self, log: Log) -> None:
        self.log = list(log)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(resize(logits, labels.shape[-2:]), labels, WEIGHTS, ignore_index=IGNORE)


def run(folder: Path, kind: str, accumulate: int = 1, stop: int | None = None) -> Log:
    """The log of a training: a row a step, and one an epoch with the validation's measures."""
    torch.manual_seed(0)
    pixels = kind == "pixels"
    head = SegmentationHeadConfig() if pixels else ClassificationHeadConfig((4, 4), 16)
    solvers = Broyden(steps=5), Implicit(Gmres(steps=4))
    model = Frozen(MDEQConfig(channels=(8, 8), expansion=2, groups=4), head, CLASSES, *solvers).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # the usual start is so small that 21 updates would change nothing
    data = Scenes(21, pixels), Scenes(13, pixels)
    if pixels:
        task = Task(*data, pixel_loss, lambda: Pixels(CLASSES), 1, lambda labels: pixel_weight(labels, WEIGHTS))
        recipe = Recipe(Sgd(lr=0.05), accumulate=accumulate, **SETTINGS)
    else:
        task = Task(*data, F.cross_entropy, lambda: TopK(CLASSES))
        recipe = Recipe(Adam(lr=3e-3), accumulate=accumulate, **SETTINGS)
    store, watcher = RunState(folder, {}, kind), Watcher(stop)
    train(model, task, recipe, seed=3, device="cpu", workers=0, store=store, observer=watcher)
    return watcher.log


def in_each(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    with processes.joined("cpu"):
        logs = {kind: run(folder / kind, kind) for kind in ("labels", "pixels")}
        logs["micro"] = run(folder / "micro", "pixels", accumulate=2)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "stopped", "labels", stop=8)
    torch.save(logs, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(in_each, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    """What one process does with whole batches."""
    return {kind: run(tmp_path_factory.mktemp(kind), kind) for kind in ("labels", "pixels")}


def logs(folder: Path, rank: int) -> dict[str, Log]:
    return torch.load(folder / f"{rank}.pt", weights_only=True)


def assert_same(ours: Log, alone: Log) -> None:
    assert len(ours) == len(alone) == 28  # 21 updates, 7 epochs
    for (step, row), (other_step, other) in zip(ours, alone, strict=True):
        kept = [name for name in other if not name.startswith(("time/", "memory/"))]
        assert step == other_step and row.keys() == other.keys()
        assert {n: row[n] for n in kept} == pytest.approx({n: other[n] for n in kept}, rel=1e-5, abs=1e-7), step


@pytest.mark.parametrize(("name", "kind"), [("labels", "labels"), ("pixels", "pixels"), ("micro", "pixels")])
def test_two_processes_train_as_one(two: Path, alone: dict[str, Log], name: str, kind: str) -> None:
    assert_same(logs(two, 0)[name], alone[kind])
    assert_same(logs(two, 1)[name], alone[kind])
    first, last = alone[kind][0][1]["loss/train"], alone[kind][-1][1]["loss/train_epoch"]
    assert last < 0.8 * first  # something was learnt, so that equality says something


@pytest.mark.parametrize("kind", ["labels", "pixels"])
def test_micro_batches_make_the_update_of_the_whole_batch(tmp_path: Path, alone: dict[str, Log], kind: str) -> None:
    assert_same(run(tmp_path, kind, accumulate=3), alone[kind])


def test_one_process_goes_on_from_what_two_left(two: Path, alone: dict[str, Log]) -> None:
    """Stopped after step 8, saved at step 6, the end of an epoch."""
    assert_same(run(two / "stopped", "labels"), alone["labels"])


@pytest.mark.parametrize("samples", [1, 5, 16, 17])
def test_the_pieces_of_a_batch_are_the_batch(samples: int) -> None:
    shares: list[Callable[[int], list[tuple[int, int]]]] = [Share(rank, 4, 2).bounds for rank in range(4)]
    found = [i for bounds in shares for a, b in bounds(samples) for i in range(a, b)]
    assert found == list(range(samples))
    sizes = [b - a for bounds in shares for a, b in bounds(samples)]
    assert max(sizes) - min(sizes) <= 1
