"""What a training would cost here, measured by a few of its steps; nothing is written or recorded."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdeq import Network
from pipeline.data.loading import Keys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import TrainParams
from pipeline.progress import duration
from pipeline.recipe import WarmUp
from pipeline.train.experiment import Experiment, flops
from pipeline.train.loop import Batch, Row, Task, evaluate_split, peak_memory, train

STEPS = 4  # of each kind; the first is not timed
BATCHES = 3  # of the validation


def rehearse(stage: str, name: str, params: TrainParams, machine: Machine) -> Iterator[str]:
    """Lines that say what the training of `<stage>.<name>` would do and cost.

    Args:
        stage: classify, pretrain or finetune.
        name: Of the model.
        params: Its section.
        machine: Where it would run.

    Raises:
        UserError: It could not begin.
    """
    machine.use_threads()
    experiment = Experiment(stage, name, params, machine)
    seed = params.seeds[0]
    task = experiment.task(seed)
    model = experiment.model(seed, task.train.classes)
    samples, source = len(task.train), experiment.summary["source"]
    yield f"params:   {stage}.{name} is valid"
    yield f"data:     {source}, {samples:,} for training, {len(task.validation):,} for validation"
    yield f"device:   {machine.device}, {experiment.workers} loader processes"

    image = task.validation[Keys(0, [0])][0].to(machine.device)
    operations = flops(model.to(machine.device), image)
    parameters = sum(p.numel() for p in model.parameters())
    yield f"model:    {parameters:,} parameters, {operations / 1e9:.3g} GFLOP per prediction"

    per_epoch = math.ceil(samples / params.batch)
    kinds = list(_kinds(experiment, per_epoch))
    seconds = {kind.name: _measure(experiment, task, kind) for kind in kinds}
    validation = _validation_seconds(model, task, experiment)
    listed = ", ".join(f"{kind.updates:,} {kind.name}" for kind in kinds) or "none"
    yield f"updates:  {listed}, of {params.batch} samples, in {params.epochs} epochs"
    if kinds:
        each = ", ".join(f"{seconds[kind.name]:.2g} s ({kind.name})" for kind in kinds)
        yield f"time:     {each} per update, {duration(validation)} per validation"
    total = sum(kind.updates * seconds[kind.name] for kind in kinds)
    total = len(params.seeds) * (total + max(1, params.epochs) * validation)
    epochs = max(1, params.epochs) * len(params.seeds)
    seeds = f" for {len(params.seeds)} seeds" if len(params.seeds) > 1 else ""
    yield (
        f"in all:   about {duration(total / epochs)} per epoch, {duration(total)}{seeds} "
        "on this machine"
    )
    memory = peak_memory(machine.device)
    listed = ", ".join(
        f"{value / 1e9:.2g} GB ({key.split('_')[1]})" for key, value in memory.items()
    )
    yield f"memory:   {listed} at most in these steps"
    yield f"disk:     {_disk(model, params, image, samples) / 1e9:.2g} GB while it trains"
    yield f"results:  {experiment.results}"
    if any(experiment.work.glob("*/*.pt")):
        yield (
            "state:    there is one of an interrupted training; "
            "with the same params, data and code it is resumed"
        )


@dataclass(frozen=True)
class _Kind:
    """Updates of a training that cost alike, and a recipe of which every update is one."""

    name: str
    updates: int
    params: TrainParams


def _kinds(experiment: Experiment, per_epoch: int) -> Iterator[_Kind]:
    params = experiment.params
    total = per_epoch * params.epochs
    plain = replace(params, warm_up=None, warm_start=None)
    unrolled = params.warm_up.steps if params.warm_up else 0
    if params.warm_up and unrolled:
        warm_up = replace(params.warm_up, steps=total)
        yield _Kind("unrolled", unrolled, replace(plain, warm_up=warm_up))
    if params.warm_start is None:
        if total > unrolled:
            yield _Kind("implicit" if params.forward else "ordinary", total - unrolled, plain)
        return
    if per_epoch > unrolled:
        yield _Kind("from zero", per_epoch - unrolled, plain)
    limits = [params.warm_start.limit(epoch, params.epochs) for epoch in range(1, params.epochs)]
    for limit in dict.fromkeys(limits):
        once = replace(plain, warm_up=WarmUp(layers=1, steps=total))
        limited = replace(plain, forward=replace(params.forward, steps=max(1, limit)))
        yield _Kind(
            f"warm with {limit} steps", per_epoch * limits.count(limit), limited if limit else once
        )


class _Enough(Exception):  # noqa: N818
    """The steps to measure are made."""


@dataclass
class _Stopwatch:
    """An observer that times updates and ends the training after `STEPS`."""

    times: list[float] = field(default_factory=list)

    def step(self, step: int, total: int, values: Row) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == STEPS:
            raise _Enough

    def validating(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return list(batches)[:0]  # a training of fewer steps than are timed

    def record(self, step: int, row: Row) -> None: ...


@dataclass(frozen=True)
class _NoStore:
    """A store that keeps nothing."""

    folder: Path

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None: ...

    def damaged(self, reason: str) -> UserError:
        return UserError(reason)


def _measure(experiment: Experiment, task: Task, kind: _Kind) -> float:
    """Seconds per update of a kind, on a model of its own."""
    seed, machine, watch = experiment.params.seeds[0], experiment.machine, _Stopwatch()
    model = replace(experiment, params=kind.params).model(seed, task.train.classes)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                model,
                task,
                kind.params,
                seed=seed,
                device=machine.device,
                workers=experiment.workers,
                store=_NoStore(Path(folder)),
                observer=watch,
            )
        except _Enough:
            pass
    times = watch.times if len(watch.times) > 1 else [began, *watch.times]
    return (times[-1] - times[0]) / (len(times) - 1)


def _validation_seconds(model: nn.Module, task: Task, experiment: Experiment) -> float:
    """Seconds of a whole validation, from its first batches."""
    params, machine = experiment.params, experiment.machine
    batch = task.validation_batch or params.batch // params.accumulate or 1
    began = time.perf_counter()
    done = 0

    def first(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal done
        for done, loaded in enumerate(batches, 1):  # noqa: B007
            yield loaded
            if done == BATCHES:
                return

    evaluate_split(
        model,
        task.validation,
        task.metric(),
        batch=batch,
        device=machine.device,
        workers=experiment.workers,
        precision=params.precision,
        watch=first,
    )
    return (
        (time.perf_counter() - began)
        * len(task.validation)
        / min(done * batch, len(task.validation))
    )


def _disk(model: nn.Module, params: TrainParams, image: torch.Tensor, samples: int) -> float:
    """Bytes that a training of a seed keeps: two states at once, and the equilibria of warm starts."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    copies = {"adam": 2, "sgd": 1, "muon": 1}[params.optimizer.kind] + 1 + bool(params.average)
    size = 2 * copies * weights
    if params.warm_start and isinstance(model, Network):
        with torch.no_grad():
            scales = model.eval()(image).equilibrium.scales
        size += 2 * 2 * samples * sum(z[0].numel() for z in scales)
    return size
