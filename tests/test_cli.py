"""The command line: fast help, one line for what a user can mend, exit codes that scripts can rely on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from pipeline import params
from pipeline.cli import app
from pipeline.data.manifest import checksum
from pipeline.train_params import ClassifyParams

ROOT = Path(__file__).parents[1]
STAGE_COMMANDS = [
    "prepare cifar10",
    "classify mdeq-small",
    "pretrain mdeq-small",
    "finetune mdeq-small",
    "evaluate cityscapes mdeq-small",
    "convergence imagenet",
    "benchmark",
]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def invoke(line: str) -> Result:
    return CliRunner().invoke(app, line.split())


def commands() -> dict[str, Any]:
    return get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def fake_stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for pipeline.stages.classify; a test gives it its `run`."""
    module = ModuleType("pipeline.stages.classify")
    monkeypatch.setitem(sys.modules, "pipeline.stages.classify", module)
    monkeypatch.setattr("pipeline.stages.classify", module, raising=False)
    return module


def test_help_is_instant_and_names_every_stage(tmp_path: Path) -> None:
    """By what it costs: not one heavy package is imported, for no command's help."""
    heavy = {"torch", "numpy", "pandas", "mlflow", "dvc", "matplotlib", "cv2", "ruamel", "torchvision"}
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.cli import app\n"
        f"shown = [CliRunner().invoke(app, [*c, '--help']) for c in ([], *([name] for name in {list(commands())}))]\n"
        f"print(shown[0].stdout, [r.exit_code for r in shown if r.exit_code], sorted({heavy} & set(sys.modules)))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.endswith(" [] []\n"), done.stdout + done.stderr
    assert all(f" {stage.command.split()[0]} " in done.stdout for stage in params.STAGES.values())
    for word in ("MDEQ_DATA_CIFAR10", "MLFLOW_TRACKING_URI", "130 interrupted", "143 terminated"):
        assert word in done.stdout


def test_every_command_and_option_explains_itself() -> None:
    for name, command in commands().items():
        assert command.help, name
        assert all(option.help for option in command.params), name


@pytest.mark.parametrize(
    ("words", "offered"),
    [("cla", {"classify"}), ("classify ", {"mdeq-small", "resnet18-small"}), ("evaluate imagenet m", {"mdeq-small"})],
)
def test_the_shell_completes_commands_and_models(workspace: Path, words: str, offered: set[str]) -> None:
    asked = {"COMP_WORDS": f"mdeq {words}", "COMP_CWORD": str(words.count(" ") + 1)}
    found = CliRunner().invoke(app, [], prog_name="mdeq", env={"_MDEQ_COMPLETE": "complete_bash", **asked})
    assert set(found.stdout.split()) == offered


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_wrong_params_stop_every_command_before_any_work(workspace: Path, command: str) -> None:
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("epochs: ", "epoch: ", 1))
    before = sorted(workspace.rglob("*"))
    result = invoke(command)
    assert result.exit_code == 2
    where = "params.yaml: classify.mdeq-small"
    assert result.stderr.splitlines()[0] == f"{where}.epochs: is missing"
    assert result.stderr.splitlines()[1].startswith(f"{where}.epoch: unknown key; did you mean epochs?")
    assert "Traceback" not in result.output
    assert sorted(workspace.rglob("*")) == before


def test_no_traceback_in_a_real_process(workspace: Path) -> None:
    (workspace / "params.yaml").write_text("prepare: [")
    done = python("-m", "pipeline", "prepare", "cifar10", cwd=workspace)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "params.yaml: line 1: not YAML" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify mdeq-huge", "classify.mdeq-huge: is not there; there are: mdeq-small, resnet18-small"),
        ("classify mdeq-small --params none.yaml", "none.yaml: no such file"),
        ("classify mdeq-small --device tpu9", "device 'tpu9': must be auto, cpu, cuda"),
        ("prepare mnist", "mnist"),
        ("classify", "Missing argument"),
        ("classify mdeq-small --workers -1", "greater than or equal to 0"),
        ("show", "no report yet"),
    ],
)
def test_wrong_usage_is_exit_code_2(workspace: Path, command: str, message: str) -> None:
    result = invoke(command)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MDEQ_WORKERS", "two", "MDEQ_WORKERS=two: must be a whole number of at least 0"),
        ("MDEQ_THREADS", "0", "MDEQ_THREADS=0: must be a whole number of at least 1"),
        ("MDEQ_DATA_CIFAR10", "/no/where", "MDEQ_DATA_CIFAR10=/no/where: no such directory"),
        ("MDEQ_DEVICE", "cuda:99", "device 'cuda:99': torch sees "),
    ],
)
def test_a_wrong_environment_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    result = invoke("classify mdeq-small")
    assert result.exit_code == 2 and message in result.stderr


def test_a_stage_gets_its_own_section_and_the_machine(workspace: Path, fake_stage: ModuleType) -> None:
    calls = []
    fake_stage.run = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    result = invoke("classify mdeq-small --device cpu --workers 3 --params params/paper.yaml")
    assert result.exit_code == 0, result.output
    ((model, section, machine),) = calls
    assert model == "mdeq-small" and section.epochs == 50
    assert (machine.device, machine.workers, machine.root) == ("cpu", 3, workspace)
    assert machine.tracking_uri == f"sqlite:///{workspace}/mlflow.db"


