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
never stops or slows the stage; what did not arrive, the next stage or `sync` uploads.
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
SECONDS_BETWEEN_UPLOADS = SECONDS_BETWEEN_LOADS = 10.0
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

    Args:
        stage: As "classify".
        instance: As "mdeq-small"; None where the stage has but one.
        params: The stage's section, JSON-like (`pipeline.params.plain`).
        machine: Where the stage runs, and which MLflow store its run is uploaded to.
        file: The run file. Another run's file at this place is replaced (never written through a
            link), unless `resume` is set.
        resume: Continue the run that the file holds, if it holds one. A resumable stage then calls
            `Run.cut` with the position that its checkpoint remembers, or with 0 without one.
        results: The folder of the stage's results if the file lies elsewhere while the stage runs.
            Artifacts are named relative to it, and a finished run's file is copied into it.

    In the helper processes of a distributed stage the returned run records nothing.

    Raises:
        UserError: The file cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return Run(None, {"run": "", "time": _now()}, file.parent)
    content = _whole_lines(file) if resume else b""
    header = _header(file) if content else None
    rows: list[dict[str, Any]] = [{"status": "RUNNING", "time": _now()}]
    if header is None:
        header, content = _new_header(stage, instance, params, machine), b""
        rows = [header]
    files.write(file, content)
    run = Run(file, header, results or file.parent)
    for row in rows:
        run.write(row)
    if machine.tracking_uri is not None:
        run.begin_upload(machine)
    return run


