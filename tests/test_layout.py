"""The house rules: who may import whom, and dvc.yaml compared with the code and the params."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from dvc.repo import Repo
from dvc.stage import PipelineStage
from ruamel.yaml import YAML

from pipeline.sets import BY_STAGE, SETS

ROOT = Path(__file__).parents[1]
PACKAGES = ("mdeq", "pipeline")

FLOORS = [
    {"mdeq"},
    {"pipeline.errors", "pipeline.files", "pipeline.sets", "pipeline.recipe"},
    {"pipeline.params", "pipeline.settings", "pipeline.machine"},
    {
        "pipeline.data",
        "pipeline.tracking",
        "pipeline.store",
        "pipeline.progress",
        "pipeline.figures",
    },
    {"pipeline.train", "pipeline.report", "pipeline.predict", "pipeline.weights", "pipeline.zoo"},
    {"pipeline.stages"},
    {"pipeline.cli"},
    {"pipeline.__main__"},
]
"""Lowest first; a module imports from its own floor and those below."""

# What decides no result: messages, the machine, what records it; DVC tracks params by value
PLUMBING = {
    "pipeline",
    "pipeline.data",
    "pipeline.errors",
    "pipeline.files",
    "pipeline.machine",
    "pipeline.params",
    "pipeline.progress",
    "pipeline.sets",
    "pipeline.settings",
    "pipeline.stages",
    "pipeline.store",
    "pipeline.tracking",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that a file imports anywhere in it, except for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return frozenset(_imports(tree))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            module = child.module or ""
            yield module
            yield from (
                f"{module}.{a.name}" for a in child.names if f"{module}.{a.name}" in MODULES
            )
        else:
            yield from _imports(child)


def tops(name: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(name)}


def floor(name: str) -> int | None:
    """The number of a module's floor; None for a package's own `__init__`."""
    for number, members in enumerate(FLOORS):
        if any(name == member or name.startswith(f"{member}.") for member in members):
            return number
    assert name == "pipeline", f"{name} is on no floor"
    return None


# who imports whom


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    own = floor(name)
    for imported in imports(name) & MODULES.keys():
        other = floor(imported)
        assert own is None or other is None or other <= own, f"{name} imports {imported}"


def test_no_modules_import_each_other() -> None:
    graph = nx.DiGraph(
        (name, imported)
        for name in MODULES
        for imported in imports(name) & MODULES.keys()
        if imported != name and MODULES[imported].name != "__init__.py"
    )
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def test_only_the_command_line_imports_late() -> None:
    optional = {
        "mlflow",
        "timm",
        "segmentation_models_pytorch",
        "torchdiffeq",
        "torchvision",
        "pandas",
    }
    for name, path in MODULES.items():
        if name == "pipeline.cli":
            continue
        heavy = {"torch"} if name == "pipeline.machine" else set()  # what prepare does without
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                late = {module.partition(".")[0] for module in _imports(function)}
                assert late <= optional | heavy, (
                    f"{name}.{function.name} imports {sorted(late - optional - heavy)}"
                )


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] == "mdeq"])
def test_the_library_imports_torch_only(name: str) -> None:
    allowed = {"mdeq", "torch", *sys.stdlib_module_names}
    if name == "mdeq.baselines":
        allowed |= {"torchvision", "timm", "segmentation_models_pytorch", "torchdiffeq"}
    assert tops(name) <= allowed


def test_stages_never_import_each_other() -> None:
    stages = {name for name in MODULES if name.startswith("pipeline.stages.")}
    for name in MODULES:
        if name != "pipeline.cli":
            assert not (imports(name) & stages) - {name}, name


def test_training_on_cifar10_needs_torch_and_numpy_alone() -> None:
    allowed = {"mdeq", "pipeline", "torch", "numpy", *sys.stdlib_module_names}
    todo, seen = ["pipeline.train.loop", "pipeline.data.cifar10"], set()
    while todo:
        name = todo.pop()
        if name not in seen and name in MODULES:
            seen.add(name)
            todo += imports(name)
            assert name == "mdeq.baselines" or tops(name) <= allowed | {"torchvision"}, name


def test_importing_the_library_needs_torch_alone() -> None:
    heavy = {"pandas", "cv2", "pydantic", "mlflow", "dvc", "torchvision", "matplotlib", "typer"}
    code = f"import sys, mdeq; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_wheel_is_typed_and_its_library_runs_with_torch_alone(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "mdeq/py.typed").is_file()
    requires = metadata.PathDistribution(next(tmp_path.glob("*.dist-info"))).requires or []
    assert [line for line in requires if "extra ==" not in line] == ["torch>=2.9"]
    others = {re.split(r"[^\w-]", line)[0] for line in requires} | {"PIL", "cv2", "ruamel"}
    library = ", ".join(name for name in MODULES if name.startswith("mdeq."))
    code = f"""
