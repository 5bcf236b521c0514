"""MLflow behind one small class. Tracking never stops or slows a stage: a thread beside it talks to the store.

Metrics are sent in batches, each step of a metric once. A resumed run keeps its params and takes only the steps that
it lacks. While the store is away all waits, in order, and is tried again every minute; what has not arrived when the
stage ends, `sync` hands over from the stage's files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import queue
import re
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from pipeline.machine import Machine, commit, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pydantic import BaseModel

PARAMS_A_BATCH, METRICS_A_BATCH, TAG_LENGTH = 100, 1000, 5000  # the store's limits
SECONDS_A_FLUSH, SECONDS_A_RETRY = 10.0, 60.0
SECONDS_AT_START, SECONDS_AT_END, SECONDS_KILLED = 15.0, 60.0, 5.0  # that a stage waits for a slow store, at most
BUFFER = 200_000  # metrics kept while the store is away
NOTE = """A run named `pipeline ...` is one `dvc repro` or `dvc exp run`: it has the report (`index.html` among its
artifacts) and the headline numbers, and below it the runs of its stages. Charts are grouped: `loss/`, `eval/`,
`solver/`, `memory/`, `time/`, `system/`. The saved view `results` has the columns that matter."""
VIEW = "results"
COLUMNS = (
    *(f"{dataset}/mdeq-small" for dataset in ("cifar10", "imagenet", "cityscapes")),
    *("eval/top1", "eval/miou", "solver/relative_residual", "solver/nfe"),
)


class Tracker(Protocol):
    """What a stage may tell about its run; use it as a context manager.

    `run_id` names the run: as MLflow does, or until the store has answered by the mark that it will have there.
    """

    run_id: str | None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; `/` in a name makes a group of charts."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file."""

    def model(self, path: Path, segments: bool) -> None:
        """Store a finished model.pt such that `mlflow.pyfunc.load_model` predicts from files of photos."""

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Name the data the run reads, and what for; the digest is that of its manifest."""

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""

    def flush(self) -> None:
        """Send what is buffered."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run: finished, failed or killed."""


class StoreError(Exception):
    """The store does not answer."""


class NullTracker(Tracker):
    """Records nothing: for tests, MDEQ_TRACKING=off, and all but the first process of a distributed run."""

    run_id: str | None = None

    def __enter__(self) -> NullTracker:
        return self


def start(
    stage: str, instance: str | None, params: BaseModel | None, machine: Machine, record: Path | None = None
) -> Tracker:
    """The tracker of a stage's run: a new run, or the one that was begun with the same file `record`."""
    if machine.tracking_uri is None or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    tracker = MlflowTracker(machine, _mark(record))
    tracker.begin(stage, instance, params and params.model_dump(mode="json"))
    return tracker


def _mark(record: Path | None) -> str:
    """By which a run is found again; noted before the run is made, so that a kill in between leaves no second one."""
    mark = record.read_text(encoding="utf-8") if record and record.exists() else ""
    if not mark:
        mark = f"{uuid.uuid4().hex}-mark"
        if record:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(mark, encoding="utf-8")
    return mark


