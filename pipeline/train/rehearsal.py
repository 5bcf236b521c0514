"""What a training would cost on this machine, measured by a few of its steps."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from mdeq import Network
from pipeline.data.loading import Keys
from pipeline.machine import Machine
from pipeline.params import TrainParams
from pipeline.progress import duration
from pipeline.recipe import WarmUp
from pipeline.train.experiment import Experiment, flops
from pipeline.train.loop import Row, Task, evaluate_split, peak_memory, predict, train

STEPS = 4  # of each kind of update; the first is not timed
BATCHES = 3  # of the validation


def rehearse(stage: str, name: str, params: TrainParams, machine: Machine) -> Iterator[str]:
    """Lines that say what the training of `<stage>.<name>` would do and cost.

    Nothing is written or recorded. Several processes (MDEQ_LAUNCH) are measured as one.

    Raises:
        UserError: The training could not begin.
    """
    machine.use_threads()
    experiment = Experiment(stage, name, params, machine)
    task, model = experiment.begin(params.seeds[0])
    model = model.to(machine.device)
    samples, source = len(task.train), experiment.summary["source"]
    yield f"params:   {experiment.key} is valid"
    yield f"data:     {source}, {samples:,} for training, {len(task.validation):,} for validation"
    yield f"device:   {machine.device}, {experiment.workers} loader processes"
    image = task.validation[Keys(0, [0])][0].to(machine.device)
    parameters = sum(p.numel() for p in model.parameters())
    operations = flops(model, image) / 1e9
    yield f"model:    {parameters:,} parameters, {operations:.3g} GFLOP per prediction"

    total, measured = 0.0, []
    for kind, updates, changed in _kinds(params, math.ceil(samples / params.batch)):
        seconds = _seconds_per_update(experiment, task, changed)
        total += updates * seconds
        measured.append(f"{updates:,} {kind} at {seconds:.2g} s")
    yield f"updates:  {', '.join(measured) or 'none'}; {params.batch} samples each"
    epochs, seeds = max(1, params.epochs), len(params.seeds)
    validation = _seconds_per_validation(model, task, experiment)
    total = seeds * (total + epochs * validation)
    yield f"epochs:   {epochs}, {duration(total / seeds / epochs)} each, with its validation"
    yield f"in all:   about {duration(total)} on this machine" + f" for {seeds} seeds" * (seeds > 1)
    for measure, value in peak_memory(machine.device).items():
        where = measure.split("_")[1]
        yield f"memory:   {value / 1e9:.2g} GB at most in these steps ({where})"
    yield f"disk:     {_disk(model, params, image, samples) / 1e9:.2g} GB while it trains"
    yield f"results:  {experiment.results}"
    if any(experiment.work.glob("*/*.pt")):
        yield "state:    that of an interrupted training; with the same params it is resumed"


def _kinds(params: TrainParams, per_epoch: int) -> Iterator[tuple[str, int, TrainParams]]:
    """The kinds of updates, how many there are, and params with which all are of that kind."""
    total = per_epoch * params.epochs
    plain = replace(params, warm_up=None, warm_start=None)
    unrolled = params.warm_up.steps if params.warm_up else 0
    if params.warm_up and unrolled:
        always = replace(params.warm_up, steps=total)
        yield "unrolled", unrolled, replace(plain, warm_up=always)
    from_zero = (per_epoch if params.warm_start else total) - unrolled
    if from_zero > 0:
        yield "implicit" if params.forward else "ordinary", from_zero, plain
    if params.warm_start is None or params.forward is None:
        return
    limits = [params.warm_start.limit(epoch, params.epochs) for epoch in range(1, params.epochs)]
    for limit in dict.fromkeys(limits):
        forward = replace(params.forward, steps=max(1, limit))
        once = None if limit else WarmUp(layers=1, steps=total)
        changed = replace(plain, forward=forward, warm_up=once)
        yield f"warm with {limit} steps", per_epoch * limits.count(limit), changed


class _EnoughError(Exception):
    """The steps to be timed are done."""


@dataclass
class _Stopwatch:
    """An observer that times updates, and a store that keeps nothing."""

    folder: Path
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def step(self, step: int, total: int, values: Row) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > STEPS:
            raise _EnoughError

    def validating(self, batches: Iterable[Any]) -> Iterable[Any]:
        return ()  # of a training with fewer steps than are timed

    def record(self, step: int, row: Row) -> None: ...

    def load(self) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


def _seconds_per_update(experiment: Experiment, task: Task, params: TrainParams) -> float:
    seed, machine = experiment.params.seeds[0], experiment.machine
    model = replace(experiment, params=params).model(seed, task.train.classes)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError):
        watch: Any = _Stopwatch(Path(folder))
        where = {"device": machine.device, "workers": experiment.workers}
        train(model, task, params, seed=seed, store=watch, observer=watch, **where)
    times = watch.times[1:] if len(watch.times) > 2 else watch.times
    return (times[-1] - times[0]) / (len(times) - 1)


def _seconds_per_validation(model: nn.Module, task: Task, experiment: Experiment) -> float:
    params, machine = experiment.params, experiment.machine
    batch = task.validation_batch or max(1, params.batch // params.accumulate)
    seen = 0

    def count(*loaded: Any) -> None:
        nonlocal seen
        seen += len(loaded[0])

    began = time.perf_counter()
    evaluate_split(
        model,
        task.validation,
        task.metric(),
        batch=batch,
        device=machine.device,
        workers=experiment.workers,
        precision=params.precision,
        on_batch=count,
        watch=lambda loader: islice(loader, BATCHES),
    )
    return (time.perf_counter() - began) * len(task.validation) / seen


def _disk(model: nn.Module, params: TrainParams, image: Any, samples: int) -> float:
    """Bytes that the training of a seed keeps: two states, and the equilibria of two epochs."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    copies = 1 + {"adam": 2, "sgd": 1, "muon": 1}[params.optimizer.kind] + bool(params.average)
    size = 2.0 * copies * weights
    if params.warm_start and isinstance(model, Network):
        found = predict(model.eval(), image).equilibrium
        size += 2 * 2 * samples * sum(z[0].numel() for z in found.scales) if found else 0
    return size
