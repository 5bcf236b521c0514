"""MLflow behind one small class. Tracking never stops a stage: its first failure warns, the stage goes on.

Metrics are buffered and sent in batches. A resumed run (`run_id`) keeps its params and takes only the steps
that it lacks, so a stage that repeats steps after a crash records each of them once.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.machine import Machine, commit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pydantic import BaseModel

PARAMS_A_BATCH, METRICS_A_BATCH, TAG_LENGTH = (
    100,
    1000,
    5000,
)  # the store's limits (tags: below the older 5000)
SECONDS_A_FLUSH, SECONDS_A_RETRY = 10.0, 60.0
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
    stage: str, instance: str | None, params: BaseModel | None, machine: Machine, run_id: str | None = None
) -> Tracker:
    """The tracker of a stage's run: a new run, or `run_id` continued if the store has it."""
    if machine.tracking_uri is None or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    tracker = MlflowTracker(machine)
    tracker.begin(stage, instance, params, run_id)
    return tracker


class MlflowTracker:
    """One MLflow run; made by `start`."""

    def __init__(self, machine: Machine) -> None:
        self.run_id: str | None = None
        self._machine = machine
        self._client: MlflowClient | None = None
        self._buffer: list[Any] = []  # mlflow.entities.Metric
        self._known: dict[str, int] = {}  # metric -> its last step in the store, when the run was resumed
        self._monitor: Any = None
        self._flushed = time.monotonic()
        self._retry_at = 0.0
        self._warned = False

    def begin(self, stage: str, instance: str | None, params: BaseModel | None, run_id: str | None) -> None:
        """Create or reopen the run."""
        with self._guard():
            self._client, experiment = open_store(self._machine)
            if run_id is None or not self._reopen(run_id):
                name = f"{stage}/{instance}" if instance else stage
                run = self._client.create_run(experiment, run_name=name, tags=_tags(stage, instance, self._machine))
                self.run_id = run.info.run_id
                if params is not None:
                    self._log_params(params.model_dump(mode="json"))
            self._monitor = self._start_monitor(resumed=self.run_id == run_id)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, unless the store has that step already."""
        if self.run_id is None:
            return
        with self._guard():
            from mlflow.entities import Metric

            now = time.time_ns() // 1_000_000
            self._buffer += [
                Metric(name, float(value), now, step)
                for name, value in values.items()
                if step > self._known.get(name, -1)
            ]
        full = len(self._buffer) >= METRICS_A_BATCH
        if full or time.monotonic() - self._flushed > SECONDS_A_FLUSH:
            self.flush()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file."""
        with self._guard():
            client, run_id = self._open()
            client.log_artifact(run_id, str(path), folder)

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Name the data the run reads."""
        with self._guard():
            from mlflow.entities import Dataset, DatasetInput, InputTag

            client, run_id = self._open()
            # MLflow's digests are short names, at most 36 characters
            data = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
            client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        with self._guard():
            client, run_id = self._open()
            client.set_tag(run_id, name, value[:TAG_LENGTH])

    def flush(self) -> None:
        """Send what is buffered. While the store is away it is kept, and tried again a minute later."""
        self._flushed = time.monotonic()
        with self._guard():
            client, run_id = self._open()
            while self._buffer:
                client.log_batch(run_id, metrics=self._buffer[:METRICS_A_BATCH])
                del self._buffer[:METRICS_A_BATCH]
        del self._buffer[:-BUFFER]

    def __enter__(self) -> MlflowTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard():
            if self._monitor is not None:
                self._monitor.finish()
        self._retry_at = 0.0  # the last chance
        self.flush()
        with self._guard():
            client, run_id = self._open()
            if error is not None:
                client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:TAG_LENGTH])
            client.set_terminated(run_id, _status(error))

    def _open(self) -> tuple[MlflowClient, str]:
        if self._client is None or self.run_id is None or time.monotonic() < self._retry_at:
            raise _Away
        return self._client, self.run_id

    def _reopen(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        assert self._client is not None
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

        client, run_id = self._open()
        flat = [Param(name, str(value)) for name, value in flatten(params).items()]
        for i in range(0, len(flat), PARAMS_A_BATCH):
            client.log_batch(run_id, params=flat[i : i + PARAMS_A_BATCH])
        client.log_dict(run_id, params, "params.json")

    def _start_monitor(self, resumed: bool) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=resumed, tracking_uri=self._machine.tracking_uri)
        monitor.start()
        return monitor

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except _Away:
            pass
        except Exception as error:
            self._retry_at = time.monotonic() + SECONDS_A_RETRY
            if not self._warned:
                self._warned = True
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"tracking failed, the stage goes on without it: {text}", RuntimeWarning, stacklevel=4)


class _Away(Exception):
    """There is no run to write to, at the moment or at all; that has been said already."""


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


def serve(machine: Machine, port: int) -> int:
    """Show the store's runs in the browser view until interrupted; returns the server's exit code."""
    import subprocess
    import sys

    _, experiment = open_store(machine)
    uri = machine.tracking_uri or ""
    print(
        f"MLflow: http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning",
        flush=True,
    )
    print("ready in some seconds; Ctrl-C ends it", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    return subprocess.run([*command, "--backend-store-uri", uri]).returncode


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


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _quieten() -> None:
    """A store that is away must fail in seconds, not after minutes of retries; and nobody is called home."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
