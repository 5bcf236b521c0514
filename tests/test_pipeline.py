"""The stages as a user runs them: real processes, real files, DVC, small instances."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import mdeq
from pipeline.sets import SETS

ROOT = Path(__file__).parents[1]
OUT = Path("results/classify/mdeq-small")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("MDEQ_", "MLFLOW_", "DVC_"))}
ENVIRONMENT = CLEAN | {
    "PYTHONPATH": str(ROOT),
    "MDEQ_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MDEQ_DEVICE": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def small() -> dict[str, Any]:
    """The demo's params, made to run in seconds."""
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    drawn = {name: section["generated"] for name, section in params["prepare"].items()}
    drawn["cifar10"] |= {"train": 96, "test": 40}
    drawn["imagenet"] |= {"classes": 3, "train_per_class": 6, "val_per_class": 2}
    drawn["cityscapes"] |= {"train": 6, "val": 2, "height": 64, "width": 128}
    for dataset in SETS.values():
        entry = params[dataset.stage]["mdeq-small"]
        params[dataset.stage] = {"mdeq-small": entry}
        scales = 2 if dataset.name == "cifar10" else 4
        entry["model"] |= {"channels": [8] * scales, "expansion": 2, "groups": 4}
        entry |= {"epochs": 2, "batch": 6, "checkpoint_minutes": 1e-6, "precision": "float32"}
        entry |= {"forward": {"kind": "broyden", "steps": 4}, "log_every": 1}
        entry["warm_up"] = {"layers": 2, "steps": 1}
        if entry["head"]["kind"] == "classification":
            entry["head"] |= {"channels": [4] * scales, "final_channels": 16}
    params["classify"]["mdeq-small"] |= {"batch": 16, "warm_start": None, "average": 0.0}
    params["pretrain"]["mdeq-small"] |= {"image": 32}
    params["finetune"]["mdeq-small"] |= {"crop": [32, 64]}
    for section in params["evaluate"].values():
        section |= {"steps": None, "limit": None}  # as in training, so that both must agree
    for section in params["convergence"].values():
        section |= {"batches": 2, "batch": 1, "steps": 4}
    return params


def write(params: dict[str, Any], folder: Path) -> Path:
    """The folder, with these params."""
    folder.mkdir(parents=True, exist_ok=True)
    YAML(typ="safe").dump(params, folder / "params.yaml")
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    pipe = subprocess.PIPE
    env = ENVIRONMENT | environment
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def run(folder: Path, *arguments: str, tracking: str = "off") -> str:
    process = start(folder, *arguments, MDEQ_TRACKING=tracking)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    return messages


def metrics(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, Any]:
    return mdeq.load(folder / OUT / "model.safetensors").state_dict()


