"""The command line: one command per stage, imported when it runs, so that --help is instant."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from pipeline.errors import Stopped, UserError
from pipeline.sets import SetName

EPILOG = """\
Environment: MDEQ_DATA_CIFAR10, MDEQ_DATA_IMAGENET, MDEQ_DATA_CITYSCAPES (where a data set lies),
MDEQ_DEVICE, MDEQ_WORKERS, MDEQ_THREADS (torch's CPU threads), MDEQ_TRACKING=off (no MLflow),
MDEQ_LAUNCH (starts the training stages: `torchrun --nproc-per-node 2`), MLFLOW_TRACKING_URI
(default: mlflow.db here), MLFLOW_EXPERIMENT_NAME (default: `mdeq-` and the scale).

Exit codes: 0 done; 1 a defect, with its traceback; 2 wrong params, data or usage, a line per
error; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM): the same command then resumes.
Under MDEQ_LAUNCH a failure has the launcher's code.
"""
TRAIN = "Train on {}. Interrupted, the same command resumes.\n\nExample: `python -m pipeline {}`"
CURES = {  # what an error says -> what to do
    "No space left|[Qq]uota exceeded": "free some space and rerun; what was saved is kept",
    "Read-only file system": "work in a folder that can be written to",
    "PermissionError": "give this user access to it",
    "DataLoader worker": "lower MDEQ_WORKERS, or give it memory (a container: --shm-size)",
    "out of memory|allocate memory|ALLOC_FAILED|MemoryError": "lower `batch` and rerun",
}


class Commands(TyperGroup):
    """Turns what a user can fix into lines and an exit code; a defect keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stop:
            text, code = stop.message, int(str(stop.code))
        except KeyboardInterrupt:
            text, code = "interrupted; rerun the same command", 130
        except Exception as error:
            text, code = _explained(error), 2
            if text is None:
                raise
        _say(text)
        raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    help="Multiscale deep equilibrium models: the paper as a pipeline. `dvc repro` runs what is "
    "not up to date; each command below is one of its stages, usable alone.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_stage = partial(app.command, rich_help_panel="Stages")
_other = partial(app.command, rich_help_panel="Around them")

PARAMS = Path("params.yaml")
Set = Annotated[SetName, Argument(help="The data set.")]
Model = Annotated[str, Argument(help="Of the stage's section in the params.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:N, mps; else MDEQ_DEVICE, else a GPU.")]
Workers = Annotated[int | None, Option(min=0, help="Loader processes; else MDEQ_WORKERS, else 0.")]
Params = Annotated[Path, Option("--params", help="The params file.", dir_okay=False)]
Changes = Annotated[
    list[str] | None,
    Option("--set", help="Replaces a param in this run: optimizer.lr=3e-4. May be repeated."),
]


def _late(module: str) -> Any:
    """A module of the pipeline, imported when a command needs it."""
    return import_module(f"pipeline.{module}")


@_stage()
def prepare(dataset: Set, workers: Workers = None, path: Params = PARAMS) -> None:
    """Bring a data set into place (drawn, yours or downloaded), check it, write its manifest.

    Example: `MDEQ_DATA_CIFAR10=~/data python -m pipeline prepare cifar10` with `source: folder`.
    """
    settings = _late("settings")
    section = getattr(settings.load(settings.Prepare, path, "prepare"), dataset)
    _late("stages.prepare").run(dataset, section, _machine(path, "cpu", workers))