class MlflowTracker:
    """One MLflow run; made by `start`.

    Args:
        machine: Whose store.
        mark: By which the run is found again: a tag of it, or its id.

    Attributes:
        complete: Whether everything has arrived; known after the end.
    """

    def __init__(self, machine: Machine, mark: str) -> None:
        self.run_id: str | None = mark
        self.complete = False
        self._machine = machine
        self._client: Any = None  # MlflowClient, once the store has answered
        self._experiment = ""
        self._parent: str | None = None  # the run of the whole pipeline, if DVC runs this stage
        self._note: IO[str] | None = None  # says that the run goes on
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._rows: list[Any] = []  # mlflow.entities.Metric; appended by the stage, taken away by the thread
        self._told: dict[str, int] = {}  # metric -> the last step that the stage told
        self._known: dict[str, int] = {}  # metric -> its last step in the store, when the run was resumed
        self._described: Collection[str] = ()  # the params in the store, when the run was resumed
        self._flushed = time.monotonic()
        self._begun, self._closing = threading.Event(), threading.Event()
        self._warned = self._dropped = False

    def begin(self, stage: str, instance: str | None, params: dict[str, Any] | None, watch: bool = True) -> None:
        """Create or reopen the run, watch the machine's load; waits for the store only a short while."""
        _quieten()
        # here: a loader process must not be forked amid an import
        import mlflow.entities  # noqa: F401 # pyright: ignore[reportUnusedImport]
        import mlflow.system_metrics.system_metrics_monitor  # noqa: F401 # pyright: ignore[reportUnusedImport]

        mark = self.run_id or ""

        def begin() -> None:
            self._client, self._experiment = open_store(self._machine)
            if watch:
                if "DVC_STAGE" in os.environ:
                    self._parent = _whole(self._client, self._experiment, self._machine)
                self._note = _noted(self._machine, mark, self._parent or "")
            whole = self._parent if stage == "report" else None  # the whole's run is the one that has its report
            found = _find(self._client, self._experiment, whole or mark)
            if found and found.info.lifecycle_stage == "active":
                self._reopen(found)
            else:
                name = f"{stage}/{instance}" if instance else stage
                tags = _tags(stage, instance, self._machine) | {"mark": mark}
                if self._parent:
                    tags["mlflow.parentRunId"] = self._parent
                self.run_id = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
            if self._note:
                print(self.run_id, file=self._note, flush=True)
            self._begun.set()

        def describe() -> None:
            if params:
                self._log_params(params)
            if watch and self.run_id != self._parent:
                threading.Thread(target=self._watch, name="load", daemon=True).start()

        self._thread = threading.Thread(target=self._work, args=([begin, describe],), name="tracking", daemon=True)
        self._thread.start()
        if not self._begun.wait(SECONDS_AT_START):
            self._complain(f"the store has not answered for {SECONDS_AT_START:g} s")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        new = {name: float(value) for name, value in values.items() if step > self._told.get(name, -1)}
        self._told |= dict.fromkeys(new, step)
        if len(self._rows) < BUFFER:
            self._rows += [Metric(name, value, now, step) for name, value in new.items()]
        full = len(self._rows) >= METRICS_A_BATCH
        if full or time.monotonic() - self._flushed > SECONDS_A_FLUSH:
            self.flush()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._jobs.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def model(self, path: Path, segments: bool) -> None:
        self._jobs.put(lambda: self._log_model(path, segments))

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow's digests are short names, at most 36 characters
        data = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", context)])]
        self._jobs.put(lambda: self._client.log_inputs(self.run_id, inputs))

    def tag(self, name: str, value: str) -> None:
        self._jobs.put(lambda: self._client.set_tag(self.run_id, name, value[:TAG_LENGTH]))

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._jobs.put(self._send)

    def __enter__(self) -> MlflowTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if error is not None:
            self.tag("error", f"{type(error).__name__}: {error}")
        self._jobs.put(lambda: self._end(_status(error)))
        self._jobs.put(None)
        self._closing.set()
        self._thread.join(SECONDS_KILLED if _status(error) == "KILLED" else SECONDS_AT_END)
        if not self.complete:
            self._complain("not everything has arrived")

    def _end(self, status: str) -> None:
        for run_id in filter(None, {self.run_id, self._parent}):
            self._client.set_terminated(run_id, status)
        if self._note:
            Path(self._note.name).unlink(missing_ok=True)
            self._note.close()

    def _work(self, first: list[Callable[[], None]]) -> None:
        """The thread: one job after the other; one that meets no store is tried again, at the end once more."""
        for job in chain(first, iter(self._jobs.get, None)):
            while True:
                last = self._closing.is_set()
                if self._done(job):
                    break
                if last:
                    return
                self._closing.wait(SECONDS_A_RETRY)
        self.complete = not self._dropped

    def _done(self, job: Callable[[], None]) -> bool:
        """Whether the job needs no other try: it is done, or can never be."""
        try:
            job()
        except Exception as error:
            self._complain(_one_line(error))
            self._begun.set()  # nothing to wait for
            status = getattr(error, "get_http_status_code", lambda: 400)()
            again = status >= 500 or status == 429 or isinstance(error, ConnectionError | TimeoutError)
            self._dropped |= not again
            return not again
        return True

    def _complain(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            cure = "the stage goes on; `python -m pipeline sync` hands over what the store lacks at the end"
            print(f"tracking: {what}; {cure}", file=sys.stderr, flush=True)

    def _send(self) -> None:
        while batch := self._rows[:METRICS_A_BATCH]:
            new = [row for row in batch if row.step > self._known.get(row.key, -1)]
            if new:
                self._client.log_batch(self.run_id, metrics=new)
            del self._rows[: len(batch)]

    def _reopen(self, run: Run) -> None:
        self._client.update_run(run.info.run_id, status="RUNNING")
        if run.info.run_id != self._parent:  # to which each report brings its own numbers
            # the latest step of each metric, without reading whole histories; MLflow has no public name for it
            self._known = {metric.key: metric.step for metric in run.data._metric_objs}
        self._described = run.data.params.keys()
        self.run_id = run.info.run_id

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(name, str(value)) for name, value in flatten(params).items() if name not in self._described]
        for i in range(0, len(flat), PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=flat[i : i + PARAMS_A_BATCH])
        if flat:
            self._client.log_dict(self.run_id, params, "params.json")

    def _log_model(self, path: Path, segments: bool) -> None:
        outputs = self._client.get_run(self.run_id).outputs
        if outputs and outputs.model_outputs:
            return  # killed after it, and resumed
        import pandas as pd
        from mlflow import pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, DataType, Schema
        from mlflow.types.schema import Array

        strings, numbers, labels = Array(DataType.string), Array(DataType.double), Array(Array(DataType.long))
        columns = {"labels": labels} if segments else {"classes": strings, "probabilities": numbers}
        answers = Schema([ColSpec(kind, name) for name, kind in columns.items()])
        signature = ModelSignature(Schema([ColSpec(DataType.string, "path")]), answers)
        name = f"{path.parent.parent.name}-{path.parent.name}"
        logged = self._client.create_logged_model(self._experiment, name, self.run_id)
        packages = [f"{package}=={found}" for package, found in versions().items() if found != "none"]
        with tempfile.TemporaryDirectory() as folder:
            save: Any = pyfunc.save_model  # whose defaults its types are guessed from
            save(
                f"{folder}/model",
                loader_module="pipeline.inference",
                data_path=str(path),
                code_paths=[str(Path(__file__).parents[1] / package) for package in ("mdeq", "pipeline")],
                mlflow_model=Model(logged.artifact_location, self.run_id, model_id=logged.model_id),
                signature=signature,
                input_example=pd.DataFrame({"path": ["photo.jpg"]}),
                pip_requirements=packages,
            )
            self._client.log_model_artifacts(logged.model_id, f"{folder}/model")
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])

    def _watch(self) -> None:
        """Records the machine's load until the stage ends; by MLflow's sensors, whose own thread gives up too soon."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        sensors = SystemMetricsMonitor(self.run_id, tracking_uri=self._machine.tracking_uri)
        step = max((last for name, last in self._known.items() if name.startswith("system/")), default=-1)
        while not self._closing.wait(sensors.sampling_interval):
            step += 1
            sensors.collect_metrics()
            self.metrics({f"system/{name}": value for name, value in sensors.aggregate_metrics().items()}, step)
            for sensor in sensors.monitors:
                sensor.clear_metrics()


def open_store(machine: Machine) -> tuple[MlflowClient, str]:
    """A client of the store and the experiment's id; makes both when missing, one process at a time.

    Runs that a killed process left open are closed.
    """
    _quieten()
    from mlflow import MlflowClient

    uri = machine.tracking_uri
    assert uri is not None, "tracking is off"
    local = uri.startswith("sqlite:///")
    name = machine.experiment
    with _alone(uri):
        if local:
            _create(Path(uri.removeprefix("sqlite:///")))
        client = MlflowClient(uri)
        if found := client.get_experiment_by_name(name):
            experiment = found.experiment_id
        else:
            where = (machine.root / "mlartifacts").as_uri() if local else None
            experiment = client.create_experiment(name, artifact_location=where, tags=_experiment_tags())
    _close_abandoned(client, experiment, machine)
    return client, experiment


def _notes(machine: Machine) -> Path:
    """Where the runs of this store that go on are noted, a file each."""
    store = hashlib.md5(str(machine.tracking_uri).encode(), usedforsecurity=False).hexdigest()
    return machine.root / "work" / "runs" / store[:8]


def _noted(machine: Machine, *marks: str) -> IO[str]:
    """A note of a run and that of the whole, locked until it is closed: the kernel frees it however a process ends."""
    path = _notes(machine) / marks[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        note = path.open("a", encoding="utf-8")
        fcntl.flock(note, fcntl.LOCK_SH)
        if path.exists():  # else another process took it, not locked yet, for an abandoned one
            print(*marks, file=note, flush=True)
            return note


def _close_abandoned(client: MlflowClient, experiment: str, machine: Machine) -> None:
    """Marks as killed the noted runs whose process is gone; a stage that goes on opens its own again."""
    for path in _notes(machine).glob("*"):
        with contextlib.suppress(OSError), path.open(encoding="utf-8") as note:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where it is still held
            for mark in note.read().split():
                run = _find(client, experiment, mark)
                if run and (run.info.status, run.info.lifecycle_stage) == ("RUNNING", "active"):
                    client.set_terminated(run.info.run_id, "KILLED")
            path.unlink()


def _create(database: Path) -> None:
    """Makes an sqlite store whole or not at all: MLflow goes through many steps, and refuses one left half-way."""
    if database.exists():
        return
    from mlflow import MlflowClient

    fresh = database.with_name(f"{database.name}.new")
    fresh.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{fresh}").search_experiments()
    fresh.replace(database)


def _experiment_tags() -> dict[str, str]:
    """What MLflow's page reads of an experiment: its note, that it trains models, and a saved view of its runs."""
    now = time.time_ns() // 1_000_000
    state = json.dumps({"selectedColumns": [f"metrics.`{name}`" for name in COLUMNS]})
    view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": state}
    return {
        "mlflow.note.content": NOTE,
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
    }


