"""Uploads run files to MLflow, as often as one likes: the store is asked what it has already.

Only this module knows MLflow. Whatever is wrong with the store becomes one `UserError` of one line,
which says what to do; the run file waits meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pandas as pd

from pipeline import files
from pipeline.errors import UserError
from pipeline.machine import Machine, masked, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ENDED = ("FINISHED", "FAILED", "KILLED")
UPLOADED = "uploaded"  # a run's tag: the bytes of its file when all of it had arrived
METRICS_PER_BATCH, PARAMS_PER_BATCH, TAG_LENGTH = 1000, 100, 5000  # MLflow's limits
ENVIRONMENT = {  # MLflow neither calls home nor prints tracebacks nor retries for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
LATER = "`python -m pipeline sync` then uploads the runs"
REASONS = {  # what an error says -> what is wrong, and what to do
    "out-of-date database schema|Can't locate revision": "its schema is another MLflow version's; "
    "back it up and run `mlflow db upgrade`, or install the MLflow that wrote it",
    "not a database|malformed|no such table|[Ii]s a directory": "it is damaged or not MLflow's; "
    "move it away, a new one is made",
    "readonly|[Pp]ermission denied|unable to open": "it was replaced while in use, or "
    "give this user write access to it",
    r"authentication|[Aa]ccess denied|\b40[13]\b|[Uu]nauthorized|[Ff]orbidden": "it refuses the "
    "credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "": "it cannot be used now; see whether it runs, and whether MLFLOW_TRACKING_URI is right",
}
THREADS = threading.Lock()
PICTURE = (  # a grey pixel, the example of a logged model's input
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
VIEW = "stages"
COLUMNS = ("eval/top1", "eval/miou", "loss/train", "solver/relative_residual", "solver/nfe")
NOTE = "A run named `pipeline ...` groups the stages of one `dvc repro` or `dvc exp run`."


class Upload:
    """The upload of one run file, in as many calls of `once` as it takes.

    The names of artifacts in the file are relative to `results`, by default the file's own folder.
    `complete` says that the store has all of an ended run, or that its user deleted it there.
    """

    def __init__(self, file: Path, machine: Machine, results: Path | None = None) -> None:
        self.complete = False
        self._file, self._machine, self._results = file, machine, results or file.parent
        self._known = False  # whether the store was asked what it has; the attributes of _ask hold

    def forget(self) -> None:
        """Makes the next call read the file from its start and ask the store what it has of it."""
        self._known = False

    def once(self) -> bool:
        """Uploads what the store lacks; returns whether it lacked something.

        Raises:
            UserError: The store cannot be reached or used, or the file is damaged.
        """
        try:
            with explained(self._machine):
                return self._upload()
        except UserError:
            self.forget()
            raise

    def _upload(self) -> bool:
        if not self._known:
            self._ask(read_header(self._file))
        if self.complete:
            return False
        for line in self._new_lines():
            self._send(_parse(line, self._file))
        self._send_metrics()
        if self._status == "RUNNING" and not running(self._file):
            self._status = "KILLED"
        if self._status in ENDED:
            self._end()
        return True

    def _ask(self, header: dict[str, Any]) -> None:
        """Finds the run in the store, or makes it, and notes what the store has of it."""
        self._name = "/".join(filter(None, (header["stage"], header.get("instance"))))
        with connected(self._machine) as (self._client, self._experiment):
            found = self._find("mark", header["run"]) or self._make_run(header)
        self._found, self._run = found, found.info.run_id
        self._steps = {metric.key: metric.step for metric in found.to_proto().data.metrics}
        self._has_model = bool(found.outputs and found.outputs.model_outputs)
        self._position = 0
        self._metrics: list[Any] = []
        self._missing: list[str] = []
        self._status, self._ended = "RUNNING", None
        whole = found.data.tags.get(UPLOADED) == str(self._file.stat().st_size)
        ended = found.info.status in ENDED
        self.complete = found.info.lifecycle_stage == "deleted" or (ended and whole)
        if ended and not self.complete:
            self._client.update_run(self._run, "RUNNING")
        self._known = True

    def _find(self, tag: str, value: str) -> Run | None:
        """The run with a tag of that value, of letters and digits; also one that was deleted."""
        from mlflow.entities import ViewType

        query = f"tags.{tag} = '{value}'"
        found = self._client.search_runs([self._experiment], query, ViewType.ALL, 1)
        return found[0] if found else None

    def _make_run(self, header: dict[str, Any]) -> Run:
        """A new run; one that the store has open for the same file was killed, and is closed."""
        place = files.digest(f"{platform.node()}:{self._file.absolute()}".encode())
        open_ones = f"tags.place = '{place}' and attributes.status = 'RUNNING'"
        for killed in self._client.search_runs([self._experiment], open_ones):
            self._terminate(killed, "KILLED")
        tags = {name: str(text)[:TAG_LENGTH] for name, text in header["tags"].items()}
        tags |= {"mark": header["run"], "place": place}
        if header.get("pipeline"):
            tags["mlflow.parentRunId"] = self._pipeline(str(header["pipeline"]), header["time"])
        return self._client.create_run(self._experiment, header["time"], tags, self._name)

    def _pipeline(self, name: str, began: int) -> str:
        """The run that groups the stages of one DVC experiment."""
        key, title = files.digest(name.encode()), f"pipeline {name}"
        tags = {"pipeline": key, "mlflow.source.name": "pipeline"}
        found = self._find("pipeline", key)
        found = found or self._client.create_run(self._experiment, began, tags, title)
        return found.info.run_id

    def _terminate(self, run: Run, status: str, ended: int | None = None) -> None:
        """Closes a run and its pipeline."""
        for one in filter(None, (run.info.run_id, run.data.tags.get("mlflow.parentRunId"))):
            self._client.set_terminated(one, status, ended)

    def _new_lines(self) -> list[bytes]:
        with self._file.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.splitlines()

    def _send(self, row: dict[str, Any]) -> None:
        match row:
            case {"metrics": dict(values), "step": int(step), "time": int(at)}:
                self._add_metrics(values, step, at)
            case {"tag": str(name), "value": value}:
                self._client.set_tag(self._run, _key(name), str(value)[:TAG_LENGTH])
            case {"dataset": str(), "digest": str(), "source": str(), "context": str()}:
                self._log_dataset(**row)
            case {"artifact": str(name)}:
                if path := self._path(name):
                    self._client.log_artifact(self._run, str(path), os.path.dirname(name) or None)
            case {"model": str(name)}:
                if (path := self._path(name)) and not self._has_model:
                    self._log_model(path)
            case {"status": "RUNNING" | "FINISHED" | "FAILED" | "KILLED", "time": int(at)}:
                self._status, self._ended = row["status"], at
            case {"run": str()}:
                self._log_params(row.get("params") or {})
            case _:
                raise _damaged(self._file, f"{str(row)[:60]} is no row of a run")

    def _end(self) -> None:
        self._terminate(self._found, self._status, self._ended)
        if self._missing and self._status == "FINISHED":
            raise UserError(
                f"{self._results}: {', '.join(self._missing)}: no such file, so not uploaded; "
                "`dvc checkout` restores it, or rerun the stage"
            )
        self._client.set_tag(self._run, UPLOADED, str(self._file.stat().st_size))
        self.complete = True

    def _add_metrics(self, values: dict[str, Any], step: int, at: int) -> None:
        from mlflow.entities import Metric

        if len(self._metrics) + len(values) > METRICS_PER_BATCH:
            self._send_metrics()
        for name, value in values.items():
            if not isinstance(value, int | float):
                raise _damaged(self._file, f"{str(value)[:60]} is no number")
            name = _key(name)
            if step > self._steps.get(name, -1):
                self._steps[name] = step
                self._metrics.append(Metric(name, value, at, step))

    def _send_metrics(self) -> None:
        self._client.log_batch(self._run, self._metrics)
        self._metrics = []

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        (flat,) = pd.json_normalize(dict(params)).to_dict("records")
        rows = [Param(_key(str(name)), str(value)) for name, value in flat.items()]
        for first in range(0, len(rows), PARAMS_PER_BATCH):
            self._client.log_batch(self._run, params=rows[first : first + PARAMS_PER_BATCH])

    def _log_dataset(self, dataset: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=dataset, digest=digest[:36], source_type="local", source=source)
        used = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._client.log_inputs(self._run, [used])

    def _log_model(self, path: Path) -> None:
        """Stores a model such that `mlflow.pyfunc.load_model` and `mlflow models serve` predict."""
        from mlflow import pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model, infer_signature

        asked = pd.DataFrame({"picture": [base64.b64decode(PICTURE)]})  # base64 in a request's JSON
        answers = pd.DataFrame({"classes": [["cat"]], "shares": [[1.0]]})
        name = re.sub(r"[^\w-]", "-", self._name)
        logged = self._client.create_logged_model(self._experiment, name, self._run)
        with tempfile.TemporaryDirectory() as folder:
            pyfunc.save_model(
                f"{folder}/model",
                loader_module="pipeline.predict",
                data_path=str(path),
                code_paths=[str(Path(__file__).parents[1] / name) for name in ("mdeq", "pipeline")],
                mlflow_model=Model(logged.artifact_location, self._run, model_id=logged.model_id),
                signature=infer_signature(asked, answers),
                input_example=asked,
                pip_requirements=[f"{name}=={v}" for name, v in versions().items() if v != "none"],
            )
            self._client.log_model_artifacts(logged.model_id, f"{folder}/model")
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(self._run, [LoggedModelOutput(logged.model_id, step=0)])
        self._has_model = True

    def _path(self, name: str) -> Path | None:
        """A file of the results, which a run file of unknown origin must not lead out of."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise _damaged(self._file, f"{name} lies outside the results")
        path = self._results / name
        if path.is_file():
            return path
        self._missing.append(name)
        return None


