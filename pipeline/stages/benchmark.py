"""Stage benchmark: time and memory of a training step, relative to one model (Sec. 4.4, Figure 4b).

All models see the same random batch of CIFAR-10's size, run eagerly in float32, and a step is
everything: forward, backward, optimizer. Steps of all models take turns, so that a machine that
slows down slows all of them; medians count. Solvers run to their limit: at random weights an early
stop would flatter them. Memory is measured in a fresh process per model: what torch allocated at
most on a GPU, the rise of the process's peak on a CPU.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mdeq.equilibrium import Implicit
from mdeq.model import Network
from mdeq.saved import Architecture
from mdeq.solvers import Solution
from pipeline import figures, files
from pipeline.machine import Machine
from pipeline.params import BenchmarkModel, BenchmarkParams, plain
from pipeline.progress import track
from pipeline.stages import recorded, write_measures
from pipeline.train.optimizers import make_optimizer

CLASSES = 10


def run(params: BenchmarkParams, machine: Machine) -> None:
    """Measures every model of `params` and writes results/benchmark/, unless that already runs."""
    machine.use_threads()
    on_gpu = machine.device.startswith("cuda")
    note = "torch.cuda.max_memory_allocated" if on_gpu else "rise of the process's peak RSS"
    facts: dict[str, Any] = {"memory": note, "threads": torch.get_num_threads()}
    facts |= {"reference": params.reference, "batch": params.batch, **machine.describe()}
    with recorded("benchmark", None, plain(params), machine) as (out, record):
        memory = {}
        for name, model in track(params.models.items(), "benchmark: memory"):
            memory[name] = memory_alone(model, params, machine)
        times, counts = measure_time(params, machine)
        write_measures(out, record, summarise(times, counts, memory, params.reference), facts)
        files.write_text(out / "times.csv", times.to_csv(index=False, float_format="%.6g"))
        figure = figures.figure4b(times, memory, params.reference, note)
        for name in ("figure4b.png", "figure4b.svg"):
            figures.save(figure, out / name)
            record.artifact(out / name)


def summarise(
    times: pd.DataFrame, counts: dict[str, dict[str, int]], memory: dict[str, int], reference: str
) -> dict[str, float]:
    """The numbers of metrics.json: counts, memory, and medians over the rounds.

    The relative time is the median of the ratios to the reference in the same round.
    """
    table = pd.DataFrame(counts).T
    table["seconds"] = times.groupby("model")["seconds"].median()
    table["relative_time"] = figures.relative_times(times, reference).median()
    table["memory_bytes"] = pd.Series(memory)
    table["relative_memory"] = table["memory_bytes"] / memory[reference]
    stacked: Any = table.stack().dropna()
    return {f"{model}/{measure}": float(value) for (model, measure), value in stacked.items()}


def measure_time(
    params: BenchmarkParams, machine: Machine
) -> tuple[pd.DataFrame, dict[str, dict[str, int]]]:
    """times.csv (model, round, seconds of each step, models taking turns), each model's counts."""
    models = params.models.items()
    trainees = {name: Trainee(model, params, machine.device) for name, model in models}
    rows = []
    for number in track(range(1 - params.warm_up, params.rounds + 1), "benchmark: time"):
        for name, trainee in trainees.items():
            began = time.perf_counter()
            trainee.step()
            rows.append((name, number, time.perf_counter() - began))
    table = pd.DataFrame(rows, columns=["model", "round", "seconds"])
    counts = {name: trainee.counts for name, trainee in trainees.items()}
    return table.query("round > 0"), counts


class Trainee:
    """A model with its optimizer and batch: a `step` is a whole update, done on the device."""

    def __init__(self, model: BenchmarkModel, params: BenchmarkParams, device: str) -> None:
        torch.manual_seed(params.seed)
        self._images = torch.randn(params.batch, 3, params.image, params.image).to(device)
        self._targets = torch.randint(CLASSES, (params.batch,)).to(device)
        self.network = _build(model).train().to(device)
        self.counts = {"parameters": sum(p.numel() for p in self.network.parameters())}
        self._optimizer = make_optimizer(self.network, model.optimizer)
        if isinstance(self.network, Network):
            self.network.backbone.on_backward = self._count_backward

    def step(self, images: int | None = None) -> None:
        """Forward, backward, update; on the first `images` of the batch, by default on all."""
        prediction = self.network(self._images[:images])
        if prediction.equilibrium and prediction.equilibrium.solution:
            self.counts["forward_evaluations"] = prediction.equilibrium.solution.nfe
        self._optimizer.zero_grad(set_to_none=True)
        cross_entropy(prediction.logits, self._targets[:images]).backward()
        self._optimizer.step()
        if self._images.is_cuda:
            torch.cuda.synchronize(self._images.device)

    def _count_backward(self, solution: Solution) -> None:
        self.counts["backward_evaluations"] = solution.nfe


def _build(model: BenchmarkModel) -> nn.Module:
    """A fresh model whose solvers run to their limit."""
    forward, backward = model.forward, model.backward
    if forward is not None:
        forward = replace(forward, tolerance=0.0)
    if isinstance(backward, Implicit):
        backward = replace(backward, solver=replace(backward.solver, tolerance=0.0))
    return Architecture(model.model, model.head, CLASSES, forward, backward).build()


def memory_alone(model: BenchmarkModel, params: BenchmarkParams, machine: Machine) -> int:
    """Peak bytes in a fresh process, with the optimizer state, beyond what torch itself takes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_bytes, model, params, machine).result()


def _peak_bytes(model: BenchmarkModel, params: BenchmarkParams, machine: Machine) -> int:
    machine.use_threads()
    # the first convolution loads libraries and their buffers, which belong to no model
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
    before = _process_peak()
    trainee = Trainee(model, params, machine.device)
    trainee.step(images=2)  # makes the optimizer's state, which a first step adds only at its end
    trainee.step()
    if machine.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(machine.device)
    return _process_peak() - before


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
