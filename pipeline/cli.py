"""The command line: one command per stage, imported when it runs, so that --help is instant."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Generator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from pipeline.errors import Stopped, UserError
from pipeline.sets import SETS

if TYPE_CHECKING:
    from pipeline.machine import Machine

EPILOG = """\
Environment: MDEQ_DATA_CIFAR10, MDEQ_DATA_IMAGENET, MDEQ_DATA_CITYSCAPES (where a data set lies),
MDEQ_DEVICE, MDEQ_WORKERS, MDEQ_THREADS (torch's CPU threads), MDEQ_TRACKING=off (no MLflow),
MDEQ_LAUNCH (starts the training stages: `torchrun --nproc-per-node 2`), MLFLOW_TRACKING_URI
(default: mlflow.db here), MLFLOW_EXPERIMENT_NAME (default: `mdeq-` and the scale).

Exit codes: 0 done; 1 a defect, with its traceback; 2 wrong params, data or usage, a line per
error; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM): the same command then resumes.
Under MDEQ_LAUNCH a failure has the launcher's code.
"""
TRAINS = "Interrupted, the same command resumes.\n\nExample: `python -m pipeline {}`"
CURES = {
    errno.ENOSPC: "free some space and rerun; what was saved is kept",
    errno.EDQUOT: "free some of your quota and rerun; what was saved is kept",
    errno.EROFS: "work in a folder that can be written to",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
}


class Commands(TyperGroup):
    """Turns what a user can fix into lines and an exit code; a defect keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


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
_around = partial(app.command, rich_help_panel="Around them")


def _models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that the shell completes: those of the stage's section in params.yaml."""
    from pipeline import settings

    dataset = SETS.get(ctx.params.get("dataset") or "")
    stage = dataset.stage if dataset else str(ctx.info_name)
    with contextlib.suppress(UserError):
        found = settings.section(settings.read(PARAMS), (stage,), PARAMS)
        return [name for name in found if name.startswith(incomplete)]
    return []


PARAMS = Path("params.yaml")
Set = Annotated[Literal["cifar10", "imagenet", "cityscapes"], Argument(help="The data set.")]
Model = Annotated[
    str, Argument(help="Of the stage's section in the params.", autocompletion=_models)
]
Device = Annotated[
    str | None,
    Option(help="cpu, cuda, cuda:N or mps; else MDEQ_DEVICE, else a GPU if there is one."),
]
Workers = Annotated[int | None, Option(min=0, help="Loader processes; else MDEQ_WORKERS, else 0.")]
Params = Annotated[Path, Option("--params", help="The params file.", dir_okay=False)]
Changes = Annotated[
    list[str] | None,
    Option("--set", help="Replaces a param in this run: optimizer.lr=3e-4. May be repeated."),
]


@_stage()
def prepare(dataset: Set, workers: Workers = None, path: Params = PARAMS) -> None:
    """Bring a data set into place (drawn, yours or downloaded), check it, write its manifest.

    Example: `MDEQ_DATA_CIFAR10=~/data python -m pipeline prepare cifar10` with `source: folder`.
    """
    _run("prepare", dataset, *_begin("prepare", dataset, "cpu", workers, path))