@contextlib.contextmanager
def connected(machine: Machine) -> Iterator[tuple[MlflowClient, str]]:
    """A client of the store and the experiment's id; both are made where they are missing.

    Inside, one thread of one process alone makes a store, an experiment or a run.

    Raises:
        UserError: The store cannot be reached or used.
    """
    prepare()
    from mlflow import MlflowClient

    name, database = machine.experiment, _database(machine)
    lock = database or machine.root / "work" / "mlflow"
    lock = lock.with_name(f"{lock.name}.lock")
    with explained(machine), THREADS, files.locked(lock, "", wait=True):
        if database:
            _make(database)
        client = MlflowClient(_address(machine))
        found = client.get_experiment_by_name(name)
        if found is None:
            where = (machine.root / "mlartifacts").as_uri() if database else None
            made = client.create_experiment(name, where, {"mlflow.note.content": NOTE})
            _save_view(client, made)
            found = client.get_experiment(made)
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"MLflow's experiment {name!r} was deleted; run `mlflow experiments restore -x "
                f"{found.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME to another; {LATER}"
            )
        yield client, found.experiment_id


def prepare() -> None:
    """Imports what an upload uses: a loader process must not be forked during an import."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("store.tracking.sqlalchemy_store", "system_metrics.system_metrics_monitor"):
        import_module(f"mlflow.{name}")
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 2  # instead of 10, which take 100 s
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def _database(machine: Machine) -> Path | None:
    """The file of an SQLite store; None for another store."""
    prefix, path = "sqlite:///", str(machine.tracking_uri)
    if not path.startswith(prefix):
        return None
    return Path(unquote(path.removeprefix(prefix).partition("?")[0]))


def _address(machine: Machine) -> str:
    """The store's address as MLflow reads it."""
    database = _database(machine)
    return _sqlite(database) if database else str(machine.tracking_uri)