def _alone(uri: str) -> contextlib.AbstractContextManager[Any]:
    """Two processes that create one sqlite store at once break it, and two that create one experiment collide."""
    from filelock import FileLock

    local = uri.startswith("sqlite:///")
    return FileLock(f"{uri.removeprefix('sqlite:///')}.lock", timeout=120) if local else contextlib.nullcontext()


def _find(client: MlflowClient, experiment: str, mark: str) -> Run | None:
    """The run with that mark or id, also one that its user deleted; None if the store has none."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    for run in client.search_runs([experiment], f"tags.mark = '{mark}'", ViewType.ALL, max_results=1):
        return run
    try:
        return client.get_run(mark)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _whole(client: MlflowClient, experiment: str, machine: Machine) -> str:
    """The run that groups the stages of one DVC experiment, or of the workspace at one commit; made when missing."""
    name = os.environ.get("DVC_EXP_NAME") or f"workspace {commit(machine.root)[:12]}"
    with _alone(machine.tracking_uri or ""):
        found = client.search_runs([experiment], f"tags.whole = '{name}'")
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        tags = {**_tags("pipeline", None, machine), "whole": name, "DVC_STAGE": ""}
        return client.create_run(experiment, run_name=f"pipeline {name}", tags=tags).info.run_id


def register(machine: Machine, mark: str | None, name: str) -> str:
    """Make the model of a run, by mark or id, a new version of the registered model `name`; returns that version.

    Raises:
        StoreError: if the store does not answer or has no such model.
    """
    _quieten()
    from mlflow.exceptions import MlflowException

    try:
        client, experiment = open_store(machine)
        run = _find(client, experiment, mark) if mark else None
        if run is None or not (run.outputs and run.outputs.model_outputs):
            raise StoreError(f"{name}: the store has no model of its run; run `python -m pipeline sync` first")
        with contextlib.suppress(MlflowException):  # it is there
            client.create_registered_model(name)
        model = run.outputs.model_outputs[-1].model_id
        return client.create_model_version(name, f"models:/{model}", run.info.run_id, model_id=model).version
    except MlflowException as error:
        raise StoreError(f"{name}: {_one_line(error)}; run `python -m pipeline sync` first") from None


def lacking(machine: Machine, mark: str) -> bool:
    """Whether the store lacks (some of) the run with that mark or id; one that its user deleted is not forced back."""
    _quieten()
    from mlflow.exceptions import MlflowException

    try:
        run = _find(*open_store(machine), mark)
    except MlflowException as error:
        raise StoreError(f"the MLflow store does not answer: {_one_line(error)}") from None
    if run is None or "whole" in run.data.tags:  # that has its report, whatever failed since
        return run is None
    return run.info.status != "FINISHED" and run.info.lifecycle_stage == "active"


def serve(machine: Machine, port: int) -> int:
    """Show the store's runs in the browser view until interrupted; returns the server's exit code."""
    import subprocess

    client, experiment = open_store(machine)
    if not any(name.endswith(VIEW) for name in client.get_experiment(experiment).tags):  # an older store's
        for name, value in _experiment_tags().items():
            client.set_experiment_tag(experiment, name, value)
    page = f"experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    print(f"MLflow: http://127.0.0.1:{port}/#/{page}", flush=True)
    print("ready in some seconds; Ctrl-C ends it", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # not as an argument, which every user of the machine can read: it may hold a password
    return subprocess.run(
        command, env={**os.environ, "MLFLOW_BACKEND_STORE_URI": machine.tracking_uri or ""}
    ).returncode


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested params under dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def curves(table: Any) -> Iterator[tuple[int, dict[str, float]]]:
    """The curves of a convergence's table, a pandas one: evaluation, and the means over the batches at it."""
    for (solver, evaluation), row in (
        table.groupby(["solver", "evaluation"], sort=False)[["change", "residual"]].mean().iterrows()
    ):
        yield evaluation, finite({f"solver/{solver}_{name}": value for name, value in row.items()})


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among a metrics file's entries, ready for `Tracker.metrics`."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _tags(stage: str, instance: str | None, machine: Machine) -> dict[str, str]:
    environment = {name: os.environ.get(name) for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")}
    tags = {
        "stage": stage,
        "instance": instance,
        "mlflow.source.name": "pipeline",
        "mlflow.source.git.commit": commit(machine.root),
    }
    facts = {f"machine.{name}": str(value) for name, value in machine.describe().items()}
    return {name: value for name, value in (tags | environment | facts).items() if value}


def _one_line(error: Exception) -> str:
    """What happened, without the password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//***@", f"{type(error).__name__}: {error}".splitlines()[0])


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _quieten() -> None:
    """A store that is away must be told from a slow one without many retries; and nobody is called home."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])  # where MLflow is imported already