def same_weights(*folders: Path) -> bool:
    one, other = map(weights, folders)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small params and their data."""
    folder = write(small(), tmp_path_factory.mktemp("pipeline"))
    for name in SETS:
        run(folder, "prepare", name)
    return folder


def clone(folder: Path, target: Path) -> Path:
    """A folder of its own with the same params and prepared data."""
    for name in ("data", "results/data"):
        shutil.copytree(folder / name, target / name)
    shutil.copy(folder / "params.yaml", target)
    return target


@pytest.mark.slow
def test_the_chain_to_the_report(folder: Path) -> None:
    """Training on each set, fine-tuning from the backbone, evaluation, convergence, report."""
    for dataset in SETS.values():
        run(folder, dataset.stage, "mdeq-small")
        trained = folder / "results" / dataset.stage / "mdeq-small"
        assert (trained / "curves.png").stat().st_size > 5_000
        run(folder, "evaluate", dataset.name, "mdeq-small")
        evaluated = folder / f"results/evaluate/{dataset.name}-mdeq-small"
        ours, again = metrics(trained), metrics(evaluated)
        assert ours[dataset.measure] == pytest.approx(again[dataset.measure], abs=1e-9)
        assert all(isinstance(value, int | float) for value in (*ours.values(), *again.values()))
    run(folder, "convergence", "cityscapes")
    run(folder, "report")
    report = (folder / "results/report/report.md").read_text(encoding="utf-8")
    assert f"{again['eval/miou']:.1f}" in report and "75.1" in report


@pytest.mark.slow
def test_several_processes_make_one_run_and_one_result(folder: Path, tmp_path: Path) -> None:
    """Started by the environment alone, as DVC would start them."""
    folder = clone(folder, tmp_path / "several")
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    store = f"sqlite:///{folder / 'several.db'}"
    process = start(
        folder, "classify", "mdeq-small", MDEQ_LAUNCH=launcher, MLFLOW_TRACKING_URI=store
    )
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert messages.count("step 12/12") == 1
    assert metrics(folder / OUT, "facts.json")["processes"] == 2
    assert not list((folder / "work").glob("classify-*/*/*.pt"))

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("mdeq-demo").experiment_id
    (recorded,) = client.search_runs([experiment], "tags.stage = 'classify'")
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["machine.processes"] == "2"
    run(folder, "evaluate", "cifar10", "mdeq-small")
    evaluated = metrics(folder / "results/evaluate/cifar10-mdeq-small")
    assert evaluated["eval/top1"] == metrics(folder / OUT)["eval/top1"]


@pytest.mark.slow
def test_queued_experiments_and_a_clone_train_at_once_on_one_store(
    folder: Path, tmp_path: Path
) -> None:
    """Workers of DVC's queue have a folder each and one root; generated data are each one's own."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    other, queued, shorter = (
        clone(folder, tmp_path / name) for name in ("other", "queued", "shorter")
    )
    params = small()
    params["classify"]["mdeq-small"]["epochs"] = 1
    params["prepare"]["cifar10"]["generated"]["train"] = 64
    write(params, shorter)
    root = {"DVC_ROOT": str(tmp_path / "root")}
    (tmp_path / "root").mkdir()

    def at_once(*commands: tuple[Path, dict[str, str], tuple[str, ...]]) -> None:
        started = [
            start(where, *words, MLFLOW_TRACKING_URI=store, **extra)
            for where, extra, words in commands
        ]
        for process in started:
            _, messages = process.communicate(timeout=300)
            assert process.returncode == 0, messages

    at_once(*((where, root, ("prepare", "cifar10")) for where in (queued, shorter)))
    trainings = [(other, {}), (queued, root), (shorter, root)]
    at_once(*((where, extra, ("classify", "mdeq-small")) for where, extra in trainings))
    assert metrics(shorter / "results/data/cifar10", "summary.json")["images"]["train"] == 64
    assert same_weights(other, queued)

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("mdeq-demo").experiment_id
    found = client.search_runs([experiment], "tags.stage = 'classify'")
    assert [run.info.status for run in found] == ["FINISHED"] * 3


@pytest.mark.slow
def test_dvc_is_terminated_with_its_stage_and_resumes_it(folder: Path, tmp_path: Path) -> None:
    """`make repro` gets SIGTERM as a group; the next `dvc repro` ends with the same weights."""
    whole, own = (clone(folder, tmp_path / name) for name in ("whole", "own"))
    run(whole, "classify", "mdeq-small")
    outs = [f"{OUT}/{name}" for name in ("model.safetensors", "metrics.json")]
    command = "python -m pipeline classify mdeq-small"
    stage = {"cmd": command, "deps": ["params.yaml"], "outs": outs}
    (own / "dvc.yaml").write_text(json.dumps({"stages": {"classify": stage}}))
    for name in ("pyproject.toml", "constraints.txt"):
        (own / name).touch()
        os.utime(own / name, (0, 0))
    environment = ENVIRONMENT | {"MDEQ_TRACKING": "off"}
    group = {"cwd": own, "env": environment, "start_new_session": True, "text": True}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    subprocess.run(["dvc", "init", "--no-scm", "-q"], check=True, **group)

    make = ["make", "-f", str(ROOT / "Makefile"), "repro", "STAMP=params.yaml"]
    with subprocess.Popen(make, **group, **said) as process:
        awaited(lambda: list((own / "work").glob("classify*/*/*.pt")))
        os.killpg(process.pid, signal.SIGTERM)
        messages, _ = process.communicate(timeout=120)
    assert process.returncode and "Traceback" not in messages, messages
    awaited(lambda: not alive(process.pid))
    assert (
        list((own / "work").glob("classify*/*/*.pt")) and not (own / OUT / "metrics.json").exists()
    )

    done = subprocess.run(["dvc", "repro"], **group, **said)
    assert done.returncode == 0, done.stdout
    assert same_weights(own, whole)


def awaited(done: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
