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
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

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
CHUNK = 4_000_000  # bytes of a run file read at once
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
    "not a database|malformed|no such table|no such column": "it is damaged or not MLflow's; "
    "move it away, a new one is made",
    "readonly|read-only|[Pp]ermission denied|unable to open": "it cannot be written; "
    "give this user write access to the file and its folder",
    "No module named|Can't load plugin": "a Python package for it is missing; install it",
    r"authentication|[Aa]ccess denied|\b40[13]\b|[Uu]nauthorized|[Ff]orbidden": "it refuses the "
    "credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "[Pp]arse|[Ii]nvalid (URL|url)|[Uu]nsupported|No host": "MLFLOW_TRACKING_URI is not an address "
    "of a store; write http://host:5000 or sqlite:////folder/mlflow.db",
    "": "it cannot be used now; the runs wait in their files",
}
THREADS = threading.Lock()
PICTURE = (  # a grey pixel, the example of a logged model's input
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
VIEW = "stages"
COLUMNS = ("eval/top1", "eval/miou", "loss/train", "solver/relative_residual", "solver/nfe")
RUN_NAME = "attributes.`Run Name`"
NOTE = """A run named `pipeline ...` groups the stages of one `dvc repro` or `dvc exp run`; each
stage is a run below it. Charts are grouped by what is before the `/` in a metric's name."""


class Upload:
    """The upload of one run file, in as many calls of `once` as it takes.

    Args:
        file: The run file.
        machine: Whose store.
        results: The folder to which the names of artifacts in the file are relative; None for the
            file's own.

    Attributes:
        complete: The store has all of a run that has ended, or its user deleted it there.
    """

    def __init__(self, file: Path, machine: Machine, results: Path | None = None) -> None:
        self.complete = False
        self._file, self._machine, self._results = file, machine, results or file.parent
        self._lock = threading.Lock()
        self._inode: int | None = None  # of an SQLite store
        self._known = False  # whether the store was asked what it has; the attributes of _ask hold
        self._position = 0

    def forget(self) -> None:
        """Makes the next call read the file from its start and ask the store what it has of it."""
        with self._lock:
            self._known, self._position = False, 0

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
        self._check_store()
        if not self._known:
            self._ask(read_header(self._file))
        if self.complete:
            return False
        while rows := self._new_rows():
            self._send(rows)
        if self._status not in ENDED and not running(self._file):
            self._status = "KILLED"
        if self._status in ENDED:
            for run in filter(None, (self._run, self._parent)):
                self._client.set_terminated(run, self._status, self._ended)
            if self._missing:
                raise UserError(
                    f"{self._results}: {', '.join(self._missing)}: no such file, so not uploaded; "
                    "`dvc checkout` restores it, or rerun the stage"
                )
            self._client.set_tag(self._run, UPLOADED, str(self._position))
            self.complete = True
        return True

    def _check_store(self) -> None:
        """MLflow would write on into a database whose file was deleted."""
        database = _database(self._machine)
        found = database.stat().st_ino if database and database.is_file() else None
        if self._inode not in (None, found):
            raise UserError(f"{database}: deleted or replaced while the stage ran; {LATER}")
        self._inode = found

    def _ask(self, header: dict[str, Any]) -> None:
        """Finds the run in the store, or makes it, and notes what the store has of it."""
        self._name = "/".join(filter(None, (header["stage"], header.get("instance"))))
        with _alone(self._machine):
            self._client, self._experiment = connect(self._machine)
            found = _find(self._client, self._experiment, "mark", header["run"])
            if found is None:
                parent = _parent(self._client, self._experiment, header)
                tags = {name: str(text)[:TAG_LENGTH] for name, text in header["tags"].items()}
                tags |= {"mark": header["run"]} | ({"mlflow.parentRunId": parent} if parent else {})
                found = self._client.create_run(self._experiment, header["time"], tags, self._name)
        self._run, self._parent = found.info.run_id, found.data.tags.get("mlflow.parentRunId")
        self._steps = {metric.key: metric.step for metric in found.to_proto().data.metrics}
        self._params = set(found.data.params)
        inputs = found.inputs.dataset_inputs if found.inputs else []
        self._datasets = {one.dataset.digest for one in inputs}
        self._has_model = bool(found.outputs and found.outputs.model_outputs)
        self._status, self._ended = "RUNNING", None
        self._missing: list[str] = []
        ended, deleted = found.info.status in ENDED, found.info.lifecycle_stage == "deleted"
        whole = ended and found.data.tags.get(UPLOADED) == str(self._file.stat().st_size)
        self.complete = deleted or whole
        if ended and not self.complete:
            self._client.update_run(self._run, "RUNNING")
        with self._lock:
            self._known, self._position = True, 0

    def _new_rows(self) -> list[dict[str, Any]]:
        with self._lock, self._file.open("rb") as file:
            file.seek(self._position)
            content = file.read(CHUNK)
            whole = content[: content.rfind(b"\n") + 1]
            self._position += len(whole)
        return [parse(line, self._file) for line in whole.splitlines()]

    def _send(self, rows: list[dict[str, Any]]) -> None:
        metrics = []
        for row in rows:
            match row:
                case {"metrics": dict(values), "step": int(step), "time": int(at)}:
                    metrics += self._new_metrics(values, step, at)
                case {"tag": str(name), "value": value}:
                    self._client.set_tag(self._run, _key(name), str(value)[:TAG_LENGTH])
                case {"dataset": str(), "digest": str(), "source": str(), "context": str()}:
                    self._log_dataset(**row)
                case {"artifact": str(name)}:
                    if path := self._path(name):
                        folder = str(Path(name).parent)
                        self._client.log_artifact(
                            self._run, str(path), None if folder == "." else folder
                        )
                case {"model": str(name)}:
                    if (path := self._path(name)) and not self._has_model:
                        self._log_model(path)
                case {"status": "RUNNING" | "FINISHED" | "FAILED" | "KILLED", "time": int(at)}:
                    self._status, self._ended = row["status"], at
                case {"run": str()}:
                    self._log_params(row.get("params") or {})
                case _:
                    raise damaged(self._file, f"{str(row)[:60]} is no row of a run")
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self._run, batch)

    def _new_metrics(self, values: dict[str, Any], step: int, at: int) -> list[Any]:
        from mlflow.entities import Metric

        named = {_key(name): value for name, value in values.items()}
        new = {name: value for name, value in named.items() if step > self._steps.get(name, -1)}
        if not all(isinstance(value, int | float) for value in new.values()):
            raise damaged(self._file, f"{str(new)[:60]} are not numbers")
        self._steps |= dict.fromkeys(new, step)
        return [Metric(name, value, at, step) for name, value in new.items()]

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = {_key(name): str(value) for name, value in flatten(params).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in self._params]
        for batch in _batches(new, PARAMS_PER_BATCH):
            self._client.log_batch(self._run, params=batch)

    def _log_dataset(self, dataset: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = digest[:36]  # MLflow's longest
        if digest not in self._datasets:
            data = Dataset(name=dataset, digest=digest, source_type="local", source=source)
            inputs = [DatasetInput(data, [InputTag("mlflow.data.context", context)])]
            self._client.log_inputs(self._run, inputs)
            self._datasets.add(digest)

    def _log_model(self, path: Path) -> None:
        """Stores a model such that `mlflow.pyfunc.load_model` and `mlflow models serve` predict."""
        from mlflow import pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, DataType, Schema
        from mlflow.types.schema import Array

        asked = Schema([ColSpec(DataType.binary, "picture")])  # base64 in a request's JSON
        strings, numbers = Array(DataType.string), Array(DataType.double)
        answers = Schema([ColSpec(strings, "classes"), ColSpec(numbers, "shares")])
        name = re.sub(r"[^\w-]", "-", self._name)
        logged = self._client.create_logged_model(self._experiment, name, self._run)
        packages = [f"{name}=={found}" for name, found in versions().items() if found != "none"]
        with tempfile.TemporaryDirectory() as folder:
            pyfunc.save_model(
                f"{folder}/model",
                loader_module="pipeline.predict",
                data_path=str(path),
                code_paths=[str(Path(__file__).parents[1] / name) for name in ("mdeq", "pipeline")],
                mlflow_model=Model(logged.artifact_location, self._run, model_id=logged.model_id),
                signature=ModelSignature(asked, answers),
                input_example=pd.DataFrame({"picture": [base64.b64decode(PICTURE)]}),
                pip_requirements=packages,
            )
            self._client.log_model_artifacts(logged.model_id, f"{folder}/model")
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(self._run, [LoggedModelOutput(logged.model_id, step=0)])
        self._has_model = True

    def _path(self, name: str) -> Path | None:
        """A file of the results, which a run file of unknown origin must not lead out of."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise damaged(self._file, f"{name} lies outside the results")
        path = self._results / name
        if path.is_file():
            return path
        self._missing.append(name)
        return None


def _parent(client: MlflowClient, experiment: str, header: dict[str, Any]) -> str | None:
    """The run that groups the stages of one DVC experiment; None for a stage run by hand."""
    name = header.get("pipeline")
    if not name:
        return None
    key = files.digest(str(name).encode())
    found = _find(client, experiment, "pipeline", key)
    if found is None:
        tags = {"pipeline": key, "mlflow.source.name": "pipeline"}
        found = client.create_run(experiment, header["time"], tags, f"pipeline {name}")
    return found.info.run_id


def _find(client: MlflowClient, experiment: str, tag: str, value: str) -> Run | None:
    """The run with a tag of that value, of letters and digits; also one that its user deleted."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment], f"tags.{tag} = '{value}'", ViewType.ALL, 1)
    return found[0] if found else None


def close_killed(machine: Machine, run: str) -> None:
    """Marks the run with that id, and its pipeline, as killed where the store has them open.

    Raises:
        UserError: The store cannot be reached or used.
    """
    with explained(machine), _alone(machine):
        client, experiment = connect(machine)
        found = _find(client, experiment, "mark", run)
        parent = found and found.data.tags.get("mlflow.parentRunId")
        for one in filter(None, (found and found.info.run_id, parent)):
            info = client.get_run(one).info
            if (info.status, info.lifecycle_stage) == ("RUNNING", "active"):
                client.set_terminated(one, "KILLED")


def connect(machine: Machine) -> tuple[MlflowClient, str]:
    """A client of the store and the experiment's id; both are made where they are missing."""
    prepare(machine)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = _database(machine)
    if database:
        _make(database)
    client = MlflowClient(_address(database) if database else machine.tracking_uri)
    name = machine.experiment
    if client.get_experiment_by_name(name) is None:
        where = (machine.root / "mlartifacts").as_uri() if database else None
        with contextlib.suppress(MlflowException):  # another machine makes it
            made = client.create_experiment(name, where, {"mlflow.note.content": NOTE})
            _save_view(client, made)
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        number = found.experiment_id if found else "ID"
        raise UserError(
            f"MLflow's experiment {name!r} was deleted; run `mlflow experiments restore -x "
            f"{number}`, or set MLFLOW_EXPERIMENT_NAME to another; {LATER}"
        )
    return client, found.experiment_id


def prepare(machine: Machine) -> None:
    """Imports what an upload uses: a loader process must not be forked during an import."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.entities
    import mlflow.system_metrics.metrics.gpu_monitor
    import mlflow.tracking  # noqa: F401

    if not _is_http(machine):
        import mlflow.store.db.utils
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        mlflow.store.db.utils.MAX_RETRY_COUNT = 2  # instead of 10, which take 100 s
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def _is_http(machine: Machine) -> bool:
    return str(machine.tracking_uri).startswith(("http://", "https://"))


def _database(machine: Machine) -> Path | None:
    """The file of an SQLite store; None for another store."""
    prefix, path = "sqlite:///", str(machine.tracking_uri)
    if not path.startswith(prefix):
        return None
    return Path(unquote(path.removeprefix(prefix).partition("?")[0]))


def _address(database: Path) -> str:
    """A database's address for MLflow, which cannot read one that has `?` or `%` in its path."""
    special = re.search(r"[?%]", str(database))
    return f"sqlite:///{os.path.relpath(database) if special else database}"


def _make(database: Path) -> None:
    """Makes an SQLite store whole or not at all: MLflow takes many steps, and refuses half of them.

    An existing one is looked at first: MLflow would fill any other program's database.
    """
    from mlflow import MlflowClient

    if database.is_dir():
        raise UserError(f"{database}: a folder where MLflow's database should be; move it; {LATER}")
    if not database.exists() or database.stat().st_size == 0:
        fresh = database.with_name(f"{database.name}.new")
        fresh.unlink(missing_ok=True)
        MlflowClient(_address(fresh)).search_experiments()
        fresh.replace(database)
    address = f"file:{quote(str(database.absolute()))}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as connection:
        connection.execute("select version_num from alembic_version").fetchone()
    if not all(os.access(path, os.W_OK) for path in (database, database.parent)):
        raise PermissionError("Permission denied")


@contextlib.contextmanager
def _alone(machine: Machine) -> Iterator[None]:
    """One process, and one thread in it, at a time makes a store, an experiment or a run."""
    database = _database(machine) or machine.root / "work" / "mlflow"
    with THREADS, files.locked(database.with_name(f"{database.name}.lock"), "", wait=True):
        yield


def _save_view(client: MlflowClient, experiment: str) -> None:
    """Saves the view that `ui` opens: every stage is a row, its name whole, the last one first.

    MLflow folds runs below their parents where they are sorted by their start; by their source,
    which is the same for all, they are rows in the same order.
    """
    now = time.time_ns() // 1_000_000
    state = {
        "orderByKey": "tags.`mlflow.source.name`",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{column}`" for column in COLUMNS],
        "columnOrder": [RUN_NAME],
        "columnWidths": {RUN_NAME: 360},
    }
    view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")


@contextlib.contextmanager
def explained(machine: Machine) -> Iterator[None]:
    """Turns whatever a store raises into one line that says what to do.

    Raises:
        UserError: In place of any error.
    """
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
    if not _is_http(machine):
        _check_port(port)
    with explained(machine), _alone(machine):
        client, experiment = connect(machine)
        _save_view(client, experiment)
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    page = f"#/experiments/{experiment}/runs?{query}"
    if _is_http(machine):
        parts = urlsplit(str(machine.tracking_uri))
        host = parts.netloc.rpartition("@")[2]
        base = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        print(f"MLflow: {base}/{page}", flush=True)
        return 0
    return _serve(machine, port, f"http://127.0.0.1:{port}/{page}")


def _check_port(port: int) -> None:
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another with --port") from None


def _serve(machine: Machine, port: int, page: str) -> int:
    words = f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1".split()
    database = _database(machine)
    address = _address(database) if database else str(machine.tracking_uri)
    # the address may hold a password, and every user of the machine can read arguments
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": address}
    server = subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                print(f"MLflow: {page}\nCtrl-C ends it", flush=True)
                return server.wait()
            time.sleep(0.2)
        return server.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def load_sensors() -> list[Any]:
    """MLflow's sensors of the machine's load: CPU, memory, disk, network, GPU."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    sensors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or no package to look at it
        sensors.append(GPUMonitor())
    return sensors


def read_header(file: Path) -> dict[str, Any]:
    """The first line of a run file.

    Raises:
        UserError: There is no file, or it is damaged.
    """
    try:
        with file.open("rb") as lines:
            header = parse(lines.readline(), file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); rerun its stage") from None
    match header:
        case {"run": str(run), "stage": str(), "time": int(), "tags": dict()} if run.isalnum():
            return header
    raise damaged(file, "its first line is no header")


def parse(line: bytes, file: Path) -> dict[str, Any]:
    """The row in a line of a run file.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise damaged(file, f"{line[:60].decode(errors='replace')!r} is no row")
    return row


def damaged(file: Path, what: str) -> UserError:
    """The error of a run file that was changed by hand."""
    cure = "`dvc checkout` restores it, or delete it and rerun its stage"
    return UserError(f"{file}: damaged: {what}; {cure}")


def running(file: Path) -> bool:
    """Whether a process still writes a run file: it holds a lock, which the kernel frees."""
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # another than this one: no such file, no locks
        return isinstance(error, BlockingIOError)
    return False


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested params under dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _key(name: str) -> str:
    """The name as MLflow takes it: of few characters, and like a path that stays in its folder."""
    plain = re.sub(r"[^\w\-. :/]", "_", name)
    return os.path.normpath(f"/{plain}").strip("/")[:250].rstrip("/") or "_"


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
