"""Two real processes, and micro-batches, give the losses and measures of one process.

The batch statistics are frozen and nothing is dropped, so that theory asks for equality; all in
float64. The last batch of an epoch has one sample: of its parts all but one are empty.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Killed, Watcher, untimed

from mdeq import (
    Broyden,
    ClassificationHeadConfig,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
    SegmentationHeadConfig,
)
from mdeq.heads import resize
from mdeq.losses import IGNORE, pixel_weight
from pipeline.data.loading import Keys, Share, draw
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Adam, Recipe, Sgd, WarmStart, WarmUp
from pipeline.train import distributed
from pipeline.train.checkpoints import RunState
from pipeline.train.loop import Row, Run, Task
from pipeline.train.metrics import ConfusionMatrix, TopK

CLASSES = 3
WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
KINDS = ("labels", "pixels", "warm")
Log = list[tuple[int, Row]]


class Scenes:
    """Noise whose brightness is its class; labels of images, or of pixels, unevenly void."""

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


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(resize(logits, labels.shape[-2:]), labels, WEIGHTS, ignore_index=IGNORE)


def run(folder: Path, kind: str, accumulate: int = 1, watcher: Watcher | None = None) -> Log:
    """The rows of a training: one per step, and one per epoch with the validation's measures."""
    torch.manual_seed(0)
    pixels = kind == "pixels"
    head = SegmentationHeadConfig() if pixels else ClassificationHeadConfig((4, 4), 16)
    config = MDEQConfig(channels=(8, 8), expansion=2, groups=4)
    model = Frozen(config, head, CLASSES, Broyden(steps=5), Implicit(Gmres(steps=4))).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # the usual start would change nothing so soon
    task = Task(Scenes(21, pixels), Scenes(13, pixels), F.cross_entropy, partial(TopK, CLASSES))
    if pixels:
        metric, weight = (
            partial(ConfusionMatrix, CLASSES),
            partial(pixel_weight, class_weights=WEIGHTS),
        )
        task = replace(task, loss=pixel_loss, metric=metric, validation_batch=1, weight=weight)
    recipe = Recipe(
        optimizer=Sgd(lr=0.05) if pixels else Adam(lr=3e-3),
        epochs=5,  # of 3 updates
        batch=10,
        accumulate=accumulate,
        warm_up=None if kind == "warm" else WarmUp(layers=2, steps=5),
        warm_start=WarmStart((2,)) if kind == "warm" else None,
        average=0.5 if kind == "warm" else 0.0,
        log_every=1,
    )
    watcher = watcher or Watcher()
    Run(model, task, recipe, 3, "cpu", 0, RunState(folder, {}, kind), watcher).train()
    return watcher.rows


class Signalled(Watcher):
    """SIGTERM reaches one of the processes alone."""

    def step(self, step: int, total: int, values: Row) -> None:
        super().step(step, total, values)
        if step == 4 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def in_each(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", **address}
    with distributed.joined("cpu"):
        logs = {kind: run(folder / kind, kind) for kind in KINDS}
        logs["micro"] = run(folder / "micro", "pixels", accumulate=2)
        with pytest.raises(Killed):
            run(folder / "stopped", "labels", watcher=Watcher(stop=8))
        with pytest.raises(Stopped, match="143") as stopped:
            run(folder / "signalled", "labels", watcher=Signalled())
        assert "5 of 15 updates are saved" in stopped.value.message
    torch.save(logs, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(in_each, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    """What one process does with whole batches."""
    return {kind: run(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def assert_same(ours: Log, alone: Log) -> None:
    for (step, row), (other_step, other) in zip(ours, alone, strict=True):
        row, other = untimed(row), untimed(other)
        assert step == other_step and row.keys() == other.keys()
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7), step


@pytest.mark.parametrize("name", [*KINDS, "micro"])
def test_two_processes_train_as_one(two: Path, alone: dict[str, Log], name: str) -> None:
    expected = alone["pixels" if name == "micro" else name]
    assert len(expected) == 20  # 15 updates, 5 epochs
    for rank in (0, 1):
        assert_same(torch.load(two / f"{rank}.pt", weights_only=True)[name], expected)
    first, last = expected[0][1]["loss/train"], expected[-1][1]["loss/train_epoch"]
    assert last < 0.8 * first  # something was learnt, so that equality says something


@pytest.mark.parametrize("kind", ["labels", "pixels"])
def test_micro_batches_make_the_update_of_the_whole_batch(
    tmp_path: Path, alone: dict[str, Log], kind: str
) -> None:
    assert_same(run(tmp_path, kind, accumulate=3), alone[kind])


@pytest.mark.parametrize(("name", "kept"), [("stopped", 6), ("signalled", 5)])
def test_one_process_resumes_what_two_left(
    two: Path, alone: dict[str, Log], name: str, kept: int
) -> None:
    """Killed after step 8, saved at step 6, the end of an epoch; or stopped by a signal."""
    after = [row for row in alone["labels"] if row[0] > kept]
    assert_same(run(two / name, "labels"), after)


def test_variables_that_contradict_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for size, rank in (("2", "two"), ("two", "0"), ("2", "0")):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match="WORLD_SIZE.*start them with torchrun"):
            with distributed.joined("cpu"):
                pass


@pytest.mark.parametrize("samples", [1, 5, 16, 17])
def test_the_pieces_of_a_batch_are_the_batch(samples: int) -> None:
    pieces = [piece for rank in range(4) for piece in Share(rank, 4, 2).bounds(samples)]
    assert [i for a, b in pieces for i in range(a, b)] == list(range(samples))
    sizes = [b - a for a, b in pieces]
    assert max(sizes) - min(sizes) <= 1
