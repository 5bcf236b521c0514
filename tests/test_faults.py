"""What goes wrong outside: processes that are killed, code that changes between, a store that is away.

Stages run in real processes, forked from one that has imported everything already, and are hit by real signals.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from ruamel.yaml import YAML
from test_pipeline import small

ROOT = Path(__file__).parents[1]
CLOCKED = ("time/", "memory/", "system/")

# Forks a stage for each line it reads. `hit` [where, n, signal]: at the n-th call of a place, before it does anything.
NURSERY = """
import importlib, json, os, signal, sys
import matplotlib.pyplot, mlflow.entities, mlflow.store.tracking.sqlalchemy_store, pandas, torch, torch._dynamo
import mlflow.system_metrics.system_metrics_monitor
from pipeline import checkpoints, cli, experiment, figures, progress, sync, tracking, train_params
from pipeline.stages import classify, prepare
from pathlib import Path

PLACES = {
    "before the write": (checkpoints, "write_atomically"), "before the rename": (Path, "replace"),
    "before the metrics are sent": (progress.Progress, "saved"), "in validation": (progress.Progress, "validating"),
    "after an update": (progress.Progress, "step"),
}

def hit(place, n, number):
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), 0
    def wrapped(*arguments):
        nonlocal calls
        calls += 1
        if calls == n:
            (os.kill if number == signal.SIGKILL else os.killpg)(os.getpid(), number)
        return original(*arguments)
    setattr(owner, name, wrapped)

for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ |= job["environment"]
        for module, name, value in job["set"]:
            setattr(importlib.import_module(module), name, value)
        if job["hit"]:
            hit(*job["hit"])
        sys.argv = ["pipeline", *job["arguments"]]
        cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Stages:
    """Runs stages in `folder`, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MDEQ_", "MLFLOW_", "DVC_"))}
        env = clean | {"PYTHONPATH": str(ROOT), "MDEQ_THREADS": "1", "OMP_NUM_THREADS": "1", "MDEQ_DEVICE": "cpu"}
        pipe = subprocess.PIPE
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True
        )

    def run(
        self, *arguments: str, hit: tuple[str, int, int] | None = None, settings: tuple = (), **environment: str
    ) -> tuple[int, str]:
        """The exit code (negative: the signal) and what was said."""
        log = self.folder / "said.txt"
        log.unlink(missing_ok=True)
        job = {"arguments": arguments, "hit": hit, "environment": environment, "set": settings, "log": str(log)}
        assert self._nursery.stdin and self._nursery.stdout
        print(json.dumps(job), file=self._nursery.stdin, flush=True)
        return int(self._nursery.stdout.readline()), log.read_text()

    def train(self, **options: Any) -> tuple[int, str]:
        return self.run("classify", "mdeq-small", **options)

    def close(self) -> None:
        assert self._nursery.stdin
        self._nursery.stdin.close()
        self._nursery.wait()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """A folder with a tiny CIFAR-10, and an uninterrupted training on it whose results lie in `whole`."""
    folder = tmp_path_factory.mktemp("faults")
    yaml = YAML(typ="safe")
    params = small(yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    params["prepare"]["cifar10"]["generated"] |= {"train": 96, "test": 32}
    params["classify"]["mdeq-small"] |= {"batch": 8, "augment": True}
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    stages = Stages(folder)
    for arguments in (["prepare", "cifar10"], ["classify", "mdeq-small"]):
        code, said = stages.run(*arguments)
        assert code == 0, said
    shutil.move(folder / "results" / "classify" / "mdeq-small", folder / "whole")
    yield stages
    stages.close()


def client(folder: Path, database: str = "mlflow.db") -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / database}")


def runs(store: MlflowClient) -> list[Run]:
    experiment = store.get_experiment_by_name("mdeq-demo")
    return store.search_runs([experiment.experiment_id], "tags.stage = 'classify'") if experiment else []


def recorded(store: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric's history, but for what the clock decides."""
    names = [name for name in store.get_run(run_id).data.metrics if not name.startswith(CLOCKED)]
    return {name: [(m.step, m.value) for m in store.get_metric_history(run_id, name)] for name in names}


def table(path: Path) -> pd.DataFrame:
    found = pd.read_csv(path)
    return found[[name for name in found if not name.startswith(CLOCKED)]]


def facts(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name != "run" and not name.startswith(CLOCKED)}


