"""Tracking: the run file, its upload to real stores however often and however late, and the views.

Stores are SQLite files and an MLflow server, which a small proxy makes slow, silent or absent.
Processes that are killed are forked from this one, which has imported MLflow.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from mdeq.baselines import ResNetConfig
from mdeq.saved import Architecture
from pipeline import store, tracking
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.predict import Predictor
from pipeline.train.checkpoints import save_model

SETTINGS = ("MDEQ_", "MLFLOW_", "DVC_", "PYTHONPATH")
CLEAN = {name: text for name, text in os.environ.items() if not name.startswith(SETTINGS)}
PATIENCE = 300.0
FORK = multiprocessing.get_context("fork")


def eventually(check: Callable[[], Any]) -> Any:
    """What `check` returns, as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := check()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


def make_store(root: Path) -> None:
    with store.connected(
        Machine(root, tracking_uri=f"sqlite:///{root}/mlflow.db", experiment="first")
    ):
        pass


@pytest.fixture(scope="session")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made by two processes at once, after one that was killed while it made it."""
    root = tmp_path_factory.mktemp("store")
    killed, *both = [FORK.Process(target=make_store, args=(root,)) for _ in range(3)]
    killed.start()
    eventually(lambda: tables(root / "mlflow.db.new") >= 10 or not killed.is_alive())
    assert not (root / "mlflow.db").exists()
    killed.kill()
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert not (root / "mlflow.db.new").exists()
    return root / "mlflow.db"


def tables(path: Path) -> int:
    with contextlib.suppress(sqlite3.Error):
        address = f"file:{path}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            count = "select count(*) from sqlite_master where type = 'table'"
            return database.execute(count).fetchone()[0]
    return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, without the user's settings; uploads follow quickly."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_ROOT", "RANK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_UPLOADS", 0.2)
    return tmp_path


@pytest.fixture
def machine(made_store: Path, folder: Path) -> Machine:
    """A machine with a store of its own: making one takes seconds, so it is a copy."""
    shutil.copy(made_store, folder)
    return Machine(folder, tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


class Served(NamedTuple):
    """A process that runs `ui`, its port and what it prints."""

    process: Any
    port: int
    said: Path


def serve(root: Path, port: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.chdir(root)
    sys.stdout = Path("said").open("w")
    sys.exit(store.ui(Machine(root, tracking_uri=f"sqlite:///{root}/mlflow.db"), port))


@pytest.fixture(scope="module")
def server(made_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An MLflow server, which is the one of `ui`."""
    root, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(made_store, root)
    process = FORK.Process(target=serve, args=(root, port))
    process.start()
    eventually(lambda: (root / "said").is_file() and "MLflow" in (root / "said").read_text())
    yield Served(process, port, root / "said")
    process.terminate()
    process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def client(machine: Machine) -> MlflowClient:
    return MlflowClient(machine.tracking_uri)


def runs(machine: Machine) -> dict[str, Run]:
    """The runs of the machine's experiment by name, deleted ones too."""
    own = client(machine)
    experiment = own.get_experiment_by_name(machine.experiment)
    if experiment is None:
        return {}
    found = own.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(machine: Machine, run: Run, name: str) -> list[tuple[int, float]]:
    found = client(machine).get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in found]


def losses(machine: Machine, name: str) -> list[tuple[int, float]]:
    run = runs(machine).get(name)
    return history(machine, run, "loss") if run else []


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def finished(machine: Machine, name: str = "x", stage: str = "classify") -> Path:
    """A small finished run's file, with an artifact."""
    out = Path("results", stage, name)
    out.mkdir(parents=True)
    with tracking.start(stage, name, {"a": {"b": [1, 2]}}, machine, out / "run.jsonl") as run:
        run.dataset("cifar10", "0123456789abcdef" * 2, "data/cifar10")
        for step in range(3):
            run.metrics({"loss/train": 1 / (step + 1)}, step)
        (out / "figures").mkdir()
        (out / "figures" / "curves.svg").write_text("<svg/>")
        run.artifact(out / "figures" / "curves.svg")
    return out / "run.jsonl"


# ------------------------------------------------------------------------------- the run file