@_stage(
    "finetune",
    help=f"Train on Cityscapes (Table 3). {TRAINS.format('finetune mdeq-small --dry-run')}",
)
@_stage(
    "pretrain",
    help=f"Train on ImageNet (Table 2). {TRAINS.format('pretrain mdeq-small --device cuda')}",
)
@_stage(
    "classify",
    help=f"Train on CIFAR-10 (Table 1). {TRAINS.format('classify mdeq-small --set epochs=5')}",
)
def train(
    ctx: typer.Context,
    model: Model,
    device: Device = None,
    workers: Workers = None,
    changes: Changes = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Run a few steps and say what the training takes here.")
    ] = False,
    limit_batches: Annotated[
        int | None, Option(min=1, help="Debug: batches per epoch, of training and validation.")
    ] = None,
    overfit_batch: Annotated[
        bool, Option("--overfit-batch", help="Debug: train and validate on one batch alone.")
    ] = False,
    profile: Annotated[
        bool, Option("--profile", help="Debug: write a Chrome trace of three updates.")
    ] = False,
    path: Params = PARAMS,
) -> None:
    """Train a model of the stage that the command is named after."""
    stage = str(ctx.info_name)
    section, machine = _begin(stage, model, device, workers, path, changes)
    if dry_run:
        from pipeline.train.rehearsal import rehearse

        for line in rehearse(stage, model, section, machine):
            typer.echo(line)
        return
    _launch()
    from pipeline.recipe import Debug

    debug = Debug(limit_batches, 1 if overfit_batch else None, profile)
    _run(stage, model, section, machine, None if debug == Debug() else debug)


@_stage()
def evaluate(
    dataset: Set,
    model: Annotated[
        str, Argument(help="Of the params, of the zoo, or a file.", autocompletion=_models)
    ],
    device: Device = None,
    workers: Workers = None,
    changes: Changes = None,
    path: Params = PARAMS,
) -> None:
    """Evaluate a model by the official measures, with the solver's statistics and examples.

    Example: `python -m pipeline evaluate cityscapes mdeq-small`
    """
    section, machine = _begin("evaluate", dataset, device, workers, path, changes)
    from pipeline import params, weights

    stage = SETS[dataset].stage
    trained, zoo = params.instances(stage, path), weights.zoo()
    if model not in (*trained, *zoo) and not os.path.isfile(model):
        raise UserError(
            f"{model}: no such model; {stage} in {path} has {', '.join(trained) or 'none'}, "
            f"the zoo has {', '.join(zoo) or 'none'}; or name a model file"
        )
    _run("evaluate", dataset, model, section, machine)


@_stage()
def convergence(
    dataset: Set,
    device: Device = None,
    workers: Workers = None,
    changes: Changes = None,
    path: Params = PARAMS,
) -> None:
    """Measure how fast solvers find the equilibria of a trained model (Figure 5).

    Example: `python -m pipeline convergence cifar10`
    """
    _run("convergence", dataset, *_begin("convergence", dataset, device, workers, path, changes))


@_stage()
def benchmark(device: Device = None, changes: Changes = None, path: Params = PARAMS) -> None:
    """Measure time and memory of a training step, relative to ResNet-101 (Figure 4b).

    Example: `python -m pipeline benchmark --device cuda`
    """
    _run("benchmark", *_begin("benchmark", None, device, None, path, changes))


@_stage()
def machine() -> None:
    """Write what decides this machine's speed to results/machine.json; the benchmark depends on it.

    Example: `python -m pipeline machine`
    """
    from pipeline.files import write_json
    from pipeline.machine import fingerprint

    write_json(Path("results/machine.json"), fingerprint())


@_stage()
def report() -> None:
    """Make the report from what the other stages wrote: results/report/index.html.

    Example: `python -m pipeline report`
    """
    _run("report", _offline(PARAMS))


@_around()
def show(
    into: Annotated[
        Path | None, Option(help="A Markdown file: write the table between its marks.", exists=True)
    ] = None,
) -> None:
    """Print the results of the last report, and where to look further.

    Example: `python -m pipeline show`
    """
    from pipeline.stages import report as stage

    stage.show(into)


