"""A stage's record of itself: an append-only file of JSON lines, which `pipeline.store` uploads to MLflow.

One object per line, told apart by its first key:

    {"run": id, "stage": ..., "instance": ..., "pipeline": ..., "params": ..., "tags": ..., "time": ms}   the header
    {"metrics": {name: number}, "step": number, "time": ms}
    {"tag": name, "value": text}
    {"dataset": name, "digest": ..., "source": ..., "context": "training" or "evaluation"}
    {"artifact": name} and {"model": name}      files, relative to the folder of the results
    {"status": "RUNNING", "FINISHED", "FAILED" or "KILLED", "time": ms}

A last line without its end is what a kill left behind; it is dropped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import UserError
from pipeline.machine import Machine

NAME = "run.jsonl"


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
        file: The run file. Another run's file at this place is replaced (never written through a link), unless
            `resume` is set.
        resume: Continue the run that the file holds, if it holds one. A resumable stage then calls `Run.cut` with the
            position that its checkpoint remembers, or with 0 if it has no checkpoint.
        results: The folder of the stage's results if the file lies elsewhere while the stage runs. Artifacts are named
            relative to it, and the file of a finished run is copied into it.

    In the helper processes of a distributed stage the returned run records nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        return Run(None, "", file.parent)
    previous = _whole_lines(file) if resume else b""
    header = _header(previous)
    run_id = header["run"] if header else uuid.uuid4().hex
    _open_anew(file, previous if header else b"")
    run = Run(file, run_id, results or file.parent)
    if header:
        run.write({"status": "RUNNING", "time": _now()})
    else:
        run.write(
            {"run": run_id, "stage": stage, "instance": instance, "params": params, "time": _now()}
        )
    return run


class Run:
    """One run of a stage; made by `start`.

    Attributes:
        id: Names the run: the tag `mark` of its MLflow run has this value.
    """

    def __init__(self, file: Path | None, run_id: str, results: Path) -> None:
        self.id = run_id
        self._path = file
        self._results = results
        self._file = file.open("ab") if file else None
        self._lock = threading.Lock()

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Records the finite numbers among some values at a step; `/` in a name makes a group of charts."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if numbers:
            self.write({"metrics": numbers, "step": step, "time": _now()})

    def tag(self, name: str, value: str) -> None:
        """Records a text that describes the run."""
        self.write({"tag": name, "value": value})

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Names the data that the run reads, and what for; the digest is that of the data's manifest."""
        self.write({"dataset": name, "digest": digest, "source": source, "context": context})

    def artifact(self, path: Path) -> None:
        """Names a file of the results' folder as belonging to the run."""
        self.write({"artifact": os.path.relpath(path, self._results)})

    def model(self, path: Path) -> None:
        """Names the trained model, a safetensors file in the results' folder."""
        self.write({"model": os.path.relpath(path, self._results)})

    def position(self) -> int:
        """The bytes of the run file; they are on the disk when this returns. A checkpoint remembers the number."""
        if self._file is None:
            return 0
        with self._lock:
            os.fsync(self._file.fileno())
            return self._file.tell()

    def cut(self, position: int) -> None:
        """Drops what was recorded after `position`: a resumed stage records it once more. The header stays."""
        if self._file is None or self._path is None:
            return
        with self._lock:
            content = self._path.read_bytes()
            kept = max(position, content.index(b"\n") + 1)
            self._file.truncate(min(kept, len(content)))

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line; nothing after the end of the run."""
        if self._file is None:
            return
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
        with self._lock:
            try:
                self._file.write(line.encode("utf-8", "surrogateescape"))
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error.strerror}); make room and rerun"
                ) from error

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
            self.tag("error", f"{type(error).__name__}: {error}")
        status = (
            "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        )
        self.write({"status": status, "time": _now()})
        self.position()
        kept = self._results / NAME
        if error is None and kept.resolve() != self._path.resolve():
            shutil.copyfile(self._path, kept)
        self._file.close()


def _open_anew(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _whole_lines(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def _header(content: bytes) -> dict[str, Any] | None:
    try:
        header = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return None
    return header if isinstance(header, dict) and "run" in header else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _now() -> int:
    return time.time_ns() // 1_000_000