import sys
sys.modules |= dict.fromkeys({others - {"torch", "filelock", "mdeq", "jinja2"}})  # not importable
import torch, mdeq, {library}
head = mdeq.ClassificationHeadConfig((4, 4), 8)
model = mdeq.Network(mdeq.MDEQConfig(channels=(8, 8)), head, 3)
model(torch.ones(2, 3, 8, 8)).logits.sum().backward()
print(mdeq.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "mdeq/__init__.py"), done.stderr


# dvc.yaml


@pytest.fixture(scope="module")
def stages() -> list[PipelineStage]:
    """The stages after templating."""
    with Repo(str(ROOT)) as repo:
        return [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]


def sections(stage: PipelineStage) -> set[str]:
    return {key for dep in stage.deps for key in getattr(dep, "params", ()) or ()}


def paths(entries: list[Any]) -> set[str]:
    return {os.path.relpath(e.fs_path, ROOT) for e in entries if not hasattr(e, "params")}


def test_a_stage_reads_the_section_of_its_command(stages: list[PipelineStage]) -> None:
    for stage in stages:
        command = stage.cmd.removeprefix("python -m pipeline ").split()
        match command:
            case ["machine" | "report"] | ["mkdir", *_]:
                expected = set()
            case ["benchmark"]:
                expected = {"benchmark"}
            case ["evaluate", dataset, _]:
                expected = {f"evaluate.{dataset}"}
            case [name, instance]:
                expected = {f"{name}.{instance}"}
        assert sections(stage) == expected, stage.name


def test_every_instance_of_params_yaml_has_its_stages(stages: list[PipelineStage]) -> None:
    data = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    expected = {f"prepare@{name}" for name in data["prepare"]}
    for dataset in SETS.values():
        expected |= {f"{dataset.stage}@{model}" for model in data[dataset.stage]}
        expected |= {f"evaluate-{dataset.name}@{model}" for model in data[dataset.stage]}
        expected |= {f"convergence@{dataset.name}"}
    others = {"no-backbone", "machine", "benchmark", "report"}
    assert {stage.name for stage in stages} == expected | others


def used_by(module: str, dataset: str | None) -> set[str]:
    """The files that decide what a stage's module computes, as dvc.yaml names them."""
    used, todo = set(), [module]
    if dataset:
        todo.append(f"pipeline.data.{dataset}")
    while todo:
        name = todo.pop()
        if name in used or name in PLUMBING or name not in MODULES:
            continue
        used.add(name)
        todo += imports(name)
    return {
        str(MODULES[name].relative_to(ROOT)) for name in used if name != "pipeline.data.readers"
    }


@pytest.mark.parametrize(
    "group",
    ["classify", "pretrain", "finetune", "convergence", "benchmark", "report"]
    + [f"evaluate-{name}" for name in SETS],
)
def test_a_stage_depends_on_the_code_it_uses(stages: list[PipelineStage], group: str) -> None:
    stage = next(stage for stage in stages if stage.name.partition("@")[0] == group)
    declared = {path for path in paths(stage.deps) if path.split("/")[0] in PACKAGES}
    dataset = BY_STAGE[group].name if group in BY_STAGE else None
    used = used_by(f"pipeline.stages.{group.partition('-')[0]}", dataset)
    missing = {
        file for file in used if not any(file == d or file.startswith(f"{d}/") for d in declared)
    }
    assert not missing, f"dvc.yaml: {group} lacks {sorted(missing)}"
    idle = {d for d in declared if not any(file == d or file.startswith(f"{d}/") for file in used)}
    assert idle <= {"pipeline/report"}, f"dvc.yaml: {group} does not use {sorted(idle)}"


def test_only_sources_and_the_machine_are_checked_every_time(stages: list[PipelineStage]) -> None:
    always = {stage.name.partition("@")[0] for stage in stages if stage.always_changed}
    assert always == {"prepare", "machine"}


def test_no_output_is_kept_or_lies_outside_results(stages: list[PipelineStage]) -> None:
    for stage in stages:
        assert all(path.startswith("results/") for path in paths(stage.outs)), stage.name
        assert not any(out.persist for out in stage.outs), "persist switches the run cache off"


def test_metrics_and_plots_are_declared(stages: list[PipelineStage]) -> None:
    for stage in stages:
        group = stage.name.partition("@")[0]
        if group not in {"prepare", "no-backbone", "machine", "report"}:
            assert any(out.metric for out in stage.outs), stage.name
            assert any(out.plot for out in stage.outs), stage.name


