"""What goes wrong outside: processes that are killed, code that changes between, a store that is away.

Stages run in real processes, forked from one that has imported everything already, and are hit by real signals.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("MDEQ_", "MLFLOW_", "DVC_"))} | {
    "PYTHONPATH": str(ROOT), "MDEQ_THREADS": "1", "OMP_NUM_THREADS": "1", "MDEQ_DEVICE": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}  # fmt: skip

# Forks the stages of each line it reads, all at once. `hit` [where, n, whom]: at the n-th call of a place, before or
# "after" it; `whom` is a signal to the stage, or [signal, group, port to wait for].
NURSERY = """
import importlib, json, mlflow, os, signal, socket, sys, time
import matplotlib.pyplot, mlflow.entities, mlflow.store.tracking.sqlalchemy_store, pandas, torch, torch._dynamo
import mlflow.system_metrics.system_metrics_monitor
from pipeline import checkpoints, cli, experiment, figures, progress, sync, tracking, train_params
from pipeline.data import imagenet
from pipeline.stages import classify, evaluate, prepare
from pathlib import Path

PLACES = {
    "before the write": (checkpoints, "write_atomically"), "before the rename": (Path, "replace"),
    "before the metrics are sent": (progress.Progress, "saved"), "in validation": (progress.Progress, "validating"),
    "after an update": (progress.Progress, "step"), "after the run is made": (mlflow.MlflowClient, "create_run"),
    "in a loader": (imagenet.ImageNet, "__getitem__"),
}

def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0

def strike(whom):
    if isinstance(whom, list):
        os.killpg(whom[1], whom[0])
        for up in (False, True) if whom[2] else ():
            while answers(whom[2]) != up:
                time.sleep(0.1)
    else:
        (os.kill if whom == signal.SIGKILL else os.killpg)(os.getpid(), whom)

def hit(place, n, whom):
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), 0
    def wrapped(*arguments, **named):
        nonlocal calls
        calls += 1
        result = original(*arguments, **named) if place.startswith("after") else None
        if calls == n:
            strike(whom)
        return result if place.startswith("after") else original(*arguments, **named)
    setattr(owner, name, wrapped)