def test_what_a_user_can_mend_is_one_line(workspace: Path, fake_stage: ModuleType) -> None:
    from pipeline.checkpoints import CheckpointError
    from pipeline.data.manifest import DataError
    from pipeline.training import TrainingError

    for error in (CheckpointError, DataError, TrainingError):

        def run(*_: object, error: type[Exception] = error) -> None:
            raise error("model.pt: damaged; make it again")

        fake_stage.run = run  # type: ignore[attr-defined]
        result = invoke("classify mdeq-small --device cpu")
        assert (result.exit_code, result.stderr) == (2, "model.pt: damaged; make it again\n")


def test_an_error_of_a_loader_process_and_a_full_disk_are_one_line(workspace: Path, fake_stage: ModuleType) -> None:
    from torch.utils.data import DataLoader

    from pipeline.data.manifest import DataError

    class Broken:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            raise DataError("a.png: changed")

    class Killed(Broken):
        def __getitem__(self, index: int) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    def load(dataset: Broken, *_: object) -> None:
        list(DataLoader(dataset, batch_size=None, num_workers=1))  # type: ignore[arg-type]

    def write(*_: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    def exhaust(*_: object) -> None:
        raise MemoryError

    for run, message in (
        (partial(load, Broken()), "a.png: changed\n"),
        (partial(load, Killed()), "; lower MDEQ_WORKERS, or give it memory"),
        (write, "No space left on device; mend that and run again"),
        (exhaust, "the memory does not suffice (out of memory); lower `batch` and run again\n"),
    ):
        fake_stage.run = run  # type: ignore[attr-defined]
        result = invoke("classify mdeq-small --device cpu")
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_defect_keeps_its_traceback(workspace: Path, fake_stage: ModuleType) -> None:
    fake_stage.run = lambda *_: 1 / 0  # type: ignore[attr-defined]
    result = invoke("classify mdeq-small --device cpu")
    assert isinstance(result.exception, ZeroDivisionError) and result.exit_code == 1


def prepared(workspace: Path) -> None:
    """What `prepare cifar10` of the demo leaves, as far as a dry run looks at it."""
    folder = workspace / "results/data/cifar10"
    folder.mkdir(parents=True)
    (workspace / "data/generated/cifar10").mkdir(parents=True)
    (folder / "manifest.csv").write_text("path,split\na,train\n")
    digest = checksum((folder / "manifest.csv").read_bytes())
    images = {"train": 2560, "test": 500}
    (folder / "summary.json").write_text(json.dumps({"manifest": digest, "source": "generated", "images": images}))


def test_a_dry_run_says_what_would_be_trained_and_leaves_no_trace(workspace: Path) -> None:
    prepared(workspace)
    before = sorted(workspace.rglob("*"))
    result = invoke("classify mdeq-small --dry-run --device cpu")
    assert result.exit_code == 0, result.output
    entry = params.load("classify", "mdeq-small")
    assert isinstance(entry, ClassifyParams) and entry.forward and entry.warm_up
    updates, unrolled = entry.epochs * 2560 // entry.batch, entry.warm_up.steps
    assert f"{unrolled} unrolled + {updates - unrolled} implicit updates of {entry.batch} samples" in result.stdout
    assert f"at most {entry.forward.steps + 2} evaluations of f" in result.stdout
    assert "158,890 parameters" in result.stdout and "recorded in mdeq-demo" in result.stdout
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify mdeq-small", "results/data/cifar10/summary.json: cannot be read"),
        ("classify mdeq-small --device cuda:99", "device 'cuda:99': torch sees"),
        ("classify other", "classify.other: is not there"),
        ("classify mdeq-small --params long.yaml", "classify.mdeq-small.warm_up.steps: 999999 must be fewer than"),
    ],
)
def test_a_dry_run_finds_what_would_stop_the_training(workspace: Path, command: str, message: str) -> None:
    if "long.yaml" in command:
        prepared(workspace)
        text = (workspace / "params.yaml").read_text()
        (workspace / "long.yaml").write_text(re.sub(r"(warm_up: .*steps: )\d+", r"\g<1>999999", text))
    result = invoke(f"{command} --dry-run")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_interrupted_is_130_and_says_that_it_goes_on(workspace: Path, fake_stage: ModuleType) -> None:
    def run(*_: object) -> None:
        raise KeyboardInterrupt

    fake_stage.run = run  # type: ignore[attr-defined]
    result = invoke("classify mdeq-small --device cpu")
    assert result.exit_code == 130 and "goes on" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_real_stage_in_good_order(workspace: Path, number: int, code: int) -> None:
    script = (
        "import os, signal, sys, types, pipeline.cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a shell's background
        "stage = types.ModuleType('pipeline.stages.classify')\n"
        "def run(*_):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        import time; time.sleep(30)\n"
        "    finally:\n"
        "        print('closed')\n"
        "stage.run = run\n"
        "import pipeline.stages; pipeline.stages.classify = stage; sys.modules[stage.__name__] = stage\n"
        "sys.argv = ['pipeline', 'classify', 'mdeq-small', '--device', 'cpu']\n"
        "pipeline.cli.main()\n"
    )
    done = python("-c", script, cwd=workspace)
    assert (done.returncode, done.stdout) == (code, "closed\n"), done.stderr


def test_the_machines_fingerprint_is_the_same_twice(workspace: Path) -> None:
    assert invoke("machine").exit_code == 0
    first = (workspace / "results/machine.json").read_text()
    assert invoke("machine").exit_code == 0
    assert (workspace / "results/machine.json").read_text() == first and '"cores"' in first


def test_check_says_all_right(workspace: Path) -> None:
    assert invoke("check").stdout == "params.yaml: all right\n"
    assert invoke("check --params params/paper.yaml").exit_code == 0