@_stage("finetune", help=TRAIN.format("Cityscapes (Table 3)", "finetune mdeq-small --dry-run"))
@_stage("pretrain", help=TRAIN.format("ImageNet (Table 2)", "pretrain mdeq-small --device cuda"))
@_stage("classify", help=TRAIN.format("CIFAR-10 (Table 1)", "classify mdeq-small --set epochs=5"))
def train(
    ctx: typer.Context,
    model: Model,
    device: Device = None,
    workers: Workers = None,
    changes: Changes = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only measure a few steps.")] = False,
    limit_batches: Annotated[int | None, Option(min=1, help="Debug: batches per epoch.")] = None,
    overfit: Annotated[bool, Option("--overfit-batch", help="Debug: train on one batch.")] = False,
    profile: Annotated[bool, Option("--profile", help="Debug: write a Chrome trace.")] = False,
    path: Params = PARAMS,
) -> None:
    """Train a model of the stage that the command is named after."""
    stage = str(ctx.info_name)
    section = _late("params").load(stage, model, path, changes or [])
    machine = _machine(path, device, workers)
    if dry_run:
        lines = _late("train.rehearsal").rehearse(stage, model, section, machine)
        typer.echo("\n".join(lines))
        return
    _launch()
    debug = None
    if limit_batches or overfit or profile:
        debug = _late("recipe").Debug(limit_batches, 1 if overfit else None, profile)
    _late(f"stages.{stage}").run(model, section, machine, debug)


@_stage()
def evaluate(
    dataset: Set,
    model: Annotated[str, Argument(help="Of the params, of the zoo, or a file.")],
    device: Device = None,
    workers: Workers = None,
    changes: Changes = None,
    path: Params = PARAMS,
) -> None:
    """Evaluate a model by the official measures, with the solver's statistics and examples.

    Example: `python -m pipeline evaluate cityscapes mdeq-small`
    """
    section = _late("params").load("evaluate", dataset, path, changes or [])
    _late("stages.evaluate").run(dataset, model, section, _machine(path, device, workers))


@_stage()
def convergence(
    dataset: Set, device: Device = None, changes: Changes = None, path: Params = PARAMS
) -> None:
    """Measure how fast solvers find the equilibria of a trained model (Figure 5).

    Example: `python -m pipeline convergence cifar10`
    """
    section = _late("params").load("convergence", dataset, path, changes or [])
    _late("stages.convergence").run(dataset, section, _machine(path, device))


@_stage()
def benchmark(device: Device = None, changes: Changes = None, path: Params = PARAMS) -> None:
    """Measure time and memory of a training step, relative to ResNet-101 (Figure 4b).

    Example: `python -m pipeline benchmark --device cuda`
    """
    section = _late("params").load("benchmark", None, path, changes or [])
    _late("stages.benchmark").run(section, _machine(path, device))


@_stage()
def machine() -> None:
    """Write what decides this machine's speed, which the benchmark depends on."""
    _late("files").write_json(Path("results/machine.json"), _late("machine").fingerprint())


@_stage()
def report() -> None:
    """Make the report from what the other stages wrote: results/report/index.html."""
    _late("stages.report").run(_machine(PARAMS, "cpu"))


@_other()
def show(into: Annotated[Path | None, Option(help="Markdown to write into.")] = None) -> None:
    """Print the results of the last report, and where to look further."""
    _late("stages.report").show(into)


@_other()
def predict(
    sources: Annotated[list[Path], Argument(help="Pictures, folders of pictures, videos.")],
    model: Annotated[str | None, Option(help="Of the zoo, or a file; else for CIFAR-10.")] = None,
    out: Annotated[Path | None, Option(help="For scenes; else predictions/<number>.")] = None,
    form: Annotated[Literal["lines", "json", "csv"], Option("--format", help="Printed.")] = "lines",
    video: Annotated[bool, Option("--video", help="A folder has a video's frames.")] = False,
    steps: Annotated[int | None, Option(min=1, help="Solver's limit; else as trained.")] = None,
    tolerance: Annotated[float | None, Option(min=0, help="Solver's; else as trained.")] = None,
    height: Annotated[int | None, Option(min=1, help="Of scenes; else as evaluated.")] = None,
    device: Device = None,
) -> None:
    """Say what a model sees in pictures, folders and videos; street scenes are also drawn.

    Example: `python -m pipeline predict cat.jpg holiday/ drive.mp4 --format csv`
    """
    chosen = _late("machine").Machine.from_environment(device)
    limits = {"steps": steps, "tolerance": tolerance, "height": height}
    predictor = _late("predict").Predictor(_late("weights").find(model), chosen, **limits)
    _late("predict").run(predictor, sources, out, video=video, form=form)


