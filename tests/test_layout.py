"""The house rules: who may import whom, and dvc.yaml held to the code and to the params."""

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

from pipeline import experiment
from pipeline.params import STAGES, TRAINED_BY

ROOT = Path(__file__).parents[1]
PACKAGES = ("mdeq", "pipeline")
# What decides no result: the command line, what records it, and params, which DVC tracks by value
PLUMBING = {
    "pipeline",
    "pipeline.machine",
    "pipeline.params",
    "pipeline.train_params",
    "pipeline.tracking",
    "pipeline.stages",
    "pipeline.data",
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
    """Every module that a file imports anywhere in it, but for type checkers alone."""
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
            yield from (f"{module}.{a.name}" for a in child.names if f"{module}.{a.name}" in MODULES)
        else:
            yield from _imports(child)


def tops(name: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(name)}


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


def test_only_tracking_knows_mlflow() -> None:
    assert [name for name in MODULES if "mlflow" in tops(name)] == ["pipeline.tracking"]


def test_only_params_opens_params_yaml() -> None:
    assert [name for name in MODULES if "ruamel" in tops(name)] == ["pipeline.params"]
    assert not [name for name in MODULES if "yaml" in tops(name)]


def test_nobody_imports_the_command_line() -> None:
    users = [name for name in MODULES if "pipeline.cli" in imports(name)]
    assert users == ["pipeline.__main__"]


def test_the_loop_and_the_checkpoints_need_torch_and_numpy_alone() -> None:
    allowed = {"mdeq", "pipeline", "torch", "numpy", *sys.stdlib_module_names}
    for name in ("pipeline.training", "pipeline.checkpoints", "pipeline.data.loading"):
        assert tops(name) <= allowed, name


def test_importing_the_library_needs_torch_alone() -> None:
    heavy = {"pandas", "cv2", "pydantic", "mlflow", "dvc", "torchvision", "matplotlib", "typer"}
    code = f"import sys, mdeq; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
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
    others = {"PIL", "cv2", "ruamel"} | {re.split(r"[^\w-]", line)[0] for line in requires if "extra ==" not in line}
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others - {"torch", "filelock"}}:  # torch itself needs filelock
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, mdeq, {", ".join(name for name in MODULES if name.startswith("mdeq."))}
head = mdeq.ClassificationHeadConfig((4, 4), 8)
mdeq.Network(mdeq.MDEQConfig(channels=(8, 8)), head, 3)(torch.ones(2, 3, 8, 8)).logits.sum().backward()
print(mdeq.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "mdeq/__init__.py"), done.stderr


# dvc.yaml


@pytest.fixture(scope="module")
def stages() -> list[PipelineStage]:
    """The stages after templating, of a copy: DVC would write into the checkout."""
    with Repo(str(ROOT)) as repo:
        return [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]


def sections(stage: PipelineStage) -> set[str]:
    return {key for dep in stage.deps for key in getattr(dep, "params", ()) or ()}


def paths(entries: list[Any]) -> set[str]:
    return {os.path.relpath(entry.fs_path, ROOT) for entry in entries if not hasattr(entry, "params")}


def test_every_stage_is_in_the_table_and_reads_what_is_declared(stages: list[PipelineStage]) -> None:
    groups = set()
    for stage in stages:
        group, _, instance = stage.name.partition("@")
        if group == "scratch":
            continue
        groups.add(group)
        entry = STAGES[group]
        assert stage.cmd == f"python -m pipeline {entry.command.format(instance)}".strip()
        assert sections(stage) == ({entry.section.format(instance)} if entry.section else set()), stage.name
    assert groups == set(STAGES)


def test_every_instance_of_params_yaml_has_its_stages(stages: list[PipelineStage]) -> None:
    names = {stage.name for stage in stages}
    data = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    sets = {"cifar10": "classify", "imagenet": "pretrain", "cityscapes": "finetune"}
    expected = {f"prepare@{name}" for name in data["prepare"]}
    for dataset, stage in sets.items():
        expected |= {f"{stage}@{model}" for model in data[stage]}
        expected |= {f"evaluate-{dataset}@{model}" for model in data[stage]} | {f"convergence@{dataset}"}
    assert names == expected | {"scratch", "machine", "benchmark", "report"}


@pytest.mark.parametrize("group", sorted(set(STAGES) - {"prepare", "machine"}))
def test_a_stage_depends_on_the_code_it_uses(stages: list[PipelineStage], group: str) -> None:
    stage = next(stage for stage in stages if stage.name.partition("@")[0] == group)
    declared = {path for path in paths(stage.deps) if path.split("/")[0] in PACKAGES}
    module = f"pipeline.stages.{STAGES[group].command.split()[0]}"
    if module not in MODULES:
        pytest.fail(f"{module} is not written yet")
    used, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in used or name in PLUMBING or name not in MODULES:
            continue
        used.add(name)
        todo += imports(name)
    needed = {"mdeq" if name.startswith("mdeq") else str(MODULES[name].relative_to(ROOT)) for name in used}
    assert declared == needed
    if group in TRAINED_BY.values():  # by what an interrupted training knows that its code has changed
        (dataset,) = (name for name, trained_by in TRAINED_BY.items() if trained_by == group)
        hashed = {"mdeq" if file.startswith("mdeq/") else file for file in experiment.code(group, dataset)}
        assert hashed == declared


