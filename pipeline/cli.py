"""The command line: one command a stage. Imports a stage only when it runs, so that --help is instant.

`EPILOG` has the exit codes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Generator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer import Argument, Option
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pipeline.machine import Machine
    from pipeline.params import Section

EPILOG = """\
Environment: MDEQ_DATA_CIFAR10, MDEQ_DATA_IMAGENET, MDEQ_DATA_CITYSCAPES (where a set's files lie),
MDEQ_DEVICE, MDEQ_WORKERS, MDEQ_THREADS (torch's CPU threads), MDEQ_TRACKING=off (no MLflow),
MDEQ_LAUNCH (starts the training stages: `torchrun --nproc-per-node 2`),
MLFLOW_TRACKING_URI (default: mlflow.db here), MLFLOW_EXPERIMENT_NAME (default: `mdeq-` and the params' scale).

Exit codes: 0 done; 1 a defect, with its traceback; 2 wrong params, data or usage, in one line;
130 interrupted (Ctrl-C), 143 terminated (SIGTERM): the same command then goes on where it was.
Under MDEQ_LAUNCH a failure has the launcher's code.
"""
TRAINS = "Interrupted, the same command goes on.\n\nExample: `python -m pipeline {}`"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class Commands(TyperGroup):
    """Turns what a user can mend into one line and an exit code; a defect keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    help="Multiscale deep equilibrium models: the paper as a pipeline. `dvc repro` runs what is not up to "
    "date; each command below is one of its stages, usable alone.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


_stage = partial(app.command, rich_help_panel="Stages")
_around = partial(app.command, rich_help_panel="Around them")


def _models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that the shell may complete to: those of the stage's section in params.yaml."""
    from pipeline import params

    stage = params.TRAINED_BY.get(ctx.params.get("dataset") or "", ctx.info_name or "")
    with contextlib.suppress(params.ParamsError, KeyError):
        return [name for name in params.instances(stage) if name.startswith(incomplete)]
    return []


Set = Annotated[Literal["cifar10", "imagenet", "cityscapes"], Argument(help="The data set.")]
Model = Annotated[str, Argument(help="One of its stage's section in the params.", autocompletion=_models)]
Weights = Annotated[Path, Argument(help="A model.pt of a training stage or of import-weights.", dir_okay=False)]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:N or mps; else MDEQ_DEVICE, else a GPU if there is one.")]
Workers = Annotated[int | None, Option(min=0, help="Loader processes; else MDEQ_WORKERS, else 0.")]
DryRun = Annotated[
    bool, Option("--dry-run", help="Check params, data and device, say what it would do; change nothing.")
]
Params = Annotated[Path, Option("--params", help="The params file.", dir_okay=False)]
PARAMS = Path("params.yaml")


@_stage()
def prepare(dataset: Set, workers: Workers = None, path: Params = PARAMS) -> None:
    """Bring a set into place (drawn, yours, or downloaded), verify it, write its manifest and pictures.

    Example: `MDEQ_DATA_CIFAR10=~/data python -m pipeline prepare cifar10` with `source: folder`.
    """
    _run("prepare", dataset, *_begin("prepare", dataset, "cpu", workers, path))


@_stage(
    "finetune",
    help="Train a model on Cityscapes, from its backbone of `pretrain` or from scratch (Table 3). "
    + TRAINS.format("finetune mdeq-small --dry-run"),
)
@_stage("pretrain", help=f"Train a model on ImageNet (Table 2). {TRAINS.format('pretrain mdeq-small --device cuda:1')}")
@_stage("classify", help=f"Train a model on CIFAR-10 (Table 1). {TRAINS.format('classify mdeq-small --device cuda')}")
def train(
    ctx: typer.Context,
    model: Model,
    device: Device = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    path: Params = PARAMS,
) -> None:
    """Train a model of the stage that the command is named after."""
    stage = str(ctx.info_name)
    section, machine = _begin(stage, model, device, workers, path, trace=not dry_run)
    if dry_run:
        from pipeline import dry_run as rehearsal
        from pipeline.train_params import TrainParams

        assert isinstance(section, TrainParams)
        typer.echo("\n".join(rehearsal.lines(stage, model, section, machine, path)))
        return
    _launch()
    _run(stage, model, section, machine)


@_stage()
def evaluate(dataset: Set, model: Model, device: Device = None, workers: Workers = None, path: Params = PARAMS) -> None:
    """Judge a trained model by the official measures, with the solver's statistics, and draw its predictions.

    Example: `python -m pipeline evaluate cityscapes mdeq-small`
    """
    _run("evaluate", dataset, model, *_begin("evaluate", dataset, device, workers, path))


@_stage()
def convergence(dataset: Set, device: Device = None, workers: Workers = None, path: Params = PARAMS) -> None:
    """How fast Broyden's method and plain iteration find the equilibria of a trained model (Figure 5).

    Example: `python -m pipeline convergence cifar10`
    """
    _run("convergence", dataset, *_begin("convergence", dataset, device, workers, path))


@_stage()
def benchmark(device: Device = None, path: Params = PARAMS) -> None:
    """Time and memory of a training step, relative to ResNet-101 (Figure 4b).

    Example: `python -m pipeline benchmark --device cuda`
    """
    _run("benchmark", *_begin("benchmark", None, device, None, path))


@_stage()
def machine() -> None:
    """Write what decides how fast this machine is to results/machine.json; the benchmark depends on it."""
    from pipeline.machine import Machine, write_fingerprint

    write_fingerprint(Machine.from_environment(device="cpu"), Path("results/machine.json"))


@_stage()
def report() -> None:
    """Make the report from what the other stages wrote: results/report/index.html."""
    from pipeline import params
    from pipeline.machine import Machine

    _run("report", Machine.from_environment(device="cpu", scale=params.scale(PARAMS)))


@_around()
def show(
    into: Annotated[
        Path | None, Option(help="A Markdown file: write what was measured between its marks.", exists=True)
    ] = None,
) -> None:
    """Print the results tables of the last report, and where to look further."""
    from pipeline.stages import report as stage

    record = stage.OUT / "results.json"
    if not record.is_file():
        _fail(f"{stage.OUT}: no report yet; `make repro` or `dvc repro` makes it")
    if into is None:
        return stage.show()
    from pipeline import readme

    readme.write(record, into)


@_around()
def predict(
    weights: Weights,
    sources: Annotated[list[Path], Argument(metavar="IMAGES...", help="Photos, folders of photos, videos.")],
    out: Annotated[Path, Option(help="The folder for pictures and predictions.json.")] = Path("predictions"),
    video: Annotated[bool, Option("--video", help="A folder's pictures are the frames of a video.")] = False,
    compare: Annotated[bool, Option("--compare", help="Frames from zero too: what is saved, what changes.")] = False,
    labels: Annotated[
        Path | None, Option(help="The folder of their *_gtFine_labelIds.png: adds the mIoU.", exists=True)
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="At most so many steps of the solver; else as trained.")] = None,
    tolerance: Annotated[float | None, Option(min=0, help="Residual at which it stops; else as trained.")] = None,
    height: Annotated[int | None, Option(min=1, help="Segment at this height; else as tested, or as they are.")] = None,
    device: Device = None,
) -> None:
    """Classify or segment photos, folders and videos: top-5 bars, overlays, label maps in Cityscapes' colours.

    A video's frames start from the last frame's equilibrium. Each source has a folder below --out (single photos:
    photos/) with a picture for each photo, or video.mp4, and exact label maps.

    Examples:

    `python -m pipeline predict results/pretrain/mdeq-small/model.pt cat.jpg holiday/`

    `python -m pipeline predict results/finetune/mdeq-small/model.pt drive.mp4 --steps 30 --tolerance 0.01 --compare`

    `python -m pipeline predict results/finetune/mdeq-small/model.pt leftImg8bit/val/lindau --labels gtFine/val/lindau`
    """
    from pipeline import predict as prediction
    from pipeline.inference import Predictor
    from pipeline.machine import Machine

    predictor = Predictor(weights, Machine.from_environment(device), steps=steps, tolerance=tolerance, height=height)
    found = prediction.run(predictor, sources, out, video=video, compare=compare, labels=labels)
    for name, figures in found.items():
        typer.echo(prediction.summary(name, figures))
    typer.echo(out)


@_around()
def strip(
    weights: Weights,
    folder: Annotated[Path, Argument(help="A video's frames, as pictures.", file_okay=False, exists=True)],
    count: Annotated[int, Option(min=1, help="Frames shown.")] = 5,
    out: Annotated[Path, Option(help="The picture.")] = Path("strip.png"),
    device: Device = None,
) -> None:
    """Draw frames of a video with their predicted classes below (Appendix C).

    Example: `python -m pipeline strip results/finetune/mdeq-small/model.pt frames/`
    """
    from pipeline import predict as prediction
    from pipeline.inference import Predictor
    from pipeline.machine import Machine

    prediction.strip(Predictor(weights, Machine.from_environment(device)), folder, count, out)
    typer.echo(out)


@_around()
def import_weights(
    file: Annotated[Path, Argument(help="The authors' checkpoint, of either release.", dir_okay=False)],
    model: Annotated[str, Option(help="Set and name of a model in params/paper.yaml: imagenet-mdeq-small.")],
    out: Annotated[Path | None, Option(help="Where to write; else where its stage would.")] = None,
) -> None:
    """Make a model that evaluate and finetune take of the authors' published weights.

    Example: `python -m pipeline import-weights MDEQ_Small_Cls.pkl --model imagenet-mdeq-small`
    """
    from pipeline import weights

    typer.echo(f"{file} -> {weights.import_weights(file, model, out)}")


@_around()
def sizes() -> None:
    """Print the parameter count of every preset beside the paper's and the published code's."""
    from rich.console import Console
    from rich.table import Table

    from pipeline import weights

    table = Table("model", "parameters", "paper", "published code")
    for name, count, paper, published in weights.sizes():
        table.add_row(name, f"{count:,}", paper, published)
    Console().print(table)


@_around()
def plan(
    stage: Annotated[str | None, Argument(help="classify, pretrain or finetune; all if left out.")] = None,
    model: Annotated[str | None, Argument(help="A model of that stage; all if left out.")] = None,
    gpu: Annotated[str, Option(help="v100, a100, rtx4090, l40s, h100 or h200.")] = "h100",
    gpus: Annotated[int, Option(min=1, help="How many share a batch.")] = 1,
    utilisation: Annotated[float, Option(min=0.001, max=1, help="Reached part of the data sheet's peak.")] = 0.1,
    path: Params = PARAMS,
) -> None:
    """Reckon what training takes, from the params alone: parameters, memory, evaluations of f, operations, hours.

    Example: `python -m pipeline plan pretrain --params params/paper.yaml --gpu a100 --gpus 8`
    """
    from rich.console import Console

    from pipeline import params
    from pipeline import plan as planning

    params.check(path)
    for table in planning.tables(stage, model, path, gpu, gpus, utilisation):
        Console().print(table)


@_around()
def check(path: Params = PARAMS) -> None:
    """Say everything that is wrong with the params file.

    Example: `python -m pipeline check --params params/paper.yaml`
    """
    from pipeline import params
    from pipeline.machine import Machine

    params.check(path, _stamp(Machine.from_environment(device="cpu")))
    typer.echo(f"{path}: all right")


@_around()
def schema() -> None:
    """Write params.schema.json, by which editors check params.yaml."""
    from pipeline import params

    Path(params.SCHEMA).write_text(params.schema(), encoding="utf-8")


@_around()
def difficulty(dataset: Set, device: Device = None, workers: Workers = None) -> None:
    """Show that a generated set is neither noise nor a gift: simple baselines against a trained network.

    Example: `python -m pipeline difficulty cifar10`
    """
    from pipeline.data import difficulty as measure
    from pipeline.machine import Machine

    measure.run(dataset, Machine.from_environment(device, workers))


@_around()
def sync(path: Params = PARAMS) -> None:
    """Hand MLflow the runs that it lacks: it was away, or DVC restored the stage from its cache."""
    from pipeline.sync import run

    for folder, whole in run(_recording(path)):
        if not whole:
            _fail(f"{folder}: not all of its run has arrived; try again")
        typer.echo(f"{folder}: its run is in the store now")


@_around()
def register(
    weights: Weights,
    name: Annotated[str | None, Option(help="Of the registered model; else stage and model.")] = None,
    path: Params = PARAMS,
) -> None:
    """Make a trained model a new version of a registered model in MLflow.

    Example: `python -m pipeline register results/classify/mdeq-small/model.pt --name cifar10`
    """
    from pipeline import checkpoints, tracking

    machine = _recording(path)
    meta = checkpoints.read(weights).get("meta", {})
    name = name or f"{meta.get('stage')}-{meta.get('model')}"
    typer.echo(f"models:/{name}/{tracking.register(machine, meta.get('run_id'), name)}")


@_around()
def ui(port: Annotated[int, Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000, path: Params = PARAMS) -> None:
    """Show the recorded runs in the browser (MLflow), for this machine alone."""
    from pipeline import tracking

    raise typer.Exit(tracking.serve(_recording(path), port))


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is closed as killed
    app()


def _begin(
    stage: str, instance: str | None, device: str | None, workers: int | None, path: Path, trace: bool = True
) -> tuple[Section, Machine]:
    """The stage's own params, after the whole file was found right, and the machine."""
    from pipeline import params
    from pipeline.machine import Machine

    machine = Machine.from_environment(device, workers, scale=params.scale(path))
    params.check(path, _stamp(machine) if trace else None)
    return params.load(stage, instance, path), machine


def _run(stage: str, *arguments: object) -> None:
    import_module(f"pipeline.stages.{stage}").run(*arguments)


def _launch() -> None:
    """Becomes the launcher that MDEQ_LAUNCH names, which runs this command in several processes; in them, goes on."""
    launcher = os.environ.get("MDEQ_LAUNCH", "")
    if not launcher or "RANK" in os.environ:
        return
    command = [*shlex.split(launcher), "-m", "pipeline", *sys.argv[1:]]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _fail(f"MDEQ_LAUNCH={launcher}: cannot be started ({error.strerror}); an example: torchrun --nproc-per-node 2")


def _recording(path: Path) -> Machine:
    """The machine, where runs are recorded."""
    from pipeline import params
    from pipeline.machine import Machine

    machine = Machine.from_environment(device="cpu", scale=params.scale(path))
    if machine.tracking_uri is None:
        _fail("MDEQ_TRACKING=off: there is no store of runs; leave it out")
    return machine


def _stamp(machine: Machine) -> Path:
    return machine.root / "work" / ".params-checked"


@contextlib.contextmanager
def _reported() -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    except _mendable() as error:
        number = os.environ.get("RANK", "0")
        said = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)  # of a loader
        _fail(said if number == "0" else f"process {number}: {said}")
    except typer.Exit:
        raise
    except (MemoryError, RuntimeError) as error:
        _fail_for_memory(error)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; mend that and run again: it goes on where it was")


def _fail_for_memory(error: BaseException) -> None:
    """Says so, if a loader process was killed or the memory does not suffice; returns from any other error."""
    from pipeline.processes import out_of_memory

    what = str(error).partition("\n")[0] or "out of memory"
    if "DataLoader worker" in what:
        _fail(f"{what.strip(' .')}; lower MDEQ_WORKERS, or give it memory (a container: --shm-size), and run again")
    if out_of_memory(error):
        _fail(f"the memory does not suffice ({what}); lower `batch` and run again")


def _mendable() -> tuple[type[BaseException], ...]:
    """The errors a user can mend, of the modules that were imported: no other can have been raised."""
    known = {
        "pipeline.params": "ParamsError",
        "pipeline.machine": "MachineError",
        "pipeline.data.manifest": "DataError",
        "pipeline.checkpoints": "CheckpointError",
        "pipeline.training": "TrainingError",
        "pipeline.tracking": "StoreError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in known.items() if module in sys.modules)


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)