@_around()
def predict(
    sources: Annotated[
        list[Path], Argument(metavar="IMAGES...", help="Pictures, folders of pictures, videos.")
    ],
    model: Annotated[
        str | None, Option(help="Of the zoo, or a model file; else the zoo's for CIFAR-10.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="The folder to make for drawn scenes; else predictions/<number>.")
    ] = None,
    form: Annotated[
        Literal["lines", "json", "csv"], Option("--format", help="Lines to read, or for scripts.")
    ] = "lines",
    video: Annotated[
        bool, Option("--video", help="A folder's pictures are the frames of a video.")
    ] = False,
    labels: Annotated[
        Path | None, Option(help="The folder of their *_gtFine_labelIds.png: adds the mIoU.")
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="Limit of the solver; else as trained.")
    ] = None,
    tolerance: Annotated[
        float | None, Option(min=0, help="Residual at which the solver stops; else as trained.")
    ] = None,
    height: Annotated[
        int | None, Option(min=1, help="Segment at this height; else as in evaluation.")
    ] = None,
    device: Device = None,
) -> None:
    """Say what a model sees in pictures, folders and videos; street scenes are also drawn.

    Examples:

    `python -m pipeline predict cat.jpg holiday/`

    `python -m pipeline predict drive.mp4 --model results/finetune/mdeq-small/model.safetensors`
    """
    from pipeline import predict as prediction
    from pipeline import weights
    from pipeline.machine import Machine

    chosen = Machine.from_environment(device)
    limits: dict[str, Any] = {"steps": steps, "tolerance": tolerance, "height": height}
    predictor = prediction.Predictor(weights.find(model), chosen, **limits)
    prediction.run(predictor, sources, out, video=video, labels=labels, form=form)


@_around("weights")
def list_weights() -> None:
    """List the trained models that come with the project.

    Example: `python -m pipeline weights`
    """
    from pipeline import weights

    typer.echo("\n".join(weights.zoo()) or "none")


@_around()
def publish(
    stage: Annotated[
        Literal["classify", "pretrain", "finetune"], Argument(help="That trained it.")
    ],
    model: Model,
    name: Annotated[str, Argument(help="Its new name.")],
) -> None:
    """Add a trained and evaluated model to the zoo, with its card and log.

    Example: `python -m pipeline publish classify mdeq-small cifar10-mdeq-small`
    """
    from pipeline import weights

    typer.echo(weights.publish(stage, model, name))


@_around()
def import_weights(
    file: Annotated[
        Path, Argument(help="A checkpoint of the authors, or a model.pt of version 0.1.")
    ],
    model: Annotated[
        str | None, Option(help="The authors' model in params/paper.yaml: imagenet-mdeq-small.")
    ] = None,
    out: Annotated[Path | None, Option(help="Where to write; else where its stage would.")] = None,
) -> None:
    """Make a model file of the authors' published weights, or of an old model of this project.

    Example: `python -m pipeline import-weights MDEQ_Small_Cls.pkl --model imagenet-mdeq-small`
    """
    from pipeline import weights

    typer.echo(weights.import_weights(file, model, out))


@_around()
def check(path: Params = PARAMS) -> None:
    """Say everything that is wrong with the params file.

    Example: `python -m pipeline check --params params/paper.yaml`
    """
    from pipeline import settings

    settings.read(path)
    from pipeline import params

    params.check(path)
    typer.echo(f"{path}: valid")


@_around()
def sync(path: Params = PARAMS) -> None:
    """Upload the runs that MLflow lacks: it was away, or DVC restored a stage from its cache.

    Example: `python -m pipeline sync`
    """
    machine = _recording(path)
    from pipeline import tracking

    for file, what in tracking.sync(machine):
        typer.echo(f"{file.parent}: {what}")


