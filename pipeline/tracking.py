"""A stage's record of itself: an append-only file of JSON lines, which `store` uploads to MLflow.

One object per line, told apart by its first key; times are milliseconds since 1970:

    {"run": id, "stage", "instance", "pipeline", "params", "tags", "time"}      the header
    {"metrics": {name: number}, "step": number, "time"}
    {"tag": name, "value"}
    {"dataset": name, "digest", "source", "context": "training" or "evaluation"}
    {"artifact": name} or {"model": name}      files, relative to the folder of the results
    {"status": "RUNNING", "FINISHED", "FAILED" or "KILLED", "time"}

A last line without its end is what a kill left behind; it is dropped. The file is part of the
stage's results. MLflow only copies it: a thread uploads what is new while the stage runs, and
never stops or slows the stage; what did not arrive, a later stage or `sync` uploads.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import files, progress, store
from pipeline.errors import UserError
from pipeline.machine import Machine, masked

NAME = "run.jsonl"
DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
SECONDS_BETWEEN_UPLOADS = 10.0
SECONDS_AT_START, SECONDS_AT_END, SECONDS_KILLED = 15.0, 60.0, 5.0  # that a stage waits, at most


def start(
    stage: str,
    instance: str | None,
    params: dict[str, Any] | None,
    machine: Machine,
    file: Path,
    *,
    resume: bool = False,
    results: Path | None = None,
) -> Run:
    """Begins the record of a stage's run; use what it returns as a context manager.

    In the helper processes of a distributed stage it records nothing.

    Args:
        stage: As "classify".
        instance: As "mdeq-small"; None where the stage has but one.
        params: The stage's section, JSON-like (`pipeline.params.plain`).
        machine: Where the stage runs, and which MLflow store its run is uploaded to.
        file: The run file. Another run's file at this place is replaced.
        resume: Continue the run that the file holds, if it holds one. The stage then calls
            `Run.cut` with the position that its checkpoint remembers, or with 0 without one.
        results: The folder of the stage's results, if not the file's. Artifacts are named relative
            to it, and a finished run's file is copied into it.

    Raises:
        UserError: The file cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return Run(None, {"run": ""}, file.parent, machine)
    header = None
    if resume:
        with contextlib.suppress(UserError, OSError):
            header = store.read_header(file)
    if header:
        whole = file.read_bytes().rpartition(b"\n")[0] + b"\n"
        files.write(file, whole + _line({"status": "RUNNING", "time": _now()}))
    else:
        header = _new_header(stage, instance, params, machine)
        files.write(file, _line(header))
    return Run(file, header, results or file.parent, machine)


