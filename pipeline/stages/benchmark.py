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
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mdeq.equilibrium import Implicit
from mdeq.model import Network
from mdeq.saved import Architecture
from mdeq.solvers import Solution
from pipeline import figures, files, tracking
from pipeline.machine import Machine
from pipeline.params import BenchmarkModel, BenchmarkParams, plain
from pipeline.progress import track
from pipeline.stages import writing
from pipeline.train.optimizers import make_optimizer

CLASSES = 10
OUT = Path("results/benchmark")


def run(params: BenchmarkParams, machine: Machine) -> None:
    """Measures every model of `params` and writes results/benchmark/.

    Raises:
        UserError: This stage is already running.
    """
    machine.use_threads()
    with writing(OUT, machine):
        file = OUT / "run.jsonl"
        with tracking.start("benchmark", None, plain(params), machine, file) as run:
            values, times = measure(params, machine)
            facts = _facts(params, machine) | {"run": run.id}
            files.write_text(OUT / "times.csv", times.to_csv(index=False, float_format="%.6g"))
            files.write_json(OUT / "metrics.json", values)
            files.write_json(OUT / "facts.json", facts)
            run.metrics(values, 0)
            memory = {name: values[f"{name}/memory_bytes"] for name in params.models}
            figure = figures.figure4b(times, memory, params.reference, facts["memory"])
            for name in ("figure4b.png", "figure4b.svg"):
                figures.save(figure, OUT / name)
                run.artifact(OUT / name)


def measure(params: BenchmarkParams, machine: Machine) -> tuple[dict[str, float], pd.DataFrame]:
    """The numbers of metrics.json, and the table of times.csv: model, round, seconds.

    For each model: seconds (median over the rounds), memory_bytes, relative_time (median over the
    rounds of the ratio to the reference in the same round), relative_memory, parameters, and for
    equilibrium models forward_evaluations and backward_evaluations of f in a step.
    """
    memory = {}
    for name, model in track(params.models.items(), "benchmark: memory"):
        memory[name] = memory_in_fresh_process(model, params, machine)
    times, counts = measure_time(params, machine)
    median: Any = times.groupby("model")["seconds"].median()
    relative: Any = figures.relative_times(times, params.reference).median()
    values: dict[str, float] = {}
    for name in params.models:
        own = {
            "seconds": float(median[name]),
            "memory_bytes": memory[name],
            "relative_time": float(relative[name]),
            "relative_memory": memory[name] / memory[params.reference],
        }
        values |= {f"{name}/{key}": value for key, value in (own | counts[name]).items()}
    return values, times


def measure_time(
    params: BenchmarkParams, machine: Machine
) -> tuple[pd.DataFrame, dict[str, dict[str, int]]]:
    """Model, round, seconds of each measured step, models taking turns; and each model's counts."""
    trainees = {}
    for name, model in params.models.items():
        trainees[name] = Trainee(model, params, machine.device)
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
        self.network = build(model, params.seed).to(device)
        self.counts = {"parameters": sum(p.numel() for p in self.network.parameters())}
        self._optimizer = make_optimizer(self.network, model.optimizer)
        self._images, self._targets = _batch(params, device)
        self._device = device
        if isinstance(self.network, Network):
            self.network.backbone.on_backward = self._note_backward

    def step(self, images: int | None = None) -> None:
        """Forward, backward, update; on the first `images` of the batch, by default on all."""
        prediction = self.network(self._images[:images])
        if prediction.equilibrium and prediction.equilibrium.solution:
            self.counts["forward_evaluations"] = prediction.equilibrium.solution.nfe
        self._optimizer.zero_grad(set_to_none=True)
        cross_entropy(prediction.logits, self._targets[:images]).backward()
        self._optimizer.step()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)

    def _note_backward(self, solution: Solution) -> None:
        self.counts["backward_evaluations"] = solution.nfe


def build(model: BenchmarkModel, seed: int) -> nn.Module:
    """The model in training mode, drawn from `seed`; its solvers run to their limit."""
    torch.manual_seed(seed)
    architecture = Architecture(model.model, model.head, CLASSES, model.forward, model.backward)
    network = architecture.build().train()
    if isinstance(network, Network):
        backbone = network.backbone
        backbone.forward_solver = replace(backbone.forward_solver, tolerance=0.0)
        if isinstance(backbone.backward, Implicit):
            backbone.backward = Implicit(replace(backbone.backward.solver, tolerance=0.0))
    return network


def memory_in_fresh_process(
    model: BenchmarkModel, params: BenchmarkParams, machine: Machine
) -> int:
    """Peak bytes of training, with the optimizer state, beyond what torch itself takes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_bytes, model, params, machine).result()


def _peak_bytes(model: BenchmarkModel, params: BenchmarkParams, machine: Machine) -> int:
    machine.use_threads()
    # the first convolution loads libraries and their buffers, which belong to no model
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
    before = _process_peak()
    trainee = Trainee(model, params, machine.device)
    trainee.step(
        images=2
    )  # makes the optimizer's state, which a first step would add only at its end
    trainee.step()
    if machine.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(machine.device)
    return _process_peak() - before


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _batch(params: BenchmarkParams, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(params.seed)
    images = torch.randn(params.batch, 3, params.image, params.image, generator=generator)
    targets = torch.randint(0, CLASSES, (params.batch,), generator=generator)
    return images.to(device), targets.to(device)


def _facts(params: BenchmarkParams, machine: Machine) -> dict[str, Any]:
    on_gpu = machine.device.startswith("cuda")
    return {
        "memory": "torch.cuda.max_memory_allocated" if on_gpu else "rise of the process's peak RSS",
        "reference": params.reference,
        "models": list(params.models),
        "batch": params.batch,
        "image": params.image,
        "rounds": params.rounds,
        "threads": torch.get_num_threads(),
        **machine.describe(),
    }
