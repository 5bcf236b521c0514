"""What belongs to the machine and not to the experiment: device, workers, data roots, tracking server.

None of it is a param: the same params on another machine are the same experiment. It comes from the
command line or the environment, and is recorded beside every metric by `Machine.describe`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETS = ("cifar10", "imagenet", "cityscapes")
PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pandas")


class MachineError(ValueError):
    """A wrong option or environment variable; the message names it and the cure."""


@dataclass(frozen=True)
class Machine:
    """Where a stage runs.

    Attributes:
        root: The repository: `data/`, `work/` and the MLflow store live below it. Results and drawn data do not:
            they are relative to the working directory, which DVC moves for a queued experiment.
        device: A torch device, checked to exist: cpu, cuda, cuda:0, mps.
        workers: Loader processes; 0 loads in the training process.
        threads: torch's CPU threads; None leaves torch's own choice.
        tracking_uri: The MLflow store; None switches tracking off.
        experiment: The MLflow experiment that runs join: MLFLOW_EXPERIMENT_NAME, or one for each scale of params.
        data_roots: The sets whose data lie elsewhere, by MDEQ_DATA_<SET>.
    """

    root: Path
    device: str = "cpu"
    workers: int = 0
    threads: int | None = None
    tracking_uri: str | None = None
    experiment: str = "mdeq"
    data_roots: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def from_environment(
        cls,
        device: str | None = None,
        workers: int | None = None,
        environ: Mapping[str, str] = os.environ,
        scale: str | None = None,
    ) -> Machine:
        """The machine as options (which win) and environment say; `device="cpu"` spares torch's import.

        Raises:
            MachineError: A device is not there, a number is none, or a data root does not exist.
        """
        root = Path(environ.get("DVC_ROOT") or Path.cwd()).resolve()
        threads = _number(environ, "MDEQ_THREADS", least=1)
        if workers is None:
            workers = _number(environ, "MDEQ_WORKERS", least=0) or 0
        return cls(
            root=root,
            device=_device(device or environ.get("MDEQ_DEVICE") or "auto", environ.get("LOCAL_RANK")),
            workers=workers,
            threads=threads,
            tracking_uri=_tracking_uri(root, environ),
            experiment=environ.get("MLFLOW_EXPERIMENT_NAME") or (f"mdeq-{scale}" if scale else "mdeq"),
            data_roots=_data_roots(environ),
        )

    def describe(self) -> dict[str, str | int]:
        """Flat facts to record beside a metric: device, cores, versions, commit."""
        facts: dict[str, str | int] = {
            "device": _device_name(self.device),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "cores": os.cpu_count() or 1,
            "platform": platform.platform(terse=True),
            "python": platform.python_version(),
            "commit": commit(self.root),
        }
        return facts | versions()

    def fingerprint(self) -> dict[str, str | int]:
        """What decides how fast this machine trains; `benchmark` depends on it. Needs no torch."""
        return {
            "cpu": _cpu_name(),
            "cores": os.cpu_count() or 1,
            "gpus": ", ".join(_gpu_names()) or "none",
            "torch": versions()["torch"],
        }


def write_fingerprint(machine: Machine, path: Path) -> None:
    """Write `machine.fingerprint()` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(machine.fingerprint(), indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions of what results depend on, read without importing them."""
    found: dict[str, str] = dict.fromkeys(PACKAGES, "none")
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit(root: Path) -> str:
    """The checkout's git commit, with `+` when files differ from it; "none" without git."""
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *words.split()], capture_output=True, text=True, check=True).stdout
            for words in ("rev-parse HEAD", "status --porcelain -uno")
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head.strip() + "+" * bool(changed.strip())


def _number(environ: Mapping[str, str], name: str, least: int) -> int | None:
    text = environ.get(name)
    if text and (not text.isdecimal() or int(text) < least):
        raise MachineError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text) if text else None


def _device(name: str, process: str | None) -> str:
    """`name`, checked; where torchrun started several processes, `cuda` is the GPU of this one's number."""
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and process is not None:
        name = f"cuda:{process}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MachineError(f"device {name!r}: must be auto, cpu, cuda, cuda:<number> or mps") from None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise MachineError(f"device {name!r}: torch sees {found} CUDA devices here; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MachineError(f"device {name!r}: torch sees no Apple GPU here; use --device cpu")
    return name


def _tracking_uri(root: Path, environ: Mapping[str, str]) -> str | None:
    if environ.get("MDEQ_TRACKING", "on").lower() == "off":
        return None
    return environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def _data_roots(environ: Mapping[str, str]) -> dict[str, Path]:
    roots = {}
    for name in SETS:
        variable = f"MDEQ_DATA_{name.upper()}"
        if text := environ.get(variable):
            roots[name] = Path(text).expanduser()
            if not roots[name].is_dir():
                raise MachineError(f"{variable}={text}: no such directory")
    return roots


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return _cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def _cpu_name() -> str:
    names = _values(Path("/proc/cpuinfo"), "model name")
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [name for file in files for name in _values(file, "Model:")]


def _values(path: Path, key: str) -> list[str]:
    """What stands behind the colon in the lines of a file of /proc that begin with `key`; nothing without the file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