def test_only_sources_and_the_machine_are_looked_at_every_time(stages: list[PipelineStage]) -> None:
    always = {stage.name.partition("@")[0] for stage in stages if stage.always_changed}
    assert always == {"prepare", "machine"}


def test_no_output_is_kept_or_lies_outside_results(stages: list[PipelineStage]) -> None:
    for stage in stages:
        assert all(path.startswith("results/") for path in paths(stage.outs)), stage.name
        assert not any(out.persist for out in stage.outs), "persist switches the run cache off"


def test_metrics_and_plots_are_declared(stages: list[PipelineStage]) -> None:
    for stage in stages:
        group = stage.name.partition("@")[0]
        if group not in {"prepare", "scratch", "machine", "report"}:
            assert any(out.metric for out in stage.outs) and any(out.plot for out in stage.outs), stage.name


# What a change reruns: asked of the real DVC, on a copy whose results are stand-ins


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stages: list[PipelineStage]) -> Path:
    """A copy of the pipeline where every stage is up to date; code and results are stand-ins."""
    root = tmp_path_factory.mktemp("finished")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    outs = {out for stage in stages for out in paths(stage.outs)}
    code = {dep for stage in stages for dep in paths(stage.deps) if dep.split("/")[0] in PACKAGES}
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
    with contextlib.chdir(root), Repo(str(root)) as repo:  # DVC reads params.yaml from the working directory
        repo.commit(force=True)


def stale(root: Path) -> set[str]:
    """What `dvc repro` would run, less what it always runs: what `dvc status` names, its descendants."""
    with Repo(str(root)) as repo:
        status = repo.status()
        changed = {name for name, why in status.items() if why != ["always changed"]}
        graph = repo.index.graph  # edges point from a stage to what it needs
        return {
            stage.addressing
            for stage in graph.nodes
            if changed & {other.addressing for other in {stage, *nx.descendants(graph, stage)}}
        }


def change(root: Path, section: str, old: str, new: str) -> None:
    """Edit the first `old` after the section's heading."""
    head, heading, tail = (root / "params.yaml").read_text().partition(f"\n{section}:")
    assert heading and old in tail
    (root / "params.yaml").write_text(head + heading + tail.replace(old, new, 1))


CLASSIFY = {"classify@mdeq-small", "evaluate-cifar10@mdeq-small", "convergence@cifar10", "report"}
FINETUNE = {"finetune@mdeq-small", "evaluate-cityscapes@mdeq-small", "convergence@cityscapes", "report"}
PRETRAIN = {"pretrain@mdeq-small", "evaluate-imagenet@mdeq-small", "convergence@imagenet", *FINETUNE}


@pytest.mark.parametrize(
    ("section", "old", "new", "expected"),
    [
        ("classify", "epochs: ", "epochs: 9", CLASSIFY),
        ("pretrain", "epochs: ", "epochs: 9", PRETRAIN),
        ("finetune", "epochs: ", "epochs: 9", FINETUNE),
        (
            "evaluate",
            "cifar10: {batch: ",
            "cifar10: {batch: 9",
            {"evaluate-cifar10@mdeq-small", "evaluate-cifar10@resnet18-small", "report"},
        ),
        ("convergence", "steps: ", "steps: 9", {"convergence@cifar10", "report"}),
        ("benchmark", "rounds: ", "rounds: 9", {"benchmark", "report"}),
        ("classify", "    batch:", "    # a comment\n    batch:", set()),
    ],
)
def test_a_change_reruns_its_instance_and_what_builds_on_it_alone(
    pipeline: Path, section: str, old: str, new: str, expected: set[str]
) -> None:
    change(pipeline, section, old, new)
    assert stale(pipeline) == expected


def test_a_changed_source_reaches_what_was_trained_on_it(pipeline: Path) -> None:
    (pipeline / "results/data/imagenet/manifest.csv").write_text("path,split\nanother,train\n")
    assert stale(pipeline) == {"prepare@imagenet", *PRETRAIN}


def test_another_machine_measures_again(pipeline: Path) -> None:
    (pipeline / "results/machine.json").write_text("{}")
    assert stale(pipeline) == {"machine", "benchmark", "report"}


def test_a_model_from_scratch_builds_on_no_backbone(pipeline: Path) -> None:
    change(pipeline, "finetune", "backbone: mdeq-small", "backbone: null")
    assert stale(pipeline) == FINETUNE
    commit(pipeline)
    change(pipeline, "pretrain", "epochs: ", "epochs: 9")
    assert stale(pipeline) == (PRETRAIN - FINETUNE) | {"report"}


def test_a_model_added_to_params_yaml_adds_its_stages(pipeline: Path) -> None:
    text = (pipeline / "params.yaml").read_text()
    data = YAML(typ="safe").load(text)
    data["classify"]["another"] = data["classify"]["mdeq-small"]
    with (pipeline / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(data, file)
    assert stale(pipeline) == {"classify@another", "evaluate-cifar10@another", "report"}
