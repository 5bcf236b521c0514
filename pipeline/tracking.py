"""MLflow behind one small class. Tracking never stops or slows a stage: a thread beside it talks to the store.

Metrics are sent in batches, each step of a metric once. A resumed run keeps its params and takes only the steps that
it lacks. While the store is away all waits, in order, and is tried again every minute; what has not arrived when the
stage ends, `sync` hands over from the stage's files.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.machine import Machine, commit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pydantic import BaseModel

PARAMS_A_BATCH, METRICS_A_BATCH, TAG_LENGTH = 100, 1000, 5000  # the store's limits
SECONDS_A_FLUSH, SECONDS_A_RETRY = 10.0, 60.0
SECONDS_AT_START, SECONDS_AT_END, SECONDS_KILLED = 15.0, 60.0, 5.0  # that a stage waits for a slow store, at most
BUFFER = 200_000  # metrics kept while the store is away


class Tracker(Protocol):
    """What a stage may tell about its run; use it as a context manager."""

    run_id: str | None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; `/` in a name makes a group of charts."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file."""

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Name the data the run reads; the digest is that of its manifest."""

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""

    def flush(self) -> None:
        """Send what is buffered."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class StoreError(Exception):
    """The store does not answer."""


class NullTracker:
    """Records nothing: for tests, MDEQ_TRACKING=off, and all but the first process of a distributed run."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing."""

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Nothing."""

    def tag(self, name: str, value: str) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def start(
    stage: str, instance: str | None, params: BaseModel | None, machine: Machine, record: Path | None = None
) -> Tracker:
    """The tracker of a stage's run: a new run, or the one that the file `record` names if the store has it."""
    if machine.tracking_uri is None or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    run_id = record.read_text(encoding="utf-8") if record and record.exists() else None
    tracker = MlflowTracker(machine, record)
    tracker.begin(stage, instance, params and params.model_dump(mode="json"), run_id)
    return tracker


class MlflowTracker:
    """One MLflow run; made by `start`.

    Attributes:
        run_id: None until the store has answered.
        complete: Whether everything has arrived; known after the end.
    """

    def __init__(self, machine: Machine, record: Path | None = None) -> None:
        self.run_id: str | None = None
        self.complete = False
        self._machine, self._record = machine, record
        self._client: Any = None  # MlflowClient, once the store has answered
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._rows: list[Any] = []  # mlflow.entities.Metric; appended by the stage, taken away by the thread
        self._told: dict[str, int] = {}  # metric -> the last step that the stage told
        self._known: dict[str, int] = {}  # metric -> its last step in the store, when the run was resumed
        self._monitor: Any = None
        self._flushed = time.monotonic()
        self._begun, self._closing = threading.Event(), threading.Event()
        self._warned = self._dropped = False

    def begin(
        self, stage: str, instance: str | None, params: dict[str, Any] | None, run_id: str | None, watch: bool = True
    ) -> None:
        """Create or reopen the run, watch the machine's load; waits for the store only a short while."""
        _quieten()
        import mlflow.entities  # noqa: F401  here: a loader process must not be forked amid an import
        import mlflow.system_metrics.system_metrics_monitor  # noqa: F401

        def begin() -> None:
            self._client, experiment = open_store(self._machine)
            if run_id is None or not self._reopen(run_id):
                name = f"{stage}/{instance}" if instance else stage
                tags = _tags(stage, instance, self._machine)
                run = self._client.create_run(experiment, run_name=name, tags=tags)
                self.run_id = run.info.run_id
            if self._record is not None:
                self._record.parent.mkdir(parents=True, exist_ok=True)
                self._record.write_text(self.run_id or "", encoding="utf-8")
            self._begun.set()

        def describe() -> None:
            if params and self.run_id != run_id:
                self._log_params(params)
            if watch:
                self._start_monitor(resumed=self.run_id == run_id)

        self._thread = threading.Thread(target=self._work, args=([begin, describe],), name="tracking", daemon=True)
        self._thread.start()
        self._begun.wait(SECONDS_AT_START)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, each step of a metric once."""
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
        """Store a copy of a file."""
        self._jobs.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Name the data the run reads."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow's digests are short names, at most 36 characters
        data = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        self._jobs.put(lambda: self._client.log_inputs(self.run_id, inputs))

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._jobs.put(lambda: self._client.set_tag(self.run_id, name, value[:TAG_LENGTH]))

    def flush(self) -> None:
        """Have what is buffered sent."""
        self._flushed = time.monotonic()
        self._jobs.put(self._send)

    def __enter__(self) -> MlflowTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(lambda: self._monitor and self._monitor.finish())
        self.flush()
        if error is not None:
            self.tag("error", f"{type(error).__name__}: {error}")
        self._jobs.put(lambda: self._client.set_terminated(self.run_id, _status(error)))
        self._jobs.put(None)
        self._closing.set()
        self._thread.join(SECONDS_KILLED if _status(error) == "KILLED" else SECONDS_AT_END)
        if not self.complete:
            self._complain("not everything has arrived")

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
            again = status >= 500 or isinstance(error, ConnectionError | TimeoutError)
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

    def _reopen(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
            if run.info.lifecycle_stage != "active":
                return False
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # another store, or the run was deleted for good
        # the latest step of each metric, without reading whole histories; MLflow has no public name for it
        self._known = {metric.key: metric.step for metric in run.data._metric_objs}
        self.run_id = run_id
        return True

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(name, str(value)) for name, value in flatten(params).items()]
        for i in range(0, len(flat), PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=flat[i : i + PARAMS_A_BATCH])
        self._client.log_dict(self.run_id, params, "params.json")

    def _start_monitor(self, resumed: bool) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=resumed, tracking_uri=self._machine.tracking_uri
        )
        self._monitor.start()


def open_store(machine: Machine) -> tuple[MlflowClient, str]:
    """A client of the store and the experiment's id; makes both when missing, one process at a time."""
    from filelock import FileLock

    _quieten()
    from mlflow import MlflowClient

    uri = machine.tracking_uri
    assert uri is not None, "tracking is off"
    local = uri.startswith("sqlite:///")
    name = machine.experiment
    # two processes that create one sqlite store at once break it, and two that create one experiment collide
    lock = FileLock(f"{uri.removeprefix('sqlite:///')}.lock", timeout=120) if local else contextlib.nullcontext()
    with lock:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return client, experiment.experiment_id
        where = (machine.root / "mlartifacts").as_uri() if local else None
        return client, client.create_experiment(name, artifact_location=where)


def lacking(machine: Machine, run_id: str | None, results: str) -> tuple[bool, str | None]:
    """Whether the store lacks (some of) a run, and the id of what it has of it.

    Args:
        run_id: That the stage had, if any.
        results: The checksum of its metrics file, by which a run that was made of the files is found again.
    """
    from mlflow.exceptions import MlflowException

    try:
        client, experiment = open_store(machine)
        runs = client.search_runs([experiment], f"tags.results = '{results}'")
        try:
            runs += [client.get_run(run_id)] if run_id else []
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    except MlflowException as error:
        raise StoreError(f"the MLflow store does not answer: {_one_line(error)}") from None
    for run in runs:  # one that its user deleted is not forced back
        return run.info.status != "FINISHED" and run.info.lifecycle_stage == "active", run.info.run_id
    return True, None


def serve(machine: Machine, port: int) -> int:
    """Show the store's runs in the browser view until interrupted; returns the server's exit code."""
    import subprocess

    _, experiment = open_store(machine)
    print(
        f"MLflow: http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning",
        flush=True,
    )
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