@_around()
def ui(
    port: Annotated[int, Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000,
    path: Params = PARAMS,
) -> None:
    """Show the recorded runs in the browser (MLflow), to this machine alone.

    Example: `python -m pipeline ui --port 5001`
    """
    machine = _recording(path)
    from pipeline import store

    raise typer.Exit(store.ui(machine, port))


def main() -> None:
    """Run the command line."""
    from pipeline.machine import masked, name_user

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name_user()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except Exception:  # a defect
        _say(masked(traceback.format_exc()))
        sys.exit(1)


def _begin(
    stage: str,
    instance: str | None,
    device: str | None,
    workers: int | None,
    path: Path,
    changes: list[str] | None = None,
) -> tuple[Any, Machine]:
    """The stage's own section, after the whole file was found valid, and the machine."""
    from pipeline import settings
    from pipeline.machine import Machine

    data = settings.read(path)
    keys = (stage, instance) if instance else (stage,)
    settings.changed(settings.section(data, keys, path), changes or [])
    scale = settings.load(settings.Name, path, ("scale",))
    machine = Machine.from_environment(device, workers, scale)
    if stage == "prepare":
        _check_once(path, machine.root / "work" / ".params-checked")
        return settings.load(settings.PREPARE[str(instance)], path, keys), machine
    from pipeline import params

    params.check(path)
    return params.load(stage, instance, path, changes or []), machine


def _check_once(path: Path, stamp: Path) -> None:
    """Checks a file that was not found valid before: the check needs torch, preparing does not."""
    from pipeline import files

    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("params", "settings", "recipe")]
    code += sorted((here.parent / "mdeq").glob("*.py"))
    known = files.digest(b"".join(file.read_bytes() for file in (path, *code)))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == known:
        return
    from pipeline import params

    params.check(path)
    files.write_text(stamp, known)


def _offline(path: Path) -> Machine:
    """The machine for what needs no device."""
    from pipeline import settings
    from pipeline.machine import Machine

    return Machine.from_environment("cpu", scale=settings.load(settings.Name, path, ("scale",)))


def _recording(path: Path) -> Machine:
    """The machine, where runs are recorded."""
    machine = _offline(path)
    if machine.tracking_uri is None:
        raise UserError("MDEQ_TRACKING=off: there is no store of runs; unset it")
    return machine


def _run(stage: str, *arguments: object) -> None:
    import_module(f"pipeline.stages.{stage}").run(*arguments)


def _launch() -> None:
    """Replaces this process by the launcher of MDEQ_LAUNCH, which runs the command in several."""
    from pipeline.machine import launcher

    words = launcher()
    if not words:
        return
    try:
        os.execvp(words[0], [*words, "-m", "pipeline", *sys.argv[1:]])
    except OSError as error:
        raise UserError(
            f"MDEQ_LAUNCH={os.environ['MDEQ_LAUNCH']}: cannot be started ({error.strerror}); "
            "for example torchrun --nproc-per-node 2"
        ) from None


@contextlib.contextmanager
def _reported() -> Generator[None]:
    try:
        yield
    except Stopped as stop:
        _say(stop.message)
        raise typer.Exit(int(str(stop.code))) from None
    except KeyboardInterrupt:
        _say("interrupted; rerun the same command")
        raise typer.Exit(130) from None
    except (BrokenPipeError, typer.Exit):
        raise
    except Exception as error:
        lines = _user_lines(error)
        if lines is None:
            raise
        rank = os.environ.get("RANK", "0")
        for line in lines.splitlines():
            _say(line if rank == "0" else f"process {rank}: {line}")
        raise typer.Exit(2) from None


def _user_lines(error: Exception) -> str | None:
    """What a user can do about an error; None for a defect."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text.rpartition("UserError: ")[2]  # a loader process puts its traceback before
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or text.rpartition("\n")[2] or type(error).__name__
        cure = CURES.get(error.errno or 0)
        return str(UserError(f"{where}{what}" + (f"; {cure}" if cure else "")))
    first = text.partition("\n")[0].strip(" .") or "out of memory"
    if "DataLoader worker" in first:
        cure = "lower MDEQ_WORKERS, or give it memory (a container: --shm-size), and rerun"
        return f"{first}; {cure}"
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"out of memory ({first}); lower `batch` and rerun"
    return None


def _say(text: str) -> None:
    """Lines on stderr, without secrets; nothing where there is no stderr to write to."""
    from pipeline.machine import masked

    with contextlib.suppress(OSError, ValueError):
        typer.echo(masked(text), err=True)
