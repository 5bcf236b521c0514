"""The command line: one command a stage. Imports a stage only when it runs, so that --help is instant.

Exit codes: 0 done, 2 wrong params, data or usage (one line says what), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pipeline.machine import Machine

EPILOG = """\
Environment: MDEQ_DATA_CIFAR10, MDEQ_DATA_IMAGENET, MDEQ_DATA_CITYSCAPES (where a set's files lie),
MDEQ_DEVICE, MDEQ_WORKERS, MDEQ_THREADS (torch's CPU threads), MDEQ_TRACKING=off (no MLflow),
MDEQ_LAUNCH (starts the training stages: `torchrun --nproc-per-node 2`),
MLFLOW_TRACKING_URI (default: mlflow.db here), MLFLOW_EXPERIMENT_NAME (default: mdeq-<scale>).

Exit codes: 0 done, 2 wrong params, data or usage, 130 interrupted;
the same command then goes on where it was.
"""

app = typer.Typer(
    name="pipeline",
    help="Multiscale deep equilibrium models: the paper as a pipeline. `dvc repro` runs what is not up to "
    "date; each command below is one of its stages, usable alone.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class DataSet(enum.StrEnum):
    """The three data sets."""

    cifar10 = "cifar10"
    imagenet = "imagenet"
    cityscapes = "cityscapes"


Set = Annotated[DataSet, typer.Argument(help="The data set.")]
Model = Annotated[str, typer.Argument(help="A model of this stage's section in params.yaml.", show_default=False)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N or mps; else MDEQ_DEVICE, else a GPU if there is one.", show_default=False),
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Loader processes; else MDEQ_WORKERS, else 0.", show_default=False)
]
Params = Annotated[Path, typer.Option("--params", help="The params file.", dir_okay=False)]
PARAMS = Path("params.yaml")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@app.command(rich_help_panel="Stages")
def prepare(dataset: Set, workers: Workers = None, params: Params = PARAMS) -> None:
    """Bring a set into place (drawn, yours, or downloaded), verify it, write its manifest and pictures.

    Example: `MDEQ_DATA_CIFAR10=~/data python -m pipeline prepare cifar10` with `source: folder`.
    """
    with _reported():
        section, machine = _begin("prepare", dataset.value, "cpu", workers, params)
        from pipeline.stages import prepare as stage

        stage.run(dataset.value, section, machine)


@app.command(rich_help_panel="Stages")
def classify(model: Model, device: Device = None, workers: Workers = None, params: Params = PARAMS) -> None:
    """Train a model on CIFAR-10 (Table 1). Interrupted, the same command goes on.

    Example: `python -m pipeline classify mdeq-small --device cuda`
    """
    with _reported():
        section, machine = _begin("classify", model, device, workers, params)
        _launch()
        from pipeline.stages import classify as stage

        stage.run(model, section, machine)


@app.command(rich_help_panel="Stages")
def pretrain(model: Model, device: Device = None, workers: Workers = None, params: Params = PARAMS) -> None:
    """Train a model on ImageNet (Table 2). Interrupted, the same command goes on.

    Example: `python -m pipeline pretrain mdeq-small --device cuda:1`
    """
    with _reported():
        section, machine = _begin("pretrain", model, device, workers, params)
        _launch()
        from pipeline.stages import pretrain as stage

        stage.run(model, section, machine)


@app.command(rich_help_panel="Stages")
def finetune(model: Model, device: Device = None, workers: Workers = None, params: Params = PARAMS) -> None:
    """Train a model on Cityscapes, from its backbone of `pretrain` or from scratch (Table 3).

    Example: `python -m pipeline finetune mdeq-small`
    """
    with _reported():
        section, machine = _begin("finetune", model, device, workers, params)
        _launch()
        from pipeline.stages import finetune as stage

        stage.run(model, section, machine)


@app.command(rich_help_panel="Stages")
def evaluate(
    dataset: Set,
    model: Annotated[str, typer.Argument(help="A model trained on that set.", show_default=False)],
    device: Device = None,
    workers: Workers = None,
    params: Params = PARAMS,
) -> None:
    """Judge a trained model by the official measures, with the solver's statistics, and draw its predictions.

    Example: `python -m pipeline evaluate cityscapes mdeq-small`
    """
    with _reported():
        section, machine = _begin("evaluate", dataset.value, device, workers, params)
        from pipeline.stages import evaluate as stage

        stage.run(dataset.value, model, section, machine)


@app.command(rich_help_panel="Stages")
def convergence(dataset: Set, device: Device = None, workers: Workers = None, params: Params = PARAMS) -> None:
    """How fast Broyden's method and plain iteration find the equilibria of a trained model (Figure 5).

    Example: `python -m pipeline convergence cifar10`
    """
    with _reported():
        section, machine = _begin("convergence", dataset.value, device, workers, params)
        from pipeline.stages import convergence as stage

        stage.run(dataset.value, section, machine)


@app.command(rich_help_panel="Stages")
def benchmark(device: Device = None, params: Params = PARAMS) -> None:
    """Time and memory of a training step, relative to ResNet-101 (Figure 4b).

    Example: `python -m pipeline benchmark --device cuda`
    """
    with _reported():
        section, machine = _begin("benchmark", None, device, None, params)
        from pipeline.stages import benchmark as stage

        stage.run(section, machine)


@app.command(rich_help_panel="Stages")
def machine() -> None:
    """Write what decides how fast this machine is to results/machine.json; the benchmark depends on it."""
    with _reported():
        from pipeline.machine import Machine, write_fingerprint

        write_fingerprint(Machine.from_environment(device="cpu"), Path("results/machine.json"))


@app.command(rich_help_panel="Stages")
def report() -> None:
    """Make the report from what the other stages wrote: results/report/index.html."""
    with _reported():
        from pipeline.machine import Machine
        from pipeline.stages import report as stage

        stage.run(Machine.from_environment(device="cpu"))


@app.command(rich_help_panel="Around them")
def show() -> None:
    """Print the results tables of the last report, and where to look further."""
    with _reported():
        from pipeline.stages import report as stage

        if not (stage.OUT / "results.json").is_file():
            _fail(f"{stage.OUT}: no report yet; `make repro` or `dvc repro` makes it")
        stage.show()


@app.command(rich_help_panel="Around them")
def predict(
    weights: Annotated[
        Path, typer.Argument(help="A model.pt of a training stage or import-weights.", show_default=False)
    ],
    sources: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Photos, folders of photos, videos.")],
    out: Annotated[Path, typer.Option(help="The folder for pictures and predictions.json.")] = Path("predictions"),
    video: Annotated[bool, typer.Option("--video", help="A folder's pictures are the frames of a video.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Start a video's frames from zero too: what is saved, what changes.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A folder with *_gtFine_labelIds.png of the pictures: adds the mIoU.", exists=True, file_okay=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many steps of the solver; else as trained.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Residual at which it stops; else as trained.", show_default=False)
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=1, help="Segment at this height; else as tested, or as they are.", show_default=False),
    ] = None,
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
    with _reported():
        from pipeline import predict as prediction
        from pipeline.inference import Predictor
        from pipeline.machine import Machine

        predictor = Predictor(
            weights, Machine.from_environment(device), steps=steps, tolerance=tolerance, height=height
        )
        found = prediction.run(predictor, sources, out, video=video, compare=compare, labels=labels)
        for name, figures in found.items():
            typer.echo(prediction.summary(name, figures))
        typer.echo(out)


@app.command(rich_help_panel="Around them")
def strip(
    weights: Annotated[Path, typer.Argument(help="A model.pt of `finetune`.", dir_okay=False, exists=True)],
    folder: Annotated[Path, typer.Argument(help="A video's frames, as pictures.", file_okay=False, exists=True)],
    count: Annotated[int, typer.Option(min=1, help="Frames shown.")] = 5,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("strip.png"),
    device: Device = None,
) -> None:
    """Draw frames of a video with their predicted classes below (Appendix C).

    Example: `python -m pipeline strip results/finetune/mdeq-small/model.pt frames/`
    """
    with _reported():
        from pipeline import strip as drawing
        from pipeline.machine import Machine

        drawing.draw(weights, folder, count, out, Machine.from_environment(device))
        typer.echo(out)


@app.command(rich_help_panel="Around them")
def import_weights(
    file: Annotated[Path, typer.Argument(help="The authors' checkpoint, of either release.", dir_okay=False)],
    model: Annotated[str, typer.Option(help="<set>-<name> of params/paper.yaml, as imagenet-mdeq-small.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; else where its stage would.")] = None,
) -> None:
    """Make a model that evaluate and finetune take of the authors' published weights.

    Example: `python -m pipeline import-weights MDEQ_Small_Cls.pkl --model imagenet-mdeq-small`
    """
    with _reported():
        from pipeline import weights

        typer.echo(f"{file} -> {weights.import_weights(file, model, out)}")


@app.command(rich_help_panel="Around them")
def sizes() -> None:
    """Print the parameter count of every preset beside the paper's and the published code's."""
    with _reported():
        from rich.console import Console
        from rich.table import Table

        from pipeline import weights

        table = Table("model", "parameters", "paper", "published code")
        for name, count, paper, published in weights.sizes():
            table.add_row(name, f"{count:,}", paper, published)
        Console().print(table)


@app.command(rich_help_panel="Around them")
def plan(
    stage: Annotated[str | None, typer.Argument(help="classify, pretrain or finetune; all if left out.")] = None,
    model: Annotated[str | None, typer.Argument(help="A model of that stage; all if left out.")] = None,
    gpu: Annotated[str, typer.Option(help="v100, a100, rtx4090, l40s, h100 or h200.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="How many share a batch.")] = 1,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Reached part of the data sheet's peak.")] = 0.1,
    path: Params = PARAMS,
) -> None:
    """Reckon what training takes, from the params alone: parameters, memory, evaluations of f, operations, hours.

    Example: `python -m pipeline plan pretrain --params params/paper.yaml --gpu a100 --gpus 8`
    """
    with _reported():
        from rich.console import Console

        from pipeline import params
        from pipeline import plan as planning

        params.check(path)
        for table in planning.tables(stage, model, path, gpu, gpus, utilisation):
            Console().print(table)


@app.command(rich_help_panel="Around them")
def check(params: Params = PARAMS) -> None:
    """Say everything that is wrong with the params file.

    Example: `python -m pipeline check --params params/paper.yaml`
    """
    with _reported():
        from pipeline import params as params_module
        from pipeline.machine import Machine

        params_module.check(params, _stamp(Machine.from_environment(device="cpu")))
        typer.echo(f"{params}: all right")


@app.command(rich_help_panel="Around them")
def schema() -> None:
    """Write params.schema.json, by which editors check params.yaml."""
    from pipeline import params as params_module

    Path(params_module.SCHEMA).write_text(params_module.schema(), encoding="utf-8")


@app.command(rich_help_panel="Around them")
def difficulty(dataset: Set, device: Device = None, workers: Workers = None) -> None:
    """Show that a generated set is neither noise nor a gift: simple baselines against a trained network.

    Example: `python -m pipeline difficulty cifar10`
    """
    with _reported():
        from pipeline.data import difficulty as measure
        from pipeline.machine import Machine

        measure.run(dataset.value, Machine.from_environment(device, workers))


@app.command(rich_help_panel="Around them")
def sync(path: Params = PARAMS) -> None:
    """Hand MLflow the runs that it lacks: it was away, or DVC restored the stage from its cache."""
    with _reported():
        from pipeline import params
        from pipeline.machine import Machine
        from pipeline.sync import run

        machine = Machine.from_environment(device="cpu", scale=params.scale(path))
        if machine.tracking_uri is None:
            _fail("MDEQ_TRACKING=off: there is no store to hand anything to")
        for folder, whole in run(machine):
            if not whole:
                _fail(f"{folder}: not all of its run has arrived; try again")
            typer.echo(f"{folder}: its run is in the store now")


@app.command(rich_help_panel="Around them")
def register(
    weights: Annotated[Path, typer.Argument(help="A model.pt of a training stage.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of the registered model; else <stage>-<model>.")] = None,
    path: Params = PARAMS,
) -> None:
    """Make a trained model a new version of a registered model in MLflow.

    Example: `python -m pipeline register results/classify/mdeq-small/model.pt --name cifar10`
    """
    with _reported():
        from pipeline import checkpoints, params, tracking
        from pipeline.machine import Machine

        machine = Machine.from_environment(device="cpu", scale=params.scale(path))
        if machine.tracking_uri is None:
            _fail("MDEQ_TRACKING=off: there is no store to register it in")
        meta = checkpoints.read(weights).get("meta", {})
        name = name or f"{meta.get('stage')}-{meta.get('model')}"
        typer.echo(f"models:/{name}/{tracking.register(machine, meta.get('run_id'), name)}")


@app.command(rich_help_panel="Around them")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000, path: Params = PARAMS
) -> None:
    """Show the recorded runs in the browser (MLflow), for this machine alone."""
    with _reported():
        from pipeline import params, tracking
        from pipeline.machine import Machine

        machine = Machine.from_environment(device="cpu", scale=params.scale(path))
        if machine.tracking_uri is None:
            _fail("MDEQ_TRACKING=off: there are no runs to show")
        raise typer.Exit(tracking.serve(machine, port))


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is closed as killed
    app()


def _begin(stage: str, instance: str | None, device: str | None, workers: int | None, path: Path) -> tuple:
    """The stage's own params, after the whole file was found right, and the machine."""
    from pipeline import params
    from pipeline.machine import Machine

    machine = Machine.from_environment("cpu" if stage == "prepare" else device, workers, scale=params.scale(path))
    params.check(path, _stamp(machine))
    return params.load(stage, instance, path), machine


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


def _stamp(machine: Machine) -> Path:
    return machine.root / "work" / ".params-checked"


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turns what a user can mend into one line and exit code 2; a defect keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    except _mendable() as error:
        number = os.environ.get("RANK", "0")
        said = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)  # of a loader
        _fail(said if number == "0" else f"process {number}: {said}")
    except OSError as error:
        if error.errno not in FULL:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; mend that and run again: it goes on where it was")


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