def become(job):
    os.setsid()
    os.chdir(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    os.environ |= job["environment"]
    for module, name, value in job["set"]:
        setattr(importlib.import_module(module), name, value)
    if job["hit"]:
        hit(*job["hit"])
    sys.argv = ["pipeline", *job["arguments"]]
    cli.main()

for line in sys.stdin:
    children = []
    for job in json.loads(line):
        if not (child := os.fork()):
            become(job)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Stages:
    """Runs stages in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command, pipe = [sys.executable, "-c", NURSERY], subprocess.PIPE
        self._nursery = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True)

    def run(self, *arguments: str, folder: Path | None = None, **options: Any) -> tuple[int, str]:
        """The exit code (negative: the signal) and what was said."""
        (code,) = self.run_all(self.job(*arguments, folder=folder, **options))
        return code, ((folder or self.folder) / "said.txt").read_text()

    def job(
        self,
        *arguments: str,
        folder: Path | None = None,
        hit: tuple | None = None,
        settings: Any = (),
        **environment: str,
    ) -> dict[str, Any]:
        where = str(folder or self.folder)
        return {"arguments": arguments, "folder": where, "hit": hit, "environment": environment, "set": settings}

    def run_all(self, *jobs: dict[str, Any]) -> list[int]:
        """The exit codes of stages that run at once."""
        assert self._nursery.stdin and self._nursery.stdout
        print(json.dumps(jobs), file=self._nursery.stdin, flush=True)
        return json.loads(self._nursery.stdout.readline())

    def clone(self, folder: Path) -> Path:
        """A folder with the same params and prepared data."""
        for name in ("data", "results/data"):
            shutil.copytree(self.folder / name, folder / name)
        shutil.copy(self.folder / "params.yaml", folder)
        return folder

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
    params["pretrain"]["mdeq-small"] |= {"batch": 3}
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


def runs(store: MlflowClient, stage: str = "classify") -> list[Run]:
    experiment = store.get_experiment_by_name("mdeq-demo")
    return store.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'") if experiment else []


def recorded(store: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric's history, but for what the clock decides."""
    names = [name for name in store.get_run(run_id).data.metrics if not name.startswith(CLOCKED)]
    return {name: [(m.step, m.value) for m in store.get_metric_history(run_id, name)] for name in names}


def table(path: Path) -> pd.DataFrame:
    found = pd.read_csv(path)
    return found[[name for name in found if not name.startswith(CLOCKED)]]


def same_weights(*folders: Path) -> bool:
    one, other = (torch.load(folder / "model.pt", weights_only=True)["state"] for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def facts(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name != "run" and not name.startswith(CLOCKED)}


def test_a_stage_without_a_state_leaves_no_run_open(stages: Stages) -> None:
    """Killed with SIGKILL, its run and that of the whole are closed by whatever opens the store next."""
    store, results = client(stages.folder), stages.folder / "results"
    shutil.copytree(stages.folder / "whole", results / "classify" / "mdeq-small", dirs_exist_ok=True)
    evaluate = ("evaluate", "cifar10", "mdeq-small")
    code, _ = stages.run(*evaluate, hit=("after the run is made", 2, 9), DVC_STAGE="evaluate", DVC_EXP_NAME="killed")
    assert code == -9
    assert [run.info.status for stage in ("evaluate", "pipeline") for run in runs(store, stage)] == ["RUNNING"] * 2
    code, said = stages.run(*evaluate)
    assert code == 0, said
    assert sorted(run.info.status for run in runs(store, "evaluate")) == ["FINISHED", "KILLED"]
    assert [run.info.status for run in runs(store, "pipeline")] == ["KILLED"]
    assert not list((stages.folder / "work" / "runs").rglob("*-mark"))
    assert stages.run("report")[0] == 0
    code, said = stages.run("sync")
    assert code == 0 and "report" not in said, said
    for name in ("classify", "evaluate", "report"):
        shutil.rmtree(results / name)


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
    assert code == 0 and "results/classify/mdeq-small: its run is in the store now\n" in said, said
    assert stages.run("sync") == (0, "")
    (run,) = [run for run in runs(store) if run.info.run_id not in known]
    assert json.loads((results / "metrics.json").read_text())["run"] == run.data.tags["mark"]  # which is no run's id
    whole = json.loads((stages.folder / "whole" / "metrics.json").read_text())["run"]
    assert run.info.status == "FINISHED" and run.data.tags["machine.torch"] == version("torch")
    assert recorded(store, run.info.run_id) == recorded(store, whole)


def test_restored_stages_have_their_runs_made_of_their_files(stages: Stages) -> None:
    """As in another clone: the results and dvc.lock came with it, the store did not."""
    results = stages.folder / "results" / "classify" / "mdeq-small"
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(stages.folder / "whole", results)
    output = {"path": "results/classify/mdeq-small/metrics.json", "md5": md5((results / "metrics.json").read_bytes())}
    entry = {"params": {"params.yaml": {"classify.mdeq-small": {"batch": 8}}}, "outs": [output]}
    (stages.folder / "dvc.lock").write_text(json.dumps({"stages": {"classify@mdeq-small": entry}}))
    convergence = stages.folder / "results" / "convergence" / "cifar10"
    convergence.mkdir(parents=True)
    (convergence / "metrics.json").write_text('{"broyden/residual": 0.25, "builds_on": "a classify", "run": ""}')
    rows = ["solver,batch,evaluation,change,residual", "broyden,0,1,,1.0", "broyden,0,2,0.5,0.5"]
    (convergence / "trace.csv").write_text("\n".join([*rows, "broyden,1,1,,1.0", "broyden,1,2,1.0,0.0"]))
    report = stages.folder / "results" / "report"
    (report / "figures").mkdir(parents=True)
    (report / "figures" / "a.svg").touch()
    (report / "results.json").write_text('{"headline": {"cifar10/mdeq-small": 50.0}}')
    store, other = client(stages.folder, "other.db"), {"MLFLOW_TRACKING_URI": f"sqlite:///{stages.folder}/other.db"}
    lacking = ("classify/mdeq-small", "convergence/cifar10", "data/cifar10", "report")
    assert stages.run("sync", **other) == (
        0,
        "".join(f"results/{name}: its run is in the store now\n" for name in lacking),
    )
    assert stages.run("sync", **other) == (0, "")
    shutil.rmtree(convergence.parent)
    shutil.rmtree(report)
    (run,) = runs(store)
    assert run.info.status == "FINISHED" and run.data.params == {"batch": "8"}
    whole = json.loads((results / "metrics.json").read_text())["run"]
    assert recorded(store, run.info.run_id) == recorded(client(stages.folder), whole)
    (run,) = runs(store, "convergence")
    assert recorded(store, run.info.run_id) == {
        "solver/broyden_change": [(2, 0.75)],
        "solver/broyden_residual": [(1, 1.0), (2, 0.25)],
        "broyden/residual": [(0, 0.25)],
    }
    assert run.data.tags["builds_on"] == "a classify"
    (run,) = runs(store, "prepare")
    summary = json.loads((stages.folder / "results/data/cifar10/summary.json").read_text())
    assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [summary["manifest"][:36]]
    (run,) = runs(store, "report")
    assert run.data.metrics == {"cifar10/mdeq-small": 50.0}
    assert [file.path for file in store.list_artifacts(run.info.run_id)] == ["figures", "results.json"]


def test_a_server_that_never_answers_holds_nothing_up_and_no_secret_is_told(stages: Stages) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        address = f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"
        code, said = stages.train(settings=HASTE, MLFLOW_TRACKING_URI=address, CITYSCAPES_PASSWORD="hunter2")
    assert code == 0 and said.count("tracking: ") == 1 and "hunter2" not in said
    results = stages.folder / "results" / "classify" / "mdeq-small"
    assert facts(results) == facts(stages.folder / "whole")
    written = [path for folder in ("results", "work", "mlartifacts") for path in (stages.folder / folder).rglob("*")]
    assert not [path for path in written if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.fixture(scope="module")
def server(stages: Stages) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """An MLflow server before the store, in a group of its own: its address, and a list to which a second one is added
    when the first one was killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[subprocess.Popen] = []

    def serve() -> None:
        command = [sys.executable, "-m", "pipeline", "ui", "--port", str(port)]
        with (stages.folder / "server.txt").open("a") as said:
            group = {"cwd": stages.folder, "env": ENVIRONMENT, "start_new_session": True}
            started.append(subprocess.Popen(command, stdout=said, stderr=said, **group))
        while started[-1].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
            time.sleep(0.1)

    def once_more() -> None:
        started[0].wait()
        if not over.is_set():
            serve()

    over = threading.Event()
    serve()
    again = threading.Thread(target=once_more)
    again.start()
    yield f"http://127.0.0.1:{port}", started
    over.set()
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again.join()


@contextlib.contextmanager
def slowly(port: int, seconds: float) -> Iterator[str]:
    """The address of a proxy that passes on each answer of a server only after some seconds."""

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as server, contextlib.suppress(OSError):
                threading.Thread(target=copy, args=(self.request, server, 0.0), daemon=True).start()
                copy(server, self.request, seconds)

    def copy(source: socket.socket, target: socket.socket, delay: float) -> None:
        with contextlib.suppress(OSError):
            while sent := source.recv(1 << 16):
                time.sleep(delay)
                target.sendall(sent)
            target.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()


def test_a_slow_server_gets_all_of_the_run_afterwards(
    stages: Stages, server: tuple[str, list[subprocess.Popen]]
) -> None:
    address, _ = server
    store, known = client(stages.folder), {run.info.run_id for run in runs(client(stages.folder))}
    with slowly(int(address.rpartition(":")[2]), seconds=1.0) as slow:
        code, said = stages.train(settings=HASTE, MLFLOW_TRACKING_URI=slow)
    assert code == 0 and said.count("tracking: ") == 1 and "Traceback" not in said, said
    assert same_weights(stages.folder / "results" / "classify" / "mdeq-small", stages.folder / "whole")
    code, said = stages.run("sync", MLFLOW_TRACKING_URI=address)
    assert code == 0 and "results/classify/mdeq-small: its run is in the store now" in said, said
    (run,) = [run for run in runs(store) if run.info.run_id not in known]
    whole = json.loads((stages.folder / "whole" / "metrics.json").read_text())["run"]
    assert run.info.status == "FINISHED" and recorded(store, run.info.run_id) == recorded(store, whole)


def test_a_server_that_freezes_or_dies_amid_a_stage(stages: Stages, server: tuple[str, list[subprocess.Popen]]) -> None:
    """Frozen, it takes requests and answers late, when the stage has ended: `sync` does the rest. Killed and started
    again it gets all from the stage itself."""
    address, started = server
    store, known = client(stages.folder), {run.info.run_id for run in runs(client(stages.folder))}
    first, port = started[0].pid, int(address.rpartition(":")[2])
    code, said = stages.train(
        hit=("after an update", 3, [signal.SIGSTOP, first, 0]), settings=HASTE, MLFLOW_TRACKING_URI=address
    )
    os.killpg(first, signal.SIGCONT)
    assert code == 0 and said.count("tracking: ") == 1 and "Traceback" not in said, said
    code, said = stages.run("sync", MLFLOW_TRACKING_URI=address)
    assert (code, said.splitlines()[-1]) == (0, "results/classify/mdeq-small: its run is in the store now"), said

    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port))  # as from outside
    often = [("pipeline.tracking", "SECONDS_A_RETRY", 0.5)]
    code, said = stages.train(
        hit=("after an update", 3, [signal.SIGKILL, first, port]), settings=often, MLFLOW_TRACKING_URI=address
    )
    assert code == 0 and said.count("tracking: ") <= 1 and "Traceback" not in said, said  # it may be back in time
    assert stages.run("sync", MLFLOW_TRACKING_URI=address) == (0, "")
    new = [run for run in runs(store) if run.info.run_id not in known]
    whole = json.loads((stages.folder / "whole" / "metrics.json").read_text())["run"]
    assert [run.info.status for run in new] == ["FINISHED"] * 2
    assert all(recorded(store, run.info.run_id) == recorded(store, whole) for run in new)


def test_two_clones_and_dvcs_queue_at_once_on_one_store(stages: Stages, tmp_path: Path) -> None:
    """A clone, and two experiments as workers of DVC's queue run them: folders of their own, but one root."""
    store, known = client(stages.folder), {run.info.run_id for run in runs(client(stages.folder))}
    clone, queued, shorter = (stages.clone(tmp_path / name) for name in ("clone", "queued", "shorter"))
    yaml = YAML(typ="safe")
    params = yaml.load((shorter / "params.yaml").read_text())
    params["classify"]["mdeq-small"]["epochs"] = 1
    params["prepare"]["cifar10"]["generated"]["train"] = 64  # what the other one trains on stays
    yaml.dump(params, shorter / "params.yaml")
    shared = {"MLFLOW_TRACKING_URI": f"sqlite:///{stages.folder / 'mlflow.db'}"}
    queue = [{"folder": folder, "DVC_ROOT": str(tmp_path / "root"), **shared} for folder in (queued, shorter)]
    (tmp_path / "root").mkdir()
    assert stages.run_all(*(stages.job("prepare", "cifar10", **options) for options in queue)) == [0, 0]
    trainings = [stages.job("classify", "mdeq-small", **options) for options in ({"folder": clone, **shared}, *queue)]
    assert stages.run_all(*trainings) == [0, 0, 0]
    assert json.loads((shorter / "results/data/cifar10/summary.json").read_text())["images"]["train"] == 64
    out = "results/classify/mdeq-small"
    assert same_weights(clone / out, stages.folder / "whole") and same_weights(queued / out, clone / out)
    new = [run for run in runs(store) if run.info.run_id not in known]
    assert [run.info.status for run in new] == ["FINISHED"] * 3
    whole = json.loads((stages.folder / "whole" / "metrics.json").read_text())["run"]
    assert sum(recorded(store, run.info.run_id) == recorded(store, whole) for run in new) == 2


def test_dvc_is_terminated_with_its_stage_and_lets_no_second_one_in(stages: Stages, tmp_path: Path) -> None:
    """`make repro` gets SIGTERM as a group; then of two `dvc repro` at once the second is refused."""
    clone = stages.clone(tmp_path / "clone")
    out = "results/classify/mdeq-small"
    outs = [f"{out}/model.pt", f"{out}/metrics.json"]
    stage = {"cmd": "python -m pipeline classify mdeq-small", "deps": ["params.yaml"], "outs": outs}
    (clone / "dvc.yaml").write_text(json.dumps({"stages": {"classify": stage}}))
    (clone / "pyproject.toml").touch()
    os.utime(clone / "pyproject.toml", (0, 0))
    group = {"cwd": clone, "env": ENVIRONMENT | {"MDEQ_TRACKING": "off"}, "start_new_session": True, "text": True}
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    subprocess.run(["dvc", "init", "--no-scm", "-q"], check=True, **group)

    make = ["make", "-f", str(ROOT / "Makefile"), "repro", "STAMP=params.yaml"]
    with subprocess.Popen(make, **group, **heard) as process:
        awaited(lambda: list((clone / "work").glob("classify*/*/*.pt")))
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode and "Traceback" not in said, said
    awaited(lambda: not alive(process.pid))
    assert list((clone / "work").glob("classify*/*/*.pt")) and not (clone / out).exists()

    with subprocess.Popen(["dvc", "repro"], **group, **heard) as process:
        awaited(lambda: f'"pid": {process.pid}' in (clone / ".dvc/tmp/rwlock").read_text())
        os.killpg(process.pid, signal.SIGSTOP)
        second = subprocess.run(["dvc", "repro"], **group, **heard)
        os.killpg(process.pid, signal.SIGCONT)
        said, _ = process.communicate(timeout=300)
    assert second.returncode and "Traceback" not in second.stdout, second.stdout
    assert "is busy" in second.stdout or "Unable to acquire lock" in second.stdout
    assert process.returncode == 0, said
    assert same_weights(clone / out, stages.folder / "whole")


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


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
