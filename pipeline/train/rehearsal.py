"""What a training would cost on this machine, measured by a few of its steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from mdeq import Network
from pipeline.data.loading import Keys
from pipeline.machine import Machine
from pipeline.params import TrainParams
from pipeline.progress import duration
from pipeline.recipe import WarmUp
from pipeline.train.experiment import Experiment, flops
from pipeline.train.loop import Run, peak_memory

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
    samples, source = len(task.train), experiment.facts["source"]
    yield f"data:     {source}, {samples:,} for training, {len(task.validation):,} for validation"
    yield f"device:   {machine.device}, {experiment.workers} loader processes"
    image = task.validation[Keys(0, [0])][0].to(machine.device)
    size, cost = sum(p.numel() for p in model.parameters()), flops(model, image) / 1e9
    yield f"model:    {size:,} parameters, {cost:.3g} GFLOP per prediction"

    few: Any = _Few()

    def begun(recipe: TrainParams) -> Run:
        network = copy.deepcopy(model)
        if isinstance(network, Network) and recipe.forward:
            network.backbone.forward_solver = recipe.forward
        return Run(network, task, recipe, 0, machine.device, experiment.workers, few, few)

    total, measured = 0.0, []
    for kind, updates, changed in _kinds(params, math.ceil(samples / params.batch)):
        seconds = _seconds_per_update(begun(changed))
        total += updates * seconds
        measured.append(f"{updates:,} {kind} at {seconds:.2g} s")
    yield f"updates:  {', '.join(measured) or 'none'}; {params.batch} samples each"
    epochs, seeds = max(1, params.epochs), len(params.seeds)
    began = time.perf_counter()
    begun(replace(params, warm_up=None, warm_start=None)).validate()
    each = total / epochs + (time.perf_counter() - began) * few.share
    yield f"epochs:   {epochs}, {duration(each)} each, with its validation"
    yield f"in all:   about {duration(each * epochs * seeds)} on this machine, {seeds} seed(s)"
    for measure, value in peak_memory(machine.device).items():
        yield f"memory:   {value / 1e9:.2g} GB at most in these steps ({measure.split('_')[1]})"
    if params.warm_start and isinstance(model, Network):
        _, z0, _ = model.backbone.fixed_point_problem(image)
        yield f"disk:     {4 * samples * z0.numel() / 1e9:.2g} GB for the equilibria of two epochs"
    yield f"results:  {experiment.results}"


def _kinds(params: TrainParams, per_epoch: int) -> Iterator[tuple[str, int, TrainParams]]:
    """The kinds of updates, how many there are, and params with which all are of that kind."""
    total, forward, start = per_epoch * params.epochs, params.forward, params.warm_start
    plain = replace(params, warm_up=None, warm_start=None)
    unrolled = params.warm_up.steps if params.warm_up else 0
    if params.warm_up and unrolled:
        always = replace(params.warm_up, steps=total)
        yield "unrolled", unrolled, replace(plain, warm_up=always)
    from_zero = (per_epoch if start else total) - unrolled
    if from_zero > 0:
        yield "implicit" if forward else "ordinary", from_zero, plain
    if start is None or forward is None:
        return
    limits = [start.limit(epoch, params.epochs) for epoch in range(1, params.epochs)]
    for limit in dict.fromkeys(limits):
        once = None if limit else WarmUp(layers=1, steps=total)
        changed = replace(plain, forward=replace(forward, steps=max(1, limit)), warm_up=once)
        yield f"warm with {limit} steps", per_epoch * limits.count(limit), changed


def _seconds_per_update(run: Run) -> float:
    run.model.train()
    times = [time.perf_counter()]
    for pieces in islice(run.remaining_batches(), STEPS):
        run.update(pieces)
        times.append(time.perf_counter())
    times = times[1:] if len(times) > 2 else times
    return (times[-1] - times[0]) / (len(times) - 1)


class _Few:
    """Lets a validation see only its first batches; `share` is how many times as many there are."""

    share = 1.0

    def validating(self, batches: Any) -> Iterable[Any]:
        self.share = max(1.0, len(batches) / BATCHES)
        return islice(batches, BATCHES)
