"""Tracking: runs on a real sqlite store; resumed without doubles; and never in the way of a stage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel

from mdeq.baselines import ResNetConfig
from pipeline import params, tracking
from pipeline.checkpoints import Architecture, save_model
from pipeline.inference import Predictor
from pipeline.machine import Machine
from pipeline.tracking import MlflowTracker, NullTracker

ROOT = Path(__file__).parents[1]


class Many(BaseModel):
    values: dict[str, int]


@pytest.fixture(scope="session")
def two_at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """A store made by two processes at once, after one that was killed amid it; and how the two ended."""
    root = tmp_path_factory.mktemp("store")
    code = (
        "from pathlib import Path; from pipeline import tracking; from pipeline.machine import Machine; "
        f"root = Path({str(root)!r}); "
        "print(tracking.open_store(Machine(root, tracking_uri=f'sqlite:///{root}/mlflow.db'))[1])"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT) as killed:
        while tables_in(root) < 30:
            time.sleep(0.002)
        killed.kill()
    both = [subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    return root / "mlflow.db", [(process.returncode, *texts) for process, texts in zip(both, said, strict=True)]


def tables_in(root: Path) -> int:
    """How many tables a store that is being made has so far, whatever its file is called."""
    for file in {*root.glob("mlflow.db*")} - {*root.glob("*.lock"), *root.glob("*-journal")}:
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db,
        ):
            return db.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0]
    return 0


@pytest.fixture
def empty_store(two_at_once: tuple[Path, object]) -> Path:
    """A store with its tables: they take seconds to make, so tests copy this one."""
    return two_at_once[0]


@pytest.fixture
def machine(empty_store: Path, workspace: Path) -> Machine:
    shutil.copy(empty_store, workspace)
    return Machine(workspace, tracking_uri=f"sqlite:///{workspace / 'mlflow.db'}")


def stored(machine: Machine, run_id: str | None) -> Run:
    assert run_id is not None and machine.tracking_uri is not None
    return MlflowClient(machine.tracking_uri).get_run(run_id)


def history(machine: Machine, run_id: str | None, name: str) -> list[tuple[int, float]]:
    assert run_id is not None and machine.tracking_uri is not None
    return [(m.step, m.value) for m in MlflowClient(machine.tracking_uri).get_metric_history(run_id, name)]


def files(machine: Machine, run_id: str | None) -> set[str]:
    assert run_id is not None and machine.tracking_uri is not None
    return {entry.path for entry in MlflowClient(machine.tracking_uri).list_artifacts(run_id)}


def test_a_stage_is_a_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "classify@mdeq-small")
    section = params.load("classify", "mdeq-small")
    (machine.root / "note.txt").write_text("hello")
    with tracking.start("classify", "mdeq-small", section, machine) as tracker:
        for step in range(5):
            tracker.metrics({"loss/train": 1 / (step + 1), "solver/nfe": 19}, step)
        tracker.artifact(machine.root / "note.txt", "notes")
        tracker.dataset("cifar10", "0123456789abcdef" * 4, "data/cifar10")
        tracker.tag("fingerprint", "f" * 8)
    run = stored(machine, tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("classify/mdeq-small", "FINISHED")
    assert run.data.params["model.channels"] == "[24, 24]"
    assert run.data.params["backward.solver.kind"] == "gmres"
    tags = run.data.tags
    assert tags["stage"] == "classify" and tags["instance"] == "mdeq-small" and tags["fingerprint"] == "f" * 8
    assert tags["DVC_STAGE"] == "classify@mdeq-small" and "mlflow.source.git.commit" in tags
    assert "DVC_EXP_NAME" not in tags and tags["machine.torch"]
    assert [value.dataset.name for value in run.inputs.dataset_inputs] == ["cifar10"]
    assert len(history(machine, tracker.run_id, "loss/train")) == 5
    assert files(machine, tracker.run_id) == {"notes", "params.json"}


def test_the_stages_of_an_experiment_lie_below_one_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "classify@x")
    monkeypatch.setenv("DVC_EXP_NAME", "wide-kiss")
    parents = []
    for stage, error in (("classify", None), ("evaluate", ValueError("no"))):
        with contextlib.suppress(ValueError), tracking.start(stage, "x", None, machine) as tracker:
            parents.append(stored(machine, tracker.run_id).data.tags["mlflow.parentRunId"])
            tracking.open_store(machine)  # which closes the runs of processes that are gone
            assert stored(machine, parents[-1]).info.status == "RUNNING"
            if error:
                raise error
        assert stored(machine, parents[-1]).info.status == ("FAILED" if error else "FINISHED")
    for accuracy in (40.0, 50.0):
        with tracking.start("report", None, None, machine) as tracker:
            tracker.metrics({"cifar10/x": accuracy}, 0)
    assert tracker.run_id == parents[0] and stored(machine, parents[0]).data.metrics == {"cifar10/x": 50.0}
    assert parents[0] == parents[1] and stored(machine, parents[0]).info.run_name == "pipeline wide-kiss"
    monkeypatch.setenv("DVC_EXP_NAME", "tall-moss")
    with tracking.start("classify", "x", None, machine) as tracker:
        pass
    assert stored(machine, tracker.run_id).data.tags["mlflow.parentRunId"] != parents[0]
    monkeypatch.delenv("DVC_STAGE")
    with tracking.start("classify", "x", None, machine) as tracker:
        pass
    assert "mlflow.parentRunId" not in stored(machine, tracker.run_id).data.tags


def test_a_logged_model_predicts_from_files_wherever_it_is_loaded(machine: Machine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ["cat", "dog", "frog"]
    architecture = Architecture(ResNetConfig(width=8), None, 3)
    path = tmp_path / "classify" / "tiny" / "model.pt"
    with tracking.start("classify", "tiny", None, machine) as tracker:
        meta = {"stage": "classify", "model": "tiny", "names": names, "params": {}, "run_id": tracker.run_id}
        save_model(path, architecture, architecture.build(), meta)
        tracker.model(path, segments=False)
    assert isinstance(tracker, MlflowTracker) and tracker.complete
    assert tracking.register(machine, tracker.run_id, "things") == 1
    assert tracking.register(machine, tracker.run_id, "things") == 2
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    code = (
        "import sys, mlflow; mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/things/2')\n"
        "import pipeline; assert '/code/pipeline/' in pipeline.__file__, pipeline.__file__\n"
        "assert model.metadata.signature.inputs.input_names() == ['path'] and model.input_example is not None\n"
        "print(model.predict([{'path': sys.argv[2]}]).to_json())"
    )
    command = [sys.executable, "-c", code, machine.tracking_uri or "", str(tmp_path / "photo.png")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MDEQ_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    best = (predictor := Predictor(path, machine)).best(predictor(photo).value)
    assert answer["classes"]["0"] == [name for name, _ in best]
    assert answer["probabilities"]["0"] == pytest.approx([p for _, p in best], abs=1e-5)


def test_what_was_not_tracked_cannot_be_registered(machine: Machine) -> None:
    for run_id in (None, "0" * 32):
        with pytest.raises(tracking.StoreError, match="things: .*; run `python -m pipeline sync` first"):
            tracking.register(machine, run_id, "things")


def test_more_params_than_a_batch_takes(machine: Machine) -> None:
    with tracking.start("benchmark", None, Many(values={f"k{i}": i for i in range(250)}), machine) as tracker:
        pass
    run = stored(machine, tracker.run_id)
    assert run.info.run_name == "benchmark" and len(run.data.params) == 250


def test_more_metrics_than_a_batch_takes_arrive_in_batches(machine: Machine) -> None:
    with tracking.start("classify", "x", None, machine) as tracker:
        for step in range(1300):
            tracker.metrics({"loss/train": step, "lr": 0.1}, step)
    assert len(history(machine, tracker.run_id, "loss/train")) == 1300


def test_a_resumed_run_has_each_step_once_and_its_first_params(machine: Machine) -> None:
    first = Many(values={"a": 1})
    record = machine.root / "work" / "run"
    with pytest.raises(RuntimeError), tracking.start("classify", "x", first, machine, record) as tracker:
        for step in range(10):
            tracker.metrics({"loss/train": step}, step)
        raise RuntimeError("the power went")
    assert stored(machine, tracker.run_id).info.status == "FAILED"
    with tracking.start("classify", "x", Many(values={"a": 2}), machine, record) as resumed:
        for step in range(5, 15):  # goes on from a checkpoint that is older than the last metric
            resumed.metrics({"loss/train": step}, step)
        resumed.metrics({"eval/top1": 0.5}, 7)
    assert resumed.run_id == tracker.run_id
    run = stored(machine, resumed.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"values.a": "1"}
    assert history(machine, resumed.run_id, "loss/train") == [(step, float(step)) for step in range(15)]
    assert history(machine, resumed.run_id, "eval/top1") == [(7, 0.5)]


def test_a_run_that_the_store_lost_is_begun_anew(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    record = machine.root / "run"
    record.write_text("0" * 32)
    with tracking.start("classify", "x", None, machine, record) as tracker:
        tracker.metrics({"loss/train": 1.0}, 0)
    assert capsys.readouterr().err == ""
    assert history(machine, tracker.run_id, "loss/train") == [(0, 1.0)]


def test_interrupted_runs_are_killed_not_failed(machine: Machine) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.start("classify", "x", None, machine) as tracker:
        raise KeyboardInterrupt
    assert stored(machine, tracker.run_id).info.status == "KILLED"


def test_a_store_out_of_reach_is_told_once_and_stops_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    machine = Machine(workspace, tracking_uri="http://me:secret@127.0.0.1:9")
    with tracking.start("classify", "x", Many(values={"a": 1}), machine) as tracker:
        for step in range(3000):
            tracker.metrics({"loss/train": 1.0}, step)
        tracker.artifact(workspace / "none.txt")
        tracker.dataset("cifar10", "0", "data")
        tracker.tag("a", "b")
        tracker.flush()
    said = capsys.readouterr().err
    assert tracker.run_id and said.count("tracking: ") == said.count("\n") == 1
    assert "pipeline sync` hands over what the store lacks" in said and "secret" not in said


def test_a_store_that_comes_back_gets_what_it_missed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries, log_batch = [], MlflowClient.log_batch
    monkeypatch.setattr(tracking, "SECONDS_A_RETRY", 0.01)

    def away_at_first(*arguments: Any, **others: Any) -> None:
        tries.append(1)
        if len(tries) < 5:
            raise ConnectionError("away")
        log_batch(*arguments, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", away_at_first)
    with tracking.start("classify", "x", None, machine) as tracker:
        tracker.metrics({"loss/train": 1.0}, 0)
        tracker.flush()
        while len(tries) < 5:
            time.sleep(0.001)
        tracker.metrics({"loss/train": 2.0}, 1)
        tracker.metrics({"loss/train": 9.0}, 1)  # each step once
    assert "ConnectionError: away" in capsys.readouterr().err
    assert history(machine, tracker.run_id, "loss/train") == [(0, 1.0), (1, 2.0)]
    assert stored(machine, tracker.run_id).info.status == "FINISHED"


def test_a_file_that_is_not_there_leaves_the_run_whole(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    with tracking.start("classify", "x", None, machine) as tracker:
        tracker.metrics({"loss/train": 1.0}, 0)
        tracker.artifact(machine.root / "none.png")
    assert "none.png" in capsys.readouterr().err
    assert stored(machine, tracker.run_id).info.status == "FINISHED"
    assert history(machine, tracker.run_id, "loss/train") == [(0, 1.0)]


def test_tracking_can_be_switched_off_and_is_off_in_helper_processes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(tracking.start("classify", "x", None, Machine(machine.root)), NullTracker)
    monkeypatch.setenv("MDEQ_TRACKING", "off")
    assert Machine.from_environment("cpu").tracking_uri is None
    monkeypatch.setenv("RANK", "1")
    assert isinstance(tracking.start("classify", "x", None, machine), NullTracker)
    with NullTracker() as tracker:
        tracker.metrics({"loss/train": 1.0}, 0)


def test_the_runs_page_opens_on_the_columns_that_matter(machine: Machine) -> None:
    """The tags by which MLflow 3.15 and later keep a saved view."""
    client, experiment = tracking.open_store(machine)
    tags = client.get_experiment(experiment).tags
    view = json.loads(tags["mlflow.sharedViewState.results"])
    assert view["name"] == "results" and isinstance(view["createdAt"], int)
    assert "metrics.`eval/top1`" in json.loads(view["state"])["selectedColumns"]
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_machines_load_is_recorded_and_goes_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    counts = [0]
    while len(counts) < 3:
        with tracking.start("classify", "x", None, machine, machine.root / "run") as tracker:
            time.sleep(0.3)
        steps = [step for step, _ in history(machine, tracker.run_id, "system/cpu_utilization_percentage")]
        assert steps == list(range(len(steps))) and len(steps) > counts[-1]
        counts.append(len(steps))


def test_the_store_lies_in_the_main_checkout_during_queued_experiments(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", "/somewhere")
    assert Machine.from_environment("cpu").tracking_uri == "sqlite:////somewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Machine.from_environment("cpu").tracking_uri == "http://mlflow:5000"


def test_two_stages_may_create_one_store_at_once_after_one_that_was_killed(
    two_at_once: tuple[Path, list[tuple[int, str, str]]],
) -> None:
    (first, second) = two_at_once[1]
    assert first[0] == second[0] == 0, (first, second)
    assert first[1] == second[1]


def test_flatten_names_nested_params() -> None:
    nested = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": {}}
    assert tracking.flatten(nested) == {"a.b": 1, "a.c.d": [1, 2], "e": None, "f": {}}


def test_finite_keeps_numbers_alone() -> None:
    values = {"eval/top1": 0.5, "n": 3, "bad": float("nan"), "device": "cpu", "flag": True}
    assert tracking.finite(values) == {"eval/top1": 0.5, "n": 3.0}