class Run:
    """One run of a stage; made by `start`.

    Attributes:
        id: Names the run: the tag `mark` of its MLflow run has this value.
    """

    def __init__(
        self, path: Path | None, header: dict[str, Any], results: Path, machine: Machine
    ) -> None:
        self.id: str = header["run"]
        self.began: int = header.get("time", 0)
        self._path, self._results = path, results
        self._file = path.open("ab") if path else None
        self._lock = threading.Lock()
        self._background: _Background | None = None
        if self._file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path and machine.tracking_uri is not None:
            self._background = _Background(self, path, results, machine)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Records the finite numbers among `values`; `/` in a name makes a group of charts."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if numbers:
            self._write({"metrics": numbers, "step": int(step), "time": _now()})

    def tag(self, name: str, value: str) -> None:
        """Records a text that describes the run."""
        self._write({"tag": name, "value": value})

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Names the data that the run reads, and what for; the digest is their manifest's."""
        self._write({"dataset": name, "digest": digest, "source": source, "context": context})

    def artifact(self, path: Path) -> None:
        """Names a file of the results' folder as belonging to the run."""
        self._write({"artifact": os.path.relpath(path, self._results)})

    def model(self, path: Path) -> None:
        """Names the trained model, a safetensors file in the results' folder."""
        self._write({"model": os.path.relpath(path, self._results)})

    def position(self) -> int:
        """The bytes of the file, which are on the disk now. A checkpoint remembers the number."""
        if self._file is None:
            return 0
        with self._lock:
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def cut(self, position: int) -> None:
        """Drops what was recorded after `position`, to be recorded again; the header stays."""
        if self._file is None or self._path is None:
            return
        with self._lock:
            with self._path.open("rb") as lines:
                header = len(lines.readline())
            size = os.fstat(self._file.fileno()).st_size
            self._file.truncate(min(max(position, header), size))
        if self._background:
            self._background.upload.forget()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the run as finished, failed or killed."""
        if self._file is None or self._path is None:
            return
        if error is not None:
            self.tag("error", masked(f"{type(error).__name__}: {error}"))
        status = _status(error)
        self._write({"status": status, "time": _now()})
        self.position()
        kept = self._results / NAME
        if status == "FINISHED" and kept.absolute() != self._path.absolute():
            files.write(kept, self._path.read_bytes())
        if self._background:
            self._background.end(SECONDS_KILLED if status == "KILLED" else SECONDS_AT_END)
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # which a loader process may have inherited
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._lock:
            try:
                self._file.write(_line(row))
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error.strerror}); make room and rerun"
                ) from error


class _Background:
    """A thread that uploads a run beside its stage, records the load, and uploads other runs."""

    def __init__(self, run: Run, file: Path, results: Path, machine: Machine) -> None:
        self.upload = store.Upload(file, machine, results)
        self._run, self._machine = run, machine
        self._sensors: list[Any] = []
        self._tried, self._ending = threading.Event(), threading.Event()
        self._warned = False
        store.prepare()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._tried.wait(SECONDS_AT_START)

    def end(self, seconds: float) -> None:
        """Waits until the rest has arrived, at most so long."""
        self._ending.set()
        self._thread.join(seconds)
        if not self.upload.complete:
            self._warn(f"MLflow lacks a part of the run; {store.LATER}")

    def _work(self) -> None:
        others = sync(self._machine)
        ending = False
        while not ending:
            ending = self._ending.is_set()
            try:
                self.upload.once()
            except UserError as error:
                self._warn(str(error))
            self._tried.set()
            if not ending:
                with contextlib.suppress(UserError):
                    next(others, None)  # one per round, for this run comes first
            if not self._ending.wait(SECONDS_BETWEEN_UPLOADS):
                self._record_load()

    def _record_load(self) -> None:
        load: dict[str, float] = {}
        with contextlib.suppress(Exception):  # a failing sensor, or the stage has just ended
            self._sensors = self._sensors or store.load_sensors()
            for sensor in self._sensors:
                sensor.collect_metrics()
                load |= sensor.aggregate_metrics()
                sensor.clear_metrics()
            seconds = (_now() - self._run.began) // 1000
            self._run.metrics({f"system/{name}": value for name, value in load.items()}, seconds)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            progress.say(f"tracking: {what}; the stage continues")


def sync(machine: Machine) -> Iterator[tuple[Path, str]]:
    """Uploads every run of this checkout that the store lacks; one that was killed is closed.

    Yields:
        Each run's file and what was done.

    Raises:
        UserError: The store cannot be reached or used, or files are damaged; the others are
            uploaded first.
    """
    with store.connected(machine):  # one error, not one for each file
        pass
    ended = sorted(Path("results").rglob(NAME))
    interrupted = sorted((machine.root / "work").glob(f"[!d]*/*/{NAME}"))  # not debug-*
    problems = []
    for file in ended + interrupted:
        try:
            if not store.running(file) and store.Upload(file, machine).once():
                yield file, "uploaded"
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _new_header(
    stage: str, instance: str | None, params: dict[str, Any] | None, machine: Machine
) -> dict[str, Any]:
    facts = machine.describe()
    tags = {name: value for name, value in os.environ.items() if name in DVC_VARIABLES}
    pipeline = None
    if "DVC_STAGE" in tags:
        pipeline = tags.get("DVC_EXP_NAME") or f"workspace {facts['commit']:.12}"
    tags |= {f"machine.{name}": str(value) for name, value in facts.items()}
    tags |= {"stage": stage, "instance": instance or ""}
    tags |= {"mlflow.source.name": "pipeline", "mlflow.source.git.commit": str(facts["commit"])}
    return {
        "run": uuid.uuid4().hex,
        "stage": stage,
        "instance": instance,
        "pipeline": pipeline,
        "params": params,
        "tags": tags,
        "time": _now(),
    }


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n"


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _now() -> int:
    return time.time_ns() // 1_000_000