def test_the_file_has_all_of_a_run_with_tracking_off(folder: Path) -> None:
    machine = Machine(folder)
    with tracking.start("classify", "x", {"a": 1}, machine, Path("results/run.jsonl")) as run:
        run.metrics({"loss": 0.5, "bad": float("nan"), "device": "cpu", "flag": True}, 3)
        run.metrics({"bad": float("inf")}, 4)
        run.tag("builds_on", "it's \x1b[31m ü")
        run.dataset("cifar10", "0" * 32, "data", "evaluation")
        run.artifact(Path("results/curves.png"))
        run.model(Path("results/model.safetensors"))
    header, *others, last = rows(Path("results/run.jsonl"))
    assert (header["run"], header["stage"], header["instance"]) == (run.id, "classify", "x")
    assert header["params"] == {"a": 1} and "machine.torch" in header["tags"]
    for row in (*others, last):
        row.pop("time", None)
    assert others == [
        {"metrics": {"loss": 0.5}, "step": 3},
        {"tag": "builds_on", "value": "it's \x1b[31m ü"},
        {"dataset": "cifar10", "digest": "0" * 32, "source": "data", "context": "evaluation"},
        {"artifact": "curves.png"},
        {"model": "model.safetensors"},
    ]
    assert last == {"status": "FINISHED"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failed_run_says_so_and_an_interrupted_one_was_killed(
    folder: Path, error: BaseException
) -> None:
    file = folder / "run.jsonl"
    with contextlib.suppress(BaseException), tracking.start("a", None, None, Machine(folder), file):
        raise error
    status = "FAILED" if isinstance(error, Exception) else "KILLED"
    assert rows(file)[-1]["status"] == status
    assert rows(file)[-2]["value"].startswith(type(error).__name__)


def test_a_resumed_run_continues_its_file_from_the_checkpoints_position(folder: Path) -> None:
    machine, work, out = Machine(folder), folder / "work" / "run.jsonl", folder / "results"
    with contextlib.suppress(RuntimeError):
        with tracking.start("a", "x", None, machine, work, resume=True, results=out) as first:
            first.metrics({"loss": 0.0}, 0)
            position = first.position()
            assert position == work.stat().st_size
            first.metrics({"loss": 1.0}, 1)
            raise RuntimeError("the power went")
    assert not out.exists()
    with work.open("ab") as file:
        file.write(b'{"metrics": {"loss"')  # torn
    with tracking.start("a", "x", {"b": 2}, machine, work, resume=True, results=out) as second:
        second.cut(position)
        second.metrics({"loss": 1.0}, 1)
    assert second.id == first.id
    header, *others = rows(out / "run.jsonl")
    assert header["params"] is None
    found = [row.get("step", row.get("status")) for row in others]
    assert found == [0, 1, "FINISHED"]
    with tracking.start("a", "x", None, machine, work, resume=True) as third:
        third.cut(0)
    assert [row.get("status") for row in rows(work)] == [None, "FINISHED"]
    with tracking.start("a", "x", None, machine, work) as fresh:
        pass
    assert fresh.id != third.id == first.id


def test_a_file_linked_from_dvcs_cache_is_never_written_through(folder: Path) -> None:
    cached, file = folder / "cached", folder / "results" / "run.jsonl"
    for link in (os.link, os.symlink):
        file.parent.mkdir(exist_ok=True)
        cached.write_text("precious")
        cached.chmod(0o444)
        link(cached, file)
        with tracking.start("a", None, None, Machine(folder), file):
            pass
        assert cached.read_text() == "precious" and len(rows(file)) == 2
        file.unlink()


def test_helper_processes_record_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracking.start("a", None, None, Machine(folder), folder / "run.jsonl") as run:
        run.metrics({"loss": 1.0}, 0)
        run.cut(run.position())
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------- the upload


def test_a_stage_is_a_run_below_its_pipelines(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(machine.root, tracking_uri=machine.tracking_uri, experiment='it\'s "q" %')
    monkeypatch.setenv("DVC_STAGE", "classify@x")
    monkeypatch.setenv("DVC_EXP_NAME", "wide-kiss")
    finished(machine)
    found = runs(machine)
    run, parent = found["classify/x"], found["pipeline wide-kiss"]
    assert run.info.status == parent.info.status == "FINISHED"
    assert run.data.params == {"a.b": "[1, 2]"}
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags["DVC_STAGE"] == "classify@x" and tags["machine.torch"]
    assert (tags["stage"], tags["instance"]) == ("classify", "x")
    assert "mlflow.source.git.commit" in tags
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("cifar10", "0123456789abcdef" * 2)
    assert history(machine, run, "loss/train") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    (artifact,) = client(machine).list_artifacts(run.info.run_id, "figures")
    assert artifact.path == "figures/curves.svg"
    with contextlib.suppress(ValueError):
        file = Path("results/evaluate/run.jsonl")
        with tracking.start("evaluate", None, None, machine, file):
            raise ValueError("no")
    monkeypatch.delenv("DVC_STAGE")
    finished(machine, stage="finetune")
    found = runs(machine)
    assert found["evaluate"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found["evaluate"].info.status == found[parent.info.run_name].info.status == "FAILED"
    assert "mlflow.parentRunId" not in found["finetune/x"].data.tags
    experiment = client(machine).get_experiment(run.info.experiment_id)
    view = json.loads(experiment.tags["mlflow.sharedViewState.stages"])
    assert "metrics.`eval/top1`" in json.loads(view["state"])["selectedColumns"]


def test_more_than_a_batch_takes_and_names_that_mlflow_refuses(machine: Machine) -> None:
    params = {f"k{i}": i for i in range(250)} | {"a=b": 1, "long": "x" * 9000}
    names = {"iou/caf\u00e9 (wall)": 1.0, "/a//../b": 2.0, "x" * 300: 3.0, "": 4.0, "a\nb": 5.0}
    with tracking.start("a", None, params, machine, Path("run.jsonl")) as run:
        for step in range(1300):
            run.metrics({"loss/train": step, "lr": 0.1}, step)
        run.metrics(names, 0)
        run.tag("long \x1b", "y" * 20_000)
    found = runs(machine)["a"]
    assert found.info.status == "FINISHED" and len(found.data.params) == 252
    assert len(found.data.metrics) == 2 + len(names)
    assert history(machine, found, "loss/train") == [(step, float(step)) for step in range(1300)]


def stage(machine: Machine) -> None:
    with tracking.start("a", "x", None, machine, Path("results/a/x/run.jsonl")) as run:
        for step in range(10):
            run.metrics({"loss": step}, step)
            if step == 4:
                Path("position").write_text(str(run.position()))
        time.sleep(PATIENCE)


def killed_stage(machine: Machine) -> str:
    """Kills a stage of 10 steps when the store has them; the id of its MLflow run."""
    process = FORK.Process(target=stage, args=(machine,))
    process.start()
    eventually(lambda: len(losses(machine, "a/x")) == 10)
    assert list(tracking.sync(machine)) == []  # its own process uploads it
    assert runs(machine)["a/x"].info.status == "RUNNING"
    process.kill()
    process.join()
    return runs(machine)["a/x"].info.run_id


def test_a_run_that_was_killed_and_resumed_has_each_step_once(machine: Machine) -> None:
    run_id, file = killed_stage(machine), Path("results/a/x/run.jsonl")
    assert [what for _, what in tracking.sync(machine)] == ["uploaded"]
    assert runs(machine)["a/x"].info.status == "KILLED"
    with tracking.start("a", "x", None, machine, file, resume=True) as run:
        run.cut(int(Path("position").read_text()))
        for step in range(5, 15):
            run.metrics({"loss": step}, step)
    found = runs(machine)["a/x"]
    assert (found.info.run_id, found.info.status) == (run_id, "FINISHED")
    assert history(machine, found, "loss") == [(step, float(step)) for step in range(15)]
    stored = [row["step"] for row in rows(file) if "loss" in row.get("metrics", {})]
    assert stored == list(range(15))


def test_a_killed_run_whose_file_is_gone_is_closed_when_its_stage_runs_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "a@x")
    monkeypatch.setenv("DVC_EXP_NAME", "wide-kiss")
    killed = killed_stage(machine)
    shutil.rmtree("results")  # as DVC removes the outputs of a stage that it runs again
    monkeypatch.setenv("DVC_EXP_NAME", "tall-moss")
    finished(machine, stage="a")
    own = client(machine)
    assert own.get_run(killed).info.status == "KILLED"
    found = own.search_runs(own.get_run(killed).info.experiment_id.split())
    statuses = sorted((run.info.run_name, run.info.status) for run in found)
    assert statuses == [
        ("a/x", "FINISHED"),
        ("a/x", "KILLED"),
        ("pipeline tall-moss", "FINISHED"),
        ("pipeline wide-kiss", "KILLED"),
    ]


def test_a_restored_run_is_uploaded_from_its_file_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "classify@x")
    file = finished(Machine(machine.root))
    monkeypatch.delenv("DVC_STAGE")
    before = file.read_bytes()
    assert list(tracking.sync(machine)) == [(file, "uploaded")]
    run = runs(machine)["classify/x"]
    header, last = rows(file)[0], rows(file)[-1]
    assert (run.info.start_time, run.info.end_time) == (header["time"], last["time"])
    assert run.info.status == "FINISHED" and len(history(machine, run, "loss/train")) == 3
    parent = client(machine).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name.startswith("pipeline workspace ")
    assert list(tracking.sync(machine)) == [] and file.read_bytes() == before
    client(machine).delete_run(run.info.run_id)  # by its user
    assert list(tracking.sync(machine)) == []
    assert runs(machine)["classify/x"].info.lifecycle_stage == "deleted"


def test_a_missing_artifact_is_named_and_all_else_arrives(machine: Machine) -> None:
    file = finished(Machine(machine.root))
    (file.parent / "figures" / "curves.svg").unlink()
    with pytest.raises(UserError, match=r"curves\.svg: no such file.*`dvc checkout`"):
        list(tracking.sync(machine))
    run = runs(machine)["classify/x"]
    assert run.info.status == "FINISHED" and len(history(machine, run, "loss/train")) == 3
    (file.parent / "figures" / "curves.svg").write_text("<svg/>")
    assert list(tracking.sync(machine)) == [(file, "uploaded")]


def test_the_machines_load_is_recorded_also_after_a_resume(machine: Machine) -> None:
    name, file = "system/cpu_utilization_percentage", Path("results/a/run.jsonl")
    with tracking.start("a", None, None, machine, file) as run:
        run.metrics({name: 1.0}, 0)
    time.sleep(1)  # a step of the load is a second
    with tracking.start("a", None, None, machine, file, resume=True):
        eventually(lambda: len(history(machine, runs(machine)["a"], name)) > 1)


BROKEN = {
    "empty": lambda lines: [],
    "no header": lambda lines: lines[1:],
    "binary": lambda lines: [b"\x00\xff\x1b[31m"],
    "not an object": lambda lines: [lines[0], b"[]", *lines[1:]],
    "cut inside": lambda lines: [*lines[:2], lines[2][:9], *lines[3:]],
    "unknown": lambda lines: [lines[0], b'{"colour": 1}', *lines[1:]],
    "text for a number": lambda lines: [lines[0], b'{"metrics":{"a":"b"},"step":1,"time":1}'],
    "no step": lambda lines: [lines[0], b'{"metrics": {"a": 1}, "time": 1}'],
    "status": lambda lines: [*lines[:-1], b'{"status": "DONE", "time": 1}'],
    "outside": lambda lines: [*lines[:-1], b'{"artifact": "../../../secret"}', lines[-1]],
    "absolute": lambda lines: [*lines[:-1], b'{"model": "/etc/passwd"}', lines[-1]],
    "a quote as id": lambda lines: [lines[0].replace(b'"run": "', b'"run": "\' or \''), *lines[1:]],
    "deep": lambda lines: [lines[0], b"[" * 100_000, lines[-1]],
}


def test_a_run_file_broken_by_hand_is_one_line_and_stops_no_other(machine: Machine) -> None:
    good = finished(Machine(machine.root), "good")
    own_id = rows(good)[0]["run"].encode()
    for number, change in enumerate(BROKEN.values()):
        folder = Path(f"results/classify/bad-{number}")
        shutil.copytree(good.parent, folder)
        lines = good.read_bytes().replace(own_id, f"{number:032x}".encode()).splitlines()
        content = b"".join(line + b"\n" for line in change(lines))
        folder.joinpath("run.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        assert [file.parent.name for file, _ in tracking.sync(machine)] == ["good"]
    said = str(caught.value).splitlines()
    assert len(said) == len(BROKEN)
    for number in range(len(BROKEN)):
        assert sum(f"bad-{number}/run.jsonl: damaged" in line for line in said) == 1
    assert all("rerun its stage" in line and line.isprintable() for line in said)


# ------------------------------------------------------------------------------- bad stores


class Refuse(socketserver.StreamRequestHandler):
    """Answers every request with the error of its server."""

    def handle(self) -> None:
        self.request.recv(65536)
        code = self.server.code  # type: ignore[attr-defined]
        answer = f"HTTP/1.1 {code} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        self.request.sendall(answer.encode())


def delete_experiment(database: Path) -> None:
    own = MlflowClient(f"sqlite:///{database}")
    own.delete_experiment(own.create_experiment("mdeq"))


def restore_experiment(database: Path) -> None:
    own = MlflowClient(f"sqlite:///{database}")
    own.restore_experiment(own.get_experiment_by_name("mdeq").experiment_id)


def other_schema(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("update alembic_version set version_num = version_num || '0'")
        connection.commit()


def other_program(database: Path) -> None:
    database.unlink()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("create table precious (a)")
        connection.commit()


def folder_in_its_place(database: Path) -> None:
    database.unlink()
    database.mkdir()


def put_back(database: Path) -> None:
    if database.is_dir():
        database.rmdir()
    shutil.copy(database.with_name("kept.db"), database)


SPOILED = {
    "garbage": (lambda path: path.write_bytes(b"garbage" * 999), put_back, "move it away"),
    "a folder": (folder_in_its_place, put_back, "move it"),
    "another program's": (other_program, put_back, "move it away"),
    "another schema": (other_schema, put_back, "mlflow db upgrade"),
    "a deleted experiment": (delete_experiment, restore_experiment, "experiments restore"),
}
ADDRESSES = {
    "nobody there": ("http://me:s3cr3t@127.0.0.1:9/?token=s3cr3t", "see whether it runs"),
    "no such host": ("http://me:s3cr3t@no-such-host.invalid", "see whether it runs"),
    "missing driver": ("postgresql+pg8000://me:s3cr3t@127.0.0.1:9/a", "pg8000"),
    "unknown scheme": ("ftp://me:s3cr3t@127.0.0.1/a", "MLFLOW_TRACKING_URI"),
    "no address": ("http://me:s3cr3t@:x", "MLFLOW_TRACKING_URI"),
    "special characters": ("http://me:s3/cr3t@s3cr3t@127.0.0.1:9", ""),
}


def assert_file_waits(machine: Machine, cure: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """A stage ends as ever, says one line; `sync` and `ui` say one line, too."""
    capsys.readouterr()
    file = finished(machine)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("tracking: "), said
    for command in (lambda: list(tracking.sync(machine)), lambda: store.ui(machine, free_port())):
        with pytest.raises(UserError) as caught:
            command()
        assert cure in str(caught.value) and "\n" not in str(caught.value)
        said += str(caught.value)
    assert cure in said and "python -m pipeline sync" in said
    assert "s3cr3t" not in said + capsys.readouterr().err and "Traceback" not in said
    recorded = [row["step"] for row in rows(file) if "loss/train" in row.get("metrics", {})]
    assert recorded == [0, 1, 2]
    return file


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_store_is_named_with_its_cure_and_the_file_waits(
    machine: Machine, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    database, (spoil, repair, cure) = machine.root / "mlflow.db", SPOILED[kind]
    shutil.copy(database, machine.root / "kept.db")
    spoil(database)
    spoiled = [] if database.is_dir() else database.read_bytes()
    file = assert_file_waits(machine, cure, capsys)
    assert spoiled == (list(database.iterdir()) if database.is_dir() else database.read_bytes())
    repair(database)
    assert list(tracking.sync(machine)) == [(file, "uploaded")]
    assert runs(machine)["classify/x"].info.status == "FINISHED"


@pytest.mark.parametrize("kind", ADDRESSES)
def test_an_address_without_a_store_is_named_and_no_password_with_it(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address, cure = ADDRESSES[kind]
    assert_file_waits(Machine(folder, tracking_uri=address), cure, capsys)


@pytest.mark.parametrize(("code", "cure"), [(401, "PASSWORD"), (403, "PASSWORD"), (404, "")])
def test_a_server_that_refuses(
    folder: Path, code: int, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as refuser:
        refuser.code = code  # type: ignore[attr-defined]
        threading.Thread(target=refuser.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://me:s3cr3t@127.0.0.1:{refuser.server_address[1]}"
        assert_file_waits(Machine(folder, tracking_uri=address), cure, capsys)
        refuser.shutdown()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("lock", [True, False])
def test_a_store_that_may_not_be_written(machine: Machine, lock: bool) -> None:
    """In a process of another user, for whom root's files are read-only."""
    database, said = machine.root / "mlflow.db", machine.root / "said"
    for path in (machine.root, *machine.root.parents):
        if path.stat().st_mode & 0o055 != 0o055 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    said.touch()
    said.chmod(0o666)
    if lock:
        database.with_name("mlflow.db.lock").touch()
        database.with_name("mlflow.db.lock").chmod(0o666)

    def other_user() -> None:
        os.setuid(65534)
        try:
            store.ui(machine, free_port())
        except UserError as error:
            said.write_text(str(error))

    process = FORK.Process(target=other_user)
    process.start()
    process.join()
    assert "mlflow.db" in said.read_text() and "give this user write access" in said.read_text()
    assert "\n" not in said.read_text()


def test_a_locked_store_stops_nothing_and_gets_the_run_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither start nor end of a stage waits longer than allowed."""
    monkeypatch.setattr(tracking, "SECONDS_AT_START", 0.2)
    monkeypatch.setattr(tracking, "SECONDS_AT_END", 0.2)
    writer = sqlite3.connect(machine.root / "mlflow.db", isolation_level=None)
    writer.execute("begin exclusive")
    file = finished(machine)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "python -m pipeline sync" in said
    writer.execute("rollback")
    writer.close()

    def arrived() -> bool:
        with contextlib.suppress(UserError):  # while the stage's own thread is still at work
            list(tracking.sync(machine))
        run = runs(machine).get("classify/x")
        return run is not None and run.info.status == "FINISHED"

    eventually(arrived)
    assert list(tracking.sync(machine)) == [] and file.exists()


def test_a_store_that_is_deleted_while_a_stage_runs_gets_the_run_later(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("results/a/run.jsonl")
    with tracking.start("a", None, None, machine, file) as run:
        for name in Path().glob("mlflow.db*"):
            name.unlink()
        run.metrics({"loss": 1.0}, 0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "python -m pipeline sync" in said
    link = machine.root / "link"  # for MLflow a store that it has not seen in this process
    link.symlink_to(machine.root)
    later = Machine(machine.root, tracking_uri=f"sqlite:///{link}/mlflow.db")
    assert list(tracking.sync(later)) == [(file, "uploaded")]
    assert losses(later, "a") == [(0, 1.0)]


def test_a_server_that_is_silent_then_answers_gets_all_while_the_stage_runs(
    server: Served, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_AT_START", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    machine = Machine(folder, tracking_uri=f"http://127.0.0.1:{server.port}", experiment="silent")
    frozen = psutil.Process(server.process.pid).children(recursive=True)
    for process in frozen:
        process.suspend()
    with tracking.start("a", None, None, machine, Path("results/a/run.jsonl")) as run:
        run.metrics({"loss": 0}, 0)
        eventually(lambda: "tracking: " in capsys.readouterr().err)
        for process in frozen:
            process.resume()
        eventually(lambda: losses(machine, "a"))
        assert runs(machine)["a"].info.status == "RUNNING"
        run.metrics({"loss": 1}, 1)
    assert capsys.readouterr().err == ""
    assert runs(machine)["a"].info.status == "FINISHED"
    assert losses(machine, "a") == [(0, 0.0), (1, 1.0)]
    assert list(tracking.sync(machine)) == []


@pytest.mark.parametrize("name", ["a?b", "a%20b", "it's #ü;&=d"])
def test_a_clone_may_lie_anywhere(
    made_store: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, database = folder / name, f"{folder.name}.db"  # MLflow caches relative addresses
    root.mkdir()
    monkeypatch.chdir(root)
    shutil.copy(made_store, root / database)
    own = Machine.from_environment(device="cpu").tracking_uri or ""
    assert own.endswith("/mlflow.db")
    machine = Machine(root, tracking_uri=own.removesuffix("mlflow.db") + database)
    file = finished(machine)
    stored = MlflowClient(f"sqlite:///{database}")
    (run,) = stored.search_runs([stored.get_experiment_by_name("mdeq").experiment_id])
    assert run.info.status == "FINISHED" and stored.list_artifacts(run.info.run_id, "figures")
    assert (root / "mlartifacts").is_dir() and file.exists()
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_relative_address_means_the_repository_in_a_queued_experiment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder / ".dvc" / "tmp" / "exps" / "tmp1"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    machine = Machine.from_environment(device="cpu")
    assert store._database(machine) == folder / "runs.db"


# ------------------------------------------------------------------------------- what people see


@pytest.mark.slow
def test_a_logged_model_answers_a_picture_wherever_it_is_loaded(
    machine: Machine,
) -> None:
    torch.manual_seed(0)
    path = Path("results/classify/tiny.1/model.safetensors")
    architecture = Architecture(ResNetConfig(width=8), None, 3)
    facts = {"stage": "classify", "model": "tiny.1", "dataset": "cifar10", "params": {}}
    facts |= {"names": ["cat", "dog", "frog"]}
    with tracking.start("classify", "tiny.1", None, machine, path.with_name("run.jsonl")) as run:
        save_model(path, architecture.build(), architecture, facts)
        run.model(path)
    found = runs(machine)["classify/tiny.1"]
    (output,) = found.outputs.model_outputs
    logged = client(machine).get_logged_model(output.model_id)
    assert (logged.name, logged.status) == ("classify-tiny-1", "READY")
    stored = Path(logged.artifact_location.removeprefix("file://"), "data")
    assert [path.name for path in stored.iterdir()] == ["model.safetensors"]
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = cv2.imencode(".png", photo)[1].tobytes()
    Path("photo.png").write_bytes(content)
    code = """
        import base64, json, mlflow, sys, threading, time, urllib.request, uvicorn
        from mlflow.pyfunc.scoring_server import init
        mlflow.set_tracking_uri(sys.argv[1])
        model = mlflow.pyfunc.load_model(sys.argv[3])
        import pipeline
        assert "/code/pipeline/" in pipeline.__file__, pipeline.__file__
        content = open(sys.argv[2], "rb").read()
        print(model.predict([{"picture": content}]).to_json())
        server = uvicorn.Server(uvicorn.Config(init(model), port=0, log_level="critical"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        record = {"picture": base64.b64encode(content).decode()}
        body = json.dumps({"dataframe_records": [record]}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, kind)
        print(urllib.request.urlopen(request).read().decode())
    """
    arguments = [str(machine.tracking_uri), str(Path("photo.png").absolute()), logged.model_uri]
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd="/", env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    direct, served = map(json.loads, done.stdout.splitlines()[-2:])
    predictor = Predictor(path, machine)
    best = predictor.best(predictor(photo[..., ::-1]).shares)
    assert direct["classes"]["0"] == served["predictions"][0]["classes"] == list(best)
    for shares in (direct["shares"]["0"], served["predictions"][0]["shares"]):
        assert shares == pytest.approx(list(best.values()), abs=1e-5)


def test_ui_of_a_servers_store_names_the_servers_own_page(
    server: Served, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://me:s3cr3t@127.0.0.1:{server.port}"
    assert store.ui(Machine(folder, tracking_uri=address), 1) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"MLflow: http://127.0.0.1:{server.port}/#/experiments/")
    assert "s3cr3t" not in said.out + said.err


def test_ui_serves_until_it_is_ended_and_leaves_nothing_behind(
    server: Served, machine: Machine
) -> None:
    assert server.said.read_text().startswith(f"MLflow: http://127.0.0.1:{server.port}/#/exper")
    with pytest.raises(UserError, match=f"port {server.port}: .*; choose another with --port"):
        store.ui(machine, server.port)
    server.process.terminate()
    server.process.join()
    assert server.process.exitcode == 143
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), 1)