# What a change reruns: asked of the real DVC, on a copy whose results are stand-ins


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stages: list[PipelineStage]) -> Path:
    """A copy of the pipeline where every stage is up to date; code and results are stand-ins."""
    root = tmp_path_factory.mktemp("finished")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    outs = {out for stage in stages for out in paths(stage.outs)}
    code = {d for stage in stages for d in paths(stage.deps) if d.split("/")[0] in PACKAGES}
    for name in outs | code:
        path = root / name if Path(name).suffix else root / name / "file.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"stands for {name}\n")
    Repo.init(str(root), no_scm=True).close()
    commit(root)
    return root


@pytest.fixture
def pipeline(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished pipeline of a test's own, made the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commit(root: Path) -> None:
    """Take every stage as done with what is there."""
    with contextlib.chdir(root), Repo(str(root)) as repo:  # DVC reads params.yaml from here
        repo.commit(force=True)


def stale(root: Path) -> set[str]:
    """What `dvc repro` would run, except what it always runs."""
    with Repo(str(root)) as repo:
        status = repo.status()
        changed = {name for name, why in status.items() if why != ["always changed"]}
        graph = repo.index.graph  # edges point from a stage to what it needs
        return {
            stage.addressing
            for stage in graph.nodes
            if changed & {other.addressing for other in {stage, *nx.descendants(graph, stage)}}
        }


def change(root: Path, keys: str, value: object) -> None:
    """Set a dotted key of params.yaml."""
    yaml = YAML(typ="safe")
    data = yaml.load(root / "params.yaml")
    *outer, last = keys.split(".")
    node = data
    for key in outer:
        node = node[key]
    node[last] = value
    yaml.dump(data, root / "params.yaml")


CLASSIFY = {
    "classify@mdeq-small",
    "evaluate-cifar10@mdeq-small",
    "convergence@cifar10",
    "report",
}
FINETUNE = {
    "finetune@mdeq-small",
    "evaluate-cityscapes@mdeq-small",
    "convergence@cityscapes",
    "report",
}
PRETRAIN = {
    "pretrain@mdeq-small",
    "evaluate-imagenet@mdeq-small",
    "convergence@imagenet",
    *FINETUNE,
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("classify.mdeq-small.epochs", 9, CLASSIFY),
        ("pretrain.mdeq-small.epochs", 9, PRETRAIN),
        ("finetune.mdeq-small.epochs", 9, FINETUNE),
        ("convergence.cifar10.steps", 9, {"convergence@cifar10", "report"}),
        ("benchmark.rounds", 9, {"benchmark", "report"}),
        ("scale", "another", set()),
    ],
)
def test_a_change_reruns_its_instance_and_what_builds_on_it_alone(
    pipeline: Path, key: str, value: object, expected: set[str]
) -> None:
    change(pipeline, key, value)
    assert stale(pipeline) == expected


def test_a_changed_source_reaches_what_was_trained_on_it(pipeline: Path) -> None:
    (pipeline / "results/data/imagenet/manifest.csv").write_text("path,split\nanother,train\n")
    assert stale(pipeline) == {"prepare@imagenet", *PRETRAIN}


def test_changed_code_of_one_reader_reaches_its_own_set_alone(pipeline: Path) -> None:
    (pipeline / "pipeline/data/cityscapes.py").write_text("another reader\n")
    evaluated = {"evaluate-cifar10", "evaluate-imagenet", "evaluate-cityscapes", "convergence"}
    groups = {name.partition("@")[0] for name in stale(pipeline)}
    assert groups == {"finetune", "report"} | evaluated


def test_another_machine_measures_again(pipeline: Path) -> None:
    (pipeline / "results/machine.json").write_text("{}")
    assert stale(pipeline) == {"machine", "benchmark", "report"}


def test_a_model_from_scratch_builds_on_no_backbone(pipeline: Path) -> None:
    change(pipeline, "finetune.mdeq-small.backbone", None)
    assert stale(pipeline) == FINETUNE
    commit(pipeline)
    change(pipeline, "pretrain.mdeq-small.epochs", 9)
    assert stale(pipeline) == (PRETRAIN - FINETUNE) | {"report"}


def test_a_model_added_to_params_yaml_adds_its_stages(pipeline: Path) -> None:
    data = YAML(typ="safe").load(pipeline / "params.yaml")
    change(pipeline, "classify.another", data["classify"]["mdeq-small"])
    assert stale(pipeline) == {"classify@another", "evaluate-cifar10@another", "report"}
