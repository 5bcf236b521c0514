"""README, CONTRIBUTING and docs/: what they show runs, what they name exists, their figures are measured."""

from __future__ import annotations

import json
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dvc.cli.parser import get_main_parser
from ruamel.yaml import YAML
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import video
from pipeline import machine, params, readme
from pipeline.cli import app
from pipeline.plan import GPUS, plan

ROOT = Path(__file__).parents[1]
TEXTS = {
    p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in (*ROOT.glob("[RC]*.md"), *ROOT.glob("docs/*.md"))
}
SHIPPED = [YAML(typ="safe").load((ROOT / name).read_text("utf-8")) for name in ("params.yaml", "params/paper.yaml")]
VARIABLES = {f"MDEQ_DATA_{name.upper()}" for name in machine.SETS} | {"MDEQ_LAUNCH"}
VARIABLES |= set(re.findall(r'"((?:MDEQ|MLFLOW)_[A-Z_]+)"', Path(machine.__file__).read_text("utf-8")))
OTHERS = {"cp", "git", "docker", "pip", "torchrun", "srun", ".venv/bin/pre-commit"}  # not ours to check


def shell(text: str) -> list[str]:
    """The commands of a text: lines of its sh blocks without comments, and code within lines that begins like one."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in blocks.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:make |dvc |python -m (?:pipeline|benchmarks)|mdeq --)[^`]*)`", prose.replace("\n", " "))
    return [line for line in (*lines, *inline) if line]


@pytest.mark.parametrize(("name", "command"), [(name, line) for name, text in TEXTS.items() for line in shell(text)])
def test_a_command_exists_as_it_is_shown(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(re.sub(r"\$\w+", "X", command))
    while words and re.fullmatch(r"\w+=.*", words[0]):
        variable = words.pop(0).partition("=")[0]
        assert variable in VARIABLES | {"T"}
    match words:
        case [] | ["export", _]:
            assert not words or words[1].partition("=")[0] in VARIABLES
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        case ["python", "-m", "benchmarks", *_]:
            pytest.fail(command)
        case ["python", "-m", module, *_] if module.startswith("benchmarks."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
        case ["python", "-m", "pipeline", *arguments] | ["mdeq", *arguments]:
            parses(arguments)
        case ["torchrun", *_, "pipeline", stage, model]:
            parses([stage, model])
        case ["dvc", "queue"]:
            pass  # only named
        case ["dvc", *arguments]:
            given = get_main_parser().parse_args(arguments)
            assert all(target == "X" or target in stages() for target in getattr(given, "targets", None) or ())
            for key in (value.partition("=")[0] for value in getattr(given, "set_param", None) or ()):
                node = SHIPPED[0]
                for part in key.split("."):
                    node = node[part]
        case ["cp", *_]:
            assert (ROOT / words[1]).is_file()
        case _:
            assert words[0] in OTHERS, f"{name}: a command that no test knows"


def parses(arguments: list[str]) -> None:
    """Through the real command line, up to where the command would begin; files it names are there."""
    for word in (word for word in arguments if "/" in word or re.search(r"\.\w+$", word)):
        path = Path(word.rstrip("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir(exist_ok=True)
    group = get_command(app)
    assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0
    name, *rest = arguments
    if name.startswith("-"):
        return
    command = group.commands[name]  # type: ignore[attr-defined]
    if not rest and any(p.required for p in command.params):
        return  # only named
    context = command.make_context(name, rest)
    stage, model = params.TRAINED_BY.get(context.params.get("dataset"), name), context.params.get("model")
    if model and stage in SHIPPED[0]:
        assert any(model in shipped[stage] for shipped in SHIPPED)


@cache
def stages() -> set[str]:
    """Of dvc.yaml, with params.yaml and params/paper.yaml."""
    found = {"machine", "benchmark", "report"}
    for shipped in SHIPPED:
        for stage, dataset in params.TRAINED_ON.items():
            found |= {f"prepare@{dataset}", f"convergence@{dataset}"}
            found |= {f"{kind}@{model}" for kind in (stage, f"evaluate-{dataset}") for model in shipped[stage]}
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve_and_named_files_and_variables_exist(name: str) -> None:
    text = TEXTS[name]
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for file in re.findall(r"`((?:mdeq|pipeline|tests|params|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / file).exists(), file
    assert set(re.findall(r"`((?:MDEQ|MLFLOW)_[A-Z]+[A-Z_0-9]*)`", text)) <= VARIABLES


def test_the_tree_names_what_is_there() -> None:
    (tree,) = re.findall(r"## Layout\n\n```\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    folder = Path()
    for line in tree.splitlines():
        first, *words = line.split()
        if first.endswith("/"):
            folder = Path("pipeline") / first if line.startswith(" ") else Path(first)
            if folder.parts[0] in ("mdeq", "pipeline"):
                assert all((ROOT / folder / f"{word}.py").is_file() for word in words if word[-1] != "/"), line
        assert (ROOT / first).exists() or (ROOT / folder).is_dir(), line


def test_the_python_blocks_run_and_train(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[:5]]
    assert losses[-1] < losses[0]


def test_the_results_are_those_of_the_recorded_report(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(TEXTS["README.md"].replace("| Table 1 |", "| Table 9 |"), encoding="utf-8")
    readme.write(ROOT / "docs/measured/demo.json", copy)
    assert copy.read_text(encoding="utf-8") == TEXTS["README.md"]


# ---- docs/scaling.md: its table is what `plan` reckons

COLUMNS = [("classify", "mdeq-small"), ("classify", "mdeq")] + [
    (stage, f"mdeq-{size}") for stage in ("pretrain", "finetune") for size in ("small", "large", "xl")
]


def test_the_scaling_table_is_reckoned() -> None:
    rows = {}
    for line in TEXTS["docs/scaling.md"].partition("## The three scales")[2].splitlines():
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 9:
            rows[cells[0]] = cells[1:]
    made = [plan(stage, model, ROOT / "params/paper.yaml") for stage, model in COLUMNS]
    giga = lambda *parts: lambda p: [p.memory[part] / 1e9 for part in parts]  # noqa: E731
    reckoned = {
        "parameters (M)": lambda p: [p.parameters / 1e6],
        "D, state of a sample (thousands)": lambda p: [p.state / 1e3],
        "tape of one f (GB)": giga("tape of one f"),
        "its `layers` in the warm-up (GB)": giga("warm-up: tape"),
        "solver, forward / backward (GB)": giga("forward: solver", "backward: solver"),
        "memory at most (GB)": lambda p: [p.peak / 1e9],
        "evaluations + products an update": lambda p: list(p.evaluations),
        "TFLOP an update: unrolled, implicit": lambda p: [each / 1e12 for each in p.flops],
        "updates (thousands)": lambda p: [sum(p.updates) / 1e3],
        "EFLOP in all": lambda p: [p.total / 1e18],
        "GPU hours on an H100 at 10 %": lambda p: [p.hours(GPUS["h100"], 1, 0.1)],
    }
    wrong = []
    for row, reckon in reckoned.items():
        for cell, column in zip(rows[row], made, strict=True):
            said = [text.replace(",", "") for text in re.findall(r"[\d.,]+", cell.replace(", ", " "))]
            right = [
                f"{value:.{len(text.partition('.')[2])}f}" for text, value in zip(said, reckon(column), strict=True)
            ]
            wrong += [(row, cell, right)] if said != right else []
    assert not wrong


# ---- docs/equilibrium.md: its figures are those of docs/measured, or reckoned


def measured(name: str) -> Any:
    return json.loads((ROOT / f"docs/measured/{name}.json").read_text("utf-8"))


def test_the_figures_about_equilibria_are_measured_or_reckoned() -> None:
    page = " ".join(TEXTS["docs/equilibrium.md"].split())
    runs = {(rule, term): measured(f"rule-{rule}-{term}") for rule in ("phantom", "implicit") for term in ("0", "0.3")}
    settings = [run["settings"] for run in (*runs.values(), measured("rule-reversible-0"))]
    assert {(s["budget"] / 60, s["test_images"], s["steps"], s["bfloat16"], s["threads"]) for s in settings} == {
        (20, 500, 5, True, 1)
    }
    assert all(word in page for word in ("20 CPU minutes of one core", "500 test images", "`Broyden(5)`", "bfloat16"))

    last = {key: run["rows"][-1] for key, run in runs.items()}
    falls = [last[rule, "0"]["residual"] / last[rule, "0.3"]["residual"] for rule in ("phantom", "implicit")]
    assert "sixteenfold under the one-step gradient and almost fivefold under the implicit one" in page
    assert round(falls[0]) == 16 and 4.5 < falls[1] < 5
    assert "A second spent on the one-step gradient teaches most" in page and "an image seen with the implicit" in page
    for term in ("0", "0.3"):
        assert last["phantom", term]["top1"] > last["implicit", term]["top1"]
        seen = last["implicit", term]["images"]
        assert all(
            r["top1"] < last["implicit", term]["top1"] for r in runs["phantom", term]["rows"] if r["images"] < seen
        )

    rows = {row["name"]: row for row in measured("peers-mdeq-small")["columns"]}
    paper, ours = rows["ours, Broyden / Broyden"], rows["ours, Anderson 18 / GMRES 20"]
    assert "they reach half of its residual forward and a third backward" in page
    for kind, part in (("forward_residual", 1 / 2), ("backward_residual", 1 / 3)):
        assert ours[kind] / paper[kind] == pytest.approx(part, rel=0.1)
    assert ours["wall"] == pytest.approx(paper["wall"], rel=0.05)

    swept, solvers = measured("sweep"), ("Broyden", "Anderson", "GMRES")
    forward, adjoint = ({n: c["residual"] for n, c in swept[key].items()} for key in ("forward", "adjoint"))
    assert "gain a digit every five evaluations" in page
    assert all(4.5 < 24 / math.log10(forward[name][5] / forward[name][29]) < 5.5 for name in solvers[:2])
    assert "iterating f slows down at a residual of 0.01" in page and 0.005 < forward["iterating f"][29] < 0.01
    assert "the accuracy has arrived after eight" in page and "GMRES is the lowest curve" in page
    assert all(max(c["accuracy"][7:]) - min(c["accuracy"][7:]) < 0.02 for c in swept["forward"].values())
    assert all(low <= min(others) for low, *others in zip(*(adjoint[n] for n in reversed(solvers)), strict=True))
    near, rough = (
        {name: dict(zip(c["products"], c["cosine"], strict=True)) for name, c in swept["gradients"][z].items()}
        for z in ("converged", "budget")
    )
    assert "ten products give a gradient within 1e-3" in page and "past fourteen that one drifts off" in page
    assert all(1 - near[name][10] < 1e-3 for name in (*solvers, "phantom, damping 1"))
    assert near["phantom, damping 1"][14] > max(near["phantom, damping 1"][n] for n in (10, 20, 30))
    assert "at the same distance, 2e-4" in page and all(1.5e-4 < 1 - rough[n][30] < 2.5e-4 for n in solvers)

    rows = measured("video")["rows"]
    assert video.markdown(rows) in TEXTS["docs/equilibrium.md"] and "All solves reached the tolerance" in page
    saved = [1 - row["before.evaluations"] / row["zero.evaluations"] for row in rows]
    assert f"saves {100 * min(saved):.0f} to {100 * max(saved):.0f} % of the evaluations" in page
    assert all(row["zero.reached"] == row["before.reached"] == 1 for row in rows)
    assert all(round(abs(row["before.miou"] - row["zero.miou"]), 2) <= 0.02 for row in rows)

    small = plan("classify", "mdeq-small", ROOT / "params/paper.yaml")
    assert f"D is {small.state:,}: 18 steps at batch 32 are {18 * 32 * small.state * 4 / 1e6:.0f} MB" in page
    scene = plan("finetune", "mdeq-small", ROOT / "params/paper.yaml")
    assert f"the full MDEQ-small ({scene.parameters / 1e6:.2f}M parameters" in page
