"""What belongs to the machine and not to the experiment: device, workers, data roots, MLflow store.

It comes from the command line or the environment, and `Machine.describe` is recorded beside every
metric. Torch is imported where a device is looked for: stages that need none start at once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.errors import UserError
from pipeline.sets import SETS

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pandas")
SECRET = re.compile("PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|API_KEY|ACCESS_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where a stage runs."""

    root: Path  # the repository, with data/, work/ and the MLflow store; results lie in the cwd
    device: str = "cpu"  # a torch device that exists: cpu, cuda, cuda:0, mps
    workers: int = 0  # loader processes; 0 loads in the training process
    threads: int | None = None  # torch's CPU threads; None for torch's own choice
    tracking_uri: str | None = None  # the MLflow store; None records nothing there
    experiment: str = "mdeq"  # the MLflow experiment of the runs
    data_roots: dict[str, Path] = field(default_factory=dict)  # of sets that lie elsewhere

    @classmethod
    def from_environment(
        cls, device: str | None = None, workers: int | None = None, scale: str | None = None
    ) -> Machine:
        """The machine by options, which win, and environment; device "cpu" imports no torch.

        Raises:
            UserError: A value is invalid, or what it names does not exist.
        """
        root = Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
        experiment = f"mdeq-{scale}" if scale else "mdeq"
        return cls(
            root=root,
            device=_device(device),
            workers=_number("MDEQ_WORKERS", least=0) or 0 if workers is None else workers,
            threads=_number("MDEQ_THREADS", least=1),
            tracking_uri=_tracking_uri(root),
            experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment,
            data_roots={name: root for name in SETS if (root := _data_root(name))},
        )

    def use_threads(self) -> None:
        """Gives torch this machine's number of CPU threads."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

    def describe(self) -> dict[str, str | int]:
        """Flat facts to record beside a metric: device, cores, versions, commit."""
        return {
            "device": _device_name(self.device),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "cores": os.cpu_count() or 1,
            "platform": platform.platform(terse=True),
            "python": platform.python_version(),
            "commit": commit(self.root),
            **versions(),
        }


def fingerprint() -> dict[str, str | int]:
    """What decides how fast this machine trains; the benchmark depends on it."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [name for file in gpus for name in _values(file, "Model:")]
    return {
        "cpu": _device_name("cpu"),
        "cores": os.cpu_count() or 1,
        "gpus": ", ".join(names) or "none",
        "torch": versions()["torch"],
    }


def versions() -> dict[str, str]:
    """The versions of packages that results depend on, read without importing them."""
    found: dict[str, str] = dict.fromkeys(PACKAGES, "none")
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def commit(root: Path) -> str:
    """The commit, with `+` where files differ from it; "unknown", and why, where there is none."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except OSError as error:
        return f"unknown: {error}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip().partition(chr(10))[0]}"


def masked(text: str) -> str:
    """The text without the secrets of the environment, and of any address in it."""
    secrets = [value for name, value in os.environ.items() if SECRET.search(name)]
    forms = {form for each in secrets for form in (each, quote(each, safe=""), repr(each)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) > 2:
            text = text.replace(form, "***")
    text = re.sub(r"(\w://)[^\s/'\"][^\s'\"]*@", r"\1***@", text)
    names = "token|password|passwd|secret|key|signature|sig"
    return re.sub(rf"(?i)([?&][\w-]*(?:{names})=)[^&\s'\"]+", r"\1***", text)


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def _device(option: str | None) -> str:
    """The device asked for, checked; `cuda` under torchrun is the GPU of this process' number."""
    name = option or os.environ.get("MDEQ_DEVICE") or "auto"
    source = f"--device {name}" if option else f"MDEQ_DEVICE={name}"
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"{source}: must be auto, cpu, cuda, cuda:<number> or mps")
    if name == "cpu":
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not count:
        return "cpu"
    if name == "mps":
        number, count = 0, int(torch.backends.mps.is_available())
    else:
        rank = os.environ.get("LOCAL_RANK")
        name = name if ":" in name else f"cuda:{rank}" if rank else "cuda"
        number = int(name.partition(":")[2] or 0)
    if number >= count:
        raise UserError(f"{source}: torch sees {count} such devices here; use cpu")
    return name


def _tracking_uri(root: Path) -> str | None:
    """The store's address; relative paths are relative to the repository."""
    if os.environ.get("MDEQ_TRACKING", "on").lower() == "off":
        return None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if re.match("sqlite:///[^/]", uri):
        return f"sqlite:///{quote(str(root / unquote(uri.removeprefix('sqlite:///'))))}"
    return uri if "://" in uri or uri.startswith("databricks") else (root / uri).as_uri()


def _data_root(dataset: str) -> Path | None:
    variable = f"MDEQ_DATA_{dataset.upper()}"
    text = os.environ.get(variable)
    if not text:
        return None
    root = Path(os.path.expanduser(text))
    if not os.path.isdir(root):
        raise UserError(f"{variable}={text}: no such directory")
    return root


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    names = _values(Path("/proc/cpuinfo"), "model name")
    return names[0] if names else platform.processor() or platform.machine()


def _values(path: Path, key: str) -> list[str]:
    """What follows the colon in the lines of a file in /proc that begin with `key`."""
    with contextlib.suppress(OSError):
        lines = path.read_text().splitlines()
        return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
    return []
