"""The benchmark on tiny models: whole steps in turns, solvers to their limit, ratios to the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mdeq import Network
from pipeline.machine import Machine
from pipeline.stages import benchmark
from pipeline.train_params import BenchmarkParams

SETTINGS = {
    "batch": 4,
    "image": 8,
    "rounds": 3,
    "warm_up": 1,
    "reference": "explicit",
    "models": {
        "implicit": {
            "model": {"kind": "mdeq", "channels": [8], "expansion": 1, "groups": 2},
            "head": {"kind": "classification", "channels": [2], "final_channels": 8},
            "forward": {"kind": "broyden", "steps": 5, "tolerance": 1.0},
            "backward": {"kind": "implicit", "solver": {"kind": "gmres", "steps": 3, "tolerance": 1.0}},
            "optimizer": {"kind": "sgd", "lr": 0.1},
        },
        "explicit": {"model": {"kind": "resnet18", "width": 1}, "optimizer": {"kind": "adam", "lr": 0.1}},
    },
}


@pytest.fixture
def params() -> BenchmarkParams:
    return BenchmarkParams.model_validate_json(json.dumps(SETTINGS))


def test_models_take_turns_and_solvers_run_to_their_limit(
    params: BenchmarkParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    step = benchmark.Trainee.step
    monkeypatch.setattr(benchmark.Trainee, "step", lambda own: order.append(own.facts["parameters"]) or step(own))
    seconds, facts = benchmark.measure_time(params, Machine(tmp_path))
    assert order == [facts["implicit"]["parameters"], facts["explicit"]["parameters"]] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert facts["implicit"]["forward_evaluations"] == 6 and facts["implicit"]["backward_evaluations"] == 3
    assert "forward_evaluations" not in facts["explicit"]


def test_a_step_is_a_whole_update(params: BenchmarkParams) -> None:
    trainee = benchmark.Trainee(params.models["implicit"], params, "cpu")
    assert isinstance(trainee.network, Network) and trainee.network.training
    before = [parameter.detach().clone() for parameter in trainee.network.parameters()]
    trainee.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainee.network.parameters(), strict=True))


def test_the_stage_writes_medians_relative_to_the_reference(
    params: BenchmarkParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "memory_in_fresh_process", lambda model, *_: 100 if model.head is None else 25)
    benchmark.run(params, Machine(tmp_path))
    record = json.loads(Path("results/benchmark/runtime.json").read_text())
    implicit, explicit = record["models"]["implicit"], record["models"]["explicit"]
    assert explicit["relative"] == {"time": 1.0, "memory": 1.0} and implicit["relative"]["memory"] == 0.25
    assert implicit["seconds"] == sorted(implicit["seconds_all"])[1]
    assert implicit["relative"]["time"] == pytest.approx(implicit["seconds"] / explicit["seconds"])
    assert {"device", "threads", "torch", "commit", "batch"} <= set(record)
    assert Path("results/benchmark/figure4b.png").is_file() and Path("results/benchmark/figure4b.svg").is_file()


@pytest.mark.slow
def test_memory_is_that_of_the_model_alone(params: BenchmarkParams, tmp_path: Path) -> None:
    measured = benchmark.memory_in_fresh_process(params.models["explicit"], params, Machine(tmp_path))
    assert 0 <= measured < 200 * 2**20  # torch itself takes more
