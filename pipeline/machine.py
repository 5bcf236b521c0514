"""What belongs to the machine and not to the experiment: device, workers, data roots, MLflow store.

None of it is a param: the same params on another machine are the same experiment. It comes from the
command line or the environment, and `Machine.describe` is recorded beside every metric. Torch is
imported where a device is looked for: stages that need none start at once.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pipeline.errors import UserError
from pipeline.sets import SETS

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pandas")
SECRET = re.compile("PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|API_KEY|ACCESS_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where a stage runs.

    Attributes:
        root: The repository, with `data/`, `work/` and the MLflow store. Results and generated data
            are relative to the working directory, which DVC moves for a queued experiment.
        device: A torch device that exists: cpu, cuda, cuda:0, mps.
        workers: Loader processes; 0 loads in the training process.
        threads: Torch's CPU threads; None for torch's own choice.
        tracking_uri: The MLflow store; None records nothing there.
        experiment: The MLflow experiment of the runs.
        data_roots: The data sets that lie elsewhere, by MDEQ_DATA_<SET>.
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
        scale: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Machine:
        """The machine by options, which win, and environment; device "cpu" imports no torch.

        Raises:
            UserError: A value is invalid, or what it names does not exist.
        """
        root = Path(environ.get("DVC_ROOT") or Path.cwd()).resolve()
        _check_processes(environ)
        if workers is None:
            workers = _number(environ, "MDEQ_WORKERS", least=0) or 0
        return cls(
            root=root,
            device=_device(device, environ),
            workers=workers,
            threads=_number(environ, "MDEQ_THREADS", least=1),
            tracking_uri=_tracking_uri(root, environ),
            experiment=environ.get("MLFLOW_EXPERIMENT_NAME")
            or (f"mdeq-{scale}" if scale else "mdeq"),
            data_roots=_data_roots(environ),
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
        "cpu": _cpu_name(),
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
    """The checkout's git commit, with `+` where files differ from it; "none" without git.

    Git refuses a checkout that another user owns; that is said, and how to allow it.
    """
    words = (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    answers = []
    for command in words:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True
            )
        except OSError:
            return "none"
        if "dubious ownership" in done.stderr:
            allow = f"git config --global --add safe.directory {shlex.quote(str(root))}"
            return f"unknown: git refuses another user's checkout; allow it with `{allow}`"
        if done.returncode:
            return "none"
        answers.append(done.stdout.strip())
    return answers[0] + "+" * bool(answers[1])


def launcher(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The words of MDEQ_LAUNCH; none where it is not set, or this process was launched by it.

    Raises:
        UserError: They cannot be told apart.
    """
    text = environ.get("MDEQ_LAUNCH", "")
    if "RANK" in environ:
        return []
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"MDEQ_LAUNCH={text}: {error}; for example torchrun --nproc-per-node 2"
        ) from None


def name_user() -> None:
    """Gives a user without a name or home, as in `docker run --user`, what libraries look for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = tempfile.gettempdir()


def masked(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without the secrets of the environment, and without those of any address in it."""
    secrets: set[str] = set()
    for name, value in environ.items():
        if SECRET.search(name):
            secrets |= {value, *value.split()}
        elif "://" in value:
            secrets |= _secrets_of(value)
    forms = {form for s in secrets for form in (s, unquote(s), quote(s, safe=""), repr(s)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) > 2:
            text = text.replace(form, "***")
    text = re.sub(r"(\w://)[^\s/'\"][^\s'\"]*@", r"\1***@", text)
    names = "token|password|passwd|secret|key|signature|sig"
    return re.sub(rf"(?i)([?&][\w-]*(?:{names})=)[^&\s'\"]+", r"\1***", text)


def _secrets_of(address: str) -> set[str]:
    """Password and query values of an address; the password may have any characters."""
    rest = address.partition("://")[2]
    if rest.startswith("/"):
        return set()  # of a file
    user, colon, password = rest.rpartition("@")[0].partition(":")
    query = parse_qsl("".join(rest.partition("?")[1:]).removeprefix("?"))
    return {password if colon else user, *(value for name, value in query if SECRET.search(name))}


def _number(environ: Mapping[str, str], name: str, least: int) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def _check_processes(environ: Mapping[str, str]) -> None:
    """Checks that torchrun's variables agree with each other."""
    size = _number(environ, "WORLD_SIZE", least=1) or 1
    local_size = _number(environ, "LOCAL_WORLD_SIZE", least=1) or size
    for name, processes in (("RANK", size), ("LOCAL_RANK", local_size)):
        rank = _number(environ, name, least=0) or 0
        if rank >= processes:
            raise UserError(
                f"{name}={rank}: must be less than the {processes} processes; use torchrun"
            )
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"WORLD_SIZE={size}: needs {', '.join(missing)}, too; use torchrun")


def _device(option: str | None, environ: Mapping[str, str]) -> str:
    """The device asked for, checked; `cuda` under torchrun is the GPU of this process' number."""
    name = option or environ.get("MDEQ_DEVICE") or "auto"
    said = f"--device {name}" if option else f"MDEQ_DEVICE={name}"
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"{said}: must be auto, cpu, cuda, cuda:<number> or mps")
    if name == "cpu":
        return name
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not found:
        return "cpu"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"{said}: torch sees no Apple GPU here; use cpu")
        return name
    if name in ("auto", "cuda"):
        name = f"cuda:{environ['LOCAL_RANK']}" if environ.get("LOCAL_RANK") else "cuda"
    if int(name.partition(":")[2] or 0) >= found:
        raise UserError(f"{said}: torch sees {found} CUDA devices here, not {name}; use cpu")
    return name


def _tracking_uri(root: Path, environ: Mapping[str, str]) -> str | None:
    """The store's address; relative paths are relative to the repository."""
    if environ.get("MDEQ_TRACKING", "on").lower() == "off":
        return None
    uri = environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, colon, rest = uri.partition(":")
    if scheme in ("sqlite", "file") and colon and rest[:4] != "////":
        path = unquote(rest.partition("?")[0].removeprefix("///" if scheme == "sqlite" else "//"))
        where = quote(str(root / path))
        return f"sqlite:///{where}" if scheme == "sqlite" else f"file://{where}"
    if "://" not in uri and not uri.startswith("databricks"):
        return (root / uri).as_uri()
    with contextlib.suppress(ValueError):
        parts = urlsplit(uri)
        if (
            "\n" not in uri
            and (parts.hostname or not uri.startswith("http"))
            and (parts.port or True)
        ):
            return uri
    raise UserError(
        "MLFLOW_TRACKING_URI: is not an address; write special characters of its password in "
        "percent-encoding, as %2F for /"
    )


def _data_roots(environ: Mapping[str, str]) -> dict[str, Path]:
    roots = {}
    for name in SETS:
        variable = f"MDEQ_DATA_{name.upper()}"
        text = environ.get(variable)
        if not text:
            continue
        try:
            roots[name] = Path(text).expanduser()
            found = roots[name].is_dir()
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{variable}={text}: {error}") from None
        if not found:
            raise UserError(f"{variable}={text}: no such directory")
    return roots


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return _cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def _cpu_name() -> str:
    names = _values(Path("/proc/cpuinfo"), "model name")
    return names[0] if names else platform.processor() or platform.machine()


def _values(path: Path, key: str) -> list[str]:
    """What follows the colon in the lines of a file in /proc that begin with `key`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