class Run:
    """One run of a stage; made by `start`.

    Attributes:
        id: Names the run: the tag `mark` of its MLflow run has this value.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], results: Path) -> None:
        self.id: str = header["run"]
        self._path, self._results, self._began = path, results, header["time"]
        self._file = path.open("ab") if path else None
        self._lock = threading.Lock()
        self._upload: store.Upload | None = None
        self._note = Path()
        self._thread = threading.Thread()
        self._tried, self._closing = threading.Event(), threading.Event()
        self._warned = False
        if self._file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Records the finite numbers among `values`; `/` in a name makes a group of charts."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if numbers:
            self.write({"metrics": numbers, "step": int(step), "time": _now()})

    def tag(self, name: str, value: str) -> None:
        """Records a text that describes the run."""
        self.write({"tag": name, "value": value})

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Names the data that the run reads, and what for; the digest is their manifest's."""
        self.write({"dataset": name, "digest": digest, "source": source, "context": context})

    def artifact(self, path: Path) -> None:
        """Names a file of the results' folder as belonging to the run."""
        self.write({"artifact": os.path.relpath(path, self._results)})

    def model(self, path: Path) -> None:
        """Names the trained model, a safetensors file in the results' folder."""
        self.write({"model": os.path.relpath(path, self._results)})

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
        if self._upload:
            self._upload.forget()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line.

        Raises:
            UserError: The disk refuses.
        """
        if self._file is None:
            return
        line = json.dumps(row, ensure_ascii=True, default=str) + "\n"
        with self._lock, contextlib.suppress(ValueError):  # closed: the sample of an ended stage
            try:
                self._file.write(line.encode())
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error.strerror}); make room and rerun"
                ) from error

    def begin_upload(self, machine: Machine) -> None:
        """Starts the threads that upload the file and record the machine's load."""
        assert self._path is not None
        self._note = _notes(machine) / self.id
        try:
            with store.explained(machine):
                store.prepare(machine)
                sensors = store.load_sensors()
            self._note_file(self._path)
        except UserError as error:
            self._warn(str(error))
            return
        self._upload = store.Upload(self._path, machine, self._results)
        self._thread = threading.Thread(target=self._keep_uploading, args=(machine,), daemon=True)
        self._thread.start()
        threading.Thread(target=self._record_load, args=(sensors,), daemon=True).start()
        self._tried.wait(SECONDS_AT_START)

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
        self.write({"status": _status(error), "time": _now()})
        self.position()
        kept = self._results / NAME
        if error is None and kept.absolute() != self._path.absolute():
            files.write(kept, self._path.read_bytes())
            if self._upload:
                self._note_file(kept)
        self._closing.set()
        if self._upload:
            self._thread.join(SECONDS_KILLED if _status(error) == "KILLED" else SECONDS_AT_END)
            if not self._upload.complete:
                self._warn(f"MLflow lacks a part of the run; {store.LATER}")
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # which a loader process may have inherited
            self._file.close()

    def _note_file(self, file: Path) -> None:
        paths = [str(file.absolute()), str(self._results.absolute())]
        files.write_json(self._note, dict(zip(("file", "results"), paths, strict=True)))

    def _keep_uploading(self, machine: Machine) -> None:
        assert self._upload is not None
        others, last = True, False
        while not last:
            last = self._closing.is_set()
            try:
                self._upload.once()
                self._tried.set()
                if others:
                    upload_waiting(machine, but=self.id)
                    others = False
            except UserError as error:
                self._warn(str(error))
                self._tried.set()
            self._closing.wait(SECONDS_BETWEEN_UPLOADS)
        if self._upload.complete:
            self._note.unlink(missing_ok=True)

    def _record_load(self, sensors: list[Any]) -> None:
        while not self._closing.wait(SECONDS_BETWEEN_LOADS):
            values: dict[str, float] = {}
            for sensor in sensors:
                sensor.collect_metrics()
                values |= sensor.aggregate_metrics()
                sensor.clear_metrics()
            load = {f"system/{name}": value for name, value in values.items()}
            with contextlib.suppress(UserError):
                self.metrics(load, (_now() - self._began) // 1000)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            progress.say(f"tracking: {what}; the stage continues")


def upload(file: Path, machine: Machine) -> None:
    """Uploads a run file to MLflow; does nothing where the store has it or its user deleted it.

    Raises:
        UserError: The store cannot be reached or used, or the file is damaged.
    """
    store.Upload(file, machine).once()


def sync(machine: Machine) -> Iterator[tuple[Path, str]]:
    """Uploads every run that the store lacks; yields each such file and what was done.

    Raises:
        UserError: The store cannot be reached or used, or files are damaged; the others are
            uploaded first.
    """
    with store.explained(machine):
        store.connect(machine)
    problems = []
    for file in sorted(Path("results").rglob(NAME)):
        try:
            if not store.running(file) and store.Upload(file, machine).once():
                yield file, "uploaded"
        except UserError as error:
            problems.append(str(error))
    for file in upload_waiting(machine):
        yield file, "uploaded"
    if problems:
        raise UserError("\n".join(problems))


def upload_waiting(machine: Machine, but: str = "") -> list[Path]:
    """Uploads the runs whose process is gone before all had arrived, and closes the killed.

    Args:
        machine: Where they ran, and whose store.
        but: The id of a run to leave alone.

    Returns:
        The files of those that the store lacked.
    """
    uploaded = []
    for note in _notes(machine).glob("?" * 32):
        if note.name == but:
            continue
        with contextlib.suppress(OSError, UserError, KeyError):  # the next one tries again
            paths = files.read_json(note, "")
            file = Path(paths["file"])
            header = _header(file)
            if header is None or header["run"] != note.name:
                store.close_killed(machine, note.name)
            elif store.running(file):
                continue
            elif store.Upload(file, machine, Path(paths["results"])).once():
                uploaded.append(file)
            note.unlink(missing_ok=True)
    return uploaded


def _notes(machine: Machine) -> Path:
    """The folder of notes: the files of the runs that this store does not have whole."""
    key = files.digest(str(machine.tracking_uri).encode())
    return machine.root / "work" / "runs" / key[:8]


def _new_header(
    stage: str, instance: str | None, params: dict[str, Any] | None, machine: Machine
) -> dict[str, Any]:
    facts = {name: str(value) for name, value in machine.describe().items()}
    environment = {name: value for name, value in os.environ.items() if name in DVC_VARIABLES}
    pipeline = None
    if "DVC_STAGE" in environment:
        workspace = f"workspace {facts['commit'][:12]}"
        pipeline = environment.get("DVC_EXP_NAME") or workspace
    tags = {f"machine.{name}": value for name, value in facts.items()} | environment
    tags |= {"stage": stage, "instance": instance or ""}
    tags |= {"mlflow.source.name": "pipeline", "mlflow.source.git.commit": facts["commit"]}
    return {
        "run": uuid.uuid4().hex,
        "stage": stage,
        "instance": instance,
        "pipeline": pipeline,
        "params": params,
        "tags": tags,
        "time": _now(),
    }


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def _header(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(UserError):
        return store.read_header(file)
    return None


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _now() -> int:
    return time.time_ns() // 1_000_000