def _sqlite(database: Path) -> str:
    """MLflow reads no address that has `?` or `%` in its path."""
    special = re.search(r"[?%]", str(database))
    return f"sqlite:///{os.path.relpath(database) if special else database}"


def _make(database: Path) -> None:
    """Makes an SQLite store whole or not at all: MLflow takes many steps, and refuses half of them.

    An existing one is looked at first: MLflow would fill any other program's database.
    """
    from mlflow import MlflowClient

    if not database.exists() or database.stat().st_size == 0:
        fresh = database.with_name(f"{database.name}.new")
        fresh.unlink(missing_ok=True)
        MlflowClient(_sqlite(fresh)).search_experiments()
        fresh.replace(database)
    with database.open("rb"), contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("select version_num from alembic_version")


def _save_view(client: MlflowClient, experiment: str) -> None:
    """Saves the view that `ui` opens: every stage is a row, the last one first.

    Sorted by their start MLflow would fold runs below their parents; their source is the same.
    """
    state = {
        "orderByKey": "tags.`mlflow.source.name`",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{column}`" for column in COLUMNS],
        "columnOrder": ["attributes.`Run Name`"],
        "columnWidths": {"attributes.`Run Name`": 360},
    }
    now = time.time_ns() // 1_000_000
    view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")


@contextlib.contextmanager
def explained(machine: Machine) -> Iterator[None]:
    """Turns whatever a store raises into a UserError of one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        reason = next(text for pattern, text in REASONS.items() if re.search(pattern, said))
        said = said.strip().splitlines()[0][:200]
        line = f"MLflow store {machine.tracking_uri}: {reason} ({said}); {LATER}"
        raise UserError(masked(line)) from None


def ui(machine: Machine, port: int) -> int:
    """Prints the address of the runs' page; a store without a server of its own gets one here.

    Returns:
        The server's exit code, when it ends; Ctrl-C and SIGTERM end it.

    Raises:
        UserError: The port is taken, or the store cannot be reached or used.
    """
    with connected(machine) as (client, experiment):
        _save_view(client, experiment)
    view = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    page = f"/#/experiments/{experiment}/runs?{view}"
    parts = urlsplit(str(machine.tracking_uri))
    if parts.scheme not in ("http", "https"):
        return _serve(machine, port, page)
    host = parts.netloc.rpartition("@")[2]
    print(f"MLflow: {parts.scheme}://{host}{parts.path.rstrip('/')}{page}", flush=True)
    return 0


def _serve(machine: Machine, port: int, page: str) -> int:
    if _answers(port):
        raise UserError(f"port {port}: another program listens there; choose another with --port")
    command = [sys.executable, *f"-m mlflow server --host 127.0.0.1 --port {port}".split()]
    # the address may hold a password, and every user of the machine can read arguments
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": _address(machine)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    server = subprocess.Popen([*command, "--workers", "1"], env=environment, **quiet)
    try:
        while server.poll() is None and not _answers(port):
            time.sleep(0.2)
        if server.poll() is None:
            print(f"MLflow: http://127.0.0.1:{port}{page}\nCtrl-C ends it", flush=True)
        return server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as own:
        return own.connect_ex(("127.0.0.1", port)) == 0


def load_sensors() -> list[Any]:
    """MLflow's sensors of this machine's load: CPU, memory, disk, network, GPUs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor("", tracking_uri="http://unused").monitors


def read_header(file: Path) -> dict[str, Any]:
    """The first line of a run file; UserError if it is damaged."""
    with file.open("rb") as lines:
        header = _parse(lines.readline(), file)
    match header:
        case {"run": str(run), "stage": str(), "time": int(), "tags": dict()} if run.isalnum():
            return header
    raise _damaged(file, "its first line is no header")


def running(file: Path) -> bool:
    """Whether a process still writes a run file: it holds a lock, which the kernel frees."""
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # another than this one: no such file, no locks
        return isinstance(error, BlockingIOError)
    return False


def _parse(line: bytes, file: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise _damaged(file, f"{line[:60].decode(errors='replace')!r} is no row")
    return row


def _damaged(file: Path, what: str) -> UserError:
    cure = "`dvc checkout` restores it, or delete it and rerun its stage"
    return UserError(f"{file}: damaged: {what}; {cure}")


def _key(name: str) -> str:
    """The name as MLflow takes it: of few characters, and like a path that stays in its folder."""
    plain = re.sub(r"[^\w\-. :/]", "_", name)
    return os.path.normpath(f"/{plain}").strip("/")[:250].rstrip("/") or "_"