def test_however_it_is_stopped_it_ends_with_the_very_same(stages: Stages) -> None:
    """Hit seven times, once by other code, at every named point; the runs between make one run."""
    folder, work = stages.folder, stages.folder / "work" / "classify-mdeq-small"
    store = client(folder)
    (whole,) = runs(store)
    kill, terminate, interrupt = 9, 15, 2

    assert stages.train(hit=("before the write", 1, kill))[0] == -kill
    assert not list(work.glob("*/*.pt"))
    assert stages.train(hit=("before the rename", 4, kill))[0] == -kill
    assert len(list(work.glob("*/*.pt"))) == len(list(work.glob("*/*.partial"))) == 1
    assert stages.train(hit=("before the metrics are sent", 3, kill))[0] == -kill  # the first is at the start

    code, said = stages.train(hit=("after an update", 1, kill), settings=[("torch", "__version__", "9.9")])
    assert code == -kill and "starts afresh; its interrupted run differs in torch. Its state stays in" in said
    assert len(list(work.glob("*/*.pt"))) == 1 and len(list(work.iterdir())) == 2

    code, said = stages.train(hit=("after an update", 2, terminate))
    assert code == 143 and "Traceback" not in said, said
    code, said = stages.train(hit=("after an update", 3, interrupt))
    assert code == 130 and "Traceback" not in said and "interrupted; the same command goes on" in said, said
    assert stages.train(hit=("in validation", 3, kill))[0] == -kill
    code, said = stages.train()
    assert code == 0, said

    results = folder / "results" / "classify" / "mdeq-small"
    expected, got = (torch.load(path / "model.pt", weights_only=True)["state"] for path in (folder / "whole", results))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert facts(results) == facts(folder / "whole")
    for name in ("history.csv", "log.csv"):
        pd.testing.assert_frame_equal(table(results / name), table(folder / "whole" / name), check_exact=True)
    assert not work.exists()

    resumed = [run for run in runs(store) if run.info.run_id != whole.info.run_id and run.info.status == "FINISHED"]
    assert len(resumed) == 1 and len(runs(store)) == 3  # and that of the other torch
    assert recorded(store, resumed[0].info.run_id) == recorded(store, whole.info.run_id)
    assert len(recorded(store, whole.info.run_id)["loss/train"]) == 2
    shutil.rmtree(results)


HASTE = [("pipeline.tracking", "SECONDS_AT_START", 0.2), ("pipeline.tracking", "SECONDS_AT_END", 0.2)]


def test_a_locked_store_gets_all_of_the_run_afterwards(stages: Stages) -> None:
    store, known = client(stages.folder), {run.info.run_id for run in runs(client(stages.folder))}
    writer = sqlite3.connect(stages.folder / "mlflow.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    code, said = stages.train(settings=HASTE)
    writer.execute("ROLLBACK")
    writer.close()
    assert code == 0 and said.count("tracking: ") == 1, said
    results = stages.folder / "results" / "classify" / "mdeq-small"
    assert facts(results) == facts(stages.folder / "whole")

    code, said = stages.run("sync")
    assert (code, said) == (0, "results/classify/mdeq-small: its run is in the store now\n")
    assert stages.run("sync") == (0, "")
    (run,) = [run for run in runs(store) if run.info.run_id not in known]
    whole = json.loads((stages.folder / "whole" / "metrics.json").read_text())["run"]
    assert run.info.status == "FINISHED" and run.data.tags["machine.torch"] == version("torch")
    assert recorded(store, run.info.run_id) == recorded(store, whole)


def test_a_restored_stage_has_its_run_made_of_its_files(stages: Stages) -> None:
    """As in another clone: the results and dvc.lock came with it, the store did not."""
    results = stages.folder / "results" / "classify" / "mdeq-small"
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(stages.folder / "whole", results)
    output = {"path": "results/classify/mdeq-small/metrics.json", "md5": md5((results / "metrics.json").read_bytes())}
    entry = {"params": {"params.yaml": {"classify.mdeq-small": {"batch": 8}}}, "outs": [output]}
    (stages.folder / "dvc.lock").write_text(json.dumps({"stages": {"classify@mdeq-small": entry}}))
    store = client(stages.folder, "other.db")
    for expected in ("results/classify/mdeq-small: its run is in the store now\n", ""):
        assert stages.run("sync", MLFLOW_TRACKING_URI=f"sqlite:///{stages.folder}/other.db") == (0, expected)
    (run,) = runs(store)
    assert run.info.status == "FINISHED" and run.data.params == {"batch": "8"}
    whole = json.loads((results / "metrics.json").read_text())["run"]
    assert recorded(store, run.info.run_id) == recorded(client(stages.folder), whole)


def test_a_server_that_never_answers_holds_nothing_up_and_no_secret_is_told(stages: Stages) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        address = f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"
        code, said = stages.train(settings=HASTE, MLFLOW_TRACKING_URI=address, CITYSCAPES_PASSWORD="hunter2")
    assert code == 0 and said.count("tracking: ") == 1 and "hunter2" not in said
    results = stages.folder / "results" / "classify" / "mdeq-small"
    assert facts(results) == facts(stages.folder / "whole")
    written = [path for folder in ("results", "work", "mlartifacts") for path in (stages.folder / folder).rglob("*")]
    assert not [path for path in written if path.is_file() and b"hunter2" in path.read_bytes()]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
