"""The command line: fast help, a line for what a user can fix, exit codes for scripts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils.data import DataLoader
from typer.main import get_command
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import Stopped, UserError
from pipeline.recipe import Debug
from pipeline.sets import BY_STAGE

ROOT = Path(__file__).parents[1]
STAGES = "prepare classify pretrain finetune evaluate convergence benchmark machine report".split()
WHOLE_COMMANDS = [
    "classify mdeq-small",
    "pretrain mdeq-small --dry-run",
    "finetune mdeq-small",
    "evaluate cityscapes mdeq-small",
    "convergence imagenet",
    "benchmark",
]
HEAVY = {"torch", "numpy", "pandas", "mlflow", "dvc", "matplotlib", "cv2", "ruamel"}


def python(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    settings = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, **settings)


def invoke(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def commands() -> dict[str, Any]:
    return get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def fake_stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for pipeline.stages.classify; a test gives it its `run`."""
    module = ModuleType("pipeline.stages.classify")
    monkeypatch.setitem(sys.modules, "pipeline.stages.classify", module)
    return module


# help


def test_help_is_instant_and_names_every_stage(tmp_path: Path) -> None:
    """By what it costs: not one heavy package is imported, for no command's help."""
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.cli import app\n"
        f"words = [[], *([name] for name in {list(commands())})]\n"
        "shown = [CliRunner().invoke(app, [*each, '--help']) for each in words]\n"
        "failed = [r.exit_code for r in shown if r.exit_code]\n"
        f"print(shown[0].stdout, failed, sorted({HEAVY} & set(sys.modules)))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.endswith(" [] []\n"), done.stdout + done.stderr
    assert all(f" {stage} " in done.stdout for stage in STAGES)
    for word in ("MDEQ_DATA_CIFAR10", "MLFLOW_TRACKING_URI", "130 interrupted", "143 terminated"):
        assert word in done.stdout


def test_every_command_shows_an_example_and_every_option_explains_itself() -> None:
    for name, command in commands().items():
        assert all(option.help for option in command.params), name
        required = any(option.required for option in command.params)
        assert not required or f"python -m pipeline {name} " in command.help, name


# what a user can fix


