"""The benchmark on tiny models: whole steps in turns, solvers to their limit, ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from mdeq import Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig
from mdeq.baselines import ResNetConfig
from pipeline.machine import Machine
from pipeline.params import BenchmarkModel, BenchmarkParams
from pipeline.recipe import Adam, Sgd
from pipeline.stages import benchmark

PARAMS = BenchmarkParams(
    batch=4,
    image=8,
    rounds=5,
    warm_up=1,
    reference="explicit",
    models={
        "implicit": BenchmarkModel(
            model=MDEQConfig((8,), expansion=1, groups=2),
            head=ClassificationHeadConfig((2,), 8),
            forward=Broyden(steps=5, tolerance=1.0),
            backward=Implicit(Gmres(steps=3, tolerance=1.0)),
            optimizer=Sgd(lr=0.1),
        ),
        "explicit": BenchmarkModel(model=ResNetConfig(width=1), optimizer=Adam(lr=0.1)),
    },
)


def test_a_step_is_a_whole_update() -> None:
    trainee = benchmark.Trainee(PARAMS.models["implicit"], PARAMS, "cpu")
    before = [parameter.detach().clone() for parameter in trainee.network.parameters()]
    trainee.step()
    pairs = zip(before, trainee.network.parameters(), strict=True)
    assert trainee.network.training and any(not torch.equal(old, new) for old, new in pairs)


def test_models_take_turns_and_the_stage_writes_numbers_facts_and_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    order: list[int] = []
    step = benchmark.Trainee.step

    def noted(own: benchmark.Trainee) -> None:
        order.append(own.counts["parameters"])
        step(own)

    def memory(model: BenchmarkModel, *_: object) -> int:
        return 100 if model.head is None else 25

    monkeypatch.setattr(benchmark.Trainee, "step", noted)
    monkeypatch.setattr(benchmark, "memory_alone", memory)
    benchmark.run(PARAMS, Machine(tmp_path))
    out = Path("results/benchmark")
    names = "facts.json figure4b.png figure4b.svg metrics.json run.jsonl times.csv"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    values = json.loads((out / "metrics.json").read_text())
    assert all(type(value) is float for value in values.values())
    assert order == [values["implicit/parameters"], values["explicit/parameters"]] * 6
    assert values["implicit/forward_evaluations"] == 6  # not stopped by a tolerance of 1
    assert values["implicit/backward_evaluations"] == 3
    assert "explicit/forward_evaluations" not in values
    assert values["explicit/relative_time"] == 1 == values["explicit/relative_memory"]
    assert values["implicit/relative_memory"] == 0.25 and values["implicit/memory_bytes"] == 25
    times = pd.read_csv(out / "times.csv").pivot(index="round", columns="model", values="seconds")
    assert times.index.tolist() == [1, 2, 3, 4, 5]
    assert values["implicit/seconds"] == pytest.approx(sorted(times["implicit"])[2], rel=1e-4)
    ratios = sorted(times["implicit"] / times["explicit"])
    assert values["implicit/relative_time"] == pytest.approx(ratios[2], rel=1e-3)
    facts = json.loads((out / "facts.json").read_text())
    assert {"device", "threads", "torch", "commit", "batch", "run", "memory"} <= facts.keys()


@pytest.mark.slow
def test_memory_is_that_of_the_model_alone(tmp_path: Path) -> None:
    model = PARAMS.models["explicit"]
    measured = benchmark.memory_alone(model, PARAMS, Machine(tmp_path))
    assert 0 <= measured < 200 * 2**20  # torch itself takes more
