"""Stage benchmark: time and memory of a training step, relative to one model (Sec. 4.4, Figure 4b).

All models see the same random batch of CIFAR-10's size, run eagerly in float32, and a step is everything:
forward, backward, optimiser. Steps of all models take turns, so that a machine that slows down slows all of
them; medians count. Solvers run to their limit, as in training a model that is not yet at ease: at random
weights an early stop would only flatter them. Memory is measured in a fresh process for each model: what
torch allocated at most on a GPU, the rise of the process' peak on a CPU.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mdeq import Implicit, Network, Solution
from pipeline import figures, tracking
from pipeline.checkpoints import Architecture
from pipeline.data.manifest import progress
from pipeline.machine import Machine
from pipeline.recipe import make_optimizer
from pipeline.train_params import BenchmarkModel, BenchmarkParams

CLASSES = 10
OUT = Path("results/benchmark")


def run(params: BenchmarkParams, machine: Machine) -> None:
    """Measure every model of ``params`` and write ``results/benchmark/``."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    OUT.mkdir(parents=True, exist_ok=True)
    with tracking.start("benchmark", None, params, machine) as tracker:
        memory = {
            name: memory_in_fresh_process(model, params, machine)
            for name, model in progress(params.models.items(), "benchmark: memory", len(params.models))
        }
        seconds, facts = measure_time(params, machine)
        record = _record(params, machine, seconds, memory, facts)
        (OUT / "runtime.json").write_text(json.dumps(record | {"run": tracker.run_id or ""}, indent=2) + "\n")
        relative = {name: entry["relative"] for name, entry in record["models"].items()}
        figure = figures.figure4b(relative, params.reference, f"memory ({record['memory']})")
        for file in ("figure4b.png", "figure4b.svg"):
            figures.save(figure, OUT / file)
            tracker.artifact(OUT / file)
        tracker.artifact(OUT / "runtime.json")
        values = {f"{measure}/{name}": value for name, own in relative.items() for measure, value in own.items()}
        tracker.metrics(values, step=0)


def build(model: BenchmarkModel, seed: int) -> nn.Module:
    """The model in training mode, its weights drawn from ``seed``, its solvers set to run to their limit."""
    torch.manual_seed(seed)
    network = Architecture.of(model, CLASSES).build().train()
    if isinstance(network, Network):
        backbone = network.backbone
        backbone.forward_solver = replace(backbone.forward_solver, tolerance=0.0)
        if isinstance(backbone.backward, Implicit):
            backbone.backward = Implicit(replace(backbone.backward.solver, tolerance=0.0))
    return network


class Trainee:
    """A model with its optimiser and batch: each ``step`` is one whole update, finished on the device."""

    def __init__(self, model: BenchmarkModel, params: BenchmarkParams, device: str) -> None:
        self.network = build(model, params.seed).to(device)
        self.facts = {"parameters": sum(p.numel() for p in self.network.parameters())}
        self._optimizer = make_optimizer(self.network, model.optimizer)
        self._images, self._targets = _batch(params, device)
        self._device = device
        if isinstance(self.network, Network):
            self.network.backbone.on_backward = self._note_backward

    def step(self, images: int | None = None) -> None:
        """Forward, backward, update; on the first ``images`` of the batch, by default on all."""
        prediction = self.network(self._images[:images])
        if prediction.equilibrium and prediction.equilibrium.solution:
            self.facts["forward_evaluations"] = prediction.equilibrium.solution.nfe
        self._optimizer.zero_grad(set_to_none=True)
        cross_entropy(prediction.logits, self._targets[:images]).backward()
        self._optimizer.step()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)

    def _note_backward(self, solution: Solution) -> None:
        self.facts["backward_evaluations"] = solution.nfe


def measure_time(params: BenchmarkParams, machine: Machine) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Seconds of each measured step by model, the models taking turns; and each model's facts."""
    trainees = {name: Trainee(model, params, machine.device) for name, model in params.models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    rounds = params.warm_up + params.rounds
    for _ in progress(range(rounds), "benchmark: time", rounds):
        for name, trainee in trainees.items():
            began = time.perf_counter()
            trainee.step()
            seconds[name].append(time.perf_counter() - began)
    measured = {name: values[params.warm_up :] for name, values in seconds.items()}
    return measured, {name: trainee.facts for name, trainee in trainees.items()}


def memory_in_fresh_process(model: BenchmarkModel, params: BenchmarkParams, machine: Machine) -> int:
    """Bytes that training needs at most, optimiser state included, beyond what torch itself takes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_bytes, model, params, machine.device, machine.threads).result()


def _peak_bytes(model: BenchmarkModel, params: BenchmarkParams, device: str, threads: int | None) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    # the first convolution loads libraries and their buffers, which are no model's
    nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
    before = _process_peak()
    trainee = Trainee(model, params, device)
    trainee.step(images=2)  # makes the optimiser's state, which a first step of its own would add only at its end
    trainee.step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _process_peak() - before


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _batch(params: BenchmarkParams, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(params.seed)
    images = torch.randn(params.batch, 3, params.image, params.image, generator=generator)
    targets = torch.randint(0, CLASSES, (params.batch,), generator=generator)
    return images.to(device), targets.to(device)


def _record(
    params: BenchmarkParams,
    machine: Machine,
    seconds: dict[str, list[float]],
    memory: dict[str, int],
    facts: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The content of runtime.json."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    models = {
        name: {
            "seconds": median[name],
            "seconds_all": seconds[name],
            "memory_bytes": memory[name],
            "relative": {
                "time": median[name] / median[params.reference],
                "memory": memory[name] / memory[params.reference],
            },
            **facts[name],
        }
        for name in seconds
    }
    on_gpu = machine.device.startswith("cuda")
    return {
        "models": models,
        "memory": "torch.cuda.max_memory_allocated" if on_gpu else "rise of the process' peak RSS",
        "batch": params.batch,
        "image": params.image,
        "rounds": params.rounds,
        "reference": params.reference,
        "threads": torch.get_num_threads(),
        **machine.describe(),
    }
