"""The stages as a user runs them: real processes, real files, a small instance of every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
TRAINED = {"classify": "cifar10", "pretrain": "imagenet", "finetune": "cityscapes"}


def small(params: dict) -> dict:
    """The demo, made to run in seconds."""
    drawn = {name: section["generated"] for name, section in params["prepare"].items()}
    drawn["cifar10"] |= {"train": 320, "test": 100}
    drawn["imagenet"] |= {"classes": 3, "train_per_class": 6, "val_per_class": 2}
    drawn["cityscapes"] |= {"train": 6, "val": 2, "height": 64, "width": 128}
    for stage in TRAINED:
        params[stage] = {"mdeq-small": params[stage]["mdeq-small"]}
        entry = params[stage]["mdeq-small"]
        entry |= {"epochs": 2, "batch": 6, "seeds": [0], "checkpoint_minutes": 1e-6, "precision": "float32"}
        entry |= {"warm_up": {"layers": 2, "steps": 1}, "forward": {"kind": "broyden", "steps": 4}}
        entry["model"] |= {"channels": [8, 8] if stage == "classify" else [8, 8, 8, 8], "expansion": 2, "groups": 4}
        if "final_channels" in entry["head"]:
            entry["head"] |= {"channels": [4] * len(entry["model"]["channels"]), "final_channels": 16}
    params["classify"]["mdeq-small"] |= {"batch": 32, "jacobian": {"weight": 0.5, "probability": 0.5}}
    params["pretrain"]["mdeq-small"] |= {"image": 32}
    params["finetune"]["mdeq-small"] |= {"crop": [32, 64]}
    for section in params["evaluate"].values():
        section |= {"steps": None}  # as in training, so that both must agree
    for section in params["convergence"].values():
        section |= {"batches": 2, "batch": 1, "steps": 4}
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    yaml = YAML(typ="safe")
    params = small(yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    for name in TRAINED.values():
        pipeline(folder, "prepare", name)
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MDEQ_", "MLFLOW_", "DVC_"))}
    env = {**clean, "PYTHONPATH": str(ROOT), "MDEQ_THREADS": "1", "MDEQ_DEVICE": "cpu", **environment}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def pipeline(folder: Path, *arguments: str, tracking: str = "off") -> str:
    process = start(folder, *arguments, MDEQ_TRACKING=tracking)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    return messages


def test_the_chain_to_the_report(folder: Path) -> None:
    """Training on each set, fine-tuning from the pretrained backbone, evaluation, convergence, report."""
    for stage in TRAINED:
        pipeline(folder, stage, "mdeq-small")
    for stage, name in TRAINED.items():
        assert (folder / "results" / stage / "mdeq-small" / "curves.png").stat().st_size > 10_000
        pipeline(folder, "evaluate", name, "mdeq-small")
    pipeline(folder, "convergence", "cityscapes")
    pipeline(folder, "report")

    evaluated = json.loads((folder / "results/evaluate/cityscapes-mdeq-small/metrics.json").read_text())
    trained = json.loads((folder / "results/finetune/mdeq-small/metrics.json").read_text())
    assert evaluated["eval/miou"] == pytest.approx(trained["eval/miou"], abs=1e-9)
    report = (folder / "results/report/results.md").read_text()
    assert f"{evaluated['eval/miou']:.1f}" in report and "75.1" in report


def test_several_processes_make_one_run_and_one_result(folder: Path) -> None:
    """Started by the environment alone, as DVC would start them."""
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    store = f"sqlite:///{folder / 'several.db'}"
    process = start(folder, "classify", "mdeq-small", MDEQ_LAUNCH=launcher, MLFLOW_TRACKING_URI=store)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert messages.count("step 20/20") == 1
    metrics = json.loads((folder / "results/classify/mdeq-small/metrics.json").read_text())
    assert metrics["processes"] == 2
    assert not (folder / "work" / "classify-mdeq-small").exists()

    from mlflow import MlflowClient

    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("mdeq-demo").experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["machine.processes"] == "2"
    pipeline(folder, "evaluate", "cifar10", "mdeq-small")
    evaluated = json.loads((folder / "results/evaluate/cifar10-mdeq-small/metrics.json").read_text())
    assert evaluated["eval/top1"] == metrics["eval/top1"]  # counted by two processes, and by one