@_other()
def weights() -> None:
    """List the trained models that come with the project."""
    typer.echo("\n".join(_late("weights").zoo()) or "none")


@_other()
def publish(
    stage: Annotated[Literal["classify", "pretrain", "finetune"], Argument(help="Its stage.")],
    model: Model,
    name: Annotated[str, Argument(help="Its new name.")],
) -> None:
    """Add a trained and evaluated model to the zoo, with its card and log.

    Example: `python -m pipeline publish classify mdeq-small cifar10-mdeq-small`
    """
    typer.echo(_late("zoo").publish(stage, model, name))


@_other()
def import_weights(
    file: Annotated[Path, Argument(help="The authors' checkpoint, or a model.pt of version 0.1.")],
    model: Annotated[str | None, Option(help="The authors' model: <set>-<name>.")] = None,
    out: Annotated[Path | None, Option(help="Where to write; else where its stage would.")] = None,
) -> None:
    """Make a model file of the authors' published weights, or of an old model of this project.

    Example: `python -m pipeline import-weights MDEQ_Small_Cls.pkl --model imagenet-mdeq-small`
    """
    typer.echo(_late("zoo").import_weights(file, model, out))


@_other()
def check(path: Params = PARAMS) -> None:
    """Say what is wrong with the params file.

    Example: `python -m pipeline check --params params/paper.yaml`
    """
    _late("params").check(path)
    typer.echo(f"{path}: valid")


@_other()
def sync(path: Params = PARAMS) -> None:
    """Upload the runs that MLflow lacks: it was away, or DVC restored a stage from its cache."""
    for file, what in _late("tracking").sync(_recording(path)):
        typer.echo(f"{file.parent}: {what}")


@_other()
def ui(
    port: Annotated[int, Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000,
    path: Params = PARAMS,
) -> None:
    """Show the recorded runs in the browser (MLflow), to this machine alone."""
    raise typer.Exit(_late("store").ui(_recording(path), port))


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except Exception:  # a defect
        _say(traceback.format_exc())
        sys.exit(1)


def _machine(path: Path, device: str | None, workers: int | None = None) -> Any:
    settings = _late("settings")
    scale = settings.load(settings.Name, path, "scale")
    return _late("machine").Machine.from_environment(device, workers, scale)


def _recording(path: Path) -> Any:
    """The machine, where runs are recorded."""
    machine = _machine(path, "cpu")
    if machine.tracking_uri is None:
        raise UserError("MDEQ_TRACKING=off: there is no store of runs; unset it")
    return machine


def _launch() -> None:
    """Replaces this process by the launcher of MDEQ_LAUNCH, which runs the command in several."""
    launcher = os.environ.get("MDEQ_LAUNCH")
    if not launcher or "RANK" in os.environ:
        return
    try:
        words = shlex.split(launcher)
        os.execvp(words[0], [*words, "-m", "pipeline", *sys.argv[1:]])
    except (ValueError, OSError) as error:
        way_out = "such as torchrun --nproc-per-node 2"
        raise UserError(f"MDEQ_LAUNCH={launcher}: {error}; name a launcher, {way_out}") from None


def _explained(error: Exception) -> str | None:
    """What a user can do about an error; None for a defect."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0]
    if isinstance(error, UserError):
        return str(error).rpartition("UserError: ")[2]  # a loader process puts a traceback before
    if isinstance(error, OSError):
        what = error.strerror or lines[-1]
        text = f"{error.filename}: {what}" if error.filename else what
    for words, cure in CURES.items():
        if re.search(words, f"{type(error).__name__}: {text}"):
            return f"{text}; {cure}"
    is_about_a_file = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
    return text if is_about_a_file else None


def _say(text: str) -> None:
    """Lines on stderr, without secrets; nothing where there is no stderr to write to."""
    with contextlib.suppress(OSError, ValueError):
        typer.echo(_late("machine").masked(text), err=True)
