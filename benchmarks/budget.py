"""Models and gradient rules judged by what a CPU budget makes of them: accuracy and residual against time, CIFAR-10.

    python -m benchmarks.budget train --data ~/cifar10 --rule implicit --jacobian 0.3 --budget 1500 --out runs
    python -m benchmarks.budget train --data ~/cifar10 --model anode --budget 1500 --out runs
    python -m benchmarks.budget draw runs/*.json --out docs/gradient_rules.svg

Each run trains a model of Table 1 with 170K parameters on the same batches for `--budget` CPU seconds of the training
process, with Adam and a cosine over that budget. Every so often, outside the budget, the first test images are
classified; an equilibrium is then solved with Broyden, 17 updates (18 evaluations of f), never unrolled. A run that is
stopped goes on where it last measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import setting
from mdeq import Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network, Phantom, Reversible
from mdeq.baselines import BaselineConfig, NeuralODEConfig, ResNetConfig, build
from pipeline.data.cifar10 import CLASSES, FOLDER, Cifar10, open_cifar10
from pipeline.data.loading import batches
from pipeline.metrics import TopK
from pipeline.recipe import cosine, set_lr
from pipeline.training import evaluate

EQUILIBRIUM = {
    "mdeq-small": (MDEQConfig(), ClassificationHeadConfig((8, 16), 200)),
    "single-stream": (MDEQConfig(channels=(40,)), ClassificationHeadConfig((8,), 100)),
}
OTHERS: dict[str, BaselineConfig] = {"resnet18-small": ResNetConfig(8), "anode": NeuralODEConfig(64, augmented=10)}
RULES = {
    "phantom": Phantom(1, 1.0),
    "implicit": Implicit(Gmres(8)),
    "reversible": Reversible(4, 0.5),
}


def train(arguments: argparse.Namespace) -> None:
    """One run: trains, measures, writes its curve and the state it can go on from."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    name = _name(arguments)
    curve, state = arguments.out / f"{name}.json", arguments.out / f"{name}.pt"
    arguments.out.mkdir(parents=True, exist_ok=True)
    network = _model(arguments)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=2.5e-6)
    spent, step, rows = 0.0, 0, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        spent, step, rows = saved["spent"], saved["step"], json.loads(curve.read_text())["rows"]
    data = open_cifar10(arguments.data, None, "train")
    test = open_cifar10(arguments.data, None, "test", limit=arguments.test_images)
    per_epoch = -(-len(data) // arguments.batch)
    due = arguments.every * (len(rows) + 1)
    while spent < arguments.budget:
        network.train()
        epoch, start = divmod(step, per_epoch)
        loader = batches(data, arguments.batch, seed=0, epoch=epoch, shuffle=True, start=start)
        for images, targets in loader:
            began = time.process_time()
            torch.manual_seed(step)
            set_lr(optimizer, cosine(1e-3, int(spent), int(arguments.budget) + 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
                penalised = arguments.jacobian > 0 and float(torch.rand(())) < 0.1
                prediction = network(images, jacobian_probes=1) if penalised else network(images)
                loss = F.cross_entropy(prediction.logits, targets)
            if penalised:
                loss = loss + arguments.jacobian * prediction.equilibrium.jacobian
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            spent += time.process_time() - began
            if spent >= min(due, arguments.budget):
                break
        if spent < min(due, arguments.budget):
            continue
        epochs, beyond = divmod(step, per_epoch)
        images = epochs * len(data) + beyond * arguments.batch  # the last batch of an epoch may be smaller
        rows.append({"seconds": spent, "images": images, **_measure(network, test)})
        print(name, rows[-1], flush=True)
        due += arguments.every
        content = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "spent": spent, "step": step}
        torch.save(content, state.with_suffix(".new"))
        settings = {k: v for k, v in vars(arguments).items() if isinstance(v, str | int | float)}
        curve.write_text(json.dumps({**setting.made(), "settings": settings, "rows": rows}, indent=1))
        state.with_suffix(".new").replace(state)


def _name(arguments: argparse.Namespace) -> str:
    model = "" if arguments.model == "mdeq-small" else f"{arguments.model}-"
    return arguments.model if arguments.model in OTHERS else f"{model}{arguments.rule}-{arguments.jacobian:g}"


def _model(arguments: argparse.Namespace) -> nn.Module:
    if arguments.model in OTHERS:
        return build(OTHERS[arguments.model], len(CLASSES))
    model, head = EQUILIBRIUM[arguments.model]
    return Network(model, head, len(CLASSES), Broyden(arguments.steps), RULES[arguments.rule])


def _measure(network: nn.Module, test: Cifar10) -> dict[str, float]:
    """Accuracy, and of an equilibrium the mean relative residual after 18 evaluations, in float32."""
    if not isinstance(network, Network):
        return {"top1": evaluate(network, test, TopK(len(CLASSES)), batch=100, device="cpu", workers=0)["eval/top1"]}
    solver = network.backbone.forward_solver
    network.backbone.forward_solver = replace(solver, steps=17)
    values = evaluate(network, test, TopK(len(CLASSES)), batch=100, device="cpu", workers=0)
    network.backbone.forward_solver = solver
    return {"top1": values["eval/top1"], "residual": values["solver/relative_residual"]}


def markdown(curves: Sequence[Path]) -> str:
    """A table of where the runs ended, the best accuracy first."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in curves]
    lines = [
        "| model | gradient | Jacobian term | images seen | test accuracy, % | residual |",
        "|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: -run["rows"][-1]["top1"]):
        settings, last = run["settings"], run["rows"][-1]
        model = settings.get("model", "mdeq-small")
        solved = (settings["rule"], f"{settings['jacobian']:g}") if "residual" in last else ("", "")
        residual = f"{last['residual']:.2g}" if "residual" in last else ""
        lines.append(f"| {' | '.join((model, *solved))} | {last['images']:,} | {last['top1']:.1f} | {residual} |")
    return "\n".join(lines)


def draw(arguments: argparse.Namespace) -> None:
    """Both figures against CPU time, a line a run; prints the table."""
    print(markdown(arguments.curves))
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rules, models = list(RULES), [*EQUILIBRIUM, *OTHERS]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.curves]
    compared = len({run["settings"].get("model", "mdeq-small") for run in runs}) > 1
    for content in runs:
        settings = content["settings"]
        model, rule, weight = settings.get("model", "mdeq-small"), settings["rule"], settings["jacobian"]
        style = {"color": f"C{rules.index(rule)}", "linestyle": "-" if weight else "--"}
        label = f"{rule}, Jacobian term {weight:g}" if weight else f"{rule}, no Jacobian term"
        if compared:
            style, label = {"color": f"C{models.index(model)}"}, model
        minutes = [row["seconds"] / 60 for row in content["rows"]]
        top.plot(minutes, [row["top1"] for row in content["rows"]], label=label, **style)
        if "residual" in content["rows"][0]:
            bottom.semilogy(minutes, [row["residual"] for row in content["rows"]], **style)
    top.set(xlabel="CPU minutes of training", ylabel="test accuracy, %")
    bottom.set(xlabel="CPU minutes of training", ylabel="relative residual after 18 evaluations")
    top.legend(frameon=False, fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="one run")
    training.add_argument("--data", type=Path, required=True, help=f"the folder that holds {FOLDER}")
    training.add_argument("--model", choices=[*EQUILIBRIUM, *OTHERS], default="mdeq-small")
    training.add_argument("--rule", choices=RULES, default="phantom", help="of an equilibrium model")
    training.add_argument("--jacobian", type=float, default=0.0, help="weight of the Jacobian term, probability 0.1")
    training.add_argument("--steps", type=int, default=5, help="updates of the forward solver, Broyden")
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--budget", type=float, default=1500, help="CPU seconds of training")
    training.add_argument("--every", type=float, default=150, help="CPU seconds between two measurements")
    training.add_argument("--test-images", type=int, default=1000)
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--bfloat16", action="store_true", help="f under autocast")
    training.add_argument("--out", type=Path, required=True, help="folder for the curve and the state")
    training.set_defaults(run=train)
    drawing = commands.add_parser("draw", help="the picture")
    drawing.add_argument("curves", type=Path, nargs="+")
    drawing.add_argument("--out", type=Path, required=True)
    drawing.set_defaults(run=draw)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