@pytest.mark.parametrize("command", WHOLE_COMMANDS)
def test_wrong_params_stop_every_command_before_any_work(workspace: Path, command: str) -> None:
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("epochs: ", "epoch: ", 1))
    before = sorted(workspace.rglob("*"))
    result = invoke(command)
    assert result.exit_code == 2, result.output
    where = "params.yaml: classify.mdeq-small"
    first, second = sorted(result.stderr.splitlines())
    assert first.startswith(f"{where}.epoch: unknown key; did you mean epochs?")
    assert second == f"{where}.epochs: is missing"
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify mdeq-huge", "classify.mdeq-huge: is missing; there are: mdeq-small, resnet18-"),
        ("classify mdeq-small --params none.yaml", "none.yaml: cannot be read"),
        ("prepare cifar10 --params none.yaml", "none.yaml: cannot be read"),
        ("classify mdeq-small --params params", "is a directory"),
        ("classify mdeq-small --device tpu9", "--device tpu9: must be auto, cpu, cuda"),
        ("classify mdeq-small --set lr=1", "--set lr=1: classify.mdeq-small.lr: unknown key"),
        ("benchmark --set rounds=0", "with --set rounds=0: benchmark.rounds: must be greater "),
        ("prepare mnist", "mnist"),
        ("classify", "Missing argument"),
        ("classify mdeq-small --limit-batches 0", "--limit-batches"),
        ("predict none.png --model none", "none: no such model"),
        ("show", "results/report/results.json: no such file; run"),
        ("MDEQ_WORKERS=two classify mdeq-small", "MDEQ_WORKERS=two: must be a whole number"),
        ("MDEQ_DEVICE=hpu classify mdeq-small", "MDEQ_DEVICE=hpu: must be auto, cpu, cuda"),
        ("MDEQ_LAUNCH='x classify mdeq-small", "MDEQ_LAUNCH='x: No closing quotation; name a"),
        ("MDEQ_LAUNCH=no/such classify mdeq-small", "MDEQ_LAUNCH=no/such: [Errno 2] No such file"),
        ("MDEQ_TRACKING=off sync", "MDEQ_TRACKING=off: there is no store of runs; unset it"),
        ("MDEQ_TRACKING=off ui", "MDEQ_TRACKING=off: there is no store of runs; unset it"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    first, _, rest = command.partition(" ")
    if "=" in first:
        monkeypatch.setenv(*first.split("="))
        command = rest
    result = invoke(command)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_stage_gets_its_own_section_the_machine_and_the_debugging_options(
    workspace: Path, fake_stage: ModuleType
) -> None:
    calls = []
    fake_stage.run = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    line = "classify mdeq-small --device cpu --workers 3 --params params/paper.yaml"
    assert invoke(line).exit_code == 0
    assert invoke(f"{line} --set epochs=7 --overfit-batch --profile").exit_code == 0
    (model, section, machine, debug), (_, changed, _, aids) = calls
    assert model == "mdeq-small" and section.epochs == 50 and debug is None
    assert (machine.device, machine.workers, machine.root) == ("cpu", 3, workspace)
    assert machine.experiment == "mdeq-paper"
    assert changed.epochs == 7 and aids == Debug(overfit=1, profile=True)


def fail(error: BaseException, *_: object) -> None:
    raise error


class Broken:
    """A data set whose one sample cannot be read."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        self.action()


def read(action: Any, *_: object) -> None:
    list(DataLoader(Broken(action), batch_size=None, num_workers=1))  # type: ignore[arg-type]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill(*_: object) -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x")


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (partial(fail, UserError("model: damaged; train again")), 2, "model: damaged; train again"),
        (partial(fail, UserError("http://me:hunter2@h: down")), 2, "http://***@h: down"),
        (
            partial(read, partial(fail, UserError("a: Error: is\nb: too"))),
            2,
            "a: Error: is\nb: too",
        ),
        (partial(read, kill), 2, "; lower MDEQ_WORKERS, or give it memory"),
        (partial(read, Path("a" * 300).read_bytes), 2, "File name too long"),
        (fill, 2, "No space left on device; free some space and rerun; what was saved is kept"),
        (partial(fail, PermissionError(errno.EACCES, "denied", "x")), 2, "x: denied; give this us"),
        (partial(fail, NotADirectoryError(errno.ENOTDIR, "no", "a/b")), 2, "a/b: no"),
        (partial(fail, MemoryError()), 2, "MemoryError; lower `batch` and rerun"),
        (partial(fail, RuntimeError("CUDA out of memory. Tried")), 2, "lower `batch` and rerun"),
        (partial(fail, Stopped("12 steps are kept", 143)), 143, "12 steps are kept"),
        (partial(fail, Stopped("12 steps are kept", 130)), 130, "12 steps are kept"),
        (partial(fail, KeyboardInterrupt()), 130, "interrupted; rerun the same command"),
    ],
)
def test_what_is_no_defect_is_said_without_a_traceback(
    workspace: Path, fake_stage: ModuleType, run: Any, code: int, said: str
) -> None:
    fake_stage.run = run  # type: ignore[attr-defined]
    result = invoke("classify mdeq-small --device cpu")
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == said.count("\n") + 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 143),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", 130),
        ("raise KeyError('http://me:hunter2@h')", 1),
        ("raise RuntimeError('operation not permitted')", 1),
    ],
)
def test_signals_and_defects_end_a_real_stage_in_good_order(
    workspace: Path, body: str, code: int
) -> None:
    script = f"""
import os, signal, sys, time, types, pipeline.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
stage = sys.modules["pipeline.stages.classify"] = types.ModuleType("pipeline.stages.classify")
def run(*_):
    try:
        {body}
    finally:
        print("closed")
stage.run = run
sys.argv = ["pipeline", "classify", "mdeq-small", "--device", "cpu"]
pipeline.cli.main()
"""
    done = python("-c", script, cwd=workspace)
    assert (done.returncode, done.stdout) == (code, "closed\n"), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1) and "hunter2" not in done.stderr


@pytest.mark.parametrize("redirection", ["", " 2>/dev/full", " 2>&-"])
def test_an_error_keeps_its_exit_code_where_it_cannot_be_printed(
    workspace: Path, redirection: str
) -> None:
    command = f"exec {sys.executable} -m pipeline classify größe{redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], cwd=workspace, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert redirection or "is missing; there are: mdeq-small" in done.stderr


# small commands


def test_check_and_machine_and_weights(workspace: Path) -> None:
    assert invoke("check").stdout == "params.yaml: valid\n"
    assert invoke("check --params params/paper.yaml").exit_code == 0
    assert invoke("machine").exit_code == 0
    first = (workspace / "results/machine.json").read_text()
    assert invoke("machine").exit_code == 0
    assert (workspace / "results/machine.json").read_text() == first and '"cores"' in first
    assert invoke("weights").exit_code == 0


@pytest.mark.parametrize("stage", BY_STAGE)
def test_a_dry_run_measures_and_leaves_no_trace(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from pipeline.train import rehearsal

    def rehearse(*arguments: Any) -> list[str]:
        assert arguments[:2] == (stage, "mdeq-small") and arguments[2].epochs == 9
        return ["time: 1 s per update"]

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setenv("MDEQ_LAUNCH", "no-such-launcher")
    before = sorted(workspace.rglob("*"))
    result = invoke(f"{stage} mdeq-small --dry-run --device cpu --set epochs=9")
    assert (result.exit_code, result.stdout) == (0, "time: 1 s per update\n"), result.output
    assert sorted(workspace.rglob("*")) == before
